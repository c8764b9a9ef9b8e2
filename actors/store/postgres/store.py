"""`Store` on PostgreSQL.

Every operation is one transaction on one pooled connection, and says first in whose name it
works: `holloway.account`, `holloway.token` or `holloway.installation`, which row-level security
reads. Without one of them no row is visible.

Loss of the database: an operation that fails before its commit was sent is tried again, until
`timeout_s` is over; then, or when the commit itself is lost, it raises Unavailable. So after
Unavailable a mutation may or may not have happened; the same call may be made again, since ids
come with it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import datetime
from typing import Any, LiteralString, TypeVar
from uuid import UUID

import psycopg
import trio

from actors.model import Account, Authorization, Change, Entity, EntityKind, Relay, Token
from actors.store.interface import (
    MAX_PAGE,
    Conflict,
    Contents,
    Fenced,
    Invalid,
    InvalidReference,
    LastOperator,
    Mutation,
    NotFound,
    StoreError,
    Unavailable,
)
from actors.store.postgres import leases
from actors.store.postgres.connection import LOST, Logins, TrioConnection
from actors.store.postgres.mapping import ACCOUNTS, AUTHORIZATIONS, RELAYS, TABLES, TOKENS
from actors.store.postgres.migrate import migrate
from actors.store.postgres.mutations import SELECT_CHANGES, apply_mutations, change_of
from actors.store.postgres.pool import Pool, PoolStatistics
from actors.store.rules import check_limit, check_mutations, check_node, check_ttl
from actors.store.validity import validate
from runtime.cluster.leases import NodeRow
from runtime.cluster.membership import check_node_name

T = TypeVar("T")

DEFAULT_CONNECTIONS = 8
DEFAULT_TIMEOUT_S = 5.0
ROLLBACK_TIMEOUT_S = 1.0
FIRST_RETRY_S = 0.02
LAST_RETRY_S = 1.0


class PostgresStore:
    """See `actors.store.interface.Store`. Make one with `open`."""

    def __init__(self, logins: Logins, *, connections: int, timeout_s: float) -> None:
        self._logins = logins
        self._pool = Pool(logins.application, size=connections)
        self._timeout_s = timeout_s

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        database: str | Logins,
        *,
        connections: int = DEFAULT_CONNECTIONS,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        migrated: bool = False,
    ) -> AsyncIterator[PostgresStore]:
        """A store for the length of the block.

        `database` is a URL whose login takes on all roles (see docs/database.md), or `Logins`.
        Unless `migrated`, brings the schema up to date first: raises MigrationError, or
        Unavailable when the database cannot be reached. `connections` bounds the pool,
        `timeout_s` every operation.
        """
        logins = Logins.of(database) if isinstance(database, str) else database
        if not migrated:
            await migrate(logins)
        store = cls(logins, connections=connections, timeout_s=timeout_s)
        try:
            yield store
        finally:
            store._pool.close()

    def statistics(self) -> PoolStatistics:
        """The pool's connections."""
        return self._pool.statistics()

    # --- accounts, entities, changes ---

    async def apply(
        self, account_id: UUID, mutations: Sequence[Mutation], *, who: str, at: datetime
    ) -> tuple[Change, ...]:
        """See `Store.apply`."""
        mutations = tuple(mutations)
        check_mutations(mutations, who=who, at=at)
        if not mutations:
            return ()
        return await self._transact(
            _of_account(account_id),
            lambda connection: apply_mutations(connection, account_id, mutations, who, at),
        )

    async def get(self, account_id: UUID, kind: EntityKind, id: UUID) -> Entity:
        """See `Store.get`."""
        table = TABLES[kind]
        rows = await self._select(
            _of_account(account_id), table.select_own("id = %s"), [account_id, id]
        )
        if not rows:
            raise NotFound(f"{kind} {id}")
        return table.value(rows[0])

    async def list(
        self, account_id: UUID, kind: EntityKind, *, after: UUID | None = None, limit: int = 100
    ) -> tuple[Entity, ...]:
        """See `Store.list`."""
        check_limit(limit)
        table = TABLES[kind]
        rows = await self._select(
            _of_account(account_id), table.select_own(_PAGE), [account_id, after, after, limit]
        )
        return tuple(map(table.value, rows))

    async def accounts(self, *, after: UUID | None = None, limit: int = 100) -> tuple[Account, ...]:
        """See `Store.accounts`."""
        check_limit(limit)
        rows = await self._select(_INSTALLATION, ACCOUNTS.select(_PAGE), [after, after, limit])
        return tuple(map(ACCOUNTS.value, rows))

    async def contents(self, account_id: UUID) -> Contents:
        """See `Store.contents`: the entities come kind by kind (as in ENTITIES), then by id."""

        async def read(connection: TrioConnection) -> Contents:
            tables = {kind: table for kind, table in TABLES.items() if kind != "account"}
            accounts = await _fetch(connection, ACCOUNTS.select("id = %s"), [account_id])
            if not accounts:
                raise NotFound(f"account {account_id}")
            ((number,),) = await _fetch(connection, _NUMBER, [account_id])
            entities = [
                table.value(row)
                for table in tables.values()
                for row in await _fetch(connection, table.select_own(_ALL), [account_id])
            ]
            return Contents(ACCOUNTS.value(accounts[0]), tuple(entities), number)

        return await self._transact(_of_account(account_id), read, mode=_SNAPSHOT)

    async def changes(
        self, account_id: UUID, *, after: int, limit: int = MAX_PAGE
    ) -> tuple[Change, ...]:
        """See `Store.changes`. The changes of a removed account stay; an unknown one has none."""
        check_limit(limit)
        rows = await self._select(
            _of_account(account_id),
            SELECT_CHANGES,
            [account_id, after, limit],
        )
        return tuple(map(change_of, rows))

    @asynccontextmanager
    async def wakeups(self) -> AsyncIterator[AsyncIterator[UUID]]:
        """See `Store.wakeups`.

        Every known account (removed ones too) comes once each time that the feed is connected, at
        first and after each loss, which it survives by itself. It raises nothing.
        """
        async with aclosing(self._follow()) as accounts:
            yield accounts

    async def _follow(self) -> AsyncGenerator[UUID, None]:
        retry_s = FIRST_RETRY_S
        while True:
            connection = None
            try:
                with trio.fail_after(self._timeout_s):
                    connection = await TrioConnection.open(self._logins.feed)
                    await connection.execute("LISTEN holloway_changes")
                    known = await _fetch(connection, "SELECT account_id FROM account_sequence", [])
                retry_s = FIRST_RETRY_S
                for (account_id,) in known:
                    yield account_id
                while True:
                    for payload in dict.fromkeys(await connection.notifications()):
                        yield UUID(payload)
            except (*LOST, trio.TooSlowError):
                await trio.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)
            finally:
                if connection is not None:
                    connection.finish()

    # --- tokens ---

    async def find_token(self, id: UUID) -> Token | None:
        """See `Store.find_token`."""
        rows = await self._select(_of_token(id), TOKENS.select("id = %s"), [id])
        return TOKENS.value(rows[0]) if rows else None

    async def use_token(self, id: UUID, *, at: datetime) -> bool:
        """See `Store.use_token`. False also for a token that does not exist."""
        rows = await self._select(
            _of_token(id),
            "UPDATE token SET uses = uses + 1, last_used_at = %s"
            " WHERE id = %s AND (max_uses IS NULL OR uses < max_uses) RETURNING uses",
            [at, id],
        )
        return bool(rows)

    async def put_installation_token(self, token: Token) -> None:
        """See `Store.put_installation_token`. Raises Invalid for the token of an account."""
        validate(token)
        if token.account_id is not None:
            raise Invalid("token", "account_id")
        await self._execute(_INSTALLATION, TOKENS.insert, TOKENS.row(token))

    async def installation_tokens(
        self, *, after: UUID | None = None, limit: int = 100
    ) -> tuple[Token, ...]:
        """See `Store.installation_tokens`."""
        check_limit(limit)
        query = TOKENS.select("account_id IS NULL AND " + _PAGE)
        return tuple(
            map(TOKENS.value, await self._select(_INSTALLATION, query, [after, after, limit]))
        )

    async def remove_installation_token(self, id: UUID, *, at: datetime) -> None:
        """See `Store.remove_installation_token`."""

        async def remove(connection: TrioConnection) -> None:
            # Locked in order, so that of two calls the second sees what the first left.
            operators = await _fetch(connection, _OPERATORS, [at])
            is_operator = any(other == id for other, _ in operators)
            if is_operator and not any(good for other, good in operators if other != id):
                raise LastOperator(f"token {id}")
            if not await _fetch(connection, _REMOVE, [id]):
                raise NotFound(f"token {id}")

        await self._transact(_INSTALLATION, remove)

    # --- leases of nodes and accounts: see `actors.store.postgres.leases` ---

    async def join_node(
        self, name: str, *, link_address: str, door_address: str, version: str, ttl_ns: int
    ) -> int:
        """See `LeaseStore.join_node`. Raises Full."""
        check_node(name, link_address=link_address, door_address=door_address, version=version)
        check_ttl(ttl_ns)
        return await self._transact(
            _INSTALLATION,
            lambda connection: leases.join(
                connection,
                name,
                link_address=link_address,
                door_address=door_address,
                version=version,
                ttl_ns=ttl_ns,
            ),
        )

    async def renew_node(
        self, name: str, incarnation: int, *, draining: bool, ttl_ns: int
    ) -> tuple[NodeRow, ...]:
        """See `LeaseStore.renew_node`. Raises Fenced."""
        check_ttl(ttl_ns)
        return await self._transact(
            _INSTALLATION,
            lambda connection: leases.renew(
                connection, name, incarnation, draining=draining, ttl_ns=ttl_ns
            ),
        )

    async def nodes(self) -> tuple[NodeRow, ...]:
        """See `LeaseStore.nodes`."""
        rows = await self._select(_INSTALLATION, leases.SELECT_NODES, [])
        return tuple(map(leases.node_of, rows))

    async def expel_node(self, name: str, incarnation: int) -> None:
        """See `LeaseStore.expel_node`."""
        await self._execute(_INSTALLATION, leases.EXPEL, [name, incarnation])

    async def leave_node(self, name: str, incarnation: int) -> None:
        """See `LeaseStore.leave_node`."""
        await self._execute(_INSTALLATION, leases.LEAVE, [name, incarnation])

    async def acquire(self, key: UUID, *, owner: str, incarnation: int) -> int:
        """See `LeaseStore.acquire`. Raises NotFound, Fenced, Held."""
        check_node_name(owner)
        return await self._transact(
            f"{_of_account(key)}; {_INSTALLATION}",
            lambda connection: leases.acquire(
                connection, key, owner=owner, incarnation=incarnation
            ),
        )

    async def release(self, key: UUID, *, owner: str, incarnation: int) -> None:
        """See `LeaseStore.release`."""
        await self._execute(_of_account(key), leases.RELEASE, [key, owner, incarnation])

    # --- authorisations ---

    async def write_authorization(self, authorization: Authorization, *, epoch: int) -> None:
        """See `Store.write_authorization`. A removed account has no owner: Fenced."""
        validate(authorization)
        account_id = authorization.account_id

        async def write(connection: TrioConnection) -> None:
            if not await _fetch(connection, _FENCE, [account_id, epoch]):
                raise Fenced(f"epoch {epoch} of account {account_id} is over")
            await connection.execute(AUTHORIZATIONS.upsert, AUTHORIZATIONS.row(authorization))

        await self._transact(_of_account(account_id), write)

    async def authorizations(
        self,
        account_id: UUID,
        *,
        live_at: datetime | None = None,
        after: UUID | None = None,
        limit: int = 100,
    ) -> tuple[Authorization, ...]:
        """See `Store.authorizations`."""
        check_limit(limit)
        live = "ended_at IS NULL AND expires_at > %s AND " if live_at else ""
        rows = await self._select(
            _of_account(account_id),
            AUTHORIZATIONS.select_own(live + _PAGE),
            [account_id, *([live_at] if live_at else []), after, after, limit],
        )
        return tuple(map(AUTHORIZATIONS.value, rows))

    # --- relays of the installation ---

    async def put_relay(self, relay: Relay) -> None:
        """See `Store.put_relay`. Raises InvalidReference unless a relay token has its token_id."""
        validate(relay)
        await self._execute(_INSTALLATION, RELAYS.upsert, RELAYS.row(relay))

    async def relays(self) -> tuple[Relay, ...]:
        """See `Store.relays`."""
        rows = await self._select(_INSTALLATION, RELAYS.select(_ALL), [])
        return tuple(map(RELAYS.value, rows))

    # --- transactions ---

    async def _select(
        self, scope: str, query: Query, parameters: Sequence[object]
    ) -> Sequence[tuple[Any, ...]]:
        return await self._transact(scope, lambda connection: _fetch(connection, query, parameters))

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
    ) -> T:
        begin = f"BEGIN {mode}; {scope}".encode()
        retry_s = FIRST_RETRY_S
        error: BaseException | None = None
        with trio.move_on_after(self._timeout_s):
            while True:
                try:
                    return await self._attempt(begin, work)
                except LOST as failure:
                    error = failure
                except psycopg.errors.IntegrityError as failure:
                    raise _refusal(failure) from None
                await trio.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)
        reason = f": {error}" if error else ""
        raise Unavailable(
            f"no answer of the database within {self._timeout_s} s{reason}"
        ) from error

    async def _attempt(self, begin: bytes, work: Callable[[TrioConnection], Awaitable[T]]) -> T:
        async with self._pool.connection() as connection:
            await connection.execute(begin)
            try:
                result = await work(connection)
            except BaseException:
                await _roll_back(connection)
                raise
            try:
                await connection.execute("COMMIT")
            except LOST as failure:
                connection.finish()
                raise Unavailable("the commit was not confirmed") from failure
            return result


Query = LiteralString | bytes

_SNAPSHOT = "ISOLATION LEVEL REPEATABLE READ READ ONLY"
_ALL: LiteralString = "true ORDER BY id"
_NUMBER: LiteralString = "SELECT number FROM account_sequence WHERE account_id = %s"
_PAGE: LiteralString = "(%s::uuid IS NULL OR id > %s) ORDER BY id LIMIT %s"
_FENCE: LiteralString = (
    "SELECT FROM lease WHERE account_id = %s AND epoch = %s AND owner <> '' FOR SHARE"
)
_OPERATORS: LiteralString = (
    "SELECT id, expires_at IS NULL OR expires_at > %s FROM token"
    " WHERE account_id IS NULL AND kind = 'operator' ORDER BY id FOR UPDATE"
)
_REMOVE: LiteralString = "DELETE FROM token WHERE account_id IS NULL AND id = %s RETURNING id"


# What opens one door of row-level security for the transaction that it begins.

_INSTALLATION = "SELECT set_config('holloway.installation', 'on', true)"


def _of_account(id: UUID) -> str:
    return f"SELECT set_config('holloway.account', '{id}', true)"


def _of_token(id: UUID) -> str:
    return f"SELECT set_config('holloway.token', '{id}', true)"


async def _fetch(
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
    kind = failure.diag.table_name or "row"
    constraint = failure.diag.constraint_name or ""
    field = constraint.removeprefix(f"{kind}_").rpartition("_")[0]
    match failure:
        case psycopg.errors.UniqueViolation():
            return Conflict(kind, field)
        case psycopg.errors.ForeignKeyViolation():
            return InvalidReference(kind, field)
        case _:
            return Invalid(kind, field)
