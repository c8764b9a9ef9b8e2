"""The gateway's agent with real engines and a client, in virtual time."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_network
from uuid import UUID

import attrs
import pytest

from channel.messages import (
    Ack,
    Authorize,
    Candidates,
    Filter,
    IceCredentials,
    IceParameters,
    Peer,
    Resource,
    ResourceUpdated,
    Revoke,
    Stats,
)
from gateways.agent import FlushTranslations
from tests.unit.clients.stage import (
    ACK,
    CLIENT,
    CLIENT_IPV4,
    CLIENT_IPV6,
    HOUR,
    SECOND,
    SERVER,
    SYN,
    WEB,
    Stage,
    answer,
    tcp,
    udp,
)
from tunnel.packet import parse
from tunnel.preshared import KemKey


def connected(stage: Stage) -> None:
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    stage.events["1"].clear()


def authorize(stage: Stage, resource: Resource = WEB, **changes: object) -> Authorize:
    plain = Authorize(
        authorization_id=UUID(int=77),
        connection_id=UUID(int=78),
        client=Peer(
            id=CLIENT,
            public_key=stage.client.engine.public_key,
            ipv4=CLIENT_IPV4,
            ipv6=CLIENT_IPV6,
        ),
        resource=resource,
        ice=IceParameters(
            client=IceCredentials(fragment="a" * 8, password="b" * 32),
            gateway=IceCredentials(fragment="c" * 8, password="d" * 32),
        ),
        kem_public_key=KemKey(bytes(64)).public_bytes(),
        expires_in_ns=HOUR,
    )
    return attrs.evolve(plain, **changes)


def acknowledged(stage: Stage, message: Authorize) -> Ack:
    gateway = stage.gateways[0]
    stage.tell(gateway, message, 5)
    [outgoing] = [
        outgoing for outgoing in gateway.drain_messages() if isinstance(outgoing.message, Ack)
    ]
    assert outgoing.ref == 5
    assert isinstance(outgoing.message, Ack)
    return outgoing.message


def test_a_new_connection_is_acknowledged_with_a_ciphertext_and_a_second_resource_without() -> None:
    stage = Stage()
    first = acknowledged(stage, authorize(stage))
    assert first.refusal == ""
    assert first.kem_ciphertext is not None
    other = attrs.evolve(WEB, id=UUID(int=5), address="10.1.0.0/16")
    second = acknowledged(
        stage, authorize(stage, other, authorization_id=UUID(int=79), kem_public_key=None)
    )
    assert (second.refusal, second.kem_ciphertext) == ("", None)
    assert len(stage.gateways[0].held()) == 2


def test_nothing_outside_the_ceiling_is_granted() -> None:
    stage = Stage(ceiling=(ip_network("10.0.0.0/25"), ip_network("fd00::/8")))
    assert acknowledged(stage, authorize(stage)).refusal == "ceiling"
    inside = attrs.evolve(WEB, address="10.0.0.64/26")
    assert acknowledged(stage, authorize(stage, inside)).refusal == ""
    assert stage.gateways[0].status(stage.now)["peers"]


@pytest.mark.parametrize(
    ("kind", "address"),
    [
        ("cidr", "127.0.0.0/8"),
        ("ip", "169.254.169.254"),
        ("ip", "::ffff:10.0.0.1"),
        ("ip", "64:ff9b::a00:1"),
        ("ip", "168.63.129.16"),
        ("ip", "fd00:ec2::254"),
        ("ip", "100.64.0.1"),
        ("cidr", "100.64.7.0/24"),
        ("cidr", "fd48:4c57:5900::/64"),
        ("cidr", "0.0.0.0/0"),
        ("cidr", "::/0"),
        ("dns", "intranet.example"),
        ("internet", "internet"),
        ("cidr", "no network"),
    ],
)
def test_what_a_gateway_cannot_serve_is_refused(kind: str, address: str) -> None:
    stage = Stage()
    resource = attrs.evolve(WEB, kind=kind, address=address)
    assert acknowledged(stage, authorize(stage, resource)).refusal == "unsupported"
    assert stage.gateways[0].held() == ()


def test_an_authorisation_told_twice_is_one_and_moves_with_its_connection() -> None:
    stage = Stage()
    assert acknowledged(stage, authorize(stage)).kem_ciphertext is not None
    assert acknowledged(stage, authorize(stage)).kem_ciphertext is None
    assert len(stage.gateways[0].held()) == 1
    again = authorize(stage, connection_id=UUID(int=90))
    assert acknowledged(stage, again).kem_ciphertext is not None
    [held] = stage.gateways[0].held()
    assert held.connection_id == UUID(int=90)
    stage.tell(stage.gateways[0], Revoke(authorization_id=held.authorization_id))
    assert stage.gateways[0].engine.connection_ids == []


def test_a_resource_for_a_connection_that_is_gone_is_refused() -> None:
    stage = Stage()
    message = authorize(stage, kem_public_key=None)
    assert acknowledged(stage, message).refusal == "unknown_connection"
    assert acknowledged(stage, authorize(stage)).refusal == ""
    stranger = attrs.evolve(message.client, public_key=bytes(31) + b"\x09")
    other = authorize(stage, client=stranger, authorization_id=UUID(int=80))
    assert acknowledged(stage, other).refusal == "unknown_connection"


def test_an_unfit_kem_key_makes_no_connection() -> None:
    stage = Stage()
    message = authorize(stage, kem_public_key=b"\xff" * 1184)
    assert acknowledged(stage, message).refusal == "unknown_connection"
    assert stage.gateways[0].engine.connection_ids == []


def test_packets_of_another_source_never_leave_the_gateway() -> None:
    stage = Stage()
    connected(stage)
    [connection_id] = stage.client.engine.connection_ids
    # as a hostile client would send it, past its own agent
    for source in ("100.64.0.2", "10.0.0.9"):
        stage.client.engine.send_packet(connection_id, udp(source=source), stage.now)
    stage.client.engine.send_packet(connection_id, b"garbage", stage.now)
    stage.settle()
    assert stage.to_servers[0] == [udp()]
    [peer] = stage.gateways[0].status(stage.now)["peers"]  # type: ignore[misc]
    assert peer["spoofed_packets"] == 2


def test_what_is_not_authorised_is_answered_as_prohibited_through_the_tunnel() -> None:
    stage = Stage()
    connected(stage)
    [connection_id] = stage.client.engine.connection_ids
    stage.client.engine.send_packet(connection_id, udp(destination="10.7.7.7"), stage.now)
    stage.settle()
    assert stage.gateways[0].counts.prohibited == 1
    # The client did not send it (its agent knows of no such flow), so it stops there.
    assert stage.client.counts.refused_inbound == 1
    assert stage.to_servers[0] == [udp()]


def test_answers_to_refused_packets_have_a_limit() -> None:
    stage = Stage()
    connected(stage)
    [connection_id] = stage.client.engine.connection_ids
    for _ in range(300):
        stage.client.engine.send_packet(connection_id, udp(destination="10.7.7.7"), stage.now)
    stage.settle()
    assert stage.gateways[0].counts.prohibited == 100
    assert stage.gateways[0].counts.dropped == 200


def test_only_answers_return_to_a_client() -> None:
    stage = Stage()
    connected(stage)
    stage.server_answers(
        answer(ports=(53, 40_001)),
        tcp(SYN, source=SERVER, destination=str(CLIENT_IPV4)),
        udp(source=SERVER, destination="100.64.0.9"),
        b"\x45garbage",
    )
    assert stage.to_client == []
    assert stage.gateways[0].counts.unsolicited == 3
    stage.server_answers(answer())
    assert stage.to_client == [answer()]


def test_a_revocation_drops_flows_and_tells_the_kernel_to_forget() -> None:
    stage = Stage()
    connected(stage)
    [authorization_id] = stage.authorizations
    stage.tell(stage.gateways[0], Revoke(authorization_id=authorization_id))
    stage.settle()
    assert stage.events["1"] == [
        FlushTranslations(client=IPv4Address("100.64.0.1"), network=ip_network("10.0.0.0/24"))
    ]
    stage.server_answers(answer())
    stage.client_sends(udp())
    assert stage.to_client == []
    assert stage.to_servers[0] == [udp()]
    assert stage.gateways[0].engine.connection_ids == []
    stage.tell(stage.gateways[0], Revoke(authorization_id=authorization_id))


def test_one_of_two_resources_may_be_revoked() -> None:
    stage = Stage()
    connected(stage)
    other = attrs.evolve(WEB, id=UUID(int=5), address="10.1.0.0/16")
    [connection_id] = stage.gateways[0].engine.connection_ids
    message = authorize(stage, other, connection_id=connection_id, kem_public_key=None)
    assert acknowledged(stage, message).refusal == ""
    [authorization_id] = stage.authorizations
    stage.tell(stage.gateways[0], Revoke(authorization_id=authorization_id))
    stage.client.engine.send_packet(connection_id, udp(destination="10.1.2.3"), stage.now)
    stage.client.engine.send_packet(connection_id, udp(b"again"), stage.now)
    stage.settle()
    assert stage.to_servers[0] == [udp(), udp(destination="10.1.2.3")]


def test_filters_that_change_hold_for_flows_that_stand() -> None:
    stage = Stage()
    connected(stage)
    narrowed = attrs.evolve(WEB, filters=(Filter(protocol="icmp"),))
    stage.tell(stage.gateways[0], ResourceUpdated(resource=narrowed))
    stage.server_answers(answer())
    assert stage.to_client == []
    # an update never moves a resource: that would widen what was authorised
    moved = attrs.evolve(WEB, address="10.0.0.0/8")
    stage.tell(stage.gateways[0], ResourceUpdated(resource=moved))
    [connection_id] = stage.client.engine.connection_ids
    stage.client.engine.send_packet(connection_id, udp(destination="10.200.0.1"), stage.now)
    stage.settle()
    assert stage.to_servers[0] == [udp()]


def test_a_lease_ends_by_the_gateways_own_clock() -> None:
    stage = Stage(lease_ns=10 * SECOND)
    connected(stage)
    stage.portal_away = True
    stage.gateways[0].channel_lost(stage.now)
    stage.advance(11)
    assert stage.gateways[0].held() == ()
    assert stage.gateways[0].engine.connection_ids == []


def test_a_rejoin_drops_what_the_portal_does_not_name() -> None:
    stage = Stage()
    connected(stage)
    gateway = stage.gateways[0]
    gateway.channel_lost(stage.now)
    held = gateway.join(stage.challenge(), stage.now).held
    assert [one.authorization_id for one in held] == list(stage.authorizations)
    stage.tell(gateway, stage.gateway_init(0))
    assert len(gateway.held()) == 1
    stage.authorizations.clear()
    stage.tell(gateway, stage.gateway_init(0))
    assert gateway.held() == ()


def test_a_client_that_starts_anew_replaces_its_connection() -> None:
    stage = Stage()
    connected(stage)
    [older] = stage.gateways[0].engine.connection_ids
    client = attrs.evolve(authorize(stage).client, public_key=bytes(31) + b"\x09")
    assert acknowledged(stage, authorize(stage, client=client)).refusal == ""
    assert stage.gateways[0].engine.connection_ids == [UUID(int=78)]
    assert [held.connection_id for held in stage.gateways[0].held()] == [UUID(int=78)]
    assert older != UUID(int=78)
    assert stage.events["1"] == []
    stage.settle()
    assert stage.events["1"] == [
        FlushTranslations(client=CLIENT_IPV4, network=None),
        FlushTranslations(client=CLIENT_IPV6, network=None),
    ]


def test_candidates_of_unknown_connections_are_ignored() -> None:
    stage = Stage()
    stage.tell(stage.gateways[0], Candidates(connection_id=UUID(int=9), generation=0))
    assert stage.gateways[0].engine.statistics().unknown_connection == 0


def test_the_load_is_told_every_thirty_seconds_while_joined() -> None:
    stage = Stage()
    connected(stage)
    gateway = stage.gateways[0]
    gateway.handle_timeout(stage.now + 31 * SECOND)
    [stats] = [
        outgoing.message
        for outgoing in gateway.drain_messages()
        if isinstance(outgoing.message, Stats)
    ]
    assert stats.connections == 1
    assert stats.bytes_in == len(udp())
    gateway.channel_lost(stage.now)
    gateway.handle_timeout(stage.now + 62 * SECOND)
    assert gateway.drain_messages() == []


def test_a_flow_that_lived_in_another_gateway_is_reset_by_this_one() -> None:
    stage = Stage()
    connected(stage)
    [connection_id] = stage.client.engine.connection_ids
    stage.client_sends(tcp(SYN))
    stage.gateways[0]._connections[connection_id].filter.withdraw(WEB.id, stage.now)
    stage.gateways[0]._connections[connection_id].filter.grant(WEB, stage.now)
    stage.client_sends(tcp(ACK, data=b"more"))
    assert stage.gateways[0].counts.reset == 1
    header = parse(stage.to_client[-1])
    assert header is not None
    assert header.source_port == 80
