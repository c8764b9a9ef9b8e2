"""Entity tags, and the conditions that a call may make of them (RFC 9110, sections 8.8.3 and 13).

The tag of an entity is strong: it names one state of what is stored, and changes with each change.
What is of this moment alone (`online`, `last_seen_at`) is no part of that state; where an answer
shows such fields the tag has a second half for them, after a dot. `If-None-Match` looks at the
whole of it, so that a cache never shows a device as online that is not, and `If-Match` at the
first half, so that an update is not refused because a device went home.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final, Literal

import attrs

from actors.store.codec import to_json
from portal.api.problems import Problem

MAX_TAGS: Final = 32
TAG_BYTES: Final = 15
"""Of SHA-256: 120 bits, which nobody meets by chance and whose text needs no padding."""

_LISTED = re.compile(r'[ \t]*(W/)?"([\x21\x23-\x7e]*)"[ \t]*(?:,|$)')

Tags = tuple[tuple[bool, str], ...] | Literal["*"]
"""What a header lists: (whether it is weak, opaque tag), or any."""


class NotModified(Exception):
    """The caller has it already: 304, with this tag."""

    def __init__(self, tag: str) -> None:
        super().__init__(tag)
        self.tag = tag


def tag_of(entity: object, live: object = None) -> str:
    """The opaque tag of an entity; `live` is what else the answer shows of this moment."""
    state = _digest(entity)
    return state if live is None else f"{state}.{_digest(live)}"


@attrs.frozen
class Preconditions:
    """What a call demands of the present state of the one thing that it names."""

    if_match: Tags | None = None
    if_none_match: Tags | None = None

    @classmethod
    def of(cls, headers: Mapping[str, Any]) -> Preconditions:
        """Those of a call. Raises Problem: 400 for what is no list of entity tags."""
        return cls(
            if_match=_listed("If-Match", headers.get("if-match")),
            if_none_match=_listed("If-None-Match", headers.get("if-none-match")),
        )

    def check(self, tag: str, *, is_read: bool) -> None:
        """Raises Problem (412) or, for a read, NotModified unless what has this tag will do."""
        state = tag.partition(".")[0]
        if self.if_match is not None and not _matches_strongly(self.if_match, state):
            raise changed("If-Match names another state of this than the present one.")
        if self.if_none_match is not None and _matches_weakly(self.if_none_match, tag):
            if is_read:
                raise NotModified(tag)
            raise changed("If-None-Match names the present state of this.")


def changed(detail: str) -> Problem:
    """412: what the call expects of the present state does not hold."""
    return Problem(412, "precondition_failed", f"{detail} Look at it anew, and decide again.")


def _matches_strongly(tags: Tags, state: str) -> bool:
    """RFC 9110, section 8.8.3.2: a weak tag never matches. Only the half of what is stored."""
    if tags == "*":
        return True
    return any(not weak and tag.partition(".")[0] == state for weak, tag in tags)


def _matches_weakly(tags: Tags, tag: str) -> bool:
    return tags == "*" or any(each == tag for _, each in tags)


def _listed(name: str, text: str | None) -> Tags | None:
    if text is None:
        return None
    if text.strip() == "*":
        return "*"
    found: list[tuple[bool, str]] = []
    position = 0
    while position < len(text) and len(found) <= MAX_TAGS:
        match = _LISTED.match(text, position)
        if match is None:
            break
        found.append((match[1] is not None, match[2]))
        position = match.end()
    if not found or len(found) > MAX_TAGS or position < len(text):
        raise Problem(
            400,
            "malformed_precondition",
            f'{name} must be * or at most {MAX_TAGS} entity tags, such as "abc".',
        )
    return tuple(found)


def _digest(value: object) -> str:
    return urlsafe_b64encode(sha256(to_json(value)).digest()[:TAG_BYTES]).decode()
