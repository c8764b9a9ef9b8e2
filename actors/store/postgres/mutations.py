"""How `apply` works inside its transaction: lock, mutate, number, log.

The account's row in `account_sequence` is locked first. So transactions of one account follow one
another, the numbers that they give are the order of their commits, and what one reads of the
account cannot change under it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, LiteralString
from uuid import UUID

import attrs

from actors.model import ENTITIES, KIND_OF, Account, Change, Entity, EntityKind
from actors.store.codec import from_json, to_json
from actors.store.interface import Mutation, NotFound, Outdated, Put
from actors.store.postgres.connection import TrioConnection
from actors.store.postgres.mapping import TABLES
from actors.store.rules import REFERRERS, REMOVAL_ORDER

SELECT_CHANGES: LiteralString = (
    "SELECT account_id, number, at, who, kind, entity_id, before, after FROM change"
    " WHERE account_id = %s AND number > %s ORDER BY number LIMIT %s"
)
_INSERT_CHANGE: LiteralString = (
    "INSERT INTO change (account_id, number, at, who, kind, entity_id, before, after)"
    " VALUES (%s, %s, %s, %s, %s, %s, %s, %s)"
)


def change_of(row: Sequence[Any]) -> Change:
    """What a row of `SELECT_CHANGES` holds."""
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
) -> tuple[Change, ...]:
    """Carry out checked mutations in the open transaction. Raises NotFound, psycopg.Error."""
    number = await _lock(connection, account_id)
    work = _Work(connection, account_id, number, who, at)
    for mutation in mutations:
        await work.carry_out(mutation)
    if work.changes:
        await work.log()
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

    async def carry_out(self, mutation: Mutation) -> None:
        if isinstance(mutation, Put):
            await self._put(mutation.entity, mutation.before)
            return
        entities = await self._find(mutation.kind, "id", mutation.id)
        if not entities:
            raise NotFound(f"{mutation.kind} {mutation.id}")
        await self._remove(mutation.kind, entities[0])

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
        for referrer, field in REFERRERS[kind]:
            for other in await self._find(referrer, field, entity.id):
                await self._remove(referrer, other)
        await self._delete(kind, entity)

    async def _delete(self, kind: EntityKind, entity: Entity) -> None:
        await self._connection.execute(TABLES[kind].delete, [self._account_id, entity.id])
        self._record(kind, entity, None)

    async def _find(self, kind: EntityKind, field: str, id: UUID) -> list[Entity]:
        """Entities of one kind whose field holds `id`, by id."""
        table = TABLES[kind]
        query = table.select_own_by(field)
        cursor = await self._connection.execute(query, [self._account_id, id])
        return [table.value(row) for row in await cursor.fetchall()]

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
                before=before,
                after=after,
            )
        )


def _row_of(change: Change) -> list[Any]:
    values = attrs.asdict(change, recurse=False)
    for field in ("before", "after"):
        entity = values[field]
        values[field] = None if entity is None else to_json(entity).decode()
    return list(values.values())
