"""Ray's own processes on this machine: a head, or raylets that join one.

A `RayMachine` is a child process (`runtime.hosting.ray_process`) which starts Ray's processes,
watches them, and ends with them. All are in one session of the kernel: they are found by it and
ended by id, whatever became of their parents. If this process dies its children see their standard
input close, and end too; so nothing is left behind, and `ray stop`, which ends every Ray of the
machine, is never needed.

The head carries no nodes. It keeps what it knows in its directory (RocksDB), so one that is started
again there, at its old port, finds raylets and nodes as they are; see docs/cluster.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Final

import attrs
import msgspec

from runtime.hosting.interface import ClusterUnavailable
from runtime.hosting.ray_settings import (
    LOOPBACK,
    MIN_OBJECT_STORE_BYTES,
    RayAccess,
    RayRefused,
    environment,
    is_loopback,
    make_token,
    prepare_directory,
    ray_directory,
)

READY_S: Final = 60.0
END_S: Final = 15.0
_LINE_BYTES: Final = 4_096


@attrs.frozen(kw_only=True)
class MachineSettings:
    """What this machine gives to Ray. Raises ValueError, RayRefused."""

    directory: Path
    """Of this RayMachine alone: sockets, logs, and a head's state. It becomes 0700; its path has at
    most MAX_DIRECTORY_BYTES."""
    host: str = LOOPBACK
    """The machine's address, at which Ray's processes are reached. They listen at all addresses,
    unless it is 127.0.0.1."""
    access: RayAccess | None = None
    """On loopback a head makes a token of its own when there is none: `directory/token`."""
    slots: int = 64
    """Ray's CPUs: a unit of accounting, not a limit of the machine. A head has none."""
    object_store_bytes: int = MIN_OBJECT_STORE_BYTES
    lock: int | None = None
    """A descriptor that it keeps open until Ray's processes are gone; see `own_directory`."""

    def __attrs_post_init__(self) -> None:
        if self.slots < 1 or self.object_store_bytes < MIN_OBJECT_STORE_BYTES:
            raise ValueError(f"a slot and {MIN_OBJECT_STORE_BYTES} B of object store at least")


class RayMachine:
    """A head or a raylet with all its processes. Blocking methods: from trio, call in a thread."""

    def __init__(self, settings: MachineSettings, head_address: str | None, port: int) -> None:
        prepare_directory(settings.directory)
        access = settings.access
        if access is None and head_address is None and is_loopback(settings.host):
            access = RayAccess(token_file=settings.directory / "token")
            make_token(access.token_file)
        variables = environment(
            settings.host,
            access,
            storage=settings.directory / "state" if head_address is None else None,
        )
        if head_address is not None:
            environment(head_address.rpartition(":")[0], access)  # refuses what it has to
        assert access is not None
        self.settings: Final = settings
        self.access: Final = access
        arguments = {
            "head": head_address,
            "port": port,
            "host": settings.host,
            "name": settings.directory.name,
            "directory": str(ray_directory(settings.directory)),
            "slots": settings.slots if head_address is not None else 0,
            "object_store_bytes": settings.object_store_bytes,
        }
        with open(settings.directory / "machine.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "runtime.hosting.ray_process", json.dumps(arguments)],
                env=os.environ | variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                pass_fds=() if settings.lock is None else (settings.lock,),
            )
        self._address: str | None = None

    @classmethod
    def head(cls, settings: MachineSettings, *, port: int = 0) -> RayMachine:
        """Start a head; `port` 0 is any that is free. A head that returns is given its old port,
        or the others do not find it. Raises RayRefused, ValueError, OSError."""
        return cls(settings, None, port)

    @classmethod
    def join(cls, settings: MachineSettings, address: str) -> RayMachine:
        """Start a raylet that joins the head at `address` (`host:port`), with its token in
        `settings.access`. Raises as `head` does."""
        if settings.access is None:
            raise RayRefused(f"to join the Ray at {address} its token file is needed")
        return cls(settings, address, 0)

    @property
    def pid(self) -> int:
        """Of the process that watches Ray's processes; also the id of their session."""
        return self._process.pid

    def ready(self) -> str:
        """Wait until it takes part, and return the head's address. Raises ClusterUnavailable, and
        has ended it then."""
        if self._address is None:
            assert self._process.stdout is not None
            os.set_blocking(self._process.stdout.fileno(), False)
            line = _read_line(self._process.stdout.fileno(), READY_S)
            with contextlib.suppress(msgspec.DecodeError):
                self._address = msgspec.json.decode(line, type=dict[str, str])["address"]
        if self._address is None:
            self.end()
            log = self.settings.directory / "machine.log"
            raise ClusterUnavailable(f"Ray did not start; see {log}")
        return self._address

    def running(self) -> bool:
        """Whether it has not ended; it ends when one of Ray's own processes does."""
        return self._process.poll() is None

    def processes(self) -> list[int]:
        """The ids of its processes, also of those that have lost their parent."""
        return session_processes(self.pid)

    def end(self) -> None:
        """End all its processes, and return when they are gone. Harmless when they are. Nodes on it
        are killed: drain them first."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        end_session(self.pid)
        self._process.stdout.close()

    def __enter__(self) -> RayMachine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


def session_processes(session: int, *, leader: bool = False) -> list[int]:
    """The living processes of a session of the kernel, without its leader unless told."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (leader or int(entry) != session):
            with contextlib.suppress(OSError):
                text = Path("/proc", entry, "stat").read_text()
                # pid (name) state ppid pgrp session ...; the name may have spaces and brackets
                state, _, _, of_session = text.rpartition(")")[2].split()[:4]
                if int(of_session) == session and state not in "ZX":
                    found.append(int(entry))
    return found


def end_session(session: int) -> None:
    """End all processes of a session but its leader, and return when they are gone."""
    deadline = time.monotonic() + END_S
    while (left := session_processes(session)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _read_line(descriptor: int, seconds: float) -> bytes:
    """A line from a non-blocking pipe, or what came of it until its end or the deadline."""
    deadline, line = time.monotonic() + seconds, b""
    while not line.endswith(b"\n") and (left := deadline - time.monotonic()) > 0:
        if not select.select([descriptor], [], [], left)[0]:
            break
        part = os.read(descriptor, _LINE_BYTES)
        if not part:
            break
        line += part
    return line
