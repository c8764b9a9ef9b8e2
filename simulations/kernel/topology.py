"""The networks of a scenario file, made of namespaces: the ground of the kernel twin.

The internet is one router; a network is a namespace with a LAN, with a NAT or without one, behind
the internet or behind another such (a carrier's, say). A long way to the internet is of its router,
and one to another network's NAT has a router of its own, so that no NAT sees a packet before it
arrives. Names of routers have a dot, which those of a file cannot have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import (
    IPv4Interface,
    IPv4Network,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from itertools import count
from typing import Final

import attrs

from simulations.build import nat_label
from simulations.expected import way_out
from simulations.kernel.lab import Host, Lab, LabError
from simulations.kernel.links import Quality
from simulations.kernel.nats import install, install_firewall
from simulations.kernel.obstacles import kernel_nat
from simulations.kernel.punch import Place
from simulations.oracle import Nat, Side
from simulations.scenario.schema import INTERNET, LinkQuality, Network, Scenario
from simulations.scenario.units import PPM, duration_ns, rate_bit_per_s, share_ppm, size_bytes

PUBLIC: Final = IPv4Network("198.18.0.0/16")
"""Where public addresses are taken from, a /30 each; as in virtual time (RFC 2544)."""
PUBLIC6: Final = IPv6Network("2001:2::/48")
"""Where public IPv6 addresses are taken from, a /64 for each host (RFC 5180)."""
WAYS: Final = IPv4Network("198.19.0.0/16")
"""Where the two ends of a long way to a NAT have addresses."""
DEFAULT_LAN: Final = "192.168.1.0/24"
FIRST_HOST: Final = 10
SMALL: Final = 27
SMALL6: Final = 123
"""In a network with so long a prefix hosts begin after the router."""
NS_PER_US: Final = 1_000


@attrs.define(eq=False)
class Built:
    """A network that stands. `attached`: the router by which it hangs on the one outside."""

    network: Network
    router: Host
    attached: Host
    way_address: str = ""
    """That of a router of its own on the way, in the network outside."""
    hop6: str = ""
    way_hop6: str = ""
    """How `attached` finds the router by IPv6, and the router outside that on the way."""
    blocked: int = 0


class Topology:
    """The networks, and hosts as they are asked for. `links`: by their router, those that may be
    impaired (for `links.impaired`). IPv6 is there if any network has a prefix of it: then in those,
    and on the internet."""

    def __init__(self, lab: Lab, scenario: Scenario) -> None:
        self._lab = lab
        self.core = lab.router("core.")
        self.has_ipv6 = any(network.prefix6 for network in scenario.networks)
        self._public = _links_of(PUBLIC)
        self._public6 = _links_of_ipv6(PUBLIC6)
        self._ways = _links_of(WAYS)
        self._networks = {network.name: network for network in scenario.networks}
        self._built: dict[str, Built] = {}
        self._next_host: dict[str, int] = {}
        self._next_host6: dict[str, int] = {}
        self._taken = {
            str(ip_address(service.address)) for service in scenario.services if service.address
        }
        self._changing = {
            name for fault in scenario.faults if fault.kind == "link" for name in fault.targets
        }
        self._hosts: dict[str, tuple[Place, str]] = {}
        self._ipv6: dict[str, str] = {}
        self._rules = count(1)
        self.links: dict[str, tuple[Host, list[tuple[Host, Quality]]]] = {}
        for network in scenario.networks:
            self._build(network)

    # --- hosts -----------------------------------------------------------------------------------

    def host(self, name: str, network: str, address: str = "") -> Place:
        """A host, at the address or the next one of its network."""
        if network == INTERNET:
            text, text6 = self._public_addresses()
            host = self._lab.public_host(name, self.core, *filter(None, (text, text6)))
        else:
            text, text6 = self._addresses(network, address)
            host = self._lab.host(name, self._built[network].router, text)
            if text6:
                self._lab.ipv6(host, text6)
        return self._stands(name, host, network, text, text6)

    def _stands(self, name: str, host: Host, network: str, text: str, text6: str) -> Place:
        place = Place(host, text or text6)
        self._hosts[name] = place, network
        self._ipv6[name] = text6.partition("/")[0]
        return place

    @property
    def names(self) -> tuple[str, ...]:
        """Of all hosts."""
        return tuple(self._hosts)

    def place(self, name: str) -> Place:
        """Where a host is now, by its IPv4 address if it has one."""
        return self._hosts[name][0]

    def address_of(self, name: str) -> str:
        """The address of a host now, without its prefix: IPv4 if it has one."""
        return ip_of(self.place(name))

    def addresses_of(self, name: str) -> tuple[str, ...]:
        """All addresses of a host now: IPv4 first."""
        return tuple(dict.fromkeys(filter(None, (self.address_of(name), self._ipv6[name]))))

    def network_of(self, name: str) -> str:
        """In which network a host is now."""
        return self._hosts[name][1]

    def move(self, name: str, network: str) -> None:
        """A host is in another network from now on, with another address."""
        place, present = self._hosts[name]
        if present == network:
            return
        if network == INTERNET:
            text, text6 = self._public_addresses()
            self._lab.move_out(place.host, self.core, *filter(None, (text, text6)))
        else:
            text, text6 = self._addresses(network, "")
            self._lab.move(place.host, self._built[network].router, text)
            if text6:
                self._lab.ipv6(place.host, text6)
        self._stands(name, place.host, network, text, text6)

    def outside(self, name: str) -> str:
        """The address by which the internet sees a host: IPv6 where it has it, by which it dials
        then (RFC 6724)."""
        return self._ipv6[name] or self.outside_ipv4(name)

    def outside_ipv4(self, name: str) -> str:
        """The same, were there no IPv6."""
        place, network = self._hosts[name]
        seen = ip_of(place)
        for built in self._way_out(network):
            if built.network.nat is not None:
                seen = built.router.wan_address
        return seen

    # --- networks --------------------------------------------------------------------------------

    def router(self, network: str) -> Host:
        """The router of a network."""
        return self._built[network].router

    def link_of(self, network: str) -> tuple[Host, Host, Quality]:
        """By which router the uplink of a network is impaired, whose link it is, and what it is
        like by the file."""
        built = self._built[network]
        return built.attached, built.router, quality_of(built.network.uplink)

    def rebind(self, network: str, *, renumber: bool) -> None:
        """The NAT of a network forgets everything; `renumber`: it gets another address."""
        built = self._built[network]
        if built.network.nat is None:
            return
        if renumber:
            self._renumber(built)
        install(built.router, kernel_nat(built.network.nat))

    def _renumber(self, built: Built) -> None:
        nat, attached = built.router, built.attached
        if attached is self.core or built.way_address:
            new = next(self._ways if built.way_address else self._public)
            attached.ip(f"addr add {next(new.network.hosts())}/30 dev {nat.uplink}")
        else:
            new = self._address(built.network.behind, "")
        gateway = next(new.network.hosts())
        nat.ip("addr flush dev wan", f"addr add {new} dev wan",
               f"route replace default via {gateway}")  # fmt: skip
        nat.wan_address = str(new.ip)
        if built.way_address:
            self._route(new.network, built)

    def block_udp(self, network: str, *, blocked: bool) -> None:
        """No UDP passes between a network and the outside, while anybody blocks it."""
        built = self._built[network]
        built.blocked += 1 if blocked else -1
        self._set_firewall(built)

    def _set_firewall(self, built: Built) -> None:
        firewall = built.network.firewall
        udp = "drop" if built.blocked and firewall.udp == "pass" else firewall.udp
        plain = udp == "pass" and not firewall.udp_ports and not firewall.tcp_ports
        install_firewall(
            built.router,
            udp=udp,
            udp_ports=firewall.udp_ports,
            tcp_ports=firewall.tcp_ports,
            ipv6_inbound=firewall.ipv6_inbound or (plain and not built.network.prefix6),
        )

    def hosts_within(self, place: str) -> list[str]:
        """The host of this name, or all hosts that are in the network or behind it."""
        if place in self._hosts:
            return [place]
        return [
            name
            for name, (_, network) in self._hosts.items()
            if any(built.network.name == place for built in self._way_out(network))
        ]

    def part(self, targets: Sequence[str], others: Sequence[str]) -> list[tuple[Host, str]]:
        """No packet passes between two sets of hosts; the tables that make it so, for `join`.

        What is dropped is told by the addresses of the others, so raises LabError where some of
        these stand behind one NAT with a host that is not meant.
        """
        made: list[tuple[Host, str]] = []
        try:
            for ours, theirs in ((targets, others), (others, targets)):
                for name in ours:
                    made.append(self._shut(name, theirs))
        except LabError:
            self.join(made)
            raise
        return made

    @staticmethod
    def join(parted: Sequence[tuple[Host, str]]) -> None:
        """The end of `part`."""
        for host, table in parted:
            host.nft(f"delete table netdev {table}\n")

    def _shut(self, name: str, others: Sequence[str]) -> tuple[Host, str]:
        seen = {self._seen(other, name) for other in others}
        for bystander in self._hosts.keys() - {name, *others}:
            if self._seen(bystander, name) in seen - {""}:
                raise LabError(f"{name} cannot tell {bystander} from those it is parted from")
        host = self._hosts[name][0].host
        table = f"parted{next(self._rules)}"
        families = {
            "ip": sorted(filter(None, seen)),
            "ip6": sorted(self._ipv6[other] for other in others if self._ipv6[other]),
        }
        those = {family: ", ".join(each) for family, each in families.items() if each}
        inward, outward = (
            "\n    ".join(f"{family} {end} {{ {each} }} drop" for family, each in those.items())
            for end in ("saddr", "daddr")
        )
        # not the hook of output, which tells the sender
        host.nft(f"""
table netdev {table} {{
  chain inward {{
    type filter hook ingress device "eth0" priority 0;
    {inward}
  }}
  chain outward {{
    type filter hook egress device "eth0" priority 0;
    {outward}
  }}
}}
""")
        return host, table

    def _seen(self, name: str, by: str) -> str:
        """The IPv4 address by which one host sees another; empty if it has none."""
        if ":" in self.address_of(name):
            return ""
        if self._realm(name) == self._realm(by):
            return ip_of(self._hosts[name][0])
        return self.outside_ipv4(name)

    def _realm(self, name: str) -> str:
        """The innermost network with a NAT that a host is behind."""
        for built in self._way_out(self._hosts[name][1]):
            if built.network.nat is not None:
                return built.network.name
        return INTERNET

    # --- the oracle's view -----------------------------------------------------------------------

    def side(self, network: str, *, relay_port: int) -> Side:
        """What the oracle has to know of a host in this network."""
        nats: list[Nat] = []
        for built in self._way_out(network):
            if (written := built.network.nat) is not None:
                kernel = kernel_nat(written)
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
        firewalls = ((one.network.firewall, one.blocked > 0) for one in self._way_out(network))
        udp, streams = way_out(firewalls, relay_port)
        ipv6 = self.has_ipv6 if network == INTERNET else bool(self._networks[network].prefix6)
        return Side(nats=tuple(nats), udp=udp, streams=streams, ipv6=ipv6)

    def describe(self, network: str) -> str:
        """The NATs on the way out, from the host outwards, and where UDP is kept in; in short."""
        labels = []
        for built in self._way_out(network):
            if built.network.nat is not None:
                labels.append(nat_label(built.network.nat))
            if built.network.firewall.udp != "pass":
                labels.append("no UDP")
        return ", ".join(labels)

    def shared_nats(self, one: str, other: str) -> int:
        """How many NATs are on the ways out of both networks."""
        ours, theirs = (
            {built.network.name for built in self._way_out(network) if built.network.nat}
            for network in (one, other)
        )
        return len(ours & theirs)

    def _way_out(self, network: str) -> Iterator[Built]:
        while network != INTERNET:
            built = self._built[network]
            yield built
            network = built.network.behind

    # --- building --------------------------------------------------------------------------------

    def _build(self, network: Network) -> Built:
        built = self._built.get(network.name)
        if built is not None:
            return built
        lan = _lan(network)
        quality = quality_of(network.uplink)
        way_address = ""
        if network.behind == INTERNET:
            attached, wan = self.core, next(self._public)
        else:
            outer = self._build(self._networks[network.behind])
            if quality != Quality() or network.name in self._changing:
                address = self._address(network.behind, "")
                attached = self._lab.way(f"way.{network.name}", outer.router, str(address))
                way_address, wan = str(address.ip), next(self._ways)
            else:
                attached, wan = outer.router, self._address(network.behind, "")
        router = self._lab.nat(
            f"nat.{network.name}",
            attached,
            wan=str(wan),
            lan=f"{next(lan.hosts())}/{lan.prefixlen}",
            kind=None,
        )
        built = self._built[network.name] = Built(network, router, attached, way_address)
        if way_address:
            self._route(wan.network, built)
        if network.nat is not None:
            install(router, kernel_nat(network.nat))
        elif network.prefix:
            self._route(lan, built)
        if self.has_ipv6:
            self._open_ipv6(built)
        self._set_firewall(built)
        if way_address or attached is self.core:
            self.links.setdefault(attached.name, (attached, []))[1].append((router, quality))
        return built

    def _route(self, prefix: IPv4Network, built: Built) -> None:
        """Let all routers of the realm outside of a network find what is at or behind it."""
        hop = built.router.wan_address
        if prefix != ip_interface(f"{hop}/30").network:
            built.attached.ip(f"route replace {prefix} via {hop}")
        if built.network.behind == INTERNET:
            return
        outer = self._built[built.network.behind]
        if built.way_address:
            outer.router.ip(f"route replace {prefix} via {built.way_address}")
        if outer.network.nat is None:
            self._route(prefix, outer)

    def _open_ipv6(self, built: Built) -> None:
        """Let its router forward IPv6, and all routers on the way to the core find its prefix."""
        network = built.network
        if built.way_address:
            outer = self._built[network.behind].router
            built.way_hop6 = self._lab.forward_ipv6(built.attached, outer)
        built.hop6 = self._lab.forward_ipv6(built.router, built.attached)
        if not network.prefix6:
            return
        lan = IPv6Network(network.prefix6)
        self._lab.lan_ipv6(built.router, f"{next(lan.hosts())}/{lan.prefixlen}")
        for each in self._way_out(network.name):
            each.attached.ip(f"route add {lan} {each.hop6}")
            if each.way_hop6:
                self._built[each.network.behind].router.ip(f"route add {lan} {each.way_hop6}")

    def _public_addresses(self) -> tuple[str, str]:
        """IPv4 and IPv6 of the next host on the internet."""
        return str(next(self._public)), str(next(self._public6)) if self.has_ipv6 else ""

    def _addresses(self, network: str, address: str) -> tuple[str, str]:
        """IPv4 and IPv6 of a host in a network. One of IPv6 that is given is its only one."""
        written = self._networks[network]
        text = text6 = ""
        if (written.nat is not None or written.prefix) and ":" not in address:
            text = str(self._address(network, address))
        if written.prefix6:
            text6 = str(self._address6(network, address if ":" in address else ""))
        return text, text6

    def _address(self, network: str, address: str) -> IPv4Interface:
        lan = _lan(self._networks[network])
        while not address:
            number = self._next_host.get(network, FIRST_HOST if lan.prefixlen < SMALL else 2)
            self._next_host[network] = number + 1
            address = str(lan[number]) if str(lan[number]) not in self._taken else ""
        return IPv4Interface(f"{address}/{lan.prefixlen}")

    def _address6(self, network: str, address: str) -> IPv6Interface:
        lan = IPv6Network(self._networks[network].prefix6)
        while not address:
            number = self._next_host6.get(network, FIRST_HOST if lan.prefixlen < SMALL6 else 2)
            self._next_host6[network] = number + 1
            address = str(lan[number]) if str(lan[number]) not in self._taken else ""
        return IPv6Interface(f"{address}/{lan.prefixlen}")


def ip_of(place: Place) -> str:
    """The address of a host, without its prefix."""
    return place.network.partition("/")[0]


def quality_of(link: LinkQuality) -> Quality:
    """What of the quality of a link the kernel is made to do."""
    return Quality(
        latency_us=duration_ns(link.latency) // NS_PER_US,
        jitter_us=duration_ns(link.jitter) // NS_PER_US,
        loss=share_ppm(link.loss) / PPM,
        burst=link.burst,
        duplication=share_ppm(link.duplication) / PPM,
        reordering=share_ppm(link.reordering) / PPM,
        corruption=share_ppm(link.corruption) / PPM,
        rate_bit_s=rate_bit_per_s(link.bandwidth) if link.bandwidth else 0,
        queue_bytes=size_bytes(link.queue),
        mtu=link.mtu,
    )


def _links_of(pool: IPv4Network) -> Iterator[IPv4Interface]:
    for link in pool.subnets(new_prefix=30):
        yield IPv4Interface(f"{link[2]}/30")


def _links_of_ipv6(pool: IPv6Network) -> Iterator[IPv6Interface]:
    for link in pool.subnets(new_prefix=64):
        yield IPv6Interface(f"{link[2]}/64")


def _lan(network: Network) -> IPv4Network:
    lan = ip_network(network.prefix or DEFAULT_LAN)
    assert isinstance(lan, IPv4Network), network.name
    return lan
