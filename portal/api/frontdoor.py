"""What every call passes before it reaches a handler: limits in size and time, and the log.

The body is read here, whole, so that handlers never wait for a slow sender and a body that is too
large is refused exactly. What is too large is still read (and dropped) up to a bound, since a
sender that is cut off while sending never sees the answer.
"""

from __future__ import annotations

import math
from collections import Counter
from hashlib import sha256
from http import HTTPStatus
from typing import Any, Final
from uuid import UUID

import trio
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from portal.api.authentication import Caller, network_of
from portal.api.call import STATE_KEY, Call
from portal.api.feeds import Feeds
from portal.api.journal import RequestJournal
from portal.api.problems import MEDIA_TYPE, Problem, unavailable
from portal.metrics import CallMetrics
from runtime.clock import Clock
from runtime.randomness import Randomness, uuid7
from runtime.service import get_logger

MAX_BODY_BYTES: Final = 1 << 20
MAX_BODY_BYTES_OF: Final = dict.fromkeys(("/v1/declaration/plan", "/v1/declaration/apply"), 4 << 20)
"""The paths that take more: a whole account of 10,000 users."""
MAX_DROPPED_BYTES: Final = 16 << 20
MAX_BUFFERED_BYTES: Final = 64 << 20
MAX_BUFFERED_BYTES_OF_SOURCE: Final = 16 << 20
"""Of one IPv4 address or IPv6 /64: bodies come before tokens, so a stranger could take all."""
BODY_TIME_S: Final = 20.0
HANDLER_TIME_S: Final = 30.0
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
EVENT_STREAM: Final = b"text/event-stream"
HARDENING: Final = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class FrontDoor:
    """An ASGI application around another, which `description` (OpenAPI) describes.

    One log line for each call: method, path template (never the path itself, which may hold
    anything), status, duration, token id, request id.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        description: dict[str, Any],
        feeds: Feeds,
        journal: RequestJournal,
        clock: Clock,
        randomness: Randomness,
        metrics: CallMetrics | None = None,
    ) -> None:
        self.description = description
        self.feeds = feeds
        self.journal = journal
        self._app = app
        self._clock = clock
        self._randomness = randomness
        self._metrics = metrics
        self._log = get_logger("portal.api")
        self._buffered_bytes = 0
        self._buffered_by_source: Counter[str] = Counter()
        self._open_calls = 0

    def statistics(self) -> dict[str, int]:
        """Calls in progress, bytes of their bodies held in memory, streams of events, and
        rows of the request log."""
        return {
            "open_calls": self._open_calls,
            "buffered_bytes": self._buffered_bytes,
            "streams": len(self.feeds),
            **self.journal.statistics(),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            if scope["type"] == ScopeType.WEBSOCKET:  # answered by 403
                await send({"type": "websocket.close", "code": 1000, "reason": None})
            return
        started_ns = self._clock.monotonic_ns()
        request_id = uuid7(self._clock, self._randomness)
        call = Call(request_id=str(request_id), method=scope["method"])
        scope["state"] = {STATE_KEY: call}  # never that of the call before
        answer = _Answer(send, call, scope["http_version"])
        self._open_calls += 1
        try:
            await self._answer(scope, receive, answer, call)
        finally:
            self._open_calls -= 1
            for end in call.at_end:
                end()
            self._record(scope, answer.status, started_ns, request_id)

    async def _answer(
        self, scope: HTTPScope, receive: Receive, answer: _Answer, call: Call
    ) -> None:
        held = 0
        source = _source_of(scope)
        try:
            try:
                with trio.fail_after(BODY_TIME_S):
                    body = await self._read_body(scope, receive, source)
            except trio.TooSlowError:
                detail = f"The body did not arrive within {BODY_TIME_S:.0f} s. Send it again."
                raise Problem(408, "too_slow", detail) from None
            if body is None:
                return  # the caller hung up
            held = len(body)
            call.body_hash = sha256(body).digest() if body else b""
            with trio.move_on_after(HANDLER_TIME_S) as scope_of_time:
                answer.time = scope_of_time
                await self._app(scope, _replay(body, receive), answer)
            if scope_of_time.cancelled_caught and answer.status is None:
                raise unavailable(
                    "The call took too long and was stopped. See what was done, then try again."
                )
        except Problem as problem:
            await answer.problem(problem)
        finally:
            self._hold(source, -held)

    def _hold(self, source: str, count: int) -> None:
        """Count bytes that are held for a source from now on, or no more."""
        self._buffered_bytes += count
        self._buffered_by_source[source] += count
        if not self._buffered_by_source[source]:
            del self._buffered_by_source[source]

    async def _read_body(self, scope: HTTPScope, receive: Receive, source: str) -> bytes | None:
        """The body, counted by `_hold`; None if the caller hung up meanwhile."""
        most = MAX_BODY_BYTES_OF.get(scope["path"], MAX_BODY_BYTES)
        too_large = _announced_bytes(scope) > most
        body = bytearray()
        dropped = 0
        try:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    self._hold(source, -len(body))
                    return None
                part = message.get("body", b"")
                if too_large or len(body) + len(part) > most:
                    too_large = True
                    dropped += len(part) + len(body)
                    self._hold(source, -len(body))
                    body.clear()
                else:
                    body += part
                    self._hold(source, len(part))
                if (
                    self._buffered_bytes > MAX_BUFFERED_BYTES
                    or self._buffered_by_source[source] > MAX_BUFFERED_BYTES_OF_SOURCE
                ):
                    raise unavailable("Too many bodies are being received. Try again shortly.")
                if not message.get("more_body", False) or dropped > MAX_DROPPED_BYTES:
                    break
        except BaseException:
            self._hold(source, -len(body))
            raise
        if too_large:
            raise Problem(413, "body_too_large", f"A body has at most {most} bytes. Send less.")
        return bytes(body)

    def _template_of(self, path: str) -> str:
        """The template of a path that was refused before it was routed."""
        given = path.split("/")
        for template in self.description["paths"]:
            wanted = template.split("/")
            if len(wanted) == len(given) and all(
                part == own or part.startswith("{") for part, own in zip(wanted, given, strict=True)
            ):
                return str(template)
        return "(unknown)"

    def _record(
        self, scope: HTTPScope, status: int | None, started_ns: int, request_id: UUID
    ) -> None:
        caller = scope["state"].get("caller")
        method = scope["method"] if scope["method"] in METHODS else "?"
        path = scope.get("path_template") or self._template_of(scope["path"])
        duration_ns = self._clock.monotonic_ns() - started_ns
        call: Call = scope["state"][STATE_KEY]
        self.journal.record(scope, call, id=request_id, status=status or 0, duration_ns=duration_ns)
        if self._metrics is not None:
            self._metrics.record(method, path, status or 0, duration_ns)
        self._log.info(
            "request",
            method=method,
            path=path,
            status=status or 0,
            duration_ms=round(duration_ns / 1e6, 1),
            token_id=str(caller.token_id) if isinstance(caller, Caller) else None,
            request_id=str(request_id),
        )


class _Answer:
    """Passes an answer on, with the headers that every answer has and those of the call, and keeps
    its status. A stream of events has all the time that it wants (`time`)."""

    def __init__(self, send: Send, call: Call, http_version: str) -> None:
        self._send = send
        self._call = call
        self._may_close = http_version.startswith("1")  # HTTP/2 knows no such header
        self.status: int | None = None
        self.time: trio.CancelScope | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = dict(message["headers"])
            more = self._call.headers | (self._call.validators if self.status < 400 else {})
            headers = [
                *message["headers"],
                *HARDENING,
                *((name.lower().encode(), value.encode()) for name, value in more.items()),
                (b"holloway-request-id", self._call.request_id.encode()),
            ]
            message = {**message, "headers": headers}
            if self.time is not None and EVENT_STREAM in own.get(b"content-type", b""):
                self.time.deadline = math.inf
        await self._send(message)

    async def problem(self, problem: Problem) -> None:
        """Answer with a problem and close, since the rest of the call was not read."""
        if self.status is not None:
            return
        self._call.code = problem.code
        body = problem.body(self._call.request_id)
        headers: list[tuple[bytes, bytes]] = [
            (b"content-type", MEDIA_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            *([(b"connection", b"close")] if self._may_close else []),
            *((name.lower().encode(), value.encode()) for name, value in problem.headers.items()),
        ]
        start: Any = {
            "type": "http.response.start",
            "status": HTTPStatus(problem.status).value,
            "headers": headers,
        }
        end: Any = {"type": "http.response.body", "body": body, "more_body": False}
        await self(start)
        await self(end)


def _source_of(scope: HTTPScope) -> str:
    return network_of(scope["client"][0] if scope["client"] else "")


def _announced_bytes(scope: HTTPScope) -> int:
    for name, value in scope["headers"]:
        if name.lower() == b"content-length" and value.isdigit() and len(value) < 19:
            return int(value)
    return 0


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message; after it, whatever the server still has to say."""
    told = False

    async def replayed() -> Any:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
