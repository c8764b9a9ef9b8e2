"""Where nodes run: one contract for nodes as tasks and for nodes on Ray, and what only Ray does.

Ray is real: one private head and three raylets, started once for this file by our own code.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.cluster.hosting import (
    Cluster,
    DrainTimedOut,
    NodeExists,
    NodeFailed,
    NodeStatus,
    NodeUnavailable,
    NoSuchNode,
    NoSuchQuestion,
    RestartPause,
)
from runtime.cluster.local_cluster import open_local_cluster
from runtime.cluster.ray_cluster import RayCluster, open_ray_cluster
from runtime.cluster.ray_machine import MachineSettings, RayMachine

pytestmark = pytest.mark.system

QUICK = RestartPause(young_ns=NS_PER_S, pause_ns=20 * NS_PER_MS)
PATIENT = RestartPause(young_ns=600 * NS_PER_S, pause_ns=600 * NS_PER_S)
PLAIN = "tests.system.node_bodies:plain"

Open = Callable[..., AbstractAsyncContextManager[Cluster]]


class PrivateRay:
    """A head and raylets of this test run alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[RayMachine] = []
        self.head = self.keep(RayMachine.head(MachineSettings(directory=directory / "h")))
        self.address = self.head.ready()
        self.raylets = [self.join() for _ in range(3)]
        for raylet in self.raylets:
            raylet.ready()

    def keep(self, machine: RayMachine) -> RayMachine:
        self.started.append(machine)
        return machine

    def join(self) -> RayMachine:
        directory = self.directory / f"r{len(self.started)}"
        settings = MachineSettings(directory=directory, access=self.head.access, slots=8)
        return self.keep(RayMachine.join(settings, self.address))

    def head_returns(self) -> None:
        port = int(self.address.rpartition(":")[2])
        self.head = self.keep(RayMachine.head(self.head.settings, port=port))
        assert self.head.ready() == self.address

    def cluster(
        self, body: str, settings: Mapping[str, Any] | None = None, **options: Any
    ) -> AbstractAsyncContextManager[RayCluster]:
        """As an operator would open it, through the first raylet."""
        access, through = self.head.access, self.raylets[0].settings.directory
        return open_ray_cluster(self.address, access, body, settings, through=through, **options)

    def end(self) -> None:
        for machine in reversed(self.started):
            machine.end()


@pytest.fixture(scope="module")
def private_ray() -> Iterator[PrivateRay]:
    directory = Path(tempfile.mkdtemp(prefix="hr"))
    ray = PrivateRay.__new__(PrivateRay)
    ray.started = []
    try:
        ray.__init__(directory)  # type: ignore[misc]
        yield ray
    finally:
        ray.end()
        left = [pid for machine in ray.started for pid in machine.processes()]
        shutil.rmtree(directory, ignore_errors=True)
    assert left == []
    assert not any(machine.running() for machine in ray.started)


@pytest.fixture(params=["tasks", "ray"])
def opened(request: pytest.FixtureRequest) -> Open:
    """Opens a cluster of nodes of a body."""
    if request.param == "tasks":
        return open_local_cluster
    ray: PrivateRay = request.getfixturevalue("private_ray")
    return ray.cluster


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = 60) -> Any:
    """What `condition` gives as soon as it is true; a node that cannot answer yet is waited for."""
    with trio.fail_after(seconds):
        while True:
            with suppress(NodeUnavailable):
                if found := await condition():
                    return found
            await trio.sleep(0.05)


async def status_of(cluster: Cluster, name: str) -> NodeStatus:
    return next(status for status in await cluster.nodes() if status.name == name)


async def pid_of(cluster: Cluster, name: str) -> int:
    return (await cluster.ask(name, "status"))["pid"]


async def drain_all(cluster: Cluster) -> None:
    for status in await cluster.nodes():
        await cluster.drain(status.name)


@asynccontextmanager
async def emptied(cluster: Cluster) -> AsyncIterator[None]:
    """Nodes on Ray outlive a test that failed, unless they are drained."""
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await drain_all(cluster)


# --- the contract ------------------------------------------------------------------------------


async def test_nodes_are_started_asked_and_drained(opened: Open):
    async with opened(PLAIN, {"colour": "red", "number": 1}) as cluster, emptied(cluster):
        assert await cluster.nodes() == ()
        status = await cluster.start("n1", {"number": 2})
        assert (status.name, status.state, status.restarts) == ("n1", "running", 0)
        assert status.reason is None
        await cluster.start("n2")
        assert [node.name for node in await cluster.nodes()] == ["n1", "n2"]
        assert (await status_of(cluster, "n1")).pid == await pid_of(cluster, "n1")
        assert await cluster.ask("n1", "settings") == {"colour": "red", "number": 2}
        assert await cluster.ask("n2", "settings") == {"colour": "red", "number": 1}
        assert [await cluster.ask("n1", "count") for _ in range(3)] == [1, 2, 3]

        with pytest.raises(NodeExists):
            await cluster.start("n1")
        with pytest.raises(ValueError, match="not the name of a node"):
            await cluster.start("N 1")
        with pytest.raises(ValueError, match="plain values"):
            await cluster.start("n3", {"secret": object()})
        with pytest.raises(NoSuchQuestion, match="'nobody knows'"):
            await cluster.ask("n1", "nobody knows")
        with pytest.raises(NodeFailed, match="'fail': LookupError: no such thing"):
            await cluster.ask("n1", "fail")
        with pytest.raises(NodeFailed, match="'unspeakable'"):
            await cluster.ask("n1", "unspeakable")
        assert await cluster.ask("n1", "count") == 4, "it goes on"

        await cluster.drain("n1")
        assert [node.name for node in await cluster.nodes()] == ["n2"]
        with pytest.raises(NoSuchNode):
            await cluster.ask("n1", "status")
        with pytest.raises(NoSuchNode):
            await cluster.drain("n1")
        await cluster.start("n1")
        assert await cluster.ask("n1", "count") == 1, "another life"


async def test_a_node_that_crashes_is_restarted_under_its_name(opened: Open):
    async with opened(PLAIN, pause=QUICK) as cluster, emptied(cluster):
        begun = (await cluster.start("n1", {"kept": True})).since
        assert [await cluster.ask("n1", "count") for _ in range(2)] == [1, 2]
        await cluster.ask("n1", "crash")

        async def restarted() -> NodeStatus | None:
            status = await status_of(cluster, "n1")
            return status if (status.restarts, status.state) == (1, "running") else None

        status = await until(restarted)
        assert status.since > begun
        assert await until(lambda: cluster.ask("n1", "count")) == 1
        assert await cluster.ask("n1", "settings") == {"kept": True}


async def test_a_body_that_cannot_start_says_why_and_leaves_nothing(opened: Open):
    async with opened("tests.system.node_bodies:broken") as cluster, emptied(cluster):
        with pytest.raises(NodeFailed) as caught:
            await cluster.start("n1")
        assert caught.value.reason == "ValueError: n1 has no database"
        assert await cluster.nodes() == ()
    async with opened("tests.system.node_bodies:not_there") as cluster, emptied(cluster):
        with pytest.raises(NodeFailed, match="not an async function"):
            await cluster.start("n1")
    async with opened("tests.system.node_bodies:mute") as cluster, emptied(cluster):
        with pytest.raises(NodeUnavailable, match="not up by the deadline"):
            await cluster.start("n1", deadline_ns=50 * NS_PER_MS)
        assert await cluster.nodes() == ()


async def test_a_drain_ends_in_time_whatever_the_node_does(opened: Open):
    async with opened(PLAIN) as cluster, emptied(cluster):
        await cluster.start("slow", {"drain_s": 600})
        await cluster.start("clumsy", {"drain": "fail"})
        with pytest.raises(DrainTimedOut):
            await cluster.drain("slow", deadline_ns=100 * NS_PER_MS)
        with pytest.raises(NodeFailed, match="OSError: could not let go"):
            await cluster.drain("clumsy")
        assert await cluster.nodes() == ()


async def test_a_node_that_waits_to_be_restarted_says_why_and_can_be_drained(opened: Open):
    async with opened(PLAIN, pause=PATIENT) as cluster, emptied(cluster):
        await cluster.start("n1")
        await cluster.ask("n1", "crash")

        async def waiting() -> NodeStatus | None:
            status = await status_of(cluster, "n1")
            return status if status.state == "restarting" else None

        assert (await until(waiting)).reason == "RuntimeError: told to crash"
        with pytest.raises(NodeUnavailable):
            await cluster.ask("n1", "count")
        await cluster.drain("n1")
        assert await cluster.nodes() == ()
