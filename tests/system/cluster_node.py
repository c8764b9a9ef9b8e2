"""A node in a process of its own, for tests that kill it: echoes every message to its sender.

    python -m tests.system.cluster_node NAME INCARNATION PORT     # the secret: a line on stdin

Prints its port, then runs until it is killed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import trio

from runtime.clock import SystemClock
from runtime.cluster.links import NodeLinks
from runtime.cluster.membership import Membership
from runtime.net.address import Address
from runtime.randomness import SystemRandomness
from runtime.secret import Secret
from tests.system.test_cluster_links import CODEC, SETTINGS


async def main(name: str, incarnation: int, port: int, secret: Secret) -> None:
    async def echo(node: str, messages: Sequence[tuple[int, Any]]) -> None:
        for target, message in messages:
            await links.send_when_possible(node, target, message)

    links = NodeLinks(
        Membership(secret, name),
        incarnation,
        CODEC,
        deliver=echo,
        changed=lambda node, incarnation, up: None,
        clock=SystemClock(),
        randomness=SystemRandomness(),
        settings=SETTINGS,
    )
    async with trio.open_nursery() as nursery:
        address = await nursery.start(links.run, Address("127.0.0.1", port))
        print(address.port, flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Secret(input().strip()))
