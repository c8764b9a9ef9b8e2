"""`holloway sim drill`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from simulations.drill.drill import Drill
from simulations.drill.probes import probe_of
from simulations.drill.processes import DrillError, Process, found
from simulations.result import Result, to_json
from simulations.scenario.load import ScenarioError, load_part
from simulations.scenario.schema import Scenario

FAILED = 1
UNUSABLE = 2


def drill(
    file: Path | None = None,
    /,
    *,
    process: tuple[str, ...] = (),
    probe: tuple[str, ...] = (),
    json: Path | None = None,
    yes: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Break parts of the installation that runs on this machine, by a file, and measure how long it
    takes to recover. Without a file, list the processes that could be broken.

    The exit status is 0 when every check held and every fault was recovered from, 1 when not, 2
    when the drill cannot be carried out. Whatever happens, what was paused goes on, what was cut
    off is healed and what was killed is started again.

    Parameters
    ----------
    file
        TOML file with `faults` (crash, restart, pause, partition) and `checks` (recovered,
        uninterrupted).
    process
        NAME=PID: call a process by this name. May be repeated.
    probe
        What has to work: tcp://HOST:PORT, http(s)://HOST/PATH or ping://HOST; with `NAME@` before
        it, asked in the network of that process. May be repeated.
    json
        Write the result to this file.
    yes
        Do not ask before anything is broken.
    """
    sys.exit(_status(file, process, probe, json, yes))


def _status(
    file: Path | None,
    named: tuple[str, ...],
    probes: tuple[str, ...],
    json: Path | None,
    yes: bool,
) -> int:
    console = Console(stderr=True)
    try:
        with found(named) as processes:
            if file is None:
                console.print(_processes(processes))
                return 0
            return _run(_read(file), processes, probes, json, yes, console)
    except DrillError as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        return UNUSABLE


def _run(
    scenario: Scenario,
    processes: dict[str, Process],
    probes: tuple[str, ...],
    json: Path | None,
    yes: bool,
    console: Console,
) -> int:
    names = list(dict.fromkeys(name for fault in scenario.faults for name in fault.targets))
    drill = Drill(
        scenario,
        processes,
        [probe_of(text, processes) for text in probes],
        lambda what: console.print(f"  {what}", highlight=False, markup=False),
    )
    if not yes:
        _confirm(names, processes, console)
    with _stopped_by_signals(drill):
        result = drill.run()
    console.print(_report(result))
    if json is not None:
        json.write_bytes(to_json(result))
    recovered = all(each.recovery_ns is not None for each in result.faults) or not probes
    return 0 if result.held and recovered and not drill.stop.is_set() else FAILED


def _read(file: Path) -> Scenario:
    try:
        return load_part(file)
    except ScenarioError as error:
        raise DrillError(str(error)) from None


def _confirm(names: list[str], processes: dict[str, Process], console: Console) -> None:
    if not sys.stdin.isatty():
        raise DrillError("this breaks running processes: say --yes")
    told = ", ".join(
        f"{name} (process {processes[name].pid})" for name in names if name in processes
    )
    console.print(f"This will break {told or 'nothing'} on this machine.", markup=False)
    if console.input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise DrillError("not begun")


@contextmanager
def _stopped_by_signals(drill: Drill) -> Iterator[None]:
    before = {
        number: signal.signal(number, lambda *_: drill.stop.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _processes(processes: dict[str, Process]) -> Table:
    table = Table("name", "component", "process", "own network", title="Holloway on this machine")
    for name, each in processes.items():
        own = "yes" if each.has_own_network() else ""
        table.add_row(name, each.component, str(each.pid), own)
    return table


def _report(result: Result) -> Table:
    table = Table("at", "what", "recovered after", title=result.scenario)
    for fault in result.faults:
        took = "not by the end" if fault.recovery_ns is None else _seconds(fault.recovery_ns)
        table.add_row(_seconds(fault.at_ns), f"{fault.kind} {', '.join(fault.targets)}", took)
    for pair in result.pairs:
        gap = f"longest gap {_seconds(pair.longest_gap_ns)}"
        asked = f"{pair.client} to {pair.resource}: {pair.answered} of {pair.asked} answered"
        table.add_row("", asked, gap)
    for check in result.checks:
        verdict = "held" if check.held else "DID NOT HOLD"
        table.add_row("", check.text, f"{verdict}: {check.detail}")
    return table


def _seconds(ns: int) -> str:
    return f"{ns / 10**9:.2f} s"
