"""The API and the channel behind one TCP port: neither takes anything from the other."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import trio
from cryptography.x509 import Certificate

from channel.credentials import decode_token, verify_portal
from channel.listener import ChannelLimits
from channel.transports import PATH, SUBPROTOCOL
from channel.websocket_listener import WebSocketDoor
from portal.doors import Door
from runtime.net.address import Address
from runtime.net.websocket import WebSocketConnection, connect_websocket
from runtime.net.websocket_core import WebSocketClosed, WebSocketLimits
from tests.ports import free_port
from tests.system.postgres_support import own_directory
from tests.system.test_channel_quic import CHAIN, KEY, MS, Portal, S, dialing, portal, until
from tests.system.test_channel_websocket import HASTY, UPGRADE, all_that_comes
from tests.system.test_portal_node import Portal as PortalProcess
from tests.unit.channel.agents import INIT, Agent

pytestmark = pytest.mark.system

AGENTS_AT_MOST = 3
LIMITS = ChannelLimits(websocket=WebSocketLimits(max_connections=AGENTS_AT_MOST, max_handshakes=4))


@attrs.frozen
class Shared:
    """One door, and who stands behind it."""

    door: Door
    channels: WebSocketDoor
    portal: Portal

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"https://{self.door.address}", verify=trusting(), trust_env=False
        )


def trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@asynccontextmanager
async def shared_door(directory: Path, limits: ChannelLimits = LIMITS) -> AsyncIterator[Shared]:
    async def hello(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    (directory / "chain.pem").write_bytes(CHAIN)
    (directory / "key.pem").write_bytes(KEY)
    door = Door(
        hello,
        listen=Address("127.0.0.1", 0),
        certificate_chain=directory / "chain.pem",
        certificate_key=directory / "key.pem",
        max_connections=2,
        grace_time_s=1.0,
    )
    async with portal(limits) as there, trio.open_nursery() as nursery:
        door.channels = WebSocketDoor(there.server, limits)
        await nursery.start(door.serve)
        yield Shared(door, door.channels, there)
        door.stop()
        there.server.drain(MS)


@asynccontextmanager
async def agent_at(here: Shared) -> AsyncIterator[WebSocketConnection]:
    async with connect_websocket(
        here.door.address,
        server_name="localhost",
        host=str(here.door.address),
        path=PATH,
        subprotocol=SUBPROTOCOL,
        verify=lambda chain: None,
    ) as connection:
        assert b"challenge" in await connection.receive()
        yield connection


async def raw_stream(here: Shared, **options: Any) -> trio.SSLStream[trio.SocketStream]:
    context = trusting()
    for name, value in options.items():
        setattr(context, name, value)
    stream = trio.SSLStream(
        await trio.open_tcp_stream(*here.door.address), context, https_compatible=True
    )
    await stream.do_handshake()
    return stream


async def test_both_are_served_at_one_port(tmp_path: Path) -> None:
    agent = Agent()
    async with (
        shared_door(tmp_path) as here,
        dialing(str(here.door.address), agent, options=HASTY) as dialer,
        here.client() as client,
    ):
        await until(lambda: dialer.connected)
        assert dialer.statistics().transport == "websocket"
        assert agent.messages == [INIT]
        for path in ("/", "/channels", "/channel/", "/v1/channel"):
            assert (await client.get(path)).text == path
        assert (await client.post("/channel")).text == "/channel"
        assert here.channels.statistics().connections == 1
        assert here.door.statistics().connections == 1


async def test_agents_take_no_connection_of_the_api_and_the_api_none_of_theirs(
    tmp_path: Path,
) -> None:
    async with shared_door(tmp_path) as here, agent_at(here), agent_at(here):
        held = [await raw_stream(here) for _ in range(2)]
        for stream in held:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in await stream.receive_some()
        assert here.door.statistics().connections == 2
        # The API is full, so the oldest of its own that is in no call gives way to a newcomer; an
        # agent still finds its place, and then the channel is full too.
        extra = await raw_stream(here)
        await extra.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in await extra.receive_some()
        await all_that_comes(held[0])  # what was left of its answer, and the end
        assert here.door.statistics().displaced == 1
        async with agent_at(here):
            assert here.channels.statistics().connections == AGENTS_AT_MOST
            with pytest.raises(WebSocketClosed):
                async with agent_at(here):
                    pass
            assert here.channels.statistics().refused_limit == 1
            await trio.aclose_forcefully(held[1])
            await until(lambda: here.door.statistics().connections == 1)
            async with here.client() as client:
                assert (await client.get("/x")).text == "/x"


async def test_who_says_nothing_is_neither_and_not_there_for_long(tmp_path: Path) -> None:
    limits = ChannelLimits(websocket=WebSocketLimits(handshake_timeout_ns=3 * S))
    async with shared_door(tmp_path, limits) as here:
        silent = [await raw_stream(here) for _ in range(5)]
        async with here.client() as client, agent_at(here):
            assert (await client.get("/x")).text == "/x"
        for stream in silent:
            assert await all_that_comes(stream) == b""
        await until(lambda: here.channels.statistics().handshakes_failed == 5)
        assert here.door.statistics().accepted == 1
        assert here.channels.statistics().accepted == 1


async def test_a_request_in_single_bytes_is_understood(tmp_path: Path) -> None:
    async with shared_door(tmp_path) as here:
        for request, answer in (
            (UPGRADE, b"HTTP/1.1 101 "),
            (b"GET /chan HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 200 "),
        ):
            stream = await raw_stream(here)
            for byte in request:
                await stream.send_all(bytes([byte]))
            assert (await stream.receive_some()).startswith(answer)
            await trio.aclose_forcefully(stream)


async def test_tls_1_2_is_good_for_the_api_alone(tmp_path: Path) -> None:
    async with shared_door(tmp_path) as here:
        old = {"maximum_version": ssl.TLSVersion.TLSv1_2}
        stream = await raw_stream(here, **old)
        await stream.send_all(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in await stream.receive_some()
        stream = await raw_stream(here, **old)
        await stream.send_all(UPGRADE)
        assert await all_that_comes(stream) == b""
        assert here.channels.statistics().requests_refused == 1
        assert here.portal.desks == []


async def test_silent_newcomers_and_agents_do_not_hold_up_the_end(tmp_path: Path) -> None:
    async with shared_door(tmp_path) as here, agent_at(here) as connection:
        await raw_stream(here)
        await until(lambda: here.channels.statistics().newcomers == 1)
        here.door.stop()
        here.portal.server.drain(MS)
        assert b'"reason":"draining"' in await connection.receive()
    assert here.channels.statistics().connections == 0
    assert here.channels.statistics().newcomers == 0


async def test_a_portal_whose_api_is_elsewhere_has_a_door_of_its_own_for_websockets() -> None:
    with own_directory("portal") as directory:
        there = PortalProcess(directory)
        channel = free_port()
        await there.start(HOLLOWAY_PORTAL_LISTEN=f"127.0.0.1:{channel}")
        try:
            token = decode_token(there.operator_token)
            assert token.portal == f"127.0.0.1:{channel}"

            def verify(chain: Sequence[Certificate]) -> None:
                verify_portal(chain, pin=token.pin, host="127.0.0.1", at=datetime.now(UTC))

            for port in (channel, there.port):
                connecting = connect_websocket(
                    Address("127.0.0.1", port),
                    server_name="127.0.0.1",
                    host=token.portal,
                    path=PATH,
                    subprotocol=SUBPROTOCOL,
                    verify=verify,
                )
                if port == channel:
                    async with connecting as connection:
                        assert b"challenge" in await connection.receive()
                else:
                    with pytest.raises(WebSocketClosed, match="the server answered 403"):
                        await connecting.__aenter__()
        finally:
            assert await there.end() == 0
