"""Whom the TURN server core talks to, and what strangers and hostile clients get from it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relays.authentication import StampedCredentials
from relays.peers import PeerPolicy
from relays.requests import ServerLimits
from relays.stun import (
    Attribute,
    Integrity,
    MessageClass,
    Method,
    StunMessage,
    xor_address_value,
)
from relays.turn import (
    channel_data,
    send_indication,
)
from runtime.net.address import Address
from tests.unit.relays.bench import (
    LISTENER,
    RELAY_HOST,
    UDP,
    Bench,
    Caller,
    channel_data_of,
    code_of,
    indication_of,
)

PEER = Address("192.0.2.10", 5000)
IPV6 = (Attribute.REQUESTED_ADDRESS_FAMILY, b"\2\0\0\0")
SOURCE = ("198.51.100.2", 40_000)


# --- whom a relay talks to -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.1.2.3",
        "100.64.0.1",
        "100.127.255.255",
        "127.0.0.1",
        "127.9.9.9",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "203.0.113.7",  # another address of this machine
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
    ],
)
def test_refused_ipv4_peers_get_403(host: str) -> None:
    caller = Caller(Bench.of())
    caller.allocate()
    assert code_of(caller.permit("192.0.2.1", host)) == 403
    assert code_of(caller.bind(0x4000, (host, 5000))) == 403


@pytest.mark.parametrize(
    "host",
    [
        "::",
        "::1",
        "::192.0.2.1",
        "::ffff:192.0.2.1",
        "64:ff9b::c000:201",
        "64:ff9b:1::1",
        "2002:c000:201::1",
        "2001:0:1::1",
        "fc00::1",
        "fd12::1",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        "100::1",
    ],
)
def test_refused_ipv6_peers_get_403(host: str) -> None:
    caller = Caller(Bench.of(ipv6=True))
    caller.allocate(IPV6)
    assert code_of(caller.permit(host)) == 403


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "198.51.100.1", "203.0.113.99", "8.8.8.8", "198.18.0.1"]
)
def test_public_and_documentation_addresses_are_peers(host: str) -> None:
    caller = Caller(Bench.of())
    caller.allocate()
    assert code_of(caller.permit(host)) == 0


def test_a_laboratory_may_allow_private_peers_but_never_multicast() -> None:
    bench = Bench.of(
        peers=PeerPolicy.of(allow_private_peers=True, allowed_peer_ranges=["0.0.0.0/0"])
    )
    caller = Caller(bench)
    caller.allocate()
    assert code_of(caller.permit("10.1.2.3")) == 0
    assert code_of(caller.permit("127.0.0.2")) == 0
    assert code_of(caller.permit("224.0.0.1")) == 403
    assert code_of(caller.permit("0.0.0.0")) == 403


def test_ports_below_1024_are_no_peers() -> None:
    bench = Bench.of()
    caller = Caller(bench)
    caller.allocate()
    assert code_of(caller.bind(0x4000, (PEER.host, 53))) == 403
    assert code_of(caller.permit(PEER.host)) == 0
    assert bench.to_peers(send_indication((PEER.host, 53), b"?", bytes(12)), SOURCE) == []
    assert bench.to_peers(send_indication((PEER.host, 1024), b"?", bytes(12)), SOURCE)


def test_an_address_that_never_spoke_gets_twenty_small_packets_a_second() -> None:
    bench = Bench.of()
    caller = Caller(bench)
    relayed = caller.allocate()
    caller.bind(0x4000, PEER)

    def burst(size: int, count: int = 50) -> int:
        packet = channel_data(0x4000, bytes(size))
        return sum(len(bench.to_peers(packet, SOURCE)) for _ in range(count))

    assert burst(201) == 0
    assert burst(200) == 20
    bench.advance(0.5)
    assert burst(200) == 10
    bench.from_peer(b"hello", (PEER.host, 7000), relayed)
    assert burst(1400) == 50
    bench.advance(301)
    caller.permit(PEER.host)
    assert burst(1400) == 0


def test_many_allocations_together_do_not_flood_an_address_that_never_spoke() -> None:
    bench = Bench.of()
    sources = [(f"198.51.100.{n}", 40_000) for n in range(2, 42)]
    for source in sources:
        caller = Caller(bench, source)
        caller.allocate()
        caller.bind(0x4000, PEER)

    def burst() -> int:
        packet = channel_data(0x4000, bytes(200))
        return sum(len(bench.to_peers(packet, source)) for source in sources for _ in range(20))

    assert burst() == ServerLimits().unanswered_per_host
    bench.advance(1)
    assert burst() <= ServerLimits().unanswered_per_host + 1


def test_two_allocations_of_one_relay_reach_each_other_without_leaving_it() -> None:
    bench = Bench.of()
    one, two = Caller(bench, ("198.51.100.2", 1)), Caller(bench, ("198.51.100.2", 2), "bob")
    first, second = one.allocate(), two.allocate()
    assert code_of(one.bind(0x4000, second)) == 0
    packet = channel_data(0x4000, bytes(1400))
    bench.server.receive(LISTENER, memoryview(packet), one.source, bench.now)
    assert bench.server.drain_transmits() == []  # the other one did not permit it
    assert code_of(two.bind(0x4005, first)) == 0
    bench.server.receive(LISTENER, memoryview(packet), one.source, bench.now)
    ((socket, data, destination),) = bench.server.drain_transmits()
    assert (socket, destination) == (LISTENER, two.source)
    assert channel_data_of(data) == (0x4005, bytes(1400))


def test_the_relays_own_address_is_reached_on_relayed_ports_only() -> None:
    bench = Bench.of()
    caller = Caller(bench)
    caller.allocate()
    caller.permit(RELAY_HOST)
    for port in (3478, 5432, 50_000):
        assert bench.to_peers(send_indication((RELAY_HOST, port), b"x", bytes(12)), SOURCE) == []
    assert code_of(Caller(bench).bind(0x4000, (RELAY_HOST, 3478))) == 0  # leads nowhere
    assert bench.to_peers(channel_data(0x4000, b"x"), SOURCE) == []


def test_a_relay_behind_one_to_one_nat_tells_its_external_address() -> None:
    bench = Bench.of(external_ip="192.0.2.200")
    one, two = Caller(bench, ("198.51.100.2", 1)), Caller(bench, ("198.51.100.2", 2))
    first, second = one.allocate(), two.allocate()
    assert first.host == "192.0.2.200"
    assert code_of(one.permit(RELAY_HOST)) == 403
    assert code_of(one.permit(first.host)) == 0
    assert code_of(two.permit(first.host)) == 0
    indication = send_indication(second, b"x", bytes(12))
    bench.server.receive(LISTENER, memoryview(indication), one.source, bench.now)
    ((_, data, destination),) = bench.server.drain_transmits()
    assert destination == two.source
    assert indication_of(data) == (first, b"x")


def test_a_revoked_user_loses_every_allocation_at_once() -> None:
    bench = Bench.of()
    for port in (1, 2, 3):
        Caller(bench, ("198.51.100.2", port)).allocate()
    bob = Caller(bench, ("198.51.100.2", 4), "bob")
    bob.allocate()
    assert bench.server.revoke_user("alice") == 3
    assert bench.server.allocations == len(bench.sockets.open_ports) == 1
    assert code_of(bob.refresh()) == 0


# --- strangers -----------------------------------------------------------------------------------


def test_strangers_are_answered_at_a_limited_rate_for_each_prefix() -> None:
    limits = ServerLimits(unauthenticated_per_second=10, unauthenticated_burst=20)
    bench = Bench.of(limits=limits)

    def answered(host: str, count: int) -> int:
        callers = [Caller(bench, (host, 1000 + number)) for number in range(count)]
        return sum(caller.bare(Method.BINDING) is not None for caller in callers)

    assert answered("198.51.100.2", 30) == 20
    assert answered("198.51.100.3", 5) == 0
    assert answered("198.51.101.2", 5) == 5
    assert answered("2001:db8:1:2200::1", 30) == 20
    assert answered("2001:db8:1:22ff::1", 5) == 0
    bench.advance(0.5)
    assert answered("198.51.100.2", 30) == 5


@given(
    method=st.sampled_from([Method.BINDING, Method.ALLOCATE, Method.REFRESH, Method.CHANNEL_BIND]),
    kinds=st.lists(st.sampled_from([*Attribute, 0x7001, 0x7002, 0x7003]), max_size=4),
    size=st.integers(0, 12),
    is_ipv6=st.booleans(),
    has_key=st.booleans(),
    fingerprint=st.booleans(),
)
def test_no_stranger_gets_more_than_twice_what_he_sent(
    method: int, kinds: list[int], size: int, is_ipv6: bool, has_key: bool, fingerprint: bool
) -> None:
    special = {Attribute.FINGERPRINT, *(integrity.attribute for integrity in Integrity)}
    data = StunMessage(
        method=method,
        message_class=MessageClass.REQUEST,
        transaction_id=bytes(12),
        attributes=tuple((kind, bytes(size)) for kind in kinds if kind not in special),
    ).encode(key=b"guess" if has_key else None, fingerprint=fingerprint)
    source = ("2001:db8::1", 1) if is_ipv6 else ("198.51.100.2", 1)
    headers = 48 if is_ipv6 else 28
    answers = Bench.of().from_client(data, source)
    assert sum(len(answer) + headers for answer in answers) <= 2 * (len(data) + headers)


def test_the_smallest_honest_allocate_is_answered() -> None:
    for credentials in (None, StampedCredentials(bytes(32))):
        challenge = Caller(Bench.of(credentials=credentials)).bare(Method.ALLOCATE, [UDP])
        assert code_of(challenge) == 401


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x40\0", b"\0\x16", b"\0\3", b"\1\1"]))
def test_no_datagram_makes_the_server_raise(data: bytes, prefix: bytes) -> None:
    bench = Bench.of()
    caller = Caller(bench)
    relayed = caller.allocate()
    caller.bind(0x4000, PEER)
    framed = prefix + len(data).to_bytes(2, "big") + b"\x21\x12\xa4\x42" + bytes(12) + data
    for datagram in (data, prefix + data, framed):
        bench.server.receive(LISTENER, memoryview(datagram), SOURCE, bench.now)
        bench.from_peer(datagram, PEER, relayed)


@settings(max_examples=200)
@given(
    method=st.sampled_from(
        [
            Method.ALLOCATE,
            Method.REFRESH,
            Method.CREATE_PERMISSION,
            Method.CHANNEL_BIND,
            Method.SEND,
        ]
    ),
    attributes=st.lists(
        st.tuples(
            st.sampled_from(
                [
                    Attribute.LIFETIME,
                    Attribute.XOR_PEER_ADDRESS,
                    Attribute.CHANNEL_NUMBER,
                    Attribute.REQUESTED_TRANSPORT,
                    Attribute.EVEN_PORT,
                    Attribute.RESERVATION_TOKEN,
                    Attribute.REQUESTED_ADDRESS_FAMILY,
                    Attribute.USERNAME,
                    Attribute.PASSWORD_ALGORITHM,
                    Attribute.USERHASH,
                ]
            ),
            st.binary(max_size=20) | st.sampled_from([b"\x11\0\0\0", b"\0\1\0\0", b"\x40\0\0\0"]),
        ),
        max_size=4,
    ),
    has_allocation=st.booleans(),
)
def test_whatever_an_authenticated_request_holds_it_gets_one_answer(
    method: int, attributes: list[tuple[int, bytes]], has_allocation: bool
) -> None:
    bench = Bench.of(ipv6=True)
    caller = Caller(bench)
    if has_allocation:
        caller.allocate()
    answers = bench.from_client(caller.encode(method, attributes), SOURCE)
    assert len(answers) == (0 if method == Method.SEND else 1)


def test_an_indication_with_what_cannot_be_honoured_is_dropped() -> None:
    bench = Bench.of()
    caller = Caller(bench)
    caller.allocate()
    caller.permit(PEER.host)
    indication = StunMessage(
        method=Method.SEND,
        message_class=MessageClass.INDICATION,
        transaction_id=bytes(12),
        attributes=(
            (Attribute.XOR_PEER_ADDRESS, xor_address_value(PEER, bytes(12))),
            (Attribute.CHANGE_REQUEST, bytes(4)),
            (Attribute.DONT_FRAGMENT, b""),
            (Attribute.DATA, b"x"),
        ),
    ).encode()
    assert bench.to_peers(indication, SOURCE) == []
