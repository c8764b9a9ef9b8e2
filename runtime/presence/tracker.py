"""The process around the presence CRDT: an actor per node, after Phoenix.Tracker.

It tracks actors of its own node (who ends, leaves), tells other nodes with heartbeats that carry
what is new, hears theirs, and asks for a transfer of the full state where it missed something.

    heartbeat   every `heartbeat_ns`, and `flush_ns` after a change: the clock and the delta
    gap         a heartbeat whose clock is ahead of what we know: ask its sender for a transfer
    silence     after `down_ns` a node is down (hidden), after `forget_ns` forgotten;
                `NodeLost` says that it is down at once, `Farewell` that it left for good

Nothing here knows how messages travel. What is to be sent is published as `Outgoing` on the topic
OUTGOING of this node; whoever carries it casts `FromNode` to the tracker over there. Messages may
be lost, doubled and reordered. What changes is published as `Changes` on `("presence", topic)`.

A tracker that is started anew has lost its clock, so it needs a `Replica` of its own (see
`lives_of`), and who was tracked must be tracked again: monitor the tracker, or track in a handler
of its restart.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import count
from typing import Any, Final

import attrs

from runtime.actor import Actor, ActorRef, Down, LimitReached, Monitor, Raise, handles
from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.presence.crdt import (
    MAX_SLICE_ENTRIES,
    Changes,
    Presence,
    PresenceError,
    PresenceState,
    PresenceStatistics,
    Replica,
    Slice,
    Status,
)

OUTGOING: Final = ("presence", "outgoing", "to other nodes")
"""The topic of this node on which `Outgoing` is published. (No presence topic has three parts.)"""

MAX_PLACES_PER_MEMBER: Final = 64
"""Entries of one actor."""


def changes_topic(topic: str) -> Hashable:
    """The topic of this node on which the Changes of a presence topic are published."""
    return ("presence", topic)


def lives_of(name: str, incarnation: int) -> Callable[[], Replica]:
    """Replicas for the trackers of one node process, a new one at each call (for the factory that
    a supervisor restarts the tracker by). `incarnation` grows with each start of the process."""
    generations = count()
    return lambda: Replica(name, incarnation, next(generations))


# --- between nodes -------------------------------------------------------------------------------


@attrs.frozen
class Heartbeat:
    """The sender lives, has come to `clock`, and did this."""

    sender: Replica
    clock: int
    slices: tuple[Slice, ...] = ()


@attrs.frozen
class TransferRequest:
    """The sender missed something of ours and wants our full state."""

    sender: Replica


@attrs.frozen
class Transfer:
    """A part of the sender's full state, true by itself."""

    sender: Replica
    slices: tuple[Slice, ...]


@attrs.frozen
class Farewell:
    """The sender ends in good order: its entries leave for good."""

    sender: Replica


PeerMessage = Heartbeat | TransferRequest | Transfer | Farewell
PEER_MESSAGES: Final[tuple[type, ...]] = (Heartbeat, TransferRequest, Transfer, Farewell)


@attrs.frozen
class Outgoing:
    """Carry `message` to the tracker of node `to`, or of every other node (None)."""

    to: str | None
    message: PeerMessage


@attrs.frozen
class FromNode:
    """`message` came from the node that proved to be `node`."""

    node: str
    message: PeerMessage


@attrs.frozen
class NodeLost:
    """The connection to a node is gone: show its entries no longer, until it is heard again."""

    node: str


# --- on this node --------------------------------------------------------------------------------


@attrs.frozen
class Track:
    """Have `member` (of this node) present on `topic` as `key` until it ends. Refused with
    ValueError or LimitReached; see `PresenceState.join`."""

    topic: str
    key: str
    member: ActorRef
    meta: bytes = b""


@attrs.frozen
class Update:
    """Give what is tracked another meta. Refused with ValueError if it is not there."""

    topic: str
    key: str
    member: ActorRef
    meta: bytes


@attrs.frozen
class Untrack:
    """Undo `Track`; harmless if it was not there."""

    topic: str
    key: str
    member: ActorRef


@attrs.frozen
class WhoIsPresent:
    """Reply: all Presences of a topic, in an order that is the same on every node."""

    topic: str


@attrs.frozen
class AskTracker:
    """Reply: TrackerStatistics."""


@attrs.frozen
class Tick:
    """To itself: it is time for a heartbeat."""


@attrs.frozen
class Flush:
    """To itself: tell what has changed."""


@attrs.frozen(kw_only=True)
class TrackerSettings:
    """Durations in nanoseconds. `down_ns` should be several heartbeats."""

    heartbeat_ns: int = 500 * NS_PER_MS
    flush_ns: int = 20 * NS_PER_MS
    down_ns: int = 3 * NS_PER_S
    forget_ns: int = 20 * 60 * NS_PER_S
    transfer_patience_ns: int = NS_PER_S
    """How long to wait for a transfer before it is asked for again."""

    def __attrs_post_init__(self) -> None:
        if not 0 < self.flush_ns <= self.heartbeat_ns < self.down_ns < self.forget_ns:
            raise ValueError("it must be flush <= heartbeat < down < forget")
        if self.transfer_patience_ns <= 0:
            raise ValueError("transfer_patience_ns must be positive")


@attrs.frozen(kw_only=True)
class TrackerStatistics:
    """Counts since the start; `state` is the CRDT's own."""

    members: int
    heartbeats_sent: int
    heartbeats_heard: int
    gaps: int
    transfers_asked: int
    transfers_given: int
    refused: int
    """Messages that no tracker can have sent, or that came from another node than they said."""
    stale: int
    """Messages of an earlier life."""
    state: PresenceStatistics


@attrs.define
class _Peer:
    """A replica that is heard, or was."""

    heard_ns: int
    asked_ns: int | None = None


@attrs.define
class _Member:
    """An actor of this node with the places where it is present."""

    monitor: Monitor
    places: set[tuple[str, str]]


class Tracker(Actor):
    """The presence of one node. `replica` is a life that was never used before."""

    mailbox_limit = 10_000

    def __init__(self, replica: Replica, settings: TrackerSettings | None = None) -> None:
        self.settings = settings or TrackerSettings()
        self._state = PresenceState(replica)
        self._peers: dict[Replica, _Peer] = {}
        self._members: dict[ActorRef, _Member] = {}
        self._flushing = False
        self._heartbeats_sent = 0
        self._heartbeats_heard = 0
        self._gaps = 0
        self._transfers_asked = 0
        self._transfers_given = 0
        self._refused = 0
        self._stale = 0

    def started(self) -> None:
        self.tick(Tick())

    def terminated(self, reason: str) -> None:
        self._send(None, Farewell(self._state.replica))

    # --- members ---------------------------------------------------------------------------------

    @handles(Track)
    def track(self, message: Track) -> Raise | None:
        ref = message.member
        if ref.node != self.context.ref.node:
            return Raise(ValueError(f"{ref} is not an actor of this node"))
        member = self._members.get(ref)
        if member is not None and len(member.places) >= MAX_PLACES_PER_MEMBER:
            return Raise(LimitReached(f"an actor is present at most {MAX_PLACES_PER_MEMBER} times"))
        try:
            changes = self._state.join(message.topic, message.key, ref.number, message.meta)
        except (ValueError, LimitReached) as error:
            return Raise(error)
        if member is None:
            member = self._members[ref] = _Member(self.monitor(ref), set())
        member.places.add((message.topic, message.key))
        self._changed(changes)
        return None

    @handles(Update)
    def update(self, message: Update) -> Raise | None:
        try:
            changes = self._state.update(
                message.topic, message.key, message.member.number, message.meta
            )
        except ValueError as error:
            return Raise(error)
        self._changed(changes)
        return None

    @handles(Untrack)
    def untrack(self, message: Untrack) -> None:
        member = self._members.get(message.member)
        if member is None or (message.topic, message.key) not in member.places:
            return
        member.places.remove((message.topic, message.key))
        if not member.places:
            self.demonitor(member.monitor)
            del self._members[message.member]
        self._changed(self._state.leave(message.topic, message.key, message.member.number))

    @handles(Down)
    def member_ended(self, message: Down) -> None:
        member = self._members.pop(message.ref, None)
        for topic, key in sorted(member.places if member is not None else ()):
            self._changed(self._state.leave(topic, key, message.ref.number))

    @handles(WhoIsPresent)
    def who_is_present(self, message: WhoIsPresent) -> tuple[Presence, ...]:
        return self._state.present(message.topic)

    @handles(AskTracker)
    def statistics(self, message: AskTracker) -> TrackerStatistics:
        return TrackerStatistics(
            members=len(self._members),
            heartbeats_sent=self._heartbeats_sent,
            heartbeats_heard=self._heartbeats_heard,
            gaps=self._gaps,
            transfers_asked=self._transfers_asked,
            transfers_given=self._transfers_given,
            refused=self._refused,
            stale=self._stale,
            state=self._state.statistics(),
        )

    # --- time ------------------------------------------------------------------------------------

    @handles(Tick)
    def tick(self, message: Tick) -> None:
        self.send_after(self.settings.heartbeat_ns, Tick())
        self._tell()
        now = self.context.now()
        for replica, peer in list(self._peers.items()):
            silent_ns = now - peer.heard_ns
            if silent_ns >= self.settings.forget_ns:
                del self._peers[replica]
                self._announce(self._state.remove_replica(replica))
            elif silent_ns >= self.settings.down_ns:
                self._announce(self._state.replica_down(replica))

    @handles(Flush)
    def flush(self, message: Flush) -> None:
        self._flushing = False
        if self._state.untold:
            self._tell()

    # --- other nodes -----------------------------------------------------------------------------

    @handles(FromNode)
    def from_node(self, message: FromNode) -> None:
        sender = message.message.sender
        if sender.name != message.node:
            self._refused += 1
            return
        try:
            self._hear(sender, message.message)
        except (PresenceError, LimitReached):
            self._refused += 1

    @handles(NodeLost)
    def node_lost(self, message: NodeLost) -> None:
        for replica in self._peers:
            if replica.name == message.node:
                self._announce(self._state.replica_down(replica))

    def _hear(self, sender: Replica, message: PeerMessage) -> None:
        if isinstance(message, Farewell):
            self._peers.pop(sender, None)
            self._announce(self._state.remove_replica(sender))
            return
        known = self._state.status(sender)
        if known is None and isinstance(message, Transfer):
            return  # the end of a life that is forgotten
        changes = self._state.replica_up(sender)
        if changes is None:
            self._stale += 1
            return
        now = self.context.now()
        peer = self._peers.get(sender)
        if peer is None:
            self._forget_earlier_lives(sender)
            peer = self._peers[sender] = _Peer(now)
        peer.heard_ns = now
        self._announce(changes)
        if known is not Status.UP:  # it may not know of us either
            self._send(sender.name, Heartbeat(self._state.replica, self._told_clock))
        match message:
            case Heartbeat():
                self._heartbeats_heard += 1
                self._merge(message.slices)
                self._look_for_gap(sender, peer, message.clock)
            case Transfer():
                self._merge(message.slices)
            case TransferRequest():
                self._transfers_given += 1
                for piece in list(self._state.extract([self._state.replica])):
                    self._send(sender.name, Transfer(self._state.replica, (piece,)))

    def _forget_earlier_lives(self, replica: Replica) -> None:
        for other in [each for each in self._peers if each.name == replica.name]:
            del self._peers[other]

    def _look_for_gap(self, sender: Replica, peer: _Peer, clock: int) -> None:
        if self._state.clock_of(sender) >= clock:
            peer.asked_ns = None
            return
        now = self.context.now()
        patience_ns = self.settings.transfer_patience_ns
        if peer.asked_ns is not None and now - peer.asked_ns < patience_ns:
            return
        if peer.asked_ns is None:
            self._gaps += 1
        peer.asked_ns = now
        self._transfers_asked += 1
        self._send(sender.name, TransferRequest(self._state.replica))

    def _merge(self, slices: Iterable[Slice]) -> None:
        for piece in slices:
            self._announce(self._state.merge(piece))

    # --- telling ---------------------------------------------------------------------------------

    @property
    def _told_clock(self) -> int:
        """What others can have heard of by now."""
        return self._state.clock - self._state.untold

    def _changed(self, changes: Changes) -> None:
        """Something of ours has changed: announce it here now, and to others soon."""
        self._announce(changes)
        if self._state.untold >= MAX_SLICE_ENTRIES // 2:
            self._tell()
        elif self._state.untold and not self._flushing:
            self._flushing = True
            self.send_after(self.settings.flush_ns, Flush())

    def _tell(self) -> None:
        """One heartbeat with all that is new."""
        replica = self._state.replica
        pieces = self._state.take_delta()
        for piece in pieces:
            self._send(None, Heartbeat(replica, piece.upto, (piece,)))
        if not pieces:
            self._send(None, Heartbeat(replica, self._state.clock))

    def _send(self, to: str | None, message: PeerMessage) -> None:
        self._heartbeats_sent += isinstance(message, Heartbeat)
        self.carry(to, message)

    def carry(self, to: str | None, message: PeerMessage) -> None:
        """Send to the tracker of node `to`, or of every other node (None)."""
        self.publish(OUTGOING, Outgoing(to, message))

    def _announce(self, changes: Changes) -> None:
        if not changes:
            return
        by_topic: dict[str, tuple[list[Any], list[Any]]] = {}
        for side, presences in enumerate((changes.joined, changes.left)):
            for each in presences:
                by_topic.setdefault(each.entry.topic, ([], []))[side].append(each)
        for topic, (joined, left) in by_topic.items():
            self.publish(changes_topic(topic), Changes(tuple(joined), tuple(left)))
