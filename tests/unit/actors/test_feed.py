"""When the account's actor reads its feed of changes."""

from __future__ import annotations

import attrs

from actors.messages import Wake
from actors.store.interface import MAX_PAGE
from channel.messages import ResourceUpserted
from tests.unit.actors.world import World

MS = 10**6


def connected() -> World:
    world = World()
    world.policy()
    world.client()
    world.run_for(1)
    return world


def reads(world: World, wake: Wake) -> int:
    """How often the feed is read when the actor gets this."""
    before = world.store.feed_reads
    assert world.host.scheduler.cast(world.account_actor(), wake)
    world.host.run_until_idle()
    return world.store.feed_reads - before


def test_a_wake_of_before_the_last_reading_causes_no_other() -> None:
    world = connected()
    now_ns = world.clock.monotonic_ns()
    assert reads(world, Wake(now_ns)) == 1
    assert reads(world, Wake(now_ns - 1)) == 0
    assert reads(world, Wake(now_ns)) == 1, "it may have come after the reading had begun"
    assert reads(world, Wake()) == 1
    world.run_for(1)
    assert reads(world, Wake(world.clock.monotonic_ns() - 1)) == 1


def test_a_wake_of_before_a_reading_that_failed_causes_another() -> None:
    world = connected()
    world.store.is_away = True
    at_ns = world.clock.monotonic_ns()
    world.clock.advance(MS)
    assert reads(world, Wake(at_ns)) == 1
    world.store.is_away = False
    assert reads(world, Wake(at_ns)) == 1


def test_one_change_is_one_reading_and_is_told() -> None:
    world = World()
    world.policy()
    client = world.client()
    world.run_for(1)
    before = world.store.feed_reads
    world.put(attrs.evolve(world.web, name="renamed"))
    assert world.store.feed_reads == before + 1
    assert [each.resource.name for each in client.heard(ResourceUpserted)] == ["renamed"]


def test_a_feed_of_more_than_a_page_is_read_to_its_end() -> None:
    world = World()
    world.policy()
    client = world.client()
    world.store.is_away = True
    for number in range(MAX_PAGE + 1):
        world.put(attrs.evolve(world.web, name=f"named {number}"))
    before = world.store.feed_reads
    world.store.is_away = False
    world.run_for(5)
    assert world.store.feed_reads >= before + 2
    assert client.heard(ResourceUpserted)[-1].resource.name == f"named {MAX_PAGE}"
