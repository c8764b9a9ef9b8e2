"""The TURN server core where one allocation has relayed addresses of both families (RFC 8656)."""

from __future__ import annotations

import pytest

from relays.requests import ServerLimits
from relays.stun import Attribute, Method, StunMessage, read_xor_address
from relays.turn import channel_data, send_indication
from runtime.net.address import Address
from tests.unit.relays.bench import (
    LIFETIME_0,
    RELAY_HOST,
    RELAY_HOST_IPV6,
    UDP,
    Bench,
    Caller,
    code_of,
    indication_of,
)

SOURCE = ("198.51.100.2", 40_000)
PEER = Address("192.0.2.10", 5000)
PEER_IPV6 = Address("2001:db8::10", 5000)
BOTH = (Attribute.ADDITIONAL_ADDRESS_FAMILY, b"\2\0\0\0")
OF_IPV4 = (Attribute.REQUESTED_ADDRESS_FAMILY, b"\1\0\0\0")
OF_IPV6 = (Attribute.REQUESTED_ADDRESS_FAMILY, b"\2\0\0\0")
EVEN = (Attribute.EVEN_PORT, b"\0")
EVEN_AND_NEXT = (Attribute.EVEN_PORT, b"\x80")
TOKEN = (Attribute.RESERVATION_TOKEN, bytes(8))


def relayed_of(answer: StunMessage) -> list[Address]:
    values = answer.values(Attribute.XOR_RELAYED_ADDRESS)
    return [read_xor_address(value, answer.transaction_id) for value in values]


def dual(bench: Bench) -> tuple[Caller, Address, Address]:
    caller = Caller(bench)
    ipv4, ipv6 = relayed_of(caller.call(Method.ALLOCATE, [UDP, BOTH]))
    return caller, ipv4, ipv6


def test_one_allocation_has_an_address_of_each_family() -> None:
    bench = Bench.of(ipv6=True)
    _, ipv4, ipv6 = dual(bench)
    assert (ipv4.host, ipv6.host) == (RELAY_HOST, RELAY_HOST_IPV6)
    assert bench.server.allocations == 1
    assert set(bench.sockets.open_ports.values()) == {(1, ipv4.port), (2, ipv6.port)}


@pytest.mark.parametrize(
    "attributes",
    [
        [UDP, BOTH, OF_IPV4],
        [UDP, BOTH, OF_IPV6],
        [UDP, BOTH, EVEN_AND_NEXT],
        [UDP, BOTH, TOKEN],
        [UDP, (Attribute.ADDITIONAL_ADDRESS_FAMILY, b"\1\0\0\0")],
        [UDP, (Attribute.ADDITIONAL_ADDRESS_FAMILY, b"\2")],
    ],
)
def test_both_families_are_not_asked_for_with_what_excludes_them(
    attributes: list[tuple[int, bytes]],
) -> None:
    bench = Bench.of(ipv6=True)
    assert code_of(Caller(bench).call(Method.ALLOCATE, attributes)) == 400
    assert not bench.sockets.open_ports


def test_both_families_may_have_even_ports() -> None:
    bench = Bench.of(ipv6=True)
    answer = Caller(bench).call(Method.ALLOCATE, [UDP, BOTH, EVEN])
    assert [one.port % 2 for one in relayed_of(answer)] == [0, 0]
    assert Attribute.RESERVATION_TOKEN not in answer


def test_a_family_that_the_relay_has_not_is_named_with_440_and_the_other_one_is_given() -> None:
    bench = Bench.of()
    answer = Caller(bench).call(Method.ALLOCATE, [UDP, BOTH])
    assert [one.host for one in relayed_of(answer)] == [RELAY_HOST]
    value = answer.value(Attribute.ADDRESS_ERROR_CODE)
    assert value is not None
    assert value[:4] == bytes((2, 0, 4, 40))
    assert value[4:] == b"Address Family not Supported"


def test_a_family_without_a_free_port_is_named_with_508_and_none_at_all_refused() -> None:
    bench = Bench.of(ipv6=True, ports=(50_000, 50_000))
    assert Caller(bench, ("198.51.100.2", 1)).allocate(OF_IPV4).host == RELAY_HOST
    answer = Caller(bench, ("198.51.100.2", 2)).call(Method.ALLOCATE, [UDP, BOTH])
    assert [one.host for one in relayed_of(answer)] == [RELAY_HOST_IPV6]
    value = answer.value(Attribute.ADDRESS_ERROR_CODE)
    assert value is not None
    assert value[:4] == bytes((1, 0, 5, 8))
    third = Caller(bench, ("198.51.100.2", 3))
    assert code_of(third.call(Method.ALLOCATE, [UDP, BOTH])) == 508


def test_peers_of_both_families_are_reached_from_the_address_of_their_own() -> None:
    bench = Bench.of(ipv6=True)
    caller, ipv4, ipv6 = dual(bench)
    assert code_of(caller.permit(PEER.host, PEER_IPV6.host)) == 0
    for peer, relayed in ((PEER, ipv4), (PEER_IPV6, ipv6)):
        left = bench.to_peers(send_indication(peer, b"ping", bytes(12)), SOURCE)
        assert left == [(peer, b"ping", str(relayed.port))]
        ((to, packet),) = bench.from_peer(b"pong", peer, relayed)
        assert to == SOURCE
        assert indication_of(packet) == (peer, b"pong")
    assert code_of(caller.bind(0x4000, PEER)) == code_of(caller.bind(0x4001, PEER_IPV6)) == 0
    for number, peer, relayed in ((0x4000, PEER, ipv4), (0x4001, PEER_IPV6, ipv6)):
        left = bench.to_peers(channel_data(number, b"ping"), SOURCE)
        assert left == [(peer, b"ping", str(relayed.port))]


def test_one_family_is_given_back_and_takes_its_permissions_and_channels_with_it() -> None:
    bench = Bench.of(ipv6=True)
    caller, ipv4, _ = dual(bench)
    caller.bind(0x4000, PEER)
    caller.bind(0x4001, PEER_IPV6)
    assert caller.refresh(LIFETIME_0, OF_IPV6).integer(Attribute.LIFETIME, 4) == 0
    assert set(bench.sockets.open_ports.values()) == {(1, ipv4.port)}
    assert bench.server.allocations == 1
    assert bench.to_peers(channel_data(0x4001, b"ping"), SOURCE) == []
    assert bench.to_peers(send_indication(PEER_IPV6, b"ping", bytes(12)), SOURCE) == []
    assert bench.to_peers(channel_data(0x4000, b"ping"), SOURCE)
    assert code_of(caller.permit(PEER_IPV6.host)) == 443
    assert code_of(caller.refresh(OF_IPV6)) == 443
    assert code_of(caller.refresh(LIFETIME_0, OF_IPV4)) == 0
    assert bench.server.allocations == 0


def test_each_family_is_refreshed_alone_or_both_at_once() -> None:
    bench = Bench.of(ipv6=True)
    caller, ipv4, _ = dual(bench)
    bench.advance(500)
    assert code_of(caller.refresh(OF_IPV4)) == 0
    bench.advance(200)  # the IPv6 address was not refreshed
    assert set(bench.sockets.open_ports.values()) == {(1, ipv4.port)}
    bench.advance(401)
    assert bench.server.allocations == 0
    caller, _, _ = dual(bench)
    bench.advance(500)
    assert code_of(caller.refresh()) == 0
    bench.advance(500)
    assert len(bench.sockets.open_ports) == 2


def test_one_allocation_of_both_families_counts_once_and_goes_at_once() -> None:
    bench = Bench.of(ipv6=True, limits=ServerLimits(allocations=1))
    dual(bench)
    assert bench.server.load == 1.0
    assert code_of(Caller(bench, ("198.51.100.2", 2)).call(Method.ALLOCATE, [UDP])) == 508
    assert bench.server.revoke_user("alice") == 1
    assert not bench.sockets.open_ports


def test_allocations_of_one_relay_reach_each_other_in_both_families() -> None:
    bench = Bench.of(ipv6=True)
    caller, ipv4, ipv6 = dual(bench)
    other = Caller(bench, ("198.51.100.3", 40_000), "bob")
    answer = other.call(Method.ALLOCATE, [UDP, BOTH])
    caller.permit(RELAY_HOST, RELAY_HOST_IPV6)
    other.permit(RELAY_HOST, RELAY_HOST_IPV6)
    for source, target in zip((ipv4, ipv6), relayed_of(answer), strict=True):
        data = send_indication(target, b"ping", bytes(12))
        bench.server.receive(1, memoryview(data), SOURCE, bench.now)
        ((_, packet, to),) = bench.server.drain_transmits()
        assert to == other.source
        assert indication_of(packet) == (source, b"ping")
