"""The client's agent with real engines and gateways, in virtual time."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import attrs
import pytest

from channel.credentials import decode_token, join_statement, verify_join
from channel.frames import RemoteProtocolError
from channel.messages import (
    AuthorizationDenied,
    AuthorizationRenewed,
    ClientInit,
    ConfigChanged,
    Filter,
    GatewayInit,
    NameSettings,
    Relays,
    ResourceRemoved,
    ResourceUpserted,
)
from clients.agent import RoutesChanged
from clients.requests import MAX_WAITING_PACKETS
from runtime.net.address import Address
from tests.unit.clients.stage import (
    ACK,
    CLIENT_IPV4,
    CLIENT_IPV6,
    FIN_ACK,
    HOUR,
    RST,
    SECOND,
    SERVER,
    SYN,
    SYN_ACK,
    WEB,
    Stage,
    answer,
    echo,
    gateway_id,
    interface,
    ipv4,
    tcp,
    udp,
)
from tests.unit.tunnel.network import relay_server
from tunnel.agent import InterfaceChanged, TunnelAgent
from tunnel.packet import ICMP, TCP, parse, tcp_flags


def is_prohibited(packet: bytes) -> bool:
    header = parse(packet)
    return header is not None and header.protocol == ICMP and packet[20:22] == b"\x03\x0d"


def is_reset(packet: bytes) -> bool:
    header = parse(packet)
    return header is not None and header.protocol == TCP and bool(tcp_flags(packet, header) & RST)


def test_the_first_packets_wait_for_the_tunnel_and_arrive_in_order() -> None:
    stage = Stage()
    questions = [udp(bytes([number])) for number in range(5)]
    stage.client_sends(*questions)
    stage.run_until(lambda: len(stage.to_servers[0]) == 5)
    assert stage.to_servers[0] == questions
    assert len(stage.requests) == 1
    stage.server_answers(answer())
    assert stage.to_client == [answer()]
    [peer] = stage.client.status(stage.now)["peers"]  # type: ignore[misc]
    assert peer["path"]["kind"] == "direct"
    assert peer["first_delivery_ns"] is not None
    assert peer["resources"][0]["name"] == "web"


def test_a_join_proves_the_device_and_names_what_is_held() -> None:
    stage = Stage()
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    challenge = stage.challenge()
    join = stage.client.join(challenge, stage.now)
    again = stage.client.join(challenge, stage.now)
    statement = join_statement(
        challenge.nonce, challenge.portal, decode_token(join.token).id, join.tunnel_key
    )
    assert verify_join(join.device_key, join.signature, statement)
    assert again.incarnation > join.incarnation
    assert [held.authorization_id for held in join.held] == list(stage.authorizations)
    assert join.tunnel_key == stage.client.engine.public_key


def test_init_sets_the_interface_and_the_routes() -> None:
    stage = Stage()
    kinds = [type(event) for event in stage.events["0"]]
    assert kinds == [InterfaceChanged, RoutesChanged]
    assert {str(network) for network in stage.events["0"][1].networks} == {"10.0.0.0/24"}
    other = attrs.evolve(WEB, id=gateway_id(50), address="10.9.0.0/16")
    stage.tell(stage.client, ResourceUpserted(resource=other))
    stage.tell(stage.client, ResourceRemoved(resource_id=WEB.id))
    stage.settle()
    assert {str(network) for network in stage.events["0"][-1].networks} == {"10.9.0.0/16"}


@pytest.mark.parametrize(
    ("own", "range_ipv4", "range_ipv6"),
    [
        ("100.64.0.9", "0.0.0.0/0", "fd48:4c57:5900::/64"),
        ("100.64.0.9", "96.0.0.0/4", "fd48:4c57:5900::/64"),
        ("100.64.0.9", "100.64.0.0/11", "fc00::/7"),
        ("192.0.2.1", "100.64.0.0/11", "fd48:4c57:5900::/64"),
        ("127.0.0.9", "127.0.0.0/8", "fd48:4c57:5900::/64"),
        ("169.254.0.9", "169.254.0.0/16", "fd48:4c57:5900::/64"),
    ],
)
def test_a_portal_cannot_take_the_machines_own_network_for_the_tunnel(
    own: str, range_ipv4: str, range_ipv6: str
) -> None:
    stage = Stage()
    told = interface(IPv4Address(own), IPv6Address("fd48:4c57:5900::9"))
    told = attrs.evolve(
        told, range_ipv4=IPv4Network(range_ipv4), range_ipv6=IPv6Network(range_ipv6)
    )
    for agent, init in (
        (stage.client, attrs.evolve(stage.client_init(), interface=told)),
        (stage.gateways[0], attrs.evolve(stage.gateway_init(0), interface=told)),
    ):
        before = agent.interface
        with pytest.raises(RemoteProtocolError):
            stage.tell(agent, init)
        assert agent.interface == before


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0/0", "::/0", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "fe80::/64", "ff02::/16"],
)
def test_a_portal_cannot_route_what_no_resource_reaches(address: str) -> None:
    stage = Stage()
    greedy = attrs.evolve(WEB, id=gateway_id(50), address=address)
    stage.tell(stage.client, ResourceUpserted(resource=greedy))
    stage.settle()
    assert {str(network) for network in stage.events["0"][-1].networks} == {"10.0.0.0/24"}


def test_other_ranges_end_what_was_granted_and_are_given_to_the_interface() -> None:
    stage = Stage()
    stage.client_sends(udp(b"one"))
    stage.run_until(lambda: stage.to_servers[0])
    assert stage.client.held()
    wider = attrs.evolve(
        interface(CLIENT_IPV4, CLIENT_IPV6), range_ipv6=IPv6Network("fd48:4c57:5900::/60")
    )
    names = NameSettings(
        names_ipv4=IPv4Network("100.96.0.0/11"),
        names_ipv6=IPv6Network("fd48:4c57:5901::/64"),
        resolver_ipv4=IPv4Address("100.100.111.1"),
        search_domain="corp.example",
    )
    stage.tell(stage.client, ConfigChanged(interface=wider, names=names))
    stage.settle()
    assert not stage.client.held()
    assert stage.client.names == names
    assert stage.events["0"][-1] == InterfaceChanged(interface=wider)
    stage.tell(stage.client, ConfigChanged(interface=wider, names=names))
    stage.settle()
    assert stage.events["0"].count(InterfaceChanged(interface=wider)) == 1
    greedy = attrs.evolve(wider, range_ipv4=IPv4Network("0.0.0.0/0"))
    with pytest.raises(RemoteProtocolError):
        stage.tell(stage.client, ConfigChanged(interface=greedy, names=names))


def test_a_denial_is_answered_as_prohibited_and_remembered_for_two_seconds() -> None:
    stage = Stage()
    stage.allowed.clear()
    stage.client_sends(tcp(SYN))
    assert len(stage.to_client) == 1
    assert is_prohibited(stage.to_client[0])
    stage.client_sends(tcp(SYN), tcp(SYN, ports=(40_001, 80)))
    assert len(stage.to_client) == 3
    assert len(stage.requests) == 1
    [denial] = stage.client.status(stage.now)["denials"]  # type: ignore[misc]
    assert (denial["resource"], denial["reason"]) == ("web", "forbidden")
    assert denial["violated"] == ["remote_ip"]
    stage.advance(2.1)
    stage.allowed.add(WEB.id)
    stage.client_sends(tcp(SYN))
    stage.run_until(lambda: stage.to_servers[0] == [tcp(SYN)])


def test_what_no_filter_allows_is_prohibited_without_asking() -> None:
    stage = Stage()
    stage.client_sends(tcp(SYN, ports=(40_000, 22)))
    assert is_prohibited(stage.to_client[0])
    assert stage.requests == []


def test_packets_of_another_source_are_dropped() -> None:
    stage = Stage()
    stage.client_sends(udp(source="192.168.1.2"))
    assert stage.to_client == []
    assert stage.requests == []
    assert stage.client.counts.foreign_source == 1


def test_more_packets_than_may_wait_push_out_the_oldest() -> None:
    stage = Stage()
    stage.client.channel_lost(stage.now)
    stage.client_sends(*[udp(bytes([number])) for number in range(MAX_WAITING_PACKETS + 3)])
    stage.tell(stage.client, stage.client_init())
    stage.run_until(lambda: stage.to_servers[0])
    assert stage.to_servers[0][0] == udp(bytes([3]))
    assert len(stage.to_servers[0]) == MAX_WAITING_PACKETS


def test_an_answer_that_never_comes_ends_the_wait() -> None:
    stage = Stage()
    stage.portal_away = True
    stage.client_sends(udp())
    stage.advance(15)
    assert stage.to_client == []
    stage.advance(2)
    assert is_prohibited(stage.to_client[0])


def test_candidates_that_were_lost_with_a_channel_are_told_after_the_next_join() -> None:
    stage = Stage()
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    stage.portal_away = True  # the channel is dead, and nobody knows it yet
    stage.client.engine.add_socket(Address("192.0.2.99", 1_111), stage.now)
    stage.settle()
    stage.client.channel_lost(stage.now)
    stage.portal_away = False
    stage.candidates.clear()
    stage.advance(30)
    stage.tell(stage.client, stage.client_init())
    stage.settle()
    (told,) = stage.candidates
    assert {each.address for each in told.add} == {"192.0.2.1", "192.0.2.99"}


def test_candidates_that_a_channel_never_took_are_told_after_the_next_join() -> None:
    stage = Stage()
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    stage.client.channel_lost(stage.now)
    stage.client.engine.add_socket(Address("192.0.2.99", 1_111), stage.now)
    stage.advance(120)
    stage.candidates.clear()
    stage.tell(stage.client, stage.client_init())
    stage.settle()
    (told,) = stage.candidates
    assert {each.address for each in told.add} == {"192.0.2.1", "192.0.2.99"}


def test_a_join_tells_no_candidates_where_the_path_is_direct_and_all_was_told_long_ago() -> None:
    stage = Stage()
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    stage.advance(120)
    stage.client.channel_lost(stage.now)
    stage.candidates.clear()
    stage.tell(stage.client, stage.client_init())
    stage.settle()
    assert stage.candidates == []


def agent_with_a_relay(stage: Stage, kind: str) -> tuple[TunnelAgent, ClientInit | GatewayInit]:
    """An agent that was told of one relay, and what it hears after a join: of none."""
    agent: TunnelAgent = stage.client if kind == "client" else stage.gateways[0]
    stage.tell(agent, Relays(added=(relay_server(),)))
    return agent, stage.client_init() if kind == "client" else stage.gateway_init(0)


@pytest.mark.parametrize("kind", ["client", "gateway"])
def test_a_relay_that_a_new_portal_does_not_know_yet_is_used_on_for_a_while(kind: str) -> None:
    stage = Stage()
    agent, init = agent_with_a_relay(stage, kind)
    agent.channel_lost(stage.now)
    stage.tell(agent, init)
    stage.advance(29)
    assert agent.engine.statistics().gathering["relays"] == 1
    stage.tell(agent, init)  # a second join gives it no more time
    stage.advance(2)
    assert agent.engine.statistics().gathering["relays"] == 0
    assert agent.told_relays() == []


@pytest.mark.parametrize("kind", ["client", "gateway"])
def test_a_relay_that_is_named_in_time_stays_and_one_that_is_taken_away_goes(kind: str) -> None:
    stage = Stage()
    agent, init = agent_with_a_relay(stage, kind)
    stage.tell(agent, init)
    stage.tell(agent, Relays(added=(relay_server(),)))
    stage.advance(60)
    assert agent.engine.statistics().gathering["relays"] == 1
    stage.tell(agent, init)
    stage.tell(agent, Relays(removed=(relay_server().id,)))
    assert agent.engine.statistics().gathering["relays"] == 0


def test_a_second_resource_joins_the_connection_that_stands() -> None:
    stage = Stage()
    other = attrs.evolve(WEB, id=gateway_id(50), address="10.9.0.0/16")
    stage.resources[other.id] = other
    stage.allowed.add(other.id)
    stage.tell(stage.client, ResourceUpserted(resource=other))
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    stage.client_sends(udp(destination="10.9.1.1"))
    assert stage.to_servers[0][-1] == udp(destination="10.9.1.1")
    assert len(stage.client.engine.connection_ids) == 1
    assert stage.requests[1].connected_gateway_ids == (gateway_id(0),)
    assert stage.acks[1].kem_ciphertext is None


def test_only_answers_come_in() -> None:
    stage = Stage()
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    [connection_id] = stage.client.engine.connection_ids
    unasked = (
        answer(ports=(53, 40_001)),
        udp(source="10.0.0.6", destination=str(CLIENT_IPV4), ports=(53, 40_000)),
        tcp(SYN, source=SERVER, destination=str(CLIENT_IPV4), ports=(80, 22)),
        echo(8, source=SERVER, destination=str(CLIENT_IPV4)),
        b"no packet",
    )
    for packet in unasked:
        # as a hostile gateway would send it, past its own filter
        stage.gateways[0].engine.send_packet(connection_id, packet, stage.now)
    stage.settle()
    assert stage.to_client == []
    assert stage.client.counts.refused_inbound == 4
    stage.gateways[0].engine.send_packet(connection_id, answer(), stage.now)
    stage.settle()
    assert stage.to_client == [answer()]


def test_another_gateway_may_not_answer_for_a_resource() -> None:
    stage = Stage(gateways=2)
    other = attrs.evolve(WEB, id=gateway_id(50), address="10.9.0.0/16")
    stage.resources[other.id] = other
    stage.allowed.add(other.id)
    stage.tell(stage.client, ResourceUpserted(resource=other))
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    stage.offline.add(0)
    stage.client._connections[stage.client.engine.connection_ids[0]].lost = True
    stage.client_sends(udp(destination="10.9.1.1"))
    stage.run_until(lambda: stage.to_servers[1])
    hostile = stage.client.engine.connection_ids[-1]
    stage.gateways[1].engine.send_packet(hostile, answer(), stage.now)
    stage.settle()
    assert stage.client.counts.refused_inbound == 1


def test_a_revocation_stops_traffic_at_once_and_resets_tcp() -> None:
    stage = Stage()
    stage.client_sends(tcp(SYN))
    stage.run_until(lambda: stage.to_servers[0])
    stage.server_answers(
        tcp(SYN_ACK, source=SERVER, destination=str(CLIENT_IPV4), ports=(80, 40_000))
    )
    stage.client_sends(tcp(ACK))
    stage.to_client.clear()
    stage.allowed.clear()
    stage.revoke(next(iter(stage.authorizations)))
    assert len(stage.to_client) == 1
    assert is_reset(stage.to_client[0])
    assert stage.client.engine.connection_ids == []
    stage.client_sends(tcp(ACK, data=b"more"))
    assert stage.to_servers[0] == [tcp(SYN), tcp(ACK)]
    stage.client_sends(tcp(SYN, ports=(40_001, 80)))
    stage.run_until(lambda: is_prohibited(stage.to_client[-1]))


def test_a_lease_ends_by_itself_while_the_portal_is_away() -> None:
    stage = Stage(lease_ns=60 * SECOND)
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    stage.portal_away = True
    stage.client.channel_lost(stage.now)
    stage.gateways[0].channel_lost(stage.now)
    stage.advance(50)
    stage.client_sends(udp(b"still"))
    assert stage.to_servers[0][-1] == udp(b"still")
    stage.advance(15)
    stage.client_sends(udp(b"over"))
    stage.advance(1)
    assert stage.to_servers[0][-1] == udp(b"still")
    assert stage.client.engine.connection_ids == []
    assert stage.gateways[0].engine.connection_ids == []


def test_a_renewal_moves_the_end_of_the_lease() -> None:
    stage = Stage(lease_ns=60 * SECOND)
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    [authorization_id] = stage.authorizations
    renewed = AuthorizationRenewed(authorization_id=authorization_id, expires_in_ns=HOUR)
    stage.tell(stage.client, renewed)
    stage.tell(stage.gateways[0], renewed)
    stage.advance(120)
    stage.client_sends(udp(b"still"))
    assert stage.to_servers[0][-1] == udp(b"still")


def test_a_rejoin_drops_what_the_portal_does_not_name() -> None:
    stage = Stage()
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    stage.client.channel_lost(stage.now)
    stage.tell(stage.client, stage.client_init())
    assert len(stage.client.held()) == 1
    stage.client.channel_lost(stage.now)
    stage.authorizations.clear()
    stage.tell(stage.client, stage.client_init())
    assert stage.client.held() == ()
    assert stage.client.engine.connection_ids == []


def test_when_a_gateway_dies_traffic_moves_to_another_and_old_flows_are_reset() -> None:
    stage = Stage(gateways=2)
    stage.client_sends(tcp(SYN))
    stage.run_until(lambda: stage.to_servers[0])
    stage.server_answers(
        tcp(SYN_ACK, source=SERVER, destination=str(CLIENT_IPV4), ports=(80, 40_000))
    )
    stage.client_sends(tcp(ACK), udp(b"before"))
    stage.to_client.clear()
    died = stage.now
    stage.offline.add(0)
    stage.client_sends(udp(b"into the void"))
    number = 0
    while not stage.to_servers[1]:
        number += 1
        stage.client_sends(udp(bytes([number])))
        stage.advance(0.1)
        assert stage.now - died < 10 * SECOND
    assert stage.requests[-1].failed_gateway_ids == (gateway_id(0),)
    assert [packet for packet in stage.to_client if is_reset(packet)]
    stage.server_answers(answer(), number=1)
    assert stage.to_client[-1] == answer()
    [peer] = stage.client.status(stage.now)["peers"]  # type: ignore[misc]
    assert peer["name"] == "gateway 1"


def test_a_connection_that_begins_while_the_old_path_is_dead_is_not_reset() -> None:
    stage = Stage(gateways=2)
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    stage.offline.add(0)
    stage.client_sends(udp(b"into the void"))
    stage.run_until(lambda: not stage.client.engine.connection_ids or stage.client._failed_until)
    stage.client_sends(tcp(SYN, ports=(41_000, 80)))
    stage.run_until(lambda: tcp(SYN, ports=(41_000, 80)) in stage.to_servers[1])
    assert not [packet for packet in stage.to_client if is_reset(packet)]


def test_tcp_that_no_flow_knows_is_reset() -> None:
    stage = Stage()
    stage.client_sends(tcp(ACK, ports=(50_000, 80)))
    assert is_reset(stage.to_client[0])
    assert stage.requests == []


def test_a_closed_flow_gives_its_ports_to_a_new_one() -> None:
    stage = Stage()
    stage.client_sends(tcp(SYN))
    stage.run_until(lambda: stage.to_servers[0])
    stage.client_sends(tcp(FIN_ACK))
    stage.server_answers(
        tcp(FIN_ACK, source=SERVER, destination=str(CLIENT_IPV4), ports=(80, 40_000))
    )
    stage.client_sends(tcp(SYN))
    assert stage.to_servers[0] == [tcp(SYN), tcp(FIN_ACK), tcp(SYN)]


def test_new_filters_of_a_resource_hold_for_new_flows() -> None:
    stage = Stage()
    narrowed = attrs.evolve(WEB, filters=(Filter(protocol="icmp"),))
    stage.tell(stage.client, ResourceUpserted(resource=narrowed))
    stage.client_sends(udp())
    assert is_prohibited(stage.to_client[0])


def test_a_resource_is_asked_for_at_most_once_a_second() -> None:
    stage = Stage()
    stage.allowed.clear()
    for _ in range(50):
        stage.client_sends(udp())
        stage.advance(0.1)
    assert len(stage.requests) <= 3


def test_a_removed_resource_ends_its_lease() -> None:
    stage = Stage()
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    stage.tell(stage.client, ResourceRemoved(resource_id=WEB.id))
    assert stage.client.held() == ()
    stage.client_sends(udp())
    assert is_prohibited(stage.to_client[-1])


def test_candidates_that_overtake_the_answer_are_kept() -> None:
    stage = Stage()
    created = []
    tell = stage.tell

    def late(agent, message, ref=None):  # type: ignore[no-untyped-def]
        if type(message).__name__ == "AuthorizationCreated":
            created.append(message)
        else:
            tell(agent, message, ref)

    stage.tell = late  # type: ignore[method-assign]
    stage.client_sends(udp())
    assert len(created) == 1
    assert stage.client._early
    tell(stage.client, created[0])
    assert not stage.client._early
    stage.run_until(lambda: stage.to_servers[0])


def test_an_offline_answer_is_told_and_tried_again() -> None:
    stage = Stage()
    stage.offline.add(0)
    stage.client_sends(udp())
    assert is_prohibited(stage.to_client[0])
    stage.offline.clear()
    stage.advance(3)
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])


def test_a_denial_that_names_a_time_is_honoured_up_to_a_minute() -> None:
    stage = Stage()
    denied = AuthorizationDenied(resource_id=WEB.id, reason="unavailable", retry_after_ns=HOUR)
    stage.tell(stage.client, denied)
    stage.advance(59)
    stage.client_sends(udp())
    assert stage.requests == []
    stage.advance(2)
    stage.client_sends(udp())
    assert len(stage.requests) == 1


@pytest.mark.parametrize("protocol", [47, 50, 132])
def test_other_protocols_are_prohibited(protocol: int) -> None:
    stage = Stage()
    stage.client_sends(ipv4(protocol, bytes(20), str(CLIENT_IPV4), SERVER))
    assert is_prohibited(stage.to_client[0])
