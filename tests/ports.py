"""Ports for tests.

What asks the kernel for any free port gets one of its ephemeral range, which is where it takes the
ports of outgoing connections from too: one that was free may be taken before it is used. Ours are
below that range (as Linux has it unless told otherwise), and above those of Ray's workers. Each
process has a block of them to itself, whoever else runs tests on this machine.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from functools import cache
from typing import Final

BLOCKS: Final = range(20_000, 32_700, 100)
"""The first ports of all blocks."""
BLOCK_SIZE: Final = BLOCKS.step

_offset = 0


def free_ports(count: int) -> int:
    """The first of so many ports in a row that are free for TCP and UDP on loopback. They are given
    once more after all others of the block."""
    global _offset
    first = _claim().first
    for _ in range(2 * BLOCK_SIZE):
        if _offset + count > BLOCK_SIZE:
            _offset = 0
        port = first + _offset
        _offset += count
        if all(_is_free(each) for each in range(port, port + count)):
            return port
    raise AssertionError(f"no {count} ports in a row are free from {first} on")


def free_port() -> int:
    """One that is free for TCP and UDP on loopback."""
    return free_ports(1)


class _Block:
    """A block is claimed by a name of a Unix socket, which lasts as long as this process."""

    def __init__(self) -> None:
        self._claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        for self.first in BLOCKS:
            with suppress(OSError):
                self._claim.bind(f"\0holloway tests: ports from {self.first} on")
                return
        raise AssertionError("too many processes run tests on this machine")


@cache
def _claim() -> _Block:
    return _Block()


def _is_free(port: int) -> bool:
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp, suppress(OSError):
        # A connection that lingers in TIME-WAIT is in nobody's way.
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for each in (tcp, udp):
            each.bind(("127.0.0.1", port))
        return True
    return False
