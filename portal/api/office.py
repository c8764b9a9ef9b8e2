"""What handlers work with: the `Office` of the node, and a `Desk` for one call on one account."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from typing import Any, Literal, Protocol, TypeGuard, TypeVar, cast
from uuid import UUID
from weakref import WeakValueDictionary

import attrs
import trio
from litestar import Request
from litestar.di import NamedDependency

from actors.limits import limit_of
from actors.messages import PresenceChanged, ResourceExposure
from actors.model import KIND_OF, Account, Entity, EntityKind, SealedSecret
from actors.policy.conditions import NOWHERE, Regions
from actors.policy.engine import Snapshot
from actors.policy.proposals import newly_failing_tests, propose
from actors.store.interface import (
    InvalidReference,
    Mutation,
    NotFound,
    Outdated,
    Put,
    Remove,
    Repeated,
    Store,
)
from actors.store.sealing import KeyRing
from portal.api.authentication import Caller, caller_of
from portal.api.call import Call, call_of
from portal.api.pagination import Page, PageRequest
from portal.api.problems import (
    Problem,
    limit_reached,
    not_found,
    of_store,
    tests_failed,
    unavailable,
)
from portal.api.snapshots import Snapshots
from runtime.clock import Clock
from runtime.randomness import Randomness, uuid7
from runtime.secret import Secret

E = TypeVar("E", bound=Entity)
T = TypeVar("T")
ACCOUNT_HEADER = "Holloway-Account"
WRITING_WAIT_S = 5.0
UPDATE_ATTEMPTS = 20
"""An entity that other nodes change so often in the midst of an update is given up: 409."""
CONCERNS_POLICY: frozenset[EntityKind] = frozenset(
    {
        "account",
        "principal",
        "auth_provider",
        "directory",
        "group",
        "membership",
        "site",
        "resource",
        "policy",
        "policy_test",
    }
)
"""Kinds of which a change may break a policy test: itself, or by what goes with it."""


@attrs.frozen(kw_only=True)
class Online:
    """A device that has a channel: the address that it comes from, and the number of its
    connection, which grows with each."""

    kind: Literal["client", "gateway"]
    remote_ip: str
    number: int


class Live(Protocol):
    """What the actors know of now, beside what the database knows of ever."""

    async def online(self, account_id: UUID) -> Mapping[UUID, Online] | None:
        """Clients and gateways with a channel; None if that cannot be told just now."""

    async def exposed(
        self, account_id: UUID, resource_ids: tuple[UUID, ...]
    ) -> Mapping[UUID, ResourceExposure] | None:
        """What is live now of those resources that somebody has access to; None if that cannot be
        told just now."""

    async def relays_online(self) -> frozenset[UUID] | None:
        """Relays with a channel; None if that cannot be told just now."""

    def watch(self, told: Callable[[PresenceChanged], None]) -> None:
        """Have `told` called when an agent comes or goes, at whatever node. A hint: one may be
        lost."""

    def wake_relays(self) -> None:
        """A relay's token was deleted: whoever is connected by it is to be sent away."""


@attrs.frozen(kw_only=True)
class Office:
    """What all calls share. `portal` (`host:port`) and `pin` go into every token; `regions` are the
    countries of addresses."""

    store: Store
    clock: Clock
    randomness: Randomness
    live: Live
    portal: str
    pin: bytes
    key_ring: KeyRing
    regions: Regions = NOWHERE
    _locks: WeakValueDictionary[UUID, trio.Lock] = attrs.field(
        factory=WeakValueDictionary, repr=False, init=False
    )

    snapshots: Snapshots = attrs.field(factory=Snapshots, repr=False, init=False)

    def new_id(self) -> UUID:
        return uuid7(self.clock, self.randomness)

    @asynccontextmanager
    async def writing(self, account_id: UUID) -> AsyncIterator[None]:
        """Held from reading an entity to writing it back, so that those of this node need not try
        again; that no update loses another's is `Put.before`'s doing. Raises Problem 503 for who
        would have to wait for longer than WRITING_WAIT_S."""
        lock = self._locks.get(account_id)
        if lock is None:
            lock = self._locks[account_id] = trio.Lock()
        with trio.move_on_after(WRITING_WAIT_S) as waiting:
            await lock.acquire()
        if waiting.cancelled_caught:
            raise unavailable("Other changes of the account come first, slowly. Try again shortly.")
        try:
            yield
        finally:
            lock.release()


@attrs.frozen(kw_only=True)
class Desk:
    """One call on one account: nothing at a desk can reach another account."""

    office: Office
    caller: Caller
    account: Account
    call: Call

    @property
    def account_id(self) -> UUID:
        return self.account.id

    @property
    def now(self) -> datetime:
        return self.office.clock.utc_now()

    def new_id(self) -> UUID:
        return self.office.new_id()

    async def get(self, entity_type: type[E], id: UUID) -> E:
        """One entity of the account. Raises Problem 404."""
        kind = KIND_OF[cast("type[Entity]", entity_type)]
        try:
            return cast(E, await self.office.store.get(self.account_id, kind, id))
        except NotFound:
            raise not_found(kind) from None

    async def refer(self, entity_type: type[E], id: UUID, field: str) -> E:
        """The entity that a field of a body names. Raises Problem 404, with the field."""
        try:
            return await self.get(entity_type, id)
        except Problem:
            kind = KIND_OF[cast("type[Entity]", entity_type)]
            raise of_store(InvalidReference(kind, field)) from None

    def seal(
        self, secret: str | None, table: EntityKind, column: str, row_id: UUID
    ) -> SealedSecret | None:
        """A secret as the store keeps it."""
        if secret is None:
            return None
        return self.office.key_ring.seal(
            Secret(secret), table=table, column=column, account_id=self.account_id, row_id=row_id
        )

    def snapshot(self) -> AbstractAsyncContextManager[Snapshot]:
        """The account as it is now, for a question; see `Snapshots.of`."""
        office = self.office
        return office.snapshots.of(self.account_id, office.store, office.regions)

    async def work(self, question: Callable[[], T]) -> T:
        """Work a question out beside the event loop; see `Snapshots.work`."""
        return await self.office.snapshots.work(self.account_id, question)

    def whole(self) -> AbstractAsyncContextManager[None]:
        """To be held by who has read all of the account; see `Snapshots.whole`."""
        return self.office.snapshots.whole(self.account_id)

    async def show(self, entity_type: type[E], id: UUID) -> E:
        """The entity that the answer is about. Raises Problem 404, 412; NotModified."""
        entity = await self.get(entity_type, id)
        self.call.show(entity)
        return entity

    async def list(
        self, entity_type: type[E], page: PageRequest, filters: Mapping[str, Any] | None = None
    ) -> Page[E]:
        """One page of the entities of a kind, by id: those whose fields have these values."""
        found = await self.office.store.list(
            self.account_id,
            KIND_OF[cast("type[Entity]", entity_type)],
            after=page.after_id(),
            limit=page.limit,
            equals=filters or {},
        )
        return page.page(cast("tuple[E, ...]", found), found[-1].id if found else None)

    async def create(self, entity: E, *more: Mutation, shown: object = None) -> E:
        """Store a new entity and return it; `shown` is what the caller gets to see, if not the
        entity itself. What the store refuses becomes a Problem. Raises Replayed, if the same
        creation was carried out meanwhile."""
        seen = entity if shown is None else shown
        await self._again(lambda: self.apply(Put(entity), *more, shown=seen))
        self.call.show(entity)
        return entity

    async def update(
        self, entity_type: type[E], id: UUID, changes: dict[str, Any] | Callable[[E], Any]
    ) -> E:
        """Replace these fields; `changes` may work them out from the present entity, and raise
        what there is against it. What other nodes change at the same moment stays. Raises Problem
        404, 412; Outdated."""
        return await self._again(lambda: self._update(entity_type, id, changes))

    async def remove(
        self,
        entity_type: type[E],
        id: UUID,
        check: Callable[[E], None] | None = None,
    ) -> None:
        """Remove an entity and all that refers to it; `check` raises what there is against it.
        Raises Problem 404, 412; Outdated."""
        await self._again(lambda: self._remove(entity_type, id, check))

    async def apply(self, *mutations: Mutation, shown: object = None) -> None:
        """Carry out mutations in one transaction, in the caller's name. The answer to a creation,
        which shows `shown`, is kept with them if the caller gave a key for it. Raises Problem 409
        for what the account's limits or policy tests refuse; Outdated."""
        number = await self.check(mutations)
        claim, now = self.call.claim, self.now
        answer = None if claim is None or shown is None else claim.answer(201, shown, now)
        try:
            await self.office.store.apply(
                self.account_id,
                mutations,
                who=self.caller.who,
                at=now,
                number=number,
                answer=answer,
            )
        except Repeated as repeated:
            assert claim is not None
            raise claim.replay(repeated.record) from None

    async def check(self, mutations: Sequence[Mutation]) -> int | None:
        """Raises Problem 409 for what the account's limits or policy tests refuse. What is
        returned is the number of the change up to which that is so (`Store.apply(number=)`), None
        if there is nothing that could be refused."""
        new = Counter(KIND_OF[type(each.entity)] for each in mutations if _is_new(each))
        new.pop("account", None)
        concerns_policy = any(_kind(each) in CONCERNS_POLICY for each in mutations)
        if not new and not concerns_policy:
            return None
        store = self.office.store
        number = await store.last_number(self.account_id)
        for kind, count in new.items():
            limit = limit_of(self.account, kind)
            if await store.count(self.account_id, kind) + count > limit:
                raise limit_reached(kind, limit)
        if concerns_policy and await self._has_tests(mutations):
            await self._check_tests(mutations, number)
        return number

    # --- helpers ---

    async def _has_tests(self, mutations: Sequence[Mutation]) -> bool:
        if any(_kind(each) == "policy_test" for each in mutations):
            return True
        return await self.office.store.count(self.account_id, "policy_test") > 0

    async def _check_tests(self, mutations: Sequence[Mutation], number: int) -> None:
        now = self.now
        async with self.snapshot() as snapshot:
            if snapshot.number != number:
                raise Outdated("the account changed while it was looked at")
            failing = await self.work(
                lambda: newly_failing_tests(propose(snapshot, mutations), now)
            )
        if failing:
            raise tests_failed(failing)

    async def _again(self, step: Callable[[], Awaitable[T]]) -> T:
        """Until no other node was faster; those of this node wait for one another."""
        async with self.office.writing(self.account_id):
            for attempts_left in reversed(range(UPDATE_ATTEMPTS)):
                try:
                    return await step()
                except Outdated:
                    if not attempts_left:
                        raise
        raise AssertionError

    async def _update(
        self, entity_type: type[E], id: UUID, changes: dict[str, Any] | Callable[[E], Any]
    ) -> E:
        before = await self.get(entity_type, id)
        self.call.check(before)
        fields = changes(before) if callable(changes) else changes
        after = attrs.evolve(before, **fields)
        await self.apply(Put(after, before))
        self.call.show(after)
        return after

    async def _remove(
        self, entity_type: type[E], id: UUID, check: Callable[[E], None] | None
    ) -> None:
        kind = KIND_OF[cast("type[Entity]", entity_type)]
        try:
            if check is None and not self.call.is_conditional:
                await self.apply(Remove(kind, id))
                return
            entity = await self.get(entity_type, id)
            self.call.check(entity)
            if check is not None:
                check(entity)
            await self.apply(Put(entity, entity), Remove(kind, id))
        except NotFound:
            raise not_found(kind) from None


def _kind(mutation: Mutation) -> EntityKind:
    return mutation.kind if isinstance(mutation, Remove) else KIND_OF[type(mutation.entity)]


def _is_new(mutation: Mutation) -> TypeGuard[Put]:
    return isinstance(mutation, Put) and mutation.before is None


async def provide_office(request: Request[Any, Any, Any]) -> Office:
    """What all handlers share."""
    office = request.app.state.office
    assert isinstance(office, Office)
    return office


async def provide_caller(request: Request[Any, Any, Any]) -> Caller:
    """Who calls, by the token of this request."""
    return caller_of(request)


async def provide_call(request: Request[Any, Any, Any]) -> Call:
    """The call itself: its preconditions, and the headers of its answer."""
    return call_of(request)


async def provide_desk(
    request: Request[Any, Any, Any],
    office: NamedDependency[Office],
    caller: NamedDependency[Caller],
    call: NamedDependency[Call],
) -> Desk:
    """The desk of the caller's account; an operator names one by the header ACCOUNT_HEADER.

    Raises Problem: 400 if an operator names none, 404 if it is not the caller's to name.
    """
    named = request.headers.get(ACCOUNT_HEADER)
    if named is None:
        if caller.account_id is None:
            raise Problem(
                400,
                "account_required",
                f"An operator names the account to act on by the header `{ACCOUNT_HEADER}: <id>`.",
            )
        return await desk_of(office, caller, call, caller.account_id)
    try:
        account_id = UUID(named)
    except ValueError:
        raise Problem(400, "account_required", f"{ACCOUNT_HEADER} must be an id.") from None
    return await desk_of(office, caller, call, account_id)


async def desk_of(office: Office, caller: Caller, call: Call, account_id: UUID) -> Desk:
    """The desk of this account. Raises Problem 404 unless the caller may act on it."""
    if caller.account_id not in (None, account_id):
        raise not_found("account")
    try:
        account = await office.store.get(account_id, "account", account_id)
    except NotFound:
        raise not_found("account") from None
    assert isinstance(account, Account)
    call.account_id = account_id
    return Desk(office=office, caller=caller, account=account, call=call)
