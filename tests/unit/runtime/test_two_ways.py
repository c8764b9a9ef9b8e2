"""What may run in two ways runs to one outcome: a call on the spot or through the mailbox, a
scheduler on trio or on the event heap, a process of one hash seed or another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.actor import ActorError
from runtime.clock import NS_PER_S, SystemClock, VirtualClock
from runtime.host import TrioHost
from runtime.randomness import SeededRandomness, SystemRandomness
from runtime.scheduler import Scheduler
from runtime.testing import Faults, HeapHost, heap_sleep, seeded_host
from tests.unit.runtime.programs import Awaiting, Refused, build, outcome, programs

DEADLINE_NS = 60 * NS_PER_S


async def heap_effect(value: int) -> float:
    await heap_sleep(1_000 * value)
    return 60 / value


async def trio_effect(value: int) -> float:
    await trio.sleep(value / 1e6)
    return 60 / value


def run_on_heap(program: list[Any], calls_in_caller: int = 64) -> tuple[Any, Any, Scheduler]:
    clock = VirtualClock()
    scheduler = Scheduler(
        clock=clock,
        randomness=SeededRandomness(1, "actors"),
        calls_in_caller_per_turn=calls_in_caller,
    )
    answers, became = run_program(HeapHost(scheduler, clock), program)
    return answers, became, scheduler


def run_program(host: HeapHost, program: list[Any]) -> tuple[Any, Any]:
    nodes = build(host.scheduler, heap_effect)
    answers: list[Any] = []
    for number, steps in program:
        try:
            answers.append(host.call(nodes[0].refs[number], Awaiting(steps), DEADLINE_NS))
        except (ActorError, Refused) as error:
            answers.append(f"{type(error).__name__}: {error}")
        host.run_for(NS_PER_S)
    return answers, outcome(nodes)


async def run_on_trio(program: list[Any]) -> tuple[Any, Any]:
    scheduler = Scheduler(clock=SystemClock(), randomness=SystemRandomness())
    host = TrioHost(scheduler)
    nodes = build(scheduler, trio_effect)
    answers: list[Any] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        for number, steps in program:
            try:
                answers.append(await host.call(nodes[0].refs[number], Awaiting(steps), DEADLINE_NS))
            except (ActorError, Refused) as error:
                answers.append(f"{type(error).__name__}: {error}")
            while scheduler.has_work or scheduler.next_deadline() is not None:
                await trio.sleep(0.0001)
        became = outcome(nodes)
        nursery.cancel_scope.cancel()
    return answers, became


@settings(max_examples=400, deadline=None)
@given(programs)
def test_a_call_on_the_spot_and_one_through_the_mailbox_have_one_outcome(program: list[Any]):
    answers, became, on_the_spot = run_on_heap(program)
    other_answers, other_became, by_mailbox = run_on_heap(program, calls_in_caller=0)
    assert answers == other_answers
    assert became == other_became
    assert by_mailbox.statistics().calls_in_caller == 0
    one, other = on_the_spot.statistics(), by_mailbox.statistics()
    assert one.calls_in_caller + one.calls_by_mailbox == other.calls_by_mailbox
    for name in ("ended", "crashed", "call_cycles", "calls_timed_out", "late_replies"):
        assert getattr(one, name) == getattr(other, name), name


@settings(max_examples=60, deadline=None)
@given(programs)
def test_the_trio_host_and_the_heap_host_have_one_outcome(program: list[Any]):
    answers, became, _ = run_on_heap(program)
    assert trio.run(run_on_trio, program) == (answers, became)


@settings(max_examples=200, deadline=None)
@given(programs, st.integers(0, 2**32))
def test_whatever_the_order_of_turns_there_is_one_outcome(program: list[Any], seed: int):
    answers, became, _ = run_on_heap(program)
    host = seeded_host(Faults(seed=seed, shuffles_turns=True))
    assert run_program(host, program) == (answers, became)


@pytest.mark.parametrize("how", ["in_order", "with_faults"])
def test_a_seed_gives_the_same_run_in_every_process(how: str):
    repository = Path(__file__).parents[3]
    traces = {
        subprocess.run(
            [sys.executable, Path(__file__).with_name("chatter.py"), "7", how],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(repository)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in (0, 1, 2)
    }
    assert len(traces) == 1
    assert traces.pop().count(b"\n") > 200
