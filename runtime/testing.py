"""Actor systems tested without real time: virtual time on an event heap, the same in every run of a
seed, with turns in a drawn order and faults.

    host = seeded_host(Faults(seed=7, shuffles_turns=True, crash_after_per_million=2_000))
    ref = host.scheduler.spawn(Counter())
    assert host.call(ref, Add(1)) == 1
    host.run_for(10 * NS_PER_S)
    print(host.statistics())

Without faults and in order of arrival it is `HeapHost(Scheduler(...), clock)`. Several nodes on one
clock are run by `run_together`; what goes between them, or to agents, goes over a `Wire`.

Effects are run to their end in one step: they may await each other and `heap_sleep`, but nothing
that wants an event loop. So an effect of the memory store just works, and one that would need a
socket says so.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, Final

import attrs

from runtime.actor import DEFAULT_DEADLINE_NS
from runtime.clock import VirtualClock, earliest
from runtime.faults import (
    FaultInjector,
    Faults,
    FaultStatistics,
    InjectedCrash,
    InjectedFailure,
)
from runtime.mailroom import Effect
from runtime.randomness import Randomness, SeededRandomness, shuffle
from runtime.refs import AnyRef
from runtime.scheduler import DEFAULT_BUDGET, Scheduler
from runtime.seeded_scheduler import SeededScheduler
from runtime.timers import TimerHeap

__all__ = [
    "MAX_MESSAGES_PER_INSTANT",
    "FaultInjector",
    "FaultStatistics",
    "Faults",
    "HeapHost",
    "HeapHostStatistics",
    "InjectedCrash",
    "InjectedFailure",
    "SeededRandomness",
    "SeededScheduler",
    "VirtualClock",
    "Wire",
    "heap_sleep",
    "run_together",
    "seeded_host",
]

MAX_MESSAGES_PER_INSTANT: Final = 10_000_000
"""Messages handled without time passing, after which actors are taken to chase each other."""


class _HeapSleep:
    def __init__(self, duration_ns: int) -> None:
        self.duration_ns = duration_ns

    def __await__(self) -> Generator[_HeapSleep, None, None]:
        yield self


async def heap_sleep(duration_ns: int) -> None:
    """For effects on a HeapHost: let virtual time pass."""
    await _HeapSleep(max(0, duration_ns))


class _Run:
    """An effect under way: `coroutine` goes on when its entry in the heap is due."""

    __slots__ = ("armed_ns", "coroutine", "due_ns", "effect", "fails_after", "fails_before")

    def __init__(self, effect: Effect) -> None:
        self.effect = effect
        self.coroutine: Coroutine[Any, Any, Any] | None = None
        self.fails_before = False
        self.fails_after = False
        self.due_ns: int | None = None
        self.armed_ns: int | None = None


class _Event:
    """Something that happens outside of the actors."""

    __slots__ = ("armed_ns", "callback", "due_ns")

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback = callback
        self.due_ns: int | None = None
        self.armed_ns: int | None = None


@attrs.frozen(kw_only=True)
class HeapHostStatistics:
    """Effects that were begun and those that have not come back, sleeping or lost; events of `at`
    to come; what was injected (None without an injector). The actors' own are in
    `scheduler.statistics()`."""

    effects: int
    effects_under_way: int
    events: int
    faults: FaultStatistics | None


class HeapHost:
    """Hosts a scheduler whose clock is `clock`. With a SeededScheduler, that one's injector says
    what goes wrong with effects, time and wires.

    With `effect_delay_ns=(least, most)` each effect is carried out after a time drawn from
    `randomness` (uniform, both ends possible); otherwise at once, in the order of asking.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        clock: VirtualClock,
        *,
        randomness: Randomness | None = None,
        effect_delay_ns: tuple[int, int] = (0, 0),
    ) -> None:
        if scheduler.clock is not clock:
            raise ValueError("the scheduler goes by another clock")
        least, most = effect_delay_ns
        if not 0 <= least <= most:
            raise ValueError("effect_delay_ns is (least, most)")
        if most > 0 and randomness is None:
            raise ValueError("delays are drawn from a randomness")
        self.scheduler = scheduler
        self.clock = clock
        self._randomness = randomness
        self._effect_delay_ns = effect_delay_ns
        self.injector = scheduler.injector if isinstance(scheduler, SeededScheduler) else None
        self._heap = TimerHeap()
        self._runs: dict[_Run, None] = {}  # under way
        self._begun = 0
        self._events = 0

    def run_until_idle(self) -> int:
        """Handle all that can be handled without time passing. Returns how many messages."""
        handled = 0
        while True:
            progress = self.scheduler.run(self._draw_budget())
            handled += progress
            for effect in self.scheduler.drain_effects():
                self._begin(effect)
                progress += 1
            progress += self._let_happen()
            if progress == 0 and not self.scheduler.has_work:
                return handled
            if handled > MAX_MESSAGES_PER_INSTANT:
                raise RuntimeError("the actors do not come to rest")

    def next_event_ns(self) -> int | None:
        """When (on the clock) something happens next if nothing comes from outside, or None."""
        return earliest(self.scheduler.next_deadline(), self._heap.next_due_ns())

    def at(self, instant_ns: int, callback: Callable[[], object]) -> None:
        """Have `callback` called when the clock stands at `instant_ns` (past: when this host runs
        next), outside of every turn. Of one instant, in the order of asking."""
        self._events += 1
        self._heap.arm(_Event(callback), instant_ns)

    def run_for(self, duration_ns: int) -> None:
        """Let `duration_ns` of virtual time pass, and handle all that falls into it."""
        self.run_to(self.clock.monotonic_ns() + duration_ns)

    def run_to(self, instant_ns: int) -> None:
        """Let virtual time pass up to and including `instant_ns`."""
        run_together([self], instant_ns)

    def heal(self) -> None:
        """From now on no fault is injected any more."""
        if self.injector is not None:
            self.injector.heal()

    def statistics(self) -> HeapHostStatistics:
        return HeapHostStatistics(
            effects=self._begun,
            effects_under_way=len(self._runs),
            events=self._events,
            faults=None if self.injector is None else self.injector.statistics(),
        )

    def call(self, ref: AnyRef, message: object, deadline_ns: int = DEFAULT_DEADLINE_NS) -> Any:
        """Call an actor and let time pass until it has answered. Raises as `Actor.call` does."""
        answers: list[tuple[Any, Exception | None]] = []
        self.scheduler.call_soon(
            ref,
            message,
            lambda value, error: answers.append((value, error)),
            deadline_ns=deadline_ns,
        )
        self.run_until_idle()
        while not answers:
            event_ns = self.next_event_ns()
            assert event_ns is not None, "a call has a deadline"
            self._pass_time(event_ns)
            self.run_until_idle()
        value, error = answers[0]
        if error is not None:
            raise error
        return value

    def cast(self, ref: AnyRef, message: object) -> bool:
        """Send, without running anything yet; see `Scheduler.cast`."""
        return self.scheduler.cast(ref, message)

    # --- time ------------------------------------------------------------------------------------

    def _pass_time(self, event_ns: int, last_ns: int | None = None) -> None:
        """Let time pass until something is due; by chance longer, but not past `last_ns`."""
        injector, now_ns = self.injector, self.clock.monotonic_ns()
        until_ns = max(event_ns, now_ns)
        if injector is not None and until_ns > now_ns:
            if injector.strikes("stall"):
                until_ns += injector.duration_ns("stall")
                until_ns = until_ns if last_ns is None else min(until_ns, last_ns)
            if injector.strikes("wall_jump"):
                sign = 1 - 2 * injector.stream("wall_jump").integer(2)
                self.clock.jump_wall(sign * injector.duration_ns("wall_jump"))
        self.clock.advance_to(until_ns)

    # --- effects and events ----------------------------------------------------------------------

    @property
    def _shuffles(self) -> bool:
        return self.injector is not None and self.injector.faults.shuffles_turns

    def _draw_budget(self) -> int:
        """For how long the scheduler runs before effects are looked at."""
        if self.injector is None or not self._shuffles:
            return DEFAULT_BUDGET
        return 1 + self.injector.stream("budget").integer(8)

    def _draw_delay(self) -> int:
        least, most = self._effect_delay_ns
        if self._randomness is None or most == 0:
            return 0
        return least + self._randomness.integer(most - least + 1)

    def _begin(self, effect: Effect) -> None:
        """Take an effect up, and draw what becomes of it."""
        self._begun += 1
        run = _Run(effect)
        self._runs[run] = None
        effect.on_abandoned = lambda: self._abandon(run)
        due_ns = self.clock.monotonic_ns() + self._draw_delay()
        injector = self.injector
        if injector is not None and injector.concerns(effect.function):
            if injector.strikes("effect_lost"):
                return
            if injector.strikes("effect_delay"):
                due_ns += injector.duration_ns("effect_delay")
            run.fails_before = injector.strikes("effect_fail_before")
            run.fails_after = not run.fails_before and injector.strikes("effect_fail_after")
        self._heap.arm(run, due_ns)

    def _abandon(self, run: _Run) -> None:
        """Nobody waits for it: it is closed when the present turn is over, as on trio."""
        self._heap.arm(run, self.clock.monotonic_ns())

    def _let_happen(self) -> int:
        """Carry out what is due outside of the actors; says how much that was."""
        runs: list[_Run] = []
        count = 0
        while (entry := self._heap.pop_due(self.clock.monotonic_ns())) is not None:
            count += 1
            if isinstance(entry, _Run):
                runs.append(entry)
            else:
                self._events -= 1
                entry.callback()
        if self.injector is not None and self._shuffles:
            shuffle(runs, self.injector.stream("effects"))
        for run in runs:
            self._step(run)
        return count

    def _step(self, run: _Run) -> None:
        effect = run.effect
        if effect.abandoned:
            self._runs.pop(run, None)
            if run.coroutine is not None:
                run.coroutine.close()
            return
        if run.fails_before:
            self._end(run, error=self._make_error())
            return
        try:
            if run.coroutine is None:
                run.coroutine = _as_coroutine(effect)
            wish = run.coroutine.send(None)
        except StopIteration as stop:
            if run.fails_after:
                self._end(run, error=self._make_error())
            else:
                self._end(run, stop.value)
            return
        except Exception as error:
            self._end(run, error=error)
            return
        if isinstance(wish, _HeapSleep):
            self._heap.arm(run, self.clock.monotonic_ns() + wish.duration_ns)
            return
        run.coroutine.close()
        text = "on a heap an effect awaits nothing but other effects and heap_sleep"
        self._end(run, error=RuntimeError(text))

    def _make_error(self) -> Exception:
        assert self.injector is not None
        return self.injector.faults.effect_error()

    def _end(self, run: _Run, value: Any = None, error: Exception | None = None) -> None:
        self._runs.pop(run, None)
        self.scheduler.complete(run.effect, value, error)


class Wire:
    """One way over which messages reach `host`'s node from elsewhere: another node, an agent.

        wire = Wire(host, lambda message: host.cast(ref, message))
        wire.send(Hello())

    `deliver` is called outside of every turn of `host`, at once (when the host runs next) or later.
    By the injector of `host` a message may be dropped, come twice, or late; none overtakes another.
    """

    def __init__(self, host: HeapHost, deliver: Callable[[Any], object]) -> None:
        self._host = host
        self._deliver = deliver
        self._last_ns = 0

    def send(self, message: Any) -> None:
        """Send on. Nobody is told what becomes of it."""
        injector = self._host.injector
        due_ns = self._host.clock.monotonic_ns()
        copies = 1
        if injector is not None:
            if injector.strikes("wire_drop"):
                return
            if injector.strikes("wire_delay"):
                due_ns += injector.duration_ns("wire_delay")
            copies += injector.strikes("wire_double")
        self._last_ns = max(self._last_ns, due_ns)
        for _ in range(copies):
            self._host.at(self._last_ns, lambda: self._deliver(message))


def run_together(hosts: Sequence[HeapHost], instant_ns: int) -> None:
    """Run nodes that share one clock up to and including `instant_ns`. Stalls of one stall all; for
    one that is dead or stopped, leave it out. Raises ValueError if their clocks differ."""
    clock = hosts[0].clock
    if any(host.clock is not clock for host in hosts):
        raise ValueError("hosts that run together have one clock")
    while True:
        for host in hosts:
            host.run_until_idle()
        events = [(at, host) for host in hosts if (at := host.next_event_ns()) is not None]
        event_ns, host = min(events, key=lambda each: each[0], default=(None, hosts[0]))
        if event_ns is None or event_ns > instant_ns:
            break
        host._pass_time(event_ns, instant_ns)
    clock.advance_to(max(instant_ns, clock.monotonic_ns()))


def seeded_host(
    faults: Faults, *, clock: VirtualClock | None = None, node: str = "local", **options: Any
) -> HeapHost:
    """A host with a scheduler, all of whose order, crashes and faults follow from `faults`.
    `options` are Scheduler's."""
    clock = VirtualClock() if clock is None else clock
    randomness = SeededRandomness(faults.seed, f"actors of {node}")
    scheduler = SeededScheduler(
        injector=FaultInjector(faults), clock=clock, randomness=randomness, node=node, **options
    )
    return HeapHost(scheduler, clock)


async def _as_coroutine(effect: Effect) -> Any:
    return await effect.function(*effect.arguments)
