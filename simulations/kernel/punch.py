"""Hole punching in earnest: our engines on real sockets in namespaces, behind the kernel's NATs.

A `Punch` is a client and a gateway whose engines gather by a real relay, tell each other their
candidates at once, and then send packets both ways. `punch_all` runs many of them side by side in
one thread and says of each what path it got; that is all that the twin of a scenario would say of
them too, without a portal and without processes for each end.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal
from uuid import UUID

import attrs

from channel.messages import Candidates, IceCredentials, IpText, RelayServer, SocketAddress
from runtime.clock import NS_PER_MS, NS_PER_S, SystemClock
from runtime.net.address import Address
from runtime.randomness import SystemRandomness, uuid7
from simulations.kernel.lab import Host, LabError
from tunnel.connection import Event, LocalCandidates
from tunnel.engine import ConnectionParameters, Engine

Outcome = Literal["direct", "relayed", "none"]

RELAY_ID: Final = UUID(int=0xE1A)
RELAY_USER, RELAY_PASSWORD = "user", "password"
GREETING_NS: Final = 200 * NS_PER_MS
"""So often each end sends a packet."""
WANTED_PACKETS: Final = 3
"""So many have to arrive at either end."""
SETTLED_NS: Final = 7 * NS_PER_S
"""After this time the first round of checks (6.2 s, tunnel/ice/pair.py) is over: what is relayed
then stays so."""
GIVE_UP_NS: Final = 30 * NS_PER_S
AT_ONCE: Final = 16
BATCH: Final = 64
CLOCK: Final = SystemClock()
_ROOT: Final = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def relay_process(host: Host, address: Address, folder: Path) -> Iterator[None]:
    """A relay in a namespace, by itself, whose one user is `RELAY_USER`; its log is in `folder`."""
    users = folder / "users"
    users.write_text(f"{RELAY_USER}:{RELAY_PASSWORD}\n")
    users.chmod(0o600)
    argv = [
        sys.executable, "-m", "holloway", "relay", "--standalone",
        "--users-file", str(users), "--listen", str(address),
        "--max-allocations-per-user", "4096",
    ]  # fmt: skip
    with (folder / "relay.log").open("wb") as log:
        process = host.spawn(argv, stdout=log, stderr=subprocess.STDOUT, cwd=_ROOT)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def relay_server(address: Address) -> RelayServer:
    """What the engines are told of that relay."""
    return RelayServer(
        id=RELAY_ID,
        addresses=(SocketAddress(address=IpText(address.host), port=address.port),),
        username=RELAY_USER,
        password=RELAY_PASSWORD,
        expires_in_ns=3600 * NS_PER_S,
    )


class End:
    """An engine with a real socket in a namespace. `network` is the host's address with prefix.
    What the other end tells of itself is known here after `signalling_ns`."""

    def __init__(self, host: Host, network: str, relays: Sequence[RelayServer]) -> None:
        family = socket.AF_INET6 if ":" in network else socket.AF_INET
        with host.entered():
            self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.bind((network.partition("/")[0], 0))
        self.socket.setblocking(False)
        self.local = Address(*self.socket.getsockname()[:2])
        self.events: list[Event] = []
        self.packets: list[bytes] = []
        self.other: End | None = None
        self.signalling_ns = 0
        self._signalled: deque[tuple[int, Candidates]] = deque()
        self.alive = True
        randomness = SystemRandomness()
        now = CLOCK.monotonic_ns()
        self.engine = Engine(private_key=randomness.bytes(32), randomness=randomness, now=now)
        self.engine.add_socket(self.local, now, network=network)
        self.engine.set_relays(relays, now)

    def receive(self) -> None:
        """Take what the socket has."""
        datagrams: list[tuple[bytes, Address]] = []
        with contextlib.suppress(OSError):  # nothing left, or an ICMP error
            while len(datagrams) < BATCH:
                data, source = self.socket.recvfrom(65_535)
                datagrams.append((data, Address(*source[:2])))
        self.engine.receive_datagrams(self.local, datagrams, CLOCK.monotonic_ns())

    def flush(self) -> None:
        """Take what was signalled, and send what the engine wants sent."""
        now = CLOCK.monotonic_ns()
        while self._signalled and self._signalled[0][0] <= now:
            self.engine.add_candidates(self._signalled.popleft()[1], now)
        for _, remote, data in self.engine.drain_transmits():
            with contextlib.suppress(OSError):
                self.socket.sendto(data, remote)
        self.packets += [packet for _, packet in self.engine.drain_packets()]
        for event in self.engine.drain_events():
            self.events.append(event)
            other = self.other
            if isinstance(event, LocalCandidates) and other is not None and other.alive:
                other._signalled.append((now + other.signalling_ns, event.message))

    def poll_timeout(self) -> int | None:
        """When the engine, or what was signalled, is due."""
        instants = [self.engine.poll_timeout(), *(at for at, _ in self._signalled)]
        return min((at for at in instants if at is not None), default=None)

    def path_kind(self, connection: UUID) -> str | None:
        """ "direct" or "relayed"; None while there is no path."""
        path = self.engine.path(connection)
        return None if path is None else path.kind

    def happened(self, kind: type) -> bool:
        """Whether an event of this kind was reported."""
        return any(isinstance(event, kind) for event in self.events)


def connect(client: End, gateway: End, connection: UUID) -> None:
    """Open a connection at both, at the gateway first, as the portal has it."""
    client.other, gateway.other = gateway, client
    randomness = SystemRandomness()
    ours, theirs = (
        IceCredentials(fragment=randomness.bytes(4).hex(), password=randomness.bytes(16).hex())
        for _ in range(2)
    )
    for end, peer, local, remote in (
        (gateway, client, theirs, ours),
        (client, gateway, ours, theirs),
    ):
        end.engine.open(
            ConnectionParameters(
                connection_id=connection,
                peer_public_key=peer.engine.public_key,
                preshared_key=b"p" * 32,
                local_ice=local,
                remote_ice=remote,
                controlling=end is client,
            ),
            CLOCK.monotonic_ns(),
        )


@attrs.frozen
class Place:
    """Where an end stands: a namespace, and its address with the prefix of its network."""

    host: Host
    network: str


class Punch:
    """One client and one gateway that look for a path until it is clear which they get. The client
    learns `late_ns` after the gateway whom to look for."""

    def __init__(
        self, client: Place, gateway: Place, relays: Sequence[RelayServer], *, late_ns: int = 0
    ) -> None:
        self.ends = tuple(End(place.host, place.network, relays) for place in (client, gateway))
        self.connection = uuid7(CLOCK, SystemRandomness())
        self.began = CLOCK.monotonic_ns()
        self.outcome: Outcome | None = None
        self._greet_at = self.began
        self._greetings = 0
        self.ends[0].signalling_ns = late_ns
        connect(self.ends[0], self.ends[1], self.connection)

    def kinds(self) -> list[str | None]:
        """The path that each end uses."""
        return [end.path_kind(self.connection) for end in self.ends]

    def due(self) -> int:
        """When `step` has to be called at the latest."""
        timeouts = [end.poll_timeout() for end in self.ends]
        return min([self._greet_at, *(at for at in timeouts if at is not None)])

    def step(self, now: int) -> None:
        """Timers, packets, and what there is to send; decides when all is clear."""
        if now >= self._greet_at:
            self._greet_at = now + GREETING_NS
            self._greetings += 1
            for end in self.ends:
                end.engine.send_packet(self.connection, greeting(self._greetings), now)
        for end in self.ends:
            end.engine.handle_timeout(now)
        for end in self.ends:
            end.flush()
        self.outcome = self._decide(now)

    def close(self) -> None:
        """End the connection, and give the allocations back."""
        for end in self.ends:
            end.engine.close(self.connection, CLOCK.monotonic_ns())
            end.engine.end(CLOCK.monotonic_ns())
            end.flush()
            end.socket.close()

    def _decide(self, now: int) -> Outcome | None:
        kinds = self.kinds()
        talk = all(len(end.packets) >= WANTED_PACKETS for end in self.ends)
        if talk and kinds == ["direct", "direct"]:
            return "direct"
        if talk and kinds == ["relayed", "relayed"] and now - self.began > SETTLED_NS:
            return "relayed"
        return "none" if now - self.began > GIVE_UP_NS else None


def punch_all(
    pairs: Sequence[tuple[Place, Place]],
    relay: Address,
    *,
    at_once: int = AT_ONCE,
    late_ns: int = 0,
) -> list[Outcome]:
    """What path each pair of a client and a gateway gets, so many of them at a time.

    `late_ns` is that of `Punch`. Raises LabError if an end cannot have a socket.
    """
    relays = [relay_server(relay)]
    waiting = list(enumerate(pairs))
    waiting.reverse()
    outcomes: list[Outcome] = ["none"] * len(pairs)
    running: dict[int, Punch] = {}
    with selectors.DefaultSelector() as selector:
        while waiting or running:
            while waiting and len(running) < at_once:
                number, (client, gateway) = waiting.pop()
                running[number] = punch = _start(client, gateway, relays, late_ns)
                for end in punch.ends:
                    selector.register(end.socket, selectors.EVENT_READ, end)
            due = min(punch.due() for punch in running.values())
            wait_s = max(0.0, (due - CLOCK.monotonic_ns()) / NS_PER_S)
            for key, _ in selector.select(wait_s):
                key.data.receive()
            for number, punch in list(running.items()):
                punch.step(CLOCK.monotonic_ns())
                if punch.outcome is not None:
                    outcomes[number] = punch.outcome
                    for end in punch.ends:
                        selector.unregister(end.socket)
                    punch.close()
                    del running[number]
    return outcomes


def greeting(number: int) -> bytes:
    """An IPv4 packet of 32 bytes that bears a number."""
    return bytes((0x45, 0, 0, 32)) + bytes(16) + number.to_bytes(12, "big")


def _start(client: Place, gateway: Place, relays: Sequence[RelayServer], late_ns: int) -> Punch:
    try:
        return Punch(client, gateway, relays, late_ns=late_ns)
    except OSError as error:
        raise LabError(f"{client.host.short_name}, {gateway.host.short_name}: {error}") from error
