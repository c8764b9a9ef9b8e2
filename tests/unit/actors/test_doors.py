"""Agents are told the doors of all nodes, and are sent through them when a node drains."""

from __future__ import annotations

from channel.messages import (
    MAX_DOORS,
    ClientInit,
    DoorAddress,
    GatewayInit,
    Portals,
    RelayInit,
)
from runtime.cluster.tenure import ROSTER, RosterChanged

from .world import Agent, World

S = 10**9
A, B, C = (DoorAddress(f"192.0.2.{n}:443") for n in (1, 2, 3))


def world_of(*doors: DoorAddress) -> World:
    world = World()
    world.doors = doors
    return world


def change(world: World, *doors: DoorAddress) -> None:
    world.doors = doors
    world.scheduler.pubsub.publish(ROSTER, RosterChanged())
    world.host.run_until_idle()


def told(agent: Agent) -> list[tuple[DoorAddress, ...]]:
    return [message.addresses for message in agent.heard(Portals)]


def agents(world: World) -> list[Agent]:
    return [world.client(), world.gateway(), world.relay()]


def test_every_kind_of_agent_is_told_the_doors_right_after_its_init() -> None:
    for agent in agents(world_of(A, B)):
        assert agent.line is not None
        first, second = agent.line.frames[:2]
        assert isinstance(first.message, ClientInit | GatewayInit | RelayInit)
        assert second.message == Portals(addresses=(A, B))
        assert second.epoch is None, "the node says it, not the owner of the account"


def test_agents_are_told_when_the_doors_are_others_and_not_when_they_are_not() -> None:
    world = world_of(A)
    everyone = agents(world)
    change(world, A)
    change(world, A, B, C)
    change(world, A, B, C)
    change(world, C)
    for agent in everyone:
        assert told(agent) == [(A,), (A, B, C), (C,)]


def test_a_node_that_knows_of_no_door_says_nothing_and_takes_nothing_back() -> None:
    world = world_of()
    everyone = agents(world)
    assert [told(agent) for agent in everyone] == [[], [], []]
    change(world, A)
    change(world)
    change(world, A)
    assert [told(agent) for agent in everyone] == [[(A,)]] * 3


def test_no_more_doors_are_told_than_an_agent_takes() -> None:
    many = tuple(DoorAddress(f"192.0.2.1:{port}") for port in range(1, MAX_DOORS + 10))
    for agent in agents(world_of(*many)):
        assert told(agent) == [many[:MAX_DOORS]]


def test_nothing_is_told_before_the_init() -> None:
    world = world_of(A)
    world.lab.proof_ns = 5 * S
    relay = world.relay()
    change(world, A, B)
    assert told(relay) == []
    world.run_for(6)
    assert told(relay) == [(A, B)]


def test_the_agents_of_a_crashed_account_are_not_told_again() -> None:
    world = world_of(A)
    client = world.client()
    world.crash(world.account_actor())
    world.run_for(5)
    assert client.is_connected
    assert told(client) == [(A,)]


def test_a_draining_node_sends_its_agents_to_the_others_one_by_one() -> None:
    world = world_of(A, B)
    everyone = [world.gateway(f"gateway-{n}") for n in range(40)]
    change(world, B)
    world.plane.drain(10 * S)
    left = []
    for _ in range(10):
        world.run_for(1)
        left.append(sum(not agent.is_connected for agent in everyone))
    assert left[-1] == 40
    assert len(set(left)) >= 8, left
    for agent in everyone:
        assert agent.line is not None
        assert agent.line.closed is not None
        assert agent.refused == "draining"
        assert agent.line.closed.retry_after_ns <= 2 * S


def test_a_draining_node_without_others_has_its_agents_come_back_one_by_one() -> None:
    world = world_of()
    everyone = [world.gateway(f"gateway-{n}") for n in range(40)]
    world.plane.drain(10 * S)
    world.host.run_until_idle()
    goodbyes = [agent.line.closed for agent in everyone if agent.line is not None]
    waits = {goodbye.retry_after_ns // S for goodbye in goodbyes if goodbye is not None}
    assert len(goodbyes) == 40
    assert len(waits) >= 8
    assert max(waits) < 10
