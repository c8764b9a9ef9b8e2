"""Addresses that no resource reaches, whatever an account says: both wings go by this one list.

The portal refuses a resource that touches one; a gateway refuses the authorisation, and drops
packets to them where a larger resource contains some; a client routes none of them.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final

RESERVED: Final[tuple[tuple[str, IPv4Network | IPv6Network], ...]] = tuple(
    (name, ip_network(network))
    for name, networks in {
        "this host": ("0.0.0.0/8", "::/96"),
        "loopback": ("127.0.0.0/8",),
        "link-local": ("169.254.0.0/16", "fe80::/10"),  # with the metadata service of most clouds
        "multicast": ("224.0.0.0/4", "ff00::/8"),
        "broadcast": ("255.255.255.255/32",),
        "reserved": ("240.0.0.0/4",),
        # An IPv4 address in these clothes would pass by every rule for that address.
        "IPv4 inside IPv6": (
            "::ffff:0:0/96",  # IPv4-mapped
            "::ffff:0:0:0/96",  # IPv4-translated (RFC 2765)
            "64:ff9b::/96",  # NAT64 (RFC 6052)
            "64:ff9b:1::/48",  # NAT64, local use (RFC 8215)
            "2001::/32",  # Teredo
            "2002::/16",  # 6to4
        ),
        # Where clouds hand out credentials to whoever asks from the machine itself.
        "metadata": (
            "100.100.100.200/32",  # Alibaba Cloud
            "168.63.129.16/32",  # Azure
            "fd00:ec2::254/128",  # Amazon
            "fd20:ce::254/128",  # Google
        ),
    }.items()
    for network in networks
)
