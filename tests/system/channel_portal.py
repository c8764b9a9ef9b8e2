"""A portal that takes in every agent, as a process of its own that can be killed.

Usage: python -m tests.system.channel_portal PORT CHAIN_FILE KEY_FILE [DOOR...]

It tells each agent the doors that are named. With WEBSOCKET_ALONE in the environment agents reach
it by WebSocket alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import trio

from channel.listener import Attachment, Channel, serve_channels
from channel.messages import Challenge, DoorAddress, Portals
from channel.websocket_listener import WebSocketDoor
from runtime.clock import SystemClock
from runtime.net.address import Address
from runtime.randomness import SystemRandomness
from tests.ports import free_port
from tests.unit.channel.agents import Desk


async def run(port: int, chain: Path, key: Path, doors: tuple[DoorAddress, ...]) -> None:
    def accept(desk: Desk) -> None:
        desk.accept()
        if doors:
            desk.channel.send(Portals(addresses=doors))

    def connected(channel: Channel, challenge: Challenge) -> Attachment:
        return Desk(channel, answer=accept)

    by_websocket = bool(os.environ.get("WEBSOCKET_ALONE"))
    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            lambda task_status: serve_channels(
                Address("127.0.0.1", 0 if by_websocket else port),
                chain.read_bytes(),
                key.read_bytes(),
                connected,
                portal="localhost",
                clock=SystemClock(),
                randomness=SystemRandomness(),
                reset_key=b"r" * 32,
                task_status=task_status,
            )
        )
        if by_websocket:
            port = port or free_port()
            listen = Address("127.0.0.1", port)
            await nursery.start(WebSocketDoor(server).serve, listen, chain, key)
        print(port if by_websocket else server.address.port, flush=True)


if __name__ == "__main__":
    trio.run(
        run,
        int(sys.argv[1]),
        Path(sys.argv[2]),
        Path(sys.argv[3]),
        tuple(map(DoorAddress, sys.argv[4:])),
    )
