"""Who calls: bearer tokens (RFC 6750) of the kinds `api` and `operator`.

An `api` token acts for one account, as long as its principal is an enabled admin of an enabled
account. An `operator` token acts for the installation, and on one account where the call names it.
Only the hash of a token is kept, and compared in constant time. A source that fails too often is
asked to wait; tokens that were good before still pass, so that nobody locks out a neighbour.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from ipaddress import IPv6Address, IPv6Network, ip_network
from typing import Any, Final, Literal
from uuid import UUID

import attrs
from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler

from actors.model import Account, Principal, Token
from actors.store.interface import NotFound, Store
from channel.credentials import InvalidToken, decode_token
from portal.api.limits import TokenBuckets
from portal.api.problems import Problem, too_many
from portal.api.requests import canonical_source
from runtime.clock import Clock

CALLS_PER_S: Final = 50.0
CALLS_BURST: Final = 200
FAILURES_PER_S: Final = 0.5
FAILURES_BURST: Final = 20
MAX_REMEMBERED_TOKENS: Final = 1_000
MAX_HEADER_CHARACTERS: Final = 1_024
PUBLIC: Final = "public"
"""A route with this entry in its `opt` is served without a token."""


@attrs.frozen(kw_only=True)
class Caller:
    """Whom a good token stands for. `account_id` is None for an operator."""

    token_id: UUID
    kind: Literal["api", "operator"]
    account_id: UUID | None
    principal_id: UUID | None

    @property
    def who(self) -> str:
        """How changes name the caller."""
        return f"token {self.token_id}"


class Authenticator:
    """Tells who calls, and limits how often: `calls_per_s` for each token, FAILURES_PER_S of
    failed attempts for each source (an IPv4 address or an IPv6 /64)."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        calls_per_s: float = CALLS_PER_S,
        calls_burst: int = CALLS_BURST,
    ) -> None:
        self._store = store
        self._clock = clock
        self._calls_per_s = calls_per_s
        self._calls = TokenBuckets(rate_per_s=calls_per_s, burst=calls_burst)
        self._failures = TokenBuckets(rate_per_s=FAILURES_PER_S, burst=FAILURES_BURST)
        self._good_hashes: OrderedDict[bytes, None] = OrderedDict()

    async def authenticate(self, authorization: str | None, source: str) -> Caller:
        """The caller behind an `Authorization` header that came from this address.

        Raises Problem: 401 without a good token, 403 for a token that may not use the API, 429
        for too many calls or failures; and what the store raises.
        """
        token = await self._identify(authorization, source)
        wait_ns = self._calls.take(token.id, self._clock.monotonic_ns())
        if wait_ns:
            detail = f"This token made too many calls. Keep below {self._calls_per_s:g} a second."
            raise too_many("rate_limited", detail, wait_ns)
        if token.kind not in ("api", "operator"):
            raise Problem(
                403,
                "wrong_token_kind",
                f"This is a {token.kind} token, for an agent. The API wants an api token.",
            )
        _check_source(token, source)
        if token.kind == "api":
            await self._check_owner(token)
        return Caller(
            token_id=token.id,
            kind=token.kind,
            account_id=token.account_id,
            principal_id=token.principal_id,
        )

    async def _identify(self, authorization: str | None, source: str) -> Token:
        """The known, unexpired token in the header; failures count against the source."""
        if authorization is None:
            raise _unauthorized(
                "missing_token", "Send the header `Authorization: Bearer <your api token>`."
            )
        scheme, _, text = authorization.partition(" ")
        network, now_ns = _network_of(source), self._clock.monotonic_ns()
        if scheme.lower() != "bearer" or len(authorization) > MAX_HEADER_CHARACTERS:
            raise self._failed(network, "invalid_token", "The header must be `Bearer <token>`.")
        try:
            given = decode_token(text)
        except InvalidToken as error:
            raise self._failed(network, "invalid_token", f"Refused: {error}.") from None
        wait_ns = self._failures.wait_ns(network, now_ns)
        if wait_ns and given.hash not in self._good_hashes:
            raise too_many("too_many_failures", "Too many failed attempts; wait.", wait_ns)
        token = await self._store.find_token(given.id)
        if token is None or not hmac.compare_digest(given.hash, token.hash):
            detail = "The token is unknown here; it may have been deleted. Use another."
            raise self._failed(network, "invalid_token", detail)
        if token.expires_at is not None and token.expires_at <= self._clock.utc_now():
            raise self._failed(network, "token_expired", "The token has expired. Make another.")
        self._good_hashes[given.hash] = None
        self._good_hashes.move_to_end(given.hash)
        if len(self._good_hashes) > MAX_REMEMBERED_TOKENS:
            self._good_hashes.popitem(last=False)
        return token

    async def _check_owner(self, token: Token) -> None:
        assert token.account_id is not None
        assert token.principal_id is not None
        try:
            account = await self._store.get(token.account_id, "account", token.account_id)
            principal = await self._store.get(token.account_id, "principal", token.principal_id)
        except NotFound:
            raise _unauthorized("invalid_token", "The token's owner is gone.") from None
        assert isinstance(account, Account)
        assert isinstance(principal, Principal)
        if account.disabled:
            raise Problem(403, "account_disabled", "The account is disabled. Ask its operator.")
        if principal.disabled:
            raise Problem(403, "principal_disabled", "The token's owner is disabled.")
        if principal.role != "admin":
            raise Problem(403, "not_admin", "The token's owner is no admin. Use an admin's token.")

    def _failed(self, network: str, code: str, detail: str) -> Problem:
        """Counts a failure; the problem is 429 once the source has none left."""
        wait_ns = self._failures.take(network, self._clock.monotonic_ns())
        if wait_ns:
            return too_many("too_many_failures", "Too many failed attempts; wait.", wait_ns)
        return _unauthorized(code, detail)


async def require_token(
    connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler
) -> None:
    """Litestar guard: leaves the Caller in the connection's state, or raises Problem.

    Runs before a body is looked at, so whoever has no token learns nothing else.
    """
    if handler.opt.get(PUBLIC):
        return
    authenticator: Authenticator = connection.app.state.authenticator
    source = connection.client.host if connection.client else ""
    connection.state["caller"] = await authenticator.authenticate(
        connection.headers.get("authorization"), source
    )


def caller_of(connection: ASGIConnection[Any, Any, Any, Any]) -> Caller:
    """The caller whom `require_token` found."""
    caller = connection.state["caller"]
    assert isinstance(caller, Caller)
    return caller


def require_operator(caller: Caller) -> None:
    """Raises Problem 403 for whoever acts for one account only."""
    if caller.kind != "operator":
        raise Problem(403, "operators_only", "Only an operator of the installation may do this.")


def _check_source(token: Token, source: str) -> None:
    if not token.allowed_sources:
        return
    address = canonical_source(source)
    if address is None or not any(address in ip_network(net) for net in token.allowed_sources):
        raise Problem(403, "source_not_allowed", "The token may not be used from this address.")


def _network_of(source: str) -> str:
    address = canonical_source(source)
    if isinstance(address, IPv6Address):
        return str(IPv6Network((address, 64), strict=False))
    return str(address)


def _unauthorized(code: str, detail: str) -> Problem:
    return Problem(401, code, detail, headers={"WWW-Authenticate": 'Bearer realm="holloway"'})
