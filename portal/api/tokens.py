"""Tokens: what agents enrol with and programs call the API with.

The text of a token is in the answer to its creation and nowhere else; the portal keeps a hash.
A token of the API makes none that may do more than itself: its scopes, its lifetime and where it
may be used from bound those of the new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from ipaddress import ip_network
from typing import Annotated, Any
from uuid import UUID

import msgspec
from litestar import Request, delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from actors.model import MAX_SCOPES, NameField, Principal, Scope, Token, TokenKind
from actors.store.interface import Repeated
from channel.credentials import SECRET_BYTES, encode_token, hash_token
from portal.api.authentication import Caller
from portal.api.call import Call
from portal.api.feeds import Feeds
from portal.api.filters import filters
from portal.api.inject import PathId, TheCall, TheCaller, TheFilters, TheOffice, ThePage
from portal.api.office import ACCOUNT_HEADER, Desk, Office, provide_desk
from portal.api.pagination import Page
from portal.api.problems import FieldError, Problem, invalid
from portal.api.requests import Body, Checks, Cidrs, Instant, changes_of
from portal.api.scopes import exceeding, missing, noun, unknown
from runtime.service import get_logger

log = get_logger("portal.api")

OWNERS = {
    "client": "principal_id",
    "api": "principal_id",
    "gateway": "site_id",
    "relay": None,
    "operator": None,
}
"""Which field names the owner of a token of each kind; those without one are the installation's."""

Scopes = Annotated[
    tuple[Scope, ...],
    Meta(
        min_length=1,
        max_length=MAX_SCOPES,
        description="What an `api` token may do: `<noun>:read` or `<noun>:write` (which includes"
        " reading), with the nouns of the paths, or `*` for all of them.",
    ),
]


class TokenCreate(Body, frozen=True, kw_only=True):
    """A new token.

    `client` and `api` tokens want a `principal_id`, `gateway` tokens a `site_id`; `relay` and
    `operator` tokens belong to the installation and are for operators. `max_uses` (enrolments of
    devices) and `approves_devices` are for gateways, `scopes` for `api` tokens (by default those
    of the token that makes it), `allowed_sources` for all kinds.
    """

    kind: TokenKind
    name: NameField
    principal_id: UUID | None = None
    site_id: UUID | None = None
    scopes: Scopes | None = None
    expires_at: Instant | None = None
    max_uses: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    allowed_sources: Cidrs = ()
    approves_devices: bool = True


class TokenUpdate(Body, frozen=True, kw_only=True):
    """Takes effect with the next call of the API; agents that are connected stay so."""

    name: NameField | UnsetType = UNSET
    scopes: Scopes | UnsetType = UNSET
    expires_at: Instant | UnsetType | None = UNSET
    allowed_sources: Cidrs | UnsetType = UNSET


class TokenView(msgspec.Struct, frozen=True, kw_only=True):
    """A token as it can be seen afterwards. `last_used_at` is when an agent joined or a program
    called with it, to the minute; null if nobody did."""

    id: UUID
    account_id: UUID | None
    kind: TokenKind
    name: str
    principal_id: UUID | None
    site_id: UUID | None
    auth_provider_id: UUID | None
    scopes: tuple[str, ...]
    expires_at: datetime | None
    max_uses: int | None
    allowed_sources: tuple[str, ...]
    approves_devices: bool
    created_at: datetime
    last_used_at: datetime | None

    @classmethod
    def of(cls, token: Token, last_used_at: datetime | None = None) -> TokenView:
        own = {
            name: getattr(token, name)
            for name in TokenView.__struct_fields__
            if name != "last_used_at"
        }
        return cls(last_used_at=last_used_at, **own)


class TokenCreated(TokenView, frozen=True, kw_only=True, omit_defaults=True):
    """The only answer that holds the `token` itself, which names the portal and pins its CA. Where
    the answer to an `Idempotency-Key` is given again, `token` is null and `token_withheld` says
    why."""

    token: str | None
    token_withheld: str = ""


@get("/", opt=filters(Token, "kind", "name", "principal_id", "site_id", "auth_provider_id"))
async def list_tokens(
    request: Request[Any, Any, Any],
    office: TheOffice,
    caller: TheCaller,
    call: TheCall,
    page: ThePage,
    filters: TheFilters,
) -> Page[TokenView]:
    """List the tokens of the account. An operator who names none gets those of the installation."""
    if caller.kind == "operator" and ACCOUNT_HEADER not in request.headers:
        account_id = None
        tokens = await office.store.installation_tokens(
            after=page.after_id(), limit=page.limit, equals=filters
        )
        found = page.page(tokens, tokens[-1].id if tokens else None)
    else:
        desk = await provide_desk(request, office, caller, call)
        account_id = desk.account_id
        found = await desk.list(Token, page, filters)
    used = await office.store.last_used(account_id, [token.id for token in found.items])
    return found.of(lambda token: TokenView.of(token, used.get(token.id)))


@get("/{id:uuid}")
async def get_token(
    request: Request[Any, Any, Any],
    office: TheOffice,
    caller: TheCaller,
    call: TheCall,
    id: PathId,
) -> TokenView:
    """Show a token. Operators also see those of the installation."""
    token = await _installation_token(office, caller, id)
    if token is None:
        token = await (await provide_desk(request, office, caller, call)).get(Token, id)
    used = await office.store.last_used(token.account_id, [id])
    call.show(token, used.get(id))
    return TokenView.of(token, used.get(id))


@post("/")
async def create_token(
    request: Request[Any, Any, Any],
    office: TheOffice,
    caller: TheCaller,
    call: TheCall,
    data: JSONBody[TokenCreate],
) -> TokenCreated:
    """Create a token. Its text is shown now and never again."""
    if OWNERS[data.kind] is None:
        return await _create_installation_token(office, caller, call, data)
    return await create_token_at(await provide_desk(request, office, caller, call), data)


@patch("/{id:uuid}")
async def update_token(
    request: Request[Any, Any, Any],
    office: TheOffice,
    caller: TheCaller,
    call: TheCall,
    id: PathId,
    data: JSONBody[TokenUpdate],
) -> TokenView:
    """Change a token of an account: its name, and within the caller's own bounds what it may do.
    One that may do more than the caller is renamed at most. Those of the installation are not
    changed but replaced."""
    desk = await provide_desk(request, office, caller, call)
    checks = Checks()
    given = changes_of(data)
    if "expires_at" in given:
        given["expires_at"] = checks.future("expires_at", given["expires_at"], desk.now)
    if "allowed_sources" in given:
        given["allowed_sources"] = checks.networks("allowed_sources", given["allowed_sources"])
    if "scopes" in given:
        given["scopes"] = _scopes(checks, given["scopes"])
    checks.finish()

    def changes(token: Token) -> dict[str, Any]:
        checks = Checks()
        if "scopes" in given and token.kind != "api":
            checks.refuse("scopes", "are for api tokens")
        if token.kind == "api" and given.keys() - {"name"}:
            _check_bounds(checks, caller, **({"scopes": token.scopes} | given))
        checks.finish()
        return given

    token = await desk.update(Token, id, changes)
    used = await office.store.last_used(token.account_id, [id])
    call.show(token, used.get(id))
    return TokenView.of(token, used.get(id))


@delete("/{id:uuid}")
async def delete_token(
    request: Request[Any, Any, Any],
    office: TheOffice,
    caller: TheCaller,
    call: TheCall,
    id: PathId,
) -> None:
    """Delete a token; agents and programs that use it are turned away at once.

    Operators also delete those of the installation: relays that joined by it go with it. The last
    token of an operator stays (409 `last_operator_token`).
    """
    token = await _installation_token(office, caller, id)
    if token is None:
        await (await provide_desk(request, office, caller, call)).remove(Token, id)
        return
    call.check(token)
    await office.store.remove_installation_token(id, at=office.clock.utc_now())
    log.info("installation_token_deleted", kind=token.kind, id=str(id), who=caller.who)
    office.live.wake_relays()
    feeds: Feeds = request.app.state.feeds
    feeds.recheck_operators()


async def create_token_at(desk: Desk, data: TokenCreate) -> TokenCreated:
    """Create a token of an account. Raises Problem for what its kind does not allow."""
    if OWNERS[data.kind] is None:
        raise Problem(
            403,
            "operators_only",
            f"A token of the kind {data.kind} belongs to the installation: POST /v1/tokens.",
        )
    token, text = _make(desk.office, desk.caller, data, account_id=desk.account_id)
    if token.kind == "api":
        await _check_admin(desk, token)
    created = _shown(token, text)
    await desk.create(token, shown=created)
    return created


async def _installation_token(office: Office, caller: Caller, id: UUID) -> Token | None:
    """A relay's or operator's token, for operators."""
    if caller.kind != "operator":
        return None
    token = await office.store.find_token(id)
    return token if token is not None and token.account_id is None else None


async def _create_installation_token(
    office: Office, caller: Caller, call: Call, data: TokenCreate
) -> TokenCreated:
    if caller.kind != "operator":
        raise Problem(403, "operators_only", f"Only an operator may make {data.kind} tokens.")
    token, text = _make(office, caller, data, account_id=None)
    created = _shown(token, text)
    claim, now = call.claim, office.clock.utc_now()
    answer = None if claim is None else claim.answer(201, created, now)
    try:
        await office.store.put_installation_token(token, answer=answer)
    except Repeated as repeated:
        assert claim is not None
        raise claim.replay(repeated.record) from None
    log.info("installation_token_created", kind=token.kind, id=str(token.id), who=caller.who)
    call.show(token)
    return created


async def _check_admin(desk: Desk, token: Token) -> None:
    assert token.principal_id is not None
    principal = await desk.refer(Principal, token.principal_id, "principal_id")
    if principal.role != "admin":
        raise invalid(
            FieldError(field="principal_id", message="must name an admin; the API is for admins")
        )


def _make(
    office: Office, caller: Caller, data: TokenCreate, *, account_id: UUID | None
) -> tuple[Token, str]:
    now = office.clock.utc_now()
    checks = Checks()
    _check_kind(checks, data)
    expires_at = checks.future("expires_at", data.expires_at, now)
    allowed_sources = checks.networks("allowed_sources", data.allowed_sources)
    scopes: tuple[str, ...] = ()
    if data.kind == "api":
        scopes = _scopes(checks, data.scopes) or caller.scopes
        expires_at = expires_at or caller.expires_at
        allowed_sources = allowed_sources or caller.allowed_sources
        _check_bounds(
            checks, caller, scopes=scopes, expires_at=expires_at, allowed_sources=allowed_sources
        )
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
        scopes=scopes,
        expires_at=expires_at,
        max_uses=data.max_uses,
        allowed_sources=allowed_sources,
        approves_devices=data.approves_devices,
        created_at=now,
    )
    return token, encode_token(data.kind, id, secret, office.portal, office.pin).reveal_text()


def _check_kind(checks: Checks, data: TokenCreate) -> None:
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
    if data.kind != "api" and data.scopes is not None:
        checks.refuse("scopes", "are for api tokens")


def _scopes(checks: Checks, scopes: Sequence[str] | None) -> tuple[str, ...]:
    """Each once, and of a noun that there is."""
    for scope in unknown(scopes or ()):
        checks.refuse("scopes", f"{scope} is of no noun; the nouns are those of the paths")
    return tuple(dict.fromkeys(scopes or ()))


def _check_bounds(
    checks: Checks,
    caller: Caller,
    *,
    scopes: Sequence[str] = (),
    allowed_sources: Sequence[str] | None = None,
    **other: object,
) -> None:
    """What a token may hand on of what it has itself. Raises Problem 403 for a scope it lacks."""
    if lacking := exceeding(scopes, caller.scopes):
        raise missing(lacking[0])
    if caller.kind == "operator":
        return
    if "expires_at" in other and caller.expires_at is not None:
        expires_at = other["expires_at"]
        if not isinstance(expires_at, datetime) or expires_at > caller.expires_at:
            checks.refuse("expires_at", "must not be later than that of the token you use")
    if allowed_sources is not None and caller.allowed_sources:
        own = [ip_network(each) for each in caller.allowed_sources]
        for text in allowed_sources:
            network = _network(text)
            if network is not None and not any(
                network.version == each.version and network.subnet_of(each) for each in own
            ):
                checks.refuse("allowed_sources", f"{text} lies outside those of the token you use")
        if not allowed_sources:
            checks.refuse("allowed_sources", "must lie within those of the token you use")


def _network(text: str) -> Any:
    try:
        return ip_network(text)
    except ValueError:
        return None  # refused already


def _shown(token: Token, text: str) -> TokenCreated:
    seen = TokenView.of(token)
    return TokenCreated(
        **{name: getattr(seen, name) for name in TokenView.__struct_fields__}, token=text
    )


router = noun("tokens", list_tokens, get_token, create_token, update_token, delete_token)
