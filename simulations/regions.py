"""Where in the world an address is, by the countries that a scenario gives its networks."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address

from simulations.net.routing import Network
from simulations.net.world import Host


class Countries:
    """The region database of a world (`actors.policy.conditions.Regions`). An address belongs to
    the network whose NAT has it outside, or else to the one whose prefix holds it."""

    def __init__(self, networks: Mapping[str, Network], countries: Mapping[str, str]) -> None:
        self._networks = [
            (network, countries[name]) for name, network in networks.items() if countries.get(name)
        ]

    def country(self, address: str) -> str | None:
        """The country (ISO 3166-1 alpha-2), None where no network says one."""
        for network, country in self._networks:
            if address in network.outer:
                return country
        return next(
            (country for network, country in self._networks if _holds(network, address)), None
        )


def _holds(network: Network, address: str) -> bool:
    pool = network.pool6 if ":" in address else network.pool4
    if pool is None or (network.nat is not None and pool is network.pool4):
        return False
    return ip_address(address) in pool.network


def public_ip(host: Host) -> str | None:
    """The address by which the internet, and so the portal, knows a host: as it dials, IPv6 where
    it has it."""
    if host.ipv6 is not None:
        return host.ipv6
    address, network = host.ipv4, host.network
    while network.parent is not None:
        if network.outer:
            address = network.outer[0]
        network = network.parent
    return address
