"""What a node tells operators: of itself, and of all nodes that it knows.

Each node has a reporter, which answers other nodes over their links, and a control socket in the
state directory, 0600, where `holloway cluster status` and `holloway portal tree` ask. So operators
need neither the database nor Ray to see how the cluster is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from actors.store.interface import StoreError
from actors.store.sealing import CannotOpen
from actors.tree import ControlPlane
from portal.settings import PortalSettings
from runtime.actor import ActorError, NamedRef
from runtime.cluster.process import NodeProcess
from runtime.cluster.reporter import REPORTER, AskNode, NodeAnswer, Reporter
from runtime.control import serve_control
from runtime.host import TrioHost
from runtime.service import Health

CONTROL_DIRECTORY: Final = "control"
SUFFIX: Final = ".sock"
CLUSTER: Final = "cluster"
"""The name of the control socket of a command that runs several nodes, beside theirs."""
ASK_NS: Final = 2 * 10**9


def control_socket(state_dir: Path, name: str) -> Path:
    """Where the node of this name answers on this machine."""
    return state_dir / CONTROL_DIRECTORY / f"{name}{SUFFIX}"


class NodeAnswers:
    """The answers of one node; spawns its reporter."""

    def __init__(
        self,
        settings: PortalSettings,
        process: NodeProcess,
        host: TrioHost,
        control: ControlPlane,
        health: Health,
        *,
        reseal: Callable[[], Awaitable[int]],
    ) -> None:
        self._settings = settings
        self._process = process
        self._host = host
        self._control = control
        self._health = health
        self._reseal = reseal
        self._started_s = time.time()
        answers = {"status": self.status, "tree": control.tree}
        host.scheduler.spawn(Reporter(answers), name=REPORTER)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer at the control socket, for ever."""
        path = control_socket(self._settings.state_dir, self._process.name)
        allowed = {0, os.geteuid()}
        await serve_control(path, self._answer, allowed_uids=allowed, task_status=task_status)

    def status(self) -> dict[str, Any]:
        """Of this node alone; no secret."""
        control, linked = self._control.statistics(), self._process.link_statistics()
        links = () if linked is None else linked.links
        return {
            "node": self._process.name,
            "pid": os.getpid(),
            "uptime_s": round(time.time() - self._started_s, 1),
            "incarnation": self._process.tenure.incarnation,
            "ready": self._health.ready,
            "accounts": control.accounts,
            "clients": control.sessions,
            "gateways": control.gateways,
            "relays": control.relays,
            "links": {
                link.node: {
                    "round_trip_ms": None if link.rtt_ns is None else link.rtt_ns / 1e6,
                    "queued": link.queued_messages,
                }
                for link in links
            },
        }

    async def cluster(self) -> list[dict[str, Any]]:
        """A row for each node that lives, as the lease table has it, with its own status; None
        where it does not answer."""
        rows = self._process.tenure.rows
        statuses: dict[str, Any] = {}

        async def ask(name: str) -> None:
            statuses[name] = await self._ask(name, "status")

        async with trio.open_nursery() as nursery:
            for row in rows:
                nursery.start_soon(ask, row.name)
        return [
            {
                "name": row.name,
                "state": "draining" if row.draining else "up",
                "incarnation": row.incarnation,
                "version": row.version,
                "link_address": row.link_address,
                "node_address": row.door_address,
                "status": statuses[row.name],
            }
            for row in rows
        ]

    async def _ask(self, name: str, question: str) -> Any:
        reporter = NamedRef(REPORTER, None if name == self._process.name else name)
        try:
            answer: NodeAnswer = await self._host.call(reporter, AskNode(question), ASK_NS)
        except ActorError:
            return None
        return msgspec.json.decode(answer.json)

    async def _answer(self, request: dict[str, Any]) -> Mapping[str, Any]:
        command, name = request.get("command"), request.get("node") or self._process.name
        if command == "cluster":
            return {"asked": self._process.name, "nodes": await self.cluster()}
        if command == "reseal":
            try:
                return {"resealed": await self._reseal()}
            except (CannotOpen, StoreError) as error:
                return {"error": str(error)}
        if command not in ("status", "tree"):
            return {"error": "the commands are cluster, reseal, status and tree"}
        if not isinstance(name, str) or self._process.tenure.row(name) is None:
            living = ", ".join(row.name for row in self._process.tenure.rows)
            return {"error": f"no such node lives; there are {living or 'none'}"}
        found = await self._ask(name, command)
        if found is None:
            return {"error": f"the node {name} does not answer"}
        return {command: found}
