"""Populations: clients with their users and networks, drawn from a mix of `mixes.toml`.

Every client draws from a stream of its own, named for it, and every shared carrier from another. So
whoever takes one client out of an expanded scenario (a shrinker, say) or adds one to a population
changes nothing about the others.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, Final

import attrs
import msgspec
from msgspec import Meta

from runtime.randomness import SeededRandomness
from simulations.scenario.schema import (
    Check,
    Client,
    Fault,
    Firewall,
    LinkQuality,
    NatBehaviour,
    Network,
    Population,
    Scenario,
    Traffic,
    User,
)
from simulations.scenario.units import PPM, duration_ns, share_ppm

CLIENTS_OF_A_CARRIER: Final = 50
"""On average: a population has so many carriers of a kind that this comes out."""
PUBLIC: Final = IPv4Network("198.19.0.0/16")
"""Where clients with a public address stand, each in a /30 of its own (of RFC 2544)."""
PUBLIC6: Final = IPv6Network("2001:db8::/32")
CARRIER: Final = "10.128.0.0/16"
"""Inside of carriers, which never meet one another; addresses of the NATs that are attached. Not
100.64.0.0/10, half of which is the range of tunnels: a client there is another case."""
ATTACHED: Final = IPv4Network("10.64.0.0/12")
"""Where clients stand that are attached to a carrier without a NAT of their own, each in a /30."""
ROAMS: Final = 3
"""Moves of a client that roams, at instants drawn over the whole run."""

Spread = Callable[[tuple[str, ...]], tuple[str, ...]]
Range = Annotated[tuple[str, ...], Meta(min_length=2, max_length=2)]


@attrs.frozen(kw_only=True)
class Kind:
    """A kind of network. Without `nat` and `carrier` clients have public addresses; with `carrier`
    alone they are attached to a carrier directly. `latency`, `timeout`: drawn from this range."""

    name: str
    share: float
    prefix: str = ""
    nat: NatBehaviour | None = None
    carrier: NatBehaviour | None = None
    firewall: Firewall = Firewall()
    latency: Range = ("5ms", "20ms")
    jitter: str = "0ms"
    loss: str | float = 0.0
    timeout: Range | None = None
    ipv6: float = 0.0


@attrs.frozen(kw_only=True)
class Mix:
    """Kinds of networks, whose shares are 1 in sum, and why they are what they are."""

    description: str
    figures: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    networks: tuple[Kind, ...]


@cache
def mixes() -> Mapping[str, Mix]:
    """All mixes, by name."""
    text = files("simulations.scenario").joinpath("mixes.toml").read_text()
    return msgspec.convert(tomllib.loads(text), dict[str, Mix])


def mix_names() -> list[str]:
    """The names of the mixes."""
    return sorted(mixes())


def expand(scenario: Scenario, seed: int) -> Scenario:
    """The same scenario with clients, users and networks in place of populations, and with the
    clients' names wherever a population was named. Itself where there is none."""
    if not scenario.populations:
        return scenario
    drawn = [Drawn(scenario, population, seed) for population in scenario.populations]
    for each in drawn:
        each.draw()
    names = {each.population.name: tuple(one.name for one in each.clients) for each in drawn}

    def spread(of: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for one in of for name in names.get(one, (one,)))

    account = scenario.account
    return attrs.evolve(
        scenario,
        populations=(),
        networks=(*scenario.networks, *_all(drawn, lambda each: each.networks)),
        clients=(*scenario.clients, *_all(drawn, lambda each: each.clients)),
        faults=(
            *(one for fault in scenario.faults for one in _spread_fault(fault, spread)),
            *_all(drawn, lambda each: each.faults),
        ),
        traffic=tuple(_spread_source(each, spread) for each in scenario.traffic),
        checks=tuple(_spread_check(each, spread) for each in scenario.checks),
        account=attrs.evolve(
            account, users=(*account.users, *_all(drawn, lambda each: each.users))
        ),
    )


class Drawn:
    """What one population becomes."""

    def __init__(self, scenario: Scenario, population: Population, seed: int) -> None:
        self.population = population
        self.mix = mixes()[population.mix]
        self.networks: list[Network] = []
        self.clients: list[Client] = []
        self.users: list[User] = []
        self.faults: list[Fault] = []
        self._seed = seed
        self._duration_ns = duration_ns(scenario.duration)
        self._first = sum(
            each.count for each in scenario.populations[: scenario.populations.index(population)]
        )
        self._carriers: dict[str, Network] = {}

    def draw(self) -> None:
        for number in range(1, self.population.count + 1):
            self._draw_client(number)
        self.networks = [*self._carriers.values(), *self.networks]

    def _draw_client(self, number: int) -> None:
        population = self.population
        name = f"{population.name}-{number}"
        stream = self._stream(name)
        # One draw for each thing, whatever the others gave, so that mixes can be edited.
        kind = self._kind(stream.integer(PPM))
        octet, latency, timeout = (stream.integer(PPM) for _ in range(3))
        has_ipv6 = stream.integer(PPM) < share_ppm(kind.ipv6)
        carrier, roams = stream.integer(PPM), stream.integer(PPM)
        index = self._first + number - 1
        network = Network(
            name=f"{name}-net",
            behind=self._carrier(kind, carrier) if kind.carrier else "internet",
            prefix=_prefix(kind, index, octet),
            prefix6=str(_subnet6(index)) if has_ipv6 else "",
            nat=_nat(kind, timeout),
            firewall=kind.firewall,
            uplink=LinkQuality(
                latency=_between(kind.latency, latency), jitter=kind.jitter, loss=kind.loss
            ),
        )
        self.networks.append(network)
        self.users.append(User(name=name, groups=population.groups))
        self.clients.append(Client(name=name, network=network.name, user=name))
        if roams < share_ppm(population.roaming):
            self._roam(name, index)

    def _roam(self, name: str, index: int) -> None:
        """The client moves between its own network and a phone's, at instants of its own."""
        stream = self._stream(f"{name} roaming")
        phone = Network(
            name=f"{name}-phone",
            prefix=_prefix(PHONE, index, stream.integer(PPM)),
            nat=PHONE.nat,
            uplink=LinkQuality(latency=_between(PHONE.latency, stream.integer(PPM)), jitter="5ms"),
        )
        self.networks.append(phone)
        instants = sorted(stream.integer(self._duration_ns // 10**6) for _ in range(ROAMS))
        for turn, at_ms in enumerate(instants):
            to = phone.name if turn % 2 == 0 else f"{name}-net"
            self.faults.append(Fault(at=f"{at_ms}ms", kind="roam", targets=(name,), to=to))

    def _carrier(self, kind: Kind, drawn: int) -> str:
        expected = self.population.count * share_ppm(kind.share) // PPM
        number = drawn * max(1, expected // CLIENTS_OF_A_CARRIER) // PPM + 1
        name = f"{self.population.name}-{kind.name}-carrier-{number}"
        if name not in self._carriers:
            stream = self._stream(name)
            self._carriers[name] = Network(
                name=name,
                prefix=CARRIER,
                nat=kind.carrier,
                uplink=LinkQuality(latency=f"{2 + stream.integer(9)}ms"),
            )
        return name

    def _kind(self, drawn: int) -> Kind:
        for kind in self.mix.networks:
            drawn -= share_ppm(kind.share)
            if drawn < 0:
                return kind
        return self.mix.networks[-1]

    def _stream(self, name: str) -> SeededRandomness:
        return SeededRandomness(self._seed, f"population {name}")


PHONE: Final = Kind(
    name="phone",
    share=1.0,
    prefix="172.20.{octet}.0/24",
    nat=NatBehaviour(ports="random", timeout="60s"),
    latency=("25ms", "80ms"),
)
"""Where a client that roams is when it is not at home; an assumption, as those of the mixes."""


def _all(drawn: list[Drawn], part: Callable[[Drawn], list[Any]]) -> tuple[Any, ...]:
    return tuple(one for each in drawn for one in part(each))


def _spread_fault(fault: Fault, spread: Spread) -> Iterator[Fault]:
    """A change of a population is one of each of its clients, or users, whose names are theirs."""
    fault = attrs.evolve(fault, targets=spread(fault.targets), others=spread(fault.others))
    for first in spread(fault.subject[:1]) or ("",):
        yield attrs.evolve(fault, subject=(first, *fault.subject[1:])) if first else fault


def _spread_source(traffic: Traffic, spread: Spread) -> Traffic:
    return attrs.evolve(traffic, source=spread(traffic.source))


def _spread_check(check: Check, spread: Spread) -> Check:
    return attrs.evolve(check, source=spread(check.source), targets=spread(check.targets))


def _prefix(kind: Kind, index: int, octet: int) -> str:
    if kind.prefix:
        return kind.prefix.format(octet=octet % 254 + 1)
    around = PUBLIC if kind.carrier is None else ATTACHED
    return str(IPv4Network((int(around.network_address) + 4 * index, 30)))


def _subnet6(index: int) -> IPv6Network:
    return IPv6Network((int(PUBLIC6.network_address) + ((index + 1) << 64), 64))


def _nat(kind: Kind, drawn: int) -> NatBehaviour | None:
    if kind.nat is None or kind.timeout is None:
        return kind.nat
    return attrs.evolve(kind.nat, timeout=_between(kind.timeout, drawn))


def _between(bounds: tuple[str, ...], drawn: int) -> str:
    """A duration in a range, in whole milliseconds."""
    least, most = (duration_ns(each) // 10**6 for each in bounds)
    return f"{least + drawn * (most - least + 1) // PPM}ms"
