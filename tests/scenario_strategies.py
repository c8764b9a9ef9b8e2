"""Scenarios by chance: any that are well formed, whether or not they mean anything."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import attrs
import msgspec
from hypothesis import strategies as st

from simulations.scenario import schema
from simulations.scenario.structure import hints, quantity_reader
from simulations.scenario.units import rate_bit_per_s, share_ppm, size_bytes

NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,5}", fullmatch=True)
DURATIONS = st.builds(
    "{}{}".format, st.integers(0, 999), st.sampled_from(["ns", "us", "ms", "s", "min"])
)
QUANTITIES = {
    rate_bit_per_s: st.builds(
        "{}{}".format, st.integers(1, 999), st.sampled_from(["kbit", "Mbit"])
    ),
    size_bytes: st.builds("{}{}".format, st.integers(1, 999), st.sampled_from(["B", "KiB"])),
    share_ppm: st.builds("{}%".format, st.integers(0, 100)) | st.sampled_from([0.0, 0.25, 1.0]),
}
PLAIN = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=5),
    st.booleans() | st.integers(-9, 9) | st.text(st.characters(codec="utf-8"), max_size=5),
    max_size=2,
)


def scenarios() -> st.SearchStrategy[schema.Scenario]:
    return instances(schema.Scenario)


def instances(wanted: Any) -> st.SearchStrategy[Any]:
    """Any value of a class of the schema; fields with a default are often left at it."""
    fields = {}
    for field in attrs.fields(wanted):
        hint = hints(wanted)[field.name]
        reader = quantity_reader(field.name, hint)
        values = of(hint) if reader is None else QUANTITIES.get(reader, DURATIONS)
        if field.default is attrs.NOTHING:
            fields[field.name] = values
        elif isinstance(field.default, attrs.Factory):
            fields[field.name] = st.builds(field.default.factory) | values
        else:
            fields[field.name] = st.just(field.default) | values
    return st.builds(wanted, **fields)


def of(hint: Any) -> st.SearchStrategy[Any]:
    if hint == schema.Name:
        return NAMES
    meta = None
    if get_origin(hint) is Annotated:
        hint, *annotations = get_args(hint)
        meta = next(each for each in annotations if isinstance(each, msgspec.Meta))
    if attrs.has(hint):
        return instances(hint)
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return st.one_of(*(st.none() if each is NoneType else of(each) for each in get_args(hint)))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if inner[-1] is Ellipsis:
            return st.lists(of(inner[0]), max_size=2).map(tuple)
        return st.tuples(*map(of, inner))
    if get_origin(hint) is dict:
        return PLAIN
    return _scalars(hint, meta)


def _scalars(hint: Any, meta: msgspec.Meta | None) -> st.SearchStrategy[Any]:
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(meta.ge if meta and meta.ge is not None else -5,
                           meta.le if meta and meta.le is not None else 70_000)  # fmt: skip
    if hint is float:
        return st.integers(1, 40).map(lambda n: n / 4 + 1)
    assert hint is str
    if meta is not None and meta.pattern:
        return st.sampled_from(["", "DE"])
    return st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
