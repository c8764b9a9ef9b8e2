"""Charts as inline SVG: the heat map of NAT pairs, distributions, faults on a time axis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from simulations.report.distribution import Distribution
from simulations.report.markup import Child, Element, tag
from simulations.report.merged import PATHS, NatRow
from simulations.report.wording import count, instant, nat, percent, time
from simulations.result import Injected

MAX_SIDE: Final = 24
"""NATs on a side of the heat map; those with the most pairs."""
MAX_FAULTS: Final = 60
CHARACTER: Final = 6.6
"""About the width of a character of the charts' text."""
_REACHED: Final = ("direct", "relayed", "failed")
NARROW: Final = 420.0
"""On a telephone it has more than three quarters of this."""
_CORNER: Final = "client behind"
FITS: Final = 360.0
"""The width of a drawing that fits a telephone, and the margins of its axes."""
_LEFT, _RIGHT, _BOTTOM = 44.0, 24.0, 28.0


def svg(width: float, height: float, title: str, *children: Child, fits: bool = False) -> Element:
    """A drawing with its name for those who hear it read. One that `fits` is drawn for the width of
    a telephone, and grows with its column; another is scrolled there, unless it is so narrow that
    its labels can be read when it is shrunk."""
    return tag(
        "svg",
        tag("title", title),
        *children,
        class_="chart fits" if fits else "chart narrow" if width <= NARROW else "chart",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        role="img",
    )


def text(x: float, y: float, content: str, class_: str = "", **more: str) -> Element:
    return tag("text", content, x=float(x), y=float(y), class_=class_ or None, **more)


def shortened(content: str, most: int) -> str:
    return content if len(content) <= most else content[: most - 1] + "…"


# --- NAT pairs ------------------------------------------------------------------------------------


def heat_map(rows: Sequence[NatRow]) -> Element:
    """A cell for each pair of NATs: how many of the pairs were direct, relayed, failed."""
    rows = [row for row in rows if row.reached]
    clients = _most_frequent([row.client_nat for row in rows for _ in range(min(row.reached, 99))])
    gateways = _most_frequent(
        [row.gateway_nat for row in rows for _ in range(min(row.reached, 99))]
    )
    by_key = {(row.client_nat, row.gateway_nat): row for row in rows}
    names = [_CORNER, *(shortened(nat(each), 34) for each in clients)]
    left = 24 + CHARACTER * max(map(len, names))
    cell, high, top = 148.0, 50.0, 62.0
    marks: list[Child] = [
        text(left, 14, "gateway behind", "s"),
        text(left - 12, top - 10, _CORNER, "s e"),
    ]
    for x, name in enumerate(gateways):
        for line, part in enumerate(_lines(nat(name), 22)):
            marks.append(text(left + x * cell + cell / 2, 32 + 13 * line, part, "m"))
    for y, name in enumerate(clients):
        marks.append(text(left - 12, top + y * high + high / 2 + 4, shortened(nat(name), 34), "e"))
        for x, other in enumerate(gateways):
            at = (left + x * cell + 2, top + y * high + 2)
            marks.append(_cell(*at, cell - 4, high - 4, by_key.get((name, other))))
    width = left + cell * len(gateways) + 10
    return svg(width, top + high * len(clients) + 8, "Outcomes by pair of NATs", marks)


def _cell(x: float, y: float, width: float, height: float, row: NatRow | None) -> Element:
    if row is None:
        return tag("rect", x=x, y=y, width=width, height=height, class_="faint", rx="5")
    parts: list[Child] = []
    place = x
    for outcome in _REACHED:
        wide = width * row.share(outcome)
        if wide:
            parts.append(tag("rect", x=place, y=y, width=wide, height=height, class_=outcome))
        place += wide
    best = max(_REACHED, key=row.share)
    parts.append(text(x + 8, y + 19, f"{percent(row.share(best))} {best}", "on b"))
    below = count(row.reached, "pair") + (f", {row.worse:,} worse" if row.worse else "")
    parts.append(text(x + 8, y + 36, below, "on"))
    told = ", ".join(f"{row.outcomes.get(each, 0)} {each}" for each in _REACHED)
    title = (
        f"{nat(row.client_nat)} to {nat(row.gateway_nat)}: {told}; {row.worse} worse than theory"
    )
    return tag("g", tag("title", title), parts)


def _most_frequent(names: Sequence[str]) -> list[str]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return sorted(sorted(counts, key=lambda name: -counts[name])[:MAX_SIDE])


def _lines(content: str, most: int) -> list[str]:
    """At most two lines, cut at a space or hyphen where there is one."""
    if len(content) <= most:
        return [content]
    place = max(content.rfind(" ", 0, most + 1), content.rfind("-", 0, most) + 1)
    place = place if place > 3 else most
    return [content[:place].strip(), shortened(content[place:].strip(), most)]


# --- distributions --------------------------------------------------------------------------------


def ecdf(by_class: Mapping[str, Distribution], title: str) -> Element:
    """What share of all took no longer than a time, on a logarithmic axis; a line each."""
    width, height, left, bottom = FITS, 176.0, _LEFT, _BOTTOM
    axis = _LogAxis(by_class.values(), left, width - _RIGHT)
    high = height - bottom - 14

    def up(share: float) -> float:
        return 14 + high * (1 - share)

    marks: list[Child] = [_time_axis(axis, 14, height - bottom)]
    for share in (0.0, 0.5, 0.9, 1.0):
        marks.append(tag("line", x1=left, x2=axis.end, y1=up(share), y2=up(share), class_="axis"))
        marks.append(text(left - 6, up(share) + 4, f"{share * 100:.0f} %", "s e"))
    for name, times in by_class.items():
        points = [f"M{axis.place(times.least):.1f} {up(0):.1f}"]
        for value, share in times.steps():
            points.append(f"H{axis.place(value):.1f}V{up(share):.1f}")
        line = tag("path", d="".join(points), class_=f"line {name}" + _dashed(name))
        median = times.quantile(0.5) or 0
        marks.append(tag("g", tag("title", f"{name}: median {time(median)}"), line))
        marks.append(tag("circle", cx=axis.place(median), cy=up(0.5), r="3", class_=name))
    return svg(width, height, title, marks, fits=True)


def histogram(times: Distribution, class_: str, title: str, *, bars: int = 36) -> Element:
    """How many took how long, in bars of equal width on a logarithmic axis."""
    width, height, left, bottom = FITS, 104.0, _LEFT, _BOTTOM
    axis = _LogAxis([times], left, width - _RIGHT)
    counts = [0] * bars
    before = 0.0
    for value, share in times.steps():
        place = (axis.place(value) - left) / (axis.end - left)
        counts[min(int(place * bars), bars - 1)] += round((share - before) * times.count)
        before = share
    most = max(*counts, 1)
    high = height - bottom - 18
    wide = (axis.end - left) / bars
    marks: list[Child] = [_time_axis(axis, 18, height - bottom)]
    for i, number in enumerate(counts):
        if number:
            tall = max(high * number / most, 1.5)
            bar = tag(
                "rect", tag("title", f"{number:,}"), x=left + i * wide + 0.5,
                y=height - bottom - tall, width=wide - 1, height=tall, class_=class_,
            )  # fmt: skip
            marks.append(bar)
    marks.append(text(left - 6, 24, f"{most:,}", "s e"))
    return svg(width, height, title, marks, fits=True)


def _dashed(name: str) -> str:
    return " dash" if name == PATHS[1] else ""


class _LogAxis:
    """Places times on a logarithmic axis, from the least of all to the greatest."""

    def __init__(self, of: object, start: float, end: float) -> None:
        given = [each for each in of if each.count]  # type: ignore[attr-defined]
        least = max(min((each.least for each in given), default=10**6), 1_000)
        most = max(max((each.most for each in given), default=10**9), least + 1)
        self._low = math.log10(least * 0.9)
        self._high = max(math.log10(most * 1.1), self._low + 0.3)
        self.start = start
        self.end = end

    def place(self, value: float) -> float:
        part = (math.log10(max(value, 1_000)) - self._low) / (self._high - self._low)
        return self.start + min(max(part, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> Iterator[int]:
        steps = (1, 2, 5) if self._high - self._low < 2 else (1,)
        for decade in range(3, 16):
            for step in steps:
                value = step * 10**decade
                if self._low <= math.log10(value) <= self._high:
                    yield value


def _time_axis(axis: _LogAxis, top: float, bottom: float) -> list[Child]:
    marks: list[Child] = []
    for value in axis.ticks():
        x = axis.place(value)
        marks.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="axis"))
        marks.append(text(x, bottom + 18, _short(value), "s m"))
    return marks


def _short(ns: int) -> str:
    for unit, size in (("s", 10**9), ("ms", 10**6), ("µs", 10**3)):
        if ns >= size:
            return f"{ns / size:g} {unit}"
    return f"{ns} ns"


# --- faults ---------------------------------------------------------------------------------------


def fault_axis(faults: Sequence[Injected], end_ns: int) -> Element:
    """Each fault in its row: how long it lasted, and from then until all were served again."""
    shown = sorted(faults, key=lambda fault: fault.at_ns)[:MAX_FAULTS]
    titles = [shortened(f"{each.kind} {', '.join(each.targets)}".strip(), 34) for each in shown]
    left = 24 + CHARACTER * max(map(len, titles), default=0)
    width, row, top = max(left + 620.0, 860.0), 24.0, 16.0
    bottom = top + row * len(shown)
    last = max(end_ns, *(_end_of(fault) for fault in shown), 1)

    def at(ns: float) -> float:
        return left + (width - 40 - left) * ns / last

    marks: list[Child] = []
    for tick in _round_ticks(last):
        marks.append(tag("line", x1=at(tick), x2=at(tick), y1=top - 6, y2=bottom, class_="axis"))
        marks.append(text(at(tick), bottom + 18, f"{tick / 1e9:g} s", "s m"))
    for i, fault in enumerate(shown):
        marks.append(_fault_row(fault, titles[i], left, top + i * row, at, last))
    return svg(width, bottom + 30, "Faults on the run's time axis", marks)


def _fault_row(
    fault: Injected, title: str, left: float, y: float, at: object, last: int
) -> Element:
    place = at
    assert callable(place)
    x = place(fault.at_ns)
    lasted = place(fault.at_ns + (fault.duration_ns or 0)) - x
    if fault.recovery_ns is None:
        after, class_, told = place(last), "failed", "never recovered"
    elif fault.recovery_ns == 0:
        after, class_, told = x + lasted, "good", "nobody was disturbed"
    else:
        after, class_ = place(_end_of(fault)), "good"
        told = f"served again after {time(fault.recovery_ns)}"
    full = f"{fault.kind} {', '.join(fault.targets)} at {instant(fault.at_ns)}: {told}"
    right = after > left + 0.8 * (place(last) - left)
    return tag(
        "g",
        tag("title", f"{full}. {fault.text}".strip()),
        text(left - 12, y + 15, title, "e"),
        tag("rect", x=x, y=y + 4, width=max(lasted, 3.0), height=14.0, class_="soft", rx="2"),
        tag(
            "rect",
            x=x + lasted,
            y=y + 8,
            width=max(after - x - lasted, 0.0),
            height=6.0,
            class_=class_,
        ),
        text(x - 6 if right else after + 8, y + 15, told, "s e" if right else "s"),
    )


def _end_of(fault: Injected) -> int:
    return fault.at_ns + (fault.duration_ns or 0) + (fault.recovery_ns or 0)


def _round_ticks(last: int) -> Iterator[int]:
    step = 10**9
    for factor in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1_800, 3_600, 7_200, 36_000, 86_400):
        step = factor * 10**9
        if last / step <= 12:
            break
    yield from range(0, last + 1, step)
