"""Our WireGuard device and Debian's wireguard-go, in namespaces with public-looking addresses.

The foreign peer's timers cannot be shortened. It starts a new handshake by itself two minutes
after the last one, or 15 s after data that got no answer; the test makes it do the latter.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import struct
import subprocess
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.net.address import Address
from runtime.randomness import SystemRandomness
from simulations.kernel.lab import Host, Lab
from tunnel.packet import ICMP, checksum, parse
from tunnel.wireguard.cookies import HANDSHAKES_PER_SECOND
from tunnel.wireguard.device import Device, SessionEstablished
from tunnel.wireguard.noise import public_key_of

pytestmark = pytest.mark.system

OURS, THEIRS = "10.77.0.1", "10.77.0.2"
OUR_PORT, THEIR_PORT = 51_820, 51_821
SECOND = 10**9


class Ours:
    """Our device on a real UDP socket; it answers pings to 10.77.0.1 and counts echo replies."""

    def __init__(self, host: Host, device: Device, peer: tuple[str, int]) -> None:
        with host.entered():
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("203.0.113.2", OUR_PORT))
        self.socket.setblocking(False)
        self.device = device
        self.peer = peer
        self.replies: list[int] = []
        self.requests = 0
        self.sessions = 0
        self.initiations_received = 0

    def ping(self, number: int, length: int = 84) -> None:
        body = struct.pack(">BBHHH", 8, 0, 0, 4242, number) + bytes(length - 28)
        self.device.send("foreign", self._packet(OURS, THEIRS, body), time.monotonic_ns())

    def run_until(self, done: Callable[[], bool], *, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < deadline, self.device.statistics()
            self._turn()

    def deaf_until_an_initiation(self, *, timeout_s: float = 60.0) -> None:
        """Lose everything that comes until the peer starts a handshake, and take that."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not select.select([self.socket], [], [], 0.2)[0]:
                continue
            datagram, (host, port) = self.socket.recvfrom(65_535)
            if datagram[0] == 1:
                self._receive(datagram, Address(host, port))
                return
        raise AssertionError("the foreign peer never started a handshake")

    def _turn(self) -> None:
        due = self.device.poll_timeout()
        if due is not None and due <= time.monotonic_ns():
            self.device.handle_timeout(time.monotonic_ns())
        self._flush()
        readable, _, _ = select.select([self.socket], [], [], 0.05)
        while readable:
            try:
                datagram, (host, port) = self.socket.recvfrom(65_535)
            except BlockingIOError:
                break
            self._receive(datagram, Address(host, port))
        self._flush()

    def _receive(self, datagram: bytes, source: Address) -> None:
        answer = self.device.receive(datagram, source, time.monotonic_ns())
        if answer is None:
            return
        self.peer = source
        self.initiations_received += datagram[0] == 1
        for packet in answer[1]:
            header = parse(packet)
            if header is None or header.protocol != ICMP:
                continue
            if header.is_echo_request:
                self.requests += 1
                body = b"\0" + packet[21:22] + b"\0\0" + packet[24:]
                self.device.send("foreign", self._packet(OURS, THEIRS, body), time.monotonic_ns())
            elif header.is_echo_reply:
                self.replies.append(int.from_bytes(packet[26:28], "big"))

    def _flush(self) -> None:
        for target, datagram in self.device.drain_datagrams():
            self.socket.sendto(datagram, target if isinstance(target, Address) else self.peer)
        for event in self.device.drain_events():
            self.sessions += isinstance(event, SessionEstablished)

    @staticmethod
    def _packet(source: str, destination: str, body: bytes) -> bytes:
        body = body[:2] + checksum(body[:2] + b"\0\0" + body[4:]).to_bytes(2, "big") + body[4:]
        ends = socket.inet_aton(source) + socket.inet_aton(destination)
        header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, 1, 0) + ends
        header = header[:10] + checksum(header).to_bytes(2, "big") + header[12:]
        return header + body


class Foreign:
    """wireguard-go in the other namespace."""

    def __init__(self, host: Host, process: subprocess.Popen[bytes], interface: str) -> None:
        self.host = host
        self.process = process
        self.interface = interface

    def latest_handshake(self) -> int:
        shown = self.host.run("wg", "show", self.interface, "latest-handshakes")
        return int(shown.split()[1])

    def ping(self, count: int = 3, size: int = 56) -> subprocess.Popen[bytes]:
        return self.host.spawn(
            ["ping", "-c", str(count), "-i", "0.2", "-W", "5", "-s", str(size), OURS],
            stdout=subprocess.PIPE,
        )


@pytest.fixture
def tunnel() -> Iterator[tuple[Ours, Foreign]]:
    with Lab() as lab:
        core = lab.router("core")
        left = lab.public_host("ours", core, "203.0.113.2/30")
        right = lab.public_host("theirs", core, "203.0.113.6/30")
        private, their_private = secrets.token_bytes(32), secrets.token_bytes(32)
        preshared = secrets.token_bytes(32)
        interface = f"hlw{lab.run_name}"
        process = right.spawn(
            ["wireguard-go", "-f", interface],
            env={"LOG_LEVEL": "error", "WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD": "1"},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        control = Path(f"/var/run/wireguard/{interface}.sock")
        deadline = time.monotonic() + 20
        while not control.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        configure(lab, right, interface, their_private, public_key_of(private), preshared)
        device = Device(private, randomness=SystemRandomness(), now=time.monotonic_ns())
        device.add_peer(
            "foreign",
            public_key=public_key_of(their_private),
            preshared_key=preshared,
            keepalive_ns=None,
            now=time.monotonic_ns(),
        )
        ours = Ours(left, device, ("203.0.113.6", THEIR_PORT))
        try:
            yield ours, Foreign(right, process, interface)
        finally:
            ours.socket.close()
            process.terminate()
            process.wait(timeout=10)


def configure(
    lab: Lab, host: Host, interface: str, private: bytes, our_public: bytes, preshared: bytes
) -> None:
    path = lab.directory / "foreign.conf"
    path.touch(mode=0o600)
    path.write_text(
        f"""[Interface]
PrivateKey = {b64encode(private).decode()}
ListenPort = {THEIR_PORT}
[Peer]
PublicKey = {b64encode(our_public).decode()}
PresharedKey = {b64encode(preshared).decode()}
AllowedIPs = {OURS}/32
Endpoint = 203.0.113.2:{OUR_PORT}
"""
    )
    host.run("wg", "setconf", interface, os.fspath(path))
    host.ip(
        f"addr add {THEIRS}/24 dev {interface}",
        f"link set {interface} mtu 1280 up",
    )


def test_we_initiate_and_renew_while_traffic_flows(tunnel: tuple[Ours, Foreign]) -> None:
    ours, foreign = tunnel
    for number, length in enumerate([28, 84, 85, 1279, 1280]):
        ours.ping(number, length)
        ours.run_until(lambda number=number: number in ours.replies)
    assert ours.sessions == 1
    first = foreign.latest_handshake()
    assert first > 0
    # REKEY_TIMEOUT has to pass before a peer may shake hands again
    ours.run_until(after(6))
    ours.device.initiate("foreign", time.monotonic_ns())
    ours.run_until(lambda: ours.sessions == 2)
    ours.ping(100)
    ours.run_until(lambda: 100 in ours.replies)
    assert foreign.latest_handshake() > first
    pinging = foreign.ping()
    ours.run_until(lambda: pinging.poll() is not None)
    assert pinging.returncode == 0
    assert ours.initiations_received == 0


def test_the_foreign_peer_initiates_and_renews_by_itself(tunnel: tuple[Ours, Foreign]) -> None:
    ours, foreign = tunnel
    pinging = foreign.ping(size=1252)
    ours.run_until(lambda: pinging.poll() is not None)
    assert pinging.returncode == 0
    assert ours.initiations_received == ours.sessions == 1
    ours.ping(1)
    ours.run_until(lambda: 1 in ours.replies)
    # It starts anew 15 s after data that nobody answered (whitepaper, section 6.3).
    foreign.ping(count=1).wait(timeout=30)
    ours.deaf_until_an_initiation()
    assert ours.initiations_received == 2
    pinging = foreign.ping()
    ours.run_until(lambda: pinging.poll() is not None)
    assert pinging.returncode == 0
    assert ours.sessions == 2
    ours.ping(2)
    ours.run_until(lambda: 2 in ours.replies)


def test_a_foreign_peer_gets_through_our_load_by_the_cookie(tunnel: tuple[Ours, Foreign]) -> None:
    ours, foreign = tunnel
    strangers_address = Address("203.0.113.1", 9)
    stranger = Device(secrets.token_bytes(32), randomness=SystemRandomness(), now=0)
    for number in range(HANDSHAKES_PER_SECOND + 1):
        stranger.add_peer(
            number,
            public_key=ours.device.public_key,
            preshared_key=bytes(32),
            keepalive_ns=None,
            now=0,
        )
        stranger.initiate(number, 0)
    flood = [datagram for _, datagram in stranger.drain_datagrams()]
    pinging = foreign.ping(count=40)

    def over() -> bool:
        for datagram in flood if ours.sessions == 0 else []:
            ours.device.receive(datagram, strangers_address, time.monotonic_ns())
        return ours.replies != [] or pinging.poll() is not None

    ours.run_until(lambda: over() or ours.requests > 0)
    assert ours.sessions == 1
    assert ours.device.statistics().cookies_sent > HANDSHAKES_PER_SECOND
    pinging.terminate()
    pinging.wait()


def after(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until
