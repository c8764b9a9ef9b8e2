"""Changes: every mutation of the account in commit order, with who, when, before and after."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec
from litestar import get
from litestar.params import FromPath

from actors.model import Change, Entity, EntityKind
from actors.store.codec import write_value
from actors.store.interface import Pruned
from actors.store.validity import SECRETS
from portal.api.filters import filters
from portal.api.inject import TheDesk, TheFilters, ThePage
from portal.api.pagination import Page
from portal.api.problems import not_found
from portal.api.scopes import noun

HIDDEN_FIELDS = ("hash", *SECRETS.values())
MAX_NUMBER = 2**63 - 1


class ChangeView(msgspec.Struct, frozen=True, kw_only=True):
    """One mutation. `before` is null for a creation, `after` for a removal; hashes and sealed
    secrets are not shown."""

    number: int
    at: datetime
    who: str
    kind: EntityKind
    entity_id: UUID
    before: dict[str, Any] | None
    after: dict[str, Any] | None

    @classmethod
    def of(cls, change: Change) -> ChangeView:
        return cls(
            number=change.number,
            at=change.at,
            who=change.who,
            kind=change.kind,
            entity_id=change.entity_id,
            before=_plain(change.before),
            after=_plain(change.after),
        )


@get("/", opt=filters(Change, "kind", "entity_id", "who"))
async def list_changes(desk: TheDesk, page: ThePage, filters: TheFilters) -> Page[ChangeView]:
    """List changes, oldest first, from the oldest one that is kept."""
    after = page.after_number()
    try:
        found = await desk.office.store.changes(
            desk.account_id, after=after, limit=page.limit, equals=filters
        )
    except Pruned as pruned:
        found = await desk.office.store.changes(
            desk.account_id, after=pruned.number, limit=page.limit, equals=filters
        )
    return page.page(found, found[-1].number if found else None).of(ChangeView.of)


@get("/{number:int}")
async def get_change(desk: TheDesk, number: FromPath[int]) -> ChangeView:
    """Show a change."""
    if not 1 <= number <= MAX_NUMBER:
        raise not_found("change")
    try:
        found = await desk.office.store.changes(desk.account_id, after=number - 1, limit=1)
    except Pruned:
        raise not_found("change") from None
    if not found or found[0].number != number:
        raise not_found("change")
    view = ChangeView.of(found[0])
    desk.call.show(view)
    return view


def _plain(entity: Entity | None) -> dict[str, Any] | None:
    if entity is None:
        return None
    plain: dict[str, Any] = msgspec.to_builtins(entity, enc_hook=write_value)
    return {name: value for name, value in plain.items() if name not in HIDDEN_FIELDS}


router = noun("changes", list_changes, get_change)
