"""How figures and states are written, the same in tables, on pages and in messages."""

from __future__ import annotations

from typing import Final

from simulations.report.merged import Report

NO_NAT: Final = "no NAT"


def time(ns: float | None) -> str:
    """A time in the unit that suits it: `41.0 ms`, `2.35 s`; a dash for none."""
    if ns is None:
        return "–"
    if ns < 10**6:
        return f"{ns / 1e3:.0f} µs" if ns else "0 s"
    if ns < 10**9:
        return f"{ns / 1e6:.1f} ms" if ns < 10**8 else f"{ns / 1e6:.0f} ms"
    if ns < 120 * 10**9:
        return f"{ns / 1e9:.2f} s"
    return f"{ns / 60e9:.1f} min"


def instant(ns: int) -> str:
    """A point on the run's clock, in seconds."""
    return f"{ns / 1e9:.3f} s"


def percent(share: float) -> str:
    """A share; 100 % only if it is all, and 0 % only if it is nothing."""
    if 0 < share < 0.001:
        return "<0.1 %"
    if 0.999 < share < 1:
        return ">99.9 %"
    return f"{share * 100:.1f} %" if share not in (0, 1) else f"{share * 100:.0f} %"


def count(number: int, one: str, many: str = "") -> str:
    """`1 run`, `3 runs`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def nat(name: str) -> str:
    """What stands between a host and the internet."""
    return name or NO_NAT


def verdict(report: Report) -> str:
    """One sentence about the whole."""
    if not report.runs:
        return "nothing was run" if not report.lost else "no run gave a result"
    if report.all_held:
        return "held" if report.runs == 1 else f"all {report.runs:,} runs held"
    if report.runs == 1 and not report.lost:
        return "did NOT hold"
    text = f"{count(report.runs - report.held, 'run')} of {report.runs:,} did NOT hold"
    if report.lost:
        text += f", {count(len(report.lost), 'seed')} gave no result"
    return text


def budget(report: Report) -> str:
    """What chaos was allowed, every option; empty without chaos."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.chaos.items())


def seeds(report: Report) -> str:
    """Which seeds a report is about."""
    if report.runs <= 1:
        return f"seed {report.first_seed}"
    return f"{count(report.runs, 'seed')}, {report.first_seed} to {report.last_seed}"
