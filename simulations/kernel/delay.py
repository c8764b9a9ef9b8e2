"""Holds packets back, as a long way would: a process that speaks to the kernel's packet queues.

The kernel puts a packet aside (`-j NFQUEUE`, or an nftables `queue`) and asks what to do with it;
this process says "accept" later, or "drop" by chance. It runs in the namespace of the router whose
packets it delays, one process for all queues of it:

    python -m simulations.kernel.delay 1:20000:0:0:1000:0:0:0:7 2:20000:5000:10000:1000:0:0:0:8

Each argument is a `Delay`. What befalls a packet is drawn in the order of `simulations.net.links`:
lost, corrupted, late by jitter (which reorders nothing), held back so that later ones overtake it,
duplicated. Contents travel only for a queue that corrupts or duplicates; a copy is sent by a raw
socket, with the mark COPY where its queue is on the way out, so that it does not come back.

A line "ready" is printed once all queues are bound. A line of such arguments on standard input
changes what becomes of their queues from then on; the process ends when its standard input does.

The protocol is nfnetlink's (linux/netfilter/nfnetlink_queue.h): a netlink header, four bytes of
family, version and queue, then attributes; numbers in attributes are big-endian.
"""

from __future__ import annotations

import contextlib
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
NFQA_PAYLOAD: Final = 10
NFQA_CFG_CMD, NFQA_CFG_PARAMS, NFQA_CFG_QUEUE_MAXLEN = 1, 2, 3
COMMAND_BIND: Final = 1
COPY_META, COPY_PACKET = 1, 2
NF_DROP, NF_ACCEPT = 0, 1
HEADER: Final = struct.Struct("=IHHII")
MAX_HELD: Final = 100_000
"""Packets that a queue may hold; the kernel drops what is more."""
RECEIVE_BUFFER_BYTES: Final = 8 << 20
RECEIVE_BYTES: Final = 1 << 17
"""More than the kernel says of one packet, with its contents."""
PARTS: Final = 1_000_000
BURST_PARTS: Final = 1_000
OVERTAKEN_NS: Final = 20_000_000
"""So much later comes who is overtaken, as in virtual time."""
COPY: Final = 0x686C77
UDP: Final = 17
IPV4_HEADER, IPV6_HEADER, UDP_HEADER = 20, 40, 8
MAX_LINE: Final = 4_096
"""Bytes of a line on standard input; pipes keep such ones whole."""


class DelayError(Exception):
    """The kernel refused a queue; the message has its reason."""


@attrs.frozen(kw_only=True)
class Delay:
    """What becomes of the packets of one queue. Shares are in parts per million; `burst` is the
    mean length of a burst of losses in thousandths of packets. An odd queue is on the way out of
    its router. `seed` is what its first packet's fate is drawn from."""

    queue: int
    latency_us: int = 0
    jitter_us: int = 0
    loss: int = 0
    burst: int = BURST_PARTS
    duplication: int = 0
    reordering: int = 0
    corruption: int = 0
    seed: int = 0

    def __str__(self) -> str:
        return ":".join(map(str, attrs.astuple(self)))

    @property
    def needs_contents(self) -> bool:
        return bool(self.duplication or self.corruption)


def parse(text: str) -> Delay:
    """The inverse of `str(delay)`. Raises ValueError."""
    queue, latency_us, jitter_us, loss, burst, *further = (int(part) for part in text.split(":"))
    duplication, reordering, corruption, seed = further
    shares = (loss, duplication, reordering, corruption)
    if (
        not 0 <= queue <= 65_535
        or min(latency_us, jitter_us, seed) < 0
        or not all(0 <= share <= PARTS for share in shares)
        or burst < BURST_PARTS
    ):
        raise ValueError(f"{text!r} is no delay")
    return Delay(
        queue=queue,
        latency_us=latency_us,
        jitter_us=jitter_us,
        loss=loss,
        burst=burst,
        duplication=duplication,
        reordering=reordering,
        corruption=corruption,
        seed=seed,
    )


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


def verdict(queue: int, packet: int, decision: int, contents: bytes = b"") -> bytes:
    """What to do with a packet of a queue. `contents`: in place of what was in it."""
    attributes = [(NFQA_VERDICT_HDR, struct.pack("!II", decision, packet))]
    if contents:
        attributes.append((NFQA_PAYLOAD, contents))
    return message(VERDICT, queue, *attributes)


Told = tuple[int, int, bytes]
"""Queue and number of a packet, and its contents if its queue has them told."""


def packets_in(data: bytes) -> list[Told]:
    """Every packet that a datagram of the kernel tells of.

    Raises DelayError if it tells of an error.
    """
    found: list[Told] = []
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
            number, contents = _packet(data[offset + HEADER.size + 4 : offset + length])
            if number is not None:
                found.append((queue, number, contents))
        offset += (length + 3) & ~3
    return found


def _packet(attributes: bytes) -> tuple[int | None, bytes]:
    """Its number and contents."""
    found, contents, offset = None, b"", 0
    while offset + 4 <= len(attributes):
        length, number = struct.unpack_from("=HH", attributes, offset)
        if length < 4:
            break
        value = attributes[offset + 4 : offset + length]
        if number & 0x3FFF == NFQA_PACKET_HDR and len(value) >= 4:
            (found,) = struct.unpack_from("!I", value)
        elif number & 0x3FFF == NFQA_PAYLOAD and len(value) == length - 4:
            contents = value
        offset += (length + 3) & ~3
    return found, contents


# --- what befalls a packet ------------------------------------------------------------------------


@attrs.define
class Fate:
    """How late a packet comes, and with which contents; `late_ns` None: it is lost."""

    late_ns: int | None
    contents: bytes = b""
    """Empty: as they were."""
    copied: bool = False


class Chance:
    """Draws what befalls the packets of one queue; `delay` may be set at any time."""

    def __init__(self, delay: Delay) -> None:
        self.delay = delay
        self._draw = random.Random(delay.seed).random
        self._bad = False
        self._last = 0

    def befalls(self, now: int, contents: bytes) -> Fate:
        """For a packet that comes now, an instant in ns."""
        delay, draw = self.delay, self._draw
        if delay.loss and self._is_lost(delay.loss / PARTS, delay.burst / BURST_PARTS):
            return Fate(None)
        changed = b""
        if delay.corruption and draw() * PARTS < delay.corruption:
            changed = flipped(contents, draw())
        arrives = now + delay.latency_us * 1_000
        if delay.jitter_us:
            arrives += int(draw() * delay.jitter_us * 1_000)
        arrives = max(arrives, self._last)
        if delay.reordering and draw() * PARTS < delay.reordering:
            arrives += OVERTAKEN_NS
        else:
            self._last = arrives
        copied = bool(delay.duplication) and draw() * PARTS < delay.duplication
        return Fate(arrives - now, changed, copied)

    def _is_lost(self, share: float, burst: float) -> bool:
        """Bursts by Gilbert and Elliott: a bad state loses all and lasts `burst` packets."""
        if burst <= 1 or share >= 1:
            return self._draw() < share
        end = 1 / burst
        if self._draw() < (end if self._bad else min(1.0, end * share / (1 - share))):
            self._bad = not self._bad
        return self._bad


def flipped(packet: bytes, where: float) -> bytes:
    """An IP packet with one bit of its data flipped, `where` (from 0 to 1) in it: past the checksum
    of UDP, while TCP and all others notice it by theirs. Empty if there is no data."""
    if len(packet) < IPV4_HEADER:
        return b""
    if packet[0] >> 4 == 6:
        transport, protocol = IPV6_HEADER, packet[6]
    else:
        transport, protocol = (packet[0] & 0xF) * 4, packet[9]
    is_udp = protocol == UDP and len(packet) >= transport + UDP_HEADER
    begin = transport + UDP_HEADER if is_udp else transport
    if len(packet) <= begin:
        return b""
    bit = int(where * 8 * (len(packet) - begin))
    at = begin + (bit >> 3)
    changed = bytearray(packet)
    changed[at] ^= 1 << (bit & 7)
    if is_udp:
        _mend(changed, transport + 6, transport, at, packet[at])
    return bytes(changed)


def _mend(packet: bytearray, checksum: int, begin: int, at: int, before: int) -> None:
    """Have the checksum of UDP know of a byte that has changed (RFC 1624, equation 3)."""
    (old,) = struct.unpack_from("!H", packet, checksum)
    if not old:  # there is none
        return
    shift = 0 if (at - begin) & 1 else 8
    total = (~old & 0xFFFF) + (~(before << shift) & 0xFFFF) + (packet[at] << shift)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    struct.pack_into("!H", packet, checksum, ~total & 0xFFFF or 0xFFFF)


class Copies:
    """Sends packets a second time, by raw sockets."""

    def __init__(self) -> None:
        self._sockets: dict[tuple[bool, bool], socket.socket] = {}

    def send(self, packet: bytes, *, outward: bool) -> None:
        """Lost is what the kernel does not take."""
        v6 = packet[0] >> 4 == 6
        packed = packet[24:40] if v6 else packet[16:20]
        family = socket.AF_INET6 if v6 else socket.AF_INET
        with contextlib.suppress(OSError):
            self._socket(v6, outward).sendto(packet, (socket.inet_ntop(family, packed), 0))

    def _socket(self, v6: bool, outward: bool) -> socket.socket:
        found = self._sockets.get((v6, outward))
        if found is None:
            family = socket.AF_INET6 if v6 else socket.AF_INET
            found = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
            found.setblocking(False)
            if outward:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, COPY)
            self._sockets[v6, outward] = found
        return found


# --- the process ----------------------------------------------------------------------------------


class Delayer:
    """Bound queues, and what is held of them."""

    def __init__(self, delays: list[Delay]) -> None:
        self._chances = {delay.queue: Chance(delay) for delay in delays}
        self._held: list[tuple[int, int, int, bytes, bytes]] = []
        self._copies = Copies()
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self.socket.bind((0, 0))
        self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        self.socket.setsockopt(SOL_NETLINK, NETLINK_NO_ENOBUFS, 1)
        for delay in delays:
            command = struct.pack("!BBH", COMMAND_BIND, 0, socket.AF_INET)
            self._configure(delay.queue, (NFQA_CFG_CMD, command))
            self._configure(delay.queue, _told_of(delay))
            self._configure(delay.queue, (NFQA_CFG_QUEUE_MAXLEN, struct.pack("!I", MAX_HELD)))
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
            if delay.queue not in self._chances:
                raise ValueError(f"queue {delay.queue} is not bound")
            self._chances[delay.queue].delay = delay
            self.socket.send(message(CONFIG, delay.queue, _told_of(delay)))

    def _take(self) -> None:
        for _ in range(64):
            try:
                data = self.socket.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return
            now = time.monotonic_ns()
            for queue, packet, contents in packets_in(data):
                fate = self._chances[queue].befalls(now, contents)
                if fate.late_ns is None:
                    self.socket.send(verdict(queue, packet, NF_DROP))
                    continue
                copy = (fate.contents or contents) if fate.copied else b""
                held = (now + fate.late_ns, packet, queue, fate.contents, copy)
                heapq.heappush(self._held, held)

    def _release(self) -> None:
        now = time.monotonic_ns()
        while self._held and self._held[0][0] <= now:
            _, packet, queue, changed, copy = heapq.heappop(self._held)
            self.socket.send(verdict(queue, packet, NF_ACCEPT, changed))
            if copy:
                self._copies.send(copy, outward=bool(queue & 1))

    def _configure(self, queue: int, attribute: tuple[int, bytes]) -> None:
        self.socket.send(message(CONFIG, queue, attribute, flags=NLM_F_ACK))
        packets_in(self.socket.recv(RECEIVE_BYTES))


def _told_of(delay: Delay) -> tuple[int, bytes]:
    """How much of its packets the kernel tells."""
    if delay.needs_contents:
        return NFQA_CFG_PARAMS, struct.pack("!IB", 0xFFFF, COPY_PACKET)
    return NFQA_CFG_PARAMS, struct.pack("!IB", 0, COPY_META)


def main(arguments: list[str]) -> None:
    delayer = Delayer([parse(text) for text in arguments])
    print("ready", flush=True)  # noqa: T201, whoever started it waits for this line
    delayer.run()


if __name__ == "__main__":
    main(sys.argv[1:])
