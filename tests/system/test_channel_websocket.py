"""The control channel over WebSocket on loopback, where UDP is blocked and where it works again.

Longer than other files: both ends, and what strangers do at the door, need the same portal.
"""

from __future__ import annotations

import signal
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import attrs
import pytest
import trio
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Message, TextMessage

from channel.dialer import Dialer, Refused
from channel.frames import CLOSE_CODES, encode_frame
from channel.listener import ChannelLimits
from channel.messages import TO_CLIENT, Heartbeat, Resource, ResourceRemoved
from channel.transports import PATH, SUBPROTOCOL, TransportOptions
from channel.websocket_listener import WebSocketDoor
from runtime.clock import SystemClock
from runtime.net.address import Address
from runtime.net.udp import UdpSocket
from runtime.net.websocket import WebSocketConnection, connect_websocket
from runtime.net.websocket_core import WebSocketClosed, WebSocketLimits
from runtime.randomness import SystemRandomness
from tests.ports import free_port
from tests.system.rebinding import Rebinding
from tests.system.test_channel_quic import (
    AUTHORITY,
    CANDIDATES,
    CHAIN,
    KEY,
    MS,
    QUICK,
    UNTIL_S,
    Portal,
    S,
    dialer_for,
    dialing,
    marks_of_own_sockets,
    portal,
    portal_process,
    until,
)
from tests.unit.channel.agents import INIT, JOIN, Agent, Desk
from tests.unit.channel.certificates import Authority

pytestmark = pytest.mark.system

RACING = TransportOptions(websocket_after_ns=50 * MS, return_interval_ns=3_600 * S)
UPGRADE = (
    b"GET /channel HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: holloway.1\r\n\r\n"
)
QUICKLY = attrs.evolve(QUICK, transports=RACING)
RETURNING = attrs.evolve(
    QUICKLY,
    transports=attrs.evolve(RACING, return_interval_ns=100 * MS, return_interval_cap_ns=200 * MS),
)

HASTY = attrs.evolve(QUICKLY, quic=attrs.evolve(QUICK.quic, handshake_timeout_ns=300 * MS))
"""For those who never come in."""


class Firewall(Rebinding):
    """UDP to the portal passes it, or does not; and tells nobody."""

    def __init__(self, portal: Portal, port: int) -> None:
        super().__init__(portal.server.address)
        self.inside.close()
        self.inside = UdpSocket.bind(Address("127.0.0.1", port))
        self._portal = portal.server.address
        self._nobody = UdpSocket.bind(Address("127.0.0.1", 0))
        self.block()

    def block(self) -> None:
        self.server = self._nobody.local_address

    def unblock(self) -> None:
        self.server = self._portal


@attrs.frozen
class Blocked:
    """A portal whose UDP is behind a firewall, and its door on TCP."""

    portal: Portal
    door: WebSocketDoor
    firewall: Firewall
    at: str


@asynccontextmanager
async def blocked_portal(
    directory: Path,
    limits: ChannelLimits | None = None,
    chain: bytes = CHAIN,
    key: bytes = KEY,
) -> AsyncIterator[Blocked]:
    port = free_port()
    (directory / "chain.pem").write_bytes(chain)
    (directory / "key.pem").write_bytes(key)
    async with portal(limits, chain, key) as there, trio.open_nursery() as nursery:
        door = WebSocketDoor(there.server, limits)
        listen = Address("127.0.0.1", port)
        await nursery.start(door.serve, listen, directory / "chain.pem", directory / "key.pem")
        firewall = Firewall(there, port)
        nursery.start_soon(firewall.run)
        yield Blocked(there, door, firewall, str(listen))
        nursery.cancel_scope.cancel()


# --- the ordinary course -----------------------------------------------------------------------


async def test_an_agent_whose_udp_is_blocked_joins_talks_and_beats(tmp_path: Path) -> None:
    agent = Agent()
    async with blocked_portal(tmp_path) as here, dialing(here.at, agent, options=QUICKLY) as dialer:
        await until(lambda: dialer.connected)
        assert dialer.statistics().transport == "websocket"
        assert agent.messages == [INIT]
        (desk,) = here.portal.desks
        assert desk.channel.remote == "127.0.0.1"
        assert dialer.send(CANDIDATES, ref=3)
        await until(lambda: len(desk.frames) == 2)
        assert desk.frames[1].ref == 3
        await until(lambda: dialer.statistics().round_trip_ns is not None)
        assert here.door.statistics().connections == 1
    assert agent.losses == 1


async def test_once_udp_passes_again_the_agent_goes_on_over_quic(tmp_path: Path) -> None:
    agent = Agent()
    async with (
        blocked_portal(tmp_path) as here,
        dialing(here.at, agent, options=RETURNING) as dialer,
    ):
        await until(lambda: dialer.connected)
        assert dialer.statistics().transport == "websocket"
        here.firewall.unblock()
        await until(lambda: dialer.statistics().transport == "quic" and dialer.connected)
        statistics = dialer.statistics()
        assert statistics.moves == 1
        assert statistics.dials == 1
        assert agent.messages == [INIT, INIT]
        # The older channel was ended by the agent, in good order, before it joined anew.
        older, newer = here.portal.desks
        assert older.ends == ["lost: going on over QUIC (code 0)"]
        assert newer.ends == []
        assert here.door.statistics().connections == 0


async def test_where_udp_works_no_websocket_is_opened(tmp_path: Path) -> None:
    async with blocked_portal(tmp_path) as here:
        here.firewall.unblock()
        patient = attrs.evolve(QUICK, transports=TransportOptions(websocket_after_ns=3_600 * S))
        async with dialing(here.at, Agent(), options=patient) as dialer:
            await until(lambda: dialer.connected)
            assert dialer.statistics().transport == "quic"
        assert here.door.statistics() == attrs.evolve(here.door.statistics(), accepted=0)


async def test_a_closed_port_is_no_reason_to_wait_for_the_head_start(tmp_path: Path) -> None:
    """As where a firewall refuses UDP by ICMP."""
    patient = attrs.evolve(QUICK, transports=TransportOptions(websocket_after_ns=3_600 * S))
    async with blocked_portal(tmp_path) as here:
        here.firewall.go_away()
        async with dialing(here.at, Agent(), options=patient) as dialer:
            await until(lambda: dialer.connected)
            assert dialer.statistics().transport == "websocket"


async def test_an_init_of_many_megabytes_arrives(tmp_path: Path) -> None:
    resources = tuple(
        Resource(id=UUID(int=n), name="n" * 250, kind="cidr", address="a" * 250)
        for n in range(10_000)
    )
    init = attrs.evolve(INIT, resources=resources)

    def accept(desk: Desk) -> None:
        desk.channel.joined("client")
        desk.channel.send(init, epoch=1)

    agent = Agent()
    async with blocked_portal(tmp_path) as here:
        here.portal.answer = accept
        async with dialing(here.at, agent, options=QUICKLY) as dialer:
            await until(lambda: dialer.connected)
            assert agent.messages == [init]


async def test_the_last_word_of_the_portal_arrives_and_is_heeded(tmp_path: Path) -> None:
    async with blocked_portal(tmp_path) as here:
        here.portal.answer = Desk.refuse
        with pytest.raises(Refused) as caught:
            await dialer_for(here.at, Agent(), options=QUICKLY).run()
        assert caught.value.code == "invalid_token"
        await until(lambda: here.portal.desks[0].ends == ["invalid_token"])
        await until(lambda: here.door.statistics().connections == 0)


async def test_draining_sends_agents_away_and_takes_no_new_one(tmp_path: Path) -> None:
    async with blocked_portal(tmp_path) as here, dialing(here.at, Agent(), options=QUICKLY) as one:
        await until(lambda: one.connected)
        here.portal.server.drain(spread_ns=MS)
        await until(lambda: one.statistics().last_error == "draining")
        await until(lambda: here.portal.server.statistics().shed > 0)
        assert here.portal.desks[0].ends == ["draining"]
        assert len(here.portal.desks) == 1


async def test_the_sockets_of_an_agent_carry_its_mark_and_come_from_its_source(
    tmp_path: Path,
) -> None:
    async with blocked_portal(tmp_path) as here, trio.open_nursery() as nursery:
        dialer = Dialer(
            here.at,
            AUTHORITY.pin,
            TO_CLIENT,
            Agent(),
            SystemClock(),
            SystemRandomness(),
            mark=0x484C,
            source="127.0.0.9",
            on_frame=lambda: None,
            options=QUICKLY,
        )
        nursery.start_soon(dialer.run)
        await until(lambda: dialer.connected)
        assert here.portal.desks[0].channel.remote == "127.0.0.9"
        assert 0x484C in marks_of_own_sockets()
        nursery.cancel_scope.cancel()


async def test_one_socket_serves_both_families_and_shows_ipv4_under_its_plain_address(
    tmp_path: Path,
) -> None:
    (tmp_path / "chain.pem").write_bytes(CHAIN)
    (tmp_path / "key.pem").write_bytes(KEY)
    port = free_port()
    async with portal() as there, trio.open_nursery() as nursery:
        door = WebSocketDoor(there.server)
        files = tmp_path / "chain.pem", tmp_path / "key.pem"
        await nursery.start(door.serve, Address("::", port), *files)
        for host in ("127.0.0.1", "::1"):
            async with connect_websocket(
                Address(host, port),
                server_name=host,
                host=str(Address(host, port)),
                path=PATH,
                subprotocol=SUBPROTOCOL,
                verify=lambda chain: None,
            ) as connection:
                assert b"challenge" in await connection.receive()
                assert there.desks[-1].channel.remote == host
                assert connection.local_host == host
        nursery.cancel_scope.cancel()


# --- losses ------------------------------------------------------------------------------------


async def test_a_node_that_was_killed_is_noticed_at_once_also_by_who_is_idle(
    tmp_path: Path,
) -> None:
    """TCP tells it; no heartbeat, no keepalive and no probe is needed."""
    idle = attrs.evolve(QUICKLY, heartbeat_interval_ns=3_600 * S, keepalive_interval_ns=3_600 * S)
    agent = Agent(attrs.evolve(JOIN, kind="gateway"))
    with portal_process(0, tmp_path, websocket=True) as (first, port):
        async with dialing(f"127.0.0.1:{port}", agent, options=idle) as dialer:
            await until(lambda: dialer.connected)
            assert dialer.statistics().transport == "websocket"
            first.kill()
            first.wait()
            await until(lambda: agent.losses == 1)
            with portal_process(port, tmp_path, websocket=True):
                await until(lambda: len(agent.messages) == 2 and dialer.connected)


async def test_a_portal_that_falls_silent_is_doubted_and_left(tmp_path: Path) -> None:
    options = attrs.evolve(
        QUICKLY, doubt_after_ns=200 * MS, doubt_timeout_ns=200 * MS, probe_interval_ns=50 * MS
    )
    agent = Agent()
    with portal_process(0, tmp_path, websocket=True) as (process, port):
        async with dialing(f"127.0.0.1:{port}", agent, options=options) as dialer:
            await until(lambda: dialer.connected)
            process.send_signal(signal.SIGSTOP)
            await until(lambda: dialer.statistics().last_error == "no answer to a probe")
            assert agent.losses == 1


async def test_a_poke_on_the_same_network_keeps_the_connection(tmp_path: Path) -> None:
    agent = Agent()
    async with blocked_portal(tmp_path) as here, dialing(here.at, agent, options=QUICKLY) as dialer:
        await until(lambda: dialer.connected)
        here.portal.desks[0].channel.probe()
        dialer.poke()
        await until(lambda: here.portal.desks[0].signs_of_life == 1)
        round_trips = dialer.statistics().frames_received
        await until(lambda: dialer.statistics().frames_received > round_trips)
        assert agent.losses == 0


async def test_an_attempt_to_return_that_comes_to_nothing_costs_nothing(tmp_path: Path) -> None:
    """QUIC answers, but the portal takes nobody there."""
    agent = Agent()
    async with (
        blocked_portal(tmp_path) as here,
        dialing(here.at, agent, options=RETURNING) as dialer,
    ):
        await until(lambda: dialer.connected)
        here.portal.server.refuse_newcomers()
        here.firewall.unblock()
        await until(lambda: here.portal.server.statistics().shed >= 2)
        assert dialer.connected
        assert dialer.statistics().transport == "websocket"
        assert agent.losses == 0


# --- distrust ----------------------------------------------------------------------------------


async def test_a_portal_of_another_authority_never_sees_the_token(tmp_path: Path) -> None:
    agent, stranger = Agent(), Authority("installation")
    chain, key = stranger.issue_pem("localhost", "127.0.0.1")
    async with (
        blocked_portal(tmp_path, chain=chain, key=key) as here,
        dialing(here.at, agent, options=HASTY) as dialer,
    ):
        await until(lambda: dialer.statistics().dials >= 2)
        assert (
            "websocket: the certification authority is not the one that the token names"
            in dialer.statistics().last_error
        )
        # Not even the client's last word of TLS came.
        await until(lambda: here.door.statistics().handshakes_failed)
        assert here.door.statistics().accepted == 0
        assert here.door.statistics().requests_refused == 0
        assert agent.challenges == []
        assert here.portal.desks == []


async def test_a_portal_under_another_name_never_sees_the_token(tmp_path: Path) -> None:
    chain, key = AUTHORITY.issue_pem("other.example.com")
    agent = Agent()
    async with (
        blocked_portal(tmp_path, chain=chain, key=key) as here,
        dialing(here.at, agent, options=HASTY) as dialer,
    ):
        await until(lambda: dialer.statistics().dials >= 2)
        assert "websocket: the portal's certificate does not hold" in (
            dialer.statistics().last_error
        )
        assert here.door.statistics().accepted == 0
        assert agent.challenges == []


async def test_who_shows_the_leaf_without_the_authority_never_sees_the_token(
    tmp_path: Path,
) -> None:
    leaf = CHAIN.partition(b"-----END CERTIFICATE-----\n")
    agent = Agent()
    async with (
        blocked_portal(tmp_path, chain=leaf[0] + leaf[1]) as here,
        dialing(here.at, agent, options=HASTY) as dialer,
    ):
        await until(lambda: dialer.statistics().dials >= 2)
        assert here.door.statistics().accepted == 0
        assert agent.challenges == []


async def test_an_older_tls_is_never_spoken(tmp_path: Path) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    (tmp_path / "chain").write_bytes(CHAIN)
    (tmp_path / "key").write_bytes(KEY)
    old.load_cert_chain(tmp_path / "chain", tmp_path / "key")
    port = free_port()
    agent = Agent()
    heard = bytearray()

    async def listen(tcp: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            stream = trio.SSLStream(tcp, old, server_side=True)
            await stream.do_handshake()
            heard.extend(await stream.receive_some())

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_tcp, listen, port, host="127.0.0.1"))
        async with dialing(f"127.0.0.1:{port}", agent, options=QUICKLY) as dialer:
            await until(lambda: dialer.statistics().dials >= 2)
            assert "no TLS" in dialer.statistics().last_error
        nursery.cancel_scope.cancel()
    assert heard == b""
    assert agent.challenges == []


@asynccontextmanager
async def bare_websocket(
    here: Blocked, source: str = "127.0.0.1"
) -> AsyncIterator[WebSocketConnection]:
    async with connect_websocket(
        Address.parse(here.at),
        server_name="localhost",
        host=here.at,
        path=PATH,
        subprotocol=SUBPROTOCOL,
        verify=lambda chain: None,
        source=source,
    ) as connection:
        yield connection


async def to_the_end(connection: WebSocketConnection) -> tuple[bytes, WebSocketClosed]:
    """All that comes, and how it ends."""
    said = b""
    with trio.fail_after(UNTIL_S):
        while True:
            try:
                said += await connection.receive()
            except WebSocketClosed as closed:
                return said, closed


async def raw_tls(here: Blocked) -> trio.SSLStream[trio.SocketStream]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    stream = trio.SSLStream(
        await trio.open_tcp_stream(*Address.parse(here.at)), context, https_compatible=True
    )
    await stream.do_handshake()
    return stream


async def all_that_comes(stream: Any) -> bytes:
    received = bytearray()
    with trio.fail_after(UNTIL_S):
        with suppress(trio.BrokenResourceError):
            while part := await stream.receive_some():
                received += part
    return bytes(received)


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (b"GET /channel HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (b"\x16\x03\x01 not HTTP at all \r\n\r\n", b"400"),
        (UPGRADE.replace(b"/channel", b"/other"), b"404"),
        (UPGRADE.replace(b"Host: x", b"Host: x\r\nOrigin: https://evil.example"), b"403"),
        (UPGRADE.replace(b"holloway.1", b"chat"), b"400"),
    ],
)
async def test_whoever_wants_something_else_is_turned_away(
    tmp_path: Path, request_text: bytes, status: bytes
) -> None:
    async with blocked_portal(tmp_path) as here:
        stream = await raw_tls(here)
        await stream.send_all(request_text)
        answer = await all_that_comes(stream)
        assert answer.split(b" ")[:2] == [b"HTTP/1.1", status]
        await until(lambda: here.door.statistics().requests_refused == 1)
        assert here.door.statistics().connections == 0
        assert here.portal.desks == []


LARGE = (64 * 1024).to_bytes(4, "big") + bytes(64 * 1024 - 3)
"""The beginning of a frame that may be, in a message that may not."""


def batched(data: bytes) -> list[bytes]:
    return [data[start : start + 10_000] for start in range(0, len(data), 10_000)]


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([TextMessage(data="{}")], 1003),
        ([BytesMessage(data=LARGE)], 1009),
        ([BytesMessage(data=part, message_finished=False) for part in batched(LARGE)], 1009),
    ],
    ids=["text", "too_large", "too_large_in_fragments"],
)
async def test_what_no_agent_sends_ends_its_own_channel_with_a_code_and_no_other(
    tmp_path: Path, frames: list[Message], code: int
) -> None:
    bystander = Agent()
    async with (
        blocked_portal(tmp_path) as here,
        dialing(here.at, bystander, options=QUICKLY) as dialer,
    ):
        await until(lambda: dialer.connected)
        stream = await raw_tls(here)
        await stream.send_all(UPGRADE)
        peer = Connection(ConnectionType.CLIENT)
        head, _, rest = (await stream.receive_some()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        for frame in frames:
            await stream.send_all(peer.send(frame))
        peer.receive_data(rest + await all_that_comes(stream))
        *_, last = peer.events()
        assert isinstance(last, CloseConnection)
        assert last.code == code
        await until(lambda: len(here.portal.desks[1].ends) == 1)
        assert here.portal.desks[1].frames == []
        assert dialer.connected
        assert bystander.losses == 0


async def test_a_join_in_many_fragments_and_frames_in_one_message_are_understood(
    tmp_path: Path,
) -> None:
    joining = encode_frame(JOIN, limit=10_000)
    async with blocked_portal(tmp_path) as here:
        stream = await raw_tls(here)
        await stream.send_all(UPGRADE)
        peer = Connection(ConnectionType.CLIENT)
        await stream.receive_some()
        for byte in joining[:-1]:
            data = peer.send(BytesMessage(data=bytes([byte]), message_finished=False))
            await stream.send_all(data)
        await stream.send_all(peer.send(BytesMessage(data=joining[-1:], message_finished=True)))
        beat = encode_frame(Heartbeat(), limit=1_000)
        candidates = encode_frame(CANDIDATES, limit=1_000)
        await stream.send_all(peer.send(BytesMessage(data=beat + candidates)))
        await until(lambda: here.portal.desks and len(here.portal.desks[0].frames) == 2)
        assert here.portal.desks[0].messages[1] == CANDIDATES
        await trio.aclose_forcefully(stream)
        await until(lambda: here.portal.desks[0].ends)


async def test_garbage_in_the_stream_is_answered_as_over_quic(tmp_path: Path) -> None:
    async with blocked_portal(tmp_path) as here, bare_websocket(here) as connection:
        connection.send((10 << 20).to_bytes(4, "big"))
        said, closed = await to_the_end(connection)
        assert b'"reason":"protocol_error"' in said
        assert closed.code == CLOSE_CODES["protocol_error"]


async def test_who_reads_nothing_is_ended_when_four_megabytes_wait(tmp_path: Path) -> None:
    """And `send` never waits for it."""
    limits = ChannelLimits(
        websocket=WebSocketLimits(send_buffer_bytes=256 * 1024, receive_window_bytes=128 * 1024)
    )
    async with blocked_portal(tmp_path, limits) as here:
        stream = await raw_tls(here)
        await stream.send_all(UPGRADE)
        await until(lambda: here.portal.desks)
        peer = Connection(ConnectionType.CLIENT)
        await stream.send_all(peer.send(BytesMessage(data=encode_frame(JOIN, limit=10_000))))
        desk = here.portal.desks[0]
        await until(lambda: desk.frames)
        removed = ResourceRemoved(resource_id=UUID(int=4))
        sent = 0
        while not desk.ends and sent < 500_000:
            desk.channel.send(removed, epoch=1)
            sent += 1
            if not sent % 1_000:
                await trio.sleep(0)
        await until(lambda: desk.ends == ["overflow"])
        await until(lambda: here.door.statistics().connections == 0)


async def test_who_never_joins_is_sent_away(tmp_path: Path) -> None:
    limits = ChannelLimits(join_deadline_ns=200 * MS)
    async with blocked_portal(tmp_path, limits) as here, bare_websocket(here) as connection:
        said, _ = await to_the_end(connection)
        assert b"no join came" in said
        await until(lambda: here.portal.desks[0].ends == ["protocol_error"])


async def test_too_many_that_have_not_joined_are_told_to_come_again(tmp_path: Path) -> None:
    async with (
        blocked_portal(tmp_path, ChannelLimits(max_unjoined=1)) as here,
        bare_websocket(here) as first,
    ):
        await first.receive()
        async with bare_websocket(here) as second:
            assert b'"reason":"unavailable"' in await second.receive()
        assert here.portal.server.statistics().shed == 1


async def test_strangers_who_say_nothing_are_few_and_not_there_for_long(tmp_path: Path) -> None:
    limits = ChannelLimits(
        websocket=WebSocketLimits(
            handshake_timeout_ns=3 * S, max_handshakes=3, max_handshakes_per_source=2
        )
    )
    async with blocked_portal(tmp_path, limits) as here:
        silent = [await trio.open_tcp_stream(*Address.parse(here.at)) for _ in range(2)]
        await until(lambda: here.door.statistics().newcomers == 2)
        third = await trio.open_tcp_stream(*Address.parse(here.at))
        assert await all_that_comes(third) == b""
        assert here.door.statistics().refused_limit == 1
        # From elsewhere there is room.
        async with bare_websocket(here, source="127.0.0.2") as connection:
            assert b"challenge" in await connection.receive()
        for stream in silent:
            assert await all_that_comes(stream) == b""
        assert here.door.statistics().handshakes_failed == 2
        async with bare_websocket(here) as connection:
            assert b"challenge" in await connection.receive()


async def test_connections_of_one_source_are_bounded_and_places_come_back(tmp_path: Path) -> None:
    limits = ChannelLimits(
        websocket=WebSocketLimits(max_connections=3, max_connections_per_source=1)
    )
    async with blocked_portal(tmp_path, limits) as here:
        async with bare_websocket(here) as first:
            await first.receive()
            with pytest.raises(WebSocketClosed):
                async with bare_websocket(here):
                    pass
            assert here.door.statistics().refused_limit == 1
            async with bare_websocket(here, source="127.0.0.2") as other:
                await other.receive()
        await until(lambda: here.door.statistics().connections == 0)
        async with bare_websocket(here) as again:
            await again.receive()


async def test_stopping_a_portal_tells_its_agents_to_come_again(tmp_path: Path) -> None:
    agent = Agent()
    serving, stopped = trio.CancelScope(), trio.Event()
    started: list[str] = []

    async def serve() -> None:
        async with blocked_portal(tmp_path) as here:
            started.append(here.at)
            with serving:
                await trio.sleep_forever()
        stopped.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        await until(lambda: started)
        async with dialing(started[0], agent, options=QUICKLY) as dialer:
            await until(lambda: dialer.connected)
            serving.cancel()
            await stopped.wait()
            await until(lambda: dialer.statistics().last_error)
            assert dialer.statistics().last_error == "shutting_down"
            assert agent.losses == 1
