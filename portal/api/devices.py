"""What clients and gateways have in common where the API shows them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address
from typing import Self
from uuid import UUID

import msgspec

from actors.model import Client, Gateway
from portal.api.office import Desk
from portal.api.pagination import Page


class DeviceView(msgspec.Struct, frozen=True, kw_only=True):
    """A device and whether it is there. `online` is null when that cannot be told just now;
    `remote_ip` is where its channel comes from."""

    id: UUID
    account_id: UUID
    token_id: UUID
    device_key: bytes
    name: str
    ipv4: IPv4Address
    ipv6: IPv6Address
    created_at: datetime
    online: bool | None
    remote_ip: str | None

    @classmethod
    async def of(cls, desk: Desk, device: Client | Gateway) -> Self:
        """The device as it is now."""
        return cls._of(device, await desk.office.live.online(desk.account_id))

    @classmethod
    async def of_page(cls, desk: Desk, found: Page[Client] | Page[Gateway]) -> Page[Self]:
        """All devices of a page as they are now."""
        online = await desk.office.live.online(desk.account_id)
        items = tuple(cls._of(device, online) for device in found.items)
        return Page(items=items, next_cursor=found.next_cursor)

    @classmethod
    def _of(cls, device: Client | Gateway, online: Mapping[UUID, str] | None) -> Self:
        live = {"online", "remote_ip"}
        return cls(
            **{name: getattr(device, name) for name in cls.__struct_fields__ if name not in live},
            online=None if online is None else device.id in online,
            remote_ip=None if online is None else online.get(device.id),
        )
