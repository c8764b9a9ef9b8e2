"""What the model-based suite does not reach: the memory store's own doors."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import pytest
import trio

from actors.model import Account, Site
from actors.store.interface import Put, Remove, Store
from actors.store.memory import MemoryStore

AT = datetime(2026, 1, 1, tzinfo=UTC)
ACME = Account(id=UUID(int=1), name="Acme", slug="acme", created_at=AT)
SITE = Site(id=UUID(int=2), account_id=ACME.id, name="Hall", created_at=AT)


async def test_the_memory_store_is_a_store() -> None:
    store: Store = MemoryStore()
    assert await store.accounts() == ()


def test_a_store_operation_ends_in_one_step_without_an_event_loop() -> None:
    coroutine = MemoryStore().apply(ACME.id, [Put(ACME)], who="test", at=AT)
    with pytest.raises(StopIteration) as end:
        coroutine.send(None)
    assert [change.number for change in end.value.value] == [1]


async def test_a_subscriber_hears_of_each_transaction_until_it_leaves() -> None:
    store, heard = MemoryStore(), list[UUID]()
    leave = store.subscribe(heard.append)
    await store.apply(ACME.id, [Put(ACME), Put(SITE)], who="test", at=AT)
    await store.apply(ACME.id, [Put(SITE)], who="test", at=AT)
    assert heard == [ACME.id], "a Put that changes nothing wakes nobody"
    leave()
    await store.apply(ACME.id, [Remove("site", SITE.id)], who="test", at=AT)
    assert heard == [ACME.id]


async def test_wakeups_tell_of_known_accounts_and_then_of_changed_ones() -> None:
    store = MemoryStore()
    await store.apply(ACME.id, [Put(ACME)], who="test", at=AT)
    with trio.fail_after(10):
        async with store.wakeups() as accounts:
            assert await anext(accounts) == ACME.id
            await store.apply(ACME.id, [Put(SITE)], who="test", at=AT)
            assert await anext(accounts) == ACME.id
