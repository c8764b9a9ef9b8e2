"""What sessions, gateway actors and relay actors share: each owns one channel of one agent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar, Final
from uuid import UUID

import attrs
import structlog

from actors.attaching import PAUSE_NS, Attaching
from actors.attachment import Channel
from actors.enrolment import agreed_version, refusal
from actors.messages import (
    DIRECTORY,
    DRAINING,
    OWNERS,
    RELAYS,
    AgentMoved,
    AssignedRelay,
    AssignRelays,
    AttachClient,
    Attached,
    AttachGateway,
    CandidatesFrom,
    Closed,
    End,
    FromOwner,
    Heard,
    Moved,
    NotAttached,
    Probe,
    RelaysChanged,
    RevokeRelayUse,
    Stale,
    attendance_topic,
)
from actors.model import Client, Gateway
from actors.services import Bucket, Services
from channel.messages import (
    MAX_AUTHORIZATIONS,
    MAX_DOORS,
    AuthorizationRenewed,
    Candidates,
    Disconnect,
    DoorAddress,
    Held,
    HeldWanted,
    IpText,
    Join,
    LiveAuthorization,
    MoreHeld,
    Portals,
    RefusalCode,
    Relays,
    RelayServer,
)
from runtime.actor import (
    LATER,
    Actor,
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
from runtime.cluster.tenure import ROSTER, RosterChanged
from runtime.presence.tracker import Track

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
LINGER_NS = 1 * 10**9
"""So long an agent that is sent to another door may wait for what is under way."""
LINGER_CHECK_NS = 10 * 10**6

_log = structlog.get_logger("holloway.channel")


@attrs.frozen
class RenewRelays:
    """The TURN credentials of the agent have to be made anew."""


class ChannelOwner(Actor):
    """Ends with its channel, and its channel with it, whichever comes first."""

    def __init__(self, services: Services, channel: Channel, kind: str) -> None:
        self._services = services
        self._channel = channel
        self._kind = kind
        self._epoch: int | None = None
        self._asker: Caller | None = None
        self._relay_by_id: dict[UUID, ActorRef] = {}
        self._told_doors: tuple[DoorAddress, ...] | None = None  # None: before the init
        self._goodbye: Disconnect | None = refusal("unavailable", "the portal lost its place")
        self._lingers_until_ns: int | None = None
        self._counts: Counter[str] = Counter()

    def started(self) -> None:
        self.subscribe(OWNERS)
        self.subscribe(ROSTER)

    def terminated(self, reason: str) -> None:
        goodbye = refusal("shutting_down") if reason == "shutdown" else self._goodbye
        self._channel.close(goodbye)
        _log.info("agent_left", kind=self._kind, reason=reason, code=goodbye and goodbye.reason)

    @handles(Closed)
    def _on_closed(self, message: Closed) -> None:
        self._goodbye = None
        self.stop()

    @handles(End)
    def _on_end(self, message: End) -> None:
        if message.after_ns:
            self.send_after(message.after_ns, End(message.disconnect))
        elif message.disconnect.reason == DRAINING and self._lingers():
            self.send_after(LINGER_CHECK_NS, message)
        else:
            self.part(message.disconnect)

    def _lingers(self) -> bool:
        """Whether to carry through what is under way, before the agent is sent to another door."""
        now_ns = self.context.now()
        if self._lingers_until_ns is None:
            self._lingers_until_ns = now_ns + LINGER_NS
        return self.is_amid() and now_ns < self._lingers_until_ns

    def is_amid(self) -> bool:
        """Whether somebody waits for an answer that travels over this channel."""
        return False

    def part(self, disconnect: Disconnect) -> None:
        """Say this as the last thing. Who watches us learns by the reason of our end whether the
        agent will be back at once."""
        self._goodbye = disconnect
        self.stop(DRAINING if disconnect.reason == DRAINING else "normal")

    def refuse(self, reason: RefusalCode, detail: str = "") -> None:
        self.part(refusal(reason, detail, randomness=self._services.randomness))

    @handles(FromOwner)
    def _on_from_owner(self, message: FromOwner) -> object:
        return self.obey(message, self.context.caller)

    def obey(self, message: FromOwner, asker: Caller | None) -> object:
        """What the account's owner says is handled as if it had come by itself, unless a later
        owner was heard before. `asker` waits for the answer."""
        self._asker = asker
        if self._epoch is not None and message.epoch < self._epoch:
            self._counts["stale"] += 1
            return Raise(Stale())
        said = message.enclosed.message
        handler = self._plain_handlers.get(type(said))
        return None if handler is None else handler(self, said)

    def say(self, message: object, *, ref: int | None = None) -> None:
        """Send to the agent, under the epoch of the account's owner."""
        self._channel.send(message, ref=ref, epoch=self._epoch)

    # --- the portal's doors ----------------------------------------------------------------------

    def begin_doors(self) -> None:
        """The init was said: from now on the agent is told the portal's doors."""
        if self._told_doors is None:
            self._told_doors = ()
            self._tell_doors()

    @handles(RosterChanged)
    def _on_roster_changed(self, message: RosterChanged) -> None:
        if self._told_doors is not None:
            self._tell_doors()

    def _tell_doors(self) -> None:
        """They are of the node, not of the account: no epoch. A node that knows of none, or lost
        sight of the others, leaves the agent what it has."""
        doors = self._services.doors()[:MAX_DOORS]
        if doors and doors != self._told_doors:
            self._told_doors = doors
            self._channel.send(Portals(addresses=doors))


@attrs.frozen
class _Attach:
    """Find the account's actor, and learn the truth from it."""


@attrs.frozen
class _Present:
    """The node's tracker was started anew: be present in it."""


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
    """How many times the limits of candidates such an agent has."""

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
        self._version = agreed_version(join.versions)
        self._remote = remote
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
        if not self._held_follow:
            self.cast(self.context.ref, _Attach())
            return
        self.send_after(self._services.limits.held_deadline_ns, _HeldDue())
        for _ in range(HELD_WINDOW):
            self.say(HeldWanted())

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
                directory, AssignRelays(self._device.id, tuple(self._relay_by_id))
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
