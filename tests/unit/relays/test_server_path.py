"""What a relay's client learns and decides about the path from the relay on: DONT-FRAGMENT and ICMP
(RFC 8656, sections 11.5, 14 and 18.13)."""

from __future__ import annotations

import pytest

from relays.stun import Attribute, Method
from relays.turn import IcmpError, channel_data, read_icmp_indication, send_indication
from runtime.net.address import Address
from tests.unit.relays.bench import LISTENER, RELAY_HOST, UDP, Bench, Caller, code_of

SOURCE = ("198.51.100.2", 40_000)
PEER = Address("192.0.2.10", 5000)
PEER_IPV6 = Address("2001:db8::10", 5000)
BOTH = (Attribute.ADDITIONAL_ADDRESS_FAMILY, b"\2\0\0\0")
WHOLE = send_indication(PEER, b"ping", bytes(12), dont_fragment=True)


def allocated(bench: Bench) -> tuple[Caller, int, int]:
    """A client with addresses of both families, and the numbers of their sockets."""
    caller = Caller(bench)
    assert code_of(caller.call(Method.ALLOCATE, [UDP, BOTH])) == 0
    ipv4, ipv6 = sorted(bench.sockets.open_ports, key=bench.sockets.open_ports.__getitem__)
    return caller, ipv4, ipv6


def transmits(bench: Bench, data: bytes) -> list[tuple[int, bytes, tuple[str, int]]]:
    bench.server.receive(LISTENER, memoryview(data), SOURCE, bench.now)
    return [(number, bytes(sent), to) for number, sent, to in bench.server.drain_transmits()]


def test_an_allocation_may_ask_whether_fragments_can_be_forbidden() -> None:
    caller = Caller(Bench.of())
    assert code_of(caller.call(Method.ALLOCATE, [UDP, (Attribute.DONT_FRAGMENT, b"")])) == 0


def test_only_an_indication_that_forbids_fragments_leaves_without_them() -> None:
    bench = Bench.of(ipv6=True)
    caller, ipv4, ipv6 = allocated(bench)
    caller.permit(PEER.host, PEER_IPV6.host)
    caller.bind(0x4000, PEER)
    assert transmits(bench, WHOLE) == [(-ipv4, b"ping", PEER)]
    whole = send_indication(PEER_IPV6, b"ping", bytes(12), dont_fragment=True)
    assert transmits(bench, whole) == [(-ipv6, b"ping", PEER_IPV6)]
    usual = send_indication(PEER, b"ping", bytes(12))
    assert transmits(bench, usual) == [(ipv4, b"ping", PEER)]
    assert transmits(bench, channel_data(0x4000, b"ping")) == [(ipv4, b"ping", PEER)]


def test_what_forbids_fragments_needs_a_permission_and_a_port_as_the_rest() -> None:
    bench = Bench.of(ipv6=True)
    caller, _, _ = allocated(bench)
    assert transmits(bench, WHOLE) == []
    caller.permit(PEER.host)
    low = send_indication((PEER.host, 53), b"ping", bytes(12), dont_fragment=True)
    assert transmits(bench, low) == []
    assert [len(transmits(bench, WHOLE)) for _ in range(21)] == [1] * 20 + [0]


def test_inside_of_the_relay_nothing_is_fragmented() -> None:
    bench = Bench.of()
    relayed = [Caller(bench, (f"198.51.100.{host}", 40_000)) for host in (2, 3)]
    _, second = (caller.allocate() for caller in relayed)
    for caller in relayed:
        caller.permit(RELAY_HOST)
    ((number, _, to),) = transmits(
        bench, send_indication(second, b"ping", bytes(12), dont_fragment=True)
    )
    assert (number, to) == (LISTENER, relayed[1].source)


@pytest.mark.parametrize(
    ("peer", "error", "is_told"),
    [
        (PEER, IcmpError(3, 3), True),
        (PEER, IcmpError(3, 4, 1300), True),
        (PEER, IcmpError(11, 0), True),
        (PEER, IcmpError(12, 0), False),
        (PEER, IcmpError(1, 0), False),
        (PEER_IPV6, IcmpError(1, 4), True),
        (PEER_IPV6, IcmpError(2, 0, 1280), True),
        (PEER_IPV6, IcmpError(3, 0), True),
        (PEER_IPV6, IcmpError(4, 1), False),
        (Address("192.0.2.11", 5000), IcmpError(3, 3), False),
    ],
)
def test_icmp_errors_about_permitted_peers_are_told_to_the_client(
    peer: Address, error: IcmpError, is_told: bool
) -> None:
    bench = Bench.of(ipv6=True)
    caller, ipv4, ipv6 = allocated(bench)
    caller.permit(PEER.host, PEER_IPV6.host)
    socket = ipv6 if peer is PEER_IPV6 else ipv4
    bench.server.receive_icmp(socket, peer, error, bench.now)
    sent = bench.server.drain_transmits()
    if not is_told:
        assert sent == []
        return
    ((number, packet, to),) = sent
    assert (number, to) == (LISTENER, SOURCE)
    assert read_icmp_indication(memoryview(packet)) == (peer, error)


def test_no_icmp_error_is_told_after_the_permission_or_the_allocation_ended() -> None:
    bench = Bench.of(ipv6=True)
    caller, ipv4, _ = allocated(bench)
    caller.permit(PEER.host)
    bench.advance(300)
    bench.server.receive_icmp(ipv4, PEER, IcmpError(3, 3), bench.now)
    bench.advance(301)
    bench.server.receive_icmp(ipv4, PEER, IcmpError(3, 3), bench.now)
    assert bench.server.drain_transmits() == []


def test_an_icmp_error_does_not_make_a_stranger_one_who_answered() -> None:
    bench = Bench.of(ipv6=True)
    caller, ipv4, _ = allocated(bench)
    caller.permit(PEER.host)
    for _ in range(5):
        bench.server.receive_icmp(ipv4, PEER, IcmpError(3, 3), bench.now)
        bench.server.drain_transmits()
    big = send_indication(PEER, bytes(201), bytes(12))
    assert transmits(bench, big) == []
