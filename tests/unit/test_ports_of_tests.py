"""The ports that tests use: no two processes are given the same, and none is one that is taken."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import BLOCK_SIZE, BLOCKS, free_port, free_ports

ROOT = Path(__file__).resolve().parents[2]


def block_of(port: int) -> int:
    return (port - BLOCKS.start) // BLOCK_SIZE


def test_another_process_has_another_block() -> None:
    ours = block_of(free_port())
    program = "from tests.ports import free_port; print(free_port())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert block_of(int(done.stdout)) != ours


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_that_is_taken_is_passed_by(kind: socket.SocketKind) -> None:
    with socket.socket(type=kind) as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        found = {free_port() for _ in range(BLOCK_SIZE + 1)}
    assert port not in found
    assert len({block_of(each) for each in found | {port}}) == 1


def test_many_in_a_row_are_of_one_block() -> None:
    for _ in range(2 * BLOCK_SIZE // 30):
        first = free_ports(30)
        assert block_of(first) == block_of(first + 29)
