"""What clients and gateways have in common where the API shows them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Self
from uuid import UUID

import attrs
import msgspec

from actors.logs import Seen
from actors.model import Client, Gateway
from portal.api.office import Desk, Online
from portal.api.pagination import Page


@attrs.frozen
class Presence:
    """What is known of devices beside what is stored of them: who is online (None: cannot be told
    now) from which address, and when each was last connected."""

    online: Mapping[UUID, Online] | None
    seen: Mapping[UUID, Seen]

    @classmethod
    async def of(cls, desk: Desk, ids: list[UUID]) -> Presence:
        """Of these devices of the account."""
        seen = await desk.office.store.seen(desk.account_id, ids)
        return cls(await desk.office.live.online(desk.account_id), seen)

    def fields(self, id: UUID) -> dict[str, Any]:
        """Those that a view has of this moment."""
        seen, online = self.seen.get(id), (self.online or {}).get(id)
        return {
            "online": None if self.online is None else online is not None,
            "remote_ip": online.remote_ip if online else None,
            "version": seen.version if seen else "",
            "last_seen_at": seen.at if seen else None,
        }


LIVE = frozenset({"online", "remote_ip", "version", "last_seen_at"})


class DeviceView(msgspec.Struct, frozen=True, kw_only=True):
    """A device and whether it is there. `online` is null when that cannot be told just now;
    `remote_ip` is where its channel comes from; `version` and `last_seen_at` are those of its
    latest connection."""

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
    version: str
    last_seen_at: datetime | None

    @classmethod
    async def of(cls, desk: Desk, device: Client | Gateway) -> Self:
        """The device as it is now, which the answer is about."""
        live = (await Presence.of(desk, [device.id])).fields(device.id)
        desk.call.show(device, live)
        return cls._of(device, live)

    @classmethod
    async def of_page(cls, desk: Desk, found: Page[Client] | Page[Gateway]) -> Page[Self]:
        """All devices of a page as they are now."""
        presence = await Presence.of(desk, [device.id for device in found.items])
        items = tuple(cls._of(device, presence.fields(device.id)) for device in found.items)
        return Page(items=items, next_cursor=found.next_cursor)

    @classmethod
    def _of(cls, device: Client | Gateway, live: dict[str, Any]) -> Self:
        own = {name: getattr(device, name) for name in cls.__struct_fields__ if name not in LIVE}
        return cls(**own, **live)
