"""Time as a seam: nobody but a shell reads a clock, and a shell reads it through this one.

Two kinds of time are kept apart. `monotonic_ns` orders and bounds things inside one machine: it
counts while the machine is suspended (CLOCK_BOOTTIME), so that a laptop that slept does not
extend anybody's access. `utc_now` is for instants that people or other machines see.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

NS_PER_S: Final = 10**9
NS_PER_MS: Final = 10**6
NS_PER_US: Final = 10**3


def earliest(*instants: int | None) -> int | None:
    """The least of those that are not None; None where all are. For timers."""
    least = None
    for instant in instants:
        if instant is not None and (least is None or instant < least):
            least = instant
    return least


class Clock(Protocol):
    """What a shell asks for the time."""

    def monotonic_ns(self) -> int:
        """Nanoseconds since an arbitrary start; never goes back; counts through a suspend."""

    def utc_now(self) -> datetime:
        """The present instant, aware, in UTC. It may jump when the machine's clock is set."""


class SystemClock:
    """The machine's clocks: CLOCK_BOOTTIME and the wall clock."""

    __slots__ = ()

    def monotonic_ns(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def utc_now(self) -> datetime:
        return datetime.now(UTC)


class VirtualClock:
    """A clock that moves only when told, for simulations and tests.

    `start_ns` is the first value of `monotonic_ns`, `utc_start` (aware) the instant at which it
    has that value; both kinds of time then advance together, but for `jump_wall`.
    """

    __slots__ = ("_now_ns", "_start_ns", "_utc_start")

    def __init__(
        self, start_ns: int = 0, utc_start: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    ) -> None:
        if utc_start.tzinfo is None:
            raise ValueError("utc_start must be aware")
        self._start_ns = start_ns
        self._now_ns = start_ns
        self._utc_start = utc_start.astimezone(UTC)

    def monotonic_ns(self) -> int:
        return self._now_ns

    def utc_now(self) -> datetime:
        return self._utc_start + timedelta(microseconds=(self._now_ns - self._start_ns) // 1_000)

    def advance_to(self, ns: int) -> None:
        """Move to `ns` on the monotonic scale. Raises ValueError if that lies in the past."""
        if ns < self._now_ns:
            raise ValueError(f"time does not go back: {ns} < {self._now_ns}")
        self._now_ns = ns

    def advance(self, duration_ns: int) -> None:
        """Move on by `duration_ns` (0 or more)."""
        self.advance_to(self._now_ns + duration_ns)

    def jump_wall(self, duration_ns: int) -> None:
        """Set the wall clock forward (back, if negative), as an administrator or NTP does: from now
        on `utc_now` is so much later. Monotonic time stays."""
        self._utc_start += timedelta(microseconds=duration_ns // 1_000)

    def __repr__(self) -> str:
        return f"VirtualClock(now_ns={self._now_ns})"
