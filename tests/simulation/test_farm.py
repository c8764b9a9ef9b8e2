"""Many seeds over real processes: order, deaths, limits, and one report whoever made it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simulations.farm.job import Job, perform
from simulations.farm.local import FarmError, FarmOptions, run_local
from simulations.farm.seeds import Gone
from simulations.report.merged import Merger, Report, report_to_json
from simulations.result import Result
from tests import farm_runners

SCENARIO = 'format = 1\nname = "empty"\n'


class Watched:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.seen: list[float] = []

    def advanced(self, done: float, *, failed: int, text: str = "") -> None:
        self.seen.append(done)

    def say(self, text: str) -> None:
        self.said.append(text)


def job(runner: Callable[..., Any], scenario: str = SCENARIO) -> Job:
    return Job(scenario=scenario, name="empty", runner=f"tests.farm_runners:{runner.__name__}")


def run(
    runner: Callable[..., Any], seeds: range, scenario: str = SCENARIO, **options: Any
) -> tuple[list[Result | Gone], Watched]:
    taken: list[Result | Gone] = []
    watched = Watched()
    farm_options = FarmOptions(**{"jobs": 2, **options})
    run_local(job(runner, scenario), seeds, farm_options, taken.append, watched)
    return taken, watched


def merged(outcomes: list[Result | Gone]) -> Report:
    merger = Merger("empty")
    for outcome in outcomes:
        if isinstance(outcome, Gone):
            merger.lose(outcome.seed, outcome.why)
        else:
            merger.add(outcome)
    return merger.report()


def test_the_report_is_the_same_however_many_processes_made_it() -> None:
    alone = merged([perform(job(farm_runners.made_up), seed) for seed in range(25)])
    taken, watched = run(farm_runners.made_up, range(25), jobs=3)
    assert report_to_json(merged(taken)) == report_to_json(alone)
    assert watched.seen[-1] == 25
    assert [failure.seed for failure in alone.failures] == [0, 10, 20]


def test_a_killed_worker_costs_a_rerun_of_its_seed_and_nothing_else(
    tmp_path: Path,
) -> None:
    scenario = f'{SCENARIO}description = "{tmp_path}"\n'
    taken, watched = run(farm_runners.killed_at_first, range(1, 9), scenario=scenario)
    assert [outcome.seed for outcome in taken] == list(range(1, 9))
    assert all(isinstance(outcome, Result) for outcome in taken)
    assert sorted(watched.said) == [
        f"seed {seed}: its worker was killed by SIGKILL; it is run again" for seed in (3, 6)
    ]


def test_a_seed_that_kills_every_worker_is_reported_and_the_others_are_run() -> None:
    taken, _ = run(farm_runners.deadly, range(4, 8))
    assert [outcome.seed for outcome in taken] == [4, 5, 6, 7]
    assert taken[1] == Gone(5, "its worker ended with 9: out of luck (3 times)")
    report = merged(taken)
    assert not report.all_held
    assert report.held == report.runs == 3


def test_a_seed_that_takes_too_long_is_ended() -> None:
    taken, _ = run(farm_runners.hanging, range(1, 4), seed_limit_s=3.0)
    assert [type(outcome) for outcome in taken] == [Result, Gone, Result]
    assert "took longer than 3 s" in taken[1].why  # type: ignore[union-attr]


def test_where_every_worker_dies_the_farm_ends_and_says_why() -> None:
    with pytest.raises(
        FarmError, match="8 workers died in a row; the last: its worker ended with 3"
    ):
        run(farm_runners.always_dying, range(100))


def test_what_a_run_prints_is_not_taken_for_a_result() -> None:
    taken, watched = run(farm_runners.chatty, range(1, 3))
    assert [outcome.seed for outcome in taken] == [1, 2]
    assert any(seen % 1 for seen in watched.seen)  # part of a seed


def test_what_is_raised_in_a_run_is_a_finding_with_its_seed() -> None:
    taken, _ = run(farm_runners.failing, range(1, 2))
    [result] = taken
    assert isinstance(result, Result)
    assert not result.held
    assert result.error.startswith("RuntimeError: an actor was not where it should be\n")


def test_it_ends_early_when_enough_runs_have_failed() -> None:
    taken, _ = run(farm_runners.made_up, range(200), stop_after=2)
    assert len([each for each in taken if isinstance(each, Result) and not each.held]) >= 2
    assert len(taken) < 100
