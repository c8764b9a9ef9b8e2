"""The scheduler's other shell: virtual time on an event heap, the same in every run of a seed.

    clock = VirtualClock()
    host = HeapHost(Scheduler(clock=clock, randomness=SeededRandomness(1, "actors")), clock)
    ref = host.scheduler.spawn(Counter())
    assert host.call(ref, Add(1)) == 1
    host.run_for(10 * NS_PER_S)

Effects are run to their end in one step: they may await each other and `heap_sleep`, but nothing
that wants an event loop. So an effect of the memory store just works, and one that would need a
socket says so.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from typing import Any, Final

from runtime.actor import DEFAULT_DEADLINE_NS
from runtime.clock import VirtualClock
from runtime.mailroom import Effect
from runtime.randomness import Randomness
from runtime.refs import AnyRef
from runtime.scheduler import Scheduler
from runtime.timers import TimerHeap

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

    __slots__ = ("armed_ns", "coroutine", "due_ns", "effect")

    def __init__(self, effect: Effect) -> None:
        self.effect = effect
        self.coroutine: Coroutine[Any, Any, Any] | None = None
        self.due_ns: int | None = None
        self.armed_ns: int | None = None


class HeapHost:
    """Hosts a scheduler whose clock is `clock`.

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
        self._runs = TimerHeap()

    def run_until_idle(self) -> int:
        """Handle all that can be handled without time passing. Returns how many messages."""
        handled = 0
        while True:
            progress = self.scheduler.run()
            handled += progress
            for effect in self.scheduler.drain_effects():
                self._runs.arm(_Run(effect), self.clock.monotonic_ns() + self._draw_delay())
                progress += 1
            run: _Run | None
            while (run := self._runs.pop_due(self.clock.monotonic_ns())) is not None:
                self._step(run)
                progress += 1
            if progress == 0 and not self.scheduler.has_work:
                return handled
            if handled > MAX_MESSAGES_PER_INSTANT:
                raise RuntimeError("the actors do not come to rest")

    def next_event_ns(self) -> int | None:
        """When (on the clock) something happens next if nothing comes from outside, or None."""
        due = [self.scheduler.next_deadline(), self._runs.next_due_ns()]
        return min((each for each in due if each is not None), default=None)

    def run_for(self, duration_ns: int) -> None:
        """Let `duration_ns` of virtual time pass, and handle all that falls into it."""
        self.run_to(self.clock.monotonic_ns() + duration_ns)

    def run_to(self, instant_ns: int) -> None:
        """Let virtual time pass up to and including `instant_ns`."""
        self.run_until_idle()
        while (event_ns := self.next_event_ns()) is not None and event_ns <= instant_ns:
            self.clock.advance_to(max(event_ns, self.clock.monotonic_ns()))
            self.run_until_idle()
        self.clock.advance_to(max(instant_ns, self.clock.monotonic_ns()))

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
            self.clock.advance_to(max(event_ns, self.clock.monotonic_ns()))
            self.run_until_idle()
        value, error = answers[0]
        if error is not None:
            raise error
        return value

    def cast(self, ref: AnyRef, message: object) -> bool:
        """Send, without running anything yet; see `Scheduler.cast`."""
        return self.scheduler.cast(ref, message)

    def _draw_delay(self) -> int:
        least, most = self._effect_delay_ns
        if self._randomness is None or most == 0:
            return 0
        return least + self._randomness.integer(most - least + 1)

    def _step(self, run: _Run) -> None:
        effect = run.effect
        if effect.abandoned:
            if run.coroutine is not None:
                run.coroutine.close()
            return
        try:
            if run.coroutine is None:
                run.coroutine = _as_coroutine(effect)
            wish = run.coroutine.send(None)
        except StopIteration as stop:
            self.scheduler.complete(effect, stop.value)
            return
        except Exception as error:
            self.scheduler.complete(effect, error=error)
            return
        if isinstance(wish, _HeapSleep):
            self._runs.arm(run, self.clock.monotonic_ns() + wish.duration_ns)
            return
        run.coroutine.close()
        text = "on a heap an effect awaits nothing but other effects and heap_sleep"
        self.scheduler.complete(effect, error=RuntimeError(text))


async def _as_coroutine(effect: Effect) -> Any:
    return await effect.function(*effect.arguments)
