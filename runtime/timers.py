"""A timer heap whose entries can be moved and called off cheaply.

An entry that is moved to a later instant stays where it is and is moved when it comes up: an actor
that makes a hundred thousand calls, each with a deadline of five seconds, costs one place in the
heap and not a hundred thousand. Places that nobody wants any more are dropped when they come up,
or all together as soon as they are more than half of the heap.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any, Final, Protocol

REBUILD_AT_LEAST: Final = 64


class Scheduled(Protocol):
    """What the heap holds. Both fields belong to the heap; begin with None in both.

    `due_ns` is when the entry wants to be fired, `armed_ns` where its place in the heap is, which
    is never later."""

    due_ns: int | None
    armed_ns: int | None


class TimerHeap:
    """Entries by due time (ns); those of one instant in the order in which they took a place."""

    __slots__ = ("_abandoned", "_heap", "_sequence")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Any]] = []
        self._sequence = 0
        self._abandoned = 0

    def __len__(self) -> int:
        return len(self._heap)

    def arm(self, entry: Scheduled, due_ns: int) -> None:
        """Fire `entry` at `due_ns`, and not when it was to be fired before."""
        entry.due_ns = due_ns
        armed_ns = entry.armed_ns
        if armed_ns is not None and armed_ns <= due_ns:
            return
        self._push(entry, due_ns)
        if armed_ns is not None:
            self._abandon()

    def cancel(self, entry: Scheduled) -> None:
        """Do not fire `entry`, and forget it. (To keep its place, just set `due_ns` to None.)"""
        entry.due_ns = None
        if entry.armed_ns is not None:
            entry.armed_ns = None
            self._abandon()

    def next_due_ns(self) -> int | None:
        """When the next entry is due, or None. Moves and drops what came up before its time."""
        heap = self._heap
        while heap:
            at_ns, _, entry = heap[0]
            if entry.armed_ns == at_ns and entry.due_ns == at_ns:
                return at_ns
            heappop(heap)
            if entry.armed_ns != at_ns:
                self._abandoned -= 1
            elif entry.due_ns is None:
                entry.armed_ns = None
            else:
                self._push(entry, entry.due_ns)
        return None

    def pop_due(self, now_ns: int) -> Any | None:
        """Take the next entry due at `now_ns`, or None. It is then neither due nor armed."""
        due_ns = self.next_due_ns()
        if due_ns is None or due_ns > now_ns:
            return None
        entry = heappop(self._heap)[2]
        entry.due_ns = entry.armed_ns = None
        return entry

    def _push(self, entry: Scheduled, at_ns: int) -> None:
        self._sequence += 1
        entry.armed_ns = at_ns
        heappush(self._heap, (at_ns, self._sequence, entry))

    def _abandon(self) -> None:
        self._abandoned += 1
        if self._abandoned < REBUILD_AT_LEAST or 2 * self._abandoned < len(self._heap):
            return
        places = {id(item[2]): item for item in self._heap if item[2].armed_ns == item[0]}
        self._heap = list(places.values())
        heapify(self._heap)
        self._abandoned = 0
