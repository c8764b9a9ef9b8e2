"""What the memory store keeps beside entities: answers, uses of tokens, when devices were seen,
logs, and how long all that lasts. A part of `actors.store.memory`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from uuid import UUID

from actors.logs import KIND_OF_LOG, LOG_FILTERS, LOG_KINDS, LOG_RETENTION, Log, LogKind, Seen
from actors.model import Account, Retention, Token
from actors.store.interface import ANSWER_KEPT, Answer, Expired, InvalidReference
from actors.store.memory_nodes import MemoryNodes
from actors.store.memory_transaction import Book, Tables
from actors.store.rules import check_ids, check_instant, check_limit, check_logs, check_seen
from actors.store.validity import check_filters, kind_of
from runtime.clock import Clock

_Rows = dict[tuple[UUID, UUID, datetime], Log]


class MemoryRecords(MemoryNodes):
    """The part of the memory store that remembers without changing an account."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._books: dict[UUID, Book] = {}
        self._tables = Tables()
        self._logs: dict[LogKind, _Rows] = {kind: {} for kind in LOG_KINDS}

    # --- answers, tokens, devices ---

    async def answer_of(self, token_id: UUID, key: str) -> Answer | None:
        """See `Store.answer_of`."""
        return self._tables.answers.get((token_id, key))

    async def find_token(self, id: UUID) -> Token | None:
        """See `Store.find_token`."""
        account_id = self._tables.token_accounts.get(id)
        if account_id is None:
            return self._tables.installation_tokens.get(id)
        token = self._books[account_id].entities["token"][id]
        assert isinstance(token, Token)
        return token

    async def use_token(self, id: UUID, *, at: datetime) -> bool:
        """See `Store.use_token`. False also for a token that does not exist."""
        token = await self.find_token(id)
        uses = self._tables.token_uses.get(id, 0)
        if token is None or (token.max_uses is not None and uses >= token.max_uses):
            return False
        self._tables.token_uses[id] = uses + 1
        await self.note_used(id, at=at)
        return True

    async def note_used(self, id: UUID, *, at: datetime) -> None:
        """See `Store.note_used`."""
        check_instant(at)
        used_at = self._tables.token_used_at.get(id)
        if self._tables.has_token(id) and (used_at is None or used_at < at):
            self._tables.token_used_at[id] = at

    async def last_used(
        self, account_id: UUID | None, ids: Collection[UUID]
    ) -> dict[UUID, datetime]:
        """See `Store.last_used`."""
        check_ids(ids)
        return {
            id: self._tables.token_used_at[id]
            for id in sorted(ids)
            if id in self._tables.token_used_at
            and self._tables.token_accounts.get(id) == account_id
        }

    async def note_seen(self, account_id: UUID, seen: Sequence[Seen]) -> None:
        """See `Store.note_seen`."""
        check_seen(seen)
        book = self._books.get(account_id)
        if book is None:
            return
        for each in seen:
            if not any(each.device_id in book.entities[kind] for kind in ("client", "gateway")):
                continue
            known = book.seen.get(each.device_id)
            if known is None or known.at < each.at:
                book.seen[each.device_id] = each

    async def seen(self, account_id: UUID, ids: Collection[UUID]) -> dict[UUID, Seen]:
        """See `Store.seen`."""
        check_ids(ids)
        book = self._books.get(account_id)
        known = book.seen if book else {}
        return {id: known[id] for id in sorted(ids) if id in known}

    # --- logs ---

    async def write_logs(self, rows: Sequence[Log]) -> None:
        """See `Store.write_logs`."""
        check_logs(rows)
        for row in rows:
            if row.account_id not in self._books:
                raise InvalidReference(kind_of(row), "account_id")
        for row in rows:
            table = self._logs[KIND_OF_LOG[type(row)]]
            table.setdefault((row.account_id, row.id, row.at), row)

    async def logs(
        self,
        account_id: UUID,
        kind: LogKind,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        equals: Mapping[str, UUID] | None = None,
        before: UUID | None = None,
        limit: int = 100,
    ) -> tuple[Log, ...]:
        """See `Store.logs`."""
        check_limit(limit)
        wanted = equals or {}
        check_filters(wanted, LOG_FILTERS[kind])
        rows = [
            row
            for row in self._logs[kind].values()
            if row.account_id == account_id
            and (since is None or row.at >= since)
            and (until is None or row.at < until)
            and (before is None or row.id < before)
            and all(getattr(row, name) == value for name, value in wanted.items())
        ]
        rows.sort(key=lambda row: (row.id, row.at), reverse=True)
        return tuple(rows[:limit])

    async def expire(self, at: datetime) -> Expired:
        """See `Store.expire`. There are no partitions."""
        check_instant(at)
        answers = self._tables.answers
        late = [key for key, answer in answers.items() if answer.at <= at - ANSWER_KEPT]
        for key in late:
            del answers[key]
        return Expired(
            changes=sum(self._prune_changes(id, book, at) for id, book in self._books.items()),
            authorizations=sum(
                self._prune_authorizations(id, book, at) for id, book in self._books.items()
            ),
            logs=sum(self._prune_logs(kind, at) for kind in LOG_KINDS),
            answers=len(late),
        )

    def _retention(self, account_id: UUID) -> Retention | None:
        book = self._books.get(account_id)
        account = book and book.entities["account"].get(account_id)
        return account.retention if isinstance(account, Account) else None

    def _prune_changes(self, account_id: UUID, book: Book, at: datetime) -> int:
        retention = self._retention(account_id) or Retention()
        horizon = at - timedelta(days=retention.changes_days)
        count = 0
        while count < len(book.changes) and book.changes[count].at < horizon:
            count += 1
        del book.changes[:count]
        book.pruned += count
        return count

    def _prune_authorizations(self, account_id: UUID, book: Book, at: datetime) -> int:
        retention = self._retention(account_id) or Retention()
        horizon = at - timedelta(days=retention.authorizations_days)
        every = book.authorizations
        gone = [id for id, each in every.items() if (each.ended_at or each.expires_at) < horizon]
        for id in gone:
            del every[id]
        return len(gone)

    def _prune_logs(self, kind: LogKind, at: datetime) -> int:
        rows = self._logs[kind]
        gone = []
        for key, row in rows.items():
            retention = self._retention(row.account_id)
            days = 0 if retention is None else getattr(retention, LOG_RETENTION[kind])
            if retention is None or row.at < at - timedelta(days=days):
                gone.append(key)
        for key in gone:
            del rows[key]
        return len(gone)
