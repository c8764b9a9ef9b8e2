"""The chosen session packet by packet, as a sequence diagram: a line for each host and NAT, time
downwards, an arrow for each packet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from simulations.report.charts import shortened, svg, text
from simulations.report.markup import Child, Element, tag
from simulations.report.wording import instant
from simulations.result import Step

MAX_STEPS: Final = 240
"""Steps that are drawn; the table below the drawing has more."""
MAX_LIFELINES: Final = 9
ROW: Final = 22.0
COLOURED: Final = frozenset({"drop", "wireguard", "turn", "channel"})


def sequence(steps: Sequence[Step]) -> Element:
    """The drawing, of the first MAX_STEPS steps."""
    shown = steps[:MAX_STEPS]
    names = lifelines(shown)
    left, apart, top = 96.0, max(150.0, min(210.0, 1_050.0 / max(len(names), 1))), 34.0
    place = {name: left + apart * (i + 0.5) for i, name in enumerate(names)}
    bottom = top + ROW * (len(shown) + 1)
    marks: list[Child] = []
    for name in names:
        x = place[name]
        marks.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="axis"))
        marks.append(text(x, 18, shortened(name, 24), "m b"))
    before = ""
    for i, step in enumerate(shown):
        y = top + ROW * (i + 1)
        at = instant(step.at_ns)
        if at != before:
            marks.append(text(left - 4, y + 4, at, "s e"))
        before = at
        marks.append(_step(step, y, place, left + apart * len(names)))
    return svg(left + apart * len(names) + 10, bottom + 6, "The session, packet by packet", marks)


def lifelines(steps: Sequence[Step]) -> list[str]:
    """Who takes part, in the order in which they first appear; the busiest where there are many."""
    seen: dict[str, int] = {}
    for step in steps:
        for name in (step.where, step.peer):
            if name:
                seen[name] = seen.get(name, 0) + 1
    busiest = sorted(seen, key=lambda name: -seen[name])[:MAX_LIFELINES]
    return [name for name in seen if name in busiest]


def _step(step: Step, y: float, place: dict[str, float], end: float) -> Element:
    kind = step.kind if step.kind in COLOURED else ""
    size = f", {step.size} B" if step.size else ""
    told = f"{instant(step.at_ns)} {step.kind} {step.where} → {step.peer}: {step.text}{size}"
    label = shortened(f"{step.kind}: {step.text}" if step.text else step.kind, 60)
    one, other = place.get(step.where), place.get(step.peer)
    if one is None and other is None:
        return tag("g", tag("title", told), text(end / 2, y + 4, label, "s m"))
    if one is None or other is None or one == other:
        x = one if one is not None else other
        assert x is not None
        class_ = f"head {kind}".strip()
        return tag(
            "g",
            tag("title", told),
            tag("circle", cx=x, cy=y, r="4", class_=class_),
            text(x + 9, y + 4, label, "s"),
        )
    way = 1 if other > one else -1
    line = tag("line", x1=one, x2=other - 5 * way, y1=y, y2=y, class_=f"arrow {kind}".strip())
    if step.kind == "drop":
        middle = (one + other) / 2
        cross = f"M{middle - 5:.1f} {y - 5:.1f}l10 10M{middle - 5:.1f} {y + 5:.1f}l10 -10"
        ends: Child = tag("path", d=cross, class_="arrow drop")
    else:
        head = f"M{other:.1f} {y:.1f}l{-8 * way} -4v8Z"
        ends = tag("path", d=head, class_=f"head {kind}".strip())
    at = min(one, other) + 8
    return tag("g", tag("title", told), line, ends, text(at, y - 4, label, "s"))
