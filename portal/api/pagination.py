"""Keyset pages: `limit` entries after `cursor`, which the page before handed out.

A cursor names the last entry of a page, so entries that come or go meanwhile neither repeat nor
hide others. Clients must not look inside.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar
from uuid import UUID

import msgspec
from litestar import Request

from portal.api.problems import FieldError, Problem, invalid

DEFAULT_LIMIT: Final = 100
MAX_LIMIT: Final = 1_000
MAX_CURSOR_TEXT: Final = 64

T = TypeVar("T")
S = TypeVar("S")


class Page(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """Entries in the order of their ids; `next_cursor` is null on the last page."""

    items: tuple[T, ...]
    next_cursor: str | None

    def of(self, view: Callable[[T], S]) -> Page[S]:
        """The same page, each item seen in this way."""
        return Page(items=tuple(map(view, self.items)), next_cursor=self.next_cursor)


class PageRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asked for; `limit` is 1 to MAX_LIMIT."""

    limit: int = DEFAULT_LIMIT
    cursor: bytes | None = None

    def after_id(self) -> UUID | None:
        """The cursor as the id of an entity. Raises Problem for a cursor of another list."""
        if self.cursor is None:
            return None
        if len(self.cursor) != 16:
            raise _bad_cursor()
        return UUID(bytes=self.cursor)

    def after_number(self) -> int:
        """The cursor as the number of a change, 0 for none. Raises Problem."""
        if self.cursor is None:
            return 0
        if len(self.cursor) != 8:
            raise _bad_cursor()
        number = int.from_bytes(self.cursor, "big")
        if number >= 1 << 63:
            raise _bad_cursor()
        return number

    def page(self, items: Sequence[T], last: UUID | int | None) -> Page[T]:
        """The page of these items; `last` is the id or number of the last one.

        A full page has a cursor, so the page after it may turn out to be empty.
        """
        cursor = None if last is None or len(items) < self.limit else _encode(last)
        return Page(items=tuple(items), next_cursor=cursor)


async def provide_page(request: Request[Any, Any, Any]) -> PageRequest:
    """`limit` and `cursor` of the query. Raises Problem for anything out of range."""
    text = request.query_params.get("limit", str(DEFAULT_LIMIT))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MAX_LIMIT):
        raise invalid(FieldError(field="limit", message=f"must be a number from 1 to {MAX_LIMIT}"))
    cursor = request.query_params.get("cursor")
    return PageRequest(limit=int(text), cursor=None if cursor is None else _decode(cursor))


def _encode(last: UUID | int) -> str:
    raw = last.bytes if isinstance(last, UUID) else last.to_bytes(8, "big")
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    if not text.isascii() or len(text) > MAX_CURSOR_TEXT:
        raise _bad_cursor()
    try:
        return urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (Base64Error, ValueError):
        raise _bad_cursor() from None


def _bad_cursor() -> Problem:
    return invalid(FieldError(field="cursor", message="must be the next_cursor of the page before"))
