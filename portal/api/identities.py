"""Identities: a principal as a provider knows it, by issuer and subject, never by e-mail."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from litestar import delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from actors.model import AuthProvider, Identity, Principal
from portal.api.filters import filters
from portal.api.inject import PathId, TheDesk, TheFilters, ThePage
from portal.api.pagination import Page
from portal.api.requests import Body, Checks, changes_of
from portal.api.scopes import noun

PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]+$(?!\n)"
Issuer = Annotated[str, Meta(min_length=1, max_length=512, pattern=PRINTABLE)]
Subject = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=255,
        pattern=PRINTABLE,
        description="What the provider calls the person: `sub`, for Entra the object id.",
    ),
]


class IdentityCreate(Body, frozen=True, kw_only=True):
    """Whoever signs in by this provider as this subject is this principal. `issuer` is the
    provider's own unless it has none."""

    principal_id: UUID
    auth_provider_id: UUID
    subject: Subject
    issuer: Issuer | None = None


class IdentityUpdate(Body, frozen=True, kw_only=True):
    """Another principal. Whatever was signed in before stays with the former one."""

    principal_id: UUID | UnsetType = UNSET


@get("/", opt=filters(Identity, "principal_id", "auth_provider_id", "issuer", "subject"))
async def list_identities(desk: TheDesk, page: ThePage, filters: TheFilters) -> Page[Identity]:
    """List identities."""
    return await desk.list(Identity, page, filters)


@get("/{id:uuid}")
async def get_identity(desk: TheDesk, id: PathId) -> Identity:
    """Show an identity."""
    return await desk.show(Identity, id)


@post("/")
async def create_identity(desk: TheDesk, data: JSONBody[IdentityCreate]) -> Identity:
    """Create an identity. Provider, issuer and subject are unique together."""
    provider = await desk.refer(AuthProvider, data.auth_provider_id, "auth_provider_id")
    await desk.refer(Principal, data.principal_id, "principal_id")
    checks = Checks()
    issuer = data.issuer or provider.issuer
    if issuer is None:
        checks.refuse("issuer", "is required, as the provider names none")
    elif provider.issuer not in (None, issuer):
        checks.refuse("issuer", "is not the provider's")
    checks.finish()
    return await desk.create(
        Identity(
            id=desk.new_id(),
            account_id=desk.account_id,
            principal_id=data.principal_id,
            auth_provider_id=data.auth_provider_id,
            issuer=issuer or "",
            subject=data.subject,
            created_at=desk.now,
        )
    )


@patch("/{id:uuid}")
async def update_identity(desk: TheDesk, id: PathId, data: JSONBody[IdentityUpdate]) -> Identity:
    """Give an identity to another principal."""
    return await desk.update(Identity, id, changes_of(data))


@delete("/{id:uuid}")
async def delete_identity(desk: TheDesk, id: PathId) -> None:
    """Delete an identity: nobody signs in by it any more."""
    await desk.remove(Identity, id)


router = noun(
    "identities",
    list_identities,
    get_identity,
    create_identity,
    update_identity,
    delete_identity,
)
