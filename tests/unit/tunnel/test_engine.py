"""Two engines, NATs and the real TURN server core: which path is found, and what it carries."""

from __future__ import annotations

import pytest

from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.net.address import Address
from simulations.net.nat import PORT_RESTRICTED, SYMMETRIC, NatBehaviour
from tests.unit.tunnel.network import (
    CONNECTION,
    RELAY,
    RELAY_ID,
    Conversation,
    Host,
    Network,
    connect,
    ip_packet,
    pair_of_hosts,
    relay_server,
)
from tunnel.engine import OWN_RELAY_AFTER_NS, Connected, LocalCandidates
from tunnel.wireguard.noise import MESSAGE_TRANSPORT

FULL_CONE = NatBehaviour(filtering="endpoint_independent")
RESTRICTED_CONE = NatBehaviour(filtering="address_dependent")
UNPRESERVED = NatBehaviour(ports="random")
ADDRESS_DEPENDENT = NatBehaviour(mapping="address_dependent", ports="random")


@pytest.mark.parametrize(
    ("client_nat", "gateway_nat", "kind"),
    [
        (None, None, "direct"),
        (None, SYMMETRIC, "direct"),
        (SYMMETRIC, None, "direct"),
        (PORT_RESTRICTED, PORT_RESTRICTED, "direct"),
        (UNPRESERVED, UNPRESERVED, "direct"),
        (RESTRICTED_CONE, PORT_RESTRICTED, "direct"),
        (SYMMETRIC, RESTRICTED_CONE, "direct"),
        (FULL_CONE, SYMMETRIC, "direct"),
        (ADDRESS_DEPENDENT, RESTRICTED_CONE, "direct"),
        (PORT_RESTRICTED, SYMMETRIC, "relayed"),
        (SYMMETRIC, PORT_RESTRICTED, "relayed"),
        (SYMMETRIC, SYMMETRIC, "relayed"),
    ],
)
def test_the_nats_decide_whether_the_path_is_direct(
    client_nat: NatBehaviour | None, gateway_nat: NatBehaviour | None, kind: str
) -> None:
    network = Network()
    client, gateway = pair_of_hosts(network, client_nat, gateway_nat)
    connect(client, gateway)
    client.send(ip_packet(1))
    assert network.run(10 * NS_PER_S, lambda: bool(gateway.packets))
    gateway.send(ip_packet(2))
    assert network.run(10 * NS_PER_S, lambda: bool(client.packets))
    assert network.run(10 * NS_PER_S, lambda: client.path_kind() == gateway.path_kind() == kind)
    assert client.happened(Connected)
    assert gateway.happened(Connected)
    assert [packet for _, packet in gateway.packets] == [ip_packet(1)]
    assert [packet for _, packet in client.packets] == [ip_packet(2)]


@pytest.mark.parametrize(
    ("client_host", "gateway_host"),
    [("192.168.1.7", "192.168.1.8"), ("2001:db8::7", "2001:db8::8"), ("fd00::7", "fd00::8")],
)
def test_hosts_that_reach_each_other_need_no_relay(client_host: str, gateway_host: str) -> None:
    network = Network()
    client, gateway = network.host("client", client_host), network.host("gateway", gateway_host)
    connect(client, gateway)
    client.send(ip_packet(1))
    assert network.run(5 * NS_PER_S, lambda: bool(gateway.packets))
    path = client.engine.path(CONNECTION)
    assert path is not None
    assert (path.kind, path.local, path.remote) == ("direct", client.address, gateway.address)


def test_private_addresses_of_another_network_are_not_even_tried() -> None:
    network = Network()
    client = network.host("client", "192.168.1.7")
    gateway = network.host("gateway", "192.168.2.8")
    connect(client, gateway)
    client.send(ip_packet(1))
    network.run(10 * NS_PER_S)
    assert network.trace == []
    assert client.path_kind() is None


def test_a_relayed_path_uses_channels() -> None:
    network = Network()
    client, gateway = pair_of_hosts(network, SYMMETRIC, SYMMETRIC)
    connect(client, gateway)
    client.send(ip_packet(1))
    assert network.run(10 * NS_PER_S, lambda: bool(gateway.packets))
    network.run(3 * NS_PER_S)
    seen: list[tuple[int, int]] = []

    def observe(_source: Address, _destination: Address, data: bytes) -> bool:
        seen.append((data[0], len(data)))
        return False

    network.blocked = observe
    gateway.send(ip_packet(2, 1280))
    assert network.run(NS_PER_S, lambda: bool(client.packets))
    assert (0x40, 1280 + 32 + 4) in seen


def test_hosts_that_may_send_to_their_relay_only_are_connected_over_it_twice() -> None:
    network = Network()
    client, gateway = pair_of_hosts(network)
    network.blocked = lambda source, destination, _data: RELAY not in (source, destination)
    connect(client, gateway)
    client.send(ip_packet(1))
    assert network.run(3 * NS_PER_S, lambda: bool(gateway.packets))
    assert client.path_kind() == gateway.path_kind() == "relayed"


def test_a_relay_that_forbids_the_peer_is_not_asked_again_and_again() -> None:
    network = Network()
    relay = network.relay()
    client = network.host("client", "192.0.2.7")
    gateway = network.host("gateway", "192.88.99.8")  # a range that a relay refuses by default
    for host in (client, gateway):
        host.engine.set_relays([relay_server()], network.now)
    connect(client, gateway)
    client.engine.path_suspect(network.now)  # so that it asks the relay too
    client.send(ip_packet(1))
    assert network.run(10 * NS_PER_S, lambda: bool(gateway.packets))
    network.run(10 * NS_PER_S)
    assert client.path_kind() == "direct"
    assert 1 <= relay.server.statistics().get("errors_403", 0) <= 4


def relayed_from(host: Host) -> bool:
    """Whether it has told a relayed address of its own."""
    told = [event.message.add for event in host.events if isinstance(event, LocalCandidates)]
    return any(candidate.kind == "relay" for add in told for candidate in add)


def test_a_client_with_a_direct_path_beside_the_gateways_relay_asks_for_no_relay_of_its_own() -> (
    None
):
    network = Network()
    client, gateway = pair_of_hosts(network)
    connect(client, gateway)
    network.run(20 * NS_PER_S)
    assert client.path_kind() == "direct"
    assert relayed_from(gateway)
    assert not relayed_from(client)
    assert client.engine.relay_reached_by(RELAY_ID) == "udp"


@pytest.mark.parametrize("lacking", ["a direct path", "a relay of the gateway's"])
def test_a_client_that_lacks_either_soon_has_a_relay_of_its_own(lacking: str) -> None:
    network = Network()
    nat = SYMMETRIC if lacking == "a direct path" else PORT_RESTRICTED
    client, gateway = pair_of_hosts(network, nat, nat)
    if lacking != "a direct path":
        gateway.engine.set_relays((), network.now)
    connect(client, gateway)
    began = network.now
    assert network.run(NS_PER_S, lambda: relayed_from(client))
    assert network.now - began <= OWN_RELAY_AFTER_NS + 200 * NS_PER_MS


def test_a_client_whose_direct_path_falls_silent_has_another_way_at_once_and_a_relay_soon() -> None:
    network = Network()
    client, gateway = pair_of_hosts(network)
    connect(client, gateway)
    conversation = Conversation(client, gateway)
    network.run(5 * NS_PER_S)
    assert not relayed_from(client)
    network.blocked = lambda source, to, _: RELAY.host not in (source.host, to.host)
    before, began = len(conversation.delivered()), network.now
    assert network.run(5 * NS_PER_S, lambda: len(conversation.delivered()) > before + 5)
    assert network.now - began <= 1_500 * NS_PER_MS
    assert client.path_kind() == "relayed"
    assert network.run(NS_PER_S, lambda: relayed_from(client))


def test_a_client_whose_gateways_relay_is_gone_takes_one_of_its_own() -> None:
    network = Network()
    client, gateway = pair_of_hosts(network)
    connect(client, gateway)
    network.run(5 * NS_PER_S)
    assert not relayed_from(client)
    gateway.engine.set_relays((), network.now)
    gateway.flush()
    assert network.run(2 * NS_PER_S, lambda: relayed_from(client))
    assert client.path_kind() == "direct"


def test_the_packet_that_waits_confirms_the_keys_in_place_of_a_keepalive() -> None:
    network = Network()
    client, gateway = pair_of_hosts(network, None, None)
    kinds: list[int] = []

    def observe(_source: Address, _destination: Address, data: bytes) -> bool:
        kinds.append(data[0])
        return False

    network.blocked = observe
    connect(client, gateway)
    for number in range(3):
        client.send(ip_packet(number))
    assert network.run(5 * NS_PER_S, lambda: len(gateway.packets) == 3)
    assert [packet for _, packet in gateway.packets] == [ip_packet(number) for number in range(3)]
    assert kinds.count(MESSAGE_TRANSPORT) == 3


def test_candidates_are_told_as_they_are_found_in_one_generation() -> None:
    network = Network()
    client, gateway = pair_of_hosts(network)
    connect(client, gateway)
    network.run(NS_PER_S)
    told = [event.message for event in gateway.events if isinstance(event, LocalCandidates)]
    assert [[c.kind for c in message.add] for message in told] == [["host"], ["srflx"], ["relay"]]
    assert {message.generation for message in told} == {told[0].generation}
    assert all(message.connection_id == CONNECTION for message in told)


def test_without_a_direct_path_both_tell_all_candidates_again_when_one_has_joined_anew() -> None:
    network = Network()
    client, gateway = pair_of_hosts(network, SYMMETRIC, SYMMETRIC)
    connect(client, gateway)
    assert network.run(10 * NS_PER_S, lambda: client.path_kind() == "relayed")
    network.run(120 * NS_PER_S)
    client.events.clear()
    gateway.events.clear()
    client.engine.tell_again((), network.now)
    client.flush()
    network.run(5 * NS_PER_S)
    (told,) = (e.message for e in client.events if isinstance(e, LocalCandidates))
    (answer,) = (e.message for e in gateway.events if isinstance(e, LocalCandidates))
    assert told.wants_answer
    assert not answer.wants_answer
    for message in (told, answer):
        assert [candidate.kind for candidate in message.add] == ["host", "srflx", "relay"]
