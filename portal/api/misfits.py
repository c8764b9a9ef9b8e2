"""Everything that is wrong with a body, where the codec names the first misfit alone.

A body that the codec refused is gone through once more, part by part: fields of structs, entries of
lists. What fits is not looked into, so the work is that of decoding it a few times (once for each
level of what does not fit), and ends with `MAX_FIELD_ERRORS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec
from msgspec import Struct, UnsetType

from portal.api.problems import MAX_FIELD_ERRORS, FieldError
from portal.api.wording import refused_field

UNKNOWN = "is not a field here"
REQUIRED = "is required"


def misfits(value: Any, type_: Any, *, within: str = "") -> tuple[FieldError, ...]:
    """What is wrong with a value (of dictionaries, lists, texts and numbers) as `type_`; `within`
    is where it was."""
    return tuple(islice(_misfits(value, type_, within), MAX_FIELD_ERRORS))


def _misfits(value: Any, type_: Any, path: str) -> Iterator[FieldError]:
    try:
        msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        below = _below(value, type_, path)
        first = next(below, None)
        if first is None:  # it is the value itself
            yield refused_field(str(error), within=path)
        else:
            yield first
            yield from below


def _below(value: Any, type_: Any, path: str) -> Iterator[FieldError]:
    kinds = [each for each in _options(type_) if _is_for(value, each)]
    if len(kinds) != 1:
        return
    (kind,) = kinds
    if isinstance(value, list):
        for place, each in enumerate(value):
            yield from _misfits(each, get_args(kind)[0], f"{path}[{place}]")
        return
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for name, each in value.items():
        at = f"{path}.{name}" if path else name
        if name in fields:
            yield from _misfits(each, fields[name].type, at)
        elif kind.__struct_config__.forbid_unknown_fields:
            yield FieldError(field=at[:200], message=UNKNOWN)
    for name, field in fields.items():
        if field.required and name not in value:
            yield FieldError(field=f"{path}.{name}" if path else name, message=REQUIRED)


def _options(type_: Any) -> Iterator[Any]:
    """The types that a value may have, apart from none at all."""
    origin = get_origin(type_)
    if origin is Annotated:
        yield from _options(get_args(type_)[0])
    elif origin in (Union, UnionType):
        for each in get_args(type_):
            yield from _options(each)
    elif type_ not in (NoneType, None, UnsetType):
        yield type_


def _is_for(value: Any, type_: Any) -> bool:
    """Whether a type describes the parts of such a value."""
    if isinstance(value, dict):
        return isinstance(type_, type) and issubclass(type_, Struct)
    if not isinstance(value, list):
        return False
    arguments = get_args(type_)
    return (get_origin(type_) is list and len(arguments) == 1) or (
        get_origin(type_) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis
    )
