"""The event heap: virtual time, what happens in it, and the parts that act.

An event is a call that is due at an instant. Events happen in the order of their instants, and at
one instant in the order in which they were asked for; nothing else decides, so a run is the same in
every process. There is no way to take an event back: what may become needless looks, when it
happens, whether it still matters.

Most of what waits is timers of later, of which every host has some. They stand aside in spans of
time, unsorted, and come into the heap when their span begins; so the heap is as small as what
happens soon, however large the world is.

A part is a core with a timer (an agent, a relay, the control plane). The heap never walks over all
parts: who gives a part something calls `touch`, and after the present event the part is flushed
once and its timer is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from itertools import chain
from typing import Any, Final, Protocol

from runtime.clock import VirtualClock

MAX_AT_ONE_INSTANT: Final = 1_000_000
MAX_FIRINGS_AT_ONE_INSTANT: Final = 10_000
SPAN_BITS: Final = 24
"""A span lasts 2**24 ns, about 17 ms."""

Event = tuple[int, int, Callable[..., object], tuple[Any, ...]]


class Part(Protocol):
    """Something that acts in the world. Hashed by identity (attrs: `eq=False`)."""

    def poll_timeout(self) -> int | None:
        """When (ns, by the clock of the host it stands on) `handle_timeout` is due."""

    def handle_timeout(self, now: int) -> None: ...

    def flush(self, now: int) -> None:
        """Put out what the core has: datagrams, frames, packets."""


class Ground(Protocol):
    """What a part stands on: its clock, and whether it may run at all. A host is one."""

    @property
    def runs(self) -> bool: ...

    def local_time(self, world_ns: int) -> int: ...

    def world_time(self, local_ns: int) -> int: ...


class Seat:
    """A part, whether it waits to be flushed, and the instant of its earliest event."""

    __slots__ = ("armed", "fired", "firings", "ground", "part", "taken", "touched", "wants")

    def __init__(self, part: Part, ground: Ground | None) -> None:
        self.part = part
        self.ground = ground
        self.armed: int | None = None
        self.wants: int | None = None
        self.touched = False
        self.taken = True
        self.fired = -1
        self.firings = 0


class Timeline:
    """See the head of this file. `now` is the present instant (ns)."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.now = 0
        self.heap: list[Event] = []
        """All that happens before `_heap_until`. Whoever asks for something soon may push it here
        whatever its instant; `after` puts what is later aside."""
        self._heap_until = 0
        self._aside: dict[int, list[Event]] = {}  # by span
        self._spans: list[int] = []  # a heap of the keys of `_aside`
        self.serial = 0
        self.events = 0
        self._seats: dict[Part, Seat] = {}
        self._touched: list[Seat] = []

    def after(self, delay_ns: int, act: Callable[..., object], *args: Any) -> None:
        """Call `act(*args)` in `delay_ns` (0 or more: 0 is after the present event)."""
        if delay_ns < 0:
            raise ValueError("nothing happens in the past")
        self._push(self.now + delay_ns, act, args)

    def events_to_come(self) -> Iterator[Event]:
        """All that waits, in no order."""
        return chain(self.heap, *self._aside.values())

    def _push(self, instant: int, act: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.serial += 1
        event = (instant, self.serial, act, args)
        if instant < self._heap_until:
            heappush(self.heap, event)
            return
        span = instant >> SPAN_BITS
        aside = self._aside.get(span)
        if aside is None:
            self._aside[span] = [event]
            heappush(self._spans, span)
        else:
            aside.append(event)

    def _next_instant(self) -> int | None:
        """When the next event is due: it is on top of the heap then. None: nothing waits."""
        heap, spans = self.heap, self._spans
        while spans and (not heap or spans[0] << SPAN_BITS <= heap[0][0]):
            heap += self._aside.pop(heappop(spans))
            heapify(heap)
        if not heap:
            return None
        self._heap_until = ((heap[0][0] >> SPAN_BITS) + 1) << SPAN_BITS
        return heap[0][0]

    # --- parts ---

    def add(self, part: Part, *, host: Ground | None = None) -> None:
        """Let it act from now on. On a host it goes by that host's clock (`poll_timeout`, and the
        `now` it is given), and stands still while the host is paused or dead."""
        if part in self._seats:
            raise ValueError(f"{part!r} is in the world already")
        self._seats[part] = Seat(part, host)
        self.touch(part)

    def remove(self, part: Part) -> None:
        """It is never called again. Nothing happens if it is not in the world."""
        seat = self._seats.pop(part, None)
        if seat is not None:
            seat.taken = False

    def touch(self, part: Part) -> None:
        """Something happened to it: after the present event it is flushed once, and its timer is
        read. Nothing happens if it is not in the world."""
        seat = self._seats.get(part)
        if seat is not None and not seat.touched:
            seat.touched = True
            self._touched.append(seat)

    def touch_all_on(self, ground: Ground) -> None:
        """`touch` every part on a host, as when its clock was changed or it goes on."""
        for part, seat in self._seats.items():
            if seat.ground is ground:
                self.touch(part)

    # --- time ---

    def run_until(
        self,
        holds: Callable[[], object],
        *,
        limit_ns: int = 60 * 10**9,
        check_every_ns: int = 0,
    ) -> bool:
        """Let time pass until the condition holds; False if it does not within the limit.

        It is asked at the start, at the end, and after each instant at which something happened,
        but not again before `check_every_ns` went by. Raises RuntimeError when more than
        MAX_AT_ONE_INSTANT events happen at one.
        """
        self._settle()
        if holds():
            return True
        end = self.now + limit_ns
        if self._run(end, holds, check_every_ns):
            return True
        self._move_to(end)
        return bool(holds())

    def run_for(self, duration_ns: int) -> None:
        """Let that much time pass."""
        self._settle()
        end = self.now + duration_ns
        self._run(end, None, 0)
        self._move_to(end)

    def _move_to(self, instant: int) -> None:
        if instant > self.now:
            self.now = instant
            self.clock.advance_to(instant)

    def _run(self, end: int, holds: Callable[[], object] | None, every_ns: int) -> bool:
        """All events up to an instant, unless the condition holds before; whether it does."""
        heap = self.heap
        touched = self._touched
        next_instant = self._next_instant
        advance_to = self.clock.advance_to
        ask_at = self.now + every_ns
        at_this_instant = 0
        while True:
            if not heap or heap[0][0] >= self._heap_until:
                soonest = next_instant()
                if soonest is None or soonest > end:
                    return False
            elif heap[0][0] > end:
                return False
            instant, _, act, args = heappop(heap)
            if instant > self.now:
                self.now = instant
                advance_to(instant)
                at_this_instant = 0
            act(*args)
            self.events += 1
            if touched:
                self._settle()
            at_this_instant += 1
            if at_this_instant > MAX_AT_ONE_INSTANT:
                raise RuntimeError(f"the world does not come to rest at {instant} ns: {act}")
            if holds is None or self.now < ask_at or (heap and heap[0][0] <= self.now):
                continue
            if holds():
                return True
            ask_at = self.now + every_ns

    def _settle(self) -> None:
        """Flush who was touched, in that order; whoever is touched meanwhile, after them."""
        touched = self._touched
        for count, seat in enumerate(touched):
            if count > MAX_AT_ONE_INSTANT:
                raise RuntimeError(f"{seat.part!r} and others do not come to rest at {self.now} ns")
            seat.touched = False
            if not seat.taken:
                continue
            ground = seat.ground
            if ground is None:
                seat.part.flush(self.now)
                seat.wants = seat.part.poll_timeout()
            elif ground.runs:
                seat.part.flush(ground.local_time(self.now))
                wants = seat.part.poll_timeout()
                seat.wants = None if wants is None else ground.world_time(wants)
            else:
                continue  # touched anew when the host goes on
            self._arm(seat)
        touched.clear()

    def _arm(self, seat: Seat) -> None:
        wants = seat.wants
        if wants is None:
            return
        if wants < self.now:
            wants = self.now
        if seat.armed is None or wants < seat.armed:
            seat.armed = wants
            self._push(wants, self._fire, (seat, wants))

    def _fire(self, seat: Seat, instant: int) -> None:
        if seat.armed != instant or not seat.taken:
            return  # an earlier one came in between
        seat.armed = None
        if seat.wants is None:
            return
        if seat.wants > self.now:
            self._arm(seat)
            return
        ground = seat.ground
        if ground is not None and not ground.runs:
            return
        if seat.fired != self.now:
            seat.fired, seat.firings = self.now, 0
        seat.firings += 1
        if seat.firings > MAX_FIRINGS_AT_ONE_INSTANT:
            raise RuntimeError(f"the timer of {seat.part!r} stays due at {self.now} ns")
        seat.wants = None
        seat.part.handle_timeout(self.now if ground is None else ground.local_time(self.now))
        if not seat.touched:
            seat.touched = True
            self._touched.append(seat)
