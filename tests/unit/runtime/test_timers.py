"""The timer heap against a plain list."""

from __future__ import annotations

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.timers import REBUILD_AT_LEAST, TimerHeap

SLOTS = 5


@attrs.define(eq=False)
class Entry:
    due_ns: int | None = None
    armed_ns: int | None = None


class TimerHeapAgainstAList(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.heap = TimerHeap()
        self.entries = [Entry() for _ in range(SLOTS)]
        self.due: dict[int, int] = {}

    @rule(slot=st.integers(0, SLOTS - 1), at=st.integers(0, 50), times=st.integers(1, 100))
    def arm(self, slot: int, at: int, times: int) -> None:
        for earlier in reversed(range(times)):
            self.heap.arm(self.entries[slot], at + earlier)
        self.due[slot] = at

    @rule(slot=st.integers(0, SLOTS - 1))
    def cancel(self, slot: int) -> None:
        self.heap.cancel(self.entries[slot])
        self.due.pop(slot, None)

    @rule(slot=st.integers(0, SLOTS - 1))
    def disarm_and_keep_the_place(self, slot: int) -> None:
        self.entries[slot].due_ns = None
        self.due.pop(slot, None)

    @rule(now=st.integers(0, 60))
    def pop(self, now: int) -> None:
        while (entry := self.heap.pop_due(now)) is not None:
            slot = self.entries.index(entry)
            assert self.due.pop(slot) <= now
        assert all(at > now for at in self.due.values())

    @invariant()
    def the_next_is_the_earliest_and_the_heap_stays_small(self) -> None:
        assert self.heap.next_due_ns() == min(self.due.values(), default=None)
        assert len(self.heap) <= 2 * SLOTS + REBUILD_AT_LEAST


TestTimerHeap = TimerHeapAgainstAList.TestCase
TestTimerHeap.settings = settings(max_examples=100, deadline=None)


def test_entries_of_one_instant_come_in_the_order_of_arming():
    heap = TimerHeap()
    entries = [Entry() for _ in range(10)]
    for entry in entries:
        heap.arm(entry, 7)
    assert [heap.pop_due(7) for _ in range(10)] == entries
    assert heap.pop_due(7) is None
