"""What a resource's address means to an agent: networks, and which of them may be reached."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network

from channel.messages import Resource
from channel.reserved import RESERVED

Network = IPv4Network | IPv6Network

FORBIDDEN_NETWORKS: tuple[Network, ...] = tuple(network for _, network in RESERVED)
"""What no resource reaches, whatever the portal says."""


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


def is_forbidden(network: Network, further: Iterable[Network] = ()) -> bool:
    """Whether a network is no resource: the default route, or within what no resource reaches or
    what `further` names. (One that is larger may contain such addresses: packets are judged too.)
    """
    return network.prefixlen == 0 or within(network, (*FORBIDDEN_NETWORKS, *further))


def _inside(network: Network, limit: Network) -> bool:
    if isinstance(network, IPv4Network):
        return isinstance(limit, IPv4Network) and network.subnet_of(limit)
    return isinstance(limit, IPv6Network) and network.subnet_of(limit)
