"""A failing scenario made small: what can be left out or made simpler while it fails the same way.

`shrink` tries reductions from large to small (half of the faults, then single ones, hosts, traffic,
checks, networks, then simpler ways and shorter times), keeps those after which the same `Failure`
still shows, and begins again until none helps or the budget of runs is spent. Random streams belong
to components by name, so what is left behaves as before wherever it may.

A pure search over scenarios: `fails` is what runs one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_network
from typing import Any, Final, TypeVar

import attrs

from simulations.checks.liveness import RULE
from simulations.result import Checked, Result, Violation
from simulations.scenario.schema import INTERNET, LinkQuality, NatBehaviour, Scenario
from simulations.scenario.units import duration_ns

MAX_RUNS: Final = 500
LEAST_NS: Final = 10**9
EARLIEST_NS: Final = 10 * 10**9
"""The first fault stays at least so long after the start."""

_PRIVATE: Final = tuple(
    map(ip_network, ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16"))
)

T = TypeVar("T")
Named = TypeVar("Named", bound=Any)


@attrs.frozen
class Failure:
    """How a run failed: the names of broken rules, the kinds of checks that did not hold and how,
    the kind of error. Two runs fail the same way where they have one of these in common."""

    signs: frozenset[str]

    @classmethod
    def of(cls, result: Result) -> Failure | None:
        """None for a run in which everything held."""
        signs = {_sign(each) for each in result.violations}
        signs |= {sign for each in result.checks if not each.held for sign in _signs(each)}
        if result.error:
            signs.add(f"error {result.error.split(':')[0]}")
        return cls(frozenset(signs)) if signs else None

    def is_like(self, other: Failure | None) -> bool:
        return other is not None and bool(self.signs & other.signs)

    def __str__(self) -> str:
        return ", ".join(sorted(self.signs))


def _sign(violation: Violation) -> str:
    """The rule that was broken; of liveness also how: no path is another failure than no direct
    one."""
    how = re.search(r": (\w+, not \w+) ", violation.detail) if violation.rule == RULE else None
    return f"rule {violation.rule}" + (f" ({how[1]})" if how else "")


def _signs(check: Checked) -> set[str]:
    """The kind of a check and how it did not hold, without names and figures: never an answer is
    another failure than a late one."""
    hows = set()
    for problem in check.detail.split("; "):
        how = re.sub(r"^\S+ to \S+ ", "", problem)
        hows.add(re.sub(r"[\d.]+", "N", how))
    return {f"check {check.kind}" + (f" ({how})" if how else "") for how in hows}


@attrs.frozen(kw_only=True)
class Shrunk:
    """The smallest that was found, how it fails, and what it took."""

    scenario: Scenario
    failure: Failure
    runs: int
    is_minimal: bool
    """No single reduction more keeps it failing (rather: the budget was spent)."""


def shrink(
    scenario: Scenario,
    failure: Failure,
    run: Callable[[Scenario], Result],
    *,
    is_valid: Callable[[Scenario], bool],
    max_runs: int = MAX_RUNS,
    progress: Callable[[int, Scenario], None] | None = None,
) -> Shrunk:
    """The smallest scenario found that fails like `failure`. `run` should stop at the first sign of
    failure, if it can; `is_valid` refuses scenarios that make no sense (`scenario.load`)."""
    runs = 0
    best, best_failure = scenario, failure
    improved = True
    while improved:
        improved = False
        for reduce in _REDUCTIONS:
            candidates = reduce(best)
            while (candidate := next(candidates, None)) is not None:
                if runs >= max_runs:
                    return Shrunk(scenario=best, failure=best_failure, runs=runs, is_minimal=False)
                if candidate == best or not is_valid(candidate):
                    continue
                runs += 1
                seen = Failure.of(run(candidate))
                if seen is not None and failure.is_like(seen):
                    best, best_failure, improved = candidate, seen, True
                    candidates = reduce(best)  # go on from the smaller one
                    if progress is not None:
                        progress(runs, best)
    return Shrunk(scenario=best, failure=best_failure, runs=runs, is_minimal=True)


def size(scenario: Scenario) -> int:
    """How much there is in a scenario: its tables' rows, and fields that are not the default."""
    return _weight(scenario)


def _weight(value: object) -> int:
    if isinstance(value, tuple | list):
        return sum(1 + _weight(each) for each in value)
    if not attrs.has(kind := type(value)):
        return 1
    set_ones = [
        field for field in attrs.fields(kind) if getattr(value, field.name) != field.default
    ]
    return sum(_weight(getattr(value, field.name)) for field in set_ones)


# --- leaving out ----------------------------------------------------------------------------------


def _fewer_faults(scenario: Scenario) -> Iterator[Scenario]:
    for rest in _subsets(scenario.faults):
        yield _evolved(scenario, faults=rest)


def _fewer_hosts(scenario: Scenario) -> Iterator[Scenario]:
    """Without clients, gateways, relays, portals, services, and all that names them."""
    for kind in ("clients", "services", "gateways", "relays", "portals"):
        for rest in _subsets(getattr(scenario, kind)):
            yield tidy(_evolved(scenario, **{kind: rest}))


def _fewer_traffic_and_checks(scenario: Scenario) -> Iterator[Scenario]:
    for kind in ("checks", "traffic", "links", "populations"):
        for rest in _subsets(getattr(scenario, kind)):
            yield _evolved(scenario, **{kind: rest})


def _fewer_networks(scenario: Scenario) -> Iterator[Scenario]:
    """Without one network; who was on it or behind it is where it was attached."""
    for network in scenario.networks:
        if network.name != INTERNET:
            yield tidy(_without_network(scenario, network.name, network.behind))


def _less_account(scenario: Scenario) -> Iterator[Scenario]:
    account = scenario.account
    for kind in ("policies", "resources", "users"):
        for rest in _subsets(getattr(account, kind)):
            yield tidy(_evolved(scenario, account=_evolved(account, **{kind: rest})))


# --- making simpler -------------------------------------------------------------------------------


def _fewer_targets(scenario: Scenario) -> Iterator[Scenario]:
    for number, fault in enumerate(scenario.faults):
        for field in ("targets", "others"):
            names = getattr(fault, field)
            for rest in _subsets(names):
                if rest:
                    yield _with_fault(scenario, number, **{field: rest})


def _simpler_ways(scenario: Scenario) -> Iterator[Scenario]:
    for number, network in enumerate(scenario.networks):
        simpler: list[dict[str, Any]] = []
        if network.nat is not None:
            simpler += [] if _is_private(network.prefix) else [{"nat": None}]
            simpler += [{"nat": NatBehaviour()}]
        simpler += [{"uplink": LinkQuality(latency="10ms")}, {"lan": LinkQuality()}]
        for fields in simpler:
            changed = _evolved(network, **fields)
            if changed != network:
                networks = _with(scenario.networks, number, changed)
                yield _evolved(scenario, networks=networks)
    for number, fault in enumerate(scenario.faults):
        if fault.quality is not None:
            for field in attrs.fields(LinkQuality):
                quality = _evolved(fault.quality, **{field.name: field.default})
                if quality != fault.quality:
                    yield _with_fault(scenario, number, quality=quality)


def _is_private(prefix: str) -> bool:
    """Whether nobody beyond a NAT sends to its addresses: without one it would be another story."""
    return prefix != "" and any(ip_network(prefix, strict=False).overlaps(p) for p in _PRIVATE)


def _shorter_times(scenario: Scenario) -> Iterator[Scenario]:
    """Half of each fault's duration; the end as long after the last fault as it was at first, so
    that what had time to recover still has."""
    for number, fault in enumerate(scenario.faults):
        if fault.duration and duration_ns(fault.duration) > LEAST_NS:
            yield _with_fault(scenario, number, duration=_half(fault.duration))
    first = scenario.faults[0] if scenario.faults else None
    early_ns = 0 if first is None else duration_ns(first.at) - EARLIEST_NS
    if first is not None and early_ns > 0:
        yield _earlier(scenario, early_ns)


def _earlier(scenario: Scenario, by_ns: int) -> Scenario:
    """All faults, checks and the end so much sooner."""
    faults = tuple(_evolved(each, at=_sooner(each.at, by_ns)) for each in scenario.faults)
    checks = tuple(
        _evolved(
            each,
            at=_sooner(each.at, by_ns),
            until=_sooner(each.until, by_ns) if each.until else "",
        )
        for each in scenario.checks
    )
    duration = _sooner(scenario.duration, by_ns)
    return _evolved(scenario, faults=faults, checks=checks, duration=duration)


def _sooner(text: str, by_ns: int) -> str:
    return f"{max(0, duration_ns(text) - by_ns) // 10**6}ms"


def _rounder_times(scenario: Scenario) -> Iterator[Scenario]:
    for number, fault in enumerate(scenario.faults):
        for field in ("at", "duration"):
            text = getattr(fault, field)
            rounded = f"{duration_ns(text) // 10**9}s" if text else ""
            if text and rounded not in (text, "0s"):
                yield _with_fault(scenario, number, **{field: rounded})


_REDUCTIONS: Final = (
    _fewer_faults,
    _fewer_hosts,
    _fewer_traffic_and_checks,
    _less_account,
    _fewer_networks,
    _fewer_targets,
    _simpler_ways,
    _shorter_times,
    _rounder_times,
)


# --- keeping the rest in order --------------------------------------------------------------------


def tidy(scenario: Scenario) -> Scenario:
    """Without what names something that is gone: targets of faults, sources of traffic and checks,
    policies of resources, users without clients stay."""
    networks = {INTERNET, *(each.name for each in scenario.networks)}
    clients = {each.name for each in scenario.clients}
    hosts = {each.name for each in scenario.hosts}
    account = scenario.account
    services = {each.name for each in scenario.services}
    resources = tuple(
        each for each in account.resources if not each.service or each.service in services
    )
    names = {each.name for each in resources}
    policies = tuple(each for each in account.policies if each.resource in names)
    users = {each.name for each in account.users}
    places = hosts | networks
    subjects = {*names, *users, *clients, *(each.name for each in policies)} | {
        group for user in account.users for group in user.groups
    }
    scenario = _evolved(
        scenario,
        account=_evolved(account, resources=resources, policies=policies),
        clients=tuple(each for each in scenario.clients if each.user in users),
    )
    return _evolved(
        scenario,
        faults=tuple(_kept(scenario.faults, {"targets": places, "others": places,
                                             "subject": subjects})),
        traffic=tuple(_kept(scenario.traffic, {"source": clients, "to": names})),
        checks=tuple(_kept(scenario.checks, {"source": clients, "to": names, "targets": places})),
    )  # fmt: skip


def _kept(rows: Sequence[T], known: dict[str, set[str]]) -> Iterator[T]:
    """Rows with only known names; without those that lose all of a list that they had."""
    for row in rows:
        fields = {
            field: tuple(name for name in getattr(row, field) if name in names)
            for field, names in known.items()
        }
        if all(fields[field] or not getattr(row, field) for field in known):
            yield _evolved(row, **fields)


def _without_network(scenario: Scenario, name: str, behind: str) -> Scenario:
    def moved(rows: Sequence[Named], field: str) -> tuple[Named, ...]:
        return tuple(
            _evolved(row, **{field: behind}) if getattr(row, field) == name else row for row in rows
        )

    rest = tuple(each for each in scenario.networks if each.name != name)
    hosts = {
        kind: moved(getattr(scenario, kind), "network")
        for kind in ("portals", "relays", "gateways", "clients", "services")
    }
    faults = tuple(each for each in scenario.faults if each.to != name)
    links = tuple(each for each in scenario.links if name not in each.between)
    return _evolved(scenario, networks=moved(rest, "behind"), faults=faults, links=links, **hosts)


def _evolved(row: T, **fields: Any) -> T:
    changed: T = attrs.evolve(row, **fields)  # type: ignore[misc]  # rows are attrs classes
    return changed


def _with_fault(scenario: Scenario, number: int, **fields: Any) -> Scenario:
    fault = _evolved(scenario.faults[number], **fields)
    return _evolved(scenario, faults=_with(scenario.faults, number, fault))


def _with(rows: tuple[T, ...], number: int, row: T) -> tuple[T, ...]:
    return (*rows[:number], row, *rows[number + 1 :])


def _subsets(rows: tuple[T, ...]) -> Iterator[tuple[T, ...]]:
    """Without halves, quarters, ... single ones (Zeller's delta debugging, by complements)."""
    length = len(rows)
    while length:
        for begin in range(0, len(rows), length):
            yield rows[:begin] + rows[begin + length :]
        length //= 2


def _half(text: str) -> str:
    return f"{max(1, duration_ns(text) // 2_000_000)}ms"
