"""Relays of the installation, for operators to look at. They join by a relay token, and are
forgotten with it."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec
from litestar import get

from actors.model import Relay
from channel.messages import SocketAddress
from portal.api.authentication import require_operator
from portal.api.filters import filters
from portal.api.inject import PathId, TheCall, TheCaller, TheFilters, TheOffice, ThePage
from portal.api.pagination import Page
from portal.api.problems import not_found
from portal.api.scopes import noun


class RelayView(msgspec.Struct, frozen=True, kw_only=True):
    """A relay and where it listens. `online` is null when that cannot be told just now."""

    id: UUID
    token_id: UUID
    name: str
    region: str
    failure_domain: str
    addresses: tuple[SocketAddress, ...]
    last_seen_at: datetime
    online: bool | None

    @classmethod
    def of(cls, relay: Relay, online: frozenset[UUID] | None) -> RelayView:
        fields = {name: getattr(relay, name) for name in cls.__struct_fields__[:-1]}
        return cls(**fields, online=None if online is None else relay.id in online)


@get("/", opt=filters(Relay, "name", "region", "failure_domain", "token_id"))
async def list_relays(
    office: TheOffice, caller: TheCaller, page: ThePage, filters: TheFilters
) -> Page[RelayView]:
    """List relays. For operators."""
    require_operator(caller)
    after = page.after_id()
    every = [
        each
        for each in await office.store.relays()
        if (after is None or each.id > after)
        and all(getattr(each, field) == value for field, value in filters.items())
    ]
    online = await office.live.relays_online()
    items = [RelayView.of(relay, online) for relay in every[: page.limit]]
    return page.page(items, items[-1].id if items else None)


@get("/{id:uuid}")
async def get_relay(office: TheOffice, caller: TheCaller, call: TheCall, id: PathId) -> RelayView:
    """Show a relay. For operators."""
    require_operator(caller)
    for relay in await office.store.relays():
        if relay.id == id:
            view = RelayView.of(relay, await office.live.relays_online())
            call.show(relay, [view.online])
            return view
    raise not_found("relay")


router = noun("relays", list_relays, get_relay)
