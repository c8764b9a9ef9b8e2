"""What one node may do now, and what it knows of the others: its tenure. A core.

It is written by one actor, the node's `Member`, after each renewal of the node's lease, and read by
everybody on the node: which nodes live, where a key lives, and whether this node is still entitled
to decide anything. All nodes read the same table, so they agree as soon as they have all renewed
once more; until then leases and epochs see to it that nothing is owned twice.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

import attrs

from runtime.cluster.leases import NodeRow
from runtime.cluster.placement import PlacedNode, Placement

MAX_REMEMBERED: Final = 10_000
"""Keys whose owner is remembered until the nodes are others: it costs 0.1 ms to work out."""
ROSTER: Final = "cluster roster"
"""The topic of each node on which `RosterChanged` is published."""


@attrs.frozen
class RosterChanged:
    """Another node lives, dies, drains or moved; or this one began another tenure: read it."""


class Tenure:
    """The tenure of node `node`. `incarnation` is that of its lease: it grows when the node was
    given up for dead and came back, without a new start of its process."""

    def __init__(self, node: str, incarnation: int) -> None:
        self.node = node
        self.incarnation = incarnation
        self.is_superseded = False
        """Another process has taken the node's name: this one has to end."""
        self.is_draining = False
        """The node wants to own nothing any more. Set by its `Member`, for its whole process."""
        self.has_left = False
        """The node has given up its lease for good."""
        self.rows: tuple[NodeRow, ...] = ()
        self.placement = Placement()
        self._lease_until_ns = 0
        self._owner_by_key: dict[UUID, str | None] = {}

    def holds(self, now_ns: int) -> bool:
        """Whether the node's lease stands, by its own clock (monotonic ns)."""
        return now_ns < self._lease_until_ns

    def owner_of(self, key: UUID) -> str | None:
        """The node on which a key lives; None if no node is known to live."""
        known = self._owner_by_key
        if key not in known:
            if len(known) >= MAX_REMEMBERED:
                known.clear()
            known[key] = self.placement.owner(key.bytes)
        return known[key]

    def is_ours(self, key: UUID) -> bool:
        """Whether a key lives on this node."""
        return self.owner_of(key) == self.node

    def row(self, name: str) -> NodeRow | None:
        """A living node."""
        return next((row for row in self.rows if row.name == name), None)

    def doors(self) -> tuple[str, ...]:
        """The door addresses of all nodes that take newcomers, by the nodes' names."""
        return tuple(row.door_address for row in self.rows if not row.draining)

    def renewed(self, rows: tuple[NodeRow, ...], until_ns: int) -> bool:
        """The node's lease was renewed up to `until_ns`, and these are all nodes. Whether anything
        is different for others to act on."""
        self._lease_until_ns = until_ns
        living = tuple(row for row in rows if row.remaining_ns > 0)
        before, self.rows = self.rows, living
        if list(map(_told, before)) == list(map(_told, living)):
            return False
        self.placement = Placement(
            PlacedNode(name=row.name, draining=row.draining) for row in living
        )
        self._owner_by_key.clear()
        return True

    def began_anew(self, incarnation: int) -> None:
        """The node was given up for dead, and has come back: nothing that it owned is its own."""
        self.incarnation = incarnation
        self._lease_until_ns = 0

    def was_lost(self) -> None:
        """The lease is over, whatever the clock says."""
        self._lease_until_ns = 0


def _told(row: NodeRow) -> NodeRow:
    """A row without what is different each time."""
    return attrs.evolve(row, remaining_ns=1)
