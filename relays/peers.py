"""Whom a relay talks to: which peer addresses are refused, and how fast strangers are served.

The refusals are an explicit list and not what `ipaddress.is_private` says: that calls
documentation ranges private, and does not know of the forms that hide an IPv4 address.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from socket import AF_INET6, inet_pton
from typing import Final

import attrs

IPNetwork = IPv4Network | IPv6Network

LOWEST_PEER_PORT: Final = 1024

# Nothing allows these.
_NEVER: Final = (
    "0.0.0.0/8",  # this network
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, and the broadcast address
    "::/96",  # unspecified, loopback, IPv4-compatible
    "::ffff:0:0/96",  # IPv4-mapped
    "::ffff:0:0:0/96",  # IPv4-translated (RFC 2765)
    "64:ff9b::/96",  # NAT64
    "64:ff9b:1::/48",  # NAT64, local use
    "2001::/32",  # Teredo
    "2002::/16",  # 6to4
    "100::/64",  # discard only
    "fec0::/10",  # site-local, deprecated
    "ff00::/8",  # multicast
)
# An operator may allow these, for a laboratory or a relay inside of one network.
_BY_DEFAULT: Final = (
    "10.0.0.0/8",
    "100.64.0.0/10",  # carrier-grade NAT, and the tunnel range
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "::1/128",
    "fc00::/7",
    "fe80::/10",
)
_PRIVATE: Final = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")


@attrs.frozen
class PeerPolicy:
    """Which IP addresses may be peers. `PeerPolicy.of` makes one."""

    never: tuple[IPNetwork, ...]
    refused: tuple[IPNetwork, ...]
    allowed: tuple[IPNetwork, ...]

    @classmethod
    def of(
        cls, *, allow_private_peers: bool = False, allowed_peer_ranges: Iterable[str] = ()
    ) -> PeerPolicy:
        """Ranges in CIDR form. `allow_private_peers` stands for 10/8, 172.16/12, 192.168/16 and
        fc00::/7. Multicast, unspecified and embedded-IPv4 forms stay refused whatever is
        allowed. Raises ValueError."""
        allowed = [*allowed_peer_ranges, *(_PRIVATE if allow_private_peers else ())]
        return cls(
            tuple(ip_network(text) for text in _NEVER),
            tuple(ip_network(text) for text in _BY_DEFAULT),
            tuple(ip_network(text) for text in allowed),
        )

    def allows(self, host: str) -> bool:
        """Whether `host` (an IP address as text) may be a peer. Anything unreadable may not."""
        try:
            address = ip_address(host)
        except ValueError:
            return False

        def is_in(networks: tuple[IPNetwork, ...]) -> bool:
            return any(address in network for network in networks)

        if is_in(self.never):
            return False
        return is_in(self.allowed) or not is_in(self.refused)


def source_prefix(host: str) -> str | bytes:
    """The /24 of an IPv4 address or the /56 of an IPv6 address, as a dictionary key."""
    if ":" in host:
        return inet_pton(AF_INET6, host.partition("%")[0])[:7]
    return host.rpartition(".")[0]


class RateLimiter:
    """So many events a second for each key, with a burst; memory is bounded.

    One integer per key: the time at which it will have paid for all that it had (the generic cell
    rate algorithm). When more than `max_keys` are in debt at once, newcomers share one allowance.
    """

    def __init__(self, *, per_second: int, burst: int, max_keys: int) -> None:
        self._interval_ns = 10**9 // per_second
        self._tolerance_ns = self._interval_ns * (burst - 1)
        self._max_keys = max_keys
        self._paid_at_by_key: dict[str | bytes, int] = {}
        self._swept_at_ns = 0

    def take(self, key: str | bytes, now: int) -> bool:
        """Whether one more event of `key` is within its rate at `now` (nanoseconds)."""
        paid_at_by_key = self._paid_at_by_key
        if len(paid_at_by_key) >= self._max_keys and key not in paid_at_by_key:
            self._sweep(now)
            if len(paid_at_by_key) >= self._max_keys:
                key = b""
        paid_at = max(paid_at_by_key.get(key, now), now)
        if paid_at - now > self._tolerance_ns:
            return False
        paid_at_by_key[key] = paid_at + self._interval_ns
        return True

    def __len__(self) -> int:
        return len(self._paid_at_by_key)

    def _sweep(self, now: int) -> None:
        """Forget who is out of debt; at most once a second, since it looks at every key."""
        if now - self._swept_at_ns < 10**9:
            return
        self._swept_at_ns = now
        for key in [key for key, paid_at in self._paid_at_by_key.items() if paid_at <= now]:
            del self._paid_at_by_key[key]
