"""WebSocket over TLS under trio: a byte stream like `runtime.net.quic`'s, where UDP is blocked.

The protocol is in `runtime.net.websocket_core`. This file is the shell around it: one task reads,
one writes, and `send` never waits.

What is decided here:

- **The client judges the server's chain within the handshake** (`runtime.net.tls`): all that it
  knows of the authority is the hash of its key, not its certificate, which comes with the chain.
- **ALPN is `http/1.1`**: what a firewall sees is what it sees of any page.
- **An end is told, and heard.** Whoever ends the connection says so by a close frame, and reads on
  until the other's has come: a socket closed with something unread in it would make the kernel drop
  what is still under way to the peer (RFC 6455, section 7.1.1). That takes FAREWELL_NS, or what
  `close` was given, at most.
- **A dead peer** is found by whoever wants an answer of it: `ping` is answered by the peer's end. A
  process that was killed is told of by its kernel.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from runtime.guard import Guard
from runtime.net.address import Address
from runtime.net.tcp import connect_tcp
from runtime.net.tls import TlsFailed, TlsStream, Verify, judging_client, shake_hands
from runtime.net.websocket_core import (
    HANDSHAKE_TIMEOUT,
    REFUSED,
    WebSocketClosed,
    WebSocketCore,
    WebSocketLimits,
)
from runtime.nursery import beside

ALPN: Final = "http/1.1"
FAREWELL_NS: Final = 10**9
"""How long an end that somebody brought about by `close` may take at least."""
LEAVE_NS: Final = 10**8
"""And that of a client which just goes, perhaps because the server is silent."""

_READ_BYTES: Final = 16 * 1024
_NS_PER_S: Final = 10**9
_LOST: Final = (trio.BrokenResourceError, trio.ClosedResourceError)

_guard = Guard("websocket")


class WebSocketConnection:
    """A `runtime.net.connection.Connection`. Made by `connect_websocket` and `accept_websocket`;
    lives while `run` runs. A new network is a new connection, so `on_migrated` is never called."""

    def __init__(
        self, stream: TlsStream, core: WebSocketCore, remote: Address, limits: WebSocketLimits
    ) -> None:
        self._stream = stream
        self._core = core
        self._remote = remote
        self._limits = limits
        self._readable = trio.Event()
        self._consumed = trio.Event()
        self._sendable = trio.Event()
        self._pongs = core.pongs
        self._life = trio.CancelScope(shield=True)
        self.on_migrated: Callable[[Address], None] | None = None
        self.on_pong: Callable[[], None] | None = None

    @property
    def remote(self) -> Address:
        return self._remote

    @property
    def local_host(self) -> str:
        """The address of this machine that the connection has, and will have to its end."""
        try:
            return str(self._stream.transport_stream.socket.getsockname()[0])
        except OSError:
            return ""

    @property
    def closed(self) -> WebSocketClosed | None:
        return self._core.closed

    def send(self, data: bytes) -> bool:
        """As `Connection.send`: refuses when more than `send_buffer_bytes` wait."""
        if self.closed is not None or self._core.queued_bytes > self._limits.send_buffer_bytes:
            return False
        self._core.send(data)
        self._wake_writer()
        return True

    async def receive(self) -> bytes:
        """As `Connection.receive`, but it never returns b"": an end is always told by a code."""
        await trio.lowlevel.checkpoint()
        while not self._core.received:
            if self.closed is not None:
                raise self.closed.anew()
            await self._readable.wait()
        data = self._core.take_received()
        self._consumed.set()
        return data

    def ping(self) -> None:
        if self.closed is None:
            self._core.ping()
            self._wake_writer()

    def keepalive(self) -> None:
        """Nothing: the kernel of a machine whose process is gone has said so by itself."""

    def close(self, code: int = 0, reason: str = "", *, linger_ns: int = 0) -> None:
        if self.closed is None:
            self._core.close(code, reason, keep_queue=linger_ns > 0)
            self._end_within(max(linger_ns, FAREWELL_NS))
            self._wake_writer()

    def leave(self) -> None:
        """End the connection without waiting for the peer to know."""
        if self.closed is None:
            self._core.close(0, "", keep_queue=False)
            self._end_within(LEAVE_NS)
            self._wake_writer()

    async def run(self) -> None:
        """Carry bytes until the connection is over, which `close` brings about in any case. Not to
        be cancelled; at its end the socket is closed."""
        try:
            with _guard, self._life:  # a mistake of ours costs the peer that met it alone
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read)
                    nursery.start_soon(self._write)
        finally:
            self._core.lost("the connection was lost")
            self._wake_reader()
            self._stream.transport_stream.socket.close()

    def __repr__(self) -> str:
        return f"<WebSocketConnection {self._remote}{' closed' if self.closed else ''}>"

    # --- helpers -------------------------------------------------------------------------------

    async def _read(self) -> None:
        core = self._core
        while not core.is_finished:
            while core.received_bytes > self._limits.receive_window_bytes and not core.closed:
                self._consumed = trio.Event()
                await self._consumed.wait()
            try:
                data = await self._stream.receive_some(_READ_BYTES)
            except _LOST:
                data = b""
            if not data:
                self._life.cancel()
                return
            core.receive(bytes(data))
            self._notice()
        # What remains to be written is a close frame, perhaps.

    def _notice(self) -> None:
        """See to what the peer's bytes brought about."""
        if self._core.pongs != self._pongs:
            self._pongs = self._core.pongs
            if self.on_pong is not None:
                self.on_pong()
        if self._core.closed is not None:
            self._end_within(FAREWELL_NS)
        self._wake_reader()
        self._wake_writer()

    async def _write(self) -> None:
        while True:
            self._sendable = trio.Event()
            while data := self._core.output():
                try:
                    await self._stream.send_all(data)
                except _LOST:
                    self._life.cancel()
                    return
            if self._core.is_finished:
                self._life.cancel()
                return
            await self._sendable.wait()

    def _end_within(self, duration_ns: int) -> None:
        """Begin the end; what was to be the last moment before stays it."""
        deadline = trio.current_time() + duration_ns / _NS_PER_S
        self._life.deadline = min(self._life.deadline, deadline)
        self._consumed.set()
        self._wake_reader()

    def _wake_reader(self) -> None:
        if self._readable.statistics().tasks_waiting:
            self._readable.set()
            self._readable = trio.Event()

    def _wake_writer(self) -> None:
        self._sendable.set()


@asynccontextmanager
async def connect_websocket(
    remote: Address,
    *,
    server_name: str,
    host: str,
    path: str,
    subprotocol: str,
    verify: Verify,
    limits: WebSocketLimits | None = None,
    mark: int | None = None,
    source: str | None = None,
) -> AsyncIterator[WebSocketConnection]:
    """Connect to a server; within the block the connection stands, after it it is closed. If it was
    by `close` the server has said that it knows, or was given FAREWELL_NS for it.

    `verify` gets the server's chain (its possession of the key is proved by then) before anything
    but the handshake is sent, and raises to refuse it: that exception is raised here. `server_name`
    is sent as SNI unless it is an IP address, `host` in the request. `mark` is the socket's
    SO_MARK, `source` the address of this machine to dial from, if it is not the kernel's to choose.
    Raises WebSocketClosed when a handshake fails or takes longer than its timeout, OSError when TCP
    cannot connect. What the block raises is not wrapped in a group.
    """
    limits = limits or WebSocketLimits()
    connection: WebSocketConnection | None = None
    with trio.move_on_after(limits.handshake_timeout_ns / _NS_PER_S):
        tcp = await connect_tcp(remote, mark=mark, source=source)
        try:
            stream = judging_client(tcp, server_name=server_name, verify=verify, alpn=ALPN)
            await shake_hands(stream)
            core = WebSocketCore(
                is_client=True,
                path=path,
                subprotocol=subprotocol,
                host=host,
                message_bytes=limits.message_bytes,
            )
            await _upgrade(stream, core, b"")
            connection = WebSocketConnection(stream, core, remote, limits)
        except TlsFailed as error:
            raise WebSocketClosed(REFUSED, str(error)) from None
        finally:
            if connection is None:
                tcp.socket.close()
    if connection is None:
        raise WebSocketClosed(HANDSHAKE_TIMEOUT, "the handshake took too long")
    async with beside(connection.run, leave=connection.leave):
        yield connection


async def accept_websocket(
    stream: TlsStream,
    data: bytes,
    *,
    remote: Address,
    path: str,
    subprotocol: str,
    limits: WebSocketLimits,
) -> WebSocketConnection:
    """Answer a client whose TLS handshake is done, and of whose request `data` came already.
    Raises WebSocketClosed for whoever is refused (and was told so), or too slow."""
    core = WebSocketCore(
        is_client=False, path=path, subprotocol=subprotocol, message_bytes=limits.message_bytes
    )
    with trio.move_on_after(limits.handshake_timeout_ns / _NS_PER_S) as scope:
        await _upgrade(stream, core, data)
    if scope.cancelled_caught:
        raise WebSocketClosed(HANDSHAKE_TIMEOUT, "the handshake took too long")
    return WebSocketConnection(stream, core, remote, limits)


def server_tls_context() -> ssl.SSLContext:
    """For a door that has none but agents behind it; the caller loads the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    context.set_alpn_protocols([ALPN])
    return context


# --- helpers -------------------------------------------------------------------------------------


async def _upgrade(stream: TlsStream, core: WebSocketCore, data: bytes) -> None:
    """The request and its answer. Raises WebSocketClosed when it comes to nothing."""
    try:
        if data:
            core.receive(data)
        while True:
            while piece := core.output():
                await stream.send_all(piece)
            if core.closed is not None:
                raise core.closed.anew()
            if core.is_open:
                return
            data = bytes(await stream.receive_some(_READ_BYTES))
            if not data:
                raise WebSocketClosed(REFUSED, "the connection ended within the handshake")
            core.receive(data)
    except _LOST:
        raise WebSocketClosed(REFUSED, "the connection broke within the handshake") from None
