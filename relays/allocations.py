"""The allocations of a relay: what each holds, who owns how many, and when each ends.

`AllocationTable` keeps the indexes and the quotas; it decides nothing about the protocol. Times
are nanoseconds. A permission or channel that has ended is left in place until it is renewed,
until its allocation is refreshed or until room is needed: whoever reads it compares its end with
`now`.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Final, Protocol, TypeVar

import attrs

from relays.fastpath import FastPath
from relays.peers import source_prefix
from relays.turn import RESERVATION_LIFETIME_NS
from runtime.net.address import Address
from runtime.randomness import Randomness

Key = TypeVar("Key")

MAX_PORT_ATTEMPTS: Final = 32
MAX_STALE_DEADLINES: Final = 1024


class Sockets(Protocol):
    """The seam to whoever owns sockets: a shell, or a simulated host."""

    def open(self, family: int, port: int) -> int | None:
        """Listen for datagrams on `port` of the relay's address of `family` (1: IPv4, 2: IPv6).

        The number by which the socket is called from now on (never one that was used before), or
        None when the port is taken.
        """

    def close(self, socket: int) -> None: ...


@attrs.define(eq=False)
class Permission:
    """An IP address that an allocation talks to (RFC 8656, section 9).

    `answered` says that something came from there: until then it is a stranger that did not ask
    for packets, and gets few (`paid_at_ns` counts them). `is_own` marks the relay's own address.
    """

    expires_ns: int
    is_own: bool
    answered: bool = False
    paid_at_ns: int = 0


@attrs.define(eq=False)
class Channel:
    """A number that stands for a peer (RFC 8656, section 12)."""

    number: int
    peer: tuple[str, int]
    expires_ns: int
    permission: Permission


@attrs.define(eq=False, kw_only=True)
class Allocation:
    """One relayed transport address and the 5-tuple that owns it (RFC 8656, section 5).

    `answer` is the response to the Allocate request `transaction_id`, sent again if that request
    comes again. `deadline_ns` is when the table looks next whether it has ended.
    """

    socket: int
    relayed: Address
    family: int
    listener: int
    client: tuple[str, int]
    username: str
    expires_ns: int
    transaction_id: bytes
    answer: bytes = b""
    deadline_ns: int = 0
    permission_by_host: dict[str, Permission] = attrs.field(factory=dict)
    channel_by_number: dict[int, Channel] = attrs.field(factory=dict)
    channel_by_peer: dict[tuple[str, int], Channel] = attrs.field(factory=dict)

    def drop_channel(self, channel: Channel) -> None:
        del self.channel_by_number[channel.number]
        del self.channel_by_peer[channel.peer]

    def purge(self, now: int) -> None:
        """Forget channels that have ended, and permissions that have and that no channel uses."""
        for channel in list(self.channel_by_number.values()):
            if channel.expires_ns <= now:
                self.drop_channel(channel)
        used = {id(channel.permission) for channel in self.channel_by_number.values()}
        for host, permission in list(self.permission_by_host.items()):
            if permission.expires_ns <= now and id(permission) not in used:
                del self.permission_by_host[host]


@attrs.frozen(kw_only=True)
class _Reservation:
    socket: int
    family: int
    port: int
    expires_ns: int


class AllocationTable:
    """All allocations of one relay. `relay_addresses` maps a family to the address that clients
    are told; `first_port` to `last_port` is the range of relayed ports."""

    def __init__(
        self,
        *,
        relay_addresses: dict[int, str],
        first_port: int,
        last_port: int,
        sockets: Sockets,
        randomness: Randomness,
        fast_path: FastPath,
    ) -> None:
        self.relay_addresses = relay_addresses
        self.by_client: dict[int, dict[tuple[str, int], Allocation]] = {}
        self.by_socket: dict[int, Allocation] = {}
        self.by_relayed: dict[tuple[str, int], Allocation] = {}
        self._first_port = first_port
        self._last_port = last_port
        self._sockets = sockets
        self._randomness = randomness
        self._fast_path = fast_path
        self._count_by_username: dict[str, int] = {}
        self._count_by_source: dict[str | bytes, int] = {}
        self._ports_in_use: set[tuple[int, int]] = set()
        self._reservation_by_token: dict[bytes, _Reservation] = {}
        self._deadlines: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.by_socket)

    @property
    def reservations(self) -> int:
        return len(self._reservation_by_token)

    def add_listener(self, listener: int) -> None:
        self.by_client[listener] = {}

    def count_of_username(self, username: str) -> int:
        return self._count_by_username.get(username, 0)

    def count_of_source(self, host: str) -> int:
        """A source is an IPv4 address, or the /56 of an IPv6 address."""
        return self._count_by_source.get(_source(host), 0)

    def of_user(self, user: str) -> list[Allocation]:
        """Those under the user name `user`, or under stamped ones that end in it."""
        stamped = f":{user}"
        return [
            one
            for one in self.by_socket.values()
            if one.username == user or one.username.endswith(stamped)
        ]

    # --- ports -------------------------------------------------------------------------------

    def take_port(self, family: int) -> tuple[int, int] | None:
        """A socket and its port, chosen at random (RFC 8656, section 7.2); None: no port free."""
        for _ in range(MAX_PORT_ATTEMPTS):
            span = self._last_port - self._first_port + 1
            port = self._first_port + self._randomness.integer(span)
            socket = self._open(family, port)
            if socket is not None:
                return socket, port
        return None

    def take_even_port(
        self, family: int, now: int, *, reserve: bool
    ) -> tuple[int, int, bytes | None] | None:
        """An even port, with `reserve` also the next one, held for 30 s: socket, port, token."""
        first_half = (self._first_port + 1) // 2
        span = (self._last_port - 1) // 2 - first_half + 1
        for _ in range(MAX_PORT_ATTEMPTS if span > 0 else 0):
            port = 2 * (first_half + self._randomness.integer(span))
            socket = self._open(family, port)
            if socket is None:
                continue
            if not reserve:
                return socket, port, None
            next_socket = self._open(family, port + 1)
            if next_socket is None:
                self._close(socket, family, port)
                continue
            token = self._randomness.bytes(8)
            expires_ns = now + RESERVATION_LIFETIME_NS
            self._reservation_by_token[token] = _Reservation(
                socket=next_socket, family=family, port=port + 1, expires_ns=expires_ns
            )
            heappush(self._deadlines, (expires_ns, next_socket))
            return socket, port, token
        return None

    def take_reserved(self, token: bytes, now: int) -> tuple[int, int, int] | None:
        """The socket, port and family behind a RESERVATION-TOKEN; None when there is none."""
        reservation = self._reservation_by_token.get(token)
        if reservation is None or reservation.expires_ns <= now:
            return None
        del self._reservation_by_token[token]
        return reservation.socket, reservation.port, reservation.family

    # --- allocations -------------------------------------------------------------------------

    def add(self, allocation: Allocation) -> None:
        self.by_client[allocation.listener][allocation.client] = allocation
        self.by_socket[allocation.socket] = allocation
        self.by_relayed[allocation.relayed] = allocation
        _count(self._count_by_username, allocation.username, 1)
        _count(self._count_by_source, _source(allocation.client[0]), 1)
        self._look_again(allocation)

    def refresh(self, allocation: Allocation, expires_ns: int) -> None:
        """Let an allocation end at another time."""
        allocation.expires_ns = expires_ns
        if expires_ns < allocation.deadline_ns:
            self._look_again(allocation)

    def remove(self, allocation: Allocation) -> None:
        self._fast_path.allocation_ended(allocation)
        del self.by_client[allocation.listener][allocation.client]
        del self.by_socket[allocation.socket]
        del self.by_relayed[allocation.relayed]
        _count(self._count_by_username, allocation.username, -1)
        _count(self._count_by_source, _source(allocation.client[0]), -1)
        self._close(allocation.socket, allocation.family, allocation.relayed.port)
        if len(self._deadlines) > 2 * (len(self) + self.reservations) + MAX_STALE_DEADLINES:
            self._rebuild_deadlines()

    def next_deadline(self) -> int | None:
        """Not later than the next end of an allocation or reservation; None: there is neither."""
        return self._deadlines[0][0] if self._deadlines else None

    def expire(self, now: int) -> int:
        """Remove what has ended; how many allocations that were.

        When a deadline comes up and the allocation was refreshed meanwhile, it is put back with
        the new end, so that refreshing costs nothing.
        """
        removed = 0
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline_ns, socket = heappop(self._deadlines)
            allocation = self.by_socket.get(socket)
            if allocation is None:
                self._expire_reservation(socket, now)
            elif allocation.expires_ns <= now:
                self.remove(allocation)
                removed += 1
            elif allocation.deadline_ns == deadline_ns:
                self._look_again(allocation)
        return removed

    # --- helpers -----------------------------------------------------------------------------

    def _look_again(self, allocation: Allocation) -> None:
        allocation.deadline_ns = allocation.expires_ns
        heappush(self._deadlines, (allocation.expires_ns, allocation.socket))

    def _rebuild_deadlines(self) -> None:
        """Drop the deadlines of allocations that were given back early."""
        reservations = self._reservation_by_token.values()
        self._deadlines = [(one.deadline_ns, one.socket) for one in self.by_socket.values()]
        self._deadlines += [(one.expires_ns, one.socket) for one in reservations]
        heapify(self._deadlines)

    def _expire_reservation(self, socket: int, now: int) -> None:
        for token, reservation in self._reservation_by_token.items():
            if reservation.socket == socket and reservation.expires_ns <= now:
                del self._reservation_by_token[token]
                self._close(socket, reservation.family, reservation.port)
                return

    def _open(self, family: int, port: int) -> int | None:
        if (family, port) in self._ports_in_use:
            return None
        socket = self._sockets.open(family, port)
        if socket is not None:
            self._ports_in_use.add((family, port))
        return socket

    def _close(self, socket: int, family: int, port: int) -> None:
        self._ports_in_use.discard((family, port))
        self._sockets.close(socket)


def _source(host: str) -> str | bytes:
    return source_prefix(host) if ":" in host else host


def _count(counts: dict[Key, int], key: Key, change: int) -> None:
    count = counts.get(key, 0) + change
    if count:
        counts[key] = count
    else:
        del counts[key]
