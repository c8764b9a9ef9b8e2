"""Properties of the engine: hostile weather, hostile bytes, and the same run twice."""

from __future__ import annotations

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from simulations.net.nat import PORT_RESTRICTED, SYMMETRIC, NatBehaviour
from tests.unit.tunnel.network import (
    CONNECTION,
    RELAY,
    Conversation,
    Network,
    Weather,
    connect,
    ice,
    ip_packet,
    pair_of_hosts,
    relay_server,
)
from tunnel.engine import ConnectionParameters, Engine

WEATHERS = st.builds(
    Weather,
    latency_ns=st.integers(1, 150).map(lambda ms: ms * NS_PER_MS),
    jitter_ns=st.integers(0, 60).map(lambda ms: ms * NS_PER_MS),
    lost=st.integers(0, 200),
    doubled=st.integers(0, 300),
)
NATS = st.sampled_from([PORT_RESTRICTED, SYMMETRIC])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), weather=WEATHERS, client_nat=NATS, gateway_nat=NATS)
def test_packets_arrive_once_and_unaltered_or_not_at_all(
    seed: int, weather: Weather, client_nat: NatBehaviour, gateway_nat: NatBehaviour
) -> None:
    network = Network(seed, weather)
    client, gateway = pair_of_hosts(network, client_nat, gateway_nat)
    connect(client, gateway)
    conversation = Conversation(client, gateway)
    assert network.run(60 * NS_PER_S, lambda: bool(client.packets))
    sent_before, delivered_before = conversation.sent, len(conversation.delivered())
    network.run(5 * NS_PER_S)
    conversation.stop()
    network.run(NS_PER_S)
    for host, numbers in (
        (gateway, conversation.delivered()),
        (client, conversation.answered()),
    ):
        assert len(numbers) == len(set(numbers))
        for connection, packet in host.packets:
            assert connection == CONNECTION
            assert packet == ip_packet(int.from_bytes(packet[20:24], "big"))
    sent = conversation.sent - sent_before
    assert len(conversation.delivered()) - delivered_before >= sent // 3


def test_the_same_seed_gives_the_same_transmissions() -> None:
    def trace(seed: int) -> list[object]:
        network = Network(seed, Weather(jitter_ns=9 * NS_PER_MS, lost=50, doubled=50))
        client, gateway = pair_of_hosts(network)
        connect(client, gateway)
        Conversation(client, gateway)
        network.run(30 * NS_PER_S)
        return list(network.trace)

    first = trace(7)
    assert first == trace(7)
    assert first != trace(8)


def lone_engine() -> Engine:
    """An engine with a connection in progress, a relay and candidates of a peer."""
    randomness = SeededRandomness(3, "lone")
    engine = Engine(private_key=randomness.bytes(32), randomness=randomness, now=0)
    peer = Engine(private_key=randomness.bytes(32), randomness=randomness, now=0)
    engine.add_socket(HERE, 0, network="192.0.2.0/24")
    engine.set_relays([relay_server()], 0)
    engine.open(
        ConnectionParameters(
            connection_id=CONNECTION,
            peer_public_key=peer.public_key,
            preshared_key=bytes(32),
            local_ice=ice("here"),
            remote_ice=ice("there"),
            controlling=True,
        ),
        0,
    )
    engine.drain_transmits()
    return engine


HERE = Address("192.0.2.7", 41_000)
PREFIXES = st.sampled_from(
    [
        b"",
        b"\x00\x01\x00\x00\x21\x12\xa4\x42",
        b"\x01\x01\x00\x08\x21\x12\xa4\x42",
        b"\x01\x11\x00\x00\x21\x12\xa4\x42",
        b"\x00\x17\x00\x10\x21\x12\xa4\x42",
        b"\x40\x00\x00\x10",
        b"\x01\x00\x00\x00",
        b"\x02\x00\x00\x00",
        b"\x03\x00\x00\x00",
        b"\x04\x00\x00\x00",
    ]
)
SOURCES = st.sampled_from([RELAY, Address("203.0.113.5", 2_000), Address("203.0.113.5", 7), HERE])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(PREFIXES, st.binary(max_size=200), SOURCES), max_size=8))
def test_datagrams_of_any_bytes_raise_nothing_and_deliver_nothing(
    datagrams: list[tuple[bytes, bytes, Address]],
) -> None:
    engine = lone_engine()
    received = [(prefix + data, source) for prefix, data, source in datagrams]
    engine.receive_datagrams(HERE, received, NS_PER_MS)
    assert engine.drain_packets() == []
    at = engine.poll_timeout()
    assert at is not None
    engine.handle_timeout(at)
    assert all(t.remote == RELAY for t in engine.drain_transmits())


@settings(max_examples=40, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 1_500), st.integers(1, 255))),
)
def test_altered_datagrams_are_refused_and_the_tunnel_lives_on(
    flips: list[tuple[int, int, int]],
) -> None:
    network = Network()
    client, gateway = pair_of_hosts(network)
    connect(client, gateway)
    conversation = Conversation(client, gateway, interval_ns=20 * NS_PER_MS)
    flip_by_number = {number: (position, mask) for number, position, mask in flips}
    count = 0

    def alter(destination: Address, data: bytes) -> bytes:
        nonlocal count
        if destination != gateway.address:
            return data
        count += 1
        position, mask = flip_by_number.get(count, (0, 0))
        position %= len(data)
        return data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]

    network.altered = alter
    network.run(5 * NS_PER_S)
    conversation.stop()
    network.run(NS_PER_S)
    numbers = conversation.delivered()
    assert len(numbers) == len(set(numbers))
    assert all(
        packet == ip_packet(int.from_bytes(packet[20:24], "big")) for _, packet in gateway.packets
    )
    assert client.path_kind() is not None


def test_secrets_do_not_show_in_what_is_printed() -> None:
    parameters = ConnectionParameters(
        connection_id=CONNECTION,
        peer_public_key=bytes(32),
        preshared_key=b"very secret psk!" * 2,
        local_ice=ice("here"),
        remote_ice=ice("there"),
        controlling=True,
    )
    assert "very secret" not in repr(parameters)
    assert ice("here").password not in repr(parameters)
    assert attrs.fields(ConnectionParameters).preshared_key.repr is False


FAULTS = st.sampled_from(
    ["client nat", "gateway nat", "both nats", "relay", "move", "cut", "suspect"]
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    client_nat=NATS,
    gateway_nat=NATS,
    steps=st.lists(st.tuples(FAULTS, NATS, st.integers(0, 4_000)), max_size=6),
)
def test_any_series_of_faults_is_recovered_from_once_it_ends(
    seed: int,
    client_nat: NatBehaviour,
    gateway_nat: NatBehaviour,
    steps: list[tuple[str, NatBehaviour, int]],
) -> None:
    network = Network(seed)
    client, gateway = pair_of_hosts(network, client_nat, gateway_nat)
    connect(client, gateway)
    conversation = Conversation(client, gateway)
    network.run(2 * NS_PER_S)
    for number, (fault, nat, wait_ms) in enumerate(steps):
        for host, faults in ((client, ("client nat", "both nats")), (gateway, ("gateway nat",))):
            if fault in faults or fault == "both nats":
                assert host.nat is not None
                host.nat.behaviour = nat
                host.nat.forget()
        if fault == "relay":
            network.relay_host.restart()
        elif fault == "move":
            name = f"203.0.113.{100 + number}"
            other = network.nat(name, nat)
            client.move(Address(f"172.20.{number}.9", 41_000), other)
        elif fault == "suspect":
            client.engine.path_suspect(network.now)
            client.flush()
        elif fault == "cut":
            network.blocked = lambda _source, _destination, _data: True
        network.run(wait_ms * NS_PER_MS)
        network.blocked = lambda _source, _destination, _data: False
    network.run(25 * NS_PER_S)
    before = len(conversation.delivered()), len(conversation.answered())
    network.run(2 * NS_PER_S)
    assert len(conversation.delivered()) - before[0] >= 38
    assert len(conversation.answered()) - before[1] >= 38
