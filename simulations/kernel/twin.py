"""The kernel twin of a scenario: the same file on namespaces, with the real processes.

The portal nodes with a PostgreSQL, relays, gateways and clients are started as an operator would
start them, the account is made through the API, and from then on, in real time, the file's traffic,
faults and checks go their way as they do in virtual time. What came of it is the same `Result`,
with the oracle's word beside each pair.

`obstacles` says what of a scenario stands in the way, and `liberties` what is built otherwise;
nothing is left out in silence. Bounds of checks are for an idle world of which every packet is
known: here they are multiplied by SLACK_FACTOR, and SLACK_NS more.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final

import attrs

from runtime.randomness import SeededRandomness
from simulations.asked import CHECK_BYTES, CHECK_EVERY_NS, Names, asked_by, probed_by
from simulations.build import nat_label
from simulations.checks.expectations import Expectations, Zero
from simulations.kernel.asking import Asked
from simulations.kernel.faults import KernelFaults
from simulations.kernel.follow import Follow
from simulations.kernel.lab import Lab, LabError, missing_requirements
from simulations.kernel.links import Impairment, impaired
from simulations.kernel.obstacles import liberties, obstacles
from simulations.kernel.parts import ECHO_PORT, RELAY_PORT, Parts
from simulations.kernel.schedule import Schedule
from simulations.kernel.taps import Seen, Taps
from simulations.kernel.topology import Topology
from simulations.kernel.watch import MARK_BYTES, Authorized, Watch
from simulations.oracle import judge
from simulations.recoveries import injected
from simulations.result import Checked, Node, Pair, Result
from simulations.scenario.population import expand
from simulations.scenario.schema import INTERNET, Check, Gateway, Scenario, Traffic
from simulations.scenario.units import duration_ns
from simulations.traffic import UNANSWERED
from simulations.traffic import Pair as Record

__all__ = ["liberties", "obstacles", "run"]

REQUIRED_PROGRAMS: Final = {"iptables-nft": "iptables", "tc": "iproute2"}
LEAST_SETTLE_NS: Final = 60 * 10**9
SETTLE_OF_EACH_NS: Final = 3 * 10**9
"""Processes take their time to start, however short the file's `settle` is."""
LOOK_NS: Final = 200 * 10**6
WATCH_NS: Final = 500 * 10**6
"""So often each client is asked by which ways it goes."""
STEPS: Final = 50
SLACK_FACTOR: Final = 2
SLACK_NS: Final = 3 * 10**9
EXPIRY_NS: Final = 10**6
"""So long after its expiry a policy is over by every rounding."""

Progress = Callable[[int, int], object]


def run(
    scenario: Scenario,
    seed: int,
    *,
    follow: tuple[str, str] | None = None,
    progress: Progress | None = None,
    monitors: Sequence[object] = (),
) -> Result:
    """Build it, start everything, let it run for its duration, and take it down again.

    `follow` names the client and resource whose packets are to be told one by one. `monitors` are
    for virtual time: here `watch` has the rules that can be seen from outside. Raises LabError for
    a scenario with `obstacles`, or a machine that lacks something, and InstallationError if a part
    does not start.
    """
    scenario = expand(scenario, seed)
    if found := obstacles(scenario) or missing_requirements(REQUIRED_PROGRAMS):
        raise LabError("; ".join(found))
    began = time.monotonic()
    with Lab() as lab, contextlib.ExitStack() as stack:
        twin = _Twin(lab, scenario, seed, stack, follow)
        twin.start()
        twin.carry_out(progress)
        result = twin.result()
    return attrs.evolve(result, seed=seed, cost={"wall_s": time.monotonic() - began})


class _Twin:
    def __init__(
        self,
        lab: Lab,
        scenario: Scenario,
        seed: int,
        stack: contextlib.ExitStack,
        follow: tuple[str, str] | None,
    ) -> None:
        self._scenario = scenario
        self._seed = seed
        self._stack = stack
        self._schedule = Schedule()
        self._topology = Topology(lab, scenario)
        self._parts = Parts(lab, scenario, self._topology, seed)
        stack.callback(self._parts.end)
        mark = SeededRandomness(seed, "mark").bytes(MARK_BYTES)
        self._asked = Asked(self._may, mark)
        stack.callback(self._asked.finish, kill=True)
        self._watch = Watch(scenario, self._topology, mark)
        self._follow = None if follow is None else Follow(scenario, self._topology, *follow)
        hosts = {name: self._topology.place(name).host for name in self._topology.names}
        self._taps = stack.enter_context(Taps(hosts, self._see))
        self._authorized: list[Authorized] | None = None
        self._expectations = Expectations(map(with_slack, scenario.checks), self._asked)
        self._impairments: dict[str, Impairment] = {}
        self._faults = KernelFaults(
            self._parts,
            self._topology,
            self._schedule,
            self._impairments,
            self._policy_changed,
            self._struck,
            seed,
        )
        self._zero = self._end = 0

    # --- running ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Everything that starts at once is online, or `settle` is over."""
        self._parts.start()
        changing = {
            self._topology.router(name).name
            for fault in self._scenario.faults
            if fault.kind == "link"
            for name in fault.targets
        }
        for router, links in self._topology.links.values():
            context = impaired(router, links, changing=changing, seed=self._seed)
            self._impairments[router.name] = self._stack.enter_context(context)
        least = LEAST_SETTLE_NS + SETTLE_OF_EACH_NS * len(self._parts.parts)
        limit = self._schedule.now + max(duration_ns(self._scenario.settle), least)
        while not self._parts.all_online() and self._schedule.now < limit:
            self._schedule.run_until(self._schedule.now + LOOK_NS)

    def carry_out(self, progress: Progress | None) -> None:
        """From instant zero to the end."""
        schedule, scenario = self._schedule, self._scenario
        duration = duration_ns(scenario.duration)
        self._zero = schedule.now
        self._end = self._zero + duration
        self._expectations.watch(schedule.after, self._parts.is_online, lambda: schedule.now)
        self._faults.schedule(scenario.faults)
        for traffic in scenario.traffic:
            schedule.after(duration_ns(traffic.at), self._begin_traffic, traffic)
        schedule.after(0, self._begin_probes)
        for instant in self._parts.account.expiries():
            schedule.after(max(0, instant - schedule.now) + EXPIRY_NS, self._policy_changed)
        schedule.after(WATCH_NS, self._watch_ways)
        for step in range(STEPS):
            schedule.run_until(self._zero + duration * (step + 1) // STEPS)
            if progress is not None:
                progress(min(duration, schedule.now - self._zero), duration)
        self._look_at_ways()
        self._asked.finish()
        self._asked.note_paths()
        self._note_denials()
        self._authorized = self._parts.account.authorizations()
        self._taps.close()

    def _begin_traffic(self, traffic: Traffic) -> None:
        until = self._zero + duration_ns(traffic.until) if traffic.until else self._end
        names = asked_by(traffic, self._scenario, self._visible)
        self._ask(names, duration_ns(traffic.every), min(self._end, until), traffic.size)

    def _begin_probes(self) -> None:
        names = probed_by(self._scenario, self._visible)
        self._ask(names, CHECK_EVERY_NS, self._end, CHECK_BYTES)

    def _ask(self, names: Sequence[Names], every: int, until: int, size: int) -> None:
        now = self._schedule.now
        targets = {
            each.name: (self._topology.address_of(each.service), ECHO_PORT)
            for each in self._scenario.account.resources
        }
        for client in dict.fromkeys(client for client, _ in names):
            pairs = [self._asked.pair(*each, now) for each in names if each[0] == client]
            host = self._topology.place(client).host
            self._asked.ask(
                host, pairs, targets, first=now, every=every, until=until, size=size
            )  # fmt: skip

    def _watch_ways(self) -> None:
        self._look_at_ways()
        self._schedule.after(WATCH_NS, self._watch_ways)

    def _look_at_ways(self) -> None:
        for client in self._scenario.clients:
            status = self._parts.status(client.name)
            self._asked.saw(client.name, self._schedule.now, status)
        self._look_around()

    # --- packets ---------------------------------------------------------------------------------

    def _see(self, seen: Seen) -> None:
        self._watch.see(seen)
        if self._follow is not None:
            self._follow.see(seen)

    def _look_around(self) -> None:
        self._watch.refresh()
        if self._follow is not None:
            self._follow.refresh()

    def _struck(self, now: int, text: str) -> None:
        self._look_around()
        if self._follow is not None:
            self._follow.fault(now, text)

    # --- policy ----------------------------------------------------------------------------------

    def _may(self, client: str, resource: str) -> bool:
        return self._parts.account.may(client, resource, self._topology.outside(client))

    def _visible(self, client: str) -> list[str]:
        return [
            resource.name
            for resource in self._scenario.account.resources
            if self._may(client, resource.name)
        ]

    def _policy_changed(self) -> None:
        self._asked.policy_changed(self._schedule.now)

    def _note_denials(self) -> None:
        """At the end: which pairs the portal refused last, as their clients know it."""
        for client in self._scenario.clients:
            status = self._parts.status(client.name)
            known = {resource["name"] for resource in status.get("resources", [])}
            refused = {denial["resource"] for denial in status.get("denials", [])}
            for pair in self._asked.select([client.name], []):
                if status.get("connected_to_portal"):
                    pair.denied = pair.resource not in known or pair.resource in refused
                else:
                    pair.denied = not pair.may()

    # --- the result ------------------------------------------------------------------------------

    def result(self) -> Result:
        """What there is to say at the end."""
        zero = Zero(begin=self._zero, end=self._end)
        pairs = self._asked.pairs
        struck = self._faults.struck
        checks = self._expectations.judge(zero)
        return Result(
            scenario=self._scenario.name,
            seed=0,
            backend="kernel",
            virtual_ns=self._end - self._zero,
            pairs=tuple(self._pair(pair, zero) for pair in pairs),
            faults=tuple(injected(each, pairs, zero, struck) for each in struck),
            checks=tuple(map(_told, checks, self._scenario.checks)),
            violations=tuple(
                attrs.evolve(each, at_ns=each.at_ns - self._zero)
                for each in self._watch.judge(pairs, struck, self._authorized, self._asked.known)
            ),
            nodes=self._nodes(),
            timeline=() if self._follow is None else self._follow.steps(self._zero),
            counters={
                "questions": sum(len(pair.asked) for pair in pairs),
                "answers": sum(_answers(pair) for pair in pairs),
                "strays": self._asked.strays,
                "hosts": len(self._parts.parts),
                "networks": len(self._scenario.networks),
                "packets_seen": self._taps.seen,
                "packets_unseen": self._taps.unseen,
                "questions_through_gateways": self._watch.arrived,
                "questions_unjudged": self._watch.unjudged,
                "questions_in_the_open": self._watch.beside,
            },
        )

    def _pair(self, pair: Record, zero: Zero) -> Pair:
        gateway = self._gateway(pair)
        found = Pair(
            client=pair.client,
            resource=pair.resource,
            gateway=pair.gateway,
            client_nat=self._nats(pair.client),
            gateway_nat="" if gateway is None else self._nats(gateway.name),
            outcome=pair.outcome(zero.end),
            first_answer_ns=pair.first_answer_ns(),
            round_trip_ns=pair.round_trip_ns(),
            asked=len(pair.asked),
            answered=_answers(pair),
            longest_gap_ns=pair.longest_gap_ns(zero.begin, zero.end),
        )
        client = self._parts.parts[pair.client]
        if not pair.may() or client.hostile or not client.is_up or self._faults.is_parted:
            return found
        if gateway is None or not self._parts.parts[gateway.name].is_up:
            return attrs.evolve(found, expected="none", why="no gateway of the resource is up")
        if gateway.hostile:
            return found
        here, there = (self._topology.network_of(name) for name in (pair.client, gateway.name))
        has_relay = any(
            self._parts.parts[each.name].is_up for each in self._scenario.relays if not each.hostile
        )
        verdict = judge(
            self._topology.side(here, relay_port=RELAY_PORT),
            self._topology.side(there, relay_port=RELAY_PORT),
            shared_nats=self._topology.shared_nats(here, there),
            same_lan=here == there != INTERNET,
            relay_transports=("udp", "stream") if has_relay else (),
        )
        return attrs.evolve(found, expected=verdict.path, why=verdict.why)

    def _gateway(self, pair: Record) -> Gateway | None:
        """The one that carried the pair, if it is up; else one that could."""
        sites = {each.name: each.sites for each in self._scenario.account.resources}[pair.resource]
        able = [each for each in self._scenario.gateways if each.site in sites]
        up = [each for each in able if self._parts.parts[each.name].is_up]
        for each in up:
            if each.name == pair.gateway:
                return each
        return next(iter([each for each in up if not each.hostile] or up or able), None)

    def _nats(self, host: str) -> str:
        return self._topology.describe(self._topology.network_of(host))

    def _nodes(self) -> tuple[Node, ...]:
        networks = [
            Node(
                name=each.name,
                kind="network",
                behind=each.behind,
                label=each.prefix if each.nat is None else nat_label(each.nat),
            )
            for each in self._scenario.networks
        ]
        hosts = [
            Node(
                name=name,
                kind=part.kind,
                behind=self._topology.network_of(name),
                label=self._topology.address_of(name),
            )
            for name, part in self._parts.parts.items()
        ]
        return (Node(name=INTERNET, kind="network"), *networks, *hosts)


def with_slack(check: Check) -> Check:
    """A check as the kernel is held to it."""
    if not check.within:
        return check
    return attrs.evolve(
        check, within=f"{(duration_ns(check.within) * SLACK_FACTOR + SLACK_NS) // 10**6}ms"
    )


def _told(checked: Checked, check: Check) -> Checked:
    if not check.within:
        return checked
    return attrs.evolve(checked, text=f"{checked.text} (with slack; {check.within} by the file)")


def _answers(pair: Record) -> int:
    return sum(at != UNANSWERED for at in pair.answered)
