"""In which order an endpoint does what it has to do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from aioquic.quic.configuration import QuicConfiguration

from runtime.net.address import Address
from runtime.net.quic_connection import QuicConnection
from runtime.net.quic_core import QuicCore, QuicLimits
from runtime.net.quic_endpoint import Endpoint
from runtime.net.udp import UdpSocket

LIMITS = QuicLimits()
LOCALHOST = Address("127.0.0.1", 0)
MANY = 500


class Noting(Endpoint):
    """Notes what it is given to do. Each datagram may be one of a newcomer."""

    def __init__(self) -> None:
        super().__init__(UdpSocket.bind(LOCALHOST), LIMITS)
        self.notes: list[str] = []
        self.newcomers = 0
        self.are_newcomers = False
        self.is_done = trio.Event()

    def datagram(self, data: bytes, sender: Address) -> None:
        self.notes.append("heard")
        self.newcomers += self.are_newcomers

    @property
    def has_newcomers(self) -> bool:
        return self.newcomers > 0

    def take_in(self) -> None:
        self.newcomers -= 1
        self.notes.append("taken in")
        if not self.newcomers:
            self.is_done.set()

    def established(self, connection: QuicConnection) -> None: ...

    def forget(self, connection: QuicConnection) -> None: ...

    def shut_down(self) -> None: ...

    def _tick(self, connection: QuicConnection, now: float) -> None:
        self.notes.append("timer")
        if not self.are_newcomers:
            self.is_done.set()

    def hear_of(self, count: int) -> None:
        """Somebody sends so much, and then a timer is due."""
        with UdpSocket.bind(LOCALHOST) as somebody:
            for _ in range(count):
                assert somebody.send(bytes(30), self.socket.local_address)
        core = QuicCore(QuicConfiguration(is_client=True), LIMITS.receive_window_bytes)
        self._schedule(QuicConnection(core, self, LOCALHOST), trio.current_time())


@asynccontextmanager
async def keeping_time() -> AsyncIterator[Noting]:
    """An endpoint that keeps time; whoever reads its socket waits for ever."""
    endpoint = Noting()
    endpoint._reader_waits = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint._keep_time)
        yield endpoint
        nursery.cancel_scope.cancel()
    endpoint.socket.close()


async def test_what_has_come_is_heard_before_a_timer_says_that_it_did_not() -> None:
    async with keeping_time() as endpoint:
        endpoint.hear_of(MANY)
        with trio.fail_after(5):
            await endpoint.is_done.wait()
        assert endpoint.notes == ["heard"] * MANY + ["timer"]


async def test_newcomers_that_are_heard_before_a_timer_are_taken_in_though_nobody_reads() -> None:
    async with keeping_time() as endpoint:
        endpoint.are_newcomers = True
        endpoint.hear_of(3)
        with trio.fail_after(5):
            await endpoint.is_done.wait()
        assert endpoint.notes == ["heard"] * 3 + ["timer"] + ["taken in"] * 3
