"""Several portal nodes: the body that each of them runs, and the command that starts them.

A node is a portal of its own, with its own ports, in a process of its own; all share one database.
Ray starts them, each as a named actor, and starts them anew when they fail; what they say to each
other goes over their own links, so they do not need Ray to go on. This module is the only one that
brings the two together.

    holloway portal --nodes 4                     a Ray of its own, on this machine, ends with it
    holloway portal --nodes 4 --ray-address A     nodes on that Ray; they go on when this ends
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from actors.store.embedded import EmbeddedPostgres
from portal.authority import Authority
from portal.first_start import load_cluster_secret, load_reset_key, prepare_state
from portal.node import PortalNode, database_url, run_portal
from portal.settings import PortalSettings, SettingsError, check, of_node
from runtime.clock import SystemClock
from runtime.cluster.hosting import Cluster, ClusterError, NodeHandle
from runtime.cluster.ray_cluster import open_ray_cluster
from runtime.cluster.ray_machine import MachineSettings, RayMachine
from runtime.randomness import SystemRandomness
from runtime.service import configure_logging, get_logger

BODY: Final = "portal.cluster:run_node"
DRAIN_MARGIN_S: Final = 15.0
"""Beyond `drain_timeout_s`, for a node to end."""

log = get_logger("portal")


# --- a node --------------------------------------------------------------------------------------


async def run_node(handle: NodeHandle) -> None:
    """The body of a node: `handle.settings` are those of `PortalSettings`, as plain values, and
    `embedded` (whether the database is the one in `state_dir`, which runs already)."""
    plain = dict(handle.settings)
    embedded = bool(plain.pop("embedded", False))
    settings = attrs.evolve(from_plain(plain), node=handle.name)
    configure_logging(settings.log_format, settings.log_level)
    database = EmbeddedPostgres(settings.state_dir / "database").logins() if embedded else None
    async with trio.open_nursery() as nursery:

        async def run(task_status: trio.TaskStatus[PortalNode]) -> None:
            await run_portal(
                settings,
                stop=handle.drain_requested,
                database=database,
                task_status=task_status,
            )

        node: PortalNode = await nursery.start(run)
        handle.started({"status": lambda: status_of(node), "tree": node.control.tree})


def status_of(node: PortalNode) -> dict[str, Any]:
    """What a node says of itself, for `holloway cluster status`."""
    control, process = node.control.statistics(), node.process.statistics()
    links = () if process.links is None else process.links.links
    return {
        "api": str(node.api),
        "channel": str(node.channel),
        "incarnation": node.process.tenure.incarnation,
        "ready": node.health.ready,
        "accounts": control.accounts,
        "clients": control.sessions,
        "gateways": control.gateways,
        "relays": control.relays,
        "links": {
            link.node: {
                "rtt_ms": None if link.rtt_ns is None else link.rtt_ns / 1e6,
                "queued": link.queued_messages,
            }
            for link in links
        },
    }


def to_plain(settings: PortalSettings) -> dict[str, Any]:
    """As values that JSON knows; there is no secret among them."""
    plain = attrs.asdict(settings)
    return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


def from_plain(plain: dict[str, Any]) -> PortalSettings:
    """Undo `to_plain`. Raises TypeError, ValueError for what is none."""
    paths = ("state_dir", "cluster_secret_file", "ray_token_file", "ray_tls_directory")
    values = dict(plain)
    for name in (*paths, "database_url_file"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    values["names"] = tuple(values.get("names", ()))
    return PortalSettings(**values)


# --- the command ---------------------------------------------------------------------------------


async def run_nodes(
    settings: PortalSettings, *, task_status: trio.TaskStatus[Cluster] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run `settings.nodes` nodes until a signal comes; then drain those of a Ray of our own, one
    after the other. Raises what `run_portal` raises, and ClusterError, RayRefused."""
    check(settings)
    prepare_state(settings.state_dir)
    randomness = SystemRandomness()
    # What nodes share is made by one, before there are several.
    authority = Authority(
        settings.state_dir / "authority", clock=SystemClock(), randomness=randomness
    )
    authority.server_certificate(check(of_node(settings, 1)).names)
    load_cluster_secret(settings, randomness)
    load_reset_key(settings.state_dir, randomness)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with _database(settings) as embedded, _cluster(settings) as cluster:
            names = []
            async with trio.open_nursery() as nursery:
                for number in range(1, settings.nodes + 1):
                    node = of_node(settings, number)
                    names.append(node.node)
                    plain = to_plain(node) | {"embedded": embedded}
                    if number == 1:  # brings the schema and the first token about
                        await _start(cluster, node.node, plain)
                    else:
                        nursery.start_soon(_start, cluster, node.node, plain)
            log.info("nodes_running", nodes=names)
            task_status.started(cluster)
            await anext(signals)
            if settings.ray_address:
                return
            for name in names:
                await _drain(cluster, name, settings)


async def _start(cluster: Cluster, name: str, plain: dict[str, Any]) -> None:
    status = await cluster.start(name, plain)
    log.info("node_up", node=name, pid=status.pid, host=status.host)


async def _drain(cluster: Cluster, name: str, settings: PortalSettings) -> None:
    seconds = settings.drain_timeout_s + DRAIN_MARGIN_S
    try:
        await cluster.drain(name, deadline_ns=round(seconds * 10**9))
    except ClusterError as error:
        log.warning("node_not_drained", node=name, error=str(error))
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
            "database_url_file: nodes on a Ray that is not of this command need a database that"
            " all of them can reach"
        )
    embedded = EmbeddedPostgres(settings.state_dir / "database")
    async with trio.open_nursery() as nursery:
        await nursery.start(embedded.run)
        yield True
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _cluster(settings: PortalSettings) -> AsyncIterator[Cluster]:
    """The Ray that is named, or one of our own, on this machine alone."""
    if settings.ray_address:
        async with open_ray_cluster(settings.ray_address, ray_access(settings), BODY) as cluster:
            yield cluster
        return
    head = await trio.to_thread.run_sync(
        RayMachine.head, MachineSettings(directory=_ray_directory(settings, "head"))
    )
    try:
        address = await trio.to_thread.run_sync(head.ready)
        worker = await trio.to_thread.run_sync(
            RayMachine.join,
            MachineSettings(directory=_ray_directory(settings, "nodes"), access=head.access),
            address,
        )
        try:
            await trio.to_thread.run_sync(worker.ready)
            through = worker.settings.directory
            async with open_ray_cluster(address, head.access, BODY, through=through) as cluster:
                yield cluster
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(worker.end)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(head.end)
