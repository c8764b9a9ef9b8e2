"""The memory store against the naive model; the PostgreSQL store is in tests/system."""

from __future__ import annotations

from actors.store.interface import Store
from actors.store.memory import MemoryStore
from tests.store_machine import check_stores


async def test_the_memory_store_does_what_the_model_says() -> None:
    async def make_stores() -> list[Store]:
        return [MemoryStore()]

    await check_stores(make_stores, examples=80, steps=25)
