"""The presence CRDT: one by one, and any history against a reference model."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from runtime.errors import LimitReached
from runtime.presence.crdt import (
    MAX_CLOUD_RUNS,
    MAX_META_BYTES,
    MAX_NAME_CHARACTERS,
    MAX_REPLICAS,
    MAX_SLICE_ENTRIES,
    NO_CHANGES,
    Changes,
    Entry,
    Heard,
    Presence,
    PresenceError,
    PresenceState,
    Replica,
    Slice,
    Status,
)

A, B, C = (Replica(name, 1) for name in "abc")


def pair() -> tuple[PresenceState, PresenceState]:
    """Two replicas that have met."""
    one, other = PresenceState(A), PresenceState(B)
    one.replica_up(B)
    other.replica_up(A)
    return one, other


def tell(source: PresenceState, *others: PresenceState) -> None:
    for piece in source.take_delta():
        for other in others:
            other.merge(piece)


def keys(state: PresenceState, topic: str = "t") -> list[str]:
    return [each.entry.key for each in state.present(topic)]


def test_a_join_and_a_leave_travel_in_deltas():
    a, b = pair()
    a.join("t", "ann", 1, b"meta")
    tell(a, b)
    assert keys(b) == ["ann"]
    assert b.present("t")[0] == Presence(A, Entry(1, "t", "ann", 1, b"meta"))
    a.leave("t", "ann", 1)
    tell(a, b)
    assert keys(a) == keys(b) == []
    assert b.topics() == ()


def test_what_joined_and_left_between_two_deltas_is_told_without_being_there():
    a, b = pair()
    a.join("t", "ann", 1)
    a.leave("t", "ann", 1)
    (piece,) = a.take_delta()
    assert piece == Slice(A, 0, 2)
    assert b.merge(piece) == NO_CHANGES
    assert b.clock_of(A) == 2
    assert a.take_delta() == ()


def test_a_late_join_does_not_bring_back_who_has_left():
    a, b = pair()
    a.join("t", "ann", 1)
    joined = a.take_delta()
    a.leave("t", "ann", 1)
    left = a.take_delta()
    for piece in (*left, *joined, *joined):
        b.merge(piece)
    assert keys(b) == []
    assert b.clock_of(A) == a.clock


def test_an_update_is_one_change_of_the_same_member():
    a, b = pair()
    a.join("t", "ann", 1, b"old")
    tell(a, b)
    a.update("t", "ann", 1, b"new")
    (piece,) = a.take_delta()
    changes = b.merge(piece)
    assert [each.entry.meta for each in changes.left] == [b"old"]
    assert [each.entry.meta for each in changes.joined] == [b"new"]
    assert a.update("t", "ann", 1, b"new") == NO_CHANGES


def test_a_member_may_be_present_under_one_key_from_two_nodes():
    a, b = pair()
    a.join("t", "ann", 1)
    b.join("t", "ann", 1)
    tell(a, b)
    tell(b, a)
    assert a.visible() == b.visible()
    assert keys(a) == ["ann", "ann"]
    b.leave("t", "ann", 1)
    tell(b, a)
    assert keys(a) == ["ann"]


def test_a_gap_is_seen_and_healed_by_the_full_state():
    a, b = pair()
    a.join("t", "ann", 1)
    tell(a, b)
    a.leave("t", "ann", 1)
    a.take_delta()  # lost
    a.join("t", "bob", 2)
    tell(a, b)
    assert keys(b) == ["ann", "bob"]
    assert b.clock_of(A) == 1 < a.clock
    assert b.statistics().cloud_runs == 1
    for piece in a.extract([A]):
        b.merge(piece)
    assert keys(b) == ["bob"]
    assert b.clock_of(A) == a.clock
    assert b.statistics().cloud_runs == 0


def test_the_full_state_may_come_from_a_third():
    a, b = pair()
    c = PresenceState(C)
    for state in (a, b):
        c.replica_up(state.replica)
    a.join("t", "ann", 1)
    tell(a, b)
    for piece in b.extract():
        c.merge(piece)
    assert c.visible() == a.visible()


def test_a_replica_that_is_down_is_hidden_and_returns_with_what_it_did_meanwhile():
    a, b = pair()
    a.join("t", "ann", 1)
    tell(a, b)
    assert [each.entry.key for each in b.replica_down(A).left] == ["ann"]
    assert keys(b) == []
    a.join("t", "bob", 2)
    tell(a, b)
    assert keys(b) == []
    returned = b.replica_up(A)
    assert returned is not None
    assert {each.entry.key for each in returned.joined} == {"ann", "bob"}


def test_a_removed_replica_is_forgotten_and_may_tell_everything_again():
    a, b = pair()
    a.join("t", "ann", 1)
    tell(a, b)
    assert [each.entry.key for each in b.remove_replica(A).left] == ["ann"]
    for piece in a.extract():
        assert b.merge(piece) == NO_CHANGES
    assert b.status(A) is None
    assert b.statistics().dropped_unknown == 1
    b.replica_up(A)
    for piece in a.extract():
        b.merge(piece)
    assert b.visible() == a.visible()


def test_a_new_incarnation_ends_the_one_before_and_no_old_word_counts_any_more():
    a, b = pair()
    a.join("t", "ann", 1)
    old = list(a.extract())
    for piece in old:
        b.merge(piece)
    changes = b.replica_up(Replica("a", 1, 1))
    assert changes is not None
    assert [each.entry.key for each in changes.left] == ["ann"]
    for piece in old:
        b.merge(piece)
    assert b.replica_up(A) is None
    assert keys(b) == []
    b.remove_replica(Replica("a", 1, 1))
    assert b.replica_up(A) is None


def test_nobody_changes_the_entries_of_another_replica():
    a, _ = pair()
    a.join("t", "ann", 1)
    assert a.merge(Slice(A, 0, 9)) == NO_CHANGES
    assert keys(a) == ["ann"]
    assert a.replica_down(A) == a.remove_replica(A) == NO_CHANGES
    assert a.replica_up(A) is None
    assert keys(a) == ["ann"]
    with pytest.raises(PresenceError, match="calls itself"):
        a.replica_up(Replica("a", 2))


def test_many_entries_travel_in_slices_that_are_true_each_by_itself():
    a, b = pair()
    count = 2 * MAX_SLICE_ENTRIES + 5
    for number in range(count):
        a.join("t", f"k{number}", number)
    pieces = a.take_delta()
    assert len(pieces) == 3
    for piece in reversed(pieces):
        b.merge(piece)
    assert b.visible() == a.visible()
    for number in range(count):
        a.leave("t", f"k{number}", number)
    pieces = a.take_delta()
    assert max(len(piece.removed) for piece in pieces) == MAX_SLICE_ENTRIES
    for piece in reversed(pieces):
        b.merge(piece)
    assert b.visible() == frozenset()
    assert b.clock_of(A) == a.clock


def test_limits_of_our_own():
    a = PresenceState(A, max_entries_per_replica=2)
    for topic, key, member, meta in (
        ("", "k", 1, b""),
        ("t", "", 1, b""),
        ("t" * (MAX_NAME_CHARACTERS + 1), "k", 1, b""),
        ("t", "k", -1, b""),
        ("t", "k", 1, bytes(MAX_META_BYTES + 1)),
    ):
        with pytest.raises(ValueError, match=r"a topic|a member|the meta"):
            a.join(topic, key, member, meta)
    a.join("t", "k", 1)
    with pytest.raises(ValueError, match="is present"):
        a.join("t", "k", 1)
    with pytest.raises(ValueError, match="not present"):
        a.update("t", "k", 2, b"")
    a.join("t", "k", 2)
    with pytest.raises(LimitReached):
        a.join("t", "k", 3)
    assert a.clock == 2
    assert a.leave("t", "nobody", 9) == NO_CHANGES


def test_limits_on_others():
    b = PresenceState(B, max_entries_per_replica=2)
    b.replica_up(A)
    entries = tuple(Entry(number, "t", "k", number) for number in (1, 2, 3))
    assert b.merge(Slice(A, 0, 3, entries)) == NO_CHANGES
    assert b.clock_of(A) == 0, "what was not taken up was not heard of"
    b.merge(Slice(A, 0, 2, entries[:2]))
    for number in range(MAX_CLOUD_RUNS + 5):
        b.merge(Slice(A, 10 + 2 * number, 11 + 2 * number))
    assert b.statistics().cloud_runs == MAX_CLOUD_RUNS
    assert b.statistics().dropped_limit == 6
    for number in range(MAX_REPLICAS - 2):
        b.replica_up(Replica(f"n{number}", 1))
    with pytest.raises(LimitReached):
        b.replica_up(Replica("one-too-many", 1))


@pytest.mark.parametrize(
    "piece",
    [
        Slice(A, 2, 1),
        Slice(A, -1, 1),
        Slice(A, 0, 2**63),
        Slice(Replica("", 1), 0, 1),
        Slice(Replica("a", -1), 0, 1),
        Slice(A, 1, 2, (Entry(1, "t", "k", 1),)),
        Slice(A, 0, 2, (Entry(3, "t", "k", 1),)),
        Slice(A, 0, 2, (Entry(2, "t", "k", 1), Entry(1, "t", "k", 2))),
        Slice(A, 0, 2, (Entry(2, "", "k", 1),)),
        Slice(A, 3, 4, (), (4,)),
        Slice(A, 3, 4, (), (2, 2)),
        Slice(A, 3, 4, (), (0,)),
        Slice(A, 5_000, 5_000, (), tuple(range(1, MAX_SLICE_ENTRIES + 2))),
    ],
)
def test_what_no_replica_can_have_said_is_refused_and_changes_nothing(piece: Slice):
    b = PresenceState(B)
    b.replica_up(A)
    before = b.statistics()
    with pytest.raises(PresenceError):
        b.merge(piece)
    assert b.statistics() == before


runs = st.tuples(st.integers(0, 12), st.integers(0, 4)).map(lambda each: (each[0], sum(each)))


@given(st.lists(st.tuples(runs, st.sets(st.integers(1, 12)))))
def test_dots_heard_of_are_the_set_of_dots_told(told: list[tuple[tuple[int, int], set[int]]]):
    heard, model = Heard(), set()
    for (after, upto), removed in told:
        earlier = tuple(sorted(dot for dot in removed if dot <= after))
        heard = heard.with_slice(Slice(A, after, upto, (), earlier))
        model |= {*range(after + 1, upto + 1), *earlier}
        assert {dot for dot in range(1, 20) if dot in heard} == model
        edges = [heard.clock, *(edge for run in heard.cloud for edge in run)]
        assert edges == sorted(set(edges)), "runs ascend and do not touch"


# --- any history ---------------------------------------------------------------------------------


class Reference:
    """What one replica knows, said as simply as can be: all dots it was ever told of, and those of
    them that left. Nothing is ever compacted."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.told: set[tuple[Replica, int]] = set()
        self.left: set[tuple[Replica, int]] = set()
        self.up: dict[Replica, bool] = {replica: True}

    def merge(self, piece: Slice) -> None:
        if piece.replica not in self.up or piece.replica == self.replica:
            return
        dots = {*range(piece.after + 1, piece.upto + 1), *piece.removed}
        alive = {entry.clock for entry in piece.entries}
        self.told |= {(piece.replica, dot) for dot in dots}
        self.left |= {(piece.replica, dot) for dot in dots - alive}

    def forget(self, replica: Replica) -> None:
        self.up.pop(replica, None)
        self.told = {dot for dot in self.told if dot[0] != replica}
        self.left = {dot for dot in self.left if dot[0] != replica}

    def visible(self) -> set[tuple[Replica, int]]:
        return {dot for dot in self.told - self.left if self.up.get(dot[0])}


NAMES = ("a", "b", "c", "d")
names = st.sampled_from(NAMES)


class AnyHistory(RuleBasedStateMachine):
    """Four nodes. Every message goes into a bag, from which it is delivered in any order, any
    number of times, or never; nodes lose sight of each other, die, forget and return."""

    @initialize()
    def begin(self) -> None:
        self.incarnation = dict.fromkeys(NAMES, 0)
        self.state: dict[str, PresenceState] = {}
        self.model: dict[str, Reference] = {}
        self.present: dict[str, dict[tuple[str, str, int], bytes]] = {}
        self.entry_by_dot: dict[tuple[Replica, int], Entry] = {}
        self.bag: list[Slice] = []
        for name in NAMES:
            self._boot(name)
        for name in NAMES:
            for other in NAMES:
                self.meet(name, other)

    def _boot(self, name: str) -> None:
        self.incarnation[name] += 1
        replica = Replica(name, self.incarnation[name])
        self.state[name] = PresenceState(replica)
        self.model[name] = Reference(replica)
        self.present[name] = {}

    def _living(self, name: str) -> bool:
        return name in self.state

    @rule(name=names, topic=st.sampled_from("xy"), member=st.integers(1, 3), meta=st.binary())
    def join_or_update(self, name: str, topic: str, member: int, meta: bytes) -> None:
        if not self._living(name):
            return
        place = (topic, "key", member)
        if place not in self.present[name]:
            changes = self.state[name].join(*place, meta[:4])
        else:
            changes = self.state[name].update(*place, meta[:4])
        self.present[name][place] = meta[:4]
        self._note(name, changes)

    @rule(name=names, topic=st.sampled_from("xy"), member=st.integers(1, 3))
    def leave(self, name: str, topic: str, member: int) -> None:
        if self._living(name):
            self.present[name].pop((topic, "key", member), None)
            self._note(name, self.state[name].leave(topic, "key", member))

    def _note(self, name: str, changes: Changes) -> None:
        """The model's own dots: all up to the clock; those without an entry left."""
        state, model = self.state[name], self.model[name]
        for each in changes.joined:
            self.entry_by_dot[each.replica, each.entry.clock] = each.entry
        model.told |= {(state.replica, dot) for dot in range(1, state.clock + 1)}
        joined = {(each.replica, each.entry.clock) for each in changes.joined}
        model.left |= {(each.replica, each.entry.clock) for each in changes.left}
        model.left |= {dot for dot in model.told if dot not in self.entry_by_dot} - joined

    @rule(name=names)
    def send_delta(self, name: str) -> None:
        if self._living(name):
            self.bag.extend(self.state[name].take_delta())

    @rule(name=names)
    def tell_everybody_now(self, name: str) -> None:
        if self._living(name):
            pieces = self.state[name].take_delta()
            self.bag.extend(pieces)
            for other in NAMES:
                for piece in pieces:
                    self._hear(other, piece)

    @rule(name=names)
    def send_full_state(self, name: str) -> None:
        if self._living(name):
            self.bag.extend(self.state[name].extract())

    @precondition(lambda self: self.bag)
    @rule(data=st.data(), name=names)
    def deliver(self, data: st.DataObject, name: str) -> None:
        piece = data.draw(st.sampled_from(self.bag))
        self._hear(name, piece)

    def _hear(self, name: str, piece: Slice) -> None:
        if not self._living(name):
            return
        state, model = self.state[name], self.model[name]
        before = state.visible()
        changes = state.merge(piece)
        model.merge(piece)
        assert (before - set(changes.left)) | set(changes.joined) == state.visible()

    @rule(name=names, other=names)
    def meet(self, name: str, other: str) -> None:
        if name != other and self._living(name) and self.incarnation[other]:
            self._meet(name, Replica(other, self.incarnation[other]))

    @rule(name=names, other=names)
    def hear_of_an_earlier_life(self, name: str, other: str) -> None:
        if name != other and self._living(name) and self.incarnation[other] > 1:
            self._meet(name, Replica(other, self.incarnation[other] - 1))

    def _meet(self, name: str, replica: Replica) -> None:
        if self.state[name].replica_up(replica) is None:
            return
        model = self.model[name]
        for known in list(model.up):
            if known.name == replica.name and known != replica:
                model.forget(known)
        model.up[replica] = True

    @rule(name=names, other=names)
    def lose_sight(self, name: str, other: str) -> None:
        replica = Replica(other, self.incarnation[other])
        if name != other and self._living(name) and self.state[name].status(replica) is not None:
            self.state[name].replica_down(replica)
            self.model[name].up[replica] = False

    @rule(name=names, other=names)
    def remove(self, name: str, other: str) -> None:
        replica = Replica(other, self.incarnation[other])
        if name != other and self._living(name):
            self.state[name].remove_replica(replica)
            self.model[name].forget(replica)

    @rule(name=names)
    def die_or_return(self, name: str) -> None:
        if self._living(name):
            del self.state[name], self.model[name], self.present[name]
        else:
            self._boot(name)

    @invariant()
    def each_knows_what_the_model_says(self) -> None:
        for name, state in self.state.items():
            dots = {(each.replica, each.entry.clock): each.entry for each in state.visible()}
            assert set(dots) == self.model[name].visible()
            assert all(self.entry_by_dot[dot] == entry for dot, entry in dots.items())

    @invariant()
    def each_shows_all_of_its_own(self) -> None:
        for name, state in self.state.items():
            mine = {
                (each.entry.topic, each.entry.key, each.entry.member): each.entry.meta
                for each in state.visible()
                if each.replica == state.replica
            }
            assert mine == self.present[name]

    def teardown(self) -> None:
        """The partition ends: the living meet, the dead are lost sight of, and everybody tells
        everybody else in some order. Then all must show the living, and nobody else."""
        if not hasattr(self, "state"):
            return
        for name, state in self.state.items():
            for replica in list(state.replicas()):
                if replica.name != name and replica.name not in self.state:
                    state.replica_down(replica)
                    self.model[name].up[replica] = False
            for other in self.state:
                if other != name:
                    self._meet(name, self.state[other].replica)
        for state in self.state.values():
            for piece in [*self.bag[-5:], *state.extract([state.replica]), *self.bag[:5]]:
                for name in self.state:
                    self._hear(name, piece)
        self.each_knows_what_the_model_says()
        expected = {
            (name, place, meta)
            for name, places in self.present.items()
            for place, meta in places.items()
        }
        for state in self.state.values():
            shown = {
                (each.replica.name, (entry.topic, entry.key, entry.member), entry.meta)
                for each in state.visible()
                for entry in [each.entry]
            }
            assert shown == expected


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(stateful_step_count=60)


@given(st.permutations(range(5)), st.permutations(range(5)))
def test_the_order_and_number_of_merges_do_not_matter(one: list[int], other: list[int]):
    a = PresenceState(A)
    pieces: list[Slice] = []
    for number in range(3):
        a.join("t", "k", number)
        pieces.extend(a.take_delta())
        a.leave("t", "k", max(0, number - 1))
        pieces.extend(a.take_delta())
    states = []
    for order in (one, other, [*one, *other]):
        b = PresenceState(B)
        b.replica_up(A)
        for place in order:
            b.merge(pieces[place])
        states.append((b.visible(), b.clock_of(A)))
    assert states[0] == states[1] == states[2]
    assert states[0] == (a.visible(), a.clock)


def test_statistics_count_what_there_is():
    a, b = pair()
    a.join("t", "ann", 1)
    tell(a, b)
    b.replica_up(C)
    b.replica_down(C)
    seen = attrs.asdict(b.statistics())
    assert seen == {
        "replicas_up": 2,
        "replicas_down": 1,
        "entries": 1,
        "visible": 1,
        "cloud_runs": 0,
        "merged": 1,
        "dropped_unknown": 0,
        "dropped_limit": 0,
    }
    assert b.replicas() == {B: Status.UP, A: Status.UP, C: Status.DOWN}
