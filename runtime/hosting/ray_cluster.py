"""Nodes as named, detached actors of Ray: it places them, restarts them and knows them by name.

Ray's calls block, and block long while its head is away, so each runs in a thread with a deadline;
a thread that is given up holds its place until Ray lets go of it. Ray is imported when a cluster is
opened, never before: it takes seconds, and agents do without.

A process has one connection to Ray (`ray.init`), so one RayCluster at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import trio

from runtime.clock import NS_PER_S
from runtime.cluster.membership import check_node_name
from runtime.hosting.interface import (
    ASK_NS,
    DRAIN_NS,
    MAX_NODES,
    START_NS,
    ClusterUnavailable,
    DrainTimedOut,
    NodeExists,
    NodeFailed,
    NodeState,
    NodeStatus,
    NodeUnavailable,
    NoSuchNode,
    NoSuchQuestion,
    RestartPause,
    encode_settings,
    reason_of,
)
from runtime.hosting.ray_node import MAX_CONCURRENCY, Answer, RayNode, Report
from runtime.hosting.ray_settings import RayAccess, environment, ray_directory

NAMESPACE: Final = "holloway"
MAX_THREADS: Final = 32
"""Calls of Ray at a time, those given up among them."""
OPEN_NS: Final = 30 * NS_PER_S
CALL_NS: Final = 12 * NS_PER_S
"""For what the head has to answer."""
CONNECT_S: Final = 3.0
REPORT_S: Final = 2.0
"""How long a node may take to say how it is."""
_STEP_S: Final = 2.0
_PAUSE_S: Final = 0.1
_LOOK_S: Final = 0.05
# The states of an actor in Ray's table that matter here; the others wait for a process.
_ALIVE: Final = 2
_DEAD: Final = 4

T = TypeVar("T")


@asynccontextmanager
async def open_ray_cluster(
    address: str,
    access: RayAccess | None,
    body: str,
    settings: Mapping[str, Any] | None = None,
    *,
    through: Path | None = None,
    namespace: str = NAMESPACE,
    cpus_per_node: float = 0.1,
    pause: RestartPause | None = None,
) -> AsyncIterator[RayCluster]:
    """The nodes of a Ray, whose head is at `address` (`host:port`), that run `body`.

    `through` is the directory of the RayMachine on this machine to which to keep; without it Ray
    takes the head if that is here, and what goes through a head does not outlive it. Nodes that
    are left go on when the cluster is closed.

    Raises RayRefused; ClusterUnavailable if there is no Ray, or this process has one already."""
    host, _, port = address.rpartition(":")
    head = (host.strip("[]"), int(port))
    cluster = RayCluster(
        head, body, settings, namespace=namespace, cpus_per_node=cpus_per_node, pause=pause
    )
    variables = environment(head[0], access)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)  # Ray reads nothing else
    try:
        connect = partial(_connect, address, namespace, through)
        await cluster._by_head(connect, OPEN_NS)
        try:
            yield cluster
        finally:
            with trio.CancelScope(shield=True):
                await cluster.close()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class RayCluster:
    """A `Cluster` on Ray; made by `open_ray_cluster`."""

    def __init__(
        self,
        head: tuple[str, int],
        body: str,
        settings: Mapping[str, Any] | None,
        *,
        namespace: str,
        cpus_per_node: float,
        pause: RestartPause | None,
    ) -> None:
        self._namespace = namespace
        self._head = head
        self._body = body
        self._settings = settings
        self._cpus_per_node = cpus_per_node
        self._pause = pause or RestartPause()
        self._threads = trio.CapacityLimiter(MAX_THREADS)
        self._handles: dict[str, Any] = {}
        """Whoever was reached once is reached without Ray's head."""

    async def start(
        self, name: str, settings: Mapping[str, Any] | None = None, *, deadline_ns: int = START_NS
    ) -> NodeStatus:
        """See `Cluster`. Raises NodeUnavailable too when no raylet has room for it."""
        check_node_name(name)
        encoded = encode_settings(self._settings, settings)
        node = await self._by_head(partial(self._create, name, encoded))
        up = False
        try:
            with trio.move_on_after(deadline_ns / NS_PER_S):
                up = await self._settled(name, node)
            if not up:
                raise NodeUnavailable(name, "was not up by the deadline")
        finally:
            if not up:
                with trio.CancelScope(shield=True):
                    await self._kill(name, node)
        self._handles[name] = node
        for status in await self.nodes():
            if status.name == name:
                return status
        raise NodeUnavailable(name, "was up, and is gone")

    async def nodes(self) -> tuple[NodeStatus, ...]:
        """See `Cluster`."""
        return await self._by_head(self._all)

    async def ask(self, name: str, question: str, *, deadline_ns: int = ASK_NS) -> Any:
        """See `Cluster`. Needs Ray's head only for a node that was not asked before."""
        seconds = deadline_ns / NS_PER_S
        answer: Answer
        try:
            answer = await self._of_node(name, "ask", question, seconds, seconds=seconds)
        except TimeoutError:
            raise NodeUnavailable(name, "did not answer by the deadline") from None
        match answer:
            case "answer", content:
                return msgspec.json.decode(content)
            case "no such question", _:
                raise NoSuchQuestion(name, question)
            case "failed", reason:
                raise NodeFailed(name, reason.decode())
            case _, text:
                raise NodeUnavailable(name, text.decode())

    async def drain(self, name: str, *, deadline_ns: int = DRAIN_NS) -> None:
        """See `Cluster`."""
        node = await self._find(name)
        report: Report | None = None
        with trio.move_on_after(deadline_ns / NS_PER_S):
            while report is None or report[0] == "draining":
                try:
                    report = await self._of_node(name, "drain", _STEP_S, seconds=2 * _STEP_S)
                except (NodeUnavailable, TimeoutError):  # it is being restarted, say
                    await trio.sleep(_PAUSE_S)
        with trio.CancelScope(shield=True):
            await self._kill(name, self._handles.get(name, node))
        if report is None or report[0] == "draining":
            raise DrainTimedOut(name)
        if report[1] is not None:
            raise NodeFailed(name, report[1])

    async def names_in(self, namespace: str) -> tuple[str, ...]:
        """The names of the actors that are not gone in another namespace of this Ray: who shares it
        with us. Raises ClusterUnavailable."""
        rows = await self._by_head(partial(_table, namespace))
        return tuple(str(row.name) for row in rows)

    async def close(self) -> None:
        """Let go of Ray. The nodes go on."""
        import ray

        with suppress(ClusterUnavailable):
            await self._in_thread(ray.shutdown, CALL_NS)

    # --- in the trio thread ----------------------------------------------------------------------

    async def _settled(self, name: str, node: Any) -> bool:
        """Wait until the node's first life is up. Raises NodeFailed."""
        while True:
            try:
                state, reason, _ = await self._in_thread(
                    partial(_get, name, node.settled.remote(_STEP_S), 2 * _STEP_S), OPEN_NS
                )
            except (NodeUnavailable, TimeoutError):  # not placed yet, or its raylet has died
                await trio.sleep(_PAUSE_S)
                continue
            except NoSuchNode as error:  # our own code is not there where it was placed, say
                raise NodeFailed(name, reason_of(error.__cause__ or error)) from None
            if reason is not None:
                raise NodeFailed(name, reason)
            if state != "starting":
                return True

    async def _find(self, name: str) -> Any:
        node = self._handles.get(name)
        if node is None:
            node = await self._by_head(partial(_look_up, name))
            self._handles[name] = node
        return node

    async def _of_node(self, name: str, method: str, *arguments: Any, seconds: float) -> Any:
        """What a method of the node gives. A handle that is kept may be of a node that has gone,
        while another of its name was started: so it is looked up once more."""
        for last in (False, True):
            node = await self._find(name)

            def call(node: Any = node) -> Any:
                return _get(name, getattr(node, method).remote(*arguments), seconds)

            try:
                return await self._in_thread(call, int((seconds + 1) * NS_PER_S))
            except NoSuchNode:
                self._handles.pop(name, None)
                if last:
                    raise
        raise AssertionError

    async def _kill(self, name: str, node: Any) -> None:
        """End the node for good, and return when its name is free."""
        self._handles.pop(name, None)
        await self._by_head(partial(_end, name, node))

    async def _by_head(self, function: Callable[[], T], deadline_ns: int = CALL_NS) -> T:
        """What Ray's head has to answer. Ray itself takes long to say that it is away."""

        def ask() -> T:
            try:
                socket.create_connection(self._head, CONNECT_S).close()
            except OSError as error:
                where = f"{self._head[0]}:{self._head[1]}"
                text = f"no Ray at {where}: {error.strerror or error}"
                raise ClusterUnavailable(text) from None
            return function()

        return await self._in_thread(ask, deadline_ns)

    async def _in_thread(self, function: Callable[[], T], deadline_ns: int) -> T:
        with trio.move_on_after(deadline_ns / NS_PER_S):
            return await trio.to_thread.run_sync(
                function, abandon_on_cancel=True, limiter=self._threads
            )
        raise ClusterUnavailable("Ray did not answer by the deadline")

    # --- in a thread -----------------------------------------------------------------------------

    def _create(self, name: str, settings: bytes) -> Any:
        import ray

        try:
            if len(_table(self._namespace)) >= MAX_NODES:
                raise ValueError(f"a cluster has at most {MAX_NODES} nodes")
            actor = ray.remote(
                num_cpus=self._cpus_per_node,
                max_restarts=-1,
                max_task_retries=0,  # what is asked twice is asked by us
                max_concurrency=MAX_CONCURRENCY,
                scheduling_strategy="SPREAD",
            )(RayNode)
            return actor.options(name=name, lifetime="detached").remote(
                name, self._body, settings, (self._pause.young_ns, self._pause.pause_ns)
            )
        except ray.exceptions.ActorAlreadyExistsError:
            raise NodeExists(name) from None
        except ray.exceptions.RayError as error:
            raise ClusterUnavailable(reason_of(error)) from None

    def _all(self) -> tuple[NodeStatus, ...]:
        import ray

        asked = [(row, _ask_report(row)) for row in _table(self._namespace)]
        refs = [ref for _, ref in asked if ref is not None]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=REPORT_S)
        return tuple(_status(row, ref) for row, ref in asked)


def _connect(address: str, namespace: str, through: Path | None) -> None:
    import ray
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # of C

    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        raise ClusterUnavailable("this process is connected to a Ray already")
    AuthenticationTokenLoader.instance().reset_cache()  # it may be of another Ray, before this one
    try:
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=None if through is None else str(ray_directory(through)),
        )
    except Exception as error:  # it has no base of its own for these
        with suppress(Exception):
            ray.shutdown()
        raise ClusterUnavailable(f"Ray at {address}: {reason_of(error)}") from None


def _look_up(name: str) -> Any:
    import ray

    try:
        return ray.get_actor(name)
    except ValueError:
        raise NoSuchNode(name) from None
    except ray.exceptions.RayError as error:
        raise ClusterUnavailable(reason_of(error)) from None


def _get(name: str, ref: Any, seconds: float) -> Any:
    """What a call of a node gives. Raises TimeoutError, NoSuchNode, NodeUnavailable."""
    import ray

    try:
        return ray.get(ref, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        raise TimeoutError from None
    except ray.exceptions.ActorUnavailableError:
        raise NodeUnavailable(name, "is being restarted") from None
    except ray.exceptions.ActorDiedError as error:
        raise NoSuchNode(name) from error
    except ray.exceptions.RayError as error:
        raise NodeUnavailable(name, reason_of(error)) from None


def _end(name: str, node: Any) -> None:
    """End an actor for good, and wait until its name is free; or until nobody waits for us."""
    import ray

    ray.kill(node, no_restart=True)
    give_up = time.monotonic() + CALL_NS / NS_PER_S
    while time.monotonic() < give_up:
        try:
            if _look_up(name)._actor_id != node._actor_id:
                return  # another has the name already
        except NoSuchNode:
            return
        time.sleep(_LOOK_S)


def _table(namespace: str) -> list[Any]:
    """Ray's rows about the nodes that are not gone, by name. Not by `ray.util.state`, which wants
    the dashboard, nor `ray._private.state`, which ends the process when the head fails it."""
    import ray
    from ray._private.worker import global_worker

    async def fetch() -> dict[Any, Any]:
        client = global_worker.gcs_client
        rows: dict[Any, Any] = await client.async_get_all_actor_info(timeout=CALL_NS / NS_PER_S)
        return rows

    try:
        rows = asyncio.run(fetch())
    except (ray.exceptions.RayError, OSError) as error:
        raise ClusterUnavailable(reason_of(error)) from None
    ours = [row for row in rows.values() if row.ray_namespace == namespace and row.name]
    return sorted((row for row in ours if row.state != _DEAD), key=lambda row: str(row.name))


def _ask_report(row: Any) -> Any:
    if row.state != _ALIVE:
        return None
    with suppress(NoSuchNode):
        return _look_up(row.name).report.remote()
    return None


def _status(row: Any, ref: Any) -> NodeStatus:
    """How a node is, by its row in Ray's table and its own report, if it is there by now."""
    state: NodeState = "restarting" if row.num_restarts else "starting"
    reason, since_ms = None, int(row.timestamp)
    if row.state == _ALIVE:
        state = "unresponsive"
        if ref is not None:
            with suppress(NodeUnavailable, NoSuchNode, TimeoutError):
                state, reason, since_ms = _get(row.name, ref, 0)
    return NodeStatus(
        name=row.name,
        state=state,
        pid=row.pid or None,
        host=row.address.ip_address,
        restarts=row.num_restarts,
        since=datetime.fromtimestamp(since_ms / 1_000, UTC),
        reason=reason,
    )
