"""The allocations of a relay: what each holds, who owns how many, and when each ends.

`AllocationTable` keeps the indexes and the quotas; it decides nothing about the protocol. Times
are nanoseconds. A permission or channel that has ended is left in place until it is renewed,
until its allocation is refreshed or until room is needed: whoever reads it compares its end with
`now`.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Final, Protocol, TypeVar

import attrs

from relays.fastpath import FastPath
from relays.peers import source_prefix
from relays.turn import RESERVATION_LIFETIME_NS, RESERVATION_TOKEN_BYTES
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
class Relayed:
    """A relayed transport address with its own time of expiry (RFC 8656, section 5).

    `deadline_ns` is when the table looks next whether it has ended.
    """

    socket: int
    address: Address
    family: int
    expires_ns: int = 0
    deadline_ns: int = 0


@attrs.define(eq=False)
class Permission:
    """An IP address that a relayed address talks to (RFC 8656, section 9).

    `answered` says that something came from there: until then it is a stranger that did not ask
    for packets, and gets few (`paid_at_ns` counts them). `is_own` marks the relay's own address.
    """

    expires_ns: int
    relayed: Relayed
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
    """One or two relayed transport addresses, of different families, and the 5-tuple that owns
    them (RFC 8656, section 5).

    `answer` is the response to the Allocate request `transaction_id`, sent again if that request
    comes again. Permissions and channels belong to the relayed address of their family.
    """

    relayed: tuple[Relayed, ...]
    listener: int
    client: tuple[str, int]
    username: str
    transaction_id: bytes
    answer: bytes = b""
    permission_by_host: dict[str, Permission] = attrs.field(factory=dict)
    channel_by_number: dict[int, Channel] = attrs.field(factory=dict)
    channel_by_peer: dict[tuple[str, int], Channel] = attrs.field(factory=dict)

    def of_family(self, family: int) -> Relayed | None:
        return next((one for one in self.relayed if one.family == family), None)

    def forget(self, relayed: Relayed) -> None:
        """Without this relayed address; its permissions and channels go with it."""
        self.relayed = tuple(one for one in self.relayed if one is not relayed)
        for channel in list(self.channel_by_number.values()):
            if channel.permission.relayed is relayed:
                self.drop_channel(channel)
        for host, permission in list(self.permission_by_host.items()):
            if permission.relayed is relayed:
                del self.permission_by_host[host]

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
        self._reservation_by_token: dict[bytes, Relayed] = {}
        self._deadlines: list[tuple[int, int]] = []
        self._allocations = 0

    def __len__(self) -> int:
        """How many allocations; one of both families counts once."""
        return self._allocations

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
            for by_client in self.by_client.values()
            for one in by_client.values()
            if one.username == user or one.username.endswith(stamped)
        ]

    # --- ports -------------------------------------------------------------------------------

    def take_port(self, family: int) -> Relayed | None:
        """A port chosen at random (RFC 8656, section 7.2); None: no port is free."""
        for port in self._free_ports(family, range(self._first_port, self._last_port + 1)):
            taken = self._open(family, port)
            if taken is not None:
                return taken
        return None

    def _free_ports(self, family: int, ports: range) -> Iterator[int]:
        """Ports of these that no allocation has, in the order in which to try them: some at random,
        and where those are taken, since few are left, as many again in a row."""
        in_use, count = self._ports_in_use, len(ports)
        if not count:
            return
        for _ in range(MAX_PORT_ATTEMPTS):
            port = ports[self._randomness.integer(count)]
            if (family, port) not in in_use:
                yield port
        start = self._randomness.integer(count)
        in_a_row = (ports[(start + place) % count] for place in range(count))
        yield from islice(
            (port for port in in_a_row if (family, port) not in in_use), MAX_PORT_ATTEMPTS
        )

    def take_even_port(
        self, family: int, now: int, *, reserve: bool
    ) -> tuple[Relayed, bytes | None] | None:
        """An even port, with `reserve` also the next one, held for 30 s: the port, the token."""
        first_even = self._first_port + self._first_port % 2
        for port in self._free_ports(family, range(first_even, self._last_port, 2)):
            if reserve and (family, port + 1) in self._ports_in_use:
                continue
            taken = self._open(family, port)
            if taken is None:
                continue
            if not reserve:
                return taken, None
            following = self._open(family, port + 1)
            if following is None:
                self._close(taken)
                continue
            token = self._randomness.bytes(RESERVATION_TOKEN_BYTES)
            following.expires_ns = now + RESERVATION_LIFETIME_NS
            self._reservation_by_token[token] = following
            self._look_again(following)
            return taken, token
        return None

    def take_reserved(self, token: bytes, now: int) -> Relayed | None:
        """What is behind a RESERVATION-TOKEN; None when there is nothing (any more)."""
        reserved = self._reservation_by_token.get(token)
        if reserved is None or reserved.expires_ns <= now:
            return None
        del self._reservation_by_token[token]
        return reserved

    # --- allocations -------------------------------------------------------------------------

    def add(self, allocation: Allocation) -> None:
        self._allocations += 1
        self.by_client[allocation.listener][allocation.client] = allocation
        for relayed in allocation.relayed:
            self.by_socket[relayed.socket] = allocation
            self.by_relayed[relayed.address] = allocation
            self._look_again(relayed)
        _count(self._count_by_username, allocation.username, 1)
        _count(self._count_by_source, _source(allocation.client[0]), 1)

    def move(self, listener: int, before: tuple[str, int], after: tuple[str, int]) -> None:
        """The allocation of the client `before`, if any, belongs to the 5-tuple of `after`."""
        allocation = self.by_client[listener].pop(before, None)
        if allocation is None:
            return
        self._fast_path.allocation_ended(allocation)
        _count(self._count_by_source, _source(before[0]), -1)
        _count(self._count_by_source, _source(after[0]), 1)
        allocation.client = after
        self.by_client[listener][after] = allocation

    def refresh(self, relayed: Relayed, expires_ns: int) -> None:
        """Let a relayed address end at another time."""
        relayed.expires_ns = expires_ns
        if expires_ns < relayed.deadline_ns:
            self._look_again(relayed)

    def remove(self, allocation: Allocation) -> None:
        for relayed in allocation.relayed:
            self.drop(allocation, relayed)

    def drop(self, allocation: Allocation, relayed: Relayed) -> bool:
        """End one relayed address; True when it was the last, and the allocation ended too. What is
        left goes the slow way until its channels are refreshed."""
        self._fast_path.allocation_ended(allocation)
        del self.by_socket[relayed.socket]
        del self.by_relayed[relayed.address]
        self._close(relayed)
        allocation.forget(relayed)
        if allocation.relayed:
            return False
        self._allocations -= 1
        del self.by_client[allocation.listener][allocation.client]
        _count(self._count_by_username, allocation.username, -1)
        _count(self._count_by_source, _source(allocation.client[0]), -1)
        standing = len(self.by_socket) + self.reservations
        if len(self._deadlines) > 2 * standing + MAX_STALE_DEADLINES:
            self._rebuild_deadlines()
        return True

    def drop_ended(self, allocation: Allocation, now: int) -> bool:
        """End what of it should have ended by now; True when nothing is left."""
        ended = [one for one in allocation.relayed if one.expires_ns <= now]
        return any(self.drop(allocation, relayed) for relayed in ended)

    def next_deadline(self) -> int | None:
        """Not later than the next end of a relayed address or reservation; None: there is none."""
        return self._deadlines[0][0] if self._deadlines else None

    def expire(self, now: int) -> int:
        """Remove what has ended; how many allocations that were.

        When a deadline comes up and the address was refreshed meanwhile, it is put back with the
        new end, so that refreshing costs nothing.
        """
        removed = 0
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline_ns, socket = heappop(self._deadlines)
            allocation = self.by_socket.get(socket)
            if allocation is None:
                self._expire_reservation(socket, now)
                continue
            relayed = next(one for one in allocation.relayed if one.socket == socket)
            if relayed.expires_ns <= now:
                removed += self.drop(allocation, relayed)
            elif relayed.deadline_ns == deadline_ns:
                self._look_again(relayed)
        return removed

    # --- helpers -----------------------------------------------------------------------------

    def _look_again(self, relayed: Relayed) -> None:
        relayed.deadline_ns = relayed.expires_ns
        heappush(self._deadlines, (relayed.expires_ns, relayed.socket))

    def _rebuild_deadlines(self) -> None:
        """Drop the deadlines of addresses that were given back early."""
        standing = list(self._reservation_by_token.values())
        for by_client in self.by_client.values():
            for allocation in by_client.values():
                standing += allocation.relayed
        self._deadlines = [(one.deadline_ns, one.socket) for one in standing]
        heapify(self._deadlines)

    def _expire_reservation(self, socket: int, now: int) -> None:
        for token, reserved in self._reservation_by_token.items():
            if reserved.socket == socket and reserved.expires_ns <= now:
                del self._reservation_by_token[token]
                self._close(reserved)
                return

    def _open(self, family: int, port: int) -> Relayed | None:
        socket = self._sockets.open(family, port)
        if socket is None:
            return None
        self._ports_in_use.add((family, port))
        return Relayed(socket, Address(self.relay_addresses[family], port), family)

    def _close(self, relayed: Relayed) -> None:
        self._ports_in_use.discard((relayed.family, relayed.address.port))
        self._sockets.close(relayed.socket)


def _source(host: str) -> str | bytes:
    return source_prefix(host) if ":" in host else host


def _count(counts: dict[Key, int], key: Key, change: int) -> None:
    count = counts.get(key, 0) + change
    if count:
        counts[key] = count
    else:
        del counts[key]
