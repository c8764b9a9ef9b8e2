"""Several portal nodes: the body that each of them runs, and the command that starts them.

A node is a portal of its own, with its own ports, in a process of its own; all share one database.
Ray starts them, each as a named actor, and starts them anew when they fail; what they say to each
other goes over their own links, so they do not need Ray to go on. This module is the only one that
brings the two together.

    holloway portal --nodes 4                     a Ray of its own, on this machine, ends with it
    holloway portal --nodes 4 --ray-address A     nodes on that Ray; they go on when this ends
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from actors.store.embedded import EmbeddedPostgres
from portal.answers import CLUSTER, control_socket
from portal.authority import Authority
from portal.first_start import (
    load_cluster_secret,
    load_key_ring,
    load_reset_key,
    prepare_state,
)
from portal.node import PortalNode, database_url, only_cause, run_portal
from portal.own_ray import open_own_ray
from portal.ports import check_ports
from portal.settings import MAX_LOCAL_NODES, PortalSettings, SettingsError, check, of_node
from runtime.clock import NS_PER_S, SystemClock
from runtime.control import serve_control
from runtime.hosting.interface import (
    Cluster,
    ClusterError,
    DrainTimedOut,
    NodeExists,
    NodeFailed,
    NodeHandle,
)
from runtime.hosting.ray_cluster import open_ray_cluster
from runtime.hosting.ray_settings import RayAccess, RayTls
from runtime.net.binding import CannotListen
from runtime.randomness import SystemRandomness
from runtime.service import configure_logging, get_logger

BODY: Final = "portal.cluster:run_node"
LOGS: Final = "log"
"""Below the state directory: the logs of nodes that are no process of ours."""
DRAIN_MARGIN_S: Final = 15.0
"""Beyond `drain_timeout_s`, for a node to end."""
PORTS_PATIENCE_S: Final = 3.0
"""For nodes of a command that was killed: they end soon after it."""
PORTS_CHECK_S: Final = 0.2

log = get_logger("portal")


# --- a node --------------------------------------------------------------------------------------


async def run_node(handle: NodeHandle) -> None:
    """The body of a node: `handle.settings` are those of `PortalSettings`, as plain values, and
    `embedded` (whether the database is the one in `state_dir`, which runs already)."""
    plain = dict(handle.settings)
    embedded = bool(plain.pop("embedded", False))
    if (log_file := plain.pop("log_file", None)) is not None:
        _write_to(Path(log_file))
    settings = attrs.evolve(from_plain(plain), node=handle.name)
    configure_logging(settings.log_format, settings.log_level)
    database = EmbeddedPostgres(settings.state_dir / "database").logins() if embedded else None
    async with trio.open_nursery() as nursery:
        node: PortalNode = await nursery.start(
            partial(run_portal, settings, stop=handle.drain_requested, database=database)
        )
        handle.started({"status": node.answers.status, "tree": node.control.tree})


def _write_to(file: Path) -> None:
    """Have all that this process says from now on appended to a file: Ray would lose it."""
    file.parent.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def to_plain(settings: PortalSettings) -> dict[str, Any]:
    """As values that JSON knows; there is no secret among them."""
    plain = attrs.asdict(settings)
    return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


def from_plain(plain: dict[str, Any]) -> PortalSettings:
    """Undo `to_plain`. Raises TypeError, ValueError for what is none."""
    paths = ("state_dir", "cluster_secret_file", "ray_token_file", "ray_tls_directory")
    values = dict(plain)
    for name in (*paths, "encryption_keys_file", "database_url_file"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    values["names"] = tuple(values.get("names", ()))
    return PortalSettings(**values)


# --- the command ---------------------------------------------------------------------------------


async def run_nodes(settings: PortalSettings) -> None:
    """Run `settings.nodes` nodes until a signal comes; then drain those of a Ray of our own, one
    after the other. Meanwhile `holloway cluster drain`, `start` and `restart` are heard.

    Raises what `run_portal` raises, and ClusterError, RayRefused."""
    try:
        await _run_nodes(settings)
    except BaseExceptionGroup as group:
        raise only_cause(group) from None


async def _run_nodes(settings: PortalSettings) -> None:
    check(settings)
    if not settings.ray_address:  # else they are on other machines, or run already
        await _await_ports(settings)
    prepare_state(settings.state_dir)
    _share(settings)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with _database(settings) as embedded, _cluster(settings) as cluster:
            for each in (signal.SIGTERM, signal.SIGINT):  # Ray has put its own in their place
                signal.signal(each, signal.getsignal(each))
            nodes = _Nodes(settings, cluster, embedded=embedded)
            async with trio.open_nursery() as nursery:
                await nursery.start(
                    partial(
                        serve_control,
                        control_socket(settings.state_dir, CLUSTER),
                        nodes.answer,
                        allowed_uids={0, os.geteuid()},
                    )
                )
                stopping = trio.Event()
                nursery.start_soon(_hear, signals, stopping, nursery.cancel_scope)
                async with trio.open_nursery() as starting:
                    starting.start_soon(_until, stopping, starting.cancel_scope)
                    await nodes.start_all()
                    starting.cancel_scope.cancel()
                await stopping.wait()
                if not settings.ray_address:
                    await nodes.drain_all()
                nursery.cancel_scope.cancel()


async def _await_ports(settings: PortalSettings) -> None:
    """See `check_ports`; but ports that get free within PORTS_PATIENCE_S are free."""
    with trio.move_on_after(PORTS_PATIENCE_S):
        while True:
            try:
                check_ports(settings)
            except CannotListen:
                await trio.sleep(PORTS_CHECK_S)
            else:
                return
    check_ports(settings)


async def _hear(
    signals: AsyncIterator[int], stopping: trio.Event, everything: trio.CancelScope
) -> None:
    """The first signal ends all in good order, the second at once."""
    await anext(signals)
    stopping.set()
    await anext(signals)
    log.warning("ended_at_once", reason="a second signal")
    everything.cancel()


async def _until(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def _share(settings: PortalSettings) -> None:
    """Make what nodes share before there are several. Raises AuthorityError, OSError."""
    randomness = SystemRandomness()
    authority = Authority(
        settings.state_dir / "authority", clock=SystemClock(), randomness=randomness
    )
    authority.server_certificate(check(of_node(settings, 1)).names)
    load_cluster_secret(settings, randomness)
    load_key_ring(settings, randomness)
    load_reset_key(settings.state_dir, randomness)


class _Nodes:
    """The nodes of one command."""

    def __init__(self, settings: PortalSettings, cluster: Cluster, *, embedded: bool) -> None:
        self._settings = settings
        self._cluster = cluster
        self._embedded = embedded
        self._changing = trio.Lock()  # one at a time, so that never all are away
        self._number_by_name = {
            of_node(settings, number).node: number for number in range(1, settings.nodes + 1)
        }

    async def start_all(self) -> None:
        first, *others = self._number_by_name
        await self._start(first)  # brings the schema and the first token about
        async with trio.open_nursery() as nursery:
            for name in others:
                nursery.start_soon(self._start, name)
        log.info("nodes_running", nodes=list(self._number_by_name))

    async def drain_all(self) -> None:
        for name in list(self._number_by_name):
            try:
                await self._drain(name)
            except ClusterError as error:
                log.warning("node_not_drained", node=name, error=str(error))

    async def answer(self, request: dict[str, Any]) -> Mapping[str, Any]:
        """A request at the control socket."""
        command, name = request.get("command"), request.get("node")
        try:
            if command == "nodes":
                found = await self._cluster.nodes()
                return {"nodes": [attrs.asdict(each) for each in found]}
            if command not in ("drain", "start", "restart"):
                return {"error": "the commands are nodes, drain, start and restart"}
            async with self._changing:
                return await self._change(command, name)
        except (ClusterError, SettingsError) as error:
            return {"error": str(error)}

    async def _change(self, command: str, name: object) -> Mapping[str, Any]:
        if command == "restart" and name is None:
            for each in list(self._number_by_name):
                await self._drain(each)
                await self._start(each)
            return {"restarted": list(self._number_by_name)}
        if command == "start" and name is None:
            taken = set(self._number_by_name.values())
            number = min(set(range(1, MAX_LOCAL_NODES + 1)) - taken, default=0)
            if not number:
                return {"error": f"there are {MAX_LOCAL_NODES} nodes"}
            name = of_node(self._settings, number).node
            self._number_by_name[name] = number
            try:
                await self._start(name)
            except ClusterError:
                del self._number_by_name[name]
                raise
            return {"started": [name]}
        if not isinstance(name, str) or name not in self._number_by_name:
            return {"error": f"name one of {', '.join(self._number_by_name)}"}
        await self._drain(name)
        if command == "drain":
            del self._number_by_name[name]
            return {"drained": [name]}
        await self._start(name)
        return {"restarted": [name]}

    async def _start(self, name: str) -> None:
        """Start a node, or leave one as it is that a command before us has started."""
        plain = to_plain(of_node(self._settings, self._number_by_name[name]))
        try:
            log_file = str(self._settings.state_dir / LOGS / f"{name}.log")
            plain |= {"embedded": self._embedded, "log_file": log_file}
            log.info("node_starting", node=name, log_file=log_file)
            status = await self._cluster.start(name, plain)
        except NodeExists:
            log.info("node_found", node=name)
        else:
            log.info("node_up", node=name, pid=status.pid, host=status.host)

    async def _drain(self, name: str) -> None:
        seconds = self._settings.drain_timeout_s + DRAIN_MARGIN_S
        try:
            await self._cluster.drain(name, deadline_ns=round(seconds * NS_PER_S))
        except (DrainTimedOut, NodeFailed) as error:  # it is gone all the same
            log.warning("node_ended", node=name, error=str(error))
        else:
            log.info("node_drained", node=name)


@asynccontextmanager
async def _database(settings: PortalSettings) -> AsyncIterator[bool]:
    """Run the embedded PostgreSQL for all nodes, unless a database is named. Whether it does."""
    if database_url(settings) is not None:
        yield False
        return
    if settings.ray_address:
        raise SettingsError(
            "database_url_file: nodes on a Ray that this command does not start need a database"
            " that all of them can reach, and the variable DATABASE_URL does not reach them"
        )
    embedded = EmbeddedPostgres(settings.state_dir / "database")
    async with trio.open_nursery() as nursery:
        await nursery.start(embedded.run)
        yield True
        nursery.cancel_scope.cancel()


def _cluster(settings: PortalSettings) -> AbstractAsyncContextManager[Cluster]:
    """The Ray that is named, or one of our own, on this machine alone."""
    if not settings.ray_address:
        return open_own_ray(BODY)
    if settings.ray_token_file is None:
        raise SettingsError("ray_token_file: the token of the Ray at ray_address is needed")
    tls: RayTls | None = None
    place = settings.ray_tls_directory
    if place is not None:
        certificate, key, authority = (place / each for each in ("tls.crt", "tls.key", "ca.crt"))
        tls = RayTls(certificate=certificate, key=key, authority=authority)
    access = RayAccess(token_file=settings.ray_token_file, tls=tls)
    return open_ray_cluster(settings.ray_address, access, BODY)
