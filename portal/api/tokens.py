"""Tokens: what agents enrol with and programs call the API with.

The text of a token is in the answer to its creation and nowhere else; the portal keeps a hash.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Request, Router, delete, get, post
from litestar.params import JSONBody
from msgspec import Meta

from actors.model import NameField, Principal, Token, TokenKind
from channel.credentials import SECRET_BYTES, encode_token, hash_token
from portal.api.authentication import Caller
from portal.api.inject import PathId, TheCaller, TheOffice, ThePage
from portal.api.office import ACCOUNT_HEADER, Desk, Office, provide_desk
from portal.api.pagination import Page
from portal.api.problems import FieldError, Problem, invalid, not_found
from portal.api.requests import Body, Checks, Cidrs, Instant
from runtime.service import get_logger

log = get_logger("portal.api")

OWNERS = {"client": "principal_id", "api": "principal_id", "gateway": "site_id", "relay": None}
"""Which field names the owner of a token of each kind."""


class TokenCreate(Body, frozen=True, kw_only=True):
    """A new token.

    `client` and `api` tokens want a `principal_id`, `gateway` tokens a `site_id`; `relay` tokens
    belong to the installation and are for operators. `max_uses` (enrolments of devices) and
    `approves_devices` are for gateways, `allowed_sources` for all kinds.
    """

    kind: Literal["client", "gateway", "relay", "api"]
    name: NameField
    principal_id: UUID | None = None
    site_id: UUID | None = None
    expires_at: Instant | None = None
    max_uses: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    allowed_sources: Cidrs = ()
    approves_devices: bool = True


class TokenView(msgspec.Struct, frozen=True, kw_only=True):
    """A token as it can be seen afterwards."""

    id: UUID
    account_id: UUID | None
    kind: TokenKind
    name: str
    principal_id: UUID | None
    site_id: UUID | None
    expires_at: datetime | None
    max_uses: int | None
    allowed_sources: tuple[str, ...]
    approves_devices: bool
    created_at: datetime

    @classmethod
    def of(cls, token: Token) -> TokenView:
        return cls(**{name: getattr(token, name) for name in TokenView.__struct_fields__})


class TokenCreated(TokenView, frozen=True, kw_only=True):
    """The only answer that holds the `token` itself. It names the portal and pins its CA."""

    token: str


@get("/")
async def list_tokens(
    request: Request[Any, Any, Any],
    office: TheOffice,
    caller: TheCaller,
    page: ThePage,
) -> Page[TokenView]:
    """List the tokens of the account. An operator who names none gets those of the installation."""
    if caller.kind == "operator" and ACCOUNT_HEADER not in request.headers:
        tokens = await office.store.installation_tokens(after=page.after_id(), limit=page.limit)
        found = page.page(tokens, tokens[-1].id if tokens else None)
    else:
        found = await (await provide_desk(request, office, caller)).list(Token, page)
    return Page(items=tuple(map(TokenView.of, found.items)), next_cursor=found.next_cursor)


@get("/{id:uuid}")
async def get_token(
    request: Request[Any, Any, Any],
    office: TheOffice,
    caller: TheCaller,
    id: PathId,
) -> TokenView:
    """Show a token. Operators also see those of the installation."""
    token = await _installation_token(office, caller, id)
    if token is not None:
        return TokenView.of(token)
    desk = await provide_desk(request, office, caller)
    return TokenView.of(await desk.get(Token, id))


@post("/")
async def create_token(
    request: Request[Any, Any, Any],
    office: TheOffice,
    caller: TheCaller,
    data: JSONBody[TokenCreate],
) -> TokenCreated:
    """Create a token. Its text is shown now and never again."""
    if data.kind == "relay":
        return await _create_relay_token(office, caller, data)
    return await create_token_at(await provide_desk(request, office, caller), data)


@delete("/{id:uuid}")
async def delete_token(
    request: Request[Any, Any, Any],
    office: TheOffice,
    caller: TheCaller,
    id: PathId,
) -> None:
    """Delete a token; agents and programs that use it are turned away at once.

    Operators also delete those of the installation: relays that joined by it go with it. The last
    token of an operator stays (409 `last_operator_token`).
    """
    token = await _installation_token(office, caller, id)
    if token is None:
        await (await provide_desk(request, office, caller)).remove("token", id)
        return
    await office.store.remove_installation_token(id, at=office.clock.utc_now())
    log.info("installation_token_deleted", kind=token.kind, id=str(id), who=caller.who)
    office.live.wake_relays()


async def create_token_at(desk: Desk, data: TokenCreate) -> TokenCreated:
    """Create a token of an account. Raises Problem for what its kind does not allow."""
    if data.kind == "relay":
        raise Problem(
            403, "operators_only", "A relay token belongs to the installation: POST /v1/tokens."
        )
    token, text = _make(desk.office, data, account_id=desk.account_id)
    if token.kind == "api":
        await _check_admin(desk, token)
    await desk.create(token)
    return _shown(token, text)


async def _installation_token(office: Office, caller: Caller, id: UUID) -> Token | None:
    """A relay's or operator's token, for operators."""
    if caller.kind != "operator":
        return None
    token = await office.store.find_token(id)
    return token if token is not None and token.account_id is None else None


async def _create_relay_token(office: Office, caller: Caller, data: TokenCreate) -> TokenCreated:
    if caller.kind != "operator":
        raise Problem(403, "operators_only", "Only an operator may make relay tokens.")
    token, text = _make(office, data, account_id=None)
    await office.store.put_installation_token(token)
    return _shown(token, text)


async def _check_admin(desk: Desk, token: Token) -> None:
    assert token.principal_id is not None
    try:
        principal = await desk.get(Principal, token.principal_id)
    except Problem:
        error = FieldError(field="principal_id", message="names nothing in this account")
        problem = not_found("principal")
        problem.errors = (error,)
        raise problem from None
    if principal.role != "admin":
        raise invalid(
            FieldError(field="principal_id", message="must name an admin; the API is for admins")
        )


def _make(office: Office, data: TokenCreate, *, account_id: UUID | None) -> tuple[Token, str]:
    now = office.clock.utc_now()
    checks = Checks()
    owner = OWNERS[data.kind]
    for field in ("principal_id", "site_id"):
        given = getattr(data, field) is not None
        if given and field != owner:
            checks.refuse(field, f"a {data.kind} token has none")
        if not given and field == owner:
            checks.refuse(field, f"a {data.kind} token needs one")
    if data.kind != "gateway":
        if data.max_uses is not None:
            checks.refuse("max_uses", "is for gateway tokens")
        if not data.approves_devices:
            checks.refuse("approves_devices", "is for gateway tokens")
    expires_at = checks.future("expires_at", data.expires_at, now)
    allowed_sources = checks.networks("allowed_sources", data.allowed_sources)
    checks.finish()
    id, secret = office.new_id(), office.randomness.bytes(SECRET_BYTES)
    token = Token(
        id=id,
        account_id=account_id,
        kind=data.kind,
        name=data.name,
        hash=hash_token(data.kind, id, secret),
        principal_id=data.principal_id,
        site_id=data.site_id,
        expires_at=expires_at,
        max_uses=data.max_uses,
        allowed_sources=allowed_sources,
        approves_devices=data.approves_devices,
        created_at=now,
    )
    return token, encode_token(data.kind, id, secret, office.portal, office.pin).reveal_text()


def _shown(token: Token, text: str) -> TokenCreated:
    seen = TokenView.of(token)
    return TokenCreated(
        **{name: getattr(seen, name) for name in TokenView.__struct_fields__}, token=text
    )


router = Router(
    "/v1/tokens",
    route_handlers=[list_tokens, get_token, create_token, delete_token],
    tags=["tokens"],
)
