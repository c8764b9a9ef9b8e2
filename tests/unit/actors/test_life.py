"""How authorisations live: renewal, expiry, and what every kind of change does to them."""

from __future__ import annotations

from datetime import time, timedelta

import attrs
import pytest

from actors.model import (
    Conditions,
    CurrentTimeCondition,
    DayWindow,
    RemoteIpCondition,
    TimeRange,
)
from channel.messages import (
    AuthorizationCreated,
    AuthorizationRenewed,
    Filter,
    ResourceUpdated,
    ResourceUpserted,
    Revoke,
)

from .world import START, ClientAgent, GatewayAgent, S, World, hours


def opened(world: World) -> tuple[GatewayAgent, ClientAgent, AuthorizationCreated]:
    gateway, client = world.gateway(), world.client()
    answer = client.ask(world.web)
    assert isinstance(answer, AuthorizationCreated)
    return gateway, client, answer


def until(*days: int, start: time = time(0), end: time = time(0)) -> Conditions:
    each = TimeRange(start=start, end=end)
    windows = tuple(DayWindow(day=day, ranges=(each,)) for day in days)
    return Conditions(current_time=CurrentTimeCondition(zone="UTC", windows=windows))


def from_network(*values: str) -> Conditions:
    return Conditions(remote_ip=RemoteIpCondition(operator="is_in", values=values))


# --- renewal and expiry --------------------------------------------------------------------------


def test_a_lease_is_renewed_at_its_half_for_both_ends() -> None:
    world = World()
    world.policy(lease_s=600)
    gateway, client, answer = opened(world)
    assert answer.expires_in_ns == 600 * S
    world.run_for(299)
    assert not client.heard(AuthorizationRenewed)
    world.run_for(2)
    for agent in (client, gateway):
        (renewed,) = agent.heard(AuthorizationRenewed)
        assert renewed.authorization_id == answer.authorization_id
        assert renewed.expires_in_ns == 600 * S
    world.run_for(3_600)
    assert world.live() == {answer.authorization_id}
    assert len(client.heard(AuthorizationRenewed)) > 10


@pytest.mark.parametrize("who", ["client", "gateway"])
def test_without_either_end_a_lease_runs_out(who: str) -> None:
    world = World()
    world.policy(lease_s=600)
    gateway, client, answer = opened(world)
    away, other = (client, gateway) if who == "client" else (gateway, client)
    away.lose_channel()
    world.run_for(599)
    assert world.live() == {answer.authorization_id}
    world.run_for(2)
    assert not world.live()
    assert world.rows()[answer.authorization_id].end_reason == "expired"
    assert not other.live


def test_an_end_that_comes_back_late_has_its_lease_renewed_at_once() -> None:
    world = World()
    world.policy(lease_s=600)
    gateway, client, answer = opened(world)
    client.lose_channel()
    world.run_for(500)
    client.join()
    assert world.live() == {answer.authorization_id}
    assert client.init.authorizations[0].expires_in_ns == 600 * S
    assert gateway.heard(AuthorizationRenewed)[-1].expires_in_ns == 600 * S


def test_access_ends_with_its_time_window() -> None:
    world = World()
    world.policy(conditions=until(0, start=time(8), end=time(17)))
    gateway, client, answer = opened(world)
    assert answer.expires_in_ns == 8 * 3_600 * S
    world.run_for(8 * 3_600)
    assert not world.live()
    assert [each.reason for each in gateway.heard(Revoke)] == ["expired"]
    assert not client.live
    refused = client.ask(world.web)
    assert refused is not None
    assert refused.violated == ("current_time",)  # type: ignore[union-attr]  # a denial


def test_a_policy_whose_window_follows_takes_over_without_a_gap() -> None:
    world = World()
    world.policy(conditions=until(0, start=time(8), end=time(17)))
    late = world.policy(conditions=until(0, start=time(17), end=time(20)))
    gateway, client, answer = opened(world)
    assert answer.expires_in_ns == 8 * 3_600 * S
    world.run_for(8 * 3_600 + 60)
    assert world.live() == set(client.live) == {answer.authorization_id}
    assert not gateway.heard(Revoke)
    row = world.rows()[answer.authorization_id]
    assert (row.policy_id, row.expires_at) == (late.id, START + hours(11))


def test_access_ends_with_the_policy_that_expires() -> None:
    world = World()
    world.policy(expires_at=START + hours(2))
    _, client, answer = opened(world)
    assert answer.expires_in_ns == 2 * 3_600 * S
    world.run_for(2 * 3_600)
    assert not client.live
    assert not world.live()


def test_access_ends_with_the_token() -> None:
    world = World()
    world.policy()
    world.change_token(world.user_token, expires_at=START + hours(1))
    gateway, client, answer = opened(world)
    assert answer.expires_in_ns == 3_600 * S
    world.run_for(3_600)
    assert client.refused == "token_expired"
    assert not gateway.live
    assert not world.live()


# --- several policies ----------------------------------------------------------------------------


def test_losing_one_of_two_policies_cuts_nothing() -> None:
    world = World()
    first = world.policy(lease_s=7_200)
    second = world.policy(lease_s=600)
    gateway, client, answer = opened(world)
    assert world.rows()[answer.authorization_id].policy_id == first.id
    world.remove("policy", first.id)
    assert world.live() == {answer.authorization_id}
    assert world.rows()[answer.authorization_id].policy_id == second.id
    for agent in (client, gateway):
        assert agent.heard(AuthorizationRenewed)[-1].expires_in_ns == 600 * S
    assert not gateway.heard(Revoke)
    world.remove("policy", second.id)
    assert not world.live()
    assert not gateway.live


def test_a_policy_that_becomes_narrower_shortens_the_lease() -> None:
    world = World()
    policy = world.policy()
    gateway, client, _ = opened(world)
    world.put(attrs.evolve(policy, lease_s=60))
    for agent in (client, gateway):
        assert agent.heard(AuthorizationRenewed)[-1].expires_in_ns == 60 * S
    assert not gateway.heard(Revoke)


def test_another_policy_gives_a_client_that_is_away_no_longer_lease() -> None:
    world = World()
    first = world.policy(lease_s=600)
    world.policy(conditions=until(0, start=time(8), end=time(9, 5)))
    _, client, answer = opened(world)
    client.lose_channel()
    world.run_for(60)
    third = world.policy()
    world.remove("policy", first.id)
    row = world.rows()[answer.authorization_id]
    assert row.policy_id == third.id
    assert row.expires_at == START + timedelta(seconds=600)


# --- changes, and a store that is away ------------------------------------------------------------


def test_new_filters_reach_gateway_and_client_without_a_cut() -> None:
    world = World()
    world.policy()
    gateway, client, answer = opened(world)
    filters = (Filter(protocol="tcp", port_start=443, port_end=443),)
    world.put(attrs.evolve(world.web, filters=filters))
    assert gateway.heard(ResourceUpdated)[-1].resource.filters == filters
    assert client.heard(ResourceUpserted)[-1].resource.filters == filters
    assert world.live() == {answer.authorization_id}


def test_a_client_that_moves_is_decided_anew() -> None:
    world = World()
    world.policy(conditions=from_network("203.0.113.0/24", "198.51.100.0/24"))
    gateway, client, answer = opened(world)
    client.move("198.51.100.77")
    assert world.live() == {answer.authorization_id}
    assert world.rows()[answer.authorization_id].remote_ip == "198.51.100.77"
    client.move("192.0.2.1")
    assert client.is_connected
    assert not client.live
    assert not gateway.live
    assert world.rows()[answer.authorization_id].end_reason == "remote_ip"


def test_a_revocation_is_written_later_if_the_store_is_away_and_cuts_at_once() -> None:
    world = World()
    policy = world.policy(lease_s=60)
    gateway, client, answer = opened(world)
    assert policy.lease_s == 60
    client.lose_channel()
    world.store.is_away = True
    world.run_for(61)
    assert not gateway.live
    assert world.rows()[answer.authorization_id].ended_at is None
    world.store.is_away = False
    world.run_for(2)
    assert world.rows()[answer.authorization_id].end_reason == "expired"
    assert not world.crashes


def test_a_renewal_waits_for_a_store_that_is_away() -> None:
    world = World()
    world.policy(lease_s=600)
    gateway, client, answer = opened(world)
    world.store.is_away = True
    world.run_for(310)
    assert not client.heard(AuthorizationRenewed)
    world.store.is_away = False
    world.run_for(280)
    assert world.live() == {answer.authorization_id}
    assert gateway.heard(AuthorizationRenewed)
    world.run_for(1_000)
    assert world.live() == {answer.authorization_id}


def test_a_change_that_comes_while_the_store_is_away_is_followed_as_soon_as_it_is_back() -> None:
    world = World()
    policy = world.policy()
    gateway, client, _ = opened(world)
    world.store.is_away = True
    world.remove("policy", policy.id)
    assert client.live
    denied = client.ask(world.db)
    assert denied is not None
    world.store.is_away = False
    world.run_for(2)
    assert not client.live
    assert not gateway.live
    assert not world.crashes
