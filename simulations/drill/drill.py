"""A drill: the faults of a file, on the processes of a running installation of this machine, while
probes look on; and how long each took to recover from.

    format = 1
    name = "gateway dies"
    duration = "30s"

    [[faults]]
    at = "5s"
    kind = "crash"            # crash, restart, pause or partition
    targets = ["gateway-1"]   # names of processes (`holloway sim drill --list`)
    duration = "5s"           # then it is started anew, resumed, healed

    [[checks]]
    kind = "recovered"
    at = "5s"
    within = "2s"

It ends after `duration`, or when everything has been healed and answered for STEADY_NS.

Whatever happens, and however the drill ends (SIGINT and SIGTERM too), what was paused is resumed,
what was cut off is healed, and what was killed is started again.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

import attrs

from simulations.drill.partition import partitioned
from simulations.drill.probes import Probe
from simulations.drill.processes import DrillError, Process
from simulations.result import Checked, Injected, Pair, Result
from simulations.scenario.schema import Check, Fault, Scenario
from simulations.scenario.units import duration_ns

KINDS: Final = ("crash", "restart", "pause", "partition")
CHECKS: Final = ("recovered", "uninterrupted")
FIRST_ANSWER_S: Final = 30.0
NS_PER_S: Final = 10**9
POLL_S: Final = 0.5
LOOK_NS: Final = NS_PER_S // 2
STEADY_NS: Final = 5 * NS_PER_S
"""After so long without a failure a drill whose faults are over is over too."""

Say = Callable[[str], None]


def problems(scenario: Scenario, processes: dict[str, Process]) -> list[str]:
    """Why this cannot be drilled on these processes, one sentence each."""
    found = []
    for number, fault in enumerate(scenario.faults):
        place = f"faults[{number}]"
        if fault.kind not in KINDS:
            found.append(f"{place}: a drill has only {', '.join(KINDS)}, not {fault.kind}")
        if not fault.targets:
            found.append(f"{place}: on which process?")
        for name in fault.targets:
            if name not in processes:
                known = ", ".join(processes) or "none"
                found.append(f"{place}: there is no process {name!r}; there are: {known}")
        if fault.kind in ("pause", "partition") and not fault.duration:
            found.append(f"{place}: for how long (`duration`)?")
    for number, check in enumerate(scenario.checks):
        if check.kind not in CHECKS:
            found.append(f"checks[{number}]: a drill has only {', '.join(CHECKS)}")
        elif not check.within:
            found.append(f"checks[{number}]: within what time (`within`)?")
    if not scenario.faults:
        found.append("there are no faults in it")
    return found


@attrs.define
class Drill:
    """One run. `stop` may be set from a signal handler: then it heals everything and ends."""

    scenario: Scenario
    processes: dict[str, Process]
    probes: Sequence[Probe]
    say: Say
    stop: threading.Event = attrs.Factory(threading.Event)
    _healing: list[tuple[int, int, str, Callable[[], None]]] = attrs.Factory(list)
    _serial: int = 0
    _begun_ns: int = 0
    _struck: list[tuple[int, Fault]] = attrs.Factory(list)

    def run(self) -> Result:
        """Raises DrillError, after everything was healed."""
        if wrong := problems(self.scenario, self.processes):
            raise DrillError("; ".join(wrong))
        with ExitStack() as stack:
            for probe in self.probes:
                probe.start()
                stack.callback(probe.stop)
            for probe in self.probes:
                if not probe.wait_for_answer(FIRST_ANSWER_S):
                    raise DrillError(f"{probe.text} gets no answer before anything was broken")
            stack.callback(self._heal_all)
            self._begun_ns = time.monotonic_ns()
            self._go_through()
        return self._result()

    # --- the timeline --------------------------------------------------------------------------

    def _go_through(self) -> None:
        faults = sorted(self.scenario.faults, key=lambda fault: duration_ns(fault.at))
        for fault in faults:
            if not self._wait_until(self._begun_ns + duration_ns(fault.at)):
                return
            self.say(f"{fault.kind} {', '.join(fault.targets)}")
            self._struck.append((time.monotonic_ns(), fault))
            for name in fault.targets:
                self._strike(fault, self.processes[name])
        end_ns = self._begun_ns + duration_ns(self.scenario.duration)
        while time.monotonic_ns() < end_ns and not self._is_over():
            if not self._wait_until(min(end_ns, time.monotonic_ns() + LOOK_NS)):
                return

    def _is_over(self) -> bool:
        """Everything is healed, and all that is probed has been answering for a while."""
        since_ns = time.monotonic_ns() - STEADY_NS
        newest_ns = max((at_ns for at_ns, _ in self._struck), default=0)
        return (
            bool(self.probes)
            and not self._healing
            and newest_ns < since_ns
            and all(probe.is_steady(since_ns) for probe in self.probes)
        )

    def _wait_until(self, at_ns: int) -> bool:
        """Wait, and heal what is due meanwhile; False when the drill is to stop."""
        while not self.stop.is_set():
            due_ns = min(self._healing[0][0], at_ns) if self._healing else at_ns
            remaining_s = (due_ns - time.monotonic_ns()) / NS_PER_S
            if remaining_s > 0:
                self.stop.wait(min(remaining_s, POLL_S))
            elif self._healing and self._healing[0][0] <= due_ns:
                self._heal_next()
            else:
                return True
        return False

    def _strike(self, fault: Fault, process: Process) -> None:
        lasts_ns = duration_ns(fault.duration) if fault.duration else 0
        match fault.kind:
            case "crash":
                process.kill()
                if lasts_ns:
                    self._later(lasts_ns, f"start {process.name}", lambda: _start(process))
            case "restart":
                process.end()
                self._later(0, f"start {process.name}", lambda: _start(process))
            case "pause":
                process.pause()
                self._later(lasts_ns, f"resume {process.name}", process.resume)
            case "partition":
                cut = ExitStack()
                cut.enter_context(partitioned(process))
                self._later(lasts_ns, f"heal {process.name}", cut.close)

    def _later(self, after_ns: int, what: str, act: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._healing, (time.monotonic_ns() + after_ns, self._serial, what, act))

    def _heal_next(self) -> None:
        _, _, what, act = heapq.heappop(self._healing)
        self.say(what)
        act()

    def _heal_all(self) -> None:
        failures = []
        while self._healing:
            try:
                self._heal_next()
            except (DrillError, OSError) as error:
                failures.append(str(error))
        if failures:
            raise DrillError("not healed: " + "; ".join(failures))

    # --- what came of it -----------------------------------------------------------------------

    def _result(self) -> Result:
        end_ns = time.monotonic_ns()
        return Result(
            scenario=self.scenario.name,
            seed=0,
            backend="kernel",
            virtual_ns=end_ns - self._begun_ns,
            pairs=tuple(self._pair(probe) for probe in self.probes),
            faults=tuple(self._injected(number) for number in range(len(self._struck))),
            checks=tuple(
                attrs.evolve(self._checked(number, check), kind=check.kind)
                for number, check in enumerate(self.scenario.checks, start=1)
            ),
        )

    def _pair(self, probe: Probe) -> Pair:
        where, _, url = probe.text.rpartition("@")
        last = probe.answers[-1].held if probe.answers else False
        return Pair(
            client=where or "here",
            resource=url,
            outcome="direct" if last else "failed",
            asked=len(probe.answers),
            answered=sum(each.held for each in probe.answers),
            longest_gap_ns=probe.longest_gap_ns(),
        )

    def _injected(self, number: int) -> Injected:
        at_ns, fault = self._struck[number]
        return Injected(
            at_ns=at_ns - self._begun_ns,
            kind=fault.kind,
            targets=fault.targets,
            duration_ns=duration_ns(fault.duration) if fault.duration else None,
            recovery_ns=self._recovery_ns(number),
        )

    def _recovery_ns(self, number: int) -> int | None:
        """Of the slowest probe, until the next fault."""
        at_ns, _ = self._struck[number]
        is_last = number + 1 == len(self._struck)
        until_ns = time.monotonic_ns() if is_last else self._struck[number + 1][0]
        times = [probe.recovery_ns(at_ns, until_ns) for probe in self.probes]
        known = [each for each in times if each is not None]
        return max(known, default=0) if len(known) == len(times) else None

    def _checked(self, number: int, check: Check) -> Checked:
        within_ns = duration_ns(check.within)
        if check.kind == "uninterrupted":
            slowest = max((probe.longest_gap_ns() for probe in self.probes), default=0)
            text = f"uninterrupted, no gap above {check.within}"
            return _verdict(number, text, slowest, within_ns)
        at_ns = duration_ns(check.at)
        struck = [
            index for index, (_, fault) in enumerate(self._struck) if duration_ns(fault.at) == at_ns
        ]
        text = f"recovered from {check.at} within {check.within}"
        if not struck:
            return Checked(number=number, text=text, held=False, detail="no fault struck then")
        return _verdict(number, text, self._recovery_ns(struck[0]), within_ns)


def _start(process: Process) -> None:
    process.start()


def _verdict(number: int, text: str, took_ns: int | None, within_ns: int) -> Checked:
    if took_ns is None:
        return Checked(number=number, text=text, held=False, detail="not by the end")
    detail = f"{took_ns / NS_PER_S:.2f} s"
    return Checked(number=number, text=text, held=took_ns <= within_ns, detail=detail)
