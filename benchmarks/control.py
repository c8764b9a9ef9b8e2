"""The control plane: `python -m benchmarks.control [--quick] [--json]`.

Each part runs in a process of its own, several rounds of it; medians are shown with their spread.
There is no peer: nothing that is installed decides the same questions. Figures of parts that were
not measured are null. The last line is one JSON object.

    policy    decisions, snapshots, changes, proposals on one large account: `control_policy`
    agents    10,000 clients of one node (with --quick, 300): `control_agents`, once, in minutes
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from typing import Final

import attrs
from rich.console import Console
from rich.table import Table

from benchmarks import control_agents, control_policy

KEYS: Final = (
    "decisions_per_s", "snapshot_build_s", "account_bytes", "change_us_policy",
    "change_us_membership", "change_us_client", "propose_ms", "diff_ms_group", "diff_ms_everyone",
    "change_to_agent_ms_p50", "change_to_agent_ms_p99", "authorization_ms_p50", "agents_connected",
    "bytes_per_agent", "storm_agents", "storm_recovery_s",
    "change_cpu_ms", "change_to_one_ms_p50", "change_to_one_ms_p99", "node_cpu", "joins_per_s",
    "join_cpu_ms", "storm_dials", "storm_cpu_ms", "listeners",
)  # fmt: skip


@attrs.frozen
class Part:
    """Its figures and their units; how often it is measured."""

    rows: tuple[tuple[str, str], ...]
    rounds: int
    rounds_quick: int


PARTS: Final = {
    "control_policy": Part(tuple(control_policy.rows()), 5, 2),
    "control_agents": Part(tuple(control_agents.rows()), 1, 1),
}

Taken = dict[str, list[float]]
"""Each figure in every round."""


def measured(part: str, *, quick: bool) -> dict[str, float]:
    """One round of a part, in a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.{part}", *(["--quick"] if quick else [])]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return figures


def take(*, quick: bool, console: Console) -> Taken:
    """All rounds of all parts."""
    taken: Taken = {}
    for part, about in PARTS.items():
        rounds = about.rounds_quick if quick else about.rounds
        for number in range(rounds):
            console.print(f"{part}, round {number + 1} of {rounds}")
            for figure, value in measured(part, quick=quick).items():
                taken.setdefault(figure, []).append(value)
    return taken


def table(taken: Taken) -> Table:
    """Medians and spread."""
    shown = Table(title=f"Holloway's control plane, Python {platform.python_version()}")
    for heading in ("figure", "unit", "median", "least", "most"):
        shown.add_column(heading, justify="left" if heading in ("figure", "unit") else "right")
    for part in PARTS.values():
        for figure, unit in part.rows:
            values = taken[figure]
            spread = (statistics.median(values), min(values), max(values))
            shown.add_row(figure, unit, *(f"{value:,.4g}" for value in spread))
    return shown


def summary(taken: Taken) -> dict[str, float | None]:
    """The medians by key; null for what was not measured."""
    return {key: statistics.median(taken[key]) if key in taken else None for key in KEYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less than a minute")
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    arguments = parser.parse_args()
    console = Console(quiet=arguments.json)
    taken = take(quick=arguments.quick, console=console)
    console.print(table(taken))
    print(json.dumps(summary(taken)))


if __name__ == "__main__":
    main()
