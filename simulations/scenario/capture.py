"""Captures of real networks, put into a scenario: `holloway sim run FILE --add CAPTURE`.

A capture (`holloway netcheck --export`) is a file of networks and clients, nothing else, which are
the scenario's from then on. Names that are taken get a number. Whose the clients are is said in the
capture, or for all of them by whoever adds it, and has to be a user of the scenario, since what a
client may do is the account's to say. They ask for all that they may reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import IPv6Network, ip_network
from itertools import count
from pathlib import Path
from typing import Final

import attrs

from simulations.scenario.load import ScenarioError, checked, load_part
from simulations.scenario.schema import INTERNET, Network, Scenario, Traffic
from simulations.scenario.structure import Problem, shown, suggestion

MAX_NAME: Final = 63
PLACEHOLDERS: Final = IPv6Network("2001:db8:ffff::/48")
"""Prefixes in it stand for one that the capture does not tell, so they may be others."""

_OWN: Final = ("format", "name", "description", "sources", "networks", "clients")


def load_capture(file: Path) -> Scenario:
    """A capture by itself: every field is well formed. Raises ScenarioError."""
    found = load_part(file)
    problems = [
        Problem(field.name, "has no place in a capture, which has networks and clients")
        for field in attrs.fields(Scenario)
        if field.name not in _OWN and getattr(found, field.name) != _default(field)
    ]
    if not found.clients:
        problems.append(Problem("clients", "are missing: a capture has at least one"))
    if problems:
        raise ScenarioError(str(file), tuple(problems), len(problems))
    return found


def add(scenario: Scenario, capture: Scenario, *, user: str = "", name: str = "") -> Scenario:
    """The scenario with what was captured; `user` is whose the clients are if not the capture's
    own, `name` that of the file, for messages. Raises ScenarioError."""
    _check_users(scenario, capture, user, name)
    networks = _renamed([each.name for each in capture.networks], _networks_of(scenario))
    hosts = _renamed([each.name for each in capture.clients], _hosts_of(scenario))
    taken = [IPv6Network(each.prefix6) for each in scenario.networks if each.prefix6]
    added = [_moved(each, networks, taken) for each in capture.networks]
    clients = [
        attrs.evolve(
            each,
            name=hosts[each.name],
            network=networks.get(each.network, each.network),
            user=user or each.user,
        )
        for each in capture.clients
    ]
    whole = attrs.evolve(
        scenario,
        networks=(*scenario.networks, *added),
        clients=(*scenario.clients, *clients),
        sources=(*scenario.sources, *capture.sources),
        traffic=(*scenario.traffic, *_traffic(scenario, tuple(hosts.values()))),
    )
    return checked(whole, f"{scenario.name} with {name or capture.name}")


def _traffic(scenario: Scenario, clients: tuple[str, ...]) -> tuple[Traffic, ...]:
    """What makes them ask for all that they may reach, where the scenario's traffic is of clients
    that it names: else nothing would be seen of those that were added."""
    return () if any(not each.source for each in scenario.traffic) else (Traffic(source=clients),)


def _check_users(scenario: Scenario, capture: Scenario, user: str, name: str) -> None:
    known = [each.name for each in scenario.account.users]
    problems = []
    for i, client in enumerate(capture.clients):
        wanted = user or client.user
        if wanted not in known:
            near = suggestion(wanted, known)
            text = f"the scenario has no user {shown(wanted)}{near}"
            if user:
                problems.append(Problem("--as", text))
                break
            problems.append(Problem(f"clients[{i}].user", f"{text} (--as names another)"))
    if problems:
        raise ScenarioError(name or capture.name, tuple(problems), len(problems))


def _networks_of(scenario: Scenario) -> set[str]:
    return {INTERNET, *(each.name for each in scenario.networks)}


def _hosts_of(scenario: Scenario) -> set[str]:
    return {each.name for each in (*scenario.hosts, *scenario.populations)}


def _renamed(names: Sequence[str], taken: set[str]) -> dict[str, str]:
    """For each name the one that it has from now on."""
    found: dict[str, str] = {}
    used = set(taken)
    for name in names:
        found.setdefault(name, next(each for each in _candidates(name) if each not in used))
        used.add(found[name])
    return found


def _candidates(name: str) -> Iterator[str]:
    yield name
    for number in count(2):
        yield f"{name[: MAX_NAME - 1 - len(str(number))]}-{number}"


def _moved(network: Network, names: dict[str, str], taken: list[IPv6Network]) -> Network:
    """The network under its new name; notes its prefix among those taken."""
    prefix6 = network.prefix6
    if _is_prefix6(prefix6):
        wanted = IPv6Network(prefix6)
        if wanted.subnet_of(PLACEHOLDERS) and wanted.prefixlen == 64:
            wanted = next(
                each
                for each in (wanted, *PLACEHOLDERS.subnets(new_prefix=64))
                if not any(each.overlaps(other) for other in taken)
            )
        taken.append(wanted)
        prefix6 = str(wanted)
    return attrs.evolve(
        network,
        name=names[network.name],
        behind=names.get(network.behind, network.behind),
        prefix6=prefix6,
    )


def _is_prefix6(text: str) -> bool:
    """What is none is told by the check of the whole."""
    try:
        return bool(text) and isinstance(ip_network(text), IPv6Network)
    except ValueError:
        return False


def _default(field: attrs.Attribute[object]) -> object:
    default = field.default
    return default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type,attr-defined]
