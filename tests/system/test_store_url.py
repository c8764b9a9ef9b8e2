"""A PostgreSQL that is not ours, named by a URL: passwords, TCP, one login for all roles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from uuid import UUID

import psycopg
import pytest
import trio

from actors.model import Account
from actors.store.interface import Put, StoreError, Unavailable
from actors.store.postgres import Logins, MigrationError, PostgresStore
from tests.system.postgres_support import PASSWORD, ForeignServer, foreign_server, own_directory

pytestmark = pytest.mark.system

AT = datetime(2026, 1, 1, tzinfo=UTC)
ACME = Account(id=UUID(int=0xA), name="Acme", slug="acme", created_at=AT)
PATIENCE_S = 60


@pytest.fixture(scope="module")
def server() -> Iterator[ForeignServer]:
    with own_directory("foreign") as directory, foreign_server(directory) as running:
        yield running


async def use(database: str | Logins) -> None:
    """Write and read through a store, and hear of it by the feed."""
    with trio.fail_after(PATIENCE_S):
        async with PostgresStore.open(database) as store, store.wakeups() as wakeups:
            await store.apply(ACME.id, [Put(ACME)], who="test", at=AT)
            assert await store.accounts() == (ACME,)
            assert await anext(wakeups) == ACME.id


def roles_exist(server: ForeignServer) -> bool:
    with psycopg.connect(server.url("admin", "postgres")) as connection:
        found = connection.execute(
            "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'holloway%'"
        ).fetchone()
    return found != (0,)


async def test_one_login_that_owns_its_database_and_may_create_roles_is_all_that_is_needed(
    server: ForeignServer,
) -> None:
    assert not roles_exist(server)
    server.administer(
        f"CREATE ROLE installation LOGIN CREATEROLE PASSWORD '{PASSWORD}'",
        "CREATE DATABASE installation OWNER installation",
    )
    await use(server.url("installation", "installation"))
    with psycopg.connect(server.url("installation", "installation")) as connection:
        owner = connection.execute("SELECT count(*) FROM holloway.account").fetchone()
        assert owner == (0,), "row-level security binds the owner too"


async def test_racing_first_starts_on_two_databases_of_one_server_both_succeed(
    server: ForeignServer,
) -> None:
    server.administer("DROP DATABASE IF EXISTS installation", "DROP ROLE IF EXISTS installation")
    server.administer(
        "DROP ROLE IF EXISTS holloway_application", "DROP ROLE IF EXISTS holloway_feed"
    )
    for number in (1, 2):
        server.administer(f"CREATE DATABASE twin{number}")
    async with trio.open_nursery() as nursery:
        for number in (1, 2):
            nursery.start_soon(use, server.url("admin", f"twin{number}"))


async def test_three_logins_without_any_right_to_create_roles_will_do(
    server: ForeignServer,
) -> None:
    with suppress(psycopg.errors.DuplicateObject):
        server.administer("CREATE ROLE holloway_application", "CREATE ROLE holloway_feed")
    server.administer(
        f"CREATE ROLE keeper LOGIN PASSWORD '{PASSWORD}'",
        f"ALTER ROLE holloway_application LOGIN PASSWORD '{PASSWORD}'",
        f"ALTER ROLE holloway_feed LOGIN PASSWORD '{PASSWORD}'",
        "CREATE DATABASE kept OWNER keeper",
    )
    await use(
        Logins.separate(
            owner=server.url("keeper", "kept"),
            application=server.url("holloway_application", "kept"),
            feed=server.url("holloway_feed", "kept"),
        )
    )


async def test_a_role_that_would_evade_row_level_security_is_refused(
    server: ForeignServer,
) -> None:
    server.administer("CREATE DATABASE evading")
    with suppress(psycopg.errors.DuplicateObject):
        server.administer("CREATE ROLE holloway_application", "CREATE ROLE holloway_feed")
    server.administer("ALTER ROLE holloway_application BYPASSRLS")
    try:
        with pytest.raises(MigrationError, match="must be subject to row-level security"):
            await use(server.url("admin", "evading"))
    finally:
        server.administer("ALTER ROLE holloway_application NOBYPASSRLS")


async def test_a_login_that_may_not_create_the_roles_is_told_so(server: ForeignServer) -> None:
    server.administer(
        "DROP DATABASE IF EXISTS installation", "DROP DATABASE IF EXISTS twin1",
        "DROP DATABASE IF EXISTS twin2", "DROP DATABASE IF EXISTS kept",
        "DROP ROLE IF EXISTS holloway_application", "DROP ROLE IF EXISTS holloway_feed",
        f"CREATE ROLE modest LOGIN PASSWORD '{PASSWORD}'",
        "CREATE DATABASE modest OWNER modest",
    )  # fmt: skip
    with pytest.raises(MigrationError, match="may not create the role holloway_application"):
        await use(server.url("modest", "modest"))


async def test_a_database_that_is_not_utf8_is_refused(server: ForeignServer) -> None:
    server.administer("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    with pytest.raises(MigrationError, match="must be UTF8"):
        await use(server.url("admin", "latin"))


@pytest.mark.parametrize("url", ["postgresql://u:hunter2@[", "password=hunter2 nonsense"])
async def test_a_malformed_url_is_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(StoreError, match="not a valid connection string") as refusal:
        Logins.of(url)
    assert "hunter2" not in repr(refusal.value)
    assert refusal.value.__cause__ is None


async def test_a_wrong_password_is_refused_without_being_quoted(server: ForeignServer) -> None:
    url = server.url("admin", "postgres", password="hunter2")
    with pytest.raises(Unavailable, match="password authentication failed") as refusal:
        await use(url)
    assert "hunter2" not in str(refusal.value)
    assert "hunter2" not in repr(Logins.of(url))
