"""`holloway status` for a person: a few lines for each peer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

NS_PER_MS = 10**6
NS_PER_S = 10**9
_LINKS = {"quic": "QUIC", "tls": "TLS", "tcp": "TCP"}
_BY = {"quic": " (QUIC)", "websocket": " (WebSocket: UDP seems to be blocked)"}


def render(status: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the answer of a control socket to `{"command": "status"}`."""
    console = console or Console(highlight=False)
    connected = "connected" if status.get("connected_to_portal") else "NOT connected"
    line = f"{status['kind']} {status['name']}: {connected} to the portal"
    if (channel := status.get("channel", {})).get("connected"):
        line += _BY.get(channel.get("transport"), "")
    console.print(line, markup=False)
    if status.get("addresses"):
        console.print(f"addresses: {', '.join(status['addresses'])}", markup=False)
    reached_by = {each.get("by") for each in status.get("relays", [])}
    if links := [word for transport, word in _LINKS.items() if transport in reached_by]:
        console.print(f"relays: reached by {' and '.join(links)} (UDP seems to be blocked)")
    peers = status.get("peers", [])
    for peer in peers:
        console.print(_peer(peer), markup=False, soft_wrap=True)
    if not peers:
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


def _peer(peer: Mapping[str, Any]) -> str:
    path = peer["path"]
    traffic = f"  in {_bytes(peer['bytes_in'])}, out {_bytes(peer['bytes_out'])}: " + ", ".join(
        resource["name"] for resource in peer["resources"]
    )
    if not path:
        return f"{peer['name']}: looking for a path\n{traffic}"
    relay, place = path.get("relay"), ""
    if link := _LINKS.get(path.get("by")):
        relay, place = link, f" at {relay}"
    relay = f" by {relay}" if relay else ""
    rtt_ns = path.get("rtt_ns")
    rtt = "" if rtt_ns is None else f", round trip {rtt_ns / NS_PER_MS:.1f} ms"
    way = f"  {path.get('local')} <-> {path.get('remote')}{place}"
    return f"{peer['name']}: {path['kind']}{relay}{rtt}\n{way}\n{traffic}"


def _bytes(number: int) -> str:
    size = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
