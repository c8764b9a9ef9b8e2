"""Holds packets back, as a long way would: a process that speaks to the kernel's packet queues.

The kernel puts a packet aside (`-j NFQUEUE`, or an nftables `queue`) and asks what to do with it;
this process says "accept" later, or "drop" by chance. Only numbers travel, no contents. It runs in
the namespace of the router whose packets it delays, one process for all queues of it:

    python -m simulations.kernel.delay 1:20000:0:0 2:20000:5000:100

Each argument is a queue with its latency and jitter in microseconds and its loss in parts per
10,000. Jitter is drawn evenly from 0 on, so packets overtake each other by it. A line "ready" is
printed once all queues are bound. A line of such arguments on standard input changes what becomes
of their queues from then on; the process ends when its standard input does.

The protocol is nfnetlink's (linux/netfilter/nfnetlink_queue.h): a netlink header, four bytes of
family, version and queue, then attributes; numbers in attributes are big-endian.
"""

from __future__ import annotations

import heapq
import os
import random
import select
import socket
import struct
import sys
import time
from typing import Final

import attrs

NETLINK_NETFILTER: Final = 12
SOL_NETLINK: Final = 270
NETLINK_NO_ENOBUFS: Final = 5
SO_RCVBUFFORCE: Final = 33
QUEUE_SUBSYSTEM: Final = 3
PACKET, VERDICT, CONFIG = 0, 1, 2
NLMSG_ERROR: Final = 2
NLM_F_REQUEST, NLM_F_ACK = 1, 4
NFQA_PACKET_HDR: Final = 1
NFQA_VERDICT_HDR: Final = 2
NFQA_CFG_CMD, NFQA_CFG_PARAMS, NFQA_CFG_QUEUE_MAXLEN = 1, 2, 3
COMMAND_BIND: Final = 1
COPY_META: Final = 1
NF_DROP, NF_ACCEPT = 0, 1
HEADER: Final = struct.Struct("=IHHII")
MAX_HELD: Final = 100_000
"""Packets that a queue may hold; the kernel drops what is more."""
RECEIVE_BUFFER_BYTES: Final = 8 << 20
PARTS: Final = 10_000
MAX_LINE: Final = 4_096
"""Bytes of a line on standard input; pipes keep such ones whole."""


class DelayError(Exception):
    """The kernel refused a queue; the message has its reason."""


@attrs.frozen(kw_only=True)
class Delay:
    """What becomes of the packets of one queue. `loss` in parts per 10,000."""

    queue: int
    latency_us: int = 0
    jitter_us: int = 0
    loss: int = 0

    def __str__(self) -> str:
        return f"{self.queue}:{self.latency_us}:{self.jitter_us}:{self.loss}"


def parse(text: str) -> Delay:
    """The inverse of `str(delay)`. Raises ValueError."""
    queue, latency_us, jitter_us, loss = (int(part) for part in text.split(":"))
    if not 0 <= queue <= 65_535 or min(latency_us, jitter_us) < 0 or not 0 <= loss <= PARTS:
        raise ValueError(f"{text!r} is no delay")
    return Delay(queue=queue, latency_us=latency_us, jitter_us=jitter_us, loss=loss)


# --- messages -------------------------------------------------------------------------------------


def message(kind: int, queue: int, *attributes: tuple[int, bytes], flags: int = 0) -> bytes:
    """One request to the subsystem of queues."""
    body = struct.pack("!BBH", 0, 0, queue)
    for number, value in attributes:
        padding = bytes(-len(value) % 4)
        body += struct.pack("=HH", 4 + len(value), number) + value + padding
    head = HEADER.pack(
        HEADER.size + len(body), QUEUE_SUBSYSTEM << 8 | kind, NLM_F_REQUEST | flags, 0, 0
    )
    return head + body


def verdict(queue: int, packet: int, decision: int) -> bytes:
    """What to do with a packet of a queue."""
    return message(VERDICT, queue, (NFQA_VERDICT_HDR, struct.pack("!II", decision, packet)))


def packets_in(data: bytes) -> list[tuple[int, int]]:
    """Queue and number of every packet that a datagram of the kernel tells of.

    Raises DelayError if it tells of an error.
    """
    found = []
    offset = 0
    while offset + HEADER.size <= len(data):
        length, kind, _, _, _ = HEADER.unpack_from(data, offset)
        if length < HEADER.size + 4 or offset + length > len(data):
            break
        if kind == NLMSG_ERROR:
            (code,) = struct.unpack_from("=i", data, offset + HEADER.size)
            if code not in {0, -2}:  # -2: a verdict on a packet that is gone already
                raise DelayError(f"the kernel refused: error {-code}")
        elif kind == QUEUE_SUBSYSTEM << 8 | PACKET:
            (queue,) = struct.unpack_from("!H", data, offset + HEADER.size + 2)
            number = _packet_number(data[offset + HEADER.size + 4 : offset + length])
            if number is not None:
                found.append((queue, number))
        offset += (length + 3) & ~3
    return found


def _packet_number(attributes: bytes) -> int | None:
    offset = 0
    while offset + 4 <= len(attributes):
        length, number = struct.unpack_from("=HH", attributes, offset)
        if length < 4:
            return None
        if number & 0x3FFF == NFQA_PACKET_HDR and offset + 8 <= len(attributes):
            (packet,) = struct.unpack_from("!I", attributes, offset + 4)
            return int(packet)
        offset += (length + 3) & ~3
    return None


# --- the process ----------------------------------------------------------------------------------


class Delayer:
    """Bound queues, and what is held of them."""

    def __init__(self, delays: list[Delay]) -> None:
        self._delays = {delay.queue: delay for delay in delays}
        self._held: list[tuple[int, int, int]] = []
        self._chance = random.Random()
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self.socket.bind((0, 0))
        self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        self.socket.setsockopt(SOL_NETLINK, NETLINK_NO_ENOBUFS, 1)
        for queue in self._delays:
            command = struct.pack("!BBH", COMMAND_BIND, 0, socket.AF_INET)
            self._configure(queue, (NFQA_CFG_CMD, command))
            self._configure(queue, (NFQA_CFG_PARAMS, struct.pack("!IB", 0, COPY_META)))
            self._configure(queue, (NFQA_CFG_QUEUE_MAXLEN, struct.pack("!I", MAX_HELD)))
        self.socket.setblocking(False)

    def run(self) -> None:
        """Until standard input ends."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        poll.register(sys.stdin, select.POLLIN)
        while True:
            wait_ms = None
            if self._held:
                # poll() waits whole milliseconds: the last one is spent awake
                wait_ms = max(0, (self._held[0][0] - time.monotonic_ns()) // 1_000_000)
            for descriptor, _ in poll.poll(wait_ms):
                if descriptor == self.socket.fileno():
                    self._take()
                elif line := os.read(sys.stdin.fileno(), MAX_LINE):
                    self.change(line.decode().split())
                else:
                    return
            self._release()

    def change(self, arguments: list[str]) -> None:
        """From now on some of the queues behave so. Raises ValueError for one that is not bound."""
        for delay in map(parse, arguments):
            if delay.queue not in self._delays:
                raise ValueError(f"queue {delay.queue} is not bound")
            self._delays[delay.queue] = delay

    def _take(self) -> None:
        for _ in range(64):
            try:
                data = self.socket.recv(1 << 16)
            except BlockingIOError:
                return
            now = time.monotonic_ns()
            for queue, packet in packets_in(data):
                delay = self._delays[queue]
                if delay.loss and self._chance.randrange(PARTS) < delay.loss:
                    self.socket.send(verdict(queue, packet, NF_DROP))
                    continue
                late_us = self._chance.randrange(delay.jitter_us + 1) if delay.jitter_us else 0
                due = now + (delay.latency_us + late_us) * 1_000
                heapq.heappush(self._held, (due, packet, queue))

    def _release(self) -> None:
        now = time.monotonic_ns()
        while self._held and self._held[0][0] <= now:
            _, packet, queue = heapq.heappop(self._held)
            self.socket.send(verdict(queue, packet, NF_ACCEPT))

    def _configure(self, queue: int, attribute: tuple[int, bytes]) -> None:
        self.socket.send(message(CONFIG, queue, attribute, flags=NLM_F_ACK))
        packets_in(self.socket.recv(1 << 16))


def main(arguments: list[str]) -> None:
    delayer = Delayer([parse(text) for text in arguments])
    print("ready", flush=True)  # noqa: T201, whoever started it waits for this line
    delayer.run()


if __name__ == "__main__":
    main(sys.argv[1:])
