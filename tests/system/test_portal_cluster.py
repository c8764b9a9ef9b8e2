"""A portal of several nodes on Ray."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.cluster_world import World, open_world

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world() as world:
        yield world


def test_x(world):
    import trio
    async def one(c):
        import time
        t=time.monotonic()
        with trio.move_on_after(30):
            a = await c.client.ask(c.resource_id)
        print(c.id, type(a).__name__, getattr(a, "reason", ""), time.monotonic()-t)
    async def all():
        for c in world.customers:
            await one(c)
    world.run(all)
    for n in world.nodes:
        print(world.run(world.status_of, n))
    print(world.query("SELECT account_id, owner, epoch FROM lease"))
    print(world.query("SELECT account_id, writer, owner, ended, at FROM written"))
    print(world.query('SELECT account_id, end_reason FROM "authorization"'))
    for n in world.nodes:
        print(world.run(world.cluster.ask, n, "tree"))
