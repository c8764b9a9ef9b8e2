"""Names in place of ids: `--group Staff`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final
from uuid import UUID

from admin.connection import Connection
from admin.description import Description, Field, Operation
from admin.failures import NOT_FOUND, Failure, usage
from admin.safety import printable

PAGE: Final = 1_000
MAX_LOOKED_THROUGH: Final = 50_000
LABELS: Final = ("name", "email", "slug")
"""Fields by whose value a thing may be named."""
MAX_TOLD: Final = 5
INVALID: Final = 422


class Names:
    """Looks things up by name; what was found is remembered for the length of one command."""

    def __init__(self, connection: Connection, description: Description) -> None:
        self._connection = connection
        self._description = description
        self._items_by_noun: dict[str, list[dict[str, Any]]] = {}

    def id_of(self, noun: str, text: str, flag: str = "") -> str:
        """The id of the thing that is named so; an id is taken as it is.

        Raises Failure if nothing, or more than one thing, has that name.
        """
        try:
            return str(UUID(text))
        except ValueError:
            pass
        place = f"{flag}: " if flag else ""
        listing = self._description.operation(noun, "list")
        if listing is None:
            raise usage(f"{place}an id is wanted")
        found = self._called(listing, text)
        if len(found) == 1:
            return str(found[0]["id"])
        name = printable(text)
        if not found:
            raise Failure(NOT_FOUND, f"{place}{noun} has nothing that is called {name!r}")
        ids = ", ".join(printable(str(item["id"])) for item in found[:MAX_TOLD])
        raise usage(f"{place}{len(found)} of {noun} are called {name!r}; name one by its id: {ids}")

    def _called(self, listing: Operation, text: str) -> list[dict[str, Any]]:
        """All that have this name: asked for by filters, where the list has some."""
        filters = [field.name for field in listing.query if field.name in LABELS]
        if not filters:
            items = self._items(listing.noun)
            return [each for each in items if text in (each.get(label) for label in LABELS)]
        found: dict[str, dict[str, Any]] = {}
        for label in filters:
            try:
                for item in items_of(self._connection, listing.path, {label: text}):
                    found[str(item["id"])] = item
            except Failure as failure:
                if failure.http != INVALID:
                    raise  # else: nothing can have such a name
        return list(found.values())

    def labels(self, noun: str) -> Mapping[str, str]:
        """What each thing of a noun is called, by id. Empty if this token may not list them."""
        if self._description.operation(noun, "list") is None:
            return {}
        try:
            items = self._items(noun)
        except Failure:
            return {}
        return {
            str(item.get("id")): str(label)
            for item in items
            if (label := item.get("email") or item.get("name"))
        }

    def filled(self, fields: Mapping[str, Field], body: dict[str, Any]) -> dict[str, Any]:
        """A body with ids in the place of names."""
        return {name: self._filled(fields.get(name), value) for name, value in body.items()}

    def _filled(self, field: Field | None, value: Any) -> Any:
        if field is None or field.refers is None:
            return value
        if isinstance(value, str):
            return self.id_of(field.refers, value, field.flag)
        if isinstance(value, list | tuple):
            return [self.id_of(field.refers, str(each), field.flag) for each in value]
        return value

    def _items(self, noun: str) -> list[dict[str, Any]]:
        if noun not in self._items_by_noun:
            self._items_by_noun[noun] = list(items_of(self._connection, f"/v1/{noun}"))
        return self._items_by_noun[noun]


def items_of(
    connection: Connection,
    path: str,
    query: Mapping[str, str] | None = None,
    *,
    most: int = MAX_LOOKED_THROUGH,
    is_paged: bool = True,
) -> Iterator[dict[str, Any]]:
    """The things of a list, page by page or (not `is_paged`) at once, `most` at the most."""
    cursor: str | None = None
    left = most
    while left > 0:
        asked = dict(query or {})
        if is_paged:
            asked["limit"] = str(min(left, PAGE))
        if cursor is not None:
            asked["cursor"] = cursor
        page = connection.call("get", path, query=asked, again=True).json()
        yield from page["items"][:left]
        left -= len(page["items"])
        cursor = page["next_cursor"]
        if cursor is None or not page["items"]:
            return
