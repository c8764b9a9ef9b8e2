"""What only a real PostgreSQL shows: walls between accounts, order under load, cancellation."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any
from uuid import UUID, uuid4

import attrs
import psycopg
import pytest
import trio

from actors.model import (
    KIND_OF,
    Account,
    Authorization,
    Change,
    Client,
    Principal,
    Resource,
    Site,
    Token,
)
from actors.store.embedded import EmbeddedPostgres
from actors.store.interface import Conflict, Fenced, Put, Remove, Unavailable
from actors.store.postgres import Logins, MigrationError, PostgresStore, migrate
from actors.store.postgres.connection import TrioConnection
from actors.store.postgres.mapping import TABLES
from actors.store.postgres.migrate import known_migrations
from channel.messages import IpText
from tests.nodes import joined

pytestmark = pytest.mark.system

AT = datetime(2026, 1, 1, tzinfo=UTC)
ACME = Account(id=UUID(int=0xA), name="Acme", slug="acme", created_at=AT)
BETA = Account(id=UUID(int=0xB), name="Beta", slug="beta", created_at=AT)
PATIENCE_S = 60


@pytest.fixture
async def store(database: Logins) -> AsyncIterator[PostgresStore]:
    async with PostgresStore.open(database, migrated=True) as store:
        yield store


def site(account: Account, name: str | None = None) -> Site:
    id = uuid4()
    return Site(id=id, account_id=account.id, name=name or str(id), created_at=AT)


def authorization(account: Account) -> Authorization:
    some = uuid4()
    return Authorization(
        id=some, account_id=account.id, policy_id=some, client_id=some, gateway_id=some,
        resource_id=some, token_id=some, connection_id=some, remote_ip=IpText("192.0.2.1"),
        created_at=AT, expires_at=AT + timedelta(hours=1),
    )  # fmt: skip


async def all_changes(store: PostgresStore, account: Account) -> list[Change]:
    changes: list[Change] = []
    while page := await store.changes(account.id, after=len(changes), limit=100):
        changes += page
    return changes


# --- walls ---------------------------------------------------------------------------------------


async def fill(store: PostgresStore, account: Account) -> None:
    """One row of the account in every table that holds rows of accounts."""
    person = Principal(id=uuid4(), account_id=account.id, name="Ann", created_at=AT)
    token = Token(
        id=uuid4(), account_id=account.id, kind="client", name="t", hash=bytes(32),
        principal_id=person.id, created_at=AT,
    )  # fmt: skip
    client = Client(
        id=uuid4(), account_id=account.id, principal_id=person.id, token_id=token.id,
        device_key=bytes(32), name="laptop", ipv4=IPv4Address("100.64.0.1"),
        ipv6=IPv6Address("fd48:4c57:5900::1"), created_at=AT,
    )  # fmt: skip
    await store.apply(
        account.id, [Put(account), Put(person), Put(token), Put(client)], who="test", at=AT
    )
    epoch = await store.acquire(account.id, **await joined(store, "test"))
    await store.write_authorization(authorization(account), epoch=epoch)


FILLED = (
    "account", "principal", "token", "client", "account_sequence", "change", "lease",
    '"authorization"',
)  # fmt: skip


def visible(connection: psycopg.Connection, table: str) -> int:
    row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("login", ["application", "owner"])
async def test_without_a_setting_no_row_is_visible_and_with_one_only_the_accounts_own(
    store: PostgresStore, database: Logins, login: str
) -> None:
    await fill(store, ACME)
    await fill(store, BETA)
    with psycopg.connect(getattr(database, login)) as connection:
        for table in FILLED:
            assert visible(connection, table) == 0, table
        connection.execute("SELECT set_config('holloway.account', %s, true)", [str(ACME.id)])
        for table in FILLED:
            expected = 4 if table == "change" else 1
            assert visible(connection, table) == expected, table
        connection.commit()
        for table in FILLED:
            assert visible(connection, table) == 0, (
                f"{table}: the setting ends with its transaction"
            )


def test_every_table_has_forced_row_level_security(database: Logins) -> None:
    with psycopg.connect(database.owner) as connection:
        rows = connection.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'holloway'::regnamespace"
            " AND relkind = 'r' AND NOT (relrowsecurity AND relforcerowsecurity)"
        ).fetchall()
    assert rows == [("migration",)]


async def test_the_application_cannot_write_into_another_account(
    store: PostgresStore, database: Logins
) -> None:
    await fill(store, ACME)
    await fill(store, BETA)
    foreign = site(BETA)
    table = TABLES["site"]
    with psycopg.connect(database.application) as connection:
        connection.execute("SELECT set_config('holloway.account', %s, true)", [str(ACME.id)])
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(table.insert, table.row(foreign))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE change SET who = 'nobody'",
        "DELETE FROM change",
        "TRUNCATE change",
        'DELETE FROM "authorization"',
        "DELETE FROM account_sequence",
        "UPDATE principal SET account_id = id",
        "UPDATE principal SET id = account_id",
        "INSERT INTO tunnel_address VALUES (scope_account(), '100.64.0.9')",
        "ALTER TABLE account DISABLE ROW LEVEL SECURITY",
        "CREATE TABLE more (id integer)",
        "SET ROLE holloway_owner",
    ],
)
async def test_the_application_has_no_right_that_it_does_not_need(
    store: PostgresStore, database: Logins, statement: str
) -> None:
    await fill(store, ACME)
    with psycopg.connect(database.application) as connection:
        connection.execute("SELECT set_config('holloway.account', %s, true)", [str(ACME.id)])
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement)


async def test_the_feed_sees_which_accounts_there_are_and_nothing_of_them(
    store: PostgresStore, database: Logins
) -> None:
    await fill(store, ACME)
    with psycopg.connect(database.feed, autocommit=True) as connection:
        assert connection.execute("SELECT account_id, number FROM account_sequence").fetchall() == [
            (ACME.id, 4)
        ]
        for table in ("account", "change", "token"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(f"SELECT * FROM {table}")


async def test_a_reference_into_another_account_is_refused_by_the_database_itself(
    store: PostgresStore, database: Logins
) -> None:
    await fill(store, ACME)
    await fill(store, BETA)
    (foreign,) = await store.list(BETA.id, "principal")
    with psycopg.connect(database.application) as connection:
        connection.execute("SELECT set_config('holloway.account', %s, true)", [str(ACME.id)])
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            connection.execute("UPDATE client SET principal_id = %s", [foreign.id])


async def test_the_database_itself_refuses_what_the_model_does_not_allow(
    store: PostgresStore, database: Logins
) -> None:
    """Whoever writes past the store's own checks, a restore or a hand at the console."""
    await fill(store, ACME)
    (person,) = await store.list(ACME.id, "principal")
    (token,) = await store.list(ACME.id, "token")
    (client,) = await store.list(ACME.id, "client")
    hall = site(ACME)
    await store.apply(ACME.id, [Put(hall)], who="test", at=AT)
    web = Resource(
        id=uuid4(), account_id=ACME.id, site_ids=(hall.id,), name="web", kind="cidr",
        address="10.0.0.0/8", created_at=AT,
    )  # fmt: skip
    bad: list[Any] = [
        attrs.evolve(person, name=""),
        attrs.evolve(person, name="two\nlines"),
        attrs.evolve(person, name="red \x9b31m"),
        attrs.evolve(person, name="x" * 256),
        attrs.evolve(person, role="king"),
        attrs.evolve(person, email="nobody"),
        attrs.evolve(web, address="10.0.0.1/8"),
        attrs.evolve(web, kind="ip", address="10.0.0.0/8"),
        attrs.evolve(web, kind="dns"),
        attrs.evolve(token, hash=bytes(31)),
        attrs.evolve(token, principal_id=None),
        attrs.evolve(token, site_id=hall.id),
        attrs.evolve(token, kind="relay"),
        attrs.evolve(token, max_uses=0),
        attrs.evolve(client, device_key=b""),
        attrs.evolve(client, ipv4=IPv4Address("10.0.0.1")),
        attrs.evolve(client, ipv4=IPv6Address("::1")),
        attrs.evolve(client, ipv6=IPv6Address("fd00::1")),
        attrs.evolve(ACME, slug="Acme"),
        attrs.evolve(ACME, range_ipv4=IPv4Network("10.0.0.0/8")),
        attrs.evolve(ACME, range_ipv6=IPv6Network("fd00::/64")),
    ]
    refusals = (psycopg.errors.IntegrityError, psycopg.errors.DataError)
    with psycopg.connect(database.application) as connection:
        connection.execute("SELECT set_config('holloway.account', %s, true)", [str(ACME.id)])
        for entity in bad:
            table = TABLES[KIND_OF[type(entity)]]
            is_new = entity.id == web.id
            statement = table.insert if is_new else table.update
            row = table.row(entity) if is_new else table.changed_row(entity)
            with pytest.raises(refusals), connection.transaction():
                connection.execute(statement, row)
        table = TABLES["resource"]
        connection.execute(table.insert, table.row(web))


# --- order, fencing, the feed --------------------------------------------------------------------


async def test_eight_writers_leave_no_gap_and_followers_see_every_change_in_order(
    store: PostgresStore,
) -> None:
    accounts = [ACME, BETA]
    for account in accounts:
        await store.apply(account.id, [Put(account)], who="test", at=AT)
    writers, rounds = 8, 15
    total = 1 + writers * rounds
    seen: dict[UUID, list[int]] = {account.id: [] for account in accounts}

    async def write(account: Account) -> None:
        for _ in range(rounds // 2):
            await store.apply(account.id, [Put(site(account)), Put(site(account))], who="w", at=AT)
        await store.apply(account.id, [Put(site(account))], who="w", at=AT)

    async def follow() -> None:
        async with store.wakeups() as wakeups:
            async for account_id in wakeups:
                known = seen[account_id]
                changes = await store.changes(account_id, after=len(known))
                known.extend(change.number for change in changes)
                if all(len(numbers) == total for numbers in seen.values()):
                    return

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            for _ in range(writers):
                for account in accounts:
                    nursery.start_soon(write, account)
    for account in accounts:
        assert seen[account.id] == list(range(1, total + 1))
        contents = await store.contents(account.id)
        assert contents.number == total
        assert len(contents.entities) == total - 1


async def test_of_writers_that_want_one_name_exactly_one_gets_it(store: PostgresStore) -> None:
    await store.apply(ACME.id, [Put(ACME)], who="test", at=AT)
    outcomes = []

    async def write() -> None:
        try:
            await store.apply(ACME.id, [Put(site(ACME, "Hall"))], who="w", at=AT)
        except Conflict as error:
            outcomes.append(error.field)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(write)
    assert outcomes == ["name"] * 7
    assert [change.number for change in await all_changes(store, ACME)] == [1, 2]


async def test_of_one_token_with_five_uses_twenty_enrolments_get_five(store: PostgresStore) -> None:
    await fill(store, ACME)
    (token,) = await store.list(ACME.id, "token")
    assert isinstance(token, Token)
    await store.apply(ACME.id, [Put(attrs.evolve(token, max_uses=5))], who="test", at=AT)
    allowed = []

    async def enrol() -> None:
        allowed.append(await store.use_token(token.id, at=AT))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(enrol)
    assert sorted(allowed) == [False] * 15 + [True] * 5


async def test_the_former_owner_of_an_account_is_fenced_off(store: PostgresStore) -> None:
    await store.apply(ACME.id, [Put(ACME)], who="test", at=AT)
    one = await joined(store, "one")
    first = await store.acquire(ACME.id, **one)
    await store.write_authorization(authorization(ACME), epoch=first)
    await store.expel_node("one", one["incarnation"])
    second = await store.acquire(ACME.id, **await joined(store, "two"))
    assert second == first + 1
    late = authorization(ACME)
    with pytest.raises(Fenced):
        await store.write_authorization(late, epoch=first)
    await store.write_authorization(authorization(ACME), epoch=second)
    assert late not in await store.authorizations(ACME.id)
    await store.apply(ACME.id, [Remove("account", ACME.id)], who="test", at=AT)
    with pytest.raises(Fenced):
        await store.write_authorization(authorization(ACME), epoch=second)


async def test_an_owner_that_is_replaced_while_it_writes_is_fenced_or_first(
    store: PostgresStore,
) -> None:
    await store.apply(ACME.id, [Put(ACME)], who="test", at=AT)
    one, two = await joined(store, "one"), await joined(store, "two")
    epochs = [await store.acquire(ACME.id, **one)]
    fenced_at: list[int] = []
    written: list[int] = []

    async def write() -> None:
        epoch = epochs[0]
        for number in range(100):
            try:
                await store.write_authorization(authorization(ACME), epoch=epoch)
                written.append(number)
            except Fenced:
                fenced_at.append(number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        while len(written) < 5:
            await trio.sleep(0)
        await store.expel_node("one", one["incarnation"])
        await store.acquire(ACME.id, **two)
        after = len(await store.authorizations(ACME.id, limit=1000))
    assert len(fenced_at) + len(written) == 100
    assert len(await store.authorizations(ACME.id, limit=1000)) == after, "none came after"


# --- cancellation --------------------------------------------------------------------------------


async def test_cancelled_operations_leave_neither_half_a_change_nor_a_spoilt_connection(
    store: PostgresStore, database: Logins
) -> None:
    await store.apply(ACME.id, [Put(ACME)], who="test", at=AT)
    chance = random.Random(20)

    async def write() -> None:
        for _ in range(25):
            with trio.move_on_after(chance.uniform(0, 0.01)):
                await store.apply(ACME.id, [Put(site(ACME)), Put(site(ACME))], who="w", at=AT)

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(write)
        await store.apply(ACME.id, [Put(site(ACME)), Put(site(ACME))], who="w", at=AT)
    changes = await all_changes(store, ACME)
    assert [change.number for change in changes] == list(range(1, len(changes) + 1))
    assert len(changes) % 2 == 1, "both sites of a transaction or neither"
    assert len((await store.contents(ACME.id)).entities) == len(changes) - 1
    statistics = store.statistics()
    assert statistics.used == statistics.waiting == 0
    assert statistics.discarded > 0, "or nothing was cancelled inside of a query"


async def test_a_connection_waits_for_a_long_query_and_a_large_one_without_blocking_others(
    database: Logins,
) -> None:
    connection = await TrioConnection.open(database.application)
    try:
        large = "x" * 20_000_000
        async with trio.open_nursery() as nursery:
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    await trio.sleep(0.001)
                    ticks += 1

            nursery.start_soon(tick)
            cursor = await connection.execute("SELECT %s::text, pg_sleep(0.2)", [large])
            assert await cursor.fetchone() == (large, "")
            nursery.cancel_scope.cancel()
        assert ticks > 0
    finally:
        connection.finish()


async def test_a_closed_store_refuses_at_once(database: Logins) -> None:
    async with PostgresStore.open(database, migrated=True, timeout_s=0.2) as store:
        pass
    with pytest.raises(Unavailable):
        await store.accounts()


async def test_an_exhausted_pool_makes_operations_wait_and_then_refuses(database: Logins) -> None:
    async with PostgresStore.open(database, migrated=True, connections=1, timeout_s=0.5) as store:
        await store.apply(ACME.id, [Put(ACME)], who="test", at=AT)
        with psycopg.connect(database.application) as blocker:
            blocker.execute("SELECT set_config('holloway.account', %s, true)", [str(ACME.id)])
            blocker.execute("SELECT FROM account_sequence FOR UPDATE")
            refused = []

            async def write() -> None:
                with pytest.raises(Unavailable):
                    await store.apply(ACME.id, [Put(site(ACME))], who="w", at=AT)
                refused.append(True)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                nursery.start_soon(write)
        assert refused == [True, True]
        await store.apply(ACME.id, [Put(site(ACME))], who="w", at=AT)


# --- migrations ----------------------------------------------------------------------------------


async def test_of_racing_migration_runners_each_file_has_one_winner(
    postgres: EmbeddedPostgres,
) -> None:
    name = "test_racing"
    with psycopg.connect(postgres.logins().owner, autocommit=True) as owner:
        owner.execute(f"CREATE DATABASE {name}")
        try:
            applied: list[str] = []

            async def run() -> None:
                applied.extend(await migrate(postgres.logins(name)))

            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(run)
            assert sorted(applied) == [migration.name for migration in known_migrations()]
            assert await migrate(postgres.logins(name)) == ()
        finally:
            owner.execute(f"DROP DATABASE {name}")


async def test_a_migration_that_changed_after_it_was_applied_is_refused(database: Logins) -> None:
    with psycopg.connect(database.owner) as owner:
        owner.execute("UPDATE migration SET checksum = 'other'")
    with pytest.raises(MigrationError, match="not what was applied"):
        await migrate(database)


async def test_a_newer_releases_migrations_are_left_alone(database: Logins) -> None:
    with psycopg.connect(database.owner) as owner:
        owner.execute("INSERT INTO migration VALUES (9999, '9999_future.sql', 'x')")
    assert await migrate(database) == ()
