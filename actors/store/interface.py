"""`Store`: what the control plane needs of a database. Two implementations pass one suite of
model-based tests: `actors.store.memory.MemoryStore` (the reference, used by the simulator) and
`actors.store.postgres.PostgresStore`.

All methods are coroutines. Those of the memory store never suspend, so an event heap can run
them to the end in one step; those of PostgreSQL wait with trio. No method reads a clock or makes
an id: instants and ids come with the call.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Protocol
from uuid import UUID

import attrs

from actors.model import Account, Authorization, Change, Entity, EntityKind, Relay, Token
from runtime.cluster.leases import (
    ClusterFull,
    LeaseFenced,
    LeaseHeld,
    LeaseStore,
    LeaseUnavailable,
)

MAX_MUTATIONS = 1_000
MAX_PAGE = 1_000


class StoreError(Exception):
    """Base of what a store raises on purpose; anything else is a defect."""


class NotFound(StoreError):
    """The named entity does not exist in this account."""


class Conflict(StoreError):
    """A value that must be unique is taken (`field` names it)."""

    def __init__(self, kind: str, field: str) -> None:
        super().__init__(f"{kind}: {field} is taken")
        self.kind = kind
        self.field = field


class Outdated(StoreError):
    """The entity is not any more as the caller read it: another writer was faster, or removed it.
    To read it and decide anew is the way on."""


class InvalidReference(StoreError):
    """A field refers to an entity that this account does not have."""

    def __init__(self, kind: str, field: str) -> None:
        super().__init__(f"{kind}: {field} names nothing in this account")
        self.kind = kind
        self.field = field


class Invalid(StoreError):
    """A value that the model does not allow (`field` names it); see `actors.store.rules`."""

    def __init__(self, kind: str, field: str) -> None:
        super().__init__(f"{kind}: {field} is not valid")
        self.kind = kind
        self.field = field


class LastOperator(StoreError):
    """Without this token no operator could come in any more."""


class Fenced(StoreError, LeaseFenced):
    """The caller's time is over: its epoch is no longer the account's, or the lease of its node
    does not stand."""

    def __init__(self, reason: str, *, superseded: bool = False) -> None:
        super().__init__(reason)
        self.superseded = superseded


class Held(StoreError, LeaseHeld):
    """Another node owns the account, and lives."""

    def __init__(self, account_id: UUID, owner: str) -> None:
        super().__init__(f"account {account_id} is owned by node {owner}")
        self.owner = owner


class Full(StoreError, ClusterFull):
    """The cluster has as many living nodes as it may have."""


class Unavailable(StoreError, LeaseUnavailable):
    """The database cannot be reached now; nothing was changed as far as the caller may assume."""


@attrs.frozen
class Put:
    """Insert the entity, or replace the one that has its id. `account_id` and `id` never change.

    With `before`, replace that alone, as the caller read it: who writes back what it has read takes
    nobody's change back, whatever other nodes write meanwhile. Otherwise Outdated is raised."""

    entity: Entity
    before: Entity | None = None


@attrs.frozen
class Remove:
    """Remove an entity and, first, all that refers to it (see `model.REFERENCES`)."""

    kind: EntityKind
    id: UUID


Mutation = Put | Remove


@attrs.frozen
class Contents:
    """A consistent picture of one account: every entity, and the number of the last change."""

    account: Account
    entities: tuple[Entity, ...]
    number: int


class Store(LeaseStore, Protocol):
    """What the control plane keeps. Every method names its account, but for what is the
    installation's. Each may raise `Unavailable` besides what its own text names; what it answered
    is durable.

    The leases of nodes and accounts are `LeaseStore`'s, with the errors of this module; the keys
    are the ids of accounts, and `acquire` raises NotFound for an unknown one.
    """

    # --- accounts, entities, changes ---

    async def apply(
        self,
        account_id: UUID,
        mutations: Sequence[Mutation],
        *,
        who: str,
        at: datetime,
    ) -> tuple[Change, ...]:
        """Carry out all mutations in one transaction and return their changes in order.

        Serialised on the account's row, which numbers the changes (1, 2, ...). The first mutation
        of a new account is `Put(Account)`. A Put that changes nothing makes no change. Removing
        an account removes everything in it.
        Raises Conflict, Invalid, InvalidReference, NotFound, Outdated, Unavailable; then nothing
        was done.
        """

    async def get(self, account_id: UUID, kind: EntityKind, id: UUID) -> Entity:
        """One entity. Raises NotFound, also when it belongs to another account."""

    async def list(
        self, account_id: UUID, kind: EntityKind, *, after: UUID | None = None, limit: int = 100
    ) -> tuple[Entity, ...]:
        """At most `limit` (1 to MAX_PAGE) entities of one kind with ids above `after`, by id."""

    async def accounts(self, *, after: UUID | None = None, limit: int = 100) -> tuple[Account, ...]:
        """Accounts of the installation, by id. For operators only."""

    async def contents(self, account_id: UUID) -> Contents:
        """Everything in the account, consistent with one change number. Raises NotFound."""

    async def changes(
        self, account_id: UUID, *, after: int, limit: int = MAX_PAGE
    ) -> tuple[Change, ...]:
        """Changes with numbers above `after`, in order, without gaps."""

    def wakeups(self) -> AbstractAsyncContextManager[AsyncIterator[UUID]]:
        """Ids of accounts that changed. Only a hint: one can be lost or come twice, so whoever
        follows an account reads `changes` after the last number that it knows. After a lost
        connection every account counts as changed."""

    # --- tokens ---

    async def find_token(self, id: UUID) -> Token | None:
        """A token by its id, of whatever account, or of the installation."""

    async def use_token(self, id: UUID, *, at: datetime) -> bool:
        """Count one enrolment by this token; False (and not counted) when `max_uses` is reached."""

    async def put_installation_token(self, token: Token) -> None:
        """Insert a relay or operator token (`account_id` None). Raises Conflict."""

    async def installation_tokens(
        self, *, after: UUID | None = None, limit: int = 100
    ) -> tuple[Token, ...]:
        """Relay and operator tokens, by id. For operators only."""

    async def remove_installation_token(self, id: UUID, *, at: datetime) -> None:
        """Remove a relay or operator token, and the relays that joined by it.

        Raises NotFound, also for the token of an account; LastOperator for the token of an
        operator if there is no other that has not expired at `at`."""

    # --- authorisations ---

    async def write_authorization(self, authorization: Authorization, *, epoch: int) -> None:
        """Insert or replace, in one transaction with a check of the epoch: an owner that takes
        over waits for it. Raises Fenced, also after a release."""

    async def authorizations(
        self,
        account_id: UUID,
        *,
        live_at: datetime | None = None,
        after: UUID | None = None,
        limit: int = 100,
    ) -> tuple[Authorization, ...]:
        """Authorisations by id; with `live_at` only those neither ended nor expired then."""

    # --- relays of the installation ---

    async def put_relay(self, relay: Relay) -> None:
        """Insert, or replace the relay that has its id."""

    async def relays(self) -> tuple[Relay, ...]:
        """Every relay of the installation, by id."""
