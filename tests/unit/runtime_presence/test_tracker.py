"""Trackers of several nodes on one virtual clock, with a transport that loses, doubles, delays and
reorders."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runtime.actor import Actor, ActorRef, LimitReached, handles
from runtime.clock import NS_PER_MS, NS_PER_S, VirtualClock
from runtime.presence.crdt import Changes, Entry, Replica, Slice
from runtime.presence.tracker import (
    MAX_PLACES_PER_MEMBER,
    OUTGOING,
    AskTracker,
    Farewell,
    FromNode,
    Heartbeat,
    NodeLost,
    Outgoing,
    Track,
    Tracker,
    TrackerSettings,
    TrackerStatistics,
    Untrack,
    Update,
    WhoIsPresent,
    changes_topic,
    lives_of,
)
from runtime.randomness import SeededRandomness
from runtime.scheduler import Scheduler
from runtime.testing import HeapHost
from runtime.timers import TimerHeap


class Member(Actor):
    """Somebody who is present."""


class Listener(Actor):
    """Keeps the Changes of a topic."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.heard: list[Changes] = []

    def started(self) -> None:
        self.subscribe(changes_topic(self.topic))

    @handles(Changes)
    def changed(self, message: Changes) -> None:
        self.heard.append(message)


class Postman(Actor):
    """Carries what its node's tracker sends into the network."""

    def __init__(self, network: Network, node: str) -> None:
        self.network = network
        self.node = node

    def started(self) -> None:
        self.subscribe(OUTGOING)

    @handles(Outgoing)
    def carry(self, message: Outgoing) -> None:
        self.network.send(self.node, message)


@attrs.define(eq=False)
class Parcel:
    to: str
    message: FromNode
    due_ns: int | None = None
    armed_ns: int | None = None


@attrs.define
class Node:
    host: HeapHost
    tracker: ActorRef
    members: list[ActorRef]


class Network:
    """Nodes by name on one clock. `loss`, `doubling` are percentages; `delay_ns` the most that a
    message takes; `cut` are pairs that do not hear each other."""

    def __init__(
        self, seed: int, *, loss: int = 0, doubling: int = 0, delay_ns: int = NS_PER_MS
    ) -> None:
        self.clock = VirtualClock()
        self.randomness = SeededRandomness(seed, "network")
        self.loss = loss
        self.doubling = doubling
        self.delay_ns = delay_ns
        self.cut: set[frozenset[str]] = set()
        self.nodes: dict[str, Node] = {}
        self.lives = 0
        self.parcels = TimerHeap()

    def boot(self, name: str) -> Node:
        self.lives += 1
        randomness = SeededRandomness(self.lives, name)
        scheduler = Scheduler(clock=self.clock, randomness=randomness, node=name)
        host = HeapHost(scheduler, self.clock)
        scheduler.spawn(Postman(self, name))
        host.run_until_idle()
        tracker = scheduler.spawn(Tracker(lives_of(name, self.lives)()))
        node = self.nodes[name] = Node(host, tracker, [])
        return node

    def kill(self, name: str) -> None:
        """Without a farewell."""
        del self.nodes[name]

    def send(self, node: str, message: Outgoing) -> None:
        if node not in self.nodes:
            return
        for to in [message.to] if message.to is not None else list(self.nodes):
            for _ in range(1 + (self.randomness.integer(100) < self.doubling)):
                if to == node or frozenset((node, to)) in self.cut:
                    continue
                if self.randomness.integer(100) < self.loss:
                    continue
                delay_ns = self.randomness.integer(self.delay_ns + 1)
                parcel = Parcel(to, FromNode(node, message.message))
                self.parcels.arm(parcel, self.clock.monotonic_ns() + delay_ns)

    def run_for(self, duration_ns: int) -> None:
        end_ns = self.clock.monotonic_ns() + duration_ns
        while True:
            for node in list(self.nodes.values()):
                node.host.run_until_idle()
            while (parcel := self.parcels.pop_due(self.clock.monotonic_ns())) is not None:
                if parcel.to in self.nodes:
                    node = self.nodes[parcel.to]
                    node.host.cast(node.tracker, parcel.message)
                    node.host.run_until_idle()
            due = [node.host.next_event_ns() for node in self.nodes.values()]
            due.append(self.parcels.next_due_ns())
            next_ns = min((each for each in due if each is not None), default=None)
            if next_ns is None or next_ns > end_ns:
                self.clock.advance_to(end_ns)
                return
            self.clock.advance_to(max(next_ns, self.clock.monotonic_ns()))

    def join(self, name: str, key: str, topic: str = "t", meta: bytes = b"") -> ActorRef:
        node = self.nodes[name]
        ref = node.host.scheduler.spawn(Member())
        node.host.call(node.tracker, Track(topic, key, ref, meta))
        node.members.append(ref)
        return ref

    def seen(self, name: str, topic: str = "t") -> list[tuple[str, str]]:
        node = self.nodes[name]
        present = node.host.call(node.tracker, WhoIsPresent(topic))
        return [(each.replica.name, each.entry.key) for each in present]

    def statistics(self, name: str) -> TrackerStatistics:
        node = self.nodes[name]
        answer = node.host.call(node.tracker, AskTracker())
        assert isinstance(answer, TrackerStatistics)
        return answer


def three(seed: int = 1, **faults: int) -> Network:
    network = Network(seed, **faults)
    for name in "abc":
        network.boot(name)
    network.run_for(2 * NS_PER_S)
    return network


def test_who_is_tracked_on_one_node_is_seen_on_all_within_a_flush():
    network = three()
    network.join("a", "ann", meta=b"hello")
    network.run_for(50 * NS_PER_MS)
    assert [network.seen(name) for name in "abc"] == [[("a", "ann")]] * 3


def test_who_ends_leaves():
    network = three()
    ref = network.join("a", "ann")
    network.run_for(50 * NS_PER_MS)
    network.nodes["a"].host.scheduler.stop(ref, "crashed: Whatever")
    network.run_for(50 * NS_PER_MS)
    assert [network.seen(name) for name in "abc"] == [[]] * 3
    assert network.statistics("a").members == 0


def test_untracking_and_updating_travel_too():
    network = three()
    ref = network.join("a", "ann")
    a, b = network.nodes["a"], network.nodes["b"]
    listener = Listener("t")
    b.host.scheduler.spawn(listener)
    network.run_for(50 * NS_PER_MS)
    a.host.call(a.tracker, Update("t", "ann", ref, b"away"))
    network.run_for(50 * NS_PER_MS)
    assert listener.heard[-1].joined[0].entry.meta == b"away"
    a.host.call(a.tracker, Untrack("t", "ann", ref))
    a.host.call(a.tracker, Untrack("t", "ann", ref))
    network.run_for(50 * NS_PER_MS)
    assert network.seen("b") == []
    assert [(len(each.joined), len(each.left)) for each in listener.heard] == [
        (1, 0),
        (1, 1),
        (0, 1),
    ]


def test_what_cannot_be_tracked_is_refused_and_the_tracker_lives_on():
    network = three()
    ref = network.join("a", "ann")
    a = network.nodes["a"]
    for message, error in (
        (Track("t", "ann", ref), ValueError),
        (Track("", "ann", ref), ValueError),
        (Track("t", "bob", network.join("b", "bob")), ValueError),
        (Update("t", "nobody", ref, b""), ValueError),
    ):
        with pytest.raises(error):
            a.host.call(a.tracker, message)
    for number in range(MAX_PLACES_PER_MEMBER - 1):
        a.host.call(a.tracker, Track("other", f"k{number}", ref))
    with pytest.raises(LimitReached):
        a.host.call(a.tracker, Track("other", "more", ref))


def test_a_tracked_actor_that_had_ended_before_leaves_at_once():
    network = three()
    a = network.nodes["a"]
    ref = a.host.scheduler.spawn(Member())
    a.host.scheduler.stop(ref)
    a.host.call(a.tracker, Track("t", "ann", ref))
    network.run_for(50 * NS_PER_MS)
    assert [network.seen(name) for name in "abc"] == [[]] * 3


def test_a_node_that_dies_is_hidden_after_missed_heartbeats_and_forgotten_later():
    network = three()
    network.join("a", "ann")
    network.run_for(NS_PER_S)
    network.kill("a")
    network.run_for(2 * NS_PER_S)
    assert network.seen("b") == [("a", "ann")]
    network.run_for(2 * NS_PER_S)
    assert network.seen("b") == network.seen("c") == []
    assert network.statistics("b").state.replicas_down == 1
    network.run_for(21 * 60 * NS_PER_S)
    assert network.statistics("b").state.replicas_down == 0


def test_a_lost_connection_hides_at_once_and_a_heartbeat_shows_again():
    network = three()
    network.join("a", "ann")
    network.run_for(NS_PER_S)
    b = network.nodes["b"]
    b.host.cast(b.tracker, NodeLost("a"))
    assert network.seen("b") == []
    network.run_for(NS_PER_S)
    assert network.seen("b") == [("a", "ann")]


def test_a_node_that_returns_is_another_life_whose_old_members_are_gone():
    network = three()
    network.join("a", "ann")
    network.run_for(NS_PER_S)
    network.kill("a")
    network.boot("a")
    network.join("a", "bob")
    network.run_for(NS_PER_S)
    assert [network.seen(name) for name in "abc"] == [[("a", "bob")]] * 3


def test_a_tracker_that_ends_in_good_order_takes_its_members_along_and_may_be_started_anew():
    network = three()
    ref = network.join("a", "ann")
    network.run_for(NS_PER_S)
    a = network.nodes["a"]
    a.host.scheduler.stop(a.tracker)
    network.run_for(10 * NS_PER_MS)
    assert network.seen("b") == []
    lives = lives_of("a", 100)
    lives()
    a.tracker = a.host.scheduler.spawn(Tracker(lives()))
    a.host.call(a.tracker, Track("t", "ann", ref))
    network.run_for(NS_PER_S)
    assert network.seen("b") == [("a", "ann")]


def test_a_partition_hides_each_side_from_the_other_and_heals():
    network = three()
    network.join("a", "ann")
    network.join("c", "cat")
    network.run_for(NS_PER_S)
    network.cut = {frozenset("ac"), frozenset("bc")}
    network.run_for(5 * NS_PER_S)
    dan = network.join("c", "dan")
    network.join("a", "eve")
    network.nodes["c"].host.scheduler.stop(dan)
    network.join("c", "fay")
    network.run_for(NS_PER_S)
    assert network.seen("a") == network.seen("b") == [("a", "ann"), ("a", "eve")]
    assert network.seen("c") == [("c", "cat"), ("c", "fay")]
    network.cut = set()
    network.run_for(2 * NS_PER_S)
    everybody = [("a", "ann"), ("a", "eve"), ("c", "cat"), ("c", "fay")]
    assert [network.seen(name) for name in "abc"] == [everybody] * 3
    assert network.statistics("a").gaps == 1


def test_many_members_travel_in_several_parts():
    network = three()
    for number in range(2_500):
        network.join("a", f"k{number}")
    network.run_for(NS_PER_S)
    network.boot("d")
    network.run_for(2 * NS_PER_S)
    assert network.seen("d") == network.seen("b") == network.seen("a")
    assert len(network.seen("d")) == 2_500


def test_words_of_another_node_or_of_nobody_are_refused_and_counted():
    network = three()
    network.join("a", "ann")
    network.run_for(NS_PER_S)
    b = network.nodes["b"]
    liar = Replica("a", 9)
    b.host.cast(b.tracker, FromNode("c", Farewell(liar)))
    b.host.cast(b.tracker, FromNode("b", Heartbeat(Replica("b", 99), 0)))
    bad = Slice(Replica("a", 1), 0, 0, (Entry(5, "t", "k", 1),))
    b.host.cast(b.tracker, FromNode("a", Heartbeat(Replica("a", 1), 1, (bad,))))
    b.host.cast(b.tracker, FromNode("a", Heartbeat(Replica("a", 0), 1)))
    assert network.seen("b") == [("a", "ann")]
    statistics = network.statistics("b")
    assert (statistics.refused, statistics.stale) == (3, 1)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="heartbeat"):
        TrackerSettings(heartbeat_ns=NS_PER_S, down_ns=NS_PER_S)
    with pytest.raises(ValueError, match="patience"):
        TrackerSettings(transfer_patience_ns=0)


step = st.one_of(
    st.tuples(st.just("join"), st.sampled_from("abcd"), st.integers(0, 99)),
    st.tuples(st.just("end"), st.sampled_from("abcd"), st.integers(0, 99)),
    st.tuples(st.just("kill"), st.sampled_from("abcd"), st.just(0)),
    st.tuples(st.just("boot"), st.sampled_from("abcd"), st.just(0)),
    st.tuples(st.just("cut"), st.sampled_from("abcd"), st.integers(0, 3)),
    st.tuples(st.just("heal"), st.just(""), st.just(0)),
    st.tuples(st.just("wait"), st.just(""), st.integers(1, 8_000)),
)


@given(st.integers(0, 2**32), st.lists(step, max_size=25))
@example(1, [*(("kill", name, 0) for name in "abc"), ("wait", "", 1_000)])
def test_whatever_was_lost_all_nodes_show_the_living_in_the_end(
    seed: int, steps: list[tuple[str, str, int]]
):
    network = Network(seed, loss=20, doubling=20, delay_ns=700 * NS_PER_MS)
    alive: dict[str, dict[ActorRef, str]] = {}
    for name in "abc":
        network.boot(name)
        alive[name] = {}
    for number, (kind, name, value) in enumerate(steps):
        match kind:
            case "join" if name in alive:
                alive[name][network.join(name, f"k{number}")] = f"k{number}"
            case "end" if alive.get(name):
                ref = list(alive[name])[value % len(alive[name])]
                network.nodes[name].host.scheduler.stop(ref)
                del alive[name][ref]
            case "kill" if name in alive:
                network.kill(name)
                del alive[name]
            case "boot" if name not in alive:
                network.boot(name)
                alive[name] = {}
            case "cut":
                network.cut.add(frozenset((name, "abcd"[value])))
            case "heal":
                network.cut.clear()
            case "wait":
                network.run_for(value * NS_PER_MS)
    network.cut.clear()
    network.loss = 0
    network.run_for(12 * NS_PER_S)
    expected = sorted((name, key) for name, members in alive.items() for key in members.values())
    for name in alive:
        assert sorted(network.seen(name)) == expected
