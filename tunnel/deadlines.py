"""`Deadlines`: many named instants, of which only the next one matters."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Deadlines(Generic[K]):
    """A dictionary of key to instant (ns) that knows its least value.

    Setting and cancelling cost a heap entry at most; stale entries are dropped as they surface.
    """

    __slots__ = ("_at_by_key", "_heap", "_number")

    def __init__(self) -> None:
        self._at_by_key: dict[K, int] = {}
        self._heap: list[tuple[int, int, K]] = []
        self._number = 0

    def set(self, key: K, at: int) -> None:
        """Name an instant, or move one that is named."""
        if self._at_by_key.get(key) == at:
            return
        self._at_by_key[key] = at
        self._number += 1
        heapq.heappush(self._heap, (at, self._number, key))

    def cancel(self, key: K) -> None:
        """Forget an instant; nothing happens if there is none."""
        self._at_by_key.pop(key, None)

    def get(self, key: K) -> int | None:
        return self._at_by_key.get(key)

    def next(self) -> int | None:
        """The least instant, None when there is none."""
        while self._heap:
            at, _, key = self._heap[0]
            if self._at_by_key.get(key) == at:
                return at
            heapq.heappop(self._heap)
        return None

    def take_due(self, now: int) -> list[K]:
        """The keys whose instant has come, earliest first; they are forgotten."""
        due: list[K] = []
        while (at := self.next()) is not None and at <= now:
            key = heapq.heappop(self._heap)[2]
            del self._at_by_key[key]
            due.append(key)
        return due

    def __len__(self) -> int:
        return len(self._at_by_key)
