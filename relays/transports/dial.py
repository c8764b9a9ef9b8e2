"""Connections to a relay over QUIC, TLS and TCP, for agents whose UDP does not get through.

A connection carries what `relays.client.TurnClient` has to say, message by message. `send` never
waits: above QUEUED_DATA_BYTES under way, data is dropped, as a full router would do, and
when requests do not fit either, the connection is over. The server of TLS and QUIC is known by its
pin alone, judged before anything but the handshake is sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Final, Protocol

import trio

from channel.relay_doors import (
    QUIC_ALPN,
    STREAM_ALPN,
    QuicCode,
    UntrustedRelay,
    accepts,
    quic_client_limits,
)
from relays.framing import FramingError, StreamFrames, padding_of
from relays.transports.limits import QUEUED_BYTES, QUEUED_DATA_BYTES
from relays.turn import is_channel_data, is_data_indication, is_send_indication
from runtime.net.address import Address
from runtime.net.connection import ConnectionClosed
from runtime.net.quic import QuicClosed, QuicConnection, connect_quic
from runtime.net.tcp import connect_tcp
from runtime.net.tls import TlsFailed, judging_client, shake_hands
from runtime.nursery import beside

HANDSHAKE_TIMEOUT_S: Final = 10.0
PING_INTERVAL_S: Final = 10.0
"""Over QUIC, for the sake of NATs: a third of the idle timeout."""
READ_BYTES: Final = 64 * 1024


class RelayUnreached(Exception):
    """The connection did not come about, or is over; the text says why."""


class RelayConnection(Protocol):
    """What every transport's connection does. Only one task may receive. `local_host` is the
    address of this machine to which it is bound for good; None: it may move to another."""

    @property
    def local_host(self) -> str | None: ...

    def send(self, messages: Iterable[bytes]) -> int:
        """Queue messages; never waits. How many of them were dropped."""

    async def receive(self) -> Sequence[bytes]:
        """The messages that have come, at least one. Raises RelayUnreached at the end."""


class StreamConnection:
    """A `RelayConnection` over a byte stream. Carries bytes while `run` runs."""

    def __init__(self, stream: trio.abc.Stream, local_host: str) -> None:
        self.local_host = local_host
        self._stream = stream
        self._frames = StreamFrames()
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._sendable = trio.Event()
        self._over = trio.CancelScope()

    def send(self, messages: Iterable[bytes]) -> int:
        dropped = 0
        for message in messages:
            is_data = is_channel_data(message) or is_send_indication(memoryview(message))
            room = QUEUED_DATA_BYTES if is_data else QUEUED_BYTES
            if self._queued_bytes + len(message) > room:
                dropped += 1
                if not is_data:
                    self._over.cancel()
                continue
            self._queue.append(message + padding_of(message))
            self._queued_bytes += len(self._queue[-1])
        self._sendable.set()
        return dropped

    async def receive(self) -> Sequence[bytes]:
        while True:
            try:
                data = await self._stream.receive_some(READ_BYTES)
                messages = self._frames.feed(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                raise RelayUnreached("the connection broke") from None
            except FramingError as error:
                raise RelayUnreached(str(error)) from None
            if not data:
                raise RelayUnreached("the relay ended the connection")
            if messages:
                return [bytes(message) for message in messages]

    async def run(self) -> None:
        """Send what is queued, until that is impossible."""
        with self._over:
            while True:
                self._sendable = trio.Event()
                while self._queue:
                    chunk = b"".join(self._queue)
                    self._queue.clear()
                    try:
                        await self._stream.send_all(chunk)
                    except (trio.BrokenResourceError, trio.ClosedResourceError):
                        return
                    self._queued_bytes -= len(chunk)
                await self._sendable.wait()


class QuicRelayConnection:
    """A `RelayConnection` over QUIC. Reads its stream while `run` runs."""

    local_host: None = None

    def __init__(self, connection: QuicConnection) -> None:
        self._connection = connection
        self._frames = StreamFrames()
        self._received: deque[bytes] = deque()
        self._came = trio.Event()
        connection.on_datagram = self._take_datagram

    def send(self, messages: Iterable[bytes]) -> int:
        """See `RelayConnection`: requests go on the stream, data in DATAGRAM frames."""
        dropped, connection = 0, self._connection
        for message in messages:
            is_data = is_channel_data(message) or is_send_indication(memoryview(message))
            if is_data and len(message) <= connection.datagram_room:
                dropped += not connection.send_datagram(message)
            elif is_data and connection.unacknowledged_bytes > QUEUED_DATA_BYTES:
                dropped += 1
            elif not connection.send(message + padding_of(message)):
                dropped += 1
                if not is_data:
                    connection.close(QuicCode.SLOW, "the relay reads too slowly")
        return dropped

    async def receive(self) -> Sequence[bytes]:
        """The messages that have come, at least one. Raises ConnectionClosed."""
        while not self._received:
            closed = self._connection.closed
            if closed is not None:
                raise closed.anew()
            await self._came.wait()
        self._came = trio.Event()
        messages = list(self._received)
        self._received.clear()
        return messages

    async def keep_alive(self) -> None:
        """For ever: a NAT on the way forgets nobody who speaks, and neither does the relay."""
        while True:
            await trio.sleep(PING_INTERVAL_S)
            self._connection.ping()

    async def run(self) -> None:
        """Read the stream until the connection is over."""
        try:
            while data := await self._connection.receive():
                self._take(bytes(each) for each in self._frames.feed(data))
        except ConnectionClosed:
            pass
        except FramingError as error:
            self._connection.close(QuicCode.FRAMING_ERROR, str(error))
        finally:
            self._connection.close()
            self._came.set()

    def _take_datagram(self, data: bytes) -> None:
        if is_channel_data(data) or is_data_indication(memoryview(data)):
            self._take((data,))

    def _take(self, messages: Iterable[bytes]) -> None:
        self._received.extend(messages)
        self._came.set()


@asynccontextmanager
async def connect_stream(
    address: Address, *, pins: Sequence[str] | None, mark: int | None = None
) -> AsyncIterator[StreamConnection]:
    """Connect over TLS, or with `pins` None over TCP; within the block the connection stands.
    `mark` is the socket's SO_MARK. Raises RelayUnreached, OSError."""
    stream: trio.abc.Stream | None = None
    with trio.move_on_after(HANDSHAKE_TIMEOUT_S):
        tcp = await connect_tcp(address, mark=mark)
        try:
            tcp.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
            if pins is None:
                stream = tcp
            else:
                tls = judging_client(tcp, server_name=None, verify=accepts(pins), alpn=STREAM_ALPN)
                await shake_hands(tls)
                stream = tls
        except (TlsFailed, UntrustedRelay) as error:
            raise RelayUnreached(str(error)) from None
        finally:
            if stream is None:
                tcp.socket.close()
    if stream is None:
        raise RelayUnreached("the handshake took too long")
    connection = StreamConnection(stream, str(tcp.socket.getsockname()[0]))
    async with beside(partial(_carry, connection, tcp)):
        yield connection


async def _carry(connection: StreamConnection, tcp: trio.SocketStream) -> None:
    """Whoever receives is told of the end by the closed socket."""
    try:
        await connection.run()
    finally:
        tcp.socket.close()


@asynccontextmanager
async def connect_datagrams(
    address: Address, *, pins: Sequence[str], mark: int | None = None
) -> AsyncIterator[RelayConnection]:
    """Connect over QUIC; within the block the connection stands. Raises RelayUnreached, OSError."""
    try:
        async with connect_quic(
            address,
            server_name=address.host,
            alpn=QUIC_ALPN,
            verify=accepts(pins),
            limits=quic_client_limits(),
            mark=mark,
        ) as quic:
            connection = QuicRelayConnection(quic)
            async with beside(connection.run, connection.keep_alive):
                yield connection
    except (QuicClosed, UntrustedRelay) as error:
        raise RelayUnreached(str(error)) from None


def connect_relay(
    transport: str, address: Address, *, pins: Sequence[str], mark: int | None = None
) -> AbstractAsyncContextManager[RelayConnection]:
    """Connect to a relay over `quic`, `tls` or `tcp`: see `connect_datagrams`, `connect_stream`."""
    if transport == "quic":
        return connect_datagrams(address, pins=pins, mark=mark)
    return connect_stream(address, pins=None if transport == "tcp" else pins, mark=mark)
