"""The relay as a process under churn: allocations are made, used, given back and abandoned over
every transport while garbage comes from all sides. Memory stays flat, and nothing goes wrong.

Some seconds of it within the suite; `make soak` lasts HOLLOWAY_RELAY_SOAK_MINUTES.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from random import Random

import attrs
import pytest
import trio

from relays.client import Allocated, Lost, Permitted, Received, TurnClient
from relays.transports.dial import RelayConnection, connect_relay
from runtime.clock import SystemClock
from runtime.net.address import Address
from runtime.net.udp import UdpSocket
from runtime.randomness import SystemRandomness
from tests.ports import free_ports
from tests.system.stream_relay import echoing_peer

MINUTES = float(os.environ.get("HOLLOWAY_RELAY_SOAK_MINUTES", "0"))
SECONDS = max(15.0, MINUTES * 60)
GUESTS = 24
TRANSPORTS = ("udp", "udp", "tcp", "tls", "quic")
PATIENCE_S = 30.0
GROWTH_BYTES = 8 * 1024 * 1024
HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parent.parent.parent
CLOCK, RANDOMNESS = SystemClock(), SystemRandomness()

pytestmark = [pytest.mark.system, pytest.mark.timeout(SECONDS + 240)]


@attrs.frozen
class Relay:
    process: subprocess.Popen[bytes]
    log: Path
    udp: Address
    tls: Address
    metrics: int
    pins: tuple[str, ...]

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def resident_bytes(self) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def metric(self, name: str) -> float:
        connection = HTTPConnection(HOST, self.metrics, timeout=10)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        values = [line.split()[1] for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(values[0]) if values else 0.0


@asynccontextmanager
async def relay(folder: Path) -> AsyncIterator[Relay]:
    users = folder / "users"
    users.touch(mode=0o600)
    users.write_text("alice:opensesame\n")
    port = free_ports(3)
    log = folder / "relay.log"
    argv = [
        sys.executable, "-m", "holloway", "relay", "--standalone", "--users-file", str(users),
        "--listen", f"{HOST}:{port}", "--listen-tls", f"{HOST}:{port + 1}",
        "--listen-quic", f"{HOST}:{port + 1}", "--observability", f"{HOST}:{port + 2}",
        "--allowed-peer-ranges", "127.0.0.0/8", "--max-allocations-per-user", "1000",
        "--connections-per-second", "1000", "--unauthenticated-per-second", "10000",
        "--log-format", "json",
    ]  # fmt: skip
    with log.open("wb") as written:
        process = subprocess.Popen(argv, cwd=ROOT, stderr=written)
    try:
        with trio.fail_after(2 * PATIENCE_S):
            while not any(b'"quic"' in line for line in log.read_bytes().splitlines()):
                await trio.sleep(0.05)
        told = [json.loads(line) for line in log.read_text().splitlines()]
        pins = next(each["pins"] for each in told if each.get("transport") == "tls")
        yield Relay(
            process, log, Address(HOST, port), Address(HOST, port + 1), port + 2, tuple(pins)
        )
    finally:
        process.kill()
        process.wait()


class UdpConnection:
    """A `RelayConnection` of datagrams, which a guest may abandon and another take over."""

    def __init__(self, opened: UdpSocket, server: Address) -> None:
        self._socket = opened
        self._server = server

    def send(self, messages: Sequence[bytes]) -> int:
        for message in messages:
            self._socket.send(message, self._server)
        return 0

    async def receive(self) -> list[bytes]:
        await self._socket.wait_readable()
        return [data for data, _ in self._socket.receive_batch()]


class Guest:
    """One that comes again and again, by any transport, from one UDP port as long as it lives."""

    def __init__(self, it: Relay, number: int, peer: Address, counts: Counter[str]) -> None:
        self._it = it
        self._drawn = Random(number)
        self._peer = peer
        self._counts = counts

    async def live(self) -> None:
        with UdpSocket.bind(Address(HOST, 0)) as opened:
            while True:
                transport = self._drawn.choice(TRANSPORTS)
                with trio.fail_after(PATIENCE_S):
                    if transport == "udp":
                        await self._visit(UdpConnection(opened, self._it.udp), "udp")
                        continue
                    door = self._it.udp if transport == "tcp" else self._it.tls
                    async with connect_relay(transport, door, pins=self._it.pins) as connection:
                        await self._visit(connection, transport)

    async def _visit(self, connection: RelayConnection | UdpConnection, transport: str) -> None:
        client = TurnClient(
            server=self._it.udp,
            username="alice",
            password="opensesame",
            family="ipv4",
            randomness=RANDOMNESS,
            now=CLOCK.monotonic_ns(),
            reliable=transport != "udp",
        )
        await self._until(client, connection, Allocated)
        client.permit(self._peer, CLOCK.monotonic_ns())
        await self._until(client, connection, Permitted)
        if self._drawn.random() < 0.5:
            client.bind(self._peer, CLOCK.monotonic_ns())
        for _ in range(self._drawn.randrange(1, 20)):
            word = self._drawn.randbytes(self._drawn.randrange(1, 180))
            client.send(self._peer, word, CLOCK.monotonic_ns())
            await self._until(client, connection, Received)
        if self._drawn.random() < 0.5:  # else it goes without a word, and over UDP comes back
            client.close(CLOCK.monotonic_ns())
            while client.state != "over":
                await self._step(client, connection)
            self._counts["given back"] += 1
        else:
            self._counts["abandoned"] += 1
        self._counts[transport] += 1

    async def _until(
        self, client: TurnClient, connection: RelayConnection | UdpConnection, kind: type
    ) -> None:
        while True:
            for event in client.drain_events():
                assert not isinstance(event, Lost), event
                if isinstance(event, kind):
                    return
            await self._step(client, connection)

    async def _step(self, client: TurnClient, connection: RelayConnection | UdpConnection) -> None:
        connection.send(client.drain_datagrams())
        due = client.poll_timeout()
        wait_s = 1.0 if due is None else max(0.0, (due - CLOCK.monotonic_ns()) / 1e9)
        with trio.move_on_after(min(wait_s, 1.0)):
            for message in await connection.receive():
                client.receive(message, CLOCK.monotonic_ns())
        client.handle_timeout(CLOCK.monotonic_ns())


HEADS = (b"", b"\0\1", b"\0\3\0\x20\x21\x12\xa4\x42", b"\x40\0\0\x10", b"\xc0")


async def throw_garbage(it: Relay, counts: Counter[str]) -> None:
    """Noise, and beginnings of what might be something, to every door."""
    drawn = Random(0)
    with UdpSocket.bind(Address(HOST, 0)) as opened:
        while True:
            head = drawn.choice(
                (b"", b"\0\1", b"\0\3\0\x20\x21\x12\xa4\x42", b"\x40\0\0\x10", b"\xc0")
            )
            noise = head + drawn.randbytes(drawn.randrange(0, 1_300))
            opened.send(noise, it.udp)
            opened.send(noise, it.tls)
            if drawn.random() < 0.2:
                with suppress(OSError):
                    async with await trio.open_tcp_stream(HOST, it.udp.port) as stream:
                        await stream.send_all(noise + b"?")
                with suppress(OSError):
                    async with await trio.open_tcp_stream(HOST, it.tls.port) as stream:
                        await stream.send_all(noise + b"?")
            counts["garbage"] += 1
            await trio.sleep(0.01)


async def test_churn_and_garbage_leave_nothing_behind(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    async with relay(tmp_path) as it, echoing_peer() as peer:
        before_files = it.open_files()
        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(throw_garbage, it, counts)
            for number in range(GUESTS):
                nursery.start_soon(Guest(it, number, peer, counts).live)
            await trio.sleep(SECONDS / 3)
            early = it.resident_bytes()
            await trio.sleep(SECONDS * 2 / 3)
            late = it.resident_bytes()
            nursery.cancel_scope.cancel()
        visits = counts["given back"] + counts["abandoned"]
        print(
            f"{visits} visits ({dict(counts)}) in {time.monotonic() - began:.0f} s;"
            f" resident {early / 2**20:.1f} MiB after a third, {late / 2**20:.1f} MiB at the end"
        )
        assert all(counts[transport] > 0 for transport in TRANSPORTS)
        assert late - early < GROWTH_BYTES
        assert it.metric("holloway_relay_input_failures_total") == 0
        wrong = [line for line in it.lines() if line["level"] in ("error", "critical")]
        assert wrong == []
        # Connections end with their clients; what was abandoned over UDP ends when it expires.
        with trio.fail_after(PATIENCE_S):
            while it.open_files() > before_files + GUESTS + 2:
                await trio.sleep(0.2)
        assert it.metric("holloway_relay_allocations") <= GUESTS
        it.process.send_signal(signal.SIGTERM)
        it.process.send_signal(signal.SIGTERM)
        with trio.fail_after(PATIENCE_S):
            assert await trio.to_thread.run_sync(it.process.wait) == 0
