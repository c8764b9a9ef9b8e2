"""TURN over QUIC: the protocol is written up in docs/turn-over-quic.md.

Requests and their answers travel on one stream, which the client opens, framed as over TCP; data
(ChannelData, Send and Data indications) travels in DATAGRAM frames, and on the stream where it does
not fit into one. To the core a connection is a client at a reliable listener, known by its address;
when that changes, the allocation follows (`Server.client_moved`).

aioquic costs some 100 us for each packet: this is a way through for networks that let no other UDP
out than to port 443, not a fast one.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Final

import attrs
import trio

from channel.relay_doors import QUIC_ALPN, QuicCode, quic_client_limits
from relays.framing import MAX_FRAME_BYTES, FramingError, StreamFrames, padding_of
from relays.server import Server
from relays.transports.limits import (
    QUEUED_BYTES,
    QUEUED_DATA_BYTES,
    UNALLOCATED_FRAME_BYTES,
    UNALLOCATED_S,
)
from relays.transports.statistics import TransportStatistics, error_code_of
from relays.transports.tls import CertificateSource
from relays.transports.udp import UdpSockets
from relays.turn import is_channel_data, is_data_indication, is_send_indication
from runtime.clock import Clock
from runtime.guard import Guard
from runtime.net.address import Address
from runtime.net.connection import ConnectionClosed
from runtime.net.quic import QuicConnection, QuicLimits, QuicListener
from runtime.net.udp import UdpSocket

SWEEP_S: Final = 1.0

_NS: Final = 10**9


def quic_limits(*, connections: int, connections_per_source: int) -> QuicLimits:
    """What a relay allows at one listener."""
    return attrs.evolve(
        quic_client_limits(),
        receive_window_bytes=2 * MAX_FRAME_BYTES,
        send_buffer_bytes=QUEUED_BYTES,
        max_connections=connections,
        max_connections_per_source=connections_per_source,
    )


class _Client:
    """One connection. `since_ns`: when it came, or its allocation ended."""

    def __init__(self, connection: QuicConnection, source: tuple[str, int], now: int) -> None:
        self.connection = connection
        self.source = source
        self.since_ns = now
        self.frames = StreamFrames(UNALLOCATED_FRAME_BYTES)
        self.is_over = False


class QuicDoor:
    """A listener for TURN over QUIC; it serves while `run` runs. `certificates` is looked at for
    each new connection."""

    def __init__(
        self,
        address: Address,
        *,
        certificates: CertificateSource,
        server: Server,
        sockets: UdpSockets,
        clock: Clock,
        limits: QuicLimits,
        unallocated_s: float = UNALLOCATED_S,
        reuse_port: bool = False,
    ) -> None:
        """With `reuse_port` other processes listen there too; then a client that moves begins
        anew. Raises OSError when the address cannot be bound."""
        self._certificates = certificates
        self._shown = certificates.current
        self._server = server
        self._sockets = sockets
        self._clock = clock
        self._unallocated_ns = int(unallocated_s * _NS)
        self._client_by_source: dict[tuple[str, int], _Client] = {}
        self._guard = Guard("relay.quic")
        self._counts = TransportStatistics()
        self._is_relaying = False
        self._doomed: list[_Client] = []
        self._listener = QuicListener(
            UdpSocket.bind(address, dont_fragment=True, reuse_port=reuse_port),
            certificate_chain_pem=self._shown.chain,
            key_pem=self._shown.key.reveal(),
            alpn=QUIC_ALPN,
            limits=limits,
        )
        self.number = sockets.attach(self)
        server.add_listener(self.number, reliable=True)

    @property
    def address(self) -> Address:
        return self._listener.address

    async def run(self) -> None:
        """Serve until cancelled; that ends all connections."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sweep_for_ever)
            await self._listener.serve(self._serve)

    def transports(self) -> dict[str, TransportStatistics]:
        """See `relays.transports.statistics.Transport`."""
        listener = self._listener.statistics()
        self._counts.allocations = self._server.allocations_at(self.number)
        self._counts.connections = len(self._client_by_source)
        self._counts.accepted = listener.accepted
        self._counts.refused["limits"] = listener.refused_limit
        return {"quic": self._counts}

    def send(self, data: bytes | memoryview, destination: tuple[str, int]) -> bool:
        """See `relays.transports.udp.Outlet`."""
        client = self._client_by_source.get(destination)
        if client is None or client.is_over:
            return False
        connection, message = client.connection, bytes(data)
        if not is_channel_data(message) and not is_data_indication(memoryview(message)):
            if not connection.send(message):
                self._doomed.append(client)
                return False
            self._counts.errors[error_code_of(message)] += bool(error_code_of(message))
            return True
        if not self._is_relaying:
            self._counts.packets += 1
            self._counts.bytes += len(message)
        if len(message) <= connection.datagram_room:
            is_taken = connection.send_datagram(message)
        else:
            is_taken = connection.unacknowledged_bytes + len(
                message
            ) <= QUEUED_DATA_BYTES and connection.send(message + padding_of(message))
        self._counts.dropped += not is_taken
        return is_taken

    # --- one connection --------------------------------------------------------------------------

    async def _serve(self, connection: QuicConnection) -> None:
        source = (connection.remote.host, connection.remote.port)
        client = _Client(connection, source, self._clock.monotonic_ns())
        self._place(client, source)
        connection.on_datagram = partial(self._take_datagram, client)
        connection.on_migrated = partial(self._follow, client)
        reason = "closed"
        try:
            while True:
                data = await connection.receive()
                if not data:
                    break
                is_known = self._server.holds_allocation(self.number, client.source)
                client.frames.limit = MAX_FRAME_BYTES if is_known else UNALLOCATED_FRAME_BYTES
                self._take(client, client.frames.feed(data))
        except ConnectionClosed:
            pass
        except FramingError as error:
            reason = "framing"
            connection.close(QuicCode.FRAMING_ERROR, str(error))
        finally:
            self._end(client, QuicCode.NO_ERROR, reason)

    def _take_datagram(self, client: _Client, data: bytes) -> None:
        view = memoryview(data)
        if is_channel_data(data) or is_send_indication(view):
            self._take(client, (view,))

    def _take(self, client: _Client, messages: Iterable[memoryview]) -> None:
        if client.is_over:
            return
        server, now = self._server, self._clock.monotonic_ns()
        packets, size, failures = server.relayed_packets, server.relayed_bytes, self._guard.failures
        self._is_relaying = True
        with self._guard:
            for message in messages:
                server.receive(self.number, message, client.source, now)
            self._sockets.flush(server)
        self._is_relaying = False
        if self._guard.failures != failures:
            server.transmits.clear()
            self._end(client, QuicCode.FRAMING_ERROR, "mistake")
        self._counts.packets += server.relayed_packets - packets
        self._counts.bytes += server.relayed_bytes - size
        doomed, self._doomed = self._doomed, []
        for each in doomed:
            self._end(each, QuicCode.SLOW, "slow")

    def _follow(self, client: _Client, remote: Address) -> None:
        """The client is somewhere else, as QUIC has proved (RFC 9000, section 9)."""
        if client.is_over:
            return
        before, after = client.source, (remote.host, remote.port)
        del self._client_by_source[before]
        self._place(client, after)
        client.source = after
        self._server.client_moved(self.number, before, after)

    def _place(self, client: _Client, source: tuple[str, int]) -> None:
        """An address belongs to who was seen there last: one who was there before is gone, or would
        have been followed to where he is now."""
        older = self._client_by_source.get(source)
        if older is not None:
            self._end(older, QuicCode.SUPERSEDED, "superseded")
        self._client_by_source[source] = client

    def _end(self, client: _Client, code: QuicCode, reason: str) -> None:
        if client.is_over:
            return
        client.is_over = True
        if self._client_by_source.get(client.source) is client:
            del self._client_by_source[client.source]
        self._server.client_gone(self.number, client.source)
        client.connection.close(code, reason)
        self._counts.ended[reason] += 1

    async def _sweep_for_ever(self) -> None:
        while True:
            await trio.sleep(SWEEP_S)
            self._look_at_certificate()
            now = self._clock.monotonic_ns()
            for client in list(self._client_by_source.values()):
                if self._server.holds_allocation(self.number, client.source):
                    client.since_ns = now
                elif now - client.since_ns >= self._unallocated_ns:
                    self._end(client, QuicCode.IDLE, "idle")

    def _look_at_certificate(self) -> None:
        current = self._certificates.current
        if current is not self._shown:
            self._shown = current
            self._listener.replace_certificate(current.chain, current.key.reveal())
