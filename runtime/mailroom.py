"""Under the scheduler, first floor: mailboxes, the run queue, timers, effects, and what each actor
waits for. Nothing here runs an actor; `runtime.lifetimes` ends them, `runtime.scheduler` runs them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Final, Protocol, final

from runtime.actor import MAX_TIMERS
from runtime.clock import Clock
from runtime.context import (
    DEAD,
    IDLE,
    QUEUED,
    SUSPEND,
    SYSTEM_MAIL,
    Abroad,
    Caller,
    Coalesced,
    Context,
    IdleTimeout,
    IdleWatch,
    Monitor,
    Raise,
    SystemMail,
    Timer,
)
from runtime.errors import (
    CallCycle,
    CallError,
    Dead,
    LimitReached,
    Overloaded,
    StartFailed,
    TimedOut,
    Unreachable,
)
from runtime.overload import Overload
from runtime.pubsub import PubSub
from runtime.randomness import Randomness
from runtime.refs import ActorRef, AnyRef, NamedRef
from runtime.registry import Registry
from runtime.timers import TimerHeap

_SLEEP: Final = object()
MAX_SPARE_MAILBOXES: Final = 1_024
"""Empty mailboxes kept to be lent again."""


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


class Elsewhere(Protocol):
    """The way to the actors of other nodes; see `runtime.cluster.remote`. None of these may block;
    what they raise is said, and then nothing was sent."""

    def cast(self, ref: AnyRef, message: object) -> bool: ...

    def call(
        self,
        ref: AnyRef,
        message: object,
        caller: Caller,
        sender: ActorRef | None,
        deadline_ns: int,
    ) -> None:
        """Answer `caller` later. Raises Unreachable, Overloaded."""

    def watch(self, ref: AnyRef, ended: Callable[[str], None]) -> Callable[[], None]:
        """Call `ended` once, perhaps at once; the result takes the watch off."""

    def exit(self, ref: AnyRef, reason: str, sender: ActorRef | None) -> bool: ...

    def link(self, ref: ActorRef, peer: ActorRef) -> bool: ...

    def unlink(self, ref: ActorRef, peer: ActorRef) -> None: ...

    def broken(self, ref: ActorRef, peer: ActorRef, reason: str) -> None:
        """Our actor `ref` has ended: an exit signal for `peer`, which was linked to it."""

    def broadcast(self, topic: Hashable, message: object) -> None: ...


class Mailroom:
    """The part of a scheduler that keeps mail and time."""

    elsewhere: Elsewhere | None = None
    """Set by whoever joins this scheduler to others; without it there is only this node."""

    def __init__(self, *, clock: Clock, randomness: Randomness, node: str) -> None:
        self.clock = clock
        self.randomness = randomness
        self.node = node
        self.registry = Registry(self)
        self.pubsub = PubSub(self)
        self._context_by_number: dict[int, Context] = {}
        self._queue: deque[Context] = deque()
        self._spare: list[deque[Any]] = []  # empty mailboxes
        self._timers = TimerHeap()
        self._effects: list[Effect] = []
        self._effects_in_flight = 0
        self._waker: Callable[[], None] | None = None
        self._current: Context | None = None  # whose turn it is
        self._inline: Context | None = None  # whose handler it runs on the spot, in a call
        self._calls_timed_out = 0
        self._call_cycles = 0
        self._refused = 0
        self._dropped = 0
        self._coalesced = 0
        self._dead_letters = 0
        self._late_replies = 0
        self._late_effects = 0

    # --- mail ------------------------------------------------------------------------------------

    def resolve(self, ref: AnyRef) -> Context | None:
        """The context of a reference, wherever the reference came from."""
        context = ref._context
        if context is not None and context._scheduler is self:
            return context
        if type(ref) is NamedRef:
            found = self.registry.whereis(ref.name) if ref.node in (None, self.node) else None
            return None if found is None else found._context
        assert isinstance(ref, ActorRef)
        return self._context_by_number.get(ref.number) if ref.node == self.node else None

    def local(self, number: int) -> ActorRef | None:
        """The living actor of this node that has this number."""
        context = self._context_by_number.get(number)
        return None if context is None or context._state == DEAD else context.ref

    def _elsewhere(self, ref: AnyRef) -> Elsewhere | None:
        """The way to the node of `ref`, if that is another one."""
        return None if ref.node is None or ref.node == self.node else self.elsewhere

    def _why_not(self, ref: AnyRef) -> CallError:
        """What a call to an address raises behind which there is no living actor."""
        if ref.node not in (None, self.node):
            return Unreachable(repr(ref), str(ref.node))
        return Dead(self._label(ref))

    def cast(self, ref: AnyRef, message: object) -> bool:
        """Send and go on. False, and counted, when there is no such actor or its mailbox is
        full."""
        context = ref._context
        if context is None or context._scheduler is not self:
            context = self.resolve(ref)
        if context is None or context._state == DEAD:
            elsewhere = self._elsewhere(ref)
            if elsewhere is not None and elsewhere.cast(ref, message):
                return True
            self._dead_letters += 1
            return False
        mailbox = context._mailbox
        if mailbox is None:
            spare = self._spare
            mailbox = context._mailbox = spare.pop() if spare else deque()
        elif len(mailbox) >= context._room:
            return self._overflow(context, message)
        mailbox.append(message)
        if context._state == IDLE:
            context._state = QUEUED
            self._queue.append(context)
            if self._waker is not None:
                self._wake()
        return True

    def broadcast(self, topic: Hashable, message: object) -> int:
        """Publish on every node; see `Actor.broadcast`."""
        if self.elsewhere is not None:
            self.elsewhere.broadcast(topic, message)
        return self.pubsub.publish(topic, message)

    def deliver(self, number: int, message: object) -> bool:
        """A cast to the actor of this node with this number; see `cast`."""
        context = self._context_by_number.get(number)
        if context is None:
            self._dead_letters += 1
            return False
        return self.cast(context.ref, message)

    def reply(self, caller: Caller, value: Any) -> bool:
        """Answer a kept call; see `Actor.reply`."""
        if type(value) is Raise:
            return self._answer(caller, None, value.error)
        return self._answer(caller, value, None)

    def _deliver(self, context: Context, item: object) -> bool:
        """Put something into a mailbox, whatever its limit. True."""
        mailbox = context._mailbox
        if mailbox is None:
            spare = self._spare
            mailbox = context._mailbox = spare.pop() if spare else deque()
        mailbox.append(item)
        if context._state == IDLE:
            context._state = QUEUED  # this and the rest are `_enqueue`
            self._queue.append(context)
            if self._waker is not None:
                self._wake()
        return True

    # --- overload --------------------------------------------------------------------------------

    def _has_room(self, context: Context) -> bool:
        """Whether one more message may be delivered; if not, that is counted. May drop another."""
        mailbox = context._mailbox
        if mailbox is None or len(mailbox) < context._room:
            return True
        if context._room == 0 and len(mailbox) < context.mailbox_limit:
            return True
        if context._actor.overload is Overload.DROP_OLDEST and self._drop_oldest(context, mailbox):
            return True
        context._own().refused += 1
        self._refused += 1
        return False

    def _overflow(self, context: Context, message: object) -> bool:
        """A cast comes and there may be no room. Says whether it was taken."""
        kind = type(message)
        if kind not in context._actor.coalesces:
            return self._has_room(context) and self._deliver(context, message)
        attribute = context._actor.coalesces[kind]
        key = (kind, None if attribute is None else getattr(message, attribute))
        extras = context._own()
        if extras.coalescing is None:
            extras.coalescing = {}
        waiting = extras.coalescing.get(key)
        if waiting is not None:
            waiting.message = message
            extras.coalesced += 1
            self._coalesced += 1
            return True
        if not self._has_room(context):
            return False
        extras.coalescing[key] = item = Coalesced(key, message)
        return self._deliver(context, item)

    def _drop_oldest(self, context: Context, mailbox: deque[Any]) -> bool:
        for index, item in enumerate(mailbox):
            if type(item) in SYSTEM_MAIL:
                continue
            del mailbox[index]
            context._own().dropped += 1
            self._dropped += 1
            if type(item) is Caller and item.waiting:
                self._answer(item, None, Overloaded(context.label, context.mailbox_limit))
            return True
        return False

    def _enqueue(self, context: Context) -> None:
        context._state = QUEUED
        self._queue.append(context)
        if self._waker is not None:
            self._wake()

    def _wake(self) -> None:
        waker, self._waker = self._waker, None
        if waker is not None:
            waker()

    # --- answers ---------------------------------------------------------------------------------

    def _answer(self, caller: Caller, value: Any, error: Exception | None) -> bool:
        callee = caller._callee
        if callee is None:
            self._late_replies += 1
            return False
        caller._callee = None  # this and the next line are `_close`
        if callee._extras.later is not None:
            callee._extras.later.pop(caller, None)
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
            caller._early = (value, error)  # its turn still goes on, in _finish_in_caller
        return True

    def _close(self, caller: Caller) -> None:
        """Whoever called does not wait any more."""
        callee = caller._callee
        caller._callee = None
        if callee is not None and callee._extras.later is not None:
            callee._extras.later.pop(caller, None)

    def _keep(self, context: Context, caller: Caller) -> None:
        if not caller.waiting:
            return
        extras = context._own()
        if extras.later is None:
            extras.later = {}
        extras.later[caller] = None

    def _refuse_cycle(self, context: Context, callee: Context) -> None:
        """Raise CallCycle if `callee` waits, over however many actors, for `context`."""
        chain: list[Context | Abroad] = [context]
        other: Context | Abroad | None = callee
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

    # --- waiting ---------------------------------------------------------------------------------

    def _wait(self, context: Context, wait: object, deadline_ns: int | None) -> None:
        context._wait = wait
        if deadline_ns is None:
            return
        due_ns = self.clock.monotonic_ns() + (deadline_ns if deadline_ns > 0 else 0)
        armed_ns = context.armed_ns
        if armed_ns is not None and armed_ns <= due_ns:
            context.due_ns = due_ns  # the common case of TimerHeap.arm, without the call
        else:
            self._timers.arm(context, due_ns)

    def _resume(self, context: Context, value: Any, error: Exception | None) -> None:
        context._wait = None
        context.due_ns = None  # its place in the heap is kept for the next deadline
        context._value = value
        context._error = error
        context._state = QUEUED  # this and the rest are `_enqueue`
        self._queue.append(context)
        if self._waker is not None:
            self._wake()

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
        elif type(wait) is _StartOf and wait.child._extras.start_waiters is not None:
            wait.child._extras.start_waiters.remove(context)
        elif type(wait) is Monitor:
            self._demonitor(wait)

    def _demonitor(self, monitor: Monitor) -> None:
        watched, watcher = monitor._watched, monitor._watcher
        if watched is not None and watched._extras.monitors is not None:
            watched._extras.monitors.pop(monitor, None)
        if watcher is not None and watcher._extras.watching is not None:
            watcher._extras.watching.pop(monitor, None)
        away, monitor._away = monitor._away, None
        monitor._watched = monitor._watcher = monitor._ended = monitor._down = None
        if away is not None:
            away()

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
        extras = child._own()
        if extras.start_waiters is None:
            extras.start_waiters = []
        extras.start_waiters.append(context)
        self._wait(context, _StartOf(child), None)
        await SUSPEND

    # --- effects, for the shell ------------------------------------------------------------------

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

    # --- timers ----------------------------------------------------------------------------------

    def next_deadline(self) -> int | None:
        """When (monotonic ns) the next timer or deadline is due, or None."""
        return self._timers.next_due_ns()

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
            elif type(entry) is IdleWatch:
                if entry.context._state == IDLE:
                    self._deliver(entry.context, SystemMail(IdleTimeout()))
            else:
                self._expire_outside(entry)

    def _fire(self, timer: Timer) -> None:
        context = timer._context
        assert context is not None
        assert context._extras.timers is not None
        del context._extras.timers[timer]
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
        elif type(wait) is Monitor:
            error = TimedOut(self._label_of(wait._watched))
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

    def _set_idle_timeout(self, context: Context, duration_ns: int | None) -> None:
        extras = context._own()
        if extras.idle is not None:
            self._timers.cancel(extras.idle)
        extras.idle = None if duration_ns is None else IdleWatch(context, duration_ns)
        if context._state == IDLE:
            self._watch_idle(context)

    def _watch_idle(self, context: Context) -> None:
        """The actor becomes idle, now."""
        watch = context._extras.idle
        if watch is not None:
            self._timers.arm(watch, self.clock.monotonic_ns() + watch.timeout_ns)

    def _send_after(
        self, context: Context, delay_ns: int, message: object, recipient: ActorRef | None
    ) -> Timer:
        if context._state == DEAD:
            raise Dead(context.label)
        extras = context._own()
        if extras.timers is None:
            extras.timers = {}
        if len(extras.timers) >= MAX_TIMERS:
            raise LimitReached(f"an actor may have at most {MAX_TIMERS} timers")
        own = recipient is None or recipient == context.ref
        timer = Timer(context, None if own else recipient, message)
        extras.timers[timer] = None
        self._timers.arm(timer, self.clock.monotonic_ns() + max(0, delay_ns))
        return timer

    def _cancel(self, timer: Timer) -> bool:
        context = timer._context
        if context is None:
            return False
        timer._context = None
        timers = context._extras.timers
        if timers is not None and timers.pop(timer, self) is None:
            self._timers.cancel(timer)
        return True

    def _label(self, ref: AnyRef) -> str:
        context = self.resolve(ref)
        return repr(ref) if context is None else context.label

    def _label_of(self, context: Context | Abroad | None) -> str:
        return "somebody" if context is None else context.label
