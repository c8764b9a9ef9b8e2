"""The sockets of a relay over UDP: one for each listener and one for each allocation.

All of them are in one epoll set, and trio waits for that set to become readable; then every socket
that has something is read, synchronously and within a bound, and what the core has to send leaves
before the next datagram is read. So the event loop is entered once for many packets, an idle
allocation costs a socket and no task, and one receive buffer serves all. (`runtime.net.udp` has a
buffer for each socket: right for an agent, too much for 20,000 allocations.)

The kernel may give a train of datagrams as one (UDP_GRO), and takes one (UDP_SEGMENT). With the
compiled drain (`relays.fastpath.drain`) a turn is made there, and what it does not know comes here.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Final, Protocol

import trio

from relays.fastpath.drain import CompiledDrain
from relays.server import Server
from relays.transports.icmp import prepare, read_errors, send_unfragmented
from runtime.clock import Clock
from runtime.guard import Guard
from runtime.net.address import Address

DATAGRAMS_PER_TURN: Final = 32
SOCKETS_PER_TURN: Final = 256
ERRORS_PER_TURN: Final = 8
"""ICMP errors that are read of one socket before its datagrams are."""
LISTENER_BUFFER_BYTES: Final = 4 * 1024 * 1024
ALLOCATION_BUFFER_BYTES: Final = 1024 * 1024
LONGEST_WAIT_S: Final = 1.0
"""Nothing that begins meanwhile ends earlier."""
SHORTEST_WAIT_S: Final = 0.01
PAUSE_AFTER_FAILURE_S: Final = 0.1
READING_NS: Final = 2_000_000
"""How long one turn may follow the other before other tasks come to their own."""
TRAINS_AFTER_REFUSAL: Final = 1_000
"""After a train was refused (it does not fit the path) so many datagrams go to that address one by
one, before another train is tried."""
MAX_PLAIN_DESTINATIONS: Final = 4_096

_MAX_DATAGRAM_BYTES: Final = 65_535
_IPV4: Final = int(socket.AF_INET)
_IPV6: Final = int(socket.AF_INET6)
_KIND: Final = int(socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
# Generic segmentation (udp(7)): the kernel gives, and takes, several datagrams at once.
_UDP_SEGMENT: Final = 103
_UDP_GRO: Final = 104
_SEGMENT_BYTES: Final = struct.Struct("=H")
_GRO_BYTES: Final = struct.Struct("=i")
_GRO_SPACE: Final = socket.CMSG_SPACE(_GRO_BYTES.size)
_FULL: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM})
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33


class Outlet(Protocol):
    """A listener that is no UDP socket: each client there has a connection."""

    def send(self, data: bytes | memoryview, destination: tuple[str, int]) -> bool:
        """Queue `data` for the client `destination`, copying it; never waits. False: it was
        dropped, since the client is gone or too much is under way to it."""


class UdpSockets:
    """Owns the sockets; is what the core calls `Sockets`, and moves datagrams while `run` runs.

    `bind_hosts` maps a family (1: IPv4, 2: IPv6) to the local IP address of relayed ports. With
    `drain`, which then has to be a fast path of the core too, what the core has allowed is moved
    there. Close it when done: that closes all sockets.
    """

    def __init__(
        self, *, bind_hosts: dict[int, str], clock: Clock, drain: CompiledDrain | None = None
    ) -> None:
        self._bind_hosts = bind_hosts
        self._clock = clock
        self._epoll = select.epoll()
        self._socket_by_number: dict[int, socket.socket] = {}
        self._number_by_descriptor: dict[int, int] = {}
        self._listeners: set[int] = set()
        self._outlet_by_number: dict[int, Outlet] = {}
        self._next_number = 1
        self._buffer = bytearray(_MAX_DATAGRAM_BYTES)
        self._buffers = [self._buffer]
        self._view = memoryview(self._buffer)
        self._drain = drain
        self._plain_trains: dict[tuple[int, tuple[str, int]], int] = {}
        self._not_opened = 0
        self._received = 0
        self._sent = 0
        self._sent_trains = 0
        self._receive_errors = 0
        self._dropped_full = 0
        self._dropped_refused = 0
        self._guard = Guard("relay")

    def listen(self, address: Address) -> tuple[int, Address]:
        """Open a listener; its number, and where it is bound. Raises OSError."""
        opened = open_listener(address)
        name = opened.getsockname()
        return self.adopt(opened), Address(name[0], name[1])

    def adopt(self, opened: socket.socket) -> int:
        """Serve a listener that `open_listener` made; its number. It is closed here from now on."""
        opened.setblocking(False)
        return self._watch(opened, is_listener=True)

    def attach(self, outlet: Outlet) -> int:
        """A number for a listener of another transport: what the core sends from there is given
        to `outlet`. Whoever calls `Server.receive` for it calls `flush` thereafter."""
        number, self._next_number = self._next_number, self._next_number + 1
        self._outlet_by_number[number] = outlet
        return number

    def flush(self, server: Server) -> None:
        """Send all that the core has to send."""
        if server.trains:
            self._send_trains(server)
        if server.transmits:
            self._send(server)

    def open(self, family: int, port: int) -> int | None:
        """See `relays.allocations.Sockets`. Without files or memory for one more there is none."""
        host = self._bind_hosts.get(family)
        if host is None:
            return None
        try:
            opened = _open(Address(host, port), ALLOCATION_BUFFER_BYTES)
            prepare(opened, is_ipv6=":" in host)
            return self._watch(opened)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                self._not_opened += 1
            return None

    def close(self, socket: int) -> None:
        closing = self._socket_by_number.pop(socket, None)
        if closing is None:
            return
        if self._drain is not None:
            self._drain.forget(socket)
        del self._number_by_descriptor[closing.fileno()]
        self._epoll.unregister(closing)
        closing.close()

    def close_all(self) -> None:
        for number in list(self._socket_by_number):
            self.close(number)
        if not self._epoll.closed:
            with contextlib.suppress(RuntimeError):
                trio.lowlevel.notify_closing(self._epoll.fileno())
            self._epoll.close()

    async def run(self, server: Server) -> None:
        """Move datagrams between the sockets and `server`, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_time, server)
            while True:
                # Without a scope for the next deadline: this is entered for each few datagrams.
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                failures = self._guard.failures
                now = self._clock.monotonic_ns()
                until_ns = now + READING_NS
                self._expire(server, now)
                while self.turn(server, now) and self._guard.failures == failures:
                    now = self._clock.monotonic_ns()
                    if now >= until_ns:
                        break
                    self._expire(server, now)
                if self._guard.failures != failures:
                    await trio.sleep(PAUSE_AFTER_FAILURE_S)

    async def _keep_time(self, server: Server) -> None:
        """End what has ended while nothing comes."""
        while True:
            now = self._clock.monotonic_ns()
            self._expire(server, now)
            deadline_ns = server.poll_timeout()
            left_s = LONGEST_WAIT_S if deadline_ns is None else (deadline_ns - now) / 1e9
            await trio.sleep(min(LONGEST_WAIT_S, max(SHORTEST_WAIT_S, left_s)))

    def _expire(self, server: Server, now: int) -> None:
        deadline_ns = server.poll_timeout()
        if deadline_ns is not None and deadline_ns <= now:
            with self._guard:
                server.handle_timeout(now)

    def turn(self, server: Server, now: int) -> bool:
        """Read what is readable, within the bounds; whether anything was. `run` does it as often as
        needed; without an event loop, whoever has one of his own."""
        if self._drain is None:
            ready = self._epoll.poll(0, SOCKETS_PER_TURN)
            for descriptor, events in ready:
                number = self._number_by_descriptor.get(descriptor)
                if number is not None:
                    if events & select.EPOLLERR:
                        self._take_errors(number, server, now)
                    self._take(number, server, now)
            return bool(ready)
        count, unknown, erring = self._drain.turn(self._epoll.fileno(), now)
        for number in erring:
            self._take_errors(number, server, now)
        for number, data, source, segment_bytes in unknown:
            with self._guard:
                self._hand_over(number, memoryview(data), segment_bytes, source, server, now)
        return bool(count)

    def statistics(self) -> dict[str, int]:
        """Datagrams received and sent, and those that the kernel did not take; how many trains
        were sent; sockets that could not be opened, though the port was free."""
        counts = Counter(
            received_datagrams=self._received,
            receive_errors=self._receive_errors,
            sent_datagrams=self._sent,
            sent_trains=self._sent_trains,
            send_dropped_full=self._dropped_full,
            send_dropped_refused=self._dropped_refused,
        )
        counts.update({} if self._drain is None else self._drain.datagrams())
        return {
            **counts,
            "sockets": len(self._socket_by_number),
            "sockets_not_opened": self._not_opened,
            "input_failures": self._guard.failures,
        }

    def _watch(self, opened: socket.socket, *, is_listener: bool = False) -> int:
        try:
            self._epoll.register(opened, select.EPOLLIN)
        except BaseException:
            opened.close()
            raise
        number, self._next_number = self._next_number, self._next_number + 1
        self._socket_by_number[number] = opened
        self._number_by_descriptor[opened.fileno()] = number
        if is_listener:
            self._listeners.add(number)
        if self._drain is not None:
            self._drain.watch(opened.fileno(), number, is_listener=is_listener)
        return number

    # --- reading -------------------------------------------------------------------------------

    def _hand_over(
        self,
        number: int,
        data: memoryview,
        segment_bytes: int,
        source: tuple[str, int],
        server: Server,
        now: int,
    ) -> None:
        """Give the core what the compiled drain did not know."""
        is_listener = number in self._listeners
        try:
            if 0 < segment_bytes < len(data):
                take_train = server.receive_train if is_listener else server.receive_train_from_peer
                take_train(number, data, segment_bytes, source, now)
            else:
                take = server.receive if is_listener else server.receive_from_peer
                take(number, data, source, now)
        finally:
            self.flush(server)

    def _take(self, number: int, server: Server, now: int) -> None:
        """Read a socket; a datagram that finds a mistake of ours costs itself alone. What follows
        it is still in the kernel, and read in the next turn."""
        failures = self._guard.failures
        with self._guard:
            self._read(number, server, now)
        if self._guard.failures != failures:
            server.transmits.clear()  # views of a buffer that is used again
            server.trains.clear()

    def _read(self, number: int, server: Server, now: int) -> None:
        reading = self._socket_by_number[number]
        # That costs 0.2 us more than recvfrom_into, 2 % of what a datagram costs in all.
        receive = reading.recvmsg_into
        is_listener = number in self._listeners
        take = server.receive if is_listener else server.receive_from_peer
        is_ipv6 = reading.family == socket.AF_INET6
        buffers, view, transmits = self._buffers, self._view, server.transmits
        for _ in range(DATAGRAMS_PER_TURN):
            try:
                size, notes, _, sender = receive(buffers, _GRO_SPACE)
            except BlockingIOError:
                return
            except OSError:
                self._receive_errors += 1
                return
            source = sender[:2] if is_ipv6 else sender
            segment_bytes = _GRO_BYTES.unpack(notes[0][2])[0] if notes else size
            if segment_bytes < size:
                self._received += -(-size // segment_bytes)
                take_train = server.receive_train if is_listener else server.receive_train_from_peer
                take_train(number, view[:size], segment_bytes, source, now)
                self.flush(server)
                continue
            self._received += 1
            take(number, view[:size], source, now)
            if transmits:
                self._send(server)

    def _take_errors(self, number: int, server: Server, now: int) -> None:
        with self._guard:
            reading = self._socket_by_number.get(number)
            if reading is None:
                return
            for peer, error in read_errors(reading, ERRORS_PER_TURN):
                if peer.port:
                    server.receive_icmp(number, peer, error, now)
            self.flush(server)

    # --- sending -------------------------------------------------------------------------------

    def _send(self, server: Server) -> None:
        transmits = server.transmits
        for number, data, destination in transmits:
            sending = self._socket_by_number.get(number)
            if sending is None:
                self._send_otherwise(server, number, data, destination)
                continue
            try:
                sending.sendto(data, destination)
            except BlockingIOError:
                self._dropped_full += 1
            except OSError:
                self._send_again(server, number, data, destination)
            else:
                self._sent += 1
        transmits.clear()

    def _send_otherwise(
        self, server: Server, number: int, data: bytes | memoryview, destination: tuple[str, int]
    ) -> None:
        """By a connection, or without fragments (a negative number); nothing for who is gone."""
        outlet = self._outlet_by_number.get(number)
        if outlet is not None:
            if not outlet.send(data, destination):
                self._dropped_full += 1
        elif -number in self._socket_by_number:
            self._send_again(server, number, data, destination)

    def _send_again(
        self, server: Server, number: int, data: bytes | memoryview, destination: tuple[str, int]
    ) -> None:
        """Up to two calls, since one may fail for an ICMP error about an earlier datagram. What is
        too big stays so, and the kernel's own error about that is read at once: it does not name
        the port."""
        sending = self._socket_by_number[abs(number)]
        for _ in range(2):
            try:
                if number < 0:
                    send_unfragmented(sending, data, destination)
                else:
                    sending.sendto(data, destination)
            except OSError as error:
                refusal = error
                if error.errno in _FULL or error.errno == errno.EMSGSIZE:
                    break
            else:
                self._sent += 1
                return
        self._count_refusal(refusal, 1)
        now = self._clock.monotonic_ns()
        for peer, told in read_errors(sending, ERRORS_PER_TURN):
            if peer.port or peer.host == destination[0]:
                to = peer if peer.port else destination
                server.receive_icmp(abs(number), to, told, now)

    def _send_trains(self, server: Server) -> None:
        for number, pieces, segment_bytes, datagrams, destination in server.trains:
            sending = self._socket_by_number.get(number)
            if sending is None:
                continue
            plain = self._plain_trains.get((number, destination), 0)
            if plain <= 0:
                refusal = _send_train(sending, pieces, segment_bytes, destination)
                if refusal is None:
                    self._sent += datagrams
                    self._sent_trains += 1
                    continue
                if refusal.errno in _FULL:
                    self._count_refusal(refusal, datagrams)
                    continue
                plain = TRAINS_AFTER_REFUSAL
            self._send_apart(sending, pieces, segment_bytes, destination)
            if len(self._plain_trains) >= MAX_PLAIN_DESTINATIONS:
                self._plain_trains.clear()
            self._plain_trains[number, destination] = plain - datagrams
        server.trains.clear()

    def _send_apart(
        self,
        sending: socket.socket,
        pieces: Sequence[bytes | memoryview],
        segment_bytes: int,
        destination: tuple[str, int],
    ) -> None:
        """The datagrams of a train, one by one: smaller ones may pass where a train does not."""
        train = memoryview(b"".join(pieces))
        for at in range(0, len(train), segment_bytes):
            try:
                sending.sendto(train[at : at + segment_bytes], destination)
            except OSError as error:
                self._count_refusal(error, 1)
            else:
                self._sent += 1

    def _count_refusal(self, error: OSError, datagrams: int) -> None:
        if error.errno in _FULL:
            self._dropped_full += datagrams
        else:
            self._dropped_refused += datagrams


def _send_train(
    sending: socket.socket,
    pieces: Sequence[bytes | memoryview],
    segment_bytes: int,
    destination: tuple[str, int],
) -> OSError | None:
    """Send a train as one; up to two calls, since one may fail for an ICMP error about something
    earlier."""
    note = (socket.IPPROTO_UDP, _UDP_SEGMENT, _SEGMENT_BYTES.pack(segment_bytes))
    refusal: OSError | None = None
    for _ in range(2):
        try:
            sending.sendmsg(pieces, [note], 0, destination)
        except OSError as error:
            refusal = error
            if error.errno in _FULL:
                break
        else:
            return None
    return refusal


def open_listener(address: Address, *, reuse_port: bool = False) -> socket.socket:
    """A bound socket for clients, with `reuse_port` one of several there. Raises OSError."""
    return _open(address, LISTENER_BUFFER_BYTES, reuse_port=reuse_port)


def _open(address: Address, buffer_bytes: int, *, reuse_port: bool = False) -> socket.socket:
    is_ipv6 = ":" in address.host
    opened = socket.socket(_IPV6 if is_ipv6 else _IPV4, _KIND)
    try:
        if is_ipv6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if reuse_port:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _grow(opened, socket.SO_RCVBUF, _SO_RCVBUFFORCE, buffer_bytes)
        _grow(opened, socket.SO_SNDBUF, _SO_SNDBUFFORCE, buffer_bytes)
        with contextlib.suppress(OSError):  # a kernel before 5.0
            opened.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
        opened.bind(address)
    except BaseException:
        opened.close()
        raise
    return opened


def _grow(opened: socket.socket, option: int, force: int, size: int) -> None:
    """Ask for a buffer; without CAP_NET_ADMIN the kernel's maximum may be lower."""
    try:
        opened.setsockopt(socket.SOL_SOCKET, force, size)
    except PermissionError:
        opened.setsockopt(socket.SOL_SOCKET, option, size)


def wanted_descriptors(allocations: int) -> int:
    """How many open files a relay with so many allocations needs (pairs reserve a second one)."""
    return 2 * allocations + 256
