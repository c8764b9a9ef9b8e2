"""A mistake of ours that an input finds costs that input, never the process: relay, agent, dialer.

The mistakes are planted: a core that raises for one datagram, one packet, one frame.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any
from uuid import UUID

import pytest
import trio

from channel.dialer import Dialer, DialerOptions
from channel.frames import Frame
from channel.listener import serve_channels
from channel.messages import TO_CLIENT, AuthorizationRevoked, ResourceRemoved
from relays.authentication import StaticCredentials
from relays.server import Server
from relays.stun import MessageClass, Method, StunMessage
from relays.transports.udp import UdpSockets
from runtime.clock import SystemClock
from runtime.guard import surface_failures
from runtime.net.address import Address
from runtime.net.udp import UdpSocket
from runtime.randomness import SystemRandomness
from tests.unit.channel.agents import Agent, Desk
from tests.unit.channel.certificates import Authority
from tunnel.agent import Outgoing
from tunnel.engine import Engine
from tunnel.shell.driver import EngineDriver
from tunnel.shell.tun import TunDevice

pytestmark = pytest.mark.system

POISON = b"\x00\x01\x00\x00 the datagram that finds a mistake"


@pytest.fixture(autouse=True)
def as_in_production() -> Iterator[None]:
    before = surface_failures(False)
    yield
    surface_failures(before)


class _FailingServer(Server):
    def receive(self, listener: int, data: memoryview, source: tuple[str, int], now: int) -> None:
        if bytes(data) == POISON:
            raise RuntimeError("a mistake")
        super().receive(listener, data, source, now)


async def test_a_relay_outlives_the_datagram_that_finds_a_mistake() -> None:
    clock = SystemClock()
    sockets = UdpSockets(bind_hosts={1: "127.0.0.1"}, clock=clock)
    server = _FailingServer(
        credentials=StaticCredentials({}),
        realm="holloway",
        relay_addresses={1: "127.0.0.1"},
        own_addresses=frozenset(),
        sockets=sockets,
        randomness=SystemRandomness(),
        now=clock.monotonic_ns(),
        unix_s=0,
    )
    number, address = sockets.listen(Address("127.0.0.1", 0))
    server.add_listener(number)
    binding = StunMessage(
        method=Method.BINDING, message_class=MessageClass.REQUEST, transaction_id=b"t" * 12
    ).encode()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sockets.run, server)
        with UdpSocket.bind(Address("127.0.0.1", 0)) as asking:
            for _ in range(3):
                asking.send(POISON, address)
            asking.send(binding, address)
            await asking.wait_readable()
            [(answer, _)] = asking.receive_batch()
        nursery.cancel_scope.cancel()
    sockets.close_all()
    assert StunMessage.decode(answer).message_class is MessageClass.SUCCESS
    assert sockets.statistics()["input_failures"] == 3


class _FailingAgent:
    """An agent whose core fails at every other packet of the TUN device."""

    def __init__(self) -> None:
        randomness = SystemRandomness()
        self.engine = Engine(private_key=randomness.bytes(32), randomness=randomness, now=0)
        self.taken: list[bytes] = []

    def receive_packets(self, packets: Iterable[bytes], now: int) -> None:
        for packet in packets:
            if packet == POISON:
                raise RuntimeError("a mistake")
            self.taken.append(packet)

    def pump(self, now: int) -> None: ...
    def poll_timeout(self) -> int | None:
        return None

    def handle_timeout(self, now: int) -> None: ...
    def finish(self, now: int) -> None: ...
    def unsent(self, outgoing: Outgoing, now: int) -> None: ...
    def drain_messages(self) -> list[Any]:
        return []

    def drain_packets(self) -> list[bytes]:
        return []

    def drain_events(self) -> list[Any]:
        return []


async def test_an_agent_outlives_the_packet_that_finds_a_mistake() -> None:
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    device.setblocking(False)
    agent = _FailingAgent()

    async def perform(event: Any) -> None: ...

    with kernel, TunDevice(device.detach(), "hlwtest") as tun:
        driver = EngineDriver(
            agent,
            tun=tun,
            clock=SystemClock(),
            mark=None,
            port=0,
            perform=perform,
            on_failure=lambda detail: None,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver._read_tun)  # the one task that this is about
            for packet in (POISON, b"good"):
                kernel.send(packet)
                while not agent.taken and not driver.statistics().failed_inputs:
                    await trio.sleep(0.005)
            while not agent.taken:
                await trio.sleep(0.005)
            nursery.cancel_scope.cancel()
    assert agent.taken == [b"good"]
    assert driver.statistics().failed_inputs == 1


class _FailingClient(Agent):
    """A client whose core fails at the first revocation that it hears of."""

    def receive(self, frame: Frame, now: int) -> None:
        super().receive(frame, now)
        if isinstance(frame.message, AuthorizationRevoked) and self.losses == 0:
            raise RuntimeError("a mistake")


async def test_an_agent_outlives_the_frame_that_finds_a_mistake_and_joins_again() -> None:
    authority = Authority("installation")
    chain, key = authority.issue_pem("localhost", "127.0.0.1")
    desks: list[Desk] = []

    def connected(channel: Any, challenge: Any) -> Desk:
        desks.append(Desk(channel))
        return desks[-1]

    agent = _FailingClient()
    poison = AuthorizationRevoked(authorization_id=UUID(int=1), resource_id=UUID(int=2))
    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            partial(
                serve_channels,
                Address("127.0.0.1", 0),
                chain,
                key,
                connected,
                portal="localhost",
                clock=SystemClock(),
                randomness=SystemRandomness(),
            )
        )
        dialer = Dialer(
            f"127.0.0.1:{server.address.port}",
            authority.pin,
            TO_CLIENT,
            agent,
            SystemClock(),
            SystemRandomness(),
            on_frame=lambda: None,
            options=DialerOptions(backoff_base_ns=10**7, backoff_cap_ns=10**8),
        )
        nursery.start_soon(dialer.run)
        while not dialer.connected:
            await trio.sleep(0.005)
        desks[0].channel.send(poison, epoch=1)
        while agent.losses == 0 or not dialer.connected:
            await trio.sleep(0.005)
        desks[-1].channel.send(ResourceRemoved(resource_id=UUID(int=2)), epoch=1)
        while not isinstance(agent.messages[-1], ResourceRemoved):
            await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    assert len(desks) == 2
