"""The event heap: order of events, parts that are flushed once, timers that follow their core."""

from __future__ import annotations

import attrs
import pytest

from simulations.net.heap import Timeline
from simulations.net.world import World

NS = 10**9


@attrs.define(eq=False)
class Alarm:
    """A part that writes down when it was called, and whose timer is set by hand."""

    due: int | None = None
    calls: list[tuple[str, int]] = attrs.field(factory=list)
    every_ns: int = 0

    def poll_timeout(self) -> int | None:
        return self.due

    def handle_timeout(self, now: int) -> None:
        self.calls.append(("timer", now))
        self.due = now + self.every_ns if self.every_ns else None

    def flush(self, now: int) -> None:
        self.calls.append(("flush", now))

    def timers(self) -> list[int]:
        return [at for what, at in self.calls if what == "timer"]


def test_events_happen_by_instant_and_then_in_the_order_of_asking() -> None:
    world = Timeline()
    happened: list[tuple[str, int]] = []

    def happen(name: str) -> None:
        happened.append((name, world.now))

    world.after(20, happen, "c")
    world.after(10, happen, "a")
    world.after(20, happen, "d")
    world.after(10, happen, "b")
    world.run_for(15)
    assert (happened, world.now) == ([("a", 10), ("b", 10)], 15)
    world.run_for(5)
    assert happened[2:] == [("c", 20), ("d", 20)]


def test_an_event_at_once_comes_after_those_that_are_due_already() -> None:
    world = Timeline()
    happened: list[str] = []

    def first() -> None:
        happened.append("first")
        world.after(0, happened.append, "asked by the first")

    world.after(10, first)
    world.after(10, happened.append, "second")
    world.run_for(10)
    assert happened == ["first", "second", "asked by the first"]


def test_the_past_takes_no_events() -> None:
    with pytest.raises(ValueError, match="past"):
        Timeline().after(-1, print)


def test_the_clock_of_the_world_moves_with_it_also_where_nothing_happens() -> None:
    world = Timeline()
    world.run_for(3 * NS)
    assert world.now == world.clock.monotonic_ns() == 3 * NS


def test_a_run_ends_as_soon_as_its_condition_holds() -> None:
    world = Timeline()
    happened: list[int] = []
    for each in range(5):
        world.after(each * 10, happened.append, each)
    assert world.run_until(lambda: len(happened) == 3, limit_ns=NS)
    assert world.now == 20
    assert not world.run_until(lambda: len(happened) == 9, limit_ns=100)
    assert world.now == 120


def test_a_condition_is_asked_no_more_often_than_wanted() -> None:
    world = Timeline()
    asked: list[int] = []
    for each in range(100):
        world.after(each, asked.count, 0)

    def holds() -> bool:
        asked.append(world.now)
        return False

    world.run_until(holds, limit_ns=200, check_every_ns=40)
    assert asked == [0, 40, 80, 200]


def test_a_touched_part_is_flushed_once_after_the_event() -> None:
    world = Timeline()
    part = Alarm()
    world.add(part)
    world.run_for(0)
    part.calls.clear()

    def event() -> None:
        world.touch(part)
        world.touch(part)
        assert part.calls == []

    world.after(10, event)
    world.run_for(10)
    assert part.calls == [("flush", 10)]


def test_what_was_touched_between_runs_is_flushed_at_the_start_of_the_next() -> None:
    world = Timeline()
    part = Alarm()
    world.add(part)
    world.run_for(5)
    world.touch(part)
    assert world.run_until(lambda: part.calls == [("flush", 0), ("flush", 5)], limit_ns=0)


def test_parts_are_flushed_in_the_order_in_which_they_were_touched() -> None:
    world = Timeline()
    order: list[str] = []

    @attrs.define(eq=False)
    class Named:
        name: str
        wakes: Named | None = None

        def poll_timeout(self) -> int | None:
            return None

        def handle_timeout(self, now: int) -> None: ...

        def flush(self, now: int) -> None:
            order.append(self.name)
            if self.wakes is not None:
                world.touch(self.wakes)

    c = Named("c")
    b = Named("b", c)
    a = Named("a", c)
    for part in (a, b, c):
        world.add(part)
    world.run_for(0)
    order.clear()

    def event() -> None:
        world.touch(b)
        world.touch(a)

    world.after(1, event)
    world.run_for(1)
    assert order == ["b", "a", "c"]


def test_a_timer_fires_when_it_is_due_and_the_part_is_flushed_after_it() -> None:
    world = Timeline()
    part = Alarm(due=50)
    world.add(part)
    world.run_for(100)
    assert part.calls == [("flush", 0), ("timer", 50), ("flush", 50)]


def test_a_timer_that_was_put_off_fires_at_the_later_instant_only() -> None:
    world = Timeline()
    part = Alarm(due=50)
    world.add(part)

    def put_off() -> None:
        part.due = 80
        world.touch(part)

    world.after(40, put_off)
    world.run_for(100)
    assert part.timers() == [80]


def test_a_timer_that_was_brought_forward_or_taken_back_follows() -> None:
    world = Timeline()
    part = Alarm(due=50)
    world.add(part)

    def change(due: int | None) -> None:
        part.due = due
        world.touch(part)

    world.after(10, change, 20)
    world.after(30, change, 90)
    world.after(60, change, None)
    world.run_for(100)
    assert part.timers() == [20]


def test_a_periodic_timer_does_not_pile_up_events() -> None:
    world = Timeline()
    part = Alarm(due=1, every_ns=10)
    world.add(part)
    world.run_for(1_000)
    assert part.timers() == list(range(1, 1_001, 10))
    assert len(list(world.events_to_come())) == 1


def test_a_timer_that_is_moved_often_does_not_pile_up_events() -> None:
    world = Timeline()
    part = Alarm(due=10_000)
    world.add(part)

    def move(due: int) -> None:
        part.due = due
        world.touch(part)

    for n in range(1, 100):
        world.after(n, move, 10_000 - n if n % 2 else 10_000 + n)
    world.run_for(100)
    assert len(list(world.events_to_come())) <= 51
    world.run_for(20_000)
    assert part.timers() == [10_000 - 99]
    assert list(world.events_to_come()) == []


def test_a_removed_part_is_left_alone() -> None:
    world = Timeline()
    part = Alarm(due=50)
    world.add(part)
    world.run_for(10)
    world.touch(part)
    world.remove(part)
    world.remove(part)
    world.touch(part)
    world.run_for(100)
    assert part.calls == [("flush", 0)]


def test_a_part_is_in_the_world_once() -> None:
    world = Timeline()
    part = Alarm()
    world.add(part)
    with pytest.raises(ValueError, match="already"):
        world.add(part)


def test_a_timer_that_stays_due_is_found_out() -> None:
    world = Timeline()

    class Stuck(Alarm):
        def handle_timeout(self, now: int) -> None: ...

    world.add(Stuck(due=10))
    with pytest.raises(RuntimeError, match="stays due at 10 ns"):
        world.run_for(100)


def test_events_without_end_at_one_instant_are_found_out() -> None:
    world = Timeline()

    def again() -> None:
        world.after(0, again)

    world.after(5, again)
    with pytest.raises(RuntimeError, match="does not come to rest at 5 ns"):
        world.run_for(10)


def test_parts_of_a_paused_host_stand_still_and_catch_up() -> None:
    world = World(1)
    host = world.host("laptop", world.internet)
    part = Alarm(due=50)
    world.add(part, host=host)
    world.after(40, host.pause)
    world.after(90, host.resume)
    world.after(60, world.touch, part)
    world.run_for(100)
    assert part.calls == [("flush", 0), ("flush", 90), ("timer", 90), ("flush", 90)]


def test_parts_of_a_dead_host_are_not_called() -> None:
    world = World(1)
    host = world.host("laptop", world.internet)
    part = Alarm(due=50)
    world.add(part, host=host)
    world.after(40, host.crash)
    world.run_for(100)
    assert part.calls == [("flush", 0)]


@pytest.mark.parametrize("ppm", [500_000, -500_000, 37, -41, 333_333])
def test_parts_go_by_the_clock_of_their_host(ppm: int) -> None:
    world = World(1)
    host = world.host("laptop", world.internet)
    part = Alarm(due=1_000_000)
    world.add(part, host=host)
    world.after(400_000, host.drift, ppm)
    world.run_for(3_000_000)
    (fired,) = part.timers()
    assert 1_000_000 <= fired <= 1_000_001
    expected = 400_000 + 600_000 * 10**6 // (10**6 + ppm)
    at_world = host.world_time(1_000_000)
    assert expected <= at_world <= expected + 1
