"""Gateways: agents beside resources. They enrol themselves; admins approve and remove them."""

from __future__ import annotations

from uuid import UUID

from litestar import delete, get, patch
from litestar.params import JSONBody
from msgspec import UNSET, UnsetType

from actors.model import Gateway, NameField
from portal.api.devices import DeviceView
from portal.api.filters import filters
from portal.api.inject import PathId, TheDesk, TheFilters, ThePage
from portal.api.pagination import Page
from portal.api.requests import Body, changes_of
from portal.api.scopes import noun


class GatewayView(DeviceView, frozen=True, kw_only=True):
    """A gateway. `online` is null when that cannot be told just now; `remote_ip` is where its
    channel comes from, `version` and `last_seen_at` are those of its latest connection."""

    site_id: UUID
    approved: bool


class GatewayUpdate(Body, frozen=True, kw_only=True):
    """`approved` lets a gateway with a device key that nobody knew do its work."""

    name: NameField | UnsetType = UNSET
    approved: bool | UnsetType = UNSET


@get("/", opt=filters(Gateway, "name", "site_id", "token_id", "approved"))
async def list_gateways(desk: TheDesk, page: ThePage, filters: TheFilters) -> Page[GatewayView]:
    """List gateways."""
    return await GatewayView.of_page(desk, await desk.list(Gateway, page, filters))


@get("/{id:uuid}")
async def get_gateway(desk: TheDesk, id: PathId) -> GatewayView:
    """Show a gateway."""
    return await GatewayView.of(desk, await desk.get(Gateway, id))


@patch("/{id:uuid}")
async def update_gateway(desk: TheDesk, id: PathId, data: JSONBody[GatewayUpdate]) -> GatewayView:
    """Rename or approve a gateway."""
    return await GatewayView.of(desk, await desk.update(Gateway, id, changes_of(data)))


@delete("/{id:uuid}")
async def delete_gateway(desk: TheDesk, id: PathId) -> None:
    """Remove a gateway. It may enrol again while its token is good."""
    await desk.remove(Gateway, id)


router = noun("gateways", list_gateways, get_gateway, update_gateway, delete_gateway)
