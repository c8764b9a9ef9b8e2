"""Snapshots of accounts, for questions that are worked out beside the event loop.

How it works. A snapshot is loaded once and then carried forward by the account's changes, so a
question costs what has changed since the one before. Whoever asks has it alone, so of each account
one question is worked out at a time; the work itself is done by one of WORKERS threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar
from uuid import UUID

import attrs
import trio

from actors.policy.conditions import Regions
from actors.policy.engine import Gap, Snapshot
from actors.store.interface import MAX_PAGE, Pruned, Store

T = TypeVar("T")

MAX_SNAPSHOTS: Final = 4
WORKERS: Final = 2
MAX_CATCH_UP: Final = 20_000
"""Whoever is further behind loads the account anew."""


@attrs.define(eq=False)
class _Place:
    """Where the snapshot of one account is kept."""

    lock: trio.Lock = attrs.Factory(trio.Lock)
    snapshot: Snapshot | None = None


class Snapshots:
    """At most MAX_SNAPSHOTS accounts; the one that was asked longest ago gives way."""

    def __init__(self) -> None:
        self._places: OrderedDict[UUID, _Place] = OrderedDict()
        self._workers: trio.CapacityLimiter | None = None

    def __len__(self) -> int:
        return len(self._places)

    @asynccontextmanager
    async def of(self, account_id: UUID, store: Store, regions: Regions) -> AsyncIterator[Snapshot]:
        """The account as it is now: to be read, not changed, and by nobody else meanwhile. Raises
        NotFound and what the store raises."""
        place = self._places.setdefault(account_id, _Place())
        self._places.move_to_end(account_id)
        while len(self._places) > MAX_SNAPSHOTS:
            self._places.popitem(last=False)
        async with place.lock:
            yield await self._forward(account_id, place, store, regions)

    async def work(self, question: Callable[[], T]) -> T:
        """Work something out in a thread. It cannot be stopped, so it must be bounded."""
        if self._workers is None:
            self._workers = trio.CapacityLimiter(WORKERS)
        return await trio.to_thread.run_sync(question, limiter=self._workers)

    async def _forward(
        self, account_id: UUID, place: _Place, store: Store, regions: Regions
    ) -> Snapshot:
        snapshot, caught_up = place.snapshot, 0
        place.snapshot = None  # whatever fails, it is loaded anew
        while snapshot is not None and caught_up < MAX_CATCH_UP:
            try:
                changes = await store.changes(account_id, after=snapshot.number, limit=MAX_PAGE)
                for change in changes:
                    snapshot.apply(change)
            except (Gap, Pruned):
                break
            caught_up += len(changes)
            if len(changes) < MAX_PAGE:
                if snapshot.account is None:
                    break
                place.snapshot = snapshot
                return snapshot
        contents = await store.contents(account_id)
        snapshot = await self.work(lambda: Snapshot.of(contents, regions))
        place.snapshot = snapshot
        return snapshot
