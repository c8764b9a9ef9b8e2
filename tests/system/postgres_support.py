"""PostgreSQL for tests: one embedded for a whole session with a fresh database for each test, and
one that is not ours, as an administrator would run it.

The embedded one lives in a thread with an event loop of its own, since every test has its own.
"""

from __future__ import annotations

import os
import pwd
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import attrs
import psycopg
import trio

from actors.store.embedded import ACCOUNTS, DATABASE, EmbeddedPostgres, find_programs
from actors.store.postgres import Logins, migrate
from simulations.kernel.lab import Host
from tests.ports import free_port

QUICK = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
"""Safe where only processes die: what was written survives in the kernel's cache."""

MEMORY = Path("/dev/shm")
"""Where the clusters of tests live if they can: a loaded disk makes each of them slow."""
NEEDED_BYTES = 2 * 10**9

PASSWORD = "correct horse"
"""Of everybody at a foreign server."""
PATIENCE_S = 60

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


# --- one that is not ours ------------------------------------------------------------------------


@attrs.frozen
class ForeignServer:
    """A PostgreSQL on loopback with SCRAM passwords, as an administrator would run it. Its Unix
    socket is in `directory`, and can be reached from every namespace."""

    port: int
    directory: Path

    def url(self, user: str, database: str, password: str = PASSWORD, port: int = 0) -> str:
        """`port` is that of something in between."""
        password = password.replace(" ", "%20")
        return f"postgresql://{user}:{password}@localhost:{port or self.port}/{database}"

    def administer(self, *statements: str, database: str = "postgres") -> None:
        with self.connect(database) as connection:
            connection.autocommit = True
            for statement in statements:
                connection.execute(statement)

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        """As the administrator, by the Unix socket."""
        return psycopg.connect(
            host=str(self.directory),
            port=self.port,
            user="admin",
            password=PASSWORD,
            dbname=database,
        )


@contextmanager
def foreign_server(
    directory: Path, *, host: Host | None = None, addresses: str = "127.0.0.1"
) -> Iterator[ForeignServer]:
    """Run one in this directory, which is given to the account that it runs as; on loopback of
    this machine, or of a host of a lab."""
    identity = unprivileged(directory)
    password_file = directory / "password"
    password_file.write_text(PASSWORD)
    password_file.chmod(0o644)
    programs = find_programs() / "bin"
    data = directory / "data"
    subprocess.run(
        [programs / "initdb", "-D", data, "-U", "admin", "-A", "scram-sha-256", "-E", "UTF8",
         "--locale=C", "--no-sync", f"--pwfile={password_file}"],
        check=True, capture_output=True, cwd=directory, **identity,
    )  # fmt: skip
    port = free_port() if host is None else 5432
    argv = [
        str(programs / "postgres"), "-D", str(data), "-c", f"port={port}", "-c", "fsync=off",
        "-c", f"listen_addresses={addresses}", "-c", f"unix_socket_directories={directory}",
    ]  # fmt: skip
    if host is None:
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(argv, cwd=directory, stdout=quiet, stderr=quiet, **identity)
    else:
        process = host.spawn(
            ["setpriv", f"--reuid={identity['user']}", f"--regid={identity['group']}",
             "--clear-groups", *argv],
            cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        server = ForeignServer(port, directory)
        wait_for(server)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE_S)


def unprivileged(directory: Path) -> dict[str, Any]:
    """Options of subprocess for the account that PostgreSQL runs as, which gets the directory."""
    if os.geteuid() != 0:
        return {}
    for name in ACCOUNTS:
        with suppress(KeyError):
            account = pwd.getpwnam(name)
            os.chown(directory, account.pw_uid, account.pw_gid)
            return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    raise AssertionError("no unprivileged account")


def wait_for(server: ForeignServer) -> None:
    """Until it takes connections."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            server.connect().close()
            return
        except psycopg.OperationalError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
