"""Resources: networks and addresses beside a site's gateways, and the traffic they accept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal
from uuid import UUID

from litestar import Router, delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from actors.model import MAX_SITES_PER_RESOURCE, NameField, Resource
from channel.messages import MAX_FILTERS, Filter
from portal.api.inject import PathId, TheDesk, ThePage
from portal.api.office import Desk
from portal.api.pagination import Page
from portal.api.requests import Body, Checks, changes_of

AddressText = Annotated[
    str,
    Meta(max_length=49, description="A network for `cidr`, a single address for `ip`."),
]


SiteIds = Annotated[
    tuple[UUID, ...],
    Meta(
        min_length=1,
        max_length=MAX_SITES_PER_RESOURCE,
        description="The sites whose gateways may carry it.",
    ),
]


class FilterBody(Body, frozen=True, kw_only=True):
    """Traffic that is accepted: a range of ports, both ends included. `icmp` has no ports."""

    protocol: Literal["tcp", "udp", "icmp"]
    port_start: Annotated[int, Meta(ge=0, le=65_535)] = 0
    port_end: Annotated[int, Meta(ge=0, le=65_535)] = 65_535


Filters = Annotated[
    tuple[FilterBody, ...], Meta(max_length=MAX_FILTERS, description="None means all traffic.")
]


class ResourceCreate(Body, frozen=True, kw_only=True):
    """What users reach through the gateways of its sites."""

    site_ids: SiteIds
    name: NameField
    kind: Literal["cidr", "ip"]
    address: AddressText
    filters: Filters = ()


class ResourceUpdate(Body, frozen=True, kw_only=True):
    """A new address cuts the accesses that stand; clients then ask anew."""

    site_ids: SiteIds | UnsetType = UNSET
    name: NameField | UnsetType = UNSET
    kind: Literal["cidr", "ip"] | UnsetType = UNSET
    address: AddressText | UnsetType = UNSET
    filters: Filters | UnsetType = UNSET


@get("/")
async def list_resources(desk: TheDesk, page: ThePage) -> Page[Resource]:
    """List resources."""
    return await desk.list(Resource, page)


@get("/{id:uuid}")
async def get_resource(desk: TheDesk, id: PathId) -> Resource:
    """Show a resource."""
    return await desk.get(Resource, id)


@post("/")
async def create_resource(desk: TheDesk, data: JSONBody[ResourceCreate]) -> Resource:
    """Create a resource. Names are unique within the account."""
    checks = Checks()
    address = _check_address(checks, desk, data.kind, data.address)
    filters = _check_filters(checks, data.filters)
    checks.finish()
    return await desk.create(
        Resource(
            id=desk.new_id(),
            account_id=desk.account_id,
            site_ids=data.site_ids,
            name=data.name,
            kind=data.kind,
            address=address,
            filters=filters,
            created_at=desk.now,
        )
    )


@patch("/{id:uuid}")
async def update_resource(desk: TheDesk, id: PathId, data: JSONBody[ResourceUpdate]) -> Resource:
    """Change a resource."""
    checks = Checks()
    async with desk.revise(Resource, id) as revision:
        changes = changes_of(data)
        kind = changes.get("kind", revision.entity.kind)
        if "kind" in changes or "address" in changes:
            text = changes.get("address", revision.entity.address)
            changes["address"] = _check_address(checks, desk, kind, text)
        if "filters" in changes:
            changes["filters"] = _check_filters(checks, changes["filters"])
        checks.finish()
        revision.changes = changes
    return revision.entity


@delete("/{id:uuid}")
async def delete_resource(desk: TheDesk, id: PathId) -> None:
    """Delete a resource with its policies; accesses to it end at once."""
    await desk.remove("resource", id)


def _check_address(checks: Checks, desk: Desk, kind: str, text: str) -> str:
    check = checks.address if kind == "ip" else checks.network
    address = check("address", text)
    tunnel_ranges = (desk.account.range_ipv4, desk.account.range_ipv6)
    checks.resource_address("address", address, tunnel_ranges)
    return address


def _check_filters(checks: Checks, filters: Sequence[FilterBody]) -> tuple[Filter, ...]:
    for i, each in enumerate(filters):
        if each.protocol == "icmp" and (each.port_start, each.port_end) != (0, 65_535):
            checks.refuse(f"filters[{i}]", "icmp has no ports; leave them out")
        if each.port_start > each.port_end:
            checks.refuse(f"filters[{i}].port_end", "must not be below port_start")
    return tuple(
        Filter(protocol=each.protocol, port_start=each.port_start, port_end=each.port_end)
        for each in filters
    )


router = Router(
    "/v1/resources",
    route_handlers=[
        list_resources,
        get_resource,
        create_resource,
        update_resource,
        delete_resource,
    ],
    tags=["resources"],
)
