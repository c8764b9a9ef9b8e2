"""A PostgreSQL of a lab, apart from the portals, so that it can stand still without them.

It listens on a Unix socket in a directory of the lab (0700), which root reaches from any namespace,
and believes whoever gets there. It is a process of a namespace, so that it ends with the lab.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from actors.store.embedded import ACCOUNTS, find_programs
from simulations.installation import wait_until
from simulations.kernel.lab import Host, LabError

OWNER: Final = "holloway"
SOCKET: Final = ".s.PGSQL.5432"
READY_S: Final = 60.0
STOP_S: Final = 20.0


class LabDatabase:
    """One cluster. `url_file` is for `holloway portal --database-url-file`. Only with `may_be_slow`
    there is a way to it that can be made so."""

    def __init__(self, directory: Path, host: Host, *, may_be_slow: bool = False) -> None:
        self._directory = directory
        self._host = host
        self._slow_directory = directory.with_suffix(".slow") if may_be_slow else None
        self._slow: subprocess.Popen[bytes] | None = None
        self.url_file = directory.with_suffix(".url")
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped: list[int] = []

    def start(self) -> None:
        """Make it and wait until it serves. Raises LabError, InstallationError."""
        self._directory.mkdir(mode=0o700)
        identity = _identity(self._directory)
        programs = find_programs() / "bin"
        data = self._directory / "data"
        _run([str(programs / "initdb"), "-D", str(data), "-U", OWNER, "-A", "trust", "-E", "UTF8",
              "--locale=C", "--no-sync"], self._directory, identity)  # fmt: skip
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._directory),
            "max_connections": "200",
            "fsync": "off",
        }
        argv = [str(programs / "postgres"), "-D", str(data)]
        for name, value in options.items():
            argv += ["-c", f"{name}={value}"]
        account = ["setpriv", f"--reuid={identity['user']}", f"--regid={identity['group']}"]
        with (self._directory / "log").open("wb") as log:
            self._process = self._host.spawn(
                [*account, "--clear-groups", *argv], cwd=self._directory, stdout=log, stderr=log
            )
        asked = [str(programs / "psql"), "-h", str(self._directory), "-U", OWNER, "-d", "postgres"]
        wait_until(
            lambda: (
                subprocess.run(
                    [*asked, "-c", "SELECT 1"], capture_output=True, check=False, **identity
                ).returncode
                == 0
            ),
            what="the database serves",
            timeout_s=READY_S,
        )
        _run([*asked, "-c", f"CREATE DATABASE {OWNER}"], self._directory, identity)
        reached_by = self._directory
        if self._slow_directory is not None:
            reached_by = self._slow_directory
            self._start_slow(reached_by)
        self.url_file.touch(mode=0o600)
        self.url_file.write_text(f"postgresql:///{OWNER}?host={reached_by}&user={OWNER}")

    def _start_slow(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        ends = [str(each / SOCKET) for each in (directory, self._directory)]
        self._slow = self._host.spawn(
            [sys.executable, "-m", "simulations.kernel.slow", *ends],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert self._slow.stdout is not None
        if self._slow.stdout.readline().strip() != b"ready":
            raise LabError("the way to the database did not start")

    def answer_after(self, delay_ns: int) -> None:
        """Each answer takes so much longer from now on. Raises LabError unless it may be slow."""
        if self._slow is None or self._slow.stdin is None:
            raise LabError("this database was not made to be slow")
        self._slow.stdin.write(b"%d\n" % (delay_ns // 1_000))
        self._slow.stdin.flush()

    def pause(self) -> None:
        """Nothing of it goes on; connections stay."""
        assert self._process is not None
        self._stopped = [self._process.pid, *_children(self._process.pid)]
        for process_id in self._stopped:
            _signal(process_id, signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        for process_id in reversed(self._stopped):
            _signal(process_id, signal.SIGCONT)
        self._stopped = []

    def stop(self) -> None:
        """End it at once; nobody needs what is in it."""
        slow, self._slow = self._slow, None
        if slow is not None:
            with slow:  # which closes its standard input
                pass
        process, self._process = self._process, None
        if process is None:
            return
        self.resume()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _identity(directory: Path) -> dict[str, Any]:
    """Options of subprocess for whom PostgreSQL runs as, who gets the directory."""
    for name in ACCOUNTS:
        with contextlib.suppress(KeyError):
            account = pwd.getpwnam(name)
            os.chown(directory, account.pw_uid, account.pw_gid)
            return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    raise LabError("PostgreSQL does not run as root, and there is no account for it")


def _run(argv: list[str], directory: Path, identity: dict[str, Any]) -> None:
    done = subprocess.run(argv, cwd=directory, capture_output=True, text=True, **identity)
    if done.returncode != 0:
        raise LabError(f"the database: {done.stderr.strip()[-500:]}")


def _children(process_id: int) -> Iterator[int]:
    """Of the postmaster: each connection has one."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == process_id:
                yield int(stat.parent.name)


def _signal(process_id: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, number)
