"""The nodes of a cluster and their leases, in memory: a part of `actors.store.memory`."""

from __future__ import annotations

from typing import Final

import attrs

from actors.store.interface import Fenced, Full
from actors.store.rules import check_node, check_ttl
from runtime.clock import Clock
from runtime.cluster.leases import NodeRow
from runtime.cluster.placement import MAX_NODES

EXPELLED: Final = -(2**63)
"""The end of the lease of a node that was given up for dead: before every instant."""


@attrs.define(kw_only=True)
class _Node:
    """A node that has joined and not left. `until_ns`: the end of its lease, or EXPELLED."""

    incarnation: int
    link_address: str
    door_address: str
    version: str
    draining: bool = False
    until_ns: int


class MemoryNodes:
    """The part of the memory store that knows who lives, by `clock`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._nodes: dict[str, _Node] = {}
        self._incarnation = 0

    async def join_node(
        self, name: str, *, link_address: str, door_address: str, version: str, ttl_ns: int
    ) -> int:
        """See `LeaseStore.join_node`. Raises Full."""
        check_node(name, link_address=link_address, door_address=door_address, version=version)
        check_ttl(ttl_ns)
        if name not in self._nodes and len(self._nodes) >= MAX_NODES:
            dead = [each for each in self._nodes if not self._stands(each)]
            if not dead:
                raise Full(f"{MAX_NODES} nodes live")
            del self._nodes[min(dead, key=lambda each: (self._nodes[each].until_ns, each))]
        self._incarnation += 1
        self._nodes[name] = _Node(
            incarnation=self._incarnation,
            link_address=link_address,
            door_address=door_address,
            version=version,
            until_ns=self._clock.monotonic_ns() + ttl_ns,
        )
        return self._incarnation

    async def renew_node(
        self, name: str, incarnation: int, *, draining: bool, ttl_ns: int
    ) -> tuple[NodeRow, ...]:
        """See `LeaseStore.renew_node`. Raises Fenced."""
        check_ttl(ttl_ns)
        node = self._life(name, incarnation)
        if node is None or node.until_ns == EXPELLED:
            raise self._is_over(name, incarnation)
        node.draining = draining
        node.until_ns = self._clock.monotonic_ns() + ttl_ns
        return await self.nodes()

    async def nodes(self) -> tuple[NodeRow, ...]:
        """See `LeaseStore.nodes`."""
        now_ns = self._clock.monotonic_ns()
        return tuple(
            NodeRow(
                name=name,
                incarnation=node.incarnation,
                link_address=node.link_address,
                door_address=node.door_address,
                version=node.version,
                draining=node.draining,
                remaining_ns=0 if node.until_ns == EXPELLED else max(0, node.until_ns - now_ns),
            )
            for name, node in sorted(self._nodes.items())
        )

    async def expel_node(self, name: str, incarnation: int) -> None:
        """See `LeaseStore.expel_node`."""
        if (node := self._life(name, incarnation)) is not None:
            node.until_ns = EXPELLED

    async def leave_node(self, name: str, incarnation: int) -> None:
        """See `LeaseStore.leave_node`."""
        if self._life(name, incarnation) is not None:
            del self._nodes[name]

    # --- helpers ---

    def _life(self, name: str, incarnation: int) -> _Node | None:
        node = self._nodes.get(name)
        return node if node is not None and node.incarnation == incarnation else None

    def _stands(self, name: str, incarnation: int | None = None) -> bool:
        """Whether the node (in this life of it) has a lease that has not expired."""
        node = self._nodes.get(name)
        return (
            node is not None
            and incarnation in (None, node.incarnation)
            and node.until_ns > self._clock.monotonic_ns()
        )

    def _is_over(self, name: str, incarnation: int) -> Fenced:
        node = self._nodes.get(name)
        superseded = node is not None and node.incarnation > incarnation
        reason = "was superseded" if superseded else "has no lease"
        return Fenced(f"node {name}, incarnation {incarnation}, {reason}", superseded=superseded)
