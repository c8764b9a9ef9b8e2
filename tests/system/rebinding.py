"""A NAT on loopback, for tests of what happens when one changes its mind."""

from __future__ import annotations

import trio

from runtime.net.address import Address
from runtime.net.udp import UdpSocket

ANY = Address("127.0.0.1", 0)


class Rebinding:
    """A NAT in front of one client, which may get another outside port at any time."""

    def __init__(self, server: Address) -> None:
        self.server = server
        self.inside = UdpSocket.bind(ANY)
        self.outside = UdpSocket.bind(ANY)
        self.client: Address | None = None
        self._back = trio.Event()

    def rebind(self, host: str = "127.0.0.1") -> None:
        old, self.outside = self.outside, UdpSocket.bind(Address(host, 0))
        old.close()

    def go_away(self) -> None:
        """Close the inside port: the client's datagrams are refused by the kernel."""
        self.inside.close()
        self._back = trio.Event()

    def come_back(self) -> None:
        """Open the same inside port again."""
        self.inside = UdpSocket.bind(self.inside.local_address)
        self._back.set()

    async def run(self) -> None:
        """Carry datagrams until cancelled; then close."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.outward)
                nursery.start_soon(self.inward)
        finally:
            self.inside.close()
            self.outside.close()

    async def outward(self) -> None:
        while True:
            try:
                await self.inside.wait_readable()
            except trio.ClosedResourceError:
                await self._back.wait()
                continue
            for data, client in self.inside.receive_batch():
                self.client = client
                self.outside.send(data, self.server)

    async def inward(self) -> None:
        while True:
            outside = self.outside
            try:
                await outside.wait_readable()
            except trio.ClosedResourceError:
                continue
            for data, _ in outside.receive_batch():
                if self.client is not None:
                    self.inside.send(data, self.client)
