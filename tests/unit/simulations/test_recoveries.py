"""Which loss is blamed on which fault, and for how long."""

from __future__ import annotations

from simulations.traffic import SHOWS_NS, UNANSWERED, Pair

S = 10**9
MS = 10**6
TRIP = 50 * MS
END = 60 * S


def asked_twice_a_second(*lost: tuple[float, float]) -> Pair:
    """A pair whose questions of some stretches (s) were lost."""
    pair = Pair(0, "laptop", "web", b"")
    for number in range(120):
        at = number * S // 2
        is_lost = any(since * S <= at < until * S for since, until in lost)
        pair.asked.append(at)
        pair.answered.append(UNANSWERED if is_lost else at + TRIP)
    return pair


def test_recovery_is_counted_from_the_end_of_the_fault_to_the_next_answer() -> None:
    pair = asked_twice_a_second((10, 14))
    assert pair.recovered_ns(10 * S, 12 * S, END) == 2 * S + TRIP
    assert pair.recovered_ns(10 * S, 10 * S, END) == 4 * S + TRIP


def test_who_lost_nothing_was_not_disturbed_and_who_gets_nothing_more_never_recovered() -> None:
    assert asked_twice_a_second().recovered_ns(10 * S, 12 * S, END) == 0
    assert asked_twice_a_second((10, 99)).recovered_ns(10 * S, 12 * S, END) is None


def test_what_is_lost_soon_after_a_fault_is_its_work_and_later_it_is_not() -> None:
    assert asked_twice_a_second((14, 16)).recovered_ns(10 * S, 12 * S, END) == 4 * S + TRIP
    late = 12 + SHOWS_NS / S
    assert asked_twice_a_second((late, late + 2)).recovered_ns(10 * S, 12 * S, END) == 0


def test_what_is_lost_by_the_next_fault_is_not_blamed_on_the_one_before() -> None:
    """Neither what was asked at its very instant, nor what was on the way then."""
    at_its_instant = asked_twice_a_second((14, 16))
    assert at_its_instant.recovered_ns(10 * S, 12 * S, END, 14 * S) == 0
    assert at_its_instant.recovered_ns(14 * S, 14 * S, END) == 2 * S + TRIP
    on_the_way = asked_twice_a_second((14, 16))
    assert on_the_way.recovered_ns(10 * S, 12 * S, END, 14 * S + TRIP - 1) == 0
    assert on_the_way.recovered_ns(10 * S, 12 * S, END, 14 * S + TRIP + 1) == 4 * S + TRIP
