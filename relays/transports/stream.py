"""TURN over TCP and TLS: listeners and their connections, beside the sockets of UDP.

All connections are in one epoll set for which one task waits; what is readable is read without
waiting, in turns of bounded size, into one buffer that serves all. Every message of a read goes to
the core at once, and what the core has to send leaves before the buffer is used again: a run of
ChannelData becomes a run of datagrams in one go. What goes to clients is queued, and leaves with
one send for all that came together. A connection costs no task; those of TLS are Python's sockets
of TLS, used without blocking.

What a stranger can take is bounded, see `StreamLimits`. A client that reads too slowly loses data
first, as a network would drop it (TCP itself must not be made to: it would only come later), and
its connection when not even answers find room. A violation of the framing ends the connection. An
allocation ends with its connection (RFC 8656, section 7).
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import ssl
from typing import Final

import attrs
import trio

from relays.framing import MAX_FRAME_BYTES, FramingError, padding_of, take_frames
from relays.peers import RateLimiter, source_prefix
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
from runtime.clock import Clock
from runtime.guard import Guard
from runtime.net.address import Address
from runtime.net.sources import SourceLimit
from runtime.net.tcp import listening_socket
from runtime.service import get_logger

READ_BYTES: Final = 64 * 1024
"""Read of one connection in one turn, at most."""
CONNECTIONS_PER_TURN: Final = 64
ACCEPTS_PER_TURN: Final = 64
ACCEPT_PAUSE_S: Final = 0.5
"""After the machine had no open file or memory for a newcomer."""
SWEEP_S: Final = 1.0
UNSENT_BYTES: Final = 64 * 1024
"""What the kernel may hold that it has not sent: what waits longer waits here, and is dropped."""

_TLS_RECORD_BYTES: Final = 16 * 1024
_NS: Final = 10**9
_READ = select.EPOLLIN
_WRITE = select.EPOLLOUT
_OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_WAIT: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

_log = get_logger("relay.streams")


@attrs.frozen(kw_only=True)
class StreamLimits:
    """What clients with connections may take, of TCP and TLS together.

    A prefix is the /24 of an IPv4 address or the /56 of an IPv6 address. Where all `connections`
    are taken, the oldest without an allocation gives way to a newcomer. The last two, and
    `unallocated_s`, are those of `relays.transports.limits`.
    """

    connections: int = 16_384
    connections_per_prefix: int = 2_048
    connections_per_second: int = 100
    """Newcomers of one prefix; four times as many at once."""
    handshake_s: float = 10.0
    """For the TLS handshake."""
    unallocated_s: float = UNALLOCATED_S
    dead_after_s: int = 60
    """An end that acknowledges nothing for so long is dead (RFC 5482): data, or the kernel's probes
    once nothing was heard of it for as long."""
    queued_data_bytes: int = QUEUED_DATA_BYTES
    queued_bytes: int = QUEUED_BYTES


class _Connection:
    __slots__ = (
        "door",
        "events",
        "is_allocated",
        "is_closed",
        "is_dirty",
        "is_shaking",
        "pending",
        "prefix",
        "queued",
        "rest",
        "since_ns",
        "socket",
        "source",
    )

    def __init__(
        self,
        door: _Door,
        accepted: socket.socket,
        source: tuple[str, int],
        prefix: str | bytes,
        now: int,
    ) -> None:
        self.door = door
        self.socket = accepted
        self.source = source
        self.prefix = prefix
        self.since_ns = now
        """When it came, or its allocation ended."""
        self.is_shaking = isinstance(accepted, ssl.SSLSocket)
        self.is_allocated = False
        self.is_dirty = False
        self.is_closed = False
        self.events = _READ
        self.rest = b""
        """The beginning of a message."""
        self.pending: list[bytes] = []
        self.queued = 0
        """Bytes of `pending`."""


class _Door:
    """A listener: what the core calls by `number`."""

    def __init__(
        self,
        owner: StreamSockets,
        transport: str,
        listening: socket.socket,
        certificates: CertificateSource | None,
    ) -> None:
        self.number = 0
        self.transport = transport
        self.listening = listening
        self.certificates = certificates
        self.client_by_source: dict[tuple[str, int], _Connection] = {}
        self.counts = TransportStatistics()
        self._owner = owner

    def send(self, data: bytes | memoryview, destination: tuple[str, int]) -> bool:
        """See `relays.transports.udp.Outlet`."""
        connection = self.client_by_source.get(destination)
        if connection is None or connection.is_shaking:
            return False
        is_channel_data = data[0] >= 0x40
        is_data = is_channel_data or (data[0] == 0 and data[1] == 0x17)
        counts, limits = self.counts, self._owner.limits
        queued = connection.queued + len(data)
        if is_data:
            if queued > limits.queued_data_bytes:
                counts.dropped += 1
                return False
            if not self._owner.is_relaying:  # else it was counted where it came from
                counts.packets += 1
                counts.bytes += len(data) - 4 if is_channel_data else _data_bytes(data)
        elif queued > limits.queued_bytes:
            self._owner.doom(connection)
            return False
        elif code := error_code_of(data):
            counts.errors[code] += 1
        pending = connection.pending
        pending.append(data if type(data) is bytes else bytes(data))
        if is_channel_data and len(data) & 3:
            pending.append(padding_of(data))
            queued += len(pending[-1])
        connection.queued = queued
        if not connection.is_dirty:
            self._owner.soil(connection)
        return True


class StreamSockets:
    """Owns the listeners and connections, and moves messages while `run` runs. Close it when done:
    that ends all connections."""

    def __init__(
        self,
        *,
        server: Server,
        sockets: UdpSockets,
        clock: Clock,
        limits: StreamLimits | None = None,
    ) -> None:
        self.limits = limits or StreamLimits()
        self.is_relaying = False
        """Messages of a connection are being handled just now."""
        self._server = server
        self._sockets = sockets
        self._clock = clock
        self._epoll = select.epoll()
        self._door_by_descriptor: dict[int, _Door] = {}
        self._paused: list[_Door] = []
        self._connection_by_descriptor: dict[int, _Connection] = {}
        self._unallocated: dict[_Connection, None] = {}
        """In the order in which they came to be so."""
        self._unfinished: dict[_Connection, None] = {}
        """Of which TLS has read more than was taken."""
        self._dirty: list[_Connection] = []
        self._doomed: list[_Connection] = []
        self._writable = trio.Event()
        self._places = SourceLimit(self.limits.connections, self.limits.connections_per_prefix)
        self._newcomers = RateLimiter(
            per_second=self.limits.connections_per_second,
            burst=4 * self.limits.connections_per_second,
            max_keys=65_536,
        )
        self._view = memoryview(bytearray(MAX_FRAME_BYTES + READ_BYTES))
        self._nursery: trio.Nursery | None = None
        self._guard = Guard("relay.streams")

    def listen(
        self,
        address: Address,
        certificates: CertificateSource | None = None,
        *,
        reuse_port: bool = False,
    ) -> Address:
        """Open a listener for TCP, or for TLS with `certificates`; where it is bound. With
        `reuse_port` other processes listen there too. Raises OSError."""
        listening = listening_socket(address, ipv6_only=True, reuse_port=reuse_port)
        _watch_over(listening, self.limits.dead_after_s)
        door = _Door(self, "tls" if certificates else "tcp", listening, certificates)
        door.number = self._sockets.attach(door)
        self._server.add_listener(door.number, reliable=True)
        self._epoll.register(listening, _READ)
        self._door_by_descriptor[listening.fileno()] = door
        name = listening.getsockname()
        return Address(name[0], name[1])

    def close_all(self) -> None:
        for connection in list(self._connection_by_descriptor.values()):
            self._close(connection, "shutdown")
        for door in self._door_by_descriptor.values():
            door.listening.close()
        self._door_by_descriptor.clear()
        if not self._epoll.closed:
            with contextlib.suppress(RuntimeError):
                trio.lowlevel.notify_closing(self._epoll.fileno())
            self._epoll.close()

    async def run(self) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._read_for_ever)
            nursery.start_soon(self._write_for_ever)
            nursery.start_soon(self._sweep_for_ever)

    def transports(self) -> dict[str, TransportStatistics]:
        """See `relays.transports.statistics.Transport`."""
        totals: dict[str, TransportStatistics] = {}
        for door in self._door_by_descriptor.values():
            door.counts.allocations = self._server.allocations_at(door.number)
            door.counts.connections = len(door.client_by_source)
            totals.setdefault(door.transport, TransportStatistics()).add(door.counts)
        return totals

    @property
    def failures(self) -> int:
        """Inputs that met a mistake of ours."""
        return self._guard.failures

    # --- what a door calls -----------------------------------------------------------------------

    def soil(self, connection: _Connection) -> None:
        """There is something to be written."""
        connection.is_dirty = True
        self._dirty.append(connection)
        self._writable.set()

    def doom(self, connection: _Connection) -> None:
        """End a connection, but not in the midst of what the core has to send."""
        self._doomed.append(connection)
        self._writable.set()

    # --- tasks -----------------------------------------------------------------------------------

    async def _read_for_ever(self) -> None:
        while True:
            if self._unfinished:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
            now = self._clock.monotonic_ns()
            for connection in list(self._unfinished)[:CONNECTIONS_PER_TURN]:
                del self._unfinished[connection]
                self._serve(connection, _READ, now)
            for descriptor, events in self._epoll.poll(0, CONNECTIONS_PER_TURN):
                found = self._connection_by_descriptor.get(descriptor)
                if found is not None:
                    if found not in self._unfinished:
                        self._serve(found, events, now)
                elif descriptor in self._door_by_descriptor:
                    with self._guard:
                        self._accept(self._door_by_descriptor[descriptor], now)
            self._write_dirty()

    async def _write_for_ever(self) -> None:
        while True:
            await self._writable.wait()
            self._writable = trio.Event()
            self._write_dirty()

    async def _sweep_for_ever(self) -> None:
        while True:
            await trio.sleep(SWEEP_S)
            now = self._clock.monotonic_ns()
            for connection in list(self._connection_by_descriptor.values()):
                self._judge(connection, now)

    def _judge(self, connection: _Connection, now: int) -> None:
        """End a connection that had its time."""
        waited_s = (now - connection.since_ns) / _NS
        if connection.is_shaking:
            if waited_s >= self.limits.handshake_s:
                connection.door.counts.handshake_failures += 1
                self._close(connection, "handshake_deadline")
        elif self._holds_allocation(connection):
            self._note_allocated(connection)
        elif connection.is_allocated:
            connection.is_allocated, connection.since_ns = False, now
            self._unallocated[connection] = None
        elif waited_s >= self.limits.unallocated_s:
            self._close(connection, "idle")

    # --- newcomers -------------------------------------------------------------------------------

    def _accept(self, door: _Door, now: int) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                accepted, address = door.listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self._pause(door, error)
                    return
                continue  # the newcomer has gone again, or so (accept(2))
            self._take(door, accepted, (address[0], address[1]), now)

    def _pause(self, door: _Door, error: OSError) -> None:
        door.counts.refused["resources"] += 1
        count = door.counts.refused["resources"]
        if count & (count - 1) == 0:
            _log.error(
                "accept_paused", transport=door.transport, reason=error.strerror, times=count
            )
        self._epoll.unregister(door.listening)
        assert self._nursery is not None
        self._nursery.start_soon(self._resume, door)

    async def _resume(self, door: _Door) -> None:
        await trio.sleep(ACCEPT_PAUSE_S)
        self._epoll.register(door.listening, _READ)

    def _take(
        self, door: _Door, accepted: socket.socket, source: tuple[str, int], now: int
    ) -> None:
        older = door.client_by_source.get(source)
        if older is not None:  # the kernel would not have this one while that stands
            self._close(older, "lost")
        prefix = source_prefix(source[0])
        refusal = self._refusal(prefix, now)
        if refusal:
            door.counts.refused[refusal] += 1
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            accepted.close()
            return
        try:
            accepted.setblocking(False)
            if door.certificates is not None:
                accepted = door.certificates.current.context.wrap_socket(
                    accepted, server_side=True, do_handshake_on_connect=False
                )
            self._epoll.register(accepted, _READ)
        except (OSError, ValueError):
            accepted.close()
            self._places.leave(prefix)
            return
        connection = _Connection(door, accepted, source, prefix, now)
        door.client_by_source[source] = connection
        door.counts.accepted += 1
        self._connection_by_descriptor[accepted.fileno()] = connection
        self._unallocated[connection] = None

    def _refusal(self, prefix: str | bytes, now: int) -> str:
        """Take a place for a newcomer; why not, if there is none."""
        if not self._newcomers.take(prefix, now):
            return "rate"
        if self._places.enter(prefix):
            return ""
        if len(self._places) < self.limits.connections:
            return "prefix"
        oldest = next(iter(self._unallocated), None)
        if oldest is None:
            return "full"
        self._close(oldest, "displaced")
        return "" if self._places.enter(prefix) else "prefix"

    # --- connections -----------------------------------------------------------------------------

    def _serve(self, connection: _Connection, events: int, now: int) -> None:
        failures = self._guard.failures
        with self._guard:
            if events & _WRITE:
                self._write(connection)
            if connection.is_shaking:
                self._shake_hands(connection)
            if not connection.is_shaking and not connection.is_closed and events & ~_WRITE:
                self._read(connection, now)
        if self._guard.failures != failures:
            self._server.transmits.clear()  # views of a buffer that is used again
            self._close(connection, "mistake")

    def _shake_hands(self, connection: _Connection) -> None:
        assert isinstance(connection.socket, ssl.SSLSocket)
        try:
            connection.socket.do_handshake()
        except ssl.SSLWantReadError:
            self._watch(connection, _READ)
        except ssl.SSLWantWriteError:
            self._watch(connection, _READ | _WRITE)
        except (OSError, ValueError):  # an SSLError is an OSError
            connection.door.counts.handshake_failures += 1
            self._close(connection, "handshake")
        else:
            connection.is_shaking = False
            self._watch(connection, _READ)

    def _read(self, connection: _Connection, now: int) -> None:
        view, reading, start = self._view, connection.socket, len(connection.rest)
        view[:start] = connection.rest
        end, until, is_over = start, start + READ_BYTES, False
        is_tls = connection.door.certificates is not None
        while end < until:
            try:
                size = reading.recv_into(view[end:until])
            except _WAIT:
                break
            except OSError:
                size = 0
            if not size:
                is_over = True
                break
            end += size
            if not is_tls:
                break
        if end > start:
            self._handle(connection, view[:end], now)
        if is_over:
            self._close(connection, "closed")
        elif is_tls and end == until and not connection.is_closed:
            self._unfinished[connection] = None

    def _handle(self, connection: _Connection, view: memoryview, now: int) -> None:
        """Pass what was read to the core, and on what that has to send."""
        limit = MAX_FRAME_BYTES if connection.is_allocated else UNALLOCATED_FRAME_BYTES
        try:
            frames, used = take_frames(view, limit)
        except FramingError:
            self._close(connection, "framing")
            return
        connection.rest = bytes(view[used:])
        server, counts = self._server, connection.door.counts
        receive, number, source = server.receive, connection.door.number, connection.source
        packets, size = server.relayed_packets, server.relayed_bytes
        self.is_relaying = True
        try:
            for frame in frames:
                receive(number, frame, source, now)
            self._sockets.flush(server)
        finally:
            self.is_relaying = False
        counts.packets += server.relayed_packets - packets
        counts.bytes += server.relayed_bytes - size
        if not connection.is_allocated and self._holds_allocation(connection):
            self._note_allocated(connection)

    def _holds_allocation(self, connection: _Connection) -> bool:
        return self._server.holds_allocation(connection.door.number, connection.source)

    def _note_allocated(self, connection: _Connection) -> None:
        connection.is_allocated = True
        self._unallocated.pop(connection, None)

    def _write_dirty(self) -> None:
        dirty, self._dirty = self._dirty, []
        for connection in dirty:
            connection.is_dirty = False
            if not connection.is_closed and not connection.events & _WRITE:
                self._write(connection)
        doomed, self._doomed = self._doomed, []
        for connection in doomed:
            self._close(connection, "slow")

    def _write(self, connection: _Connection) -> None:
        """Write as much of what is queued as the kernel takes. What TLS was given once stands at
        the head until it was taken, as OpenSSL demands."""
        if not connection.pending:
            self._watch(connection, _READ)
            return
        writing, pending = connection.socket, connection.pending
        data = pending[0] if len(pending) == 1 else b"".join(pending)
        size, sent = len(data), 0
        at_once = size if connection.door.certificates is None else _TLS_RECORD_BYTES
        view = memoryview(data)
        try:
            while sent < size:
                sent += writing.send(view[sent : sent + at_once])
        except _WAIT:
            pass
        except OSError:
            self._close(connection, "lost")
            return
        pending.clear()
        if sent < size:
            pending.append(data[sent:])
        connection.queued = size - sent
        self._watch(connection, _READ if sent == size else _READ | _WRITE)

    def _watch(self, connection: _Connection, events: int) -> None:
        if connection.events != events:
            connection.events = events
            self._epoll.modify(connection.socket, events)

    def _close(self, connection: _Connection, reason: str) -> None:
        if connection.is_closed:
            return
        connection.is_closed = True
        door = connection.door
        del self._connection_by_descriptor[connection.socket.fileno()]
        self._epoll.unregister(connection.socket)
        connection.socket.close()
        connection.pending.clear()
        door.client_by_source.pop(connection.source, None)
        self._unallocated.pop(connection, None)
        self._unfinished.pop(connection, None)
        self._places.leave(connection.prefix)
        door.counts.ended[reason] += 1
        self._server.client_gone(door.number, connection.source)


def _watch_over(listening: socket.socket, dead_after_s: int) -> None:
    """Have the kernel find out who is dead, and hold little unsent; connections inherit it."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, dead_after_s),
        (socket.TCP_KEEPINTVL, max(1, dead_after_s // 4)),
        (socket.TCP_USER_TIMEOUT, dead_after_s * 1_000),
        (socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES),
    ):
        listening.setsockopt(socket.IPPROTO_TCP, option, value)


def _data_bytes(indication: bytes | memoryview) -> int:
    """The length of DATA in a Data indication that this relay made: its second attribute."""
    place = 26 + (indication[22] << 8 | indication[23])
    return int.from_bytes(indication[place : place + 2], "big")
