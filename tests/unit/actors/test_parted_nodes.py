"""Two nodes that do not reach each other, while both reach the store and all others."""

from __future__ import annotations

import attrs
import pytest

from actors.messages import FromOwner, Stale
from actors.services import Limits
from channel.credentials import decode_token
from channel.messages import (
    Ack,
    AuthorizationCreated,
    AuthorizationDenied,
    AuthorizationRevoked,
    Authorize,
    Candidates,
    ClientInit,
    Revoke,
    RevokeUser,
)
from runtime.cluster.envelopes import Enclosed

from .cluster_world import ClusterWorld
from .test_several_nodes import granted, spread
from .world import Agent, ClientAgent

S = 10**9
SILENCE_S = 3.0
"""After so long a parted link is known to be lost."""
LEFT_AFTER_S = 3.5
"""So much later agents have been sent on."""


@pytest.fixture
def world() -> ClusterWorld:
    world = ClusterWorld("a", "b", "c")
    world.policy(world.web)
    world.policy(world.db)
    return world


def part_from_owner(world: ClusterWorld, agent: Agent) -> tuple[str, str]:
    """Part the node of an agent from that of its account."""
    node, owner = world.node_of(agent), world.owner()
    assert node is not None
    assert node != owner
    world.cluster.partition(node, owner)
    return node, owner


def test_a_gateway_whose_account_is_out_of_reach_is_served_where_that_lives(
    world: ClusterWorld,
) -> None:
    gateway, client = spread(world)
    answer = granted(world, client)
    _, owner = part_from_owner(world, gateway)
    world.run_for(SILENCE_S + 0.1)
    before = len(client.line.frames) if client.line else 0
    client.request(world.db, connected=(gateway.id,))
    world.run_for(LEFT_AFTER_S)
    assert client.answer(before) is None, "the gateway is waited for"
    world.follow(gateway)
    assert world.node_of(gateway) == owner
    world.run_for(0.1)
    further = client.answer(before)
    assert isinstance(further, AuthorizationCreated)
    assert further.connection_id == answer.connection_id
    ids = {answer.authorization_id, further.authorization_id}
    assert set(gateway.live) == set(client.live) == ids
    assert not gateway.heard(Revoke)
    assert not client.heard(AuthorizationRevoked)
    world.run_for(30)
    assert gateway.is_connected
    assert client.is_connected
    assert len(client.heard(ClientInit)) == 1, "the client noticed something"
    assert not world.crashes


def test_a_client_whose_account_is_out_of_reach_is_served_where_that_lives(
    world: ClusterWorld,
) -> None:
    gateway, client = spread(world)
    answer = granted(world, client)
    node, owner = part_from_owner(world, client)
    world.run_for(SILENCE_S + 0.1)
    client.request(world.db, connected=(gateway.id,))
    world.run_for(LEFT_AFTER_S)
    assert not client.heard(AuthorizationDenied)
    world.follow(client)
    assert world.node_of(client) == owner
    assert isinstance(client.ask(world.db, connected=(gateway.id,)), AuthorizationCreated)
    assert answer.authorization_id in gateway.live
    assert set(gateway.live) == set(client.live)
    world.cluster.heal(node, owner)
    world.run_for(30)
    assert gateway.is_connected
    assert client.is_connected


def test_a_newcomer_is_sent_on_before_it_is_taken_in(world: ClusterWorld) -> None:
    owner = world.owner()
    other, third = world.others(owner)
    world.cluster.partition(owner, other)
    world.run_for(SILENCE_S + 0.1)
    world.at = other
    newcomer = ClientAgent(world, "late", world.user_token, "198.51.100.9")
    newcomer.join()
    assert newcomer.is_connected
    world.run_for(LEFT_AFTER_S)
    world.follow(newcomer)
    assert newcomer.is_connected
    assert world.node_of(newcomer) == owner
    world.at = third
    assert world.client().is_connected


def test_a_gateway_that_does_not_come_back_is_offline(world: ClusterWorld) -> None:
    gateway, client = spread(world)
    part_from_owner(world, gateway)
    world.run_for(SILENCE_S + 0.1)
    client.request(world.web)
    world.run_for(6)
    (denied,) = client.heard(AuthorizationDenied)
    assert denied.reason == "offline"
    denied_at_once = client.ask(world.web)
    assert isinstance(denied_at_once, AuthorizationDenied)
    assert denied_at_once.reason == "offline"


def test_a_link_that_comes_back_in_time_costs_nobody_anything(world: ClusterWorld) -> None:
    gateway, client = spread(world)
    answer = granted(world, client)
    node, owner = part_from_owner(world, client)
    world.run_for(SILENCE_S + 0.5)
    before = len(client.line.frames) if client.line else 0
    client.request(world.db, connected=(gateway.id,))
    world.run_for(1)
    assert client.answer(before) is None, "it is held"
    world.cluster.heal(node, owner)
    world.run_for(1)
    assert isinstance(client.answer(before), AuthorizationCreated)
    assert len(client.heard(ClientInit)) == 1
    assert answer.authorization_id in client.live
    assert set(gateway.live) == set(client.live)


def test_client_and_gateway_on_parted_nodes_meet_by_way_of_the_account(
    world: ClusterWorld,
) -> None:
    gateway, client = spread(world)
    one, other = world.node_of(gateway), world.node_of(client)
    assert one is not None
    assert other is not None
    world.cluster.partition(one, other)
    world.run_for(SILENCE_S + 1)
    answer = granted(world, client)
    assert set(gateway.live) == set(client.live) == {answer.authorization_id}
    client.say(Candidates(connection_id=answer.connection_id, generation=0, add=(), remove=()))
    world.run_for(0.1)
    assert len(gateway.heard(Candidates)) == 1
    gateway.refusal = "ceiling"
    refused = client.ask(world.db, connected=(gateway.id,))
    assert isinstance(refused, AuthorizationDenied)
    assert refused.violated == ("gateway_ceiling",)
    world.run_for(20)
    assert gateway.is_connected
    assert client.is_connected
    assert not world.crashes


def test_a_session_without_its_account_hears_of_its_channel(world: ClusterWorld) -> None:
    _, client = spread(world)
    node, _ = part_from_owner(world, client)
    world.run_for(SILENCE_S + 0.5)
    assert client.is_connected
    assert world.nodes[node].plane.statistics().sessions == 1
    client.lose_channel()
    assert world.nodes[node].plane.statistics().sessions == 0


def test_what_is_said_for_the_account_is_held_until_its_truth_has_come(
    world: ClusterWorld,
) -> None:
    gateway, client = spread(world)
    answer = granted(world, client)
    node, owner = part_from_owner(world, gateway)
    world.run_for(SILENCE_S + 0.5)
    scheduler, to = world.nodes[node].heap.scheduler, world.owner_of(gateway)
    authorize = gateway.frame(Authorize)
    assert authorize.epoch is not None
    assert isinstance(authorize.message, Authorize)
    id = world.new_id()
    further = attrs.evolve(authorize.message, authorization_id=id, kem_public_key=None)
    said = [further, Revoke(authorization_id=answer.authorization_id)]
    answers: list[object] = []
    for epoch in (authorize.epoch - 1, authorize.epoch):
        for message in said:
            order = FromOwner(epoch, Enclosed(message))
            scheduler.call_soon(to, order, lambda *of: answers.append(of), deadline_ns=20 * S)
    world.run_for(0.5)
    assert not answers
    world.cluster.heal(node, owner)
    world.run_for(1)
    stale = [type(error) for value, error in answers if error is not None]  # type: ignore[misc]
    assert stale == [Stale, Stale]
    assert Ack(authorization_id=id) in [value for value, error in answers]  # type: ignore[misc]
    assert [each.authorization_id for each in gateway.heard(Revoke)] == [answer.authorization_id]
    assert gateway.is_connected


def test_a_node_that_lost_its_lease_sends_nobody_on(world: ClusterWorld) -> None:
    _, client = spread(world)
    node, _ = part_from_owner(world, client)
    world.nodes[node].is_cut_off = True
    world.run_for(SILENCE_S + 30)
    assert client.refused == "unavailable"
    assert client.line is not None
    assert client.line.closed is not None
    assert client.line.closed.door is None


def test_requests_that_wait_for_the_account_are_bounded() -> None:
    world = ClusterWorld("a", "b", "c", limits=Limits(pending_requests=2))
    resources = [world.resource(f"r{n}", f"10.0.1.{n + 1}") for n in range(3)]
    world.put(*resources)
    for resource in resources:
        world.policy(resource)
    _, client = spread(world)
    node, owner = part_from_owner(world, client)
    world.run_for(SILENCE_S + 0.5)
    for resource in resources:
        client.request(resource)
    world.run_for(0.5)
    (shed,) = client.heard(AuthorizationDenied)
    assert shed.reason == "limits_exceeded"
    assert shed.retry_after_ns > 0
    world.cluster.heal(node, owner)
    world.run_for(1)
    assert len(client.heard(AuthorizationCreated)) == 2


class CommonDoor(ClusterWorld):
    door_at = "all.example:443"


def test_a_node_behind_the_same_address_is_no_place_to_send_to() -> None:
    world = CommonDoor("a", "b", "c")
    _, client = spread(world)
    part_from_owner(world, client)
    world.run_for(SILENCE_S + 30)
    assert client.refused == "unavailable"
    assert client.line is not None
    assert client.line.closed is not None
    assert client.line.closed.door is None


def test_whoever_lost_its_right_meanwhile_loses_its_relays_too(world: ClusterWorld) -> None:
    world.at = "a"
    relay = world.relay()
    gateway, client = spread(world)
    node, owner = part_from_owner(world, client)
    world.run_for(SILENCE_S + 0.5)
    (relay_server,) = client.init.relays
    user = relay_server.username.partition(":")[2]
    world.remove("token", decode_token(world.user_token).id)
    world.run_for(0.5)
    assert client.is_connected, "nobody could tell its node"
    assert user not in {each.user for each in relay.heard(RevokeUser)}
    world.cluster.heal(node, owner)
    world.run_for(1)
    assert client.refused == "invalid_token"
    assert user in {each.user for each in relay.heard(RevokeUser)}
    assert gateway.is_connected


def test_a_removed_account_ends_its_sessions_at_once(world: ClusterWorld) -> None:
    _, client = spread(world)
    node, owner = part_from_owner(world, client)
    world.run_for(SILENCE_S + 0.5)
    world.remove("account", world.account.id)
    world.run_for(0.5)
    world.cluster.heal(node, owner)
    world.run_for(0.5)
    assert client.refused == "invalid_token"
