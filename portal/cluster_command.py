"""`holloway cluster`: how the nodes of a portal are, and what may be done with them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from portal.asking import ask, ask_cluster, find_cluster
from portal.settings import DEFAULT_STATE_DIR

app = App(name="cluster", help="Look after a portal of several nodes.")

FILE_WIDTH = 200
"""Of a table that goes into a file or a pipe."""

StateDir = Annotated[Path, Parameter(help="The state directory that `holloway portal` was given.")]
Output = Annotated[Literal["table", "json"], Parameter(name=("--output", "-o"))]


@app.command
def status(*, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = "table") -> None:
    """Show all nodes that live, as a node on this machine knows them.

    Parameters
    ----------
    output
        `table` for people, `json` for machines: everything that is known.
    """
    answer = ask("cluster status", state_dir, {"command": "cluster"})
    hosted = find_cluster("cluster status", state_dir, {"command": "nodes"})
    if hosted is not None:
        by_name = {each["name"]: each for each in hosted["nodes"]}
        for row in answer["nodes"]:
            row["hosted"] = by_name.pop(row["name"], None)
        answer["nodes"] += [
            {"name": name, "state": each["state"], "status": None, "hosted": each}
            for name, each in by_name.items()
        ]
    if output == "json":
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode() + "\n")
    else:
        _render(answer)


@app.command
def drain(node: str, *, state_dir: StateDir = DEFAULT_STATE_DIR) -> None:
    """End a node in good order: its accounts and agents go to the others. It stays away.

    Parameters
    ----------
    node
        Its name.
    """
    _change("drain", node, state_dir)


@app.command
def start(*, state_dir: StateDir = DEFAULT_STATE_DIR) -> None:
    """Start one more node; accounts move to it as soon as it is up."""
    _change("start", None, state_dir)


@app.command
def restart(node: str | None = None, *, state_dir: StateDir = DEFAULT_STATE_DIR) -> None:
    """Drain and start a node anew, or all of them, one after the other.

    Parameters
    ----------
    node
        Its name; without one, all.
    """
    _change("restart", node, state_dir)


def _change(command: str, node: str | None, state_dir: Path) -> None:
    answer = ask_cluster(f"cluster {command}", state_dir, {"command": command, "node": node})
    for what, names in answer.items():
        sys.stdout.write(f"{what}: {', '.join(names)}\n")


def _render(answer: Mapping[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("node", "state", "agents at", "accounts", "clients", "gateways", "relays"):
        table.add_column(column)
    for column in ("links", "up for", "restarts", "pid"):
        table.add_column(column)
    for row in answer["nodes"]:
        said, hosted = row["status"], row.get("hosted") or {}
        state = row["state"] if said is not None or row["state"] != "up" else "does not answer"
        counts = (
            ["-"] * 4
            if said is None
            else [str(said[each]) for each in ("accounts", "clients", "gateways", "relays")]
        )
        table.add_row(
            row["name"],
            state,
            row.get("node_address", "-"),
            *counts,
            "-" if said is None else str(len(said["links"])),
            "-" if said is None else f"{said['uptime_s']:.0f} s",
            str(hosted.get("restarts", "-")),
            str(hosted.get("pid") or (said or {}).get("pid") or "-"),
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=FILE_WIDTH)
    console.print(table)
