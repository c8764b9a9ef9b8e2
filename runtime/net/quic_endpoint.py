"""Endpoints: one UDP socket each, and the QUIC connections that live on it.

The essay on what is decided is in `runtime.net.quic`. Some 700 lines, since the endpoints of a
server and of a client are one loop over one socket.
"""

from __future__ import annotations

import hashlib
import heapq
import hmac
import math
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import attrs
import trio
from aioquic._buffer import Buffer
from aioquic.quic import events
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.connection import TRANSPORT_CLOSE_FRAME_CAPACITY
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import (
    QuicFrameType,
    QuicHeader,
    QuicPacketType,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.retry import QuicRetryTokenHandler
from cryptography.x509 import Certificate

from runtime.net.address import Address
from runtime.net.quic_connection import (
    BAD_CERTIFICATE,
    CONNECTION_REFUSED,
    HANDSHAKE_TIMEOUT,
    IDLE_TIMEOUT,
    PORT_CLOSED,
    STATELESS_RESET,
    QuicClosed,
    QuicConnection,
)
from runtime.net.quic_core import (
    MIN_RESET_BYTES,
    RESET_TOKEN_BYTES,
    QuicCore,
    QuicLimits,
)
from runtime.net.quic_newcomers import Newcomer, Newcomers
from runtime.net.quic_short import CID_BYTES
from runtime.net.quic_suspicion import Suspicion
from runtime.net.sources import source_of
from runtime.net.udp import UdpSocket
from runtime.service import get_logger

_NO_APPLICATION_PROTOCOL: Final = 0x100 + 120
_MAX_RESET_BYTES: Final = 43
_REFUSALS_OF_A_DIAL: Final = 2
_LONG_HEADER: Final = 0x80
_BATCH: Final = 64
"""So many datagrams are taken before anything else has its turn."""
_BATCHES_BEFORE_TIMERS: Final = 32
_NS_PER_S: Final = 10**9

log = get_logger("quic")


@attrs.frozen(kw_only=True)
class QuicListenerStatistics:
    """Live connections, and counts since the listener was made. `dropped_unread` is the socket's
    (`UdpStatistics`): keepalives, mostly."""

    connections: int
    handshakes: int
    accepted: int
    refused_limit: int
    retries_sent: int
    resets_sent: int
    failures: int
    dropped_unread: int


class Endpoint(ABC):
    """One UDP socket and the connections on it: reads, steps, sends, keeps their timers.

    `mark` asks for a connection to be stepped; many sends between two turns of the event loop
    share packets. Timers lie in a heap in which a connection has about one entry: a later
    deadline is put in only when the earlier one comes up.
    """

    def __init__(self, socket: UdpSocket, limits: QuicLimits) -> None:
        self.socket = socket
        self.limits = limits
        self.failures = 0
        self._marked: dict[QuicConnection, None] = {}
        self._wake = trio.Event()
        self._reader_waits = False
        self._timers: list[tuple[float, int, QuicConnection]] = []
        self._timer_number = 0

    def mark(self, connection: QuicConnection) -> None:
        self._marked[connection] = None
        self._wake.set()

    def send_aside(self, connection: QuicConnection, data: bytes) -> None:
        self.socket.send(data, connection.remote)

    def flush(self) -> None:
        """Step what is marked, now."""
        while self._marked:
            marked, self._marked = self._marked, {}
            for connection in marked:
                self.step(connection)

    async def run(self) -> None:
        """Serve the socket until cancelled; then close every connection, and the socket."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read)
                await self._keep_time()
        finally:
            self.shut_down()
            self.flush()
            self.socket.close()

    @abstractmethod
    def datagram(self, data: bytes, sender: Address) -> None: ...

    def refused(self, remote: Address) -> None:
        """The kernel was told that nobody listens at `remote`; it may be a lie."""

    @property
    def has_newcomers(self) -> bool:
        """Whether `take_in` has something to do."""
        return False

    def take_in(self) -> None:
        """Begin one handshake, if one was asked for; what has come on connections goes first."""

    @abstractmethod
    def established(self, connection: QuicConnection) -> None: ...

    @abstractmethod
    def forget(self, connection: QuicConnection) -> None: ...

    def issued(self, connection: QuicConnection, cid: bytes) -> None:
        """The peer may use `cid` for this connection from now on."""

    def retired(self, connection: QuicConnection, cid: bytes) -> None:
        """The peer will not use `cid` any more."""

    @abstractmethod
    def shut_down(self) -> None: ...

    def receive(self, connection: QuicConnection, data: bytes, sender: Address) -> None:
        """Pass one datagram to its connection. Whatever it does to it, it does to it alone."""
        core = connection._core
        if core.is_released:
            return
        if core.configuration.is_client and core.is_reset(data):
            self._finish(connection, QuicClosed(STATELESS_RESET, "the server has forgotten us"))
            return
        try:
            now = trio.current_time()
            core.receive_datagram(data, sender, now)
            # Mostly an acknowledgement of all there was: nothing is to be done about it, and the
            # timer that is set leads to the next one.
            if (
                connection._lingering is None
                and sender == connection._remote
                and core.is_at_rest(now)
            ):
                connection._wake_writer()
                return
        except Exception as error:
            self._fail(connection, error)
            return
        self.mark(connection)

    def step(self, connection: QuicConnection) -> None:
        """Handle events, send what is due, set the timer."""
        core, now = connection._core, trio.current_time()
        if core.is_released:
            return
        try:
            while (event := core.next_event()) is not None:
                if isinstance(event, events.ConnectionTerminated):
                    self._finish(connection, _closed_by(event))
                    return
                self._handle(connection, event)
            if (ended := core.ended_by_peer()) is not None:
                self._finish(connection, _closed_by(ended))
                return
            connection._follow_path()
            self._linger(connection, now)
            for data, remote in core.datagrams_to_send(now):
                self.socket.send(data, remote)
            timer = core.next_look()
        except Exception as error:
            self._fail(connection, error)
            return
        if connection._closed is not None and connection._lingering is None:
            self._drop(connection)
            return
        if connection.unacknowledged_bytes <= self.limits.send_buffer_bytes:
            connection._wake_writer()
        self._schedule(connection, min(timer, connection._deadline))

    # --- helpers -------------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            if self.has_newcomers:
                await trio.lowlevel.checkpoint()
            else:
                self._reader_waits = True
                await self.socket.wait_readable()
                self._reader_waits = False
            self._hear(1)
            # After the datagrams: what the peer said before its end is no answer to a probe.
            for remote in self.socket.take_refusals():
                self.refused(remote)
            self.flush()
            self.take_in()

    async def _keep_time(self) -> None:
        while True:
            # What other tasks send in this turn shares packets.
            await trio.lowlevel.checkpoint()
            if self._timers and self._timers[0][0] <= trio.current_time():
                # To have told a thousand connections something takes a while, in which they have
                # answered: that is read before their answers are missed.
                self._hear(_BATCHES_BEFORE_TIMERS)
                self._fire_timers()
            self.flush()
            self._wake = trio.Event()
            if self._reader_waits and self.has_newcomers:  # of which it does not know
                self.take_in()
                self._wake.set()
            with trio.move_on_at(self._timers[0][0] if self._timers else math.inf):
                await self._wake.wait()

    def _hear(self, batches: int) -> None:
        """Take what has come, at most so many batches of it."""
        for _ in range(batches):
            batch = self.socket.receive_batch(_BATCH)
            for data, sender in batch:
                self.datagram(data, sender)
            if len(batch) < _BATCH:
                return

    def _schedule(self, connection: QuicConnection, at: float) -> None:
        if at >= connection._scheduled_at:
            return
        connection._scheduled_at = at
        self._timer_number += 1
        heapq.heappush(self._timers, (at, self._timer_number, connection))
        if self._timers[0][2] is connection:
            self._wake.set()

    def _fire_timers(self) -> None:
        now = trio.current_time()
        while self._timers and self._timers[0][0] <= now:
            at, _, connection = heapq.heappop(self._timers)
            if at != connection._scheduled_at:
                continue
            connection._scheduled_at = math.inf
            if connection._deadline <= now:
                self._expire(connection)
                self.mark(connection)
            else:
                self._tick(connection, now)

    def _tick(self, connection: QuicConnection, now: float) -> None:
        try:
            timer = connection._core.next_look()
            if now < timer < math.inf:
                # An acknowledgement has put it off since it was set.
                self._schedule(connection, min(timer, connection._deadline))
                return
            if timer <= now:
                connection._core.handle_timer(now)
        except Exception as error:
            self._fail(connection, error)
            return
        self.mark(connection)

    def _expire(self, connection: QuicConnection) -> None:
        connection._deadline = math.inf
        if connection._lingering is not None:
            code, reason = connection._lingering
            connection._lingering = None
            connection._core.close(error_code=code, reason_phrase=reason)
        elif not connection._established:
            self._finish(connection, QuicClosed(HANDSHAKE_TIMEOUT, "the handshake took too long"))

    def _linger(self, connection: QuicConnection, now: float) -> None:
        if connection._lingering is None or connection._stream is None:
            return
        if connection._stream.sender.is_finished:
            self._expire(connection)

    def _handle(self, connection: QuicConnection, event: events.QuicEvent) -> None:
        if isinstance(event, events.HandshakeCompleted):
            connection._established = True
            connection._deadline = math.inf
            connection._core.forget_handshake()
            if event.alpn_protocol not in (connection._core.configuration.alpn_protocols or ()):
                connection.close(_NO_APPLICATION_PROTOCOL, "another protocol")
                return
            self.established(connection)
        elif isinstance(event, events.ConnectionIdIssued):
            self.issued(connection, event.connection_id)
        elif isinstance(event, events.ConnectionIdRetired):
            self.retired(connection, event.connection_id)
        else:
            connection._handle(event)

    def _fail(self, connection: QuicConnection, error: Exception) -> None:
        """A mistake of aioquic that a peer found: it costs that peer its connection alone."""
        self.failures += 1
        log.error("connection_failed", remote=str(connection.remote), error=repr(error))
        self._finish(connection, QuicClosed(1, f"internal error: {type(error).__name__}"))

    def _finish(self, connection: QuicConnection, closed: QuicClosed) -> None:
        connection._lingering = None
        connection._end(closed)
        self._drop(connection)

    def _drop(self, connection: QuicConnection) -> None:
        connection._deadline = connection._scheduled_at = math.inf
        connection._core.release()
        self.forget(connection)


class ClientEndpoint(Endpoint):
    """The endpoint of one connection that was dialled.

    A refusal by the peer's machine ends a dial when it comes a second time (QUIC has repeated
    itself by then); of a connection that stood it raises a suspicion only.
    """

    def __init__(
        self,
        socket: UdpSocket,
        limits: QuicLimits,
        configuration: QuicConfiguration,
        remote: Address,
        verify: Callable[[Sequence[Certificate]], None],
    ) -> None:
        super().__init__(socket, limits)
        self._verify = verify
        self._refusal: Exception | None = None
        self._ready = trio.Event()
        self._refusals = 0
        self.suspicion = Suspicion()
        core = QuicCore(
            configuration, limits.receive_window_bytes, client_opens=limits.client_opens
        )
        self.connection = QuicConnection(core, self, remote)
        now = trio.current_time()
        core.connect(remote, now)
        self.connection._deadline = now + limits.handshake_timeout_ns / _NS_PER_S
        self.mark(self.connection)

    async def wait_established(self) -> QuicConnection:
        await self._ready.wait()
        if self._refusal is not None:
            raise self._refusal
        if self.connection.closed is not None:
            raise self.connection.closed.anew()
        return self.connection

    def datagram(self, data: bytes, sender: Address) -> None:
        core = self.connection._core
        heard = core.packets_heard
        self.receive(self.connection, data, sender)
        if core.packets_heard != heard:
            self._refusals = 0
            self.suspicion.heard()

    def refused(self, remote: Address) -> None:
        connection = self.connection
        if remote != connection.remote or connection.closed is not None:
            return
        if connection._established:
            self.suspicion.hint(trio.current_time(), connection._core.probe_timeout())
            self._schedule(connection, self.suspicion.poll_timeout())
            return
        self._refusals += 1
        if self._refusals >= _REFUSALS_OF_A_DIAL:
            self._finish(connection, QuicClosed(PORT_CLOSED, "nobody listens at its port"))

    def step(self, connection: QuicConnection) -> None:
        super().step(connection)
        if connection.closed is None:
            self._schedule(connection, self.suspicion.poll_timeout())

    def established(self, connection: QuicConnection) -> None:
        try:
            self._verify(connection.certificates)
        except Exception as error:
            self._refusal = error
            connection.close(BAD_CERTIFICATE, "the certificate is refused")
        else:
            if self.limits.client_opens:
                connection._open_stream()
        self._ready.set()

    def forget(self, connection: QuicConnection) -> None:
        self._ready.set()

    def shut_down(self) -> None:
        self.connection.close()

    def _tick(self, connection: QuicConnection, now: float) -> None:
        match self.suspicion.handle_timeout(now):
            case "probe":
                connection._core.probe()
                self.mark(connection)
            case "gone" if connection.closed is None:
                reason = "its port is closed, and it does not answer"
                self._finish(connection, QuicClosed(PORT_CLOSED, reason))
                return
        super()._tick(connection, now)
        if connection.closed is None:
            self._schedule(connection, self.suspicion.poll_timeout())


class ServerEndpoint(Endpoint):
    """The endpoint of a listener: finds a packet's connection, or decides about a new one.

    Who comes new waits for its turn (`runtime.net.quic_newcomers`).
    """

    def __init__(
        self,
        socket: UdpSocket,
        limits: QuicLimits,
        configuration: Callable[[], QuicConfiguration],
        reset_key: bytes,
    ) -> None:
        super().__init__(socket, limits)
        self.accepted: Callable[[QuicConnection], None] = lambda connection: None
        self._configuration = configuration
        self._reset_key = reset_key
        self._retry = QuicRetryTokenHandler()
        self._connection_by_cid: dict[bytes, QuicConnection] = {}
        self._source_by_connection: dict[QuicConnection, str] = {}
        self._connections_by_source: Counter[str] = Counter()
        self._newcomers = Newcomers()
        self._handshakes: set[QuicConnection] = set()
        self._handshakes_by_source: Counter[str] = Counter()
        self._resets_second = 0
        self._resets_in_second = 0
        self._accepted = self._refused = self._retries = self._resets = 0

    def datagram(self, data: bytes, sender: Address) -> None:
        if len(data) > CID_BYTES and not data[0] & _LONG_HEADER:
            connection = self._connection_by_cid.get(data[1 : 1 + CID_BYTES])
            if connection is not None:
                self.receive(connection, data, sender)
                return
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=CID_BYTES)
        except ValueError:
            return
        connection = self._connection_by_cid.get(header.destination_cid)
        if connection is not None:
            self.receive(connection, data, sender)
        elif self._newcomers.heard(header.destination_cid, data, sender, trio.current_time()):
            pass
        elif header.packet_type == QuicPacketType.ONE_RTT:
            self._reset(header.destination_cid, len(data), sender)
        elif len(data) >= SMALLEST_MAX_DATAGRAM_SIZE:
            self._first_datagram(header, data, sender)

    def established(self, connection: QuicConnection) -> None:
        self._end_handshake(connection)
        self._accepted += 1
        if not self.limits.client_opens:
            connection._open_stream()
        self.accepted(connection)

    def issued(self, connection: QuicConnection, cid: bytes) -> None:
        if connection in self._source_by_connection:
            connection._cids.add(cid)
            self._connection_by_cid[cid] = connection

    def retired(self, connection: QuicConnection, cid: bytes) -> None:
        connection._cids.discard(cid)
        self._connection_by_cid.pop(cid, None)

    def forget(self, connection: QuicConnection) -> None:
        if connection not in self._source_by_connection:
            return
        self._end_handshake(connection)
        _count_down(self._connections_by_source, self._source_by_connection.pop(connection))
        for cid in connection._cids:
            self._connection_by_cid.pop(cid, None)

    def _end_handshake(self, connection: QuicConnection) -> None:
        if connection in self._handshakes:
            self._handshakes.remove(connection)
            _count_down(self._handshakes_by_source, self._source_by_connection[connection])

    def shut_down(self) -> None:
        for connection in list(self._source_by_connection):
            connection.close(0, "shutting down")

    def statistics(self) -> QuicListenerStatistics:
        return QuicListenerStatistics(
            connections=len(self._source_by_connection),
            handshakes=self._count_handshakes(),
            accepted=self._accepted,
            refused_limit=self._refused,
            retries_sent=self._retries,
            resets_sent=self._resets,
            failures=self.failures,
            dropped_unread=self.socket.statistics().dropped_unread,
        )

    # --- new connections -----------------------------------------------------------------------

    def _first_datagram(self, header: QuicHeader, data: bytes, sender: Address) -> None:
        configuration = self._configuration()
        if header.packet_type == QuicPacketType.VERSION_NEGOTIATION or header.version is None:
            return
        if header.version not in configuration.supported_versions:
            answer = encode_quic_version_negotiation(
                source_cid=header.destination_cid,
                destination_cid=header.source_cid,
                supported_versions=configuration.supported_versions,
            )
            self.socket.send(answer, sender)
            return
        if header.packet_type != QuicPacketType.INITIAL:
            return
        source = source_of(sender.host)
        waiting = self._newcomers.of_source(source)
        if (
            self._count_handshakes() >= self.limits.max_handshakes
            or waiting + self._handshakes_by_source[source] >= self.limits.max_handshakes_per_source
        ):
            # Silence: an honest client repeats itself, and finds room then.
            self._refused += 1
            return
        original, retry_source = header.destination_cid, None
        if header.token:
            retry_source = header.destination_cid
            try:
                original = self._retry.validate_token(
                    address=sender,
                    destination_cid=header.destination_cid,
                    token=header.token,
                    now=trio.current_time(),
                )
            except ValueError:
                return
        elif self._count_handshakes() >= self.limits.retry_above_handshakes:
            self._ask_to_retry(header, sender)
            return
        if (
            len(self._source_by_connection) + len(self._newcomers) >= self.limits.max_connections
            or waiting + self._connections_by_source[source]
            >= self.limits.max_connections_per_source
        ):
            self._refuse(header, sender)
            return
        self._newcomers.put(
            Newcomer(
                cid=header.destination_cid,
                source=source,
                sender=sender,
                original_cid=original,
                retry_cid=retry_source,
                heard_at=trio.current_time(),
                datagrams=[data],
            )
        )

    @property
    def has_newcomers(self) -> bool:
        return len(self._newcomers) > 0

    def take_in(self) -> None:
        newcomer = self._newcomers.take(trio.current_time())
        if newcomer is not None:
            self._accept(newcomer)
            self.flush()

    def _count_handshakes(self) -> int:
        """Begun, or waiting to be."""
        return len(self._handshakes) + len(self._newcomers)

    def _accept(self, newcomer: Newcomer) -> None:
        core = QuicCore(
            self._configuration(),
            self.limits.receive_window_bytes,
            self._reset_token,
            newcomer.original_cid,
            newcomer.retry_cid,
            client_opens=self.limits.client_opens,
        )
        connection = QuicConnection(core, self, newcomer.sender)
        source = newcomer.source
        self._source_by_connection[connection] = source
        self._connections_by_source[source] += 1
        self._handshakes.add(connection)
        self._handshakes_by_source[source] += 1
        for cid in (newcomer.cid, core.host_cid):
            connection._cids.add(cid)
            self._connection_by_cid[cid] = connection
        connection._deadline = trio.current_time() + self.limits.handshake_timeout_ns / _NS_PER_S
        for data in newcomer.datagrams:
            self.receive(connection, data, newcomer.sender)
        if not core.has_begun():
            self._drop(connection)

    def _ask_to_retry(self, header: QuicHeader, sender: Address) -> None:
        if header.version is None:
            return
        source_cid = os.urandom(CID_BYTES)
        token = self._retry.create_token(
            address=sender,
            original_destination_connection_id=header.destination_cid,
            retry_source_connection_id=source_cid,
            now=trio.current_time(),
        )
        self._retries += 1
        self.socket.send(
            encode_quic_retry(
                version=header.version,
                source_cid=source_cid,
                destination_cid=header.source_cid,
                original_destination_cid=header.destination_cid,
                retry_token=token,
            ),
            sender,
        )

    def _refuse(self, header: QuicHeader, sender: Address) -> None:
        """Say CONNECTION_REFUSED (RFC 9000, section 20.1) without keeping anything."""
        self._refused += 1
        if header.version is None:
            return
        crypto = CryptoPair()
        crypto.setup_initial(cid=header.destination_cid, is_client=False, version=header.version)
        builder = QuicPacketBuilder(
            host_cid=header.destination_cid,
            is_client=False,
            max_datagram_size=SMALLEST_MAX_DATAGRAM_SIZE,
            peer_cid=header.source_cid,
            version=header.version,
        )
        builder.start_packet(QuicPacketType.INITIAL, crypto)
        frame = builder.start_frame(
            QuicFrameType.TRANSPORT_CLOSE, capacity=TRANSPORT_CLOSE_FRAME_CAPACITY
        )
        frame.push_uint_var(CONNECTION_REFUSED)
        frame.push_uint_var(QuicFrameType.PADDING)
        frame.push_uint_var(0)
        datagrams, _ = builder.flush()
        self.socket.send(datagrams[0], sender)

    def _reset(self, cid: bytes, size: int, sender: Address) -> None:
        """Answer a packet of an unknown connection, shorter than it was, so that no two
        listeners can answer each other for ever (RFC 9000, section 10.3.3)."""
        second = int(trio.current_time())
        if second != self._resets_second:
            self._resets_second, self._resets_in_second = second, 0
        size = min(size - 1, _MAX_RESET_BYTES)
        if size < MIN_RESET_BYTES or self._resets_in_second >= self.limits.resets_per_s:
            return
        self._resets_in_second += 1
        self._resets += 1
        noise = bytearray(os.urandom(size - RESET_TOKEN_BYTES))
        noise[0] = noise[0] & 0x3F | 0x40
        self.socket.send(bytes(noise) + self._reset_token(cid), sender)

    def _reset_token(self, cid: bytes) -> bytes:
        return hmac.digest(self._reset_key, cid, hashlib.sha256)[:RESET_TOKEN_BYTES]


def _count_down(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def _closed_by(event: events.ConnectionTerminated) -> QuicClosed:
    if event.reason_phrase == "Idle timeout" and event.frame_type == QuicFrameType.PADDING:
        return QuicClosed(IDLE_TIMEOUT, "nothing came for too long")
    return QuicClosed(event.error_code, event.reason_phrase)
