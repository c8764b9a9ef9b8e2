"""What the relay's core costs without any socket: `python -m benchmarks.relay --core-only`.

One server core with an allocation and a channel in memory, fed with the same datagram again and
again. Nanoseconds of CPU time for each; for those who change the core. No peer, no ratio.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from relays.authentication import StaticCredentials
from relays.client import TurnClient
from relays.requests import ServerLimits
from relays.server import Server
from relays.stun import MessageClass, Method, StunMessage
from relays.turn import FIRST_CHANNEL, channel_data, send_indication
from runtime.net.address import Address
from runtime.randomness import SeededRandomness

LISTENER: Final = 1
SERVER: Final = Address("203.0.113.6", 3478)
CLIENT: Final = Address("198.51.100.2", 40_000)
PEER: Final = Address("192.0.2.2", 5000)
USERNAME: Final = "bench"
PASSWORD: Final = "carry-on"
PACKET_BYTES: Final = 172
NOW: Final = 10**12
LIMITS: Final = ServerLimits(
    allocations=10**6, allocations_per_username=10**6, allocations_per_source=10**6,
    unauthenticated_per_second=10**8, unauthenticated_burst=10**9,
)  # fmt: skip


class _Ports:
    """Sockets that are numbers only."""

    def __init__(self) -> None:
        self.opened = LISTENER

    def open(self, family: int, port: int) -> int:
        self.opened += 1
        return self.opened

    def close(self, socket: int) -> None:
        """Nothing is held."""


def measure(count: int) -> dict[str, int]:
    """Nanoseconds of CPU time for each kind of datagram, the least of five runs."""
    server, ports = _server()
    _allocate(server, CLIENT, bind=True)
    relayed_by = ports.opened
    server.receive_from_peer(relayed_by, memoryview(b"answer"), PEER, NOW)
    data = bytes(PACKET_BYTES)
    to_peer = memoryview(channel_data(FIRST_CHANNEL, data))
    indication = memoryview(send_indication(PEER, data, bytes(12)))
    binding = memoryview(
        StunMessage(
            method=Method.BINDING, message_class=MessageClass.REQUEST, transaction_id=bytes(12)
        ).encode()
    )
    sources = iter(range(10**6))
    peers_data = memoryview(data)
    kinds: dict[str, tuple[Callable[[], object], int]] = {
        "channel_data_to_peer_ns": (
            lambda: server.receive(LISTENER, to_peer, CLIENT, NOW), count,
        ),
        "channel_data_to_client_ns": (
            lambda: server.receive_from_peer(relayed_by, peers_data, PEER, NOW), count,
        ),
        "send_indication_ns": (
            lambda: server.receive(LISTENER, indication, CLIENT, NOW), count,
        ),
        "binding_ns": (lambda: server.receive(LISTENER, binding, CLIENT, NOW), count // 10),
        "allocation_with_client_ns": (
            lambda: _allocate(server, _source(next(sources)), bind=False), max(1, count // 200),
        ),
    }  # fmt: skip
    return {name: _least_ns(server, act, times) for name, (act, times) in kinds.items()}


def _server() -> tuple[Server, _Ports]:
    ports = _Ports()
    server = Server(
        credentials=StaticCredentials({USERNAME: PASSWORD}),
        realm="holloway",
        relay_addresses={1: SERVER.host},
        own_addresses=frozenset({SERVER.host}),
        sockets=ports,
        randomness=SeededRandomness(1, "relay core"),
        limits=LIMITS,
        now=NOW,
        unix_s=1_800_000_000,
    )
    server.add_listener(LISTENER)
    return server, ports


def _source(number: int) -> Address:
    return Address(f"198.51.{number >> 14 & 0xFF}.1", 1024 + (number & 0x3FFF))


def _allocate(server: Server, source: Address, *, bind: bool) -> None:
    turn = TurnClient(
        server=SERVER, username=USERNAME, password=PASSWORD, family="ipv4",
        randomness=SeededRandomness(source.port, source.host), now=NOW,
    )  # fmt: skip
    if bind:
        turn.bind(PEER, NOW)
    while datagrams := turn.drain_datagrams():
        for datagram in datagrams:
            server.receive(LISTENER, memoryview(datagram), source, NOW)
        for _, answer, _ in server.drain_transmits():
            turn.receive(answer, NOW)
    assert turn.relayed is not None, turn.drain_events()


def _least_ns(server: Server, act: Callable[[], object], times: int) -> int:
    least = 0
    for _ in range(5):
        began = time.process_time_ns()
        for _ in range(times):
            act()
            server.transmits.clear()
        spent = (time.process_time_ns() - began) // times
        least = min(least or spent, spent)
    return least
