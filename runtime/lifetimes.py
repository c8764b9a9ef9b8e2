"""Under the scheduler, second floor: how actors end, and who is told."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from inspect import CORO_RUNNING, getcoroutinestate

from runtime import inspection
from runtime.clock import Clock
from runtime.context import (
    DEAD,
    NO_EXTRAS,
    RUNNING,
    SUSPEND,
    SYSTEM_MAIL,
    Caller,
    Context,
    Down,
    Monitor,
)
from runtime.errors import Crashed, Dead, StartFailed
from runtime.inspection import Report
from runtime.links import Links
from runtime.randomness import Randomness
from runtime.refs import ActorRef


class Lifetimes(Links):
    """The part of a scheduler that ends actors."""

    def __init__(
        self,
        *,
        clock: Clock,
        randomness: Randomness,
        node: str,
        report: Callable[[Report], None] | None,
        crash_details: bool,
    ) -> None:
        super().__init__(clock=clock, randomness=randomness, node=node)
        self._report = report
        self._crash_details = crash_details
        self._running = False
        self._signals = deque()
        self._endings = 0  # ends under way, one within the other
        self._ended = 0
        self._crashed = 0
        self._messages_handled = 0  # of actors that have ended

    def stop(self, ref: ActorRef, reason: str = "shutdown") -> bool:
        """End an actor now: its waiting handler is cut, an effect in flight is abandoned, its
        children end before it, its mail is lost. If it stops itself so, then as soon as it waits or
        returns. False if it has ended already."""
        context = self.resolve(ref)
        if context is None or context._state == DEAD or context._killed:
            return False
        self._stop(context, reason)
        return True

    def shutdown(self, reason: str = "shutdown") -> None:
        """End every actor, the youngest root first, and drop their mail."""
        for context in reversed(self.roots()):
            if context._state != DEAD:  # the end of another may have been its own, by a link
                self._stop(context, reason)

    def is_alive(self, ref: ActorRef) -> bool:
        """Whether the actor runs on this node and has not ended."""
        context = self.resolve(ref)
        return context is not None and context._state != DEAD

    def roots(self) -> list[Context]:
        """Contexts of the actors that nobody above would take along, oldest first."""
        return [
            context
            for context in self._context_by_number.values()
            if context._parent is None or context._parent._state == DEAD
        ]

    def watch(self, ref: ActorRef, ended: Callable[[str], None]) -> Monitor:
        """Have `ended(reason)` called when the actor ends, at once if it has. `unwatch` undoes."""
        context = self.resolve(ref)
        if context is None or context._state == DEAD:
            monitor = Monitor(None, None, ended)
            if not self._watch_elsewhere(ref, monitor):
                ended("dead")
            return monitor
        monitor = Monitor(None, context, ended)
        self._add_monitor(context, monitor)
        return monitor

    def unwatch(self, monitor: Monitor) -> None:
        """Take off a watch or a monitor."""
        self._demonitor(monitor)

    # --- ends ------------------------------------------------------------------------------------

    def _stop(self, context: Context, reason: str) -> None:
        if context._state == RUNNING and self._running:
            waits_for_callee = context is self._current and self._inline is not None
            if not waits_for_callee or context is self._inline:
                context._ending = context._ending or reason
                context._killed = True
                return
        self._terminate(context, reason)

    def _crash(self, context: Context, error: Exception) -> str:
        """The actor has failed. Returns the reason under which it ended."""
        what = "start failed" if context._unstarted else "crashed"
        reason = f"{what}: {type(error).__name__}"
        self._record_crash(context, reason, error)
        self._terminate(context, reason, crashed=True)
        return reason

    def _record_crash(self, context: Context, reason: str, error: Exception) -> None:
        self._crashed += 1
        if self._report is not None:
            self._report(inspection.crash_report(context, reason, error, self._crash_details))

    def _terminate(self, context: Context, reason: str, *, crashed: bool = False) -> None:
        """The end of an actor, and of all those that its exit signals end in turn."""
        self._endings += 1
        try:
            self._end(context, reason, crashed)
            if self._endings == 1:
                self._pass_signals_on()
        finally:
            self._endings -= 1

    def _end(self, context: Context, reason: str, crashed: bool) -> None:
        """The end of one actor: what it waits for, its children, itself, its names, and only then
        whoever waits for it, watches it or is linked to it."""
        context._state = DEAD
        context._room = 0  # for `Actor.cast`
        self._drop_wait(context)
        if context is self._current and self._inline is not None and self._inline._caller:
            self._close(self._inline._caller)
        self._close_coroutine(context)
        for child in reversed(list(context._extras.children or ())):
            if child._state != DEAD:
                self._stop(child, "shutdown")
        try:
            context._actor.terminated(reason)
        except Exception as error:
            self._record_crash(context, f"terminated failed: {type(error).__name__}", error)
        self._ended += 1
        self._messages_handled += context.handled
        del self._context_by_number[context.ref.number]
        if context._parent is not None and context._parent._extras.children is not None:
            context._parent._extras.children.pop(context, None)
        self.registry._forget(context)
        self.pubsub._forget(context)
        self._timers.cancel(context)
        if context._extras.idle is not None:
            self._timers.cancel(context._extras.idle)
        for timer in context._extras.timers or ():
            timer._context = None
            self._timers.cancel(timer)
        self._fail_callers(context, reason, crashed)
        self._tell_watchers(context, reason)
        self._break_links(context, reason)
        self._release(context)

    def _close_coroutine(self, context: Context) -> None:
        """Run the clean-up of a handler that is cut. One that is at a call on the spot, whose
        callee has just ended it, cannot be closed from within: it is when it comes back."""
        coroutine = context._coroutine
        if coroutine is None or getcoroutinestate(coroutine) == CORO_RUNNING:
            return
        context._coroutine = None
        try:
            coroutine.close()
        except Exception as error:
            self._record_crash(context, f"clean-up failed: {type(error).__name__}", error)

    def _fail_callers(self, context: Context, reason: str, crashed: bool) -> None:
        label = context.label
        taken_up = list(context._extras.later or ())
        if context._caller is not None:
            taken_up.append(context._caller)
        for caller in taken_up:
            if caller.waiting:
                error = Crashed(label, reason) if crashed else Dead(label, reason)
                self._answer(caller, None, error)
        for item in context._mailbox or ():
            if type(item) is Caller:
                if item.waiting:
                    self._answer(item, None, Dead(label, reason))
            elif type(item) not in SYSTEM_MAIL:
                self._dead_letters += 1
        for waiter in context._extras.start_waiters or ():
            self._resume(waiter, None, StartFailed(label, reason))

    def _tell_watchers(self, context: Context, reason: str) -> None:
        for monitor in list(context._extras.watching or ()):
            self._demonitor(monitor)
        for monitor in list(context._extras.monitors or ()):
            monitor._watched = None
            watcher = monitor._watcher
            if watcher is not None:
                if watcher._extras.watching is not None:
                    watcher._extras.watching.pop(monitor, None)
                monitor._down = Down(context.ref, reason)
                self._deliver(watcher, monitor)
            elif monitor._ended is not None:
                monitor._ended(reason)

    def _release(self, context: Context) -> None:
        """Let go of everything, also of what refers back, so that nothing is left for the garbage
        collector to find; references may be kept for long, and know it as dead by its number."""
        context.ref._context = None
        context._label = context.label
        context._actor = None
        context._parent = context._caller = None
        context._value = context._error = context._mailbox = context._recent = None
        context._extras = NO_EXTRAS

    # --- monitors --------------------------------------------------------------------------------

    def _monitor(self, context: Context, ref: ActorRef) -> Monitor:
        if context._state == DEAD:
            raise Dead(context.label)
        watched = self.resolve(ref)
        if watched is None or watched._state == DEAD:
            monitor = Monitor(context, None)
            if self._elsewhere(ref) is None:
                monitor._down = Down(ref, "dead")
                self._deliver(context, monitor)
                return monitor
        else:
            monitor = Monitor(context, watched)
            self._add_monitor(watched, monitor)
        extras = context._own()
        if extras.watching is None:
            extras.watching = {}
        extras.watching[monitor] = None
        if monitor._watched is None:
            self._watch_elsewhere(ref, monitor)
        return monitor

    def _watch_elsewhere(self, ref: ActorRef, monitor: Monitor) -> bool:
        """Watch an actor of another node; False if it is none."""
        elsewhere = self._elsewhere(ref)
        if elsewhere is None:
            return False

        def ended(reason: str) -> None:
            monitor._away = None
            watcher, callback = monitor._watcher, monitor._ended
            if watcher is not None:
                if watcher._extras.watching is not None:
                    watcher._extras.watching.pop(monitor, None)
                monitor._down = Down(ref, reason)
                self._deliver(watcher, monitor)
            elif callback is not None:
                monitor._ended = None
                callback(reason)

        off = elsewhere.watch(ref, ended)
        if monitor._down is None and (monitor._watcher or monitor._ended) is not None:
            monitor._away = off
        return True

    async def _wait_ended(self, context: Context, ref: ActorRef, deadline_ns: int | None) -> str:
        if context is not self._current:
            raise RuntimeError("awaited outside its own handler")
        watched = self.resolve(ref)
        is_here = watched is not None and watched._state != DEAD
        if not is_here and self._elsewhere(ref) is None:
            return "dead"

        def ended(reason: str) -> None:
            if context._wait is watch:
                self._resume(context, reason, None)

        watch = Monitor(None, watched if is_here else None, ended)
        self._wait(context, watch, deadline_ns)
        if watched is not None and is_here:
            self._add_monitor(watched, watch)
        else:
            self._watch_elsewhere(ref, watch)
        reason: str = await SUSPEND
        return reason

    def _add_monitor(self, watched: Context, monitor: Monitor) -> None:
        extras = watched._own()
        if extras.monitors is None:
            extras.monitors = {}
        extras.monitors[monitor] = None
