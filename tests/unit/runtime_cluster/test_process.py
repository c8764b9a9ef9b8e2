"""The process of a node without links: it ends when it is no node any more, and then only."""

from typing import Any

import pytest
import trio
import trio.testing

from actors.store.memory import MemoryStore
from runtime.clock import SystemClock
from runtime.cluster.envelopes import make_codec
from runtime.cluster.member import MEMBER, Renew
from runtime.cluster.process import MembershipEnded, NodeProcess, NodeSuperseded
from runtime.host import TrioHost
from runtime.randomness import SystemRandomness
from runtime.scheduler import Scheduler
from runtime.secret import Secret

RANDOMNESS = SystemRandomness()


class Running:
    """A process that runs within a nursery."""

    def __init__(self, process: NodeProcess) -> None:
        self.process = process
        self.errors: list[Exception] = []
        self.scheduler = Scheduler(
            clock=SystemClock(),
            randomness=RANDOMNESS,
            node=process.name,
            incarnation=process.incarnation,
        )
        self.host = TrioHost(self.scheduler)
        process.attach(self.scheduler, make_codec({}))

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.host.run)
            try:
                await self.process.run()
            except (MembershipEnded, NodeSuperseded) as error:
                self.errors.append(error)
            nursery.cancel_scope.cancel()

    def member(self) -> Any:
        return self.scheduler.registry.whereis(MEMBER)


async def join(store: MemoryStore) -> NodeProcess:
    return await NodeProcess.join(
        "a",
        store=store,
        door_address="127.0.0.1:1",
        version="test",
        clock=SystemClock(),
        randomness=RANDOMNESS,
    )


async def until_renewed(running: Running) -> None:
    with trio.fail_after(20):
        while not running.process.tenure.rows:
            await trio.sleep(0.005)


async def test_a_process_whose_name_is_taken_ends() -> None:
    store = MemoryStore()
    running = Running(await join(store))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.run)
            await until_renewed(running)
            await join(store)
            running.scheduler.cast(running.member(), Renew())
    assert [type(error) for error in running.errors] == [NodeSuperseded]


async def test_a_process_whose_member_fails_again_and_again_ends() -> None:
    """It would lose its lease, and stand there for nothing."""
    running = Running(await join(MemoryStore()))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.run)
            await until_renewed(running)
            for _ in range(4):
                running.scheduler.stop(running.member(), "crashed: on purpose")
                while running.member() is None and not running.errors:
                    await trio.sleep(0.005)
    assert [type(error) for error in running.errors] == [MembershipEnded]


async def test_the_end_of_all_actors_is_no_failure() -> None:
    running = Running(await join(MemoryStore()))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.run)
            await until_renewed(running)
            running.scheduler.shutdown()
            await trio.testing.wait_all_tasks_blocked()
            assert running.errors == []
            nursery.cancel_scope.cancel()


async def test_a_process_drains_and_leaves() -> None:
    store = MemoryStore()
    running = Running(await join(store))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.run)
            await until_renewed(running)
            await running.process.drain(running.host)
            assert [row.draining for row in await store.nodes()] == [True]
            await running.process.leave(running.host)
            assert await store.nodes() == ()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("secret", [Secret(b"x" * 32)])
async def test_links_need_both_a_secret_and_an_address(secret: Secret) -> None:
    with pytest.raises(ValueError, match="secret"):
        await NodeProcess.join(
            "a",
            store=MemoryStore(),
            door_address="127.0.0.1:1",
            version="test",
            clock=SystemClock(),
            randomness=RANDOMNESS,
            secret=secret,
        )
