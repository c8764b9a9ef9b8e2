"""Comparison: what counts as worse, what as the same, and what as better."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from simulations.report.compare import Comparison, Tolerance, compare, tables
from simulations.report.merged import Report, merge
from simulations.result import Checked, Injected, Outcome, Pair, Result, Violation


def runs(
    count: int = 20,
    *,
    failed: int = 0,
    outcome: Outcome = "direct",
    others: int = 0,
    first_ms: int = 200,
    recovery_ms: int | None = 500,
    rule: int = 0,
) -> Report:
    """`failed`: runs whose check does not hold; `others`: runs with a relayed path; `rule`: runs
    that break one."""
    return merge(
        *(
            Result(
                scenario="x",
                seed=seed,
                pairs=(
                    Pair(
                        client="c",
                        resource="r",
                        client_nat="easy",
                        outcome="relayed" if seed < others else outcome,
                        first_answer_ns=first_ms * 10**6,
                    ),
                ),
                faults=(
                    Injected(
                        at_ns=1,
                        kind="crash",
                        targets=("g",),
                        recovery_ns=None if recovery_ms is None else recovery_ms * 10**6,
                    ),
                ),
                checks=(Checked(number=1, text="it is reached", held=seed >= failed),),
                violations=(Violation(at_ns=1, rule="nonces", detail=""),) * (seed < rule),
            )
            for seed in range(count)
        )
    )


def verdicts(found: Comparison) -> dict[str, str]:
    return {each.what: each.verdict for each in found.differences if each.verdict != "same"}


@pytest.mark.parametrize(
    ("after", "what"),
    [
        (runs(failed=2), {"runs that held", "check: it is reached"}),
        (runs(others=3), {"easy - no NAT: direct"}),
        (runs(outcome="failed"), {"easy - no NAT: direct", "easy - no NAT: failed"}),
        (runs(first_ms=230), {"first answer, direct, p50", "first answer, direct, p95"}),
        (runs(recovery_ms=900), {"recovery from crash, p50", "recovery from crash, p95"}),
        (runs(recovery_ms=None), {"crash: never recovered"}),
        (runs(rule=1), {"runs that held", "runs that broke: nonces"}),
    ],
    ids=["check", "relayed", "failed", "first answer", "recovery", "never", "rule"],
)
def test_what_is_worse_is_found_and_the_other_way_round_it_is_better(
    after: Report, what: set[str]
) -> None:
    worse = compare(runs(), after)
    assert verdicts(worse) == dict.fromkeys(what, "worse")
    assert worse.worse
    better = compare(after, runs())
    assert verdicts(better) == dict.fromkeys(what, "better")
    assert not better.worse


def test_the_same_is_the_same() -> None:
    assert not verdicts(compare(runs(), runs()))
    assert not compare(runs(), runs()).worse


def test_small_differences_and_few_times_are_no_change() -> None:
    assert not verdicts(compare(runs(), runs(first_ms=205)))
    assert not verdicts(compare(runs(3), runs(3, first_ms=900)))
    assert not verdicts(compare(runs(), runs(others=3), Tolerance(share=0.2)))
    assert not verdicts(compare(runs(), runs(first_ms=390), Tolerance(relative=1.0)))
    assert verdicts(compare(runs(), runs(first_ms=205), Tolerance(relative=0, absolute_ns=0)))


def test_the_table_shows_what_changed_or_everything() -> None:
    found = compare(runs(), runs(failed=2, first_ms=100))
    short, whole = io.StringIO(), io.StringIO()
    for part in tables(found, everything=False):
        Console(file=short, width=100).print(part)
    for part in tables(found, everything=True):
        Console(file=whole, width=100).print(part)
    assert re.search("worse +runs that held", short.getvalue())
    assert re.search("better +first answer, direct, p50", short.getvalue())
    assert "worse than before" in short.getvalue()
    assert "never recovered" not in short.getvalue()
    assert "never recovered" in whole.getvalue()
    assert b'"worse": true' in found.to_json()
