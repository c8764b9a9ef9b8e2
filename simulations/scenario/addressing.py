"""Addresses of a scenario: prefixes parse, do not collide where they meet, and hold their hosts.

A NAT (or the internet) is the outer edge of a *realm*: all networks behind it without a further NAT
share one address space. Two homes may both be 192.168.1.0/24, since they never meet; two networks
of one realm may not overlap. IPv6 is not translated, so its realm is the whole world. A network
without a prefix has addresses of the one outside, and behind a NAT 192.168.1.0/24.
"""

from __future__ import annotations

from collections import Counter
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_interface, ip_network
from typing import Final

from channel.reserved import RESERVED
from simulations.scenario.schema import INTERNET, Scenario
from simulations.scenario.structure import Problems, shown

DRAWN: Final = IPv4Network("198.18.0.0/16")
"""Addresses of hosts and NATs on the internet itself, one after the other."""

AnyNetwork = IPv4Network | IPv6Network


def check_addresses(scenario: Scenario, problems: Problems) -> None:
    """Note what is wrong with the addresses of a scenario."""
    prefixes: dict[str, list[AnyNetwork]] = {}
    realms = realms_of(scenario)
    met: dict[str, list[tuple[str, AnyNetwork]]] = {}
    for place, network in problems.numbered(scenario.networks, "networks"):
        prefixes[network.name] = []
        for field, version in (("prefix", 4), ("prefix6", 6)):
            prefix = _prefix(f"{place}.{field}", getattr(network, field), version, problems)
            if prefix is not None:
                prefixes[network.name].append(prefix)
                key = realms[network.name] if version == 4 else "ipv6"
                met.setdefault(key, []).append((f"{place}.{field}", prefix))
    for place, prefix in met.get(INTERNET, ()):
        if prefix.overlaps(DRAWN):
            problems.note(place, f"{prefix} overlaps {DRAWN}, from which the internet's are drawn")
    for each in met.values():
        _collisions(each, problems)
    _room(scenario, prefixes, problems)
    _services(scenario, prefixes, realms, problems)
    _resources(scenario, problems)
    _links(scenario, realms, problems)


def realms_of(scenario: Scenario) -> dict[str, str]:
    """For each network the name of the one at whose outer edge the address space ends in which its
    hosts have their IPv4 addresses."""
    by_name = {each.name: each for each in scenario.networks}
    found = {INTERNET: INTERNET}
    for name in by_name:
        inner = [name]
        while (last := inner[-1]) not in found:
            network = by_name.get(last)
            if network is None or (network.behind in inner):  # unknown or a circle, as was noted
                found[last] = INTERNET
            elif network.nat is not None:
                found[last] = last
            else:
                inner.append(network.behind)
        found.update(dict.fromkeys(inner, found[last]))
    return found


def _prefix(place: str, text: str, version: int, problems: Problems) -> AnyNetwork | None:
    if not text:
        return None
    try:
        prefix = ip_network(text)
    except ValueError:
        try:
            nearest = f"; did you mean {ip_interface(text).network}?"
        except ValueError:
            nearest = f", such as {'192.168.1.0/24' if version == 4 else '2001:db8:1::/64'}"
        problems.note(place, f"{shown(text)} is no prefix{nearest}")
        return None
    if prefix.version != version:
        problems.note(place, f"{shown(text)} is no IPv{version} prefix")
        return None
    if prefix.is_multicast or prefix.is_loopback or prefix.is_link_local:
        problems.note(place, f"{shown(text)} is not for hosts")
        return None
    return prefix


def _collisions(met: list[tuple[str, AnyNetwork]], problems: Problems) -> None:
    """Sorted by address, a prefix that overlaps an earlier one overlaps the widest before it."""
    ordered = sorted(met, key=lambda each: (int(each[1].network_address), each[1].prefixlen))
    last_place, last = "", None
    for place, prefix in ordered:
        if last is not None and prefix.network_address <= last.broadcast_address:  # type: ignore[operator]
            problems.note(place, f"{prefix} collides with {last} of {last_place}: they meet")
        else:
            last_place, last = place, prefix


def _room(scenario: Scenario, prefixes: dict[str, list[AnyNetwork]], problems: Problems) -> None:
    """Networks with hosts have addresses for them, and for the outsides of NATs behind them."""
    hosts: Counter[str] = Counter()
    for part in ("portals", "relays", "gateways", "clients", "services"):
        hosts.update(each.network for each in getattr(scenario, part))
    outsides: Counter[str] = Counter()
    for network in scenario.networks:
        if network.nat is not None:
            outsides[network.behind] += network.nat.addresses
    for place, network in problems.numbered(scenario.networks, "networks"):
        wanted = hosts[network.name] + outsides[network.name]
        for prefix in prefixes[network.name]:
            if prefix.version == 4 and wanted > max(prefix.num_addresses - 3, 0):
                problems.note(f"{place}.prefix", f"{prefix} has no room for {wanted} addresses")


def _services(
    scenario: Scenario,
    prefixes: dict[str, list[AnyNetwork]],
    realms: dict[str, str],
    problems: Problems,
) -> None:
    taken: dict[tuple[str, str], str] = {}
    for place, service in problems.numbered(scenario.services, "services"):
        if not service.address:
            continue
        at = f"{place}.address"
        try:
            address = ip_address(service.address)
        except ValueError:
            problems.note(at, f"{shown(service.address)} is no address")
            continue
        within = prefixes.get(service.network)
        if within and not any(address in prefix for prefix in within):
            names = ", ".join(map(str, within))
            problems.note(at, f"{address} is not of its network ({names})")
        key = (realms.get(service.network, INTERNET), str(address))
        if key in taken:
            problems.note(at, f"{address} is taken by {taken[key]}")
        taken[key] = place


def _resources(scenario: Scenario, problems: Problems) -> None:
    for place, resource in problems.numbered(scenario.account.resources, "account.resources"):
        if not resource.address:
            continue
        try:
            address = ip_network(resource.address)
        except ValueError:
            problems.note(f"{place}.address", f"{shown(resource.address)} is no address or prefix")
            continue
        for name, reserved in RESERVED:
            if address.version == reserved.version and address.overlaps(reserved):
                problems.note(f"{place}.address", f"{address} is not for resources: {name}")


def _links(scenario: Scenario, realms: dict[str, str], problems: Problems) -> None:
    for place, link in problems.numbered(scenario.links, "links"):
        one, other = (realms.get(name, "") for name in link.between)
        if one != other and one and other:
            problems.note(
                f"{place}.between",
                f"there is a NAT between them ({one}, {other}); a link joins one realm",
            )
