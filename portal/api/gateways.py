"""Gateways: agents beside resources. They enrol themselves; admins approve and remove them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address
from uuid import UUID

import msgspec
from litestar import Router, delete, get, patch
from litestar.params import JSONBody
from msgspec import UNSET, UnsetType

from actors.model import Gateway, NameField
from portal.api.inject import PathId, TheDesk, ThePage
from portal.api.pagination import Page
from portal.api.requests import Body, changes_of


class GatewayView(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway. `online` is null when that cannot be told just now; `remote_ip` is where
    its channel comes from."""

    id: UUID
    account_id: UUID
    site_id: UUID
    token_id: UUID
    device_key: bytes
    name: str
    ipv4: IPv4Address
    ipv6: IPv6Address
    approved: bool
    created_at: datetime
    online: bool | None
    remote_ip: str | None

    @classmethod
    def of(cls, gateway: Gateway, online: Mapping[UUID, str] | None) -> GatewayView:
        fields = {name: getattr(gateway, name) for name in cls.__struct_fields__[:-2]}
        remote_ip = None if online is None else online.get(gateway.id)
        is_online = None if online is None else gateway.id in online
        return cls(**fields, online=is_online, remote_ip=remote_ip)


class GatewayUpdate(Body, frozen=True, kw_only=True):
    """`approved` lets a gateway with a device key that nobody knew do its work."""

    name: NameField | UnsetType = UNSET
    approved: bool | UnsetType = UNSET


@get("/")
async def list_gateways(desk: TheDesk, page: ThePage) -> Page[GatewayView]:
    """List gateways."""
    found = await desk.list(Gateway, page)
    online = await desk.office.live.online(desk.account_id)
    items = tuple(GatewayView.of(gateway, online) for gateway in found.items)
    return Page(items=items, next_cursor=found.next_cursor)


@get("/{id:uuid}")
async def get_gateway(desk: TheDesk, id: PathId) -> GatewayView:
    """Show a gateway."""
    gateway = await desk.get(Gateway, id)
    return GatewayView.of(gateway, await desk.office.live.online(desk.account_id))


@patch("/{id:uuid}")
async def update_gateway(desk: TheDesk, id: PathId, data: JSONBody[GatewayUpdate]) -> GatewayView:
    """Rename or approve a gateway."""
    gateway = await desk.update(Gateway, id, changes_of(data))
    return GatewayView.of(gateway, await desk.office.live.online(desk.account_id))


@delete("/{id:uuid}")
async def delete_gateway(desk: TheDesk, id: PathId) -> None:
    """Remove a gateway. It may enrol again while its token is good."""
    await desk.remove("gateway", id)


router = Router(
    "/v1/gateways",
    route_handlers=[list_gateways, get_gateway, update_gateway, delete_gateway],
    tags=["gateways"],
)
