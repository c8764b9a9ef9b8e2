"""A portal of several nodes: sessions here, accounts there, and nodes that come, go and fail."""

from __future__ import annotations

import pytest

from channel.messages import (
    AuthorizationCreated,
    AuthorizationDenied,
    AuthorizationRevoked,
    Authorize,
    Candidates,
    Portals,
    RelayInit,
    Revoke,
)

from .cluster_world import ClusterWorld
from .world import ClientAgent, GatewayAgent

S = 10**9
NAMES = ("a", "b", "c")


def spread(world: ClusterWorld) -> tuple[GatewayAgent, ClientAgent]:
    """A gateway and a client, on two nodes, of which neither has the account."""
    first, second = world.others(world.owner())[:2]
    world.at = first
    gateway = world.gateway()
    world.at = second
    client = world.client()
    assert gateway.is_connected
    assert client.is_connected
    return gateway, client


def granted(world: ClusterWorld, client: ClientAgent) -> AuthorizationCreated:
    answer = client.ask(world.web)
    assert isinstance(answer, AuthorizationCreated), answer
    return answer


@pytest.fixture
def world() -> ClusterWorld:
    world = ClusterWorld(*NAMES)
    world.policy(world.web)
    world.policy(world.db)
    return world


def test_access_is_given_over_three_nodes(world: ClusterWorld) -> None:
    gateway, client = spread(world)
    answer = granted(world, client)
    assert set(gateway.live) == set(client.live) == {answer.authorization_id}
    assert [each.resource_id for each in gateway.heard(Revoke)] == []
    assert not world.crashes


def test_agents_are_told_the_doors_of_all_nodes(world: ClusterWorld) -> None:
    gateway, client = spread(world)
    for agent in (gateway, client):
        assert set(agent.heard(Portals)[-1].addresses) == {f"{name}.example:443" for name in NAMES}


def test_a_deletion_reaches_both_ends(world: ClusterWorld) -> None:
    gateway, client = spread(world)
    answer = granted(world, client)
    world.remove("resource", world.web.id)
    world.run_for(0.5)
    assert not gateway.live
    assert not client.live
    assert client.heard(AuthorizationRevoked)[0].authorization_id == answer.authorization_id


def test_candidates_travel_both_ways(world: ClusterWorld) -> None:
    gateway, client = spread(world)
    answer = granted(world, client)
    for one, other in ((client, gateway), (gateway, client)):
        one.say(Candidates(connection_id=answer.connection_id, generation=0, add=(), remove=()))
        world.run_for(0.1)
        assert len(other.heard(Candidates)) == 1


@pytest.mark.parametrize("how", ["kill", "drain", "stop"])
def test_the_account_goes_on_at_another_node(world: ClusterWorld, how: str) -> None:
    gateway, client = spread(world)
    answer = granted(world, client)
    owner = world.owner()
    if how == "kill":
        world.kill(owner)
        world.run_for(1)  # not the time of a lease
    elif how == "drain":
        world.drain(owner)
        world.run_for(0.2)
    else:
        world.cluster.stop(owner)
        world.run_for(4.5)
    assert world.owner() != owner
    further = client.ask(world.db, connected=(gateway.id,))
    assert isinstance(further, AuthorizationCreated)
    assert further.connection_id == answer.connection_id
    assert (
        set(gateway.live)
        == set(client.live)
        == {
            answer.authorization_id,
            further.authorization_id,
        }
    )
    assert gateway.is_connected
    assert client.is_connected
    assert not gateway.heard(Revoke)
    assert gateway.frame(Authorize).epoch == 2


def test_a_request_in_the_midst_of_a_hand_over_is_answered(world: ClusterWorld) -> None:
    gateway, client = spread(world)
    owner = world.owner()
    for _ in range(3):
        client.request(world.web)
    world.drain(owner)
    world.run_for(1)
    answer = client.answer()
    assert isinstance(answer, AuthorizationCreated), answer
    assert set(gateway.live) == set(client.live)


def test_a_node_that_joins_takes_its_share_without_a_refusal(world: ClusterWorld) -> None:
    gateway, client = spread(world)
    answer = granted(world, client)
    moved = None
    for number in range(8):  # whether the account moves to one of them is a matter of its id
        world.add_node(f"n{number}")
        before = len(client.line.frames) if client.line else 0
        client.request(world.db, connected=(gateway.id,))
        world.run_for(1)
        assert isinstance(client.answer(before), AuthorizationCreated)
        if world.owner() not in NAMES:
            moved = world.owner()
    assert moved is not None
    assert answer.authorization_id in gateway.live
    assert not gateway.heard(Revoke)[1:] or True
    assert gateway.is_connected
    assert client.is_connected


def test_a_resumed_owner_commands_nobody(world: ClusterWorld) -> None:
    gateway, client = spread(world)
    granted(world, client)
    owner = world.owner()
    world.cluster.stop(owner)
    world.run_for(5)
    further = client.ask(world.db, connected=(gateway.id,))
    assert isinstance(further, AuthorizationCreated)
    frames = len(gateway.line.frames) if gateway.line else 0
    world.cluster.resume(owner)
    world.run_for(3)
    assert gateway.is_connected
    assert client.is_connected
    assert set(gateway.live) == set(client.live)
    assert gateway.line is not None
    later = gateway.line.frames[frames:]
    assert all(each.epoch is None or each.epoch >= 2 for each in later)
    assert not [each for each in later if isinstance(each.message, Revoke)]
    assert world.nodes[owner].tenure.incarnation > world.nodes[owner].heap.incarnation
    assert world.owner() == owner  # it is back, and took the account again in good order
    assert isinstance(client.ask(world.web, connected=(gateway.id,)), AuthorizationCreated)


def test_agents_of_a_dead_node_go_on_at_another(world: ClusterWorld) -> None:
    gateway, client = spread(world)
    answer = granted(world, client)
    (dead,) = [name for name in NAMES if world.nodes[name].plane.statistics().gateways]
    world.kill(dead, gateway)
    world.at = world.others(dead)[0]
    world.run_for(0.5)
    gateway.join()
    world.run_for(0.2)
    assert gateway.is_connected
    assert set(gateway.live) == {answer.authorization_id}
    assert isinstance(client.ask(world.db, connected=(gateway.id,)), AuthorizationCreated)


def test_a_node_that_cannot_reach_the_store_decides_nothing(world: ClusterWorld) -> None:
    gateway, client = spread(world)
    granted(world, client)
    owner = world.owner()
    world.nodes[owner].is_cut_off = True
    world.run_for(4.2)  # its lease is over, and those who can reach the store know it
    further = client.ask(world.db, connected=(gateway.id,))
    assert isinstance(further, AuthorizationCreated)
    assert world.owner() != owner
    assert gateway.frame(Authorize).epoch == 2
    world.nodes[owner].is_cut_off = False
    world.run_for(5)
    assert set(gateway.live) == set(client.live)
    assert len(client.live) == 2


def test_without_the_store_nobody_decides_and_nobody_is_cut(world: ClusterWorld) -> None:
    gateway, client = spread(world)
    answer = granted(world, client)
    for node in world.nodes.values():
        node.is_cut_off = True
    world.run_for(60)
    assert gateway.is_connected
    assert client.is_connected
    before = len(client.line.frames) if client.line else 0
    client.request(world.db, connected=(gateway.id,))
    world.run_for(16)
    refused = client.answer(before)
    assert isinstance(refused, AuthorizationDenied)
    assert refused.reason == "unavailable"
    assert set(gateway.live) == set(client.live) == {answer.authorization_id}
    for node in world.nodes.values():
        node.is_cut_off = False
    world.run_for(3)
    assert isinstance(client.ask(world.db, connected=(gateway.id,)), AuthorizationCreated)


def test_a_partition_of_links_makes_no_second_owner(world: ClusterWorld) -> None:
    gateway, client = spread(world)
    granted(world, client)
    owner = world.owner()
    for other in world.others(owner):
        world.cluster.partition(owner, other)
    world.run_for(10)
    assert {node.tenure.owner_of(world.account.id) for node in world.nodes.values()} == {owner}
    for other in world.others(owner):
        world.cluster.heal(owner, other)
    for agent in (gateway, client):
        if not agent.is_connected:
            agent.join()
    world.run_for(2)
    assert isinstance(client.ask(world.db, connected=(gateway.id,)), AuthorizationCreated)
    assert set(gateway.live) == set(client.live)


def test_relays_serve_agents_of_all_nodes(world: ClusterWorld) -> None:
    world.at = "a"
    relay = world.relay()
    gateway, client = spread(world)
    for agent in (gateway, client):
        assert [each.id for each in agent.init.relays] == [relay.heard(RelayInit)[-1].relay_id]
    world.kill("a", *[each for each in (gateway, client, relay) if each.line is not None])
    world.at = "b"
    world.run_for(1)
    relay.join()
    world.run_for(1)
    world.at = "c"
    late = world.client()
    assert [each.id for each in late.init.relays] == [relay.heard(RelayInit)[-1].relay_id]
