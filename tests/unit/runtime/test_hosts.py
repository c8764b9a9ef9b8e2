"""The two shells: what each does of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from runtime.actor import Actor, ActorRef, Crashed, Dead, TimedOut, handles
from runtime.clock import NS_PER_MS, NS_PER_S, SystemClock, VirtualClock
from runtime.host import TrioHost
from runtime.randomness import SeededRandomness, SystemRandomness
from runtime.scheduler import Scheduler
from runtime.testing import HeapHost, heap_sleep


@attrs.frozen
class Hello:
    pass


@attrs.frozen
class Perform:
    function: Any


@attrs.frozen
class Remind:
    delay_ns: int


class Greeter(Actor):
    def __init__(self) -> None:
        self.heard = trio.Event()
        self.reason: str | None = None

    def terminated(self, reason: str) -> None:
        self.reason = reason

    @handles(Hello)
    def hello(self, message: Hello) -> str:
        self.heard.set()
        return "hello"

    @handles(Perform)
    async def do(self, message: Perform) -> Any:
        return await self.perform(message.function)

    @handles(Remind)
    def remind(self, message: Remind) -> None:
        self.send_after(message.delay_ns, Hello())


def trio_host() -> TrioHost:
    return TrioHost(Scheduler(clock=SystemClock(), randomness=SystemRandomness()))


async def test_a_trio_task_casts_and_calls(nursery: trio.Nursery):
    host = trio_host()
    await nursery.start(host.run)
    greeter = Greeter()
    ref = host.scheduler.spawn(greeter)
    assert host.cast(ref, Hello())
    with trio.fail_after(10):
        await greeter.heard.wait()
        assert await host.call(ref, Hello()) == "hello"
    told = host.statistics()
    assert told.scheduler.messages_handled == 2
    assert told.runs >= 2
    assert told.parks >= 1
    assert told.effects == 0


async def test_mail_that_came_before_the_host_ran_is_not_lost(nursery: trio.Nursery):
    host = trio_host()
    greeter = Greeter()
    host.cast(host.scheduler.spawn(greeter), Hello())
    await nursery.start(host.run)
    with trio.fail_after(10):
        await greeter.heard.wait()


async def test_a_timer_wakes_a_sleeping_host(nursery: trio.Nursery):
    host = trio_host()
    await nursery.start(host.run)
    greeter = Greeter()
    ref = host.scheduler.spawn(greeter)
    await host.call(ref, Remind(5 * NS_PER_MS))
    with trio.fail_after(10):
        await greeter.heard.wait()


async def test_a_call_has_its_deadline_and_its_errors(nursery: trio.Nursery):
    host = trio_host()
    await nursery.start(host.run)
    ref = host.scheduler.spawn(Greeter())
    with pytest.raises(TimedOut):
        await host.call(ref, Perform(trio.sleep_forever), deadline_ns=NS_PER_MS)
    with pytest.raises(Dead):
        await host.call(ActorRef("local", 999), Hello())

    async def fail() -> None:
        raise OSError

    other = host.scheduler.spawn(Greeter())
    with pytest.raises(Crashed):
        await host.call(other, Perform(fail))
    assert await host.join(other) == "dead"


async def test_a_call_to_a_busy_actor_has_its_deadline_although_the_host_sleeps(
    nursery: trio.Nursery,
):
    host = trio_host()
    await nursery.start(host.run)
    ref = host.scheduler.spawn(Greeter())
    host.cast(ref, Perform(trio.sleep_forever))
    await trio.testing.wait_all_tasks_blocked()
    with trio.fail_after(10), pytest.raises(TimedOut):
        await host.call(ref, Hello(), deadline_ns=NS_PER_MS)


async def test_effects_run_as_trio_tasks_beside_each_other(nursery: trio.Nursery):
    host = trio_host()
    await nursery.start(host.run)
    meeting = trio.Event()
    first, second = host.scheduler.spawn(Greeter()), host.scheduler.spawn(Greeter())
    answers: list[str] = []

    async def wait() -> str:
        await meeting.wait()
        return "met"

    async def come() -> str:
        meeting.set()
        return "came"

    async def ask(ref: ActorRef, function: Any) -> None:
        answers.append(await host.call(ref, Perform(function)))

    with trio.fail_after(10):
        async with trio.open_nursery() as asking:
            asking.start_soon(ask, first, wait)
            await trio.testing.wait_all_tasks_blocked()
            asking.start_soon(ask, second, come)
    assert sorted(answers) == ["came", "met"]


async def test_stopping_an_actor_cancels_its_effect(nursery: trio.Nursery):
    host = trio_host()
    await nursery.start(host.run)
    ref = host.scheduler.spawn(Greeter())
    begun, cancelled = trio.Event(), trio.Event()

    async def effect() -> None:
        try:
            begun.set()
            await trio.sleep_forever()
        finally:
            cancelled.set()

    host.cast(ref, Perform(effect))
    with trio.fail_after(10):
        await begun.wait()
        host.scheduler.stop(ref, "killed")
        await cancelled.wait()
    assert host.scheduler.statistics().effects_in_flight == 0


async def test_a_cancelled_call_is_forgotten_and_its_reply_dropped(nursery: trio.Nursery):
    host = trio_host()
    await nursery.start(host.run)
    ref = host.scheduler.spawn(Greeter())
    go_on = trio.Event()
    with trio.move_on_after(0.01):
        await host.call(ref, Perform(go_on.wait))
    go_on.set()
    with trio.fail_after(10):
        assert await host.call(ref, Hello()) == "hello"
    assert host.scheduler.statistics().late_replies == 1


async def test_when_the_host_is_cancelled_every_actor_ends_and_every_waiter_is_told():
    host = trio_host()
    actors = [Greeter() for _ in range(3)]
    refs = [host.scheduler.spawn(actor) for actor in actors]
    seen: list[str] = []

    async def call(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        try:
            await host.call(refs[0], Perform(trio.sleep_forever), deadline_ns=60 * NS_PER_S)
        except Dead:
            seen.append("dead")

    async def join(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        seen.append(await host.join(refs[1]))

    with trio.fail_after(10):
        async with trio.open_nursery() as waiting, trio.open_nursery() as hosting:
            await hosting.start(host.run)
            await waiting.start(call)
            await waiting.start(join)
            await trio.testing.wait_all_tasks_blocked()
            hosting.cancel_scope.cancel()
    assert sorted(seen) == ["dead", "shutdown"]
    assert [actor.reason for actor in actors] == ["shutdown"] * 3
    with pytest.raises(Dead, match="the host has ended"):
        await host.call(host.scheduler.spawn(Greeter()), Hello())


async def test_a_busy_host_leaves_room_for_other_tasks(nursery: trio.Nursery):
    class Endless(Actor):
        @handles(Hello)
        def again(self, message: Hello) -> None:
            self.cast(self.context.ref, message)

    host = trio_host()
    await nursery.start(host.run)
    host.cast(host.scheduler.spawn(Endless()), Hello())
    with trio.fail_after(10):
        for _ in range(20):
            await trio.sleep(0)


async def test_another_thread_enters_through_trio(nursery: trio.Nursery):
    host = trio_host()
    await nursery.start(host.run)
    greeter = Greeter()
    ref = host.scheduler.spawn(greeter)
    with trio.fail_after(10):
        await trio.to_thread.run_sync(lambda: trio.from_thread.run_sync(host.cast, ref, Hello()))
        await greeter.heard.wait()


# --- the event heap ----------------------------------------------------------------------------


def heap_host(**options: Any) -> HeapHost:
    clock = VirtualClock()
    scheduler = Scheduler(clock=clock, randomness=SeededRandomness(1, "actors"))
    return HeapHost(scheduler, clock, **options)


def test_time_stands_at_the_end_of_the_run_and_nothing_before_it_is_left():
    host = heap_host()
    ref = host.scheduler.spawn(Greeter())
    host.call(ref, Remind(NS_PER_S))
    host.run_for(NS_PER_S - 1)
    assert host.next_event_ns() == NS_PER_S
    host.run_for(1)
    assert host.clock.monotonic_ns() == NS_PER_S
    seen = host.scheduler.statistics_of(ref)
    assert seen is not None
    assert seen.handled == 2


def test_an_effect_that_wants_an_event_loop_is_told_so():
    host = heap_host()

    async def effect() -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()

    ref = host.scheduler.spawn(Greeter())
    with pytest.raises(Crashed, match="RuntimeError"):
        host.call(ref, Perform(effect))


def test_delays_of_effects_come_from_the_seed():
    def finish(seed: int) -> list[int]:
        host = heap_host(
            randomness=SeededRandomness(seed, "host"), effect_delay_ns=(NS_PER_MS, 9 * NS_PER_MS)
        )
        times: list[int] = []

        async def effect() -> None:
            times.append(host.clock.monotonic_ns())
            await heap_sleep(1)

        for _ in range(5):
            host.cast(host.scheduler.spawn(Greeter()), Perform(effect))
        host.run_for(NS_PER_S)
        return times

    assert finish(1) == finish(1) != finish(2)
    assert all(NS_PER_MS <= at <= 9 * NS_PER_MS for at in finish(3))


def test_a_heap_host_wants_the_clock_of_its_scheduler():
    scheduler = Scheduler(clock=VirtualClock(), randomness=SeededRandomness(1, "actors"))
    with pytest.raises(ValueError, match="another clock"):
        HeapHost(scheduler, VirtualClock())
    with pytest.raises(ValueError, match="randomness"):
        heap_host(effect_delay_ns=(0, 5))


def test_nothing_but_the_trio_host_knows_trio():
    program = (
        "import sys, runtime.supervisor, runtime.testing, runtime.scheduler;"
        "sys.exit('trio' in sys.modules)"
    )
    repository = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", program], cwd=repository, check=True)
