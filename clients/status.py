"""`holloway status` for a person: a few lines and a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

NS_PER_MS = 10**6
NS_PER_S = 10**9
ADDRESS_COLUMNS = 24


def render(status: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the answer of a control socket to `{"command": "status"}`."""
    console = console or Console(highlight=False)
    connected = "connected" if status.get("connected_to_portal") else "NOT connected"
    console.print(f"{status['kind']} {status['name']}: {connected} to the portal", markup=False)
    if status.get("addresses"):
        console.print(f"addresses: {', '.join(status['addresses'])}", markup=False)
    peers = status.get("peers", [])
    if peers:
        console.print(_table(peers))
    else:
        console.print("no tunnels at present")
    for denial in status.get("denials", []):
        violated = ", ".join(denial["violated"]) or "no reason given"
        console.print(
            f"denied: {denial['resource'] or denial['resource_id']}: {denial['reason']} "
            f"({violated}), {denial['age_ns'] // NS_PER_S} s ago",
            markup=False,
        )
    for name in status.get("waiting", []):
        console.print(f"waiting for an answer: {name}", markup=False)


def _table(peers: list[dict[str, Any]]) -> Table:
    """A few lines for each peer, so that whole addresses fit into 80 columns."""
    table = Table()
    for column in ("peer", "path", "from, to", "round trip", "in, out", "resources"):
        min_width = ADDRESS_COLUMNS if column == "from, to" else None
        table.add_column(column, overflow="fold", min_width=min_width)
    for peer in peers:
        path = peer["path"] or {}
        way = [path.get("local"), path.get("remote")]
        if path.get("relay"):
            way.append(f"by {path['relay']}")
        rtt_ns = path.get("rtt_ns")
        table.add_row(
            peer["name"],
            path.get("kind", "looking for one"),
            "\n".join(filter(None, way)),
            "" if rtt_ns is None else f"{rtt_ns / NS_PER_MS:.1f} ms",
            f"{_bytes(peer['bytes_in'])}\n{_bytes(peer['bytes_out'])}",
            ", ".join(resource["name"] for resource in peer["resources"]),
        )
    return table


def _bytes(number: int) -> str:
    size = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
