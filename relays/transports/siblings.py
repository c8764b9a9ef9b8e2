"""Datagrams between the processes of one relay, through pairs of AF_UNIX sockets that the parent
made: nobody else can send there. See `relays.processes.siblings`."""

from __future__ import annotations

import socket
from typing import Final

import trio

from relays.processes.siblings import sibling_of
from relays.server import Server
from relays.transports.udp import UdpSockets
from runtime.clock import Clock
from runtime.guard import Guard

DATAGRAMS_PER_TURN: Final = 64
_MAX_BYTES: Final = 65_536 + 64


class Siblings:
    """An outlet to the siblings, and what comes from them."""

    def __init__(
        self,
        *,
        inbox: socket.socket,
        posts: list[socket.socket | None],
        slices: list[tuple[int, int]],
        clock: Clock,
    ) -> None:
        self._inbox = inbox
        self._posts = posts
        self._slices = slices
        self._clock = clock
        self._guard = Guard("relay")
        self._view = memoryview(bytearray(_MAX_BYTES))

    def send(self, data: bytes | memoryview, destination: tuple[str, int]) -> bool:
        at = sibling_of(destination[1], self._slices)
        post = None if at is None else self._posts[at]
        if post is None:
            return False
        try:
            post.send(data, socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

    async def run(self, server: Server, sockets: UdpSockets) -> None:
        """Hand what siblings send to the core, until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._inbox)
            now = self._clock.monotonic_ns()
            for _ in range(DATAGRAMS_PER_TURN):
                try:
                    size = self._inbox.recv_into(self._view, 0, socket.MSG_DONTWAIT)
                except OSError:
                    break
                with self._guard:
                    server.receive_from_sibling(self._view[:size], now)
                    sockets.flush(server)
