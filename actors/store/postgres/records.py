"""What the PostgreSQL store keeps beside entities: answers, uses of tokens, when devices were seen,
logs. How long: `actors.store.postgres.retention`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import LiteralString
from uuid import UUID

from actors.logs import KIND_OF_LOG, LOG_FILTERS, Log, LogKind, Seen
from actors.model import Token
from actors.store.interface import Answer, Expired, InvalidReference
from actors.store.postgres import retention
from actors.store.postgres.connection import Logins, TrioConnection
from actors.store.postgres.mapping import LOGS, TOKENS
from actors.store.postgres.mutations import SELECT_ANSWER, answer_of
from actors.store.postgres.transactions import (
    OF_INSTALLATION,
    NoPartition,
    Transactions,
    of_account,
    of_token,
)
from actors.store.rules import check_ids, check_instant, check_limit, check_logs, check_seen
from actors.store.validity import check_filters
from channel.messages import IpText

_USE: LiteralString = (
    "UPDATE token SET uses = uses + 1, last_used_at = greatest(last_used_at, %s)"
    " WHERE id = %s AND (max_uses IS NULL OR uses < max_uses) RETURNING uses"
)
_NOTE_USED: LiteralString = (
    "UPDATE token SET last_used_at = %s"
    " WHERE id = %s AND (last_used_at IS NULL OR last_used_at < %s)"
)
_LAST_USED: LiteralString = (
    "SELECT id, last_used_at FROM token WHERE account_id IS NOT DISTINCT FROM %s"
    " AND id = ANY (%s) AND last_used_at IS NOT NULL ORDER BY id"
)
_NOTE_SEEN: LiteralString = """
INSERT INTO seen (account_id, client_id, gateway_id, at, version, remote_ip)
SELECT %(account_id)s, client.id, CASE WHEN client.id IS NULL THEN gateway.id END,
    device.at, device.version, device.remote_ip
FROM unnest(
    %(device_ids)s::uuid[], %(ats)s::timestamptz[], %(versions)s::text[], %(remote_ips)s::inet[]
) AS device (id, at, version, remote_ip)
LEFT JOIN client ON client.account_id = %(account_id)s AND client.id = device.id
LEFT JOIN gateway ON gateway.account_id = %(account_id)s AND gateway.id = device.id
WHERE client.id IS NOT NULL OR gateway.id IS NOT NULL
ORDER BY device.id
ON CONFLICT (account_id, device_id) DO UPDATE SET at = excluded.at,
    version = excluded.version, remote_ip = excluded.remote_ip WHERE seen.at < excluded.at
"""
_SEEN: LiteralString = (
    "SELECT device_id, at, version, remote_ip FROM seen"
    " WHERE account_id = %s AND device_id = ANY (%s) ORDER BY device_id"
)


class PostgresRecords(Transactions):
    """The part of the store that remembers without changing an account."""

    def __init__(self, logins: Logins, *, connections: int, timeout_s: float) -> None:
        super().__init__(logins, connections=connections, timeout_s=timeout_s)
        self._months: set[datetime] = set()

    # --- answers, tokens, devices ---

    async def answer_of(self, token_id: UUID, key: str) -> Answer | None:
        """See `Store.answer_of`."""
        rows = await self._select(of_token(token_id), SELECT_ANSWER, [token_id, key])
        return answer_of(rows[0]) if rows else None

    async def find_token(self, id: UUID) -> Token | None:
        """See `Store.find_token`."""
        rows = await self._select(of_token(id), TOKENS.select("id = %s"), [id])
        return TOKENS.value(rows[0]) if rows else None

    async def use_token(self, id: UUID, *, at: datetime) -> bool:
        """See `Store.use_token`. False also for a token that does not exist."""
        return bool(await self._select(of_token(id), _USE, [at, id], writes=True))

    async def note_used(self, id: UUID, *, at: datetime) -> None:
        """See `Store.note_used`."""
        check_instant(at)
        await self._execute(of_token(id), _NOTE_USED, [at, id, at])

    async def last_used(
        self, account_id: UUID | None, ids: Collection[UUID]
    ) -> dict[UUID, datetime]:
        """See `Store.last_used`."""
        check_ids(ids)
        scope = OF_INSTALLATION if account_id is None else of_account(account_id)
        rows = await self._select(scope, _LAST_USED, [account_id, list(ids)])
        return {id: at.astimezone(UTC) for id, at in rows}

    async def note_seen(self, account_id: UUID, seen: Sequence[Seen]) -> None:
        """See `Store.note_seen`."""
        check_seen(seen)
        parameters = {
            "account_id": account_id,
            "device_ids": [each.device_id for each in seen],
            "ats": [each.at for each in seen],
            "versions": [each.version for each in seen],
            "remote_ips": [str(each.remote_ip) for each in seen],
        }

        async def note(connection: TrioConnection) -> None:
            await connection.execute(_NOTE_SEEN, parameters)

        try:
            await self._transact(of_account(account_id), note)
        except InvalidReference:  # a device went at this moment
            if len(seen) > 1:
                for each in seen:
                    await self.note_seen(account_id, [each])

    async def seen(self, account_id: UUID, ids: Collection[UUID]) -> dict[UUID, Seen]:
        """See `Store.seen`."""
        check_ids(ids)
        rows = await self._select(of_account(account_id), _SEEN, [account_id, list(ids)])
        return {
            id: Seen(
                device_id=id,
                at=at.astimezone(UTC),
                version=version,
                remote_ip=IpText(str(remote_ip)),
            )
            for id, at, version, remote_ip in rows
        }

    # --- logs ---

    async def write_logs(self, rows: Sequence[Log]) -> None:
        """See `Store.write_logs`. Makes the partition of a month that has none, and sees to it
        before the first row of a month, since psycopg reports a failed batch to its own log."""
        check_logs(rows)
        months = {retention.month_of(row.at) for row in rows}
        if not months <= self._months:
            await self._make_partitions(months)
        try:
            await self._append(rows)
        except NoPartition:
            await self._make_partitions(months)
            await self._append(rows)

    async def _make_partitions(self, months: set[datetime]) -> None:
        await retention.make_partitions(self._logins, months, timeout_s=self._timeout_s)
        self._months |= months

    async def _append(self, rows: Iterable[Log]) -> None:
        batches = [
            (account_id, kind, [LOGS[kind].row(row) for row in batch])
            for (account_id, kind), batch in groupby(sorted(rows, key=_place), key=_place)
        ]

        async def append(connection: TrioConnection) -> None:
            for account_id, kind, values in batches:
                await connection.execute(of_account(account_id).encode())
                async with connection.cursor() as cursor:
                    await cursor.executemany(LOGS[kind].append, values)

        await self._transact("", append)

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
        """See `Store.logs`."""
        check_limit(limit)
        wanted = dict(equals or {})
        check_filters(wanted, LOG_FILTERS[kind])
        given: dict[LiteralString, object] = {
            "at >= %s": since,
            "at < %s": until,
            "id < %s": before,
        }
        bounds = {bound: value for bound, value in given.items() if value is not None}
        query = LOGS[kind].select_log(tuple(wanted), tuple(bounds))
        parameters = [account_id, *wanted.values(), *bounds.values(), limit]
        return tuple(
            map(LOGS[kind].value, await self._select(of_account(account_id), query, parameters))
        )

    async def expire(self, at: datetime) -> Expired:
        """See `Store.expire`. Works on a connection of the owner of its own."""
        check_instant(at)
        return await retention.expire(self._logins, at, timeout_s=self._timeout_s)


def _place(row: Log) -> tuple[UUID, LogKind]:
    return row.account_id, KIND_OF_LOG[type(row)]
