"""Who calls: bearer tokens (RFC 6750) of the kinds `api` and `operator`.

An `api` token acts for one account, as long as its principal is an enabled admin of an enabled
account. An `operator` token acts for the installation, and on one account where the call names it.
Only the hash of a token is kept, and compared in constant time. A source that fails too often is
asked to wait; tokens that were good before still pass, so that nobody locks out a neighbour.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from datetime import datetime
from ipaddress import ip_network
from typing import Any, Final, Literal
from uuid import UUID

import attrs
from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler

from actors.model import Account, Principal, Token
from actors.store.interface import NotFound, Store
from channel.credentials import InvalidToken, decode_token
from portal.api.call import call_of
from portal.api.limits import TokenBuckets
from portal.api.problems import Problem, too_many
from portal.api.requests import canonical_source
from portal.api.scopes import EVERYTHING
from runtime.clock import Clock
from runtime.net.sources import source_of

CALLS_PER_S: Final = 50.0
CALLS_BURST: Final = 200
TOKENS_WORTH_OF_AN_ACCOUNT: Final = 4
"""All tokens of an account together may call as often as this many of them."""
FAILURES_PER_S: Final = 0.5
FAILURES_BURST: Final = 20
MAX_REMEMBERED_TOKENS: Final = 1_000
MAX_HEADER_CHARACTERS: Final = 1_024
USE_NOTED_EVERY_NS: Final = 60 * 10**9
PUBLIC: Final = "public"
"""A route with this entry in its `opt` is served without a token."""


@attrs.frozen(kw_only=True)
class Caller:
    """Whom a good token stands for. `account_id` is None for an operator, whose `scopes` are all
    there are; `expires_at` and `allowed_sources` bound what tokens it may make."""

    token_id: UUID
    kind: Literal["api", "operator"]
    account_id: UUID | None
    principal_id: UUID | None
    scopes: tuple[str, ...]
    expires_at: datetime | None = None
    allowed_sources: tuple[str, ...] = ()

    @property
    def who(self) -> str:
        """How changes name the caller."""
        return f"token {self.token_id}"


class Authenticator:
    """Tells who calls, and limits how often: `calls_per_s` for each token, a few times that for all
    tokens of an account, FAILURES_PER_S of failed attempts for each source (an IPv4 address or an
    IPv6 /64)."""

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
        self._calls_of_accounts = TokenBuckets(
            rate_per_s=calls_per_s * TOKENS_WORTH_OF_AN_ACCOUNT,
            burst=calls_burst * TOKENS_WORTH_OF_AN_ACCOUNT,
        )
        self._failures = TokenBuckets(rate_per_s=FAILURES_PER_S, burst=FAILURES_BURST)
        self._good_hashes: OrderedDict[bytes, None] = OrderedDict()
        self._noted_at_by_token: OrderedDict[UUID, int] = OrderedDict()

    async def authenticate(self, authorization: str | None, source: str) -> Caller:
        """The caller behind an `Authorization` header that came from this address.

        Raises Problem: 401 without a good token, 403 for a token that may not use the API, 429
        for too many calls or failures; and what the store raises.
        """
        token = await self._identify(authorization, source)
        wait_ns = self._calls.take(token.id, self._clock.monotonic_ns())
        if wait_ns:
            detail = f"This token made too many calls. Keep below {self._calls_per_s:g} a second."
            problem = too_many("rate_limited", detail, wait_ns)
            problem.headers |= self.rate_headers(token.id)
            raise problem
        if token.account_id is not None:
            now = self._clock.monotonic_ns()
            wait_ns = self._calls_of_accounts.take(token.account_id, now)
            if wait_ns:
                detail = "The tokens of this account made too many calls together."
                raise too_many("rate_limited", detail, wait_ns)
        caller = await self._admit(token, source)
        await self._note_use(token)
        return caller

    async def admit_again(self, caller: Caller, source: str) -> Caller:
        """The caller as it is now. Raises Problem if it would be turned away, and what the store
        raises. Counts as no call."""
        token = await self._store.find_token(caller.token_id)
        if token is None:
            raise _unauthorized("invalid_token", "The token was deleted.")
        if token.expires_at is not None and token.expires_at <= self._clock.utc_now():
            raise _unauthorized("token_expired", "The token has expired.")
        return await self._admit(token, source)

    def rate_headers(self, token_id: UUID) -> dict[str, str]:
        """How many calls the token has left, as draft-ietf-httpapi-ratelimit-headers-10 says it:
        `q` calls in each window of `w` seconds; `r` are left, all are back in `t` seconds."""
        now = self._clock.monotonic_ns()
        left, full_in_ns = self._calls.left(token_id, now), self._calls.full_in_ns(token_id, now)
        burst = self._calls.burst
        window_s = max(1, round(burst / self._calls_per_s))
        return {
            "RateLimit-Policy": f'"token";q={burst};w={window_s}',
            "RateLimit": f'"token";r={left};t={-(-full_in_ns // 10**9)}',
        }

    async def _admit(self, token: Token, source: str) -> Caller:
        """The caller behind a good token, if it may use the API from this address."""
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
            scopes=EVERYTHING if token.kind == "operator" else token.scopes,
            expires_at=token.expires_at,
            allowed_sources=token.allowed_sources,
        )

    async def _note_use(self, token: Token) -> None:
        """Remember that the token was used: once in USE_NOTED_EVERY_NS, since it costs a write."""
        now = self._clock.monotonic_ns()
        noted_at = self._noted_at_by_token.get(token.id)
        if noted_at is not None and now - noted_at < USE_NOTED_EVERY_NS:
            return
        self._noted_at_by_token[token.id] = now
        self._noted_at_by_token.move_to_end(token.id)
        if len(self._noted_at_by_token) > MAX_REMEMBERED_TOKENS:
            self._noted_at_by_token.popitem(last=False)
        await self._store.note_used(token.id, at=self._clock.utc_now())

    async def _identify(self, authorization: str | None, source: str) -> Token:
        """The known, unexpired token in the header; failures count against the source."""
        if authorization is None:
            raise _unauthorized(
                "missing_token", "Send the header `Authorization: Bearer <your api token>`."
            )
        scheme, _, text = authorization.partition(" ")
        network, now_ns = network_of(source), self._clock.monotonic_ns()
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
    caller = await authenticator.authenticate(connection.headers.get("authorization"), source)
    connection.scope["state"]["caller"] = caller
    call_of(connection).headers |= authenticator.rate_headers(caller.token_id)


def caller_of(connection: ASGIConnection[Any, Any, Any, Any]) -> Caller:
    """The caller whom `require_token` found."""
    caller = connection.scope["state"]["caller"]
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


def network_of(source: str) -> str:
    """What counts as one source: an IPv4 address, or an IPv6 /64."""
    address = canonical_source(source)
    return "" if address is None else source_of(str(address))


def _unauthorized(code: str, detail: str) -> Problem:
    return Problem(401, code, detail, headers={"WWW-Authenticate": 'Bearer realm="holloway"'})
