"""From what TOML says to the classes of `schema`, strictly, and with everything that is wrong.

A reader that stops at the first mistake makes people run it ten times. This one goes on: each
mistake is a `Problem` with its place, and what cannot be read has no value.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import attrs
import msgspec

from simulations.scenario import schema, units

T = TypeVar("T")

MAX_PROBLEMS: Final = 1_000
"""After so many the reader stops noting them."""
MAX_SHOWN: Final = 60
"""Characters of a value that a message repeats."""

MISSING: Final[Any] = object()
"""The value of what could not be read."""


@attrs.frozen
class Problem:
    """Something that is wrong: `place` as in `networks[2].nat.timeout`, counted from 0, and what to
    do about it."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}" if self.place else self.text


class Problems:
    """Those found so far, at most MAX_PROBLEMS.

    `unread` are the names of entries that could not be read, so that whoever refers to them is not
    told that they do not exist; `kept` has the numbers in the file of the others of such a list."""

    def __init__(self) -> None:
        self.found: list[Problem] = []
        self.total = 0
        self.unread: set[str] = set()
        self.kept: dict[str, list[int]] = {}

    def note(self, place: str, text: str) -> None:
        self.total += 1
        if len(self.found) < MAX_PROBLEMS:
            self.found.append(Problem(place, text))

    def numbered(self, entries: Sequence[T], place: str) -> Iterator[tuple[str, T]]:
        """Each entry of a list that was read, with its place in the file."""
        numbers = self.kept.get(place)
        for i, entry in enumerate(entries):
            yield f"{place}[{i if numbers is None else numbers[i]}]", entry


def read(raw: Any, wanted: Any, place: str, problems: Problems) -> Any:
    """`raw` as `wanted`, a type as `schema` uses them; MISSING where that cannot be."""
    if wanted == schema.Quantity or wanted == schema.Share:
        raise AssertionError("quantities are read by the class that they are in")
    plain, meta = _without_meta(wanted)
    if attrs.has(plain):
        return _read_class(raw, plain, place, problems)
    if get_origin(plain) in (Union, UnionType):
        # TOML has no null: what is None is left out. "" stands for "none" where it may.
        some = [each for each in get_args(plain) if each not in (NoneType, Literal[""])]
        if raw == "" and Literal[""] in get_args(plain):
            return raw
        if len(some) == 1:
            return read(raw, some[0], place, problems)
    if get_origin(plain) is tuple and get_args(plain)[-1] is Ellipsis:
        return _read_list(raw, get_args(plain)[0], meta, place, problems)
    return _read_value(raw, wanted, place, problems)


def quantity_reader(name: str, hint: Any) -> Callable[[Any], int] | None:
    """What reads the quantity of a field of that name and type; None for another field."""
    if hint == schema.Share:
        return units.share_ppm
    if hint != schema.Quantity:
        return None
    return _READERS.get(name, units.duration_ns)


_READERS: Final[dict[str, Callable[[Any], int]]] = {
    "bandwidth": units.rate_bit_per_s,
    "queue": units.size_bytes,
    "offset": units.signed_duration_ns,
}


@cache
def hints(wanted: type) -> dict[str, Any]:
    """The types of a class's fields, with their limits."""
    return get_type_hints(wanted, include_extras=True)


def suggestion(name: str, known: Iterable[str]) -> str:
    """A clause about the known name that is nearest, if one is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def shown(value: object) -> str:
    """A value as a message repeats it."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


# --- the kinds of things ------------------------------------------------------------------------


def _read_class(raw: Any, wanted: Any, place: str, problems: Problems) -> Any:
    if not isinstance(raw, dict):
        problems.note(place, f"must be a table, and is {_kind(raw)}")
        return MISSING
    fields = {field.name: field for field in attrs.fields(wanted)}
    inside = f"{place}." if place else ""
    for key in raw:
        if key not in fields:
            near = suggestion(key, fields)
            problems.note(inside + key[:MAX_SHOWN], f"there is no such key here{near}")
    values: dict[str, Any] = {}
    complete = True
    for name, field in fields.items():
        if name not in raw:
            if field.default is attrs.NOTHING:
                problems.note(inside + name, "is missing, and there is no default")
                complete = False
            continue
        value = _read_field(raw[name], wanted, field, inside + name, problems)
        if value is not MISSING:
            values[name] = value
        elif field.default is attrs.NOTHING or wanted not in _CONTAINERS:
            complete = False
    return wanted(**values) if complete else MISSING


_CONTAINERS: Final = (schema.Scenario, schema.Account)
"""What is read although a part of it could not be, for the sake of the other parts."""


def _read_field(raw: Any, owner: Any, field: Any, place: str, problems: Problems) -> Any:
    hint = hints(owner)[field.name]
    reader = quantity_reader(field.name, hint)
    if reader is None:
        return read(raw, hint, place, problems)
    value = _read_value(raw, hint, place, problems)
    if value is MISSING or value == field.default:
        return value
    try:
        reader(value)
    except ValueError as error:
        problems.note(place, str(error))
        return MISSING
    return value


def _read_list(raw: Any, each: Any, meta: Any, place: str, problems: Problems) -> Any:
    if not isinstance(raw, list):
        problems.note(place, f"must be a list, and is {_kind(raw)}")
        return MISSING
    if meta is not None and meta.max_length is not None and len(raw) > meta.max_length:
        problems.note(place, f"has {len(raw)} entries; at most {meta.max_length} are taken")
        return MISSING
    values = [read(one, each, f"{place}[{i}]", problems) for i, one in enumerate(raw)]
    kept = [i for i, value in enumerate(values) if value is not MISSING]
    if len(kept) < len(values):
        problems.kept[place] = kept
        unread = (raw[i] for i, value in enumerate(values) if value is MISSING)
        names = (one["name"] if isinstance(one, dict) and "name" in one else one for one in unread)
        problems.unread.update(name for name in names if isinstance(name, str))
    return tuple(values[i] for i in kept)


def _read_value(raw: Any, wanted: Any, place: str, problems: Problems) -> Any:
    if foreign := next(_foreign(raw), ""):
        problems.note(place, foreign)
        return MISSING
    try:
        return msgspec.convert(raw, wanted)
    except (msgspec.ValidationError, OverflowError) as error:
        problems.note(place, _reason(raw, wanted, str(error)))
        return MISSING


def _foreign(raw: Any) -> Iterator[str]:
    """What TOML can say and a scenario cannot: dates, and numbers that are none."""
    match raw:
        case dict():
            for each in raw.values():
                yield from _foreign(each)
        case list():
            for each in raw:
                yield from _foreign(each)
        case float() if not math.isfinite(raw):
            yield f"{raw} is no number that can be worked with"
        case bool() | int() | float() | str():
            pass
        case _:
            yield f"write dates and times as text: {shown(str(raw))}"


def _reason(raw: Any, wanted: Any, said: str) -> str:
    """What is wrong with a value, by its type where a type says more than msgspec."""
    if choices := _choices(wanted):
        near = suggestion(raw, choices) if isinstance(raw, str) else ""
        known = ", ".join(choices)
        return f"{shown(raw)} is none of: {known}{near}"
    if "matching regex" in said and isinstance(raw, str):
        if _PATTERN_OF_NAMES in said:
            return f"{shown(raw)} is no name: lower-case letters, digits, - and _, at most 63"
        return f"{shown(raw)} is not written like that ({re.sub(r'Expected ', '', said)})"
    text = said.replace("`str`", "text").replace("`", "")
    return f"{text[0].lower()}{text[1:]}, and this is {shown(raw)}"


_PATTERN_OF_NAMES: Final = "^[a-z0-9][a-z0-9_-]{0,62}$"


def _choices(wanted: Any) -> list[str]:
    plain, _ = _without_meta(wanted)
    if get_origin(plain) is Literal:
        return [str(each) or '""' for each in get_args(plain)]
    return []


def _without_meta(wanted: Any) -> tuple[Any, Any]:
    if get_origin(wanted) is Annotated:
        plain, *annotations = get_args(wanted)
        return plain, next((each for each in annotations if isinstance(each, msgspec.Meta)), None)
    return wanted, None


def _kind(raw: Any) -> str:
    match raw:
        case dict():
            return "a table"
        case list():
            return "a list"
        case str():
            return f"the text {shown(raw)}"
    return shown(raw)
