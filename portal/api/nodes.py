"""Nodes of the installation, for operators: the portals that share its database."""

from __future__ import annotations

import msgspec
from litestar import get
from litestar.params import FromPath

from portal.api.authentication import require_operator
from portal.api.inject import TheCall, TheCaller, TheOffice
from portal.api.pagination import Page
from portal.api.problems import not_found
from portal.api.scopes import noun
from runtime.cluster.leases import NodeRow


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node that holds a lease. `incarnation` counts its starts; `node_address` is where agents
    find it, `link_address` where other nodes do."""

    name: str
    incarnation: int
    state: str
    version: str
    node_address: str
    link_address: str

    @classmethod
    def of(cls, row: NodeRow) -> NodeView:
        return cls(
            name=row.name,
            incarnation=row.incarnation,
            state="draining" if row.draining else "up",
            version=row.version,
            node_address=row.door_address,
            link_address=row.link_address,
        )


@get("/")
async def list_nodes(office: TheOffice, caller: TheCaller) -> Page[NodeView]:
    """List the nodes that live; there are few, so they come at once. For operators."""
    require_operator(caller)
    rows = sorted(await office.store.nodes(), key=lambda row: row.name)
    return Page(items=tuple(map(NodeView.of, rows)), next_cursor=None)


@get("/{name:str}")
async def get_node(
    office: TheOffice, caller: TheCaller, call: TheCall, name: FromPath[str]
) -> NodeView:
    """Show a node. For operators."""
    require_operator(caller)
    for row in await office.store.nodes():
        if row.name == name:
            view = NodeView.of(row)
            call.show(view)
            return view
    raise not_found("node")


router = noun("nodes", list_nodes, get_node)
