"""One QUIC connection as its user sees it: a bounded byte stream, an address, an end.

The essay on what is decided is in `runtime.net.quic`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Protocol

import trio
from aioquic.quic import events
from aioquic.quic.stream import QuicStream
from cryptography.x509 import Certificate

from runtime.net.address import Address
from runtime.net.connection import ConnectionClosed
from runtime.net.quic_core import QuicCore, QuicLimits

BAD_CERTIFICATE: Final = 0x100 + 42
CONNECTION_REFUSED: Final = 0x2
IDLE_TIMEOUT: Final = -1
STATELESS_RESET: Final = -2
HANDSHAKE_TIMEOUT: Final = -3
PORT_CLOSED: Final = -4

_KEEPALIVE: Final = b"\xff"
"""As that of IPsec (RFC 3948, section 2.3), which is for the NAT's sake."""
_NS_PER_S: Final = 10**9


class QuicClosed(ConnectionClosed):
    """The connection is over. `code` is the peer's or our own error code (RFC 9000, section 20),
    or IDLE_TIMEOUT, STATELESS_RESET, HANDSHAKE_TIMEOUT or PORT_CLOSED; `reason` is printable and
    short."""


class Driver(Protocol):
    """What a connection needs of the endpoint that it lives on."""

    limits: QuicLimits

    def mark(self, connection: QuicConnection) -> None:
        """Step the connection soon: it has something to send."""

    def send_aside(self, connection: QuicConnection, data: bytes) -> None:
        """Send what is no QUIC, on the connection's path."""


class QuicConnection:
    """One connection and its stream. Made by `connect_quic` and `QuicListener`.

    Only one task at a time may receive. `on_migrated`, called with the new address, `on_pong`,
    called when a `ping` was answered, and `on_datagram`, called with the data of each DATAGRAM
    frame, may be set at any time; they must not block.
    """

    def __init__(self, core: QuicCore, endpoint: Driver, remote: Address) -> None:
        self._core = core
        self._endpoint = endpoint
        self._remote = remote
        self._stream: QuicStream | None = None
        self._received: list[bytes] = []
        self._ended = False
        self._closed: QuicClosed | None = None
        self._lingering: tuple[int, str] | None = None
        self._readable: trio.Event | None = None  # while somebody waits
        self._writable: trio.Event | None = None
        self._established = False
        self._deadline = math.inf
        self._scheduled_at = math.inf
        self._cids: set[bytes] = set()
        self._pings = 0
        self.on_migrated: Callable[[Address], None] | None = None
        self.on_pong: Callable[[], None] | None = None
        self.on_datagram: Callable[[bytes], None] | None = None

    @property
    def remote(self) -> Address:
        """The peer's address on the last path that was validated."""
        return self._remote

    @property
    def closed(self) -> QuicClosed | None:
        """Why the connection is over, None while it is not."""
        return self._closed

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        """The chain that the peer presented, its own certificate first; empty for a client."""
        return self._core.peer_chain()

    @property
    def unacknowledged_bytes(self) -> int:
        """Bytes passed to `send` that the peer has not acknowledged yet."""
        return 0 if self._stream is None else self._core.buffered_bytes(self._stream)

    def send(self, data: bytes) -> bool:
        """Queue bytes and send what may go at once. Never waits.

        False, and nothing is taken, when more than `send_buffer_bytes` are unacknowledged, when
        the connection is over, or when the peer is to open the stream and has not spoken yet.
        """
        if self._closed is not None or self._stream is None:
            return False
        if self.unacknowledged_bytes > self._endpoint.limits.send_buffer_bytes:
            return False
        self._stream.sender.write(data)
        self._endpoint.mark(self)
        return True

    def send_datagram(self, data: bytes) -> bool:
        """Queue data for one DATAGRAM frame (RFC 9221), which may be lost. Never waits. False, and
        it is dropped, when so many wait already, when it is larger than `datagram_room`, or when
        the connection is over."""
        if self._closed is not None or len(data) > self.datagram_room:
            return False
        if self._core.waiting_datagrams() >= self._endpoint.limits.waiting_datagrams:
            return False
        self._core.send_datagram_frame(data)
        self._endpoint.mark(self)
        return True

    @property
    def datagram_room(self) -> int:
        """The most bytes that `send_datagram` takes; 0 where the peer takes none."""
        return self._core.datagram_room() if self._established else 0

    async def send_all(self, data: bytes) -> None:
        """As `send`, but wait for room. Cancelled, it has queued nothing. Raises QuicClosed."""
        await trio.lowlevel.checkpoint()
        while not self.send(data):
            if self._closed is not None:
                raise self._closed.anew()
            if self._writable is None:
                self._writable = trio.Event()
            await self._writable.wait()

    async def receive(self) -> bytes:
        """The bytes that have come, at least one; b"" once the peer has ended its stream.

        Raises QuicClosed when the connection is over otherwise, and everything was returned.
        Safe to cancel.
        """
        if self._received or self._ended or self._closed is not None:
            await trio.lowlevel.checkpoint()
        while not self._received:
            if self._ended:
                return b""
            if self._closed is not None:
                raise self._closed.anew()
            self._readable = trio.Event()
            await self._readable.wait()
        data = b"".join(self._received)
        self._received.clear()
        if self._stream is not None and self._core.consume(self._stream, len(data)):
            self._endpoint.mark(self)
        return data

    def ping(self) -> None:
        """Send a PING at once, however much is under way: the peer learns of a new path, and
        `on_pong` tells of its answer."""
        if self._closed is None and self._established:
            self._pings += 1
            self._core.send_ping(self._pings)
            self._core.probe()
            self._endpoint.mark(self)

    def keepalive(self) -> None:
        """Send one byte that the peer's kernel drops, or answers by "port unreachable" where the
        port is closed; every NAT on the path sees it too. Tells nothing of a peer that lives."""
        if self._closed is None and self._established:
            self._endpoint.send_aside(self, _KEEPALIVE)

    def close(self, code: int = 0, reason: str = "", *, linger_ns: int = 0) -> None:
        """End the connection with an application's error code. Closing twice is harmless.

        For this side it is over at once. With `linger_ns` the peer still gets everything that
        was sent, for at most that long, before it is told.
        """
        if self._closed is not None:
            return
        linger = linger_ns > 0 and self._stream is not None and self.unacknowledged_bytes > 0
        self._end(QuicClosed(code, reason))
        if linger and self._stream is not None:
            self._stream.sender.write(b"", end_stream=True)
            self._lingering = (code, reason)
            self._deadline = trio.current_time() + linger_ns / _NS_PER_S
        else:
            self._core.close(error_code=code, reason_phrase=reason)
        self._endpoint.mark(self)

    def __repr__(self) -> str:
        return f"<QuicConnection {self._remote}{' closed' if self._closed else ''}>"

    # --- for the endpoint ----------------------------------------------------------------------

    def _open_stream(self) -> None:
        """Open the stream: its bytes go out with the first `send`."""
        self._stream = self._core.open_stream()

    def _end(self, closed: QuicClosed) -> None:
        if self._closed is None:
            self._closed = closed
        self._wake_reader()
        self._wake_writer()

    def _wake_reader(self) -> None:
        if self._readable is not None:
            self._readable.set()
            self._readable = None

    def _wake_writer(self) -> None:
        if self._writable is not None:
            self._writable.set()
            self._writable = None

    def _handle(self, event: events.QuicEvent) -> None:
        if isinstance(event, events.StreamDataReceived):
            self._handle_data(event)
        elif isinstance(event, events.DatagramFrameReceived):
            if self.on_datagram is not None and self._closed is None:
                self.on_datagram(event.data)
        elif isinstance(event, events.StreamReset):
            self.close(0, "the stream was reset")
        elif isinstance(event, events.PingAcknowledged) and self.on_pong is not None:
            self.on_pong()

    def _handle_data(self, event: events.StreamDataReceived) -> None:
        if self._stream is None:
            self._stream = self._core.stream(event.stream_id)
        if self._stream is None or event.stream_id != self._stream.stream_id:
            self.close(0, "a second stream")
            return
        if self._closed is not None:
            return
        if event.data:
            self._received.append(event.data)
        self._ended = self._ended or event.end_stream
        self._wake_reader()

    def _follow_path(self) -> None:
        path = self._core.validated_address()
        if path is not None and path != self._remote:
            self._remote = Address(path[0], path[1])
            if self.on_migrated is not None and self._closed is None:
                self.on_migrated(self._remote)
