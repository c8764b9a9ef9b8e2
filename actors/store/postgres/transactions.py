"""One transaction on one pooled connection, in somebody's name: the ground of `PostgresStore`.

A transaction says first in whose name it works: `holloway.account`, `holloway.token` or
`holloway.installation`, which row-level security reads. Without one of them no row is visible.

Loss of the database: an operation that only reads, or fails before its commit was sent, is tried
again, until `timeout_s` is over; then, or when the commit of a writer is lost, it raises
Unavailable. So after Unavailable a mutation may or may not have happened; the same call may be made
again, since ids come with it.

A server that has no room on its disk says so at once, which is StorageFull: to try that again
within seconds helps nobody.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, LiteralString, TypeVar
from uuid import UUID

import psycopg
import trio

from actors.store.interface import (
    Conflict,
    Invalid,
    InvalidReference,
    StorageFull,
    StoreError,
    Unavailable,
)
from actors.store.postgres.connection import LOST, Logins, TrioConnection
from actors.store.postgres.pool import Pool, PoolStatistics

T = TypeVar("T")

ROLLBACK_TIMEOUT_S = 1.0
FIRST_RETRY_S = 0.02
LAST_RETRY_S = 1.0
FULL_S: Final = 30.0
"""For so long after a refusal for want of room the storage counts as full."""

Query = LiteralString | bytes

MEMBER_TABLES: Final = {
    "resource_site": ("resource", "site_ids"),
    "resource_device": ("resource", "device_ids"),
}
"""Whose field a table of members follows."""
_MONTH = re.compile(r"_[0-9]{4}_[0-9]{2}$")


class NoPartition(StoreError):
    """A row's instant lies in a month for which there is no partition yet."""


class Transactions:
    """The pool, and how an operation uses it."""

    def __init__(self, logins: Logins, *, connections: int, timeout_s: float) -> None:
        self._logins = logins
        self._pool = Pool(logins.application, size=connections)
        self._timeout_s = timeout_s
        self._full_at_s = -math.inf

    def statistics(self) -> PoolStatistics:
        """The pool's connections."""
        return self._pool.statistics()

    @property
    def storage_full(self) -> bool:
        """Whether the server had no room for something within the last FULL_S."""
        return trio.current_time() < self._full_at_s + FULL_S

    async def _select(
        self, scope: str, query: Query, parameters: Sequence[object], *, writes: bool = False
    ) -> Sequence[tuple[Any, ...]]:
        return await self._transact(
            scope, lambda connection: fetch(connection, query, parameters), writes=writes
        )

    async def _execute(self, scope: str, query: Query, parameters: Sequence[object]) -> None:
        async def execute(connection: TrioConnection) -> None:
            await connection.execute(query, parameters)

        await self._transact(scope, execute)

    async def _transact(
        self,
        scope: str,
        work: Callable[[TrioConnection], Awaitable[T]],
        *,
        mode: str = "",
        writes: bool = True,
    ) -> T:
        begin = f"BEGIN {mode}; {scope}".encode()
        retry_s = FIRST_RETRY_S
        error: BaseException | None = None
        with trio.move_on_after(self._timeout_s):
            while True:
                try:
                    return await self._attempt(begin, work, writes)
                except psycopg.errors.DiskFull as failure:
                    self._full_at_s = trio.current_time()
                    raise StorageFull(f"no room to write: {failure.diag.message_primary}") from None
                except LOST as failure:
                    error = failure
                except psycopg.errors.IntegrityError as failure:
                    raise _refusal(failure) from None
                except psycopg.DataError:  # NUL in a text, an instant before the calendar
                    raise Invalid("row", "value") from None
                await trio.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)
        reason = f": {error}" if error else ""
        raise Unavailable(
            f"no answer of the database within {self._timeout_s} s{reason}"
        ) from error

    async def _attempt(
        self, begin: bytes, work: Callable[[TrioConnection], Awaitable[T]], writes: bool
    ) -> T:
        async with self._pool.connection(writes=writes) as connection:
            await connection.execute(begin)
            try:
                result = await work(connection)
            except BaseException:
                await _roll_back(connection)
                raise
            try:
                await connection.execute("COMMIT")
            except psycopg.errors.DiskFull:  # rolled back, by what the commit itself had to write
                raise
            except LOST as failure:
                connection.finish()
                if not writes:
                    raise
                raise Unavailable("the commit was not confirmed") from failure
            return result


# What opens one door of row-level security for the transaction that it begins.

OF_INSTALLATION = "SELECT set_config('holloway.installation', 'on', true)"


def of_account(id: UUID) -> str:
    return f"SELECT set_config('holloway.account', '{id}', true)"


def of_token(id: UUID) -> str:
    return f"SELECT set_config('holloway.token', '{id}', true)"


async def fetch(
    connection: TrioConnection, query: Query, parameters: Sequence[object]
) -> Sequence[tuple[Any, ...]]:
    return await (await connection.execute(query, parameters)).fetchall()


async def _roll_back(connection: TrioConnection) -> None:
    """End the transaction, also while our task is being cancelled, or else the connection."""
    with trio.move_on_after(ROLLBACK_TIMEOUT_S, shield=True):
        try:
            await connection.execute("ROLLBACK")
        except LOST:
            connection.finish()


def _refusal(failure: psycopg.errors.IntegrityError) -> StoreError:
    """Reads kind and field off the constraint's name: see migrations/0001_foundation.sql."""
    kind = _MONTH.sub("", failure.diag.table_name or "row")
    constraint = failure.diag.constraint_name or ""
    if isinstance(failure, psycopg.errors.CheckViolation) and not constraint:
        return NoPartition(kind)
    field = constraint.removeprefix(f"{kind}_").rpartition("_")[0]
    kind, field = MEMBER_TABLES.get(kind, (kind, field))
    match failure:
        case psycopg.errors.UniqueViolation():
            return Conflict(kind, field)
        case psycopg.errors.ForeignKeyViolation():
            return InvalidReference(kind, field)
        case _:
            return Invalid(kind, field)
