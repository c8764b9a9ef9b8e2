"""What a resource's address means to an agent: networks, and which of them may be reached."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network

from channel.messages import Resource

Network = IPv4Network | IPv6Network

# No resource reaches these, whatever the portal says: they mean the gateway itself, its link, or
# many hosts. The IPv6 forms that embed an IPv4 address would lead around a rule for that address.
FORBIDDEN_NETWORKS: tuple[Network, ...] = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0/3",
        "::/96",
        "::ffff:0:0/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "fe80::/10",
        "ff00::/8",
    )
)


def networks_of(resource: Resource) -> tuple[Network, ...]:
    """The networks of a `cidr` or `ip` resource; none for other kinds or an unreadable address."""
    if resource.kind not in ("cidr", "ip"):
        return ()
    try:
        return (ip_network(resource.address, strict=False),)
    except ValueError:
        return ()


def within(network: Network, ceiling: Iterable[Network]) -> bool:
    """Whether `network` lies wholly inside one of `ceiling`."""
    return any(_inside(network, limit) for limit in ceiling)


def overlaps_forbidden(network: Network) -> bool:
    """Whether a network consists of forbidden addresses (a larger one may contain some)."""
    return within(network, FORBIDDEN_NETWORKS)


def _inside(network: Network, limit: Network) -> bool:
    if isinstance(network, IPv4Network):
        return isinstance(limit, IPv4Network) and network.subnet_of(limit)
    return isinstance(limit, IPv6Network) and network.subnet_of(limit)
