"""The account actor: the one owner of an account's state. It decides, writes, and then tells.

Exactly one lives for an account, fenced by the epoch that it got from the store. It holds
- the snapshot, carried forward by the account's feed of changes (pulled when woken, after own
  writes, and before any agent is told the truth);
- who is connected (presence), each with a number; of two connections of a device the one with the
  higher number stands;
- the live authorisations and the connections that carry them.

It is one actor in six files, since its state has one owner: `authorizations` (how they live and
end), `requests` (access is asked for), `flows` (what was carried), `questions` (of the API),
`following` (the feed, and what changes mean), and this one (its own life, enrolment, presence).
What can be said without waiting stands in `ledger`, `consequences`, `choice` and `enrolment`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime, timedelta
from typing import ClassVar, Literal
from uuid import UUID

import attrs
import structlog

from actors.attendance import Attendance, OnlineAgent
from actors.authorizations import AGAIN_NS
from actors.consequences import (
    as_told,
    end_reason,
    has_other_ranges,
    is_rebuilt,
    names_of,
    rejudge,
)
from actors.devices import Devices
from actors.enrolment import (
    RangeExhausted,
    device_refusal,
    has_too_many_devices,
    interface_of,
    known_device,
    new_device,
    owner_refusal,
    refusal,
    renewed_device,
)
from actors.following import FeedOfAccount
from actors.ledger import LAST_CALL_NS, Live
from actors.messages import (
    DRAINING,
    REGIONS,
    AgentMoved,
    AttachClient,
    AttachGateway,
    ClientTruth,
    End,
    EnrolDevice,
    GatewayLoad,
    GatewayTruth,
    Occupied,
)
from actors.model import Authorization, Client, Gateway
from actors.policy.engine import Denied, Snapshot
from actors.services import Services
from actors.store.interface import (
    MAX_PAGE,
    Invalid,
    Pruned,
    Put,
    Unavailable,
)
from channel.messages import (
    Disconnect,
    Held,
    IpText,
    LiveAuthorization,
)
from runtime.actor import Caller, Down, Raise, handles
from runtime.cluster.keyed import NotEntitled
from runtime.links import NO_CONNECTION
from runtime.randomness import uuid7

MAX_ENROL_ATTEMPTS = 5
CLOCK_SLACK = timedelta(seconds=5)
"""How far the clocks of those that write changes and authorisations may lie apart."""

_log = structlog.get_logger("holloway.account")


@attrs.frozen
class _Idle:
    """Nobody was connected when this was sent, and `joined` connections had come before."""

    joined: int


@attrs.frozen
class _Follow:
    """The store could not take all that follows from this move."""

    moved: AgentMoved


class AccountActor(FeedOfAccount):
    """See the module. Started on demand under the name `account_name(account_id)`."""

    mailbox_limit: ClassVar[int] = 20_000

    def __init__(self, services: Services, account_id: UUID) -> None:
        super().__init__(services, account_id)
        self._joined = 0

    # --- life --------------------------------------------------------------------------------

    async def took_over(self) -> None:
        """We are the owner: load the truth, and end what holds no more. Raises StoreError."""
        self.subscribe(REGIONS)
        store = self._services.store
        contents = await self._do(store.contents, self._account_id)
        self._snapshot = Snapshot.of(contents, self._services.regions)
        self._devices = Devices.of(self._snapshot)
        await self._expect_agents()
        now_ns, instant = self.context.now(), self.context.utc_now()
        rows = await self._live_rows(instant)
        for row in rows:
            self._ledger.add(row, now_ns=now_ns, instant=instant, stage="presumed")
        for live in await self._granted_for_another_place(rows):
            await self._end(live, "resource_changed")
        for live in self._ledger:
            await self._review(live)
        self._arm()
        self.send_after(self._services.limits.idle_account_ns, _Idle(self._joined))
        _log.info(
            "account_owned",
            account=str(self._account_id),
            epoch=self.epoch,
            live=len(self._ledger),
        )

    async def about_to_move(self) -> None:
        """What has ended here must not live on where the account goes."""
        await self._write_ends()

    async def _live_rows(self, instant: datetime) -> list[Authorization]:
        rows: list[Authorization] = []
        after: UUID | None = None
        while True:
            page: tuple[Authorization, ...] = await self._do(
                self._services.store.authorizations,
                self._account_id,
                live_at=instant,
                after=after,
                limit=MAX_PAGE,
            )
            rows.extend(page)
            if len(page) < MAX_PAGE:
                return rows
            after = page[-1].id

    async def _granted_for_another_place(self, rows: list[Authorization]) -> list[Live]:
        """Authorisations of resources that were moved, or in an account that was given other
        ranges, while nobody watched: the row does not say what address it was granted for, the feed
        says when the address changed."""
        if not rows:
            return []
        since = min(row.created_at for row in rows) - CLOCK_SLACK
        moved_at: dict[UUID, datetime] = {}
        after = await self._number_before(since)
        while changes := await self._changes_after(after):
            for each in changes:
                if is_rebuilt(each) or has_other_ranges(each):
                    moved_at[each.entity_id] = each.at
            after = changes[-1].number
        return [
            live
            for live in self._ledger
            if any(
                moved_at.get(id, since) >= live.authorization.created_at - CLOCK_SLACK
                for id in (live.authorization.resource_id, self._account_id)
                if id in moved_at
            )
        ]

    async def _number_before(self, instant: datetime) -> int:
        """A number of the feed after which every change from `instant` on lies (by bisection)."""
        low, high = 0, self._snapshot.number
        while low < high:
            middle = (low + high) // 2
            try:
                page = await self._do(
                    self._services.store.changes, self._account_id, after=middle, limit=1
                )
            except Pruned as gone:  # what is gone is older than any live authorisation
                low = gone.number
                continue
            if page and page[0].at < instant:
                low = middle + 1
            else:
                high = middle
        return low

    # --- enrolment ---------------------------------------------------------------------------

    @handles(EnrolDevice)
    async def _on_enrol(self, ask: EnrolDevice) -> Client | Gateway | Disconnect:
        try:
            return await self._enrol(ask)
        except Unavailable:
            return self._refusal("unavailable")
        except Invalid as error:  # the name, which is the only thing that the device chose
            return self._refusal("protocol_error", f"not a valid {error.field}")
        except RangeExhausted:
            return self._refusal("limits_exceeded", "the tunnel range is exhausted")

    async def _enrol(self, ask: EnrolDevice) -> Client | Gateway | Disconnect:
        await self._pull()
        counted, who = False, f"token {ask.token.id}"
        for _ in range(MAX_ENROL_ATTEMPTS):
            refused = owner_refusal(
                self._snapshot, ask.token.id, ask.remote, self.context.utc_now()
            )
            if refused is not None:
                return refused
            known = known_device(self._snapshot, self._devices, ask)
            if known is not None:
                row = renewed_device(known, ask)
            elif has_too_many_devices(
                self._snapshot, self._devices, ask.token, self._services.limits
            ):
                return self._refusal("limits_exceeded", "too many devices")
            else:
                at = self.context.utc_now()
                counted = counted or await self._do(
                    self._services.store.use_token, ask.token.id, at=at
                )
                if not counted:
                    return Disconnect(
                        reason="limits_exceeded", detail="the token is used up", retry=False
                    )
                randomness = self._services.randomness
                id = uuid7(self._services.clock, randomness)
                row = new_device(
                    self._snapshot, self._devices, ask, id=id, at=at, randomness=randomness
                )
            if row == known or await self._write_rows([Put(row, known)], who):
                return row
        return self._refusal("unavailable")

    # --- presence ----------------------------------------------------------------------------

    @handles(AttachClient)
    async def _on_attach_client(self, ask: AttachClient) -> ClientTruth | Disconnect | Raise:
        caller = self.context.caller
        assert caller is not None
        try:
            await self._pull()
            if not await self.confirm():
                return Raise(NotEntitled())
            online = self._arrive(
                self._clients, self._snapshot.clients.get(ask.client_id), ask, caller
            )
            if isinstance(online, Disconnect):
                return online
            lives = self._ledger.of_client(online.id)
            under_way = {each for each in lives if each.authorization.resource_id in ask.asking}
            held_ids = {each.connection_id for each in ask.held}
            held_ids |= {each.authorization.connection_id for each in under_way}
            for connection in self._connections.of_client(online.id):
                self._keep_or_forget(connection, held_ids, client_key=ask.tunnel_key)
            for known in ask.connections:
                self._restore(known, online)
            told = await self._reconcile(lives, ask.held, under_way, remote=ask.remote)
            for live in told:
                self._restore_half(live, client_key=ask.tunnel_key)
        except Unavailable:
            return self._refusal("unavailable")
        account, row = self._snapshot.account, self._snapshot.clients.get(ask.client_id)
        assert account is not None
        assert row is not None
        online.visible = self._visible(online)
        return ClientTruth(
            epoch=self.epoch,
            number=online.number,
            interface=interface_of(account, row),
            resources=dict(online.visible),
            names=names_of(account),
            auth_provider_id=self._snapshot.tokens[ask.token_id].auth_provider_id,
            authorizations=self._truth(told),
        )

    @handles(AttachGateway)
    async def _on_attach_gateway(
        self, ask: AttachGateway
    ) -> GatewayTruth | Occupied | Disconnect | Raise:
        caller = self.context.caller
        assert caller is not None
        try:
            await self._pull()
            if not await self.confirm():
                return Raise(NotEntitled())
            before = self._gateways.get(ask.gateway_id)
            owner = ask.owner or caller.ref
            if ask.number is None and before and before.ref not in (owner, ask.replaces):
                return Occupied(before.ref)
            online = self._arrive(
                self._gateways, self._snapshot.gateways.get(ask.gateway_id), ask, caller
            )
            if isinstance(online, Disconnect):
                return online
            lives = self._ledger.of_gateway(online.id)
            is_back = ask.number is not None
            # What a former owner ordered and is not held by now is refused as stale, and given up.
            under_way = {each for each in lives if is_back and not each.acknowledged}
            held_ids = {each.connection_id for each in ask.held}
            held_ids |= {each.authorization.connection_id for each in under_way}
            for connection in self._connections.of_gateway(online.id):
                self._keep_or_forget(connection, held_ids, gateway_key=ask.tunnel_key)
            told = await self._reconcile(lives, ask.held, under_way)
            for live in told:
                self._restore_half(live, gateway_key=ask.tunnel_key)
        except Unavailable:
            return self._refusal("unavailable")
        account, row = self._snapshot.account, self._snapshot.gateways.get(ask.gateway_id)
        assert account is not None
        assert row is not None
        carried = {live.authorization.resource_id for live in told}
        return GatewayTruth(
            epoch=self.epoch,
            number=online.number,
            interface=interface_of(account, row),
            authorizations=self._truth(told),
            resources=tuple(as_told(self._snapshot.resources[id]) for id in sorted(carried)),
        )

    def _arrive(
        self,
        attendance: Attendance,
        row: Client | Gateway | None,
        ask: AttachClient | AttachGateway,
        caller: Caller,
    ) -> OnlineAgent | Disconnect:
        """Note who is connected; of two connections of one device the newer stands. (That of a
        gateway comes here only when the older one failed a probe.)"""
        refused = device_refusal(
            self._snapshot, row, ask.token_id, ask.remote, self.context.utc_now()
        )
        if refused is not None:
            return refused
        owner = ask.owner or caller.ref
        assert row is not None
        assert owner is not None
        kind: Literal["client", "gateway"] = "client" if isinstance(row, Client) else "gateway"
        limits = self._services.limits
        limit = limits.clients_online if kind == "client" else limits.gateways_online
        before = attendance.get(row.id)
        if before is None and len(attendance) >= limit:
            return self._refusal("limits_exceeded", f"too many {kind}s online")
        self._joined += 1
        number = ask.number if ask.number is not None else self.epoch << 32 | self._joined
        if before is not None and before.ref != owner:
            if before.number > number:
                return refusal("superseded")
            self._command(before.ref, End(refusal("superseded")))
        online = OnlineAgent(
            kind=kind,
            id=row.id,
            ref=owner,
            number=number,
            token_id=ask.token_id,
            tunnel_key=ask.tunnel_key,
            version=ask.version,
            incarnation=ask.incarnation,
            remote=ask.remote,
            since=self.context.utc_now(),
        )
        attendance.put(online)
        self._tell_presence(online, is_online=True)
        self.monitor(online.ref)
        self._watch_token(online)
        self._has_arrived(online)
        return online

    async def _reconcile(
        self,
        lives: Iterable[Live],
        held: tuple[Held, ...],
        under_way: Collection[Live],
        *,
        remote: IpText | None = None,
    ) -> list[Live]:
        """End what the agent does not hold or may not have, and give what it holds, caught up with:
        of the address that the client has now, and renewed if that is overdue. What is under way
        to the agent is neither ended nor given: who carries it acknowledges it, or gives it up."""
        held_ids = {each.authorization_id for each in held}
        stay: list[Live] = []
        for live in lives:
            if live.id not in held_ids and live not in under_way:
                await self._end(live, "absent")
                continue
            if remote is not None and live.authorization.remote_ip != remote:
                await self._rewrite(live, attrs.evolve(live.authorization, remote_ip=remote))
            await self._review(live)
            if self._ledger.get(live.id) is live and live.id not in held_ids:
                self._ledger.doubt(live, self.context.now())
                continue
            if self._ledger.get(live.id) is live and live.due_ns >= live.deadline_ns - LAST_CALL_NS:
                await self._renew(live)
            if self._ledger.get(live.id) is live:
                stay.append(live)
        if stay:  # confirms the lease: raises Fenced if another owner has taken over
            await self._write(stay[0].authorization)
        self._arm()
        return stay

    def _truth(self, lives: Iterable[Live]) -> tuple[LiveAuthorization, ...]:
        now_ns = self.context.now()
        return tuple(live.told(now_ns) for live in lives if self._ledger.get(live.id) is live)

    @handles(Down)
    async def _on_down(self, message: Down) -> None:
        for attendance, _ in self._sides():
            online = attendance.by_ref(message.ref)
            if online is None:
                continue
            attendance.remove(online)
            self._tell_presence(online, is_online=False)
            if message.reason in (DRAINING, NO_CONNECTION):
                self._expect_back(online)
            if online.kind == "client" and message.reason != NO_CONNECTION:
                for live in self._ledger.of_client(online.id):
                    if not live.acknowledged:
                        await self._end(live, "abandoned")
        self._arm()
        if not self._clients and not self._gateways:
            self.send_after(self._services.limits.idle_account_ns, _Idle(self._joined))

    @handles(_Idle)
    async def _on_idle(self, message: _Idle) -> None:
        """What is live then ends by its leases, at the gateways that carry it."""
        if message.joined != self._joined:
            return
        if self._unwritten:
            self.send_after(self._services.limits.idle_account_ns, message)
        else:
            await self.give_up("normal")

    @handles(AgentMoved)
    async def _on_agent_moved(self, message: AgentMoved) -> None:
        attendance, rows = self._side(message.kind)
        online = attendance.current(message.id, message.number)
        if online is None or online.remote == message.remote:
            return
        online.remote = message.remote
        await self._check_presence(attendance, online, rows.get(online.id))
        await self._follow_move(message)

    @handles(_Follow)
    async def _on_follow(self, message: _Follow) -> None:
        moved = message.moved
        attendance, _ = self._side(moved.kind)
        online = attendance.current(moved.id, moved.number)
        if online is not None and online.remote == moved.remote:
            await self._follow_move(moved)

    async def _follow_move(self, moved: AgentMoved) -> None:
        """Decide over a moved client anew. What it may have no more ends even while the store is
        away; what it may keep is written as soon as there is one."""
        try:
            for live in self._ledger.of_client(moved.id):  # where the gateway is no policy asks
                row = attrs.evolve(live.authorization, remote_ip=moved.remote)
                decision = rejudge(self._snapshot, row, self.context.utc_now())
                if isinstance(decision, Denied):
                    await self._end(live, end_reason(decision))
                    continue
                await self._rewrite(live, row)
                await self._review(live)
        except Unavailable:
            self.send_after(AGAIN_NS, _Follow(moved))
        self._arm()

    @handles(GatewayLoad)
    def _on_gateway_load(self, message: GatewayLoad) -> None:
        online = self._gateways.current(message.gateway_id, message.number)
        if online is not None:
            online.load = message.connections
