"""Answers, logs and their end, as both stores promise them and as PostgreSQL does it: partitions,
rights, and an upgrade of what an earlier release wrote."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import attrs
import psycopg
import pytest
import trio

from actors.logs import LOG_FILTERS, LOG_KINDS, FlowLog, Log, RequestLog, Seen, SessionLog
from actors.model import Account, Change, Client, Group, Principal, Retention, Site, Token
from actors.store.embedded import EmbeddedPostgres
from actors.store.interface import (
    ANSWER_KEPT,
    MAX_ANSWER_BYTES,
    Answer,
    Conflict,
    Invalid,
    Outdated,
    Pruned,
    Put,
    Remove,
    Repeated,
    Store,
)
from actors.store.memory import MemoryStore
from actors.store.postgres import Logins, PostgresStore, migrate
from actors.store.postgres.migrate import known_migrations
from channel.messages import IpText

pytestmark = pytest.mark.system

AT = datetime(2026, 3, 20, tzinfo=UTC)
DAY = timedelta(days=1)
ACME = Account(id=UUID(int=0xA), name="Acme", slug="acme", created_at=AT)
BETA = Account(id=UUID(int=0xB), name="Beta", slug="beta", created_at=AT)
ANN = Principal(id=UUID(int=1), account_id=ACME.id, name="Ann", created_at=AT)
API = Token(
    id=UUID(int=2), account_id=ACME.id, kind="api", name="t", hash=bytes(32),
    principal_id=ANN.id, scopes=("*:write",), created_at=AT,
)  # fmt: skip
ANSWER = Answer(token_id=API.id, key="k", request_hash=bytes(32), status=201, body=b"{}", at=AT)


@pytest.fixture(params=["memory", "postgres"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    database = request.getfixturevalue("database")
    async with PostgresStore.open(database, migrated=True) as postgres:
        yield postgres


@pytest.fixture
async def postgres_store(database: Logins) -> AsyncIterator[PostgresStore]:
    async with PostgresStore.open(database, migrated=True) as store:
        yield store


async def fill(store: Store, *accounts: Account) -> None:
    for account in accounts or (ACME,):
        await store.apply(account.id, [Put(account)], who="test", at=AT)
    if not accounts:
        await store.apply(ACME.id, [Put(ANN), Put(API)], who="test", at=AT)


def site(name: str) -> Site:
    return Site(id=uuid4(), account_id=ACME.id, name=name, created_at=AT)


def request_at(at: datetime, number: int, account: Account = ACME) -> RequestLog:
    return RequestLog(
        id=UUID(int=number), account_id=account.id, at=at, method="GET", path="/v1/sites",
        status=200, token_id=API.id,
    )  # fmt: skip


def every_kind(at: datetime, number: int) -> list[Log]:
    some = UUID(int=number)
    here = IpText("192.0.2.1")
    return [
        request_at(at, number),
        SessionLog(
            id=some, account_id=ACME.id, at=at, agent="client", event="connected", token_id=some,
            remote_ip=here,
        ),
        FlowLog(
            id=some, account_id=ACME.id, at=at, reporter="gateway", authorization_id=some,
            client_id=some, gateway_id=some, resource_id=some, protocol="udp", source=here,
            destination=here, started_at=at, ended_at=at, ending="a_new_one", flows=2**63 - 1,
        ),
    ]  # fmt: skip


# --- once only -----------------------------------------------------------------------------------


async def test_a_key_counts_once_and_tells_what_was_answered(store: Store) -> None:
    await fill(store)
    await store.apply(ACME.id, [Put(site("Hall"))], who="t", at=AT, answer=ANSWER)
    again = attrs.evolve(ANSWER, status=500, at=AT + ANSWER_KEPT - timedelta(microseconds=1))
    with pytest.raises(Repeated) as repeated:
        await store.apply(ACME.id, [Put(site("Loft"))], who="t", at=AT, answer=again)
    assert repeated.value.record == ANSWER
    assert len(await store.list(ACME.id, "site")) == 1
    late = attrs.evolve(ANSWER, status=202, at=AT + ANSWER_KEPT)
    await store.apply(ACME.id, [Put(site("Loft"))], who="t", at=AT, answer=late)
    assert await store.answer_of(API.id, "k") == late


async def test_an_answer_may_tell_the_number_that_the_transaction_came_to(store: Store) -> None:
    await fill(store)
    number = (await store.contents(ACME.id)).number
    two = [Put(site("Hall")), Put(site("Loft"))]
    changes = await store.apply(
        ACME.id, two, who="t", at=AT, answer=ANSWER, tell=lambda last: b"%d" % last
    )
    assert changes[-1].number == number + 2
    told = attrs.evolve(ANSWER, body=b"%d" % (number + 2))
    assert await store.answer_of(API.id, "k") == told
    other = attrs.evolve(ANSWER, key="other")
    with pytest.raises(Invalid):
        await store.apply(
            ACME.id,
            [Put(site("Barn"))],
            who="t",
            at=AT,
            answer=other,
            tell=lambda _: bytes(MAX_ANSWER_BYTES + 1),
        )
    assert await store.answer_of(API.id, "other") is None
    assert len(await store.list(ACME.id, "site")) == 2


async def test_a_refused_transaction_leaves_its_key_free(store: Store) -> None:
    await fill(store)
    twice = [Put(site("Hall")), Put(site("Hall"))]
    with pytest.raises(Exception, match="taken"):
        await store.apply(ACME.id, twice, who="t", at=AT, answer=ANSWER)
    assert await store.answer_of(API.id, "k") is None
    await store.apply(ACME.id, twice[:1], who="t", at=AT, answer=ANSWER)


async def test_an_answer_goes_with_its_token(store: Store) -> None:
    await fill(store)
    await store.apply(ACME.id, [Put(site("Hall"))], who="t", at=AT, answer=ANSWER)
    await store.apply(ACME.id, [Remove("token", API.id)], who="t", at=AT)
    assert await store.answer_of(API.id, "k") is None


async def test_of_eight_calls_with_one_key_exactly_one_is_carried_out(
    postgres_store: PostgresStore,
) -> None:
    """Also across accounts, as an operator's calls are: nothing but the key serialises those."""
    store = postgres_store
    operator = Token(
        id=UUID(int=9), account_id=None, kind="operator", name="o", hash=bytes(32), created_at=AT
    )
    await store.put_installation_token(operator)
    accounts = [
        Account(id=uuid4(), name="A", slug=f"a{number}", created_at=AT) for number in range(8)
    ]
    answer = attrs.evolve(ANSWER, token_id=operator.id)
    outcomes: list[Answer | str] = []

    async def create(account: Account) -> None:
        try:
            await store.apply(account.id, [Put(account)], who="o", at=AT, answer=answer)
            outcomes.append("done")
        except Repeated as error:
            outcomes.append(error.record)

    async with trio.open_nursery() as nursery:
        for account in accounts:
            nursery.start_soon(create, account)
    assert outcomes.count("done") == 1
    assert outcomes.count(answer) == 7
    assert len(await store.accounts()) == 1


async def test_who_knows_an_older_number_changes_nothing(store: Store) -> None:
    await fill(store)
    await store.apply(ACME.id, [Put(site("Hall"))], who="t", at=AT, number=3)
    with pytest.raises(Outdated):
        await store.apply(ACME.id, [Put(site("Loft"))], who="t", at=AT, number=3)
    await store.apply(ACME.id, [Put(site("Loft"))], who="t", at=AT, number=4)
    with pytest.raises(Outdated):
        await store.apply(BETA.id, [Put(BETA)], who="t", at=AT, number=1)
    await store.apply(BETA.id, [Put(BETA)], who="t", at=AT, number=0)


async def test_a_number_stands_for_one_key_for_ever(store: Store) -> None:
    one, two, other = (bytes([n]) * 32 for n in range(3))
    await store.check_keys({1: one})
    await store.check_keys({1: one, 2: two})
    with pytest.raises(Conflict):
        await store.check_keys({1: one, 2: other, 3: other})
    with pytest.raises(Conflict):
        await store.check_keys({1: other})
    await store.check_keys({3: two})


# --- what ends -----------------------------------------------------------------------------------


async def test_changes_end_from_the_oldest_and_their_numbers_go_on(store: Store) -> None:
    kept = attrs.evolve(ACME, retention=Retention(changes_days=2))
    await fill(store, kept)
    for day in (1, 3, 2, 4):  # a clock went back between the second and the third
        await store.apply(ACME.id, [Put(site(f"day {day}"))], who="t", at=AT + day * DAY)
    expired = await store.expire(AT + 5 * DAY)
    assert expired.changes == 2, "the third is old enough only behind one that is not"
    with pytest.raises(Pruned) as gone:
        await store.changes(ACME.id, after=1)
    assert gone.value.number == 2
    assert await numbers(store, after=2) == [3, 4, 5]
    assert (await store.expire(AT + 5 * DAY)).changes == 0
    await store.expire(AT + 40 * DAY)
    assert await numbers(store, after=5) == []
    await store.apply(ACME.id, [Put(site("new"))], who="t", at=AT)
    assert await numbers(store, after=5) == [6]
    with pytest.raises(Pruned):
        await store.changes(ACME.id, after=0)


async def numbers(store: Store, *, after: int) -> list[int]:
    found: tuple[Change, ...] = await store.changes(ACME.id, after=after)
    return [change.number for change in found]


async def test_each_account_keeps_its_logs_for_as_long_as_it_says(store: Store) -> None:
    short, long = Retention(requests_days=1), Retention(requests_days=30)
    await fill(store, attrs.evolve(ACME, retention=short), attrs.evolve(BETA, retention=long))
    rows = [request_at(AT, 1), request_at(AT + 2 * DAY, 2), request_at(AT, 3, BETA)]
    await store.write_logs(rows)
    assert (await store.expire(AT + 2 * DAY)).logs == 1
    assert await store.logs(ACME.id, "request") == (rows[1],)
    assert await store.logs(BETA.id, "request") == (rows[2],)
    await store.apply(BETA.id, [Remove("account", BETA.id)], who="t", at=AT)
    await store.expire(AT + 2 * DAY)
    assert await store.logs(BETA.id, "request") == ()


async def test_logs_are_read_page_by_page_over_months(store: Store) -> None:
    await fill(store)
    rows = [request_at(AT + number * 10 * DAY, number) for number in range(9)]
    await store.write_logs(rows)
    seen: list[Log] = []
    before: UUID | None = None
    while page := await store.logs(ACME.id, "request", before=before, limit=2):
        seen += page
        before = page[-1].id
    assert seen == rows[::-1]
    some = {"since": AT + 10 * DAY, "until": AT + 40 * DAY, "equals": {"token_id": API.id}}
    assert await store.logs(ACME.id, "request", **some) == tuple(rows[3:0:-1])
    assert await store.logs(BETA.id, "request") == ()
    with pytest.raises(ValueError, match="asked for by"):
        await store.logs(ACME.id, "request", equals={"path": API.id})


async def test_logs_of_several_accounts_are_written_together_or_not_at_all(store: Store) -> None:
    await fill(store)
    rows = [request_at(AT, 1), request_at(AT, 2, BETA)]
    with pytest.raises(Exception, match="account_id names nothing"):
        await store.write_logs(rows)
    assert await store.logs(ACME.id, "request") == ()
    await fill(store, BETA)
    await store.write_logs(rows)
    await store.write_logs(rows)
    for account, row in ((ACME, rows[0]), (BETA, rows[1])):
        assert await store.logs(account.id, "request") == (row,)


# --- sightings -----------------------------------------------------------------------------------


async def test_devices_are_seen_together_and_one_that_is_gone_costs_no_other(store: Store) -> None:
    await fill(store)
    laptops = [
        Client(
            id=UUID(int=number), account_id=ACME.id, principal_id=ANN.id, token_id=API.id,
            device_key=bytes([number]) * 32, name="laptop", ipv4=ACME.range_ipv4[number],
            ipv6=ACME.range_ipv6[number], created_at=AT,
        )
        for number in range(10, 13)
    ]  # fmt: skip
    token = attrs.evolve(API, kind="client", scopes=(), id=UUID(int=3), hash=bytes(31) + b"1")
    laptops = [attrs.evolve(each, token_id=token.id) for each in laptops]
    await store.apply(ACME.id, [Put(token), *map(Put, laptops)], who="test", at=AT)
    await store.apply(ACME.id, [Remove("client", laptops[1].id)], who="test", at=AT)
    seen = [
        Seen(device_id=each.id, at=AT, version=each.name, remote_ip=IpText("192.0.2.1"))
        for each in reversed(laptops)
    ]
    await store.note_seen(ACME.id, seen)
    kept = {each.device_id: each for each in seen if each.device_id != laptops[1].id}
    assert await store.seen(ACME.id, [each.id for each in laptops]) == kept
    with pytest.raises(ValueError, match="named twice"):
        await store.note_seen(ACME.id, [seen[0], attrs.evolve(seen[0], at=AT + DAY)])
    await store.note_seen(BETA.id, seen)
    assert await store.seen(ACME.id, [each.id for each in laptops]) == kept


# --- partitions ----------------------------------------------------------------------------------


def partitions(database: Logins) -> set[str]:
    with psycopg.connect(database.owner) as owner:
        rows = owner.execute(
            "SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE relkind = 'r'"
        ).fetchall()
    return {name for (name,) in rows}


async def test_months_are_made_ahead_and_dropped_when_every_accounts_time_is_over(
    postgres_store: PostgresStore, database: Logins
) -> None:
    store = postgres_store
    kept = Retention(requests_days=40, sessions_days=1, flows_days=1)
    await fill(store, attrs.evolve(ACME, retention=kept))
    await store.write_logs([row for month in range(3) for row in every_kind(AT, month)])
    assert partitions(database) == {f"{kind}_log_2026_03" for kind in LOG_KINDS}
    await store.expire(AT)
    assert partitions(database) == {
        f"{kind}_log_2026_{month:02d}" for kind in LOG_KINDS for month in (3, 4, 5)
    }
    await store.expire(datetime(2026, 5, 5, tzinfo=UTC))
    left = {name for name in partitions(database) if name.endswith(("_03", "_04"))}
    assert left == {"request_log_2026_03", "request_log_2026_04"}, "40 days reach back to March"
    assert await store.logs(ACME.id, "request") == ()
    expired = await store.expire(datetime(2026, 5, 12, tzinfo=UTC))
    assert expired.partitions == 1
    assert "request_log_2026_03" not in partitions(database)


async def test_writers_readers_and_two_that_expire_do_not_disturb_each_other(
    postgres_store: PostgresStore,
) -> None:
    store = postgres_store
    await fill(store, attrs.evolve(ACME, retention=Retention(requests_days=1)))
    written = 0

    async def write() -> None:
        nonlocal written
        for number in range(30):
            await store.write_logs([request_at(AT + number * 10 * DAY, number)])
            await store.logs(ACME.id, "request")
            written += 1

    async def expire() -> None:
        for number in range(10):
            await store.expire(AT + number * 30 * DAY)

    async with trio.open_nursery() as nursery:
        for task in (write, expire, expire):
            nursery.start_soon(task)
    assert written == 30
    await store.expire(AT + 290 * DAY)
    (last,) = await store.logs(ACME.id, "request")
    assert last.id == UUID(int=29)


async def test_a_partition_is_no_way_round_the_walls(
    postgres_store: PostgresStore, database: Logins
) -> None:
    await fill(postgres_store)
    await postgres_store.write_logs(every_kind(AT, 1))
    with psycopg.connect(database.owner) as owner:
        bare = owner.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'holloway'::regnamespace"
            " AND relkind IN ('r', 'p') AND NOT (relrowsecurity AND relforcerowsecurity)"
        ).fetchall()
        assert bare == [("migration",)]
        owner.execute("SELECT set_config('holloway.account', %s, true)", [str(ACME.id)])
        for kind in LOG_KINDS:
            assert owner.execute(f"SELECT count(*) FROM {kind}_log").fetchone() == (1,)
            assert owner.execute(f"SELECT count(*) FROM {kind}_log_2026_03").fetchone() == (0,)
        owner.execute("SELECT set_config('holloway.account', %s, true)", [str(BETA.id)])
        for kind in LOG_KINDS:
            assert owner.execute(f"SELECT count(*) FROM {kind}_log").fetchone() == (0,)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM request_log",
        "UPDATE request_log SET status = 200",
        "SELECT * FROM request_log_2026_03",
        "DROP TABLE request_log_2026_03",
        "DELETE FROM answer",
        "DELETE FROM seen",
        "DELETE FROM encryption_key",
        "UPDATE encryption_key SET fingerprint = ''",
        "UPDATE seen SET client_id = account_id",
        "UPDATE account_sequence SET pruned = 0",
        "INSERT INTO resource_site SELECT * FROM resource_site",
        "DELETE FROM resource_device",
    ],
)
async def test_the_application_may_add_to_records_and_remove_none(
    postgres_store: PostgresStore, database: Logins, statement: str
) -> None:
    await fill(postgres_store)
    await postgres_store.write_logs(every_kind(AT, 1))
    with psycopg.connect(database.application) as connection:
        connection.execute("SELECT set_config('holloway.account', %s, true)", [str(ACME.id)])
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement)


async def test_an_answer_is_visible_to_its_token_alone(
    postgres_store: PostgresStore, database: Logins
) -> None:
    await fill(postgres_store)
    hall = site("Hall")
    await postgres_store.apply(ACME.id, [Put(hall)], who="t", at=AT, answer=ANSWER)
    with psycopg.connect(database.application) as connection:
        connection.execute("SELECT set_config('holloway.account', %s, true)", [str(ACME.id)])
        assert connection.execute("SELECT count(*) FROM answer").fetchone() == (0,)
        connection.execute("SELECT set_config('holloway.token', %s, true)", [str(ANN.id)])
        assert connection.execute("SELECT count(*) FROM answer").fetchone() == (0,)
        connection.execute("SELECT set_config('holloway.token', %s, true)", [str(API.id)])
        assert connection.execute("SELECT count(*) FROM answer").fetchone() == (1,)


def test_every_way_to_ask_for_logs_has_an_index(database: Logins) -> None:
    with psycopg.connect(database.owner) as owner:
        rows = owner.execute(
            "SELECT tablename, substring(indexdef FROM '\\((.*)\\)') FROM pg_indexes"
            " WHERE schemaname = 'holloway'"
        ).fetchall()
    for kind, fields in LOG_FILTERS.items():
        assert (f"{kind}_log", "account_id, id, at") in rows
        assert (f"{kind}_log", "account_id, at") in rows
        for field in fields:
            assert (f"{kind}_log", f"account_id, {field}, id") in rows


# --- upgrade -------------------------------------------------------------------------------------


async def test_what_the_previous_release_wrote_is_taken_over_and_it_may_go_on_beside(
    postgres: EmbeddedPostgres,
) -> None:
    """Migrations up to 0004, rows as that release wrote them, then the rest."""
    name = "upgraded"
    with psycopg.connect(postgres.logins().owner, autocommit=True) as owner:
        owner.execute(f"CREATE DATABASE {name}")
        try:
            await upgrade(postgres.logins(name))
        finally:
            owner.execute(f"DROP DATABASE {name}")


OLD_RESOURCE = (
    "INSERT INTO resource (account_id, id, site_id, name, kind, address, filters, created_at)"
    " VALUES (%(a)s, %(id)s, %(site)s, %(name)s, 'cidr', '10.0.0.0/8', '[]', %(at)s)"
)


async def upgrade(logins: Logins) -> None:
    hall, loft, group, old, older = (uuid4() for _ in range(5))
    values: dict[str, Any] = {"a": ACME.id, "at": AT, "p": ANN.id, "t": API.id}
    with psycopg.connect(logins.owner, autocommit=True) as owner:
        owner.execute("CREATE SCHEMA holloway")
        owner.execute(
            "CREATE TABLE holloway.migration (number integer PRIMARY KEY, name text NOT NULL,"
            " checksum bytea NOT NULL)"
        )
        for migration in known_migrations()[:4]:
            owner.execute(migration.statements.encode())
            owner.execute(
                "INSERT INTO migration VALUES (%s, %s, %s)",
                [migration.number, migration.name, migration.checksum],
            )
    with psycopg.connect(logins.application) as past:
        past.execute("SELECT set_config('holloway.account', %s, true)", [str(ACME.id)])
        past.execute("INSERT INTO account_sequence VALUES (%(a)s, 0)", values)
        past.execute(
            "INSERT INTO account (id, name, slug, disabled, range_ipv4, range_ipv6, created_at)"
            " VALUES (%(a)s, 'Acme', 'acme', false, '100.64.0.0/10', 'fd48:4c57:5900::/64',"
            " %(at)s)",
            values,
        )
        past.execute(
            "INSERT INTO principal VALUES (%(a)s, %(p)s, 'user', 'admin', 'Ann', NULL, false,"
            " %(at)s)",
            values,
        )
        for id, name in ((hall, "Hall"), (loft, "Loft")):
            past.execute("INSERT INTO site VALUES (%s, %s, %s, %s)", [ACME.id, id, name, AT])
        past.execute(
            "INSERT INTO \"group\" VALUES (%s, %s, 'static', 'Staff', %s)", [ACME.id, group, AT]
        )
        past.execute(OLD_RESOURCE, values | {"id": old, "site": hall, "name": "old"})
        past.execute(
            "INSERT INTO token (account_id, id, kind, name, hash, principal_id, allowed_sources,"
            " approves_devices, created_at) VALUES (%(a)s, %(t)s, 'api', 't', %(hash)s, %(p)s,"
            " '[]', true, %(at)s)",
            values | {"hash": bytes(32)},
        )
    await migrate(logins)
    async with PostgresStore.open(logins, migrated=True) as store:
        contents = await store.contents(ACME.id)
        assert contents.account.range_ipv4.prefixlen == 10, "kept, though it meets names_ipv4 now"
        assert Group(id=group, account_id=ACME.id, name="Staff", created_at=AT) in contents.entities
        assert API in contents.entities, "with every scope"
        with psycopg.connect(logins.application) as beside:
            beside.execute("SELECT set_config('holloway.account', %s, true)", [str(ACME.id)])
            beside.execute(OLD_RESOURCE, values | {"id": older, "site": hall, "name": "older"})
            beside.execute("UPDATE resource SET site_id = %s WHERE id = %s", [loft, old])
        moved = await store.get(ACME.id, "resource", old)
        made = await store.get(ACME.id, "resource", older)
        assert (moved.site_ids, made.site_ids) == ((loft,), (hall,))
        both = attrs.evolve(made, site_ids=(loft, hall))
        await store.apply(ACME.id, [Put(both)], who="t", at=AT)
        with psycopg.connect(logins.application) as beside:
            beside.execute("SELECT set_config('holloway.account', %s, true)", [str(ACME.id)])
            assert beside.execute(
                "SELECT site_id FROM resource WHERE id = %s", [older]
            ).fetchone() == (loft,)
        changes = await store.apply(ACME.id, [Remove("site", loft)], who="t", at=AT)
        assert [(c.kind, c.after is None) for c in changes] == [
            ("resource", True) if old < older else ("resource", False),
            ("resource", False) if old < older else ("resource", True),
            ("site", True),
        ]
