"""Lines between the parent of a relay's processes and a worker, over a pair of sockets."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import trio

from relays.processes.messages import MAX_LINE_BYTES

_RECEIVE_BYTES = 65_536


class Link:
    """One end. Reading and writing may go on at the same time, each in one task."""

    def __init__(self, end: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(end))

    async def send(self, line: bytes) -> None:
        """Raises trio.BrokenResourceError when the other end is gone."""
        await self._stream.send_all(line)

    async def lines(self) -> AsyncIterator[bytes]:
        """Until the other end is gone, or sends a line that is too long."""
        held = bytearray()
        while len(held) <= MAX_LINE_BYTES:
            try:
                received = await self._stream.receive_some(_RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not received:
                return
            held += received
            *whole, rest = held.split(b"\n") if b"\n" in received else (held,)
            for line in whole:
                yield bytes(line)
            held = rest

    def close(self) -> None:
        self._stream.socket.close()
