"""A disk that is slow, or hangs, for one program: its fsync(2) and fdatasync(2) take as long as a
test says. To the program, and to the kernel's scheduler, it is as with a real one: the task sleeps
in the system call, only a SIGKILL gets it out of there, and all that needs no disk goes on. (Writes
go to the kernel's cache, as they do with a real disk; only who asks for the disk waits for it.)

It takes nothing but Linux 5.19 and root: a seccomp filter hands these two calls to a supervisor, a
thread of the test, which lets them go on when their time has come (seccomp_unotify(2)).

    python -m tests.system.slow_disk FD PROGRAM ...     # what `SlowDisk.command` has run
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import platform
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import attrs

_PR_SET_NO_NEW_PRIVS: Final = 38
_SET_MODE_FILTER: Final = 1
_FLAGS: Final = (1 << 3) | (1 << 5)
"""NEW_LISTENER, and WAIT_KILLABLE_RECV: a call that waits for us is ended by SIGKILL alone."""
_RECEIVE: Final = 0xC0502100
_SEND: Final = 0xC0182101
_CONTINUE: Final = 1
_NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")
_RESPONSE: Final = struct.Struct("=QqiI")
_LOOK_MS: Final = 20


@attrs.frozen
class _Calls:
    """Numbers of system calls."""

    seccomp: int
    fsync: int
    fdatasync: int


_CALLS: Final = {"x86_64": _Calls(317, 74, 75), "aarch64": _Calls(277, 82, 83)}


class SlowDisk:
    """How slow the disk of the programs is that were started by `command`.

    `latency_s` is how long it takes to have written; nothing at first. While it `hangs` nothing is
    written at all. Both may be changed at any time. Use it as a context manager around the
    programs' lives: afterwards nobody is waited for any more.
    """

    def __init__(self) -> None:
        self.latency_s = 0.0
        self.hangs = False
        self.calls = 0
        """So many were let go on after they had to wait."""
        self._threads: list[threading.Thread] = []

    def command(self, argv: Sequence[str]) -> tuple[list[str], int]:
        """How to start a program on this disk, and a descriptor to pass and to close then."""
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=self._supervise, args=(ours,), name="slow disk")
        thread.start()
        self._threads.append(thread)
        number = theirs.detach()
        return [sys.executable, "-m", __name__, str(number), *argv], number

    def __enter__(self) -> SlowDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.latency_s, self.hangs = 0.0, False
        for thread in self._threads:
            thread.join()

    def _supervise(self, from_program: socket.socket) -> None:
        """Until the program and all its children are gone."""
        with from_program:
            _, descriptors, *_ = socket.recv_fds(from_program, 1, 1)
        if not descriptors:
            return
        (listener,) = descriptors
        waiting: list[tuple[float, int]] = []
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        try:
            while True:
                for _, events in poll.poll(_LOOK_MS if waiting else None):
                    if events & select.POLLHUP:
                        return
                    if events & select.POLLIN:
                        self._receive(listener, waiting)
                while waiting and not self.hangs and waiting[0][0] <= time.monotonic():
                    _, id = heapq.heappop(waiting)
                    self.calls += 1
                    with suppress(FileNotFoundError):  # killed meanwhile
                        fcntl.ioctl(listener, _SEND, _RESPONSE.pack(id, 0, 0, _CONTINUE))
        finally:
            os.close(listener)

    def _receive(self, listener: int, waiting: list[tuple[float, int]]) -> None:
        notification = bytearray(_NOTIFICATION.size)
        with suppress(FileNotFoundError):  # killed meanwhile
            fcntl.ioctl(listener, _RECEIVE, notification)
            id, *_ = _NOTIFICATION.unpack(notification)
            heapq.heappush(waiting, (time.monotonic() + self.latency_s, id))


# --- in the program's process, before it is the program ------------------------------------------


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _filter(calls: _Calls) -> bytes:
    """Classic BPF: load the number of the call; the two go to the supervisor, others go on."""
    instruction = struct.Struct("=HBBI").pack
    return b"".join(
        [
            instruction(0x20, 0, 0, 0),
            instruction(0x15, 2, 0, calls.fsync),
            instruction(0x15, 1, 0, calls.fdatasync),
            instruction(0x06, 0, 0, 0x7FFF_0000),
            instruction(0x06, 0, 0, 0x7FC0_0000),
        ]
    )


def main() -> None:
    channel, argv = int(sys.argv[1]), sys.argv[2:]
    calls = _CALLS[platform.machine()]
    code = _filter(calls)
    program = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    listener = libc.syscall(calls.seccomp, _SET_MODE_FILTER, _FLAGS, ctypes.byref(program))
    if listener < 0:
        sys.exit(f"seccomp: {os.strerror(ctypes.get_errno())}")
    with socket.socket(fileno=channel) as to_test:
        socket.send_fds(to_test, [b"x"], [listener])
    os.close(listener)
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main()
