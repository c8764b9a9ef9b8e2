"""Relays of the installation, for operators to look at. They join by a relay token."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec
from litestar import Router, get

from actors.model import Relay
from channel.messages import SocketAddress
from portal.api.authentication import require_operator
from portal.api.inject import PathId, TheCaller, TheOffice, ThePage
from portal.api.pagination import Page
from portal.api.problems import not_found


class RelayView(msgspec.Struct, frozen=True, kw_only=True):
    """A relay and where it listens. `online` is null when that cannot be told just now."""

    id: UUID
    token_id: UUID
    name: str
    region: str
    addresses: tuple[SocketAddress, ...]
    last_seen_at: datetime
    online: bool | None

    @classmethod
    def of(cls, relay: Relay, online: frozenset[UUID] | None) -> RelayView:
        fields = {name: getattr(relay, name) for name in cls.__struct_fields__[:-1]}
        return cls(**fields, online=None if online is None else relay.id in online)


@get("/")
async def list_relays(
    office: TheOffice,
    caller: TheCaller,
    page: ThePage,
) -> Page[RelayView]:
    """List relays. For operators."""
    require_operator(caller)
    after = page.after_id()
    every = [each for each in await office.store.relays() if after is None or each.id > after]
    online = await office.live.relays_online()
    items = [RelayView.of(relay, online) for relay in every[: page.limit]]
    return page.page(items, items[-1].id if items else None)


@get("/{id:uuid}")
async def get_relay(office: TheOffice, caller: TheCaller, id: PathId) -> RelayView:
    """Show a relay. For operators."""
    require_operator(caller)
    for relay in await office.store.relays():
        if relay.id == id:
            return RelayView.of(relay, await office.live.relays_online())
    raise not_found("relay")


router = Router("/v1/relays", route_handlers=[list_relays, get_relay], tags=["relays"])
