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

from runtime.actor import (
    Actor,
    ActorError,
    ActorRef,
    CallError,
    Dead,
    NamedRef,
    Raise,
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
ACQUIRE_RETRY_NS: Final = 40 * NS_PER_MS
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
        self._lapses = 0

    async def took_over(self) -> None:
        """The lease is ours: come up. What this raises is a start failure."""

    async def about_to_move(self) -> None:
        """The last thing before the lease is given up. What this raises is dropped."""

    @property
    def is_entitled(self) -> bool:
        """Whether the lease stands now, and always did: else nothing may be decided."""
        tenure = self.tenure
        return (
            tenure.incarnation == self._incarnation
            and tenure.lapses == self._lapses
            and tenure.holds(self.context.now())
        )

    async def confirm(self) -> bool:
        """`is_entitled`; but a lease that has lapsed gets a while to be renewed. Then the key is
        taken once more: if nobody had it meanwhile all is as before, under the next epoch, and
        else this actor ends. Raises what the store does."""
        end_ns = self.context.now() + LAPSE_PATIENCE_NS
        tenure = self.tenure
        while not self.is_entitled:
            if tenure.incarnation != self._incarnation or self.context.now() >= end_ns:
                return False
            if tenure.holds(self.context.now()) and not await self._take_again():
                self.stop(FENCED)
                return False
            if not self.is_entitled:
                await self.sleep(LAPSE_CHECK_NS)
        return True

    async def _take_again(self) -> bool:
        """False if the key is another's, or was: what this actor knows is not the truth then."""
        lapses = self.tenure.lapses
        try:
            epoch = await self._acquire_once()
        except LeaseHeld:
            return False
        except LeaseFenced:
            return True  # it has lapsed again
        if epoch != self.epoch + 1:
            return False
        self.epoch, self._lapses = epoch, lapses
        return True

    async def _acquire_once(self) -> int:
        epoch: int = await self.perform(
            partial(
                self._leases.acquire,
                self.key,
                owner=self.tenure.node,
                incarnation=self._incarnation,
            )
        )
        return epoch

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
        finally:
            await self.give_up(MOVED)

    async def _acquire(self) -> bool:
        """Take the lease. False if the key lives elsewhere now. Raises what the store does."""
        tenure = self.tenure
        end_ns = self.context.now() + ACQUIRE_PATIENCE_NS
        while tenure.is_ours(self.key):
            self._incarnation, self._lapses = tenure.incarnation, tenure.lapses
            try:
                self.epoch = await self._acquire_once()
            except (LeaseHeld, LeaseFenced) as error:
                if self.context.now() >= end_ns:
                    raise
                if isinstance(error, LeaseHeld):
                    keeper = NamedRef(keeper_name(self.kind), error.owner)
                    self.cast(keeper, Relinquish(self.key, tenure.node))
            else:
                return True
            await self.sleep(ACQUIRE_RETRY_NS)
        return False

    async def _release(self) -> None:
        tenure = self.tenure
        with suppress(LeaseUnavailable):  # then whoever wants it asks for it, or waits for our end
            await self.perform(
                partial(
                    self._leases.release,
                    self.key,
                    owner=tenure.node,
                    incarnation=self._incarnation,
                )
            )


class _Releaser(Actor):
    """Gives up a lease for which no actor lives any more (it crashed, and its key moved)."""

    def __init__(self, key: UUID, tenure: Tenure, store: LeaseStore) -> None:
        self._key = key
        self._tenure = tenure
        self._store = store

    def started(self) -> None:
        self.cast(self.context.ref, _Check())

    @handles(_Check)
    async def _on_check(self, message: _Check) -> None:
        tenure = self._tenure
        with suppress(LeaseUnavailable):  # it is asked for again
            await self.perform(
                partial(
                    self._store.release,
                    self._key,
                    owner=tenure.node,
                    incarnation=tenure.incarnation,
                )
            )
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
        self._moving_since_ns: dict[UUID, int] = {}

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
        child = self.child(key)
        if child is not None and key in self._moving_since_ns:
            return Located(None, False)  # it moved away, and comes back: first it has to end
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
        else:
            self.spawn(_Releaser(key, self._tenure, self._store), label=f"release {key}")

    @handles(RosterChanged)
    def _on_roster_changed(self, message: RosterChanged) -> None:
        self._end_if_fenced()
        self._move()

    @handles(_Check)
    def _on_check(self, message: _Check) -> None:
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
        now_ns = self.context.now()
        for key in self.keys:
            child = self.child(key)
            if child is None or self._tenure.is_ours(key):
                self._moving_since_ns.pop(key, None)
                continue
            if now_ns - self._moving_since_ns.get(key, now_ns) >= HAND_OVER_PATIENCE_NS:
                self.stop_actor(child, MOVED)
            else:
                self._hand_over(key, child)
        gone = [key for key in self._moving_since_ns if self.child(key) is None]
        for key in gone:
            del self._moving_since_ns[key]
        if self._moving_since_ns:
            self.send_after(HAND_OVER_CHECK_NS, _Check())

    def _hand_over(self, key: UUID, child: ActorRef) -> None:
        if key in self._moving_since_ns:
            return
        if self.cast(child, HandOver()):
            self._moving_since_ns[key] = self.context.now()

    def _end_if_fenced(self) -> None:
        """This node was given up for dead: nothing of before is ours."""
        if self._incarnation == self._tenure.incarnation and not self._tenure.is_superseded:
            return
        self._incarnation = self._tenure.incarnation
        self._moving_since_ns.clear()
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

    async def locate(self, actor: Actor, key: UUID, *, deadline_ns: int) -> ActorRef:
        """The key's actor, started if need be; it may still be coming up. `actor` is who asks, in
        a coroutine handler. Asks again while the key moves. Raises Unreachable after the deadline,
        Refused or LimitReached when its node takes no more."""
        context = actor.context
        end_ns = context.now() + deadline_ns
        pause_ns = FIRST_RETRY_NS
        while True:
            keeper = self.keeper_of(key)
            left_ns = end_ns - context.now()
            if keeper is not None:
                patience_ns = max(1, min(left_ns, LOCATE_DEADLINE_NS))
                try:
                    located: Located = await actor.call(keeper, Locate(key), patience_ns)
                except CallError:
                    pass
                else:
                    if located.ref is not None:
                        return located.ref
            if left_ns <= 0:
                where = "nowhere" if keeper is None else str(keeper.node)
                raise Unreachable(f"{self.kind} {key}", where)
            await actor.sleep(pause_ns + context.randomness.integer(pause_ns))
            pause_ns = min(2 * pause_ns, LAST_RETRY_NS)

    async def call(self, actor: Actor, key: UUID, message: object, deadline_ns: int) -> Any:
        """Call the key's actor; when it ended, or its node could not be reached, before it took the
        message up, once more at its next place. Raises as `Actor.call` does, and as `locate`."""
        context = actor.context
        end_ns = context.now() + deadline_ns
        while True:
            ref = await self.locate(actor, key, deadline_ns=max(1, end_ns - context.now()))
            try:
                return await actor.call(ref, message, max(1, end_ns - context.now()))
            except (Dead, Unreachable):
                if context.now() >= end_ns:
                    raise
            await actor.sleep(FIRST_RETRY_NS)
