"""What handlers work with: the `Office` of the node, and a `Desk` for one call on one account."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar, cast
from uuid import UUID
from weakref import WeakValueDictionary

import attrs
import trio
from litestar import Request
from litestar.di import NamedDependency

from actors.model import KIND_OF, Account, Entity, EntityKind
from actors.policy.conditions import NOWHERE, Regions
from actors.store.interface import Mutation, NotFound, Outdated, Put, Remove, Store
from actors.store.sealing import KeyRing
from portal.api.authentication import Caller, caller_of
from portal.api.pagination import Page, PageRequest
from portal.api.problems import Problem, not_found, unavailable
from runtime.clock import Clock
from runtime.randomness import Randomness, uuid7

E = TypeVar("E", bound=Entity)
ACCOUNT_HEADER = "Holloway-Account"
UPDATE_ATTEMPTS = 5
WRITING_WAIT_S = 5.0
"""An entity that other nodes change so often in the midst of an update is given up: 409."""


class Live(Protocol):
    """What the actors know of now, beside what the database knows of ever."""

    async def online(self, account_id: UUID) -> Mapping[UUID, str] | None:
        """Clients and gateways with a channel, each with the address that it comes from; None if
        that cannot be told just now."""

    async def relays_online(self) -> frozenset[UUID] | None:
        """Relays with a channel; None if that cannot be told just now."""

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

    async def list(self, entity_type: type[E], page: PageRequest) -> Page[E]:
        """One page of the entities of a kind, by id."""
        found = await self.office.store.list(
            self.account_id,
            KIND_OF[cast("type[Entity]", entity_type)],
            after=page.after_id(),
            limit=page.limit,
        )
        return page.page(cast("tuple[E, ...]", found), found[-1].id if found else None)

    async def create(self, entity: E) -> E:
        """Store a new entity and return it. What the store refuses becomes a Problem."""
        await self.apply(Put(entity))
        return entity

    async def update(self, entity_type: type[E], id: UUID, changes: dict[str, Any]) -> E:
        """Replace these fields. For checks that need the present entity see `revise`. What other
        nodes change at the same moment stays."""
        for attempts_left in reversed(range(UPDATE_ATTEMPTS)):
            try:
                async with self.revise(entity_type, id) as revision:
                    revision.changes = changes
            except Outdated:
                if not attempts_left:
                    raise
            else:
                return revision.entity
        raise AssertionError

    @asynccontextmanager
    async def revise(self, entity_type: type[E], id: UUID) -> AsyncIterator[Revision[E]]:
        """Read an entity, have its changes worked out by the body, write it back, unless another
        node was faster. Those of this node wait for one another. Raises Problem 404, Outdated."""
        async with self.office.writing(self.account_id):
            revision = Revision(await self.get(entity_type, id))
            yield revision
            before = revision.entity
            revision.entity = attrs.evolve(before, **revision.changes)
            await self.apply(Put(revision.entity, before))

    async def remove(self, kind: EntityKind, id: UUID) -> None:
        """Remove an entity and all that refers to it. Raises Problem 404."""
        try:
            await self.apply(Remove(kind, id))
        except NotFound:
            raise not_found(kind) from None

    async def apply(self, *mutations: Mutation) -> None:
        """Carry out mutations in one transaction, in the caller's name."""
        await self.office.store.apply(self.account_id, mutations, who=self.caller.who, at=self.now)


class Revision(Generic[E]):
    """An entity as it is, and the changes to be made; after the block, as it has become."""

    __slots__ = ("changes", "entity")

    def __init__(self, entity: E) -> None:
        self.entity = entity
        self.changes: dict[str, Any] = {}


async def provide_office(request: Request[Any, Any, Any]) -> Office:
    """What all handlers share."""
    office = request.app.state.office
    assert isinstance(office, Office)
    return office


async def provide_caller(request: Request[Any, Any, Any]) -> Caller:
    """Who calls, by the token of this request."""
    return caller_of(request)


async def provide_desk(
    request: Request[Any, Any, Any],
    office: NamedDependency[Office],
    caller: NamedDependency[Caller],
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
        return await desk_of(office, caller, caller.account_id)
    try:
        account_id = UUID(named)
    except ValueError:
        raise Problem(400, "account_required", f"{ACCOUNT_HEADER} must be an id.") from None
    return await desk_of(office, caller, account_id)


async def desk_of(office: Office, caller: Caller, account_id: UUID) -> Desk:
    """The desk of this account. Raises Problem 404 unless the caller may act on it."""
    if caller.account_id not in (None, account_id):
        raise not_found("account")
    try:
        account = await office.store.get(account_id, "account", account_id)
    except NotFound:
        raise not_found("account") from None
    assert isinstance(account, Account)
    return Desk(office=office, caller=caller, account=account)
