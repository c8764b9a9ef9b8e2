"""Candidates of ICE (RFC 8445, section 5.1): their priorities, and which of a peer's are refused.

A *base* is a place that this machine can send from: a host socket, or an address that a relay
holds for it. Server-reflexive candidates share the base of the socket behind the NAT, so pairs
are formed of bases and remote addresses only (section 6.1.2.4, pruning).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Literal

import attrs

from channel.messages import MAX_CANDIDATES, Candidate, IpText
from runtime.net.address import Address

Kind = Literal["host", "srflx", "prflx", "relay"]
IpNetwork = IPv4Network | IPv6Network

LOWEST_PORT: Final = 1024
COMPONENT: Final = 1
MAX_LOCAL_PREFERENCE: Final = 65_535
REMEMBERED_HOSTS: Final = 4_096
"""Addresses whose judgement is remembered: the same few come with every check."""
TYPE_PREFERENCE: Final[dict[Kind, int]] = {"host": 126, "prflx": 110, "srflx": 100, "relay": 0}

# Lists of our own: `ipaddress.is_private` counts documentation ranges in, and its answers have
# changed between versions of Python.
PRIVATE: Final[tuple[IpNetwork, ...]] = (
    IPv4Network("10.0.0.0/8"),
    IPv4Network("172.16.0.0/12"),
    IPv4Network("192.168.0.0/16"),
    IPv6Network("fc00::/7"),
)
FORBIDDEN: Final[dict[str, tuple[IpNetwork, ...]]] = {
    "unspecified": (IPv4Network("0.0.0.0/8"), IPv6Network("::/128")),
    "loopback": (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128")),
    "link-local": (IPv4Network("169.254.0.0/16"), IPv6Network("fe80::/10")),
    "multicast": (IPv4Network("224.0.0.0/4"), IPv6Network("ff00::/8")),
    "reserved": (IPv4Network("240.0.0.0/4"),),
    "tunnel range": (IPv4Network("100.64.0.0/10"), IPv6Network("fd48:4c57:5900::/48")),
    # An IPv4 address in other clothes would pass by every line above.
    "embedded IPv4": (
        IPv6Network("::/96"),
        IPv6Network("::ffff:0:0/96"),
        IPv6Network("64:ff9b::/96"),
        IPv6Network("64:ff9b:1::/48"),
        IPv6Network("2001::/32"),
        IPv6Network("2002::/16"),
    ),
}


@attrs.frozen(kw_only=True)
class Base:
    """A place to send from: the host socket `socket`, or `address` on the relay `server`.

    `address` is what identifies it: the socket's own address, or the relayed one. `network` is
    the subnet that a host socket is connected to, where it is known.
    """

    address: Address
    socket: Address
    server: Address | None = None
    priority: int
    network: IpNetwork | None = None

    @property
    def kind(self) -> Literal["host", "relay"]:
        return "host" if self.server is None else "relay"


def priority_of(kind: Kind, local_preference: int) -> int:
    """RFC 8445, section 5.1.2.1. `local_preference` is 0 to 65535, larger is better."""
    return TYPE_PREFERENCE[kind] << 24 | local_preference << 8 | 256 - COMPONENT


def reflexive_priority(base: Base) -> int:
    """PRIORITY of a check: what the peer gives the peer-reflexive candidate it may find by it.

    The type preference is that of peer-reflexive candidates (section 7.1.1), except from a
    relay's address: a peer that has not heard of it yet must not take it for a direct path.
    """
    if base.server is not None:
        return base.priority
    return TYPE_PREFERENCE["prflx"] << 24 | base.priority & 0xFFFFFF


def reflexive_kind(priority: int) -> Kind:
    """What a peer-reflexive candidate is by the PRIORITY of the check that told of it.

    The other side of `reflexive_priority`. The address alone does not tell: a NAT of ours may show
    the packets of the peer's relay with another port than the one that was signalled.
    """
    return "relay" if priority >> 24 == TYPE_PREFERENCE["relay"] else "prflx"


def pair_priority(controlling: int, controlled: int) -> int:
    """RFC 8445, section 6.1.2.3, from the candidate priorities of the two ends."""
    low, high = min(controlling, controlled), max(controlling, controlled)
    return low << 32 | high << 1 | (controlling > controlled)


def foundation_of(kind: Kind, base_host: str, server: str = "") -> str:
    """The same for candidates of one kind, base address and server (section 5.1.1.3)."""
    return sha256(f"{kind}\0{base_host}\0{server}".encode()).hexdigest()[:8]


def host_candidate(base: Base) -> Candidate:
    """The address of a host socket itself (RFC 8445, section 5.1.1.1)."""
    return _candidate("host", base.address, base.priority, base.socket.host)


def reflexive_candidate(base: Base, address: Address, server: Address) -> Candidate:
    """What a STUN server saw of the host socket `base`."""
    priority = TYPE_PREFERENCE["srflx"] << 24 | base.priority & 0xFFFFFF
    return _candidate("srflx", address, priority, base.socket.host, server.host)


def relayed_candidate(base: Base) -> Candidate:
    """The relayed address of an allocation (RFC 8445, section 5.1.1.2); `base` is relayed."""
    assert base.server is not None
    return _candidate("relay", base.address, base.priority, base.address.host, base.server.host)


def address_of(candidate: Candidate) -> Address:
    """Where checks for this candidate are sent."""
    return Address(str(candidate.address), candidate.port)


def refusal(address: Address) -> str | None:
    """Why nothing is ever sent to a remote `address`; None when it may be tried.

    Private addresses are judged by `reachable`, since that depends on the socket.
    """
    return "low port" if address.port < LOWEST_PORT else _refusal_of_host(address.host)


@lru_cache(maxsize=REMEMBERED_HOSTS)
def _refusal_of_host(host: str) -> str | None:
    ip = ip_address(host)
    for reason, networks in FORBIDDEN.items():
        if _within(ip, networks):
            return reason
    return None


def reachable(base: Base, remote: Address) -> bool:
    """Whether a pair of these two may be formed: one family, and a private remote address only
    from a host socket that is connected to its subnet."""
    if (":" in base.address.host) != (":" in remote.host):
        return False
    if not _is_private(remote.host):
        return True
    if base.server is not None or base.network is None:
        return False
    return _within(ip_address(remote.host), (base.network,))


@lru_cache(maxsize=REMEMBERED_HOSTS)
def _is_private(host: str) -> bool:
    return _within(ip_address(host), PRIVATE)


def announceable(address: Address) -> bool:
    """Whether a peer could ever accept `address` as a candidate."""
    return refusal(address) is None


def network_of(network: IpNetwork | str | None) -> IpNetwork | None:
    """A subnet from its text, host bits allowed (`192.168.1.7/24`). Raises ValueError."""
    return ip_network(network, strict=False) if isinstance(network, str) else network


def _within(ip: IPv4Address | IPv6Address, networks: tuple[IpNetwork, ...]) -> bool:
    return any(ip in network for network in networks if network.version == ip.version)


def _candidate(
    kind: Kind, address: Address, priority: int, base_host: str, server: str = ""
) -> Candidate:
    return Candidate(
        kind=kind,
        address=IpText(address.host),
        port=address.port,
        priority=priority,
        foundation=foundation_of(kind, base_host, server),
    )


def local_candidates(
    hosts: Iterable[Base],
    reflexive: Iterable[tuple[Base, Address, Address]],
    relayed: Iterable[Base],
) -> tuple[Candidate, ...]:
    """What a peer may be told, best first, at most `MAX_CANDIDATES`. `reflexive`: bases, what their
    sockets look like from a server, and that server."""
    found = {base.address: host_candidate(base) for base in hosts}
    for base, seen_as, server in reflexive:
        found.setdefault(seen_as, reflexive_candidate(base, seen_as, server))
    found |= {base.address: relayed_candidate(base) for base in relayed}
    useful = [candidate for address, candidate in found.items() if announceable(address)]
    useful.sort(key=lambda candidate: candidate.priority, reverse=True)
    return tuple(useful[:MAX_CANDIDATES])
