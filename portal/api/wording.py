"""What msgspec says of a value that does not fit, in words that say what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, get_args

from msgspec import Meta

from actors.model import FactName, NameField, Region, Scope, Slug
from portal.api.problems import FieldError

INSTANT: Final = "must be an instant with its offset, such as 2027-01-31T09:00:00Z"
TIME: Final = "must be a time of day such as 09:30:00"

_PATH_IN_MESSAGE = re.compile(r" - at `\$\.?(.*)`$", re.DOTALL)

NO_LINE_FEED: Final = r"(?!\n)"
"""How patterns of the model end, which says nothing to a caller."""


def _pattern_of(type_: Any) -> str:
    return next(str(each.pattern) for each in get_args(type_) if isinstance(each, Meta))


FORMS: Final = {
    _pattern_of(type_): words
    for type_, words in (
        (NameField, "must not have control characters"),
        (Slug, "must be 1 to 63 of a-z, 0-9 and -, which neither begin nor end with -"),
        (Region, "must be a country of ISO 3166-1 alpha-2, such as DE"),
        (Scope, "must be <noun>:read or <noun>:write, such as sites:read; * is every noun"),
        (FactName, "must be such as os_version: a-z, 0-9 and _, with a letter first"),
    )
}
"""By their patterns, what texts have to be."""


def _of_form(found: re.Match[str]) -> str:
    pattern = found[1].replace("\\\\", "\\")
    return FORMS.get(pattern, f"must match {pattern.removesuffix(NO_LINE_FEED)}")


def _of_length(found: re.Match[str]) -> str:
    bound, count = ("at least", "at most")[found[2] == "<="], int(found[3])
    one = "character" if found[1] == "str" else "entry"
    many = "characters" if found[1] == "str" else "entries"
    return f"must have {bound} {count} {one if count == 1 else many}"


WORDS: Final[tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...]] = (
    (re.compile(r"Invalid RFC3339 encoded datetime"), lambda _: INSTANT),
    (re.compile(r"Expected `datetime` with a timezone component"), lambda _: INSTANT),
    (re.compile(r"Invalid RFC3339 encoded time"), lambda _: TIME),
    (re.compile(r"Expected `time` with no timezone component"), lambda _: TIME),
    (re.compile(r"Invalid UUID"), lambda _: "must be an id (a UUID)"),
    (re.compile(r"Expected `(?:int|float)` >= (\S+)"), lambda it: f"must be at least {it[1]}"),
    (re.compile(r"Expected `(?:int|float)` <= (\S+)"), lambda it: f"must be at most {it[1]}"),
    (re.compile(r"Expected `(str|array)` of length (>=|<=) (\d+)"), _of_length),
    (re.compile(r"Expected `str` matching regex '(.*)'", re.DOTALL), _of_form),
)


def in_words(message: str) -> str:
    """The message, or what to write instead where that is known."""
    for pattern, words in WORDS:
        found = pattern.fullmatch(message)
        if found is not None:
            return words(found)
    return message


def refused_field(message: str, *, within: str = "") -> FieldError:
    """The field that msgspec did not like, by its message; `within` is where the value was."""
    found = _PATH_IN_MESSAGE.search(message)
    unknown = re.search(r"Object contains unknown field `(.*?)`", message, re.DOTALL)
    path = found[1] if found else ""
    text = _PATH_IN_MESSAGE.sub("", message)
    if unknown:
        path = f"{path}.{unknown[1]}" if path else unknown[1]
        text = "is not a field here"
    missing = re.search(r"missing required field `(.*?)`", text, re.DOTALL)
    if missing:
        path = f"{path}.{missing[1]}" if path else missing[1]
        text = "is required"
    path = f"{within}{path}" if path.startswith("[") else ".".join(filter(None, (within, path)))
    return FieldError(field=path[:200], message=in_words(text)[:500])
