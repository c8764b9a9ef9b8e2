"""The clerk of a node: writes down who was connected, and what flowed, in batches.

Nobody waits for it. What it is told it keeps in memory, within limits, and writes a quarter of a
second later, many rows at a time; while the store is away it keeps what it has, and forgets the
oldest above MAX_ROWS. What a node that dies has not written yet is lost: a log says what happened,
and nothing depends on it.

Of devices and tokens it writes when they were last seen, each once for many times that it was told.
A refusal that repeats itself (an agent that dials again and again) is one row in ten minutes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Any, ClassVar
from uuid import UUID

import attrs
import structlog

from actors.logs import Log, Seen, SessionLog
from actors.messages import ClerkStatistics, ClerkStatisticsRequest, DeviceSeen, LogRows
from actors.store.interface import MAX_LOGS, Store, Unavailable
from runtime.actor import Actor, Timer, handles

WRITE_AFTER_NS = 250 * 10**6
AGAIN_NS = 10**9
"""The pause after the store could not be reached."""
TURN_NS = 10**6
"""The pause between two batches, in which others have their turn."""
MAX_ROWS = 20_000
MAX_DEVICES = 100_000
SEEN_AT_ONCE = 100
REFUSED_AGAIN_NS = 600 * 10**9
MAX_REFUSED = 10_000
"""Refusals that are remembered."""

_log = structlog.get_logger("holloway.clerk")


@attrs.frozen
class _Write:
    """Write what waits."""


class Clerk(Actor):
    """One on each node, registered as `CLERK`. See the module."""

    mailbox_limit: ClassVar[int] = 50_000

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows: deque[Log] = deque()
        self._seen: dict[UUID, tuple[UUID, Seen]] = {}
        self._used: dict[UUID, datetime] = {}
        self._refused: OrderedDict[tuple[UUID, str, str], int] = OrderedDict()
        self._written = 0
        self._lost = 0
        self._lost_told = 0
        self._timer: Timer | None = None

    @handles(LogRows)
    def _on_rows(self, message: LogRows) -> None:
        self._rows.extend(row for row in message.rows if not self._is_repeated(row))
        while len(self._rows) > MAX_ROWS:
            self._rows.popleft()
            self._lost += 1
        self._write_after(WRITE_AFTER_NS)

    @handles(DeviceSeen)
    def _on_seen(self, message: DeviceSeen) -> None:
        seen = message.seen
        if len(self._seen) < MAX_DEVICES or seen.device_id in self._seen:
            self._seen[seen.device_id] = (message.account_id, seen)
        if len(self._used) < MAX_DEVICES or message.token_id in self._used:
            self._used[message.token_id] = seen.at
        self._write_after(WRITE_AFTER_NS)

    @handles(ClerkStatisticsRequest)
    def _on_statistics(self, message: ClerkStatisticsRequest) -> ClerkStatistics:
        return ClerkStatistics(
            rows_waiting=len(self._rows),
            devices_waiting=len(self._seen),
            rows_written=self._written,
            rows_lost=self._lost,
        )

    def _is_repeated(self, row: Log) -> bool:
        if not isinstance(row, SessionLog) or row.event != "refused":
            return False
        key, now_ns = (row.token_id, row.reason, str(row.remote_ip)), self.context.now()
        last_ns = self._refused.get(key)
        if last_ns is not None and now_ns < last_ns + REFUSED_AGAIN_NS:
            return True
        self._refused.pop(key, None)
        self._refused[key] = now_ns
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)
        return False

    def _write_after(self, delay_ns: int) -> None:
        if self._timer is None or not self._timer.pending:
            self._timer = self.send_after(delay_ns, _Write())

    @handles(_Write)
    async def _on_write(self, message: _Write) -> None:
        """One batch of each; the rest after a pause."""
        if self._lost != self._lost_told:
            _log.warning("log_rows_lost", rows=self._lost - self._lost_told)
            self._lost_told = self._lost
        try:
            await self._write_rows()
            await self._write_seen()
        except Unavailable:
            self._write_after(AGAIN_NS)
            return
        if self._rows or self._seen or self._used:
            self._write_after(TURN_NS)

    async def _write_rows(self) -> None:
        batch = [self._rows[place] for place in range(min(len(self._rows), MAX_LOGS))]
        if not batch:
            return
        refused = await self._is_refused(self._store.write_logs, batch)
        for row in batch:
            if refused and await self._is_refused(self._store.write_logs, [row]):
                self._lost += 1  # it is of an account that is gone, or holds what none may
            else:
                self._written += 1
            self._rows.popleft()

    async def _write_seen(self) -> None:
        by_account: dict[UUID, list[Seen]] = {}
        for account_id, seen in islice(self._seen.values(), SEEN_AT_ONCE):
            by_account.setdefault(account_id, []).append(seen)
        for account_id, batch in by_account.items():
            if await self._is_refused(self._store.note_seen, account_id, batch):
                for seen in batch:  # which one it is
                    await self._is_refused(self._store.note_seen, account_id, [seen])
            for seen in batch:
                del self._seen[seen.device_id]
        for token_id in list(self._used)[:SEEN_AT_ONCE]:
            await self._is_refused(self._store.note_used, token_id, at=self._used[token_id])
            del self._used[token_id]

    async def _is_refused(
        self, write: Callable[..., Awaitable[None]], *arguments: Any, **keywords: Any
    ) -> bool:
        """Write; True if the store will not have it, however often it is tried. Whatever is wrong
        with a row, the tree of actors does not suffer for it. Raises Unavailable."""
        try:
            await self.perform(partial(write, *arguments, **keywords))
        except Unavailable:
            raise
        except Exception as error:
            _log.warning("not_written", error=type(error).__name__)
            return True
        return False
