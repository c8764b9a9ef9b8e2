"""The TURN client core against the server core, in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relays.authentication import ClientCredentials, StaticCredentials
from relays.client import (
    Allocated,
    Lost,
    Permitted,
    Received,
    Redirected,
    Refused,
    TurnClient,
    Unreachable,
)
from relays.peers import PeerPolicy
from relays.requests import ServerLimits
from relays.stun import (
    Attribute,
    MessageClass,
    Method,
    StunMessage,
    address_value,
    error_value,
)
from relays.turn import (
    NS,
    IcmpError,
    data_indication,
    icmp_indication,
    read_unfragmented_indication,
)
from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from tests.unit.relays.bench import RELAY_HOST, RELAY_HOST_IPV6, SERVER, Bench, Wire

SOURCE = ("198.51.100.2", 40_000)
PEER = Address("192.0.2.10", 5000)
MS = NS // 1000


def connected(wire: Wire) -> tuple[TurnClient, Address]:
    client = wire.client(SOURCE)
    wire.settle()
    (event,) = wire.events[SOURCE]
    assert isinstance(event, Allocated)
    wire.events[SOURCE].clear()
    return client, event.relayed


def test_it_allocates_and_tells_both_addresses() -> None:
    wire = Wire(Bench.of())
    client = wire.client(SOURCE)
    wire.settle()
    (event,) = wire.events[SOURCE]
    assert isinstance(event, Allocated)
    assert event.relayed.host == RELAY_HOST
    assert event.reflexive == SOURCE
    assert client.state == "allocated"


def test_data_goes_by_indications_and_then_by_the_channel() -> None:
    wire = Wire(Bench.of())
    client, relayed = connected(wire)
    assert not client.send(PEER, b"too early", wire.bench.now)
    client.permit(PEER, wire.bench.now)
    wire.settle()
    assert wire.events[SOURCE] == [Permitted(peer=PEER)]
    assert client.send(PEER, b"by indication", wire.bench.now)
    client.bind(PEER, wire.bench.now)
    wire.settle()
    assert client.send(PEER, b"by channel", wire.bench.now)
    (datagram,) = client.drain_datagrams()
    assert datagram == b"\x40\0\0\x0aby channel"
    wire.bench.to_peers(datagram, SOURCE)
    assert wire.at_peers == [(PEER, relayed, b"by indication")]
    wire.events[SOURCE].clear()
    wire.from_peer(b"answer", PEER, relayed)
    wire.from_peer(b"other port", Address(PEER.host, 6000), relayed)
    assert wire.events[SOURCE] == [
        Received(PEER, b"answer"),
        Received(Address(PEER.host, 6000), b"other port"),
    ]


def test_wishes_from_before_the_allocation_are_granted_after_it() -> None:
    wire = Wire(Bench.of())
    client = wire.client(SOURCE)
    client.permit(PEER, wire.bench.now)
    client.bind(Address("192.0.2.11", 2000), wire.bench.now)
    wire.settle()
    kinds = [type(event) for event in wire.events[SOURCE]]
    assert kinds == [Allocated, Permitted, Permitted]


def test_a_second_port_of_a_permitted_address_needs_no_request() -> None:
    wire = Wire(Bench.of())
    client, _ = connected(wire)
    client.permit(PEER, wire.bench.now)
    wire.settle()
    client.permit(Address(PEER.host, 6000), wire.bench.now)
    assert client.drain_datagrams() == []
    assert client.drain_events() == [Permitted(peer=Address(PEER.host, 6000))]


def test_it_repeats_itself_in_growing_steps_and_then_gives_up() -> None:
    client = TurnClient(
        server=SERVER,
        username="alice",
        password="opensesame",
        family="ipv4",
        randomness=SeededRandomness(1, "client"),
        now=0,
    )
    sent = {0: client.drain_datagrams()}
    while (deadline := client.poll_timeout()) is not None:
        client.handle_timeout(deadline)
        sent[deadline // MS] = client.drain_datagrams()
    assert list(sent) == [0, 100, 300, 700, 1500, 3100, 6300, 7900]
    assert sent.pop(7900) == []
    assert len({tuple(datagrams) for datagrams in sent.values()}) == 1
    assert client.drain_events() == [Lost(code=0, reason="the relay does not answer")]
    assert client.state == "over"


def test_over_a_reliable_transport_nothing_is_sent_twice() -> None:
    client = TurnClient(
        server=SERVER,
        username="alice",
        password="opensesame",
        family="ipv4",
        randomness=SeededRandomness(1, "client"),
        now=0,
        reliable=True,
    )
    assert len(client.drain_datagrams()) == 1
    assert client.poll_timeout() == 7900 * MS
    client.handle_timeout(7900 * MS)
    assert client.drain_datagrams() == []
    assert client.drain_events() == [Lost(code=0, reason="the relay does not answer")]


def test_over_a_reliable_transport_a_second_probe_waits_for_the_first() -> None:
    wire = Wire(Bench.of())
    client = wire.client(SOURCE, reliable=True)
    wire.settle()
    assert client.state == "allocated"
    client.probe(wire.bench.now)
    client.probe(wire.bench.now)
    assert len(client.drain_datagrams()) == 1


@pytest.mark.parametrize("seed", range(8))
def test_it_gets_through_a_network_that_loses_a_third(seed: int) -> None:
    wire = Wire(Bench.of(seed=seed), loss_percent=33)
    client = wire.client(SOURCE)
    client.bind(PEER, wire.bench.now)
    wire.run(10)
    assert client.state == "allocated"
    assert Permitted(peer=PEER) in wire.events[SOURCE]
    assert wire.bench.server.allocations == 1


def test_everything_stays_alive_for_three_hours() -> None:
    wire = Wire(Bench.of())
    client, relayed = connected(wire)
    client.bind(PEER, wire.bench.now)
    other = Address("192.0.2.11", 2000)
    client.permit(other, wire.bench.now)
    wire.settle()
    for _ in range(3 * 60):
        wire.run(60)
        wire.at_peers.clear()
        assert client.send(PEER, b"x", wire.bench.now)
        assert client.send(other, b"y", wire.bench.now)
        wire.settle()
        assert wire.at_peers == [(PEER, relayed, b"x"), (other, relayed, b"y")]
    assert not any(isinstance(event, Lost) for event in wire.events[SOURCE])
    assert wire.bench.server.counters["errors_438"] >= 2


def test_a_forgotten_peer_is_let_go() -> None:
    wire = Wire(Bench.of())
    client, relayed = connected(wire)
    client.bind(PEER, wire.bench.now)
    wire.settle()
    client.forget(PEER, wire.bench.now)
    wire.run(301)
    assert wire.bench.from_peer(b"x", PEER, relayed) == []
    assert not client.send(PEER, b"x", wire.bench.now)


def test_a_relay_that_started_anew_is_noticed_by_a_probe() -> None:
    wire = Wire(Bench.of())
    client, _ = connected(wire)
    client.probe(wire.bench.now)
    wire.run(1)
    assert wire.events[SOURCE] == []
    wire.bench.server = Bench.of(seed=1).server
    client.probe(wire.bench.now)
    wire.settle()
    (event,) = wire.events[SOURCE]
    assert isinstance(event, Lost)
    assert event.code == 437


@pytest.mark.parametrize("username", ["alice", "bob"])
def test_what_was_left_on_this_port_is_given_back_before_an_allocation_is_made(
    username: str,
) -> None:
    wire = Wire(Bench.of())
    _, before = connected(wire)
    wire.client(SOURCE, username=username)  # the process died, and is there again
    wire.settle()
    (event,) = wire.events[SOURCE]
    assert isinstance(event, Allocated)
    assert event.relayed != before
    assert wire.bench.server.allocations == 1


def test_what_was_left_on_this_port_is_given_back_through_loss_too() -> None:
    wire = Wire(Bench.of(seed=1))
    connected(wire)
    wire.client(SOURCE)
    wire.is_cut = True
    wire.run(1)
    wire.is_cut = False
    wire.run(5)
    assert [type(event) for event in wire.events[SOURCE]] == [Allocated]


def test_a_relay_that_will_not_give_up_an_allocation_is_left_alone() -> None:
    wire = Wire(Bench.of())
    connected(wire)
    client = wire.client(SOURCE)
    refused = 0
    while client.state == "allocating":
        for datagram in client.drain_datagrams():
            request = StunMessage.decode(datagram)
            if Attribute.USERNAME not in request:
                (answer,) = wire.bench.from_client(datagram, SOURCE)
                client.receive(answer, wire.bench.now)
                key = ClientCredentials(username="alice", password="opensesame")
                key.learn(StunMessage.decode(answer))
                continue
            refused += 1
            code = 437 if request.method == Method.ALLOCATE else 441
            error = StunMessage(
                method=request.method,
                message_class=MessageClass.ERROR,
                transaction_id=request.transaction_id,
                attributes=((Attribute.ERROR_CODE, error_value(code)),),
            )
            client.receive(error.encode(key=key.key, integrity=key.integrity), wire.bench.now)
    (event,) = client.drain_events()
    assert isinstance(event, Lost)
    assert event.code == 441
    assert refused == 2


def test_a_path_that_is_gone_is_noticed_by_a_probe() -> None:
    wire = Wire(Bench.of())
    client, _ = connected(wire)
    wire.is_cut = True
    client.probe(wire.bench.now)
    wire.run(5)
    client.probe(wire.bench.now)  # asks at once, and counts anew
    wire.run(7)
    assert wire.events[SOURCE] == []
    wire.run(2)
    assert wire.events[SOURCE] == [Lost(code=0, reason="the relay does not answer")]
    assert client.poll_timeout() is None


def test_wrong_credentials_are_told_as_lost() -> None:
    wire = Wire(Bench.of())
    wire.client(SOURCE, password="guess")
    wire.settle()
    (event,) = wire.events[SOURCE]
    assert isinstance(event, Lost)
    assert event.code == 401


@pytest.mark.parametrize(
    ("limit", "code"), [("allocations", 508), ("allocations_per_username", 486)]
)
def test_a_full_relay_is_told_as_lost(limit: str, code: int) -> None:
    wire = Wire(Bench.of(limits=ServerLimits(**{limit: 0})))
    wire.client(SOURCE)
    wire.settle()
    (event,) = wire.events[SOURCE]
    assert isinstance(event, Lost)
    assert event.code == code


def test_a_refused_peer_is_told_and_the_rest_goes_on() -> None:
    wire = Wire(Bench.of())
    client, _ = connected(wire)
    private = Address("10.0.0.1", 5000)
    client.bind(private, wire.bench.now)
    client.permit(PEER, wire.bench.now)
    wire.settle()
    assert Refused(peer=private, code=403) in wire.events[SOURCE]
    assert Permitted(peer=PEER) in wire.events[SOURCE]
    assert not client.send(private, b"x", wire.bench.now)
    assert client.statistics()["channels"] == 0


def test_a_channel_that_is_refused_leaves_indications() -> None:
    wire = Wire(Bench.of(limits=ServerLimits(channels_per_allocation=0)))
    client, relayed = connected(wire)
    client.bind(PEER, wire.bench.now)
    wire.settle()
    assert client.send(PEER, b"x", wire.bench.now)
    wire.settle()
    assert wire.at_peers == [(PEER, relayed, b"x")]


def test_closing_gives_the_allocation_back() -> None:
    wire = Wire(Bench.of())
    client, _ = connected(wire)
    client.close(wire.bench.now)
    wire.settle()
    assert wire.bench.server.allocations == 0
    assert client.state == "over"
    assert client.poll_timeout() is None
    assert wire.events[SOURCE] == []
    assert not client.send(PEER, b"x", wire.bench.now)


def test_closing_without_an_answer_ends_too() -> None:
    wire = Wire(Bench.of())
    client, _ = connected(wire)
    wire.is_cut = True
    client.close(wire.bench.now)
    wire.run(10)
    assert client.state == "over"
    assert wire.events[SOURCE] == []


def test_two_clients_of_one_relay_talk_through_it() -> None:
    wire = Wire(Bench.of())
    one, first = connected(wire)
    there = ("192.0.2.77", 1000)
    two = wire.client(there, "bob")
    wire.settle()
    second = two.relayed
    assert second is not None
    one.bind(second, wire.bench.now)
    two.bind(first, wire.bench.now)
    wire.settle()
    one.send(second, b"hello", wire.bench.now)
    two.send(first, b"bonjour", wire.bench.now)
    wire.settle()
    assert wire.events[there][-1] == Received(first, b"hello")
    assert wire.events[SOURCE][-1] == Received(second, b"bonjour")


def test_an_ipv6_allocation_is_asked_for() -> None:
    policy = PeerPolicy.of()
    wire = Wire(Bench.of(ipv6=True, peers=policy))
    client = wire.client(SOURCE, family="ipv6")
    wire.settle()
    assert client.relayed is not None
    assert ":" in client.relayed.host


def test_answers_that_are_not_signed_are_not_believed() -> None:
    wire = Wire(Bench.of())
    client, _ = connected(wire)
    client.probe(wire.bench.now)
    (datagram,) = client.drain_datagrams()
    request = StunMessage.decode(datagram)
    for key in (None, b"guess"):
        forged = StunMessage(
            method=Method.REFRESH,
            message_class=MessageClass.ERROR,
            transaction_id=request.transaction_id,
            attributes=((Attribute.ERROR_CODE, error_value(437)),),
        ).encode(key=key)
        assert client.receive(forged, wire.bench.now)
    assert client.drain_events() == []
    assert client.state == "allocated"
    assert client.statistics()["dropped"] == 2


def test_nobody_in_between_talks_it_down_to_md5() -> None:
    wire = Wire(Bench.of())
    client = wire.client(SOURCE)
    (request,) = client.drain_datagrams()
    (answer,) = wire.bench.from_client(request, SOURCE)
    challenge = StunMessage.decode(answer)
    kept = tuple(a for a in challenge.attributes if a[0] != Attribute.PASSWORD_ALGORITHMS)
    stripped = StunMessage(
        method=challenge.method,
        message_class=challenge.message_class,
        transaction_id=challenge.transaction_id,
        attributes=kept,
    ).encode()
    assert client.receive(stripped, wire.bench.now)
    (event,) = client.drain_events()
    assert isinstance(event, Lost)
    assert client.drain_datagrams() == []


def test_what_is_not_for_it_is_left_to_others() -> None:
    wire = Wire(Bench.of())
    client, _ = connected(wire)
    binding = StunMessage(
        method=Method.BINDING, message_class=MessageClass.SUCCESS, transaction_id=b"x" * 12
    )
    stranger = data_indication(("192.0.2.99", 1), b"x", bytes(12))
    for datagram in (b"", b"\x01\0\0\0hello", b"\x40\0\0\1x", binding.encode(), stranger):
        assert not client.receive(datagram, wire.bench.now)


def test_neither_password_nor_key_is_printed() -> None:
    wire = Wire(Bench.of())
    client, _ = connected(wire)
    assert "opensesame" not in repr(client) + str(vars(client))
    assert "opensesame" not in repr(StaticCredentials({"alice": "opensesame"}))


@settings(max_examples=200)
@given(
    body=st.binary(max_size=120),
    kind=st.sampled_from([0x0103, 0x0113, 0x0104, 0x0114, 0x0017, 0x4000, 0x0108]),
    is_ours=st.booleans(),
)
def test_no_datagram_makes_the_client_raise(body: bytes, kind: int, is_ours: bool) -> None:
    client = TurnClient(
        server=SERVER,
        username="alice",
        password="opensesame",
        family="ipv4",
        randomness=SeededRandomness(1, "client"),
        now=0,
    )
    (request,) = client.drain_datagrams()
    transaction_id = request[8:20] if is_ours else bytes(12)
    body += bytes(-len(body) % 4)
    head = kind.to_bytes(2, "big") + len(body).to_bytes(2, "big") + b"\x21\x12\xa4\x42"
    for datagram in (body, head + transaction_id + body):
        client.receive(datagram, 1)
    client.handle_timeout(10**12)


# --- both families, other relays, the path -----------------------------------------------------


def test_one_client_has_relayed_addresses_of_both_families() -> None:
    wire = Wire(Bench.of(ipv6=True))
    client = wire.client(SOURCE, family="both")
    peers = [PEER, Address("2001:db8::10", 5000)]
    for peer in peers:
        client.bind(peer, wire.bench.now)
    wire.settle()
    (allocated, *granted) = wire.events[SOURCE]
    assert isinstance(allocated, Allocated)
    assert allocated.additional is not None
    assert [allocated.relayed.host, allocated.additional.host] == [RELAY_HOST, RELAY_HOST_IPV6]
    assert granted == [Permitted(peer=peer) for peer in peers]
    assert wire.bench.server.allocations == 1
    wire.run(3 * 3600)
    assert len(wire.bench.sockets.open_ports) == 2
    for peer in peers:
        assert client.send(peer, b"ping", wire.bench.now)
    wire.settle()
    assert [peer for peer, _, _ in wire.at_peers] == peers


def test_a_relay_of_one_family_gives_that_one_to_who_wants_both() -> None:
    wire = Wire(Bench.of())
    client = wire.client(SOURCE, family="both")
    client.permit(Address("2001:db8::10", 5000), wire.bench.now)
    wire.settle()
    allocated, refused = wire.events[SOURCE]
    assert isinstance(allocated, Allocated)
    assert (allocated.relayed.host, allocated.additional) == (RELAY_HOST, None)
    assert refused == Refused(peer=Address("2001:db8::10", 5000), code=443)


def test_a_client_follows_a_draining_relay_to_another_one_if_it_is_allowed_to() -> None:
    alternate = Address("192.0.2.99", 3478)
    wire = Wire(Bench.of(alternate=alternate))
    wire.bench.server.drain()
    client = wire.client(SOURCE)
    wire.settle()
    assert wire.events[SOURCE] == [Lost(code=300, reason="Try Alternate")]
    client = wire.client(SOURCE, redirects=1)
    wire.settle()
    assert wire.events[SOURCE][0] == Redirected(server=alternate)
    assert client.server == alternate
    # It is the same relay to which it was sent, for this test: it does not go in circles.
    assert wire.events[SOURCE][1:] == [Lost(code=300, reason="Try Alternate")]


def test_a_client_takes_its_credentials_to_no_other_realm() -> None:
    alternate = Address("192.0.2.99", 3478)
    first, second = Bench.of(alternate=alternate), Bench.of(realm="other")
    first.server.drain()
    wire = Wire(first)
    client = wire.client(SOURCE, redirects=1)
    wire.settle_until(lambda: client.server == alternate)
    wire.bench = second
    wire.settle()
    lost = wire.events[SOURCE][-1]
    assert isinstance(lost, Lost)
    assert lost.code == 401
    assert second.server.allocations == 0


def test_nobody_sends_a_client_elsewhere_who_does_not_know_its_password() -> None:
    client = TurnClient(
        server=SERVER,
        username="alice",
        password="opensesame",
        family="ipv4",
        randomness=SeededRandomness(1, "client"),
        now=0,
        redirects=3,
    )
    (request,) = client.drain_datagrams()
    forged = StunMessage(
        method=Method.ALLOCATE,
        message_class=MessageClass.ERROR,
        transaction_id=StunMessage.decode(request).transaction_id,
        attributes=(
            (Attribute.ERROR_CODE, error_value(300)),
            (Attribute.ALTERNATE_SERVER, address_value(("192.0.2.66", 3478))),
        ),
    ).encode()
    client.receive(forged, 0)
    assert client.server == SERVER
    assert client.drain_datagrams() == []


def test_what_must_stay_whole_says_so_and_errors_of_the_path_are_told() -> None:
    wire = Wire(Bench.of())
    client, _ = connected(wire)
    client.bind(PEER, wire.bench.now)
    wire.settle()
    assert client.send(PEER, b"probe", wire.bench.now, dont_fragment=True)
    (datagram,) = client.drain_datagrams()
    unpacked = read_unfragmented_indication(memoryview(datagram))
    assert unpacked is not None
    assert (unpacked[0], bytes(unpacked[1])) == (PEER, b"probe")
    wire.events[SOURCE].clear()
    (socket,) = wire.bench.sockets.open_ports
    error = IcmpError(3, 4, 1300)
    wire.bench.server.receive_icmp(socket, PEER, error, wire.bench.now)
    wire.settle()
    assert wire.events[SOURCE] == [Unreachable(peer=PEER, error=error)]
    stranger = Address("192.0.2.77", 5000)
    assert not client.receive(icmp_indication(stranger, error, bytes(12)), wire.bench.now)
    assert client.drain_events() == []
