"""Live events of accounts, for those who read them as a stream (see `portal.api.events`).

How it works. A `Reader` has a position, the number of the last change that it sent, and fetches
what comes after it, so nothing is kept for it and no change is missed, however slow it is. What
wakes it is a hint: of the store (an account changed), of the actors (somebody came or went), or its
own heartbeat, by which it looks anyway. Presence has no past to read again: it waits in a queue of
MAX_PRESENCES, and a reader that does not take it is sent away with a word.

The actors say who comes and goes when it happens, on whatever node. Since such a word can be lost
(with the node that had it to say), who is online is asked every PRESENCE_CHECK_S, and what was
missed is told then.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable
from datetime import datetime
from typing import Final, Literal
from uuid import UUID

import attrs
import msgspec
import trio

from actors.messages import PresenceChanged
from actors.model import Change
from actors.store.interface import Pruned, Store, StoreError
from portal.api.authentication import Authenticator, Caller
from portal.api.changes import ChangeView
from portal.api.office import Live, Online
from portal.api.problems import Problem, unavailable
from portal.api.scopes import allows, missing
from runtime.clock import Clock
from runtime.service import get_logger

MAX_READERS: Final = 256
MAX_READERS_PER_TOKEN: Final = 8
MAX_READERS_PER_ACCOUNT: Final = 64
"""Its admins may make tokens without end: no account takes all places of a node."""
MAX_PRESENCES: Final = 1_000
BATCH: Final = 100
HEARTBEAT_S: Final = 15.0
PRESENCE_CHECK_S: Final = 30.0
RECHECK_S: Final = 1.0
RETRY_MS: Final = 2_000
SCOPE: Final = "events:read"
GUARDING: Final = frozenset({"account", "principal", "token"})
"""Kinds of entities whose change may cost a caller its right to read on."""

log = get_logger("portal.api.events")


class PresenceEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A client or gateway came or went. `remote_ip` is where its channel comes from."""

    kind: Literal["client", "gateway"]
    id: UUID
    online: bool
    remote_ip: str | None


class EndEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The last event: why the stream ends. `code` is that of a problem, or `gap` (changes after
    the one that was asked for are not kept any more), `too_slow`, `draining`, `account_deleted`."""

    code: str
    detail: str


@attrs.define(eq=False)
class _Audience:
    """The readers of one account at this node, and who they were told is online."""

    readers: set[Reader] = attrs.Factory(set)
    online: dict[UUID, Online] | None = None


class Feeds:
    """All streams of one node. `run` and `follow` serve them; without these, readers still see
    every change, within HEARTBEAT_S."""

    def __init__(
        self, store: Store, clock: Clock, live: Live, authenticator: Authenticator
    ) -> None:
        self._store = store
        self._clock = clock
        self._live = live
        self._authenticator = authenticator
        self._audiences: dict[UUID, _Audience] = {}
        self._by_token: Counter[UUID] = Counter()
        self._is_closed = False

    def __len__(self) -> int:
        return self._by_token.total()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hear who comes and goes, ask now and then, and look after the callers, for ever."""
        self._live.watch(self._presence_changed)
        task_status.started()
        next_check = -math.inf
        while True:
            if trio.current_time() >= next_check:
                next_check = trio.current_time() + PRESENCE_CHECK_S
                for account_id in tuple(self._audiences):
                    await self._check_presence(account_id)
            self.recheck_operators()  # at other nodes nothing else tells of it
            await trio.sleep(RECHECK_S)

    def recheck_operators(self) -> None:
        """A token of the installation was deleted: look at once at whom no feed tells of it."""
        for reader in self._readers():
            if reader.caller.account_id is None:
                reader.recheck()

    async def follow(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Have readers woken by the store's own hints, for ever. A node that follows these already
        calls `wake` instead."""
        async with self._store.wakeups() as accounts:
            task_status.started()
            async for account_id in accounts:
                self.wake(account_id)

    def wake(self, account_id: UUID) -> None:
        """The account changed, or may have."""
        audience = self._audiences.get(account_id)
        for reader in () if audience is None else tuple(audience.readers):
            reader.wake()

    def close(self) -> None:
        """This node is about to end: every reader is told to go to another one."""
        self._is_closed = True
        for reader in self._readers():
            reader.end("draining", "This node is going down. Read on at another one.")

    def open(self, caller: Caller, account_id: UUID, source: str, after: int) -> Reader:
        """A stream of the changes after this one. `close` of the reader ends it; `greet` is to be
        called before it is read.

        Raises Problem: 429 for too many streams of one token or account, 503 for too many of all.
        """
        if self._is_closed or len(self) >= MAX_READERS:
            raise unavailable("This node has as many streams as it takes. Try again shortly.")
        if self._by_token[caller.token_id] >= MAX_READERS_PER_TOKEN:
            raise Problem(
                429,
                "too_many_streams",
                f"A token may read {MAX_READERS_PER_TOKEN} streams at once. End one of them.",
                headers={"Retry-After": str(round(HEARTBEAT_S))},
            )
        audience = self._audiences.get(account_id) or _Audience()
        if len(audience.readers) >= MAX_READERS_PER_ACCOUNT:
            raise Problem(
                429,
                "too_many_streams",
                f"An account may have {MAX_READERS_PER_ACCOUNT} streams at one node. End one of"
                " them.",
                headers={"Retry-After": str(round(HEARTBEAT_S))},
            )
        reader = Reader(self, caller, account_id, source, after)
        self._by_token[caller.token_id] += 1
        self._audiences[account_id] = audience
        audience.readers.add(reader)
        return reader

    async def greet(self, reader: Reader) -> None:
        """See who is online at first, if nobody else reads of the account."""
        audience = self._audiences[reader.account_id]
        if audience.online is None:
            await self._check_presence(reader.account_id)

    def leave(self, reader: Reader) -> None:
        """The reader is gone."""
        self._by_token[reader.caller.token_id] -= 1
        if not self._by_token[reader.caller.token_id]:
            del self._by_token[reader.caller.token_id]
        audience = self._audiences[reader.account_id]
        audience.readers.discard(reader)
        if not audience.readers:
            del self._audiences[reader.account_id]

    async def changes(self, account_id: UUID, after: int) -> tuple[Change, ...]:
        """The next BATCH of them. Raises Pruned, and what the store raises."""
        return await self._store.changes(account_id, after=after, limit=BATCH)

    async def admit_again(self, caller: Caller, source: str) -> Caller:
        """The caller, if it may still read. Raises Problem, and what the store raises."""
        now = await self._authenticator.admit_again(caller, source)
        if not allows(now.scopes, SCOPE):
            raise missing(SCOPE)
        return now

    def seconds_until(self, instant: datetime | None) -> float:
        """Never below 0; for ever until None."""
        if instant is None:
            return math.inf
        return max(0.0, (instant - self._clock.utc_now()).total_seconds())

    # --- presence ---

    def _presence_changed(self, change: PresenceChanged) -> None:
        audience = self._audiences.get(change.account_id)
        if audience is None or audience.online is None:
            return
        known = audience.online.get(change.id)
        if change.online:
            if known is not None and known.number >= change.number:
                return
            online = Online(kind=change.kind, remote_ip=str(change.remote), number=change.number)
            self._tell(audience, change.id, online, online.kind)
        elif known is not None and known.number == change.number:
            self._tell(audience, change.id, None, known.kind)

    async def _check_presence(self, account_id: UUID) -> None:
        """Ask who is online, and tell what was missed."""
        found = await self._live.online(account_id)
        audience = self._audiences.get(account_id)
        if audience is None or found is None:
            return
        before, is_first = audience.online or {}, audience.online is None
        if is_first:
            audience.online = dict(found)
            return
        for id in before.keys() - found.keys():
            self._tell(audience, id, None, before[id].kind)
        for id, online in found.items():
            known = before.get(id)
            if known is None or known.number < online.number:
                self._tell(audience, id, online, online.kind)

    def _tell(
        self,
        audience: _Audience,
        id: UUID,
        online: Online | None,
        kind: Literal["client", "gateway"],
    ) -> None:
        assert audience.online is not None
        if online is None:
            audience.online.pop(id, None)
        else:
            audience.online[id] = online
        event = PresenceEvent(
            kind=kind,
            id=id,
            online=online is not None,
            remote_ip=None if online is None else online.remote_ip,
        )
        for reader in tuple(audience.readers):
            reader.tell(event)

    def _readers(self) -> Iterable[Reader]:
        return tuple(reader for audience in self._audiences.values() for reader in audience.readers)


class Reader:
    """One stream: an asynchronous iterator of blocks of events, as they go over the wire."""

    def __init__(
        self, feeds: Feeds, caller: Caller, account_id: UUID, source: str, after: int
    ) -> None:
        self.caller = caller
        self.account_id = account_id
        self._feeds = feeds
        self._source = source
        self._position = after
        self._presences: deque[PresenceEvent] = deque()
        self._woken = trio.Event()
        self._has_changed = True
        self._is_doubtful = False
        self._last: EndEvent | None = None
        self._is_begun = self._is_over = False

    # --- what others say ---

    def wake(self) -> None:
        """There may be changes."""
        self._has_changed = True
        self._woken.set()

    def recheck(self) -> None:
        """The caller may have lost its right."""
        self._is_doubtful = True
        self._woken.set()

    def tell(self, event: PresenceEvent) -> None:
        """Somebody came or went."""
        if len(self._presences) >= MAX_PRESENCES:
            self._presences.clear()
            self.end("too_slow", "You read too slowly. Read on from the last id, and list anew.")
            return
        self._presences.append(event)
        self._woken.set()

    def end(self, code: str, detail: str) -> None:
        """The stream is over once this was said."""
        self._last = self._last or EndEvent(code=code, detail=detail)
        self._woken.set()

    def close(self) -> None:
        """Whatever happened to the caller. To be called once."""
        self._feeds.leave(self)

    # --- what is sent ---

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._is_begun:
            self._is_begun = True
            return f"retry: {RETRY_MS}\n\n".encode()
        while not self._is_over:
            try:
                block = await self._next()
            except Pruned:
                self.end("gap", "Changes after the last id are not kept any more. List anew.")
            except Problem as problem:
                self.end(problem.code, problem.detail)
            except StoreError as error:
                log.warning("events_delayed", error=type(error).__name__)
                await self._wait()
                return b": the database is away\n\n"
            else:
                if block:
                    return block
            if self._last is not None:
                self._is_over = True
                return encode("end", self._last)
        raise StopAsyncIteration

    async def _next(self) -> bytes:
        """What there is to say; nothing if the stream ends. Waits, HEARTBEAT_S at most."""
        if self._is_doubtful:
            await self._recheck()
        if self._last is not None:
            return b""
        presences = [encode("presence", each) for each in self._presences]
        self._presences.clear()
        if presences:
            return b"".join(presences)
        if self._has_changed:
            self._has_changed = False
            changes = await self._changes()
            if changes:
                return b"".join(
                    encode("change", ChangeView.of(each), id=each.number) for each in changes
                )
        return b"" if await self._wait() else b": still here\n\n"

    async def _recheck(self) -> None:
        self._is_doubtful = False  # first: whoever doubts meanwhile is to be heard again
        try:
            self.caller = await self._feeds.admit_again(self.caller, self._source)
        except StoreError:
            self._is_doubtful = True
            raise

    async def _changes(self) -> tuple[Change, ...]:
        """The next ones, up to one that may cost the caller its right: that is looked at first."""
        try:
            changes = await self._feeds.changes(self.account_id, self._position)
        except StoreError:
            self._has_changed = True
            raise
        if not changes:
            return ()
        for place, each in enumerate(changes):
            if each.kind in GUARDING:
                self._is_doubtful = True
                changes = changes[: place + 1]
                break
        self._position = changes[-1].number
        self._has_changed = True  # there may be more
        if any(each.kind == "account" and each.after is None for each in changes):
            self.end("account_deleted", "The account was deleted.")
        return changes

    async def _wait(self) -> bool:
        """Until something happens: True; or HEARTBEAT_S are over, or the token has expired."""
        expires_in_s = self._feeds.seconds_until(self.caller.expires_at)
        with trio.move_on_after(min(HEARTBEAT_S, expires_in_s)):
            await self._woken.wait()
        happened = self._woken.is_set()
        self._woken = trio.Event()
        if not happened:
            self._has_changed = True
            self._is_doubtful = True
        return happened


def encode(name: str, data: object, *, id: int | None = None) -> bytes:
    """One event as the HTML standard has it (section 9.2.6); JSON has no line feed."""
    line = b"" if id is None else b"id: %d\n" % id
    return line + b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"
