"""How long the PostgreSQL store remembers: partitions of logs, and what is removed in small steps.

The application may add to logs, changes and authorisations, and remove none; so this works with
the owner's login, on a connection that it opens for the purpose. The owner is bound by row-level
security too: it sees one account at a time, the list of accounts, and how old answers are.

Logs have one partition for each calendar month (UTC), named `<log>_<year>_<month>`. Those of this
month and the next ones are made ahead; one that is needed before is made by whoever writes. A
partition is dropped when every account's time is over for all of it; what an account keeps for a
shorter time is deleted row by row, BATCH at once.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString
from uuid import UUID

import attrs
import psycopg
import trio
from psycopg.sql import SQL, Identifier, Literal

from actors.logs import LOG_KINDS, LOG_RETENTION, LogKind
from actors.model import Retention
from actors.store.codec import from_json
from actors.store.interface import ANSWER_KEPT, Expired, Unavailable
from actors.store.postgres.connection import LOST, Logins, TrioConnection
from actors.store.postgres.transactions import OF_INSTALLATION, fetch, of_account

BATCH = 5_000
MONTHS_AHEAD = 2
LOCK_TIMEOUT_MS = 1_000
_PARTITIONS_LOCK = 0x686F6C6C6F776C67  # "hollowlg"

_FIND_PARTITIONS: LiteralString = """
SELECT child.relname FROM pg_inherits
JOIN pg_class child ON child.oid = inhrelid
WHERE inhparent = format('holloway.%%I', %s::text)::regclass
"""
_ACCOUNTS: LiteralString = """
SELECT account_id, retention FROM account_sequence LEFT JOIN account ON account.id = account_id
WHERE (%s::uuid IS NULL OR account_id > %s) ORDER BY account_id LIMIT %s
"""
_FIRST_CHANGE: LiteralString = "SELECT at FROM change WHERE account_id = %s ORDER BY number LIMIT 1"
_LOCK: LiteralString = "SELECT number FROM account_sequence WHERE account_id = %s FOR NO KEY UPDATE"
_OLD_CHANGES: LiteralString = (
    "SELECT number, at < %s FROM change WHERE account_id = %s ORDER BY number LIMIT %s"
)
_PRUNE: LiteralString = "DELETE FROM change WHERE account_id = %s AND number <= %s"
_PRUNED: LiteralString = "UPDATE account_sequence SET pruned = %s WHERE account_id = %s"
_END_AUTHORIZATIONS: LiteralString = """
DELETE FROM "authorization" WHERE account_id = %(account_id)s AND id IN (
    SELECT id FROM "authorization" WHERE account_id = %(account_id)s
        AND coalesce(ended_at, expires_at) < %(horizon)s LIMIT %(limit)s
)
"""
_FORGET_ANSWERS: LiteralString = """
DELETE FROM answer WHERE (token_id, key) IN (
    SELECT token_id, key FROM answer WHERE at <= %s LIMIT %s
)
"""
_MONTH = re.compile(r"_([0-9]{4})_([0-9]{2})$")
_EVER = datetime(9999, 1, 1, tzinfo=UTC)


async def make_partitions(
    logins: Logins, instants: Iterable[datetime], *, timeout_s: float
) -> None:
    """Make the partitions of the months in which these instants lie. Raises Unavailable."""
    months = sorted({month_of(at) for at in instants})
    async with _Owner.connected(logins, timeout_s) as owner:
        await owner.make_partitions(months)


async def expire(logins: Logins, at: datetime, *, timeout_s: float) -> Expired:
    """See `Store.expire`. `timeout_s` bounds each step. Raises Unavailable."""
    async with _Owner.connected(logins, timeout_s) as owner:
        months = [month_of(at)]
        for _ in range(MONTHS_AHEAD):
            months.append(_month_after(months[-1]))
        await owner.make_partitions(months)
        return await owner.expire(at)


class _Owner:
    """A connection of the owner. Every step is one transaction."""

    def __init__(self, connection: TrioConnection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    @classmethod
    @asynccontextmanager
    async def connected(cls, logins: Logins, timeout_s: float) -> AsyncIterator[_Owner]:
        connection = None
        try:
            with trio.fail_after(timeout_s):
                connection = await TrioConnection.open(logins.owner)
            yield cls(connection, timeout_s)
        except (*LOST, trio.TooSlowError) as error:
            raise Unavailable(f"the database cannot be reached: {error}") from error
        finally:
            if connection is not None:
                connection.finish()

    async def make_partitions(self, months: Iterable[datetime]) -> None:
        async with self._step("") as connection:
            await _lock_partitions(connection)
            for kind in LOG_KINDS:
                known = await _partitions(connection, kind)
                for month in months:
                    if month not in known.values():
                        await _make_partition(connection, kind, month)

    async def expire(self, at: datetime) -> Expired:
        expired = Expired(answers=await self._forget_answers(at))
        longest = dict.fromkeys(LOG_KINDS, timedelta())
        after: UUID | None = None
        while page := await self._accounts(after):
            for account_id, text in page:
                retention = None if text is None else from_json(text, Retention)
                gone = await self._expire_account(account_id, retention, at)
                expired = _sum(expired, gone)
                for kind in LOG_KINDS:
                    longest[kind] = max(longest[kind], _kept(retention, kind))
            after = page[-1][0]
        dropped = await self._drop_partitions({kind: at - longest[kind] for kind in LOG_KINDS})
        return attrs.evolve(expired, partitions=dropped)

    async def _accounts(self, after: UUID | None) -> list[tuple[UUID, str | None]]:
        async with self._step(OF_INSTALLATION) as connection:
            rows = await fetch(connection, _ACCOUNTS, [after, after, BATCH])
        return [(account_id, retention) for account_id, retention in rows]

    async def _expire_account(
        self, account_id: UUID, retention: Retention | None, at: datetime
    ) -> Expired:
        kept = retention or Retention()
        return Expired(
            changes=await self._prune_changes(account_id, at - timedelta(days=kept.changes_days)),
            authorizations=await self._delete(
                account_id, _END_AUTHORIZATIONS, at - timedelta(days=kept.authorizations_days)
            ),
            logs=sum(
                [
                    await self._delete(
                        account_id,
                        _delete_logs(kind),
                        _EVER if retention is None else at - _kept(retention, kind),
                    )
                    for kind in LOG_KINDS
                ]
            ),
        )

    async def _prune_changes(self, account_id: UUID, horizon: datetime) -> int:
        """The changes before the first one that is young enough, whatever instants they bear."""
        pruned = 0
        while True:
            async with self._step(of_account(account_id)) as connection:
                first = await fetch(connection, _FIRST_CHANGE, [account_id])
                if not first or first[0][0] >= horizon:
                    return pruned
                await fetch(connection, _LOCK, [account_id])
                rows = await fetch(connection, _OLD_CHANGES, [horizon, account_id, BATCH])
                old = [number for number, is_old in rows if is_old]
                young = [number for number, is_old in rows if not is_old]
                last = young[0] - 1 if young else old[-1]
                cursor = await connection.execute(_PRUNE, [account_id, last])
                pruned += cursor.rowcount
                await connection.execute(_PRUNED, [last, account_id])

    async def _delete(
        self, account_id: UUID, statement: LiteralString | bytes, horizon: datetime
    ) -> int:
        parameters: dict[str, Any] = {
            "account_id": account_id,
            "horizon": horizon,
            "limit": BATCH,
        }
        deleted = 0
        while True:
            async with self._step(of_account(account_id)) as connection:
                count = (await connection.execute(statement, parameters)).rowcount
            deleted += count
            if count < BATCH:
                return deleted

    async def _forget_answers(self, at: datetime) -> int:
        forgotten = 0
        while True:
            async with self._step(OF_INSTALLATION) as connection:
                cursor = await connection.execute(_FORGET_ANSWERS, [at - ANSWER_KEPT, BATCH])
            forgotten += cursor.rowcount
            if cursor.rowcount < BATCH:
                return forgotten

    async def _drop_partitions(self, horizons: dict[LogKind, datetime]) -> int:
        """One whose table somebody is reading for long is left for the next time."""
        dropped = 0
        for kind, horizon in horizons.items():
            async with self._step("") as connection:
                known = await _partitions(connection, kind)
            old = [name for name, month in known.items() if _month_after(month) <= horizon]
            for name in old:
                try:
                    async with self._step("") as connection:
                        await _lock_partitions(connection)
                        await connection.execute(
                            SQL("DROP TABLE IF EXISTS {}").format(Identifier(name))
                        )
                    dropped += 1
                except psycopg.errors.LockNotAvailable:
                    await self._connection.execute("ROLLBACK")
        return dropped

    @asynccontextmanager
    async def _step(self, scope: str) -> AsyncIterator[TrioConnection]:
        """A transaction. Failing, it leaves the rollback to the server: its connection is about to
        be closed."""
        with trio.fail_after(self._timeout_s):
            await self._connection.execute(f"BEGIN; {scope}".encode())
            yield self._connection
            await self._connection.execute("COMMIT")


async def _lock_partitions(connection: TrioConnection) -> None:
    """One runner at a time makes and drops partitions, and none waits for long for a table."""
    await connection.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS:d}".encode())
    await connection.execute("SELECT pg_advisory_xact_lock(%s)", [_PARTITIONS_LOCK])


async def _partitions(connection: TrioConnection, kind: LogKind) -> dict[str, datetime]:
    """The partitions of a log and their months."""
    rows = await fetch(connection, _FIND_PARTITIONS, [f"{kind}_log"])
    months = {name: _MONTH.search(name) for (name,) in rows}
    return {
        name: datetime(int(month[1]), int(month[2]), 1, tzinfo=UTC)
        for name, month in months.items()
        if month is not None
    }


async def _make_partition(connection: TrioConnection, kind: LogKind, month: datetime) -> None:
    """It is made beside the log and attached then, which holds up neither readers nor writers."""
    log, name = (
        Identifier(f"{kind}_log"),
        Identifier(f"{kind}_log_{month.year:04d}_{month.month:02d}"),
    )
    start, end = Literal(month.isoformat()), Literal(_month_after(month).isoformat())
    for statement in (
        SQL("CREATE TABLE {} (LIKE {} INCLUDING DEFAULTS INCLUDING CONSTRAINTS)").format(name, log),
        SQL("ALTER TABLE {} ENABLE ROW LEVEL SECURITY").format(name),
        SQL("ALTER TABLE {} FORCE ROW LEVEL SECURITY").format(name),
        SQL("ALTER TABLE {} ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})").format(
            log, name, start, end
        ),
    ):
        await connection.execute(statement)


def _delete_logs(kind: LogKind) -> bytes:
    return (
        SQL(
            "DELETE FROM {log} WHERE account_id = %(account_id)s AND at < %(horizon)s"
            " AND (id, at) IN (SELECT id, at FROM {log} WHERE account_id = %(account_id)s"
            " AND at < %(horizon)s LIMIT %(limit)s)"
        )
        .format(log=Identifier(f"{kind}_log"))
        .as_bytes()
    )


def _kept(retention: Retention | None, kind: LogKind) -> timedelta:
    """How long a log is kept; not at all of an account that is gone."""
    return timedelta(days=0 if retention is None else getattr(retention, LOG_RETENTION[kind]))


def month_of(at: datetime) -> datetime:
    start = at.astimezone(UTC)
    return datetime(start.year, start.month, 1, tzinfo=UTC)


def _month_after(month: datetime) -> datetime:
    return month_of(month + timedelta(days=31))


def _sum(one: Expired, other: Expired) -> Expired:
    figures = zip(attrs.astuple(one), attrs.astuple(other), strict=True)
    return Expired(**dict(zip(attrs.fields_dict(Expired), map(sum, figures), strict=True)))
