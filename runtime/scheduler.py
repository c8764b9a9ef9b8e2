"""The scheduler: a core that runs actors, with no clock, socket, thread or event loop of its own.

    ref = scheduler.spawn(Counter())
    scheduler.cast(ref, Add(1))
    scheduler.run()                      # handle what can be handled now
    for effect in scheduler.drain_effects(): ...   # the shell's work; then scheduler.complete(...)
    scheduler.next_deadline()            # when to call run() again if nothing else happens

`runtime.host` does this on trio, `runtime.testing` on a simulated clock. docs/runtime.md tells the
whole story. Not thread-safe. Four floors: `runtime.mailroom` (mail and time), `runtime.lifetimes`
(ends), `runtime.calls` (calls that are waited for), and here the turns. A call has two ways, on the
spot in the caller (`_call`) and through the mailbox (`_take`); tests hold them equal.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Generator, Hashable
from inspect import iscoroutine
from typing import Any, Final

from runtime import inspection
from runtime.actor import Actor
from runtime.calls import Calls
from runtime.clock import Clock
from runtime.context import (
    DEAD,
    IDLE,
    LATER,
    NO_EXTRAS,
    RECENT_MESSAGES,
    RUNNING,
    SUSPEND,
    SUSPENDED,
    Caller,
    Coalesced,
    Context,
    Exit,
    IdleTimeout,
    Monitor,
    Raise,
    SystemMail,
    Timer,
)
from runtime.errors import Dead, LimitReached, NameTaken, NoHandler
from runtime.inspection import ActorStatistics, Report, SchedulerStatistics, UnhandledReport
from runtime.mailroom import MAX_SPARE_MAILBOXES, Effect
from runtime.overload import Overload
from runtime.randomness import Randomness
from runtime.refs import ActorRef, AnyRef

__all__ = ["DEFAULT_BUDGET", "MESSAGES_PER_TURN", "Effect", "Scheduler"]

MESSAGES_PER_TURN: Final = 64
"""Messages that an actor handles before the next one has its turn. As many calls it may run on the
spot in one turn, before they take the way through the mailbox."""

DEFAULT_BUDGET: Final = 4_096
DEFAULT_ACTOR_LIMIT: Final = 1_000_000
NUMBER_BITS: Final = 40
MAX_INCARNATION: Final = 2 ** (62 - NUMBER_BITS) - 1
"""A node's actors are numbered from its incarnation on: no number comes again in a later life, so
that a reference from before never means another actor."""

_RECENT_MASK: Final = RECENT_MESSAGES - 1


class Scheduler(Calls):
    """Runs actors on one node.

    `report` is called with a CrashReport for every crash and an UnhandledReport for every dropped
    message of an unknown type; it must not raise and must not call back. `crash_details` puts the
    exception's text into reports, which may be message content: for tests and simulations.
    `calls_in_caller_per_turn=0` sends every call through the mailbox; nothing else changes.
    `incarnation` (0 to MAX_INCARNATION) must be another at each start of a node of this name.
    """

    _messages_per_turn = MESSAGES_PER_TURN  # another one only in `runtime.seeded_scheduler`

    def __init__(
        self,
        *,
        clock: Clock,
        randomness: Randomness,
        node: str = "local",
        report: Callable[[Report], None] | None = None,
        crash_details: bool = False,
        actor_limit: int = DEFAULT_ACTOR_LIMIT,
        calls_in_caller_per_turn: int = MESSAGES_PER_TURN,
        incarnation: int = 0,
    ) -> None:
        super().__init__(
            clock=clock,
            randomness=randomness,
            node=node,
            report=report,
            crash_details=crash_details,
        )
        self._actor_limit = actor_limit
        self._inline_per_turn = calls_in_caller_per_turn
        self._inline_left = 0  # calls that the present actor may still run in this turn
        if not 0 <= incarnation <= MAX_INCARNATION:
            raise ValueError(f"an incarnation is 0 to {MAX_INCARNATION}")
        self._first_number = (incarnation << NUMBER_BITS) + 1
        self._next_number = self._first_number
        self._restarted = 0
        self._calls_in_caller = 0
        self._unhandled = 0

    # --- for everybody (also: cast, call_soon, stop, watch, resolve, registry, pubsub) -----------

    def spawn(
        self,
        actor: Actor,
        *,
        parent: ActorRef | None = None,
        name: Hashable | None = None,
        label: str | None = None,
        mailbox_limit: int | None = None,
        restarts: int = 0,
    ) -> ActorRef:
        """Start an actor: below `parent`, which takes it along when it ends, or as a root.

        `started` runs in the actor's own first turn; messages sent before wait in its mailbox.
        `name` is registered; `label` is for people (default: the name, or class and number).
        Raises LimitReached, NameTaken, Dead (the parent has ended), ValueError (an instance twice).
        """
        if actor._was_spawned:
            raise ValueError(f"{actor.context.label} was spawned before")
        above = self.resolve(parent) if parent is not None else None
        if parent is not None and (above is None or above._state == DEAD):
            raise Dead(repr(parent))
        if len(self._context_by_number) >= self._actor_limit:
            raise LimitReached(f"a node runs at most {self._actor_limit} actors")
        if name is not None and self.registry.whereis(name) is not None:
            raise NameTaken(f"{name!r} is taken")
        ref = ActorRef(self.node, self._next_number)
        self._next_number += 1
        limit = actor.mailbox_limit if mailbox_limit is None else mailbox_limit
        shown = label if label is not None or name is None else str(name)
        now = self.clock.monotonic_ns()
        room = 0 if actor.overload is Overload.COALESCE else limit
        context = Context(self, ref, actor, above, shown, room, now)
        if room <= 0:
            context._mailbox = deque()  # never without, so that all that comes is looked at
        if restarts:
            self._restarted += 1
        if restarts or mailbox_limit is not None:
            extras = context._own()
            extras.restarts = restarts
            extras.mailbox_limit = mailbox_limit
        ref._context = context
        actor.context = context
        actor._was_spawned = True
        self._context_by_number[ref.number] = context
        if name is not None:
            self.registry.register(name, ref)
        if above is not None:
            extras = above._own()
            if extras.children is None:
                extras.children = {}
            extras.children[context] = None
        if actor.idle_timeout_ns is not None:
            self._set_idle_timeout(context, actor.idle_timeout_ns)
        if context._unstarted:
            self._enqueue(context)
        return ref

    # --- for the shell (also: drain_effects, complete, next_deadline, shutdown) ------------------

    def run(self, budget: int = DEFAULT_BUDGET) -> int:
        """Fire due timers, then handle messages until nothing can run or about `budget` messages
        are handled (a turn is always ended). Returns how many were."""
        if self._running:
            raise RuntimeError("the scheduler runs already")
        self._running = True
        queue = self._queue
        handled = 0
        try:
            self._fire_timers()
            while queue and handled < budget:
                context = queue.popleft()
                if context._state != DEAD:
                    handled += self._turn(context)
        finally:
            self._running = False
            self._current = self._inline = None
        return handled

    @property
    def has_work(self) -> bool:
        """Whether `run` would do something now, timers apart."""
        return bool(self._queue)

    def park(self, waker: Callable[[], None]) -> None:
        """The shell goes to sleep: call `waker` once as soon as there is something to do."""
        self._waker = waker

    def unpark(self) -> None:
        """The shell is awake; `waker` is not called any more."""
        self._waker = None

    # --- for whoever watches ---------------------------------------------------------------------

    def tree(self) -> str:
        """Every actor on a line; see `inspection.tree`."""
        return inspection.tree(self)

    def statistics(self) -> SchedulerStatistics:
        contexts = self._context_by_number.values()
        return SchedulerStatistics(
            actors=len(contexts),
            queued=len(self._queue),
            timers=len(self._timers),
            effects_in_flight=self._effects_in_flight,
            spawned=self._next_number - self._first_number,
            ended=self._ended,
            crashed=self._crashed,
            restarted=self._restarted,
            messages_handled=self._messages_handled + sum(each.handled for each in contexts),
            calls_in_caller=self._calls_in_caller,
            calls_by_mailbox=self._calls_by_mailbox,
            calls_elsewhere=self._calls_elsewhere,
            calls_timed_out=self._calls_timed_out,
            call_cycles=self._call_cycles,
            refused=self._refused,
            dropped=self._dropped,
            coalesced=self._coalesced,
            dead_letters=self._dead_letters,
            unhandled=self._unhandled,
            late_replies=self._late_replies,
            late_effects=self._late_effects,
        )

    def statistics_of(self, ref: AnyRef) -> ActorStatistics | None:
        """One actor, or None if it has ended."""
        context = self.resolve(ref)
        if context is None or context._state == DEAD:
            return None
        return inspection.actor_statistics(context)

    # --- a turn ----------------------------------------------------------------------------------

    def _turn(self, context: Context) -> int:
        """Give one actor its turn; returns how many messages (or parts of one) it handled."""
        self._current = context
        self._inline_left = self._inline_per_turn
        context._state = RUNNING
        count = 1
        going_on = True
        if context._coroutine is not None:
            going_on = self._step(context)
        elif context._unstarted:
            going_on = self._start(context)
        else:
            count = 0
        if going_on:
            count = self._empty_mailbox(context, count)
        self._calls_in_caller += self._inline_per_turn - self._inline_left
        if context._state == IDLE and context._extras is not NO_EXTRAS:
            self._watch_idle(context)
        return count

    def _empty_mailbox(self, context: Context, count: int) -> int:
        """Handle messages until there are none or the turn's `count` is full; returns the count.

        Messages of one type in a row share the look-up of the handler, and are noted together."""
        actor = context._actor
        mailbox = context._mailbox
        kind: type | None = None  # of the messages in a row, for which there is a plain `handler`
        handler: Any = None
        before = count  # where they begin
        most = self._messages_per_turn
        while mailbox:
            if count >= most:
                if kind is not None:
                    self._note(context, kind, count - before)
                self._enqueue(context)
                return count
            count += 1
            item = mailbox.popleft()
            if type(item) is not kind:
                if kind is not None:
                    self._note(context, kind, count - 1 - before)
                kind = type(item)
                before = count - 1
                handler = context._plain.get(kind)
                if handler is None:
                    kind = None
                    if not self._take(context, item):
                        return count
                    continue
            try:
                handler(actor, item)
            except Exception as error:
                self._note(context, kind, count - before)
                self._crash(context, error)
                return count
            if context._ending is not None:
                self._note(context, kind, count - before)
                self._terminate(context, context._ending)
                return count
        if kind is not None:
            self._note(context, kind, count - before)
        context._state = IDLE
        if mailbox is not None and context._room > 0:
            context._mailbox = None
            if len(self._spare) < MAX_SPARE_MAILBOXES:
                self._spare.append(mailbox)
        return count

    def _take(self, context: Context, item: Any) -> bool:
        """Handle one item that is not simply a message for a plain handler. False when the turn is
        over: the actor waits or has ended."""
        caller: Caller | None = None
        message = item
        if type(item) is Caller:
            caller = item
            message = item._message
            item._message = None
        elif type(item) is Timer:
            if item._context is None:
                return True
            item._context = None
            message = item._message
        elif type(item) is Monitor:
            if item._down is None:
                return True
            message = item._down
        elif type(item) is SystemMail:
            message = item.message
        elif type(item) is Coalesced:
            message = item.message
            assert context._extras.coalescing is not None
            del context._extras.coalescing[item.key]
        kind = type(message)
        plain = context._plain.get(kind)
        awaiting = context._actor._awaiting_handlers.get(kind) if plain is None else None
        if plain is None and awaiting is None:
            if kind is Exit and (message.ref is None or message.ref == context.parent):
                self._terminate(context, message.reason)
                return False
            if kind is IdleTimeout:
                self._terminate(context, "normal")
                return False
            self._leave_unhandled(context, kind.__name__, caller)
            return True
        self._note(context, kind)
        context._caller = caller
        if awaiting is not None:
            context._coroutine = awaiting(context._actor, message)
            return self._step(context)
        assert plain is not None
        try:
            result = plain(context._actor, message)
        except Exception as error:
            self._crash(context, error)
            return False
        return self._finish(context, result)

    def _start(self, context: Context) -> bool:
        try:
            result = context._actor.started()
            if iscoroutine(result):
                context._coroutine = result
            elif result is not None:
                raise TypeError("started returns nothing")
        except Exception as error:
            self._crash(context, error)
            return False
        return self._step(context) if context._coroutine is not None else self._came_up(context)

    def _step(self, context: Context) -> bool:
        """Resume the coroutine with what it waited for. False: it waits again or has ended."""
        coroutine = context._coroutine
        assert coroutine is not None
        value, error = context._value, context._error
        context._value = context._error = None
        while True:
            try:
                token = coroutine.send(value) if error is None else coroutine.throw(error)
            except StopIteration as stop:
                result = stop.value
                break
            except Exception as failure:
                context._coroutine = None
                self._crash(context, failure)
                return False
            if context._state == DEAD:
                self._close_coroutine(context)
                return False
            if token is SUSPEND and context._wait is not None:
                context._state = SUSPENDED
                if context._killed and context._ending is not None:
                    self._terminate(context, context._ending)
                return False
            value, error = None, RuntimeError("a handler awaits only the runtime's primitives")
        context._coroutine = None
        return self._came_up(context) if context._unstarted else self._finish(context, result)

    def _finish(self, context: Context, result: Any) -> bool:
        """A handler has returned. False when that was the actor's end."""
        caller = context._caller
        if caller is not None:
            context._caller = None
            if result is LATER:
                self._keep(context, caller)
            elif not caller._replied:
                if type(result) is Raise:
                    self._answer(caller, None, result.error)
                else:
                    self._answer(caller, result, None)
        if context._ending is None:
            return True
        self._terminate(context, context._ending)
        return False

    def _came_up(self, context: Context) -> bool:
        context._unstarted = False
        if (waiters := context._extras.start_waiters) is not None:
            context._extras.start_waiters = None
            for waiter in waiters:
                self._resume(waiter, None, None)
        if context._ending is None:
            return True
        self._terminate(context, context._ending)
        return False

    def _settle(self, context: Context) -> None:
        """Put an actor that has just handled something to where it belongs."""
        if context._mailbox:
            self._enqueue(context)
            return
        context._state = IDLE
        self._watch_idle(context)

    def _note(self, context: Context, kind: type, times: int = 1) -> None:
        """The actor has handled (or begins to handle) so many messages of a type in a row."""
        recent = context._recent
        if recent is None:
            recent = context._recent = [None] * RECENT_MESSAGES
        handled = context.handled = context.handled + times
        recent[handled & _RECENT_MASK] = kind
        if times > 1:
            for earlier in range(1, min(times, RECENT_MESSAGES)):
                recent[(handled - earlier) & _RECENT_MASK] = kind

    def _leave_unhandled(self, context: Context, kind: str, caller: Caller | None) -> None:
        self._unhandled += 1
        if caller is not None:
            self._answer(caller, None, NoHandler(context.label, kind))
        elif self._report is not None:
            actor = type(context._actor).__name__
            self._report(
                UnhandledReport(ref=context.ref, label=context.label, actor=actor, message=kind)
            )

    # --- calls -----------------------------------------------------------------------------------

    @types.coroutine  # a generator: half of what a coroutine that awaits SUSPEND costs
    def _call(
        self, context: Context, ref: AnyRef, message: object, deadline_ns: int
    ) -> Generator[Any, Any, Any]:
        if context is not self._current:
            raise RuntimeError("awaited outside its own handler")
        callee = ref._context
        if callee is None or callee._scheduler is not self:
            callee = self.resolve(ref)
        if callee is None or callee._state == DEAD:
            caller = self._call_elsewhere(context, ref, message, deadline_ns)
            self._wait(context, caller, deadline_ns)
            return (yield SUSPEND)
        handler = None
        if callee._state == IDLE and self._inline_left > 0:
            kind = type(message)
            handler = callee._plain.get(kind)
        if handler is None:
            caller = self._post(context, callee, message)
            self._wait(context, caller, deadline_ns)
            return (yield SUSPEND)
        # On the spot: the callee is idle and its handler is plain. This is _take and _finish,
        # written out for the common end; `_finish_in_caller` is for all others.
        self._inline_left -= 1
        handled = callee.handled = callee.handled + 1
        recent = callee._recent
        if recent is None:
            recent = callee._recent = [None] * RECENT_MESSAGES
        recent[handled & _RECENT_MASK] = kind
        callee._state = RUNNING
        self._inline = callee
        failure: Exception | None = None
        result: Any = None
        try:
            result = handler(callee._actor, message)
        except Exception as error:
            failure = error
        if (
            failure is not None
            or callee._caller is not None
            or callee._ending is not None
            or result is LATER
            or type(result) is Raise
        ):
            kept = self._finish_in_caller(callee, result, failure)
            self._inline = None
            if context._state == DEAD:  # ended by what it called: it does not see the answer
                return (yield SUSPEND)
            if kept._early is None:
                self._wait(context, kept, deadline_ns)
                return (yield SUSPEND)
            result, refusal = kept._early
            if refusal is not None:
                raise refusal
            return result
        self._inline = None
        if callee._mailbox:
            self._enqueue(callee)
        else:
            callee._state = IDLE
            if callee._extras is not NO_EXTRAS:
                self._watch_idle(callee)
        if context._state == DEAD:
            self._late_replies += 1
            return (yield SUSPEND)
        return result

    def _caller_on_the_spot(self, callee: Context) -> Caller:
        """The Caller of a call that is being handled on the spot."""
        context = self._current
        assert context is not None
        return Caller(None if context._state == DEAD else callee, None, context)

    def _finish_in_caller(self, callee: Context, result: Any, failure: Exception | None) -> Caller:
        """The less common ends of a call on the spot. The Caller that comes back has its answer in
        `_early`, or else is to be waited for."""
        caller = callee._caller or self._caller_on_the_spot(callee)
        callee._caller = caller
        if failure is not None:
            self._crash(callee, failure)
        elif self._finish(callee, result):
            self._settle(callee)
        return caller
