"""The tree of a node: presence over the links of a cluster, and a node that is alone."""

from typing import Any

import pytest

from runtime.actor import Actor, ActorRef
from runtime.clock import NS_PER_MS, NS_PER_S, VirtualClock
from runtime.cluster.keyed import KeyedActors
from runtime.cluster.node import TRACKER, start_alone
from runtime.presence.tracker import AskTracker, Track, TrackerStatistics, WhoIsPresent
from runtime.randomness import SeededRandomness
from runtime.scheduler import Scheduler
from runtime.testing import HeapHost
from tests.keyed_world import CODEC, KeyedWorld, finish

TOPIC = "agents"


class Somebody(Actor):
    pass


@pytest.fixture
def world() -> KeyedWorld:
    world = KeyedWorld(keys=0)
    for name in "abc":
        world.start(name)
    world.run_for(NS_PER_S)
    return world


def tracker(world: KeyedWorld, name: str) -> ActorRef:
    ref = world.nodes[name].heap.scheduler.registry.whereis(TRACKER)
    assert ref is not None
    return ref


def track(world: KeyedWorld, name: str, key: str) -> ActorRef:
    """Somebody is present on a node."""
    ref = world.nodes[name].heap.scheduler.spawn(Somebody())
    world.cluster.call(name, tracker(world, name), Track(TOPIC, key, ref))
    return ref


def present(world: KeyedWorld, name: str) -> list[tuple[str, str]]:
    """Who is present where, as a node sees it."""
    found: Any = world.cluster.call(name, tracker(world, name), WhoIsPresent(TOPIC))
    return [(each.replica.name, each.entry.key) for each in found]


def agree(world: KeyedWorld, expected: list[tuple[str, str]]) -> None:
    for name in world.nodes:
        assert present(world, name) == expected, name


def test_who_joins_and_leaves_is_known_everywhere(world: KeyedWorld) -> None:
    track(world, "a", "one")
    second = track(world, "b", "two")
    world.run_for(100 * NS_PER_MS)
    agree(world, [("a", "one"), ("b", "two")])
    world.nodes["b"].heap.scheduler.stop(second)
    world.run_for(100 * NS_PER_MS)
    agree(world, [("a", "one")])


def test_a_node_that_joins_late_learns_who_is_there(world: KeyedWorld) -> None:
    track(world, "a", "one")
    world.run_for(NS_PER_S)
    world.start("d")
    world.run_for(2 * NS_PER_S)
    agree(world, [("a", "one")])


def test_whom_a_dead_node_had_is_gone_at_once(world: KeyedWorld) -> None:
    track(world, "a", "one")
    track(world, "b", "two")
    world.run_for(NS_PER_S)
    world.kill("b")
    world.run_for(10 * NS_PER_MS)
    agree(world, [("a", "one")])
    world.start("b")
    world.run_for(10 * NS_PER_MS)
    track(world, "b", "again")
    world.run_for(2 * NS_PER_S)
    agree(world, [("a", "one"), ("b", "again")])


def test_a_partition_hides_and_its_end_shows_all_again(world: KeyedWorld) -> None:
    track(world, "a", "one")
    world.run_for(NS_PER_S)
    world.part("a", "b")
    world.part("a", "c")
    world.run_for(5 * NS_PER_S)
    track(world, "b", "two")
    world.run_for(NS_PER_S)
    assert present(world, "a") == [("a", "one")]
    assert present(world, "b") == present(world, "c") == [("b", "two")]
    world.heal("a", "b")
    world.run_for(2 * NS_PER_S)
    assert present(world, "a") == present(world, "b") == [("a", "one"), ("b", "two")]
    world.heal("a", "c")
    world.run_for(2 * NS_PER_S)
    agree(world, [("a", "one"), ("b", "two")])


def test_a_stopped_node_comes_back_to_what_is_then(world: KeyedWorld) -> None:
    track(world, "a", "one")
    leaves = track(world, "b", "two")
    world.run_for(NS_PER_S)
    world.cluster.stop("c")
    world.run_for(5 * NS_PER_S)
    world.nodes["b"].heap.scheduler.stop(leaves)
    world.run_for(NS_PER_S)
    world.cluster.resume("c")
    world.run_for(2 * NS_PER_S)
    agree(world, [("a", "one")])


def test_a_tracker_that_crashed_tells_nothing_old(world: KeyedWorld) -> None:
    """Who was tracked has to say so again; nobody sees a ghost."""
    track(world, "a", "one")
    world.run_for(NS_PER_S)
    world.nodes["a"].heap.scheduler.stop(tracker(world, "a"), "crashed: on purpose")
    world.run_for(2 * NS_PER_S)
    agree(world, [])
    track(world, "a", "again")
    world.run_for(NS_PER_S)
    agree(world, [("a", "again")])
    answer = world.cluster.call("b", tracker(world, "b"), AskTracker())
    assert isinstance(answer, TrackerStatistics)
    assert answer.refused == 0


def test_a_node_that_is_alone_owns_every_key_and_comes_to_rest() -> None:
    world = KeyedWorld(keys=3)
    clock = VirtualClock()
    scheduler = Scheduler(clock=clock, randomness=SeededRandomness(1, "alone"), node="alone")
    host = HeapHost(scheduler, clock)
    incarnation = finish(
        world.store.join_node(
            "alone", link_address="x:1", door_address="x:2", version="1", ttl_ns=3 * NS_PER_S
        )
    )
    tenure = start_alone(scheduler, world.store, CODEC, incarnation=incarnation)
    host.run_until_idle()
    assert tenure.holds(clock.monotonic_ns() + 24 * 3_600 * NS_PER_S)
    assert all(tenure.is_ours(key) for key in world.keys)
    keeper = KeyedActors("tally", tenure).keeper_of(world.keys[0])
    assert keeper is not None
    assert keeper.node == "alone"
    handled = scheduler.statistics().messages_handled
    host.run_for(3_600 * NS_PER_S)
    assert scheduler.statistics().messages_handled == handled, "nothing goes on in it"
