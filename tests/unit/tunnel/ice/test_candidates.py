"""Candidates: the priorities of RFC 8445, and which addresses of a peer are never sent to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.net.address import Address
from tunnel.ice.candidates import (
    Base,
    foundation_of,
    host_candidate,
    network_of,
    pair_priority,
    priority_of,
    reachable,
    reflexive_candidate,
    reflexive_priority,
    refusal,
    relayed_candidate,
)

HERE = Address("192.168.1.7", 41_000)
HOST = Base(
    address=HERE,
    socket=HERE,
    priority=priority_of("host", 65_535),
    network=network_of("192.168.1.7/24"),
)
RELAYED = Base(
    address=Address("198.51.100.10", 50_000),
    socket=HERE,
    server=Address("198.51.100.10", 3478),
    priority=priority_of("relay", 65_535),
)


def test_priorities_are_those_of_the_rfc() -> None:
    assert priority_of("host", 65_535) == 126 * 2**24 + 65_535 * 2**8 + 255
    assert priority_of("relay", 0) == 255
    assert pair_priority(2, 1) == 2**32 + 2 * 2 + 1
    assert pair_priority(1, 2) == 2**32 + 2 * 2


@given(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1))
def test_both_ends_give_a_pair_nearly_the_same_priority(one: int, other: int) -> None:
    assert pair_priority(one, other) >> 1 == pair_priority(other, one) >> 1


def test_kinds_are_ordered_from_host_to_relay() -> None:
    server = Address("198.51.100.10", 3478)
    host = host_candidate(HOST)
    reflexive = reflexive_candidate(HOST, Address("203.0.113.7", 41_000), server)
    relayed = relayed_candidate(RELAYED)
    assert host.priority > reflexive_priority(HOST) > reflexive.priority > relayed.priority
    assert reflexive_priority(RELAYED) == relayed.priority, "a relay is never taken for direct"
    assert len({host.foundation, reflexive.foundation, relayed.foundation}) == 3
    assert foundation_of("host", "192.168.1.7") == host.foundation


@pytest.mark.parametrize(
    ("host", "port", "reason"),
    [
        ("203.0.113.9", 1023, "low port"),
        ("203.0.113.9", 53, "low port"),
        ("0.0.0.0", 5000, "unspecified"),
        ("0.1.2.3", 5000, "unspecified"),
        ("::", 5000, "unspecified"),
        ("127.0.0.1", 5000, "loopback"),
        ("127.8.9.1", 5000, "loopback"),
        ("::1", 5000, "loopback"),
        ("169.254.169.254", 5000, "link-local"),
        ("fe80::1", 5000, "link-local"),
        ("224.0.0.251", 5353, "multicast"),
        ("ff02::1", 5353, "multicast"),
        ("255.255.255.255", 5000, "reserved"),
        ("240.0.0.1", 5000, "reserved"),
        ("100.64.0.1", 5000, "tunnel range"),
        ("100.127.255.255", 5000, "tunnel range"),
        ("fd48:4c57:5900::1", 5000, "tunnel range"),
        ("fd48:4c57:5900:ffff::1", 5000, "tunnel range"),
        ("::ffff:127.0.0.1", 5000, "embedded IPv4"),
        ("64:ff9b::7f00:1", 5000, "embedded IPv4"),
        ("2002:7f00:1::", 5000, "embedded IPv4"),
        ("203.0.113.9", 1024, None),
        ("100.128.0.1", 5000, None),
        ("192.0.2.1", 5000, None),
        ("10.0.0.1", 5000, None),
        ("2001:db8::1", 5000, None),
        ("fd48:4c57:5a00::1", 5000, None),
    ],
)
def test_addresses_that_no_peer_can_have_are_refused(
    host: str, port: int, reason: str | None
) -> None:
    assert refusal(Address(host, port)) == reason


def test_a_private_address_is_reached_from_a_socket_on_its_subnet_only() -> None:
    neighbour, stranger = Address("192.168.1.20", 5000), Address("192.168.2.20", 5000)
    assert reachable(HOST, neighbour)
    assert not reachable(HOST, stranger)
    assert not reachable(RELAYED, neighbour)
    unknown = Base(address=HERE, socket=HERE, priority=1)
    assert not reachable(unknown, neighbour)
    assert reachable(unknown, Address("203.0.113.9", 5000))
    assert not reachable(HOST, Address("fd00::5", 5000))
    assert not reachable(HOST, Address("2001:db8::5", 5000)), "families do not mix"
    assert reachable(RELAYED, Address("203.0.113.9", 5000))
