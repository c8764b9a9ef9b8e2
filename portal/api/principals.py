"""Principals: users and service accounts."""

from __future__ import annotations

from typing import Annotated, Literal

from litestar import delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from actors.model import NameField, Principal
from portal.api.filters import filters
from portal.api.inject import PathId, TheDesk, TheFilters, ThePage
from portal.api.pagination import Page
from portal.api.requests import Body, changes_of
from portal.api.scopes import noun

Email = Annotated[str, Meta(max_length=254, pattern=r"^[^\x00-\x20\x7f@]+@[^\x00-\x20\x7f@]+$")]


class PrincipalCreate(Body, frozen=True, kw_only=True):
    """A user or a service account. Admins may use the API by a token of their own."""

    name: NameField
    kind: Literal["user", "service_account"] = "user"
    role: Literal["admin", "member"] = "member"
    email: Email | None = None


class PrincipalUpdate(Body, frozen=True, kw_only=True):
    """A disabled principal loses every access at once."""

    name: NameField | UnsetType = UNSET
    role: Literal["admin", "member"] | UnsetType = UNSET
    email: Email | UnsetType | None = UNSET
    disabled: bool | UnsetType = UNSET


@get("/", opt=filters(Principal, "name", "kind", "role", "email", "disabled"))
async def list_principals(desk: TheDesk, page: ThePage, filters: TheFilters) -> Page[Principal]:
    """List principals."""
    return await desk.list(Principal, page, filters)


@get("/{id:uuid}")
async def get_principal(desk: TheDesk, id: PathId) -> Principal:
    """Show a principal."""
    return await desk.show(Principal, id)


@post("/")
async def create_principal(desk: TheDesk, data: JSONBody[PrincipalCreate]) -> Principal:
    """Create a principal."""
    return await desk.create(
        Principal(
            id=desk.new_id(),
            account_id=desk.account_id,
            kind=data.kind,
            role=data.role,
            name=data.name,
            email=data.email,
            created_at=desk.now,
        )
    )


@patch("/{id:uuid}")
async def update_principal(desk: TheDesk, id: PathId, data: JSONBody[PrincipalUpdate]) -> Principal:
    """Change a principal."""
    return await desk.update(Principal, id, changes_of(data))


@delete("/{id:uuid}")
async def delete_principal(desk: TheDesk, id: PathId) -> None:
    """Delete a principal with its memberships, identities, tokens, clients and policy tests."""
    await desk.remove(Principal, id)


router = noun(
    "principals",
    list_principals,
    get_principal,
    create_principal,
    update_principal,
    delete_principal,
)
