"""`holloway admin` and portals that are busy, lose answers, or say what no portal says."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from admin.connection import MAX_ATTEMPTS, MAX_LOST, Connection
from admin.declaration import show_plan
from admin.failures import UNAVAILABLE, Failure
from admin.names import items_of
from admin.safety import UNSAFE
from runtime.secret import Secret

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


class Busy(BaseHTTPRequestHandler):
    """A portal that has no time at first, and says when it will."""

    refusals: ClassVar[int] = 0
    refusal: ClassVar[int] = 503
    losses: ClassVar[int] = 0
    calls: ClassVar[list[tuple[str, str | None]]] = []
    content: ClassVar[bytes] = b"{}"
    agents: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        Busy.agents.append(self.headers.get("user-agent"))
        Busy.calls.append((self.command, self.headers.get("idempotency-key")))
        if len(Busy.calls) <= Busy.losses:
            return  # without an answer: the connection is closed
        status = 200 if len(Busy.calls) > Busy.refusals else Busy.refusal
        self.send_response(status)
        self.send_header("retry-after", "0")
        self.send_header("content-length", str(len(Busy.content)))
        self.end_headers()
        self.wfile.write(Busy.content)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def busy(
    refusals: int = 0, losses: int = 0, content: bytes = b"{}", refusal: int = 503
) -> Iterator[Connection]:
    Busy.refusals, Busy.refusal, Busy.losses = refusals, refusal, losses
    Busy.calls, Busy.content = [], content
    server = HTTPServer(("127.0.0.1", 0), Busy)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    connection = Connection(
        base_url=f"http://127.0.0.1:{server.server_port}",
        token=Secret("token"),
        tls=ssl.create_default_context(),
    )
    try:
        yield connection
    finally:
        connection.close()
        server.shutdown()
        server.server_close()


def test_a_busy_portal_is_asked_again_where_that_is_safe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with busy(refusals=2) as connection:
        assert connection.call("get", "/", again=True).status_code == 200
        assert len(Busy.calls) == 3
        assert capsys.readouterr().err.count("asking again") == 1
        assert {str(agent).partition("/")[0] for agent in Busy.agents} == {"holloway-admin"}
    with busy(refusals=2) as connection:
        headers = {"Idempotency-Key": "k"}
        connection.call("post", "/", body={}, headers=headers, again=True)
        assert Busy.calls == [("POST", "k")] * 3
    with busy(refusals=1) as connection:
        with pytest.raises(Failure) as refused:
            connection.call("post", "/", body={})
        assert (refused.value.status, len(Busy.calls)) == (UNAVAILABLE, 1)
    with busy(refusals=100) as connection:
        with pytest.raises(Failure):
            connection.call("get", "/", again=True)
        assert len(Busy.calls) == MAX_ATTEMPTS


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (200, b"\x1b]0;owned\x07"),
        (200, b"[]"),
        (200, b'{"steps": [{"action": "\\u001b[2J", "kind": 1, "name": "x"}]}'),
        (200, b'{"steps": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        (422, b'{"code": "invalid_fields", "errors": "\\u001b[2J"}'),
        (422, b'{"code": "invalid_fields", "errors": 1}'),
    ],
)
def test_whatever_a_portal_answers_a_command_ends_with_a_harmless_sentence(
    status: int, content: bytes
) -> None:
    with (
        busy(refusals=0 if status == 200 else 100, content=content, refusal=status) as connection,
        pytest.raises(Failure) as failed,
        connection.understood(),
    ):
        show_plan(connection.call("post", "/v1/declaration/plan", body={}).json())
    assert not UNSAFE.search(str(failed.value).replace("\n", ""))


def test_pages_without_end_are_not_followed() -> None:
    with busy(content=b'{"items": [], "next_cursor": "x"}') as connection:
        assert list(items_of(connection, "/v1/sites")) == []
        assert len(Busy.calls) == 1


def test_a_lost_answer_is_asked_for_again_under_the_same_key() -> None:
    headers = {"Idempotency-Key": "k"}
    with busy(losses=1) as connection:
        connection.call("post", "/", body={}, headers=headers, again=True)
        assert Busy.calls == [("POST", "k")] * 2
    for again, calls in ((False, 1), (True, MAX_LOST)):
        with busy(losses=100) as connection:
            with pytest.raises(Failure):
                connection.call("post", "/", body={}, headers=headers, again=again)
            assert len(Busy.calls) == calls
