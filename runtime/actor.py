"""What an actor is: handlers, the primitives that they may use, and the context they run in.

    class Counter(Actor):
        def __init__(self) -> None:
            self.total = 0

        @handles(Add)
        def add(self, message: Add) -> int:
            self.total += message.amount
            return self.total

A handler is a plain function or a coroutine function; its return value is the reply when the
message came by a call. A plain handler may cast, spawn, stop, monitor and set timers, but not wait.
A coroutine handler may also await `call`, `sleep`, `perform` and `wait_started`, and nothing else:
these are stepped by the scheduler, so an actor runs unchanged on trio and on a simulated clock.
While it waits, its actor takes up no other message (as a gen_server does not).

How it works inside is told in docs/runtime.md.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping
from inspect import iscoroutinefunction
from typing import Any, ClassVar, Final, TypeVar

from runtime.context import (
    LATER,
    Caller,
    Context,
    Down,
    Exit,
    IdleTimeout,
    Monitor,
    Raise,
    Timer,
)
from runtime.errors import (
    ActorError,
    CallCycle,
    CallError,
    Crashed,
    Dead,
    LimitReached,
    NameTaken,
    NodeLost,
    NoHandler,
    Overloaded,
    Refused,
    StartFailed,
    TimedOut,
    Unreachable,
)
from runtime.overload import Overload
from runtime.refs import ActorRef, AnyRef, NamedRef

__all__ = [
    "DEFAULT_DEADLINE_NS",
    "DEFAULT_MAILBOX_LIMIT",
    "LATER",
    "MAX_TIMERS",
    "Actor",
    "ActorError",
    "ActorRef",
    "CallCycle",
    "CallError",
    "Caller",
    "Context",
    "Crashed",
    "Dead",
    "Down",
    "Exit",
    "IdleTimeout",
    "LimitReached",
    "Monitor",
    "NameTaken",
    "NamedRef",
    "NoHandler",
    "NodeLost",
    "Overload",
    "Overloaded",
    "Raise",
    "Refused",
    "StartFailed",
    "TimedOut",
    "Timer",
    "Unreachable",
    "handles",
    "is_abnormal",
]

DEFAULT_DEADLINE_NS: Final = 5 * 10**9
DEFAULT_MAILBOX_LIMIT: Final = 1_000
MAX_TIMERS: Final = 100_000
"""Timers that one actor may have pending."""

NORMAL_REASONS: Final = frozenset({"normal", "shutdown"})

F = TypeVar("F", bound=Callable[..., Any])


def is_abnormal(reason: str) -> bool:
    """Whether a transient child that ended so is to be restarted."""
    return reason not in NORMAL_REASONS


def handles(*message_types: type) -> Callable[[F], F]:
    """Mark a method as the handler of messages of exactly these types (not of subclasses)."""

    def mark(function: F) -> F:
        function.__handles__ = message_types  # type: ignore[attr-defined]  # read back by Actor
        return function

    return mark


class Actor:
    """Base of all actors: state with one owner. An instance is spawned once.

    Class variables:
    `mailbox_limit`: messages that may wait, system messages apart;
    `overload`: what a full mailbox does, and with Overload.COALESCE
    `coalesces`: of which types only the newest waits, by the value of which attribute (hashable;
    None: all are of one key);
    `idle_timeout_ns`: whenever the actor has been idle for so long it gets `IdleTimeout` (and ends
    "normal" if it has no handler for that);
    `traps_exits`: whether exit signals come as `Exit` messages. One that traps and has no handler
    for `Exit` ends with the signal's reason if it is its parent's or comes from outside (as a
    gen_server does), and drops it otherwise.
    """

    mailbox_limit: ClassVar[int] = DEFAULT_MAILBOX_LIMIT
    overload: ClassVar[Overload] = Overload.REFUSE
    coalesces: ClassVar[Mapping[type, str | None]] = {}
    traps_exits: ClassVar[bool] = False
    idle_timeout_ns: ClassVar[int | None] = None
    _has_start: ClassVar[bool] = False
    _was_spawned: bool = False
    _plain_handlers: ClassVar[dict[type, Callable[[Any, Any], Any]]] = {}
    _awaiting_handlers: ClassVar[dict[type, Callable[[Any, Any], Coroutine[Any, Any, Any]]]] = {}

    context: Context
    """Set by the scheduler before `started`."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        types_by_method: dict[str, tuple[type, ...]] = {}
        for base in reversed(cls.__mro__):
            for name, member in vars(base).items():
                if isinstance(types := getattr(member, "__handles__", None), tuple):
                    types_by_method[name] = types
        if (cls.overload is Overload.COALESCE) != bool(cls.coalesces):
            raise TypeError(f"{cls.__name__}: `coalesces` goes with Overload.COALESCE")
        cls._has_start = cls.started is not Actor.started
        cls._plain_handlers = {}
        cls._awaiting_handlers = {}
        for name, types in types_by_method.items():
            function = getattr(cls, name)
            table = cls._awaiting_handlers if iscoroutinefunction(function) else cls._plain_handlers
            for message_type in types:
                cls._plain_handlers.pop(message_type, None)
                cls._awaiting_handlers.pop(message_type, None)
                table[message_type] = function

    # --- what an actor may define ---

    def started(self) -> Coroutine[Any, Any, None] | None:
        """Run before the first message; may be a coroutine function. A failure is a start failure:
        the actor ends, and whoever waits for its start gets StartFailed."""
        return None

    def terminated(self, reason: str) -> None:
        """Run when the actor has ended, however it did (also when it never came up): "normal",
        "shutdown", "crashed: ValueError", ... Its children have ended before. It may cast."""

    # --- messages ---

    def cast(self, ref: AnyRef, message: object) -> bool:
        """Send and go on. False when it was refused: no such actor, or its mailbox is full."""
        to = ref._context
        if to is not None and to._scheduler is self.context._scheduler:
            mailbox = to._mailbox  # the common case of Scheduler.cast, without the call: an actor
            if mailbox is not None and len(mailbox) < to._room:  # that has mail is queued already,
                mailbox.append(message)  # and one that has ended has no room
                return True
        return self.context._scheduler.cast(ref, message)

    def call(
        self, ref: AnyRef, message: object, deadline_ns: int = DEFAULT_DEADLINE_NS
    ) -> Awaitable[Any]:
        """Send and await the reply, at most `deadline_ns` from now. Only in a coroutine handler
        (RuntimeError elsewhere).

        Raises Dead, Unreachable, Crashed, Overloaded, TimedOut, NoHandler, CallCycle, or what the
        callee returned as `Raise`."""
        context = self.context
        if context._coroutine is None:
            self._require_coroutine("call")
        return context._scheduler._call(context, ref, message, deadline_ns)

    def reply(self, caller: Caller, value: Any) -> bool:
        """Answer a call whose handler returned LATER (or do it early: the handler's own return
        value is then ignored). False, and counted, when nobody waits for it any more."""
        return self.context._scheduler.reply(caller, value)

    def send_after(self, delay_ns: int, message: object, *, to: ActorRef | None = None) -> Timer:
        """Have `message` come to this actor (or be cast to `to`) in `delay_ns`. To itself it is
        never refused. It is lost when this actor ends. Raises LimitReached (MAX_TIMERS)."""
        return self.context._scheduler._send_after(self.context, delay_ns, message, to)

    def cancel(self, timer: Timer) -> bool:
        """Call a timer off; its message does not come, even if it lies in the mailbox already.
        False when it had been handled."""
        return self.context._scheduler._cancel(timer)

    def set_idle_timeout(self, duration_ns: int | None) -> None:
        """From the end of this turn on, another `idle_timeout_ns` for this actor (None: none)."""
        self.context._scheduler._set_idle_timeout(self.context, duration_ns)

    # --- waiting (coroutine handlers only) ---

    def sleep(self, duration_ns: int) -> Awaitable[None]:
        """Go on in `duration_ns` (0: after everybody who can run has had a turn)."""
        self._require_coroutine("sleep")
        return self.context._scheduler._sleep(self.context, duration_ns)

    def perform(
        self,
        function: Callable[..., Awaitable[Any]],
        *arguments: Any,
        deadline_ns: int | None = None,
    ) -> Awaitable[Any]:
        """An effect: the shell runs `await function(*arguments)` outside the scheduler; its result
        or exception comes back here. If this actor is stopped meanwhile, or the deadline passes
        (TimedOut), the effect is cancelled and its result dropped."""
        self._require_coroutine("perform")
        return self.context._scheduler._perform(self.context, function, arguments, deadline_ns)

    def wait_started(self, ref: ActorRef) -> Awaitable[None]:
        """Wait until `ref` has come up. Raises StartFailed, or CallCycle when it waits for us."""
        self._require_coroutine("wait_started")
        return self.context._scheduler._wait_started(self.context, ref)

    def wait_ended(self, ref: ActorRef, *, deadline_ns: int | None = None) -> Awaitable[str]:
        """Wait until `ref` has ended; gives the reason ("dead": it had before). Raises TimedOut."""
        self._require_coroutine("wait_ended")
        return self.context._scheduler._wait_ended(self.context, ref, deadline_ns)

    # --- other actors ---

    def spawn(
        self,
        actor: Actor,
        *,
        name: Hashable | None = None,
        label: str | None = None,
        mailbox_limit: int | None = None,
        restarts: int = 0,
        link: bool = False,
    ) -> ActorRef:
        """Start a child: it is stopped when this actor ends. It starts in a turn of its own.

        `name` is registered until it ends (NameTaken); `label` is for people; `link` links this
        actor to it from the first (an end of the child is then felt here). Raises LimitReached."""
        ref = self.context._scheduler.spawn(
            actor,
            parent=self.context.ref,
            name=name,
            label=label,
            mailbox_limit=mailbox_limit,
            restarts=restarts,
        )
        if link:
            self.link(ref)
        return ref

    def stop(self, reason: str = "normal") -> None:
        """End this actor when the present handler ends (its reply is still sent)."""
        self.context._ending = self.context._ending or reason

    def stop_actor(self, ref: ActorRef, reason: str = "shutdown") -> bool:
        """End another actor (see `Scheduler.stop`)."""
        return self.context._scheduler.stop(ref, reason)

    def link(self, ref: ActorRef) -> None:
        """Link this actor and `ref`: the end of one is an exit signal to the other (see
        `runtime.links`). Again is harmless. If `ref` has ended, its signal ("dead") comes now."""
        self.context._scheduler._link(self.context, ref)

    def unlink(self, ref: ActorRef) -> None:
        """Take the link off; harmless if there is none. An `Exit` of it that lies in the mailbox
        already stays there."""
        self.context._scheduler._unlink(self.context, ref)

    def exit(self, ref: ActorRef, reason: str) -> bool:
        """Send an exit signal: it ends `ref`, unless it traps exits or `reason` is "normal". "kill"
        ends it in any case. False if nobody is there."""
        return self.context._scheduler.exit(ref, reason, sender=self.context.ref)

    def monitor(self, ref: ActorRef) -> Monitor:
        """Have `Down` delivered when `ref` ends, at once if it has. Never refused."""
        return self.context._scheduler._monitor(self.context, ref)

    def demonitor(self, monitor: Monitor) -> None:
        """Take the monitor off; its Down does not come, even if it lies in the mailbox already."""
        self.context._scheduler._demonitor(monitor)

    # --- topics ---

    def subscribe(self, topic: Hashable) -> None:
        """Have what is published on `topic` cast to this actor until it ends."""
        self.context.pubsub.subscribe(topic, self.context.ref)

    def unsubscribe(self, topic: Hashable) -> None:
        """Undo `subscribe`."""
        self.context.pubsub.unsubscribe(topic, self.context.ref)

    def publish(self, topic: Hashable, message: object) -> int:
        """Cast `message` to every subscriber of `topic` on this node; says how many took it."""
        return self.context.pubsub.publish(topic, message)

    def broadcast(self, topic: Hashable, message: object) -> int:
        """`publish` here and on all nodes to which there is a link; says how many took it here.
        Topic and message must be such as travel (see `runtime.refs`, `runtime.cluster.frames`)."""
        return self.context._scheduler.broadcast(topic, message)

    def _require_coroutine(self, primitive: str) -> None:
        if self.context._coroutine is None:
            raise RuntimeError(f"{type(self).__name__}: a plain handler may not {primitive}")
