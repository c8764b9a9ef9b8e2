"""What is printed: a table for people, JSON or YAML for programs. All of it is safe for a terminal
(see `safety`), whatever a portal says."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, TextIO

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from admin.columns import Column, fitted
from admin.description import Field
from admin.safety import UNSAFE, escaped, printable

Format = Literal["table", "wide", "json", "yaml"]
TABLES: Final = ("table", "wide")
"""For people; a wide one has all columns, whole, however narrow the terminal is."""
QUIET: Final = ("account_id", "created_at", "device_key")
"""Columns that only a wide table of many has room for."""
FIRST: Final = ("id", "number", "name")
MAX_CELL: Final = 80
"""Characters of what has no simple form, in a table of many."""
WIDE: Final = 10_000
"""Columns of what is no terminal, so that a line stays a line."""
CHANGE: Final = {"before", "after"}
"""Fields that a table of many shows as the one column `change`: what became of what."""

_FRACTION = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.\d+(Z|[+-]\d\d:\d\d)")
"""Of an instant: in a table seconds are enough."""

Label = Callable[[Field, str], str]


def show_many(
    items: Sequence[Mapping[str, Any]], fields: Sequence[Field], format: Format, label: Label
) -> None:
    """Print things of one kind."""
    if format not in TABLES:
        _show_plain(list(items), format)
        return
    fields = fields or _fields_of(items)
    if {field.name for field in fields} >= CHANGE:
        items = [dict(item, change=_change(item)) for item in items]
        fields = [field for field in fields if field.name not in CHANGE]
        fields.append(Field(name="change", kind="string"))
    columns = [
        field
        for field in sorted(_named_once(fields), key=_place)
        if (format == "wide" or field.name not in QUIET)
        and any(_is_told(item.get(field.name)) for item in items)
    ]
    if not items:
        print("none", file=sys.stderr)  # noqa: T201  # beside the output, which is empty
        return
    cells = [
        Column(
            field.name,
            _heading(field),
            [_short(field, item.get(field.name), label) for item in items],
        )
        for field in columns
    ]
    width = WIDE if format == "wide" else console().width
    shown, left_out = fitted(cells, width)
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in shown:
        table.add_column(Text(column.heading), overflow="fold", no_wrap=False)
    for row in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*map(Text, row))
    _print(table, width)
    if left_out:
        print(f"not shown (-o wide): {', '.join(left_out)}", file=sys.stderr)  # noqa: T201


def show_one(
    item: Mapping[str, Any], fields: Sequence[Field], format: Format, label: Label
) -> None:
    """Print one thing: its fields, one below the other."""
    if format not in TABLES:
        _show_plain(item, format)
        return
    known = {field.name: field for field in fields}
    table = Table(box=None, pad_edge=False, show_header=False, show_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    token = item.get("token")
    item = {name: value for name, value in item.items() if name != "token"}
    order = {name: place for place, name in enumerate(known)}
    shown = [known.get(name) or Field(name=name, kind="json") for name in item]
    for field in sorted(shown, key=lambda each: (_place(each), order.get(each.name, len(order)))):
        value = item[field.name]
        cell = "\n".join(_outline(value, label)) if _is_deep(value) else _cell(field, value, label)
        table.add_row(Text(_heading(field)), Text(cell))
    _print(table)
    if token is not None:  # in one piece, so that it can be copied
        print(f"token: {printable(str(token))}")  # noqa: T201


def to_second(text: str) -> str:
    """An instant without the fraction of its second; another text as it is."""
    return _FRACTION.sub(r"\1\2", text) if _FRACTION.fullmatch(text) else text


def show_event(event: Mapping[str, Any], format: Format) -> None:
    """Print one event of a stream: a line, or a YAML document."""
    if format == "yaml":
        _show_plain(event, format)
        print("---")  # noqa: T201
    else:
        print(escaped(json.dumps(event, ensure_ascii=False)), flush=True)  # noqa: T201


def console(file: TextIO | None = None) -> Console:
    """Prints as wide as the terminal is; what is none gets every line whole."""
    file = file or sys.stdout
    is_narrow = file.isatty() or "COLUMNS" in os.environ
    return Console(
        file=file, width=None if is_narrow else WIDE, highlight=False, emoji=False, markup=False
    )


def _print(table: Table, width: int | None = None) -> None:
    """Without the spaces that fill up the last column."""
    out = console()
    out.width = width or out.width
    with out.capture() as captured:
        out.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())  # noqa: T201


def _place(field: Field) -> int:
    return FIRST.index(field.name) if field.name in FIRST else len(FIRST)


def _short(field: Field, value: Any, label: Label) -> str:
    if isinstance(value, dict) and _is_deep(value):
        return ", ".join(printable(name) for name, each in value.items() if _is_told(each))
    cell = _cell(field, value, label)
    return cell[: MAX_CELL - 1] + "…" if field.kind == "json" and len(cell) > MAX_CELL else cell


def _show_plain(value: Any, format: Format) -> None:
    if format == "json":
        print(escaped(json.dumps(value, ensure_ascii=False, indent=2)))  # noqa: T201
        return
    is_safe = not any(UNSAFE.search(text) for text in _texts(value))
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=is_safe, width=100)
    print(text, end="")  # noqa: T201


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield str(name)
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _fields_of(items: Sequence[Mapping[str, Any]]) -> list[Field]:
    names = dict.fromkeys(name for item in items for name in item)
    return [Field(name=name, kind="json") for name in names]


def _named_once(fields: Sequence[Field]) -> list[Field]:
    """Without the `resource_name` beside a `resource_id` that is shown as its name anyway."""
    labelled = {field.name.removesuffix("_id") for field in fields if field.refers is not None}
    return [field for field in fields if field.name.removesuffix("_name") not in labelled]


def _change(item: Mapping[str, Any]) -> str:
    """What became of a thing: made, removed, or which of its fields are what now."""
    before, after = item.get("before"), item.get("after")
    if not isinstance(before, dict) or not isinstance(after, dict):
        known, word = (after, "made") if isinstance(after, dict) else (before, "removed")
        name = known.get("name") if isinstance(known, dict) else None
        return f"{word} {name}" if name else word
    changed = [name for name in after if after[name] != before.get(name)]
    return ", ".join(
        f"{name}: {_brief(before.get(name))} -> {_brief(after[name])}" for name in changed
    )


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text[: MAX_CELL - 1] + "…" if len(text) > MAX_CELL else text


def _is_deep(value: Any) -> bool:
    """Whether a value is better told in several lines: a list of objects, or one in an object."""
    if isinstance(value, list | tuple):
        return any(isinstance(each, dict) for each in value)
    return isinstance(value, dict) and any(isinstance(each, dict | list) for each in value.values())


def _outline(value: Any, label: Label) -> Iterable[str]:
    """A value in lines, as YAML would have it: a line for what has no inner structure."""
    if isinstance(value, list | tuple):
        for each in value:
            lines = list(_outline(each, label)) if _is_deep(each) else [_flat(each, label)]
            yield from (f"{'  ' if place else '- '}{line}" for place, line in enumerate(lines))
        return
    for name, each in value.items():
        if not _is_told(each) or name == "property" or _is_id_beside_name(name, value):
            continue
        title = printable(str(name).removesuffix("_name"))
        if _is_deep(each):
            yield f"{title}:"
            yield from (f"  {line}" for line in _outline(each, label))
        else:
            yield f"{title}: {_flat(each, label)}"


def _flat(value: Any, label: Label) -> str:
    """A value without inner structure in one line; a check begins with how it went."""
    match value:
        case {"property": name, "holds": bool() as holds, **more}:
            detail = f": {_flat(more['detail'], label)}" if more.get("detail") else ""
            return f"{'ok' if holds else 'violated'}  {printable(str(name))}{detail}"
        case {"kind": kind, "id": id, "name": name} if len(value) == 3:
            return printable(f"{kind} {name or id}")
        case dict():
            return ", ".join(_outline(value, label))
        case _:
            return _cell(Field(name="", kind="json"), value, label)


def _is_id_beside_name(name: str, within: Mapping[str, Any]) -> bool:
    return name.endswith("_id") and bool(within.get(f"{name.removesuffix('_id')}_name"))


def _heading(field: Field) -> str:
    name = printable(field.name)
    if field.refers is not None:
        name = name.removesuffix("_id")
        name = f"{name.removesuffix('_ids')}s" if name.endswith("_ids") else name
    return name


def _is_told(value: object) -> bool:
    """Whether a value says more than that there is none."""
    return value is not None and value not in ("", [], {})


def _cell(field: Field, value: Any, label: Label) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case str():
            return printable(to_second(label(field, value)))
        case list() if all(isinstance(each, str | int) for each in value):
            return ", ".join(_cell(field, each, label) for each in value)
        case dict():
            return ", ".join(
                f"{printable(str(name))}: {_cell(field, each, label)}"
                for name, each in value.items()
                if _is_told(each)
            )
        case list():
            return "; ".join(_cell(field, each, label) for each in value)
        case _:
            return printable(str(value))
