"""A portal that takes in every agent, as a process of its own that can be killed.

Usage: python -m tests.system.channel_portal PORT CHAIN_FILE KEY_FILE [DOOR...]

It tells each agent the doors that are named.
"""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from channel.listener import Attachment, Channel, serve_channels
from channel.messages import Challenge, DoorAddress, Portals
from runtime.clock import SystemClock
from runtime.net.address import Address
from runtime.randomness import SystemRandomness
from tests.unit.channel.agents import Desk


async def run(port: int, chain: bytes, key: bytes, doors: tuple[DoorAddress, ...]) -> None:
    def accept(desk: Desk) -> None:
        desk.accept()
        if doors:
            desk.channel.send(Portals(addresses=doors))

    def connected(channel: Channel, challenge: Challenge) -> Attachment:
        return Desk(channel, answer=accept)

    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            lambda task_status: serve_channels(
                Address("127.0.0.1", port),
                chain,
                key,
                connected,
                portal="localhost",
                clock=SystemClock(),
                randomness=SystemRandomness(),
                reset_key=b"r" * 32,
                task_status=task_status,
            )
        )
        print(server.address.port, flush=True)


if __name__ == "__main__":
    trio.run(
        run,
        int(sys.argv[1]),
        Path(sys.argv[2]).read_bytes(),
        Path(sys.argv[3]).read_bytes(),
        tuple(map(DoorAddress, sys.argv[4:])),
    )
