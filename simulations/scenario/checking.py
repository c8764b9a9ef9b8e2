"""What a scenario means as a whole: names that refer to something, prefixes that do not collide,
faults and checks that have what their kind needs. Notes everything that is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import attrs
import msgspec

from simulations.scenario.addressing import check_addresses
from simulations.scenario.kinds import (
    CHECKS,
    FAULTS,
    POPULATION_TARGETS,
    SUBJECTS,
    Kind,
    default_of,
)
from simulations.scenario.population import mix_names
from simulations.scenario.schema import (
    INTERNET,
    MAX_HOSTS,
    MAX_NETWORKS,
    Chaos,
    Check,
    Fault,
    Policy,
    Resource,
    Scenario,
    Traffic,
)
from simulations.scenario.structure import Problems, shown, suggestion
from simulations.scenario.units import duration_ns, share_ppm

EVERYONE: Final = "everyone"
MAX_DEPTH: Final = 16
"""Networks behind one another."""


def check(scenario: Scenario, problems: Problems) -> None:
    """Note what is wrong with a scenario whose every field is well formed."""
    Checking(scenario, problems).run()


class Checking:
    """The names of one scenario, and what refers to them."""

    def __init__(self, scenario: Scenario, problems: Problems) -> None:
        self.scenario = scenario
        self.problems = problems
        account = scenario.account
        self.kinds: dict[str, set[str]] = {
            "network": {INTERNET, *(each.name for each in scenario.networks)},
            "portal": {each.name for each in scenario.portals},
            "relay": {each.name for each in scenario.relays},
            "gateway": {each.name for each in scenario.gateways},
            "client": {each.name for each in scenario.clients},
            "service": {each.name for each in scenario.services},
            "population": {each.name for each in scenario.populations},
            "user": {each.name for each in account.users},
            "site": set(account.sites),
            "resource": {each.name for each in account.resources},
            "policy": {each.name for each in account.policies},
            "group": self._groups(),
        }
        self.duration_ns = duration_ns(scenario.duration)

    def run(self) -> None:
        self._unique()
        self._places()
        self._account()
        check_addresses(self.scenario, self.problems)
        for place, traffic in self.problems.numbered(self.scenario.traffic, "traffic"):
            self._traffic(place, traffic)
        for place, fault in self.problems.numbered(self.scenario.faults, "faults"):
            self._fault(place, fault)
        for place, each in self.problems.numbered(self.scenario.checks, "checks"):
            self._check(place, each)
        if self.scenario.chaos is not None:
            self._chaos(self.scenario.chaos)

    # --- names ------------------------------------------------------------------------------------

    def _groups(self) -> set[str]:
        found = {EVERYONE}
        for user in self.scenario.account.users:
            found.update(user.groups)
        for population in self.scenario.populations:
            found.update(population.groups)
        for fault in self.scenario.faults:
            if fault.change in ("add_membership", "remove_membership"):
                found.update(fault.subject[1:2])
        return found

    def _unique(self) -> None:
        it, account = self.scenario, self.scenario.account
        self._each_once(
            "networks", it.networks, taken={INTERNET: "the core, which is always there"}
        )
        hosts: dict[str, str] = {}
        for part in ("portals", "relays", "gateways", "clients", "services", "populations"):
            self._each_once(part, getattr(it, part), taken=hosts)
        self._each_once("account.users", account.users)
        self._each_once("account.resources", account.resources)
        self._each_once("account.policies", account.policies)
        sites: set[str] = set()
        for place, site in self.problems.numbered(account.sites, "account.sites"):
            if site in sites:
                self.problems.note(place, f"{shown(site)} is named twice")
            sites.add(site)
        count = len(it.clients) + sum(each.count for each in it.populations)
        if count > MAX_HOSTS:
            self.problems.note(
                "populations", f"make {count} clients; at most {MAX_HOSTS} are taken"
            )
        networks = len(it.networks) + sum(
            each.count * (2 if share_ppm(each.roaming) else 1) for each in it.populations
        )
        if networks > MAX_NETWORKS:
            text = f"make {networks} networks; at most {MAX_NETWORKS} are taken"
            self.problems.note("populations", text)

    def _each_once(
        self, part: str, entries: Iterable[Any], taken: dict[str, str] | None = None
    ) -> None:
        taken = {} if taken is None else taken
        for place, entry in self.problems.numbered(tuple(entries), part):
            if entry.name in taken:
                self.problems.note(
                    f"{place}.name", f"{shown(entry.name)} is taken: {taken[entry.name]}"
                )
            else:
                taken[entry.name] = f"by {place}"

    def _known(self, place: str, name: str, *kinds: str) -> bool:
        """Whether `name` is one of these kinds; noted if not."""
        if any(name in self.kinds[kind] for kind in kinds) or name in self.problems.unread:
            return True
        wanted = " or ".join(dict.fromkeys(kinds))
        is_a = next((kind for kind, names in self.kinds.items() if name in names), "")
        known = [each for kind in kinds for each in sorted(self.kinds[kind])]
        why = f" (it is a {is_a})" if is_a else suggestion(name, known)
        self.problems.note(place, f"there is no {wanted} named {shown(name)}{why}")
        return False

    def _all_known(self, place: str, names: Iterable[str], *kinds: str) -> None:
        for at, name in self.problems.numbered(tuple(names), place):
            self._known(at, name, *kinds)

    # --- where things stand -----------------------------------------------------------------------

    def _places(self) -> None:
        it, problems = self.scenario, self.problems
        behind = {each.name: each.behind for each in it.networks}
        for place, network in problems.numbered(it.networks, "networks"):
            self._known(f"{place}.behind", network.behind, "network")
            self._depth(f"{place}.behind", network.name, behind)
        for place, link in problems.numbered(it.links, "links"):
            self._all_known(f"{place}.between", link.between, "network")
            if link.between[0] == link.between[1]:
                problems.note(f"{place}.between", "names one network twice")
        for part in ("portals", "relays", "gateways", "clients", "services"):
            for place, host in problems.numbered(getattr(it, part), part):
                self._known(f"{place}.network", host.network, "network")
        for place, gateway in problems.numbered(it.gateways, "gateways"):
            self._known(f"{place}.site", gateway.site, "site")
        for place, client in problems.numbered(it.clients, "clients"):
            self._known(f"{place}.user", client.user, "user")
        for place, population in problems.numbered(it.populations, "populations"):
            if population.mix not in mix_names():
                known = ", ".join(mix_names())
                problems.note(f"{place}.mix", f"{shown(population.mix)} is none of: {known}")
        if (it.clients or it.gateways or it.populations) and not it.portals:
            problems.note("portals", "there is none, so no agent could ever join; add one")

    def _depth(self, place: str, name: str, behind: dict[str, str]) -> None:
        seen = [name]
        while (name := behind.get(name, INTERNET)) != INTERNET:
            if name in seen:
                circle = " -> ".join([*seen, name])
                self.problems.note(place, f"goes round in a circle: {shown_path(circle)}")
                return
            seen.append(name)
            if len(seen) > MAX_DEPTH:
                self.problems.note(place, f"is more than {MAX_DEPTH} networks deep")
                return

    # --- who may reach what -----------------------------------------------------------------------

    def _account(self) -> None:
        account = self.scenario.account
        for place, user in self.problems.numbered(account.users, "account.users"):
            for at, group in self.problems.numbered(user.groups, f"{place}.groups"):
                if group == EVERYONE:
                    self.problems.note(at, "everyone is in it; leave it out")
        for place, resource in self.problems.numbered(account.resources, "account.resources"):
            self._resource(place, resource)
        for place, policy in self.problems.numbered(account.policies, "account.policies"):
            self._policy(place, policy)

    def _resource(self, place: str, resource: Resource) -> None:
        self._all_known(f"{place}.sites", resource.sites, "site")
        if not resource.sites:
            self.problems.note(f"{place}.sites", "is empty, so no gateway would serve it")
        if bool(resource.service) == bool(resource.address):
            self.problems.note(place, "wants either `service` or `address`")
        if resource.service:
            self._known(f"{place}.service", resource.service, "service")
        if resource.filters:
            from channel.messages import Filter

            for i, each in enumerate(resource.filters):
                self._convert(f"{place}.filters[{i}]", each, Filter)

    def _policy(self, place: str, policy: Policy) -> None:
        self._known(f"{place}.group", policy.group, "group")
        self._known(f"{place}.resource", policy.resource, "resource")
        if policy.conditions:
            self._conditions(f"{place}.conditions", policy.conditions)
        if policy.lease and not 60 * 10**9 <= duration_ns(policy.lease) <= 86_400 * 10**9:
            self.problems.note(f"{place}.lease", "is from 1min to 24h")

    def _conditions(self, place: str, conditions: dict[str, Any]) -> None:
        # Only here since it brings the portal's API, which takes a third of a second.
        from portal.api.conditions import ConditionsBody, conditions_of
        from portal.api.problems import Problem
        from portal.api.requests import Checks

        body = self._convert(place, conditions, ConditionsBody)
        if body is None:
            return
        checks = Checks()
        conditions_of(checks, body)
        try:
            checks.finish()
        except Problem as refused:
            for error in refused.errors:
                self.problems.note(place + error.field.removeprefix("conditions"), error.message)

    def _convert(self, place: str, raw: dict[str, Any], wanted: Any) -> Any:
        if attrs.has(wanted):
            fields = {field.name for field in attrs.fields(wanted)}
            for key in raw:
                if key not in fields:
                    near = suggestion(key, fields)
                    self.problems.note(f"{place}.{key[:40]}", f"there is no such key here{near}")
        try:
            return msgspec.convert(raw, wanted)
        except msgspec.ValidationError as error:
            what, _, where = str(error).partition(" - at `$")
            inside = where.removesuffix("`")
            self.problems.note(place + inside, what.replace("`", ""))
            return None

    # --- what happens -----------------------------------------------------------------------------

    def _traffic(self, place: str, traffic: Traffic) -> None:
        self._all_known(f"{place}.source", traffic.source, *_CLIENTS)
        self._all_known(f"{place}.to", traffic.to, "resource")
        self._span(place, traffic.at, traffic.until)
        if duration_ns(traffic.every) < 10**6:
            self.problems.note(f"{place}.every", "is at least 1ms")

    def _fault(self, place: str, fault: Fault) -> None:
        kind = FAULTS[fault.kind]
        self._fields(place, fault, kind)
        self._all_known(f"{place}.targets", fault.targets, *kind.targets)
        self._all_known(f"{place}.others", fault.others, *kind.targets)
        self._instant(f"{place}.at", fault.at)
        if fault.to:
            self._known(f"{place}.to", fault.to, "network")
        if fault.change:
            self._subject(place, fault)
        if fault.kind == "rebind":
            natted = {each.name for each in self.scenario.networks if each.nat is not None}
            for at, name in self.problems.numbered(fault.targets, f"{place}.targets"):
                if name in self.kinds["network"] and name not in natted:
                    self.problems.note(at, f"{shown(name)} has no NAT that could forget anything")
        if fault.kind == "clock_skew" and not fault.drift_ppm and fault.offset == "0s":
            self.problems.note(place, "wants `offset` or `drift_ppm`")
        if fault.kind == "partition":
            for name in sorted(set(fault.targets) & set(fault.others)):
                self.problems.note(f"{place}.others", f"{shown(name)} cannot part from itself")

    def _subject(self, place: str, fault: Fault) -> None:
        kinds = SUBJECTS[fault.change]
        if len(fault.subject) != len(kinds):
            names = " and a ".join(kinds)
            self.problems.note(f"{place}.subject", f"{fault.change} wants the name of a {names}")
            return
        for i, (name, kind) in enumerate(zip(fault.subject, kinds, strict=True)):
            allowed = (kind, "population") if kind in POPULATION_TARGETS else (kind,)
            self._known(f"{place}.subject[{i}]", name, *allowed)

    def _check(self, place: str, each: Check) -> None:
        kind = CHECKS[each.kind]
        self._fields(place, each, kind)
        self._all_known(f"{place}.source", each.source, *_CLIENTS)
        self._all_known(f"{place}.to", each.to, "resource")
        self._all_known(f"{place}.targets", each.targets, *kind.targets)
        self._span(place, each.at, each.until)
        if each.kind == "recovered":
            instants = {duration_ns(fault.at) for fault in self.scenario.faults}
            if duration_ns(each.at) not in instants and not self.problems.unread:
                known = ", ".join(sorted({fault.at for fault in self.scenario.faults}))
                why = f"there are faults at: {known}" if known else "there is no fault at all"
                self.problems.note(f"{place}.at", f"no fault is at {each.at}; {why}")
        if each.kind == "reach" and each.path == "none" and each.within:
            self.problems.note(f"{place}.within", "means nothing where no path is expected")

    def _fields(self, place: str, entry: Fault | Check, kind: Kind) -> None:
        for name in kind.needs:
            if getattr(entry, name) == default_of(entry, name):
                self.problems.note(f"{place}.{name}", f"is missing: {entry.kind} needs it")
        for field in attrs.fields(type(entry)):
            name = field.name
            if name in kind.fields or getattr(entry, name) == default_of(entry, name):
                continue
            takes = ", ".join(sorted(kind.fields - {"kind"}))
            self.problems.note(
                f"{place}.{name}", f"means nothing to {entry.kind}, which takes: {takes}"
            )

    def _chaos(self, chaos: Chaos) -> None:
        heals = duration_ns(chaos.heals)
        if chaos.faults and heals >= self.duration_ns:
            self.problems.note(
                "chaos.heals", f"leaves no time for faults: the run takes {self.scenario.duration}"
            )

    # --- instants ---------------------------------------------------------------------------------

    def _span(self, place: str, at: str, until: str) -> None:
        self._instant(f"{place}.at", at)
        if until:
            self._instant(f"{place}.until", until)
            if duration_ns(until) <= duration_ns(at):
                self.problems.note(f"{place}.until", f"is not after `at` ({at})")

    def _instant(self, place: str, at: str) -> None:
        if duration_ns(at) > self.duration_ns:
            self.problems.note(place, f"is after the end: the run takes {self.scenario.duration}")


_CLIENTS: Final = ("client", "population")


def shown_path(path: str) -> str:
    """A circle of networks, which may be long."""
    return path if len(path) <= 200 else path[:197] + "..."
