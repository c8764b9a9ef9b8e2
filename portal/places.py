"""Who gets one of a door's places, and who gives his up for it. A function of who is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol, TypeVar

import attrs


class Place(Protocol):
    """A connection that is held. `idle`: it is in the midst of no call, but in that of its
    handshake or headers, or between two calls. `source`: whom it counts against."""

    source: str
    idle: bool


P = TypeVar("P", bound=Place)


class NoPlace(Exception):
    """The newcomer cannot be taken: nobody who counts would give up his place."""


@attrs.frozen
class Bounds:
    """How many connections there may be, in all and of one source."""

    in_all: int
    per_source: int


def make_place(held: Iterable[P], source: str, bounds: Bounds) -> P | None:
    """The connection that has to end so that one of `source` can be taken; None if there is room.

    `held` are in the order in which they came. Where the source has all that it may, its own oldest
    idle one gives way. Where all places are taken it is the oldest idle one of whoever holds the
    most, unless that is less than the newcomer would then have. Raises NoPlace.
    """
    places = list(held)
    counts = Counter(each.source for each in places)
    if counts[source] >= bounds.per_source:
        return _oldest_idle(places, {source})
    if len(places) < bounds.in_all:
        return None
    most = max(counts.values(), default=0)
    if most <= counts[source]:
        return _oldest_idle(places, {source})
    return _oldest_idle(places, {each for each, count in counts.items() if count == most})


def _oldest_idle(places: list[P], sources: set[str]) -> P:
    for each in places:
        if each.idle and each.source in sources:
            return each
    raise NoPlace
