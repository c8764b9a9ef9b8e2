from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, time, timedelta
from itertools import pairwise
from zoneinfo import available_timezones

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.model import CurrentTimeCondition, DayWindow, TimeRange
from actors.policy.windows import MAX_HORIZON, Windows

from ..reading import closes, is_open, utc

ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",  # half an hour of daylight saving time
    "Asia/Kathmandu",  # +05:45
    "America/Santiago",  # changes at midnight
    "Africa/Casablanca",  # changes around Ramadan
    "Pacific/Apia",
]
# Instants a few hours before a change of the offset in one of the zones.
CHANGES = [
    utc(2026, 3, 28, 22, 0),
    utc(2026, 10, 24, 22, 0),
    utc(2026, 3, 8, 3, 0),
    utc(2026, 11, 1, 2, 0),
    utc(2026, 4, 4, 10, 0),
    utc(2026, 10, 3, 10, 0),
    utc(2026, 4, 4, 23, 0),
    utc(2026, 9, 6, 0, 0),
    utc(2026, 2, 14, 22, 0),
    utc(2026, 3, 21, 22, 0),
]


@st.composite
def conditions(draw: st.DrawFn) -> CurrentTimeCondition:
    minute = st.sampled_from([0, 1, 15, 30, 59])
    moment = st.builds(time, st.integers(0, 23), minute)
    ranges = st.lists(st.builds(lambda a, b: TimeRange(start=a, end=b), moment, moment), max_size=4)
    days = st.lists(st.integers(0, 6), min_size=1, max_size=7)
    windows = [DayWindow(day=day, ranges=tuple(draw(ranges))) for day in draw(days)]
    return CurrentTimeCondition(zone=draw(st.sampled_from(ZONES)), windows=tuple(windows))


instants = st.one_of(
    st.builds(
        lambda change, minutes: change + timedelta(minutes=minutes),
        st.sampled_from(CHANGES),
        st.integers(-60, 12 * 60),
    ),
    st.builds(
        lambda minutes: utc(2026, 1, 1) + timedelta(minutes=minutes), st.integers(0, 525_600)
    ),
)


@settings(max_examples=150, deadline=None)
@given(conditions(), instants)
def test_the_end_of_a_window_is_what_stepping_minute_by_minute_finds(
    condition: CurrentTimeCondition, instant: datetime
) -> None:
    cap = instant + timedelta(days=2)
    windows = Windows(condition)
    assert windows.contains(instant) == is_open(condition, instant)
    assert windows.end(instant, cap) == closes(condition, instant, cap)


@settings(max_examples=300, deadline=None)
@given(conditions(), instants, st.integers(0, 59_999_999))
@example(
    CurrentTimeCondition(zone="Europe/Berlin", windows=(DayWindow(day=6),)),
    utc(2026, 3, 29, 0, 59),
    59_999_999,
)
def test_an_instant_between_two_minutes_counts_as_the_minute_before_it(
    condition: CurrentTimeCondition, instant: datetime, microseconds: int
) -> None:
    later = instant + timedelta(microseconds=microseconds)
    windows = Windows(condition)
    assert windows.contains(later) == windows.contains(instant)
    if windows.contains(instant):
        assert windows.end(later, instant + timedelta(days=2)) == windows.end(
            instant, instant + timedelta(days=2)
        )


@settings(max_examples=60, deadline=None)
@given(conditions(), instants, st.integers(1, 3 * 24 * 60))
def test_the_spans_are_the_minutes_at_which_the_windows_are_open(
    condition: CurrentTimeCondition, start: datetime, minutes: int
) -> None:
    end = start + timedelta(minutes=minutes)
    spans = list(Windows(condition).spans(start, end))
    for opens, closes_at in spans:
        assert start <= opens < closes_at <= end
    for (_, one), (other, _) in pairwise(spans):
        assert one < other
    instant = start
    while instant < end:
        inside = any(opens <= instant < closes_at for opens, closes_at in spans)
        assert inside == is_open(condition, instant)
        instant += timedelta(minutes=1)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(available_timezones())),
    st.integers(0, 6),
    st.integers(-70 * 365 * 86_400, 100 * 365 * 86_400),
)
def test_in_any_zone_and_any_year_a_day_is_that_of_the_wall(
    zone: str, day: int, second: int
) -> None:
    instant = utc(1970, 1, 1) + timedelta(seconds=second)
    condition = CurrentTimeCondition(zone=zone, windows=(DayWindow(day=day),))
    assert Windows(condition).contains(instant) == is_open(condition, instant)


@pytest.mark.parametrize("zone", ZONES)
def test_a_whole_year_of_working_hours_and_nights_is_read_off_the_wall(zone: str) -> None:
    night = (TimeRange(start=time(22), end=time(0)), TimeRange(start=time(0), end=time(2, 30)))
    day = (TimeRange(start=time(9), end=time(12)), TimeRange(start=time(13), end=time(17)))
    condition = CurrentTimeCondition(
        zone=zone,
        windows=(DayWindow(day=6, ranges=night), DayWindow(day=0, ranges=(*day, *night))),
    )
    windows = Windows(condition)
    spans = list(windows.spans(utc(2026, 1, 1), utc(2027, 1, 1)))
    edges = [edge for span in spans for edge in span]
    for opens, closes_at in spans[:-1]:
        assert windows.contains(opens)
        assert not windows.contains(closes_at)
        assert windows.end(opens, opens + timedelta(days=2)) == closes_at
    for edge in edges[1:-1]:
        minute = timedelta(minutes=1)
        assert is_open(condition, edge) != is_open(condition, edge - minute)
    for quarter in range(365 * 96):
        instant = utc(2026, 1, 1) + timedelta(minutes=15 * quarter)
        assert windows.contains(instant) == is_open(condition, instant)


def window(zone: str, day: int, *ranges: tuple[str, str]) -> Windows:
    parsed = tuple(
        TimeRange(start=time.fromisoformat(start), end=time.fromisoformat(end))
        for start, end in ranges
    )
    return Windows(CurrentTimeCondition(zone=zone, windows=(DayWindow(day=day, ranges=parsed),)))


def test_a_range_up_to_midnight_and_one_from_midnight_are_one_window() -> None:
    late = DayWindow(day=4, ranges=(TimeRange(start=time(22), end=time(0)),))
    early = DayWindow(day=5, ranges=(TimeRange(start=time(0), end=time(6)),))
    windows = Windows(CurrentTimeCondition(zone="UTC", windows=(late, early)))
    friday = utc(2026, 11, 20, 23, 0)
    assert windows.end(friday) == utc(2026, 11, 21, 6, 0)


def test_a_window_goes_on_over_the_end_of_the_week() -> None:
    days = tuple(DayWindow(day=day) for day in (6, 0))
    windows = Windows(CurrentTimeCondition(zone="UTC", windows=days))
    assert windows.end(utc(2026, 11, 22, 12, 0)) == utc(2026, 11, 24, 0, 0)


def test_a_window_that_is_always_open_ends_at_the_horizon() -> None:
    days = tuple(DayWindow(day=day) for day in range(7))
    windows = Windows(CurrentTimeCondition(zone="Europe/Berlin", windows=days))
    at = utc(2026, 3, 28)
    assert windows.end(at) == at + MAX_HORIZON
    assert windows.end(at, at + timedelta(hours=24)) == at + timedelta(hours=24)


def test_the_end_belongs_to_the_window_no_more() -> None:
    windows = window("UTC", 0, ("09:00", "17:00"))
    assert windows.contains(utc(2026, 11, 23, 9, 0))
    assert not windows.contains(utc(2026, 11, 23, 17, 0))
    assert windows.end(utc(2026, 11, 23, 17, 0)) is None


def test_a_range_inside_the_hour_that_is_skipped_is_never_open() -> None:
    windows = window("Europe/Berlin", 6, ("02:00", "03:00"))
    at = utc(2026, 3, 29, 0, 0)
    assert not any(windows.contains(at + timedelta(minutes=m)) for m in range(180))


def test_a_range_across_the_skipped_hour_is_an_hour_shorter() -> None:
    windows = window("Europe/Berlin", 6, ("01:00", "04:00"))
    assert windows.end(utc(2026, 3, 29, 0, 0)) == utc(2026, 3, 29, 2, 0)


def test_a_wall_time_that_is_shown_twice_counts_both_times() -> None:
    windows = window("Europe/Berlin", 6, ("01:00", "02:30"))
    assert windows.end(utc(2026, 10, 25, 0, 0)) == utc(2026, 10, 25, 0, 30)
    assert not windows.contains(utc(2026, 10, 25, 0, 45))
    assert windows.end(utc(2026, 10, 25, 1, 0)) == utc(2026, 10, 25, 1, 30)


@pytest.mark.parametrize("zone", ["Nowhere/Land", "../../etc/passwd", "", "/etc/localtime", "a\0b"])
def test_an_unknown_zone_is_always_closed(zone: str) -> None:
    windows = window(zone, 0)
    assert not windows.contains(datetime(2026, 11, 23, 12, tzinfo=UTC))
    assert windows.end(datetime(2026, 11, 23, 12, tzinfo=UTC)) is None


def test_a_range_that_ends_before_it_starts_is_empty() -> None:
    windows = window("UTC", 0, ("17:00", "09:00"))
    assert not any(windows.contains(utc(2026, 11, 23, hour)) for hour in range(24))


def test_zones_are_known_also_on_a_machine_without_a_database_of_zones() -> None:
    program = "from actors.policy.windows import load_zone; print(load_zone('Europe/Berlin'))"
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONTZPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "Europe/Berlin"
