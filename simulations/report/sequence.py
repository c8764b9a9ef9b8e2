"""The chosen session packet by packet, as a sequence diagram: a line for each host and NAT, time
downwards, an arrow for each packet from where it was sent to where it came or was dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from simulations.report.charts import shortened, svg, text
from simulations.report.markup import Child, Element, tag
from simulations.report.wording import instant, time
from simulations.result import Step

MAX_FLIGHTS: Final = 240
"""Packets that are drawn; the table below the drawing has more."""
MAX_LIFELINES: Final = 10
ROW: Final = 22.0
COLOURED: Final = frozenset({"drop", "wireguard", "turn", "channel"})
_VERBS: Final = ("sent", "translated", "delivered", "dropped")


@attrs.define(kw_only=True)
class Flight:
    """One packet, or something else that happened (`hops` are empty or one). `over_ns`: when it
    was delivered or dropped; None if that was not seen."""

    at_ns: int
    kind: str
    label: str
    size: int = 0
    hops: list[str] = attrs.Factory(list)
    over_ns: int | None = None
    why: str = ""
    peer: str = ""
    seen_ns: int = 0


def flights(steps: Sequence[Step]) -> list[Flight]:
    """Steps tell of a packet at each place that it passes; here these are one. A packet is known
    again by what it is, its size and its peer. Of several alike it is the one that was just seen
    (the next place may be no time away), or else the one that was sent first."""
    found: list[Flight] = []
    open_by_key: dict[tuple[str, int], list[Flight]] = {}
    for step in steps:
        verb, _, rest = step.text.partition(" ")
        if verb not in _VERBS:
            hops = [name for name in (step.where, step.peer) if name]
            label = step.text
            found.append(Flight(at_ns=step.at_ns, kind=step.kind, label=label, hops=hops))
            continue
        label, _, why = rest.partition("(") if verb == "dropped" else (rest, "", "")
        waiting = open_by_key.setdefault((label.strip(), step.size), [])
        flight = None if verb == "sent" else _known_again(step, waiting)
        if flight is None:
            if step.kind == "channel" and verb != "sent":
                continue  # a part of what a stream had put together
            known = [] if verb == "sent" else [step.peer]
            flight = Flight(
                at_ns=step.at_ns,
                kind=step.kind,
                label=label.strip(),
                size=step.size,
                hops=[*known, step.where],
            )
            found.append(flight)
            waiting.append(flight)
        elif step.where != flight.hops[-1]:
            flight.hops.append(step.where)
        flight.peer, flight.seen_ns = step.peer, step.at_ns
        if verb in ("delivered", "dropped"):
            flight.over_ns, flight.why = step.at_ns, why.rstrip(") ")
            if verb == "dropped":
                flight.kind = "drop"
            waiting.remove(flight)
    return found


def _known_again(step: Step, waiting: Sequence[Flight]) -> Flight | None:
    possible = [one for one in waiting if one.hops[-1] != step.where]
    ranked = sorted(possible, key=lambda one: (one.peer != step.peer, one.seen_ns != step.at_ns))
    return ranked[0] if ranked else None


def sequence(steps: Sequence[Step]) -> Element:
    """The drawing, of the first MAX_FLIGHTS packets."""
    shown = flights(steps)[:MAX_FLIGHTS]
    names = lifelines(shown)
    left, apart, top = 96.0, max(150.0, min(230.0, 1_050.0 / max(len(names), 1))), 34.0
    place = {name: left + apart * (i + 0.5) for i, name in enumerate(names)}
    end = left + apart * len(names)
    bottom = top + ROW * (len(shown) + 1)
    marks: list[Child] = []
    for name in names:
        x = place[name]
        marks.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="axis"))
        marks.append(text(x, 18, shortened(name, 24), "m b"))
    before = ""
    for i, flight in enumerate(shown):
        y = top + ROW * (i + 1)
        at = instant(flight.at_ns)
        if at != before:
            marks.append(text(left - 4, y + 4, at, "s e"))
        before = at
        marks.append(_arrow(flight, y, place, end))
    return svg(end + 10, bottom + 6, "The session, packet by packet", marks)


def lifelines(shown: Sequence[Flight]) -> list[str]:
    """Who takes part, in the order in which they first appear; the busiest where there are many."""
    seen: dict[str, int] = {}
    for flight in shown:
        for name in flight.hops:
            seen[name] = seen.get(name, 0) + 1
    busiest = sorted(seen, key=lambda name: -seen[name])[:MAX_LIFELINES]
    return [name for name in seen if name in busiest]


def _arrow(flight: Flight, y: float, place: dict[str, float], end: float) -> Element:
    label = flight.label or ("stream data" if flight.kind == "channel" else flight.kind)
    size = f", {flight.size} B" if flight.size else ""
    title = tag("title", _told(flight, size))
    xs = [place[name] for name in flight.hops if name in place]
    if not xs:
        return tag("g", title, text(end / 2, y + 4, shortened(label, 80), "s m"))
    kind = flight.kind if flight.kind in COLOURED else ""
    class_ = f"head {kind}".strip()
    first, last = xs[0], xs[-1]
    if first == last:
        dot = tag("circle", cx=first, cy=y, r="4", class_=class_)
        return tag("g", title, dot, text(first + 9, y + 4, shortened(label, 40), "s"))
    way = 1 if last > first else -1
    line = tag("line", x1=first, x2=last - 5 * way, y1=y, y2=y, class_=f"arrow {kind}".strip())
    nats = [tag("circle", cx=x, cy=y, r="2.5", class_=class_) for x in xs[1:-1]]
    if flight.kind == "drop":
        cross = f"M{last - 5:.1f} {y - 5:.1f}l10 10M{last - 5:.1f} {y + 5:.1f}l10 -10"
        ends: Child = tag("path", d=cross, class_="arrow drop")
        label = f"{label} ✗ {flight.why}"
    else:
        ends = tag("path", d=f"M{last:.1f} {y:.1f}l{-8 * way} -4v8Z", class_=class_)
    room = int(abs(last - first) / 6)
    below = text(min(first, last) + 8, y - 4, shortened(label + size, max(room, 12)), "s")
    return tag("g", title, line, nats, ends, below)


def _told(flight: Flight, size: str) -> str:
    took = "" if flight.over_ns is None else f" in {time(flight.over_ns - flight.at_ns)}"
    why = f", dropped: {flight.why}" if flight.kind == "drop" else ""
    way = " → ".join(flight.hops)
    return f"{instant(flight.at_ns)} {flight.kind} {flight.label}{size}: {way}{took}{why}"
