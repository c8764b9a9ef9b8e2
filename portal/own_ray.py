"""A Ray of our own for the nodes of one machine: a head and a raylet on loopback, watched.

Either may die: the head is started again at its old port with what it knew, while the nodes go on;
a raylet's nodes end with it, and Ray starts them anew on the next. All of it ends with us.
If we are killed, its directory stays, and the next command removes it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio

from runtime.hosting.interface import ClusterUnavailable
from runtime.hosting.own_directory import OwnDirectory, open_own_directory
from runtime.hosting.ray_cluster import RayCluster, open_ray_cluster
from runtime.hosting.ray_machine import MachineSettings, RayMachine
from runtime.service import get_logger

WATCH_S: Final = 0.5
AGAIN_S: Final = 2.0

log = get_logger("portal")


@asynccontextmanager
async def open_own_ray(body: str) -> AsyncIterator[RayCluster]:
    """A Ray on which nodes run `body`, for the length of the block. Raises ClusterUnavailable."""
    with open_own_directory() as place:
        ray = _OwnRay(place)
        try:
            await ray.start()
            async with (
                trio.open_nursery() as nursery,
                open_ray_cluster(
                    ray.address, ray.head.access, body, through=place.path / "nodes"
                ) as cluster,
            ):
                nursery.start_soon(ray.watch)
                yield cluster
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(ray.end)


class _OwnRay:
    def __init__(self, place: OwnDirectory) -> None:
        self._place = place
        self.address = ""
        self._head: RayMachine | None = None
        self._raylet: RayMachine | None = None

    @property
    def head(self) -> RayMachine:
        assert self._head is not None
        return self._head

    async def start(self) -> None:
        await self._start_head(port=0)
        await self._start_raylet()

    async def watch(self) -> None:
        """Start again whatever has ended, for ever."""
        while True:
            await trio.sleep(WATCH_S)
            try:
                if not self.head.running():
                    log.error("ray_head_ended", address=self.address)
                    await self._start_head(port=int(self.address.rpartition(":")[2]))
                if self._raylet is None or not self._raylet.running():
                    log.error("raylet_ended")
                    await self._start_raylet()
            except (ClusterUnavailable, OSError) as error:
                log.error("ray_not_started", error=str(error))
                await trio.sleep(AGAIN_S)

    def end(self) -> None:
        for machine in (self._raylet, self._head):
            if machine is not None:
                machine.end()

    async def _start_head(self, port: int) -> None:
        if self._head is not None:
            await trio.to_thread.run_sync(self._head.end)
        settings = MachineSettings(directory=self._place.path / "head", lock=self._place.lock)
        self._head = await trio.to_thread.run_sync(partial(RayMachine.head, settings, port=port))
        self.address = await trio.to_thread.run_sync(self._head.ready)

    async def _start_raylet(self) -> None:
        if self._raylet is not None:
            await trio.to_thread.run_sync(self._raylet.end)
        settings = MachineSettings(
            directory=self._place.path / "nodes",
            access=self.head.access,
            lock=self._place.lock,
        )
        self._raylet = await trio.to_thread.run_sync(RayMachine.join, settings, self.address)
        await trio.to_thread.run_sync(self._raylet.ready)
