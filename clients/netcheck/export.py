"""A report as a part of a scenario: `holloway sim run FILE --add CAPTURE` places a client in it.

The tables are those of the simulator's files (docs/simulator.md). Every figure has a comment that
says whether it was measured or is assumed; what is assumed is what makes direct paths harder. The
file holds no public address of this network and no name of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from ipaddress import IPv4Network, ip_address, ip_network
from typing import Final

from clients.netcheck.findings import FamilyFinding, Report

NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,49}")
"""Names of scenario files, with room for what is put behind them."""
PLACEHOLDER_PREFIX6: Final = "2001:db8:ffff:1::/64"
"""IPv6 that is there, in a prefix for documentation (RFC 3849): the real one stays private."""
ASSUMED_LATENCY: Final = "10ms"
ASSUMED_TIMEOUT: Final = "30s"

_PRIVATE: Final = tuple(
    IPv4Network(each) for each in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
)
_HARDEST: Final = "address_and_port_dependent"


def is_name(text: str) -> bool:
    """Whether a scenario can have it as the name of a network or user."""
    return NAME.fullmatch(text) is not None


def to_fragment(report: Report, *, name: str, user: str, at: datetime) -> str:
    """The file. Raises ValueError for names that no scenario can have."""
    if not is_name(name) or not is_name(user):
        raise ValueError(f"a name is lower-case letters, digits, - and _: {name!r}, {user!r}")
    lines = [
        f"# A real network, captured by `holloway netcheck --export` on {at:%Y-%m-%d}.",
        "# `holloway sim run FILE --add` this file places a client in it.",
        *(f"# {note}" for note in _remarks(report)),
        "format = 1",
        f'name = "captured: {name}"',
        "",
        "[[networks]]",
        f'name = "{name}"',
        *_prefixes(report),
        *_nat(report.ipv4),
        *_firewall(report),
        *_uplink(report),
        "",
        "[[clients]]",
        f'name = "{name}-client"',
        f'network = "{name}"',
        f'user = "{user}" # of the scenario; or name one by --as',
    ]
    return "\n".join(lines) + "\n"


def _remarks(report: Report) -> Iterator[str]:
    ipv4 = report.ipv4
    answered = sum(server.reachable for server in ipv4.servers)
    yield f"Over IPv4 {answered} of {len(ipv4.servers)} addresses of servers answered by UDP."
    if ipv4.udp == "partly":
        yield "The others did not; the file says nothing of why."
    if report.portal is not None:
        how = "was reached" if report.portal.reachable else "was NOT reached"
        yield f"The portal {how} by TLS over TCP."
    for note in ipv4.notes:
        yield f"Not measured: {note}."


def _prefixes(report: Report) -> Iterator[str]:
    link = report.link
    if _has_nat(report.ipv4) and link is not None and _is_private(link.prefix):
        yield f'prefix = "{link.prefix}" # of the interface'
    if report.ipv6.udp in ("works", "partly"):
        yield "# IPv6 was measured to work; the prefix is a placeholder, and that nothing comes in"
        yield "# unasked is assumed."
        yield f'prefix6 = "{PLACEHOLDER_PREFIX6}"'


def _nat(family: FamilyFinding) -> Iterator[str]:
    nat = family.nat
    if not _has_nat(family):
        yield "# No NAT was measured. That IPv4 comes in unasked is how the simulator has it."
        return
    if nat.present is None:
        yield "# Assumed, since nobody answered: a NAT, of the hardest kind."
    mapping, how = nat.mapping, "measured"
    if mapping == "endpoint_dependent":
        mapping, how = _HARDEST, "measured to depend on the destination, assumed: on its port too"
    elif mapping == "not_measured":
        mapping, how = _HARDEST, "assumed"
    filtering, how_filtering = nat.filtering, "measured"
    if filtering == "not_measured":
        filtering, how_filtering = _HARDEST, "assumed: no server could tell"
    ports, how_ports = nat.ports, "measured, from a few sockets"
    if ports == "not_measured":
        ports, how_ports = "random" if mapping == _HARDEST else "preserve", "assumed"
    hairpinning, how_hairpinning = nat.hairpinning, "measured"
    if hairpinning == "not_measured":
        hairpinning, how_hairpinning = "none", "assumed"
    yield f"# mapping: {how}"
    yield f"# filtering: {how_filtering}"
    yield f"# ports: {how_ports}"
    yield f"# hairpinning: {how_hairpinning}"
    yield "# timeout: assumed (and that inbound packets do not renew it)"
    yield (
        f'nat = {{ mapping = "{mapping}", filtering = "{filtering}", ports = "{ports}", '
        f'hairpinning = "{hairpinning}", timeout = "{ASSUMED_TIMEOUT}" }}'
    )


def _firewall(report: Report) -> Iterator[str]:
    """A blockade of IPv4 alone has no word in a scenario: IPv6 would be blocked with it."""
    if report.ipv4.udp == "blocked" and report.ipv6.udp not in ("works", "partly"):
        yield "# measured: no server answered by UDP"
        yield 'firewall = { udp = "drop" }'


def _uplink(report: Report) -> Iterator[str]:
    round_trip_ns = report.best_round_trip_ns
    latency, how = ASSUMED_LATENCY, "assumed"
    if round_trip_ns is not None:
        latency = f"{round_trip_ns // 2_000}us"
        how = "half of the shortest round trip to a server (so its own way is in it)"
    yield f"# latency: {how}"
    mtu = ""
    if report.link is not None and 1_280 <= report.link.mtu <= 65_535:
        yield "# mtu: of the interface; further on it may be less"
        mtu = f", mtu = {report.link.mtu}"
    yield "# jitter, loss, bandwidth: not measured, none assumed"
    yield f'uplink = {{ latency = "{latency}"{mtu} }}'


def _has_nat(family: FamilyFinding) -> bool:
    """Measured; or else assumed where the own address is one that needs it."""
    if family.nat.present is not None:
        return family.nat.present
    return family.local_host is None or not ip_address(family.local_host).is_global


def _is_private(prefix: str) -> bool:
    network = ip_network(prefix)
    if not isinstance(network, IPv4Network) or network.prefixlen > 30:
        return False
    return any(network.subnet_of(each) for each in _PRIVATE)
