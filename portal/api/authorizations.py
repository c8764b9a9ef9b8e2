"""Authorisations: which client reached which resource through which gateway, and until when."""

from __future__ import annotations

from uuid import UUID

from litestar import get

from actors.model import Authorization
from portal.api.filters import Filter, filters
from portal.api.inject import PathId, TheDesk, TheFilters, ThePage
from portal.api.pagination import Page
from portal.api.problems import not_found
from portal.api.scopes import noun


@get(
    "/",
    opt=filters(
        Authorization,
        "policy_id",
        "client_id",
        "gateway_id",
        "resource_id",
        live=Filter("live", bool, "true for those that stand now, else all."),
    ),
)
async def list_authorizations(
    desk: TheDesk, page: ThePage, filters: TheFilters
) -> Page[Authorization]:
    """List authorisations."""
    is_live = filters.pop("live", False)
    found = await desk.office.store.authorizations(
        desk.account_id,
        live_at=desk.now if is_live else None,
        after=page.after_id(),
        limit=page.limit,
        equals=filters,
    )
    return page.page(found, found[-1].id if found else None)


@get("/{id:uuid}")
async def get_authorization(desk: TheDesk, id: PathId) -> Authorization:
    """Show an authorisation."""
    before = UUID(int=max(id.int - 1, 0))
    found = await desk.office.store.authorizations(desk.account_id, after=before, limit=1)
    if not found or found[0].id != id:
        raise not_found("authorization")
    desk.call.show(found[0])
    return found[0]


router = noun("authorizations", list_authorizations, get_authorization)
