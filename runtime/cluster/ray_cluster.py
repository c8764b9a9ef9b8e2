"""Nodes as named, detached actors of Ray: it places them, restarts them and knows them by name.

Ray's calls block, and block long while its head is away, so each runs in a thread with a deadline;
a thread that is given up holds its place until Ray lets go of it. Ray is imported when a cluster is
opened, never before: it takes seconds, and agents do without.

A process has one connection to Ray (`ray.init`), so one RayCluster at a time.
"""

from __future__ import annotations

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
from runtime.cluster.hosting import (
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
from runtime.cluster.membership import check_node_name
from runtime.cluster.ray_node import MAX_CONCURRENCY, Answer, RayNode, Report
from runtime.cluster.ray_settings import RayAccess, environment, ray_directory

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
_STATES: Final[Mapping[str, NodeState]] = {"RESTARTING": "restarting", "ALIVE": "running"}
"""Ray's states that are more than a start."""

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
    cluster = RayCluster(head, body, settings, cpus_per_node=cpus_per_node, pause=pause)
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
        cpus_per_node: float,
        pause: RestartPause | None,
    ) -> None:
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
        status = await self._by_head(partial(_status, name, node))
        if status is None:
            raise NodeUnavailable(name, "was up, and is gone")
        return status

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
            await self._kill(name, node)
        if report is None or report[0] == "draining":
            raise DrainTimedOut(name)
        if report[1] is not None:
            raise NodeFailed(name, report[1])

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
            if len(ray.util.list_named_actors()) >= MAX_NODES:
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

        try:
            names = sorted(ray.util.list_named_actors())
        except (ray.exceptions.RayError, OSError) as error:
            raise ClusterUnavailable(reason_of(error)) from None
        found = []
        for name in names:
            with suppress(NoSuchNode):
                found.append((name, _look_up(name)))
        reports = [(name, node, node.report.remote()) for name, node in found]
        with suppress(ray.exceptions.RayError):
            ray.wait([ref for *_, ref in reports], num_returns=len(reports), timeout=REPORT_S)
        statuses = [_status(name, node, ref, 0) for name, node, ref in reports]
        return tuple(status for status in statuses if status is not None)


def _connect(address: str, namespace: str, through: Path | None) -> None:
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        raise ClusterUnavailable("this process is connected to a Ray already")
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
    except ray.exceptions.ActorDiedError:
        raise NoSuchNode(name) from None
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


def _status(name: str, node: Any, ref: Any = None, seconds: float = REPORT_S) -> NodeStatus | None:
    """How a node is, by Ray's table and its own report; None if it is gone."""
    from ray._private.state import actors  # the public one needs the dashboard

    row = actors(node._actor_id.hex())
    if not row or row["State"] == "DEAD":
        return None
    state: NodeState = _STATES.get(row["State"], "starting")
    reason, since_ms = None, int(row["Timestamp"])
    if row["State"] == "ALIVE":
        try:
            ref = node.report.remote() if ref is None else ref
            state, reason, since_ms = _get(name, ref, seconds)
        except (NodeUnavailable, NoSuchNode, TimeoutError):
            state = "unresponsive"
    return NodeStatus(
        name=name,
        state=state,
        pid=row["Pid"] or None,
        host=row["Address"]["IPAddress"],
        restarts=row["NumRestarts"],
        since=datetime.fromtimestamp(since_ms / 1_000, UTC),
        reason=reason,
    )
