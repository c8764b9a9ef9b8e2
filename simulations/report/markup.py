"""HTML and SVG as a tree, of which everything that is text is escaped: there is no way to say
markup as text. Names of elements and attributes are constants of this package.

    tag("p", "a < b", class_="note")        <p class="note">a &lt; b</p>
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from html import escape
from typing import Final, Union

import attrs

from admin.safety import UNSAFE
from simulations.report.style import STYLE

VOID: Final = frozenset({"meta", "br", "hr", "col"})
_ATTRIBUTE: Final = re.compile(r"[a-z][A-Za-z0-9_:-]*", re.ASCII)

Child = Union["Element", str, int, None, Iterable["Child"]]


@attrs.frozen
class Element:
    """One element, with attributes in order."""

    name: str
    attributes: tuple[tuple[str, str], ...]
    children: tuple[Child, ...]


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Element:
    """An element. `class_` is `class`, `stroke_width` is `stroke-width`; None and False are left
    out, and True is an attribute without a value."""
    found = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        written = key.rstrip("_").replace("_", "-")
        assert _ATTRIBUTE.fullmatch(written), written
        found.append((written, "" if value is True else _figure(value)))
    return Element(name, tuple(found), children)


def render(element: Element) -> str:
    """The element as text."""
    return "".join(_pieces(element))


def _pieces(child: Child) -> Iterator[str]:
    if isinstance(child, Element):
        attributes = "".join(f' {key}="{_text(value)}"' for key, value in child.attributes)
        yield f"<{child.name}{attributes}>"
        if child.name in VOID:
            return
        if child.name == "style":  # raw text by the rules of HTML, and a constant of ours
            yield from (STYLE, "</style>")
            return
        for inner in child.children:
            yield from _pieces(inner)
        yield f"</{child.name}>"
    elif isinstance(child, (str, int)):
        yield _text(str(child))
    elif child is not None:
        for inner in child:
            yield from _pieces(inner)


def _text(text: str) -> str:
    """Escaped, and without characters that a page cannot hold or that turn its writing about."""
    return escape(UNSAFE.sub(lambda found: found[0] if found[0] in "\n\t" else "\ufffd", text))


def _figure(value: str | float) -> str:
    """Coordinates to a tenth, which is enough on any screen."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
