"""What sessions, gateway actors and relay actors share: each owns one channel of one agent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar
from uuid import UUID

import attrs
import structlog

from actors.attachment import Channel
from actors.enrolment import occupied, refusal
from actors.messages import (
    DIRECTORY,
    DRAINING,
    OWNERS,
    RELAYS,
    AgentMoved,
    AssignedRelay,
    AssignRelays,
    AttachClient,
    AttachGateway,
    CandidatesFrom,
    ClientTruth,
    Closed,
    End,
    FromOwner,
    GatewayTruth,
    Heard,
    Moved,
    Occupied,
    Probe,
    RelaysChanged,
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
    Raise,
    handles,
)
from runtime.cluster.node import TRACKER
from runtime.cluster.tenure import ROSTER, RosterChanged
from runtime.presence.tracker import Track

HELD_WINDOW = 4
"""So many `MoreHeld` are under way at a time."""
ATTACH_DEADLINE_NS = 10 * 10**9
LOCATE_NS = 2 * 10**9
"""For one of the attempts to find where the account lives: all of them outlast a node's lease."""
MAX_ATTACH_ATTEMPTS = 6
MAX_PROBES = 16
"""So many newcomers at a time may wait for a sign of life of one agent."""
MAX_UNSENT = 100
"""So much for the account's actor is kept while it moves to another node."""
LINGER_NS = 1 * 10**9
"""So long an agent that is sent to another door may wait for what is under way."""
LINGER_CHECK_NS = 10 * 10**6
REATTACH_NS = 50 * 10**6
"""The first pause before an account actor that ended is looked for again; it doubles."""

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
        """What the account's owner says is handled as if it had come by itself, unless a later
        owner was heard before."""
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
        self._number: int | None = None
        self._probing: list[Caller] = []
        self._tunnel_key = join.tunnel_key
        self._incarnation = join.incarnation
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

    @handles(_Attach)
    async def _on_attach(self, message: _Attach) -> None:
        is_first = self._number is None
        ask = self._question(tuple(self._held) if is_first else self._held_now())
        truth = await self._ask_for_truth(ask)
        if truth is None:
            return
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
        if self._remote != ask.remote:
            self._tell_moved()

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

    async def _ask_for_truth(
        self, ask: AttachClient | AttachGateway
    ) -> ClientTruth | GatewayTruth | None:
        """The account actor's truth for this agent, or None if the channel has to be closed."""
        pause_ns = REATTACH_NS
        for _ in range(MAX_ATTACH_ATTEMPTS):
            try:
                account = await self._services.accounts.locate(
                    self, self._account_id, deadline_ns=LOCATE_NS
                )
                answer = await self.call(account, ask, ATTACH_DEADLINE_NS)
            except ActorError:
                await self.sleep(pause_ns + self._services.randomness.integer(pause_ns))
                pause_ns *= 2
                continue
            if isinstance(answer, Occupied):
                if await self._is_alive(answer.owner):
                    self.part(occupied(self._services.randomness))
                    return None
                assert isinstance(ask, AttachGateway)
                ask = attrs.evolve(ask, replaces=answer.owner)
                continue
            if isinstance(answer, Disconnect):
                self.part(answer)
                return None
            assert isinstance(answer, ClientTruth | GatewayTruth)
            self._account = account
            self._account_watch = self.monitor(account)
            return answer
        self.refuse("unavailable")
        return None

    async def _is_alive(self, owner: ActorRef) -> bool:
        """Whether the agent at the other end of this owner's channel is heard in time."""
        try:
            await self.call(owner, Probe(), self._services.limits.probe_ns)
        except CallError:
            return False
        return True

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
            self._account = None
            self.cast(self.context.ref, _Attach())
        elif message.ref == self._tracker:
            self._tracker = None
            self.send_after(REATTACH_NS, _Present())

    @handles(RosterChanged)
    def _on_roster_changed(self, message: RosterChanged) -> None:
        """The account may live elsewhere now, and its actor may not be able to say so."""
        super()._on_roster_changed(message)
        account = self._account
        owner = self._services.tenure.owner_of(self._account_id)
        if account is not None and owner not in (None, account.node):
            self._account = None
            if self._account_watch is not None:
                self.demonitor(self._account_watch)
            self.cast(self.context.ref, _Attach())

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
