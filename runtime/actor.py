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

from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable
from datetime import datetime
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar, final

import attrs

from runtime.errors import (
    ActorError,
    CallCycle,
    CallError,
    Crashed,
    Dead,
    LimitReached,
    NameTaken,
    NoHandler,
    Overloaded,
    StartFailed,
    TimedOut,
)
from runtime.randomness import Randomness

if TYPE_CHECKING:
    from runtime.pubsub import PubSub
    from runtime.registry import Registry
    from runtime.scheduler import Scheduler

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
    "LimitReached",
    "Monitor",
    "NameTaken",
    "NoHandler",
    "Overloaded",
    "Raise",
    "StartFailed",
    "TimedOut",
    "Timer",
    "handles",
    "is_abnormal",
]

DEFAULT_DEADLINE_NS: Final = 5 * 10**9
DEFAULT_MAILBOX_LIMIT: Final = 1_000
MAX_TIMERS: Final = 100_000
"""Timers that one actor may have pending."""

RECENT_MESSAGES: Final = 8
"""How many types of handled messages an actor remembers for its crash report."""

NORMAL_REASONS: Final = frozenset({"normal", "shutdown"})

# States of an actor. IDLE means: started, nothing in the mailbox, nothing in flight.
IDLE: Final = 0
QUEUED: Final = 1
RUNNING: Final = 2
SUSPENDED: Final = 3
DEAD: Final = 4
STATE_NAMES: Final = ("idle", "queued", "running", "waiting", "dead")

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


@final
class ActorRef:
    """The address of one incarnation of an actor: a node and a number, never reused.

    Equal and hashable by these two; the rest is a shortcut to the actor on its own node."""

    __slots__ = ("_context", "node", "number")

    def __init__(self, node: str, number: int) -> None:
        self.node = node
        self.number = number
        self._context: Context | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ActorRef):
            return NotImplemented
        return self.number == other.number and self.node == other.node

    def __hash__(self) -> int:
        return self.number

    def __repr__(self) -> str:
        return f"<{self.node}.{self.number}>"

    def __reduce__(self) -> tuple[type[ActorRef], tuple[str, int]]:
        return ActorRef, (self.node, self.number)


@final
class _Later:
    def __repr__(self) -> str:
        return "LATER"


LATER: Final = _Later()
"""Returned by a handler that has kept `self.context.caller` and will `reply` to it later."""


@final
@attrs.frozen
class Raise:
    """Returned by a handler (or given to `reply`) to raise `error` in the caller: a refusal that
    leaves the callee as it is. Give a fresh exception each time."""

    error: Exception


@attrs.frozen
class Down:
    """The monitored actor `ref` has ended ("dead": it had before the monitor was set)."""

    ref: ActorRef
    reason: str


@final
class Caller:
    """A call that waits for its answer; `reply` takes it. Valid for one answer."""

    __slots__ = (
        "_answered", "_callee", "_context", "_early", "_message", "_replied", "armed_ns", "due_ns",
    )  # fmt: skip

    def __init__(
        self,
        callee: Context | None,
        message: object,
        context: Context | None,
        answered: Callable[[Any, Exception | None], None] | None = None,
    ) -> None:
        self._callee = callee
        self._message = message
        self._context = context
        self._answered = answered
        self._early: tuple[Any, Exception | None] | None = None  # answered before it waited
        self._replied = False
        self.due_ns: int | None = None
        self.armed_ns: int | None = None

    @property
    def ref(self) -> ActorRef | None:
        """Who called, or None when it was not an actor."""
        return None if self._context is None else self._context.ref

    @property
    def waiting(self) -> bool:
        """False once answered, past its deadline, or when the caller has ended."""
        return self._callee is not None

    def __repr__(self) -> str:
        return f"<Caller {self.ref or 'outside'}{'' if self.waiting else ', done'}>"


@final
class Timer:
    """A message to come (see `Actor.send_after`)."""

    __slots__ = ("_context", "_message", "_recipient", "armed_ns", "due_ns")

    def __init__(self, context: Context, recipient: ActorRef | None, message: object) -> None:
        self._context: Context | None = context
        self._recipient = recipient
        self._message = message
        self.due_ns: int | None = None
        self.armed_ns: int | None = None

    @property
    def pending(self) -> bool:
        """Whether the message is still to be handled."""
        return self._context is not None


@final
class Monitor:
    """One watch of one actor over another (see `Actor.monitor`)."""

    __slots__ = ("_down", "_ended", "_watched", "_watcher")

    def __init__(
        self,
        watcher: Context | None,
        watched: Context | None,
        ended: Callable[[str], None] | None = None,
    ) -> None:
        self._watcher = watcher
        self._watched = watched
        self._ended = ended
        self._down: Down | None = None


class _Suspend:
    """The only thing that a coroutine handler may let through to the scheduler."""

    __slots__ = ()

    def __await__(self) -> Generator[_Suspend, Any, Any]:
        return (yield self)


SUSPEND: Final = _Suspend()


@final
class Context:
    """What the scheduler knows of one actor, and what the actor may ask about itself.

    Everything with an underscore belongs to the scheduler."""

    __slots__ = (
        "_actor", "_awaiting", "_caller", "_children", "_coroutine", "_ending", "_error",
        "_killed", "_label", "_later", "_mailbox", "_mailbox_limit",
        "_monitors", "_names", "_parent", "_plain", "_recent", "_scheduler", "_start_waiters",
        "_state", "_timers", "_topics", "_unstarted", "_value", "_wait", "_watching",
        "armed_ns", "due_ns", "handled", "ref", "refused", "restarts", "spawned_ns",
    )  # fmt: skip

    def __init__(
        self,
        scheduler: Scheduler,
        ref: ActorRef,
        actor: Actor,
        parent: Context | None,
        label: str | None,
        mailbox_limit: int,
        restarts: int,
        spawned_ns: int,
    ) -> None:
        self.ref = ref
        self.restarts = restarts
        self.spawned_ns = spawned_ns
        self.handled = 0
        self.refused = 0
        self.due_ns: int | None = None
        self.armed_ns: int | None = None
        self._scheduler = scheduler
        self._actor: Any = actor
        self._label = label
        self._parent = parent
        self._state = IDLE
        self._mailbox: deque[Any] = deque()
        self._mailbox_limit = mailbox_limit
        self._plain = actor._plain_handlers
        self._awaiting = actor._awaiting_handlers
        self._unstarted = actor._has_start
        self._coroutine: Coroutine[Any, Any, Any] | None = None
        self._caller: Caller | None = None  # of the message in hand
        self._wait: object | None = None  # what a suspended coroutine waits for
        self._value: Any = None  # what it is to be resumed with
        self._error: Exception | None = None
        self._ending: str | None = None  # end so when the handler ends (if killed: or suspends)
        self._killed = False
        self._recent: list[type | None] | None = None
        # Below: None until first used, since most actors have none of them.
        self._later: dict[Caller, None] | None = None
        self._children: dict[Context, None] | None = None
        self._monitors: dict[Monitor, None] | None = None  # on us
        self._watching: dict[Monitor, None] | None = None  # ours on others
        self._timers: dict[Timer, None] | None = None
        self._names: dict[Hashable, None] | None = None
        self._topics: dict[Hashable, None] | None = None
        self._start_waiters: list[Context] | None = None

    def now(self) -> int:
        """Monotonic time in nanoseconds, as the scheduler's clock has it."""
        return self._scheduler.clock.monotonic_ns()

    def utc_now(self) -> datetime:
        """The present instant, aware, in UTC."""
        return self._scheduler.clock.utc_now()

    @property
    def randomness(self) -> Randomness:
        """The scheduler's source of randomness."""
        return self._scheduler.randomness

    @property
    def registry(self) -> Registry:
        """The names of this node."""
        return self._scheduler.registry

    @property
    def pubsub(self) -> PubSub:
        """The topics of this node."""
        return self._scheduler.pubsub

    @property
    def label(self) -> str:
        """A name for people: what was given, or the class and the number."""
        return self._label or f"{type(self._actor).__name__}#{self.ref.number}"

    @property
    def parent(self) -> ActorRef | None:
        """Who spawned this actor and takes it along when it ends."""
        return None if self._parent is None else self._parent.ref

    @property
    def mailbox_depth(self) -> int:
        """Messages that wait to be handled."""
        return len(self._mailbox)

    @property
    def caller(self) -> Caller | None:
        """Whoever called with the message in hand; None if it was cast. Keep it and return LATER
        to reply later."""
        if self._caller is None and self._scheduler._inline is self:
            self._caller = self._scheduler._caller_on_the_spot(self)
        return self._caller

    def __repr__(self) -> str:
        return f"<Context {self.label} {self.ref} {STATE_NAMES[self._state]}>"


class Actor:
    """Base of all actors: state with one owner. An instance is spawned once.

    Class variables: `mailbox_limit`, the messages that may wait (system messages apart)."""

    __slots__ = ("context",)

    mailbox_limit: ClassVar[int] = DEFAULT_MAILBOX_LIMIT
    _has_start: ClassVar[bool] = False
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

    def cast(self, ref: ActorRef, message: object) -> bool:
        """Send and go on. False when it was refused: no such actor, or its mailbox is full."""
        return self.context._scheduler.cast(ref, message)

    def call(
        self, ref: ActorRef, message: object, deadline_ns: int = DEFAULT_DEADLINE_NS
    ) -> Awaitable[Any]:
        """Send and await the reply, at most `deadline_ns` from now. Only in a coroutine handler
        (RuntimeError elsewhere).

        Raises Dead, Crashed, Overloaded, TimedOut, NoHandler, CallCycle, or what the callee
        returned as `Raise`."""
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

    # --- other actors ---

    def spawn(
        self,
        actor: Actor,
        *,
        name: Hashable | None = None,
        label: str | None = None,
        mailbox_limit: int | None = None,
        restarts: int = 0,
    ) -> ActorRef:
        """Start a child: it is stopped when this actor ends. It starts in a turn of its own.

        `name` is registered until it ends (NameTaken); `label` is for people. Raises
        LimitReached."""
        return self.context._scheduler.spawn(
            actor,
            parent=self.context.ref,
            name=name,
            label=label,
            mailbox_limit=mailbox_limit,
            restarts=restarts,
        )

    def stop(self, reason: str = "normal") -> None:
        """End this actor when the present handler ends (its reply is still sent)."""
        self.context._ending = self.context._ending or reason

    def stop_actor(self, ref: ActorRef, reason: str = "shutdown") -> bool:
        """End another actor (see `Scheduler.stop`)."""
        return self.context._scheduler.stop(ref, reason)

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
        """Cast `message` to every subscriber of `topic`; says how many took it."""
        return self.context.pubsub.publish(topic, message)

    def _require_coroutine(self, primitive: str) -> None:
        if self.context._coroutine is None:
            raise RuntimeError(f"{type(self).__name__}: a plain handler may not {primitive}")
