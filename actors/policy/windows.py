"""Time windows of policies: whether an instant lies in one, and when the present one ends.

The rule is a reading of the wall clock, and nothing else: an instant lies in the windows if the
time that a clock on the wall shows in the condition's zone, at that instant, lies in a range of
that weekday. What follows from it at a change of the offset (daylight saving time):

- a wall time that is skipped never happens, so a range inside the gap is never open;
- a wall time that is shown twice counts both times, so 01:00 to 02:30 is open twice in a night
  where the clock goes back from 03:00 to 02:00, with half an hour between;
- ranges are half open: `start` belongs to it, `end` does not, and an `end` of 00:00 is midnight.

A range whose end is not after its start (and is not 00:00) is empty: it never allows anything.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from datetime import UTC, datetime, time, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from actors.model import CurrentTimeCondition

MAX_HORIZON = timedelta(days=8)
"""How far ahead an end is looked for: one week and the longest change of the offset."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = 1_000_000
_DAY = 86_400 * _SECOND
_WEEK = 7 * _DAY
_EPOCH_IN_WEEK = 3 * _DAY
"""1970-01-01 was a Thursday."""
_BLOCK = 16 * _DAY
"""Offsets are looked up once for each stretch of this length, and kept."""
_STRIDE = 6 * 3_600 * _SECOND
"""Offsets are compared at steps of this length; no zone changed its offset twice in it."""
_MICROSECOND = timedelta(microseconds=1)


class Windows:
    """The windows of one condition, compiled. Immutable; an unknown zone makes it always closed."""

    __slots__ = ("_ends", "_starts", "_zone")

    def __init__(self, condition: CurrentTimeCondition) -> None:
        self._zone = load_zone(condition.zone)
        merged = _merge(condition) if self._zone is not None else []
        self._starts = [start for start, _ in merged]
        self._ends = [end for _, end in merged]

    def contains(self, instant: datetime) -> bool:
        """Whether the windows are open at this instant (aware)."""
        at = microseconds(instant)
        offset, _ = self._offset(at)
        return self._open_until((at + offset + _EPOCH_IN_WEEK) % _WEEK) is not None

    def end(self, instant: datetime, horizon: datetime | None = None) -> datetime | None:
        """The first instant after `instant` at which the windows are closed, in UTC.

        None if they are closed already. Windows that touch are one, over midnight and over the
        end of the week too. Never later than `horizon`, nor than `MAX_HORIZON` from `instant`:
        windows that are always open end there.
        """
        limit = instant + MAX_HORIZON
        if horizon is not None and horizon < limit:
            limit = horizon
        at = microseconds(instant)
        if not self.contains(instant):
            return None
        last = microseconds(limit)
        while at < last:
            offset, until = self._offset(at)
            position = (at + offset + _EPOCH_IN_WEEK) % _WEEK
            closes = self._open_until(position)
            if closes is None:
                break
            at = min(at + closes - position, until, last)
        return instant_of(at)

    def spans(self, start: datetime, end: datetime) -> Iterator[tuple[datetime, datetime]]:
        """When the windows are open from `start` up to `end`: in order, none touching the next."""
        at, last = microseconds(start), microseconds(end)
        opened: int | None = None
        while at < last:
            offset, until = self._offset(at)
            position = (at + offset + _EPOCH_IN_WEEK) % _WEEK
            closes = self._open_until(position)
            if closes is None:
                if opened is not None:
                    yield instant_of(opened), instant_of(at)
                opened = None
                next_open = self._opens_after(position)
                step = last - at if next_open is None else next_open - position
            else:
                if opened is None:
                    opened = at
                step = closes - position
            at = min(at + step, until, last)
        if opened is not None:
            yield instant_of(opened), instant_of(last)

    # --- helpers ---

    def _offset(self, at: int) -> tuple[int, int]:
        """The zone's offset at an instant, and the first instant for which that is not known to
        be so."""
        if self._zone is None:
            return 0, at + _BLOCK
        for until, offset in _offsets(self._zone, at // _BLOCK):
            if at < until:
                return offset, until
        raise AssertionError("a block has an offset up to its end")

    def _open_until(self, position: int) -> int | None:
        """Where in the week the range around `position` ends, or None outside of every range."""
        index = bisect_right(self._starts, position) - 1
        if index < 0 or self._ends[index] <= position:
            return None
        return self._ends[index]

    def _opens_after(self, position: int) -> int | None:
        """Where the next range starts, which may be in the next week; None if there is none."""
        if not self._starts:
            return None
        index = bisect_right(self._starts, position)
        return self._starts[index] if index < len(self._starts) else self._starts[0] + _WEEK


def microseconds(instant: datetime) -> int:
    """Microseconds from 1970 to an aware instant."""
    since = instant - _EPOCH
    return since.days * _DAY + since.seconds * _SECOND + since.microseconds


def instant_of(microseconds: int) -> datetime:
    """The instant, in UTC, that is so many microseconds after 1970 began."""
    return _EPOCH + timedelta(microseconds=microseconds)


@lru_cache(maxsize=512)
def load_zone(name: str) -> ZoneInfo | None:
    """The IANA zone of this name, or None: names come from outside, so any failure is unknown."""
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        return None


def _merge(condition: CurrentTimeCondition) -> list[tuple[int, int]]:
    """The ranges as microseconds of the week: sorted, disjoint, and none touching the next."""
    spans: list[tuple[int, int]] = []
    for window in condition.windows:
        midnight = window.day * _DAY
        if not window.ranges:
            spans.append((midnight, midnight + _DAY))
        for each in window.ranges:
            start = midnight + _day_position(each.start)
            end = midnight + (_day_position(each.end) or _DAY)
            if start < end:
                spans.append((start, end))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _day_position(value: time) -> int:
    seconds = (value.hour * 60 + value.minute) * 60 + value.second
    return seconds * _SECOND + value.microsecond


@lru_cache(maxsize=4_096)
def _offsets(zone: ZoneInfo, block: int) -> tuple[tuple[int, int], ...]:
    """The offsets of a zone within a block, in order: (the instant up to which it holds, offset).

    A pure function of the zone, so what is kept is never old.
    """
    at, last = block * _BLOCK, (block + 1) * _BLOCK
    offset = _offset_at(zone, at)
    pieces: list[tuple[int, int]] = []
    while at < last:
        after = min(at + _STRIDE, last)
        changed = _offset_at(zone, after)
        if changed != offset:
            pieces.append((_transition(zone, at, after), offset))
            offset = changed
        at = after
    if not pieces or pieces[-1][0] < last:
        pieces.append((last, offset))
    return tuple(pieces)


_EARLIEST = microseconds(datetime.min.replace(tzinfo=UTC)) + 2 * _DAY
_LATEST = microseconds(datetime.max.replace(tzinfo=UTC)) - 2 * _DAY


def _offset_at(zone: ZoneInfo, at: int) -> int:
    """Microseconds east of UTC. At the ends of time, where a wall has no calendar, that of the
    days beside."""
    instant = instant_of(min(max(at, _EARLIEST), _LATEST))
    offset = instant.astimezone(zone).utcoffset()
    assert offset is not None
    return offset // _MICROSECOND


def _transition(zone: ZoneInfo, before: int, after: int) -> int:
    """The first instant in (before, after] that has not the offset of `before`.

    Both are whole seconds, and offsets change at whole seconds only.
    """
    offset = _offset_at(zone, before)
    low, high = 0, (after - before) // _SECOND
    while high - low > 1:
        middle = (low + high) // 2
        if _offset_at(zone, before + middle * _SECOND) == offset:
            low = middle
        else:
            high = middle
    return before + high * _SECOND
