"""Which seeds are still to be run, which are under way, and whose results wait for their turn.

A core: no process, no clock. Results leave in the order of the seeds, whatever the order in which
they come, so that a report is the same however many workers made it. No seed is handed out that is
more than `ahead` beyond the first one without a result, so at most so many results wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from simulations.farm.job import MAX_TRIES
from simulations.result import Result


@attrs.frozen
class Gone:
    """A seed that was given up, and why."""

    seed: int
    why: str


class Seeds:
    """The seeds of one run of the farm."""

    def __init__(self, seeds: Sequence[int], *, ahead: int, tries: int = MAX_TRIES) -> None:
        self._seeds = seeds
        self._ahead = ahead
        self._tries = tries
        self._next = 0
        self._again: list[int] = []
        self._tried: dict[int, int] = {}
        self._first = 0
        """The place of the first seed whose result has not left."""
        self._waiting: dict[int, Result | Gone] = {}
        self._under_way: dict[int, float] = {}
        self.failed = 0
        """Of those that have left."""

    @property
    def over(self) -> bool:
        """Whether every seed has left, with a result or without."""
        return self._first == len(self._seeds)

    @property
    def done(self) -> float:
        """How many seeds are done, those under way by their share."""
        return self._first + len(self._waiting) + sum(self._under_way.values())

    def take(self) -> int | None:
        """A seed to be run, or None if there is none now."""
        if self._again:
            seed = self._again.pop()
        elif self._next < min(len(self._seeds), self._first + self._ahead):
            seed = self._seeds[self._next]
            self._next += 1
        else:
            return None
        self._tried[seed] = self._tried.get(seed, 0) + 1
        self._under_way[seed] = 0.0
        return seed

    def progressed(self, seed: int, share: float) -> None:
        """A seed under way is so far."""
        if seed in self._under_way:
            self._under_way[seed] = share

    def finished(self, seed: int, result: Result) -> None:
        """A seed gave a result. One that nobody waits for any more is not taken."""
        if self._under_way.pop(seed, None) is None:
            return
        self._waiting[seed] = result

    def died(self, seed: int, why: str) -> bool:
        """The worker of a seed died. False if it was given up with that, else it is run again."""
        if self._under_way.pop(seed, None) is None:
            return True
        if self._tried[seed] < self._tries:
            self._again.append(seed)
            return True
        self._waiting[seed] = Gone(seed, f"{why} ({self._tried[seed]} times)")
        return False

    def leaving(self) -> Iterator[Result | Gone]:
        """Those whose turn has come."""
        while self._first < len(self._seeds):
            seed = self._seeds[self._first]
            outcome = self._waiting.pop(seed, None)
            if outcome is None:
                return
            self._tried.pop(seed, None)
            self._first += 1
            self.failed += isinstance(outcome, Gone) or not outcome.held
            yield outcome
