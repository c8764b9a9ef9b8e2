"""What is said to a supervisor about its children, and what it says: specifications and calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from enum import Enum
from typing import Final

import attrs

from runtime.actor import Actor
from runtime.errors import ActorError
from runtime.refs import ActorRef

DEFAULT_SHUTDOWN_NS: Final = 5 * 10**9


class Restart(Enum):
    """When a child that has ended is started again."""

    PERMANENT = "permanent"
    """Always."""
    TRANSIENT = "transient"
    """If it ended abnormally (anything but "normal" and "shutdown")."""
    TEMPORARY = "temporary"
    """Never."""


class Strategy(Enum):
    """What happens to the other children when one is restarted."""

    ONE_FOR_ONE = "one_for_one"
    """Nothing."""
    ONE_FOR_ALL = "one_for_all"
    """All are ended, the youngest first, and started again in order: they need each other."""
    REST_FOR_ONE = "rest_for_one"
    """So are those that were started after it: each needs the ones before."""


class Shutdown(Enum):
    """How long a child may take to end, where that is not a number of nanoseconds."""

    BY_KIND = "by_kind"
    """As long as it takes if it is a supervisor, DEFAULT_SHUTDOWN_NS if it is not."""
    INFINITY = "infinity"
    """As long as it takes."""
    BRUTAL_KILL = "brutal_kill"
    """No time at all, and no signal before."""


class AlreadyStarted(ActorError):
    """The supervisor has a living child of this id: `ref`."""

    def __init__(self, id: Hashable, ref: ActorRef) -> None:
        super().__init__(f"there is a child {id!r} already")
        self.ref = ref


@attrs.frozen(kw_only=True)
class ChildSpec:
    """How to start a child. `factory` makes a fresh actor; `name` is registered while it lives;
    `id` is its name under this supervisor (and in the tree).

    `shutdown` bounds its end (ns): it is sent the exit signal "shutdown", which ends it at once
    unless it traps exits; if it lives after that time it is killed."""

    id: Hashable
    factory: Callable[[], Actor]
    restart: Restart = Restart.PERMANENT
    shutdown: int | Shutdown = Shutdown.BY_KIND
    name: Hashable | None = None
    mailbox_limit: int | None = None


@attrs.frozen
class StartChild:
    """Call: start a child below this supervisor; the reply is its ActorRef. It does not wait for
    the child to come up (see `Actor.wait_started`). With `reuse`, a living child of the same id is
    the reply. Raises AlreadyStarted, LimitReached, NameTaken."""

    spec: ChildSpec
    reuse: bool = False


@attrs.frozen
class TerminateChild:
    """Call: end a child and forget it; the reply is False if there is none of this id."""

    id: Hashable


@attrs.frozen
class WhichChildren:
    """Call: the reply is a tuple of Child, in the order of their first start."""


@attrs.frozen(kw_only=True)
class Child:
    """A child as its supervisor sees it; `ref` is None while none lives (it ended normally)."""

    id: Hashable
    ref: ActorRef | None
    restarts: int


@attrs.frozen(kw_only=True)
class SupervisorStatistics:
    """Children now, those that live, and restarts since this supervisor started."""

    children: int
    alive: int
    restarts: int
