"""The observability server and the control socket, on real sockets."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client import CollectorRegistry, Counter

from runtime.control import (
    ControlUnavailable,
    ask_control,
    ask_control_async,
    serve_control,
)
from runtime.net.address import Address
from runtime.observe import MAX_CONNECTIONS, Health, make_registry, serve_observability

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]


# --- observability -----------------------------------------------------------------------------


@asynccontextmanager
async def observing(
    health: Health, registry: CollectorRegistry | None = None
) -> AsyncIterator[Address]:
    async with trio.open_nursery() as nursery:
        address = await nursery.start(
            serve_observability, "127.0.0.1:0", health, registry or CollectorRegistry()
        )
        yield address
        nursery.cancel_scope.cancel()


async def converse(address: Address, request: bytes) -> bytes:
    """Send bytes, then read until the server closes."""
    stream = await trio.open_tcp_stream(*address)
    async with stream:
        try:
            await stream.send_all(request)
        except trio.BrokenResourceError:
            return b""
        answer = b""
        try:
            async for data in stream:
                answer += data
        except trio.BrokenResourceError:
            return answer
    return answer


async def get(address: Address, path: str, method: str = "GET") -> tuple[int, bytes]:
    request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    head, _, body = (await converse(address, request.encode())).partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def test_health_readiness_and_metrics_are_shown() -> None:
    health, registry = Health(), make_registry()
    Counter("holloway_test_events", "Events.", registry=registry).inc(3)
    async with observing(health, registry) as address:
        assert await get(address, "/healthz") == (200, b"alive\n")
        assert (await get(address, "/readyz"))[0] == 503
        health.set("portal", True)
        status, body = await get(address, "/readyz?verbose")
        assert status == 200
        assert json.loads(body)["checks"] == {"portal": {"ok": True, "detail": ""}}
        status, body = await get(address, "/metrics")
        assert status == 200
        assert b"holloway_test_events_total 3.0" in body
        assert b"process_resident_memory_bytes" in body
        assert await get(address, "/healthz", "HEAD") == (200, b"")
        assert (await get(address, "/other"))[0] == 404
        assert (await get(address, "/metrics", "DELETE"))[0] == 405


async def test_one_connection_serves_many_requests() -> None:
    async with observing(Health()) as address:
        request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        last = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answer = await converse(address, request * 5 + last)
        assert answer.count(b"HTTP/1.1 200") == 6


async def test_requests_that_are_too_large_or_no_requests_are_refused() -> None:
    async with observing(Health()) as address:
        long_header = b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 20_000
        assert (await converse(address, long_header)).startswith(b"HTTP/1.1 431")
        assert (await converse(address, b"\x16\x03\x01 hello\r\n\r\n")).startswith(b"HTTP/1.1 400")
        body = b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
        assert (await converse(address, body + b"b" * 20_000)).startswith(b"HTTP/1.1 413")
        assert (await get(address, "/healthz"))[0] == 200


async def test_connections_are_bounded() -> None:
    async with observing(Health()) as address, trio.open_nursery() as nursery:
        for _ in range(MAX_CONNECTIONS):
            stream = await trio.open_tcp_stream(*address)
            await stream.send_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await stream.receive_some()
            nursery.start_soon(hold, stream)
        assert await converse(address, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") == b""
        nursery.cancel_scope.cancel()


async def hold(stream: trio.SocketStream) -> None:
    async with stream:
        await trio.sleep_forever()


# --- the control socket ------------------------------------------------------------------------


async def answer(request: dict[str, Any]) -> Mapping[str, Any]:
    if request.get("do") == "fail":
        raise KeyError("swordfish")
    return {"you_said": request, "where": Path("/here")}


@asynccontextmanager
async def controlling(path: Path, allowed: set[int]) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[None]) -> None:
            await serve_control(path, answer, allowed_uids=allowed, task_status=task_status)

        await nursery.start(serve)
        yield
        nursery.cancel_scope.cancel()


async def test_a_question_gets_its_answer_and_the_socket_goes_with_the_daemon(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run" / "control.sock"
    async with controlling(path, {os.getuid()}):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        for number in range(3):
            expected = {"you_said": {"do": number}, "where": "/here"}
            assert await ask_control_async(path, {"do": number}) == expected
    assert not path.exists()
    with pytest.raises(ControlUnavailable):
        ask_control(path, {"do": 1})


async def test_a_handler_that_fails_answers_without_its_words(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with controlling(path, {os.getuid()}):
        assert await ask_control_async(path, {"do": "fail"}) == {
            "error": "internal error: KeyError"
        }
        assert "you_said" in await ask_control_async(path, {"do": "go on"})


async def test_another_user_is_not_heard(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with controlling(path, {os.getuid() + 1}):
        with pytest.raises(ControlUnavailable):
            await ask_control_async(path, {"do": 1})


async def test_lines_that_are_no_request_or_too_long_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with controlling(path, {os.getuid()}):
        for line in (b"hello\n", b"[1]\n", b"[" * 10_000 + b"\n", b"\xff\n"):
            stream = await trio.open_unix_socket(path)
            async with stream:
                await stream.send_all(line + b'{"do":1}\n')
                lines = b""
                while lines.count(b"\n") < 2:
                    lines += await stream.receive_some()
                assert b"not a JSON object" in lines
                assert b"you_said" in lines
        stream = await trio.open_unix_socket(path)
        async with stream:
            await stream.send_all(b"x" * 70_000)
            assert b"too large" in await stream.receive_some()
            assert await stream.receive_some() == b""


async def test_a_socket_left_behind_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    async with controlling(path, {os.getuid()}):
        assert "you_said" in await ask_control_async(path, {"do": 1})
        with pytest.raises(OSError, match="another process answers"):
            await serve_control(path, answer, allowed_uids={os.getuid()})
        assert "you_said" in await ask_control_async(path, {"do": 2})
    path.write_text("precious")
    with pytest.raises(OSError, match="not a socket"):
        await serve_control(path, answer, allowed_uids={os.getuid()})
    assert path.read_text() == "precious"
