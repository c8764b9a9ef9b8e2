"""Two connections with one gateway's device key: the older one stands for as long as it lives."""

from __future__ import annotations

from actors.services import Limits
from channel.messages import AuthorizationCreated, GatewayInit

from .world import GatewayAgent, World


def twin_of(gateway: GatewayAgent) -> GatewayAgent:
    """A machine with a copy of the gateway's device key."""
    twin = GatewayAgent(gateway.world, "twin", gateway.token, "192.0.2.66")
    twin.seed = gateway.seed
    return twin


def test_a_gateway_that_was_killed_is_taken_in_again_within_three_seconds() -> None:
    world = World()
    gateway = world.gateway()
    first = gateway.line
    gateway.restart()
    gateway.join()  # nobody told the portal that the older connection is dead
    assert gateway.is_connected
    world.run_for(3)
    assert gateway.heard(GatewayInit)
    assert first is not None
    assert first.closed is not None
    assert (first.closed.reason, first.closed.retry) == ("superseded", False)
    (online,) = world.presence().gateways
    assert online.tunnel_key == gateway.tunnel_key
    assert not world.crashes


def test_a_copy_of_the_key_of_a_gateway_that_lives_is_told_to_come_again_later() -> None:
    world = World()
    world.policy(world.web)
    gateway, client = world.gateway(), world.client()
    created = client.ask(world.web)
    assert isinstance(created, AuthorizationCreated)
    twin = twin_of(gateway)
    line = twin.join()
    assert line.closed is not None
    assert (line.closed.reason, line.closed.retry) == ("superseded", True)
    assert 10 * 10**9 <= line.closed.retry_after_ns < 20 * 10**9
    assert not twin.heard(GatewayInit)
    world.run_for(10)
    assert gateway.is_connected
    assert world.live() == {created.authorization_id}
    assert world.presence().gateways[0].tunnel_key == gateway.tunnel_key
    assert isinstance(client.ask(world.web, connected=(gateway.id,)), AuthorizationCreated)


def test_the_copy_is_taken_in_when_the_older_one_has_gone() -> None:
    world = World()
    gateway = world.gateway()
    twin = twin_of(gateway)
    twin.join()
    gateway.lose_channel()
    twin.join()
    assert twin.heard(GatewayInit)


def test_of_several_newcomers_one_stays_when_the_older_one_is_dead() -> None:
    world = World()
    gateway = world.gateway()
    gateway.line = None  # it hears and says nothing any more
    twins = [twin_of(gateway) for _ in range(3)]
    for twin in twins:
        twin.join()
    world.run_for(6)
    connected = [twin for twin in twins if twin.is_connected]
    assert len(connected) == 1
    assert [twin.refused for twin in twins if twin not in connected] == ["superseded"] * 2
    assert world.presence().gateways[0].tunnel_key == connected[0].tunnel_key
    assert not world.crashes


def test_a_gateway_that_lives_is_not_disturbed_by_any_number_of_newcomers() -> None:
    world = World(limits=Limits(probe_ns=10**9))
    gateway = world.gateway()
    for _ in range(40):
        twin_of(gateway).join()
    world.run_for(5)
    assert gateway.is_connected
    assert len(world.presence().gateways) == 1
    assert not world.crashes


def test_a_gateway_finds_its_way_back_when_the_account_actor_is_started_anew() -> None:
    world = World()
    gateway = world.gateway()
    twin = twin_of(gateway)
    twin.join()
    world.crash(world.account_actor())
    world.run_for(5)
    assert gateway.is_connected
    assert world.presence().gateways[0].tunnel_key == gateway.tunnel_key
