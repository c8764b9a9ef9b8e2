"""The scheduler: a core that runs actors, with no clock, socket, thread or event loop of its own.

    ref = scheduler.spawn(Counter())
    scheduler.cast(ref, Add(1))
    scheduler.run()                      # handle what can be handled now
    for effect in scheduler.drain_effects(): ...   # the shell's work; then scheduler.complete(...)
    scheduler.next_deadline()            # when to call run() again if nothing else happens

`runtime.host` does this on trio, `runtime.testing` on a simulated clock. docs/runtime.md tells the
whole story. Not thread-safe. The two ways of a call, in the caller and through the mailbox, are
`_run_in_caller` and `_take`; tests hold them equal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from inspect import iscoroutine
from typing import Any, Final, final

from runtime import inspection
from runtime.actor import (
    DEAD,
    DEFAULT_DEADLINE_NS,
    IDLE,
    LATER,
    MAX_TIMERS,
    QUEUED,
    RECENT_MESSAGES,
    RUNNING,
    SUSPEND,
    SUSPENDED,
    Actor,
    ActorRef,
    Caller,
    Context,
    Down,
    Monitor,
    Raise,
    Timer,
)
from runtime.clock import Clock
from runtime.errors import (
    CallCycle,
    Crashed,
    Dead,
    LimitReached,
    NameTaken,
    NoHandler,
    Overloaded,
    StartFailed,
    TimedOut,
)
from runtime.inspection import ActorStatistics, Report, SchedulerStatistics, UnhandledReport
from runtime.pubsub import PubSub
from runtime.randomness import Randomness
from runtime.registry import Registry
from runtime.timers import TimerHeap

MESSAGES_PER_TURN: Final = 64
"""Messages that an actor handles before the next one has its turn; also the calls that it may run
in its own turn before they take the way through the mailbox."""

DEFAULT_BUDGET: Final = 4_096
DEFAULT_ACTOR_LIMIT: Final = 1_000_000
_RECENT_MASK: Final = RECENT_MESSAGES - 1
_SLEEP: Final = object()


@final
class Effect:
    """A coroutine that an actor waits for and the shell runs.

    `on_abandoned`, if the shell sets it, is called when nobody waits for the result any more."""

    __slots__ = ("_context", "arguments", "function", "on_abandoned")

    def __init__(
        self, context: Context, function: Callable[..., Awaitable[Any]], arguments: tuple[Any, ...]
    ) -> None:
        self._context: Context | None = context
        self.function = function
        self.arguments = arguments
        self.on_abandoned: Callable[[], None] | None = None

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for the result (any more)."""
        return self._context is None


@final
class _StartOf:
    """What a coroutine in `wait_started` waits for."""

    __slots__ = ("child",)

    def __init__(self, child: Context) -> None:
        self.child = child


class Scheduler:
    """Runs actors on one node.

    `report` is called with a CrashReport for every crash and an UnhandledReport for every dropped
    message of an unknown type; it must not raise and must not call back. `crash_details` puts the
    exception's text into reports, which may be message content: for tests and simulations.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        randomness: Randomness,
        node: str = "local",
        report: Callable[[Report], None] | None = None,
        crash_details: bool = False,
        actor_limit: int = DEFAULT_ACTOR_LIMIT,
    ) -> None:
        self.clock = clock
        self.randomness = randomness
        self.node = node
        self.registry = Registry(self)
        self.pubsub = PubSub(self)
        self._report = report
        self._crash_details = crash_details
        self._actor_limit = actor_limit
        self._context_by_number: dict[int, Context] = {}
        self._next_number = 1
        self._queue: deque[Context] = deque()
        self._timers = TimerHeap()
        self._effects: list[Effect] = []
        self._effects_in_flight = 0
        self._waker: Callable[[], None] | None = None
        self._running = False
        self._current: Context | None = None  # whose turn it is
        self._inline_left = 0  # calls that it may still run in this turn
        self._ended = 0
        self._crashed = 0
        self._messages_handled = 0  # of actors that have ended
        self._calls_in_caller = 0
        self._calls_by_mailbox = 0
        self._calls_timed_out = 0
        self._call_cycles = 0
        self._refused = 0
        self._dead_letters = 0
        self._unhandled = 0
        self._late_replies = 0
        self._late_effects = 0

    # --- for everybody -------------------------------------------------------------------------

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
        if hasattr(actor, "context"):
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
        context = Context(self, ref, actor, above, shown, limit, restarts, now)
        ref._context = context
        actor.context = context
        self._context_by_number[ref.number] = context
        if name is not None:
            self.registry.register(name, ref)
        if above is not None:
            if above._children is None:
                above._children = {}
            above._children[context] = None
        if context._unstarted:
            self._enqueue(context)
        return ref

    def cast(self, ref: ActorRef, message: object) -> bool:
        """Send and go on. False, and counted, when there is no such actor or its mailbox is
        full."""
        context = ref._context
        if context is None or context._scheduler is not self:
            context = self.resolve(ref)
        if context is None or context._state == DEAD:
            self._dead_letters += 1
            return False
        mailbox = context._mailbox
        if len(mailbox) >= context._mailbox_limit:
            context.refused += 1
            self._refused += 1
            return False
        mailbox.append(message)
        if context._state == IDLE:
            context._state = QUEUED
            self._queue.append(context)
            if self._waker is not None:
                self._wake()
        return True

    def call_soon(
        self,
        ref: ActorRef,
        message: object,
        answered: Callable[[Any, Exception | None], None],
        *,
        deadline_ns: int = DEFAULT_DEADLINE_NS,
    ) -> Caller:
        """A call from outside: `answered(value, None)` or `answered(None, error)` is called once,
        from within `run`, or at once when the call is refused (Dead, Overloaded). It must not
        raise. Give the result to `forget` to lose interest."""
        context = self.resolve(ref)
        if context is None or context._state == DEAD:
            answered(None, Dead(self._label(ref)))
            return Caller(None, None, None)
        caller = Caller(context, message, None, answered)
        if len(context._mailbox) >= context._mailbox_limit:
            caller._callee = None
            context.refused += 1
            self._refused += 1
            answered(None, Overloaded(context.label, context._mailbox_limit))
            return caller
        self._calls_by_mailbox += 1
        self._timers.arm(caller, self.clock.monotonic_ns() + deadline_ns)
        self._deliver(context, caller)
        if self._waker is not None:  # the deadline may be earlier than what the shell waits for
            self._wake()
        return caller

    def forget(self, caller: Caller) -> None:
        """Nobody waits for this call from outside any more: `answered` will not be called."""
        if caller.waiting:
            self._timers.cancel(caller)
            self._close(caller)

    def stop(self, ref: ActorRef, reason: str = "shutdown") -> bool:
        """End an actor now: its waiting handler is cut, an effect in flight is abandoned, its
        children end before it, its mail is lost. If it is running at this moment (it called into
        what stops it), then as soon as it waits or returns. False if it has ended already."""
        context = self.resolve(ref)
        if context is None or context._state == DEAD:
            return False
        self._stop(context, reason)
        return True

    def watch(self, ref: ActorRef, ended: Callable[[str], None]) -> Monitor:
        """Have `ended(reason)` called when the actor ends, at once if it has. `unwatch` undoes."""
        context = self.resolve(ref)
        if context is None or context._state == DEAD:
            ended("dead")
            return Monitor(None, None)
        monitor = Monitor(None, context, ended)
        self._add_monitor(context, monitor)
        return monitor

    def unwatch(self, monitor: Monitor) -> None:
        """Take off a watch or a monitor."""
        self._demonitor(monitor)

    def reply(self, caller: Caller, value: Any) -> bool:
        """Answer a kept call; see `Actor.reply`."""
        if type(value) is Raise:
            return self._answer(caller, None, value.error)
        return self._answer(caller, value, None)

    def is_alive(self, ref: ActorRef) -> bool:
        """Whether the actor runs on this node and has not ended."""
        context = self.resolve(ref)
        return context is not None and context._state != DEAD

    def resolve(self, ref: ActorRef) -> Context | None:
        """The context of a reference, wherever the reference came from."""
        context = ref._context
        if context is not None and context._scheduler is self:
            return context
        return self._context_by_number.get(ref.number) if ref.node == self.node else None

    # --- for the shell -------------------------------------------------------------------------

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
            self._current = None
        return handled

    @property
    def has_work(self) -> bool:
        """Whether `run` would do something now, timers apart."""
        return bool(self._queue)

    def next_deadline(self) -> int | None:
        """When (monotonic ns) the next timer or deadline is due, or None."""
        return self._timers.next_due_ns()

    def park(self, waker: Callable[[], None]) -> None:
        """The shell goes to sleep: call `waker` once as soon as there is something to do."""
        self._waker = waker

    def unpark(self) -> None:
        """The shell is awake; `waker` is not called any more."""
        self._waker = None

    def drain_effects(self) -> list[Effect]:
        """Effects to begin with, in the order in which they were asked for."""
        effects, self._effects = self._effects, []
        return [effect for effect in effects if not effect.abandoned]

    def complete(self, effect: Effect, value: Any = None, error: Exception | None = None) -> bool:
        """The result of an effect, or what it raised. False, and counted, if nobody waits."""
        context = effect._context
        if context is None:
            self._late_effects += 1
            return False
        effect._context = None
        self._effects_in_flight -= 1
        self._resume(context, value, error)
        return True

    def shutdown(self, reason: str = "shutdown") -> None:
        """End every actor, the youngest root first, and drop their mail."""
        for context in reversed(self.roots()):
            self._stop(context, reason)

    # --- for whoever watches -------------------------------------------------------------------

    def roots(self) -> list[Context]:
        """Contexts of the actors that nobody above would take along, oldest first."""
        return [
            context
            for context in self._context_by_number.values()
            if context._parent is None or context._parent._state == DEAD
        ]

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
            spawned=self._next_number - 1,
            ended=self._ended,
            crashed=self._crashed,
            messages_handled=self._messages_handled + sum(each.handled for each in contexts),
            calls_in_caller=self._calls_in_caller,
            calls_by_mailbox=self._calls_by_mailbox,
            calls_timed_out=self._calls_timed_out,
            call_cycles=self._call_cycles,
            refused=self._refused,
            dead_letters=self._dead_letters,
            unhandled=self._unhandled,
            late_replies=self._late_replies,
            late_effects=self._late_effects,
        )

    def statistics_of(self, ref: ActorRef) -> ActorStatistics | None:
        """One actor, or None if it has ended."""
        context = self.resolve(ref)
        if context is None or context._state == DEAD:
            return None
        return inspection.actor_statistics(context)

    # --- a turn --------------------------------------------------------------------------------

    def _turn(self, context: Context) -> int:
        """Give one actor its turn; returns how many messages (or parts of one) it handled."""
        self._current = context
        self._inline_left = MESSAGES_PER_TURN
        context._state = RUNNING
        count = 0
        if context._coroutine is not None:
            count = 1
            if not self._step(context):
                return 1
        elif context._unstarted:
            count = 1
            if not self._start(context):
                return 1
        actor = context._actor
        mailbox = context._mailbox
        plain = context._plain
        recent = context._recent
        if recent is None:
            recent = context._recent = [None] * RECENT_MESSAGES
        while mailbox:
            if count >= MESSAGES_PER_TURN:
                self._enqueue(context)
                return count
            count += 1
            item = mailbox.popleft()
            kind = type(item)
            handler = plain.get(kind)
            if handler is None:
                if not self._take(context, item):
                    return count
                continue
            context.handled += 1
            recent[context.handled & _RECENT_MASK] = kind
            try:
                handler(actor, item)
            except Exception as error:
                self._crash(context, error)
                return count
            if context._ending is not None:
                self._terminate(context, context._ending)
                return count
        context._state = IDLE
        return count or 1

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
        kind = type(message)
        plain = context._plain.get(kind)
        awaiting = context._awaiting.get(kind) if plain is None else None
        if plain is None and awaiting is None:
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
                self.reply(caller, result)
        if context._ending is None:
            return True
        self._terminate(context, context._ending)
        return False

    def _came_up(self, context: Context) -> bool:
        context._unstarted = False
        for waiter in context._start_waiters or ():
            self._resume(waiter, None, None)
        context._start_waiters = None
        if context._ending is None:
            return True
        self._terminate(context, context._ending)
        return False

    def _note(self, context: Context, kind: type) -> None:
        if context._recent is None:
            context._recent = [None] * RECENT_MESSAGES
        context.handled += 1
        context._recent[context.handled & _RECENT_MASK] = kind

    def _leave_unhandled(self, context: Context, kind: str, caller: Caller | None) -> None:
        self._unhandled += 1
        if caller is not None:
            self._answer(caller, None, NoHandler(context.label, kind))
        elif self._report is not None:
            actor = type(context._actor).__name__
            self._report(
                UnhandledReport(ref=context.ref, label=context.label, actor=actor, message=kind)
            )

    # --- calls ---------------------------------------------------------------------------------

    async def _call(
        self, context: Context, ref: ActorRef, message: object, deadline_ns: int
    ) -> Any:
        if context is not self._current:
            raise RuntimeError("awaited outside its own handler")
        callee = self.resolve(ref)
        if callee is None or callee._state == DEAD:
            raise Dead(self._label(ref))
        if callee._state == IDLE and self._inline_left > 0:
            handler = callee._plain.get(type(message))
            if handler is not None:
                result = self._run_in_caller(context, callee, handler, message)
                if type(result) is not Caller:
                    return result
                self._wait(context, result, deadline_ns)
                return await SUSPEND
        self._refuse_cycle(context, callee)
        if len(callee._mailbox) >= callee._mailbox_limit:
            callee.refused += 1
            self._refused += 1
            raise Overloaded(callee.label, callee._mailbox_limit)
        self._calls_by_mailbox += 1
        caller = Caller(callee, message, context)
        self._deliver(callee, caller)
        self._wait(context, caller, deadline_ns)
        return await SUSPEND

    def _run_in_caller(
        self,
        context: Context,
        callee: Context,
        handler: Callable[[Any, Any], Any],
        message: object,
    ) -> Any:
        """Handle a call to an idle actor on the spot. Returns the reply, or the Caller to wait
        for when the handler returned LATER; raises what the caller is to see."""
        self._inline_left -= 1
        self._calls_in_caller += 1
        self._note(callee, type(message))
        callee._state = RUNNING
        callee._inline_from = context
        failure: Exception | None = None
        try:
            result = handler(callee._actor, message)
        except Exception as error:
            failure = error
        callee._inline_from = None
        if failure is not None:
            label = callee.label
            reason = self._crash(callee, failure)
            raise Crashed(label, reason)
        plain_end = callee._caller is None and callee._ending is None
        if plain_end and result is not LATER and type(result) is not Raise:
            self._settle(callee)
            return result
        caller = callee._caller or Caller(callee, None, context)
        callee._caller = caller
        if self._finish(callee, result):
            self._settle(callee)
        if caller._early is None:
            return caller
        value, refusal = caller._early
        if refusal is not None:
            raise refusal
        return value

    def _settle(self, context: Context) -> None:
        """Put an actor that has just handled something to where it belongs."""
        if context._mailbox:
            self._enqueue(context)
        else:
            context._state = IDLE

    def _keep(self, context: Context, caller: Caller) -> None:
        if not caller.waiting:
            return
        if context._later is None:
            context._later = {}
        context._later[caller] = None

    def _answer(self, caller: Caller, value: Any, error: Exception | None) -> bool:
        if not caller.waiting:
            self._late_replies += 1
            return False
        self._close(caller)
        caller._replied = True
        if caller._answered is not None:
            self._timers.cancel(caller)
            caller._answered(value, error)
            return True
        context = caller._context
        assert context is not None
        if context._wait is caller:
            self._resume(context, value, error)
        else:
            caller._early = (value, error)  # its turn still goes on, in _run_in_caller
        return True

    def _close(self, caller: Caller) -> None:
        """Whoever called does not wait any more."""
        callee = caller._callee
        caller._callee = None
        if callee is not None and callee._later is not None:
            callee._later.pop(caller, None)

    def _refuse_cycle(self, context: Context, callee: Context) -> None:
        """Raise CallCycle if `callee` waits, over however many actors, for `context`."""
        chain = [context]
        other: Context | None = callee
        while other is not None:
            chain.append(other)
            if other is context:
                self._call_cycles += 1
                raise CallCycle([each.label for each in chain])
            wait = other._wait
            if type(wait) is Caller:
                other = wait._callee
            elif type(wait) is _StartOf:
                other = wait.child
            else:
                other = None

    # --- waiting -------------------------------------------------------------------------------

    def _wait(self, context: Context, wait: object, deadline_ns: int | None) -> None:
        context._wait = wait
        if deadline_ns is not None:
            self._timers.arm(context, self.clock.monotonic_ns() + max(0, deadline_ns))

    def _resume(self, context: Context, value: Any, error: Exception | None) -> None:
        context._wait = None
        context.due_ns = None  # its place in the heap is kept for the next deadline
        context._value = value
        context._error = error
        self._enqueue(context)

    async def _sleep(self, context: Context, duration_ns: int) -> None:
        if context is not self._current:
            raise RuntimeError("awaited outside its own handler")
        self._wait(context, _SLEEP, duration_ns)
        await SUSPEND

    async def _perform(
        self,
        context: Context,
        function: Callable[..., Awaitable[Any]],
        arguments: tuple[Any, ...],
        deadline_ns: int | None,
    ) -> Any:
        if context is not self._current:
            raise RuntimeError("awaited outside its own handler")
        effect = Effect(context, function, arguments)
        self._effects.append(effect)
        self._effects_in_flight += 1
        self._wait(context, effect, deadline_ns)
        return await SUSPEND

    async def _wait_started(self, context: Context, ref: ActorRef) -> None:
        if context is not self._current:
            raise RuntimeError("awaited outside its own handler")
        child = self.resolve(ref)
        if child is None or child._state == DEAD:
            raise StartFailed(self._label(ref), "dead")
        if not child._unstarted:
            return
        self._refuse_cycle(context, child)
        if child._start_waiters is None:
            child._start_waiters = []
        child._start_waiters.append(context)
        self._wait(context, _StartOf(child), None)
        await SUSPEND

    def _drop_wait(self, context: Context) -> None:
        """Whatever the actor waits for, it does so no more."""
        wait = context._wait
        context._wait = None
        context.due_ns = None
        if type(wait) is Caller:
            self._close(wait)
        elif type(wait) is Effect:
            wait._context = None
            self._effects_in_flight -= 1
            if wait.on_abandoned is not None:
                wait.on_abandoned()
        elif type(wait) is _StartOf and wait.child._start_waiters is not None:
            wait.child._start_waiters.remove(context)

    # --- timers --------------------------------------------------------------------------------

    def _fire_timers(self) -> None:
        timers = self._timers
        if not len(timers):
            return
        now = self.clock.monotonic_ns()
        while (entry := timers.pop_due(now)) is not None:
            if type(entry) is Timer:
                self._fire(entry)
            elif type(entry) is Context:
                self._expire(entry)
            else:
                self._expire_outside(entry)

    def _fire(self, timer: Timer) -> None:
        context = timer._context
        assert context is not None
        assert context._timers is not None
        del context._timers[timer]
        if timer._recipient is None:
            self._deliver(context, timer)
            return
        timer._context = None
        self.cast(timer._recipient, timer._message)

    def _expire(self, context: Context) -> None:
        """The time of what a suspended actor waits for is up."""
        wait = context._wait
        error: Exception | None = None
        if type(wait) is Caller:
            self._calls_timed_out += 1
            error = TimedOut(self._label_of(wait._callee))
        elif wait is not _SLEEP:
            error = TimedOut("an effect")
        self._drop_wait(context)
        self._resume(context, None, error)

    def _expire_outside(self, caller: Caller) -> None:
        self._calls_timed_out += 1
        error = TimedOut(self._label_of(caller._callee))
        self._close(caller)
        assert caller._answered is not None
        caller._answered(None, error)

    def _send_after(
        self, context: Context, delay_ns: int, message: object, recipient: ActorRef | None
    ) -> Timer:
        if context._state == DEAD:
            raise Dead(context.label)
        if context._timers is None:
            context._timers = {}
        if len(context._timers) >= MAX_TIMERS:
            raise LimitReached(f"an actor may have at most {MAX_TIMERS} timers")
        own = recipient is None or recipient == context.ref
        timer = Timer(context, None if own else recipient, message)
        context._timers[timer] = None
        self._timers.arm(timer, self.clock.monotonic_ns() + max(0, delay_ns))
        return timer

    def _cancel(self, timer: Timer) -> bool:
        context = timer._context
        if context is None:
            return False
        timer._context = None
        if context._timers is not None and context._timers.pop(timer, self) is None:
            self._timers.cancel(timer)
        return True

    # --- ends ----------------------------------------------------------------------------------

    def _stop(self, context: Context, reason: str) -> None:
        if context._state != RUNNING or not self._running:
            self._terminate(context, reason)
            return
        context._ending = context._ending or reason
        context._killed = True

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
        """The end of an actor: what it waits for, its children, itself, its names, and only then
        whoever waits for it or watches it."""
        context._state = DEAD
        self._drop_wait(context)
        coroutine, context._coroutine = context._coroutine, None
        if coroutine is not None:
            try:
                coroutine.close()
            except Exception as error:
                self._record_crash(context, f"clean-up failed: {type(error).__name__}", error)
        for child in reversed(list(context._children or ())):
            if child._state != DEAD:
                self._stop(child, "shutdown")
        try:
            context._actor.terminated(reason)
        except Exception as error:
            self._record_crash(context, f"terminated failed: {type(error).__name__}", error)
        self._ended += 1
        self._messages_handled += context.handled
        del self._context_by_number[context.ref.number]
        if context._parent is not None and context._parent._children is not None:
            context._parent._children.pop(context, None)
        self.registry._forget(context)
        self.pubsub._forget(context)
        self._timers.cancel(context)
        for timer in context._timers or ():
            timer._context = None
            self._timers.cancel(timer)
        self._fail_callers(context, reason, crashed)
        self._tell_watchers(context, reason)
        self._release(context)

    def _fail_callers(self, context: Context, reason: str, crashed: bool) -> None:
        label = context.label
        taken_up = list(context._later or ())
        if context._caller is not None:
            taken_up.append(context._caller)
        for caller in taken_up:
            if caller.waiting:
                error = Crashed(label, reason) if crashed else Dead(label, reason)
                self._answer(caller, None, error)
        for item in context._mailbox:
            if type(item) is Caller and item.waiting:
                self._answer(item, None, Dead(label, reason))
            elif type(item) is not Timer and type(item) is not Monitor:
                self._dead_letters += 1
        for waiter in context._start_waiters or ():
            self._resume(waiter, None, StartFailed(label, reason))

    def _tell_watchers(self, context: Context, reason: str) -> None:
        for monitor in list(context._watching or ()):
            self._demonitor(monitor)
        for monitor in list(context._monitors or ()):
            monitor._watched = None
            watcher = monitor._watcher
            if watcher is not None:
                if watcher._watching is not None:
                    watcher._watching.pop(monitor, None)
                monitor._down = Down(context.ref, reason)
                self._deliver(watcher, monitor)
            elif monitor._ended is not None:
                monitor._ended(reason)

    def _release(self, context: Context) -> None:
        """Let go of everything, since references may keep the context for long."""
        context._label = context.label
        context._actor = None
        context._parent = context._caller = context._inline_from = None
        context._children = context._monitors = context._watching = None
        context._timers = context._later = context._start_waiters = context._recent = None
        context._value = context._error = None
        context._mailbox.clear()

    # --- monitors ------------------------------------------------------------------------------

    def _monitor(self, context: Context, ref: ActorRef) -> Monitor:
        if context._state == DEAD:
            raise Dead(context.label)
        watched = self.resolve(ref)
        if watched is None or watched._state == DEAD:
            monitor = Monitor(context, None)
            monitor._down = Down(ref, "dead")
            self._deliver(context, monitor)
            return monitor
        monitor = Monitor(context, watched)
        self._add_monitor(watched, monitor)
        if context._watching is None:
            context._watching = {}
        context._watching[monitor] = None
        return monitor

    def _add_monitor(self, watched: Context, monitor: Monitor) -> None:
        if watched._monitors is None:
            watched._monitors = {}
        watched._monitors[monitor] = None

    def _demonitor(self, monitor: Monitor) -> None:
        watched, watcher = monitor._watched, monitor._watcher
        if watched is not None and watched._monitors is not None:
            watched._monitors.pop(monitor, None)
        if watcher is not None and watcher._watching is not None:
            watcher._watching.pop(monitor, None)
        monitor._watched = monitor._watcher = monitor._ended = monitor._down = None

    # --- small things --------------------------------------------------------------------------

    def _enqueue(self, context: Context) -> None:
        context._state = QUEUED
        self._queue.append(context)
        if self._waker is not None:
            self._wake()

    def _deliver(self, context: Context, item: object) -> None:
        """Put a call or a system message into a mailbox, whatever its limit."""
        context._mailbox.append(item)
        if context._state == IDLE:
            self._enqueue(context)

    def _wake(self) -> None:
        waker, self._waker = self._waker, None
        if waker is not None:
            waker()

    def _label(self, ref: ActorRef) -> str:
        context = self.resolve(ref)
        return repr(ref) if context is None else context.label

    def _label_of(self, context: Context | None) -> str:
        return "somebody" if context is None else context.label
