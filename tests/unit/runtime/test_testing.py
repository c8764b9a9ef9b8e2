"""The testing module keeps its own promises: drawn orders are legal and all of them come up, faults
happen as often as they are asked for, and the same seed is the same run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.actor import Actor, ActorRef, Crashed, StartFailed, TimedOut, handles
from runtime.clock import NS_PER_MS, NS_PER_S, VirtualClock
from runtime.faults import MILLION
from runtime.randomness import SeededRandomness
from runtime.scheduler import MESSAGES_PER_TURN, Scheduler
from runtime.testing import (
    FaultInjector,
    Faults,
    HeapHost,
    InjectedCrash,
    InjectedFailure,
    SeededScheduler,
    Wire,
    heap_sleep,
    run_together,
    seeded_host,
)

ALWAYS = MILLION


@attrs.frozen
class Say:
    who: int
    what: int


@attrs.frozen
class Work:
    pass


@attrs.frozen
class Rest:
    duration_ns: int


class Hearer(Actor):
    """Writes down what it hears."""

    def __init__(self, log: list[Say]) -> None:
        self.log = log

    @handles(Say)
    def hear(self, message: Say) -> str:
        self.log.append(message)
        return "heard"


class Talker(Actor):
    """Sends each of `hearers` numbers in order."""

    def __init__(self, who: int, hearers: list[ActorRef], count: int) -> None:
        self.who = who
        self.hearers = hearers
        self.count = count

    async def started(self) -> None:
        for what in range(self.count):
            for ref in self.hearers:
                self.cast(ref, Say(self.who, what))
            await self.sleep(0)


class Worker(Actor):
    """Performs an effect that lasts a second and counts."""

    def __init__(self, done: list[int], deadline_ns: int | None = None) -> None:
        self.done = done
        self.deadline_ns = deadline_ns

    @handles(Work)
    async def work(self, message: Work) -> str:
        await self.perform(self.count, deadline_ns=self.deadline_ns)
        return "worked"

    @handles(Rest)
    async def rest(self, message: Rest) -> None:
        try:
            await self.sleep(message.duration_ns)
        finally:
            self.done.append(-1)

    async def count(self) -> None:
        await heap_sleep(NS_PER_S)
        self.done.append(1)


def talk(seed: int, talkers: int = 3, count: int = 4) -> tuple[list[list[Say]], HeapHost]:
    host = seeded_host(Faults(seed=seed, shuffles_turns=True))
    logs: list[list[Say]] = [[], []]
    hearers = [host.scheduler.spawn(Hearer(log)) for log in logs]
    for who in range(talkers):
        host.scheduler.spawn(Talker(who, hearers, count))
    host.run_until_idle()
    return logs, host


# --- orders of turns ---------------------------------------------------------------------------


@given(st.integers(0, 2**64))
def test_what_one_sends_another_arrives_in_order_and_all_of_it(seed: int):
    logs, _ = talk(seed)
    for log in logs:
        for who in range(3):
            assert [each.what for each in log if each.who == who] == [0, 1, 2, 3]


def test_every_order_that_is_legal_comes_up():
    orders = {tuple(each.who for each in talk(seed, count=1)[0][0]) for seed in range(100)}
    assert len(orders) == 6  # of three talkers


def test_a_hearer_may_be_run_between_any_two_of_its_messages():
    """So another actor may be, too: turns are cut short by chance."""
    lengths = set()
    for seed in range(150):
        host = seeded_host(Faults(seed=seed, shuffles_turns=True))
        log: list[Say] = []
        ref = host.scheduler.spawn(Hearer(log))
        for what in range(4):
            host.cast(ref, Say(0, what))
        lengths.add(host.scheduler.run(1))
    assert lengths == {1, 2, 3, 4}


def test_a_seed_is_one_run_and_another_seed_is_another():
    assert talk(5)[0] == talk(5)[0]
    assert len({repr(talk(seed)[0]) for seed in range(10)}) > 5
    assert talk(5)[1].statistics() == talk(5)[1].statistics()


class Greedy(Actor):
    """Always has mail."""

    @handles(Say)
    def hear(self, message: Say) -> None:
        self.cast(self.context.ref, message)


@given(st.integers(0, 2**64))
def test_nobody_starves_in_any_order(seed: int):
    host = seeded_host(Faults(seed=seed, shuffles_turns=True))
    log: list[Say] = []
    for _ in range(3):
        host.cast(host.scheduler.spawn(Greedy()), Say(0, 0))
    for _ in range(50):
        host.cast(host.scheduler.spawn(Hearer(log)), Say(1, 1))
    handled = 0
    while len(log) < 50:
        handled += host.scheduler.run(1)
    assert handled <= 50 + 3 * MESSAGES_PER_TURN  # one round of the run queue


class Sleeper(Actor):
    def __init__(self, log: list[Say]) -> None:
        self.log = log
        self.seen: int | None = None

    @handles(Rest)
    async def rest(self, message: Rest) -> None:
        await self.sleep(0)
        self.seen = len(self.log)


@given(st.integers(0, 2**64))
def test_a_sleep_of_no_time_lets_everybody_have_a_turn_in_any_order(seed: int):
    host = seeded_host(Faults(seed=seed, shuffles_turns=True))
    log: list[Say] = []
    sleeper = Sleeper(log)
    host.cast(host.scheduler.spawn(sleeper), Rest(0))
    for _ in range(20):
        host.cast(host.scheduler.spawn(Hearer(log)), Say(1, 1))
    host.run_until_idle()
    assert sleeper.seen == 20


def test_without_faults_a_seeded_scheduler_does_what_a_scheduler_does():
    def run(scheduler: Scheduler, clock: VirtualClock) -> list[list[Say]]:
        host = HeapHost(scheduler, clock)
        logs: list[list[Say]] = [[], []]
        hearers = [scheduler.spawn(Hearer(log)) for log in logs]
        for who in range(3):
            scheduler.spawn(Talker(who, hearers, 200))
        host.run_until_idle()
        return logs

    clock, randomness = VirtualClock(), SeededRandomness(1, "actors")
    injector = FaultInjector(Faults(seed=1))
    seeded = SeededScheduler(injector=injector, clock=clock, randomness=randomness)
    plain = Scheduler(clock=clock, randomness=randomness)
    assert run(seeded, clock) == run(plain, clock)
    assert seeded.statistics() == plain.statistics()
    assert set(attrs.astuple(injector.statistics())) == {0}


def test_a_seeded_scheduler_does_not_run_within_itself():
    host = seeded_host(Faults(shuffles_turns=True))
    errors: list[str] = []

    class Impatient(Actor):
        def started(self) -> None:
            try:
                host.scheduler.run()
            except RuntimeError as error:
                errors.append(str(error))

    host.scheduler.spawn(Impatient())
    host.run_until_idle()
    assert errors == ["the scheduler runs already"]


# --- crashes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_mailed", [True, False])
def test_a_crash_before_has_done_nothing_and_one_after_everything_but_the_answer(is_mailed: bool):
    for faults, heard in (
        (Faults(crash_before_per_million=ALWAYS), 0),
        (Faults(crash_after_per_million=ALWAYS), 1),
    ):
        host = seeded_host(faults)
        log: list[Say] = []
        ref = host.scheduler.spawn(Hearer(log))
        if is_mailed:
            assert host.cast(ref, Say(1, 1))
            host.run_until_idle()
        else:
            with pytest.raises(Crashed, match=InjectedCrash.__name__):
                host.call(ref, Say(1, 1))
        assert len(log) == heard
        assert not host.scheduler.is_alive(ref)
        counts = host.statistics().faults
        assert counts is not None
        assert (counts.crashes_before, counts.crashes_after) == (1 - heard, heard)


def test_coroutine_handlers_crash_before_after_and_where_they_wait():
    for faults, done in (
        (Faults(crash_before_per_million=ALWAYS), []),
        (Faults(crash_after_per_million=ALWAYS), [1]),
        (Faults(crash_waiting_per_million=ALWAYS), [1]),
    ):
        host = seeded_host(faults)
        log: list[int] = []
        with pytest.raises(Crashed, match=InjectedCrash.__name__):
            host.call(host.scheduler.spawn(Worker(log)), Work())
        assert log == done


def test_a_handler_that_crashes_where_it_waits_has_its_clean_up():
    host = seeded_host(Faults(crash_waiting_per_million=ALWAYS))
    done: list[int] = []
    with pytest.raises(Crashed):
        host.call(host.scheduler.spawn(Worker(done)), Rest(5))
    assert done == [-1]


def test_a_start_that_crashes_is_a_failed_start():
    host = seeded_host(Faults(crash_start_per_million=ALWAYS, crash_spares=(Sleeper,)))
    errors: list[StartFailed] = []

    class Parent(Sleeper):
        async def started(self) -> None:
            try:
                await self.wait_started(self.spawn(Talker(1, [], 1)))
            except StartFailed as error:
                errors.append(error)

    host.scheduler.spawn(Parent([]))
    host.run_until_idle()
    assert [each.reason for each in errors] == ["start failed: InjectedCrash"]


def test_who_is_spared_never_crashes_and_nobody_does_after_healing():
    faults = Faults(crash_before_per_million=ALWAYS, crash_spares=(Hearer,))
    host = seeded_host(faults)
    assert host.call(host.scheduler.spawn(Hearer([])), Say(1, 1)) == "heard"
    with pytest.raises(Crashed):
        host.call(host.scheduler.spawn(Worker([])), Work())
    host.heal()
    assert host.call(host.scheduler.spawn(Worker([])), Work()) == "worked"


# --- effects -----------------------------------------------------------------------------------


class Away(Exception):
    pass


def test_effects_fail_before_or_after_they_are_carried_out_with_the_error_that_is_wanted():
    for faults, done in (
        (Faults(effect_fail_before_per_million=ALWAYS, effect_error=Away), []),
        (Faults(effect_fail_after_per_million=ALWAYS, effect_error=Away), [1]),
    ):
        host = seeded_host(faults)
        log: list[int] = []
        with pytest.raises(Crashed, match="Away"):
            host.call(host.scheduler.spawn(Worker(log)), Work())
        assert log == done
        assert host.statistics().effects_under_way == 0
    assert issubclass(Faults().effect_error, InjectedFailure)  # type: ignore[arg-type]  # a class


def test_an_effect_that_never_comes_back_is_ended_by_its_deadline_only():
    host = seeded_host(Faults(effect_lost_per_million=ALWAYS))
    done: list[int] = []
    with pytest.raises(Crashed, match="TimedOut"):
        host.call(host.scheduler.spawn(Worker(done, deadline_ns=3)), Work())
    host.run_until_idle()
    assert host.statistics().effects_under_way == 0
    patient = host.scheduler.spawn(Worker(done))
    with pytest.raises(TimedOut):
        host.call(patient, Work())
    assert host.statistics().effects_under_way == 1
    host.scheduler.shutdown()
    host.run_until_idle()
    assert host.statistics().effects_under_way == 0
    assert done == []


def test_a_delayed_effect_comes_later_and_only_those_that_are_named_are_touched():
    for names, took_ns in ((("count",), NS_PER_S + 7), (("other",), NS_PER_S)):
        faults = Faults(effect_delay_per_million=ALWAYS, effect_delay_ns=(7, 7), effect_names=names)
        host = seeded_host(faults)
        assert host.call(host.scheduler.spawn(Worker([])), Work()) == "worked"
        assert host.clock.monotonic_ns() == took_ns


def test_the_effect_of_an_actor_that_is_stopped_is_cleaned_up_at_once_as_on_trio():
    host = seeded_host(Faults())
    closed_at: list[int] = []

    class Idler(Worker):
        async def count(self) -> None:
            try:
                await heap_sleep(NS_PER_S)
            finally:
                closed_at.append(host.clock.monotonic_ns())

    ref = host.scheduler.spawn(Idler([]))
    host.cast(ref, Work())
    host.run_for(5)
    host.scheduler.stop(ref)
    host.run_until_idle()
    assert closed_at == [5]
    assert host.next_event_ns() is None


# --- wires, time -------------------------------------------------------------------------------


def send_five(faults: Faults) -> tuple[list[tuple[int, int]], HeapHost]:
    host = seeded_host(faults)
    came: list[tuple[int, int]] = []
    wire = Wire(host, lambda number: came.append((number, host.clock.monotonic_ns())))
    for number in range(5):
        wire.send(number)
    host.run_for(NS_PER_S)
    assert host.statistics().events == 0
    return came, host


def test_a_wire_without_faults_delivers_at_once():
    assert send_five(Faults())[0] == [(number, 0) for number in range(5)]


def test_a_wire_may_lose_and_double():
    assert send_five(Faults(wire_drop_per_million=ALWAYS))[0] == []
    doubled, host = send_five(Faults(wire_double_per_million=ALWAYS))
    assert [number for number, _ in doubled] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    counts = host.statistics().faults
    assert counts is not None
    assert counts.wires_doubled == 5


@given(st.integers(0, 2**64))
def test_on_a_wire_nothing_is_overtaken(seed: int):
    faults = Faults(
        seed=seed,
        wire_delay_per_million=500_000,
        wire_delay_ns=(1, 1_000),
        wire_double_per_million=200_000,
        shuffles_turns=True,
    )
    came, _ = send_five(faults)
    assert came == sorted(came)
    assert {number for number, _ in came} == set(range(5))


def test_the_wall_clock_jumps_and_monotonic_time_does_not():
    host = seeded_host(Faults(wall_jump_per_million=ALWAYS, wall_jump_ns=(NS_PER_S, NS_PER_S)))
    before = host.clock.utc_now()
    host.at(NS_PER_MS, lambda: None)
    host.run_for(NS_PER_MS)
    moved_s = (host.clock.utc_now() - before).total_seconds()
    assert moved_s in (1.001, -0.999)
    assert host.clock.monotonic_ns() == NS_PER_MS


def test_what_falls_into_a_stall_is_late():
    host = seeded_host(Faults(stall_per_million=ALWAYS, stall_ns=(100, 100)))
    came: list[int] = []
    for instant_ns in (10, 50, 120):
        host.at(instant_ns, lambda: came.append(host.clock.monotonic_ns()))
    host.run_for(150)
    assert came == [110, 110, 150]  # the second stall lasts beyond what was to be run
    assert host.clock.monotonic_ns() == 150


def test_a_call_waits_out_a_stall():
    host = seeded_host(Faults(stall_per_million=ALWAYS, stall_ns=(100, 100)))
    assert host.call(host.scheduler.spawn(Worker([])), Work()) == "worked"
    assert host.clock.monotonic_ns() == NS_PER_S + 100


def test_nodes_on_one_clock_speak_over_wires():
    clock = VirtualClock()
    faults = Faults(wire_delay_per_million=ALWAYS, wire_delay_ns=(5, 5))
    one, other = (seeded_host(faults, clock=clock, node=name) for name in ("one", "other"))
    times: list[tuple[str, int]] = []

    class Ponger(Actor):
        wire: Wire

        @handles(Say)
        def hear(self, message: Say) -> None:
            times.append((self.context.ref.node, self.context.now()))
            self.wire.send(message)

    pongers = [Ponger(), Ponger()]
    refs = [host.scheduler.spawn(each) for host, each in zip((one, other), pongers, strict=True)]
    pongers[0].wire = Wire(other, lambda message: other.cast(refs[1], message))
    pongers[1].wire = Wire(one, lambda message: one.cast(refs[0], message))
    one.cast(refs[0], Say(1, 1))
    run_together([one, other], 12)
    assert times == [("one", 0), ("other", 5), ("one", 10)]
    run_together([one], 100)  # the other one is dead
    assert times[3:] == []


def test_hosts_of_two_clocks_do_not_run_together():
    with pytest.raises(ValueError, match="one clock"):
        run_together([seeded_host(Faults()), seeded_host(Faults())], 1)


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"crash_before_per_million": -1},
        {"effect_lost_per_million": MILLION + 1},
        {"stall_ns": (2, 1)},
        {"wire_delay_ns": (-1, 1)},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(options))):
        Faults(**options)


def test_a_run_can_be_repeated_from_its_printed_options():
    most = Faults(
        shuffles_turns=True,
        crash_before_per_million=40,
        effect_lost_per_million=40,
        stall_per_million=40,
    )
    swarm = [most.swarm(seed) for seed in range(200)]
    for faults in swarm:
        names = {"Faults": Faults, "InjectedFailure": InjectedFailure}
        text = repr(faults).replace(repr(InjectedFailure), "InjectedFailure")
        assert eval(text, names) == faults
        assert faults.crash_before_per_million <= 40
        assert faults.crash_after_per_million == 0
    rates = [faults.crash_before_per_million for faults in swarm]
    assert 60 < rates.count(0) < 140
    assert len(set(rates)) > 20
    assert most.swarm(3) == most.swarm(3)


# --- the documentation -------------------------------------------------------------------------


def test_the_example_of_the_documentation_runs():
    page = (Path(__file__).parents[3] / "docs" / "runtime.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/runtime.md", "exec"), names)
    tests = [each for name, each in names.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()
