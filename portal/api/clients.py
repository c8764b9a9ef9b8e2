"""Clients: users' devices. They enrol themselves; admins verify, rename and remove them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address
from uuid import UUID

import msgspec
from litestar import Router, delete, get, patch
from litestar.params import JSONBody
from msgspec import UNSET, UnsetType

from actors.model import Client, NameField
from portal.api.inject import PathId, TheDesk, ThePage
from portal.api.pagination import Page
from portal.api.requests import Body, changes_of


class ClientView(msgspec.Struct, frozen=True, kw_only=True):
    """A device. `online` is null when that cannot be told just now; `remote_ip` is where
    its channel comes from."""

    id: UUID
    account_id: UUID
    principal_id: UUID
    token_id: UUID
    device_key: bytes
    name: str
    ipv4: IPv4Address
    ipv6: IPv6Address
    verified: bool
    created_at: datetime
    online: bool | None
    remote_ip: str | None

    @classmethod
    def of(cls, client: Client, online: Mapping[UUID, str] | None) -> ClientView:
        fields = {name: getattr(client, name) for name in cls.__struct_fields__[:-2]}
        remote_ip = None if online is None else online.get(client.id)
        is_online = None if online is None else client.id in online
        return cls(**fields, online=is_online, remote_ip=remote_ip)


class ClientUpdate(Body, frozen=True, kw_only=True):
    """`verified` says that an admin knows the device."""

    name: NameField | UnsetType = UNSET
    verified: bool | UnsetType = UNSET


@get("/")
async def list_clients(desk: TheDesk, page: ThePage) -> Page[ClientView]:
    """List devices."""
    found = await desk.list(Client, page)
    online = await desk.office.live.online(desk.account_id)
    items = tuple(ClientView.of(client, online) for client in found.items)
    return Page(items=items, next_cursor=found.next_cursor)


@get("/{id:uuid}")
async def get_client(desk: TheDesk, id: PathId) -> ClientView:
    """Show a device."""
    client = await desk.get(Client, id)
    return ClientView.of(client, await desk.office.live.online(desk.account_id))


@patch("/{id:uuid}")
async def update_client(desk: TheDesk, id: PathId, data: JSONBody[ClientUpdate]) -> ClientView:
    """Rename or verify a device."""
    client = await desk.update(Client, id, changes_of(data))
    return ClientView.of(client, await desk.office.live.online(desk.account_id))


@delete("/{id:uuid}")
async def delete_client(desk: TheDesk, id: PathId) -> None:
    """Remove a device and end its accesses. It may enrol again while its token is good."""
    await desk.remove("client", id)


router = Router(
    "/v1/clients",
    route_handlers=[list_clients, get_client, update_client, delete_client],
    tags=["clients"],
)
