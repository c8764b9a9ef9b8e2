"""One embedded PostgreSQL for a whole test session, and a fresh database for each test.

It lives in a thread with an event loop of its own, since every test has its own.
"""

from __future__ import annotations

import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import psycopg
import trio

from actors.store.embedded import DATABASE, EmbeddedPostgres
from actors.store.postgres import Logins, migrate

QUICK = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
"""Safe where only processes die: what was written survives in the kernel's cache."""

MEMORY = Path("/dev/shm")
"""Where the clusters of tests live if they can: a loaded disk makes each of them slow."""
NEEDED_BYTES = 2 * 10**9

_numbers = count(1)


@contextmanager
def own_directory(purpose: str) -> Iterator[Path]:
    """A directory of this run that other accounts may pass through; removed afterwards."""
    in_memory = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > NEEDED_BYTES
    parent = MEMORY if in_memory else None
    prefix = f"holloway-test-{os.getpid()}-{purpose}-"
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    directory.chmod(0o711)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


class PostgresThread:
    """An embedded PostgreSQL that runs beside the tests. Its database is migrated."""

    def __init__(self, directory: Path) -> None:
        self.postgres = EmbeddedPostgres(directory / "database", settings=QUICK)
        self._started: queue.Queue[BaseException | tuple[trio.lowlevel.TrioToken, trio.Nursery]]
        self._started = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="postgres")

    def __enter__(self) -> EmbeddedPostgres:
        self._thread.start()
        started = self._started.get()
        if isinstance(started, BaseException):
            raise started
        self._token, self._nursery = started
        return self.postgres

    def __exit__(self, *_: object) -> None:
        self._token.run_sync_soon(self._nursery.cancel_scope.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            self._started.put(error)

    async def _main(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.postgres.run)
            await migrate(self.postgres.logins())
            self._started.put((trio.lowlevel.current_trio_token(), nursery))


@contextmanager
def fresh_database(postgres: EmbeddedPostgres) -> Iterator[Logins]:
    """A migrated, empty database, dropped afterwards."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(postgres.logins().owner, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {DATABASE} STRATEGY FILE_COPY")
    try:
        yield postgres.logins(name)
    finally:
        with psycopg.connect(postgres.logins().owner, autocommit=True) as connection:
            _drop(connection, name)


def _drop(connection: psycopg.Connection, name: str) -> None:
    """Not with FORCE: the owner may not end the backends of other roles. They end by themselves
    soon after their clients; the server waits 5 s for that each time."""
    for _ in range(11):
        with suppress(psycopg.errors.ObjectInUse):
            connection.execute(f"DROP DATABASE {name}")
            return
    connection.execute(f"DROP DATABASE {name}")
