"""A small pool of connections for one trio run.

It opens connections as they are needed, up to a bound; whoever comes beyond it waits in order.
A connection comes back only if it is open and outside of a transaction, and is handed out only if
the server has not hung up meanwhile: so the pool heals by itself after a restart of the database.

When the server's disk hangs, whoever writes waits in a commit that nothing can cut short at the
server's end; who only reads need not suffer from that. So writers never have all places. And a
place is free again only when the server, too, has let go of its connection: the server never has
more of ours than the bound says, however often we have given up.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Final

import attrs
import psycopg
import trio

from actors.store.postgres.connection import TrioConnection

FOR_READERS: Final = 2
"""Places that writers leave, if there are more."""
READ_BYTES: Final = 4_096


@attrs.frozen(kw_only=True)
class PoolStatistics:
    """Connections now (`idle`, `used`; `left`: given up by us, not yet by the server), tasks that
    wait, and totals since the start."""

    idle: int
    used: int
    left: int
    waiting: int
    opened: int
    discarded: int


class Pool:
    """At most `size` connections by one connection string."""

    def __init__(self, conninfo: str, *, size: int) -> None:
        self._conninfo = conninfo
        self._idle: list[TrioConnection] = []
        self._used: set[TrioConnection] = set()
        self._places = trio.Semaphore(size, max_value=size)
        self._writing = trio.Semaphore(max(size - FOR_READERS, 1))
        self._left = 0
        self._opened = 0
        self._discarded = 0
        self._closed = False

    @asynccontextmanager
    async def connection(self, *, writes: bool) -> AsyncIterator[TrioConnection]:
        """Lend a connection, to one who writes or one who only reads. Raises
        psycopg.OperationalError if none can be opened.

        Waits without a bound of its own: wrap it in a timeout.
        """
        with ExitStack() as place:
            for each in (self._writing, self._places) if writes else (self._places,):
                await each.acquire()
                place.callback(each.release)
            connection = self._take() or await self._open()
            self._used.add(connection)
            try:
                yield connection
            finally:
                self._used.discard(connection)
                self._give_back(connection)
                if connection.cut_off is not None:
                    taken = place.pop_all()
                    trio.lowlevel.spawn_system_task(self._await_end, connection.cut_off, taken)

    def close(self) -> None:
        """Close every connection. Tasks that wait on one get a psycopg.OperationalError."""
        self._closed = True
        for connection in (*self._idle, *self._used):
            connection.finish()
        self._idle.clear()

    def statistics(self) -> PoolStatistics:
        """A picture of this moment."""
        return PoolStatistics(
            idle=len(self._idle),
            used=len(self._used),
            left=self._left,
            waiting=sum(each.statistics().tasks_waiting for each in (self._writing, self._places)),
            opened=self._opened,
            discarded=self._discarded,
        )

    def _take(self) -> TrioConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_idle():
                return connection
            self._discard(connection)
        return None

    async def _open(self) -> TrioConnection:
        if self._closed:
            raise psycopg.InterfaceError("the pool is closed")
        connection = await TrioConnection.open(self._conninfo)
        connection.leaves_word = True
        self._opened += 1
        return connection

    def _give_back(self, connection: TrioConnection) -> None:
        if connection.is_idle() and not self._closed:
            self._idle.append(connection)
        else:
            self._discard(connection)

    def _discard(self, connection: TrioConnection) -> None:
        connection.finish()
        self._discarded += 1

    async def _await_end(self, descriptor: int, place: ExitStack) -> None:
        """Keep the place of a connection that was cut off until the server has ended it."""
        self._left += 1
        with place, trio.socket.from_stdlib_socket(socket.socket(fileno=descriptor)) as ours:
            with suppress(OSError):
                while await ours.recv(READ_BYTES):
                    pass
            self._left -= 1
