"""The network of `benchmarks.relay`, the relays in it, and flows through them.

Three namespaces in a row: client, relay, peer. The one in the middle also forwards, which is the
direct way. Relays listen at its client side and open relayed ports at its peer side. All addresses
are of documentation ranges, which no relay refuses.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

from benchmarks.relay_load import (
    UDP_GRO,
    UDP_SEGMENT,
    Ends,
    frame,
    packet_socket,
    train,
    udp_socket,
)
from relays.client import Lost, Permitted, TurnClient
from relays.turn import FIRST_CHANNEL, channel_data
from runtime.net.address import Address
from runtime.randomness import SystemRandomness
from simulations.kernel.lab import Host, Lab

ROOT: Final = Path(__file__).resolve().parents[1]
CLIENT: Final = "198.51.100.2"
LISTEN: Final = "198.51.100.1"
RELAYED: Final = "192.0.2.1"
PEER: Final = "192.0.2.2"
SERVER: Final = Address(LISTEN, 3478)
USERNAME: Final = "bench"
PASSWORD: Final = "carry-on"  # of a relay that nobody else reaches
REALM: Final = "holloway"
RELAYED_PORTS: Final = (49_152, 65_535)
START_TIMEOUT_S: Final = 20.0
SETUP_TIMEOUT_S: Final = 20.0
CHANNEL_HEADER_BYTES: Final = 4
ALLOCATIONS_AT_ONCE: Final = 100


class WorldError(Exception):
    """A relay did not start, or did not do what was asked; the message says which and what."""


@attrs.frozen(kw_only=True)
class World:
    """The namespaces; `relay_cores` are where relays run."""

    lab: Lab
    client: Host
    relay: Host
    peer: Host
    relay_cores: str

    @classmethod
    def build(cls, lab: Lab, relay_cores: str) -> World:
        relay = lab.router("relay")
        return cls(
            lab=lab,
            relay=relay,
            client=lab.public_host("client", relay, f"{CLIENT}/24"),
            peer=lab.public_host("peer", relay, f"{PEER}/24"),
            relay_cores=relay_cores,
        )

    def client_socket(self) -> socket.socket:
        with self.client.entered():
            return udp_socket(CLIENT)

    def peer_socket(self) -> socket.socket:
        with self.peer.entered():
            return udp_socket(PEER)

    def sink_socket(self, host: str) -> socket.socket:
        """In the relay's place: what the generator can do without a relay."""
        with self.relay.entered():
            return udp_socket(host)

    def packet_socket(self, host: Host) -> socket.socket:
        with host.entered():
            return packet_socket(host.device)

    def hardware(self, host: Host) -> bytes:
        """Destination and source with which frames go from `host` to the relay."""
        mac = [
            place.run("cat", f"/sys/class/net/{device}/address").strip()
            for place, device in ((self.relay, host.uplink), (host, host.device))
        ]
        return b"".join(bytes.fromhex(each.replace(":", "")) for each in mac)

    @contextlib.contextmanager
    def offloads_for_xdp(self) -> Iterator[None]:
        """Sender checksums and NAPI as XDP on veth needs them; as before at the end. Raises
        LabError where `ethtool` is missing."""
        try:
            for host in (self.client, self.peer):
                host.run("ethtool", "-K", host.device, "tx", "off", "gro", "on")
            yield
        finally:
            for host in (self.client, self.peer):
                host.run("ethtool", "-K", host.device, "tx", "on", "gro", "off")


# --- relays --------------------------------------------------------------------------------------


@attrs.frozen
class Relay:
    """A relay that can be started: its name in the table, and its command in a world. Of one that
    is `data_only` no latency, no cost at a moderate rate and no allocations are measured."""

    name: str
    command: Callable[[World], list[str]]
    needs_xdp: bool = False
    data_only: bool = False
    checkout: Path = ROOT

    def log(self, world: World) -> Path:
        return world.lab.directory / f"{self.name.replace(' ', '-')}.log"

    @contextlib.contextmanager
    def running(self, world: World) -> Iterator[list[int]]:
        """The relay in its namespace, ready to serve; its process ids. Raises WorldError."""
        log = self.log(world)
        with contextlib.ExitStack() as stack:
            if self.needs_xdp:
                stack.enter_context(world.offloads_for_xdp())
            output = stack.enter_context(log.open("wb"))
            process = world.relay.spawn(
                ["taskset", "-c", world.relay_cores, *self.command(world)],
                stdout=output,
                stderr=output,
                cwd=self.checkout,
            )
            stack.callback(_end, process)
            _wait_until_it_answers(world, process, self.name, log)
            yield world.relay.pids()


def coturn(threads: int) -> Relay:
    """Debian's, without logs, TLS, TCP or a database of its own."""

    def command(world: World) -> list[str]:
        return [
            "turnserver", "-n", "--no-cli", "--no-tls", "--no-dtls", "--no-tcp", "--no-tcp-relay",
            "--no-stdout-log", "--log-file", "/dev/null", "--lt-cred-mech",
            "--user", f"{USERNAME}:{PASSWORD}", "--realm", REALM,
            "--listening-ip", LISTEN, "--listening-port", str(SERVER.port), "--relay-ip", RELAYED,
            "--min-port", str(RELAYED_PORTS[0]), "--max-port", str(RELAYED_PORTS[1]),
            "--relay-threads", str(threads),
            "--userdb", str(world.lab.directory / "turndb"),
            "--pidfile", str(world.lab.directory / "turnserver.pid"),
        ]  # fmt: skip

    return Relay("coturn", command)


def holloway(
    name: str,
    *flags: str,
    needs_xdp: bool = False,
    data_only: bool = False,
    checkout: Path = ROOT,
) -> Relay:
    """Ours, with its limits out of the way: all clients here are one user at one address."""

    def command(world: World) -> list[str]:
        users = world.lab.directory / "users"
        users.touch(mode=0o600)
        users.write_text(f"{USERNAME}:{PASSWORD}\n")
        return [
            sys.executable, "-m", "holloway", "relay", "--standalone", "--users-file", str(users),
            "--realm", REALM, "--listen", str(SERVER), "--relay-address", RELAYED,
            "--relayed-ports", f"{RELAYED_PORTS[0]}-{RELAYED_PORTS[1]}",
            "--max-allocations-per-user", "20000", "--max-allocations-per-source", "20000",
            "--unauthenticated-per-second", "1000000", "--log-format", "json", *flags,
        ]  # fmt: skip

    return Relay(name, command, needs_xdp, data_only, checkout)


def data_path(world: World, relay: Relay) -> str:
    """How a relay of ours that runs has logged that it moves data; `python` where it did not."""
    modes = {}
    for line in relay.log(world).read_text().splitlines():
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            modes[said.get("event")] = said.get("mode")
    fast = modes.get("fast_path", "off")
    return f"xdp {fast}" if fast != "off" else modes.get("data_path", "python")


def _wait_until_it_answers(
    world: World, process: subprocess.Popen[bytes], name: str, log: Path
) -> None:
    binding = b"\0\1\0\0\x21\x12\xa4\x42" + bytes(12)
    deadline = time.monotonic() + START_TIMEOUT_S
    with world.client_socket() as asking:
        asking.settimeout(0.05)
        asking.connect(SERVER)
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(TimeoutError, ConnectionError):
                asking.send(binding)
                asking.recv(100)
                return
    raise WorldError(f"{name} does not serve: {log.read_text(errors='replace')[-500:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """The whole session of a relay; sockets and ports are free again after it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- flows ---------------------------------------------------------------------------------------


@attrs.frozen
class Flow:
    """A client and a peer with a channel of an allocation between them, both sockets connected.

    Without a channel (0) nothing stands between them that takes a header off or puts it on.
    """

    client: socket.socket
    peer: socket.socket
    channel: int

    def data(self, size: int, to_peer: bool) -> bytes:
        """What leaves the client or the peer, to be `size` bytes between relay and peer."""
        return channel_data(self.channel, bytes(size)) if to_peer else bytes(size)

    def arriving_bytes(self, size: int, to_peer: bool) -> int:
        if not self.channel:
            return len(self.data(size, to_peer))
        return size if to_peer else size + CHANNEL_HEADER_BYTES

    def close(self) -> None:
        self.client.close()
        self.peer.close()


@contextlib.contextmanager
def flows(world: World, count: int) -> Iterator[list[Flow]]:
    """Allocations with a channel each; the peers have answered, and both ways are proved."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            client, peer = world.client_socket(), world.peer_socket()
            stack.enter_context(client)
            stack.enter_context(peer)
            made.append(_flow(client, peer))
        yield made


def _flow(client: socket.socket, peer: socket.socket) -> Flow:
    now = time.monotonic_ns()
    turn = TurnClient(
        server=SERVER, username=USERNAME, password=PASSWORD, family="ipv4",
        randomness=SystemRandomness(), now=now,
    )  # fmt: skip
    peer_address = Address(*peer.getsockname())
    turn.bind(peer_address, now)
    client.connect(SERVER)
    client.settimeout(0.1)
    _drive(turn, client, lambda: turn.statistics()["transactions"] == 0)
    if turn.relayed is None or not any(isinstance(e, Permitted) for e in turn.drain_events()):
        raise WorldError("no allocation with a permission")
    peer.connect(turn.relayed)
    flow = Flow(client, peer, FIRST_CHANNEL)
    _prove(flow)
    return flow


def _drive(turn: TurnClient, client: socket.socket, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SETUP_TIMEOUT_S
    while not done():
        for datagram in turn.drain_datagrams():
            client.send(datagram)
        with contextlib.suppress(TimeoutError):
            turn.receive(client.recv(2048), time.monotonic_ns())
        turn.handle_timeout(time.monotonic_ns())
        if turn.state == "over" or time.monotonic() > deadline:
            lost = [event for event in turn.drain_events() if isinstance(event, Lost)]
            raise WorldError(f"no allocation: {lost or 'too slow'}")


def _prove(flow: Flow) -> None:
    """The peer answers first, since relays may limit what goes to one that never did."""
    for _ in range(5):
        with contextlib.suppress(TimeoutError):
            flow.peer.send(b"answer")
            if flow.client.recv(100)[:10] != channel_data(flow.channel, b"answer"):
                raise WorldError("what the peer sent did not come by the channel")
            flow.client.send(channel_data(flow.channel, b"request"))
            flow.peer.settimeout(0.1)
            if flow.peer.recv(100) != b"request":
                raise WorldError("what the client sent did not arrive as it was")
            return
    raise WorldError("a channel carries nothing")


# --- what the generator sends --------------------------------------------------------------------


@contextlib.contextmanager
def thin(world: World, made: Sequence[Flow], size: int, to_peer: bool) -> Iterator[Ends]:
    """One packet of each flow in turn."""
    with world.packet_socket(world.client if to_peer else world.peer) as sending:
        hardware = world.hardware(world.client if to_peer else world.peer)
        messages = []
        for flow in made:
            end = flow.client if to_peer else flow.peer
            data = flow.data(size, to_peer)
            messages.append(frame(hardware, end.getsockname(), end.getpeername(), data))
        yield Ends(
            sending=sending,
            messages=messages,
            packets=1,
            receiving=[flow.peer if to_peer else flow.client for flow in made],
            arriving_bytes=made[0].arriving_bytes(size, to_peer),
        )


@contextlib.contextmanager
def bulk(flow: Flow, size: int, to_peer: bool) -> Iterator[Ends]:
    """One flow in trains: UDP_SEGMENT at the sender, UDP_GRO at the receiver."""
    data = flow.data(size, to_peer)
    sending, receiving = (flow.client, flow.peer) if to_peer else (flow.peer, flow.client)
    message, packets = train(data)
    sending.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, len(data))
    receiving.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    try:
        yield Ends(
            sending=sending,
            messages=[message],
            packets=packets,
            receiving=[receiving],
            arriving_bytes=flow.arriving_bytes(size, to_peer),
        )
    finally:
        sending.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 0)
        receiving.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 0)


@contextlib.contextmanager
def without_relay(world: World, count: int, to_peer: bool) -> Iterator[list[Flow]]:
    """Flows that end in the relay's namespace, to see what the generator alone does. They are
    `Flow`s whose other end is a plain socket where the relay would receive."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            near = world.client_socket() if to_peer else world.peer_socket()
            far = world.sink_socket(LISTEN if to_peer else RELAYED)
            stack.enter_context(near)
            stack.enter_context(far)
            near.connect(far.getsockname())
            far.connect(near.getsockname())
            made.append(Flow(near, far, 0) if to_peer else Flow(far, near, 0))
        yield made


# --- many allocations ----------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Allocated:
    """`answering_s` is the time in which the relay had requests before it, `cpu_s` what its
    processes used in all of it."""

    count: int
    answering_s: float
    cpu_s: float


def allocate_many(
    world: World, stack: contextlib.ExitStack, count: int, cpu_s: Callable[[], float]
) -> Allocated:
    """Make allocations, each from a port of its own with its own 401; they stand, with their
    sockets, until `stack` is closed. All first requests of a batch go out before any answer is
    read, then all second ones: so the relay is busy, and the client's own work is not in the
    time."""
    answering_s = used_s = 0.0
    for begun in range(0, count, ALLOCATIONS_AT_ONCE):
        size = min(ALLOCATIONS_AT_ONCE, count - begun)
        sockets = [stack.enter_context(world.client_socket()) for _ in range(size)]
        now = time.monotonic_ns()
        clients = [
            TurnClient(
                server=SERVER, username=USERNAME, password=PASSWORD, family="ipv4",
                randomness=SystemRandomness(), now=now,
            )
            for _ in range(size)
        ]  # fmt: skip
        for each in sockets:
            each.connect(SERVER)
        for _ in ("challenge", "success"):
            used_before, began = cpu_s(), time.perf_counter()
            answers = _exchange(sockets, [turn.drain_datagrams() for turn in clients])
            answering_s += time.perf_counter() - began
            used_s += cpu_s() - used_before
            for turn, answer in zip(clients, answers, strict=True):
                turn.receive(answer, time.monotonic_ns())
        if not all(turn.relayed for turn in clients):
            raise WorldError(f"an allocation was refused: {clients[0].drain_events()}")
    return Allocated(count=count, answering_s=answering_s, cpu_s=used_s)


def _exchange(sockets: Sequence[socket.socket], requests: Sequence[list[bytes]]) -> list[bytes]:
    """One answer for each socket's requests. What is lost is sent again after a while."""
    answers: list[bytes | None] = [None] * len(sockets)
    with selectors.DefaultSelector() as selector:
        for number, each in enumerate(sockets):
            selector.register(each, selectors.EVENT_READ, number)
        for _ in range(5):
            for each, request, answer in zip(sockets, requests, answers, strict=True):
                if answer is None:
                    for datagram in request:
                        each.send(datagram)
            while None in answers:
                ready = selector.select(0.5)
                if not ready:
                    break
                for key, _ in ready:
                    answers[key.data] = sockets[key.data].recv(2048)
    if None in answers:
        raise WorldError("the relay left requests without an answer")
    return [answer for answer in answers if answer is not None]


# --- what a relay uses ---------------------------------------------------------------------------


def cpu_s(pids: Sequence[int]) -> float:
    """User and system time of all threads of these processes so far (schedstat, ns)."""
    used_ns = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            used_ns += int((task / "schedstat").read_text().split()[0])
    return used_ns / 1e9


def proportional_bytes(pids: Sequence[int]) -> int:
    """Memory of these processes, what they share divided among them (PSS)."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total
