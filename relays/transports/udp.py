"""The sockets of a relay over UDP: one for each listener and one for each allocation.

All of them are in one epoll set, and trio waits for that set to become readable; then every socket
that has something is read, synchronously and within a bound, and what the core has to send leaves
before the next datagram is read. So the event loop is entered once for many packets, an idle
allocation costs a socket and no task, and one receive buffer serves all. (`runtime.net.udp` has a
buffer for each socket: right for an agent, too much for 20,000 allocations.)
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from typing import Final, Protocol

import trio

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
LONGEST_WAIT_S: Final = 30.0
PAUSE_AFTER_FAILURE_S: Final = 0.1

_MAX_DATAGRAM_BYTES: Final = 65_535
_IPV4: Final = int(socket.AF_INET)
_IPV6: Final = int(socket.AF_INET6)
_KIND: Final = int(socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33


class Outlet(Protocol):
    """A listener that is no UDP socket: each client there has a connection."""

    def send(self, data: bytes | memoryview, destination: tuple[str, int]) -> bool:
        """Queue `data` for the client `destination`, copying it; never waits. False: it was
        dropped, since the client is gone or too much is under way to it."""


class UdpSockets:
    """Owns the sockets; is what the core calls `Sockets`, and moves datagrams while `run` runs.

    `bind_hosts` maps a family (1: IPv4, 2: IPv6) to the local IP address of relayed ports. Close
    it when done: that closes all sockets.
    """

    def __init__(self, *, bind_hosts: dict[int, str], clock: Clock) -> None:
        self._bind_hosts = bind_hosts
        self._clock = clock
        self._epoll = select.epoll()
        self._socket_by_number: dict[int, socket.socket] = {}
        self._number_by_descriptor: dict[int, int] = {}
        self._listeners: set[int] = set()
        self._outlet_by_number: dict[int, Outlet] = {}
        self._next_number = 1
        self._buffer = bytearray(_MAX_DATAGRAM_BYTES)
        self._view = memoryview(self._buffer)
        self._received = 0
        self._sent = 0
        self._receive_errors = 0
        self._dropped_full = 0
        self._dropped_refused = 0
        self._guard = Guard("relay")

    def listen(self, address: Address) -> tuple[int, Address]:
        """Open a listener; its number, and where it is bound. Raises OSError."""
        number = self._open(address, LISTENER_BUFFER_BYTES)
        self._listeners.add(number)
        name = self._socket_by_number[number].getsockname()
        return number, Address(name[0], name[1])

    def attach(self, outlet: Outlet) -> int:
        """A number for a listener of another transport: what the core sends from there is given
        to `outlet`. Whoever calls `Server.receive` for it calls `flush` thereafter."""
        number, self._next_number = self._next_number, self._next_number + 1
        self._outlet_by_number[number] = outlet
        return number

    def flush(self, server: Server) -> None:
        """Send all that the core has to send."""
        if server.transmits:
            self._send(server)

    def open(self, family: int, port: int) -> int | None:
        """See `relays.allocations.Sockets`."""
        host = self._bind_hosts.get(family)
        if host is None:
            return None
        try:
            number = self._open(Address(host, port), ALLOCATION_BUFFER_BYTES)
        except OSError:
            return None
        prepare(self._socket_by_number[number], is_ipv6=":" in host)
        return number

    def close(self, socket: int) -> None:
        closing = self._socket_by_number.pop(socket, None)
        if closing is None:
            return
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
        while True:
            deadline_ns = server.poll_timeout()
            wait_s = LONGEST_WAIT_S
            if deadline_ns is not None:
                left_s = (deadline_ns - self._clock.monotonic_ns()) / 1e9
                wait_s = min(wait_s, max(0.0, left_s))
            with trio.move_on_after(wait_s):
                await trio.lowlevel.wait_readable(self._epoll.fileno())
            now = self._clock.monotonic_ns()
            failures = self._guard.failures
            if deadline_ns is not None and deadline_ns <= now:
                with self._guard:
                    server.handle_timeout(now)
            for descriptor, events in self._epoll.poll(0, SOCKETS_PER_TURN):
                number = self._number_by_descriptor.get(descriptor)
                if number is not None:
                    if events & select.EPOLLERR:
                        self._take_errors(number, server, now)
                    self._take(number, server, now)
            if self._guard.failures != failures:
                await trio.sleep(PAUSE_AFTER_FAILURE_S)

    def statistics(self) -> dict[str, int]:
        """Datagrams received and sent, and those that the kernel did not take."""
        return {
            "sockets": len(self._socket_by_number),
            "received_datagrams": self._received,
            "receive_errors": self._receive_errors,
            "sent_datagrams": self._sent,
            "send_dropped_full": self._dropped_full,
            "send_dropped_refused": self._dropped_refused,
            "input_failures": self._guard.failures,
        }

    def _open(self, address: Address, buffer_bytes: int) -> int:
        is_ipv6 = ":" in address.host
        opened = socket.socket(_IPV6 if is_ipv6 else _IPV4, _KIND)
        try:
            if is_ipv6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            _grow(opened, socket.SO_RCVBUF, _SO_RCVBUFFORCE, buffer_bytes)
            _grow(opened, socket.SO_SNDBUF, _SO_SNDBUFFORCE, buffer_bytes)
            opened.bind(address)
            self._epoll.register(opened, select.EPOLLIN)
        except BaseException:
            opened.close()
            raise
        number, self._next_number = self._next_number, self._next_number + 1
        self._socket_by_number[number] = opened
        self._number_by_descriptor[opened.fileno()] = number
        return number

    def _take(self, number: int, server: Server, now: int) -> None:
        """Read a socket; a datagram that finds a mistake of ours costs itself alone. What follows
        it is still in the kernel, and read in the next turn."""
        failures = self._guard.failures
        with self._guard:
            self._read(number, server, now)
        if self._guard.failures != failures:
            server.transmits.clear()  # views of a buffer that is used again

    def _read(self, number: int, server: Server, now: int) -> None:
        reading = self._socket_by_number[number]
        receive = reading.recvfrom_into
        take = server.receive if number in self._listeners else server.receive_from_peer
        is_ipv6 = reading.family == socket.AF_INET6
        buffer, view, transmits = self._buffer, self._view, server.transmits
        for _ in range(DATAGRAMS_PER_TURN):
            try:
                size, sender = receive(buffer)
            except BlockingIOError:
                return
            except OSError:
                self._receive_errors += 1
                return
            self._received += 1
            take(number, view[:size], sender[:2] if is_ipv6 else sender, now)
            if transmits:
                self._send(server)

    def _take_errors(self, number: int, server: Server, now: int) -> None:
        with self._guard:
            for peer, error in read_errors(self._socket_by_number[number], ERRORS_PER_TURN):
                if peer.port:
                    server.receive_icmp(number, peer, error, now)
            self.flush(server)

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
            except BlockingIOError:
                self._dropped_full += 1
                return
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    break
            else:
                self._sent += 1
                return
        self._dropped_refused += 1
        now = self._clock.monotonic_ns()
        for peer, told in read_errors(sending, ERRORS_PER_TURN):
            if peer.port or peer.host == destination[0]:
                to = peer if peer.port else destination
                server.receive_icmp(abs(number), to, told, now)


def _grow(opened: socket.socket, option: int, force: int, size: int) -> None:
    """Ask for a buffer; without CAP_NET_ADMIN the kernel's maximum may be lower."""
    try:
        opened.setsockopt(socket.SOL_SOCKET, force, size)
    except PermissionError:
        opened.setsockopt(socket.SOL_SOCKET, option, size)


def wanted_descriptors(allocations: int) -> int:
    """How many open files a relay with so many allocations needs (pairs reserve a second one)."""
    return 2 * allocations + 256
