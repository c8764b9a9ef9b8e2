"""Relays whose channel moves, or whose node is out of reach, are handed out on."""

from __future__ import annotations

import pytest

from channel.messages import RelayInit, Relays

from .cluster_world import ClusterWorld
from .world import ClientAgent, RelayAgent

SILENCE_S = 3.5
AWAY_S = 30


@pytest.fixture
def world() -> ClusterWorld:
    return ClusterWorld("a", "b", "c")


def relay_and_client(world: ClusterWorld) -> tuple[RelayAgent, str, ClientAgent, str]:
    """Each with its node, none of which is that of the account; `world.at` is the client's."""
    there, here = world.others(world.owner())
    world.at = there
    relay = world.relay()
    world.at = here
    client = world.client()
    assert relays_of(client) == [relay_id(relay)]
    return relay, there, client, here


def latecomer(world: ClusterWorld) -> ClientAgent:
    client = ClientAgent(world, "late", world.user_token, "198.51.100.9")
    client.join()
    world.run_for(1)
    return client


def relay_id(relay: RelayAgent) -> object:
    return relay.heard(RelayInit)[0].relay_id


def relays_of(client: ClientAgent) -> list[object]:
    return [each.id for each in client.init.relays]


def taken_away(client: ClientAgent) -> list[object]:
    return [id for told in client.heard(Relays) for id in told.removed]


def test_a_relay_that_goes_from_a_draining_node_to_another_is_taken_from_nobody(
    world: ClusterWorld,
) -> None:
    relay, there, client, _ = relay_and_client(world)
    world.drain(there, relay)
    world.run_for(5)
    assert relays_of(latecomer(world)) == [relay_id(relay)]
    relay.join()
    world.run_for(AWAY_S + 1)
    assert taken_away(client) == []
    assert {each.id for told in client.heard(Relays) for each in told.added} == {relay_id(relay)}


def test_a_relay_at_a_node_that_is_out_of_reach_is_handed_out_for_as_long_as_that_lives(
    world: ClusterWorld,
) -> None:
    relay, there, client, here = relay_and_client(world)
    world.cluster.partition(here, there)
    world.run_for(SILENCE_S + 3 * AWAY_S)
    assert relays_of(latecomer(world)) == [relay_id(relay)]
    assert taken_away(client) == []
    relay.lose_channel()
    world.run_for(1)
    assert taken_away(client) == [], "nobody could tell its node"
    world.cluster.heal(here, there)
    world.run_for(AWAY_S + 1)
    assert taken_away(client) == [relay_id(relay)]


def test_a_relay_that_comes_back_into_reach_is_told_of_once_more_when_it_leaves(
    world: ClusterWorld,
) -> None:
    relay, there, client, here = relay_and_client(world)
    for _ in range(3):
        world.cluster.partition(here, there)
        world.run_for(SILENCE_S + 1)
        world.cluster.heal(here, there)
        world.run_for(3)
    assert taken_away(client) == []
    relay.lose_channel()
    world.run_for(1)
    assert taken_away(client) == [relay_id(relay)]


def test_a_relay_that_does_not_come_back_from_a_node_that_died_is_taken_away(
    world: ClusterWorld,
) -> None:
    relay, there, client, _ = relay_and_client(world)
    world.kill(there, relay)
    world.run_for(AWAY_S - 5)
    assert taken_away(client) == []
    world.run_for(AWAY_S + 15)
    assert taken_away(client) == [relay_id(relay)]
    assert not world.crashes
