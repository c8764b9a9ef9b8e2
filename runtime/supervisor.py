"""Supervisors: actors whose only work is to keep others alive, after OTP's `supervisor`.

    class Portal(Supervisor): ...
    scheduler.spawn(
        Supervisor(
            [
                ChildSpec(id="directory", factory=Directory, name="directory"),
                ChildSpec(id="accounts", factory=lambda: DynamicSupervisor(limit=10_000)),
            ],
            intensity=3,
            period_ns=5 * NS_PER_S,
        )
    )

A child that ends is started anew from its factory, by its restart type, and nothing of its state
survives. More than `intensity` restarts within `period_ns` mean that restarting does not help: the
supervisor ends all its children and itself, abnormally, so that the one above may try (escalation).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from enum import Enum
from typing import ClassVar, Final

import attrs

from runtime.actor import Actor, ActorRef, Down, Raise, handles, is_abnormal
from runtime.errors import ActorError, LimitReached, NameTaken

DEFAULT_INTENSITY: Final = 3
DEFAULT_PERIOD_NS: Final = 5 * 10**9
MAX_CHILDREN: Final = 1_000
ESCALATED: Final = "escalated: restart intensity reached"


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


class AlreadyStarted(ActorError):
    """The supervisor has a living child of this id: `ref`."""

    def __init__(self, id: Hashable, ref: ActorRef) -> None:
        super().__init__(f"there is a child {id!r} already")
        self.ref = ref


@attrs.frozen(kw_only=True)
class ChildSpec:
    """How to start a child. `factory` makes a fresh actor; `name` is registered while it lives;
    `id` is its name under this supervisor (and in the tree)."""

    id: Hashable
    factory: Callable[[], Actor]
    restart: Restart = Restart.PERMANENT
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


@attrs.define(eq=False)
class _Entry:
    spec: ChildSpec
    ref: ActorRef | None = None
    restarts: int = 0


class Supervisor(Actor):
    """Starts its children in order, each when the one before has come up, and keeps them alive.

    If one does not come up at first, the supervisor itself does not. When it ends, its children
    end first, the youngest first. A child added later whose first start fails is forgotten.
    """

    forgets_ended: ClassVar[bool] = False
    """Whether a child that ended and is not restarted loses its place."""

    def __init__(
        self,
        children: Sequence[ChildSpec] = (),
        *,
        strategy: Strategy = Strategy.ONE_FOR_ONE,
        intensity: int = DEFAULT_INTENSITY,
        period_ns: int = DEFAULT_PERIOD_NS,
        limit: int = MAX_CHILDREN,
    ) -> None:
        ids = [spec.id for spec in children]
        if len(set(ids)) != len(ids):
            raise ValueError("the ids of children are unique")
        if len(ids) > limit:
            raise ValueError(f"more children than the limit of {limit}")
        if intensity < 0 or period_ns <= 0:
            raise ValueError("intensity is 0 or more and the period is positive")
        self.strategy = strategy
        self.intensity = intensity
        self.period_ns = period_ns
        self.limit = limit
        self._specs = tuple(children)
        self._entry_by_id: dict[Hashable, _Entry] = {}
        self._entry_by_ref: dict[ActorRef, _Entry] = {}
        self._restarted_ns: deque[int] = deque()
        self._restarts = 0

    async def started(self) -> None:
        for spec in self._specs:
            await self.wait_started(self.start_child(spec))

    # --- also for whoever holds the object -----------------------------------------------------

    def start_child(self, spec: ChildSpec, *, reuse: bool = False) -> ActorRef:
        """See `StartChild`. May be called from outside a turn, once this supervisor is spawned."""
        entry = self._entry_by_id.get(spec.id)
        if entry is not None and entry.ref is not None:
            if reuse:
                return entry.ref
            raise AlreadyStarted(spec.id, entry.ref)
        if entry is None and len(self._entry_by_id) >= self.limit:
            raise LimitReached(f"{self.context.label} has at most {self.limit} children")
        entry = _Entry(spec)
        ref = self._begin(entry)
        self._entry_by_id[spec.id] = entry
        return ref

    def terminate_child(self, id: Hashable) -> bool:
        """See `TerminateChild`."""
        entry = self._entry_by_id.pop(id, None)
        if entry is None:
            return False
        if entry.ref is not None:
            del self._entry_by_ref[entry.ref]
            self.stop_actor(entry.ref)
        return True

    def child(self, id: Hashable) -> ActorRef | None:
        """The living child of this id."""
        entry = self._entry_by_id.get(id)
        return None if entry is None else entry.ref

    def children(self) -> tuple[Child, ...]:
        """See `WhichChildren`."""
        return tuple(
            Child(id=id, ref=entry.ref, restarts=entry.restarts)
            for id, entry in self._entry_by_id.items()
        )

    def statistics(self) -> SupervisorStatistics:
        return SupervisorStatistics(
            children=len(self._entry_by_id),
            alive=len(self._entry_by_ref),
            restarts=self._restarts,
        )

    # --- handlers ------------------------------------------------------------------------------

    @handles(StartChild)
    def _on_start_child(self, message: StartChild) -> ActorRef | Raise:
        try:
            return self.start_child(message.spec, reuse=message.reuse)
        except (AlreadyStarted, LimitReached, NameTaken) as error:
            return Raise(error)

    @handles(TerminateChild)
    def _on_terminate_child(self, message: TerminateChild) -> bool:
        return self.terminate_child(message.id)

    @handles(WhichChildren)
    def _on_which_children(self, message: WhichChildren) -> tuple[Child, ...]:
        return self.children()

    @handles(Down)
    def _on_down(self, message: Down) -> None:
        entry = self._entry_by_ref.pop(message.ref, None)
        if entry is None:
            return
        entry.ref = None
        if not self._is_restarted(entry, message.reason):
            if self.forgets_ended or entry.spec.restart is Restart.TEMPORARY:
                self._forget(entry)
            return
        if message.reason.startswith("start failed") and entry.restarts == 0:
            self._forget(entry)
            return
        if not self._may_restart():
            self.stop(ESCALATED)
            return
        entry.restarts += 1
        self._restarts += 1
        self._begin(entry)

    # --- helpers -------------------------------------------------------------------------------

    def _begin(self, entry: _Entry) -> ActorRef:
        spec = entry.spec
        ref = self.spawn(
            spec.factory(),
            name=spec.name,
            label=str(spec.id),
            mailbox_limit=spec.mailbox_limit,
            restarts=entry.restarts,
        )
        self.monitor(ref)
        entry.ref = ref
        self._entry_by_ref[ref] = entry
        return ref

    def _forget(self, entry: _Entry) -> None:
        if self._entry_by_id.get(entry.spec.id) is entry:
            del self._entry_by_id[entry.spec.id]

    def _is_restarted(self, entry: _Entry, reason: str) -> bool:
        restart = entry.spec.restart
        return restart is Restart.PERMANENT or (
            restart is Restart.TRANSIENT and is_abnormal(reason)
        )

    def _may_restart(self) -> bool:
        """Count a restart now; False when that makes one too many within the period."""
        now = self.context.now()
        restarted_ns = self._restarted_ns
        restarted_ns.append(now)
        while restarted_ns[0] <= now - self.period_ns:
            restarted_ns.popleft()
        return len(restarted_ns) <= self.intensity


class DynamicSupervisor(Supervisor):
    """A supervisor of children that come and go: none at first, at most `limit`, and one that ends
    for good is forgotten."""

    forgets_ended = True

    def __init__(
        self,
        *,
        limit: int,
        intensity: int = DEFAULT_INTENSITY,
        period_ns: int = DEFAULT_PERIOD_NS,
    ) -> None:
        super().__init__(intensity=intensity, period_ns=period_ns, limit=limit)
