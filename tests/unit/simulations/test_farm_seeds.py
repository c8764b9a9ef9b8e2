"""The farm's book: every seed leaves once, in order, and few results wait."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from simulations.farm.seeds import Gone, Seeds
from simulations.result import Result


def result(seed: int) -> Result:
    return Result(scenario="x", seed=seed)


@given(
    count=st.integers(0, 40),
    ahead=st.integers(1, 9),
    choices=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3)), max_size=300),
)
def test_whatever_workers_do_every_seed_leaves_once_and_in_order(
    count: int, ahead: int, choices: list[tuple[int, int]]
) -> None:
    seeds = Seeds(range(count), ahead=ahead, tries=3)
    under_way: list[int] = []
    left: list[int] = []
    gone: set[int] = set()

    def step(choice: int, what: int) -> None:
        if what == 0 or not under_way:
            taken = seeds.take()
            if taken is not None:
                under_way.append(taken)
        else:
            seed = under_way.pop(choice % len(under_way))
            if what == 1:
                seeds.died(seed, "it died")
            else:
                seeds.finished(seed, result(seed))
        for outcome in seeds.leaving():
            left.append(outcome.seed)
            if isinstance(outcome, Gone):
                gone.add(outcome.seed)
        assert len(under_way) <= ahead
        assert 0 <= seeds.done <= count

    for choice, what in choices:
        step(choice, what)
    while not seeds.over:
        step(0, 0)
        step(0, 2)
    assert left == list(range(count))
    assert seeds.failed == len(gone)
    assert seeds.done == count


def test_a_seed_is_given_up_after_its_tries_and_its_reason_is_told() -> None:
    seeds = Seeds([7, 8], ahead=2, tries=2)
    assert seeds.take() == 7
    assert seeds.died(7, "killed")
    assert seeds.take() == 7
    assert not seeds.died(7, "killed")
    assert list(seeds.leaving()) == [Gone(7, "killed (2 times)")]


def test_a_result_that_nobody_waits_for_is_not_taken() -> None:
    seeds = Seeds([1], ahead=1)
    seeds.finished(1, result(1))
    assert not list(seeds.leaving())
    assert seeds.take() == 1
    seeds.finished(1, result(1))
    seeds.finished(1, result(1))
    assert len(list(seeds.leaving())) == 1
