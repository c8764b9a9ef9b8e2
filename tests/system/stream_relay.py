"""A relay's listeners for TCP and TLS in this process, and our own client on a stream to them."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import attrs
import trio

from relays.authentication import StaticCredentials
from relays.client import Allocated, Event, Permitted, Received, TurnClient
from relays.framing import StreamFrames, padding_of
from relays.peers import PeerPolicy
from relays.server import Server
from relays.transports.statistics import TransportStatistics
from relays.transports.stream import StreamLimits, StreamSockets
from relays.transports.tls import CertificateSource
from relays.transports.udp import UdpSockets
from runtime.clock import SystemClock
from runtime.net.address import Address
from runtime.net.tcp import connect_tcp
from runtime.net.udp import UdpSocket
from runtime.randomness import SystemRandomness

HOST = "127.0.0.1"
PEER_HOST = "127.0.0.2"
CLOCK, RANDOMNESS = SystemClock(), SystemRandomness()
PATIENCE_S = 20.0

E = TypeVar("E")


@attrs.frozen(kw_only=True)
class StreamRelay:
    server: Server
    sockets: UdpSockets
    streams: StreamSockets
    certificates: CertificateSource
    tcp: Address
    tls: Address

    def counts(self, transport: str = "tcp") -> TransportStatistics:
        return self.streams.transports()[transport]


@asynccontextmanager
async def stream_relay(
    limits: StreamLimits | None = None,
    chain: Path | None = None,
    key: Path | None = None,
    host: str = HOST,
    inside: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> AsyncIterator[StreamRelay]:
    """Relays to PEER_HOST; the user is alice. The listeners are opened `inside` of a block."""
    sockets = UdpSockets(bind_hosts={1: host}, clock=CLOCK)
    server = Server(
        credentials=StaticCredentials({"alice": "opensesame"}),
        realm="holloway",
        relay_addresses={1: host},
        own_addresses=frozenset({host}),
        sockets=sockets,
        randomness=RANDOMNESS,
        peers=PeerPolicy.of(allowed_peer_ranges=["127.0.0.0/8"]),
        now=CLOCK.monotonic_ns(),
        unix_s=int(datetime.now(UTC).timestamp()),
    )
    streams = StreamSockets(server=server, sockets=sockets, clock=CLOCK, limits=limits)
    certificates = CertificateSource(chain, key, datetime.now(UTC))
    try:
        with inside():
            tcp = streams.listen(Address(host, 0))
            tls = streams.listen(Address(host, 0), certificates)
        relay = StreamRelay(
            server=server,
            sockets=sockets,
            streams=streams,
            certificates=certificates,
            tcp=tcp,
            tls=tls,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sockets.run, server)
            nursery.start_soon(streams.run)
            yield relay
            nursery.cancel_scope.cancel()
    finally:
        streams.close_all()
        sockets.close_all()


class StreamClient:
    """`TurnClient` on a stream that is driven by whoever waits for something."""

    def __init__(self, stream: trio.abc.Stream, server: Address) -> None:
        self.stream = stream
        self.frames = StreamFrames()
        self.turn = TurnClient(
            server=server,
            username="alice",
            password="opensesame",
            family="ipv4",
            randomness=RANDOMNESS,
            now=CLOCK.monotonic_ns(),
        )
        self._events: list[Event] = []

    async def speak(self) -> None:
        said = self.turn.drain_datagrams()
        if said:
            await self.stream.send_all(b"".join(each + padding_of(each) for each in said))

    async def event(self, kind: type[E]) -> E:
        """The next event of this kind; others before it are dropped."""
        with trio.fail_after(PATIENCE_S):
            while True:
                while self._events:
                    event = self._events.pop(0)
                    if isinstance(event, kind):
                        return event
                await self.speak()
                data = await self.stream.receive_some(65_536)
                if not data:
                    raise EOFError
                for frame in self.frames.feed(bytes(data)):
                    self.turn.receive(frame, CLOCK.monotonic_ns())
                self._events += self.turn.drain_events()

    async def begin(self, peer: Address) -> Allocated:
        """Get an allocation, a permission for `peer`, and an echo of it: before one, an address
        gets little."""
        allocated = await self.event(Allocated)
        self.turn.permit(peer, CLOCK.monotonic_ns())
        await self.event(Permitted)
        self.turn.send(peer, b"hello", CLOCK.monotonic_ns())
        assert await self.receive() == b"hello"
        return allocated

    async def receive(self) -> bytes:
        return (await self.event(Received)).data


def any_certificate() -> ssl.SSLContext:
    """Of a client that believes whoever answers: what is shown is looked at afterwards."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@asynccontextmanager
async def dialled(
    relay: StreamRelay, transport: str = "tcp", context: ssl.SSLContext | None = None
) -> AsyncIterator[StreamClient]:
    """A client on a connection to the relay."""
    where = relay.tls if transport == "tls" else relay.tcp
    stream: trio.abc.Stream = await connect_tcp(where)
    if transport == "tls":
        stream = trio.SSLStream(stream, context or any_certificate(), https_compatible=True)
    async with stream:
        yield StreamClient(stream, where)


@asynccontextmanager
async def echoing_peer() -> AsyncIterator[Address]:
    async with trio.open_nursery() as nursery:
        with UdpSocket.bind(Address(PEER_HOST, 0)) as socket:

            async def echo() -> None:
                while True:
                    await socket.wait_readable()
                    for data, sender in socket.receive_batch():
                        socket.send(data, sender)

            nursery.start_soon(echo)
            try:
                yield socket.local_address
            finally:
                nursery.cancel_scope.cancel()
                await trio.lowlevel.cancel_shielded_checkpoint()


async def until(holds: Callable[[], bool], what: str) -> None:
    with trio.move_on_after(PATIENCE_S):
        while not holds():
            await trio.sleep(0.01)
        return
    raise AssertionError(f"{what}: not within {PATIENCE_S} s")
