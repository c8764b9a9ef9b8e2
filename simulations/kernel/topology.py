"""The networks of a scenario file, made of namespaces: the ground of the kernel twin.

The internet is one router; a network with a NAT is a namespace with a LAN, behind the internet or
behind another such (a carrier's). What the kernel cannot be made to do, or what is not built here
yet, is said by `obstacles`, before anything is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Interface, IPv4Network, ip_network
from typing import Final

import attrs

from simulations.kernel.lab import Host, Lab
from simulations.kernel.links import Quality
from simulations.kernel.nats import KernelNat, install, unsupported
from simulations.kernel.punch import Place
from simulations.oracle import Nat, Side
from simulations.scenario.schema import INTERNET, LinkQuality, Network, Scenario
from simulations.scenario.units import duration_ns, rate_bit_per_s, share_ppm, size_bytes

PUBLIC: Final = ("203.0.113.0/24", "198.51.100.0/24", "192.0.2.0/24")
"""Where public addresses are taken from, a /30 each (RFC 5737)."""
DEFAULT_LAN: Final = "192.168.1.0/24"
FIRST_HOST: Final = 10
NS_PER_US: Final = 1_000


def obstacles(scenario: Scenario) -> list[str]:
    """Why the networks of this scenario cannot be built, a sentence each; empty if they can."""
    found = []
    networks = {network.name: network for network in scenario.networks}
    for network in scenario.networks:
        if network.nat is None:
            found.append(f"network {network.name}: one without a NAT is not built on the kernel")
        elif network.nat.ports == "range" or network.nat.addresses > 1:
            found.append(f"network {network.name}: blocks of ports, or of addresses")
        elif reason := unsupported(_kernel_nat(network)):
            found.append(f"network {network.name}: {reason}")
        if network.firewall.udp_ports or network.firewall.tcp_ports or network.prefix6:
            found.append(f"network {network.name}: lists of ports, and IPv6, are not built yet")
        if network.behind != INTERNET and (
            network.behind not in networks or _quality(network.uplink).delayed
        ):
            found.append(f"network {network.name}: a long way to a carrier's NAT is not built yet")
    if scenario.links:
        found.append("further links between networks are not built on the kernel")
    return found


class Topology:
    """The networks, and hosts as they are asked for. `first` has the first public address;
    `uplinks` is for `links.impaired`."""

    def __init__(self, lab: Lab, scenario: Scenario, *, first: str) -> None:
        self._lab = lab
        self.core = lab.router("core")
        self._public = _public_addresses()
        self.first = self.host(first, INTERNET)
        self._networks = {network.name: network for network in scenario.networks}
        self._nats: dict[str, Host] = {}
        self._next_host: dict[str, int] = {}
        self.uplinks: list[tuple[Host, Quality]] = []
        for network in scenario.networks:
            self._nat_of(network)

    def host(self, name: str, network: str, address: str = "") -> Place:
        """A host, at the address or the next one of its network."""
        if network == INTERNET:
            public = next(self._public)
            return Place(self._lab.public_host(name, self.core, str(public)), str(public))
        text = str(self._address(network, address))
        return Place(self._lab.host(name, self._nats[network], text), text)

    def side(self, network: str) -> Side:
        """What the oracle has to know of a host in this network."""
        nats, udp = [], "open"
        while network != INTERNET:
            found = self._networks[network]
            kernel = _kernel_nat(found)
            nats.append(
                Nat(
                    mapping=kernel.mapping,
                    filtering=kernel.filtering,
                    ports=kernel.assigned,
                    hairpinning=kernel.hairpinning,
                    filters_per=kernel.filters_per,
                    inbound_binding=kernel.racing,
                    reply_binding=not kernel.racing,
                )
            )
            if found.firewall.udp != "pass":
                udp = "blocked"
            network = found.behind
        return Side(nats=tuple(nats), udp="blocked" if udp == "blocked" else "open")

    def describe(self, network: str) -> str:
        """The NATs on the way out, from the host outwards."""
        kinds = (self._networks[name].nat for name in self._way_out(network))
        return ", ".join(f"{nat.mapping}/{nat.filtering}" for nat in kinds if nat is not None)

    def shared_nats(self, one: str, other: str) -> int:
        """How many NATs are on the ways out of both networks."""
        return len(set(self._way_out(one)) & set(self._way_out(other)))

    def _way_out(self, network: str) -> list[str]:
        names = []
        while network != INTERNET:
            names.append(network)
            network = self._networks[network].behind
        return names

    def _nat_of(self, network: Network) -> Host:
        made = self._nats.get(network.name)
        if made is not None:
            return made
        lan = f"{next(_lan(network).hosts())}/{_lan(network).prefixlen}"
        if network.behind == INTERNET:
            router, wan = self.core, str(next(self._public))
        else:
            router = self._nat_of(self._networks[network.behind])
            wan = str(self._address(network.behind, ""))
        nat = self._lab.nat(f"nat-{network.name}", router, wan=wan, lan=lan)
        self._nats[network.name] = nat
        install(nat, _kernel_nat(network))
        quality = _quality(network.uplink)
        if quality.delayed or quality.rate_bit_s:
            self.uplinks.append((nat, quality))
        return nat

    def _address(self, network: str, address: str) -> IPv4Interface:
        lan = _lan(self._networks[network])
        if not address:
            number = self._next_host.get(network, FIRST_HOST)
            self._next_host[network] = number + 1
            address = str(lan[number])
        return IPv4Interface(f"{address}/{lan.prefixlen}")


def _public_addresses() -> Iterator[IPv4Interface]:
    for prefix in PUBLIC:
        for link in IPv4Network(prefix).subnets(new_prefix=30):
            yield IPv4Interface(f"{link[2]}/30")


def _lan(network: Network) -> IPv4Network:
    lan = ip_network(network.prefix or DEFAULT_LAN)
    assert isinstance(lan, IPv4Network), network.name
    return lan


def _kernel_nat(network: Network) -> KernelNat:
    nat = network.nat
    assert nat is not None, network.name
    timeout_s = max(1, duration_ns(nat.timeout) // 10**9)
    kept = nat.ports == "preserve" and nat.mapping != "endpoint_independent"
    return KernelNat(
        mapping=nat.mapping,
        filtering=nat.filtering,
        ports=None if kept or nat.ports == "range" else nat.ports,
        hairpinning=nat.hairpinning,
        udp=network.firewall.udp,
        timeout_s=timeout_s,
        stream_timeout_s=timeout_s,
        racing=nat.inbound_binding,
    )


def _quality(link: LinkQuality) -> Quality:
    return attrs.evolve(
        Quality(),
        latency_us=duration_ns(link.latency) // NS_PER_US,
        jitter_us=duration_ns(link.jitter) // NS_PER_US,
        loss=share_ppm(link.loss) / 10**6,
        rate_bit_s=rate_bit_per_s(link.bandwidth) if link.bandwidth else 0,
        queue_bytes=size_bytes(link.queue),
    )
