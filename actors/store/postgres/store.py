"""`Store` on PostgreSQL. How its operations use the database, and what becomes of them when it is
lost: `actors.store.postgres.transactions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import datetime
from typing import LiteralString
from uuid import UUID

import trio

from actors.model import Account, Authorization, Change, Entity, EntityKind, Relay, Token
from actors.store.interface import (
    MAX_PAGE,
    NO_FILTER,
    Answer,
    Conflict,
    Contents,
    Equals,
    Fenced,
    Invalid,
    LastOperator,
    Mutation,
    NotFound,
)
from actors.store.postgres import leases
from actors.store.postgres.connection import LOST, Logins, TrioConnection
from actors.store.postgres.mapping import ACCOUNTS, AUTHORIZATIONS, COUNTS, RELAYS, TABLES, TOKENS
from actors.store.postgres.migrate import migrate
from actors.store.postgres.mutations import apply_mutations, changes_of, keep, select_changes
from actors.store.postgres.records import PostgresRecords
from actors.store.postgres.transactions import (
    FIRST_RETRY_S,
    LAST_RETRY_S,
    OF_INSTALLATION,
    fetch,
    of_account,
    of_token,
)
from actors.store.rules import (
    check_limit,
    check_mutations,
    check_node,
    check_ttl,
    without_secrets,
)
from actors.store.validity import validate
from runtime.cluster.leases import NodeRow
from runtime.cluster.membership import check_node_name

DEFAULT_CONNECTIONS = 8
DEFAULT_TIMEOUT_S = 5.0

_SNAPSHOT = "ISOLATION LEVEL REPEATABLE READ READ ONLY"
_ALL: LiteralString = "true ORDER BY id"
_NUMBER: LiteralString = "SELECT number FROM account_sequence WHERE account_id = %s"
_LIVE: LiteralString = "ended_at IS NULL AND expires_at > %s"
_FENCE: LiteralString = (
    "SELECT FROM lease WHERE account_id = %s AND epoch = %s AND owner <> '' FOR SHARE"
)
_OPERATORS: LiteralString = (
    "SELECT id, expires_at IS NULL OR expires_at > %s FROM token"
    " WHERE account_id IS NULL AND kind = 'operator' ORDER BY id FOR UPDATE"
)
_KNOW_KEY: LiteralString = (
    "INSERT INTO encryption_key (id, fingerprint) VALUES (%s, %s) ON CONFLICT DO NOTHING"
)
_SAME_KEY: LiteralString = "SELECT FROM encryption_key WHERE id = %s AND fingerprint = %s"
_REMOVE: LiteralString = "DELETE FROM token WHERE account_id IS NULL AND id = %s RETURNING id"


class PostgresStore(PostgresRecords):
    """See `actors.store.interface.Store`. Make one with `open`."""

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
        mutations = tuple(mutations)
        check_mutations(mutations, who=who, at=at, answer=answer)
        if not mutations:
            return ()
        scope = of_account(account_id)
        if answer is not None:
            scope = f"{scope}; {of_token(answer.token_id)}"
        return await self._transact(
            scope,
            lambda connection: apply_mutations(
                connection, account_id, mutations, who, at, number, answer, tell
            ),
        )

    async def get(self, account_id: UUID, kind: EntityKind, id: UUID) -> Entity:
        """See `Store.get`."""
        table = TABLES[kind]
        rows = await self._select(
            of_account(account_id), table.select_own("id = %s"), [account_id, id]
        )
        if not rows:
            raise NotFound(f"{kind} {id}")
        return table.value(rows[0])

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
        check_limit(limit)
        table = TABLES[kind]
        rows = await self._select(
            of_account(account_id),
            table.select_page(tuple(equals)),
            [account_id, *table.parameters(equals), after, after, limit],
        )
        return tuple(map(table.value, rows))

    async def accounts(
        self, *, after: UUID | None = None, limit: int = 100, equals: Equals = NO_FILTER
    ) -> tuple[Account, ...]:
        """See `Store.accounts`."""
        check_limit(limit)
        rows = await self._select(
            OF_INSTALLATION,
            ACCOUNTS.select_page(tuple(equals), is_own=False),
            [*ACCOUNTS.parameters(equals), after, after, limit],
        )
        return tuple(map(ACCOUNTS.value, rows))

    async def contents(self, account_id: UUID) -> Contents:
        """See `Store.contents`: the entities come kind by kind (as in ENTITIES), then by id."""

        async def read(connection: TrioConnection) -> Contents:
            tables = {kind: table for kind, table in TABLES.items() if kind != "account"}
            accounts = await fetch(connection, ACCOUNTS.select("id = %s"), [account_id])
            if not accounts:
                raise NotFound(f"account {account_id}")
            ((number,),) = await fetch(connection, _NUMBER, [account_id])
            entities = [
                without_secrets(table.value(row))
                for table in tables.values()
                for row in await fetch(connection, table.select_own(_ALL), [account_id])
            ]
            return Contents(ACCOUNTS.value(accounts[0]), tuple(entities), number)

        return await self._transact(of_account(account_id), read, mode=_SNAPSHOT, writes=False)

    async def counts(self, account_id: UUID) -> dict[EntityKind, int]:
        """See `Store.counts`."""
        (row,) = await self._select(of_account(account_id), COUNTS, [account_id] * len(TABLES))
        return dict(zip(TABLES, row, strict=True))

    async def count(self, account_id: UUID, kind: EntityKind) -> int:
        """See `Store.count`."""
        rows = await self._select(of_account(account_id), TABLES[kind].count_own, [account_id])
        return int(rows[0][0])

    async def changes(
        self, account_id: UUID, *, after: int, limit: int = MAX_PAGE, equals: Equals = NO_FILTER
    ) -> tuple[Change, ...]:
        """See `Store.changes`. The changes of a removed account stay; an unknown one has none."""
        check_limit(limit)
        rows = await self._select(
            of_account(account_id),
            select_changes(tuple(equals)),
            [after, *equals.values(), limit, account_id],
        )
        return changes_of(rows, account_id, after)

    async def last_number(self, account_id: UUID) -> int:
        """See `Store.last_number`."""
        rows = await self._select(of_account(account_id), _NUMBER, [account_id])
        return int(rows[0][0]) if rows else 0

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
                    known = await fetch(connection, "SELECT account_id FROM account_sequence", [])
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

    # --- tokens of the installation ---

    async def put_installation_token(self, token: Token, *, answer: Answer | None = None) -> None:
        """See `Store.put_installation_token`. Raises Invalid for the token of an account."""
        validate(token)
        if token.account_id is not None:
            raise Invalid("token", "account_id")
        scope = OF_INSTALLATION
        if answer is not None:
            validate(answer)
            scope = f"{scope}; {of_token(answer.token_id)}"

        async def put(connection: TrioConnection) -> None:
            if answer is not None:
                await keep(connection, answer)
            await connection.execute(TOKENS.insert, TOKENS.row(token))

        await self._transact(scope, put)

    async def installation_tokens(
        self, *, after: UUID | None = None, limit: int = 100, equals: Equals = NO_FILTER
    ) -> tuple[Token, ...]:
        """See `Store.installation_tokens`."""
        check_limit(limit)
        rows = await self._select(
            OF_INSTALLATION,
            TOKENS.select_page(tuple(equals), "account_id IS NULL", is_own=False),
            [*TOKENS.parameters(equals), after, after, limit],
        )
        return tuple(map(TOKENS.value, rows))

    async def remove_installation_token(self, id: UUID, *, at: datetime) -> None:
        """See `Store.remove_installation_token`."""

        async def remove(connection: TrioConnection) -> None:
            # Locked in order, so that of two calls the second sees what the first left.
            operators = await fetch(connection, _OPERATORS, [at])
            is_operator = any(other == id for other, _ in operators)
            if is_operator and not any(good for other, good in operators if other != id):
                raise LastOperator(f"token {id}")
            if not await fetch(connection, _REMOVE, [id]):
                raise NotFound(f"token {id}")

        await self._transact(OF_INSTALLATION, remove)

    # --- leases of nodes and accounts: see `actors.store.postgres.leases` ---

    async def join_node(
        self, name: str, *, link_address: str, door_address: str, version: str, ttl_ns: int
    ) -> int:
        """See `LeaseStore.join_node`. Raises Full."""
        check_node(name, link_address=link_address, door_address=door_address, version=version)
        check_ttl(ttl_ns)
        return await self._transact(
            OF_INSTALLATION,
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
            OF_INSTALLATION,
            lambda connection: leases.renew(
                connection, name, incarnation, draining=draining, ttl_ns=ttl_ns
            ),
        )

    async def nodes(self) -> tuple[NodeRow, ...]:
        """See `LeaseStore.nodes`."""
        rows = await self._select(OF_INSTALLATION, leases.SELECT_NODES, [])
        return tuple(map(leases.node_of, rows))

    async def expel_node(self, name: str, incarnation: int) -> None:
        """See `LeaseStore.expel_node`."""
        await self._execute(OF_INSTALLATION, leases.EXPEL, [name, incarnation])

    async def leave_node(self, name: str, incarnation: int) -> None:
        """See `LeaseStore.leave_node`."""
        await self._execute(OF_INSTALLATION, leases.LEAVE, [name, incarnation])

    async def acquire(self, key: UUID, *, owner: str, incarnation: int) -> int:
        """See `LeaseStore.acquire`. Raises NotFound, Fenced, Held."""
        check_node_name(owner)
        return await self._transact(
            f"{of_account(key)}; {OF_INSTALLATION}",
            lambda connection: leases.acquire(
                connection, key, owner=owner, incarnation=incarnation
            ),
        )

    async def release(self, key: UUID, *, owner: str, incarnation: int) -> None:
        """See `LeaseStore.release`."""
        await self._execute(of_account(key), leases.RELEASE, [key, owner, incarnation])

    # --- authorisations ---

    async def write_authorization(self, authorization: Authorization, *, epoch: int) -> None:
        """See `Store.write_authorization`. A removed account has no owner: Fenced."""
        validate(authorization)
        account_id = authorization.account_id

        async def write(connection: TrioConnection) -> None:
            if not await fetch(connection, _FENCE, [account_id, epoch]):
                raise Fenced(f"epoch {epoch} of account {account_id} is over")
            await connection.execute(AUTHORIZATIONS.upsert, AUTHORIZATIONS.row(authorization))

        await self._transact(of_account(account_id), write)

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
        check_limit(limit)
        query = AUTHORIZATIONS.select_page(tuple(equals), _LIVE if live_at else "true")
        wanted = [*([live_at] if live_at else []), *AUTHORIZATIONS.parameters(equals)]
        rows = await self._select(
            of_account(account_id), query, [account_id, *wanted, after, after, limit]
        )
        return tuple(map(AUTHORIZATIONS.value, rows))

    # --- the installation ---

    async def check_keys(self, fingerprints: Mapping[int, bytes]) -> None:
        """See `Store.check_keys`."""

        async def check(connection: TrioConnection) -> None:
            for key_id, fingerprint in sorted(fingerprints.items()):
                await connection.execute(_KNOW_KEY, [key_id, fingerprint])
                if not await fetch(connection, _SAME_KEY, [key_id, fingerprint]):
                    raise Conflict("encryption_key", "id")

        await self._transact(OF_INSTALLATION, check)

    async def put_relay(self, relay: Relay) -> None:
        """See `Store.put_relay`. Raises InvalidReference unless a relay token has its token_id."""
        validate(relay)
        await self._execute(OF_INSTALLATION, RELAYS.upsert, RELAYS.row(relay))

    async def relays(self) -> tuple[Relay, ...]:
        """See `Store.relays`."""
        rows = await self._select(OF_INSTALLATION, RELAYS.select(_ALL), [])
        return tuple(map(RELAYS.value, rows))
