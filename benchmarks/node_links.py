"""Two nodes in two processes over a real link (TCP, TLS, frames); a part of `benchmarks.runtime`.

One node sends small messages of one class, waiting whenever the queue is full; the other counts
what is delivered to it, and answers whenever it is asked how many there were.

    msgs_per_s           from the first `send` until the other node has answered that it has all;
                         the processes have a core each
    msgs_per_s_one_core  the same, both processes on one core
    round_trip_ms        one question at a time, and its answer: the median; a core each

`python -m benchmarks.node_links [--quick]` measures once and prints these as one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import attrs
import trio

from runtime.clock import SystemClock
from runtime.cluster.frames import MessageCodec
from runtime.cluster.links import NodeLinks
from runtime.cluster.membership import Membership, make_secret
from runtime.net.address import Address
from runtime.randomness import SystemRandomness
from runtime.secret import Secret

COUNT: Final = 1
"""Target of messages that are only counted."""
ASK: Final = 2
"""Target of those that are answered as well."""
SENDS_PER_CHECKPOINT: Final = 500
PATIENCE_S: Final = 120
SERVE: Final = "--serve"
NOWHERE: Final = Address("127.0.0.1", 1)
"""Who dials us need not be dialled."""


@attrs.frozen
class Note:
    number: int
    text: str = "a few letters"


class Node:
    """One end. Counts what is delivered; `answer` is the last answer, `answered` that it came."""

    def __init__(self, name: str, secret: Secret) -> None:
        self.received = 0
        self.answered = trio.Event()
        self.answer = 0
        self.up = trio.Event()
        self.down = trio.Event()
        self.links = NodeLinks(
            Membership(secret, name),
            time.time_ns(),
            MessageCodec({16: Note}),
            deliver=self._deliver,
            changed=lambda _node, _incarnation, there: (self.up if there else self.down).set(),
            clock=SystemClock(),
            randomness=SystemRandomness(),
        )

    async def _deliver(self, node: str, messages: Sequence[tuple[int, Any]]) -> None:
        for target, message in messages:
            if target == ASK:
                self.links.send(node, 0, Note(self.received))
            elif target == COUNT:
                self.received += 1
            else:
                self.answer = message.number
                self.answered.set()

    async def ask(self) -> int:
        """How many messages the other node got by now."""
        self.answered = trio.Event()
        await self.links.send_when_possible("b", ASK, Note(0))
        await self.answered.wait()
        return self.answer


async def serve(secret: Secret) -> None:
    """Be node b until its link is lost."""
    node = Node("b", secret)
    async with trio.open_nursery() as nursery:
        address = await nursery.start(node.links.run, Address("127.0.0.1", 0))
        node.links.set_peers({"a": NOWHERE})
        print(address.port, flush=True)
        await node.down.wait()
        nursery.cancel_scope.cancel()


async def measure_one_way(node: Node, count: int) -> float:
    note, send = Note(1), node.links.send_when_possible
    began = time.perf_counter()
    for _ in range(count // SENDS_PER_CHECKPOINT):
        for _ in range(SENDS_PER_CHECKPOINT):
            await send("b", COUNT, note)
        await trio.lowlevel.checkpoint()
    got = await node.ask()
    took = time.perf_counter() - began
    if got != count:
        raise RuntimeError(f"{got} messages of {count} arrived")
    return count / took


async def measure_round_trips(node: Node, count: int) -> float:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        await node.ask()
        times.append(time.perf_counter() - began)
    return 1_000 * statistics.median(times)


async def use(port: int, secret: Secret, messages: int, round_trips: int) -> dict[str, float]:
    """Be node a: dial b, and measure."""
    node = Node("a", secret)
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(node.links.run, Address("127.0.0.1", 0))
            node.links.set_peers({"b": Address("127.0.0.1", port)})
            await node.up.wait()
            figures = {"msgs_per_s": await measure_one_way(node, messages)}
            if round_trips:
                figures["round_trip_ms"] = await measure_round_trips(node, round_trips)
            nursery.cancel_scope.cancel()
    return figures


def between(cores: tuple[int, int], messages: int, round_trips: int) -> dict[str, float]:
    """Measure from this process, on the first core, to a new one on the second."""
    secret = make_secret(SystemRandomness())
    before = os.sched_getaffinity(0)
    command = [sys.executable, "-m", "benchmarks.node_links", SERVE, str(cores[1])]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdin is not None
            assert other.stdout is not None
            print(secret.reveal().hex(), file=other.stdin, flush=True)
            port = int(other.stdout.readline())
            os.sched_setaffinity(0, {cores[0]})
            return trio.run(use, port, secret, messages, round_trips)
        finally:
            os.sched_setaffinity(0, before)
            other.kill()


def measure_node_links(messages: int, round_trips: int) -> dict[str, float]:
    """All figures; those with a core each only where there are two."""
    cores = sorted(os.sched_getaffinity(0))
    shared = between((cores[0], cores[0]), messages, 0)
    figures = {"msgs_per_s_one_core": shared["msgs_per_s"]}
    if len(cores) > 1:
        figures |= between((cores[0], cores[1]), messages, round_trips)
    return figures


def main() -> None:
    if sys.argv[1:2] == [SERVE]:
        os.sched_setaffinity(0, {int(sys.argv[2])})
        trio.run(serve, Secret(bytes.fromhex(sys.stdin.readline())))
    else:
        scale = 1 if "--quick" in sys.argv else 5
        print(json.dumps(measure_node_links(200_000 * scale, 1_000 * scale)))


if __name__ == "__main__":
    main()
