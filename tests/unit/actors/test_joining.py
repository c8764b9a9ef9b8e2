from __future__ import annotations

from ipaddress import IPv4Network
from typing import Any

import attrs
import pytest
from structlog.testing import capture_logs

from actors.model import AccountLimits, Principal
from actors.services import Limits
from channel.credentials import decode_token, encode_token
from channel.messages import (
    Challenge,
    ClientInit,
    Disconnect,
    GatewayInit,
    IpText,
    Join,
    ResourceRemoved,
    ResourceUpserted,
    Stats,
)

from .world import PORTAL, ClientAgent, GatewayAgent, Line, World, hours


def agent(world: World, **changes: Any) -> ClientAgent:
    agent = ClientAgent(world, "laptop", world.user_token, "203.0.113.7")
    agent.join(**changes)
    return agent


def test_a_client_that_joins_is_told_where_it_is_and_what_it_may_see() -> None:
    world = World()
    world.policy(world.web)
    client = agent(world)
    init = client.init
    assert isinstance(init, ClientInit)
    row = world.get("client", init.client_id)
    assert (row.ipv4, row.ipv6) == (init.interface.ipv4, init.interface.ipv6)
    assert row.ipv4 in world.account.range_ipv4
    assert row.ipv6 in world.account.range_ipv6
    assert row.principal_id == world.user.id
    assert [each.name for each in init.resources] == ["web"]
    assert client.line is not None
    assert client.line.kind == "client"
    assert [frame.epoch for frame in client.line.frames] == [1]


def test_a_device_keeps_its_row_and_its_addresses() -> None:
    world = World()
    client = agent(world)
    first = client.init
    client.lose_channel()
    client.join()
    assert client.init.client_id == first.client_id
    assert client.init.interface == first.interface


def test_devices_never_share_an_address() -> None:
    world = World()
    # A range of six addresses: six devices join, and the seventh is refused.
    world.put(attrs.evolve(world.account, range_ipv4=IPv4Network("100.64.0.0/29")))
    agents = [agent(world) for _ in range(7)]
    addresses = [each.init.interface.ipv4 for each in agents[:6]]
    assert len(set(addresses)) == 6
    assert agents[6].refused == "limits_exceeded"


@pytest.mark.parametrize(
    ("changes", "code", "retry"),
    [
        ({"token": "hlw_client_nonsense"}, "invalid_token", False),
        ({"signature": bytes(64)}, "invalid_signature", False),
        ({"tunnel_key": bytes(32)}, "invalid_signature", False),
        ({"device_key": bytes(32)}, "invalid_signature", False),
        ({"versions": (2, 3)}, "version_unsupported", False),
        ({"kind": "gateway"}, "invalid_token", False),
    ],
)
def test_a_join_that_does_not_prove_itself_is_refused_with_a_code(
    changes: dict[str, Any], code: str, retry: bool
) -> None:
    world = World()
    client = agent(world, **changes)
    assert client.line is not None
    assert client.line.closed is not None
    assert (client.line.closed.reason, client.line.closed.retry) == (code, retry)
    assert client.line.kind is None
    assert not world.presence().clients
    assert not world.crashes


def test_a_token_with_another_secret_is_refused() -> None:
    world = World()
    real = decode_token(world.user_token)
    forged = encode_token("client", real.id, bytes(32), PORTAL, bytes(32)).reveal_text()
    assert agent(world, token=forged).refused == "invalid_token"
    unknown = encode_token("client", world.new_id(), bytes(32), PORTAL, bytes(32)).reveal_text()
    assert agent(world, token=unknown).refused == "invalid_token"


def test_a_signature_for_another_challenge_is_refused() -> None:
    world = World()
    client = agent(world)
    assert client.line is not None
    old = client.init
    stolen = client._join(Challenge(nonce=bytes(32), portal=PORTAL))
    client.lose_channel()
    client.join(signature=stolen.signature)
    assert client.refused == "invalid_signature"
    assert client.init is old


def test_a_token_that_expired_is_refused_and_ends_the_session_that_it_opened() -> None:
    world = World()
    world.change_token(world.user_token, expires_at=world.clock.utc_now() + hours(1))
    client = agent(world)
    assert client.is_connected
    world.run_for(3_600)
    assert client.refused == "token_expired"
    client.join()
    assert client.refused == "token_expired"


def test_a_token_is_good_from_its_allowed_sources_only_also_after_a_move() -> None:
    world = World()
    world.change_token(world.user_token, allowed_sources=("203.0.113.0/24",))
    client = agent(world)
    client.move("203.0.113.99")
    assert client.is_connected
    client.move("192.0.2.1")
    assert client.refused == "invalid_token"
    client.join()
    assert client.refused == "invalid_token"


def test_the_uses_of_a_token_count_devices_and_not_joins() -> None:
    world = World()
    world.change_token(world.user_token, max_uses=1)
    client = agent(world)
    for _ in range(3):
        client.lose_channel()
        client.join()
        assert client.is_connected
    other = agent(world)
    assert other.line is not None
    assert other.line.closed == Disconnect(
        reason="limits_exceeded", detail="the token is used up", retry=False
    )


@pytest.mark.parametrize("what", ["account", "principal"])
def test_nobody_joins_a_disabled_account_or_for_a_disabled_principal(what: str) -> None:
    world = World()
    client = agent(world)
    row = world.account if what == "account" else world.user
    world.put(attrs.evolve(row, disabled=True))
    assert client.refused == "account_disabled"
    client.join()
    assert client.refused == "account_disabled"
    world.put(attrs.evolve(row, disabled=False))
    client.join()
    assert client.is_connected


def test_a_gateway_awaits_approval_where_the_token_asks_for_it() -> None:
    world = World()
    world.change_token(world.site_token, approves_devices=False)
    gateway = GatewayAgent(world, "gateway", world.site_token, "198.51.100.9")
    line = gateway.join()
    assert gateway.refused == "awaiting_approval"
    assert line.closed is not None
    assert line.closed.retry
    (row,) = world.entities("gateway")
    assert not row.approved
    world.put(attrs.evolve(row, approved=True))
    gateway.join()
    assert isinstance(gateway.init, GatewayInit)


def test_the_newest_connection_of_a_device_wins() -> None:
    world = World()
    client = agent(world)
    first = client.line
    client.join()
    assert first is not None
    assert first.closed is not None
    assert (first.closed.reason, first.closed.retry) == ("superseded", False)
    assert client.is_connected
    assert len(world.presence().clients) == 1
    # The end of the older changes nothing for the newer.
    world.run_for(1)
    assert len(world.presence().clients) == 1


def test_a_connection_that_never_joins_is_closed() -> None:
    world = World()
    client = ClientAgent(world, "mute", world.user_token, "203.0.113.7")
    client.say = lambda *_: None  # type: ignore[method-assign]  # an agent that says nothing
    client.join()
    world.run_for(11)
    assert client.refused == "protocol_error"
    assert world.plane.statistics().admissions == 0


def test_above_the_limit_of_admissions_newcomers_are_told_to_come_later() -> None:
    world = World(limits=Limits(admissions=1))
    mute = ClientAgent(world, "mute", world.user_token, "203.0.113.7")
    mute.say = lambda *_: None  # type: ignore[method-assign]  # an agent that says nothing
    mute.join()
    line = ClientAgent(world, "second", world.user_token, "203.0.113.7").join()
    assert line.closed is not None
    assert (line.closed.reason, line.closed.retry) == ("limits_exceeded", True)
    assert line.closed.retry_after_ns > 0


def test_anything_but_a_join_at_first_is_a_protocol_error() -> None:
    world = World()
    client = ClientAgent(world, "odd", world.user_token, "203.0.113.7")
    client.line = line = Line(world, client.remote)
    line.attachment = world.plane.connected(line, Challenge(nonce=bytes(32), portal=PORTAL))
    client.say(Stats(connections=1, bytes_in=0, bytes_out=0))
    world.host.run_until_idle()
    assert client.refused == "protocol_error"


def test_a_second_join_on_a_channel_is_a_protocol_error() -> None:
    world = World()
    client, gateway = agent(world), world.gateway()
    for each in (client, gateway):
        assert each.line is not None
        each.say(
            Join(
                kind="client",
                token="x",
                device_key=bytes(32),
                signature=bytes(64),
                tunnel_key=bytes(32),
                name="x",
                incarnation=1,
            )
        )
        world.host.run_until_idle()
        assert each.refused == "protocol_error"
    assert not world.crashes


def test_a_removed_token_takes_its_devices_along() -> None:
    world = World()
    client, gateway = agent(world), world.gateway()
    world.remove("token", decode_token(world.user_token).id)
    assert client.refused == "invalid_token"
    world.remove("token", decode_token(world.site_token).id)
    assert gateway.refused == "invalid_token"
    assert not world.presence().clients
    assert not world.presence().gateways


def test_a_device_that_joins_by_another_token_follows_its_owner() -> None:
    world = World()
    client = agent(world)
    other = Principal(name="other", **world.common())
    world.put(other)
    client.lose_channel()
    client.token = world.token("client", principal_id=other.id)
    client.join()
    row = world.get("client", client.id)
    assert (row.principal_id, row.token_id) == (other.id, decode_token(client.token).id)
    world.remove("token", decode_token(world.user_token).id)
    assert client.is_connected


def test_what_a_client_sees_follows_policies_groups_and_resources() -> None:
    world = World()
    client = agent(world)
    policy = world.policy(world.web, group_id=world.staff.id)
    assert not client.heard(ResourceUpserted)
    member = world.membership(world.staff, world.user)
    assert [each.resource.id for each in client.heard(ResourceUpserted)] == [world.web.id]
    world.put(attrs.evolve(world.web, name="intranet"))
    assert client.heard(ResourceUpserted)[-1].resource.name == "intranet"
    world.put(attrs.evolve(policy, disabled=True))
    assert [each.resource_id for each in client.heard(ResourceRemoved)] == [world.web.id]
    world.put(policy)
    assert len(client.heard(ResourceUpserted)) == 3
    world.remove("membership", member.id)
    assert len(client.heard(ResourceRemoved)) == 2
    world.put(attrs.evolve(policy, group_id=world.everyone.id))
    assert len(client.heard(ResourceUpserted)) == 4
    world.remove("resource", world.web.id)
    assert len(client.heard(ResourceRemoved)) == 3


def test_presence_and_load_can_be_asked_for() -> None:
    world = World()
    client, gateway = agent(world), world.gateway()
    gateway.say(Stats(connections=7, bytes_in=1, bytes_out=2))
    client.move("192.0.2.77")
    presence = world.presence()
    assert [each.remote for each in presence.clients] == [IpText("192.0.2.77")]
    assert [each.tunnel_key for each in presence.gateways] == [gateway.tunnel_key]
    gateway.lose_channel()
    assert not world.presence().gateways
    assert world.plane.statistics().gateways == 0


def test_draining_sends_everybody_away_and_takes_nobody() -> None:
    world = World()
    client, gateway = agent(world), world.gateway()
    world.plane.drain()
    world.host.run_until_idle()
    for each in (client, gateway):
        assert each.line is not None
        assert each.line.closed is not None
        assert (each.line.closed.reason, each.line.closed.retry) == ("draining", True)
    client.join()
    assert client.refused == "draining"


def test_an_account_that_is_removed_sends_its_agents_away() -> None:
    world = World()
    world.policy()
    client, gateway = agent(world), world.gateway()
    client.ask(world.web)
    assert client.live
    world.remove("account", world.account.id)
    assert client.refused == "invalid_token"
    assert gateway.refused == "invalid_token"
    assert not client.live
    assert not gateway.live
    client.join()
    assert client.refused == "invalid_token"
    assert world.plane.statistics().accounts == 0
    assert not world.crashes


def test_a_name_that_no_row_can_hold_is_refused_and_harms_nobody() -> None:
    world = World()
    client = agent(world, name="two\nlines")
    assert client.refused == "protocol_error"
    assert not world.crashes
    assert not world.entities("client")


def test_a_principal_has_a_limit_of_devices() -> None:
    world = World(limits=Limits(clients_per_principal=2))
    first, _, third = (agent(world) for _ in range(3))
    assert third.refused == "limits_exceeded"
    first.join()
    assert first.is_connected


def test_an_account_has_no_more_devices_than_its_operator_lets_it() -> None:
    world = World()
    world.put(attrs.evolve(world.account, limits=AccountLimits(clients=2, gateways=1)))
    first, _, third = (agent(world) for _ in range(3))
    gateways = [GatewayAgent(world, "gw", world.site_token, "198.51.100.7") for _ in range(2)]
    for gateway in gateways:
        gateway.join()
    assert third.refused == "limits_exceeded"
    assert gateways[1].refused == "limits_exceeded"
    assert (len(world.entities("client")), len(world.entities("gateway"))) == (2, 1)
    assert gateways[0].is_connected
    first.join()
    assert first.is_connected


def test_the_actor_of_an_account_leaves_some_time_after_the_last_agent() -> None:
    world = World()
    client = agent(world)
    client.lose_channel()
    world.run_for(500)
    client.join()
    client.lose_channel()
    world.run_for(500)
    assert world.plane.statistics().accounts == 1
    world.run_for(200)
    assert world.plane.statistics().accounts == 0
    client.join()
    assert client.is_connected


@pytest.mark.parametrize("changes", [{}, {"signature": bytes(64)}, {"token": "hlw_client_secret"}])
def test_a_join_leaves_one_line_in_the_log_and_no_secret_in_it(changes: dict[str, Any]) -> None:
    world = World()
    with capture_logs() as lines:
        agent(world, **changes)
    own = [line for line in lines if line["event"] in ("agent_joined", "join_refused")]
    assert len(own) == 1
    secret = decode_token(world.user_token).secret
    text = repr(lines)
    for hidden in (world.user_token, secret.hex(), repr(secret), "hlw_client"):
        assert hidden not in text
