"""What is said to the kernel's packet queues, and what is understood of their answers."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from itertools import pairwise

import pytest

from simulations.kernel.delay import (
    HEADER,
    NF_ACCEPT,
    NFQA_PACKET_HDR,
    NLMSG_ERROR,
    OVERTAKEN_NS,
    PACKET,
    QUEUE_SUBSYSTEM,
    UDP,
    VERDICT,
    Chance,
    Delay,
    DelayError,
    Fate,
    flipped,
    message,
    packets_in,
    parse,
    verdict,
)

TCP = 6


def packet(queue: int, number: int) -> bytes:
    header = struct.pack("!IHB", number, 0x0800, 0)
    return message(PACKET, queue, (9, b"\0" * 3), (NFQA_PACKET_HDR, header))


def error(code: int) -> bytes:
    body = struct.pack("=i", code) + bytes(16)
    return HEADER.pack(HEADER.size + len(body), NLMSG_ERROR, 0, 0, 0) + body


def test_a_delay_is_written_and_read() -> None:
    delay = Delay(queue=3, latency_us=20_000, jitter_us=5, loss=100, burst=2_500, seed=1 << 63)
    assert parse(str(delay)) == delay


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1:2:3",
        "1:-1:0:0:1000:0:0:0:0",
        "70000:0:0:0:1000:0:0:0:0",
        "1:0:0:1000001:1000:0:0:0:0",
        "1:0:0:0:999:0:0:0:0",
        "1:0:0:0:1000:0:0:0:0:0",
        "a:b:c:d",
    ],
)
def test_what_is_no_delay_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011, also int's own
        parse(text)


def test_packets_of_one_datagram_are_all_found() -> None:
    assert packets_in(packet(1, 7) + error(0) + packet(2, 9)) == [(1, 7, b""), (2, 9, b"")]


def test_a_verdict_names_queue_packet_and_decision() -> None:
    data = verdict(5, 77, NF_ACCEPT)
    length, kind, _, _, _ = HEADER.unpack_from(data)
    assert length == len(data)
    assert kind == QUEUE_SUBSYSTEM << 8 | VERDICT
    assert struct.unpack_from("!H", data, HEADER.size + 2) == (5,)
    assert data.endswith(struct.pack("!II", NF_ACCEPT, 77))


def test_a_refusal_is_an_error_but_a_packet_that_is_gone_is_none() -> None:
    assert packets_in(error(-2)) == []
    with pytest.raises(DelayError, match="error 1"):
        packets_in(error(-1))


def test_what_is_cut_short_says_nothing() -> None:
    data = packet(1, 7)
    for length in range(len(data)):
        assert packets_in(data[:length]) in ([], [(1, 7, b"")])
    assert packets_in(bytes(64)) == []


# --- what befalls a packet ------------------------------------------------------------------------


def ip_packet(version: int, protocol: int, data: bytes) -> bytes:
    """With ports and a true checksum of UDP, if it is that."""
    source, destination = (ip_address(each).packed for each in ENDS[version])
    length = 8 + len(data)
    body = struct.pack("!HHHH", 1_000, 2_000, length, 0) + data
    if protocol == UDP:
        pseudo = source + destination + struct.pack("!IHBB", length, 0, 0, protocol)
        body = body[:6] + struct.pack("!H", summed(pseudo + body) ^ 0xFFFF) + body[8:]
    if version == 6:
        return struct.pack("!IHBB", 6 << 28, length, protocol, 64) + source + destination + body
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 1, 0, 64, protocol, 0)
    return head + source + destination + body


ENDS = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}


def summed(data: bytes) -> int:
    """The ones' complement sum (RFC 1071)."""
    words = struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2))
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def udp_sum(version: int, packet: bytes) -> int:
    """0xFFFF where the checksum is true."""
    begin = 40 if version == 6 else 20
    ends = packet[begin - (32 if version == 6 else 8) : begin]
    return summed(ends + struct.pack("!IHBB", len(packet) - begin, 0, 0, UDP) + packet[begin:])


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [1, 16, 33])
def test_a_flipped_bit_of_a_datagram_is_past_its_checksum(version: int, size: int) -> None:
    packet = ip_packet(version, UDP, bytes(range(size)))
    assert udp_sum(version, packet) == 0xFFFF
    places = set()
    for step in range(8 * size):
        changed = flipped(packet, (step + 0.5) / (8 * size))
        assert udp_sum(version, changed) == 0xFFFF
        begin = len(packet) - size
        assert changed[: begin - 2] == packet[: begin - 2]
        [(at, bits)] = [
            (at, one ^ other)
            for at, (one, other) in enumerate(zip(changed, packet, strict=True))
            if at >= begin and one != other
        ]
        assert bits.bit_count() == 1
        places.add((at, bits))
    assert len(places) == 8 * size


@pytest.mark.parametrize("version", [4, 6])
def test_a_flipped_bit_of_all_else_is_left_to_its_checksum(version: int) -> None:
    packet = ip_packet(version, TCP, b"segment")
    changed = flipped(packet, 0.9)
    assert sum((a ^ b).bit_count() for a, b in zip(changed, packet, strict=True)) == 1
    assert flipped(ip_packet(version, UDP, b""), 0.5) == b""
    assert flipped(b"", 0.5) == b""


def befallen(count: int = 20_000, every_ns: int = 1_000_000, **quality: int) -> list[Fate]:
    chance = Chance(Delay(queue=0, seed=7, **quality))
    return [chance.befalls(number * every_ns, b"") for number in range(count)]


def test_the_same_seed_has_the_same_befall() -> None:
    quality = {"loss": 200_000, "jitter_us": 5_000, "duplication": 100_000, "reordering": 100_000}
    assert befallen(500, **quality) == befallen(500, **quality)


def test_so_many_are_lost_copied_and_overtaken_as_is_said() -> None:
    lost = sum(fate.late_ns is None for fate in befallen(loss=100_000))
    copied = sum(fate.copied for fate in befallen(duplication=100_000))
    fates = befallen(reordering=100_000, latency_us=1_000)
    overtaken = sum(fate.late_ns == 1_000_000 + OVERTAKEN_NS for fate in fates)
    for count in (lost, copied, overtaken):
        assert 1_800 < count < 2_200


def test_losses_come_in_bursts_of_the_length_that_is_said() -> None:
    fates = befallen(100_000, loss=100_000, burst=4_000)
    lost = [fate.late_ns is None for fate in fates]
    bursts = sum(not before and now for before, now in pairwise(lost))
    assert 9_000 < sum(lost) < 11_000
    assert 3.6 < sum(lost) / bursts < 4.4


def test_jitter_alone_reorders_nothing() -> None:
    arrivals = [
        number * 1_000_000 + (fate.late_ns or 0)
        for number, fate in enumerate(befallen(1_000, jitter_us=30_000))
    ]
    assert arrivals == sorted(arrivals)
    assert len(set(arrivals)) > 100
