"""A small pool of connections for one trio run.

It opens connections as they are needed, up to a bound; whoever comes beyond it waits in order.
A connection comes back only if it is open and outside of a transaction, and is handed out only if
the server has not hung up meanwhile: so the pool heals by itself after a restart of the database.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import psycopg
import trio

from actors.store.postgres.connection import TrioConnection


@attrs.frozen(kw_only=True)
class PoolStatistics:
    """Connections now (`idle`, `used`), tasks that wait, and totals since the start."""

    idle: int
    used: int
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
        self._opened = 0
        self._discarded = 0
        self._closed = False

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[TrioConnection]:
        """Lend a connection. Raises psycopg.OperationalError if none can be opened.

        Waits without a bound of its own: wrap it in a timeout.
        """
        async with self._places:
            connection = self._take() or await self._open()
            self._used.add(connection)
            try:
                yield connection
            finally:
                self._used.discard(connection)
                self._give_back(connection)

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
            waiting=self._places.statistics().tasks_waiting,
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
