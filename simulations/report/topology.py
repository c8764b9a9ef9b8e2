"""The topology as inline SVG: the internet at the left, networks behind it, hosts at the right.

Large ones are drawn by kind: networks that differ in nothing but their names, with clients alone on
them, become one box with a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import attrs

from simulations.report.charts import CHARACTER, shortened, svg, text
from simulations.report.markup import Child, Element, tag
from simulations.result import Node

MAX_DRAWN: Final = 160
"""Nodes that are drawn one by one; with more, those that are alike are one."""
MAX_ROWS: Final = 200
ROW: Final = 40.0
GAP: Final = 64.0
SYMBOLS: Final = {
    "portal": "M0 -8L8 0L0 8L-8 0Z",
    "relay": "M0 -8L8 7L-8 7Z",
    "gateway": "M-7 -7H7V7H-7Z",
    "client": "M7 0A7 7 0 1 1 -7 0A7 7 0 1 1 7 0Z",
    "service": "M-4 -7H4L8 0L4 7H-4L-8 0Z",
}
COLOURS: Final = {
    "portal": "good",
    "relay": "relayed",
    "gateway": "direct",
    "client": "soft",
    "service": "denied",
}


@attrs.define
class _Place:
    """A node in the tree; `times` of it are drawn as one."""

    node: Node
    inner: list[_Place] = attrs.Factory(list)
    times: int = 1
    hosts: int = 0
    x: float = 0.0
    y: float = 0.0


def topology(nodes: Sequence[Node]) -> Element:
    """The drawing, of what `Result.nodes` says."""
    root = _tree(nodes)
    if len(nodes) > MAX_DRAWN:
        _fold(root)
        _multiply(root)
    rows = list(_in_rows(root))
    cut = max(len(rows) - MAX_ROWS, 0)
    columns = _columns(root)
    height = ROW * min(len(rows), MAX_ROWS) + 24
    marks: list[Child] = [_wires(root, height), _boxes(root, height)]
    if cut:
        marks.append(text(12, height + 14, f"and {cut} more rows that are not drawn", "s"))
        height += 20
    return svg(columns, height, "Topology", marks)


def legend(nodes: Iterable[Node]) -> Element:
    """What the symbols mean, of those that occur."""
    present = {node.kind for node in nodes}
    entries = [
        tag(
            "li",
            tag(
                "svg",
                tag("path", d=path, class_=COLOURS[kind], transform="translate(9 9)"),
                width="18",
                height="18",
                aria_hidden="true",
            ),
            kind,
        )
        for kind, path in SYMBOLS.items()
        if kind in present
    ]
    return tag("ul", entries, class_="legend")


def _tree(nodes: Sequence[Node]) -> _Place:
    root = _Place(Node(name="internet", kind="network"))
    places = {node.name: _Place(node) for node in nodes}
    places.setdefault("internet", root)
    root = places["internet"]
    for node in nodes:
        if node.name == "internet":
            continue
        outer = places.get(node.behind, root)
        if outer is not places[node.name]:
            outer.inner.append(places[node.name])
    return root


def _fold(place: _Place) -> None:
    """Make one of what is alike, from the inside outwards."""
    for inner in place.inner:
        _fold(inner)
    kept: dict[tuple[object, ...], _Place] = {}
    folded: list[_Place] = []
    for inner in place.inner:
        shape = _shape(inner)
        if shape is None:
            folded.append(inner)
        elif shape in kept:
            kept[shape].times += inner.times
        else:
            kept[shape] = inner
            folded.append(inner)
    place.inner = folded


def _multiply(place: _Place) -> None:
    """What is within so many is there so many times."""
    for inner in place.inner:
        inner.times *= place.times
        _multiply(inner)


def _shape(place: _Place) -> tuple[object, ...] | None:
    """What makes it the same as others; None for what is always drawn by itself."""
    if place.node.kind in ("portal", "relay", "gateway", "service"):
        return None
    shapes = [_shape(inner) for inner in place.inner]
    if None in shapes:
        return None
    counts = tuple(inner.times for inner in place.inner)
    return (place.node.kind, place.node.label, tuple(shapes), counts)


def _in_rows(root: _Place) -> Iterator[_Place]:
    """Gives every leaf a row and every network the middle of its own; yields the leaves."""
    row = 0
    stack: list[tuple[_Place, bool]] = [(root, False)]
    while stack:
        place, seen = stack.pop()
        if seen:
            place.y = (place.inner[0].y + place.inner[-1].y) / 2
        elif not place.inner:
            place.y = 12 + ROW * (row + 0.5)
            row += 1
            yield place
        else:
            stack.append((place, True))
            # Hosts first, then the networks behind.
            ordered = sorted(place.inner, key=lambda each: each.node.kind == "network")
            place.inner = ordered
            stack.extend((inner, False) for inner in reversed(ordered))


def _columns(root: _Place) -> float:
    """Gives every node its x; returns the width of all."""
    level, x, width = [root], 12.0, 0.0
    while level:
        for place in level:
            place.x = x
        widest = max(_width(place) for place in level)
        width = max(width, x + widest)
        level = [inner for place in level for inner in place.inner]
        x += min(widest, 260.0) + GAP
    return width + 12


def _title(place: _Place) -> str:
    node = place.node
    if place.times > 1:
        what = node.kind if node.kind != "network" else (node.label or "network")
        return f"{place.times:,} × {what}"
    return node.name


def _under(place: _Place) -> str:
    is_plain_network = place.node.kind == "network" and place.times == 1
    return shortened(place.node.label, 40) if is_plain_network else ""


def _width(place: _Place) -> float:
    longest = max(len(shortened(_title(place), 44)), len(_under(place)))
    return longest * CHARACTER + (20 if place.node.kind == "network" else 24)


def _all(root: _Place) -> Iterator[_Place]:
    stack = [root]
    while stack:
        place = stack.pop()
        yield place
        stack.extend(place.inner)


def _wires(root: _Place, height: float) -> list[Child]:
    marks: list[Child] = []
    for place in _all(root):
        start = place.x + _width(place)
        for inner in place.inner:
            if inner.y > height:
                continue
            middle = start + (inner.x - start) / 2
            path = (
                f"M{start:.1f} {place.y:.1f}C{middle:.1f} {place.y:.1f} {middle:.1f} {inner.y:.1f} "
            )
            marks.append(tag("path", d=f"{path}{inner.x:.1f} {inner.y:.1f}", class_="wire"))
    return marks


def _boxes(root: _Place, height: float) -> list[Child]:
    marks: list[Child] = []
    for place in _all(root):
        if place.y > height:
            continue
        title, under, x, y = shortened(_title(place), 44), _under(place), place.x, place.y
        told = f"{place.node.kind} {place.node.name} {place.node.label}".strip()
        if place.node.kind == "network":
            tall = 28.0 if under else 22.0
            box = tag(
                "rect", x=x, y=y - tall / 2, width=_width(place), height=tall, rx="6", class_="box"
            )
            name = text(x + 10, y - 1 if under else y + 4, title, "b" if under else "")
            label = text(x + 10, y + 11, under, "s") if under else None
            marks.append(tag("g", tag("title", told), box, name, label))
        else:
            symbol = tag(
                "path",
                d=SYMBOLS[place.node.kind],
                class_=COLOURS[place.node.kind],
                transform=f"translate({x + 8:.1f} {y:.1f})",
            )
            marks.append(tag("g", tag("title", told), symbol, text(x + 22, y + 4, title)))
    return marks
