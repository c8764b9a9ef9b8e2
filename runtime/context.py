"""What the scheduler keeps of each actor: its context, and the small objects that lie in mailboxes.

Everything with an underscore belongs to the scheduler. An idle actor is a Context, an ActorRef and
the actor itself: a mailbox is lent to it while it has mail, and what few actors have (children,
timers, links, ...) is in `Extras`, made when first needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Generator, Hashable
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, final

import attrs

from runtime.randomness import Randomness
from runtime.refs import ActorRef

if TYPE_CHECKING:
    from runtime.actor import Actor
    from runtime.pubsub import PubSub
    from runtime.registry import Registry
    from runtime.scheduler import Scheduler

RECENT_MESSAGES: Final = 8
"""How many types of handled messages an actor remembers for its crash report."""

# States of an actor. IDLE means: started, nothing in the mailbox, nothing in flight.
IDLE: Final = 0
QUEUED: Final = 1
RUNNING: Final = 2
SUSPENDED: Final = 3
DEAD: Final = 4
STATE_NAMES: Final = ("idle", "queued", "running", "waiting", "dead")


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


@attrs.frozen
class Exit:
    """An exit signal, as a message: only an actor that traps exits gets it. `ref` is the linked
    actor that has ended, or who sent the signal (None: not an actor)."""

    ref: ActorRef | None
    reason: str


@final
class SystemMail:
    """A message that the runtime owes an actor, in its mailbox: never refused."""

    __slots__ = ("message",)

    def __init__(self, message: object) -> None:
        self.message = message


@final
class Caller:
    """A call that waits for its answer; `reply` takes it. Valid for one answer."""

    __slots__ = (
        "_answered", "_callee", "_context", "_early", "_message", "_replied", "_sender",
        "armed_ns", "due_ns",
    )  # fmt: skip

    def __init__(
        self,
        callee: Context | Abroad | None,
        message: object,
        context: Context | None,
        answered: Callable[[Any, Exception | None], None] | None = None,
        sender: ActorRef | None = None,
    ) -> None:
        self._callee = callee
        self._message = message
        self._context = context
        self._answered = answered
        self._sender = sender  # of another node, if it is not `context`
        self._early: tuple[Any, Exception | None] | None = None  # answered before it waited
        self._replied = False
        self.due_ns: int | None = None
        self.armed_ns: int | None = None

    @property
    def ref(self) -> ActorRef | None:
        """Who called, or None when it was not an actor."""
        return self._sender if self._context is None else self._context.ref

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

    __slots__ = ("_away", "_down", "_ended", "_watched", "_watcher")

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
        self._away: Callable[[], None] | None = None  # takes it off on another node


SYSTEM_MAIL: Final = (Timer, Monitor, SystemMail)
"""Types of what lies in a mailbox and is never refused or dropped."""


class _Suspend:
    """The only thing that a coroutine handler may let through to the scheduler."""

    __slots__ = ()

    def __await__(self) -> Generator[_Suspend, Any, Any]:
        return (yield self)


SUSPEND: Final = _Suspend()


@final
class Coalesced:
    """A message in a mailbox, to be replaced by the next one of the same key."""

    __slots__ = ("key", "message")

    def __init__(self, key: Hashable, message: object) -> None:
        self.key = key
        self.message = message


@attrs.frozen
class IdleTimeout:
    """Nothing has come for as long as the actor's idle time-out (see `Actor.idle_timeout_ns`)."""


@final
class IdleWatch:
    """The idle time-out of one actor, in the timer heap."""

    __slots__ = ("armed_ns", "context", "due_ns", "timeout_ns")

    def __init__(self, context: Context, timeout_ns: int) -> None:
        self.context = context
        self.timeout_ns = timeout_ns
        self.due_ns: int | None = None
        self.armed_ns: int | None = None


class Extras:
    """What most actors never have. Each is None until first used; read of NO_EXTRAS, which all
    share that have nothing, write only to `Context._own()`."""

    __slots__ = (
        "children", "coalesced", "coalescing", "dropped", "idle", "later", "links",
        "mailbox_limit", "monitors", "names", "refused", "restarts", "start_waiters", "timers",
        "topics", "watching",
    )  # fmt: skip

    def __init__(self) -> None:
        self.restarts = 0
        self.refused = 0
        self.dropped = 0
        self.coalesced = 0
        self.coalescing: dict[Hashable, Coalesced] | None = None  # what waits, by key
        self.idle: IdleWatch | None = None
        self.mailbox_limit: int | None = None  # if not that of the class
        self.later: dict[Caller, None] | None = None  # calls to be answered later
        self.children: dict[Context, None] | None = None
        self.monitors: dict[Monitor, None] | None = None  # on us
        self.watching: dict[Monitor, None] | None = None  # ours on others
        self.links: dict[Context | ActorRef, None] | None = None  # a ref: of another node
        self.timers: dict[Timer, None] | None = None
        self.names: dict[Hashable, None] | None = None
        self.topics: dict[Hashable, None] | None = None
        self.start_waiters: list[Context] | None = None


NO_EXTRAS: Final = Extras()


@final
class Abroad:
    """An actor of another node, as a callee: what a `Caller` here needs of it."""

    __slots__ = ("label",)

    _extras = NO_EXTRAS
    _wait = None

    def __init__(self, label: str) -> None:
        self.label = label


@final
class Context:
    """What the scheduler knows of one actor, and what the actor may ask about itself.

    Everything with an underscore belongs to the scheduler."""

    __slots__ = (
        "_actor", "_caller", "_coroutine", "_ending", "_error", "_extras", "_killed", "_label",
        "_mailbox", "_parent", "_plain", "_recent", "_room", "_scheduler", "_state", "_unstarted",
        "_value", "_wait", "armed_ns", "due_ns", "handled", "ref", "spawned_ns",
    )  # fmt: skip

    def __init__(
        self,
        scheduler: Scheduler,
        ref: ActorRef,
        actor: Actor,
        parent: Context | None,
        label: str | None,
        room: int,
        spawned_ns: int,
    ) -> None:
        self.ref = ref
        self.spawned_ns = spawned_ns
        self.handled = 0  # messages; those in a row of the present turn are added at its end
        self.due_ns: int | None = None
        self.armed_ns: int | None = None
        self._scheduler = scheduler
        self._actor: Any = actor
        self._label = label
        self._parent = parent
        self._state = IDLE
        self._mailbox: deque[Any] | None = None  # None: lent when the first mail comes
        self._room = room  # with so much mail, what comes is for `_overflow` to decide
        self._plain = actor._plain_handlers
        self._unstarted = actor._has_start
        self._coroutine: Coroutine[Any, Any, Any] | None = None
        self._caller: Caller | None = None  # of the message in hand
        self._wait: object | None = None  # what a suspended coroutine waits for
        self._value: Any = None  # what it is to be resumed with
        self._error: Exception | None = None
        self._ending: str | None = None  # end so when the handler ends (if killed: or suspends)
        self._killed = False
        self._recent: list[type | None] | None = None
        self._extras = NO_EXTRAS

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
        return len(self._mailbox or ())

    @property
    def mailbox_limit(self) -> int:
        """Messages that may wait, system messages apart."""
        own = self._extras.mailbox_limit
        limit: int = type(self._actor).mailbox_limit if own is None else own
        return limit

    @property
    def refused(self) -> int:
        """Messages that were refused because the mailbox was full."""
        return self._extras.refused

    @property
    def restarts(self) -> int:
        """How often its supervisor had to start it anew."""
        return self._extras.restarts

    def _own(self) -> Extras:
        """The extras, to be written to."""
        if self._extras is NO_EXTRAS:
            self._extras = Extras()
        return self._extras

    @property
    def caller(self) -> Caller | None:
        """Whoever called with the message in hand; None if it was cast. Keep it and return LATER
        to reply later."""
        if self._caller is None and self._scheduler._inline is self:
            self._caller = self._scheduler._caller_on_the_spot(self)
        return self._caller

    def __repr__(self) -> str:
        return f"<Context {self.label} {self.ref} {STATE_NAMES[self._state]}>"
