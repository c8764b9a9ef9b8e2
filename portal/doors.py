"""The door for HTTPS: the API on Hypercorn's trio worker, in a nursery of ours.

Hypercorn speaks HTTP (h11) on streams; the rest of a worker is here, since it must be bounded:
how many connections there are, how long one may take for its handshake, its headers and its
answers, how large the headers are. A caller that takes no answer is cut off, so that no caller
can hold up the end of the process.

Where the control channel has the same port, agents whose network blocks UDP come here too, by
WebSocket. Whoever begins with a request for the channel's path is handed to the channel's door,
before Hypercorn has seen a byte, and is none of the API's connections.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Event, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from channel.websocket_listener import WebSocketDoor, asks_for_channel
from portal.places import Bounds, NoPlace, make_place
from runtime.net.address import Address
from runtime.net.binding import binding
from runtime.net.sources import source_of
from runtime.net.tcp import listening_socket, peer_of
from runtime.net.tls import TlsStream
from runtime.service import get_logger

MAX_CONNECTIONS: Final = 512
MAX_CONNECTIONS_PER_SOURCE: Final = 128
"""Of one IPv4 address or IPv6 /64. One more takes the place of the oldest that is in no call."""
MAX_HEADER_BYTES: Final = 32 * 1024
HANDSHAKE_TIME_S: Final = 10.0
IDLE_TIME_S: Final = 15.0
"""How long a connection may wait for its next request to begin and its headers to arrive."""

WRITE_TIME_S: Final = 30.0
GRACE_TIME_S: Final = 5.0
"""How long calls in progress may take once the door closes."""

log = get_logger("portal.doors")


@attrs.define
class DoorStatistics:
    """What has happened at a door since it opened."""

    connections: int = 0
    accepted: int = 0
    refused: int = 0
    displaced: int = 0
    cut_off: int = 0


class Door:
    """A listening TCP socket at `listen` (port 0 takes any) with the API behind it.

    The socket is bound at once, so `address` is known; callers wait in the backlog until `serve`
    runs. Raises OSError if the address is taken or not ours.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        *,
        listen: Address,
        certificate_chain: Path,
        certificate_key: Path,
        max_connections: int = MAX_CONNECTIONS,
        max_connections_per_source: int = MAX_CONNECTIONS_PER_SOURCE,
        grace_time_s: float = GRACE_TIME_S,
    ) -> None:
        self.channels: WebSocketDoor | None = None
        """Who takes the agents that come here, if they do: to be set before `serve`."""

        self._app = ASGIWrapper(app)
        self._bounds = Bounds(max_connections, max_connections_per_source)
        self._grace_time_s = grace_time_s
        self._chain = certificate_chain
        self._key = certificate_key
        self._tls = _tls_context(certificate_chain, certificate_key)
        self._config = _hypercorn_config()
        self._streams: dict[_BoundedStream, None] = {}
        """In the order in which they came."""
        self._newcomers: set[trio.SocketStream] = set()
        self._statistics = DoorStatistics()
        self._stopping = trio.Event()
        with binding("api_listen", f"{listen} (TCP)"):
            self._socket = listening_socket(listen)
        host, port = self._socket.getsockname()[:2]
        self.address = Address(host, port)

    def statistics(self) -> DoorStatistics:
        """Open connections, and counts of accepted, refused (too many), displaced (by a newcomer)
        and cut off ones."""
        return attrs.evolve(self._statistics, connections=len(self._streams))

    def renew(self) -> None:
        """Use the certificate that the files hold now for all handshakes from here on."""
        self._tls.load_cert_chain(self._chain, self._key)

    async def serve(
        self, *, task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until `stop`: then no call is taken any more, those in progress have
        `grace_time_s`, and what is left is cut off. A cancellation cuts off everything at once."""
        context = WorkerContext(None)

        async def connection(stream: Any) -> None:
            await self._connection(stream, context)

        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._socket))
        async with trio.open_nursery() as connections:
            try:
                async with trio.open_nursery() as accepting:
                    accepting.start_soon(
                        partial(
                            trio.serve_listeners,
                            connection,
                            [listener],
                            handler_nursery=connections,
                        )
                    )
                    task_status.started(self.address)
                    await self._stopping.wait()
                    accepting.cancel_scope.cancel()
                await context.terminated.set()
            except BaseException:
                self._cut_off()
                raise
            connections.start_soon(self._cut_off_late)

    def stop(self) -> None:
        """Have `serve` come to its end."""
        self._stopping.set()

    async def _connection(self, stream: trio.SocketStream, context: WorkerContext) -> None:
        begun = b""
        tls = trio.SSLStream(stream, self._tls, server_side=True, https_compatible=True)
        try:
            if self.channels is not None:
                self._newcomers.add(stream)
                try:
                    greeted = await self.channels.greet(tls)
                finally:
                    self._newcomers.discard(stream)
                if greeted is None:
                    return
                if asks_for_channel(greeted):
                    await self.channels.take(tls, greeted)
                    return
                begun = greeted
            if not self._has_place(stream):
                self._statistics.refused += 1
                return
            await self._serve_call(_BoundedStream(stream, tls, begun, self._statistics), context)
        finally:
            stream.socket.close()

    def _has_place(self, stream: trio.SocketStream) -> bool:
        """Whether there is room, if need be after an older connection has given way."""
        try:
            older = make_place(self._streams, _source_of(stream), self._bounds)
        except NoPlace:
            return False
        if older is not None:
            self._statistics.displaced += 1
            self._streams.pop(older)
            older.give_way()
        return True

    async def _serve_call(self, bounded: _BoundedStream, context: WorkerContext) -> None:
        self._statistics.accepted += 1
        self._streams[bounded] = None
        try:
            with bounded.scope:
                await _serve_connection(self._app, self._config, context, bounded)
        except Exception as error:  # one connection never harms another
            log.error("connection_failed", exc_info=error)
        finally:
            self._streams.pop(bounded, None)

    async def _cut_off_late(self) -> None:
        until = trio.current_time() + self._grace_time_s
        try:
            while (self._streams or self._newcomers) and trio.current_time() < until:
                await trio.sleep(0.05)
        finally:
            self._cut_off()

    def _cut_off(self) -> None:
        for stream in tuple(self._streams):
            stream.cut_off()
        for newcomer in tuple(self._newcomers):
            newcomer.socket.close()


async def _serve_connection(
    app: ASGIWrapper, config: Config, context: WorkerContext, stream: _BoundedStream
) -> None:
    state = ConnectionState({})
    server = _Connection(app, config, context, state, stream)  # type: ignore[arg-type]  # SSLStream is final; this has what is used
    await server.run()


class _Connection(TCPServer):
    """Hypercorn's own would wait for the idle timeout even when the caller has hung up."""

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated):
            self.stream.idle = event.idle
        await super().protocol_send(event)


class _BoundedStream:
    """A TLS stream, as Hypercorn uses one, whose every send ends: by success, or by the end of
    the connection. `begun` is what was read of it already."""

    def __init__(
        self,
        stream: trio.SocketStream,
        tls: TlsStream,
        begun: bytes,
        statistics: DoorStatistics,
    ) -> None:
        self.transport_stream = stream
        self.source = _source_of(stream)
        self.idle = True
        self._tls = tls
        self._begun = begun
        self._statistics = statistics
        self.scope = trio.CancelScope()
        self.do_handshake = self._tls.do_handshake

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._begun:
            begun, self._begun = self._begun, b""
            return begun
        return await self._tls.receive_some(max_bytes)

    def selected_alpn_protocol(self) -> str | None:
        return self._tls.selected_alpn_protocol()  # type: ignore[no-any-return]  # typed as Any

    async def send_all(self, data: bytes) -> None:
        try:
            with trio.move_on_after(WRITE_TIME_S) as scope:
                await self._tls.send_all(data)
        except trio.BrokenResourceError:
            self.cut_off()
            raise
        if scope.cancelled_caught:
            self.cut_off()
            raise trio.BrokenResourceError("the caller takes no answer")

    async def aclose(self) -> None:
        with trio.move_on_after(WRITE_TIME_S):
            await self._tls.aclose()

    def cut_off(self) -> None:
        """End the connection now: Hypercorn shields what it sends, which only a closed socket
        ends, and its reader would wait for ever for an answer that cannot be sent."""
        self._statistics.cut_off += 1
        self.give_way()

    def give_way(self) -> None:
        """End the connection now, for another's sake."""
        self.transport_stream.socket.close()
        self.scope.cancel()


def _source_of(stream: trio.SocketStream) -> str:
    """Whom a connection counts against; those that are gone again are one."""
    try:
        return source_of(peer_of(stream).host)
    except OSError:
        return ""


def _tls_context(chain: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.load_cert_chain(chain, key)
    return context


def _hypercorn_config() -> Config:
    config = Config()
    config.h11_max_incomplete_size = MAX_HEADER_BYTES
    config.h2_max_header_list_size = MAX_HEADER_BYTES
    config.h2_max_concurrent_streams = 8
    config.keep_alive_timeout = IDLE_TIME_S
    config.ssl_handshake_timeout = HANDSHAKE_TIME_S
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = logging.getLogger("portal.hypercorn")
    return config
