"""The life of the authorisations of an account: the lower part of the account actor.

How an authorisation lives is drawn in docs/control-plane.md. The rules that this file keeps:
- whatever touches an authorisation makes it be decided anew, over all policies, before it is cut;
- what ends is ended in the store, then told to the gateway, then to the client;
- what is prolonged is written, then told to both, and only while both are connected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import attrs

from actors.attendance import Attendance, OnlineAgent
from actors.consequences import end_reason, rejudge, stands
from actors.enrolment import refusal
from actors.ledger import LAST_CALL_NS, Connection, Connections, Ledger, Live
from actors.messages import ACCOUNT, FromOwner, Wake
from actors.model import Authorization, Client, Gateway
from actors.policy.engine import Allowed, Denied, Snapshot
from actors.services import Services
from actors.store.interface import InvalidReference, NotFound, Unavailable
from channel.messages import (
    AuthorizationRenewed,
    AuthorizationRevoked,
    Disconnect,
    Peer,
    RefusalCode,
    Revoke,
)
from runtime.actor import ActorRef, Caller, Timer, handles
from runtime.cluster.envelopes import Enclosed
from runtime.cluster.keyed import KeyedActor

AGAIN_NS = 1 * 10**9
"""After this time what the store could not take is tried again."""
MAX_UNWRITTEN = 1_000
"""While the ends of so many authorisations wait for the store, nothing new is granted."""

_T = TypeVar("_T")


@attrs.frozen
class _Due:
    """Some authorisation has to be looked at."""


@attrs.frozen
class AskAgain:
    """A request that waited for a connection to be made."""

    caller: Caller
    ask: object


class AuthorizationsOfAccount(KeyedActor):
    """The lower part of the account actor: its state, and the life of its authorisations."""

    kind = ACCOUNT

    def __init__(self, services: Services, account_id: UUID) -> None:
        super().__init__(account_id, services.tenure, services.store)
        self._services = services
        self._account_id = account_id
        self._ledger = Ledger()
        self._connections = Connections()
        self._clients = Attendance()
        self._gateways = Attendance()
        self._counts: Counter[str] = Counter()
        self._unwritten: dict[UUID, Authorization] = {}
        self._again: Timer | None = None
        self._timer: Timer | None = None
        self._timer_ns: int | None = None

    _snapshot: Snapshot
    """Set when the actor has started."""

    # --- the life of an authorisation ----------------------------------------------------------

    async def _review(self, live: Live) -> None:
        """Decide it anew, over all policies, and carry out what follows."""
        if self._ledger.get(live.id) is not live:
            return
        row, instant = live.authorization, self.context.utc_now()
        decision = rejudge(self._snapshot, row, instant)
        if isinstance(decision, Denied):
            await self._end(live, end_reason(decision))
        elif stands(self._snapshot, row, instant):
            return
        elif not live.acknowledged:  # nobody holds it yet: the request is decided once more
            await self._end(live, "decided anew")
        elif self._both_connected(row):
            await self._prolong(live, decision.policy_id, decision.expires_at)
        else:  # another policy keeps it, but only who is connected gets a later end
            expires_at = min(decision.expires_at, row.expires_at)
            await self._prolong(live, decision.policy_id, expires_at)

    async def _renew(self, live: Live) -> None:
        """Give it a later end, if both its ends are connected and there is one to give."""
        row = live.authorization
        if self._ledger.get(live.id) is not live:
            return
        if not self._both_connected(row):
            self._ledger.postpone(live, self.context.now())
            return
        last_call = self.context.now() >= live.deadline_ns - LAST_CALL_NS
        instant = self.context.utc_now()
        if last_call:
            instant = max(instant, row.expires_at)
        decision = rejudge(self._snapshot, row, instant)
        if isinstance(decision, Allowed) and decision.expires_at > row.expires_at:
            self._counts["renewed"] += 1
            await self._prolong(live, decision.policy_id, decision.expires_at)
        elif isinstance(decision, Denied) and not last_call:
            await self._end(live, end_reason(decision))
        else:
            self._ledger.postpone(live, self.context.now())

    def _both_connected(self, row: Authorization) -> bool:
        return (
            self._clients.get(row.client_id) is not None
            and self._gateways.get(row.gateway_id) is not None
        )

    async def _prolong(self, live: Live, policy_id: UUID, expires_at: datetime) -> None:
        row = live.authorization
        # The clock may have been set back: no row ends before it began.
        expires_at = max(expires_at, row.created_at)
        row = attrs.evolve(row, policy_id=policy_id, expires_at=expires_at)
        await self._rewrite(live, row)
        renewed = AuthorizationRenewed(
            authorization_id=row.id, expires_in_ns=live.remaining_ns(self.context.now())
        )
        self._tell(self._gateways, row.gateway_id, renewed)
        self._tell(self._clients, row.client_id, renewed)

    async def _rewrite(self, live: Live, row: Authorization) -> None:
        await self._write(row)
        self._ledger.rewrite(live, row, self.context.now(), self.context.utc_now())

    async def _end(self, live: Live, reason: str) -> None:
        """In the store, at the gateway, at the client: in this order. A store that cannot be
        reached now does not keep the access alive; it learns of the end as soon as it can."""
        if self._ledger.get(live.id) is not live:
            return
        row, was_told = live.authorization, live.acknowledged
        self._ledger.remove(live, self.context.now())
        self._counts["ended"] += 1
        self._unwritten[row.id] = attrs.evolve(
            row, ended_at=self.context.utc_now(), end_reason=reason
        )
        await self._write_ends()
        self._tell(self._gateways, row.gateway_id, Revoke(authorization_id=row.id, reason=reason))
        if was_told:
            revoked = AuthorizationRevoked(
                authorization_id=row.id, resource_id=row.resource_id, reason=reason
            )
            self._tell(self._clients, row.client_id, revoked)
        connection = self._connections.between(row.client_id, row.gateway_id)
        if (
            connection is not None
            and connection.id == row.connection_id
            and not self._ledger.of_connection(connection.id)
        ):
            self._drop(connection)

    async def _write_ends(self) -> None:
        for row in tuple(self._unwritten.values()):
            if self._snapshot.account is not None:
                try:
                    await self._write(row)
                except Unavailable:
                    self._wake_again()
                    return
                except (InvalidReference, NotFound):
                    pass  # the row went with what it referred to
            del self._unwritten[row.id]

    def _wake_again(self) -> None:
        """Do soon what the store could not do now. One timer is enough for all of it."""
        if self._again is None or not self._again.pending:
            self._again = self.send_after(AGAIN_NS, Wake())

    @handles(_Due)
    async def _on_due(self, message: _Due) -> None:
        self._timer = None
        for live in self._ledger.take_due(self.context.now()):
            try:
                await self._look_at(live)
            except Unavailable:
                self._ledger.retry(live, self.context.now())
        self._arm()

    async def _look_at(self, live: Live) -> None:
        """Its moment has come: half of the lease, the last call, the end, or no answer."""
        if self._ledger.get(live.id) is not live:
            return
        if not live.acknowledged:
            await self._end(live, "not acknowledged")
        elif self.context.now() >= live.deadline_ns:
            await self._end(live, "expired")
        else:
            await self._renew(live)

    def _arm(self) -> None:
        """Have the timer stand at the next moment of any authorisation."""
        due_ns = self._ledger.next_due_ns()
        if self._timer is not None:
            if self._timer_ns == due_ns and self._timer.pending:
                return
            self.cancel(self._timer)
            self._timer = None
        if due_ns is not None:
            self._timer_ns = due_ns
            self._timer = self.send_after(max(0, due_ns - self.context.now()), _Due())

    # --- helpers -----------------------------------------------------------------------------

    def _tell(self, attendance: Attendance, id: UUID, message: object) -> None:
        online = attendance.get(id)
        if online is not None:
            self._command(online.ref, message)

    def _command(self, owner: ActorRef, message: object) -> None:
        """Say something to the owner of a channel, under our epoch."""
        self.cast(owner, FromOwner(self.epoch, Enclosed(message)))

    async def _write(self, row: Authorization) -> None:
        await self._do(self._services.store.write_authorization, row, epoch=self.epoch)

    async def _do(
        self, method: Callable[..., Awaitable[_T]], *arguments: Any, **keywords: Any
    ) -> _T:
        """One query of the store, as an effect."""
        result: _T = await self.perform(partial(method, *arguments, **keywords))
        return result

    def _peer(self, online: OnlineAgent) -> Peer:
        row: Client | Gateway
        if online.kind == "client":
            row = self._snapshot.clients[online.id]
        else:
            row = self._snapshot.gateways[online.id]
        return Peer(
            id=row.id,
            public_key=online.tunnel_key,
            ipv4=row.ipv4,
            ipv6=row.ipv6,
            name=row.name,
        )

    def _ask_again(self, connection: Connection) -> None:
        waiting, connection.waiting = connection.waiting, []
        for caller, ask in waiting:
            self.send_after(0, AskAgain(caller, ask))

    def _drop(self, connection: Connection) -> None:
        self._connections.forget(connection)
        self._ask_again(connection)

    def _refusal(self, reason: RefusalCode, detail: str = "") -> Disconnect:
        return refusal(reason, detail, randomness=self._services.randomness)
