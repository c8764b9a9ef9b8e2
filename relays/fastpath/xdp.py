"""Which packets the XDP program (`relay_xdp.c`) may carry: its entries, kept in step with the core.

A channel whose peer has answered has two entries, one for each direction. Both say until when they
hold: the first end of channel, permission and allocation. The program compares that itself with
the clock that the core uses (CLOCK_BOOTTIME), so nothing goes on longer if this process hangs or
forgets. What the core treats in a special way has no entries: strangers and their allowance, the
relay's own addresses, Send indications, channels without permission, listeners that are no UDP.

This is a core: it changes a `Flows` (a map of the kernel, or a dictionary in tests) and reads no
clock. `relays.fastpath.attaching` brings program and devices together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from socket import AF_INET, AF_INET6, inet_pton
from struct import Struct
from typing import Final, Protocol

import attrs

from relays.allocations import Allocation, Channel
from relays.turn import NS
from runtime.net.address import Address

OBJECT: Final = Path(__file__).with_name("relay_xdp.o")
SAMPLE_INTERVAL_NS: Final = 10 * NS
"""As in relay_xdp.c: one packet of each entry in this time takes the slow path."""
SWEEP_INTERVAL_NS: Final = 30 * NS
"""So long entries that have ended may fill the map."""

NAMES: Final = (
    "to_peer",
    "to_client",
    "not_udp",
    "irregular",
    "options",
    "fragment",
    "no_entry",
    "expired",
    "checksum",
    "hop_limit",
    "too_short",
    "too_large",
    "no_route",
    "other_device",
    "sampled",
    "no_room",
)
"""What the program counts: the first two are packets carried, the others reasons why a packet went
to the kernel."""

_ENDS: Final = Struct("!16s16sHHH")
_FAMILY: Final = Struct("<H")
_TIMES: Final = Struct("<QQ")

Counts = Callable[[], dict[str, tuple[int, int]]]
_Owner = tuple[int, tuple[str, int]]


class Flows(Protocol):
    """Where the program finds its entries. Raises OSError: no room, or the kernel refused."""

    def update(self, key: bytes, value: bytes) -> None: ...

    def delete(self, key: bytes) -> None:
        """What is not there is deleted already."""


@attrs.define
class _Entry:
    """What a channel has in the map: two keys with their values but for the times."""

    peer: tuple[str, int]
    expires_ns: int
    from_client: tuple[bytes, bytes]
    from_peer: tuple[bytes, bytes]


class XdpFastPath:
    """See the head of this file and `relays.fastpath.FastPath`.

    `relayed_hosts` maps a family (1: IPv4, 2: IPv6) to the local address of relayed ports; `counts`
    reads packets and bytes by `NAMES`.
    """

    def __init__(self, *, flows: Flows, counts: Counts, relayed_hosts: dict[int, str]) -> None:
        self._flows = flows
        self._counts = counts
        self._relayed_hosts = relayed_hosts
        self._listeners: dict[int, Address] = {}
        self._entries: dict[_Owner, dict[int, _Entry]] = {}
        self._swept_at_ns = 0
        self._refused = 0
        self._undeleted: list[bytes] = []

    def add_listener(self, listener: int, address: Address) -> None:
        """Clients of this UDP listener reach it at `address`, not a wildcard. Those of others are
        left to the core."""
        self._listeners[listener] = address

    def channels_changed(self, allocation: Allocation, now: int, host: str | None = None) -> None:
        if allocation.listener not in self._listeners:
            return
        for channel in allocation.channel_by_number.values():
            if host is None or channel.peer[0] == host:
                self._follow(allocation, channel, now)

    def allocation_ended(self, allocation: Allocation) -> None:
        for entry in self._entries.pop(_owner(allocation), {}).values():
            self._remove(entry)

    def handle_timeout(self, now: int) -> None:
        if now - self._swept_at_ns < SWEEP_INTERVAL_NS:
            return
        self._swept_at_ns = now
        undeleted, self._undeleted = self._undeleted, []
        for key in undeleted:
            self._delete(key)
        for entries in self._entries.values():
            for number, entry in list(entries.items()):
                if entry.expires_ns <= now:
                    self._remove(entries.pop(number))
        self._entries = {owner: held for owner, held in self._entries.items() if held}

    def relayed(self) -> tuple[int, int]:
        counts = self._counts()
        both = [counts.get(name, (0, 0)) for name in NAMES[:2]]
        return sum(packets for packets, _ in both), sum(size for _, size in both)

    def statistics(self) -> dict[str, int]:
        counts = self._counts()
        carried = {f"fast_path_{name}_packets": counts.get(name, (0, 0))[0] for name in NAMES[:2]}
        passed = {f"fast_path_passed_{name}": counts.get(name, (0, 0))[0] for name in NAMES[2:]}
        return {
            "fast_path_channels": sum(map(len, self._entries.values())),
            "fast_path_refused_channels": self._refused,
            **carried,
            **passed,
        }

    # --- helpers ---------------------------------------------------------------------------------

    def _follow(self, allocation: Allocation, channel: Channel, now: int) -> None:
        """Make the entries of one channel what it is now."""
        entries = self._entries.setdefault(_owner(allocation), {})
        permission = channel.permission
        expires_ns = min(permission.relayed.expires_ns, channel.expires_ns, permission.expires_ns)
        entry = entries.get(channel.number)
        if entry is not None and entry.peer != channel.peer:
            self._remove(entries.pop(channel.number))
            entry = None
        if permission.is_own or not permission.answered or expires_ns <= now:
            if entry is not None:
                self._remove(entries.pop(channel.number))
            return
        if entry is None:
            self._forget_peer(entries, channel.peer)
            entry = self._entry(allocation, channel)
        if entry is None or entry.expires_ns == expires_ns:
            return
        entry.expires_ns = expires_ns
        if self._write(entry, now):
            entries[channel.number] = entry
        else:
            entries.pop(channel.number, None)

    def _forget_peer(self, entries: dict[int, _Entry], peer: tuple[str, int]) -> None:
        """A peer whose channel has ended may have another number now, and has one key."""
        for number in [number for number, entry in entries.items() if entry.peer == peer]:
            self._remove(entries.pop(number))

    def _entry(self, allocation: Allocation, channel: Channel) -> _Entry | None:
        """None for addresses with a scope (link-local ones)."""
        listener = self._listeners[allocation.listener]
        leg = channel.permission.relayed
        relayed = (self._relayed_hosts[leg.family], leg.address.port)
        try:
            return _Entry(
                peer=channel.peer,
                expires_ns=0,
                from_client=(
                    _ends(allocation.client, listener, channel.number),
                    _ends(relayed, channel.peer, 0),
                ),
                from_peer=(
                    _ends(channel.peer, relayed, 0),
                    _ends(listener, allocation.client, channel.number),
                ),
            )
        except OSError:
            return None

    def _write(self, entry: _Entry, now: int) -> bool:
        times = _TIMES.pack(entry.expires_ns, now)
        try:
            for key, value in (entry.from_client, entry.from_peer):
                self._flows.update(key, times + value)
        except OSError:
            self._refused += 1
            self._remove(entry)
            return False
        return True

    def _remove(self, entry: _Entry) -> None:
        self._delete(entry.from_client[0])
        self._delete(entry.from_peer[0])

    def _delete(self, key: bytes) -> None:
        try:
            self._flows.delete(key)
        except OSError:  # it ends by itself at the latest when its time has come
            self._undeleted.append(key)


def _owner(allocation: Allocation) -> _Owner:
    """The 5-tuple: it has one allocation at a time."""
    return allocation.listener, allocation.client


def relayed_port_of(key: bytes, value: bytes) -> int:
    """Of which relayed port an entry is."""
    _, _, _, target_port, channel = _ENDS.unpack_from(key)
    if channel == 0:
        return int(target_port)
    return int(_ENDS.unpack_from(value, _TIMES.size)[2])


def _ends(source: tuple[str, int], target: tuple[str, int], channel: int) -> bytes:
    """Addresses, ports, channel and family as relay_xdp.c has them. Raises OSError."""
    family = AF_INET6 if ":" in source[0] else AF_INET
    hosts = inet_pton(family, source[0]), inet_pton(family, target[0])
    return _ENDS.pack(*hosts, source[1], target[1], channel) + _FAMILY.pack(family)
