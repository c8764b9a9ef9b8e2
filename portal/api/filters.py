"""Filters of lists: query parameters that name fields, each with the one value that is wanted.

A route declares them once, by `opt=filters(Resource, "kind", "name")`; the type of the field is
what checks the value, and what the OpenAPI document shows. All that are given have to hold.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Annotated, Any, Final, Union, get_args, get_origin, get_type_hints

import attrs
import msgspec
from litestar import Request

from actors.store.codec import read_value
from portal.api.problems import FieldError, invalid

FILTERS: Final = "filters"
MAX_VALUE_CHARACTERS: Final = 512


@attrs.frozen
class Filter:
    """One parameter: the field it speaks of, and the type of its value."""

    field: str
    type: Any
    description: str = ""

    def __deepcopy__(self, memo: object) -> Filter:
        """Itself: Litestar copies the options of a route, which msgspec's types do not let it."""
        return self


def filters(entity: type, *fields: str, **others: Filter) -> dict[str, Any]:
    """The `opt` of a list that can be filtered by these fields of its entities, and by `others`."""
    hints = _hints(entity)
    own = {name: Filter(name, _without_none(hints[name])) for name in fields}
    return {FILTERS: own | others}


def instant(field: str, description: str) -> Filter:
    """A filter by an instant with its offset."""
    return Filter(field, Annotated[datetime, msgspec.Meta(tz=True)], description)


async def provide_filters(request: Request[Any, Any, Any]) -> dict[str, Any]:
    """The values that the query asks for, by field. Raises Problem 422."""
    declared: Mapping[str, Filter] = request.route_handler.opt.get(FILTERS, {})
    errors, wanted = [], {}
    for name, each in declared.items():
        text = request.query_params.get(name)
        if text is None:
            continue
        try:
            if len(text) > MAX_VALUE_CHARACTERS:
                raise ValueError(f"must have at most {MAX_VALUE_CHARACTERS} characters")
            wanted[each.field] = _read(text, each.type)
        except (ValueError, msgspec.ValidationError) as error:
            errors.append(FieldError(field=name, message=str(error)[:500]))
    if errors:
        raise invalid(*errors)
    return wanted


def _read(text: str, type_: Any) -> Any:
    if type_ is bool and text not in ("true", "false"):
        raise ValueError("must be true or false")
    return msgspec.convert(text, type_, strict=False, dec_hook=read_value)


@cache
def _hints(entity: type) -> dict[str, Any]:
    return get_type_hints(entity, include_extras=True)


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    (only,) = (each for each in get_args(hint) if each is not type(None))
    return only
