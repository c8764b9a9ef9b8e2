"""What `benchmarks.relay` makes of its figures: the table, and the object of the last line."""

from __future__ import annotations

import gzip
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from rich.table import Table

KEYS: Final = (
    "thin_172_vs_coturn", "thin_1400_vs_coturn", "bulk_1400_vs_coturn",
    "thin_172_per_cpu_s_vs_coturn", "thin_1400_per_cpu_s_vs_coturn",
    "bulk_1400_per_cpu_s_vs_coturn", "thin_172_pure_vs_coturn", "thin_1400_pure_vs_coturn",
    "bulk_1400_pure_vs_coturn", "thin_172_pure_per_cpu_s_vs_coturn",
    "thin_1400_pure_per_cpu_s_vs_coturn", "bulk_1400_pure_per_cpu_s_vs_coturn",
    "cpu_per_packet_vs_coturn", "added_cpu_per_packet_vs_coturn", "xdp_cpu_per_packet_vs_coturn",
    "xdp_driver_cpu_per_packet_vs_coturn",
    "latency_added_us", "coturn_latency_added_us", "allocations_per_s_vs_coturn",
    "allocations_per_cpu_s_vs_coturn", "bytes_per_allocation_vs_coturn", "mode", "coturn_version",
)  # fmt: skip
DIRECT: Final = "generator alone"
COTURN: Final = "coturn"
OURS: Final = "holloway"
PURE: Final = "holloway pure"
XDP: Final = "holloway xdp"
DRIVER: Final = "holloway xdp driver"
WAYS: Final = {True: "to peer", False: "to client"}

Figures = dict[str, float]
Taken = dict[str, list[Figures]]
"""For each relay, one set of figures a round."""


def summary(taken: Taken, modes: dict[str, str]) -> dict[str, Any]:
    """The object of the last line: ratios are medians of the rounds' ratios, ours over coturn's."""
    result: dict[str, Any] = dict.fromkeys(KEYS)
    pure = OURS if modes.get(OURS) == "python" else PURE
    for case in ("thin_172", "thin_1400", "bulk_1400"):
        name = case.replace("_", " ")
        result[f"{case}_vs_coturn"] = ratio(taken, OURS, partial(rate, name))
        result[f"{case}_pure_vs_coturn"] = ratio(taken, pure, partial(rate, name))
        spent = ratio(taken, OURS, partial(cpu, name))
        result[f"{case}_per_cpu_s_vs_coturn"] = inverse(spent)
        spent = ratio(taken, pure, partial(cpu, name))
        result[f"{case}_pure_per_cpu_s_vs_coturn"] = inverse(spent)
    result["cpu_per_packet_vs_coturn"] = ratio(taken, OURS, partial(cpu, "thin 172"))
    add_what_paced_runs_added(taken)
    result["added_cpu_per_packet_vs_coturn"] = ratio(taken, OURS, added)
    result["xdp_cpu_per_packet_vs_coturn"] = ratio(taken, XDP, added)
    result["xdp_driver_cpu_per_packet_vs_coturn"] = ratio(taken, DRIVER, added)
    result["latency_added_us"] = median(taken, OURS, "latency added us")
    result["coturn_latency_added_us"] = median(taken, COTURN, "latency added us")
    for key, name in (
        ("allocations_per_s_vs_coturn", "allocations per_s"),
        ("allocations_per_cpu_s_vs_coturn", "allocations per_cpu_s"),
        ("bytes_per_allocation_vs_coturn", "allocation bytes"),
    ):
        result[key] = ratio(taken, OURS, partial(plain, name))
    ran = [modes[name] for name in (OURS, XDP) if name in taken and name in modes]
    result["mode"] = "+".join(ran) or None
    result["coturn_version"] = coturn_version()
    result["absolute"] = {
        name: {
            figure.replace(" ", "_"): median(taken, name, figure) for figure in figures_of(rounds)
        }
        for name, rounds in taken.items()
    }
    return result


def add_what_paced_runs_added(taken: Taken) -> None:
    """What a relay adds to what the same round's generator alone used and took."""
    alone = taken.get(DIRECT, [])
    for name, rounds in taken.items():
        if name == DIRECT:
            continue
        for figures, bare in zip(rounds, alone, strict=False):
            for way in WAYS.values():
                key = f"paced 172 {way} {'busy' if interrupts_are_apart() else 'used'}_us"
                if key in figures and key in bare:
                    figures[f"paced 172 {way} added_us"] = figures[key] - bare[key]
            if "round trip us" in figures and "round trip us" in bare:
                figures["latency added us"] = (figures["round trip us"] - bare["round trip us"]) / 2


@cache
def interrupts_are_apart() -> bool:
    """Whether this kernel charges no thread for softirq work. False if it does not tell."""
    try:
        text = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    except OSError:
        path = Path(f"/boot/config-{platform.release()}")
        text = path.read_text() if path.exists() else ""
    return "CONFIG_IRQ_TIME_ACCOUNTING=y" in text


def plain(name: str, figures: Figures) -> float | None:
    return figures.get(name)


def rate(case: str, figures: Figures) -> float | None:
    """Packets a second, the mean of both ways; None where either was not measured."""
    return mean(figures.get(f"{case} {way} per_s") for way in WAYS.values())


def cpu(case: str, figures: Figures) -> float | None:
    return mean(figures.get(f"{case} {way} cpu_us") for way in WAYS.values())


def added(figures: Figures) -> float | None:
    return mean(figures.get(f"paced 172 {way} added_us") for way in WAYS.values())


def mean(values: Iterator[float | None]) -> float | None:
    known = [each for each in values if each is not None]
    return sum(known) / len(known) if len(known) == len(WAYS) else None


def ratio(taken: Taken, name: str, of: Callable[[Figures], float | None]) -> float | None:
    ratios = []
    for ours, theirs in zip(taken.get(name, []), taken.get(COTURN, []), strict=False):
        mine, other = of(ours), of(theirs)
        if mine is not None and other:
            ratios.append(mine / other)
    return round(statistics.median(ratios), 3) if ratios else None


def inverse(value: float | None) -> float | None:
    return round(1 / value, 3) if value else None


def median(taken: Taken, name: str, figure: str) -> float | None:
    values = [figures[figure] for figures in taken.get(name, []) if figure in figures]
    return round(statistics.median(values), 4) if values else None


def figures_of(rounds: Sequence[Figures]) -> list[str]:
    return list(dict.fromkeys(figure for figures in rounds for figure in figures))


def table(taken: Taken) -> Table:
    """Medians, with the least and the most of all rounds; case by case."""
    add_what_paced_runs_added(taken)
    result = Table(title="median (least - most); per_s in packets or allocations a second")
    result.add_column("", no_wrap=True)
    for name in taken:
        result.add_column(name, justify="right")
    for figure in sorted(figures_of([each for rounds in taken.values() for each in rounds])):
        if _is_dull(figure, taken):
            continue
        cells = []
        for rounds in taken.values():
            values = [figures[figure] for figures in rounds if figure in figures]
            cells.append(_cell(values) if values else "-")
        result.add_row(figure, *cells)
    return result


def _is_dull(figure: str, taken: Taken) -> bool:
    """Parts of `added_us`, and losses where nothing was lost."""
    if figure.endswith((" used_us", " busy_us", "round trip us")):
        return True
    values = [figures.get(figure, 0.0) for rounds in taken.values() for figures in rounds]
    return figure.endswith(" loss") and not any(values)


def _cell(values: list[float]) -> str:
    form = ",.0f" if max(values) >= 100 else ",.2f" if max(values) >= 0.1 else ",.4f"
    least, middle, most = min(values), statistics.median(values), max(values)
    if least == most:
        return f"{middle:{form}}"
    return f"{middle:{form}} ({least:{form}} - {most:{form}})"


def coturn_version() -> str | None:
    if shutil.which("turnserver") is None:
        return None
    done = subprocess.run(["turnserver", "--version"], capture_output=True, text=True)
    words = (done.stdout + done.stderr).split()
    return next((word for word in words if re.fullmatch(r"\d+(\.\d+)+", word)), "unknown")
