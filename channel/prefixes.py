"""`PrefixTable`: which of many networks holds an address, the longest prefix first."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Generic, TypeVar

T = TypeVar("T")

Network = IPv4Network | IPv6Network
_BITS_BY_VERSION = {4: 32, 6: 128}


class PrefixTable(Generic[T]):
    """A table of IPv4 and IPv6 networks, one value each. Empty at first.

    A lookup asks one dictionary for each prefix length in use, the longest first: in practice a
    handful. An IPv4-mapped IPv6 address is an IPv6 address like any other.
    """

    __slots__ = ("_entries", "_lengths")

    def __init__(self) -> None:
        # Entries by version and shift (the number of host bits), then by the network's own bits.
        self._entries: dict[int, dict[int, dict[int, tuple[Network, T]]]] = {4: {}, 6: {}}
        self._lengths: dict[int, tuple[int, ...]] = {4: (), 6: ()}

    def insert(self, network: Network | str, value: T) -> None:
        """Add a network, or give one that is there another value. Raises ValueError for text
        that is no network, or has host bits."""
        network = _network(network)
        by_shift = self._entries[network.version]
        shift = _shift(network)
        entries = by_shift.get(shift)
        if entries is None:
            entries = by_shift[shift] = {}
            self._lengths[network.version] = tuple(sorted(by_shift))
        entries[int(network.network_address) >> shift] = (network, value)

    def remove(self, network: Network | str) -> T:
        """Take exactly this network out and return its value. Raises KeyError if it is not in."""
        network = _network(network)
        by_shift = self._entries[network.version]
        shift = _shift(network)
        entries = by_shift.get(shift, {})
        key = int(network.network_address) >> shift
        if key not in entries:
            raise KeyError(network)
        _, value = entries.pop(key)
        if not entries:
            del by_shift[shift]
            self._lengths[network.version] = tuple(sorted(by_shift))
        return value

    def get(self, network: Network | str) -> T | None:
        """The value of exactly this network, or None."""
        network = _network(network)
        shift = _shift(network)
        entries = self._entries[network.version].get(shift, {})
        entry = entries.get(int(network.network_address) >> shift)
        return None if entry is None else entry[1]

    def lookup(self, address: str | bytes | IPv4Address | IPv6Address) -> T | None:
        """The value of the longest prefix that holds `address`, or None.

        `address` is text, 4 or 16 bytes in network order (the quickest), or an address object.
        Raises ValueError for anything else.
        """
        entry = self.match(address)
        return None if entry is None else entry[1]

    def match(self, address: str | bytes | IPv4Address | IPv6Address) -> tuple[Network, T] | None:
        """As `lookup`, with the network that held the address."""
        version, number = _number(address)
        by_shift = self._entries[version]
        for shift in self._lengths[version]:
            entry = by_shift[shift].get(number >> shift)
            if entry is not None:
                return entry
        return None

    def items(self) -> Iterator[tuple[Network, T]]:
        """Every network with its value, in no particular order."""
        for by_shift in self._entries.values():
            for entries in by_shift.values():
                yield from entries.values()

    def __contains__(self, network: object) -> bool:
        """Whether exactly this network (an object, not text) is in the table."""
        if not isinstance(network, IPv4Network | IPv6Network):
            return False
        shift = _shift(network)
        entries = self._entries[network.version].get(shift, {})
        return int(network.network_address) >> shift in entries

    def __len__(self) -> int:
        return sum(
            len(entries) for by_shift in self._entries.values() for entries in by_shift.values()
        )

    def __repr__(self) -> str:
        return f"<PrefixTable of {len(self)} networks>"


def _network(network: Network | str) -> Network:
    return ip_network(network) if isinstance(network, str) else network


def _shift(network: Network) -> int:
    return _BITS_BY_VERSION[network.version] - network.prefixlen


def _number(address: str | bytes | IPv4Address | IPv6Address) -> tuple[int, int]:
    if isinstance(address, bytes):
        if len(address) == 4:
            return 4, int.from_bytes(address, "big")
        if len(address) == 16:
            return 6, int.from_bytes(address, "big")
        raise ValueError(f"an address has 4 or 16 bytes, not {len(address)}")
    if isinstance(address, str):
        address = ip_address(address)
    return address.version, int(address)
