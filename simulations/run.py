"""One run of a scenario in virtual time: `run(scenario, seed)` gives a `Result`.

    settle     everything that starts at once comes online, or `settle` is over: instant zero
    run        traffic, faults and checks, all of them counted from zero, for `duration`
    judge      outcomes by pair, recoveries by fault, the file's checks, what monitors saw

Instants of the result count from zero as well, so what happens while settling is before it. All but
`Result.cost` follows from the scenario and the seed.
"""

from __future__ import annotations

import gc
import resource as system_resource
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import attrs

from simulations.asked import CHECK_BYTES, CHECK_EVERY_NS, asked_by, probed_by
from simulations.build import Installation, Slot
from simulations.checks.expectations import Expectations, Zero
from simulations.checks.interface import Observer, hears
from simulations.expected import Judge
from simulations.faults import Faults
from simulations.hosts.agent import ENGINE_PORT
from simulations.net.packets import Sighting
from simulations.recoveries import injected
from simulations.result import Injected, Result, Violation
from simulations.result import Pair as PairResult
from simulations.scenario import schema
from simulations.scenario.population import expand
from simulations.scenario.units import duration_ns
from simulations.timeline import Timeline
from simulations.traffic import UNANSWERED, Pair, Traffic

PROGRESS_STEPS: Final = 50
COLLECTION: Final = (1_000_000, 10, 10)
"""Thresholds of the garbage collector's generations while a world runs: a session leaves ten
objects in cycles behind, and three hundred that live on and would be looked at for nothing."""
EXPIRY_NS: Final = 10**6
"""So long after its expiry a policy is over by every rounding."""
MAX_BESIDE: Final = 100_000

Progress = Callable[[int, int], None]
"""Given the virtual time since zero, and the duration (ns)."""


def run(
    scenario: schema.Scenario,
    seed: int,
    *,
    follow: tuple[str, str] | None = None,
    progress: Progress | None = None,
    monitors: Sequence[Observer] = (),
) -> Result:
    """Run it to its end. `follow` names the client and resource whose packets are to be told one by
    one. Raises ValueError for a scenario that cannot be built; whatever goes wrong later ends the
    run early and is the result's `error`."""
    return Run(scenario, seed, follow=follow, monitors=monitors).carry_out(progress)


class Run:
    """One run, for who wants to look at it while it goes (`run` is for all others)."""

    def __init__(
        self,
        scenario: schema.Scenario,
        seed: int,
        *,
        follow: tuple[str, str] | None = None,
        monitors: Sequence[Observer] = (),
    ) -> None:
        self._began = time.perf_counter(), time.process_time()
        self.scenario = scenario = expand(scenario, seed)
        self.seed = seed
        self.monitors = tuple(monitors)
        with rare_collection():
            self.installation = Installation(scenario, seed, self.monitors)
        self.world = self.installation.world
        self.traffic = Traffic(self.installation)
        self.timeline = None if follow is None else Timeline(self.installation, *follow)
        self.faults = Faults(
            self.installation, changed=self.traffic.policy_changed, log=self._tell_fault
        )
        self.expectations = Expectations(scenario.checks, self.traffic)
        self.duration = duration_ns(scenario.duration)
        self.zero = 0
        self.error = ""
        datagram = hears(self.monitors, "datagram")
        if datagram:
            self.world.watch(Wiretap(self.installation, datagram))
        hostile = [slot.name for slot in self.installation.slots.values() if slot.hostile]
        for monitor in self.monitors:
            monitor.began(self.world.now, scenario, seed, frozenset(hostile))

    def carry_out(self, progress: Progress | None = None) -> Result:
        """From the start to the result."""
        try:
            with rare_collection():
                self.settle()
                self.begin()
                for step in range(PROGRESS_STEPS):
                    until = self.zero + self.duration * (step + 1) // PROGRESS_STEPS
                    self.world.run_for(until - self.world.now)
                    if progress is not None:
                        progress(self.world.now - self.zero, self.duration)
        except Exception as error:
            self.error = _told(error)
        return self.result()

    def settle(self) -> None:
        """Start everything, and wait until all that starts at once is online."""
        self.installation.start()
        slots = self.installation.slots.values()
        waiting = [slot for slot in slots if slot.starts and not slot.hostile]

        def all_online() -> bool:
            while waiting and waiting[-1].is_online:
                waiting.pop()
            return not waiting

        self.world.run_until(all_online, limit_ns=duration_ns(self.scenario.settle))

    def begin(self) -> None:
        """This is instant zero: traffic, faults and checks count from here."""
        self.zero = self.world.now
        self.world.note("zero")
        self.expectations.watch(
            self.world.after,
            lambda name: self.installation.slots[name].is_online,
            lambda: self.world.now,
        )
        self.faults.schedule(self.scenario.faults)
        for traffic in self.scenario.traffic:
            self.world.after(duration_ns(traffic.at), self._begin_traffic, traffic)
        self.world.after(0, self._begin_probes)
        for policy in self.scenario.account.policies:
            if policy.expires_in:
                ends_in = duration_ns(policy.expires_in) - self.zero
                self.world.after(max(0, ends_in) + EXPIRY_NS, self.traffic.policy_changed)

    # --- traffic ---------------------------------------------------------------------------------

    def _begin_traffic(self, traffic: schema.Traffic) -> None:
        pairs = [
            self.traffic.pair(*names)
            for names in asked_by(traffic, self.scenario, self.installation.visible)
        ]
        end = self.zero + self.duration
        until = min(end, self.zero + duration_ns(traffic.until)) if traffic.until else end
        self.traffic.ask_again_and_again(pairs, duration_ns(traffic.every), until, traffic.size)

    def _begin_probes(self) -> None:
        """Ask for what checks name and no traffic touches, so that there is something to judge."""
        names = probed_by(self.scenario, self.installation.visible)
        pairs = [self.traffic.pair(*each) for each in names]
        end = self.zero + self.duration
        if pairs:
            self.traffic.ask_again_and_again(pairs, CHECK_EVERY_NS, end, CHECK_BYTES)

    # --- the result ------------------------------------------------------------------------------

    def result(self) -> Result:
        """What there is to say now."""
        zero = Zero(begin=self.zero, end=self.world.now)
        self.traffic.note_denials()
        for monitor in self.monitors:
            monitor.ended(self.world.now)
        wall, cpu = self._began
        return Result(
            scenario=self.scenario.name,
            seed=self.seed,
            trace=self.world.trace,
            virtual_ns=self.world.now - self.zero,
            pairs=self._pairs(zero),
            faults=self._injected(zero),
            checks=self.expectations.judge(zero),
            violations=self._violations(),
            nodes=self.installation.nodes(),
            timeline=() if self.timeline is None else self.timeline.steps(self.zero),
            counters=self._counters(),
            error=self.error,
            cost={
                "wall_s": time.perf_counter() - wall,
                "cpu_s": time.process_time() - cpu,
                "memory_bytes": 1_024
                * system_resource.getrusage(system_resource.RUSAGE_SELF).ru_maxrss,
            },
        )

    def _injected(self, zero: Zero) -> tuple[Injected, ...]:
        """The faults, by what became of honest clients: of hostile ones nothing is expected, and
        some hold on to what is dead."""
        slots = self.installation.slots
        honest = [pair for pair in self.traffic.pairs if not slots[pair.client].hostile]
        struck = self.faults.struck
        return tuple(injected(each, honest, zero, struck) for each in struck)

    def _pairs(self, zero: Zero) -> tuple[PairResult, ...]:
        judge = Judge(self.installation)
        return tuple(self._pair(pair, judge, zero) for pair in self.traffic.pairs)

    def _pair(self, pair: Pair, judge: Judge, zero: Zero) -> PairResult:
        expected, why = judge.expected(pair)
        slots = self.installation.slots
        client, gateway = slots[pair.client], slots.get(pair.gateway)
        if gateway is None:
            gateway = self._gateway_of(pair.resource)
        return PairResult(
            client=pair.client,
            resource=pair.resource,
            gateway=pair.gateway,
            client_nat=self.installation.nats_of(client.host.network),
            gateway_nat="" if gateway is None else self.installation.nats_of(gateway.host.network),
            expected=expected,
            why=why,
            outcome=pair.outcome(zero.end),
            first_answer_ns=pair.first_answer_ns(),
            round_trip_ns=pair.round_trip_ns(),
            asked=len(pair.asked),
            answered=sum(at != UNANSWERED for at in pair.answered),
            longest_gap_ns=pair.longest_gap_ns(zero.begin, zero.end),
        )

    def _gateway_of(self, resource: str) -> Slot | None:
        """The first that could have carried a pair which never had a gateway."""
        sites = {each.name: each.sites for each in self.scenario.account.resources}[resource]
        found = (each.name for each in self.scenario.gateways if each.site in sites)
        name = next(found, None)
        return None if name is None else self.installation.slots[name]

    def _violations(self) -> tuple[Violation, ...]:
        return tuple(
            attrs.evolve(violation, at_ns=violation.at_ns - self.zero)
            for monitor in self.monitors
            for violation in monitor.violations
        )

    def _counters(self) -> dict[str, int]:
        world = self.world.statistics()
        counters = {
            "events": world["events"],
            "packets_sent": world["sent"],
            "packets_delivered": world["delivered"],
            "questions": self.traffic.questions,
            "answers": self.traffic.answers,
            "prohibited": self.traffic.prohibited,
            "strays": self.traffic.strays,
            "actor_crashes": len(self.installation.crashes),
            "hosts": world["hosts"],
            "networks": world["networks"],
        }
        for why, count in world["dropped"].items():
            counters[f"dropped_{why.replace(' ', '_')}"] = count
        return counters

    def _tell_fault(self, now: int, fault: schema.Fault, text: str) -> None:
        if self.timeline is not None:
            self.timeline.fault(now, text)


class Wiretap:
    """Has monitors see every datagram at every hop, but for those of a gateway and the services of
    its network."""

    def __init__(self, installation: Installation, listeners: tuple[Any, ...]) -> None:
        self._listeners = listeners
        self._services = frozenset(each.name for each in installation.scenario.services)
        self._gateways = frozenset(each.name for each in installation.scenario.gateways)
        self._beside: set[int] = set()

    def __call__(self, seen: Sighting) -> None:
        if seen.stream or seen.what == "copied" or seen.origin in self._services:
            return
        if seen.origin in self._gateways:
            if seen.what == "sent" and seen.source.port != ENGINE_PORT:
                if len(self._beside) > MAX_BESIDE:
                    self._beside.clear()
                self._beside.add(seen.number)
            if seen.number in self._beside:
                return
        for listener in self._listeners:
            listener(seen.now, seen.what, seen.where, seen.source, seen.destination, seen.data)


@contextmanager
def rare_collection() -> Iterator[None]:
    """Have the garbage collector look rarely: a world makes many objects that live for the whole
    run, and few cycles. A tenth less time for a thousand hosts."""
    before = gc.get_threshold()
    gc.set_threshold(*COLLECTION)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _told(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({last[0].name}, line {last[0].lineno} of {last[0].filename})" if last else ""
    return f"{type(error).__name__}: {error}{place}"
