"""A node for a test that needs an owner of accounts and nothing else of a cluster."""

from __future__ import annotations

from typing import TypedDict

from runtime.cluster.leases import MAX_NODE_LEASE_NS, LeaseStore


class Owner(TypedDict):
    """What `acquire` and `release` want to know of the node: `**` it."""

    owner: str
    incarnation: int


async def joined(
    store: LeaseStore, name: str = "node", *, ttl_ns: int = MAX_NODE_LEASE_NS
) -> Owner:
    """A life of a node, which need not renew its lease."""
    incarnation = await store.join_node(
        name,
        link_address="127.0.0.1:1",
        door_address="127.0.0.1:2",
        version="test",
        ttl_ns=ttl_ns,
    )
    return Owner(owner=name, incarnation=incarnation)
