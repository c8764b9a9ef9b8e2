"""Clients: users' devices. They enrol themselves; admins verify, rename and remove them."""

from __future__ import annotations

from uuid import UUID

from litestar import delete, get, patch
from litestar.params import JSONBody
from msgspec import UNSET, UnsetType

from actors.model import Client, Fact, NameField
from portal.api.devices import DeviceView
from portal.api.filters import filters
from portal.api.inject import PathId, TheDesk, TheFilters, ThePage
from portal.api.pagination import Page
from portal.api.requests import Body, changes_of
from portal.api.scopes import noun


class ClientView(DeviceView, frozen=True, kw_only=True):
    """A device. `online` is null when that cannot be told just now; `remote_ip` is where its
    channel comes from, `version` and `last_seen_at` are those of its latest connection, `posture`
    is what it last reported of itself."""

    principal_id: UUID
    verified: bool
    posture: tuple[Fact, ...]


class ClientUpdate(Body, frozen=True, kw_only=True):
    """`verified` says that an admin knows the device."""

    name: NameField | UnsetType = UNSET
    verified: bool | UnsetType = UNSET


@get("/", opt=filters(Client, "name", "principal_id", "token_id", "verified"))
async def list_clients(desk: TheDesk, page: ThePage, filters: TheFilters) -> Page[ClientView]:
    """List devices."""
    return await ClientView.of_page(desk, await desk.list(Client, page, filters))


@get("/{id:uuid}")
async def get_client(desk: TheDesk, id: PathId) -> ClientView:
    """Show a device."""
    return await ClientView.of(desk, await desk.get(Client, id))


@patch("/{id:uuid}")
async def update_client(desk: TheDesk, id: PathId, data: JSONBody[ClientUpdate]) -> ClientView:
    """Rename or verify a device."""
    return await ClientView.of(desk, await desk.update(Client, id, changes_of(data)))


@delete("/{id:uuid}")
async def delete_client(desk: TheDesk, id: PathId) -> None:
    """Remove a device and end its accesses. It may enrol again while its token is good."""
    await desk.remove(Client, id)


router = noun("clients", list_clients, get_client, update_client, delete_client)
