"""The request log of each account: a row for each call that concerned it, written behind.

A call does not wait for its row: rows are gathered, and written by the batch. What a database that
is away keeps waiting is bounded; beyond that the oldest rows are lost, and counted.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

import trio

from actors.logs import RequestLog
from actors.store.interface import MAX_LOGS, Store, StoreError
from channel.messages import IpText
from portal.api.authentication import Caller
from portal.api.call import Call
from portal.api.requests import canonical_source
from runtime.clock import Clock
from runtime.service import get_logger

MAX_WAITING: Final = 10_000
WRITE_EVERY_S: Final = 1.0
PATIENCE_S: Final = 5.0
MAX_AGENT: Final = 255
MAX_PATH: Final = 512

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f]")

log = get_logger("portal.api")


class RequestJournal:
    """Rows that wait to be written; `run` writes them."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._waiting: deque[RequestLog] = deque()
        self._lost = 0

    def statistics(self) -> dict[str, int]:
        """Rows that wait now, and those that were lost since the start."""
        return {"waiting_rows": len(self._waiting), "lost_rows": self._lost}

    def record(
        self, scope: Mapping[str, Any], call: Call, *, id: UUID, status: int, duration_ns: int
    ) -> None:
        """Note a call, if it is known which account it concerned. Its path is one of ours by now:
        what no route knows may hold anything, and comes to no account."""
        caller = scope["state"].get("caller")
        account_id = call.account_id or (caller.account_id if caller else None)
        if account_id is None or not isinstance(caller, Caller) or not status:
            return
        client = scope.get("client")
        source = canonical_source(client[0]) if client else None
        agent = dict(scope["headers"]).get(b"user-agent", b"").decode("latin-1")
        self._waiting.append(
            RequestLog(
                id=id,
                account_id=account_id,
                at=self._clock.utc_now(),
                token_id=caller.token_id,
                principal_id=caller.principal_id,
                method=scope["method"],
                path=_UNPRINTABLE.sub("?", scope["path"])[:MAX_PATH],
                status=status,
                code=call.code,
                remote_ip=IpText(str(source)) if source else None,
                user_agent=_UNPRINTABLE.sub("?", agent)[:MAX_AGENT],
                duration_us=duration_ns // 1_000,
            )
        )
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            self._lost += 1

    async def run(self) -> None:
        """Write what waits, for ever; once more when it is cancelled."""
        try:
            while True:
                await trio.sleep(WRITE_EVERY_S)
                await self.flush()
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(PATIENCE_S):
                await self.flush()

    async def flush(self) -> None:
        """Write what waits now. A store that is away keeps it waiting."""
        while self._waiting:
            batch = [self._waiting[i] for i in range(min(len(self._waiting), MAX_LOGS))]
            try:
                await self._store.write_logs(batch)
            except StoreError as error:
                log.warning("request_log_delayed", error=type(error).__name__)
                return
            written = {row.id for row in batch}
            while self._waiting and self._waiting[0].id in written:
                self._waiting.popleft()
