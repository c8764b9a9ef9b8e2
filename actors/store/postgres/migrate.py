"""Numbered SQL files, each applied once, in order, in a transaction of its own.

Any number of runners may race: each file is applied under an advisory lock by whoever comes first.
A file that was applied must never change (its SHA-256 is kept); files with higher numbers than we
know are a newer release's and are left alone, so nodes of two releases can run side by side.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from importlib.resources import files
from typing import LiteralString

import attrs
import psycopg
import trio
from psycopg.sql import SQL

from actors.store.interface import StoreError, Unavailable
from actors.store.postgres.connection import (
    APPLICATION_ROLE,
    FEED_ROLE,
    LOST,
    Logins,
    TrioConnection,
)

MIN_SERVER_VERSION = 160_000
_LOCK = 0x686F6C6C6F776179  # "holloway"


class MigrationError(StoreError):
    """The database is not one that this release can bring up to date."""


@attrs.frozen(kw_only=True)
class Migration:
    """One file. `number` starts at 1 and has no gaps."""

    number: int
    name: str
    statements: str = attrs.field(repr=False)

    @property
    def checksum(self) -> bytes:
        """SHA-256 of the file."""
        return sha256(self.statements.encode()).digest()


def known_migrations() -> tuple[Migration, ...]:
    """The files of this release in order."""
    directory = files("actors.store") / "migrations"
    names = sorted(each.name for each in directory.iterdir() if each.name.endswith(".sql"))
    return tuple(
        Migration(number=int(name[:4]), name=name, statements=(directory / name).read_text())
        for name in names
    )


async def migrate(logins: Logins, *, timeout_s: float = 60.0) -> tuple[str, ...]:
    """Bring the database up to date; returns the names of the files that this call applied.

    Raises Unavailable when the database cannot be reached in time, MigrationError when it is too
    old, not UTF-8, or holds another history.
    """
    try:
        with trio.fail_after(timeout_s):
            connection = await TrioConnection.open(logins.owner)
            try:
                return await _migrate(connection)
            finally:
                connection.finish()
    except (*LOST, trio.TooSlowError) as error:
        # libpq writes several lines, indented by tabs.
        said = " ".join(str(error).split())
        raise Unavailable(f"the database cannot be reached: {said}") from error


async def _migrate(connection: TrioConnection) -> tuple[str, ...]:
    _check_server(connection)
    for role in (APPLICATION_ROLE, FEED_ROLE):
        await _ensure_role(connection, role)
    async with _alone(connection):
        await connection.execute(_LEDGER)
    applied = []
    for migration in known_migrations():
        async with _alone(connection):
            if await _apply(connection, migration):
                applied.append(migration.name)
    return tuple(applied)


def _check_server(connection: TrioConnection) -> None:
    if connection.info.server_version < MIN_SERVER_VERSION:
        raise MigrationError(f"PostgreSQL {MIN_SERVER_VERSION // 10_000} or newer is needed")
    if connection.info.parameter_status("server_encoding") != "UTF8":
        raise MigrationError("the database's encoding must be UTF8")


async def _ensure_role(connection: TrioConnection, role: LiteralString) -> None:
    """Make the role, which our login may take on, unless the administrator has made it."""
    try:
        await connection.execute(SQL(_CREATE_ROLE.replace("ROLE_NAME", role)))
    except psycopg.errors.InsufficientPrivilege:
        raise MigrationError(f"the login may not create the role {role}: create it first") from None
    cursor = await connection.execute(
        "SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = %s", [role]
    )
    if await cursor.fetchone() != (False,):
        raise MigrationError(f"the role {role} must be subject to row-level security")


@asynccontextmanager
async def _alone(connection: TrioConnection) -> AsyncIterator[None]:
    """A transaction that no other runner overlaps. Failing, it leaves the rollback to the server:
    its connection is about to be closed."""
    await connection.execute("BEGIN")
    await connection.execute("SET LOCAL statement_timeout = 0")
    await connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
    yield
    await connection.execute("COMMIT")


async def _apply(connection: TrioConnection, migration: Migration) -> bool:
    cursor = await connection.execute(
        "SELECT checksum FROM migration WHERE number = %s", [migration.number]
    )
    row = await cursor.fetchone()
    if row is not None:
        if row[0] != migration.checksum:
            raise MigrationError(f"{migration.name} is not what was applied to this database")
        return False
    await connection.execute(migration.statements.encode())
    await connection.execute(
        "INSERT INTO migration (number, name, checksum) VALUES (%s, %s, %s)",
        [migration.number, migration.name, migration.checksum],
    )
    return True


_LEDGER: LiteralString = """
CREATE SCHEMA IF NOT EXISTS holloway;
CREATE TABLE IF NOT EXISTS holloway.migration (
    number integer PRIMARY KEY,
    name text NOT NULL,
    checksum bytea NOT NULL
)
"""

_CREATE_ROLE: LiteralString = """
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'ROLE_NAME') THEN
        CREATE ROLE ROLE_NAME NOLOGIN NOINHERIT;
        GRANT ROLE_NAME TO CURRENT_USER WITH SET TRUE, INHERIT FALSE;
    END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
    NULL;  -- another runner was quicker
END $$
"""
