"""A world whose portal has several nodes: real control planes on a HeapCluster, one store."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs

from actors.messages import ACCOUNT
from actors.tree import ControlPlane
from actors.wire import node_codec
from channel.messages import DoorAddress
from runtime.actor import ActorRef, NamedRef
from runtime.cluster.keyed import Locate, keeper_name
from runtime.cluster.member import BeginDraining, Identity, Leave
from runtime.cluster.node import ClusterNode
from runtime.cluster.tenure import Tenure
from runtime.cluster.testing import HeapCluster, HeapNode

from .world import PORTAL, Agent, World, run

MS = 10**6
S = 10**9
TTL_NS = 3 * S


@attrs.define(eq=False)
class Node:
    """A portal node."""

    name: str
    heap: HeapNode
    cluster: ClusterNode
    tenure: Tenure
    plane: ControlPlane
    is_cut_off: bool = False
    """Whether it cannot reach the store."""


class ClusterWorld(World):
    """Agents join at the node `at`. Time passes a little at each step, since messages travel."""

    step_ns = 20 * MS
    door_at = "{}.example:443"
    """The door of a node, by its name."""
    latency_ns = (MS // 10, MS)
    """Least and most of one way between two nodes."""

    def __init__(self, *names: str, seed: int = 1, **options: Any) -> None:
        self.names = names
        self.at = names[0]
        self.nodes: dict[str, Node] = {}
        super().__init__(seed, **options)

    # --- the portal ---

    def start_portal(self) -> None:
        self.cluster = HeapCluster(
            node_codec(),
            self.randomness.child("cluster"),
            clock=self.clock,
            latency_ns=self.latency_ns,
            effect_delay_ns=self.effect_delay_ns,
            report=self._report,
        )
        self.host: Any = self
        self.store.subscribe(self._wake)
        for name in self.names:
            self.add_node(name)
        self.cluster.run_for(S)

    def add_node(self, name: str) -> Node:
        identity = Identity(
            link_address=f"{name}.nodes:1", door_address=self.door_at.format(name), version="1"
        )
        incarnation = run(
            self.store.join_node(
                name,
                link_address=identity.link_address,
                door_address=identity.door_address,
                version=identity.version,
                ttl_ns=TTL_NS,
            )
        )
        heap = self.cluster.add(name, incarnation=incarnation)
        tenure = Tenure(name, incarnation)
        store: Any = Reach(self, name)
        cluster = ClusterNode(
            heap.scheduler,
            heap.remote,
            tenure,
            store,
            identity,
            self._refuses,
            incarnation=incarnation,
        )
        plane = ControlPlane(
            heap.scheduler,
            store,
            self.clock,
            self.randomness.child(f"plane/{name}/{incarnation}"),
            portal_name=PORTAL,
            prove_address=self._prove,
            tenure=tenure,
            limits=self.limits,
            doors=lambda: tuple(map(DoorAddress, tenure.doors())),
        )
        heap.link_changed = cluster.link_changed
        cluster.start()
        plane.start()
        node = self.nodes[name] = Node(name, heap, cluster, tenure, plane)
        return node

    async def _refuses(self, address: str) -> bool:
        return address.partition(".")[0] not in self.nodes

    def _wake(self, account_id: Any) -> None:
        for node in self.nodes.values():
            if not node.heap.stopped:
                node.plane.wake(account_id)

    @property
    def plane(self) -> ControlPlane:
        """Of the node at which agents join."""
        return self.nodes[self.at].plane

    # --- what a HeapHost has ---

    def run_until_idle(self) -> None:
        self.cluster.run_for(self.step_ns)

    def run_for(self, seconds: float) -> None:
        self.cluster.run_for(int(seconds * S))

    def call(self, message: object) -> Any:
        return self.cluster.call(self.at, self.account_actor(), message)

    def account_actor(self) -> ActorRef:
        owner = self.owner()
        located = self.cluster.call(
            self.at, NamedRef(keeper_name(ACCOUNT), owner), Locate(self.account.id)
        )
        assert located.ref is not None
        ref: ActorRef = located.ref
        return ref

    def owner(self) -> str:
        """The node on which the account lives, as the node `at` sees it."""
        owner = self.nodes[self.at].tenure.owner_of(self.account.id)
        assert owner is not None
        return owner

    def others(self, *names: str) -> list[str]:
        """All nodes but these."""
        return [name for name in self.nodes if name not in names]

    def node_of(self, agent: Agent) -> str | None:
        """The node at which an agent is."""
        attachment: Any = agent.line.attachment if agent.line is not None else None
        for name, node in self.nodes.items():
            if agent.is_connected and attachment._scheduler is node.heap.scheduler:
                return name
        return None

    def follow(self, *agents: Agent) -> None:
        """Have agents that were sent on to a door join there, as their dialers do."""
        for agent in agents:
            assert agent.line is not None
            assert agent.line.closed is not None
            door = agent.line.closed.door
            assert door is not None, agent.line.closed
            self.at = door.partition(".")[0]
            agent.join()

    # --- what happens to nodes ---

    def kill(self, name: str, *agents: Agent) -> None:
        """As by SIGKILL; these agents were connected to it, and notice."""
        del self.nodes[name]
        self.cluster.kill(name)
        for agent in agents:
            if agent.line is not None:
                agent.line.is_open = False
                agent.line.attachment = None

    def drain(self, name: str, *agents: Agent) -> None:
        """In good order, as SIGTERM does it; these agents were connected to it."""
        self.begin_draining(name)
        self.cluster.run_for(S)
        self.end_draining(name, *agents)

    def begin_draining(self, name: str, spread_ns: int = 0) -> None:
        """Have its accounts and its agents go to other nodes."""
        self._tell_member(name, BeginDraining())
        self.nodes[name].plane.drain(spread_ns)

    def end_draining(self, name: str, *agents: Agent) -> None:
        """It leaves, and ends; these agents are still connected to it."""
        self._tell_member(name, Leave())
        self.kill(name, *agents)

    def _tell_member(self, name: str, message: object) -> None:
        member = self.nodes[name].cluster.member
        assert member is not None
        self.cluster.call(name, member, message)


class Reach:
    """The store, as one node reaches it."""

    def __init__(self, world: ClusterWorld, name: str) -> None:
        self._world = world
        self._name = name

    def __getattr__(self, method: str) -> Any:
        return partial(self._ask, getattr(self._world.store, method))

    async def _ask(self, method: Any, *arguments: Any, **keywords: Any) -> Any:
        from actors.store.interface import Unavailable

        node = self._world.nodes.get(self._name)
        if node is not None and node.is_cut_off:
            raise Unavailable("this node cannot reach it")
        return await method(*arguments, **keywords)
