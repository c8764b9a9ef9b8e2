"""The kernel beside virtual time: outcomes decide, and nothing else does."""

from __future__ import annotations

from io import StringIO

import attrs
from rich.console import Console

from simulations.kernel.against import compare, shown
from simulations.result import Checked, Pair, Result

PAIR = Pair(client="laptop", resource="wiki", expected="direct", outcome="direct", asked=9)
HELD = Checked(number=1, text="laptop reaches wiki", held=True)
VIRTUAL = Result(scenario="s", seed=3, pairs=(PAIR,), checks=(HELD,))
KERNEL = attrs.evolve(
    VIRTUAL, backend="kernel", pairs=(attrs.evolve(PAIR, first_answer_ns=5 * 10**9),)
)


def text(virtual: Result, kernel: Result) -> str:
    console = Console(width=120, record=True, file=StringIO())
    console.print(shown(compare(virtual, kernel)))
    return console.export_text()


def test_pairs_with_the_same_outcome_agree_however_long_they_took() -> None:
    assert compare(VIRTUAL, KERNEL).agrees
    assert "virtual time and the kernel agree, seed 3" in text(VIRTUAL, KERNEL)
    assert "- / 5000 ms" in text(VIRTUAL, KERNEL)


def test_another_outcome_is_a_difference() -> None:
    relayed = attrs.evolve(KERNEL, pairs=(attrs.evolve(PAIR, outcome="relayed"),))
    assert not compare(VIRTUAL, relayed).agrees
    assert "differs" in text(VIRTUAL, relayed)


def test_a_pair_of_one_world_alone_is_a_difference_unless_it_was_never_asked() -> None:
    further = attrs.evolve(PAIR, resource="printer")
    assert not compare(attrs.evolve(VIRTUAL, pairs=(PAIR, further)), KERNEL).agrees
    unasked = attrs.evolve(further, outcome="unasked")
    assert compare(attrs.evolve(VIRTUAL, pairs=(PAIR, unasked)), KERNEL).agrees


def test_a_run_that_ended_early_never_agrees() -> None:
    ended = attrs.evolve(KERNEL, error="LabError: no namespaces\nTraceback")
    assert compare(VIRTUAL, ended).errors == ("kernel: LabError: no namespaces",)
    assert not compare(VIRTUAL, ended).agrees


def test_a_check_that_held_in_one_world_alone_is_told() -> None:
    failed = attrs.evolve(HELD, held=False, detail="laptop to wiki is failed")
    told = compare(VIRTUAL, attrs.evolve(KERNEL, checks=(failed,)))
    assert told.agrees
    (line,) = told.checks
    assert line == ("held in virtual time alone: laptop reaches wiki (laptop to wiki is failed)")
    (line,) = compare(attrs.evolve(VIRTUAL, checks=(failed,)), KERNEL).checks
    assert line.startswith("held on the kernel alone")
