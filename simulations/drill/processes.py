"""The processes of an installation on this machine: found, killed, paused, started anew.

Only processes of Holloway are ever touched: those whose command line runs a component of it, and
whose start time is still the one that was seen (a process id may be given anew). To start one that
was killed, its command line, environment, directory, user and network namespace are taken down
beforehand, in memory only: the environment may hold secrets.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

COMPONENTS: Final = ("portal", "relay", "gateway", "up")
"""Subcommands of `holloway` that serve; of a client the process is `holloway up`."""
END_TIMEOUT_S: Final = 20.0
_PROC: Final = Path("/proc")


class DrillError(Exception):
    """What was asked for cannot be done; the message says what to do."""


@attrs.define
class Process:
    """A component that runs, or ran. `started_at` tells its life apart from a later one with the
    same id (clock ticks since boot)."""

    name: str
    component: str
    pid: int
    started_at: int
    argv: tuple[bytes, ...]
    _environment: bytes = attrs.field(repr=False)
    _directory: str
    _ids: tuple[int, int]
    _output: str
    _network: int = attrs.field(repr=False)
    """A descriptor of its network namespace, which keeps that alive."""
    _child: subprocess.Popen[bytes] | None = None

    def is_alive(self) -> bool:
        if self._child is not None and self._child.poll() is not None:
            return False
        return _start_time(self.pid) == self.started_at and not _is_zombie(self.pid)

    def kill(self) -> None:
        """SIGKILL, and wait for the death. Raises DrillError if it is not there any more."""
        self._signal(signal.SIGKILL)
        self._wait_for_end()

    def end(self) -> None:
        """SIGTERM, and wait for its end; after END_TIMEOUT_S SIGKILL."""
        self._signal(signal.SIGTERM)
        if not self._wait_for_end():
            self.kill()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def start(self) -> bool:
        """Start it anew as it was; False, and nothing is done, if a supervisor has done so already.
        Raises DrillError."""
        if self.is_alive():
            return False
        if (successor := self._successor()) is not None:
            self.pid, self.started_at = successor
            self._child = None
            return False
        entries = (entry.split(b"=", 1) for entry in self._environment.split(b"\0"))
        environment = {entry[0]: entry[1] for entry in entries if len(entry) == 2}
        user, group = self._ids if os.geteuid() == 0 else (None, None)
        try:
            with open(self._output, "ab") as output:
                self._child = subprocess.Popen(
                    ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self._network}", "--", *self.argv],
                    env={
                        os.fsdecode(key): os.fsdecode(value) for key, value in environment.items()
                    },
                    cwd=self._directory,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    user=user,
                    group=group,
                )
        except OSError as error:
            raise DrillError(f"{self.name} cannot be started anew: {error}") from None
        self.pid = self._child.pid
        self.started_at = _start_time(self.pid) or 0
        return True

    def enter(self) -> list[str]:
        """What to put before a command so that it runs in the network of this process."""
        return ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self._network}", "--"]

    def has_own_network(self) -> bool:
        """Whether its network namespace is another than ours."""
        own, its = os.stat("/proc/self/ns/net"), os.fstat(self._network)
        return (own.st_ino, own.st_dev) != (its.st_ino, its.st_dev)

    def close(self) -> None:
        os.close(self._network)

    # --- helpers -------------------------------------------------------------------------------

    def _signal(self, number: signal.Signals) -> None:
        if not self.is_alive():
            raise DrillError(f"{self.name} (process {self.pid}) is not running any more")
        os.kill(self.pid, number)

    def _wait_for_end(self) -> bool:
        until = time.monotonic() + END_TIMEOUT_S
        while time.monotonic() < until:
            if not self.is_alive():
                return True
            time.sleep(0.01)
        return False

    def _successor(self) -> tuple[int, int] | None:
        """Who a supervisor has started in its place: the same command in the same network, with the
        same environment. (The command alone may be that of another installation.)"""
        for pid in _pids():
            if argv_of(pid) == self.argv and not _is_zombie(pid) and self._is_like(pid):
                started_at = _start_time(pid)
                if started_at is not None:
                    return pid, started_at
        return None

    def _is_like(self, pid: int) -> bool:
        own = os.fstat(self._network)
        try:
            its = os.stat(_PROC / str(pid) / "ns" / "net")
            environment = (_PROC / str(pid) / "environ").read_bytes()
        except OSError:
            return False
        same_network = (own.st_ino, own.st_dev) == (its.st_ino, its.st_dev)
        return same_network and _without_supervisor(environment) == _without_supervisor(
            self._environment
        )


@contextlib.contextmanager
def found(named: Sequence[str] = ()) -> Iterator[dict[str, Process]]:
    """The processes of Holloway on this machine by name; those of `named` (`NAME=PID`) under that
    name. Other names: that of `--name`, or the component's, with the process id where two would
    have the same. Raises DrillError."""
    given = dict(_given(text) for text in named)
    read = [process for pid in _pids() if (process := _read(pid)) is not None]
    try:
        yield _by_name(read, given)
    finally:
        for process in read:
            process.close()


def _by_name(read: Sequence[Process], given: dict[int, str]) -> dict[str, Process]:
    pids = {process.pid for process in read}
    for pid, name in given.items():
        if pid not in pids:
            raise DrillError(
                f"{name}: process {pid} is none of Holloway's, or not yours to look at"
            )
    if len(set(given.values())) < len(given):
        raise DrillError("--process gives two processes the same name")
    own_names = [process.name for process in read if process.pid not in given]
    taken = Counter([*given.values(), *own_names])
    processes: dict[str, Process] = {}
    for process in read:
        is_alone = taken[process.name] == 1
        own_name = process.name if is_alone else f"{process.name}-{process.pid}"
        process.name = given.get(process.pid, own_name)
        processes[process.name] = process
    return processes


def _without_supervisor(environment: bytes) -> set[bytes]:
    """Without what systemd makes anew for each start."""
    anew = (b"INVOCATION_ID=", b"JOURNAL_STREAM=", b"SYSTEMD_EXEC_PID=", b"MEMORY_PRESSURE_")
    return {entry for entry in environment.split(b"\0") if not entry.startswith(anew)}


def _given(text: str) -> tuple[int, str]:
    name, equals, pid = text.partition("=")
    if not (name and equals and pid.isascii() and pid.isdigit()):
        raise DrillError(f"--process wants NAME=PID, not {text!r}")
    return int(pid), name


def component_of(argv: Sequence[bytes]) -> str | None:
    """Which component a command line runs, None if it is not Holloway's. `holloway X`, by whatever
    path, and `python -m holloway X`; not wrappers such as sudo, whose child does."""
    words = list(argv)
    if words and Path(os.fsdecode(words[0])).name.startswith("python"):
        words = words[1:]
        while words and words[0].startswith(b"-") and words[0] != b"-m":
            words = words[1:]
        if words[:2] == [b"-m", b"holloway"]:
            words = words[1:]
        elif not words or Path(os.fsdecode(words[0])).name != "holloway":
            return None
    if len(words) < 2 or Path(os.fsdecode(words[0])).name not in ("holloway", "holloway.py"):
        return None
    component = os.fsdecode(words[1])
    return component if component in COMPONENTS else None


def _read(pid: int) -> Process | None:
    argv = argv_of(pid)
    component = component_of(argv)
    if component is None or _is_zombie(pid):
        return None
    try:
        status = (_PROC / str(pid)).stat()
        return Process(
            name=_name(argv, component),
            component=component,
            pid=pid,
            started_at=_start_time(pid) or 0,
            argv=argv,
            environment=(_PROC / str(pid) / "environ").read_bytes(),
            directory=os.readlink(_PROC / str(pid) / "cwd"),
            ids=(status.st_uid, status.st_gid),
            output=_output(pid),
            network=os.open(_PROC / str(pid) / "ns" / "net", os.O_RDONLY | os.O_CLOEXEC),
        )
    except OSError:
        return None  # it has ended, or is another user's


def _name(argv: Sequence[bytes], component: str) -> str:
    for number, word in enumerate(argv):
        if word == b"--name" and number + 1 < len(argv):
            return os.fsdecode(argv[number + 1])
        if word.startswith(b"--name="):
            return os.fsdecode(word[7:])
    return "client" if component == "up" else component


def _output(pid: int) -> str:
    """Where it writes, if that is a file; else nowhere."""
    path = os.readlink(_PROC / str(pid) / "fd" / "1")
    return path if path.startswith("/") and Path(path).is_file() else os.devnull


def _pids() -> list[int]:
    return sorted(int(each.name) for each in _PROC.iterdir() if each.name.isdigit())


def argv_of(pid: int) -> tuple[bytes, ...]:
    """The command line of a process, () if it has ended or is a kernel's."""
    try:
        return tuple((_PROC / str(pid) / "cmdline").read_bytes().rstrip(b"\0").split(b"\0"))
    except OSError:
        return ()


def _stat(pid: int) -> list[bytes]:
    try:
        return (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return []


def _start_time(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else None


def _is_zombie(pid: int) -> bool:
    fields = _stat(pid)
    return bool(fields) and fields[0] == b"Z"
