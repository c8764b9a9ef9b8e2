"""Keyed actors: at most one for each key (a UUID) in the whole cluster, started where it is wanted.

    class Account(KeyedActor):
        async def took_over(self) -> None: ...          # self.epoch is ours now: load the truth
        async def about_to_move(self) -> None: ...      # write what is not written

    keeper = Keeper("account", tenure, store, factory)  # one on each node, registered
    accounts = KeyedActors("account", tenure)           # the way to them, from any node
    answer = await accounts.call(self, key, Question(), deadline_ns)

Where a key lives is said by rendezvous hashing over the living nodes (`Tenure`). Whoever wants its
actor asks the `Keeper` of that node, which starts it on demand. An actor begins by taking the lease
of its key, which raises the key's epoch: whatever an earlier owner still believes, what it writes
under the old epoch is refused.

When the nodes are others than before, a keeper hands over what lives elsewhere now: the actor gets
`HandOver` behind the mail that it has, so it still answers that; then it writes what it has to,
gives up the lease, and ends. Mail that comes after finds nobody, and `KeyedActors.call` asks again
at the new place. The new owner, started meanwhile, waits for the lease with its mail. A node that
is dead hands nothing over; its leases are free as soon as its own has ended.

    caller ── Locate ──> keeper of the node where the key lives ── starts ──> actor
    actor ── acquire(key) ──┬─ LeaseHeld: Relinquish, to the keeper of the owner; and again
                            └─ epoch: took_over(), then its mail
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Final
from uuid import UUID

import attrs
import structlog

from runtime.actor import (
    Actor,
    ActorError,
    ActorRef,
    CallError,
    Dead,
    NamedRef,
    Raise,
    Refused,
    Timer,
    Unreachable,
    handles,
)
from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.cluster.leases import LeaseFenced, LeaseHeld, LeaseStore, LeaseUnavailable
from runtime.cluster.tenure import ROSTER, RosterChanged, Tenure
from runtime.errors import LimitReached, NameTaken
from runtime.supervisor import ChildSpec, DynamicSupervisor, Restart

ACQUIRE_PATIENCE_NS: Final = 10 * NS_PER_S
"""How long an actor waits for the lease of its key before it gives up."""
HAND_OVER_PATIENCE_NS: Final = 5 * NS_PER_S
"""How long an actor that has to move may take over its mail before it is ended."""
HAND_OVER_CHECK_NS: Final = NS_PER_S // 2
LAPSE_PATIENCE_NS: Final = 2 * NS_PER_S
"""How long a decision waits for a lapsed lease to be renewed."""
LAPSE_CHECK_NS: Final = 20 * NS_PER_MS
LOCATE_DEADLINE_NS: Final = NS_PER_S
FIRST_RETRY_NS: Final = 10 * NS_PER_MS
LAST_RETRY_NS: Final = 200 * NS_PER_MS

MOVED: Final = "moved"
"""The reason of an actor that ended since its key lives elsewhere now."""
FENCED: Final = "fenced"
"""The reason of an actor whose node was given up for dead: it owns nothing any more."""
OVERDUE: Final = "overdue"
"""The reason of an actor that had to move, and did not in HAND_OVER_PATIENCE_NS."""
NOT_TAKEN_UP: Final = frozenset({MOVED, "normal", "no such actor"})
"""The reasons of an end in good order: what lies in the mailbox then was not begun with. Of an
actor that was cut off nobody knows; who called it gets Dead."""

_log = structlog.get_logger("holloway.cluster")


class NoWay(Unreachable):
    """No link has led to the node where the key lives for as long as the caller would wait for
    one. The node holds its lease: others may reach it."""


@attrs.frozen
class Locate:
    """To a keeper: the actor of this key, started if need be (and if `start`). Answered by
    Located."""

    key: UUID
    start: bool = True


@attrs.frozen
class Located:
    """`ref` is the actor, on the keeper's node. None: it does not run; `is_here` says whether this
    is because the key lives on this node, and nobody started it."""

    ref: ActorRef | None
    is_here: bool


@attrs.frozen
class Relinquish:
    """To the keeper of a node that has the lease of a key, by the node where the key lives."""

    key: UUID
    node: str


@attrs.frozen
class HandOver:
    """To a keyed actor: write what you have to, give up the lease, and end."""


@attrs.frozen
class _Check:
    """See whether what has to move has moved."""


@attrs.define
class _Move:
    """An actor that has to move, and whether it knows."""

    since_ns: int
    is_told: bool = False


def keeper_name(kind: str) -> tuple[str, str]:
    """The registered name of a node's keeper."""
    return ("keeper", kind)


class NotEntitled(ActorError):
    """The node's lease has lapsed, or the key is another's: ask again, and maybe elsewhere."""


class KeyedActor(Actor):
    """The base of keyed actors. `kind` names their keeper. A subclass that defines `started` calls
    this one's first (it need not: `took_over` is the place)."""

    kind: ClassVar[str]

    def __init__(self, key: UUID, tenure: Tenure, store: LeaseStore) -> None:
        self.key = key
        self.tenure = tenure
        self.epoch = 0
        """The fencing token: of this ownership, and higher than that of any before."""
        self._leases = store
        self._incarnation = 0

    async def took_over(self) -> None:
        """The lease is ours: come up. What this raises is a start failure."""

    async def about_to_move(self) -> None:
        """The last thing before the lease is given up. What this raises is logged, and dropped.
        Calls that are kept (LATER) are made once more at the next place: keep none with which
        something was begun."""

    @property
    def is_entitled(self) -> bool:
        """Whether the lease stands now: without it nothing may be decided. (Had it lapsed, and
        somebody taken the key meanwhile, the node would be in another tenure.)"""
        tenure = self.tenure
        return tenure.incarnation == self._incarnation and tenure.holds(self.context.now())

    async def confirm(self) -> bool:
        """`is_entitled`, but a lease that has lapsed gets a while to be renewed."""
        end_ns = self.context.now() + LAPSE_PATIENCE_NS
        while not self.is_entitled:
            if self.tenure.incarnation != self._incarnation or self.context.now() >= end_ns:
                return False
            await self.sleep(LAPSE_CHECK_NS)
        return True

    async def started(self) -> None:
        if await self._acquire():
            await self.took_over()
        else:
            self.stop(MOVED)

    async def give_up(self, reason: str) -> None:
        """End, and free the lease, so that another node need not ask for it."""
        await self._release()
        self.stop(reason)

    @handles(HandOver)
    async def _on_hand_over(self, message: HandOver) -> None:
        if self.tenure.is_ours(self.key):
            return  # it came back meanwhile
        try:
            await self.about_to_move()
        except Exception as error:
            _log.warning("about_to_move_failed", key=str(self.key), cause=type(error).__name__)
        await self.give_up(MOVED)

    async def _acquire(self) -> bool:
        """Take the lease. False if the key lives elsewhere now. Raises what the store does."""
        tenure = self.tenure
        end_ns = self.context.now() + ACQUIRE_PATIENCE_NS
        pause_ns = FIRST_RETRY_NS
        while tenure.is_ours(self.key):
            self._incarnation = tenure.incarnation
            try:
                self.epoch = await self.perform(
                    partial(
                        self._leases.acquire,
                        self.key,
                        owner=tenure.node,
                        incarnation=tenure.incarnation,
                    )
                )
            except (LeaseHeld, LeaseFenced, LeaseUnavailable) as error:
                if self.context.now() >= end_ns:
                    raise
                if isinstance(error, LeaseHeld):
                    keeper = NamedRef(keeper_name(self.kind), error.owner)
                    self.cast(keeper, Relinquish(self.key, tenure.node))
            else:
                return True
            await self.sleep(pause_ns + self.context.randomness.integer(pause_ns))
            pause_ns = min(2 * pause_ns, LAST_RETRY_NS)
        return False

    async def _release(self) -> None:
        await _release(self, self._leases, self.key, self.tenure.node, self._incarnation)


async def _release(actor: Actor, store: LeaseStore, key: UUID, node: str, incarnation: int) -> None:
    """Give up a lease. If the store is away, whoever wants it asks for it, or waits for our end."""
    with suppress(LeaseUnavailable):
        await actor.perform(partial(store.release, key, owner=node, incarnation=incarnation))


class _Releaser(Actor):
    """Gives up a lease for which no actor lives any more (it crashed, and its key moved). While it
    does, the key has no actor here: the lease of that one would be given up."""

    def __init__(self, key: UUID, tenure: Tenure, store: LeaseStore) -> None:
        self._key = key
        self._tenure = tenure
        self._store = store

    def started(self) -> None:
        self.cast(self.context.ref, _Check())

    @handles(_Check)
    async def _on_check(self, message: _Check) -> None:
        tenure = self._tenure
        await _release(self, self._store, self._key, tenure.node, tenure.incarnation)
        self.stop()


class Keeper(DynamicSupervisor):
    """The keyed actors of one kind on this node; see the module. They are temporary children: who
    ends is started again by whoever wants it."""

    mailbox_limit = 100_000

    def __init__(
        self,
        kind: str,
        tenure: Tenure,
        store: LeaseStore,
        factory: Callable[[UUID], KeyedActor],
        *,
        limit: int,
    ) -> None:
        super().__init__(limit=limit)
        self._kind = kind
        self._tenure = tenure
        self._store = store
        self._factory = factory
        self._incarnation = tenure.incarnation
        self._moving: dict[UUID, _Move] = {}
        self._next_check: Timer | None = None

    async def started(self) -> None:
        await super().started()
        self.subscribe(ROSTER)

    @property
    def keys(self) -> tuple[UUID, ...]:
        """The keys whose actors live here, those that are about to move among them."""
        return tuple(each.id for each in self.children() if isinstance(each.id, UUID))

    @handles(Locate)
    def _on_locate(self, message: Locate) -> Located | Raise:
        self._end_if_fenced()
        key = message.key
        if not self._tenure.is_ours(key) or not self._tenure.holds(self.context.now()):
            return Located(None, False)
        if key in self._moving or self.child(_release_of(key)) is not None:
            return Located(None, False)  # it moved away, and comes back: first that has to end
        child = self.child(key)
        if child is None and message.start:
            try:
                child = self._start(key)
            except (LimitReached, NameTaken) as error:
                return Raise(error)
        return Located(child, True)

    @handles(Relinquish)
    def _on_relinquish(self, message: Relinquish) -> None:
        """Only if by our own view too the key lives there: who asks may know less than we do."""
        key = message.key
        if self._tenure.owner_of(key) != message.node or message.node == self._tenure.node:
            return
        child = self.child(key)
        if child is not None:
            self._hand_over(key, child)
            self._check_later()
            return
        release = partial(_Releaser, key, self._tenure, self._store)
        with suppress(LimitReached):  # it is asked for again
            self.start_child(
                ChildSpec(id=_release_of(key), factory=release, restart=Restart.TEMPORARY),
                reuse=True,
            )

    @handles(RosterChanged)
    def _on_roster_changed(self, message: RosterChanged) -> None:
        self._end_if_fenced()
        self._move()

    @handles(_Check)
    def _on_check(self, message: _Check) -> None:
        self._next_check = None
        self._move()

    def _start(self, key: UUID) -> ActorRef:
        return self.start_child(
            ChildSpec(
                id=key,
                factory=partial(self._factory, key),
                restart=Restart.TEMPORARY,
                name=(self._kind, key),
            )
        )

    def _move(self) -> None:
        """Hand over what lives elsewhere now; end what does not let itself be handed over."""
        for key in self.keys:
            child = self.child(key)
            if child is None or self._tenure.is_ours(key):
                self._moving.pop(key, None)
            else:
                self._hand_over(key, child)
        for key in [key for key in self._moving if self.child(key) is None]:
            del self._moving[key]
        self._check_later()

    def _hand_over(self, key: UUID, child: ActorRef) -> None:
        now_ns = self.context.now()
        move = self._moving.setdefault(key, _Move(now_ns))
        if now_ns - move.since_ns >= HAND_OVER_PATIENCE_NS:
            self.stop_actor(child, OVERDUE)
        elif not move.is_told:  # a full mailbox does not take it: it is told with the next check
            move.is_told = self.cast(child, HandOver())

    def _check_later(self) -> None:
        if self._moving and self._next_check is None:
            self._next_check = self.send_after(HAND_OVER_CHECK_NS, _Check())

    def _end_if_fenced(self) -> None:
        """This node was given up for dead: nothing of before is ours."""
        if self._incarnation == self._tenure.incarnation and not self._tenure.is_superseded:
            return
        self._incarnation = self._tenure.incarnation
        self._moving.clear()
        for key in self.keys:
            child = self.child(key)
            if child is not None:
                self.stop_actor(child, FENCED)


class KeyedActors:
    """The way to the keyed actors of one kind, for actors of this node. Location makes no
    difference but in time."""

    def __init__(self, kind: str, tenure: Tenure) -> None:
        self.kind = kind
        self.tenure = tenure

    def keeper_of(self, key: UUID) -> NamedRef | None:
        """The keeper that should know; None if no node is known to live."""
        owner = self.tenure.owner_of(key)
        return None if owner is None else NamedRef(keeper_name(self.kind), owner)

    async def locate(
        self, actor: Actor, key: UUID, *, deadline_ns: int, no_way_ns: int | None = None
    ) -> ActorRef:
        """The key's actor, started if need be; it may still be coming up. `actor` is who asks, in
        a coroutine handler. Asks again while the key moves. Raises Unreachable after the deadline,
        NoWay when for `no_way_ns` without a break there was no link to the node where it lives,
        LimitReached (Refused, if that is another node) when its node takes no more."""
        context = actor.context
        end_ns = context.now() + deadline_ns
        pause_ns = FIRST_RETRY_NS
        unreached, unreached_ns = "", 0  # the node without a link, and since when
        while True:
            keeper = self.keeper_of(key)
            left_ns = end_ns - context.now()
            if keeper is not None:
                patience_ns = max(1, min(left_ns, LOCATE_DEADLINE_NS))
                try:
                    located: Located = await actor.call(keeper, Locate(key), patience_ns)
                except Refused:
                    raise
                except Unreachable as error:
                    if unreached != error.node:
                        unreached, unreached_ns = error.node, context.now()
                    elif no_way_ns is not None and context.now() >= unreached_ns + no_way_ns:
                        raise NoWay(f"{self.kind} {key}", unreached) from None
                except CallError:
                    unreached = ""
                else:
                    unreached = ""
                    if located.ref is not None:
                        return located.ref
            if left_ns <= 0:
                where = "nowhere" if keeper is None else str(keeper.node)
                raise Unreachable(f"{self.kind} {key}", where)
            await actor.sleep(pause_ns + context.randomness.integer(pause_ns))
            pause_ns = min(2 * pause_ns, LAST_RETRY_NS)

    async def call(
        self,
        actor: Actor,
        key: UUID,
        message: object,
        deadline_ns: int,
        *,
        no_way_ns: int | None = None,
    ) -> Any:
        """Call the key's actor; when it ended, or its node could not be reached, before it took the
        message up, once more at its next place. Raises as `Actor.call` does, and as `locate`; Dead
        also when the actor did not come up, since there may be no such key."""
        context = actor.context
        end_ns = context.now() + deadline_ns
        while True:
            left_ns = max(1, end_ns - context.now())
            ref = await self.locate(actor, key, deadline_ns=left_ns, no_way_ns=no_way_ns)
            try:
                return await actor.call(ref, message, max(1, end_ns - context.now()))
            except (Dead, Unreachable) as error:
                if context.now() >= end_ns or not _may_be_repeated(error):
                    raise
            await actor.sleep(FIRST_RETRY_NS)


def _release_of(key: UUID) -> tuple[str, UUID]:
    """The id of a keeper's child that gives up the lease of the key."""
    return ("release", key)


def _may_be_repeated(error: Dead | Unreachable) -> bool:
    """Whether a call that ended so was surely not taken up."""
    if isinstance(error, Unreachable):
        return True
    return error.reason in NOT_TAKEN_UP or error.reason.startswith("crashed")
