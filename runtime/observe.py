"""Health and metrics of one process, and the small HTTP server that shows them.

The server speaks HTTP/1.1 by h11, knows three paths, and is bounded in everything that a client
may do: connections, size and time of a request, requests on a connection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs
import h11
import msgspec
import trio
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from runtime.net.address import Address, split_host_port
from runtime.net.binding import binding

MAX_REQUEST_BYTES: Final = 8_192
MAX_REQUESTS_PER_CONNECTION: Final = 1_000
MAX_CONNECTIONS: Final = 64
REQUEST_TIMEOUT_NS: Final = 10 * 10**9

_NS_PER_S: Final = 10**9
_RECEIVE_BYTES: Final = 4_096
_CLOSING: Final = frozenset({h11.MUST_CLOSE, h11.CLOSED, h11.ERROR})


@attrs.frozen(kw_only=True)
class Check:
    """One named condition of a process."""

    ok: bool
    detail: str = ""


class Health:
    """The named conditions of a process: it is ready while there is at least one, and all hold.

    Being alive is another matter: a process that answers at all is alive.
    """

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}

    def set(self, name: str, ok: bool, detail: str = "") -> None:
        """State a condition. `detail` is shown to whoever asks: no secrets."""
        self._checks[name] = Check(ok=ok, detail=detail)

    def remove(self, name: str) -> None:
        """Forget a condition; none of that name is fine too."""
        self._checks.pop(name, None)

    @property
    def ready(self) -> bool:
        return bool(self._checks) and all(check.ok for check in self._checks.values())

    def checks(self) -> dict[str, Check]:
        """A copy of every condition, by name."""
        return dict(self._checks)


def make_registry() -> CollectorRegistry:
    """A registry of metrics for this process alone, with those of Python and the process in it.

    Nothing is global, so several components may live in one process (the demo, the tests).
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


async def serve_observability(
    listen: str,
    health: Health,
    registry: CollectorRegistry,
    *,
    task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `/metrics` (Prometheus), `/healthz` and `/readyz` at `listen` ("host:port"), for ever.

    `/healthz` answers 200 while the process turns, `/readyz` 200 or 503, with every check as
    JSON. A request of more than 8 KiB gets 431, one that takes longer than 10 s is cut off,
    and so is a 65th connection. Starts with the address that is bound. Raises CannotListen,
    which names the setting `observability`.
    """
    slots = trio.CapacityLimiter(MAX_CONNECTIONS)
    answer = _routes(health, registry)

    async def handle(stream: trio.SocketStream) -> None:
        try:
            slots.acquire_nowait()
        except trio.WouldBlock:
            await trio.aclose_forcefully(stream)
            return
        try:
            async with stream:
                await _serve_connection(stream, answer)
        finally:
            slots.release()

    with binding("observability", listen):
        host, port = split_host_port(listen)
        listeners = await trio.open_tcp_listeners(port, host=host)
    name = listeners[0].socket.getsockname()
    task_status.started(Address(name[0], name[1]))
    await trio.serve_listeners(handle, listeners)


_Answer = tuple[int, str, bytes]


def _routes(health: Health, registry: CollectorRegistry) -> Callable[[h11.Request], _Answer]:
    def answer(request: h11.Request) -> _Answer:
        path = request.target.split(b"?", 1)[0]
        if path not in (b"/metrics", b"/healthz", b"/readyz"):
            return 404, "text/plain", b"not found\n"
        if request.method not in (b"GET", b"HEAD"):
            return 405, "text/plain", b"method not allowed\n"
        if path == b"/metrics":
            return 200, CONTENT_TYPE_LATEST, generate_latest(registry)
        if path == b"/healthz":
            return 200, "text/plain", b"alive\n"
        body = {"ready": health.ready, "checks": health.checks()}
        return 200 if health.ready else 503, "application/json", msgspec.json.encode(body)

    return answer


async def _serve_connection(
    stream: trio.SocketStream, answer: Callable[[h11.Request], _Answer]
) -> None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST_BYTES)
    try:
        for _ in range(MAX_REQUESTS_PER_CONNECTION):
            with trio.fail_after(REQUEST_TIMEOUT_NS / _NS_PER_S):
                if not await _serve_request(stream, connection, answer):
                    return
    except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
        return


async def _serve_request(
    stream: trio.SocketStream,
    connection: h11.Connection,
    answer: Callable[[h11.Request], _Answer],
) -> bool:
    """Serve one request; False when the connection is to be closed."""
    try:
        request, size = None, 0
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await stream.receive_some(_RECEIVE_BYTES))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                size += len(event.data)
                if size > MAX_REQUEST_BYTES:
                    await _respond(stream, connection, (413, "text/plain", b"too large\n"))
                    return False
            elif isinstance(event, h11.EndOfMessage) and request is not None:
                break
            else:
                return False
    except h11.RemoteProtocolError as error:
        if connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return False
        refusal = (error.error_status_hint, "text/plain", b"bad request\n")
        await _respond(stream, connection, refusal)
        return False
    await _respond(stream, connection, answer(request), with_body=request.method != b"HEAD")
    if connection.our_state in _CLOSING or connection.their_state in _CLOSING:
        return False
    connection.start_next_cycle()
    return True


async def _respond(
    stream: trio.SocketStream,
    connection: h11.Connection,
    answer: _Answer,
    *,
    with_body: bool = True,
) -> None:
    status, content_type, body = answer
    headers = [
        ("Content-Type", content_type),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
    ]
    parts = [h11.Response(status_code=status, headers=headers)]
    data = connection.send(parts[0]) or b""
    if with_body:
        data += connection.send(h11.Data(data=body)) or b""
    data += connection.send(h11.EndOfMessage()) or b""
    await stream.send_all(data)
