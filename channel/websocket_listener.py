"""The portal's door for agents whose network blocks UDP: WebSocket over TLS on TCP.

It stands where QUIC's stands, at the channel's own host and port, and serves the path `/channel`.
Where the API listens at that port too, the API's door is the only one, and hands on whoever asks
for that path (`WebSocketDoor.greet`, `asks_for_channel`, `take`); else `serve` has a socket of its
own. Whoever comes is served by the same `ChannelServer` as those on QUIC: its limits of unjoined
channels, its deadlines and its words at the end are theirs too.

Why wsproto on a trio stream, and not an application of the API's ASGI server: that server waits
inside of `send` for a slow reader, where the channel must never wait; it parts a stream into
messages only to have them put together again; its pings, its end and its 512 connections are its
own; and an API's middleware is nothing for an agent to pass. What is needed of WebSocket is little.

An agent costs the API nothing and the other way round: until the first line of a request has come
nobody knows whose a connection is, so it counts among newcomers, of which there are few, for a
short time; then it counts for the one or the other.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import trio

from channel.listener import ChannelLimits, ChannelServer
from channel.transports import PATH, SUBPROTOCOL
from runtime.clock import NS_PER_S
from runtime.guard import Guard
from runtime.net.address import Address
from runtime.net.binding import binding
from runtime.net.sources import SourceLimit, source_of
from runtime.net.tcp import listening_socket, peer_of
from runtime.net.tls import TlsStream
from runtime.net.websocket import accept_websocket, server_tls_context
from runtime.net.websocket_core import WebSocketClosed
from runtime.service import get_logger

_REQUEST: Final = f"GET {PATH}".encode()
_AFTER_PATH: Final = (b" ", b"?")
_READ_BYTES: Final = 16 * 1024

log = get_logger("channel.websocket")


@attrs.frozen(kw_only=True)
class WebSocketStatistics:
    """Live connections (newcomers are not among them yet), and counts since the start: WebSockets
    that were opened; connections refused for a limit; newcomers that were too slow, or broke off;
    requests that were refused."""

    connections: int
    newcomers: int
    accepted: int
    refused_limit: int
    handshakes_failed: int
    requests_refused: int


class WebSocketDoor:
    """Brings `server` the agents that come by WebSocket."""

    def __init__(self, server: ChannelServer, limits: ChannelLimits | None = None) -> None:
        self._server = server
        self._limits = most = (limits or ChannelLimits()).websocket
        self._newcomers = SourceLimit(most.max_handshakes, most.max_handshakes_per_source)
        self._connections = SourceLimit(most.max_connections, most.max_connections_per_source)
        self._guard = Guard("channel.websocket", passes=(WebSocketClosed,))
        self._accepted = self._refused_limit = 0
        self._handshakes_failed = self._requests_refused = 0

    def statistics(self) -> WebSocketStatistics:
        return WebSocketStatistics(
            connections=len(self._connections),
            newcomers=len(self._newcomers),
            accepted=self._accepted,
            refused_limit=self._refused_limit,
            handshakes_failed=self._handshakes_failed,
            requests_refused=self._requests_refused,
        )

    async def greet(self, stream: TlsStream) -> bytes | None:
        """TLS, and as much of the request as tells what it wants; None for whoever is one too many,
        too slow, or no such caller. A newcomer has `handshake_timeout_ns` for it all."""
        try:
            source = source_of(peer_of(stream.transport_stream).host)
        except OSError:
            return None
        if not self._newcomers.enter(source):
            self._refused_limit += 1
            return None
        begun = None
        try:
            with (
                self._guard,
                suppress(trio.BrokenResourceError, trio.ClosedResourceError),
                trio.move_on_after(self._limits.handshake_timeout_ns / NS_PER_S),
            ):
                begun = await _begin(stream)
        finally:
            self._newcomers.leave(source)
        self._handshakes_failed += begun is None
        return begun

    async def take(self, stream: TlsStream, begun: bytes) -> None:
        """Serve a caller that was greeted, from request to end, and close the socket."""
        try:
            remote = peer_of(stream.transport_stream)
            source = source_of(remote.host)
        except OSError:
            return
        if not self._connections.enter(source):
            self._refused_limit += 1
            return
        try:
            with self._guard:  # one connection never harms another
                await self._serve(stream, begun, remote)
        except WebSocketClosed as closed:
            self._requests_refused += 1
            log.debug("websocket_refused", remote=str(remote), reason=closed.reason)
        finally:
            self._connections.leave(source)
            stream.transport_stream.socket.close()

    async def serve(
        self,
        listen: Address,
        certificate_chain: Path,
        certificate_key: Path,
        *,
        task_status: trio.TaskStatus[Callable[[], None]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve agents alone at `listen` (TCP), for ever; starts with what is to be called when the
        files hold another certificate. `::` is every address, of IPv4 too. Raises CannotListen,
        OSError and ssl.SSLError for the files."""
        context = server_tls_context()
        renew = partial(context.load_cert_chain, certificate_chain, certificate_key)
        renew()
        with binding("listen", f"{listen} (TCP)"):
            listening = listening_socket(listen)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        async with trio.open_nursery() as nursery:
            task_status.started(renew)
            await trio.serve_listeners(
                partial(self._welcome, context), [listener], handler_nursery=nursery
            )

    # --- helpers -------------------------------------------------------------------------------

    async def _welcome(self, context: ssl.SSLContext, tcp: trio.SocketStream) -> None:
        stream = trio.SSLStream(tcp, context, server_side=True, https_compatible=True)
        try:
            begun = await self.greet(stream)
            if begun is not None:
                await self.take(stream, begun)
        finally:
            tcp.socket.close()

    async def _serve(self, stream: TlsStream, begun: bytes, remote: Address) -> None:
        if stream.version() != "TLSv1.3":
            raise WebSocketClosed(0, "an older TLS")
        connection = await accept_websocket(
            stream, begun, remote=remote, path=PATH, subprotocol=SUBPROTOCOL, limits=self._limits
        )
        self._accepted += 1
        async with trio.open_nursery() as carrying:
            # It ends by itself, soon after it was closed: the agent is told of a cancellation too.
            carrying.start_soon(connection.run)
            try:
                await self._server.serve_connection(connection)
            finally:
                connection.close()


def asks_for_channel(begun: bytes) -> bool:
    """Whether a request that begins like this is an agent's."""
    return begun.startswith(_REQUEST) and begun[len(_REQUEST) :].startswith(_AFTER_PATH)


async def _begin(stream: TlsStream) -> bytes | None:
    """What has come when that is enough to tell whose it is; None if nothing more will."""
    await stream.do_handshake()
    begun = b""
    while _is_undecided(begun):
        data = bytes(await stream.receive_some(_READ_BYTES))
        if not data:
            return None
        begun += data
    return begun


def _is_undecided(begun: bytes) -> bool:
    return len(begun) <= len(_REQUEST) and _REQUEST.startswith(begun)
