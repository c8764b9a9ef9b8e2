"""The API over PostgreSQL: what its constraints refuse becomes a problem, never a 500."""

from __future__ import annotations

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.store.memory import MemoryStore
from actors.store.postgres import Logins, PostgresStore
from tests.unit.portal.json_calls import Call, Target, calls, target

pytestmark = pytest.mark.system

SHAPE = target(MemoryStore())


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(calls(SHAPE.document, SHAPE.ids), min_size=20, max_size=40))
def test_no_json_is_answered_by_a_500_over_postgresql(database: Logins, many: list[Call]) -> None:
    async def send_all() -> None:
        async with PostgresStore.open(database, migrated=True) as store:
            here = Target(
                door=target(store).door,
                token=SHAPE.token,
                document=SHAPE.document,
                ids=SHAPE.ids,
                entities=SHAPE.entities,
            )
            await here.fill(store)
            for call in many:
                await here.send(call)

    trio.run(send_all)
