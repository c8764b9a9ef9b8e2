from __future__ import annotations

from datetime import timedelta
from typing import Any

import attrs
import pytest

from channel.credentials import decode_token, turn_expiry, turn_password
from channel.messages import (
    Challenge,
    IpText,
    Load,
    Rejoining,
    RelayInit,
    Relays,
    RelayServer,
    RevokeUser,
    SocketAddress,
)

from .world import START, RelayAgent, World, run

PIN = "0123456789abcdef" * 4


def test_agents_get_credentials_of_their_own_for_each_relay() -> None:
    world = World()
    relay = world.relay()
    client, gateway = world.client(), world.gateway()
    (for_client,), (for_gateway,) = client.init.relays, gateway.init.relays
    assert for_client.addresses == RelayAgent.addresses
    assert for_client.username != for_gateway.username
    assert for_client.password == turn_password(bytes(32), for_client.id, for_client.username)
    ends = turn_expiry(for_client.username) - START.timestamp()
    assert ends >= 24 * 3600
    assert for_client.expires_in_ns == ends * 10**9
    assert relay.heard(RelayInit)[0].relay_id == for_client.id


def test_no_secret_of_a_relay_is_kept_in_the_store() -> None:
    world = World()
    world.relay()
    (row,) = world.relay_rows()
    assert row.name == "relay"
    assert "stamp" not in {field.name for field in attrs.fields(type(row))}


def test_an_address_where_no_relay_answers_is_never_handed_out() -> None:
    world = World()
    world.lab.proven = False
    relay = world.relay()
    assert relay.refused == "unavailable"
    assert not world.client().init.relays


def test_only_addresses_that_can_be_proven_are_handed_out() -> None:
    world = World()
    world.lab.blocked = "tcp"
    relay = RelayAgent(world, "relay", world.relay_token(), "203.0.113.50")
    tcp = SocketAddress(address=IpText("203.0.113.50"), port=3478, transport="tcp")
    tls = SocketAddress(address=IpText("203.0.113.50"), port=443, transport="tls")
    relay.addresses = (*RelayAgent.addresses, tcp, tls)
    relay.certificate_pins = (PIN,)
    relay.join()
    assert world.lab.asked == [(each, (PIN,)) for each in relay.addresses]
    (server,) = world.client().init.relays
    assert server.addresses == (*RelayAgent.addresses, tls)
    assert server.certificate_pins == (PIN,)


def test_a_relay_that_joins_anew_with_another_certificate_is_left_by_nobody() -> None:
    world = World()
    relay = RelayAgent(world, "relay", world.relay_token(), "203.0.113.50")
    relay.certificate_pins = (PIN,)
    relay.join()
    client = world.client()
    relay.say(Rejoining())
    relay.lose_channel()
    assert not client.heard(Relays)
    relay.certificate_pins = (PIN[::-1],)
    relay.join()
    (told,) = client.heard(Relays)
    assert not told.removed
    assert [each.certificate_pins for each in told.added] == [(PIN[::-1],)]
    assert len(world.relays()) == 1


def test_a_relay_that_said_it_joins_anew_and_does_not_is_gone_after_half_a_minute() -> None:
    world = World()
    relay, client = world.relay(), world.client()
    relay.say(Rejoining())
    relay.lose_channel()
    world.run_for(29)
    assert not client.heard(Relays)
    world.run_for(2)
    assert client.heard(Relays)[-1].removed == (relay.heard(RelayInit)[0].relay_id,)
    assert not world.relays()


def test_a_proof_that_takes_too_long_is_none() -> None:
    world = World()
    world.lab.proof_ns = 60 * 10**9
    relay = world.relay()
    world.run_for(11)
    assert relay.refused == "unavailable"


def test_addresses_are_proven_at_once_and_not_one_after_the_other() -> None:
    world = World()
    world.lab.proof_ns = 4 * 10**9
    relay = RelayAgent(world, "relay", world.relay_token(), "203.0.113.50")
    relay.addresses = tuple(
        SocketAddress(address=IpText("203.0.113.50"), port=3478 + number, transport=transport)
        for number in range(4)
        for transport in ("udp", "tcp")
    )
    world.lab.blocked = "tcp"
    relay.join()
    world.run_for(5)
    (init,) = relay.heard(RelayInit)
    (server,) = world.client().init.relays
    assert server.id == init.relay_id
    assert server.addresses == relay.addresses[::2]


def test_a_relay_that_goes_while_it_is_proven_leaves_no_proof_behind() -> None:
    world = World()
    world.lab.proof_ns = 4 * 10**9
    relay = RelayAgent(world, "relay", world.relay_token(), "203.0.113.50")
    relay.join()
    world.run_for(1)
    relay.lose_channel()
    world.run_for(10)
    assert not world.relays()
    assert not world.relay_rows()


def test_relays_that_come_and_go_are_told_to_everybody() -> None:
    world = World()
    client, gateway = world.client(), world.gateway()
    relay = world.relay()
    for agent in (client, gateway):
        (told,) = agent.heard(Relays)
        assert [each.id for each in told.added] == [relay.heard(RelayInit)[0].relay_id]
    relay.lose_channel()
    for agent in (client, gateway):
        told = agent.heard(Relays)[-1]
        assert told.removed == (relay.heard(RelayInit)[0].relay_id,)
        assert not told.added


def test_a_relay_that_dies_is_replaced_by_another() -> None:
    world = World()
    relays = {relay.heard(RelayInit)[0].relay_id: relay for relay in map(world.relay, "abc")}
    client = world.client()
    used = {each.id for each in client.init.relays}
    assert len(used) == 2
    dying = next(iter(used))
    relays[dying].lose_channel()
    (told,) = client.heard(Relays)
    assert told.removed == (dying,)
    assert {each.id for each in told.added} == set(relays) - used


def test_the_least_loaded_relays_are_handed_out() -> None:
    world = World()
    busy, idle, calm = (world.relay(name) for name in ("busy", "idle", "calm"))
    busy.say(Load(allocations=100, load=0.9))
    calm.say(Load(allocations=1, load=0.1))
    world.host.run_until_idle()
    chosen = [each.id for each in world.client().init.relays]
    assert chosen == [each.heard(RelayInit)[0].relay_id for each in (idle, calm)]


def test_credentials_are_made_anew_long_before_they_end() -> None:
    world = World()
    world.relay()
    client = world.client()
    (first,) = client.init.relays
    world.run_for(12 * 3600 + 1)
    (told,) = client.heard(Relays)
    (second,) = told.added
    assert second.id == first.id
    assert turn_expiry(second.username) > turn_expiry(first.username)
    # Whatever lease was given before ends before the credentials that the agent had then.
    assert turn_expiry(first.username) >= world.clock.utc_now().timestamp() + 24 * 3600


def test_a_relay_that_comes_back_is_the_same_relay_and_supersedes_its_older_connection() -> None:
    world = World()
    relay = world.relay()
    id = relay.heard(RelayInit)[0].relay_id
    first = relay.line
    relay.join()
    assert relay.heard(RelayInit)[0].relay_id == id
    assert first is not None
    assert first.closed is not None
    assert first.closed.reason == "superseded"
    assert len(world.relay_rows()) == len(world.relays()) == 1
    assert not world.crashes


class RestartedRelay(RelayAgent):
    """The same relay after a restart: it made another stamp secret, and nobody told the portal
    yet that the older connection is dead."""

    def _join(self, challenge: Challenge) -> Any:
        return attrs.evolve(super()._join(challenge), stamp_secret=b"\x01" * 32)


def test_a_relay_that_was_started_anew_has_everybody_told_of_credentials_that_serve() -> None:
    world = World()
    before = world.relay()
    client, gateway = world.client(), world.gateway()
    relay = RestartedRelay(world, before.name, before.token, "203.0.113.50")
    relay.join()
    id = relay.heard(RelayInit)[0].relay_id
    assert id == before.heard(RelayInit)[0].relay_id
    for agent in (client, gateway):
        told = [server for message in agent.heard(Relays) for server in message.added]
        assert {server.id for server in told} == {id}
        newest = told[-1]
        assert newest.password == turn_password(b"\x01" * 32, id, newest.username)
        assert not agent.heard(Relays)[-1].removed


def test_a_relay_needs_the_token_of_a_relay() -> None:
    world = World()
    relay = RelayAgent(world, "relay", world.site_token, "203.0.113.50")
    relay.join()
    assert relay.refused == "invalid_token"


def forget_token(world: World) -> None:
    """As another node would: nobody here is told."""
    id = decode_token(world.relay_token()).id
    run(world.store.remove_installation_token(id, at=world.clock.utc_now()))


@pytest.mark.parametrize("is_told", [True, False])
def test_a_relay_whose_token_is_deleted_is_sent_away_and_no_longer_handed_out(
    is_told: bool,
) -> None:
    world = World()
    relay, client = world.relay(), world.client()
    forget_token(world)
    if is_told:
        world.plane.wake_relays()
        world.run_for(0)
    else:
        assert relay.is_connected
        world.run_for(61)
    assert relay.refused == "invalid_token"
    assert client.heard(Relays)[-1].removed == (relay.heard(RelayInit)[0].relay_id,)
    assert not world.relays()
    assert not world.relay_rows()
    relay.join()
    assert relay.refused == "invalid_token"
    assert not world.crashes


def test_a_relay_whose_token_expires_is_sent_away_then() -> None:
    world = World()
    expires_at = world.clock.utc_now() + timedelta(seconds=100)
    world._relay_token = world.token("relay", account_id=None, expires_at=expires_at)
    relay, client = world.relay(), world.client()
    world.run_for(99)
    assert relay.is_connected
    world.run_for(1)
    assert relay.refused == "token_expired"
    assert client.heard(Relays)[-1].removed == (relay.heard(RelayInit)[0].relay_id,)


def test_a_token_that_is_deleted_while_its_relay_joins_lets_no_relay_in() -> None:
    world = World()
    world.lab.proof_ns = 3 * 10**9
    relay = world.relay()
    world.run_for(1)
    forget_token(world)
    world.plane.wake_relays()
    world.run_for(5)
    assert relay.refused == "invalid_token"
    assert not relay.heard(RelayInit)
    assert not world.relays()


def test_a_relays_token_is_good_from_its_allowed_sources_only_also_after_a_move() -> None:
    world = World()
    world._relay_token = world.token("relay", account_id=None, allowed_sources=("203.0.113.0/24",))
    relay = world.relay()
    relay.move("203.0.113.77")
    assert relay.is_connected
    relay.move("192.0.2.1")
    assert relay.refused == "invalid_token"


def test_relays_stay_while_the_store_is_away() -> None:
    world = World()
    relay = world.relay()
    world.store.is_away = True
    world.run_for(300)
    assert relay.is_connected
    forget_token(world)
    world.store.is_away = False
    world.run_for(61)
    assert relay.refused == "invalid_token"


def user_of(server: RelayServer) -> str:
    return server.username.partition(":")[2]


def test_an_agent_has_one_user_at_each_relay_that_tells_nothing_of_it() -> None:
    world = World()
    world.relay("one")
    world.relay("two")
    client, other = world.client(), world.client()
    users = [user_of(server) for server in (*client.init.relays, *other.init.relays)]
    assert len(set(users)) == 4
    client.lose_channel()
    client.join()
    assert {user_of(server) for server in client.init.relays} == set(users[:2])


@pytest.mark.parametrize("connected", [True, False])
def test_a_removed_agent_loses_its_allocations_too(connected: bool) -> None:
    world = World()
    relay = world.relay()
    client, other = world.client(), world.client()
    (server,) = client.init.relays
    if not connected:
        client.lose_channel()
    world.remove("client", client.init.client_id)
    (told,) = relay.heard(RevokeUser)
    assert told.user == user_of(server)
    assert told.expires_in_ns >= server.expires_in_ns
    assert told.user != user_of(other.init.relays[0])


def test_an_agent_that_may_come_back_comes_to_relays_as_another() -> None:
    world = World()
    relay = world.relay()
    client = world.client()
    before = user_of(client.init.relays[0])
    world.put(attrs.evolve(world.account, disabled=True))
    assert [told.user for told in relay.heard(RevokeUser)] == [before]
    world.put(attrs.evolve(world.account, disabled=False))
    client.join()
    assert user_of(client.init.relays[0]) != before
