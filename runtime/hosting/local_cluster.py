"""Nodes as tasks of this process: the same bodies as on Ray, for one process and for tests."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final

import attrs
import msgspec
import trio

from runtime.clock import NS_PER_S, Clock, SystemClock
from runtime.cluster.membership import check_node_name
from runtime.hosting.interface import (
    ASK_NS,
    DRAIN_NS,
    MAX_NODES,
    START_NS,
    DrainTimedOut,
    Life,
    NodeExists,
    NodeFailed,
    NodeHandle,
    NodeStatus,
    NodeUnavailable,
    NoSuchNode,
    RestartPause,
    encode_settings,
)

HOST: Final = "local"


@attrs.define(eq=False)
class _Node:
    """A node over all its lives."""

    name: str
    settings: bytes
    life: Life
    since: datetime
    restarts: int = 0
    accepted: bool = False
    """Its first life was up, so it is restarted."""
    leaving: bool = False
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    gone: trio.Event = attrs.field(factory=trio.Event)


@asynccontextmanager
async def open_local_cluster(
    body: str,
    settings: Mapping[str, Any] | None = None,
    *,
    pause: RestartPause | None = None,
    clock: Clock | None = None,
) -> AsyncIterator[LocalCluster]:
    """A cluster of nodes that run `body`; at the end those left are cancelled."""
    async with trio.open_nursery() as nursery:
        cluster = LocalCluster(nursery, body, settings, pause=pause, clock=clock)
        try:
            yield cluster
        finally:
            await cluster.close()


class LocalCluster:
    """A `Cluster` whose nodes are tasks of `nursery`. A body that fails never ends another."""

    def __init__(
        self,
        nursery: trio.Nursery,
        body: str,
        settings: Mapping[str, Any] | None = None,
        *,
        pause: RestartPause | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._nursery = nursery
        self._body = body
        self._settings = settings
        self._pause = pause or RestartPause()
        self._clock = clock or SystemClock()
        self._nodes: dict[str, _Node] = {}

    async def start(
        self, name: str, settings: Mapping[str, Any] | None = None, *, deadline_ns: int = START_NS
    ) -> NodeStatus:
        """See `Cluster`. Raises ValueError beyond MAX_NODES too."""
        check_node_name(name)
        encoded = encode_settings(self._settings, settings)
        if name in self._nodes:
            raise NodeExists(name)
        if len(self._nodes) >= MAX_NODES:
            raise ValueError(f"a cluster has at most {MAX_NODES} nodes")
        life = _new_life(name, encoded)
        node = _Node(name=name, settings=encoded, life=life, since=self._clock.utc_now())
        self._nodes[name] = node
        self._nursery.start_soon(self._keep, node)
        try:
            with trio.move_on_after(deadline_ns / NS_PER_S):
                await life.wait_up()
                node.accepted = life.was_up and life.failure is None
        finally:
            if not node.accepted:
                await self._end(node)
        if node.accepted:
            return self._status(node)
        if life.failure is not None:
            raise NodeFailed(name, life.failure)
        raise NodeUnavailable(name, "was not up by the deadline")

    async def nodes(self) -> tuple[NodeStatus, ...]:
        """See `Cluster`."""
        return tuple(self._status(self._nodes[name]) for name in sorted(self._nodes))

    async def ask(self, name: str, question: str, *, deadline_ns: int = ASK_NS) -> Any:
        """See `Cluster`. Answers at once, since it is asked in the node's own thread."""
        return msgspec.json.decode(self._find(name).life.answer(question))

    async def drain(self, name: str, *, deadline_ns: int = DRAIN_NS) -> None:
        """See `Cluster`."""
        node = self._find(name)
        node.leaving = True
        life = node.life
        if life.ended.is_set():  # it waits to be restarted
            await self._end(node)
            return
        life.handle.drain_requested.set()
        with trio.move_on_after(deadline_ns / NS_PER_S):
            await node.gone.wait()
        if not node.gone.is_set():
            await self._end(node)
            raise DrainTimedOut(name)
        if life.failure is not None:
            raise NodeFailed(name, life.failure)

    async def close(self) -> None:
        """Cancel the nodes that are left, and return when they are gone."""
        for node in list(self._nodes.values()):
            await self._end(node)

    async def _keep(self, node: _Node) -> None:
        """Run the node's body, again and again."""
        try:
            with node.scope:
                while True:
                    begun_ns = self._clock.monotonic_ns()
                    await node.life.run(self._body)
                    if node.leaving or not (node.life.was_up or node.accepted):
                        return
                    lived_ns = self._clock.monotonic_ns() - begun_ns
                    await trio.sleep(self._pause.after(lived_ns) / NS_PER_S)
                    node.restarts += 1
                    node.since = self._clock.utc_now()
                    node.life = _new_life(node.name, node.settings)
        finally:
            self._nodes.pop(node.name, None)
            node.gone.set()

    async def _end(self, node: _Node) -> None:
        node.scope.cancel()
        with trio.CancelScope(shield=True):
            await node.gone.wait()

    def _find(self, name: str) -> _Node:
        node = self._nodes.get(name)
        if node is None:
            raise NoSuchNode(name)
        return node

    def _status(self, node: _Node) -> NodeStatus:
        return NodeStatus(
            name=node.name,
            state=node.life.state,
            pid=os.getpid(),
            host=HOST,
            restarts=node.restarts,
            since=node.since,
            reason=node.life.failure,
        )


def _new_life(name: str, settings: bytes) -> Life:
    return Life(NodeHandle(name, msgspec.json.decode(settings)))
