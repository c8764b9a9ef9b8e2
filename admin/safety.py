"""Texts from a portal before they reach a terminal: whatever could steer it is taken out."""

from __future__ import annotations

import re
from typing import Final

# C0 and C1 controls, DEL, marks that turn the direction of writing, line and paragraph separators.
UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_SPACES: Final = {"\n": " ", "\t": " ", "\r": " "}


def printable(text: str) -> str:
    """The text on one line, without control characters."""
    return UNSAFE.sub(lambda found: _SPACES.get(found[0], ""), text)


def escaped(json_text: str) -> str:
    """JSON with those of its characters escaped that a terminal would obey. It means the same."""
    return UNSAFE.sub(
        lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", json_text
    )
