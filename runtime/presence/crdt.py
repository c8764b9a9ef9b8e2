"""Who is present where: a delta CRDT, as a pure core.

An add-wins observed-remove set after Phoenix.Tracker.State (phoenix_pubsub) and "Delta State
Replicated Data Types" (Almeida, Shoker, Baquero, 2018). Every node holds one `PresenceState`, the
*replica*. It alone adds and removes its own entries, and learns those of others from them or from
anybody who knows them, in any order, any number of times.

How it works. A replica numbers all it does: 1, 2, 3, ... The pair (replica, number) is a *dot*. A
join makes an entry and gives it a dot; a leave takes the entry away and uses up a dot too, so that
the highest dot tells whether anything was missed. What a state knows of a replica are the dots that
it has *heard of* (its causal context: a clock, and a cloud of runs beyond it that are not connected
yet) and the entries among them that live. **A dot that is heard of and has no entry has left.** So
a removal needs no tombstone, and no late message brings back what is gone.

There is one kind of message, the `Slice`: "of this replica, of the dots after..upto and of the
removed ones, exactly these entries live". A delta is the slice since the last one; the full state
is the slice from 0, cut into as many as is convenient, since each is true by itself. Merging is
commutative, associative and idempotent.

A replica is `up`, `down` (its entries are kept but not shown; it may return from a partition with
few words) or unknown (never met, or removed for good; slices of it are dropped until it is up).
Of two incarnations of one name only the later one can be alive: its coming removes the earlier.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Final

import attrs

from runtime.errors import LimitReached

MAX_NAME_CHARACTERS: Final = 200
"""Of a replica's name, a topic, a key."""
MAX_META_BYTES: Final = 2_048
MAX_ENTRIES_PER_REPLICA: Final = 200_000
MAX_REPLICAS: Final = 256
"""Replicas known at one time, up or down."""
MAX_NAMES_REMEMBERED: Final = 4_096
"""Names whose latest incarnation is remembered after they were removed."""
MAX_CLOUD_RUNS: Final = 256
"""Runs of dots beyond the clock of one replica. A slice that would make more is not merged."""
MAX_SLICE_ENTRIES: Final = 1_000
"""Entries in a slice, and dots in its list of removed ones."""
MAX_NUMBER: Final = 2**62
"""The largest dot, member, incarnation and generation."""


class PresenceError(Exception):
    """Somebody sent what no replica can have said."""


@attrs.frozen(order=True)
class Replica:
    """One life of the presence of one node. `incarnation` is the node's and grows with each start
    of its process; `generation` grows when only its tracker is started anew. A replica that forgot
    its clock must never use the same three again."""

    name: str
    incarnation: int
    generation: int = 0

    @property
    def life(self) -> tuple[int, int]:
        """What orders the lives of one name."""
        return self.incarnation, self.generation

    def __str__(self) -> str:
        return f"{self.name}/{self.incarnation}.{self.generation}"


@attrs.frozen
class Entry:
    """A member (the number of an actor of the replica's node) present on `topic` as `key`.
    `clock` is its dot. `meta` is for whoever lists it; it carries no secret."""

    clock: int
    topic: str
    key: str
    member: int
    meta: bytes = b""


@attrs.frozen
class Slice:
    """Of the dots after < dot <= upto, and of `removed` (all of them at most `after`), exactly
    `entries` live. Both tuples ascend by dot."""

    replica: Replica
    after: int
    upto: int
    entries: tuple[Entry, ...] = ()
    removed: tuple[int, ...] = ()


@attrs.frozen
class Presence:
    """An entry and where it is."""

    replica: Replica
    entry: Entry


@attrs.frozen
class Changes:
    """What became visible and what ceased to be. An entry that was changed is in both, under one
    topic, key and member."""

    joined: tuple[Presence, ...] = ()
    left: tuple[Presence, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.joined or self.left)


NO_CHANGES: Final = Changes()


class Status(Enum):
    """Whether the entries of a replica are shown."""

    UP = "up"
    DOWN = "down"


@attrs.frozen(kw_only=True)
class PresenceStatistics:
    """Sizes now, and counts since the start."""

    replicas_up: int
    replicas_down: int
    entries: int
    visible: int
    cloud_runs: int
    merged: int
    dropped_unknown: int
    """Slices of replicas that are not known, or of ourselves."""
    dropped_limit: int
    """Slices that would have passed a limit."""


class PresenceState:
    """The presence that one replica knows. Plain and synchronous.

    Change it with `join`, `leave`, `update`; tell others with `take_delta` (to all, often) and
    `extract` (to whoever missed something); hear others with `merge`. Say who is there with
    `replica_up`, `replica_down`, `remove_replica`.
    """

    def __init__(
        self, replica: Replica, *, max_entries_per_replica: int = MAX_ENTRIES_PER_REPLICA
    ) -> None:
        _check_replica(replica)
        self.replica = replica
        self._max_entries = max_entries_per_replica
        self._own = _Known()
        self._known_by_replica: dict[Replica, _Known] = {replica: self._own}
        self._life_by_name: dict[str, tuple[int, int]] = {replica.name: replica.life}
        self._own_by_place: dict[tuple[str, str, int], Entry] = {}
        self._visible_by_topic: dict[str, dict[tuple[Replica, int], Presence]] = {}
        self._told = 0  # own dots up to here are in deltas that were taken
        self._untold_removals: list[int] = []  # of dots up to _told
        self._merged = 0
        self._dropped_unknown = 0
        self._dropped_limit = 0

    # --- our own entries -------------------------------------------------------------------------

    @property
    def clock(self) -> int:
        """The last own dot."""
        return self._own.heard.clock

    @property
    def untold(self) -> int:
        """About how much the next delta has to tell. Take it before MAX_SLICE_ENTRIES."""
        return self.clock - self._told

    def join(self, topic: str, key: str, member: int, meta: bytes = b"") -> Changes:
        """Add an entry of our own. Raises ValueError (a name or meta that is no name or too long,
        or it is there already) and LimitReached."""
        _check_entry(topic, key, member, meta)
        if (topic, key, member) in self._own_by_place:
            raise ValueError(f"{member} is present on {topic!r} as {key!r}")
        if len(self._own.entries) >= self._max_entries:
            raise LimitReached(f"a replica has at most {self._max_entries} entries")
        entry = Entry(self._advance(), topic, key, member, meta)
        self._own.entries[entry.clock] = entry
        self._own_by_place[topic, key, member] = entry
        return Changes(joined=(self._show(self.replica, entry),))

    def leave(self, topic: str, key: str, member: int) -> Changes:
        """Take an entry of our own away; nothing happens if it is not there."""
        entry = self._own_by_place.pop((topic, key, member), None)
        if entry is None:
            return NO_CHANGES
        del self._own.entries[entry.clock]
        if entry.clock <= self._told:
            self._untold_removals.append(entry.clock)
        self._advance()
        return Changes(left=(self._hide(self.replica, entry),))

    def update(self, topic: str, key: str, member: int, meta: bytes) -> Changes:
        """Give an entry of our own another meta. Raises ValueError if it is not there."""
        _check_entry(topic, key, member, meta)
        before = self._own_by_place.get((topic, key, member))
        if before is None:
            raise ValueError(f"{member} is not present on {topic!r} as {key!r}")
        if before.meta == meta:
            return NO_CHANGES
        left = self.leave(topic, key, member).left
        return Changes(joined=self.join(topic, key, member, meta).joined, left=left)

    # --- telling and hearing ---------------------------------------------------------------------

    def take_delta(self) -> tuple[Slice, ...]:
        """What we did since this was called last, in slices that tell it together; () if nothing.
        Each has at most MAX_SLICE_ENTRIES dots, and at least one, so that the loss of any of them
        shows in the clock."""
        told, upto = self._told, self.clock
        removed = sorted(self._untold_removals)  # each used up a dot, so there are not more of them
        self._told = upto
        self._untold_removals = []
        slices = []
        for place, after in enumerate(range(told, upto, MAX_SLICE_ENTRIES)):
            last = min(after + MAX_SLICE_ENTRIES, upto)
            dots = range(after + 1, last + 1)
            entries = tuple(self._own.entries[dot] for dot in dots if dot in self._own.entries)
            first = place * MAX_SLICE_ENTRIES
            gone = tuple(removed[first : first + MAX_SLICE_ENTRIES])
            slices.append(Slice(self.replica, after, last, entries, gone))
        return tuple(slices)

    def extract(self, replicas: Iterable[Replica] | None = None) -> Iterator[Slice]:
        """The full state of these replicas (default: all that are known), as far as it is known
        without a gap. Slices of at most MAX_SLICE_ENTRIES entries, each true by itself; take them
        before the state changes."""
        wanted = list(self._known_by_replica) if replicas is None else list(replicas)
        for replica in wanted:
            known = self._known_by_replica.get(replica)
            if known is not None and known.heard.clock > 0:
                yield from self._cut(replica, known)

    def merge(self, piece: Slice) -> Changes:
        """Learn from a slice. Nothing happens if it is our own, of a replica that is not known, or
        would pass a limit (all counted). Raises PresenceError for what no replica can have said,
        and changes nothing then."""
        check_slice(piece)
        known = self._known_by_replica.get(piece.replica)
        if known is None or known is self._own:
            self._dropped_unknown += 1
            return NO_CHANGES
        heard = known.heard
        told = {entry.clock for entry in piece.entries}
        fresh = [entry for entry in piece.entries if entry.clock not in heard]
        gone = [clock for clock in known.among(piece) if clock not in told]
        after = heard.with_slice(piece)
        fits = len(known.entries) - len(gone) + len(fresh) <= self._max_entries
        if not fits or len(after.cloud) > MAX_CLOUD_RUNS:
            self._dropped_limit += 1
            return NO_CHANGES
        known.heard = after
        removed = [known.entries.pop(clock) for clock in gone]
        known.entries.update((entry.clock, entry) for entry in fresh)
        self._merged += 1
        if known.status is Status.DOWN:
            return NO_CHANGES
        left = tuple(self._hide(piece.replica, entry) for entry in removed)
        return Changes(tuple(self._show(piece.replica, entry) for entry in fresh), left)

    # --- replicas --------------------------------------------------------------------------------

    def replica_up(self, replica: Replica) -> Changes | None:
        """The replica lives: show its entries. Earlier lives of its name are removed for good.
        None if a later life was seen (it is not up then), or it is ourselves. Raises LimitReached,
        PresenceError."""
        _check_replica(replica)
        if replica.life < self._life_by_name.get(replica.name, replica.life):
            return None
        if replica == self.replica:
            return None
        if replica.name == self.replica.name:
            raise PresenceError(f"another node calls itself {replica.name!r} too")
        known = self._known_by_replica.get(replica)
        if known is not None and known.status is Status.UP:
            return NO_CHANGES
        left: list[Presence] = []
        for other in [each for each in self._known_by_replica if each.name == replica.name]:
            if other != replica:
                left.extend(self.remove_replica(other).left)
        if known is None:
            if len(self._known_by_replica) >= MAX_REPLICAS:
                raise LimitReached(f"at most {MAX_REPLICAS} replicas are known at a time")
            known = self._known_by_replica[replica] = _Known()
        self._remember_life(replica)
        known.status = Status.UP
        joined = tuple(self._show(replica, entry) for entry in known.entries.values())
        return Changes(joined, tuple(left))

    def replica_down(self, replica: Replica) -> Changes:
        """The replica is not heard any more: show its entries no longer, but keep them."""
        known = self._known_by_replica.get(replica)
        if known is None or known is self._own or known.status is Status.DOWN:
            return NO_CHANGES
        known.status = Status.DOWN
        return Changes(left=tuple(self._hide(replica, each) for each in known.entries.values()))

    def remove_replica(self, replica: Replica) -> Changes:
        """The replica is gone for good: forget all about it. Should it be up once more, it has to
        tell everything again. Does nothing to ourselves."""
        if replica == self.replica:
            return NO_CHANGES
        changes = self.replica_down(replica)
        self._known_by_replica.pop(replica, None)
        return changes

    def status(self, replica: Replica) -> Status | None:
        """None: not known."""
        known = self._known_by_replica.get(replica)
        return None if known is None else known.status

    def replicas(self) -> dict[Replica, Status]:
        """All that are known, ourselves too."""
        return {replica: known.status for replica, known in self._known_by_replica.items()}

    def clock_of(self, replica: Replica) -> int:
        """Up to which dot everything of the replica is known (0: nothing, or not known)."""
        known = self._known_by_replica.get(replica)
        return 0 if known is None else known.heard.clock

    # --- reading ---------------------------------------------------------------------------------

    def present(self, topic: str) -> tuple[Presence, ...]:
        """Who is visible on a topic, in the order of (replica, dot): the same on every replica
        that knows the same."""
        found = self._visible_by_topic.get(topic, {})
        return tuple(found[place] for place in sorted(found))

    def topics(self) -> tuple[str, ...]:
        """The topics on which somebody is visible, sorted."""
        return tuple(sorted(self._visible_by_topic))

    def visible(self) -> frozenset[Presence]:
        """All that is visible."""
        return frozenset(
            each for places in self._visible_by_topic.values() for each in places.values()
        )

    def statistics(self) -> PresenceStatistics:
        everybody = self._known_by_replica.values()
        up = sum(known.status is Status.UP for known in everybody)
        return PresenceStatistics(
            replicas_up=up,
            replicas_down=len(self._known_by_replica) - up,
            entries=sum(len(known.entries) for known in everybody),
            visible=sum(map(len, self._visible_by_topic.values())),
            cloud_runs=sum(len(known.heard.cloud) for known in everybody),
            merged=self._merged,
            dropped_unknown=self._dropped_unknown,
            dropped_limit=self._dropped_limit,
        )

    # --- within ----------------------------------------------------------------------------------

    def _advance(self) -> int:
        clock = self.clock + 1
        self._own.heard = Heard(clock)
        return clock

    def _show(self, replica: Replica, entry: Entry) -> Presence:
        presence = Presence(replica, entry)
        self._visible_by_topic.setdefault(entry.topic, {})[replica, entry.clock] = presence
        return presence

    def _hide(self, replica: Replica, entry: Entry) -> Presence:
        places = self._visible_by_topic[entry.topic]
        presence = places.pop((replica, entry.clock))
        if not places:
            del self._visible_by_topic[entry.topic]
        return presence

    def _remember_life(self, replica: Replica) -> None:
        self._life_by_name.pop(replica.name, None)  # to the end: the longest unused is dropped
        self._life_by_name[replica.name] = replica.life
        if len(self._life_by_name) > MAX_NAMES_REMEMBERED:
            current = {each.name for each in self._known_by_replica}
            idle = next(name for name in self._life_by_name if name not in current)
            del self._life_by_name[idle]

    @staticmethod
    def _cut(replica: Replica, known: _Known) -> Iterator[Slice]:
        """Slices that tell all of `known` up to its clock."""
        after, upto = 0, known.heard.clock
        clocks = sorted(clock for clock in known.entries if clock <= upto)
        while len(clocks) > MAX_SLICE_ENTRIES:
            now, clocks = clocks[:MAX_SLICE_ENTRIES], clocks[MAX_SLICE_ENTRIES:]
            yield Slice(replica, after, now[-1], tuple(known.entries[each] for each in now))
            after = now[-1]
        yield Slice(replica, after, upto, tuple(known.entries[each] for each in clocks))


@attrs.frozen
class Heard:
    """The dots heard of one replica: 1..clock, and the runs (after, upto) of `cloud`, which
    ascend, do not touch each other or the clock, and hold after < dot <= upto."""

    clock: int = 0
    cloud: tuple[tuple[int, int], ...] = ()

    def __contains__(self, dot: int) -> bool:
        if dot <= self.clock:
            return True
        place = bisect.bisect_left(self.cloud, (dot, 0)) - 1
        return place >= 0 and self.cloud[place][0] < dot <= self.cloud[place][1]

    def with_slice(self, piece: Slice) -> Heard:
        """These dots and those that the slice tells of."""
        if piece.after <= self.clock and not piece.removed and not self.cloud:
            return Heard(max(self.clock, piece.upto))
        runs = [(0, self.clock), *self.cloud, (piece.after, piece.upto)]
        runs.extend((dot - 1, dot) for dot in piece.removed)
        joined: list[tuple[int, int]] = []
        for after, upto in sorted(runs):
            if joined and after <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(joined[-1][1], upto))
            elif after < upto or not joined:
                joined.append((after, upto))
        return Heard(joined[0][1], tuple(joined[1:]))


class _Known:
    """What is known of one replica: the dots heard of, and the entries that live, by dot."""

    __slots__ = ("entries", "heard", "status")

    def __init__(self) -> None:
        self.heard = Heard()
        self.entries: dict[int, Entry] = {}
        self.status = Status.UP

    def among(self, piece: Slice) -> list[int]:
        """The dots of living entries that the slice tells of."""
        span = range(piece.after + 1, piece.upto + 1)
        if len(span) < len(self.entries):
            within = [dot for dot in span if dot in self.entries]
        else:
            within = [dot for dot in self.entries if dot in span]
        within.extend(dot for dot in piece.removed if dot in self.entries)
        return within


def check_slice(piece: Slice) -> None:
    """Raises PresenceError unless a replica can have said this. Types are taken as declared."""
    _check_replica(piece.replica)
    if not 0 <= piece.after <= piece.upto <= MAX_NUMBER:
        raise PresenceError("the dots of a slice are out of order")
    if len(piece.entries) > MAX_SLICE_ENTRIES or len(piece.removed) > MAX_SLICE_ENTRIES:
        raise PresenceError(f"a slice tells of at most {MAX_SLICE_ENTRIES} entries")
    before = piece.after
    for entry in piece.entries:
        if not before < entry.clock <= piece.upto:
            raise PresenceError("the entries of a slice are out of order")
        before = entry.clock
        try:
            _check_entry(entry.topic, entry.key, entry.member, entry.meta)
        except ValueError as error:
            raise PresenceError(str(error)) from None
    before = 0
    for dot in piece.removed:
        if not before < dot <= piece.after:
            raise PresenceError("the removed dots of a slice are out of order")
        before = dot


def _check_replica(replica: Replica) -> None:
    if not 0 < len(replica.name) <= MAX_NAME_CHARACTERS:
        raise PresenceError(f"a replica's name has 1 to {MAX_NAME_CHARACTERS} characters")
    if not (0 <= replica.incarnation <= MAX_NUMBER and 0 <= replica.generation <= MAX_NUMBER):
        raise PresenceError("a replica's incarnation is out of range")


def _check_entry(topic: str, key: str, member: int, meta: bytes) -> None:
    if not (0 < len(topic) <= MAX_NAME_CHARACTERS and 0 < len(key) <= MAX_NAME_CHARACTERS):
        raise ValueError(f"a topic and a key have 1 to {MAX_NAME_CHARACTERS} characters")
    if not 0 <= member <= MAX_NUMBER:
        raise ValueError("a member's number is out of range")
    if len(meta) > MAX_META_BYTES:
        raise ValueError(f"the meta of an entry has at most {MAX_META_BYTES} bytes")
