"""Ports for tests."""

from __future__ import annotations

import socket
from contextlib import suppress


def free_ports(count: int) -> int:
    """The first of so many ports in a row that were free for TCP and UDP a moment ago."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
        with suppress(OSError, OverflowError):
            for each in range(port, port + count):
                with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
                    tcp.bind(("127.0.0.1", each))
                    udp.bind(("127.0.0.1", each))
            return port
