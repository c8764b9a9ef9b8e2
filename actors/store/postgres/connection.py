"""A psycopg connection that waits by trio's readiness calls.

psycopg's protocol code is generators that yield what they wait for; its `AsyncConnection` runs
them on asyncio. `TrioConnection` runs the same generators on trio. It leans on private names
(`_connect_gen`, `wait`, `lock`), so psycopg's minor version is pinned.

Cancellation: a wait that is cut short, by whatever, closes the connection at once. Its state
would be unknown, and so would be the server's, which rolls back when it finds the socket closed.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress
from typing import Any, Final, Self, TypeVar, cast

import attrs
import psycopg
import trio
from psycopg import generators
from psycopg.abc import ConnParam, PQGen, PQGenConn
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow, tuple_row
from psycopg.types.string import TextLoader
from psycopg.waiting import Ready, Wait

from actors.store.interface import StoreError

RV = TypeVar("RV")

APPLICATION_ROLE: Final = "holloway_application"
FEED_ROLE: Final = "holloway_feed"
SCHEMA: Final = "holloway"

STATEMENT_TIMEOUT_MS = 5_000
IDLE_TRANSACTION_TIMEOUT_MS = 10_000
CLIENT_CHECK_INTERVAL_MS = 500

LOST = (psycopg.OperationalError, psycopg.InterfaceError, OSError)
"""What a lost, refused or timed-out connection raises; also deadlocks and cut statements."""

_SETTINGS = {
    "search_path": SCHEMA,
    "timezone": "UTC",
    "statement_timeout": str(STATEMENT_TIMEOUT_MS),
    "idle_in_transaction_session_timeout": str(IDLE_TRANSACTION_TIMEOUT_MS),
    # The server gives up the query of a client that has hung up (a cancelled operation).
    "client_connection_check_interval": str(CLIENT_CHECK_INTERVAL_MS),
}
_DEFAULTS = {
    "application_name": "holloway",
    "client_encoding": "UTF8",
    "gssencmode": "disable",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
}


@attrs.frozen(kw_only=True)
class Logins:
    """libpq connection strings, one for each of the three roles."""

    owner: str = attrs.field(repr=False)
    application: str = attrs.field(repr=False)
    feed: str = attrs.field(repr=False)

    @classmethod
    def of(cls, url: str) -> Logins:
        """All three by one login, which takes on the other two roles with SET ROLE.

        `url` is a libpq URL or `key=value` string. Raises StoreError if it is neither (without
        quoting it: it may hold a password).
        """
        return cls(
            owner=_prepared(url),
            application=_prepared(url, role=APPLICATION_ROLE),
            feed=_prepared(url, role=FEED_ROLE),
        )

    @classmethod
    def separate(cls, *, owner: str, application: str, feed: str) -> Logins:
        """Three logins of their own. Raises StoreError as `of` does."""
        return cls(owner=_prepared(owner), application=_prepared(application), feed=_prepared(feed))


class TrioConnection(psycopg.AsyncConnection[TupleRow]):
    """A connection in autocommit mode for one task at a time. JSON arrives as text.

    One that `leaves_word` keeps a descriptor of its socket when a wait is cut short, in `cut_off`,
    for whoever wants to know when the server has let go of it; that one has to close it.
    """

    leaves_word = False
    cut_off: int | None = None

    def __init__(self, pgconn: Any, row_factory: Any = tuple_row) -> None:
        super().__init__(pgconn, row_factory)
        self.lock = cast(Any, trio.Lock())  # psycopg's is an asyncio.Lock with the same methods

    @classmethod
    async def open(cls, conninfo: str) -> Self:
        """Connect to the first host that answers. Raises psycopg.OperationalError.

        Without a bound of its own: wrap it in a timeout.
        """
        error = psycopg.OperationalError("the name of the database's host cannot be resolved")
        for attempt in await _attempts(conninfo):
            try:
                connection = await _drive_connecting(cls._connect_gen(attempt))
            except psycopg.OperationalError as failure:
                error = failure
                continue
            connection.adapters.register_loader("jsonb", TextLoader)
            await connection.set_autocommit(True)
            return connection
        raise error

    async def wait(self, gen: PQGen[RV], interval: float = 0.0, timeout: float | None = None) -> RV:
        """Run one of psycopg's generators. Cut short, it leaves the connection closed."""
        try:
            return await _drive(gen, self.pgconn.socket)
        except psycopg.Error:
            raise
        except BaseException:
            if self.leaves_word and not self.closed:
                self.cut_off = os.dup(self.pgconn.socket)
            self.finish()
            with suppress(psycopg.Error):  # psycopg's way out, which finds no connection any more
                gen.close()
            raise

    async def notifications(self) -> list[str]:
        """Wait for the payloads of at least one notification."""
        backlog = self._notifies_backlog
        if backlog:
            payloads = [notify.payload for notify in backlog]
            backlog.clear()
            return payloads
        while True:
            received = await self.wait(generators.notifies(self.pgconn))
            if received:
                return [each.extra.decode() for each in received]
            if self.pgconn.status != psycopg.pq.ConnStatus.OK:
                raise psycopg.OperationalError("the connection of the feed is lost")

    async def close(self) -> None:
        """Close at once. A task that waits on the connection gets an OperationalError."""
        self.finish()

    def is_idle(self) -> bool:
        """Whether it is open, outside of a transaction, and the server has not hung up."""
        if self.closed or self.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
            return False
        poll = select.poll()
        poll.register(self.pgconn.socket, select.POLLIN)
        return not poll.poll(0)

    def finish(self) -> None:
        if not self.closed:
            with suppress(OSError, psycopg.Error):
                trio.lowlevel.notify_closing(self.pgconn.socket)
        self._closed = True
        self.pgconn.finish()


def _prepared(url: str, *, role: str | None = None) -> str:
    try:
        parameters = conninfo_to_dict(url)
    except psycopg.Error:
        raise StoreError("the database's URL is not a valid connection string") from None
    settings = _SETTINGS | ({"role": role} if role else {})
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    given = str(parameters.pop("options", ""))
    merged: dict[str, ConnParam] = {**_DEFAULTS, **parameters, "options": f"{options} {given}"}
    return make_conninfo("", **merged)


async def _attempts(conninfo: str) -> list[str]:
    """One connection string for each address of each host, names resolved without blocking."""
    parameters = conninfo_to_dict(conninfo)
    hosts = str(parameters.get("host", "")).split(",")
    ports = str(parameters.get("port", "")).split(",")
    attempts = []
    if "hostaddr" in parameters:
        return [conninfo]
    for index, host in enumerate(hosts):
        port = ports[index] if len(ports) == len(hosts) else ports[0]
        each: dict[str, ConnParam] = {**parameters, "host": host, "port": port}
        if not host or host.startswith(("/", "@")):
            attempts.append(make_conninfo("", **each))
            continue
        with suppress(OSError):
            for *_, address in await trio.socket.getaddrinfo(
                host, None, type=trio.socket.SOCK_STREAM
            ):
                attempts.append(make_conninfo("", **{**each, "hostaddr": str(address[0])}))
    return attempts


async def _drive(gen: PQGen[RV], fileno: int) -> RV:
    try:
        wanted = next(gen)
        while True:
            wanted = gen.send(await _readiness(fileno, wanted))
    except StopIteration as end:
        return cast(RV, end.value)


async def _drive_connecting(gen: PQGenConn[RV]) -> RV:
    try:
        fileno, wanted = next(gen)
        while True:
            fileno, wanted = gen.send(await _readiness(fileno, wanted))
    except StopIteration as end:
        return cast(RV, end.value)


async def _readiness(fileno: int, wanted: Wait) -> Ready:
    try:
        if wanted == Wait.R:
            await trio.lowlevel.wait_readable(fileno)
            return Ready.R
        if wanted == Wait.W:
            await trio.lowlevel.wait_writable(fileno)
            return Ready.W
        return await _either(fileno)
    except trio.ClosedResourceError:
        raise psycopg.OperationalError("the connection was closed") from None


async def _either(fileno: int) -> Ready:
    with select.epoll() as both:
        both.register(fileno, select.EPOLLIN | select.EPOLLOUT)
        await trio.lowlevel.wait_readable(both.fileno())
        ((_, events),) = both.poll(0)
    readable = Ready.R if events & ~select.EPOLLOUT else 0
    writable = Ready.W if events & select.EPOLLOUT else 0
    return Ready(readable | writable)
