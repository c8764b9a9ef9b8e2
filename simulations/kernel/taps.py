"""Sees the packets of namespaces, as a tap on each of their devices would (packet(7)).

One thread reads all sockets; instants are those at which the kernel saw a packet, on the machine's
monotonic clock. What it has no time for the kernel drops, and `unseen` counts.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final

import attrs

from simulations.kernel.lab import Host

ALL_PROTOCOLS: Final = 3
IP_PROTOCOLS: Final = (0x0800, 0x86DD)
SO_TIMESTAMPNS: Final = 35
SO_RCVBUFFORCE: Final = 33
SOL_PACKET: Final = 263
PACKET_STATISTICS: Final = 6
PACKET_OUTGOING: Final = 4
BUFFER_BYTES: Final = 16 << 20
PACKET_BYTES: Final = 1 << 16
BATCH: Final = 64
_TIME: Final = struct.Struct("@qq")


@attrs.frozen
class Seen:
    """An IP packet at one device of a host, `outgoing` or coming in."""

    at_ns: int
    host: str
    device: str
    outgoing: bool
    packet: bytes


class Taps:
    """Tells `take` of every packet of these hosts, from another thread, while it is entered."""

    def __init__(self, hosts: Mapping[str, Host], take: Callable[[Seen], None]) -> None:
        self._hosts = hosts
        self._take = take
        self._sockets: dict[str, socket.socket] = {}
        self._thread = threading.Thread(target=self._read, name="taps", daemon=True)
        self._stop, self._stopped = os.pipe()
        self._ahead_ns = time.time_ns() - time.monotonic_ns()
        self.seen = 0
        self.unseen = 0

    def __enter__(self) -> Taps:
        for name, host in self._hosts.items():
            with host.entered():
                tap = socket.socket(
                    socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ALL_PROTOCOLS)
                )
            tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
            tap.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            tap.setblocking(False)
            self._sockets[name] = tap
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take what has been seen, and no more. May be called again."""
        if self._stopped < 0:
            return
        os.close(self._stopped)
        self._stopped = -1
        self._thread.join()
        os.close(self._stop)
        for tap in self._sockets.values():
            counts = tap.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
            self.unseen += struct.unpack("=II", counts)[1]
            tap.close()

    def _read(self) -> None:
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._stop, selectors.EVENT_READ, "")
            for name, tap in self._sockets.items():
                waiting.register(tap, selectors.EVENT_READ, name)
            ending = False
            while not ending:
                ready = waiting.select()
                ending = any(key.fileobj == self._stop for key, _ in ready)
                for key, _ in ready:
                    if key.data:
                        self._drain(key.data, self._sockets[key.data], whole=ending)

    def _drain(self, name: str, tap: socket.socket, *, whole: bool) -> None:
        taken = 0
        with contextlib.suppress(BlockingIOError):
            while whole or taken < BATCH:
                taken += 1
                try:
                    packet, notes, _, source = tap.recvmsg(PACKET_BYTES, 64)
                except OSError as error:
                    if isinstance(error, BlockingIOError):
                        raise
                    continue  # a device is gone: told once
                if source[1] in IP_PROTOCOLS and packet:
                    self.seen += 1
                    outgoing = source[2] == PACKET_OUTGOING
                    self._take(Seen(self._instant(notes), name, source[0], outgoing, packet))

    def _instant(self, notes: list[tuple[int, int, bytes]]) -> int:
        for level, kind, data in notes:
            if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
                seconds, ns = _TIME.unpack_from(data)
                return int(seconds) * 10**9 + int(ns) - self._ahead_ns
        return time.monotonic_ns()
