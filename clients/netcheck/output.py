"""`holloway netcheck` for a person."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clients.netcheck.findings import FamilyFinding, PortalFinding, Report, ServerFinding
from runtime.clock import NS_PER_MS

_FAMILY: Final = {"ipv4": "IPv4", "ipv6": "IPv6"}
_UDP: Final = {
    "works": "every server answers",
    "partly": "some servers do not answer",
    "blocked": "blocked: no server answers",
    "not_measured": "not measured",
}


def render(report: Report, console: Console | None = None) -> None:
    """Print a report."""
    console = console or Console(highlight=False)
    rows = Table(box=None, show_header=False, pad_edge=False)
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    for family in report.families:
        for label, text in _family(family):
            rows.add_row(label, Text(text))
    if report.portal is not None:
        rows.add_row("portal", Text(_portal(report.portal)))
    if report.link is not None:
        rows.add_row("interface", Text(f"{report.link.name}, MTU {report.link.mtu}"))
    console.print(rows)
    servers = [server for family in report.families for server in family.servers]
    if servers:
        console.print()
        console.print(_servers(servers))
    for prefix, notes in (
        *((f"{_FAMILY[each.family]}, ", each.notes) for each in report.families if each.servers),
        ("", report.notes),
    ):
        for note in notes:
            console.print(f"not measured: {prefix}{note}", markup=False)
    console.print()
    console.print(verdict(report), markup=False)


def verdict(report: Report) -> str:
    """What it means for tunnels, in a sentence."""
    families = [each for each in report.families if each.udp in ("works", "partly")]
    if not families:
        if all(each.udp == "not_measured" for each in report.families):
            return "Nothing was measured by UDP."
        tcp = report.portal is not None and report.portal.reachable
        return "UDP does not leave this network" + ("; TCP does." if tcp else ".")
    if any(each.nat.present is False for each in families):
        return "No NAT in the way: direct paths are likely."
    mapping = families[0].nat.mapping
    if mapping == "endpoint_independent":
        return "An easy NAT: direct paths are likely."
    if mapping == "not_measured":
        return "There is a NAT; how hard it is was not measured."
    return "A hard NAT: direct only with peers that are easy to reach, otherwise by a relay."


def _family(family: FamilyFinding) -> list[tuple[str, str]]:
    name = _FAMILY[family.family]
    if family.local_host is None:
        return [(name, "none: this machine has no way out by it")]
    udp = _UDP[family.udp]
    if not family.servers:
        return [(name, f"from {family.local_host}; {udp}: no server with such an address")]
    rows = [(name, f"from {family.local_host}; UDP: {udp}")]
    nat = family.nat
    if nat.present is None:
        return rows
    if not nat.present:
        return [*rows, ("  NAT", "none")]
    return [
        *rows,
        ("  NAT", "seen from outside as " + ", ".join(nat.public_hosts)),
        ("  mapping", _words(nat.mapping)),
        ("  filtering", _words(nat.filtering)),
        ("  ports", _words(nat.ports)),
        ("  hairpinning", _words(nat.hairpinning)),
    ]


def _portal(portal: PortalFinding) -> str:
    if not portal.reachable:
        return f"{portal.address}: no TLS over TCP ({portal.error})"
    took = "" if portal.handshake_ns is None else f" in {_ms(portal.handshake_ns)}"
    proved = {
        True: "and is the one of the token",
        False: f"but it is NOT the portal of the token: {portal.error}",
        None: "but was not proved (no token was given)",
    }[portal.proved]
    return f"{portal.address}: TLS over TCP answers{took}, {proved}"


def _servers(servers: list[ServerFinding]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("server", no_wrap=True)
    table.add_column("round trip", no_wrap=True)
    table.add_column("sees us as", overflow="fold")
    for server in servers:
        if not server.reachable:
            table.add_row(Text(server.address), "no answer", "")
            continue
        time = "" if server.round_trip_ns is None else _ms(server.round_trip_ns)
        seen = server.mapped or f"error {server.error}"
        table.add_row(Text(server.address), time, Text(seen))
    return table


def _words(term: str) -> str:
    return term.replace("_", " ")


def _ms(ns: int) -> str:
    return f"{ns / NS_PER_MS:.1f} ms"
