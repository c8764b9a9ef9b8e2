"""TURN over QUIC on real sockets: the relay's door, and an agent's end of it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import attrs
import pytest
import trio

from channel.binding import BindingProbe
from channel.messages import IpText, SocketAddress
from channel.relay_doors import QUIC_ALPN, accepts, quic_client_limits
from portal.probe import prove_address
from relays.authentication import StaticCredentials
from relays.client import Allocated, Event, Permitted, Received, TurnClient
from relays.peers import PeerPolicy
from relays.server import Server
from relays.transports.dial import RelayConnection, RelayUnreached, connect_relay
from relays.transports.quic import QuicDoor, quic_limits
from relays.transports.tls import CertificateSource
from relays.transports.udp import UdpSockets
from runtime.clock import SystemClock
from runtime.net.address import Address
from runtime.net.connection import ConnectionClosed
from runtime.net.quic import connect_quic
from runtime.randomness import SystemRandomness
from tests.system.rebinding import Rebinding

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]
HERE = "127.0.0.1"
USERS = {"alice": "opensesame", "bob": "swordfish"}
CLOCK = SystemClock()


@attrs.define
class Relay:
    """A relay on loopback that serves QUIC alone. Its guests may talk to each other."""

    server: Server
    sockets: UdpSockets
    certificates: CertificateSource
    door: QuicDoor

    @property
    def pins(self) -> tuple[str, ...]:
        return (self.certificates.current.pin,)

    @property
    def ended(self) -> dict[str, int]:
        return dict(self.door.transports()["quic"].ended)


@asynccontextmanager
async def relay(*, unallocated_s: float = 30.0, connections: int = 100) -> AsyncIterator[Relay]:
    sockets = UdpSockets(bind_hosts={1: HERE}, clock=CLOCK)
    server = Server(
        credentials=StaticCredentials(USERS),
        realm="holloway",
        relay_addresses={1: HERE},
        own_addresses=frozenset({HERE}),
        sockets=sockets,
        randomness=SystemRandomness(),
        peers=PeerPolicy.of(allowed_peer_ranges=["127.0.0.0/8"]),
        now=CLOCK.monotonic_ns(),
        unix_s=int(datetime.now(UTC).timestamp()),
    )
    certificates = CertificateSource(None, None, datetime.now(UTC))
    door = QuicDoor(
        Address(HERE, 0),
        certificates=certificates,
        server=server,
        sockets=sockets,
        clock=CLOCK,
        limits=quic_limits(connections=connections, connections_per_source=connections),
        unallocated_s=unallocated_s,
    )
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sockets.run, server)
            nursery.start_soon(door.run)
            yield Relay(server, sockets, certificates, door)
            nursery.cancel_scope.cancel()
    finally:
        sockets.close_all()


class Guest:
    """The client core over one connection."""

    def __init__(self, connection: RelayConnection, address: Address, user: str) -> None:
        self.connection = connection
        self.events: list[Event] = []
        self.dropped = 0
        self.core = TurnClient(
            server=address,
            username=user,
            password=USERS[user],
            family="ipv4",
            randomness=SystemRandomness(),
            now=CLOCK.monotonic_ns(),
            reliable=True,
        )
        self.flush()

    def flush(self) -> None:
        self.dropped += self.connection.send(self.core.drain_datagrams())
        self.events += self.core.drain_events()

    async def until(self, holds: Callable[[], object]) -> None:
        while not holds():
            for message in await self.connection.receive():
                self.core.receive(message, CLOCK.monotonic_ns())
            self.flush()

    def of(self, kind: type) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    async def allocate(self) -> Address:
        await self.until(lambda: self.of(Allocated))
        assert self.core.relayed is not None
        return self.core.relayed

    async def permit(self, peer: Address) -> None:
        self.core.bind(peer, CLOCK.monotonic_ns())
        self.core.permit(peer, CLOCK.monotonic_ns())
        self.flush()
        await self.until(lambda: self.of(Permitted))

    def say(self, peer: Address, data: bytes) -> None:
        assert self.core.send(peer, data, CLOCK.monotonic_ns())
        self.flush()

    def heard(self) -> list[bytes]:
        return [event.data for event in self.events if isinstance(event, Received)]


@asynccontextmanager
async def guest(it: Relay, user: str, to: Address | None = None) -> AsyncIterator[Guest]:
    address = to or it.door.address
    async with connect_relay("quic", address, pins=it.pins) as connection:
        yield Guest(connection, address, user)


async def met(alice: Guest, bob: Guest) -> tuple[Address, Address]:
    """Both have allocations and permissions for each other; their relayed addresses."""
    alices, bobs = await alice.allocate(), await bob.allocate()
    await alice.permit(bobs)
    await bob.permit(alices)
    return alices, bobs


async def test_two_guests_talk_in_datagrams_and_what_is_too_large_goes_on_the_stream() -> None:
    async with relay() as it, guest(it, "alice") as alice, guest(it, "bob") as bob:
        alices, bobs = await met(alice, bob)
        for size in (0, 1, 1312, 1365, 1400, 9_000):
            data = os.urandom(size)
            before = len(bob.heard()), len(alice.heard())
            alice.say(bobs, data)
            await bob.until(lambda before=before: len(bob.heard()) > before[0])
            bob.say(alices, data)
            await alice.until(lambda before=before: len(alice.heard()) > before[1])
            assert bob.heard()[-1] == alice.heard()[-1] == data
        counted = it.door.transports()["quic"]
        assert (counted.allocations, counted.connections, counted.accepted) == (2, 2, 2)
        assert counted.errors[401] == 2
        assert counted.packets == 12


async def test_another_key_than_the_portal_told_is_refused_before_anything_is_said() -> None:
    async with relay() as it:
        with pytest.raises(RelayUnreached, match="another key"):
            async with connect_relay("quic", it.door.address, pins=["00" * 32]):
                raise AssertionError("connected")
        assert it.server.statistics().get("errors_401", 0) == 0


async def test_an_allocation_ends_with_its_connection() -> None:
    async with relay() as it:
        async with guest(it, "alice") as alice:
            await alice.allocate()
            assert it.server.allocations == 1
        while it.server.allocations:
            await trio.sleep(0.01)
        assert it.door.transports()["quic"].connections == 0


async def test_a_guest_whose_address_changes_keeps_its_allocation() -> None:
    async with relay() as it, trio.open_nursery() as nursery:
        nat = Rebinding(it.door.address)
        nursery.start_soon(nat.run)
        async with (
            guest(it, "alice", to=nat.inside.local_address) as alice,
            guest(it, "bob") as bob,
        ):
            alices, bobs = await met(alice, bob)
            nat.rebind()
            alice.say(bobs, b"from there")
            await bob.until(lambda: b"from there" in bob.heard())
            with trio.move_on_after(0.5):  # the new path is proved meanwhile
                await alice.until(lambda: False)
            bob.say(alices, b"to there")
            await alice.until(lambda: b"to there" in alice.heard())
            # Its nonce was for the other address: it is asked for another, once, and goes on.
            alice.core.permit(Address("127.0.0.2", 5000), CLOCK.monotonic_ns())
            alice.flush()
            await alice.until(lambda: len(alice.of(Permitted)) > 1)
            assert it.server.allocations == 2
            assert it.server.statistics()["errors_438"] == 1
        nursery.cancel_scope.cancel()


async def test_garbage_ends_its_connection_on_the_stream_and_nothing_in_datagrams() -> None:
    async with (
        relay() as it,
        guest(it, "alice") as alice,
        connect_quic(
            it.door.address,
            server_name=HERE,
            alpn=QUIC_ALPN,
            verify=accepts(it.pins),
            limits=quic_client_limits(),
        ) as raw,
    ):
        await alice.allocate()
        probe = BindingProbe(SystemRandomness())
        for datagram in (b"", b"\xff" * 100, probe.request, os.urandom(1000), b"\x40"):
            raw.send_datagram(datagram)
        await raw.send_all(probe.request)
        assert probe.answer(await raw.receive()) is not None, (
            "it goes on, and requests there do not"
        )
        await raw.send_all(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(ConnectionClosed, match="where 4096 are allowed"):
            await raw.receive()
        assert it.ended == {"framing": 1}
        assert it.server.allocations == 1


async def test_who_never_allocates_is_sent_away() -> None:
    async with relay(unallocated_s=0.2) as it, guest(it, "alice") as alice:
        await alice.allocate()
        async with connect_relay("quic", it.door.address, pins=it.pins) as idle:
            with pytest.raises(ConnectionClosed):
                await idle.receive()
        assert it.ended == {"idle": 1}
        assert it.server.allocations == 1


async def test_the_portal_proves_an_address_of_quic_with_its_pin() -> None:
    async with relay() as it:
        place = SocketAddress(address=IpText(HERE), port=it.door.address.port, transport="quic")
        assert await prove_address(place, it.pins, SystemRandomness())
        assert not await prove_address(place, ("11" * 32,), SystemRandomness())
    assert not await prove_address(place, it.pins, SystemRandomness())
