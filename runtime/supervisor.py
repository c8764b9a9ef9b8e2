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
survives; the strategy says which others are restarted with it. More than `intensity` restarts
within `period_ns` mean that restarting does not help: the supervisor ends all its children and
itself, abnormally, so that the one above may try (escalation).

A supervisor traps exits. Told to end by its own parent (or from outside), it ends its children in
the reverse order of their start, each with the time that its specification gives it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import ClassVar, Final

import attrs

from runtime.actor import Actor, ActorRef, Down, Exit, Raise, handles, is_abnormal
from runtime.children import (
    DEFAULT_SHUTDOWN_NS,
    AlreadyStarted,
    Child,
    ChildSpec,
    Restart,
    Shutdown,
    StartChild,
    Strategy,
    SupervisorStatistics,
    TerminateChild,
    WhichChildren,
)
from runtime.errors import LimitReached, NameTaken, StartFailed, TimedOut
from runtime.links import KILLED

__all__ = [
    "DEFAULT_INTENSITY",
    "DEFAULT_PERIOD_NS",
    "DEFAULT_SHUTDOWN_NS",
    "ESCALATED",
    "MAX_CHILDREN",
    "AlreadyStarted",
    "Child",
    "ChildSpec",
    "DynamicSupervisor",
    "Restart",
    "Shutdown",
    "StartChild",
    "Strategy",
    "Supervisor",
    "SupervisorStatistics",
    "TerminateChild",
    "WhichChildren",
]

DEFAULT_INTENSITY: Final = 3
DEFAULT_PERIOD_NS: Final = 5 * 10**9
MAX_CHILDREN: Final = 1_000
ESCALATED: Final = "escalated: restart intensity reached"


@attrs.define(eq=False)
class _Entry:
    spec: ChildSpec
    ref: ActorRef | None = None
    is_supervisor: bool = False
    restarts: int = 0


class Supervisor(Actor):
    """Starts its children in order, each when the one before has come up, and keeps them alive.

    If one does not come up at first, the supervisor itself does not. When it ends, its children
    end first, the youngest first. A child added later whose first start fails is forgotten.
    While it ends children or restarts several, it takes up no message.
    """

    traps_exits = True
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
        try:
            for spec in self._specs:
                await self.wait_started(self.start_child(spec))
        except StartFailed:
            await self._shut_down(self._entry_by_id.values())
            raise

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
        """As `TerminateChild`, but at once: the child gets no time."""
        entry = self._entry_by_id.pop(id, None)
        if entry is None:
            return False
        if (ref := self._let_go(entry)) is not None:
            self.stop_actor(ref)
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
    async def _on_terminate_child(self, message: TerminateChild) -> bool:
        entry = self._entry_by_id.pop(message.id, None)
        if entry is None:
            return False
        await self._shut_down([entry])
        return True

    @handles(WhichChildren)
    def _on_which_children(self, message: WhichChildren) -> tuple[Child, ...]:
        return self.children()

    @handles(Exit)
    async def _on_exit(self, message: Exit) -> None:
        if message.ref is None or message.ref == self.context.parent:
            await self._shut_down(self._entry_by_id.values())
            self.stop(message.reason)

    @handles(Down)
    async def _on_down(self, message: Down) -> None:
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
        broken: _Entry | None = entry
        while broken is not None:
            if not self._may_restart():
                await self._shut_down(self._entry_by_id.values())
                self.stop(ESCALATED)
                return
            if self.strategy is Strategy.ONE_FOR_ONE:
                self._restart(broken)
                return
            broken = await self._restart_group(broken)

    # --- restarts ------------------------------------------------------------------------------

    def _restart(self, entry: _Entry) -> ActorRef:
        entry.restarts += 1
        self._restarts += 1
        return self._begin(entry)

    async def _restart_group(self, broken: _Entry) -> _Entry | None:
        """End what goes with `broken` and start it all again. Returns a child that did not come up,
        with which those after it are left for the next attempt."""
        group = list(self._entry_by_id.values())
        if self.strategy is Strategy.REST_FOR_ONE:
            group = group[group.index(broken) :] if broken in group else [broken]
        await self._shut_down(group)
        for entry in group:
            if self._entry_by_id.get(entry.spec.id) is not entry or entry.ref is not None:
                continue  # taken away, or started by somebody else, meanwhile
            if entry.spec.restart is Restart.TEMPORARY and entry is not broken:
                self._forget(entry)
                continue
            ref = self._restart(entry)
            try:
                await self.wait_started(ref)
            except StartFailed:
                self._let_go(entry)
                return entry
        return None

    # --- ends ----------------------------------------------------------------------------------

    async def _shut_down(self, entries: Iterable[_Entry]) -> None:
        """End the children one after the other, the youngest first."""
        for entry in reversed(list(entries)):
            if (ref := self._let_go(entry)) is not None:
                self._tell_to_end(entry, ref)
                await self._see_end(ref, self._patience_ns(entry))

    def _tell_to_end(self, entry: _Entry, ref: ActorRef) -> None:
        if entry.spec.shutdown is Shutdown.BRUTAL_KILL:
            self.stop_actor(ref, KILLED)
        else:
            self.exit(ref, "shutdown")

    async def _see_end(self, ref: ActorRef, patience_ns: int | None) -> None:
        try:
            await self.wait_ended(ref, deadline_ns=patience_ns)
        except TimedOut:
            self.stop_actor(ref, KILLED)

    def _patience_ns(self, entry: _Entry) -> int | None:
        """How long the child may take to end; None: as long as it takes."""
        shutdown = entry.spec.shutdown
        if shutdown is Shutdown.BY_KIND:
            shutdown = Shutdown.INFINITY if entry.is_supervisor else DEFAULT_SHUTDOWN_NS
        return shutdown if isinstance(shutdown, int) else None

    def _let_go(self, entry: _Entry) -> ActorRef | None:
        """The end of this child, if it lives, means nothing any more."""
        ref, entry.ref = entry.ref, None
        if ref is not None:
            self._entry_by_ref.pop(ref, None)
        return ref

    # --- helpers -------------------------------------------------------------------------------

    def _begin(self, entry: _Entry) -> ActorRef:
        spec = entry.spec
        actor = spec.factory()
        entry.is_supervisor = isinstance(actor, Supervisor)
        ref = self.spawn(
            actor,
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
    for good is forgotten. They know nothing of each other, so they are ended all at once."""

    forgets_ended = True

    def __init__(
        self,
        *,
        limit: int,
        intensity: int = DEFAULT_INTENSITY,
        period_ns: int = DEFAULT_PERIOD_NS,
    ) -> None:
        super().__init__(intensity=intensity, period_ns=period_ns, limit=limit)

    async def _shut_down(self, entries: Iterable[_Entry]) -> None:
        began_ns = self.context.now()
        ending = [(entry, self._let_go(entry)) for entry in reversed(list(entries))]
        for entry, ref in ending:
            if ref is not None:
                self._tell_to_end(entry, ref)
        for entry, ref in ending:
            if ref is not None:
                patience_ns = self._patience_ns(entry)
                if patience_ns is not None:
                    patience_ns = max(0, patience_ns + began_ns - self.context.now())
                await self._see_end(ref, patience_ns)
