"""What sessions and gateway actors share: the agent of a device, which its account decides over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Final, Literal
from uuid import UUID

import attrs

from actors.attaching import PAUSE_NS, Attaching
from actors.attachment import Channel
from actors.channel_owner import ChannelOwner
from actors.logs import Seen, SessionLog
from actors.messages import (
    CLERK,
    DIRECTORY,
    RELAYS,
    AgentMoved,
    AssignedRelay,
    AssignRelays,
    AttachClient,
    Attached,
    AttachGateway,
    CandidatesFrom,
    DeviceSeen,
    FlowsFrom,
    FromOwner,
    Heard,
    LogRows,
    Moved,
    NotAttached,
    Probe,
    RelaysChanged,
    RevokeRelayUse,
    attendance_topic,
)
from actors.model import Client, Gateway
from actors.services import Bucket, Services
from channel.messages import (
    MAX_AUTHORIZATIONS,
    AuthorizationRenewed,
    Candidates,
    FlowReport,
    Held,
    HeldWanted,
    IpText,
    Join,
    LiveAuthorization,
    MoreHeld,
    RefusalCode,
    Relays,
    RelayServer,
)
from runtime.actor import (
    LATER,
    ActorError,
    ActorRef,
    Caller,
    CallError,
    Down,
    Monitor,
    Overloaded,
    Raise,
    handles,
)
from runtime.cluster.node import TRACKER
from runtime.cluster.tenure import RosterChanged
from runtime.presence.tracker import Track
from runtime.randomness import uuid7

HELD_WINDOW = 4
"""So many `MoreHeld` are under way at a time."""
MAX_PROBES = 16
"""So many newcomers at a time may wait for a sign of life of one agent."""
MAX_UNSENT = 100
"""So much for the account's actor is kept while it moves to another node."""
MAX_HELD_ORDERS = 1_000
"""So much that the account's owner says is held until its truth has come."""
AGAIN_NS = PAUSE_NS
"""The pause before what ended on this node is looked for again."""
LOST_RIGHTS: Final[frozenset[RefusalCode]] = frozenset(
    {"invalid_token", "token_expired", "account_disabled", "awaiting_approval"}
)
"""Whoever is sent away so may not use relays either."""
SEEN_EVERY_NS = 3_600 * 10**9
MAX_SOFTWARE = 64
"""So much of what an agent says it is is kept."""


@attrs.frozen
class RenewRelays:
    """The TURN credentials of the agent have to be made anew."""


@attrs.frozen
class _Attach:
    """Find the account's actor, and learn the truth from it."""


@attrs.frozen
class _Present:
    """The node's tracker was started anew: be present in it."""


@attrs.frozen
class _SeenDue:
    """That the agent is connected is to be noted again."""


@attrs.frozen
class _HeldDue:
    """The rest of what the agent holds should be told by now."""


class AgentOwner(ChannelOwner, ABC):
    """The owner of a client's or gateway's channel: it learns what its agent holds, follows its
    account's actor, whichever incarnation of it lives, and keeps the agent in relays.

    It never waits for the account: an `Attaching` beside it does. Until the truth has come, what
    is said on behalf of the account is held, since it may be said after the truth and come before.

    `remote` is the validated path at the join. A subclass says what is asked of the account actor
    (`_question`), and tells the agent the first truth (`_introduce`) or how a later one differs
    from what it was told (`_correct`).
    """

    candidates_factor: ClassVar[int] = 1
    """How many times the limits of candidates and flow logs such an agent has."""

    def __init__(
        self,
        services: Services,
        channel: Channel,
        *,
        device: Client | Gateway,
        token_id: UUID,
        join: Join,
        remote: IpText,
    ) -> None:
        super().__init__(services, channel, join.kind)
        self._side = join.kind
        self._device = device
        self._account_id = device.account_id
        self._token_id = token_id
        self._account: ActorRef | None = None
        self._account_watch: Monitor | None = None
        self._attaching: ActorRef | None = None
        self._held_orders: list[tuple[FromOwner, Caller | None]] = []
        self._number: int | None = None
        self._probing: list[Caller] = []
        self._tunnel_key = join.tunnel_key
        self._incarnation = join.incarnation
        self._version = services.spoken.agreed(join.versions) or services.spoken.oldest
        self._remote = remote
        self._software = join.software[:MAX_SOFTWARE]
        self._auth_provider_id: UUID | None = None
        self._held = list(join.held)
        self._held_follow = join.held_follow
        self._tracker: ActorRef | None = None
        self._unsent: list[object] = []

    def started(self) -> None:
        super().started()
        limits, factor = self._services.limits, self.candidates_factor
        self._candidates = Bucket(
            limits.candidates_per_s * factor, limits.candidates_burst * factor, self.context.now()
        )
        self._flow_logs = Bucket(
            limits.flow_logs_per_s * factor, limits.flow_logs_burst * factor, self.context.now()
        )
        if not self._held_follow:
            self.cast(self.context.ref, _Attach())
            return
        self.send_after(self._services.limits.held_deadline_ns, _HeldDue())
        for _ in range(HELD_WINDOW):
            self.say(HeldWanted())

    def terminated(self, reason: str) -> None:
        super().terminated(reason)
        code = "lost" if self._goodbye is None else self._goodbye.reason
        if reason == "shutdown":
            code = "shutting_down"
        if self._number is None:
            self._log_session("refused", code)
        else:
            self._note_seen()
            self._log_session("disconnected", code)

    # --- the log -------------------------------------------------------------------------------

    def _log_session(
        self, event: Literal["connected", "refused", "disconnected"], reason: str = ""
    ) -> None:
        is_client = isinstance(self._device, Client)
        row = SessionLog(
            id=uuid7(self._services.clock, self._services.randomness),
            account_id=self._account_id,
            at=self.context.utc_now(),
            agent=self._side,
            event=event,
            device_id=self._device.id,
            principal_id=self._device.principal_id if isinstance(self._device, Client) else None,
            token_id=self._token_id,
            auth_provider_id=self._auth_provider_id if is_client else None,
            remote_ip=self._remote,
            version=self._software,
            reason=reason,
        )
        self._tell_clerk(LogRows((row,)))

    def _note_seen(self) -> None:
        seen = Seen(
            device_id=self._device.id,
            at=self.context.utc_now(),
            version=self._software,
            remote_ip=self._remote,
        )
        self._tell_clerk(
            DeviceSeen(account_id=self._account_id, token_id=self._token_id, seen=seen)
        )

    def _tell_clerk(self, message: object) -> None:
        clerk = self.context.registry.whereis(CLERK)
        if clerk is not None:
            self.cast(clerk, message)

    @handles(_SeenDue)
    def _on_seen_due(self, message: _SeenDue) -> None:
        self._note_seen()
        self.send_after(SEEN_EVERY_NS, message)

    # --- what the agent holds ------------------------------------------------------------------

    def take_held(self, message: MoreHeld) -> None:
        """A further frame of what the agent holds; after the last one the truth is asked for."""
        if not self._held_follow or len(self._held) + len(message.held) > MAX_AUTHORIZATIONS:
            self.refuse("protocol_error", "more is held than was announced, or than may be")
            return
        self._held += message.held
        self._held_follow = message.more
        if message.more:
            self.say(HeldWanted())
        else:
            self.cast(self.context.ref, _Attach())

    @handles(_HeldDue)
    def _on_held_due(self, message: _HeldDue) -> None:
        if self._held_follow:
            self.refuse("protocol_error", "not all that is held was told in time")

    # --- the account's actor -------------------------------------------------------------------

    @property
    def is_attaching(self) -> bool:
        """The account is being asked for the truth."""
        return self._attaching is not None

    @handles(_Attach)
    def _on_attach(self, message: _Attach) -> None:
        self._attach()

    def _attach(self) -> None:
        held = tuple(self._held) if self._number is None else self._held_now()
        attaching = Attaching(
            self._services,
            owner=self.context.ref,
            account_id=self._account_id,
            ask=self._question(held),
        )
        try:
            self._attaching = self.spawn(attaching, label="attaching")
        except ActorError:
            self.refuse("unavailable")
            return
        self.monitor(self._attaching)

    @handles(NotAttached)
    def _on_not_attached(self, message: NotAttached) -> None:
        reason = message.disconnect.reason
        directory = self.context.registry.whereis(DIRECTORY)
        if reason in LOST_RIGHTS and directory is not None:
            # The account has told all directories; perhaps when no link led here.
            self.cast(directory, RevokeRelayUse(self._device.id, is_gone=False))
        self.part(message.disconnect)

    @handles(Attached)
    async def _on_attached(self, message: Attached) -> None:
        truth, is_first = message.truth, self._number is None
        self._account = message.account
        self._account_watch = self.monitor(message.account)
        self._epoch, self._number = truth.epoch, truth.number
        self._become_present()
        unsent, self._unsent = self._unsent, []
        for each in unsent:
            self.to_account(each)
        if is_first:
            self._held.clear()
            await self._introduce(truth)
            self.begin_doors()
            self._log_session("connected")
            self._note_seen()
            self.send_after(self._services.randomness.integer(SEEN_EVERY_NS), _SeenDue())
        else:
            self._correct(truth)
        if self._remote != message.remote:
            self._tell_moved()
        self._attaching = None
        self._obey_held()
        self._follow_account()
        if self._attaching is None:
            self.attached()

    def attached(self) -> None:
        """The truth has come, and with it what was held."""

    @handles(FromOwner)
    def _on_from_owner(self, message: FromOwner) -> object:
        caller = self.context.caller
        if self._attaching is None:
            return self.obey(message, caller)
        if len(self._held_orders) >= MAX_HELD_ORDERS:
            self.refuse("unavailable", "too much was said before the truth")
            return Raise(Overloaded(self._side, MAX_HELD_ORDERS))
        self._held_orders.append((message, caller))
        return None if caller is None else LATER

    def _obey_held(self) -> None:
        orders, self._held_orders = self._held_orders, []
        for order, caller in orders:
            if caller is None:
                self.obey(order, None)
            elif caller.waiting:
                answer = self.obey(order, caller)
                if answer is not LATER:
                    self.reply(caller, answer)

    @abstractmethod
    def _question(self, held: tuple[Held, ...]) -> AttachClient | AttachGateway: ...

    @abstractmethod
    def _held_now(self) -> tuple[Held, ...]:
        """What the agent holds by what it was told."""

    @abstractmethod
    async def _introduce(self, truth: Any) -> None: ...

    @abstractmethod
    def _correct(self, truth: Any) -> None: ...

    def _say_renewed(self, lives: Iterable[LiveAuthorization]) -> None:
        for live in lives:
            self.say(
                AuthorizationRenewed(
                    authorization_id=live.authorization_id, expires_in_ns=live.expires_in_ns
                )
            )

    @handles(Probe)
    def _on_probe(self, message: Probe) -> object:
        if self.context.caller is None:
            return None
        self._probing = [each for each in self._probing if each.waiting][-MAX_PROBES:]
        self._probing.append(self.context.caller)
        self._channel.probe()
        return LATER

    @handles(Heard)
    def _on_heard(self, message: Heard) -> None:
        probing, self._probing = self._probing, []
        for caller in probing:
            self.reply(caller, None)

    @handles(Down)
    def _on_down(self, message: Down) -> None:
        if message.ref == self._account:
            self._leave_account()
        elif message.ref == self._attaching:  # without a word
            self.refuse("unavailable")
        elif message.ref == self._tracker:
            self._tracker = None
            self.send_after(AGAIN_NS, _Present())

    @handles(RosterChanged)
    def _on_roster_changed(self, message: RosterChanged) -> None:
        super()._on_roster_changed(message)
        self._follow_account()

    def _follow_account(self) -> None:
        """The account may live elsewhere now, and its actor may not be able to say so."""
        owner = self._services.tenure.owner_of(self._account_id)
        if self._account is not None and owner not in (None, self._account.node):
            if self._account_watch is not None:
                self.demonitor(self._account_watch)
            self._leave_account()

    def _leave_account(self) -> None:
        self._account = None
        self._attach()

    # --- presence --------------------------------------------------------------------------------

    @handles(_Present)
    def _on_present(self, message: _Present) -> None:
        self._become_present()

    def _become_present(self) -> None:
        """Have all nodes know that this agent is connected: see `messages.attendance_topic`."""
        tracker = self.context.registry.whereis(TRACKER)
        if self._tracker is not None or tracker is None:
            return
        self._tracker = tracker
        self.monitor(tracker)
        topic, key = attendance_topic(self._account_id), f"{self._side}:{self._device.id}"
        self.cast(tracker, Track(topic, key, self.context.ref))

    @handles(Moved)
    def _on_moved(self, message: Moved) -> None:
        self._remote = message.remote
        if self._account is not None:  # else with the truth
            self._tell_moved()

    def _tell_moved(self) -> None:
        self.to_account(
            AgentMoved(
                kind=self._side,
                id=self._device.id,
                number=self._number or 0,
                remote=self._remote,
            )
        )

    def pass_on(self, candidates: Candidates) -> None:
        """Candidates of the agent, for the other end of a connection."""
        if self._number is None or not self._candidates.take(self.context.now()):
            self._counts["candidates_dropped"] += 1
            return
        self.to_account(
            CandidatesFrom(
                sender=self._side,
                sender_id=self._device.id,
                number=self._number,
                candidates=candidates,
            )
        )

    def pass_on_flows(self, report: FlowReport) -> None:
        """Flows of the agent, to be logged."""
        if self._number is None or not self._flow_logs.take(self.context.now()):
            self._counts["flow_logs_dropped"] += 1
            return
        self.to_account(
            FlowsFrom(
                sender=self._side,
                sender_id=self._device.id,
                number=self._number,
                flows=report.flows,
            )
        )

    def to_account(self, message: object) -> None:
        """Cast to the account's actor; while it moves, keep a little of it for the next one."""
        if self._account is not None:
            self.cast(self._account, message)
        elif len(self._unsent) < MAX_UNSENT:
            self._unsent.append(message)

    # --- relays ------------------------------------------------------------------------------

    async def assigned_relays(self) -> tuple[AssignedRelay, ...]:
        """Relays for this agent, with credentials of its own; those in use stay if they can."""
        directory = self.context.registry.whereis(DIRECTORY)
        if directory is None:
            return ()
        try:
            assigned: tuple[AssignedRelay, ...] = await self.call(
                directory,
                AssignRelays(self._device.id, tuple(self._relay_by_id), self._remote),
            )
        except CallError:
            return ()
        return assigned

    async def first_relays(self) -> tuple[RelayServer, ...]:
        self.subscribe(RELAYS)
        assigned = await self.assigned_relays()
        self._relay_by_id = {each.server.id: each.relay for each in assigned}
        self.send_after(self._services.limits.relay_renewal_ns, RenewRelays())
        return tuple(each.server for each in assigned)

    @handles(RelaysChanged)
    async def _on_relays_changed(self, message: RelaysChanged) -> None:
        await self._tell_relays(only_new=True)

    @handles(RenewRelays)
    async def _on_renew_relays(self, message: RenewRelays) -> None:
        self.send_after(self._services.limits.relay_renewal_ns, message)
        await self._tell_relays(only_new=False)

    async def _tell_relays(self, *, only_new: bool) -> None:
        """A relay that came back is new: it may have been started anew, with another secret."""
        assigned = await self.assigned_relays()
        before = self._relay_by_id
        self._relay_by_id = {each.server.id: each.relay for each in assigned}
        added = tuple(
            each.server
            for each in assigned
            if not only_new or before.get(each.server.id) != each.relay
        )
        removed = tuple(id for id in before if id not in self._relay_by_id)
        if added or removed:
            self.say(Relays(added=added, removed=removed))
