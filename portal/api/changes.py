"""Changes: every mutation of the account in commit order, with who, when, before and after."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

import msgspec
from litestar import Router, get

from actors.model import Change, Entity, EntityKind
from actors.store.interface import Pruned
from actors.store.validity import SECRETS
from portal.api.inject import TheDesk, ThePage
from portal.api.pagination import Page

HIDDEN_FIELDS = ("hash", *SECRETS.values())


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


@get("/")
async def list_changes(desk: TheDesk, page: ThePage) -> Page[ChangeView]:
    """List changes, oldest first, from the first one on that is still kept."""
    read = partial(desk.office.store.changes, desk.account_id, limit=page.limit)
    try:
        found = await read(after=page.after_number())
    except Pruned as gone:
        found = await read(after=gone.number)
    return page.page(tuple(map(ChangeView.of, found)), found[-1].number if found else None)


def _plain(entity: Entity | None) -> dict[str, Any] | None:
    if entity is None:
        return None
    plain: dict[str, Any] = msgspec.to_builtins(entity, enc_hook=str)
    return {name: value for name, value in plain.items() if name not in HIDDEN_FIELDS}


router = Router("/v1/changes", route_handlers=[list_changes], tags=["changes"])
