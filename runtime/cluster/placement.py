"""Which node a key lives on: rendezvous (highest random weight) hashing, as a pure core.

Thaler and Ravishankar, "Using name-based mappings to increase hit rates" (1998). Every pair of a
key and a node has a score, a hash of both; the key lives on the node with the highest. So all who
know the same nodes agree without a word, and when a node comes or goes only its own keys move.

A node of weight w has w tickets per key and keeps its best. That gives it w shares exactly, in
integers: no floating point, hence the same answer in every process, version and machine. A node
that drains is given no keys while another does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from hashlib import blake2b
from typing import Final

import attrs

MAX_NODES: Final = 256
MAX_NODE_NAME_BYTES: Final = 64
MAX_WEIGHT: Final = 16
MAX_KEY_BYTES: Final = 1_024

_PERSON: Final = b"placement/1"
_SCORE_BYTES: Final = 8


@attrs.frozen(kw_only=True)
class PlacedNode:
    """A living node. `weight` (1 to MAX_WEIGHT) is its number of shares; `draining` nodes get keys
    only if all drain. Raises ValueError."""

    name: str
    weight: int = 1
    draining: bool = False

    def __attrs_post_init__(self) -> None:
        if not 0 < len(self.name.encode()) <= MAX_NODE_NAME_BYTES:
            raise ValueError(f"a node's name has 1 to {MAX_NODE_NAME_BYTES} bytes")
        if not 1 <= self.weight <= MAX_WEIGHT:
            raise ValueError(f"a node's weight is 1 to {MAX_WEIGHT}")


@attrs.frozen(init=False, slots=False)
class Placement:
    """One view of the cluster: the living nodes, by name. A value; equal views place equally.

    Names are distinct; at most MAX_NODES. Raises ValueError."""

    nodes: tuple[PlacedNode, ...]

    def __init__(self, nodes: Iterable[PlacedNode] = ()) -> None:
        ordered = tuple(sorted(nodes, key=lambda node: node.name))
        if len(ordered) > MAX_NODES:
            raise ValueError(f"a cluster has at most {MAX_NODES} nodes")
        if len({node.name for node in ordered}) < len(ordered):
            raise ValueError("two nodes have one name")
        self.__attrs_init__(ordered)

    def owner(self, key: bytes) -> str | None:
        """The name of the node on which the key lives; None if there is no node. About 1 us for
        each node and weight."""
        _check_key(key)
        tickets = self._tickets
        if not tickets:
            return None
        return max((_score(ticket, key), name) for ticket, name in tickets)[1]

    def ranked(self, key: bytes) -> tuple[str, ...]:
        """All nodes that may have the key, its owner first, then who would get it next if those
        before went away."""
        _check_key(key)
        best: dict[str, int] = {}
        for ticket, name in self._tickets:
            best[name] = max(best.get(name, -1), _score(ticket, key))
        return tuple(sorted(best, key=lambda name: (best[name], name), reverse=True))

    def moved(
        self, successor: Placement, keys: Iterable[bytes]
    ) -> dict[bytes, tuple[str | None, str | None]]:
        """Of these keys those that live elsewhere in `successor`: (before, after) by key."""
        owners = {key: (self.owner(key), successor.owner(key)) for key in keys}
        return {key: pair for key, pair in owners.items() if pair[0] != pair[1]}

    @cached_property
    def _tickets(self) -> tuple[tuple[blake2b, str], ...]:
        """For each share of each node that takes keys: the hash begun with its name and number."""
        takers = [node for node in self.nodes if not node.draining] or list(self.nodes)
        return tuple(
            (_ticket(node.name, number), node.name)
            for node in takers
            for number in range(node.weight)
        )


def _ticket(name: str, number: int) -> blake2b:
    salt = number.to_bytes(2, "big")
    return blake2b(key=name.encode(), salt=salt, person=_PERSON, digest_size=_SCORE_BYTES)


def _score(ticket: blake2b, key: bytes) -> int:
    hasher = ticket.copy()
    hasher.update(key)
    return int.from_bytes(hasher.digest(), "big")


def _check_key(key: bytes) -> None:
    if len(key) > MAX_KEY_BYTES:
        raise ValueError(f"a key has at most {MAX_KEY_BYTES} bytes")
