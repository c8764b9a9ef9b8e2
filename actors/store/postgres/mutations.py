"""How `apply` works inside its transaction: lock, mutate, number, log.

The account's row in `account_sequence` is locked first. So transactions of one account follow one
another, the numbers that they give are the order of their commits, and what one reads of the
account cannot change under it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, LiteralString
from uuid import UUID

import attrs

from actors.model import ENTITIES, KIND_OF, Account, Change, Entity, EntityKind
from actors.store.codec import from_json, to_json
from actors.store.interface import (
    ANSWER_KEPT,
    Answer,
    Mutation,
    NotFound,
    Outdated,
    Pruned,
    Put,
    Repeated,
)
from actors.store.postgres.connection import TrioConnection
from actors.store.postgres.mapping import TABLES
from actors.store.rules import (
    HOLDERS,
    REFERRERS,
    REMOVAL_ORDER,
    check_policies,
    gains_policy,
    without_member,
    without_secrets,
)
from actors.store.validity import validate

# In one statement, so that what it finds and how far the changes are pruned belong together.
_CHANGES: LiteralString = """
SELECT pruned, found.* FROM account_sequence LEFT JOIN LATERAL (
    SELECT account_id, number, at, who, kind, entity_id, before, after FROM change
    WHERE change.account_id = account_sequence.account_id AND number > %s
"""
_END_OF_CHANGES: LiteralString = """
    ORDER BY number LIMIT %s
) found ON true
WHERE account_sequence.account_id = %s ORDER BY found.number
"""
_CHANGE_HAS: dict[str, LiteralString] = {
    "kind": " AND kind = %s",
    "entity_id": " AND entity_id = %s",
    "who": " AND who = %s",
}
SELECT_ANSWER: LiteralString = (
    "SELECT token_id, key, request_hash, status, body, at FROM answer"
    " WHERE token_id = %s AND key = %s"
)
_KEEP: LiteralString = """
INSERT INTO answer (token_id, key, request_hash, status, body, at) VALUES (%s, %s, %s, %s, %s, %s)
ON CONFLICT (token_id, key) DO UPDATE SET request_hash = excluded.request_hash,
    status = excluded.status, body = excluded.body, at = excluded.at
WHERE answer.at <= %s RETURNING key
"""
_RETELL: LiteralString = "UPDATE answer SET body = %s WHERE token_id = %s AND key = %s"
_COUNT_POLICIES: LiteralString = (
    "SELECT count(*) FROM policy WHERE account_id = %s AND resource_id = %s"
)
_INSERT_CHANGE: LiteralString = (
    "INSERT INTO change (account_id, number, at, who, kind, entity_id, before, after)"
    " VALUES (%s, %s, %s, %s, %s, %s, %s, %s)"
)


def select_changes(fields: tuple[str, ...]) -> LiteralString:
    """Changes that have given values in these fields. Parameters: after, the values, limit,
    account. Raises KeyError for another field."""
    query = _CHANGES
    for field in fields:
        query += _CHANGE_HAS[field]
    return query + _END_OF_CHANGES


def changes_of(rows: Sequence[Sequence[Any]], account_id: UUID, after: int) -> tuple[Change, ...]:
    """What the rows of `select_changes` hold. Raises Pruned."""
    for pruned, *_ in rows:
        if max(after, 0) < pruned:
            raise Pruned(account_id, pruned)
    return tuple(_change_of(row[1:]) for row in rows if row[1] is not None)


def _change_of(row: Sequence[Any]) -> Change:
    account_id, number, at, who, kind, entity_id, before, after = row
    as_type = ENTITIES[kind]
    return Change(
        account_id=account_id,
        number=number,
        at=at.astimezone(UTC),
        who=who,
        kind=kind,
        entity_id=entity_id,
        before=None if before is None else from_json(before, as_type),
        after=None if after is None else from_json(after, as_type),
    )


async def apply_mutations(
    connection: TrioConnection,
    account_id: UUID,
    mutations: Sequence[Mutation],
    who: str,
    at: datetime,
    expected: int | None,
    answer: Answer | None,
    tell: Callable[[int], bytes] | None,
) -> tuple[Change, ...]:
    """Carry out checked mutations in the open transaction, if `expected` (a number that is not
    None) is that of the last change. Raises NotFound, Outdated, Repeated, TooMany, psycopg.Error.
    """
    number = await _lock(connection, account_id)
    if answer is not None:
        await keep(connection, answer)
    if expected not in (None, number):
        raise Outdated(f"account {account_id} is at change {number}")
    work = _Work(connection, account_id, number, who, at)
    for mutation in mutations:
        await work.carry_out(mutation)
    await work.finish()
    if work.changes:
        await work.log()
    if answer is not None and tell is not None:
        told = attrs.evolve(answer, body=tell(number + len(work.changes)))
        validate(told)
        await connection.execute(_RETELL, [told.body, told.token_id, told.key])
    return tuple(work.changes)


async def _lock(connection: TrioConnection, account_id: UUID) -> int:
    """Lock the account's row, made if need be, and return the last number given."""
    query: LiteralString = (
        "SELECT number FROM account_sequence WHERE account_id = %s FOR NO KEY UPDATE"
    )
    row = await (await connection.execute(query, [account_id])).fetchone()
    if row is None:
        await connection.execute(
            "INSERT INTO account_sequence VALUES (%s, 0) ON CONFLICT DO NOTHING", [account_id]
        )
        row = await (await connection.execute(query, [account_id])).fetchone()
    assert row is not None
    return int(row[0])


async def keep(connection: TrioConnection, answer: Answer) -> None:
    """Keep what is about to be answered, in place of an answer that is too old to count."""
    values = [answer.token_id, answer.key, answer.request_hash, answer.status, answer.body]
    parameters = [*values, answer.at, answer.at - ANSWER_KEPT]
    if await (await connection.execute(_KEEP, parameters)).fetchone() is None:
        cursor = await connection.execute(SELECT_ANSWER, [answer.token_id, answer.key])
        row = await cursor.fetchone()
        assert row is not None
        raise Repeated(answer_of(row))


def answer_of(row: Sequence[Any]) -> Answer:
    """What a row of `SELECT_ANSWER` holds."""
    token_id, key, request_hash, status, body, at = row
    return Answer(
        token_id=token_id,
        key=key,
        request_hash=request_hash,
        status=status,
        body=body,
        at=at.astimezone(UTC),
    )


class _Work:
    """The mutations of one transaction."""

    def __init__(
        self, connection: TrioConnection, account_id: UUID, number: int, who: str, at: datetime
    ) -> None:
        self.changes: list[Change] = []
        self._connection = connection
        self._account_id = account_id
        self._number = number
        self._who = who
        self._at = at
        self._account_exists = False
        self._with_more_policies: set[UUID] = set()

    async def carry_out(self, mutation: Mutation) -> None:
        if isinstance(mutation, Put):
            await self._put(mutation.entity, mutation.before)
            return
        entities = await self._find(mutation.kind, "id", mutation.id)
        if not entities:
            raise NotFound(f"{mutation.kind} {mutation.id}")
        await self._remove(mutation.kind, entities[0])

    async def finish(self) -> None:
        """What is judged by the state that all mutations together leave. Raises TooMany."""
        if not self._with_more_policies:
            return
        for account in await self._find("account", "id", self._account_id):
            assert isinstance(account, Account)
            for id in sorted(self._with_more_policies):
                cursor = await self._connection.execute(_COUNT_POLICIES, [self._account_id, id])
                row = await cursor.fetchone()
                assert row is not None
                check_policies(account, row[0])

    async def log(self) -> None:
        """Write the changes and the new number; its trigger wakes the feed at the commit."""
        async with self._connection.cursor() as cursor:
            await cursor.executemany(_INSERT_CHANGE, [_row_of(change) for change in self.changes])
        await self._connection.execute(
            "UPDATE account_sequence SET number = %s WHERE account_id = %s",
            [self._number + len(self.changes), self._account_id],
        )
        if any(change.kind == "account" and change.after is None for change in self.changes):
            await self._connection.execute(
                "UPDATE lease SET epoch = epoch + 1, owner = '' WHERE account_id = %s",
                [self._account_id],
            )

    async def _put(self, entity: Entity, expected: Entity | None) -> None:
        owner = entity.id if isinstance(entity, Account) else entity.account_id
        if owner != self._account_id:
            raise ValueError("an entity belongs to the account that it is put into")
        kind = KIND_OF[type(entity)]
        table = TABLES[kind]
        known = await self._find(kind, "id", entity.id)
        before = known[0] if known else None
        if before == entity:  # also when this is done once more, after a lost connection
            return
        if expected is not None and before != expected:
            raise Outdated(f"{kind} {entity.id}")
        if before is not None:
            await self._connection.execute(table.update, table.changed_row(entity))
        else:
            if not isinstance(entity, Account):
                await self._check_account()
            await self._connection.execute(table.insert, table.row(entity))
        self._record(kind, before, entity)
        resource_id = gains_policy(before, entity)
        if resource_id is not None:
            self._with_more_policies.add(resource_id)

    async def _check_account(self) -> None:
        if not self._account_exists and not await self._find("account", "id", self._account_id):
            raise NotFound(f"account {self._account_id}")
        self._account_exists = True

    async def _remove(self, kind: EntityKind, entity: Entity) -> None:
        if kind == "account":
            self._account_exists = False
            for each in REMOVAL_ORDER[:-1]:
                for other in await self._find(each, "account_id", self._account_id):
                    await self._delete(each, other)
        for holder, field in HOLDERS[kind]:
            query = TABLES[holder].select_own_with(field)
            for other in await self._fetch(holder, query, entity.id):
                await self._take_out(holder, other, field, entity.id)
        for referrer, field in REFERRERS[kind]:
            for other in await self._find(referrer, field, entity.id):
                await self._remove(referrer, other)
        await self._delete(kind, entity)

    async def _take_out(self, kind: EntityKind, entity: Entity, field: str, member: UUID) -> None:
        after = without_member(entity, field, member)
        if after is None:
            await self._remove(kind, entity)
            return
        table = TABLES[kind]
        await self._connection.execute(table.update, table.changed_row(after))
        self._record(kind, entity, after)

    async def _delete(self, kind: EntityKind, entity: Entity) -> None:
        await self._connection.execute(TABLES[kind].delete, [self._account_id, entity.id])
        self._record(kind, entity, None)

    async def _find(self, kind: EntityKind, field: str, id: UUID) -> list[Entity]:
        """Entities of one kind whose field holds `id`, by id."""
        return await self._fetch(kind, TABLES[kind].select_own_by(field), id)

    async def _fetch(self, kind: EntityKind, query: bytes, value: UUID) -> list[Entity]:
        cursor = await self._connection.execute(query, [self._account_id, value])
        return [TABLES[kind].value(row) for row in await cursor.fetchall()]

    def _record(self, kind: EntityKind, before: Entity | None, after: Entity | None) -> None:
        entity = after or before
        assert entity is not None
        self.changes.append(
            Change(
                account_id=self._account_id,
                number=self._number + len(self.changes) + 1,
                at=self._at,
                who=self._who,
                kind=kind,
                entity_id=entity.id,
                before=before and without_secrets(before),
                after=after and without_secrets(after),
            )
        )


def _row_of(change: Change) -> list[Any]:
    values = attrs.asdict(change, recurse=False)
    for field in ("before", "after"):
        entity = values[field]
        values[field] = None if entity is None else to_json(entity).decode()
    return list(values.values())
