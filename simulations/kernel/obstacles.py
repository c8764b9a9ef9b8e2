"""What of a scenario the kernel cannot be made to do, and what it does otherwise.

Both are said before anything is made: `obstacles` keep a scenario from running, and `liberties` are
small enough to run with. `as_built` is the scenario with the liberties written in, so that a run in
virtual time meets the same networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import attrs

from simulations.kernel.nats import KernelNat, unsupported
from simulations.scenario.schema import (
    INTERNET,
    Client,
    Fault,
    Gateway,
    LinkQuality,
    NatBehaviour,
    Network,
    Relay,
    Scenario,
)
from simulations.scenario.units import duration_ns

MAX_PROCESSES: Final = 50
"""Portals, relays, gateways and clients: each takes 60 to 150 MB, and with 66 of them two cores had
no time left to answer."""
LAN: Final = LinkQuality()
REASONS: Final = {
    "clock_skew": "all hosts have the machine's clock; a time namespace shifts no wall clock, only"
    " the monotonic ones, which hosts do not compare",
}


def obstacles(scenario: Scenario) -> list[str]:
    """Why this scenario cannot run on the kernel, a sentence each; empty if it can. Populations and
    chaos are to be written out before."""
    return [*_of_networks(scenario), *_of_hosts(scenario), *_of_faults(scenario)]


def liberties(scenario: Scenario) -> list[str]:
    """What is built otherwise than the file says, a sentence each."""
    by_word: dict[str, list[str]] = {}
    for network in scenario.networks:
        for word in _liberties_of(network):
            by_word.setdefault(word, []).append(network.name)
    found = [f"{word}: {', '.join(names)}" for word, names in by_word.items()]
    if any(fault.kind == "reconnect" for fault in scenario.faults):
        found.append("reconnect: the portal refuses for 17 s, until the channel ends by itself")
    if any(fault.slow for fault in scenario.faults):
        found.append(
            "a slow database is so in each round trip, of which a question may take several"
        )
    if scenario.traffic or scenario.checks:
        found.append("bounds of checks: twice as long, and 3 s more")
    return found


def _liberties_of(network: Network) -> Iterator[str]:
    nat = network.nat
    if nat is not None:
        if nat.addresses > 1:
            yield "NATs have one public address in place of several"
        if nat.ports == "range":
            yield "ports are in sequence or random, in place of blocks"
        if nat.ports == "preserve" and nat.mapping != "endpoint_independent":
            yield "ports are random, none is kept"
        if not nat.inbound_refresh:
            yield "traffic from outside keeps a binding, too"
        if not (nat.inbound_binding or nat.reply_binding):
            yield "answers leave from where the question came in"
    if network.lan != LAN:
        yield "nothing is slow or lost between hosts of one network"


def agents_of(scenario: Scenario) -> tuple[Relay | Gateway | Client, ...]:
    """All whose control channel ends at a portal, in the order in which they are started."""
    return (*scenario.relays, *scenario.gateways, *scenario.clients)


def as_built(scenario: Scenario) -> Scenario:
    """The scenario with its networks as they are on the kernel."""
    networks = tuple(
        attrs.evolve(
            each,
            lan=LAN,
            nat=None if each.nat is None else _nat_as_built(each.nat),
        )
        for each in scenario.networks
    )
    return attrs.evolve(scenario, networks=networks)


def kernel_nat(nat: NatBehaviour) -> KernelNat:
    """The NAT of the kernel that stands for one of a file."""
    timeout_s = max(1, duration_ns(nat.timeout) // 10**9)
    as_built = _nat_as_built(nat)
    ports = as_built.ports
    assert ports != "range"
    return KernelNat(
        mapping=nat.mapping,
        filtering=nat.filtering,
        ports=ports,
        hairpinning=nat.hairpinning,
        timeout_s=timeout_s,
        stream_timeout_s=timeout_s,
        racing=nat.inbound_binding,
    )


def _nat_as_built(nat: NatBehaviour) -> NatBehaviour:
    kept = nat.mapping != "endpoint_independent" and nat.ports in ("preserve", "range")
    ports = "random" if kept else "sequential" if nat.ports == "range" else nat.ports
    return attrs.evolve(
        nat,
        ports=ports,
        addresses=1,
        inbound_refresh=True,
        reply_binding=not nat.inbound_binding,
    )


# --- networks -------------------------------------------------------------------------------------


def _of_networks(scenario: Scenario) -> Iterator[str]:
    for network in scenario.networks:
        name = f"network {network.name}"
        if network.nat is None and not network.prefix and not network.prefix6:
            yield f"{name}: without a NAT it needs a prefix of its own"
        if network.nat is not None and (reason := unsupported(kernel_nat(network.nat))):
            yield f"{name}: {reason}"
    if scenario.links:
        yield "further links between networks are not built on the kernel"


# --- hosts ----------------------------------------------------------------------------------------


def _of_hosts(scenario: Scenario) -> Iterator[str]:
    processes = len(scenario.hosts) - len(scenario.services)
    processes += sum(each.count for each in scenario.populations)
    if processes > MAX_PROCESSES:
        yield f"{processes} processes of Holloway are more than {MAX_PROCESSES}"
    without_ipv4 = {each.name for each in scenario.networks if each.nat is None and not each.prefix}
    for portal in scenario.portals:
        if portal.network in without_ipv4:
            yield f"{portal.name}: a portal without IPv4 is not built on the kernel"
    if scenario.portals and not scenario.portals[0].starts:
        yield f"{scenario.portals[0].name}: the first portal has to start at once"
    for resource in scenario.account.resources:
        if not resource.service:
            yield f"resource {resource.name}: only those of a service are asked"
    for service in scenario.services:
        if service.network == INTERNET and service.address:
            yield f"service {service.name}: addresses on the internet itself cannot be chosen"


# --- faults ---------------------------------------------------------------------------------------


def _of_faults(scenario: Scenario) -> Iterator[str]:
    networks = {network.name: network for network in scenario.networks}
    portals = {portal.name for portal in scenario.portals}
    for fault in scenario.faults:
        if reason := _why_not(fault, networks, portals):
            yield f"fault {fault.kind} at {fault.at}: {reason}"


def _why_not(fault: Fault, networks: dict[str, Network], portals: set[str]) -> str:
    if fault.kind in REASONS:
        return REASONS[fault.kind]
    if fault.kind == "roam" and portals & set(fault.targets):
        return "a portal keeps its address"
    if fault.kind == "rebind" and fault.renumber:
        for name in fault.targets:
            if name in networks and networks[name].nat is None:
                return f"network {name} has no NAT"
    return ""
