"""Providers by which people sign in: OpenID Connect issuers, and one-time passwords by e-mail.

A client secret goes in and never comes out: it is sealed before it reaches the store.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from actors.model import AuthProvider, NameField
from portal.api.filters import filters
from portal.api.inject import PathId, TheDesk, TheFilters, ThePage
from portal.api.pagination import Page
from portal.api.requests import Body, Checks, SecretText, changes_of
from portal.api.scopes import noun

GOOGLE_ISSUER = "https://accounts.google.com"

Kind = Literal["oidc", "google", "okta", "entra", "email"]
Context = Literal["clients", "portal", "both"]
IssuerUrl = Annotated[str, Meta(max_length=512, pattern=r"^https://[!-~]+$(?!\n)")]
ClientId = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[ -~]+$(?!\n)")]
ClientSession = Annotated[
    int, Meta(ge=3_600, le=90 * 86_400, description="Seconds that a client stays signed in.")
]
PortalSession = Annotated[
    int, Meta(ge=300, le=86_400, description="Seconds that an admin stays signed in.")
]


class AuthProviderCreate(Body, frozen=True, kw_only=True):
    """A way to sign in. All but `email` want a `client_id`, and but for `google` an `issuer`."""

    kind: Kind
    name: NameField
    issuer: IssuerUrl | None = None
    client_id: ClientId | None = None
    client_secret: SecretText | None = None
    context: Context = "both"
    client_session_s: ClientSession = 7 * 86_400
    portal_session_s: PortalSession = 8 * 3_600


class AuthProviderUpdate(Body, frozen=True, kw_only=True):
    """`client_secret` replaces the one that is kept; null forgets it."""

    name: NameField | UnsetType = UNSET
    issuer: IssuerUrl | UnsetType = UNSET
    client_id: ClientId | UnsetType = UNSET
    client_secret: SecretText | UnsetType | None = UNSET
    context: Context | UnsetType = UNSET
    client_session_s: ClientSession | UnsetType = UNSET
    portal_session_s: PortalSession | UnsetType = UNSET
    disabled: bool | UnsetType = UNSET


class AuthProviderView(msgspec.Struct, frozen=True, kw_only=True):
    """A provider. Of its secret there is only whether one is kept."""

    id: UUID
    account_id: UUID
    kind: Kind
    name: str
    issuer: str | None
    client_id: str | None
    has_client_secret: bool
    context: Context
    client_session_s: int
    portal_session_s: int
    disabled: bool
    created_at: datetime

    @classmethod
    def of(cls, provider: AuthProvider) -> AuthProviderView:
        fields = {
            name: getattr(provider, name)
            for name in cls.__struct_fields__
            if name != "has_client_secret"
        }
        return cls(has_client_secret=provider.client_secret is not None, **fields)


@get("/", opt=filters(AuthProvider, "name", "kind", "context", "disabled"))
async def list_auth_providers(
    desk: TheDesk, page: ThePage, filters: TheFilters
) -> Page[AuthProviderView]:
    """List providers."""
    return (await desk.list(AuthProvider, page, filters)).of(AuthProviderView.of)


@get("/{id:uuid}")
async def get_auth_provider(desk: TheDesk, id: PathId) -> AuthProviderView:
    """Show a provider."""
    return AuthProviderView.of(await desk.show(AuthProvider, id))


@post("/")
async def create_auth_provider(
    desk: TheDesk, data: JSONBody[AuthProviderCreate]
) -> AuthProviderView:
    """Create a provider."""
    id = desk.new_id()
    provider = AuthProvider(
        id=id,
        account_id=desk.account_id,
        kind=data.kind,
        name=data.name,
        issuer=data.issuer or (GOOGLE_ISSUER if data.kind == "google" else None),
        client_id=data.client_id,
        client_secret=desk.seal(data.client_secret, "auth_provider", "client_secret", id),
        context=data.context,
        client_session_s=data.client_session_s,
        portal_session_s=data.portal_session_s,
        created_at=desk.now,
    )
    _check(provider)
    view = AuthProviderView.of(provider)
    await desk.create(provider, shown=view)
    return view


@patch("/{id:uuid}")
async def update_auth_provider(
    desk: TheDesk, id: PathId, data: JSONBody[AuthProviderUpdate]
) -> AuthProviderView:
    """Change a provider."""
    changes = changes_of(data)
    if "client_secret" in changes:
        changes["client_secret"] = desk.seal(
            changes["client_secret"], "auth_provider", "client_secret", id
        )

    def checked(provider: AuthProvider) -> dict[str, Any]:
        _check(provider, changes)
        return changes

    return AuthProviderView.of(await desk.update(AuthProvider, id, checked))


@delete("/{id:uuid}")
async def delete_auth_provider(desk: TheDesk, id: PathId) -> None:
    """Delete a provider with its identities, and the tokens that were made by signing in with it:
    whoever did is signed out at once."""
    await desk.remove(AuthProvider, id)


def _check(provider: AuthProvider, changes: dict[str, Any] | None = None) -> None:
    """Raises Problem for what the kind does not allow."""
    checks = Checks()
    after = {name: getattr(provider, name) for name in ("issuer", "client_id", "client_secret")}
    after |= changes or {}
    for field in ("issuer", "client_id", "client_secret"):
        given = after[field] is not None
        if provider.kind == "email" and given:
            checks.refuse(field, "one-time passwords by e-mail have none")
        if provider.kind != "email" and not given and field != "client_secret":
            checks.refuse(field, f"a provider of the kind {provider.kind} needs one")
    if provider.kind == "google" and after["issuer"] != GOOGLE_ISSUER:
        checks.refuse("issuer", f"of Google is {GOOGLE_ISSUER}")
    checks.finish()


router = noun(
    "auth_providers",
    list_auth_providers,
    get_auth_provider,
    create_auth_provider,
    update_auth_provider,
    delete_auth_provider,
)
