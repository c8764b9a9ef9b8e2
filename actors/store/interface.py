"""`Store`: what the control plane needs of a database. Two implementations pass one suite of
model-based tests: `actors.store.memory.MemoryStore` (the reference, used by the simulator) and
`actors.store.postgres.PostgresStore`.

All methods are coroutines. Those of the memory store never suspend, so an event heap can run
them to the end in one step; those of PostgreSQL wait with trio. No method reads a clock or makes
an id: instants and ids come with the call.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from typing import Annotated, Final, Protocol
from uuid import UUID

import attrs
from msgspec import Meta

from actors.logs import Log, LogKind, Seen
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
MAX_LOGS = 1_000
MAX_IDS = 1_000
MAX_KEY = 255
MAX_ANSWER_BYTES = 65_536
ANSWER_KEPT: Final = timedelta(hours=24)


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


class Pruned(StoreError):
    """Changes after the number that was asked for are not kept any more. Whoever follows the
    account has to read its `contents` anew; `number` is the last one that is gone."""

    def __init__(self, account_id: UUID, number: int) -> None:
        super().__init__(
            f"the changes of account {account_id} up to {number} are not kept any more"
        )
        self.number = number


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


class TooMany(StoreError):
    """More entities of a kind would have the same value in `field` than the account's `limit`."""

    def __init__(self, kind: str, field: str, limit: int) -> None:
        super().__init__(f"{kind}: at most {limit} of one {field}")
        self.kind = kind
        self.field = field
        self.limit = limit


class Repeated(StoreError):
    """The key was used before, within ANSWER_KEPT; `record` is what was answered then."""

    def __init__(self, record: Answer) -> None:
        super().__init__("the idempotency key was used before")
        self.record = record


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


class StorageFull(Unavailable):
    """The database has no room to write: what only reads goes on. Nothing was changed."""


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

Equals = Mapping[str, object]
"""Values that fields have to have. A field with several values has to have it among them."""
NO_FILTER: Final[Equals] = {}


@attrs.frozen(kw_only=True)
class Answer:
    """What the API answered to the holder of a token who gave this idempotency key.

    `request_hash` tells the same request from another one under the same key. `body` is JSON and
    never holds a secret.
    """

    token_id: UUID
    key: Annotated[str, Meta(min_length=1, max_length=MAX_KEY, pattern=r"^[!-~]+$(?!\n)")] = (
        attrs.field(repr=False)
    )
    request_hash: Annotated[bytes, Meta(min_length=32, max_length=32)] = attrs.field(repr=False)
    status: Annotated[int, Meta(ge=100, le=599)]
    body: Annotated[bytes, Meta(max_length=MAX_ANSWER_BYTES)] = attrs.field(repr=False)
    at: datetime


@attrs.frozen(kw_only=True)
class Expired:
    """What `expire` removed: rows by what they are, and whole partitions of logs (whose rows are
    in no other figure)."""

    changes: int = 0
    authorizations: int = 0
    logs: int = 0
    answers: int = 0
    partitions: int = 0


@attrs.frozen
class Contents:
    """A consistent picture of one account: every entity, and the number of the last change. Of a
    sealed secret it says only that there is one, as changes do."""

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
        number: int | None = None,
        answer: Answer | None = None,
        tell: Callable[[int], bytes] | None = None,
    ) -> tuple[Change, ...]:
        """Carry out all mutations in one transaction and return their changes in order.

        Serialised on the account's row, which numbers the changes (1, 2, ...). The first mutation
        of a new account is `Put(Account)`. A Put that changes nothing makes no change. Removing
        an account removes everything in it. Changes hold no sealed secret: its box is empty.

        `number`: only if the account's last change is this one (0 for none), else Outdated.
        `answer`: kept with the mutations under (token_id, key), which must be free or older than
        ANSWER_KEPT, else Repeated. It goes with its token. Where both speak, Repeated does first.
        `tell` makes its body of the number of the last change, where it depends on that.

        Raises Conflict, Invalid, InvalidReference, NotFound, Outdated, Repeated, TooMany,
        Unavailable; then nothing was done. TooMany judges what all mutations together leave, and
        only what gained by them.
        """

    async def answer_of(self, token_id: UUID, key: str) -> Answer | None:
        """What was answered under this key, until `expire` removes it (its `at` says how old it
        is)."""

    async def get(self, account_id: UUID, kind: EntityKind, id: UUID) -> Entity:
        """One entity. Raises NotFound, also when it belongs to another account."""

    async def list(
        self,
        account_id: UUID,
        kind: EntityKind,
        *,
        after: UUID | None = None,
        limit: int = 100,
        equals: Equals = NO_FILTER,
    ) -> tuple[Entity, ...]:
        """At most `limit` (1 to MAX_PAGE) entities of one kind with ids above `after`, by id: those
        whose fields have these values, or have them among others."""

    async def accounts(
        self, *, after: UUID | None = None, limit: int = 100, equals: Equals = NO_FILTER
    ) -> tuple[Account, ...]:
        """Accounts of the installation, by id. For operators only."""

    async def contents(self, account_id: UUID) -> Contents:
        """Everything in the account, consistent with one change number. Raises NotFound."""

    async def counts(self, account_id: UUID) -> dict[EntityKind, int]:
        """How many entities of each kind the account has; zeros if there is no such account."""

    async def count(self, account_id: UUID, kind: EntityKind) -> int:
        """How many entities of one kind the account has; 0 if there is no such account."""

    async def changes(
        self, account_id: UUID, *, after: int, limit: int = MAX_PAGE, equals: Equals = NO_FILTER
    ) -> tuple[Change, ...]:
        """Changes with numbers above `after`, in order, without gaps (but for those that `equals`
        leaves out); fewer than `limit` only where there are no more. Raises Pruned when the next
        one is not kept any more."""

    async def last_number(self, account_id: UUID) -> int:
        """The number of the account's last change; 0 if there never was one."""

    def wakeups(self) -> AbstractAsyncContextManager[AsyncIterator[UUID]]:
        """Ids of accounts that changed. Only a hint: one can be lost or come twice, so whoever
        follows an account reads `changes` after the last number that it knows. After a lost
        connection every account counts as changed."""

    # --- tokens ---

    async def find_token(self, id: UUID) -> Token | None:
        """A token by its id, of whatever account, or of the installation."""

    async def use_token(self, id: UUID, *, at: datetime) -> bool:
        """Count one enrolment by this token; False (and not counted) when `max_uses` is reached."""

    async def note_used(self, id: UUID, *, at: datetime) -> None:
        """Remember that a token was used, without counting an enrolment. Nothing happens when it
        was used later, or is gone."""

    async def last_used(
        self, account_id: UUID | None, ids: Collection[UUID]
    ) -> dict[UUID, datetime]:
        """When each of these tokens of the account (None: of the installation) was last used; those
        that never were are left out. At most MAX_IDS."""

    async def put_installation_token(self, token: Token, *, answer: Answer | None = None) -> None:
        """Insert a relay or operator token (`account_id` None); the answer is kept as by `apply`.
        Raises Conflict, Repeated."""

    async def installation_tokens(
        self, *, after: UUID | None = None, limit: int = 100, equals: Equals = NO_FILTER
    ) -> tuple[Token, ...]:
        """Relay and operator tokens, by id. For operators only."""

    async def remove_installation_token(self, id: UUID, *, at: datetime) -> None:
        """Remove a relay or operator token, and the relays that joined by it.

        Raises NotFound, also for the token of an account; LastOperator for the token of an
        operator if there is no other that has not expired at `at`."""

    # --- devices ---

    async def note_seen(self, account_id: UUID, seen: Sequence[Seen]) -> None:
        """Remember when clients and gateways were last connected, each named once, at most MAX_IDS.
        Nothing happens to one that was seen later, or is gone. Raises Invalid, ValueError."""

    async def seen(self, account_id: UUID, ids: Collection[UUID]) -> dict[UUID, Seen]:
        """When each of these devices was last connected; those that never were are left out. At
        most MAX_IDS."""

    # --- logs ---

    async def write_logs(self, rows: Sequence[Log]) -> None:
        """Append at most MAX_LOGS rows, all or none. A row that is there is left as it is, so the
        call may be made again. Raises Invalid, InvalidReference for an account that never was."""

    async def logs(
        self,
        account_id: UUID,
        kind: LogKind,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        equals: Mapping[str, UUID] | None = None,
        before: UUID | None = None,
        limit: int = 100,
    ) -> tuple[Log, ...]:
        """Rows with ids below `before`, by id, the newest first, written from `since` up to, not
        including, `until`. `equals` may name the fields of LOG_FILTERS, else ValueError."""

    async def expire(self, at: datetime) -> Expired:
        """Remove what is older at `at` than its account keeps it (`Retention`): logs, changes, and
        authorisations that have ended; and answers older than ANSWER_KEPT. Logs and authorisations
        of a removed account go at once, its changes after the default time.

        To be called about once an hour by one node; twice at once does no harm. It may take long:
        every step is a short transaction of its own, so what was removed before an error stays so.
        """

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
        equals: Equals = NO_FILTER,
    ) -> tuple[Authorization, ...]:
        """Authorisations by id; with `live_at` only those neither ended nor expired then."""

    # --- the installation ---

    async def check_keys(self, fingerprints: Mapping[int, bytes]) -> None:
        """Remember the fingerprint (32 bytes) of each encryption key by its number, for ever.
        Raises Conflict, and remembers none, when a number stands for another key already."""

    async def put_relay(self, relay: Relay) -> None:
        """Insert, or replace the relay that has its id."""

    async def relays(self) -> tuple[Relay, ...]:
        """Every relay of the installation, by id."""
