"""The HTTPS door under callers who are slow, silent, greedy or many; and its end."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from portal.authority import RENEW_BEFORE_END, SERVER_LIFE, Authority
from portal.doors import MAX_HEADER_BYTES, Door
from runtime.clock import VirtualClock
from runtime.net.address import Address
from runtime.randomness import SystemRandomness
from tests.system.portal_support import Installation, installation

pytestmark = pytest.mark.system

PATIENCE_S = 60


async def raw_stream(here: Installation) -> trio.SSLStream[trio.SocketStream]:
    stream = await trio.open_tcp_stream(*here.door.address)
    tls = trio.SSLStream(stream, here.tls, server_hostname="127.0.0.1", https_compatible=True)
    await tls.do_handshake()
    return tls


async def all_that_comes(stream: Any) -> bytes:
    """Everything until the far end closes."""
    received = bytearray()
    with trio.fail_after(PATIENCE_S):
        while True:
            try:
                part = await stream.receive_some(65_536)
            except trio.BrokenResourceError:
                return bytes(received)
            if not part:
                return bytes(received)
            received += part


async def test_more_connections_than_allowed_are_closed_and_places_come_back(
    tmp_path: Path,
) -> None:
    async with installation(tmp_path, max_connections=3) as here:
        held = [await raw_stream(here) for _ in range(3)]
        for stream in held:
            await begin_call(stream)
        await in_calls(here, 3)
        extra = await trio.open_tcp_stream(*here.door.address)
        assert await all_that_comes(extra) == b""
        assert here.door.statistics().refused == 1
        await trio.aclose_forcefully(held[0])
        with trio.fail_after(PATIENCE_S):
            while here.door.statistics().connections == 3:
                await trio.sleep(0.01)
        async with here.client() as client:
            assert (await client.get("/healthz")).status_code == 200
        for stream in held:
            await trio.aclose_forcefully(stream)


async def begin_call(stream: trio.SSLStream[trio.SocketStream]) -> None:
    """A call whose body does not come."""
    await stream.send_all(
        b"POST /v1/sites HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 100\r\n\r\n"
    )


async def in_calls(here: Installation, count: int) -> None:
    with trio.fail_after(PATIENCE_S):
        while sum(not each.idle for each in here.door._streams) != count:
            await trio.sleep(0.01)


async def test_a_stranger_who_holds_all_that_he_may_keeps_nobody_out(tmp_path: Path) -> None:
    async with installation(tmp_path, max_connections_per_source=4) as here:
        greeting = [await trio.open_tcp_stream(*here.door.address) for _ in range(2)]
        with trio.fail_after(PATIENCE_S):
            while here.door.statistics().connections < 2:
                await trio.sleep(0.01)
        silent = await raw_stream(here)
        calling = await raw_stream(here)
        await begin_call(calling)
        await in_calls(here, 1)
        for number, stream in enumerate([*greeting, silent], 1):
            newcomer = await raw_stream(here)  # the oldest that is in no call gives way
            await begin_call(newcomer)
            await in_calls(here, 1 + number)
            assert await all_that_comes(stream) == b""
            assert here.door.statistics().displaced == number
        refused = await trio.open_tcp_stream(*here.door.address)
        assert await all_that_comes(refused) == b""
        assert here.door.statistics().refused == 1
        assert here.door.statistics().connections == 4


async def test_a_call_after_a_call_is_no_idle_one(tmp_path: Path) -> None:
    async with installation(tmp_path) as here, here.client() as client:
        for _ in range(2):
            assert (await client.get("/healthz")).status_code == 200
            await in_calls(here, 0)
        assert here.door.statistics().accepted == 1


async def test_headers_without_end_are_refused(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        stream = await raw_stream(here)
        await stream.send_all(b"GET / HTTP/1.1\r\nhost: x\r\n")
        filler = b"x-filler: " + b"x" * MAX_HEADER_BYTES + b"\r\n"
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(filler * 1_000)
        async with here.client() as client:
            assert (await client.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    "request_text",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"POST /v1/sites HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/sites HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n"
        b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: x\r\nauthorization: \xff\xfe\r\nconnection: close\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 50,
        b"GET /v1/sites?cursor=%ff%fe&\xff HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        b"GET /%2e%2e/%00 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        b"G\xc3\xa4T / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    ],
)
async def test_what_is_no_http_ends_its_own_connection_only(
    tmp_path: Path, request_text: bytes
) -> None:
    async with installation(tmp_path) as here:
        stream = await raw_stream(here)
        await stream.send_all(request_text)
        await stream.transport_stream.send_eof()
        answer = await all_that_comes(stream)
        assert b" 500 " not in answer.split(b"\r\n", 1)[0]
        async with here.client() as client:
            assert (await client.get("/healthz")).status_code == 200


async def test_plain_text_and_old_tls_are_turned_away(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        plain = await trio.open_tcp_stream(*here.door.address)
        await plain.send_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200" not in await all_that_comes(plain)
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(tmp_path / "ca.pem")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        stream = trio.SSLStream(
            await trio.open_tcp_stream(*here.door.address), old, server_hostname="127.0.0.1"
        )
        with pytest.raises((trio.BrokenResourceError, ssl.SSLError)):
            await stream.do_handshake()


async def test_a_call_in_progress_ends_well_and_a_stuck_caller_does_not_hold_up_the_end(
    tmp_path: Path,
) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            for i in range(60):
                await client.post("/v1/sites", json={"name": f"{i:0240}"})
        stuck = await trio.open_tcp_stream(*here.door.address)
        stuck.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        tls = trio.SSLStream(stuck, here.tls, server_hostname="127.0.0.1", https_compatible=True)
        bearer = f"host: x\r\nauthorization: Bearer {admin}\r\n"
        ask = f"GET /v1/changes?limit=1000 HTTP/1.1\r\n{bearer}\r\n"
        await tls.send_all(ask.encode() * 100)  # answers that nobody reads
        waiting = await raw_stream(here)
        await waiting.send_all(
            f"POST /v1/sites HTTP/1.1\r\n{bearer}"
            "content-type: application/json\r\ncontent-length: 13\r\n\r\n".encode()
        )
        with trio.fail_after(PATIENCE_S):
            while here.door.statistics().connections < 2:
                await trio.sleep(0.01)
        here.door.stop()
        await waiting.send_all(b'{"name": "x"}')
        assert b" 201 " in (await all_that_comes(waiting)).split(b"\r\n", 1)[0]
        with pytest.raises(OSError, match="all attempts"):
            await trio.open_tcp_stream(*here.door.address)
    assert here.door.statistics().connections == 0


@asynccontextmanager
async def renewing_door(directory: Path, clock: VirtualClock) -> AsyncIterator[tuple[Any, Door]]:
    async def hello(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    authority = Authority(directory, clock=clock, randomness=SystemRandomness())
    certificate = authority.server_certificate(["127.0.0.1"])
    door = Door(
        hello,
        listen=Address("127.0.0.1", 0),
        certificate_chain=certificate.chain_file,
        certificate_key=certificate.key_file,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(door.serve)
        yield authority, door
        door.stop()


async def test_a_renewed_certificate_is_used_from_the_next_handshake_on(tmp_path: Path) -> None:
    clock = VirtualClock(utc_start=datetime.now(UTC) - (SERVER_LIFE - RENEW_BEFORE_END))
    async with renewing_door(tmp_path, clock) as (authority, door):
        tls = ssl.create_default_context(cadata=authority.certificate_pem.decode())

        async def presented() -> bytes:
            stream = await trio.open_tcp_stream(*door.address)
            async with trio.SSLStream(stream, tls, server_hostname="127.0.0.1") as secure:
                await secure.do_handshake()
                found: bytes = secure.getpeercert(binary_form=True)
                return found

        first = await presented()
        async with httpx.AsyncClient(
            base_url=f"https://{door.address}", verify=tls, trust_env=False
        ) as client:
            assert (await client.get("/")).text == "hello"
            clock.advance((SERVER_LIFE - RENEW_BEFORE_END) // timedelta(microseconds=1) * 1_000)
            authority.server_certificate(["127.0.0.1"])
            assert await presented() == first
            door.renew()
            assert await presented() != first
            assert (await client.get("/")).text == "hello"
