"""A node of a cluster in one process: the sockets and tasks around `runtime.cluster.node`.

process = await NodeProcess.join("a", secret=..., listen=Address("127.0.0.1", 0), store=store,
                                 door_address="...", version="1.0", clock=..., randomness=...)
scheduler = Scheduler(..., node=process.name, incarnation=process.incarnation)
node = process.attach(scheduler, codec)     # then spawn what uses it, and start its host
await nursery.start(process.run)            # until cancelled
await process.leave(host)                   # in good order
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any, Final

import attrs
import trio

from runtime.actor import Actor, CallError, handles, is_abnormal
from runtime.clock import NS_PER_S, Clock
from runtime.cluster.frames import MessageCodec
from runtime.cluster.leases import LeaseStore, LeaseUnavailable
from runtime.cluster.link import LinkSettings
from runtime.cluster.links import NodeLinks, NodeLinksStatistics, open_link_listeners
from runtime.cluster.member import BeginDraining, Identity, Leave
from runtime.cluster.membership import Membership, check_node_name
from runtime.cluster.node import NOWHERE, ClusterNode, ClusterSettings, no_links
from runtime.cluster.remote import RemoteActors
from runtime.cluster.tenure import ROSTER, RosterChanged, Tenure
from runtime.host import TrioHost
from runtime.net.address import Address, join_host_port, split_host_port
from runtime.randomness import Randomness
from runtime.scheduler import Scheduler
from runtime.secret import Secret

MESSAGES_AT_ONCE: Final = 256
"""Messages of one link that are cast before the actors get their turn, so that a mailbox of the
usual size is not full before its actor could do anything."""
CONNECT_PATIENCE_NS: Final = NS_PER_S
LEAVE_PATIENCE_NS: Final = 3 * NS_PER_S


class NodeSuperseded(Exception):
    """Another process has joined the cluster under this node's name."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the node {name!r} was superseded: another process has joined under its name;"
            " give each node a name of its own"
        )


@attrs.frozen(kw_only=True)
class NodeStatistics:
    """This node among the others: now, and counts since the start."""

    living: int
    """Nodes with a lease, this one among them."""
    holds_lease: bool
    links: int
    links_lost: int
    links_refused: int
    """Connections that did not prove membership, or sent what no node may."""
    calls: int
    """To other nodes, under way."""
    watches: int
    sent: int
    unsent: int
    received: int
    answers_lost: int
    broadcasts: int


class MembershipEnded(Exception):
    """What makes this process a node has ended, and could not be started anew."""


class _Follower(Actor):
    """Tells the process when the roster changed."""

    def __init__(self, process: NodeProcess) -> None:
        self._process = process

    def started(self) -> None:
        self.subscribe(ROSTER)
        self._process._follow()

    @handles(RosterChanged)
    def _on_roster_changed(self, message: RosterChanged) -> None:
        self._process._follow()


class NodeProcess:
    """See the module; make one with `join`. Belongs to one trio run.

    Without a `secret` it has no links, and is a cluster of one node."""

    def __init__(
        self,
        tenure: Tenure,
        store: LeaseStore,
        identity: Identity,
        listeners: list[trio.SocketListener],
        membership: Membership | None,
        *,
        clock: Clock,
        randomness: Randomness,
        settings: ClusterSettings,
        link_settings: LinkSettings,
    ) -> None:
        self.name = tenure.node
        self.incarnation = tenure.incarnation
        self.tenure = tenure
        self.identity = identity
        self._store = store
        self._listeners = listeners
        self._membership = membership
        self._clock = clock
        self._randomness = randomness
        self._settings = settings
        self._link_settings = link_settings
        self._links: NodeLinks | None = None
        self._node: ClusterNode | None = None
        self._over = trio.Event()

    @classmethod
    async def join(
        cls,
        name: str,
        *,
        store: LeaseStore,
        door_address: str,
        version: str,
        clock: Clock,
        randomness: Randomness,
        secret: Secret | None = None,
        listen: Address | None = None,
        advertise: str = "",
        settings: ClusterSettings | None = None,
        link_settings: LinkSettings | None = None,
    ) -> NodeProcess:
        """Listen for other nodes and begin a life of the node `name`. `advertise` is the host (or
        host:port) by which others reach `listen`; by default what is bound.

        Raises LeaseUnavailable, CannotListen, and ValueError for a name that is none, a secret that
        is too short, or one of `secret` and `listen` without the other."""
        check_node_name(name)
        if (secret is None) != (listen is None):
            raise ValueError("nodes that listen need a secret, and the other way round")
        settings = settings or ClusterSettings()
        membership = None if secret is None else Membership(secret, name)
        listeners = [] if listen is None else await open_link_listeners(listen)
        try:
            link_address = "" if listen is None else _advertised(listeners[0], advertise)
            identity = Identity(
                link_address=link_address or NOWHERE, door_address=door_address, version=version
            )
            incarnation = await store.join_node(
                name,
                link_address=identity.link_address,
                door_address=door_address,
                version=version,
                ttl_ns=settings.lease.ttl_ns,
            )
        except BaseException:
            for listener in listeners:
                listener.socket.close()
            raise
        return cls(
            Tenure(name, incarnation),
            store,
            identity,
            listeners,
            membership,
            clock=clock,
            randomness=randomness,
            settings=settings,
            link_settings=link_settings or LinkSettings(),
        )

    def attach(self, scheduler: Scheduler, codec: MessageCodec) -> ClusterNode:
        """Join the scheduler of this node to the cluster, and start the actors that it needs."""
        if scheduler.node != self.name:
            raise ValueError("the scheduler is of another node")
        remote = RemoteActors(scheduler, codec, self._send)
        node = ClusterNode(
            scheduler,
            remote,
            self.tenure,
            self._store,
            self.identity,
            refuses_connections,
            incarnation=self.incarnation,
            settings=self._settings,
        )
        self._node = node
        if self._membership is not None:
            self._links = NodeLinks(
                self._membership,
                self.incarnation,
                codec,
                deliver=self._deliver,
                changed=lambda name, incarnation, is_up: node.link_changed(name, is_up),
                clock=self._clock,
                randomness=self._randomness,
                settings=self._link_settings,
            )
        scheduler.watch(node.start(), self._ended)
        scheduler.spawn(_Follower(self), label="roster")
        return node

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry messages until cancelled. Raises NodeSuperseded, MembershipEnded."""
        async with trio.open_nursery() as nursery:
            if self._links is not None:
                await nursery.start(self._links.run, self._listeners)
            task_status.started()
            await self._over.wait()
            nursery.cancel_scope.cancel()
        if self.tenure.is_superseded:
            raise NodeSuperseded(self.name)
        raise MembershipEnded(
            f"the node {self.name!r} is no member any more: see the crashes above"
        )

    async def drain(self, host: TrioHost) -> None:
        """Own no key any more, if another node can: all nodes know it, and hand-over begins. Raises
        nothing: without the database, the lease ends by itself."""
        await self._tell_member(host, BeginDraining())

    async def leave(self, host: TrioHost) -> None:
        """Give up the lease. Raises nothing."""
        await self._tell_member(host, Leave())

    def statistics(self) -> NodeStatistics:
        assert self._node is not None
        remote = self._node.remote.statistics()
        links = self.link_statistics()
        return NodeStatistics(
            living=len(self.tenure.rows),
            holds_lease=self.tenure.holds(self._clock.monotonic_ns()),
            links=0 if links is None else len(links.links),
            links_lost=0 if links is None else links.lost,
            links_refused=0 if links is None else links.refused_membership + links.refused_protocol,
            calls=remote.calls,
            watches=remote.watches,
            sent=remote.sent,
            unsent=remote.unsent,
            received=remote.received,
            answers_lost=remote.answers_lost,
            broadcasts=remote.broadcasts,
        )

    def link_statistics(self) -> NodeLinksStatistics | None:
        """The links one by one; None for a node that has none."""
        return None if self._links is None else self._links.statistics()

    async def _tell_member(self, host: TrioHost, message: object) -> None:
        member = None if self._node is None else self._node.member
        if member is None:
            return
        try:
            await host.call(member, message, LEAVE_PATIENCE_NS)
        except (CallError, LeaseUnavailable):
            return

    def _send(self, node: str, target: int, message: object) -> None:
        if self._links is None:
            no_links(node, target, message)
        self._links.send(node, target, message)

    async def _deliver(self, node: str, messages: Sequence[tuple[int, Any]]) -> None:
        assert self._node is not None
        receive = self._node.remote.receive
        for start in range(0, len(messages), MESSAGES_AT_ONCE):
            receive(node, messages[start : start + MESSAGES_AT_ONCE])
            await trio.lowlevel.checkpoint()

    def _ended(self, reason: str) -> None:
        if is_abnormal(reason):  # and not the end of the whole scheduler
            self._over.set()

    def _follow(self) -> None:
        """The roster changed: keep links with the nodes that live, and see whether we may go on."""
        if self.tenure.is_superseded:
            self._over.set()
        if self._links is None:
            return
        self._links.set_peers(
            {
                row.name: Address(*split_host_port(row.link_address))
                for row in self.tenure.rows
                if row.name != self.name and row.link_address != NOWHERE
            }
        )


async def refuses_connections(address: str) -> bool:
    """Whether `host:port` refuses connections at all of its addresses."""
    where = Address(*split_host_port(address))
    with trio.move_on_after(CONNECT_PATIENCE_NS / NS_PER_S):
        try:
            found = await trio.socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
        except OSError:
            return False
        for family, kind, protocol, _, target in found:
            with trio.socket.socket(family, kind, protocol) as probe:
                try:
                    await probe.connect(target)
                except ConnectionRefusedError:
                    continue
                except OSError:
                    return False
                return False
        return bool(found)
    return False


def _advertised(listener: trio.SocketListener, advertise: str) -> str:
    bound = listener.socket.getsockname()
    if advertise.endswith("]") or (advertise and ":" not in advertise):
        return join_host_port(advertise.strip("[]"), bound[1])
    return advertise or join_host_port(bound[0], bound[1])
