"""The truth after a loss: agents that rejoin, actors that crash, a portal that is killed."""

from __future__ import annotations

from datetime import timedelta
from ipaddress import IPv6Network

import attrs
import pytest

from actors.messages import account_name
from actors.model import Conditions, RemoteIpCondition, Retention
from channel.messages import (
    Ack,
    AuthorizationCreated,
    AuthorizationRenewed,
    AuthorizationRevoked,
    Authorize,
    Candidates,
    ConfigChanged,
    Heartbeat,
    RelayInit,
    ResourceUpdated,
    ResourceUpserted,
    Revoke,
    Stats,
)

from .test_life import opened
from .world import CIPHERTEXT, ClientAgent, GatewayAgent, World, run


def world_with_access() -> tuple[World, GatewayAgent, ClientAgent, AuthorizationCreated]:
    world = World()
    world.policy(world.web)
    world.policy(world.db)
    gateway, client, answer = opened(world)
    return world, gateway, client, answer


# --- agents --------------------------------------------------------------------------------------


def test_a_client_that_rejoins_keeps_what_it_holds_and_its_connection() -> None:
    world, gateway, client, answer = world_with_access()
    client.lose_channel()
    client.join()
    (told,) = client.init.authorizations
    assert told.authorization_id == answer.authorization_id
    assert told.connection_id == answer.connection_id
    further = client.ask(world.db, connected=(gateway.id,))
    assert isinstance(further, AuthorizationCreated)
    assert further.connection_id == answer.connection_id
    assert further.kem_ciphertext is None


def test_what_a_client_no_longer_holds_ends_at_the_gateway() -> None:
    world, gateway, client, answer = world_with_access()
    client.lose_channel()
    client.restart()
    client.join()
    assert client.init.authorizations == ()
    assert not gateway.live
    assert not world.live()
    assert world.rows()[answer.authorization_id].end_reason == "absent"
    again = client.ask(world.web)
    assert isinstance(again, AuthorizationCreated)
    assert again.kem_ciphertext == CIPHERTEXT


def test_what_a_gateway_no_longer_holds_ends_at_the_client() -> None:
    world, gateway, client, _ = world_with_access()
    gateway.lose_channel()
    gateway.restart()
    gateway.join()
    assert gateway.init.authorizations == ()
    assert not client.live
    assert len(client.heard(AuthorizationRevoked)) == 1
    again = client.ask(world.web)
    assert isinstance(again, AuthorizationCreated)
    assert again.gateway.public_key == gateway.tunnel_key
    assert again.kem_ciphertext == CIPHERTEXT


def test_what_was_decided_otherwise_meanwhile_is_absent_from_the_truth() -> None:
    world, gateway, client, _ = world_with_access()
    for agent in (client, gateway):
        agent.lose_channel()
    for policy in world.entities("policy"):
        world.remove("policy", policy.id)
    client.join()
    gateway.join()
    assert client.init.authorizations == gateway.init.authorizations == ()
    assert not client.live
    assert not gateway.live


def test_a_client_that_comes_back_from_elsewhere_is_decided_anew() -> None:
    world = World()
    office = RemoteIpCondition(operator="is_in", values=("203.0.113.0/24",))
    world.policy(conditions=Conditions(remote_ip=office))
    gateway, client, _ = opened(world)
    client.lose_channel()
    client.remote = "192.0.2.1"
    client.join()
    assert not client.live
    assert not gateway.live


def test_held_authorisations_of_others_are_not_given() -> None:
    world, _, client, answer = world_with_access()
    thief = world.client(remote="192.0.2.5")
    thief.live[answer.authorization_id] = answer.connection_id
    thief.lose_channel()
    thief.join()
    assert thief.init.authorizations == ()
    assert world.live() == set(client.live)


def test_filters_that_changed_while_a_gateway_was_away_are_told_after_its_rejoin() -> None:
    world, gateway, _, _ = world_with_access()
    gateway.lose_channel()
    world.put(attrs.evolve(world.web, name="renamed"))
    gateway.join()
    assert [each.resource.name for each in gateway.heard(ResourceUpdated)] == ["renamed"]


# --- actors --------------------------------------------------------------------------------------


def test_an_account_actor_that_crashes_is_replaced_and_nobody_notices() -> None:
    world, gateway, client, answer = world_with_access()
    world.crash(world.account_actor())
    world.run_for(1)
    assert client.is_connected
    assert gateway.is_connected
    assert world.live() == {answer.authorization_id}
    assert not client.heard(AuthorizationRevoked)
    presence = world.presence()
    assert len(presence.clients) == len(presence.gateways) == 1
    # The epoch has risen, and stands on what is said from now on.
    further = client.ask(world.db, connected=(gateway.id,))
    assert isinstance(further, AuthorizationCreated)
    assert client.frame(AuthorizationCreated).epoch == 2
    # The connection was kept, with its ICE credentials.
    assert further.connection_id == answer.connection_id
    assert further.ice == answer.ice


def test_what_changed_while_no_account_actor_lived_has_its_consequences() -> None:
    world, gateway, client, _ = world_with_access()
    ref = world.account_actor()
    world.scheduler.stop(ref, "crashed: on purpose")
    for policy in world.entities("policy"):
        world.remove("policy", policy.id)
    world.run_for(1)
    assert not client.live
    assert not gateway.live
    assert not world.live()
    assert gateway.heard(Revoke)
    assert client.is_connected


def test_a_resource_that_moved_while_no_account_actor_lived_is_cut() -> None:
    world, gateway, client, answer = world_with_access()
    ref = world.account_actor()
    world.scheduler.stop(ref, "crashed: on purpose")
    world.put(attrs.evolve(world.web, address="10.0.0.77"))
    world.run_for(1)
    assert not client.live
    assert not gateway.live
    assert world.rows()[answer.authorization_id].end_reason == "resource_changed"
    assert client.heard(ResourceUpserted)[-1].resource.address == "10.0.0.77"


def test_other_ranges_that_came_while_no_account_actor_lived_are_told() -> None:
    world, gateway, client, answer = world_with_access()
    ref = world.account_actor()
    world.scheduler.stop(ref, "crashed: on purpose")
    wider = IPv6Network("fd48:4c57:5900::/60")
    world.put(attrs.evolve(world.account, range_ipv6=wider, search_domain="corp.example"))
    world.run_for(1)
    assert not client.live
    assert world.rows()[answer.authorization_id].end_reason == "resource_changed"
    (told,) = client.heard(ConfigChanged)
    assert told.interface.range_ipv6 == wider
    assert told.names.search_domain == "corp.example"
    assert gateway.refused == "unavailable"
    gateway.join()
    assert gateway.init.interface.range_ipv6 == wider


def test_what_lives_long_is_not_cut_by_a_move_before_its_time() -> None:
    world = World()
    world.policy()
    world.put(attrs.evolve(world.web, address="10.0.0.77"))
    world.run_for(3_600)
    gateway, client, _ = opened(world)
    world.crash(world.account_actor())
    world.run_for(1)
    assert client.live
    assert gateway.live


def prune_changes(world: World) -> None:
    """As if two days went by, of which the account keeps the changes of one."""
    world.put(attrs.evolve(world.account, retention=Retention(changes_days=1)))
    expired = run(world.store.expire(world.clock.utc_now() + timedelta(days=2)))
    assert expired.changes > 0
    assert expired.authorizations == 0


def test_an_account_whose_changes_are_not_kept_any_more_is_taken_over_all_the_same() -> None:
    world, gateway, client, answer = world_with_access()
    prune_changes(world)
    world.crash(world.account_actor())
    world.run_for(1)
    assert world.live() == {answer.authorization_id}
    assert client.live
    assert gateway.live


def test_who_has_missed_changes_that_are_not_kept_any_more_starts_from_the_contents() -> None:
    world, gateway, client, _ = world_with_access()
    world.store.is_away = True
    for policy in world.entities("policy"):
        world.remove("policy", policy.id)
    prune_changes(world)
    assert client.live
    world.store.is_away = False
    world.run_for(5)
    assert not client.live
    assert not gateway.live
    assert not world.live()
    assert client.is_connected


@pytest.mark.parametrize("who", ["client", "gateway"])
def test_a_session_or_gateway_actor_that_crashes_costs_a_rejoin_and_nothing_else(who: str) -> None:
    world, gateway, client, answer = world_with_access()
    agent = client if who == "client" else gateway
    world.crash(world.owner_of(agent))
    assert agent.refused == "unavailable"
    assert agent.line is not None
    assert agent.line.closed is not None
    assert agent.line.closed.retry
    agent.join()
    assert world.live() == set(client.live) == set(gateway.live) == {answer.authorization_id}


def test_a_request_that_crashes_is_answered_and_leaves_nothing_live() -> None:
    world = World()
    world.policy()
    gateway = world.gateway()
    gateway.is_silent = True
    client = world.client()
    client.request(world.web)
    world.host.run_until_idle()
    world.crash(world.actor("request"))
    answer = client.answer()
    assert answer is not None
    assert answer.reason == "unavailable"  # type: ignore[union-attr]  # a denial
    world.run_for(30)
    assert not world.live()
    assert not gateway.live


def test_an_account_actor_that_crashes_in_the_midst_of_a_request_loses_nothing() -> None:
    world = World()
    world.policy()
    gateway = world.gateway()
    gateway.is_silent = True
    client = world.client()
    client.request(world.web)
    world.host.run_until_idle()
    frame = gateway.frame(Authorize)
    gateway.is_silent = False
    world.crash(world.account_actor())
    world.run_for(0.5)
    gateway.hear(frame)  # the acknowledgement, half a second late
    world.run_for(5)
    answer = client.answer()
    assert isinstance(answer, AuthorizationCreated)
    assert world.live() == set(client.live) == {answer.authorization_id}
    assert answer.authorization_id in gateway.live


def test_an_account_actor_that_cannot_come_up_ends_the_channels_with_the_advice_to_retry() -> None:
    world, gateway, client, _ = world_with_access()
    world.store.is_away = True
    world.crash(world.account_actor())
    world.run_for(30)
    for agent in (client, gateway):
        assert agent.refused == "unavailable"
        assert agent.line is not None
        assert agent.line.closed is not None
        assert agent.line.closed.retry
    world.store.is_away = False
    for agent in (gateway, client):
        agent.join()
    assert world.live() == set(client.live) == set(gateway.live)
    assert world.live()


def test_a_supervisor_brings_the_directory_back_and_relays_come_to_it() -> None:
    world = World()
    relay = world.relay()
    client = world.client()
    directory = world.plane.relay_directory
    assert directory is not None
    world.crash(directory)
    world.run_for(1)
    assert world.plane.relay_directory not in (None, directory)
    assert len(world.relays()) == 1
    assert relay.is_connected
    assert client.is_connected


# --- the whole portal ----------------------------------------------------------------------------


def test_a_portal_that_is_killed_loses_nothing_that_it_acknowledged() -> None:
    world, gateway, client, answer = world_with_access()
    world.kill_portal(client, gateway)
    world.run_for(60)
    world.start_portal()
    assert world.live() == {answer.authorization_id}
    client.join()
    gateway.join()
    assert world.live() == set(client.live) == set(gateway.live) == {answer.authorization_id}
    assert client.line is not None
    assert client.line.frames[0].epoch == 2
    # Both ends still hold the connection, so it carries further resources.
    further = client.ask(world.db, connected=(gateway.id,))
    assert isinstance(further, AuthorizationCreated)
    assert further.connection_id == answer.connection_id
    # And candidates go on to be relayed.
    client.say(Candidates(connection_id=answer.connection_id, generation=5))
    world.host.run_until_idle()
    assert gateway.heard(Candidates)


def test_leases_go_on_to_run_out_after_a_restart() -> None:
    world = World()
    world.policy(lease_s=600)
    gateway, client, _ = opened(world)
    world.kill_portal(client, gateway)
    world.run_for(300)
    world.start_portal()
    assert world.live()
    world.run_for(299)
    assert world.live()
    world.run_for(2)
    assert not world.live()


def test_what_was_never_acknowledged_is_ended_after_a_restart() -> None:
    world = World()
    world.policy()
    gateway = world.gateway()
    gateway.is_silent = True
    client = world.client()
    client.request(world.web)
    world.host.run_until_idle()
    world.kill_portal(client, gateway)
    world.start_portal()
    assert world.live()
    client.join()
    assert not world.live()


def test_a_session_of_an_older_portal_never_supersedes_a_newer_one() -> None:
    world, _, client, _ = world_with_access()
    old = world.scheduler.registry.whereis(account_name(world.account.id))
    assert old is not None
    first = client.line
    world.scheduler.stop(old, "crashed: on purpose")
    client.join()  # arrives at the new account actor before the old session looks for it
    world.run_for(1)
    assert client.is_connected
    assert first is not None
    assert first.closed is not None
    assert first.closed.reason == "superseded"
    assert not world.crashes


def test_garbage_from_agents_harms_nobody() -> None:
    world, gateway, client, answer = world_with_access()
    for agent in (client, gateway):
        for message in (
            Heartbeat(),
            Candidates(connection_id=world.new_id(), generation=0),
        ):
            agent.say(message)
    gateway.say(Stats(connections=2**40, bytes_in=0, bytes_out=0))
    for ref in (None, -1, 2**60):
        gateway.say(Ack(authorization_id=world.new_id(), refusal="ceiling"), ref=ref)
    world.host.run_until_idle()
    assert client.is_connected
    assert gateway.is_connected
    for agent in (client, gateway):
        agent.say(RelayInit(relay_id=world.new_id()))
        world.host.run_until_idle()
        assert agent.refused == "protocol_error"
    assert world.live() == {answer.authorization_id}
    assert not world.crashes


def test_renewals_are_not_told_of_what_an_agent_does_not_hold() -> None:
    world, gateway, client, _ = world_with_access()
    world.run_for(13 * 3_600)
    assert len(client.heard(AuthorizationRenewed)) == 1
    assert len(gateway.heard(AuthorizationRenewed)) == 1


def test_a_client_that_does_not_count_a_gateway_in_makes_its_connection_anew() -> None:
    """So it does once a day, for a fresh KEM key."""
    world = World()
    world.policy(world.web)
    world.policy(world.db)
    gateway, client = world.gateway(), world.client()
    first, second = client.ask(world.web), client.ask(world.db)
    assert isinstance(first, AuthorizationCreated)
    assert isinstance(second, AuthorizationCreated)
    world.run_for(60)
    renewed = client.ask(world.web)
    assert isinstance(renewed, AuthorizationCreated)
    assert renewed.connection_id != first.connection_id
    assert renewed.kem_ciphertext is not None
    assert renewed.ice != first.ice
    assert world.live() == {renewed.authorization_id} == set(gateway.live) == set(client.live)
    joined = client.ask(world.db)  # asked for at the same time, before its answer was there
    assert isinstance(joined, AuthorizationCreated)
    assert joined.connection_id == renewed.connection_id
