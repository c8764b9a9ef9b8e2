"""Nothing is lost silently: in long random lives every accepted message is handled once or counted
as a dead letter, every call from outside is answered once, and every monitor tells once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from runtime.actor import LATER, Actor, ActorRef, Caller, Down, handles
from runtime.clock import NS_PER_S, VirtualClock
from runtime.randomness import SeededRandomness
from runtime.scheduler import Scheduler
from runtime.testing import FaultInjector, Faults, HeapHost, SeededScheduler, heap_sleep

MAILBOX = 5
behaviours = st.sampled_from(
    ["ok", "ok", "ok", "later", "settle", "sleep", "perform", "ask", "crash", "stop", "kill"]
)
delays = st.sampled_from([0, 1, 5, 100])
slots = st.integers(0, 3)


@attrs.frozen
class Plain:
    number: int
    behaviour: str
    delay_ns: int
    other: ActorRef


@attrs.frozen
class Awaiting(Plain):
    pass


class Laborer(Actor):
    mailbox_limit = MAILBOX

    def __init__(self, world: Lives) -> None:
        self.world = world
        self.kept: list[Caller] = []

    @handles(Plain)
    def plain(self, message: Plain) -> Any:
        self.world.handled[message.number] += 1
        return self.act(message)

    @handles(Awaiting)
    async def awaiting(self, message: Awaiting) -> Any:
        self.world.handled[message.number] += 1
        if message.behaviour == "sleep":
            await self.sleep(message.delay_ns)
        elif message.behaviour == "perform":
            await self.perform(heap_sleep, message.delay_ns)
        elif message.behaviour == "ask":
            number = self.world.take_number()
            inner = Plain(number, "ok", 0, message.other)
            await self.call(message.other, inner, message.delay_ns)
        return self.act(message)

    def act(self, message: Plain) -> Any:
        caller = self.context.caller
        match message.behaviour:
            case "crash":
                raise ValueError
            case "stop":
                self.stop()
            case "kill":
                self.stop_actor(message.other, "killed")
            case "later" if caller is not None:
                self.kept.append(caller)
                return LATER
            case "settle":
                while self.kept:
                    self.reply(self.kept.pop(), "settled")
        return "done"


class Watcher(Actor):
    mailbox_limit = 1

    def __init__(self) -> None:
        self.downs: Counter[ActorRef] = Counter()

    @handles(Down)
    def down(self, message: Down) -> None:
        self.downs[message.ref] += 1


class Lives(RuleBasedStateMachine):
    calls_in_caller = 64

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        clock = VirtualClock()
        self.scheduler = self.make_scheduler(clock, seed)
        self.host = HeapHost(self.scheduler, clock)
        self.watcher = Watcher()
        self.scheduler.spawn(self.watcher)
        self.refs: list[ActorRef] = []
        self.watched: list[ActorRef] = []
        self.next_number = 0
        self.handled: Counter[int] = Counter()
        self.accepted: set[int] = set()
        self.cast_to_the_dead = 0
        self.answers: dict[int, list[Any]] = {}
        self.callers: dict[int, Caller] = {}
        self.forgotten: set[int] = set()
        for _ in range(4):
            self.spawn()

    def make_scheduler(self, clock: VirtualClock, seed: int) -> Scheduler:
        return Scheduler(
            clock=clock,
            randomness=SeededRandomness(1, "actors"),
            calls_in_caller_per_turn=self.calls_in_caller,
        )

    def take_number(self) -> int:
        self.next_number += 1
        return self.next_number

    def spawn(self) -> ActorRef:
        ref = self.scheduler.spawn(Laborer(self))
        self.refs.append(ref)
        self.watcher.monitor(ref)
        self.watched.append(ref)
        return ref

    def message(self, awaiting: bool, behaviour: str, delay_ns: int, other: int) -> Plain:
        kind = Awaiting if awaiting else Plain
        return kind(self.take_number(), behaviour, delay_ns, self.refs[other])

    @rule(slot=slots, awaiting=st.booleans(), behaviour=behaviours, delay_ns=delays, other=slots)
    def cast(self, slot: int, awaiting: bool, behaviour: str, delay_ns: int, other: int) -> None:
        message = self.message(awaiting, behaviour, delay_ns, other)
        if self.scheduler.cast(self.refs[slot], message):
            self.accepted.add(message.number)
        elif not self.scheduler.is_alive(self.refs[slot]):
            self.cast_to_the_dead += 1

    @rule(
        slot=slots,
        awaiting=st.booleans(),
        behaviour=behaviours,
        delay_ns=delays,
        other=slots,
        deadline_ns=st.sampled_from([1, 50, NS_PER_S]),
    )
    def call(
        self,
        slot: int,
        awaiting: bool,
        behaviour: str,
        delay_ns: int,
        other: int,
        deadline_ns: int,
    ) -> None:
        message = self.message(awaiting, behaviour, delay_ns, other)
        answers = self.answers[message.number] = []
        self.callers[message.number] = self.scheduler.call_soon(
            self.refs[slot],
            message,
            lambda value, error: answers.append((value, error)),
            deadline_ns=deadline_ns,
        )

    @rule()
    def forget(self) -> None:
        for number, caller in self.callers.items():
            if caller.waiting:
                self.scheduler.forget(caller)
                self.forgotten.add(number)
                return

    @rule(slot=slots)
    def stop(self, slot: int) -> None:
        self.scheduler.stop(self.refs[slot])

    @rule(slot=slots)
    def replace(self, slot: int) -> None:
        if not self.scheduler.is_alive(self.refs[slot]):
            self.refs[slot] = self.spawn()
            self.refs.pop()

    @rule(budget=st.integers(1, 4))
    def run_a_little(self, budget: int) -> None:
        self.scheduler.run(budget)

    @rule(duration_ns=st.sampled_from([0, 1, 7, 100]))
    def time_passes(self, duration_ns: int) -> None:
        self.host.run_for(duration_ns)

    @invariant()
    def nobody_is_above_its_limit_and_nothing_happens_twice(self) -> None:
        for ref in self.refs:
            seen = self.scheduler.statistics_of(ref)
            assert seen is None or seen.mailbox_depth <= MAILBOX
        assert all(count == 1 for count in self.handled.values())
        assert all(len(answers) <= 1 for answers in self.answers.values())

    def teardown(self) -> None:
        self.host.run_for(10 * NS_PER_S)
        statistics = self.scheduler.statistics()
        assert statistics.queued == 0
        assert statistics.effects_in_flight == 0
        for number, answers in self.answers.items():
            assert len(answers) == (number not in self.forgotten)
        alive = [ref for ref in self.watched if self.scheduler.is_alive(ref)]
        for ref in alive:
            seen = self.scheduler.statistics_of(ref)
            assert seen is not None
            assert (seen.state, seen.mailbox_depth) == ("idle", 0)
            self.scheduler.stop(ref)
        self.host.run_until_idle()
        assert self.watcher.downs == Counter(self.watched)
        lost = sum(number not in self.handled for number in self.accepted)
        assert statistics.dead_letters == lost + self.cast_to_the_dead
        assert self.scheduler.statistics().actors == 1


class LivesByMailbox(Lives):
    calls_in_caller = 0


class LivesInAnyOrder(Lives):
    """Turns in a drawn order, and handlers that crash by chance."""

    def make_scheduler(self, clock: VirtualClock, seed: int) -> Scheduler:
        faults = Faults(
            seed=seed,
            shuffles_turns=True,
            crash_after_per_million=20_000,
            crash_waiting_per_million=20_000,
            crash_spares=(Watcher,),
        )
        randomness = SeededRandomness(1, "actors")
        return SeededScheduler(injector=FaultInjector(faults), clock=clock, randomness=randomness)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLivesByMailbox = LivesByMailbox.TestCase
TestLivesByMailbox.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestLivesInAnyOrder = LivesInAnyOrder.TestCase
TestLivesInAnyOrder.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
