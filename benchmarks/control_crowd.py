"""Many agents in one process, for `benchmarks.control_agents`: real dialers, each with a socket and
a QUIC connection of its own, and nothing behind them.

`python -m benchmarks.control_crowd FILE` makes the agents that FILE names (`Plan`, JSON), and does
what each line of its standard input says (`{"do": ..., ...}`); for each it answers by a line. Times
are CLOCK_MONOTONIC in nanoseconds, which all processes of a machine share.

    join   first, last, at_once   has clients dial, so many at a time; seconds until all are in
    cut    first, last            ends their connections; they dial no more
    seen   name, count            waits until so many know a resource by that name; since when
    ask    clients, resource      has them ask for access, one after the other; how long it took
    settle                        waits until its gateways are connected
    count                         how many are connected
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import defaultdict
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import attrs
import trio

from channel.frames import Frame
from channel.messages import AuthorizationCreated, ResourceUpserted
from runtime.service import configure_logging
from tests.system.light_agents import LightClient, LightGateway

AGENTS_PER_SOURCE: Final = 25
"""As behind the NATs of small sites. (A portal takes 1,000 connections of one address, and 128
handshakes at a time.)"""
SEEN_WITHIN_S: Final = 60.0


@attrs.frozen
class Plan:
    """The tokens of all clients of a process, in order, and of its gateways."""

    clients: list[str]
    gateways: list[str]


class Client(LightClient):
    """Notes when it was told of what, and when it came in."""

    def __init__(self, token: str, name: str, source: str, seen: dict[str, list[int]]) -> None:
        super().__init__(token, name, source=source)
        self._seen = seen
        self.is_in = trio.Event()
        self.scope = trio.CancelScope()

    def receive(self, frame: Frame, now: int) -> None:
        if isinstance(frame.message, ResourceUpserted):
            self._seen[frame.message.resource.name].append(time.monotonic_ns())
        super().receive(frame, now)

    def came_in(self) -> None:
        super().came_in()
        self.is_in.set()

    async def run(self) -> None:
        with self.scope:
            await self.dialer.run()


class Crowd:
    """See the module."""

    def __init__(self, plan: Plan, nursery: trio.Nursery) -> None:
        self._seen: dict[str, list[int]] = defaultdict(list)
        self._nursery = nursery
        self.clients = [
            Client(token, f"client-{number}", source_of(number), self._seen)
            for number, token in enumerate(plan.clients)
        ]
        self.gateways = [
            LightGateway(token, f"gateway-{number}") for number, token in enumerate(plan.gateways)
        ]
        for gateway in self.gateways:
            nursery.start_soon(gateway.dialer.run)

    async def join(self, first: int, last: int, at_once: int) -> dict[str, float]:
        limiter = trio.CapacityLimiter(at_once)
        some = self.clients[first:last]
        took: list[float] = []
        begun = time.monotonic()

        async def one(client: Client) -> None:
            async with limiter:
                client.forget_doors()
                client.is_in, client.scope = trio.Event(), trio.CancelScope()
                self._nursery.start_soon(client.run)
                await client.is_in.wait()
                took.append(time.monotonic() - begun)

        async with trio.open_nursery() as nursery:
            for client in some:
                nursery.start_soon(one, client)
        dials = sum(client.dialer.statistics().dials for client in some)
        return {"seconds": max(took, default=0.0), "dials": dials}

    async def cut(self, first: int, last: int) -> dict[str, float]:
        for client in self.clients[first:last]:
            client.scope.cancel()
        await trio.sleep(0.1)
        return {"cut": last - first}

    async def seen(self, name: str, count: int) -> dict[str, list[int]]:
        with trio.fail_after(SEEN_WITHIN_S):
            while len(self._seen[name]) < count:
                await trio.sleep(0.005)
        return {"at_ns": self._seen.pop(name)}

    async def ask(self, clients: list[int], resource: str) -> dict[str, list[float]]:
        took = []
        for number in clients:
            begun = time.monotonic()
            answer = await self.clients[number].ask(UUID(resource))
            if not isinstance(answer, AuthorizationCreated):
                raise RuntimeError(f"access was refused: {answer}")
            took.append((time.monotonic() - begun) * 1e3)
        return {"ms": took}

    async def settle(self) -> dict[str, int]:
        while not all(gateway.dialer.connected for gateway in self.gateways):
            await trio.sleep(0.05)
        return await self.count()

    async def count(self) -> dict[str, int]:
        return {
            "clients": sum(client.dialer.connected for client in self.clients),
            "gateways": sum(gateway.dialer.connected for gateway in self.gateways),
        }


def source_of(number: int) -> str:
    """From which address a client dials: from 127.1.0.0 on."""
    return str(IPv4Address("127.1.0.0") + number // AGENTS_PER_SOURCE)


async def obey(plan: Plan) -> None:
    async with trio.open_nursery() as nursery:
        crowd = Crowd(plan, nursery)
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            order: dict[str, Any] = json.loads(line)
            answer = await getattr(crowd, order.pop("do"))(**order)
            print(json.dumps(answer), flush=True)
        nursery.cancel_scope.cancel()


def main() -> None:
    if len(sys.argv) != 2:
        print(__doc__)
        return
    configure_logging("text", "error")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    trio.run(obey, Plan(**json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()
