"""Packets: what is read, what is refused, and the two answers that are built."""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.packet import (
    ICMP,
    ICMPV6,
    TCP,
    TCP_ACK,
    TCP_RST,
    TCP_SYN,
    UDP,
    checksum,
    packet_length,
    parse,
    prohibited,
    quoted,
    reset,
    tcp_flags,
)


def ipv4(protocol: int, payload: bytes, *, source: str = "100.64.0.1", flags: int = 0) -> bytes:
    header = struct.pack(
        ">BBHHHBBH4s4s",
        0x45,
        0,
        20 + len(payload),
        7,
        flags,
        64,
        protocol,
        0,
        socket.inet_aton(source),
        socket.inet_aton("10.0.0.1"),
    )
    return header + payload


def ipv6(next_header: int, payload: bytes) -> bytes:
    ends = ip_address("fd48::1").packed + ip_address("fd00::1").packed
    return struct.pack(">IHBB", 6 << 28, len(payload), next_header, 64) + ends + payload


def tcp(flags: int, *, sequence: int = 100, acknowledgement: int = 7, data: bytes = b"") -> bytes:
    return (
        struct.pack(">HHIIBBHHH", 40_000, 80, sequence, acknowledgement, 0x50, flags, 0, 0, 0)
        + data
    )


UDP_DATAGRAM = struct.pack(">HHHH", 40_000, 53, 8, 0)


def reference_checksum(data: bytes) -> int:
    """RFC 1071, section 4.1, word by word."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@given(st.binary(max_size=300))
def test_the_checksum_is_the_one_of_rfc_1071(data: bytes) -> None:
    assert checksum(data) == reference_checksum(data)


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("build", [ipv4, ipv6])
def test_addresses_and_ports_are_read(protocol: int, build: object) -> None:
    payload = tcp(TCP_SYN) if protocol == TCP else struct.pack(">HHHH", 40_000, 80, 8, 0)
    packet = ipv4(protocol, payload) if build is ipv4 else ipv6(protocol, payload)
    header = parse(packet)
    assert header is not None
    assert (header.protocol, header.source_port, header.destination_port) == (protocol, 40_000, 80)
    assert header.fragment is None
    assert len(header.source) == (4 if build is ipv4 else 16)


def test_an_echo_has_its_identifier_on_the_side_that_asks() -> None:
    request = parse(ipv4(ICMP, struct.pack(">BBHHH", 8, 0, 0, 77, 1)))
    reply = parse(ipv6(ICMPV6, struct.pack(">BBHHH", 129, 0, 0, 77, 1)))
    assert request is not None
    assert request.is_echo_request
    assert (request.source_port, request.destination_port) == (77, 0)
    assert reply is not None
    assert reply.is_echo_reply
    assert (reply.source_port, reply.destination_port) == (0, 77)


def test_extension_headers_of_ipv6_are_walked() -> None:
    options = bytes([43, 0]) + bytes(6)
    routing = bytes([44, 0]) + bytes(6)
    fragment = struct.pack(">BBHI", UDP, 0, 1, 99)
    header = parse(ipv6(0, options + routing + fragment + UDP_DATAGRAM))
    assert header is not None
    assert (header.protocol, header.destination_port, header.fragment) == (UDP, 53, 99)
    assert header.first_fragment


def test_a_chain_of_extension_headers_has_a_limit() -> None:
    assert parse(ipv6(0, bytes([0, 0, 0, 0, 0, 0, 0, 0]) * 20)) is None


def test_later_fragments_have_no_ports() -> None:
    header = parse(ipv4(UDP, bytes(16), flags=185))
    assert header is not None
    assert (header.fragment, header.first_fragment) == (7, False)
    assert (header.source_port, header.destination_port) == (0, 0)


def test_a_refused_packet_is_answered_as_administratively_prohibited() -> None:
    refused = ipv4(UDP, UDP_DATAGRAM)
    answer = prohibited(refused)
    assert answer is not None
    header = parse(answer)
    assert header is not None
    assert (header.protocol, answer[20], answer[21]) == (ICMP, 3, 13)
    assert (header.source, header.destination) == (refused[16:20], refused[12:16])
    assert checksum(answer[:20]) == 0
    assert checksum(answer[20:]) == 0
    inside = quoted(answer, header)
    assert inside is not None
    assert inside.destination_port == 53


def test_a_refused_packet_of_ipv6_is_answered_too() -> None:
    answer = prohibited(ipv6(UDP, UDP_DATAGRAM + bytes(1232)))
    assert answer is not None
    assert len(answer) == 1280
    assert (answer[40], answer[41]) == (1, 1)
    pseudo = answer[8:40] + struct.pack(">II", len(answer) - 40, ICMPV6)
    assert checksum(pseudo + answer[40:]) == 0
    header = parse(answer)
    assert header is not None
    assert quoted(answer, header) is not None


def test_errors_and_later_fragments_are_never_answered() -> None:
    answer = prohibited(ipv4(UDP, UDP_DATAGRAM))
    assert answer is not None
    assert prohibited(answer) is None
    assert prohibited(ipv4(UDP, bytes(16), flags=185)) is None
    assert prohibited(ipv4(UDP, UDP_DATAGRAM, source="224.0.0.1")) is None
    assert prohibited(ipv4(UDP, UDP_DATAGRAM, source="0.0.0.0")) is None


def test_a_reset_of_a_syn_acknowledges_it() -> None:
    answer = reset(ipv4(TCP, tcp(TCP_SYN, data=b"hi")))
    assert answer is not None
    header = parse(answer)
    assert header is not None
    assert (header.source_port, header.destination_port) == (80, 40_000)
    assert tcp_flags(answer, header) == TCP_RST | TCP_ACK
    assert struct.unpack_from(">II", answer, 24) == (0, 103)
    pseudo = answer[12:20] + struct.pack(">BBH", 0, TCP, 20)
    assert checksum(pseudo + answer[20:]) == 0


def test_a_reset_of_an_established_flow_takes_its_acknowledgement() -> None:
    answer = reset(ipv6(TCP, tcp(TCP_ACK, acknowledgement=4_000)))
    assert answer is not None
    header = parse(answer)
    assert header is not None
    assert tcp_flags(answer, header) == TCP_RST
    assert struct.unpack_from(">II", answer, 44) == (4_000, 0)
    assert reset(answer) is None
    assert reset(ipv4(UDP, UDP_DATAGRAM)) is None


@given(st.binary(max_size=120), st.sampled_from([0x00, 0x45, 0x4F, 0x60]))
def test_no_bytes_raise(data: bytes, first: int) -> None:
    packet = bytes([first]) + data
    header = parse(packet)
    prohibited(packet)
    reset(packet)
    length = packet_length(packet)
    assert length is None or length <= len(packet)
    if header is not None:
        assert header.length == length
        quoted(packet, header)


@given(st.binary(min_size=20, max_size=120), st.sampled_from([1, 6, 17, 58, 0, 43, 44, 60]))
def test_no_well_sized_packet_raises(body: bytes, protocol: int) -> None:
    for packet in (ipv4(protocol, body), ipv6(protocol, body)):
        header = parse(packet)
        prohibited(packet)
        reset(packet)
        if header is not None:
            quoted(packet, header)
            tcp_flags(packet, header)


ADDRESSES_IPV4 = st.ip_addresses(v=4).map(lambda address: address.packed)
ADDRESSES_IPV6 = st.ip_addresses(v=6).map(lambda address: address.packed)
PORTS = st.integers(0, 65_535)


@given(
    ADDRESSES_IPV4, ADDRESSES_IPV4, PORTS, PORTS, st.sampled_from([TCP, UDP]),
    st.integers(0, 10), st.binary(max_size=40),
)  # fmt: skip
def test_every_header_of_ipv4_comes_back_as_it_was_written(
    source: bytes, destination: bytes, here: int, there: int, protocol: int, words: int, data: bytes
) -> None:
    transport = struct.pack(">HH", here, there) + bytes(16) + data
    offset = 20 + 4 * words
    length = offset + len(transport)
    packet = (
        struct.pack(">BBHHHBBH", 0x45 + words, 0, length, 7, 0, 64, protocol, 0)
        + source + destination + bytes([1]) * 4 * words + transport
    )  # fmt: skip
    header = parse(packet + b"padding")
    assert header is not None
    assert (header.source, header.destination) == (source, destination)
    assert (header.protocol, header.source_port, header.destination_port) == (protocol, here, there)
    assert (header.offset, header.length, header.fragment) == (offset, length, None)


@given(
    ADDRESSES_IPV6, ADDRESSES_IPV6, PORTS, PORTS, st.sampled_from([TCP, UDP]),
    st.lists(st.tuples(st.sampled_from([0, 43, 60]), st.integers(0, 2)), max_size=7),
    st.none() | st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_header_of_ipv6_comes_back_as_it_was_written(
    source: bytes,
    destination: bytes,
    here: int,
    there: int,
    protocol: int,
    extensions: list[tuple[int, int]],
    fragment: int | None,
) -> None:
    payload, following = struct.pack(">HH", here, there) + bytes(16), protocol
    if fragment is not None:
        payload = struct.pack(">BBHI", following, 0, 1, fragment) + payload
        following = 44
    for kind, units in reversed(extensions if fragment is None else extensions[:6]):
        payload = bytes([following, units]) + bytes(6 + 8 * units) + payload
        following = kind
    packet = struct.pack(">IHBB", 6 << 28, len(payload), following, 64)
    packet += source + destination + payload
    header = parse(packet)
    assert header is not None
    assert (header.source, header.destination) == (source, destination)
    assert (header.protocol, header.source_port, header.destination_port) == (protocol, here, there)
    assert (header.offset, header.length, header.fragment) == (
        len(packet) - 20, len(packet), fragment,
    )  # fmt: skip
