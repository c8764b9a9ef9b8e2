"""What happens to a connection when the network changes under it, in virtual time."""

from __future__ import annotations

from uuid import UUID

import pytest

from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.net.address import Address
from simulations.net.nat import PORT_RESTRICTED, SYMMETRIC, NatBehaviour
from tests.unit.tunnel.network import (
    CONNECTION,
    GREETING,
    RELAY,
    Conversation,
    Host,
    Network,
    connect,
    ip_packet,
    pair_of_hosts,
    relay_server,
)
from tunnel.engine import Connected, Failed, PathChanged, PathLost
from tunnel.ice.gathering import LEAVE_NS

LAB_EASY = NatBehaviour(timeout_ns=30 * NS_PER_S)


def connected_pair(
    network: Network,
    client_nat: NatBehaviour | None = PORT_RESTRICTED,
    gateway_nat: NatBehaviour | None = PORT_RESTRICTED,
) -> tuple[Host, Host]:
    client, gateway = pair_of_hosts(network, client_nat, gateway_nat)
    connect(client, gateway)
    client.send(ip_packet(GREETING))
    assert network.run(
        10 * NS_PER_S, lambda: client.happened(Connected) and gateway.happened(Connected)
    )
    return client, gateway


@pytest.mark.parametrize("nat", [PORT_RESTRICTED, SYMMETRIC])
def test_the_death_of_the_peer_under_traffic_is_noticed_within_a_second_and_a_half(
    nat: NatBehaviour,
) -> None:
    network = Network()
    client, gateway = connected_pair(network, nat, nat)
    Conversation(client, gateway)
    network.run(3 * NS_PER_S)
    died = network.now
    gateway.alive = False
    assert network.run(5 * NS_PER_S, lambda: client.happened(PathLost))
    assert client.time_of(PathLost) - died <= 1_500 * NS_PER_MS
    assert client.path_kind() is None


def test_after_the_loss_the_path_is_looked_for_and_then_given_up() -> None:
    network = Network()
    client, gateway = connected_pair(network)
    conversation = Conversation(client, gateway)
    network.run(NS_PER_S)
    gateway.alive = False
    assert network.run(60 * NS_PER_S, lambda: client.happened(Failed))
    assert client.events[-1] == Failed(connection_id=CONNECTION, reason="unreachable")
    waited = client.time_of(Failed) - client.time_of(PathLost)
    assert 25 * NS_PER_S <= waited <= 35 * NS_PER_S
    conversation.stop()
    network.run(NS_PER_S)
    client.engine.close(CONNECTION, network.now)
    client.flush()
    network.run(120 * NS_PER_S)
    before = len(network.trace)
    network.run(600 * NS_PER_S)
    assert len(network.trace) == before, "an engine without connections is silent"
    assert client.engine.poll_timeout() is None


def test_a_peer_that_comes_back_is_found_again() -> None:
    network = Network()
    client, gateway = connected_pair(network)
    conversation = Conversation(client, gateway)
    network.run(NS_PER_S)
    network.blocked = lambda _source, _destination, _data: True
    assert network.run(5 * NS_PER_S, lambda: client.happened(PathLost))
    network.run(8 * NS_PER_S)
    network.blocked = lambda _source, _destination, _data: False
    back = network.now
    assert network.run(5 * NS_PER_S, lambda: client.path_kind() is not None)
    assert client.happened(PathChanged)
    seen = len(conversation.delivered())
    assert network.run(5 * NS_PER_S, lambda: len(conversation.delivered()) > seen + 10)
    assert client.time_of(PathChanged) - back <= 3 * NS_PER_S


def test_nats_that_become_symmetric_in_mid_session_are_survived_by_the_relay() -> None:
    network = Network()
    client, gateway = connected_pair(network)
    conversation = Conversation(client, gateway)
    network.run(2 * NS_PER_S)
    assert client.path_kind() == gateway.path_kind() == "direct"
    for host in (client, gateway):
        assert host.nat is not None
        host.nat.behaviour = SYMMETRIC
        host.nat.forget()
    changed = network.now
    assert network.run(
        20 * NS_PER_S, lambda: client.path_kind() == gateway.path_kind() == "relayed"
    )
    seen = len(conversation.delivered()), len(conversation.answered())
    assert network.run(
        10 * NS_PER_S,
        lambda: (
            len(conversation.delivered()) > seen[0] + 20
            and len(conversation.answered()) > seen[1] + 20
        ),
    )
    assert network.now - changed <= 6 * NS_PER_S


def test_a_nat_that_forgets_its_bindings_is_punched_anew() -> None:
    network = Network()
    client, gateway = connected_pair(network)
    conversation = Conversation(client, gateway)
    network.run(2 * NS_PER_S)
    assert client.nat is not None
    client.nat.behaviour = NatBehaviour(ports="random")
    client.nat.forget()
    network.run(10 * NS_PER_S)
    assert client.path_kind() == gateway.path_kind() == "direct"
    seen = len(conversation.delivered()), len(conversation.answered())
    network.run(NS_PER_S)
    assert len(conversation.delivered()) > seen[0] + 15
    assert len(conversation.answered()) > seen[1] + 15


@pytest.mark.parametrize("nat", [PORT_RESTRICTED, SYMMETRIC])
def test_a_client_that_changes_network_goes_on(nat: NatBehaviour) -> None:
    network = Network()
    client, gateway = connected_pair(network, nat, PORT_RESTRICTED)
    conversation = Conversation(client, gateway)
    network.run(2 * NS_PER_S)
    moved = network.now
    other = network.nat("203.0.113.77", nat)
    client.move(Address("172.20.1.9", 41_000), other)
    seen = len(conversation.delivered()), len(conversation.answered())
    assert network.run(
        20 * NS_PER_S,
        lambda: (
            len(conversation.delivered()) > seen[0] + 40
            and len(conversation.answered()) > seen[1] + 40
        ),
    )
    assert network.now - moved <= 8 * NS_PER_S
    assert not client.happened(PathLost), "a gateway is not given up because the client moved"


def test_a_relay_that_lost_its_allocations_is_asked_anew() -> None:
    network = Network()
    client, gateway = connected_pair(network, SYMMETRIC, SYMMETRIC)
    conversation = Conversation(client, gateway)
    network.run(2 * NS_PER_S)
    assert client.path_kind() == "relayed"
    network.relay_host.restart()
    restarted = network.now
    seen = len(conversation.delivered()), len(conversation.answered())
    assert network.run(
        20 * NS_PER_S,
        lambda: (
            len(conversation.delivered()) > seen[0] + 40
            and len(conversation.answered()) > seen[1] + 40
        ),
    )
    assert network.now - restarted <= 8 * NS_PER_S
    assert client.path_kind() == gateway.path_kind() == "relayed"


def test_a_better_path_takes_over_without_loss() -> None:
    network = Network()
    network.blocked = lambda source, destination, _data: (
        RELAY.host
        not in (
            source.host,
            destination.host,
        )
    )
    client, gateway = connected_pair(network)
    conversation = Conversation(client, gateway, interval_ns=5 * NS_PER_MS)
    network.run(10 * NS_PER_S)
    assert client.path_kind() == "relayed"
    network.blocked = lambda _source, _destination, _data: False
    assert network.run(60 * NS_PER_S, lambda: client.path_kind() == gateway.path_kind() == "direct")
    network.run(NS_PER_S)
    conversation.stop()
    network.run(NS_PER_S)
    delivered = conversation.delivered()
    assert sorted(set(delivered)) == sorted(delivered), "nothing is delivered twice"
    assert sorted(delivered) == list(range(conversation.sent)), "and nothing is lost"
    answered = conversation.answered()
    assert len(answered) == len(set(answered))
    assert not client.happened(PathLost)


def test_traffic_in_one_direction_only_keeps_its_path() -> None:
    network = Network()
    client, gateway = connected_pair(network)
    conversation = Conversation(client, gateway, answers=False)
    network.run(60 * NS_PER_S)
    assert not client.happened(PathLost)
    assert not client.happened(PathChanged)
    assert len(conversation.delivered()) >= conversation.sent - 2


def test_an_idle_connection_lives_on_behind_nats_with_short_timeouts_at_little_cost() -> None:
    network = Network()
    client, gateway = connected_pair(network, LAB_EASY, LAB_EASY)
    network.run(90 * NS_PER_S)
    before = len(network.trace)
    network.run(600 * NS_PER_S)
    assert len(network.trace) - before < 1_200, "two packets a second in the whole network"
    assert not client.happened(PathLost)
    assert not gateway.happened(PathLost)
    gateway.send(ip_packet(7))
    assert network.run(NS_PER_S, lambda: bool(client.packets))
    client.send(ip_packet(8))
    assert network.run(NS_PER_S, lambda: len(gateway.packets) == 2)


def test_an_idle_connection_whose_peer_dies_is_noticed_when_consent_ends() -> None:
    network = Network()
    client, gateway = connected_pair(network)
    network.run(60 * NS_PER_S)
    gateway.alive = False
    died = network.now
    assert network.run(60 * NS_PER_S, lambda: client.happened(PathLost))
    assert client.time_of(PathLost) - died <= 31 * NS_PER_S


def test_a_newer_connection_to_the_same_peer_replaces_the_older_one() -> None:
    network = Network()
    client, gateway = connected_pair(network)
    network.run(NS_PER_S)
    newer = UUID(int=0xC1)
    connect(client, gateway, newer, preshared_key=b"q" * 32)
    for host in (client, gateway):
        assert Failed(connection_id=CONNECTION, reason="replaced") in host.events
        assert host.engine.connection_ids == [newer]
    client.send(ip_packet(1), newer)
    assert network.run(5 * NS_PER_S, lambda: (newer, ip_packet(1)) in gateway.packets)
    client.send(ip_packet(2), CONNECTION)
    network.run(NS_PER_S)
    assert client.engine.statistics().unknown_connection == 1


def test_ends_with_different_preshared_keys_never_connect() -> None:
    network = Network()
    client, gateway = pair_of_hosts(network)
    connect(client, gateway)
    gateway.engine.close(CONNECTION, network.now)
    connect(client, gateway, preshared_key=b"another" + bytes(25))
    client.send(ip_packet(1))
    assert network.run(120 * NS_PER_S, lambda: client.happened(Failed))
    assert client.events[-1] == Failed(connection_id=CONNECTION, reason="handshake")
    assert not client.happened(Connected)
    assert gateway.packets == []


def test_a_connection_whose_peer_never_appears_fails() -> None:
    network = Network()
    client, gateway = pair_of_hosts(network)
    gateway.alive = False
    connect(client, gateway)
    client.send(ip_packet(1))
    assert network.run(60 * NS_PER_S, lambda: client.happened(Failed))
    assert not client.happened(PathLost)


def test_packets_wait_for_the_first_path_in_a_bounded_buffer() -> None:
    network = Network()
    client, gateway = pair_of_hosts(network)
    connect(client, gateway)
    for number in range(100):
        client.send(ip_packet(number))
    report = client.engine.connection_statistics(CONNECTION)
    assert report is not None
    assert report.connection.buffered_packets == 64
    assert report.connection.dropped_packets == 36
    assert network.run(5 * NS_PER_S, lambda: len(gateway.packets) == 64)
    assert [packet for _, packet in gateway.packets] == [ip_packet(n) for n in range(36, 100)]


def test_new_relay_credentials_and_relays_that_go_and_come_are_taken_up() -> None:
    network = Network()
    client, gateway = connected_pair(network, SYMMETRIC, SYMMETRIC)
    conversation = Conversation(client, gateway)
    network.run(NS_PER_S)
    for host in (client, gateway):
        host.engine.set_relays([], network.now)
        host.flush()
    assert network.run(LEAVE_NS + 5 * NS_PER_S, lambda: client.happened(PathLost))
    network.run(NS_PER_S)
    assert network.relay_host.server.allocations == 0, "allocations are given back"
    for host in (client, gateway):
        host.engine.set_relays([relay_server()], network.now)
        host.flush()
    seen = len(conversation.delivered())
    assert network.run(20 * NS_PER_S, lambda: len(conversation.delivered()) > seen + 20)


def test_wrong_relay_credentials_do_no_harm_to_a_direct_path() -> None:
    network = Network()
    client, gateway = pair_of_hosts(network)
    for host in (client, gateway):
        host.engine.set_relays([relay_server(password="wrong")], network.now)
    connect(client, gateway)
    client.send(ip_packet(1))
    assert network.run(5 * NS_PER_S, lambda: bool(gateway.packets))
    before = len(network.trace)
    network.run(120 * NS_PER_S)
    assert len(network.trace) - before < 400, "refused allocations are retried with back-off"
