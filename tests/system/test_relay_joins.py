"""The relay as a process on the real control channel: it joins, serves whom the portal sends,
drains when told, outlives its portal, and says so when it is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from uuid import UUID

import attrs
import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from channel.credentials import (
    encode_token,
    pin_of,
    turn_password,
    turn_username,
    turn_username_of,
)
from channel.frames import Frame
from channel.listener import Channel, ChannelServer, serve_channels
from channel.messages import (
    Challenge,
    Disconnect,
    Drain,
    IpText,
    Load,
    Rejoining,
    RelayInit,
    RelayJoin,
    RevokeUser,
    SocketAddress,
)
from portal.probe import prove_address
from relays.client import Allocated, Event, Lost, TurnClient
from runtime.clock import SystemClock
from runtime.net.address import Address
from runtime.net.udp import UdpSocket
from runtime.randomness import SystemRandomness
from tests.ports import free_port
from tests.unit.channel.certificates import Authority

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parent.parent.parent
AUTHORITY = Authority("installation")
CHAIN, KEY = AUTHORITY.issue_pem("localhost", "127.0.0.1")
RELAY_ID = UUID(int=42)
SECRET = b"\x5a" * 32
CLOCK, RANDOMNESS = SystemClock(), SystemRandomness()
PATIENCE_S = 30.0


@attrs.define
class Desk:
    """What a portal does with one relay: takes it in, or refuses it with `refusal`."""

    refusal: Disconnect | None = None
    channel: Channel | None = None
    joins: list[RelayJoin] = attrs.field(factory=list)
    loads: list[Load] = attrs.field(factory=list)
    farewells: list[Rejoining] = attrs.field(factory=list)
    closed_reasons: list[str] = attrs.field(factory=list)

    def connected(self, channel: Channel, challenge: Challenge) -> Desk:
        self.channel = channel
        return self

    def received(self, frame: Frame) -> None:
        assert self.channel is not None
        if isinstance(frame.message, RelayJoin):
            self.joins.append(frame.message)
            if self.refusal is not None:
                self.channel.close(self.refusal)
                return
            self.channel.joined("relay")
            self.channel.send(RelayInit(relay_id=RELAY_ID), epoch=1)
        elif isinstance(frame.message, Load):
            self.loads.append(frame.message)
        elif isinstance(frame.message, Rejoining):
            self.farewells.append(frame.message)

    def heard(self) -> None:
        pass

    def migrated(self, remote: IpText) -> None:
        pass

    def closed(self, reason: str) -> None:
        self.closed_reasons.append(reason)


@asynccontextmanager
async def portal(desk: Desk, port: int = 0) -> AsyncIterator[int]:
    """The listener of a portal on loopback; its port."""
    async with trio.open_nursery() as nursery:
        server: ChannelServer = await nursery.start(
            lambda task_status: serve_channels(
                Address("127.0.0.1", port),
                CHAIN,
                KEY,
                desk.connected,
                portal="localhost",
                clock=CLOCK,
                randomness=RANDOMNESS,
                task_status=task_status,
            )
        )
        yield server.address.port
        nursery.cancel_scope.cancel()


@contextmanager
def relay(
    folder: Path, portal_port: int, port: int, *flags: str, observability: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    token = folder / "relay-token"
    text = encode_token("relay", UUID(int=1), SECRET, f"localhost:{portal_port}", AUTHORITY.pin)
    token.write_bytes(text.reveal())
    token.chmod(0o600)
    with (folder / "relay.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "holloway", "relay", "--listen", f"127.0.0.1:{port}",
             "--allowed-peer-ranges", "127.0.0.0/8", "--observability", observability,
             "--name", "lyon", "--region", "eu", "--failure-domain", "rack-7", *flags],
            env=os.environ | {"HOLLOWAY_RELAY_TOKEN_FILE": str(token)},
            stderr=log,
            cwd=ROOT,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def until(holds: Callable[[], bool], what: str) -> None:
    with trio.move_on_after(PATIENCE_S):
        while not holds():
            await trio.sleep(0.02)
        return
    raise AssertionError(f"{what}: not within {PATIENCE_S} s")


def client_with(stamp: bytes, port: int, user: str | None = None) -> TurnClient:
    """A client with credentials as the portal makes them."""
    expiry = int(time.time()) + 3600
    username = turn_username_of(expiry, user) if user else turn_username(expiry, RANDOMNESS)
    return TurnClient(
        server=Address("127.0.0.1", port),
        username=username,
        password=turn_password(stamp, RELAY_ID, username),
        family="ipv4",
        randomness=RANDOMNESS,
        now=CLOCK.monotonic_ns(),
    )


async def event_of(client: TurnClient, socket: UdpSocket) -> Event:
    """The next event of a client that is driven on this socket."""
    with trio.fail_after(PATIENCE_S):
        while True:
            for datagram in client.drain_datagrams():
                socket.send(datagram, client.server)
            events = client.drain_events()
            if events:
                return events[0]
            with trio.move_on_after(0.05):
                await socket.wait_readable()
            for data, _ in socket.receive_batch():
                client.receive(data, CLOCK.monotonic_ns())
            client.handle_timeout(CLOCK.monotonic_ns())


async def test_a_relay_joins_and_serves_whom_the_portal_sends(tmp_path: Path) -> None:
    desk, port = Desk(), free_port()
    async with portal(desk) as portal_port:
        with relay(tmp_path, portal_port, port):
            await until(lambda: bool(desk.loads), "the relay reports its load")
            (join,) = desk.joins
            here = IpText("127.0.0.1")
            assert join.addresses == (
                SocketAddress(address=here, port=port),
                SocketAddress(address=here, port=port, transport="tcp"),
            )
            assert join.certificate_pins == ()
            assert (join.name, join.region, join.failure_domain) == ("lyon", "eu", "rack-7")
            assert desk.loads[0] == Load(allocations=0, load=0.0)
            with UdpSocket.bind(Address("127.0.0.1", 0)) as socket:
                client = client_with(join.stamp_secret, port)
                assert isinstance(await event_of(client, socket), Allocated)
            with UdpSocket.bind(Address("127.0.0.1", 0)) as socket:
                lost = await event_of(client_with(bytes(32), port), socket)
                assert isinstance(lost, Lost)
                assert lost.code == 401
    log = (tmp_path / "relay.log").read_text()
    assert "joined" in log
    assert "hlw_relay_" not in log


def write_certificate(folder: Path) -> str:
    """A new one for the relay; its pin."""
    certificate, key = Authority("any").issue("relay.example")
    for name, content in (
        ("chain.pem", certificate.public_bytes(Encoding.PEM)),
        ("key.pem", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
    ):
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(content)
    return pin_of(certificate).hex()


async def test_a_relay_with_a_new_certificate_tells_the_portal_at_once(tmp_path: Path) -> None:
    desk, port, tls_port = Desk(), free_port(), free_port()
    flags = ("--listen-tls", f"127.0.0.1:{tls_port}", "--tls-certificate",
             str(tmp_path / "chain.pem"), "--tls-key", str(tmp_path / "key.pem"))  # fmt: skip
    pin = write_certificate(tmp_path)
    async with portal(desk) as portal_port:
        with relay(tmp_path, portal_port, port, *flags) as process:
            await until(lambda: bool(desk.loads), "the relay joined")
            place = SocketAddress(address=IpText("127.0.0.1"), port=tls_port, transport="tls")
            over_quic = SocketAddress(address=place.address, port=tls_port, transport="quic")
            assert desk.joins[0].addresses[-2:] == (place, over_quic)
            assert await prove_address(over_quic, (pin,), RANDOMNESS)
            assert desk.joins[0].certificate_pins == (pin,)
            assert await prove_address(place, (pin,), RANDOMNESS)
            with UdpSocket.bind(Address("127.0.0.1", 0)) as socket:
                client = client_with(desk.joins[0].stamp_secret, port)
                assert isinstance(await event_of(client, socket), Allocated)
                newer = write_certificate(tmp_path)
                process.send_signal(signal.SIGHUP)
                await until(lambda: len(desk.joins) == 2, "it joins anew")
                assert desk.farewells == [Rejoining()]
                assert desk.joins[1].certificate_pins == (newer,)
                assert desk.joins[1].stamp_secret == desk.joins[0].stamp_secret
                assert await prove_address(place, (newer,), RANDOMNESS)
                assert not await prove_address(place, (pin,), RANDOMNESS)
                await until(lambda: desk.loads[-1].allocations == 1, "its allocation stands")


async def test_a_relay_drains_when_the_portal_says_so(tmp_path: Path) -> None:
    desk, port = Desk(), free_port()
    async with portal(desk) as portal_port:
        with relay(tmp_path, portal_port, port):
            await until(lambda: bool(desk.loads), "the relay joined")
            assert desk.channel is not None
            desk.channel.send(Drain(), epoch=1)
            await until(lambda: "draining" in (tmp_path / "relay.log").read_text(), "draining")
            with UdpSocket.bind(Address("127.0.0.1", 0)) as socket:
                lost = await event_of(client_with(desk.joins[0].stamp_secret, port), socket)
                assert isinstance(lost, Lost)
                assert lost.code == 508


async def test_a_relay_ends_what_a_revoked_agent_has_and_gives_it_no_more(tmp_path: Path) -> None:
    desk, port = Desk(), free_port()
    async with portal(desk) as portal_port:
        with relay(tmp_path, portal_port, port):
            await until(lambda: bool(desk.loads), "the relay joined")
            assert desk.channel is not None
            stamp, user = desk.joins[0].stamp_secret, "A" * 16
            with UdpSocket.bind(Address("127.0.0.1", 0)) as socket:
                client = client_with(stamp, port, user)
                assert isinstance(await event_of(client, socket), Allocated)
                desk.channel.send(RevokeUser(user=user, expires_in_ns=3600 * 10**9), epoch=1)
                log = tmp_path / "relay.log"
                await until(lambda: "user_revoked" in log.read_text(), "revoked")
                client.probe(CLOCK.monotonic_ns())
                assert isinstance(await event_of(client, socket), Lost)
            with UdpSocket.bind(Address("127.0.0.1", 0)) as socket:
                lost = await event_of(client_with(stamp, port, user), socket)
                assert isinstance(lost, Lost)
                assert lost.code == 401
                other = client_with(stamp, port, "B" * 16)
            with UdpSocket.bind(Address("127.0.0.1", 0)) as socket:
                assert isinstance(await event_of(other, socket), Allocated)


async def test_a_relay_outlives_its_portal_and_joins_the_next(tmp_path: Path) -> None:
    desk, port, portal_port = Desk(), free_port(), free_port()
    async with portal(desk, portal_port):
        process = relay(tmp_path, portal_port, port)
        running = process.__enter__()
        await until(lambda: bool(desk.loads), "the relay joined")
    try:
        stamp = desk.joins[0].stamp_secret
        with UdpSocket.bind(Address("127.0.0.1", 0)) as socket:
            assert isinstance(await event_of(client_with(stamp, port), socket), Allocated)
        heir = Desk()
        async with portal(heir, portal_port):
            await until(lambda: bool(heir.loads), "the relay joined again")
            assert heir.joins[0].stamp_secret == stamp
            assert heir.joins[0].incarnation > desk.joins[0].incarnation
            await until(lambda: heir.loads[-1].allocations == 1, "it tells its allocation")
            running.send_signal(signal.SIGTERM)
            await until(lambda: bool(heir.closed_reasons), "the channel is closed first")
            running.send_signal(signal.SIGTERM)
            await until(lambda: running.poll() == 0, "a second signal ends it at once")
    finally:
        process.__exit__(None, None, None)


async def test_a_relay_that_is_refused_says_why_and_ends(tmp_path: Path) -> None:
    desk = Desk(refusal=Disconnect(reason="invalid_token", detail="who is that", retry=False))
    async with portal(desk) as portal_port:
        with relay(tmp_path, portal_port, free_port()) as process:
            await until(lambda: process.poll() is not None, "the relay ends")
            assert process.returncode == 1
    log = (tmp_path / "relay.log").read_text()
    assert "invalid_token: who is that" in log
    assert "Traceback" not in log
    assert "hlw_relay_" not in log
