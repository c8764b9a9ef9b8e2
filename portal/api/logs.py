"""Logs: sessions of agents, flows through tunnels, calls of this API. The newest come first."""

from __future__ import annotations

from typing import Any

from litestar import get

from actors.logs import LOG_FILTERS, FlowLog, LogKind, RequestLog, SessionLog
from portal.api.filters import filters, instant
from portal.api.inject import TheDesk, TheFilters, ThePage
from portal.api.office import Desk
from portal.api.pagination import Page, PageRequest
from portal.api.scopes import noun

WHEN = {
    "since": instant("since", "From this instant on."),
    "until": instant("until", "Up to, not including, this instant."),
}


@get("/sessions", opt=filters(SessionLog, *LOG_FILTERS["session"], **WHEN))
async def list_session_logs(desk: TheDesk, page: ThePage, filters: TheFilters) -> Page[SessionLog]:
    """List connections of clients and gateways, refusals, and departures."""
    return await _list(desk, "session", page, filters)


@get("/flows", opt=filters(FlowLog, *LOG_FILTERS["flow"], **WHEN))
async def list_flow_logs(desk: TheDesk, page: ThePage, filters: TheFilters) -> Page[FlowLog]:
    """List flows, each as one side counted it."""
    return await _list(desk, "flow", page, filters)


@get("/requests", opt=filters(RequestLog, *LOG_FILTERS["request"], **WHEN))
async def list_request_logs(desk: TheDesk, page: ThePage, filters: TheFilters) -> Page[RequestLog]:
    """List calls of this API that concerned the account."""
    return await _list(desk, "request", page, filters)


async def _list(desk: Desk, kind: LogKind, page: PageRequest, filters: dict[str, Any]) -> Page[Any]:
    found = await desk.office.store.logs(
        desk.account_id,
        kind,
        since=filters.pop("since", None),
        until=filters.pop("until", None),
        equals=filters,
        before=page.after_id(),
        limit=page.limit,
    )
    return page.page(found, found[-1].id if found else None)


router = noun("logs", list_session_logs, list_flow_logs, list_request_logs)
