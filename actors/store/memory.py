"""The reference store: everything in dictionaries, one transaction at a time.

It is the specification that the PostgreSQL store is tested against, and what the simulator uses.
No method but `wakeups` ever suspends, so an event heap runs each to its end in one step; whoever
has no event loop follows changes with `subscribe`. Nothing survives the process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import attrs
import trio

from actors.model import (
    ENTITIES,
    KIND_OF,
    REFERENCES,
    Account,
    Authorization,
    Change,
    Client,
    Entity,
    EntityKind,
    Gateway,
    Group,
    Relay,
    Token,
)
from actors.store.interface import (
    MAX_PAGE,
    Conflict,
    Contents,
    Fenced,
    Held,
    Invalid,
    InvalidReference,
    LastOperator,
    Mutation,
    NotFound,
    Outdated,
    Put,
    Remove,
)
from actors.store.memory_nodes import MemoryNodes
from actors.store.rules import (
    REFERRERS,
    REMOVAL_ORDER,
    UNIQUE,
    check_limit,
    check_mutations,
    validate,
)
from runtime.clock import Clock, SystemClock
from runtime.cluster.membership import check_node_name

T = TypeVar("T")


@attrs.define
class _Book:
    """One account. It outlives the account's removal: numbers and epochs never start again."""

    entities: dict[EntityKind, dict[UUID, Entity]] = attrs.field(
        factory=lambda: {kind: {} for kind in ENTITIES}
    )
    number: int = 0
    changes: list[Change] = attrs.Factory(list)
    epoch: int = 0
    owner: str = ""
    incarnation: int = 0
    authorizations: dict[UUID, Authorization] = attrs.Factory(dict)


class MemoryStore(MemoryNodes):
    """`actors.store.interface.Store` in memory. Not for use from several threads.

    `clock` is that of the nodes' leases: the machine's own unless a virtual world gives another."""

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__(clock or SystemClock())
        self._books: dict[UUID, _Book] = {}
        self._unique: dict[Hashable, UUID] = {}
        self._token_uses: dict[UUID, int] = {}
        self._token_accounts: dict[UUID, UUID] = {}
        self._installation_tokens: dict[UUID, Token] = {}
        self._relays: dict[UUID, Relay] = {}
        self._subscribers: list[Callable[[UUID], None]] = []

    # --- accounts, entities, changes ---

    async def apply(
        self, account_id: UUID, mutations: Sequence[Mutation], *, who: str, at: datetime
    ) -> tuple[Change, ...]:
        """See `Store.apply`."""
        check_mutations(mutations, who=who, at=at)
        if not mutations:
            return ()
        known = account_id in self._books
        book = self._books.setdefault(account_id, _Book())
        transaction = _Transaction(self, account_id, book, who, at)
        try:
            for mutation in mutations:
                transaction.carry_out(mutation)
        except BaseException:
            transaction.undo()
            if not known:
                del self._books[account_id]
            raise
        changes = tuple(transaction.changes)
        book.number += len(changes)
        book.changes.extend(changes)
        if any(change.kind == "account" and change.after is None for change in changes):
            book.authorizations.clear()
            book.epoch += 1 if book.epoch else 0
            book.owner = ""
        if changes:
            self._wake(account_id)
        return changes

    async def get(self, account_id: UUID, kind: EntityKind, id: UUID) -> Entity:
        """See `Store.get`."""
        entity = self._table(account_id, kind).get(id)
        if entity is None:
            raise NotFound(f"{kind} {id}")
        return entity

    async def list(
        self, account_id: UUID, kind: EntityKind, *, after: UUID | None = None, limit: int = 100
    ) -> tuple[Entity, ...]:
        """See `Store.list`."""
        return _page(self._table(account_id, kind), after, limit)

    async def accounts(self, *, after: UUID | None = None, limit: int = 100) -> tuple[Account, ...]:
        """See `Store.accounts`."""
        accounts = {id: account for id in self._books if (account := self._account(id))}
        return _page(accounts, after, limit)

    async def contents(self, account_id: UUID) -> Contents:
        """See `Store.contents`: the entities come kind by kind (as in ENTITIES), then by id."""
        account = self._account(account_id)
        if account is None:
            raise NotFound(f"account {account_id}")
        book = self._books[account_id]
        entities = tuple(
            book.entities[kind][id]
            for kind in ENTITIES
            if kind != "account"
            for id in sorted(book.entities[kind])
        )
        return Contents(account, entities, book.number)

    async def changes(
        self, account_id: UUID, *, after: int, limit: int = MAX_PAGE
    ) -> tuple[Change, ...]:
        """See `Store.changes`. The changes of a removed account stay; an unknown one has none."""
        check_limit(limit)
        book = self._books.get(account_id)
        start = max(after, 0)
        return tuple(book.changes[start : start + limit]) if book else ()

    def subscribe(self, changed: Callable[[UUID], None]) -> Callable[[], None]:
        """Call `changed` with the account's id after each transaction, at once and in its task.

        For hosts without trio. The function returned ends it."""
        self._subscribers.append(changed)
        return lambda: self._subscribers.remove(changed)

    @asynccontextmanager
    async def wakeups(self) -> AsyncIterator[AsyncIterator[UUID]]:
        """See `Store.wakeups`. At first every known account comes once."""
        pending = dict.fromkeys(self._books)
        more = trio.Event()

        def changed(account_id: UUID) -> None:
            pending[account_id] = None
            more.set()

        async def follow() -> AsyncIterator[UUID]:
            nonlocal more
            while True:
                await trio.lowlevel.checkpoint()
                while pending:
                    account_id = next(iter(pending))
                    del pending[account_id]
                    yield account_id
                more = trio.Event()
                await more.wait()

        unsubscribe = self.subscribe(changed)
        try:
            yield follow()
        finally:
            unsubscribe()

    # --- tokens ---

    async def find_token(self, id: UUID) -> Token | None:
        """See `Store.find_token`."""
        account_id = self._token_accounts.get(id)
        if account_id is None:
            return self._installation_tokens.get(id)
        token = self._books[account_id].entities["token"][id]
        assert isinstance(token, Token)
        return token

    async def use_token(self, id: UUID, *, at: datetime) -> bool:
        """See `Store.use_token`. False also for a token that does not exist."""
        token = await self.find_token(id)
        uses = self._token_uses.get(id, 0)
        if token is None or (token.max_uses is not None and uses >= token.max_uses):
            return False
        self._token_uses[id] = uses + 1
        return True

    async def put_installation_token(self, token: Token) -> None:
        """See `Store.put_installation_token`. Raises Invalid for the token of an account."""
        validate(token)
        if token.account_id is not None:
            raise Invalid("token", "account_id")
        if await self.find_token(token.id) is not None:
            raise Conflict("token", "id")
        self._installation_tokens[token.id] = token

    async def installation_tokens(
        self, *, after: UUID | None = None, limit: int = 100
    ) -> tuple[Token, ...]:
        """See `Store.installation_tokens`."""
        return _page(self._installation_tokens, after, limit)

    async def remove_installation_token(self, id: UUID, *, at: datetime) -> None:
        """See `Store.remove_installation_token`."""
        token = self._installation_tokens.get(id)
        if token is None:
            raise NotFound(f"token {id}")
        if token.kind == "operator" and not any(
            each.kind == "operator" and each is not token and not _has_expired(each, at)
            for each in self._installation_tokens.values()
        ):
            raise LastOperator(f"token {id}")
        del self._installation_tokens[id]
        self._token_uses.pop(id, None)
        self._relays = {key: each for key, each in self._relays.items() if each.token_id != id}

    # --- leases of accounts ---

    async def acquire(self, key: UUID, *, owner: str, incarnation: int) -> int:
        """See `LeaseStore.acquire`. Raises NotFound, Fenced, Held."""
        check_node_name(owner)
        if self._account(key) is None:
            raise NotFound(f"account {key}")
        if not self._stands(owner, incarnation):
            raise self._is_over(owner, incarnation)
        book = self._books[key]
        if book.owner != owner and self._stands(book.owner, book.incarnation):
            raise Held(key, book.owner)
        if book.owner != owner:
            await self.expel_node(book.owner, book.incarnation)
        book.epoch += 1
        book.owner, book.incarnation = owner, incarnation
        return book.epoch

    async def release(self, key: UUID, *, owner: str, incarnation: int) -> None:
        """See `LeaseStore.release`."""
        book = self._books.get(key)
        if book is not None and (book.owner, book.incarnation) == (owner, incarnation):
            book.owner = ""

    # --- authorisations ---

    async def write_authorization(self, authorization: Authorization, *, epoch: int) -> None:
        """See `Store.write_authorization`. A removed account has no owner: Fenced."""
        validate(authorization)
        book = self._books.get(authorization.account_id)
        if book is None or book.epoch != epoch or not book.owner:
            raise Fenced(f"epoch {epoch} of account {authorization.account_id} is over")
        book.authorizations[authorization.id] = authorization

    async def authorizations(
        self,
        account_id: UUID,
        *,
        live_at: datetime | None = None,
        after: UUID | None = None,
        limit: int = 100,
    ) -> tuple[Authorization, ...]:
        """See `Store.authorizations`."""
        book = self._books.get(account_id)
        every = book.authorizations if book else {}
        live = {id: each for id, each in every.items() if _is_live(each, live_at)}
        return _page(live, after, limit)

    # --- relays of the installation ---

    async def put_relay(self, relay: Relay) -> None:
        """See `Store.put_relay`. Raises InvalidReference unless a relay token has its token_id."""
        validate(relay)
        token = self._installation_tokens.get(relay.token_id)
        if token is None or token.kind != "relay":
            raise InvalidReference("relay", "token_id")
        self._relays[relay.id] = relay

    async def relays(self) -> tuple[Relay, ...]:
        """See `Store.relays`."""
        return tuple(self._relays[id] for id in sorted(self._relays))

    # --- helpers ---

    def _table(self, account_id: UUID, kind: EntityKind) -> dict[UUID, Entity]:
        book = self._books.get(account_id)
        return book.entities[kind] if book else {}

    def _account(self, account_id: UUID) -> Account | None:
        account = self._table(account_id, "account").get(account_id)
        assert account is None or isinstance(account, Account)
        return account

    def _wake(self, account_id: UUID) -> None:
        for changed in tuple(self._subscribers):
            changed(account_id)


class _Transaction:
    """The mutations of one `apply`, and how to undo each step."""

    def __init__(
        self, store: MemoryStore, account_id: UUID, book: _Book, who: str, at: datetime
    ) -> None:
        self.changes: list[Change] = []
        self._store = store
        self._account_id = account_id
        self._book = book
        self._who = who
        self._at = at
        self._undo: list[Callable[[], None]] = []

    def carry_out(self, mutation: Mutation) -> None:
        match mutation:
            case Put(entity=entity, before=before):
                self._put(entity, before)
            case Remove(kind=kind, id=id):
                if id not in self._book.entities[kind]:
                    raise NotFound(f"{kind} {id}")
                self._remove(kind, id)

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _put(self, entity: Entity, expected: Entity | None) -> None:
        owner = entity.id if isinstance(entity, Account) else entity.account_id
        if owner != self._account_id:
            raise ValueError("an entity belongs to the account that it is put into")
        accounts = self._book.entities["account"]
        if not accounts and not isinstance(entity, Account):
            raise NotFound(f"account {self._account_id}")
        kind = KIND_OF[type(entity)]
        before = self._book.entities[kind].get(entity.id)
        if before == entity:
            return
        if expected is not None and before != expected:
            raise Outdated(f"{kind} {entity.id}")
        unique = self._store._unique
        for key in _unique_keys(before) if before else ():
            self._delete(unique, key)
        if isinstance(entity, Token) and entity.id in self._store._installation_tokens:
            raise Conflict("token", "id")
        addresses = _address_keys(entity)
        for key, field in _unique_keys(entity).items():
            if key not in addresses:
                self._claim(kind, key, field, entity.id)
        self._check_references(kind, entity)
        self._check_ranges(entity)
        for key, field in addresses.items():
            self._claim(kind, key, field, entity.id)
        if isinstance(entity, Token):
            self._set(self._store._token_accounts, entity.id, self._account_id)
        self._set(self._book.entities[kind], entity.id, entity)
        self._record(kind, entity.id, before, entity)

    def _claim(self, kind: EntityKind, key: Hashable, field: str, id: UUID) -> None:
        if key in self._store._unique:
            raise Conflict(kind, field)
        self._set(self._store._unique, key, id)

    def _check_references(self, kind: EntityKind, entity: Entity) -> None:
        for field, target in REFERENCES.get(kind, {}).items():
            id = getattr(entity, field)
            if id is not None and id not in self._book.entities[target]:
                raise InvalidReference(kind, field)

    def _check_ranges(self, entity: Entity) -> None:
        """Every tunnel address lies in the account's ranges, whichever of the two changes."""
        if isinstance(entity, Account):
            for kind in ("client", "gateway"):
                for each in self._book.entities[kind].values():
                    for field in _fields_out_of_range(each, entity):
                        raise Invalid("account", f"range_{field}")
            return
        account = self._book.entities["account"][self._account_id]
        for field in _fields_out_of_range(entity, account):
            raise Invalid(KIND_OF[type(entity)], field)

    def _remove(self, kind: EntityKind, id: UUID) -> None:
        if kind == "account":
            for each in REMOVAL_ORDER[:-1]:
                for other in sorted(self._book.entities[each]):
                    self._remove(each, other)
        for referrer, field in REFERRERS[kind]:
            table = self._book.entities[referrer]
            for other in sorted(key for key, each in table.items() if getattr(each, field) == id):
                if other in table:
                    self._remove(referrer, other)
        entity = self._book.entities[kind][id]
        for key in _unique_keys(entity):
            self._delete(self._store._unique, key)
        if isinstance(entity, Token):
            self._delete(self._store._token_accounts, id)
            if id in self._store._token_uses:
                self._delete(self._store._token_uses, id)
        self._delete(self._book.entities[kind], id)
        self._record(kind, id, entity, None)

    def _record(
        self, kind: EntityKind, id: UUID, before: Entity | None, after: Entity | None
    ) -> None:
        number = self._book.number + len(self.changes) + 1
        self.changes.append(
            Change(
                account_id=self._account_id,
                number=number,
                at=self._at,
                who=self._who,
                kind=kind,
                entity_id=id,
                before=before,
                after=after,
            )
        )

    def _set(self, table: dict[Any, Any], key: Hashable, value: object) -> None:
        if key in table:
            old = table[key]
            self._undo.append(lambda: table.__setitem__(key, old))
        else:
            self._undo.append(lambda: table.__delitem__(key))
        table[key] = value

    def _delete(self, table: dict[Any, Any], key: Hashable) -> None:
        old = table.pop(key)
        self._undo.append(lambda: table.__setitem__(key, old))


def _unique_keys(entity: Entity) -> dict[Hashable, str]:
    """What no other entity may have, each with the field that a conflict names."""
    kind = KIND_OF[type(entity)]
    scope = None if isinstance(entity, Account) else entity.account_id
    keys: dict[Hashable, str] = {
        (scope, kind, *fields, *(getattr(entity, field) for field in fields)): fields[-1]
        for fields in UNIQUE.get(kind, ())
    }
    if isinstance(entity, Token):
        keys["token", entity.id] = "id"
    if isinstance(entity, Group) and entity.kind == "everyone":
        keys[scope, "group", "everyone"] = "kind"
    return keys | _address_keys(entity)


def _address_keys(entity: Entity) -> dict[Hashable, str]:
    if not isinstance(entity, (Client, Gateway)):
        return {}
    return {
        (entity.account_id, entity.ipv4): "ipv4",
        (entity.account_id, entity.ipv6): "ipv6",
    }


def _fields_out_of_range(entity: Entity, account: Entity) -> Iterator[str]:
    assert isinstance(account, Account)
    if isinstance(entity, (Client, Gateway)):
        if entity.ipv4 not in account.range_ipv4:
            yield "ipv4"
        if entity.ipv6 not in account.range_ipv6:
            yield "ipv6"


def _is_live(authorization: Authorization, at: datetime | None) -> bool:
    if at is None:
        return True
    return authorization.ended_at is None and authorization.expires_at > at


def _has_expired(token: Token, at: datetime) -> bool:
    return token.expires_at is not None and token.expires_at <= at


def _page(table: dict[UUID, T], after: UUID | None, limit: int) -> tuple[T, ...]:
    check_limit(limit)
    ids = sorted(id for id in table if after is None or id > after)
    return tuple(table[id] for id in ids[:limit])
