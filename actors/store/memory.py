"""The reference store: everything in dictionaries, one transaction at a time.

It is the specification that the PostgreSQL store is tested against, and what the simulator uses.
No method but `wakeups` ever suspends, so an event heap runs each to its end in one step; whoever
has no event loop follows changes with `subscribe`. Nothing survives the process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from itertools import islice
from typing import TypeVar
from uuid import UUID

import trio

from actors.model import (
    ENTITIES,
    Account,
    Authorization,
    Change,
    Entity,
    EntityKind,
    Relay,
    Token,
)
from actors.store.interface import (
    MAX_PAGE,
    NO_FILTER,
    Answer,
    Conflict,
    Contents,
    Equals,
    Fenced,
    Held,
    Invalid,
    InvalidReference,
    LastOperator,
    Mutation,
    NotFound,
    Outdated,
    Pruned,
)
from actors.store.memory_records import MemoryRecords
from actors.store.memory_transaction import Book, Transaction, check_answer
from actors.store.rules import check_limit, check_mutations, without_secrets
from actors.store.validity import validate
from runtime.clock import Clock, SystemClock
from runtime.cluster.membership import check_node_name

T = TypeVar("T")


class MemoryStore(MemoryRecords):
    """`actors.store.interface.Store` in memory. Not for use from several threads.

    `clock` is that of the nodes' leases: the machine's own unless a virtual world gives another."""

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__(clock or SystemClock())
        self._relays: dict[UUID, Relay] = {}
        self._fingerprints: dict[int, bytes] = {}
        self._subscribers: list[Callable[[UUID], None]] = []

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
        """See `Store.apply`."""
        check_mutations(mutations, who=who, at=at, answer=answer)
        if not mutations:
            return ()
        known = account_id in self._books
        book = self._books.setdefault(account_id, Book())
        transaction = Transaction(self._tables, account_id, book, who, at)
        try:
            if answer is not None:
                transaction.keep(answer)
            if number is not None and book.number != number:
                raise Outdated(f"account {account_id} is at change {book.number}")
            for mutation in mutations:
                transaction.carry_out(mutation)
            transaction.finish()
            if answer is not None and tell is not None:
                transaction.retell(answer, tell(book.number + len(transaction.changes)))
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
        self,
        account_id: UUID,
        kind: EntityKind,
        *,
        after: UUID | None = None,
        limit: int = 100,
        equals: Equals = NO_FILTER,
    ) -> tuple[Entity, ...]:
        """See `Store.list`."""
        return _page(self._table(account_id, kind), after, limit, equals)

    async def accounts(
        self, *, after: UUID | None = None, limit: int = 100, equals: Equals = NO_FILTER
    ) -> tuple[Account, ...]:
        """See `Store.accounts`."""
        accounts = {id: account for id in self._books if (account := self._account(id))}
        return _page(accounts, after, limit, equals)

    async def contents(self, account_id: UUID) -> Contents:
        """See `Store.contents`: the entities come kind by kind (as in ENTITIES), then by id."""
        account = self._account(account_id)
        if account is None:
            raise NotFound(f"account {account_id}")
        book = self._books[account_id]
        entities = tuple(
            without_secrets(book.entities[kind][id])
            for kind in ENTITIES
            if kind != "account"
            for id in sorted(book.entities[kind])
        )
        return Contents(account, entities, book.number)

    async def counts(self, account_id: UUID) -> dict[EntityKind, int]:
        """See `Store.counts`."""
        return {kind: len(self._table(account_id, kind)) for kind in ENTITIES}

    async def count(self, account_id: UUID, kind: EntityKind) -> int:
        """See `Store.count`."""
        return len(self._table(account_id, kind))

    async def changes(
        self, account_id: UUID, *, after: int, limit: int = MAX_PAGE, equals: Equals = NO_FILTER
    ) -> tuple[Change, ...]:
        """See `Store.changes`. The changes of a removed account stay; an unknown one has none."""
        check_limit(limit)
        book = self._books.get(account_id)
        if book is None:
            return ()
        start = max(after, 0) - book.pruned
        if start < 0:
            raise Pruned(account_id, book.pruned)
        if not equals:
            return tuple(book.changes[start : start + limit])
        found = (change for change in book.changes[start:] if matches(change, equals))
        return tuple(islice(found, limit))

    async def last_number(self, account_id: UUID) -> int:
        """See `Store.last_number`."""
        book = self._books.get(account_id)
        return book.number if book else 0

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

    async def put_installation_token(self, token: Token, *, answer: Answer | None = None) -> None:
        """See `Store.put_installation_token`. Raises Invalid for the token of an account."""
        validate(token)
        if token.account_id is not None:
            raise Invalid("token", "account_id")
        if answer is not None:
            check_answer(self._tables, answer)
        if await self.find_token(token.id) is not None:
            raise Conflict("token", "id")
        self._tables.installation_tokens[token.id] = token
        if answer is not None:
            self._tables.answers[answer.token_id, answer.key] = answer

    async def installation_tokens(
        self, *, after: UUID | None = None, limit: int = 100, equals: Equals = NO_FILTER
    ) -> tuple[Token, ...]:
        """See `Store.installation_tokens`."""
        return _page(self._tables.installation_tokens, after, limit, equals)

    async def remove_installation_token(self, id: UUID, *, at: datetime) -> None:
        """See `Store.remove_installation_token`."""
        token = self._tables.installation_tokens.get(id)
        if token is None:
            raise NotFound(f"token {id}")
        if token.kind == "operator" and not any(
            each.kind == "operator" and each is not token and not _has_expired(each, at)
            for each in self._tables.installation_tokens.values()
        ):
            raise LastOperator(f"token {id}")
        del self._tables.installation_tokens[id]
        self._tables.token_uses.pop(id, None)
        self._tables.token_used_at.pop(id, None)
        for key in [key for key in self._tables.answers if key[0] == id]:
            del self._tables.answers[key]
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
        equals: Equals = NO_FILTER,
    ) -> tuple[Authorization, ...]:
        """See `Store.authorizations`."""
        book = self._books.get(account_id)
        every = book.authorizations if book else {}
        live = {id: each for id, each in every.items() if _is_live(each, live_at)}
        return _page(live, after, limit, equals)

    # --- the installation ---

    async def check_keys(self, fingerprints: Mapping[int, bytes]) -> None:
        """See `Store.check_keys`."""
        for key_id, fingerprint in fingerprints.items():
            if self._fingerprints.get(key_id, fingerprint) != fingerprint:
                raise Conflict("encryption_key", "id")
        self._fingerprints.update(fingerprints)

    async def put_relay(self, relay: Relay) -> None:
        """See `Store.put_relay`. Raises InvalidReference unless a relay token has its token_id."""
        validate(relay)
        token = self._tables.installation_tokens.get(relay.token_id)
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


def _is_live(authorization: Authorization, at: datetime | None) -> bool:
    if at is None:
        return True
    return authorization.ended_at is None and authorization.expires_at > at


def _has_expired(token: Token, at: datetime) -> bool:
    return token.expires_at is not None and token.expires_at <= at


def matches(value: object, equals: Equals) -> bool:
    """Whether all these fields have these values, or have them among others."""
    for field, wanted in equals.items():
        content = getattr(value, field)
        if content != wanted and not (isinstance(content, tuple) and wanted in content):
            return False
    return True


def _page(table: dict[UUID, T], after: UUID | None, limit: int, equals: Equals) -> tuple[T, ...]:
    check_limit(limit)
    ids = sorted(
        id for id, each in table.items() if (after is None or id > after) and matches(each, equals)
    )
    return tuple(table[id] for id in ids[:limit])
