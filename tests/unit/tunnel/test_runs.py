"""Runs of packets: nothing is lost or moved, and what is decided of one holds for each."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from tunnel.packet import ICMP, TCP, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, UDP, parse, runs, tcp_flags

PSH = 8


def ipv4(
    protocol: int, body: bytes, *, ends: bytes = b"\x0a\0\0\x01\x0a\0\0\x02", fragment: int = 0
) -> bytes:
    return (
        struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 7, fragment, 64, protocol, 0)
        + ends
        + body
    )


def ipv6(protocol: int, body: bytes) -> bytes:
    ends = bytes(15) + b"\1" + bytes(15) + b"\2"
    return struct.pack(">IHBB", 6 << 28, len(body), protocol, 64) + ends + body


def tcp(flags: int, *, port: int = 80, data: bytes = b"data", sequence: int = 1) -> bytes:
    return struct.pack(">HHIIBBHHH", 4_000, port, sequence, 0, 5 << 4, flags, 0, 0, 0) + data


def udp(*, port: int = 80, data: bytes = b"data") -> bytes:
    return struct.pack(">HHHH", 4_000, port, 8 + len(data), 0) + data


flags = st.sampled_from([TCP_ACK, TCP_ACK | PSH, TCP_SYN, TCP_ACK | TCP_FIN, TCP_RST, 0])
bodies = st.one_of(
    st.builds(
        lambda flags, port, data: (TCP, tcp(flags, port=port, data=data)),
        flags,
        st.sampled_from([80, 81]),
        st.sampled_from([b"", b"x" * 7]),
    ),
    st.builds(lambda port: (UDP, udp(port=port)), st.sampled_from([80, 81])),
    st.just((ICMP, struct.pack(">BBHHH", 8, 0, 0, 77, 1))),
)
packets = st.one_of(
    st.builds(
        lambda body, fragment, other: ipv4(
            *body, fragment=fragment, ends=b"\x0a\0\0\x01\x0a\0\0" + bytes([2 + other])
        ),
        bodies,
        st.sampled_from([0, 0x4000, 0x2000, 3]),
        st.booleans(),
    ),
    st.builds(lambda body: ipv6(*body), bodies),
    st.builds(lambda body, cut: ipv4(*body)[:cut], bodies, st.integers(0, 47)),
    st.binary(max_size=60),
)


@given(st.lists(packets, max_size=20))
def test_runs_keep_every_packet_in_order_and_share_all_that_is_decided_from(
    given_packets: list[bytes],
) -> None:
    found = list(runs(given_packets))
    assert [packet for _, run in found for packet in run] == given_packets
    for header, run in found:
        assert header == parse(run[-1])
        if len(run) == 1:
            continue
        assert header is not None
        for packet in run:
            own = parse(packet)
            assert own is not None
            assert own._replace(length=0) == header._replace(length=0)
            assert own.fragment is None
            assert not tcp_flags(packet, own) & (TCP_SYN | TCP_FIN | TCP_RST)
            assert own.protocol == UDP or tcp_flags(packet, own) & TCP_ACK


def test_the_segments_of_a_download_are_one_run() -> None:
    segments = [tcp(TCP_ACK, sequence=number) for number in range(40)] + [tcp(TCP_ACK | PSH)]
    for build in (ipv4, ipv6):
        ((_, run),) = runs([build(TCP, segment) for segment in segments])
        assert len(run) == 41
    ((_, run),) = runs([ipv6(UDP, udp(data=b"x" * size)) for size in range(1, 9)])
    assert len(run) == 8


def test_the_end_of_a_flow_is_a_run_of_its_own() -> None:
    data, end = ipv4(TCP, tcp(TCP_ACK)), ipv4(TCP, tcp(TCP_ACK | TCP_FIN))
    assert [run for _, run in runs([data, data, end, end, data])] == [
        [data, data],
        [end],
        [end],
        [data],
    ]
