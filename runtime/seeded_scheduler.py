"""A scheduler for tests: turns in an order that a seed gives, and actors that crash by chance.

The production scheduler knows nothing of it. What is overridden here is who of the queued has the
next turn and for how long, and the tables of handlers that an actor is run by.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from inspect import CORO_SUSPENDED, getcoroutinestate
from typing import Any

from runtime.actor import Actor
from runtime.context import DEAD, Context
from runtime.faults import FaultInjector, InjectedCrash
from runtime.refs import ActorRef
from runtime.scheduler import DEFAULT_BUDGET, MESSAGES_PER_TURN, Scheduler


class SeededScheduler(Scheduler):
    """A Scheduler whose order of turns and whose crashes are drawn by `injector`.

    The other arguments are Scheduler's. If it shuffles turns, they go in rounds: whoever is queued
    when a round begins has one turn in it, in a drawn order; whoever is queued meanwhile has one in
    the next, and timers fire between two rounds. So nobody starves, `sleep(0)` lets everybody have
    a turn, and mailboxes keep their order.
    """

    def __init__(self, *, injector: FaultInjector, **options: Any) -> None:
        super().__init__(**options)
        self.injector = injector
        self._inline_most = self._inline_per_turn
        self._left_in_round = 0  # so many at the head of the queue are still to be drawn from
        self._tables: dict[type[Actor], tuple[dict[type, Any], dict[type, Any]]] = {}

    def spawn(self, actor: Actor, **options: Any) -> ActorRef:
        """As `Scheduler.spawn`."""
        ref = super().spawn(actor, **options)
        context = ref._context
        if context is not None and not self.injector.spares(actor):
            kind = type(actor)
            if kind not in self._tables:
                self._tables[kind] = self._fragile_tables(kind)
            context._plain, awaiting = self._tables[kind]
            vars(actor)["_awaiting_handlers"] = awaiting  # before its class's own
        return ref

    def run(self, budget: int = DEFAULT_BUDGET) -> int:
        """As `Scheduler.run`."""
        if not self.injector.faults.shuffles_turns:
            return super().run(budget)
        if self._running:
            raise RuntimeError("the scheduler runs already")
        self._running = True
        handled = 0
        try:
            while handled < budget:
                if self._left_in_round == 0:
                    self._left_in_round = len(self._queue)
                    self._fire_timers()
                    self._left_in_round = self._left_in_round or len(self._queue)
                    if self._left_in_round == 0:
                        break
                context = self._draw()
                if context._state != DEAD:
                    handled += self._turn(context)
        finally:
            self._running = False
            self._current = self._inline = None
        return handled

    # --- turns -----------------------------------------------------------------------------------

    def _draw(self) -> Context:
        """Take somebody of the present round from the queue, and draw the bounds of its turn."""
        queue, chance = self._queue, self.injector.stream("turn")
        if self._left_in_round > 1:
            at = chance.integer(self._left_in_round)
            queue[0], queue[at] = queue[at], queue[0]
            self.injector.count("turn")
        self._left_in_round -= 1
        # Short turns more often than long ones: most mailboxes hold less than a turn anyway.
        most = (1, 2, 4, MESSAGES_PER_TURN)[chance.integer(4)]
        self._messages_per_turn = 1 + chance.integer(most)
        self._inline_per_turn = (0, self._inline_most)[chance.integer(2)]
        return queue.popleft()

    # --- crashes ---------------------------------------------------------------------------------

    def _start(self, context: Context) -> bool:
        if not self.injector.spares(context._actor) and self.injector.strikes("crash_start"):
            self._crash(context, InjectedCrash())
            return False
        return super()._start(context)

    def _step(self, context: Context) -> bool:
        coroutine = context._coroutine
        assert coroutine is not None
        if (
            getcoroutinestate(coroutine) == CORO_SUSPENDED
            and not self.injector.spares(context._actor)
            and self.injector.strikes("crash_waiting")
        ):
            self._crash(context, InjectedCrash())
            return False
        return super()._step(context)

    def _fragile_tables(self, kind: type[Actor]) -> tuple[dict[type, Any], dict[type, Any]]:
        """The handlers of a class, each of which may crash before or after its work."""
        plain = {each: self._fragile(handler) for each, handler in kind._plain_handlers.items()}
        awaiting = {
            each: self._fragile_awaiting(handler)
            for each, handler in kind._awaiting_handlers.items()
        }
        return plain, awaiting

    def _fragile(self, handler: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        strikes = self.injector.strikes

        def handle(actor: Any, message: Any) -> Any:
            if strikes("crash_before"):
                raise InjectedCrash
            result = handler(actor, message)
            if strikes("crash_after"):
                raise InjectedCrash
            return result

        return handle

    def _fragile_awaiting(
        self, handler: Callable[[Any, Any], Coroutine[Any, Any, Any]]
    ) -> Callable[[Any, Any], Coroutine[Any, Any, Any]]:
        strikes = self.injector.strikes

        async def handle(actor: Any, message: Any) -> Any:
            if strikes("crash_before"):
                raise InjectedCrash
            result = await handler(actor, message)
            if strikes("crash_after"):
                raise InjectedCrash
            return result

        return handle
