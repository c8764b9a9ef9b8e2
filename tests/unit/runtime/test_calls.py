"""Mailboxes, casts, calls and their ends, in virtual time.

Longer than other files: one short test for each sentence of what a call promises.
"""

from __future__ import annotations

import asyncio
from typing import Any

import attrs
import pytest

from runtime.actor import (
    LATER,
    Actor,
    ActorRef,
    CallCycle,
    Caller,
    Crashed,
    Dead,
    NoHandler,
    Overloaded,
    Raise,
    TimedOut,
    Unreachable,
    handles,
)
from runtime.clock import NS_PER_S, VirtualClock
from runtime.inspection import CrashReport, Report, UnhandledReport
from runtime.randomness import SeededRandomness
from runtime.scheduler import MESSAGES_PER_TURN, Scheduler
from runtime.testing import HeapHost, heap_sleep


@attrs.frozen
class Add:
    amount: int


@attrs.frozen
class Total:
    pass


@attrs.frozen
class Fail:
    secret: str


@attrs.frozen
class Relay:
    """Have the receiver call `ref` with `message`."""

    ref: ActorRef
    message: Any
    deadline_ns: int = 5 * NS_PER_S


@attrs.frozen
class Nap:
    duration_ns: int


@attrs.frozen
class Later:
    pass


@attrs.frozen
class Settle:
    value: int


@attrs.frozen
class Foreign:
    pass


@attrs.frozen
class Unknown:
    pass


class Worker(Actor):
    mailbox_limit = 10

    def __init__(self) -> None:
        self.total = 0
        self.callers: list[Caller] = []
        self.reason: str | None = None

    def terminated(self, reason: str) -> None:
        self.reason = reason

    @handles(Add)
    def add(self, message: Add) -> int:
        self.total += message.amount
        return self.total

    @handles(Total)
    async def get_total(self, message: Total) -> int:
        return self.total

    @handles(Fail)
    def fail(self, message: Fail) -> None:
        raise ValueError(message.secret)

    @handles(Relay)
    async def relay(self, message: Relay) -> Any:
        return await self.call(message.ref, message.message, message.deadline_ns)

    @handles(Nap)
    async def nap(self, message: Nap) -> int:
        await self.sleep(message.duration_ns)
        return self.context.now()

    @handles(Later)
    def later(self, message: Later) -> Any:
        assert self.context.caller is not None
        self.callers.append(self.context.caller)
        return LATER

    @handles(Settle)
    def settle(self, message: Settle) -> list[bool]:
        return [self.reply(caller, message.value) for caller in self.callers]

    @handles(Foreign)
    async def foreign(self, message: Foreign) -> None:
        await asyncio.sleep(1)


@pytest.fixture
def reports() -> list[Report]:
    return []


@pytest.fixture(params=[64, 0], ids=["on the spot", "by mailbox"])
def host(request: pytest.FixtureRequest, reports: list[Report]) -> HeapHost:
    clock = VirtualClock()
    scheduler = Scheduler(
        clock=clock,
        randomness=SeededRandomness(1, "actors"),
        report=reports.append,
        calls_in_caller_per_turn=request.param,
    )
    return HeapHost(scheduler, clock)


def test_casts_arrive_in_order_and_a_call_after_them_sees_them_all(host: HeapHost):
    worker = host.scheduler.spawn(Worker())
    for amount in range(5):
        assert host.cast(worker, Add(amount))
    assert host.call(worker, Total()) == 10


def test_a_call_from_an_actor_is_answered(host: HeapHost):
    asker, worker = host.scheduler.spawn(Worker()), host.scheduler.spawn(Worker())
    assert host.call(asker, Relay(worker, Add(3))) == 3
    assert host.call(asker, Relay(worker, Total())) == 3


def test_a_call_does_not_overtake_what_the_caller_cast_before(host: HeapHost):
    class Sender(Actor):
        @handles(Relay)
        async def send(self, message: Relay) -> Any:
            self.cast(message.ref, Add(7))
            return await self.call(message.ref, Add(0))

    sender, worker = host.scheduler.spawn(Sender()), host.scheduler.spawn(Worker())
    assert host.call(sender, Relay(worker, None)) == 7


def test_a_full_mailbox_refuses_casts_and_calls_and_counts_them(host: HeapHost):
    worker = host.scheduler.spawn(Worker())
    assert [host.cast(worker, Add(1)) for _ in range(12)] == [True] * 10 + [False] * 2
    with pytest.raises(Overloaded):
        host.call(worker, Total())
    assert host.scheduler.statistics().refused == 3
    host.run_until_idle()
    assert host.call(worker, Total()) == 10
    seen = host.scheduler.statistics_of(worker)
    assert seen is not None
    assert (seen.refused, seen.mailbox_limit) == (3, 10)


def test_an_actor_that_calls_an_overloaded_one_is_told_so(host: HeapHost, reports: list[Report]):
    asker, worker = host.scheduler.spawn(Worker()), host.scheduler.spawn(Worker())
    host.cast(worker, Nap(NS_PER_S))
    host.run_until_idle()
    for _ in range(10):
        host.cast(worker, Add(1))
    with pytest.raises(Crashed, match="crashed: Overloaded"):
        host.call(asker, Relay(worker, Add(1)))


def test_a_call_to_the_dead_says_so(host: HeapHost):
    asker, worker = host.scheduler.spawn(Worker()), host.scheduler.spawn(Worker())
    host.scheduler.stop(worker)
    assert not host.cast(worker, Add(1))
    with pytest.raises(Dead):
        host.call(worker, Total())
    with pytest.raises(Unreachable):
        host.call(ActorRef("elsewhere", 1), Total())
    with pytest.raises(Crashed, match="crashed: Dead"):
        host.call(asker, Relay(worker, Total()))
    assert host.scheduler.statistics().dead_letters == 1


def test_a_crash_ends_the_callee_and_the_caller_learns_of_it_but_not_what(
    host: HeapHost, reports: list[Report]
):
    worker = Worker()
    ref = host.scheduler.spawn(worker, label="worker")
    host.call(ref, Add(1))
    with pytest.raises(Crashed, match="worker: crashed: ValueError") as failure:
        host.call(ref, Fail("hunter2"))
    assert "hunter2" not in f"{failure.value} {failure.value.__context__}"
    assert worker.reason == "crashed: ValueError"
    [report] = reports
    assert isinstance(report, CrashReport)
    assert report.last_messages == ("Add(amount)", "Fail(secret)")
    assert "fail" in report.frames[-1]
    assert "hunter2" not in repr(report)
    assert not host.scheduler.is_alive(ref)


def test_a_callee_that_crashes_on_the_spot_does_not_take_a_careful_caller_along(host: HeapHost):
    @attrs.frozen
    class Try:
        ref: ActorRef

    class Careful(Actor):
        @handles(Try)
        async def attempt(self, message: Try) -> str:
            try:
                await self.call(message.ref, Fail("x"))
            except Crashed as error:
                return f"it {error.reason}"
            return "it lives"

    careful, worker = host.scheduler.spawn(Careful()), host.scheduler.spawn(Worker())
    assert host.call(careful, Try(worker)) == "it crashed: ValueError"
    assert host.scheduler.is_alive(careful)


def test_calls_in_the_mailbox_of_one_that_ends_get_dead_and_those_in_hand_crashed(host: HeapHost):
    worker = host.scheduler.spawn(Worker())
    errors: list[str] = []

    def answered(value: Any, error: Exception | None) -> None:
        errors.append(type(error).__name__)

    host.scheduler.call_soon(worker, Later(), answered)
    host.scheduler.call_soon(worker, Fail("x"), answered)
    host.scheduler.call_soon(worker, Total(), answered)
    host.run_until_idle()
    assert sorted(errors) == ["Crashed", "Crashed", "Dead"]


def test_a_deadline_cuts_the_wait_and_not_the_work_and_the_late_reply_is_counted(host: HeapHost):
    asker, worker = host.scheduler.spawn(Worker()), host.scheduler.spawn(Worker())
    with pytest.raises(TimedOut):
        host.call(worker, Nap(10 * NS_PER_S), deadline_ns=NS_PER_S)
    assert host.clock.monotonic_ns() == NS_PER_S
    with pytest.raises(Crashed, match="TimedOut"):
        host.call(asker, Relay(worker, Total(), 2 * NS_PER_S))
    assert host.clock.monotonic_ns() == 3 * NS_PER_S
    host.run_for(10 * NS_PER_S)
    assert host.scheduler.is_alive(worker)
    seen = host.scheduler.statistics()
    assert (seen.late_replies, seen.calls_timed_out) == (2, 2)


def test_while_a_handler_waits_its_actor_handles_nothing_else(host: HeapHost):
    worker = Worker()
    ref = host.scheduler.spawn(worker)
    host.cast(ref, Nap(NS_PER_S))
    host.cast(ref, Add(1))
    host.run_for(NS_PER_S - 1)
    assert worker.total == 0
    host.run_for(1)
    assert worker.total == 1


def test_a_reply_may_come_later_and_only_once(host: HeapHost):
    asker, worker = host.scheduler.spawn(Worker()), host.scheduler.spawn(Worker())
    answers: list[Any] = []
    host.scheduler.call_soon(
        asker, Relay(worker, Later()), lambda value, error: answers.append(value)
    )
    host.run_until_idle()
    assert answers == []
    assert host.call(worker, Settle(5)) == [True]
    assert answers == [5]
    assert host.call(worker, Settle(6)) == [False]
    assert host.scheduler.statistics().late_replies == 1


def test_a_later_reply_to_one_that_gave_up_is_dropped_and_does_not_pile_up(host: HeapHost):
    worker = Worker()
    ref = host.scheduler.spawn(worker)
    for _ in range(3):
        with pytest.raises(TimedOut):
            host.call(ref, Later(), deadline_ns=1)
    assert not worker.context._extras.later
    assert host.call(ref, Settle(5)) == [False] * 3


def test_later_for_a_call_that_is_over_is_not_kept(host: HeapHost):
    class Slow(Actor):
        @handles(Nap)
        async def nap(self, message: Nap) -> Any:
            await self.sleep(message.duration_ns)
            return LATER

        @handles(Add)
        def add(self, message: Add) -> Any:
            assert self.context.caller is not None
            self.reply(self.context.caller, message.amount)
            return LATER

    slow = Slow()
    ref, asker = host.scheduler.spawn(slow), host.scheduler.spawn(Worker())
    with pytest.raises(TimedOut):
        host.call(ref, Nap(2), deadline_ns=1)
    host.run_for(5)
    assert host.call(asker, Relay(ref, Add(3))) == 3
    assert not slow.context._extras.later


def test_a_refusal_is_raised_in_the_caller_and_leaves_the_callee_alone(host: HeapHost):
    @attrs.frozen
    class Open:
        door: int

    class Door(Actor):
        @handles(Open)
        def open(self, message: Open) -> Raise:
            return Raise(KeyError(message.door))

    class Visitor(Actor):
        @handles(Relay)
        async def visit(self, message: Relay) -> str:
            with pytest.raises(KeyError):
                await self.call(message.ref, message.message)
            return "refused"

    door, visitor = host.scheduler.spawn(Door()), host.scheduler.spawn(Visitor())
    with pytest.raises(KeyError):
        host.call(door, Open(7))
    assert host.call(visitor, Relay(door, Open(7))) == "refused"
    assert host.scheduler.is_alive(door)


def test_an_unknown_message_disturbs_nobody(host: HeapHost, reports: list[Report]):
    worker = host.scheduler.spawn(Worker())
    host.cast(worker, Unknown())
    with pytest.raises(NoHandler, match="does not handle Unknown"):
        host.call(worker, Unknown())
    assert host.scheduler.is_alive(worker)
    assert host.scheduler.statistics().unhandled == 2
    [report] = reports
    assert isinstance(report, UnhandledReport)
    assert report.message == "Unknown"


def test_a_circle_of_waiting_actors_is_refused_by_name(host: HeapHost, reports: list[Report]):
    a, b, c = (host.scheduler.spawn(Worker(), label=name) for name in "abc")
    with pytest.raises(Crashed):
        host.call(a, Relay(b, Relay(c, Relay(a, Total()))))
    [first, *_] = reports
    assert isinstance(first, CrashReport)
    assert (first.label, first.reason) == ("c", "crashed: CallCycle")
    assert host.scheduler.statistics().call_cycles == 1


def test_a_call_to_oneself_is_the_smallest_circle(host: HeapHost):
    seen: list[tuple[str, ...]] = []

    class Narcissus(Actor):
        @handles(Total)
        async def ask(self, message: Total) -> None:
            try:
                await self.call(self.context.ref, Total())
            except CallCycle as cycle:
                seen.append(cycle.names)

    host.call(host.scheduler.spawn(Narcissus(), label="n"), Total())
    assert seen == [("n", "n")]


@pytest.mark.parametrize("primitive", ["call", "sleep", "perform", "wait_started"])
def test_a_plain_handler_may_not_wait(host: HeapHost, reports: list[Report], primitive: str):
    class Impatient(Actor):
        @handles(Total)
        def wait(self, message: Total) -> None:
            arguments = [self.context.ref, message] if primitive == "call" else [0]
            getattr(self, primitive)(*arguments)

    with pytest.raises(Crashed, match="RuntimeError"):
        host.call(host.scheduler.spawn(Impatient()), Total())


def test_nor_may_one_that_runs_on_the_spot_in_a_waiting_caller(host: HeapHost):
    class Impatient(Actor):
        @handles(Total)
        def wait(self, message: Total) -> None:
            self.call(self.context.ref, message)

    asker, impatient = host.scheduler.spawn(Worker()), host.scheduler.spawn(Impatient())
    with pytest.raises(Crashed, match="crashed: Crashed"):
        host.call(asker, Relay(impatient, Total()))


def test_a_foreign_awaitable_crashes_the_actor_and_not_the_scheduler(host: HeapHost):
    worker = host.scheduler.spawn(Worker())
    with pytest.raises(Crashed, match="RuntimeError"):
        host.call(worker, Foreign())


def test_an_awaitable_of_another_actor_is_refused(host: HeapHost):
    box: list[Any] = []

    class Lender(Actor):
        @handles(Total)
        async def lend(self, message: Total) -> None:
            box.append(self.sleep(5))

    class Borrower(Actor):
        @handles(Total)
        async def borrow(self, message: Total) -> str:
            with pytest.raises(RuntimeError, match="outside its own handler"):
                await box.pop()
            return "refused"

    host.call(host.scheduler.spawn(Lender()), Total())
    assert host.call(host.scheduler.spawn(Borrower()), Total()) == "refused"


def test_nobody_handles_more_than_its_share_in_a_turn():
    clock = VirtualClock()
    scheduler = Scheduler(clock=clock, randomness=SeededRandomness(1, "actors"))
    order: list[str] = []

    class Busy(Actor):
        def __init__(self, name: str) -> None:
            self.name = name

        @handles(Add)
        def add(self, message: Add) -> None:
            order.append(self.name)

    a, b = scheduler.spawn(Busy("a")), scheduler.spawn(Busy("b"))
    for _ in range(MESSAGES_PER_TURN + 10):
        scheduler.cast(a, Add(1))
    scheduler.cast(b, Add(1))
    scheduler.run()
    assert order == ["a"] * MESSAGES_PER_TURN + ["b"] + ["a"] * 10


def test_a_loop_of_calls_on_the_spot_does_not_starve_the_others():
    clock = VirtualClock()
    scheduler = Scheduler(clock=clock, randomness=SeededRandomness(1, "actors"))
    host = HeapHost(scheduler, clock)
    worker = Worker()
    ref = scheduler.spawn(worker)
    seen: list[int] = []

    class Looper(Actor):
        @handles(Total)
        async def loop(self, message: Total) -> None:
            for _ in range(1_000):
                await self.call(ref, Add(1))

    class Witness(Actor):
        @handles(Total)
        def look(self, message: Total) -> None:
            seen.append(worker.total)

    looper, witness = scheduler.spawn(Looper()), scheduler.spawn(Witness())
    host.cast(looper, Total())
    host.cast(witness, Total())
    host.run_until_idle()
    assert worker.total == 1_000
    assert seen[0] <= MESSAGES_PER_TURN + 1
    statistics = scheduler.statistics()
    assert statistics.calls_in_caller > 900
    assert statistics.calls_in_caller + statistics.calls_by_mailbox == 1_000


def test_a_caller_ended_by_its_callee_does_not_go_on(host: HeapHost):
    went_on: list[bool] = []
    cleaned: list[str] = []

    @attrs.frozen
    class Kill:
        ref: ActorRef

    class Killer(Actor):
        @handles(Kill)
        def kill(self, message: Kill) -> bool:
            return self.stop_actor(message.ref, "killed")

    class Victim(Actor):
        @handles(Relay)
        async def walk_in(self, message: Relay) -> None:
            try:
                await self.call(message.ref, Kill(self.context.ref))
                went_on.append(True)
            finally:
                cleaned.append("yes")

    killer, victim = host.scheduler.spawn(Killer()), host.scheduler.spawn(Victim())
    with pytest.raises(Dead, match="killed"):
        host.call(victim, Relay(killer, None))
    assert not went_on
    assert cleaned == ["yes"]
    assert host.scheduler.is_alive(killer)


def test_nor_can_it_be_replied_to(host: HeapHost):
    replied: list[bool] = []

    class Killer(Actor):
        @handles(Total)
        def kill(self, message: Total) -> None:
            caller = self.context.caller
            assert caller is not None
            assert caller.ref is not None
            self.stop_actor(caller.ref, "killed")
            replied.append(self.reply(caller, 1))

    killer, victim = host.scheduler.spawn(Killer()), host.scheduler.spawn(Worker())
    with pytest.raises(Dead, match="killed"):
        host.call(victim, Relay(killer, Total()))
    assert replied == [False]


def test_an_effect_gives_its_result_or_its_exception_back(host: HeapHost):
    async def divide(a: int, b: int) -> float:
        await heap_sleep(NS_PER_S)
        return a / b

    class Calculator(Actor):
        @handles(Add)
        async def divide(self, message: Add) -> Any:
            try:
                return await self.perform(divide, 10, message.amount)
            except ZeroDivisionError:
                return "no"

    calculator = host.scheduler.spawn(Calculator())
    assert host.call(calculator, Add(4)) == 2.5
    assert host.call(calculator, Add(0)) == "no"
    assert host.clock.monotonic_ns() == 2 * NS_PER_S


def test_an_effect_past_its_deadline_is_abandoned(host: HeapHost):
    ended: list[str] = []

    async def slow() -> None:
        try:
            await heap_sleep(10 * NS_PER_S)
        finally:
            ended.append("cut")

    class Hasty(Actor):
        @handles(Total)
        async def hurry(self, message: Total) -> str:
            try:
                await self.perform(slow, deadline_ns=NS_PER_S)
            except TimedOut:
                return "too slow"
            return "in time"

    assert host.call(host.scheduler.spawn(Hasty()), Total()) == "too slow"
    assert host.clock.monotonic_ns() == NS_PER_S
    assert host.scheduler.statistics().effects_in_flight == 0
    host.run_for(10 * NS_PER_S)
    assert ended == ["cut"]


def test_many_calls_with_deadlines_leave_nothing_behind(host: HeapHost):
    @attrs.frozen
    class Go:
        ref: ActorRef

    class Looper(Actor):
        @handles(Go)
        async def loop(self, message: Go) -> None:
            for _ in range(5_000):
                await self.call(message.ref, Total())
                await self.sleep(0)

    looper, worker = host.scheduler.spawn(Looper()), host.scheduler.spawn(Worker())
    host.call(looper, Go(worker))
    assert host.scheduler.statistics().timers < 200


def test_subclasses_inherit_handlers_and_may_replace_them(host: HeapHost):
    class Doubling(Worker):
        def add(self, message: Add) -> int:
            return super().add(Add(2 * message.amount))

    class Waiting(Worker):
        @handles(Add)
        async def add(self, message: Add) -> int:  # type: ignore[override]  # plain to awaiting
            await self.sleep(1)
            return -1

    assert host.call(host.scheduler.spawn(Doubling()), Add(4)) == 8
    assert host.call(host.scheduler.spawn(Waiting()), Add(4)) == -1
