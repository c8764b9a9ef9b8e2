"""Events: the changes of the account, and who comes and goes, as server-sent events."""

from __future__ import annotations

from typing import Any, Final

from litestar import Request, get
from litestar.response import Stream

from actors.store.interface import Pruned
from portal.api.changes import ChangeView
from portal.api.feeds import EndEvent, Feeds, PresenceEvent
from portal.api.inject import TheCall, TheDesk
from portal.api.office import Desk
from portal.api.problems import FieldError, Problem, invalid
from portal.api.scopes import noun

LAST_EVENT_ID: Final = "Last-Event-ID"
EVENT_STREAM: Final = "text/event-stream"
STREAM: Final = "stream"
"""A route with this entry in its `opt` answers with a stream of events, of these types."""
EVENTS: Final = (ChangeView, PresenceEvent, EndEvent)


@get("/", media_type=EVENT_STREAM, opt={STREAM: True})
async def read_events(request: Request[Any, Any, Any], desk: TheDesk, call: TheCall) -> Stream:
    """Read the events of the account, for as long as you like.

    `change` events are those of `/v1/changes`, in order and without gaps, each with its number as
    `id`; the header `Last-Event-ID` resumes after one (410 `events_gone` if what follows is not
    kept any more), without it the stream begins now. `presence` events say who comes and goes from
    now on. A comment comes every 15 s. The last event is `end`, with the reason.
    """
    after = await _position(desk, request.headers.get(LAST_EVENT_ID))
    feeds: Feeds = request.app.state.feeds
    source = request.client.host if request.client else ""
    reader = feeds.open(desk.caller, desk.account_id, source, after)
    call.at_end.append(reader.close)
    await feeds.greet(reader)
    return Stream(reader, media_type=EVENT_STREAM)


async def _position(desk: Desk, text: str | None) -> int:
    """The number after which the stream begins. Raises Problem: 422, 410."""
    store = desk.office.store
    last = await store.last_number(desk.account_id)
    if text is None:
        return last
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise invalid(FieldError(field=LAST_EVENT_ID, message="must be the id of an event"))
    after = int(text)
    try:
        await store.changes(desk.account_id, after=after, limit=1)
    except Pruned:
        after = last + 1
    if after > last:
        raise Problem(
            410,
            "events_gone",
            "What follows this event is not kept any more. List anew, and read from now on.",
        )
    return after


router = noun("events", read_events)
