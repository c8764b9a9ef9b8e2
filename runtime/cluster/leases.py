"""Who owns what in a cluster: the leases of nodes and of keyed actors, as a database keeps them.

Two kinds of lease, and one clock, the database's:

- A *node* has a lease of a few seconds that it renews all the time. Its row also says where it
  listens, so whoever renews learns at once which nodes live and where: this is how nodes find one
  another, and the one truth about who is alive. Each start of a node, and each return after it was
  given up, is another *incarnation*, a number that only grows.
- A *keyed actor* (one for each account, say) is owned by one incarnation of one node, for as long
  as that lives. Each take-over raises the *epoch* of the key, the fencing token: whatever an owner
  writes is refused when the epoch is no longer its own. So a node that was stopped and resumed can
  do no harm, whatever it still believes.

A node counts its own lease from before the renewal was sent, so it ends for the node itself
earlier than for the others.
"""

from __future__ import annotations

from typing import Final, Protocol
from uuid import UUID

import attrs

MAX_NODE_LEASE_NS: Final = 366 * 24 * 3_600 * 10**9
"""Far beyond any real lease: for worlds of one node in virtual time, which need not renew it."""


class LeaseFenced(Exception):
    """This incarnation of the node, or this epoch of the key, is over. `superseded`: another
    process has joined under the node's name; otherwise the node was given up for dead."""

    superseded: bool = False


class LeaseHeld(Exception):
    """The key is owned by another node that lives; `owner` is its name."""

    owner: str


class ClusterFull(Exception):
    """`placement.MAX_NODES` nodes live, so no other can join."""


class LeaseUnavailable(Exception):
    """The database cannot be reached now."""


@attrs.frozen(kw_only=True)
class NodeRow:
    """A node that has joined and not left. `remaining_ns` is what is left of its lease, 0 when it
    has expired or was given up."""

    name: str
    incarnation: int
    link_address: str
    """`host:port` at which the other nodes reach it."""
    door_address: str
    """`host:port` at which those whom the cluster serves reach it."""
    version: str
    draining: bool
    remaining_ns: int


class LeaseStore(Protocol):
    """What a cluster needs of a database. Each method may raise LeaseUnavailable besides what its
    own text names. Durations in nanoseconds; instants are the database's own."""

    async def join_node(
        self, name: str, *, link_address: str, door_address: str, version: str, ttl_ns: int
    ) -> int:
        """Begin a life of the node `name` and return its incarnation, which is higher than that of
        any life of any node before. A process that has the name already is superseded. Where
        there are MAX_NODES rows, it takes the place of the node that has been dead longest.

        `ttl_ns` is 0 (expired at once) to MAX_NODE_LEASE_NS. Raises ClusterFull; ValueError for
        what cannot be the name of a node, an address or a version (1 to 255 characters)."""

    async def renew_node(
        self, name: str, incarnation: int, *, draining: bool, ttl_ns: int
    ) -> tuple[NodeRow, ...]:
        """Prolong the node's lease to `ttl_ns` from now, also when it has expired meanwhile and
        nothing that it owned was taken over, and return all nodes, this one among them, by name.
        Raises LeaseFenced, also when the node has left, or made room for another while it was
        dead."""

    async def nodes(self) -> tuple[NodeRow, ...]:
        """All nodes, by name. (For operators; a node learns them by `renew_node`.)"""

    async def expel_node(self, name: str, incarnation: int) -> None:
        """Give this incarnation up for dead: its lease ends now, and it cannot renew it. Harmless
        if it is over."""

    async def leave_node(self, name: str, incarnation: int) -> None:
        """End the life of a node in good order: its row goes, and what it still owned is free for
        others at once. Harmless if it is over."""

    async def acquire(self, key: UUID, *, owner: str, incarnation: int) -> int:
        """Become the owner of the key: raises its epoch by one and returns it.

        Raises, in this order: what the store raises for a key that it does not know; LeaseFenced
        unless the lease of (owner, incarnation) stands; LeaseHeld while another node owns it whose
        lease stands. What an earlier life of the same node owned is free.

        A node whose lease has expired, and whose key is taken over so, is expelled with that: were
        it to go on as before, two actors of the key would live, both of them entitled."""

    async def release(self, key: UUID, *, owner: str, incarnation: int) -> None:
        """Give up the ownership of the key, so that another node need not wait for the end of our
        lease. The epoch stays, and nothing can be written by it any more. Harmless unless the key
        is owned by this incarnation."""
