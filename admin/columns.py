"""Which columns of a table a narrow terminal gets to see, and how much of what is in them. A
function of the cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import attrs

GAP: Final = 2
"""Spaces between two columns."""
MAX_FITTED: Final = 40
"""Characters of one cell, where not all of the table fits."""
ID_TAIL: Final = 12
"""Characters of the id of another thing, where not all fits: its random end, since ids of one time
begin alike."""
ID_COLUMN: Final = "id"
HANDLES: Final = ("id", "number", "name")
"""Columns by which a row is named: one of them always stays."""

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@attrs.define
class Column:
    """A column by the name of its field, with its heading and its cells."""

    name: str
    heading: str
    cells: list[str]

    @property
    def width(self) -> int:
        return max(map(len, (self.heading, *self.cells)))


def fitted(columns: Sequence[Column], width: int) -> tuple[list[Column], list[str]]:
    """What is shown within so many characters, and the headings of what is left out.

    As it is, if it fits. Else long cells and ids of other things are cut; then the row's own id
    goes where its names say as much; then what is the same in several rows; then columns from the
    right. What is left may still be too wide: the names of rows are never cut.
    """
    kept = [Column(each.name, each.heading, list(each.cells)) for each in columns]
    if _fits(kept, width):
        return kept, []
    for column in kept:
        if column.name not in HANDLES:
            column.cells = [_cut(cell) for cell in column.cells]
    for name in (*_needless_handles(kept), *_monotonous(kept), *_from_the_right(kept)):
        if _fits(kept, width):
            break
        kept = [each for each in kept if each.name != name]
    names = {each.name for each in kept}
    return kept, [each.heading for each in columns if each.name not in names]


def _fits(columns: Sequence[Column], width: int) -> bool:
    return sum(each.width for each in columns) + GAP * (len(columns) - 1) <= width


def _cut(cell: str) -> str:
    if _ID.fullmatch(cell):
        return "…" + cell[-ID_TAIL:]
    return cell[: MAX_FITTED - 1] + "…" if len(cell) > MAX_FITTED else cell


def _needless_handles(columns: Sequence[Column]) -> list[str]:
    """The id, where no two rows have one name."""
    for column in columns:
        is_clear = all(column.cells) and len(set(column.cells)) == len(column.cells)
        if column.name == "name" and is_clear:
            return [ID_COLUMN]
    return []


def _monotonous(columns: Sequence[Column]) -> list[str]:
    """What says the same of each of several rows, from the right."""
    return [
        each.name
        for each in reversed(columns)
        if each.name not in HANDLES and len(each.cells) > 1 and len(set(each.cells)) == 1
    ]


def _from_the_right(columns: Sequence[Column]) -> list[str]:
    return [each.name for each in reversed(columns) if each.name not in HANDLES]
