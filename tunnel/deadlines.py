"""`Deadlines`: many named instants, of which only the next one matters."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Deadlines(Generic[K]):
    """A dictionary of key to instant (ns) that knows its least value.

    Setting and cancelling cost a heap entry at most; stale entries are dropped as they surface.
    `next` is asked for again and again: it never hashes a key (that of a UUID is slow).
    """

    __slots__ = ("_by_key", "_heap", "_live", "_number")

    def __init__(self) -> None:
        self._by_key: dict[K, tuple[int, int]] = {}  # instant, and number of its entry
        self._live: set[int] = set()
        self._heap: list[tuple[int, int, K]] = []
        self._number = 0

    def set(self, key: K, at: int) -> None:
        """Name an instant, or move one that is named."""
        known = self._by_key.get(key)
        if known is not None:
            if known[0] == at:
                return
            self._live.discard(known[1])
        self._number += 1
        self._by_key[key] = at, self._number
        self._live.add(self._number)
        heapq.heappush(self._heap, (at, self._number, key))

    def cancel(self, key: K) -> None:
        """Forget an instant; nothing happens if there is none."""
        known = self._by_key.pop(key, None)
        if known is not None:
            self._live.discard(known[1])

    def get(self, key: K) -> int | None:
        known = self._by_key.get(key)
        return None if known is None else known[0]

    def next(self) -> int | None:
        """The least instant, None when there is none."""
        heap = self._heap
        while heap:
            at, number, _ = heap[0]
            if number in self._live:
                return at
            heapq.heappop(heap)
        return None

    def take_due(self, now: int) -> list[K]:
        """The keys whose instant has come, earliest first; they are forgotten."""
        due: list[K] = []
        while (at := self.next()) is not None and at <= now:
            key = heapq.heappop(self._heap)[2]
            self.cancel(key)
            due.append(key)
        return due

    def __len__(self) -> int:
        return len(self._by_key)
