"""A PostgreSQL of an administrator's that has faults: killed with all its processes, on a disk that
is slow or hangs, or on one that is full."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from actors.store.embedded import find_programs
from tests.ports import free_ports
from tests.system.postgres_support import (
    PASSWORD,
    PATIENCE_S,
    ForeignServer,
    unprivileged,
    wait_for,
)
from tests.system.slow_disk import SlowDisk

LOGIN: Final = "holloway_login"
DATABASE: Final = "holloway"
CHUNK_BYTES: Final = 1 << 16


class SmallDisk:
    """A file system of so many bytes in memory at `path`, seen by the programs alone that are
    started by `command`: it is in a mount namespace of its own, and goes with it. Use it as a
    context manager."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size

    def __enter__(self) -> SmallDisk:
        mount = f'mount -t tmpfs -o size={self._size},mode=0711 holloway-test "$1"'
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private",
             "sh", "-ec", f"{mount}; echo mounted; exec cat", "sh", str(self._path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"mounted\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.communicate()

    @property
    def root(self) -> Path:
        """The file system, as it is seen from outside."""
        return Path(f"/proc/{self._holder.pid}/root{self._path}")

    def command(self, *argv: str) -> list[str]:
        namespace = f"--mount=/proc/{self._holder.pid}/ns/mnt"
        return ["nsenter", namespace, f"--wd={Path.cwd()}", "--", *argv]

    def fill(self) -> None:
        """Take all space that there is, by a file of ballast."""
        with suppress(OSError), (self.root / "ballast").open("ab", buffering=0) as file:
            for size in (CHUNK_BYTES, 1):
                with suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    def make_room(self) -> None:
        (self.root / "ballast").unlink()


class FaultyServer:
    """The server, with a database and a login for a portal. Use it as a context manager."""

    def __init__(self, directory: Path, *, disk_bytes: int | None = None) -> None:
        directory.mkdir(mode=0o711)
        self._directory = directory
        self._stack = ExitStack()
        self._port = free_ports(1)
        self._server = ForeignServer(self._port, directory)
        self._process: subprocess.Popen[bytes] | None = None
        self.slow = SlowDisk()
        self.small = None if disk_bytes is None else SmallDisk(directory / "disk", disk_bytes)

    @property
    def url(self) -> str:
        return self._server.url(LOGIN, DATABASE)

    @property
    def log(self) -> str:
        return (self._directory / "log").read_text()

    def administer(self, *statements: str) -> None:
        self._server.administer(*statements)

    def query(self, statement: str) -> list[tuple[object, ...]]:
        """Rows of the portal's database, past all row-level security."""
        with self._server.connect(DATABASE) as connection:
            connection.execute("SET search_path TO holloway")
            return connection.execute(statement.encode()).fetchall()

    def __enter__(self) -> FaultyServer:
        with ExitStack() as stack:
            self._initialise(stack)
            self.start()
            stack.callback(self._end)
            self.administer(
                f"CREATE ROLE {LOGIN} LOGIN CREATEROLE PASSWORD '{PASSWORD}'",
                f"CREATE DATABASE {DATABASE} OWNER {LOGIN} ENCODING 'UTF8' TEMPLATE template0",
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _initialise(self, stack: ExitStack) -> None:
        identity = unprivileged(self._directory)
        user, group = f"--reuid={identity['user']}", f"--regid={identity['group']}"
        self._as_account = ["setpriv", user, group, "--clear-groups"]
        disk = self._directory / "disk"
        disk.mkdir()
        stack.enter_context(self.slow)
        if self.small is not None:
            stack.enter_context(self.small)
        place = disk if self.small is None else self.small.root
        os.chown(place, identity["user"], identity["group"])
        password_file = self._directory / "password"
        password_file.write_text(PASSWORD)
        password_file.chmod(0o644)
        subprocess.run(
            self._on_disk(
                str(find_programs() / "bin" / "initdb"), "-D", str(disk / "data"), "-U", "admin",
                "-A", "scram-sha-256", "-E", "UTF8", "--locale=C", f"--pwfile={password_file}",
            ),
            check=True, capture_output=True, cwd=self._directory,
        )  # fmt: skip

    def _on_disk(self, *argv: str) -> list[str]:
        command = [*self._as_account, *argv]
        return command if self.small is None else self.small.command(*command)

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        self.spawn()
        wait_for(self._server)

    def spawn(self) -> None:
        """Start it: whether it comes up is another matter."""
        settings = {
            "port": str(self._port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self._directory),
            "log_line_prefix": "%m [%p] ",
        }
        argv = [str(find_programs() / "bin" / "postgres"), "-D", str(self._directory / "disk/data")]
        for name, value in settings.items():
            argv += ["-c", f"{name}={value}"]
        command, descriptor = self.slow.command(self._on_disk(*argv))
        try:
            with (self._directory / "log").open("ab") as log:
                self._process = subprocess.Popen(
                    command, stdout=log, stderr=log, pass_fds=[descriptor]
                )
        finally:
            os.close(descriptor)

    def ended(self) -> bool:
        """Whether it is not there any more, for whatever reason."""
        return self._process is None or self._process.poll() is not None

    def kill(self) -> None:
        """SIGKILL to the postmaster and all its children, as when the machine is gone."""
        process, self._process = self._process, None
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        children = self._children(process.pid)
        process.kill()
        process.wait()
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while any(_lives(pid) for pid in children):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kill_a_backend(self) -> None:
        """SIGKILL to one process that serves the portal: PostgreSQL ends all others, and recovers
        by itself."""
        assert self._process is not None
        for pid in self._children(self._process.pid):
            with suppress(OSError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
                if LOGIN.encode() in title:
                    os.kill(pid, signal.SIGKILL)
                    return

    def _children(self, pid: int) -> list[int]:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def _end(self) -> None:
        self.slow.latency_s, self.slow.hangs = 0.0, False
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(PATIENCE_S)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
