"""Resources: what users reach. Networks, addresses and names beside the gateways of one or more
sites, the internet, and pools of users' own devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal
from uuid import UUID

import attrs
from litestar import delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from actors.model import MAX_POOL_DEVICES, MAX_SITES_PER_RESOURCE, NameField, Resource, Site
from channel.messages import MAX_FILTERS, Filter
from portal.api.accounts import resolver_network
from portal.api.filters import Filter as QueryFilter
from portal.api.filters import filters
from portal.api.inject import PathId, TheDesk, TheFilters, ThePage
from portal.api.office import Desk
from portal.api.pagination import Page, PageRequest
from portal.api.requests import Body, Checks, changes_of
from portal.api.scopes import noun

Kind = Literal["cidr", "ip", "dns", "internet", "device_pool"]
IpStack = Literal["v4", "v6", "dual"]
AddressText = Annotated[
    str,
    Meta(
        max_length=253,
        description="A network for `cidr`, an address for `ip`, a pattern of names for `dns`"
        " (`*` is one label or a part of one, `**` any number of labels, `?` a character); empty"
        " for the other kinds.",
    ),
]
SiteIds = Annotated[
    tuple[UUID, ...],
    Meta(
        max_length=MAX_SITES_PER_RESOURCE,
        description="Any gateway of these sites may carry it. A pool of devices has none, the"
        " internet is at the site Internet.",
    ),
]
DeviceIds = Annotated[
    tuple[UUID, ...],
    Meta(max_length=MAX_POOL_DEVICES, description="Clients; for `device_pool` alone."),
]
BOUND = ("kind", "site_ids", "address", "ip_stack", "device_ids")
"""The fields that have to fit one another."""


class FilterBody(Body, frozen=True, kw_only=True):
    """Traffic that is accepted: a range of ports, both ends included. `icmp` has no ports."""

    protocol: Literal["tcp", "udp", "icmp"]
    port_start: Annotated[int, Meta(ge=0, le=65_535)] = 0
    port_end: Annotated[int, Meta(ge=0, le=65_535)] = 65_535


Filters = Annotated[
    tuple[FilterBody, ...], Meta(max_length=MAX_FILTERS, description="None means all traffic.")
]


class ResourceCreate(Body, frozen=True, kw_only=True):
    """What users reach. `ip_stack` says which addresses a name is given, and is for `dns`."""

    name: NameField
    kind: Kind
    site_ids: SiteIds = ()
    address: AddressText = ""
    ip_stack: IpStack = "dual"
    device_ids: DeviceIds = ()
    filters: Filters = ()


class ResourceUpdate(Body, frozen=True, kw_only=True):
    """A new address cuts the accesses that stand; clients then ask anew."""

    name: NameField | UnsetType = UNSET
    kind: Kind | UnsetType = UNSET
    site_ids: SiteIds | UnsetType = UNSET
    address: AddressText | UnsetType = UNSET
    ip_stack: IpStack | UnsetType = UNSET
    device_ids: DeviceIds | UnsetType = UNSET
    filters: Filters | UnsetType = UNSET


@get(
    "/",
    opt=filters(
        Resource,
        "name",
        "kind",
        "address",
        site_id=QueryFilter("site_ids", UUID, "One of its sites."),
        device_id=QueryFilter("device_ids", UUID, "One of its devices."),
    ),
)
async def list_resources(desk: TheDesk, page: ThePage, filters: TheFilters) -> Page[Resource]:
    """List resources."""
    return await desk.list(Resource, page, filters)


@get("/{id:uuid}")
async def get_resource(desk: TheDesk, id: PathId) -> Resource:
    """Show a resource."""
    return await desk.show(Resource, id)


@post("/")
async def create_resource(desk: TheDesk, data: JSONBody[ResourceCreate]) -> Resource:
    """Create a resource. Names are unique within the account."""
    checks = Checks()
    resource = Resource(
        id=desk.new_id(),
        account_id=desk.account_id,
        site_ids=data.site_ids or await _default_sites(desk, data.kind),
        name=data.name,
        kind=data.kind,
        address=data.address,
        ip_stack=data.ip_stack,
        device_ids=data.device_ids,
        filters=_check_filters(checks, data.filters),
        created_at=desk.now,
    )
    resource = _check_bound(checks, desk, resource)
    checks.finish()
    return await desk.create(resource)


@patch("/{id:uuid}")
async def update_resource(desk: TheDesk, id: PathId, data: JSONBody[ResourceUpdate]) -> Resource:
    """Change a resource."""
    given = changes_of(data)
    checks = Checks()
    if "filters" in given:
        given["filters"] = _check_filters(checks, given["filters"])
    checks.finish()

    def changes(before: Resource) -> dict[str, Any]:
        if not given.keys() & set(BOUND):
            return given
        checks = Checks()
        after = _check_bound(checks, desk, attrs.evolve(before, **given))
        checks.finish()
        return given | {name: getattr(after, name) for name in BOUND}

    return await desk.update(Resource, id, changes)


@delete("/{id:uuid}")
async def delete_resource(desk: TheDesk, id: PathId) -> None:
    """Delete a resource with its policies and policy tests; accesses to it end at once."""
    await desk.remove(Resource, id)


# --- below: what fits a kind ---


async def _default_sites(desk: Desk, kind: Kind) -> tuple[UUID, ...]:
    """The internet resource lies at the managed site, whoever asks."""
    if kind != "internet":
        return ()
    sites = await desk.list(Site, PageRequest(limit=1), {"kind": "internet"})
    return tuple(site.id for site in sites.items)


def _check_bound(checks: Checks, desk: Desk, resource: Resource) -> Resource:
    """The resource in canonical form; what does not fit its kind is refused."""
    kind = resource.kind
    site_ids = _distinct(checks, "site_ids", resource.site_ids)
    device_ids = _distinct(checks, "device_ids", resource.device_ids)
    if kind == "device_pool" and site_ids:
        checks.refuse("site_ids", "a pool of devices lies at no site")
    if kind != "device_pool" and not site_ids:
        checks.refuse("site_ids", f"a resource of the kind {kind} needs a site")
    if kind != "device_pool" and device_ids:
        checks.refuse("device_ids", "are for a pool of devices")
    if kind != "dns" and resource.ip_stack != "dual":
        checks.refuse("ip_stack", "is for the kind dns; leave it out")
    address = check_address(checks, desk, kind, resource.address)
    return attrs.evolve(resource, site_ids=site_ids, device_ids=device_ids, address=address)


def _distinct(checks: Checks, field: str, ids: Sequence[UUID]) -> tuple[UUID, ...]:
    if len(set(ids)) != len(ids):
        checks.refuse(field, "names one twice")
    return tuple(ids)


def check_address(checks: Checks, desk: Desk, kind: Kind, text: str) -> str:
    if kind in ("internet", "device_pool"):
        if text:
            checks.refuse("address", f"a resource of the kind {kind} has none")
        return text
    if kind == "dns":
        return checks.name_pattern("address", text)
    check = checks.address if kind == "ip" else checks.network
    address = check("address", text)
    account = desk.account
    own = {
        "tunnel": (account.range_ipv4, account.range_ipv6),
        "name": (account.names_ipv4, account.names_ipv6),
        "resolver": (resolver_network(account),),
    }
    checks.resource_address("address", address, own)
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


router = noun(
    "resources",
    list_resources,
    get_resource,
    create_resource,
    update_resource,
    delete_resource,
)
