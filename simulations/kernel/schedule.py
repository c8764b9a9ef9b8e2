"""A heap of events on the machine's own clock: what the simulator's world is in virtual time."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from itertools import count
from typing import Any


class Schedule:
    """Everything happens in the thread that calls `run_until`. Instants are of the monotonic clock
    (ns); what is late happens late, in its order."""

    def __init__(self) -> None:
        self._events: list[tuple[int, int, Callable[..., object], tuple[Any, ...]]] = []
        self._numbers = count()

    @property
    def now(self) -> int:
        return time.monotonic_ns()

    def after(self, delay_ns: int, act: Callable[..., object], *arguments: Any) -> None:
        """Have something happen after so long."""
        heapq.heappush(
            self._events, (self.now + delay_ns, next(self._numbers), act, arguments)
        )  # fmt: skip

    def run_until(self, instant: int) -> None:
        """Let happen what is due, until then."""
        while (now := self.now) < instant:
            if self._events and self._events[0][0] <= now:
                _, _, act, arguments = heapq.heappop(self._events)
                act(*arguments)
                continue
            due = min(instant, self._events[0][0]) if self._events else instant
            time.sleep(max(0, due - now) / 10**9)
