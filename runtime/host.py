"""The scheduler's shell on trio: it runs the scheduler when there is something to run, performs
effects as trio tasks, and sleeps until mail, a finished effect or a deadline. The only file of the
actor runtime that knows trio."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Final

import attrs
import trio
from outcome import Error, Outcome, Value

from runtime.actor import DEFAULT_DEADLINE_NS, ActorRef, Caller
from runtime.clock import NS_PER_S
from runtime.errors import Dead
from runtime.inspection import SchedulerStatistics
from runtime.mailroom import Effect
from runtime.refs import AnyRef
from runtime.scheduler import Scheduler

MESSAGES_PER_CHECKPOINT: Final = 1_024
"""Messages between two real checkpoints of the host's task."""

MAX_PARK_NS: Final = NS_PER_S
"""With a deadline pending, the host looks at the clock this often: trio's own clock stands still
while the machine is suspended, and the scheduler's does not."""


COLLECTOR_THRESHOLDS: Final = (50_000, 20, 100)
"""Python's own make it walk over all actors several times while their number doubles: two thirds of
the time that spawning takes. An actor that ends leaves no cycle, so there is little to be found."""


def collect_rarely() -> None:
    """Set the garbage collector of this process to what suits one that holds many actors."""
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


@attrs.frozen(kw_only=True)
class HostStatistics:
    """Counts since `run` began, and what the scheduler holds now."""

    runs: int
    """Times that the scheduler was run: each ends in a checkpoint, or in sleep."""
    parks: int
    """Times that there was nothing to do."""
    effects: int
    scheduler: SchedulerStatistics


class TrioHost:
    """Hosts one scheduler in one trio run.

        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            answer = await host.call(ref, Question())

    `run` goes on until it is cancelled; then every actor is ended ("shutdown") and effects in
    flight are cancelled. All methods belong to the thread of the trio run; another thread enters
    by `trio.from_thread.run_sync(host.cast, ...)`.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._closed = False
        self._runs = 0
        self._parks = 0
        self._effects = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the scheduler until cancelled. Has the process collect garbage less often."""
        collect_rarely()
        scheduler = self.scheduler
        async with trio.open_nursery() as effects:
            task_status.started()
            try:
                while True:
                    scheduler.run(MESSAGES_PER_CHECKPOINT)
                    self._runs += 1
                    for effect in scheduler.drain_effects():
                        self._effects += 1
                        effects.start_soon(self._perform, effect)
                    if scheduler.has_work:
                        await trio.lowlevel.checkpoint()
                    else:
                        self._parks += 1
                        await self._park()
            finally:
                self._closed = True
                scheduler.unpark()
                scheduler.shutdown()

    def statistics(self) -> HostStatistics:
        return HostStatistics(
            runs=self._runs,
            parks=self._parks,
            effects=self._effects,
            scheduler=self.scheduler.statistics(),
        )

    def cast(self, ref: AnyRef, message: object) -> bool:
        """Send and go on; see `Scheduler.cast`."""
        return self.scheduler.cast(ref, message)

    async def call(
        self, ref: AnyRef, message: object, deadline_ns: int = DEFAULT_DEADLINE_NS
    ) -> Any:
        """Call an actor from a trio task. Raises as `Actor.call` does. When cancelled, the reply
        is dropped; the actor handles the message all the same. Always a checkpoint."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            raise Dead(repr(ref), "the host has ended")
        caller: Caller | None = None

        def begin(answered: Callable[[Any, Exception | None], None]) -> None:
            nonlocal caller
            caller = self.scheduler.call_soon(ref, message, answered, deadline_ns=deadline_ns)

        def abandon() -> None:
            if caller is not None:
                self.scheduler.forget(caller)

        return await _wait_for(begin, abandon)

    async def join(self, ref: ActorRef) -> str:
        """Wait until the actor has ended; returns the reason ("dead" if it had before)."""
        watches = []

        def begin(answered: Callable[[Any, Exception | None], None]) -> None:
            watches.append(self.scheduler.watch(ref, lambda reason: answered(reason, None)))

        def abandon() -> None:
            for watch in watches:
                self.scheduler.unwatch(watch)

        reason: str = await _wait_for(begin, abandon)
        return reason

    async def _park(self) -> None:
        """Sleep until there is something to do."""
        scheduler = self.scheduler
        deadline_ns = scheduler.next_deadline()
        task = trio.lowlevel.current_task()
        timeout_s = float("inf")
        if deadline_ns is not None:
            wait_ns = deadline_ns - scheduler.clock.monotonic_ns()
            if wait_ns <= 0:
                await trio.lowlevel.checkpoint()
                return
            timeout_s = min(wait_ns, MAX_PARK_NS) / NS_PER_S
        scheduler.park(lambda: trio.lowlevel.reschedule(task))

        def abort(_: object) -> trio.lowlevel.Abort:
            scheduler.unpark()
            return trio.lowlevel.Abort.SUCCEEDED

        with trio.move_on_after(timeout_s):
            await trio.lowlevel.wait_task_rescheduled(abort)

    async def _perform(self, effect: Effect) -> None:
        if effect.abandoned:
            return
        with trio.CancelScope() as scope:
            effect.on_abandoned = scope.cancel
            try:
                value = await effect.function(*effect.arguments)
            except Exception as error:
                self.scheduler.complete(effect, error=error)
                return
            self.scheduler.complete(effect, value)


async def _wait_for(
    begin: Callable[[Callable[[Any, Exception | None], None]], None], abandon: Callable[[], None]
) -> Any:
    """Wait for one callback. `begin` is given it and may call it at once; `abandon` is called when
    this task is cancelled before."""
    task = trio.lowlevel.current_task()
    outcome: Outcome[Any] | None = None
    waiting = False

    def answered(value: Any, error: Exception | None) -> None:
        nonlocal outcome
        outcome = Value(value) if error is None else Error(error)
        if waiting:
            trio.lowlevel.reschedule(task, outcome)

    def abort(_: object) -> trio.lowlevel.Abort:
        abandon()
        return trio.lowlevel.Abort.SUCCEEDED

    begin(answered)
    if outcome is not None:
        await trio.lowlevel.checkpoint()
        return outcome.unwrap()
    waiting = True
    return await trio.lowlevel.wait_task_rescheduled(abort)
