"""Whom a connection counts against, and how many there may be: a core."""

from __future__ import annotations

from collections import Counter
from ipaddress import IPv6Address, ip_address


def source_of(host: str) -> str:
    """Whom an IP address counts against: an IPv4 address itself, of IPv6 the /64 network."""
    ip = ip_address(host)
    return ip.exploded[:19] if isinstance(ip, IPv6Address) else host


class SourceLimit:
    """Places: `most` of them, of which one source gets `most_per_source`. What a source is, the
    owner says."""

    def __init__(self, most: int, most_per_source: int) -> None:
        self._most = most
        self._most_per_source = most_per_source
        self._taken = 0
        self._taken_by_source: Counter[str | bytes] = Counter()

    def __len__(self) -> int:
        return self._taken

    def enter(self, source: str | bytes) -> bool:
        """Take a place; False if there is none."""
        if self._taken >= self._most or self._taken_by_source[source] >= self._most_per_source:
            return False
        self._taken += 1
        self._taken_by_source[source] += 1
        return True

    def leave(self, source: str | bytes) -> None:
        """Give a place back."""
        self._taken -= 1
        self._taken_by_source[source] -= 1
        if not self._taken_by_source[source]:
            del self._taken_by_source[source]
