"""Faults drawn from a seed, within the budget that a scenario states.

`draw` gives the scenario with the drawn faults written out, so what happens in a run of chaos is a
scenario file like any other: it can be saved, read, replayed and shrunk. Each fault is drawn from a
stream of its own (its number), so leaving one out changes no other.

Everything heals: each drawn fault has ended by `Chaos.heals`, hosts run again, links are as they
were, and what an admin changed is undone. From then until the end of the scenario the system has
time to recover, and in the end everybody who may must have access (`checks.liveness`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import attrs

from runtime.randomness import Randomness, SeededRandomness, choice
from simulations.scenario.schema import (
    INTERNET,
    Chaos,
    Fault,
    FaultKind,
    LinkQuality,
    Scenario,
)
from simulations.scenario.units import duration_ns, share_ppm

NS_PER_MS: Final = 10**6
SHORTEST_NS: Final = 100 * NS_PER_MS
TRIES: Final = 50
"""How often another time is drawn for a fault, before it is left out for want of room."""


@attrs.frozen
class _Topology:
    """Names by what can happen to them."""

    hosts: tuple[str, ...]
    agents: tuple[str, ...]
    portals: tuple[str, ...]
    relays: tuple[str, ...]
    edges: tuple[str, ...]
    """Networks with an uplink."""
    nats: tuple[str, ...]
    clients: tuple[str, ...]
    policies: tuple[str, ...]

    @classmethod
    def of(cls, scenario: Scenario) -> _Topology:
        services = {each.name for each in scenario.services}
        edges = [each.name for each in scenario.networks if each.name != INTERNET]
        return cls(
            hosts=tuple(each.name for each in scenario.hosts if each.name not in services),
            agents=(
                *(each.name for each in scenario.relays),
                *(each.name for each in scenario.gateways),
                *(each.name for each in scenario.clients),
            ),
            portals=tuple(each.name for each in scenario.portals),
            relays=tuple(each.name for each in scenario.relays),
            edges=tuple(edges),
            nats=tuple(each.name for each in scenario.networks if each.nat is not None),
            clients=tuple(each.name for each in scenario.clients),
            policies=tuple(p.name for p in scenario.account.policies if not p.disabled),
        )


@attrs.frozen
class _Span:
    """When a fault goes on, ns; and what it needs for itself."""

    begins: int
    ends: int
    claims: frozenset[tuple[str, str]]

    def overlaps(self, other: _Span) -> bool:
        return self.begins < other.ends and other.begins < self.ends


def draw(scenario: Scenario, seed: int) -> Scenario:
    """The scenario with `chaos.faults` drawn faults beside its own; itself without a budget.

    Fewer are drawn where there is no room for more (`at_once`, one fault of a kind on a target at a
    time). The result has no `chaos` any more, and the seed that it was drawn by.
    """
    budget = scenario.chaos
    if budget is None:
        return attrs.evolve(scenario, seed=seed)
    topology = _Topology.of(scenario)
    kinds = [kind for kind in budget.kinds or tuple(_MAKERS) if kind in _MAKERS]
    possible = [kind for kind in kinds if _MAKERS[kind].has_targets(topology)]
    randomness = SeededRandomness(seed, "chaos")
    drawn: list[tuple[_Span, list[Fault]]] = []
    for number in range(budget.faults if possible else 0):
        one = _one(randomness.child(str(number)), possible, topology, scenario, budget, drawn)
        if one is not None:
            drawn.append(one)
    faults = [*scenario.faults, *(fault for _, some in drawn for fault in some)]
    faults.sort(key=lambda fault: duration_ns(fault.at))
    return attrs.evolve(scenario, chaos=None, seed=seed, faults=tuple(faults))


def describe(budget: Chaos) -> dict[str, object]:
    """Every option of a budget by name, as it is printed and saved."""
    return attrs.asdict(budget) | {"kinds": list(budget.kinds or _MAKERS)}


def _one(
    randomness: SeededRandomness,
    kinds: Sequence[FaultKind],
    topology: _Topology,
    scenario: Scenario,
    budget: Chaos,
    others: Sequence[tuple[_Span, list[Fault]]],
) -> tuple[_Span, list[Fault]] | None:
    """A fault (or a pair that belongs together) that there is room for, None if there is none."""
    heals_ns = duration_ns(budget.heals)
    kind = choice(kinds, randomness)
    for _ in range(TRIES):
        longest_ns = min(duration_ns(budget.longest), heals_ns)
        length_ns = SHORTEST_NS + randomness.integer(max(1, longest_ns - SHORTEST_NS))
        begins_ns = randomness.integer(max(1, heals_ns - length_ns))
        about = _About(randomness, topology, scenario, budget, begins_ns, length_ns)
        faults = _MAKERS[kind].make(about)
        span = _Span(begins_ns, begins_ns + length_ns, _claims(faults))
        beside = [other for other, _ in others if other.overlaps(span)]
        is_taken = any(other.claims & span.claims for other in beside)
        if len(beside) < budget.at_once and not is_taken:
            return span, faults
    return None


def _claims(faults: Sequence[Fault]) -> frozenset[tuple[str, str]]:
    """What no second fault may touch meanwhile: else the end of one would end the other."""
    claims: set[tuple[str, str]] = set()
    for fault in faults:
        group = _GROUPS.get(fault.kind, fault.kind)
        names = (*fault.targets, *fault.subject) or ("",)
        claims.update((group, name) for name in names)
    return frozenset(claims)


_GROUPS: Final = {
    "crash": "life", "pause": "life", "restart": "life", "drain": "life", "upgrade": "life",
    "roam": "place", "rebind": "nat",
}  # fmt: skip
"""Kinds that would disturb each other on one target."""


@attrs.frozen
class _About:
    """What a maker draws from, and for when."""

    randomness: Randomness
    topology: _Topology
    scenario: Scenario
    budget: Chaos
    begins_ns: int
    length_ns: int

    def fault(self, kind: FaultKind, *targets: str, lasts: bool = True, **fields: Any) -> Fault:
        duration = _text(self.length_ns) if lasts else ""
        return Fault(
            kind=kind, at=_text(self.begins_ns), targets=targets, duration=duration, **fields
        )

    def one_of(self, names: Sequence[str]) -> str:
        return choice(names, self.randomness)

    def some_of(self, names: Sequence[str]) -> tuple[str, ...]:
        """At least one, in the order of the file."""
        picked = [name for name in names if self.randomness.integer(2)]
        return tuple(picked) or (self.one_of(names),)


def _text(ns: int) -> str:
    return f"{ns // NS_PER_MS}ms"


# --- the kinds ------------------------------------------------------------------------------------


@attrs.frozen
class _Maker:
    has_targets: Callable[[_Topology], object]
    make: Callable[[_About], list[Fault]]


def _crash(about: _About) -> list[Fault]:
    return [about.fault("crash", about.one_of(about.topology.hosts))]


def _pause(about: _About) -> list[Fault]:
    return [about.fault("pause", about.one_of(about.topology.hosts))]


def _restart(about: _About) -> list[Fault]:
    return [about.fault("restart", about.one_of(about.topology.hosts), lasts=False)]


def _partition(about: _About) -> list[Fault]:
    places = (*about.topology.hosts, *about.topology.edges)
    one = about.one_of(places)
    others = [name for name in places if name != one]
    return [about.fault("partition", one, others=about.some_of(others))]


def _link(about: _About) -> list[Fault]:
    """A bad link: slow, lossy, out of order, corrupting, or all of these."""
    randomness, budget = about.randomness, about.budget
    loss = f"{randomness.integer(share_ppm(budget.worst_loss) + 1)}ppm"
    worst_ns = duration_ns(budget.worst_latency)
    quality = LinkQuality(
        latency=_text(randomness.integer(worst_ns + 1)),
        jitter=_text(randomness.integer(worst_ns // 4 + 1)),
        loss=loss,
        burst=float(1 + randomness.integer(8)),
        duplication=f"{randomness.integer(50_000)}ppm",
        reordering=f"{randomness.integer(100_000)}ppm",
        corruption=f"{randomness.integer(20_000)}ppm",
    )
    return [about.fault("link", about.one_of(about.topology.edges), quality=quality)]


def _block_udp(about: _About) -> list[Fault]:
    return [about.fault("block_udp", about.one_of(about.topology.edges))]


def _rebind(about: _About) -> list[Fault]:
    renumber = bool(about.randomness.integer(2))
    return [
        about.fault("rebind", about.one_of(about.topology.nats), lasts=False, renumber=renumber)
    ]


def _roam(about: _About) -> list[Fault]:
    """There and back again."""
    client = about.one_of(about.topology.clients)
    homes = {each.name: each.network for each in about.scenario.clients}
    away = [name for name in about.topology.edges if name != homes[client]] or [INTERNET]
    out = about.fault("roam", client, lasts=False, to=about.one_of(away))
    back_ns = about.begins_ns + about.length_ns
    back = Fault(kind="roam", at=_text(back_ns), targets=(client,), to=homes[client])
    return [out, back]


def _clock_skew(about: _About) -> list[Fault]:
    most_ns = 3_600 * 10**9
    offset_ns = about.randomness.integer(2 * most_ns) - most_ns
    host = about.one_of(about.topology.hosts)
    return [about.fault("clock_skew", host, offset=_text(offset_ns))]


def _drain(about: _About) -> list[Fault]:
    return [about.fault("drain", about.one_of((*about.topology.portals, *about.topology.relays)))]


def _database(about: _About) -> list[Fault]:
    slow = _text(50 * NS_PER_MS + about.randomness.integer(2_000 * NS_PER_MS))
    return [about.fault("database", slow=slow if about.randomness.integer(2) else "")]


def _upgrade(about: _About) -> list[Fault]:
    kinds = [names for names in (about.topology.portals, about.topology.relays) if names]
    targets = choice(kinds, about.randomness)
    every = _text(about.length_ns // len(targets))
    return [about.fault("upgrade", *targets, lasts=False, every=every)]


def _reconnect(about: _About) -> list[Fault]:
    return [about.fault("reconnect", *about.some_of(about.topology.agents), lasts=False)]


def _change(about: _About) -> list[Fault]:
    """Access is taken away, and given again."""
    policy = about.one_of(about.topology.policies)
    off = about.fault("change", lasts=False, change="disable_policy", subject=(policy,))
    on_ns = about.begins_ns + about.length_ns
    on = Fault(kind="change", at=_text(on_ns), change="enable_policy", subject=(policy,))
    return [off, on]


_MAKERS: Final[dict[FaultKind, _Maker]] = {
    "crash": _Maker(lambda it: it.hosts, _crash),
    "pause": _Maker(lambda it: it.hosts, _pause),
    "restart": _Maker(lambda it: it.hosts, _restart),
    "partition": _Maker(lambda it: len(it.hosts) + len(it.edges) > 1, _partition),
    "link": _Maker(lambda it: it.edges, _link),
    "block_udp": _Maker(lambda it: it.edges, _block_udp),
    "rebind": _Maker(lambda it: it.nats, _rebind),
    "roam": _Maker(lambda it: it.clients, _roam),
    "clock_skew": _Maker(lambda it: it.hosts, _clock_skew),
    "drain": _Maker(lambda it: (*it.portals, *it.relays), _drain),
    "database": _Maker(lambda it: it.portals, _database),
    "upgrade": _Maker(lambda it: it.portals, _upgrade),
    "reconnect": _Maker(lambda it: it.agents, _reconnect),
    "change": _Maker(lambda it: it.policies, _change),
}
