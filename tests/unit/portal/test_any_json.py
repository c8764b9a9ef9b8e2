"""Random JSON at every endpoint that takes a body: never a 500, always JSON, always a shape.

The application is driven as Hypercorn drives it, but without a socket between. The same over
PostgreSQL is in tests/system/test_portal_store.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import httpx
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.store.memory import MemoryStore
from tests.unit.portal.json_calls import Call, Target, calls, target


@cache
def api() -> Target:
    store = MemoryStore()
    made = target(store)
    trio.run(made.fill, store)
    return made


@settings(max_examples=400, deadline=None)
@given(st.deferred(lambda: calls(api().document, api().ids)))
def test_no_json_is_answered_by_a_500(call: Call) -> None:
    trio.run(api().send, call)


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from(["application/json", "text/plain", "", "multipart/form-data"]),
)
def test_no_bytes_of_any_media_type_are_answered_by_a_500(content: bytes, media_type: str) -> None:
    async def send() -> httpx.Response:
        async with api().client() as http:
            headers: dict[str, Any] = {"content-type": media_type}
            return await http.post("/v1/sites", content=content, headers=headers)

    assert trio.run(send).status_code in (400, 415, 422)
