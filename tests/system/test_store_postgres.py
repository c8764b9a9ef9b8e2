"""What only a real PostgreSQL shows: walls between accounts, order under load, cancellation.

Longer than other files: all of it works on the same accounts, filled in the same way.
"""

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
    AccountLimits,
    Authorization,
    AuthProvider,
    Change,
    Client,
    Directory,
    DnsUpstream,
    Fact,
    Group,
    Identity,
    Policy,
    PolicyTest,
    Principal,
    Resource,
    Retention,
    SealedSecret,
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


async def test_every_table_has_forced_row_level_security(
    store: PostgresStore, database: Logins
) -> None:
    await store.expire(datetime.now(UTC))  # makes partitions
    with psycopg.connect(database.owner) as connection:
        partitions = connection.execute(
            "SELECT count(*) FROM pg_inherits JOIN pg_class"
            " ON pg_class.oid = inhrelid WHERE relkind = 'r'"
        ).fetchone()
        assert partitions is not None
        assert partitions[0] >= 9
        rows = connection.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'holloway'::regnamespace"
            " AND relkind IN ('r', 'p') AND NOT (relrowsecurity AND relforcerowsecurity)"
        ).fetchall()
    assert rows == [("migration",)]


def test_what_runs_with_the_owners_rights_looks_nowhere_else(database: Logins) -> None:
    with psycopg.connect(database.owner) as connection:
        rows = connection.execute(
            "SELECT proname, proconfig, has_function_privilege('public', oid, 'EXECUTE')"
            " FROM pg_proc WHERE pronamespace = 'holloway'::regnamespace AND prosecdef"
        ).fetchall()
    assert rows
    assert [row for row in rows if row[1:] != (["search_path=holloway, pg_temp"], False)] == []


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
    hall, common = site(ACME), {"account_id": ACME.id, "created_at": AT}
    internet = attrs.evolve(site(ACME), kind="internet")
    box = SealedSecret(key_id=1, box=bytes(40))
    provider = AuthProvider(
        **common, id=uuid4(), kind="okta", name="o", issuer="https://id.example", client_id="h",
        client_secret=box,
    )  # fmt: skip
    mail = AuthProvider(**common, id=uuid4(), kind="email", name="m")
    directory = Directory(**common, id=uuid4(), kind="okta", name="d", credentials=box)
    identity = Identity(
        **common, id=uuid4(), principal_id=person.id, auth_provider_id=provider.id, issuer="i",
        subject="s",
    )  # fmt: skip
    group = Group(**common, id=uuid4(), name="g")
    synced = attrs.evolve(
        group, id=uuid4(), name="s", kind="synced", directory_id=directory.id, external_id="x"
    )
    lan = Resource(
        **common, id=uuid4(), site_ids=(hall.id,), name="lan", kind="cidr", address="10.0.0.0/8"
    )
    everything = attrs.evolve(
        lan, id=uuid4(), name="i", kind="internet", address="", site_ids=(internet.id,)
    )
    pool = attrs.evolve(
        lan, id=uuid4(), name="p", kind="device_pool", address="", site_ids=(),
        device_ids=(client.id,),
    )  # fmt: skip
    policy = Policy(**common, id=uuid4(), group_id=group.id, resource_id=lan.id)
    test = PolicyTest(
        **common, id=uuid4(), name="t", principal_id=person.id, resource_id=lan.id,
        expected="denied",
    )  # fmt: skip
    api = attrs.evolve(token, id=uuid4(), kind="api", scopes=("*:read",))
    good: list[Any] = [
        hall, internet, provider, mail, directory, identity, group, synced, lan, everything, pool,
        policy, test, api,
    ]  # fmt: skip
    await store.apply(ACME.id, [Put(entity) for entity in good], who="test", at=AT)
    nobody, dns = uuid4(), {"kind": "dns", "address": "*.corp.example"}
    bad: list[Any] = [
        attrs.evolve(person, name=""),
        attrs.evolve(person, name="two\nlines"),
        attrs.evolve(person, name="red \x9b31m"),
        attrs.evolve(person, name="x" * 256),
        attrs.evolve(person, role="king"),
        attrs.evolve(person, email="nobody"),
        attrs.evolve(provider, kind="saml"),
        attrs.evolve(provider, issuer=None),
        attrs.evolve(provider, issuer="http://id.example"),
        attrs.evolve(provider, issuer="https://id.example/?a"),
        attrs.evolve(provider, client_id=None),
        attrs.evolve(provider, client_secret=attrs.evolve(box, box=bytes(39))),
        attrs.evolve(provider, context="everywhere"),
        attrs.evolve(provider, client_session_s=3_599),
        attrs.evolve(provider, portal_session_s=86_401),
        attrs.evolve(provider, name="m"),
        attrs.evolve(mail, issuer="https://id.example"),
        attrs.evolve(mail, client_id="h"),
        attrs.evolve(mail, client_secret=box),
        attrs.evolve(directory, kind="ldap"),
        attrs.evolve(directory, credentials=attrs.evolve(box, box=b"")),
        attrs.evolve(directory, last_error="two\nlines"),
        attrs.evolve(identity, id=uuid4()),
        attrs.evolve(identity, subject=""),
        attrs.evolve(identity, principal_id=nobody),
        attrs.evolve(identity, auth_provider_id=nobody),
        attrs.evolve(group, kind="synced"),
        attrs.evolve(group, directory_id=directory.id),
        attrs.evolve(group, external_id="x"),
        attrs.evolve(synced, directory_id=None),
        attrs.evolve(synced, external_id=None),
        attrs.evolve(synced, directory_id=nobody),
        attrs.evolve(synced, id=uuid4(), name="again"),
        attrs.evolve(hall, kind="internet"),
        attrs.evolve(hall, kind="elsewhere"),
        attrs.evolve(internet, kind="static"),
        attrs.evolve(lan, address="10.0.0.1/8"),
        attrs.evolve(lan, kind="ip", address="10.0.0.0/8"),
        attrs.evolve(lan, kind="robot"),
        attrs.evolve(lan, site_ids=()),
        attrs.evolve(lan, site_ids=(nobody,)),
        attrs.evolve(lan, site_ids=(hall.id, nobody)),
        attrs.evolve(lan, site_ids=(hall.id, hall.id)),
        attrs.evolve(lan, site_ids=tuple(uuid4() for _ in range(9))),
        attrs.evolve(lan, device_ids=(client.id,)),
        attrs.evolve(lan, ip_stack="v4"),
        attrs.evolve(lan, **dns, ip_stack="v5"),
        attrs.evolve(lan, kind="dns", address="corp.*"),
        attrs.evolve(lan, kind="dns", address="a**.example"),
        attrs.evolve(lan, kind="dns", address="10.0.0.1"),
        attrs.evolve(lan, kind="dns", address="Corp.example"),
        attrs.evolve(lan, kind="internet", address="", site_ids=(internet.id,)),
        attrs.evolve(everything, site_ids=(hall.id,)),
        attrs.evolve(everything, site_ids=(internet.id, hall.id)),
        attrs.evolve(everything, address="0.0.0.0/0"),
        attrs.evolve(pool, site_ids=(hall.id,)),
        attrs.evolve(pool, device_ids=(nobody,)),
        attrs.evolve(pool, device_ids=(client.id, client.id)),
        attrs.evolve(pool, device_ids=tuple(uuid4() for _ in range(101))),
        attrs.evolve(test, name=""),
        attrs.evolve(test, expected="maybe"),
        attrs.evolve(test, resource_id=nobody),
        attrs.evolve(test, auth_provider_id=nobody),
        attrs.evolve(test, id=uuid4()),
        attrs.evolve(token, hash=bytes(31)),
        attrs.evolve(token, principal_id=None),
        attrs.evolve(token, site_id=hall.id),
        attrs.evolve(token, kind="relay"),
        attrs.evolve(token, max_uses=0),
        attrs.evolve(token, scopes=("*:read",)),
        attrs.evolve(token, auth_provider_id=nobody),
        attrs.evolve(api, scopes=("policies:delete",)),
        attrs.evolve(api, scopes=("*:read", "*:read")),
        attrs.evolve(api, scopes=tuple(f"{'a' * n}:read" for n in range(1, 66))),
        attrs.evolve(api, auth_provider_id=provider.id),
        attrs.evolve(client, device_key=b""),
        attrs.evolve(client, ipv4=IPv4Address("10.0.0.1")),
        attrs.evolve(client, ipv4=IPv6Address("::1")),
        attrs.evolve(client, ipv6=IPv6Address("fd00::1")),
        attrs.evolve(client, posture=(Fact(name="os", value=1),) * 33),
        attrs.evolve(ACME, slug="Acme"),
        attrs.evolve(ACME, range_ipv4=IPv4Network("10.0.0.0/8")),
        attrs.evolve(ACME, range_ipv6=IPv6Network("fd00::/64")),
        attrs.evolve(ACME, names_ipv4=IPv4Network("100.64.0.0/12")),
        attrs.evolve(ACME, names_ipv4=IPv4Network("100.100.111.0/25")),
        attrs.evolve(ACME, names_ipv6=IPv6Network("fd48:4c57:5900::/48")),
        attrs.evolve(ACME, resolver_ipv4=IPv4Address("100.64.0.1")),
        attrs.evolve(ACME, search_domain="corp..example"),
        attrs.evolve(ACME, search_domain="10.0.0.1"),
        attrs.evolve(ACME, dns_upstreams=(DnsUpstream(kind="do53", address="dns.example"),)),
        attrs.evolve(ACME, dns_upstreams=(DnsUpstream(kind="doh", address="http://a.example"),)),
        attrs.evolve(ACME, dns_upstreams=(DnsUpstream(kind="do53", address="192.0.2.1"),) * 9),
        attrs.evolve(ACME, limits=AccountLimits(sites=-1)),
        attrs.evolve(ACME, retention=Retention(flows_days=0)),
        attrs.evolve(ACME, retention=Retention(changes_days=3_651)),
    ]
    known = {ACME.id, person.id, token.id, client.id} | {entity.id for entity in good}
    refusals = (psycopg.errors.IntegrityError, psycopg.errors.DataError)
    with psycopg.connect(database.application) as connection:
        connection.execute("SELECT set_config('holloway.account', %s, true)", [str(ACME.id)])
        for entity in bad:
            table = TABLES[KIND_OF[type(entity)]]
            is_new = entity.id not in known
            statement = table.insert if is_new else table.update
            row = table.row(entity) if is_new else table.changed_row(entity)
            with pytest.raises(refusals), connection.transaction():
                connection.execute(statement, row)
        for change in ({"conditions": '{"weather": null}'}, {"conditions": '{"remote_ip": {}}'}):
            with pytest.raises(refusals), connection.transaction():
                connection.execute("UPDATE policy SET conditions = %(conditions)s", change)
        for id in (hall.id, internet.id):
            with pytest.raises(refusals), connection.transaction():
                connection.execute("DELETE FROM site WHERE id = %s", [id])
        with pytest.raises(refusals), connection.transaction():
            connection.execute("DELETE FROM client WHERE id = %s", [client.id])
        for entity in good:
            table = TABLES[KIND_OF[type(entity)]]
            connection.execute(table.update, table.changed_row(entity))
        moved = attrs.evolve(everything, kind="cidr", address="10.0.0.0/8", site_ids=(hall.id,))
        connection.execute(TABLES["resource"].update, TABLES["resource"].changed_row(moved))
        connection.execute(TABLES["resource"].update, TABLES["resource"].changed_row(everything))


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
