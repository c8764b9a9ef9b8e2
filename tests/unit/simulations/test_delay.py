"""What is said to the kernel's packet queues, and what is understood of their answers."""

from __future__ import annotations

import struct

import pytest

from simulations.kernel.delay import (
    HEADER,
    NF_ACCEPT,
    NFQA_PACKET_HDR,
    NLMSG_ERROR,
    PACKET,
    QUEUE_SUBSYSTEM,
    VERDICT,
    Delay,
    DelayError,
    message,
    packets_in,
    parse,
    verdict,
)


def packet(queue: int, number: int) -> bytes:
    header = struct.pack("!IHB", number, 0x0800, 0)
    return message(PACKET, queue, (9, b"\0" * 3), (NFQA_PACKET_HDR, header))


def error(code: int) -> bytes:
    body = struct.pack("=i", code) + bytes(16)
    return HEADER.pack(HEADER.size + len(body), NLMSG_ERROR, 0, 0, 0) + body


def test_a_delay_is_written_and_read() -> None:
    delay = Delay(queue=3, latency_us=20_000, jitter_us=5, loss=100)
    assert parse(str(delay)) == delay


@pytest.mark.parametrize("text", ["", "1:2:3", "1:-1:0:0", "70000:0:0:0", "1:0:0:10001", "a:b:c:d"])
def test_what_is_no_delay_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011, also int's own
        parse(text)


def test_packets_of_one_datagram_are_all_found() -> None:
    assert packets_in(packet(1, 7) + error(0) + packet(2, 9)) == [(1, 7), (2, 9)]


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
        assert packets_in(data[:length]) in ([], [(1, 7)])
    assert packets_in(bytes(64)) == []
