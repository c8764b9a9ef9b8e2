"""Leases of nodes and accounts: the promises, kept by both stores, and what only races show."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import attrs
import psycopg
import pytest
import trio

from actors.model import Account, Authorization
from actors.store.interface import Fenced, Full, Held, NotFound, Put, Remove, Store
from actors.store.memory import MemoryStore
from actors.store.postgres import Logins, PostgresStore
from channel.messages import IpText
from runtime.clock import VirtualClock
from runtime.cluster.leases import MAX_NODE_LEASE_NS, LeaseFenced, LeaseHeld
from runtime.cluster.placement import MAX_NODES
from tests.nodes import Owner, joined

pytestmark = pytest.mark.system

S = 10**9
AT = datetime(2026, 1, 1, tzinfo=UTC)
ACME = Account(id=UUID(int=0xA), name="Acme", slug="acme", created_at=AT)
BETA = Account(id=UUID(int=0xB), name="Beta", slug="beta", created_at=AT)
PATIENCE_S = 60


@pytest.fixture(params=["memory", "postgres"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        memory = MemoryStore()
        await memory.apply(ACME.id, [Put(ACME)], who="test", at=AT)
        yield memory
        return
    database = request.getfixturevalue("database")
    async with PostgresStore.open(database, migrated=True) as postgres:
        await postgres.apply(ACME.id, [Put(ACME)], who="test", at=AT)
        yield postgres


@pytest.fixture
async def real(database: Logins) -> AsyncIterator[PostgresStore]:
    async with PostgresStore.open(database, migrated=True) as store:
        await store.apply(ACME.id, [Put(ACME)], who="test", at=AT)
        yield store


def access(account: Account = ACME) -> Authorization:
    some = uuid4()
    return Authorization(
        id=some, account_id=account.id, policy_id=some, client_id=some, gateway_id=some,
        resource_id=some, token_id=some, connection_id=some, remote_ip=IpText("192.0.2.1"),
        created_at=AT, expires_at=AT + timedelta(hours=1),
    )  # fmt: skip


async def renew(store: Store, node: Owner, *, ttl_ns: int = MAX_NODE_LEASE_NS) -> None:
    await store.renew_node(node["owner"], node["incarnation"], draining=False, ttl_ns=ttl_ns)


# --- promises of both stores ---------------------------------------------------------------------


async def test_a_node_is_seen_by_all_until_it_leaves(store: Store) -> None:
    south, north = await joined(store, "south"), await joined(store, "north", ttl_ns=5 * S)
    rows = await store.renew_node("south", south["incarnation"], draining=True, ttl_ns=3 * S)
    assert [(row.name, row.draining) for row in rows] == [("north", False), ("south", True)]
    assert [row.incarnation for row in rows] == [north["incarnation"], south["incarnation"]]
    assert 0 < rows[1].remaining_ns <= 3 * S < rows[0].remaining_ns + 3 * S
    assert (rows[0].link_address, rows[0].door_address) == ("127.0.0.1:1", "127.0.0.1:2")
    await store.leave_node("north", north["incarnation"])
    assert [row.name for row in await store.nodes()] == ["south"]
    with pytest.raises(Fenced) as refusal:
        await renew(store, north)
    assert not refusal.value.superseded
    assert (await joined(store, "north"))["incarnation"] > north["incarnation"]


async def test_a_node_that_was_stopped_and_resumed_can_do_no_harm(store: Store) -> None:
    one, two = await joined(store, "one"), await joined(store, "two")
    epoch = await store.acquire(ACME.id, **one)
    with pytest.raises(LeaseHeld) as held:
        await store.acquire(ACME.id, **two)
    assert held.value.owner == "one"
    await renew(store, one, ttl_ns=0)
    assert await store.acquire(ACME.id, **two) == epoch + 1
    with pytest.raises(Fenced):
        await store.write_authorization(access(), epoch=epoch)
    with pytest.raises(LeaseFenced) as fenced:
        await store.acquire(ACME.id, **one)
    assert not fenced.value.superseded
    await store.release(ACME.id, **one)  # it owns nothing any more: harmless
    with pytest.raises(Fenced) as over:  # or what it has of the account would go on with it
        await renew(store, one)
    assert not over.value.superseded
    with pytest.raises(Held) as held_by_two:
        await store.acquire(ACME.id, **await joined(store, "one"))
    assert held_by_two.value.owner == "two"
    await store.write_authorization(access(), epoch=epoch + 1)
    assert len(await store.authorizations(ACME.id)) == 1


async def test_a_lease_that_lapsed_is_renewed_with_all_that_nobody_took_over(store: Store) -> None:
    one, two = await joined(store, "one"), await joined(store, "two")
    await store.acquire(ACME.id, **one)
    await store.release(ACME.id, **one)
    await renew(store, one, ttl_ns=0)
    await store.acquire(ACME.id, **two)  # it was nobody's: no sign that `one` has to be fenced
    await store.release(ACME.id, **two)
    await renew(store, one)
    epoch = await store.acquire(ACME.id, **one)
    await renew(store, one, ttl_ns=0)
    await renew(store, one)
    with pytest.raises(Held):
        await store.acquire(ACME.id, **two)
    await store.write_authorization(access(), epoch=epoch)


async def test_a_node_that_was_given_up_cannot_come_back_but_by_joining(store: Store) -> None:
    one, two = await joined(store, "one"), await joined(store, "two")
    epoch = await store.acquire(ACME.id, **one)
    await store.expel_node("one", one["incarnation"])
    await store.expel_node("one", one["incarnation"])
    assert [row.remaining_ns > 0 for row in await store.nodes()] == [False, True]
    for question in (renew(store, one), store.acquire(ACME.id, **one)):
        with pytest.raises(Fenced) as refusal:
            await question
        assert not refusal.value.superseded
    # Its own next life may take over at once, and is not hit by a late expulsion of this one.
    again = await joined(store, "one")
    await store.expel_node("one", one["incarnation"])
    assert await store.acquire(ACME.id, **again) == epoch + 1
    with pytest.raises(Held):
        await store.acquire(ACME.id, **two)


async def test_of_two_processes_with_one_name_the_later_stands(store: Store) -> None:
    first = await joined(store)
    epoch = await store.acquire(ACME.id, **first)
    second = await joined(store)
    for question in (renew(store, first), store.acquire(ACME.id, **first)):
        with pytest.raises(Fenced) as refusal:
            await question
        assert refusal.value.superseded
    await store.leave_node("node", first["incarnation"])
    await store.expel_node("node", first["incarnation"])
    await renew(store, second)
    assert await store.acquire(ACME.id, **second) == epoch + 1
    with pytest.raises(Fenced):
        await store.write_authorization(access(), epoch=epoch)


async def test_what_is_released_is_free_and_nothing_is_written_by_its_epoch(store: Store) -> None:
    one, two = await joined(store, "one"), await joined(store, "two")
    epoch = await store.acquire(ACME.id, **one)
    await store.release(ACME.id, **two)
    await store.release(ACME.id, owner="one", incarnation=one["incarnation"] + 1)
    await store.release(BETA.id, **one)
    await store.write_authorization(access(), epoch=epoch)
    await store.release(ACME.id, **one)
    for guess in (epoch, epoch + 1):
        with pytest.raises(Fenced):
            await store.write_authorization(access(), epoch=guess)
    assert await store.acquire(ACME.id, **two) == epoch + 1


async def test_what_a_node_leaves_behind_is_free(store: Store) -> None:
    one, two = await joined(store, "one"), await joined(store, "two")
    epoch = await store.acquire(ACME.id, **one)
    await store.leave_node("one", one["incarnation"])
    await store.leave_node("one", one["incarnation"])
    assert await store.acquire(ACME.id, **two) == epoch + 1


async def test_who_has_not_joined_owns_nothing(store: Store) -> None:
    node = await joined(store, ttl_ns=0)
    for owner in (node, Owner(owner="nobody", incarnation=1)):
        with pytest.raises(Fenced):
            await store.acquire(ACME.id, **owner)
    with pytest.raises(Fenced):
        await store.write_authorization(access(), epoch=0)


async def test_a_full_cluster_has_room_for_those_who_replace_the_dead(store: Store) -> None:
    dead = [await joined(store, f"dead-{number}", ttl_ns=0) for number in range(3)]
    names = [f"node-{number}" for number in range(MAX_NODES - len(dead))]
    for name in names:
        await joined(store, name)
    await renew(store, dead[0], ttl_ns=0)  # so it is dead-1 that has been dead longest
    present = {row.name for row in await store.nodes()}
    for name, gone in [("new-1", "dead-1"), ("new-2", "dead-2"), ("new-3", "dead-0")]:
        await joined(store, name)
        present = (present | {name}) - {gone}
        assert {row.name for row in await store.nodes()} == present
    with pytest.raises(Full):
        await joined(store, "new-4")
    await joined(store, "new-3")
    assert {row.name for row in await store.nodes()} == present
    with pytest.raises(Fenced):
        await renew(store, dead[0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "Node"},
        {"name": "-node"},
        {"name": "n" * 64},
        {"link_address": "127.0.0.1"},
        {"door_address": "127.0.0.1:x"},
        {"version": ""},
        {"version": "\x9b"},
        {"ttl_ns": -1},
        {"ttl_ns": MAX_NODE_LEASE_NS + 1},
    ],
)
async def test_what_no_node_can_say_is_a_mistake_of_the_caller(
    store: Store, wrong: dict[str, object]
) -> None:
    good: dict[str, object] = {
        "name": "node", "link_address": "a:1", "door_address": "[::1]:2", "version": "1",
        "ttl_ns": S,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"."):
        await store.join_node(**(good | wrong))  # type: ignore[arg-type]  # on purpose
    assert await store.nodes() == ()
    await store.join_node(**good)  # type: ignore[arg-type]  # a dictionary of several types


async def test_in_a_virtual_world_a_lease_lasts_to_the_nanosecond() -> None:
    clock = VirtualClock()
    store = MemoryStore(clock)
    await store.apply(ACME.id, [Put(ACME)], who="test", at=AT)
    one, two = await joined(store, "one", ttl_ns=3 * S), await joined(store, "two")
    await store.acquire(ACME.id, **one)
    clock.advance(3 * S - 1)
    assert (await store.nodes())[0].remaining_ns == 1
    with pytest.raises(Held):
        await store.acquire(ACME.id, **two)
    clock.advance(1)
    assert (await store.nodes())[0].remaining_ns == 0
    await store.acquire(ACME.id, **two)


# --- races ---------------------------------------------------------------------------------------


async def test_of_nodes_that_want_one_account_at_once_exactly_one_gets_it(
    database: Logins,
) -> None:
    """The first acquisition of an account, and those after a release and a death; while others
    write, edit and renew. And nobody ever waits in a circle."""
    async with PostgresStore.open(database, migrated=True, connections=12) as store:
        await store.apply(ACME.id, [Put(ACME)], who="test", at=AT)
        names = [f"node-{number}" for number in range(6)]
        nodes = {name: await joined(store, name) for name in names}
        epochs: list[int] = []
        for round_ in range(12):
            won: list[str] = []
            refused: list[str] = []

            async def try_(name: str, won: list[str], refused: list[str]) -> None:
                try:
                    epochs.append(await store.acquire(ACME.id, **nodes[name]))
                    won.append(name)
                    await store.write_authorization(access(), epoch=epochs[-1])
                except Held as error:
                    refused.append(error.owner)

            async def disturb(round_: int) -> None:
                renamed = attrs.evolve(ACME, name=f"Acme {round_}")
                await store.apply(ACME.id, [Put(renamed)], who="test", at=AT)

            with trio.fail_after(PATIENCE_S):
                async with trio.open_nursery() as nursery:
                    for name in names:
                        nursery.start_soon(try_, name, won, refused)
                        nursery.start_soon(renew, store, nodes[name])
                    nursery.start_soon(disturb, round_)
            assert len(won) == 1
            assert refused == won * 5
            if round_ % 2:
                await store.release(ACME.id, **nodes[won[0]])
            else:
                await store.expel_node(won[0], nodes[won[0]]["incarnation"])
                nodes[won[0]] = await joined(store, won[0])
        assert epochs == list(range(1, 13))
    assert await deadlocks(database) == 0


async def test_of_many_lives_of_one_name_the_one_with_the_highest_number_stands(
    real: PostgresStore,
) -> None:
    lives: list[Owner] = []

    async def join() -> None:
        lives.append(await joined(real))

    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(join)
    numbers = sorted(life["incarnation"] for life in lives)
    assert len(set(numbers)) == 12
    assert [row.incarnation for row in await real.nodes()] == numbers[-1:]


async def test_who_takes_over_waits_for_a_write_under_way(
    real: PostgresStore, database: Logins
) -> None:
    one, two = await joined(real, "one"), await joined(real, "two")
    epoch = await real.acquire(ACME.id, **one)
    row, order = access(), list[str]()

    async def write() -> None:
        await real.write_authorization(row, epoch=epoch)
        order.append("written")

    async def take_over() -> None:
        assert await real.acquire(ACME.id, **two) == epoch + 1
        order.append("taken over")

    async with trio.open_nursery() as nursery:
        with stuck(database, row):
            nursery.start_soon(write)
            await until_waiting(database, 1)
            await real.expel_node("one", one["incarnation"])
            nursery.start_soon(take_over)
            await until_waiting(database, 2)
            assert order == []
    assert sorted(order) == ["taken over", "written"]
    assert await real.authorizations(ACME.id) == (row,)
    with pytest.raises(Fenced):
        await real.write_authorization(access(), epoch=epoch)


@pytest.mark.parametrize("late", ["renewed", "expelled", "expired", "superseded"])
async def test_who_waited_for_a_write_judges_by_what_is_true_then(
    real: PostgresStore, database: Logins, late: str
) -> None:
    """The owner seemed dead, or the newcomer alive, when the wait began."""
    one, two = await joined(real, "one"), await joined(real, "two")
    epoch = await real.acquire(ACME.id, **one)
    await renew(real, one, ttl_ns=0)
    row, refusals = access(), list[type[BaseException]]()

    async def take_over() -> None:
        with pytest.raises((Held, Fenced)) as refusal:
            await real.acquire(ACME.id, **two)
        refusals.append(refusal.type)

    async with trio.open_nursery() as nursery:
        with stuck(database, row):
            nursery.start_soon(lambda: real.write_authorization(row, epoch=epoch))
            await until_waiting(database, 1)
            nursery.start_soon(take_over)
            await until_waiting(database, 2)
            match late:
                case "renewed":
                    await renew(real, one)
                case "expelled":
                    await real.expel_node("two", two["incarnation"])
                case "expired":
                    await renew(real, two, ttl_ns=0)
                case "superseded":
                    await joined(real, "two")
    assert refusals == [Held if late == "renewed" else Fenced]
    await real.write_authorization(access(), epoch=epoch)


async def test_a_lease_that_ends_while_its_node_waits_has_ended(
    real: PostgresStore, database: Logins
) -> None:
    """By the clock alone: nothing is written to the node's row meanwhile."""
    one = await joined(real, "one")
    epoch = await real.acquire(ACME.id, **one)
    await renew(real, one, ttl_ns=0)
    row = access()

    async def take_over(two: Owner) -> None:
        with pytest.raises(Fenced):
            await real.acquire(ACME.id, **two)

    async with trio.open_nursery() as nursery:
        with stuck(database, row):
            nursery.start_soon(lambda: real.write_authorization(row, epoch=epoch))
            await until_waiting(database, 1)
            two = await joined(real, "two", ttl_ns=S // 2)
            nursery.start_soon(take_over, two)
            await until_waiting(database, 2)
            while (await real.nodes())[1].remaining_ns:
                await trio.sleep(0.02)


async def test_a_renewal_waits_for_a_take_over_that_is_under_way(
    real: PostgresStore, database: Logins
) -> None:
    one, two = await joined(real, "one"), await joined(real, "two")
    await real.acquire(ACME.id, **one)
    await renew(real, one, ttl_ns=0)
    refusals = list[type[BaseException]]()

    async def return_to_life() -> None:
        with pytest.raises(Fenced) as refusal:
            await renew(real, one)
        refusals.append(refusal.type)

    async with trio.open_nursery() as nursery:
        with psycopg.connect(database.application) as other:
            other.execute("SELECT set_config('holloway.installation', 'on', true)")
            other.execute("SELECT FROM node WHERE name = 'one' FOR NO KEY UPDATE")
            nursery.start_soon(lambda: real.acquire(ACME.id, **two))
            await until_waiting(database, 1)
            nursery.start_soon(return_to_life)
            await until_waiting(database, 2)
    assert refusals == [Fenced]


@contextmanager
def stuck(database: Logins, row: Authorization) -> Iterator[None]:
    """A write of `row` waits, once it has passed the fence, for the length of the block."""
    with psycopg.connect(database.application) as other:
        other.execute("SELECT set_config('holloway.account', %s, true)", [str(row.account_id)])
        other.execute(
            'INSERT INTO "authorization" VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, NULL,'
            " '')",
            [row.account_id, *[row.id] * 7, str(row.remote_ip), AT, AT],
        )
        yield
        other.rollback()


async def until_waiting(database: Logins, count: int) -> None:
    """Until so many of the application's connections wait for a lock."""
    with psycopg.connect(database.application, autocommit=True) as connection:
        with trio.fail_after(PATIENCE_S):
            while True:
                row = connection.execute(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
                ).fetchone()
                if row == (count,):
                    return
                await trio.sleep(0.02)


async def deadlocks(database: Logins) -> int:
    """How many this database has seen; its connections tell when they end."""
    with psycopg.connect(database.owner, autocommit=True) as connection:
        with trio.fail_after(PATIENCE_S):
            while True:
                row = connection.execute(
                    "SELECT (SELECT count(*) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()),"
                    " deadlocks FROM pg_stat_database WHERE datname = current_database()"
                ).fetchone()
                assert row is not None
                if row[0] == 0:
                    return int(row[1])
                await trio.sleep(0.02)


# --- walls ---------------------------------------------------------------------------------------

INSTALLATION = "SELECT set_config('holloway.installation', 'on', true)"
A_NODE = (
    "INSERT INTO node (name, incarnation, link_address, door_address, version, lease_until)"
    " VALUES ({}, 99, 'a:1', 'a:1', '1', now())"
)


async def test_nodes_are_seen_and_written_in_the_name_of_the_installation_only(
    real: PostgresStore, database: Logins
) -> None:
    one = await joined(real, "one")
    await real.acquire(ACME.id, **one)
    for scope in ("SELECT 1", f"SELECT set_config('holloway.account', '{ACME.id}', true)"):
        with psycopg.connect(database.application) as connection:
            connection.execute(scope)
            for table in ("node", "node_sequence"):
                assert connection.execute(f"SELECT * FROM {table}").fetchall() == []
            for statement in (
                "UPDATE node SET draining = true",
                "UPDATE node_sequence SET incarnation = 1",
                "DELETE FROM node",
            ):
                assert connection.execute(statement).rowcount == 0
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(A_NODE.format("'two'"))
    with psycopg.connect(database.application) as connection:
        connection.execute(INSTALLATION)
        assert connection.execute("SELECT name FROM node").fetchall() == [("one",)]
        assert connection.execute("UPDATE lease SET owner = ''").rowcount == 0
    with (
        psycopg.connect(database.feed) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute("SELECT * FROM node")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE node SET incarnation = 5",
        "UPDATE node SET name = 'two'",
        "UPDATE node SET link_address = 'a:1'",
        "UPDATE node SET door_address = 'a:1'",
        "DELETE FROM node_sequence",
        "TRUNCATE node",
    ],
)
async def test_the_application_cannot_change_who_a_node_is(
    real: PostgresStore, database: Logins, statement: str
) -> None:
    await joined(real, "one")
    with psycopg.connect(database.application) as connection:
        connection.execute(INSTALLATION)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        A_NODE.format("''"),
        A_NODE.format("'Node'"),
        A_NODE.format("'node-'"),
        A_NODE.format("E'node\\n'"),
        A_NODE.format("repeat('n', 64)"),
        A_NODE.format("'two'").replace("'a:1'", "'a'"),
        A_NODE.format("'two'").replace("'a:1'", "':1'"),
        A_NODE.format("'two'").replace("'1'", "''"),
        A_NODE.format("'two'").replace("99", "0"),
        A_NODE.format("'two'").replace("now()", "'infinity'"),
        A_NODE.format("'one'"),
        A_NODE.format("'two'").replace("99", "(SELECT incarnation FROM node)"),
        "INSERT INTO node_sequence VALUES (false, 1)",
        "INSERT INTO node_sequence VALUES (true, 1)",
        "UPDATE node_sequence SET incarnation = 0",
        "UPDATE lease SET owner = 'Node'",
        "UPDATE lease SET incarnation = -1",
    ],
)
async def test_the_database_itself_refuses_impossible_nodes(
    real: PostgresStore, database: Logins, statement: str
) -> None:
    await real.acquire(ACME.id, **await joined(real, "one"))
    with psycopg.connect(database.application) as connection:
        connection.execute(INSTALLATION)
        connection.execute("SELECT set_config('holloway.account', %s, true)", [str(ACME.id)])
        with pytest.raises(psycopg.errors.IntegrityError):
            connection.execute(statement)


async def test_an_account_that_is_removed_while_it_is_acquired_is_there_or_gone(
    real: PostgresStore,
) -> None:
    """The epoch of an account only grows, whatever came first."""
    one = await joined(real, "one")
    highest = 0
    for _ in range(10):
        epochs: list[int] = []

        async def acquire(epochs: list[int]) -> None:
            with suppress(NotFound):
                epochs.append(await real.acquire(ACME.id, **one))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(acquire, epochs)
            nursery.start_soon(
                lambda: real.apply(ACME.id, [Remove("account", ACME.id)], who="t", at=AT)
            )
        for epoch in epochs:
            assert epoch > highest
            highest = epoch
            with pytest.raises(Fenced):
                await real.write_authorization(access(), epoch=epoch)
        await real.apply(ACME.id, [Put(ACME)], who="test", at=AT)
