"""One agent for each thing that it changes on a machine: routing tables, forwarding switches.

The lock is an abstract Unix socket: such names belong to the network namespace, as routes, rules,
nftables and forwarding switches do, and the kernel frees one at the death of its owner. Anyone in
the namespace can take a name, so a refusal says who has it.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

_CREDENTIALS = struct.Struct("3i")


class AlreadyRunning(Exception):
    """Another process has the lock; the message says which."""


@contextmanager
def only_one(what: str) -> Iterator[None]:
    """Hold the lock named `what` (of this network namespace) within the block.

    Raises AlreadyRunning, with `what` in its words: "the gateway", "routing table 26727".
    """
    name = f"\0holloway: {what}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as lock:
        try:
            lock.bind(name)
        except OSError:
            place = "this machine (network namespace)"
            raise AlreadyRunning(
                f"{what} of {place} is taken{_by_whom(name)}: end that first"
            ) from None
        lock.listen()
        yield


def _by_whom(name: str) -> str:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(1.0)
            asking.connect(name)
            found = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        return ""
    pid, uid, _ = _CREDENTIALS.unpack(found)
    return f" by process {pid} of user {uid}"
