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
from datetime import UTC, datetime, time, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from actors.model import CurrentTimeCondition

MAX_HORIZON = timedelta(days=8)
"""How far ahead an end is looked for: one week and the longest change of the offset."""

_SECOND = 1_000_000
_DAY = 86_400 * _SECOND
_WEEK = 7 * _DAY
_STRIDE = timedelta(hours=6)
"""Offsets are compared at steps of this length; no zone changed its offset twice in it."""


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
        if self._zone is None:
            return False
        return self._open_until(_week_position(instant.astimezone(self._zone))) is not None

    def end(self, instant: datetime, horizon: datetime | None = None) -> datetime | None:
        """The first instant after `instant` at which the windows are closed, in UTC.

        None if they are closed already. Windows that touch are one, over midnight and over the
        end of the week too. Never later than `horizon`, nor than `MAX_HORIZON` from `instant`:
        windows that are always open end there.
        """
        limit = instant + MAX_HORIZON
        if horizon is not None and horizon < limit:
            limit = horizon
        at = instant.astimezone(UTC)
        limit = limit.astimezone(UTC)
        if not self.contains(at):
            return None
        zone = self._zone
        assert zone is not None
        while at < limit:
            wall = at.astimezone(zone)
            position = _week_position(wall)
            closes = self._open_until(position)
            if closes is None:
                return at
            step = min(timedelta(microseconds=closes - position), _STRIDE, limit - at)
            after = at + step
            offset = wall.utcoffset()
            if after.astimezone(zone).utcoffset() != offset:
                after = _transition(zone, at, after)
            at = after
        return limit

    def _open_until(self, position: int) -> int | None:
        """Where in the week the range around `position` ends, or None outside of every range."""
        index = bisect_right(self._starts, position) - 1
        if index < 0 or self._ends[index] <= position:
            return None
        return self._ends[index]


@lru_cache(maxsize=512)
def load_zone(name: str) -> ZoneInfo | None:
    """The IANA zone of this name, or None: names come from outside, so any failure is unknown."""
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        return None


def _week_position(wall: datetime) -> int:
    """Microseconds from Monday 00:00 to this wall time."""
    seconds = (wall.hour * 60 + wall.minute) * 60 + wall.second
    return wall.weekday() * _DAY + seconds * _SECOND + wall.microsecond


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


def _transition(zone: ZoneInfo, before: datetime, after: datetime) -> datetime:
    """The first instant in (before, after] that has not the offset of `before`.

    Both are in UTC. Offsets change at whole seconds only.
    """
    offset = before.astimezone(zone).utcoffset()
    start = before.replace(microsecond=0)
    low, high = 0, int((after - start) / timedelta(seconds=1)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if (start + timedelta(seconds=middle)).astimezone(zone).utcoffset() == offset:
            low = middle
        else:
            high = middle
    return start + timedelta(seconds=high)
