"""Whether a QUIC server can be reached by UDP, for the price of a datagram: a core, and its shell.

A datagram of a version that nobody speaks is answered by whoever speaks QUIC with those that he
does (Version Negotiation, RFC 9000, section 6.1), without a key, a state or a signature on either
side. The versions that look like 0x?a?a?a?a are reserved for this (section 15). The answer repeats
the connection ids of the question, which are random, so only who saw the question can give it; it
proves nothing else, so it is a reason to dial and no more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

import trio

from runtime.clock import NS_PER_S, SystemClock
from runtime.net.address import Address
from runtime.net.udp import UdpSocket

PROBE_BYTES: Final = 1200
TRIES: Final = 3
INTERVAL_NS: Final = 700_000_000
"""A datagram may be lost: so often it is sent, and so long an answer has each time."""

_CID_BYTES: Final = 8
_RESERVED_VERSION: Final = bytes.fromhex("1a2a3a4a")
_LONG_HEADER: Final = b"\xc0"
_NEGOTIATION: Final = bytes(4)
_VERSION_1: Final = bytes.fromhex("00000001")


def probe_datagram(destination_cid: bytes, source_cid: bytes) -> bytes:
    """The question. Both ids have 8 bytes, and are random."""
    ids = b"".join(bytes([len(each)]) + each for each in (destination_cid, source_cid))
    return (_LONG_HEADER + _RESERVED_VERSION + ids).ljust(PROBE_BYTES, b"\0")


def is_answer(data: bytes, destination_cid: bytes, source_cid: bytes) -> bool:
    """Whether a datagram answers the question with these ids."""
    ids = b"".join(bytes([len(each)]) + each for each in (source_cid, destination_cid))
    start = _NEGOTIATION + ids
    return len(data) > len(start) and data[0] & 0x80 != 0 and data[1:].startswith(start)


def negotiation(data: bytes) -> bytes | None:
    """The answer to a question, by a server that speaks QUIC version 1 (RFC 9000, section 17.2.1);
    None for other bytes. `aioquic` gives it by itself; this is for servers in virtual time."""
    if len(data) < PROBE_BYTES or not data.startswith(_LONG_HEADER + _RESERVED_VERSION):
        return None
    head = len(_LONG_HEADER + _RESERVED_VERSION)
    size = 1 + _CID_BYTES
    destination, source = data[head : head + size], data[head + size : head + 2 * size]
    if destination[0] != _CID_BYTES or source[0] != _CID_BYTES:
        return None
    return b"\x80" + _NEGOTIATION + source + destination + _VERSION_1


class QuicProbe:
    """Asks until there is an answer, TRIES times at most, from `now` on. `random_bytes` draws the
    ids. Times are monotonic nanoseconds."""

    def __init__(self, random_bytes: Callable[[int], bytes], now: int) -> None:
        self._ids = random_bytes(_CID_BYTES), random_bytes(_CID_BYTES)
        self._left = TRIES
        self._due = now
        self.outcome: bool | None = None
        """Whether who is there speaks QUIC with us; None while that is open."""

    def poll_timeout(self) -> int | None:
        """When `handle_timeout` is due; None once there is an outcome."""
        return self._due if self.outcome is None else None

    def handle_timeout(self, now: int) -> bytes | None:
        """The question, if it is to be sent now."""
        if self.outcome is not None or now < self._due:
            return None
        if not self._left:
            self.outcome = False
            return None
        self._left -= 1
        self._due = now + INTERVAL_NS
        return probe_datagram(*self._ids)

    def receive(self, data: bytes) -> None:
        """A datagram came from the address that was asked."""
        if self.outcome is None and is_answer(data, *self._ids):
            self.outcome = True


async def quic_answers(
    remote: Address, *, mark: int | None = None, source: str | None = None
) -> bool:
    """Whether who is there speaks QUIC with us, at this moment. Takes TRIES * INTERVAL_NS at most.
    Raises OSError when no socket can be had."""
    clock = SystemClock()
    probe = QuicProbe(os.urandom, clock.monotonic_ns())
    any_host = "::" if ":" in remote.host else "0.0.0.0"  # noqa: S104  # the kernel chooses
    with UdpSocket.bind(Address(source or any_host, 0), mark=mark, dont_fragment=True) as udp:
        while (due := probe.poll_timeout()) is not None:
            now = clock.monotonic_ns()
            if (question := probe.handle_timeout(now)) is not None:
                udp.send(question, remote)
                continue
            with trio.move_on_after(max(0, due - now) / NS_PER_S):
                await udp.wait_readable()
                for data, sender in udp.receive_batch():
                    if sender == remote:
                        probe.receive(bytes(data))
    return probe.outcome is True
