"""Questions of one account do not stand in the way of those of others."""

from __future__ import annotations

import threading
from uuid import UUID

import trio
import trio.testing

from portal.api.snapshots import WORKERS, Snapshots

A, B = UUID(int=1), UUID(int=2)


async def test_no_account_has_more_than_one_worker() -> None:
    snapshots, goes_on, asked = Snapshots(), threading.Event(), 3 * WORKERS
    answers: list[str] = []

    async def ask() -> None:
        answers.append(await snapshots.work(A, lambda: f"{goes_on.wait(30)}"))

    async with trio.open_nursery() as nursery:
        for _ in range(asked):
            nursery.start_soon(ask)
        try:
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(10):
                assert await snapshots.work(B, lambda: "b") == "b"
        finally:
            goes_on.set()
    assert answers == ["True"] * asked


async def test_no_account_is_read_as_a_whole_more_than_once_at_a_time() -> None:
    snapshots = Snapshots()
    reading: list[UUID] = []

    async def read(account_id: UUID) -> None:
        async with snapshots.whole(account_id):
            reading.append(account_id)
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for account_id in (A, A, B):
            nursery.start_soon(read, account_id)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(reading) == [A, B]
        nursery.cancel_scope.cancel()
