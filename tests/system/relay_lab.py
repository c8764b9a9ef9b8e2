"""A relay as a process in a network of namespaces with public-looking addresses, over UDP, TCP and
TLS, before clients that others wrote."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

from simulations.kernel.lab import Host, Lab
from tests.unit.channel.certificates import Authority

ROOT = Path(__file__).resolve().parent.parent.parent
FOREIGN = ROOT / "build" / "foreign"
"""What `tools/setup test` installed or built for these tests alone."""
RELAY = "203.0.113.6"
CLIENT = "198.51.100.2"
PEER = "192.0.2.10"
METRICS = ("127.0.0.1", 9478)
MESSAGES = int(os.environ.get("HOLLOWAY_FOREIGN_MESSAGES", "0"))
"""How many messages each client of coturn and pion sends; 0: as many as tell what is to be told."""
AUTHORITY = Authority("web")


@attrs.frozen(kw_only=True)
class Network:
    """Three hosts around a router, and a folder for this run."""

    relay: Host
    client: Host
    peer: Host
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "relay.log"

    @property
    def authority(self) -> Path:
        """The certificate of the authority that clients have to know."""
        return self.folder / "authority.pem"


@contextlib.contextmanager
def relay_network() -> Iterator[Network]:
    with Lab() as lab:
        core = lab.router("core")
        network = Network(
            relay=lab.public_host("relay", core, f"{RELAY}/30"),
            client=lab.public_host("client", core, f"{CLIENT}/30"),
            peer=lab.public_host("peer", core, f"{PEER}/24"),
            folder=lab.directory,
        )
        for name in ("chain.pem", "key.pem", "password"):
            (network.folder / name).touch(mode=0o600)
        (network.folder / "password").write_text("opensesame\n")
        yield network


def renew_certificate(network: Network) -> None:
    chain, key = AUTHORITY.issue_pem(RELAY)
    (network.folder / "chain.pem").write_bytes(chain)
    (network.folder / "key.pem").write_bytes(key)
    last = b"-----BEGIN CERTIFICATE-----" + chain.rpartition(b"-----BEGIN CERTIFICATE-----")[2]
    network.authority.write_bytes(last)


@contextlib.contextmanager
def running(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The whole session of a process is ended with this block."""
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.05)


@contextlib.contextmanager
def relay_process(network: Network, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """`holloway relay --standalone --user alice`, with a certificate of files, ready to serve."""
    renew_certificate(network)
    argv = [
        sys.executable, "-m", "holloway", "relay", "--standalone", "--user", "alice",
        "--password-file", str(network.folder / "password"), "--listen", f"{RELAY}:3478",
        "--tls-certificate", str(network.folder / "chain.pem"),
        "--tls-key", str(network.folder / "key.pem"), *flags,
    ]  # fmt: skip
    with (
        network.log.open("wb") as log,
        running(network.relay.spawn(argv, stderr=log, cwd=ROOT)) as process,
    ):
        wait_until(lambda: network.log.read_text().count("listening") == 3, "the relay listens")
        wait_until(lambda: is_observable(network), "its metrics can be read")
        yield process


@contextlib.contextmanager
def echoing_peer(network: Network) -> Iterator[None]:
    """coturn's peer: it sends back what comes to its ports 3480 and 3481."""
    with running(network.peer.spawn(["turnutils_peer", "-L", PEER], stdout=subprocess.DEVNULL)):
        yield


def metrics(network: Network) -> dict[str, float]:
    with network.relay.connect(METRICS) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n")
        parts = []
        while part := connection.recv(65_536):
            parts.append(part)
    lines = b"".join(parts).decode().splitlines()
    found = [re.fullmatch(r"holloway_relay_(\w+(?:{.*})?) (\S+)", line) for line in lines]
    return {each[1]: float(each[2]) for each in found if each}


def is_observable(network: Network) -> bool:
    try:
        return bool(metrics(network))
    except OSError:
        return False


def installed(name: str) -> Path:
    """A program or folder below `build/foreign`."""
    path = FOREIGN / name
    assert path.exists(), f"build/foreign/{name} is missing: run tools/setup test"
    return path


def connection_of(network: Network, port: int) -> socket.socket:
    return network.client.connect((RELAY, port))
