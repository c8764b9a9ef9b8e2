"""Authorisations: which client reached which resource through which gateway, and until when."""

from __future__ import annotations

from typing import Any

from litestar import Request, Router, get

from actors.model import Authorization
from portal.api.inject import TheDesk, ThePage
from portal.api.pagination import Page
from portal.api.problems import FieldError, invalid


@get("/", opt={"query": {"live": "true for those that stand now, false (the default) for all"}})
async def list_authorizations(
    request: Request[Any, Any, Any], desk: TheDesk, page: ThePage
) -> Page[Authorization]:
    """List authorisations."""
    live = request.query_params.get("live", "false")
    if live not in ("true", "false"):
        raise invalid(FieldError(field="live", message="must be true or false"))
    found = await desk.office.store.authorizations(
        desk.account_id,
        live_at=desk.now if live == "true" else None,
        after=page.after_id(),
        limit=page.limit,
    )
    return page.page(found, found[-1].id if found else None)


router = Router("/v1/authorizations", route_handlers=[list_authorizations], tags=["authorizations"])
