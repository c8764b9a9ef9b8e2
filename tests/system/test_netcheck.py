"""Netcheck behind NATs of the kernel: it says what they are, and what it exports is, in the
simulator, what they are."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import attrs
import pytest

from channel.credentials import encode_token
from simulations.kernel.lab import Host, Lab, NatKind
from simulations.run import run
from simulations.scenario.capture import add, load_capture
from simulations.scenario.load import dump
from tests.simulation.scenarios import scenario
from tests.unit.channel.certificates import Authority

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]
ROOT = Path(__file__).resolve().parents[2]
HOLLOWAY = [sys.executable, "-m", "holloway"]
RELAYS = ("203.0.113.2", "203.0.113.6")
RELAYS6 = ("2001:db8:1::2", "2001:db8:2::2")
PORTAL = ("203.0.113.10", 443)
PUBLIC = "198.51.100.2"
SERVERS = (f"{RELAYS[0]}:3478", f"{RELAYS[0]}:3479", f"{RELAYS[1]}:3478")


@attrs.frozen
class Place:
    """A laptop behind a NAT, and two relays of which the first has two ports."""

    lab: Lab
    home: Host
    laptop: Host
    portal: Host

    def netcheck(
        self, *argv: str, servers: tuple[str, ...] = SERVERS, on: Host | None = None
    ) -> dict[str, Any]:
        """What `holloway netcheck --json` finds on the laptop, or another host."""
        named = [word for server in servers for word in ("--stun", server)]
        nowhere = ["--state-dir", str(self.lab.directory / "none")]
        found: dict[str, Any] = json.loads(
            (on or self.laptop).run(*HOLLOWAY, "netcheck", "--json", *nowhere, *named, *argv)
        )
        return found


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with Lab() as lab, contextlib.ExitStack() as running:
        core = lab.router("core")
        hosts = [
            lab.public_host(f"relay-{number}", core, f"{ipv4}/30", f"{ipv6}/64")
            for number, (ipv4, ipv6) in enumerate(zip(RELAYS, RELAYS6, strict=True))
        ]
        portal = lab.public_host("portal", core, f"{PORTAL[0]}/30", "2001:db8:3::2/64")
        home = lab.nat("home", core, wan=f"{PUBLIC}/30", lan="192.168.1.1/24")
        laptop = lab.host("laptop", home, "192.168.1.10/24")
        for host, ipv4, ipv6 in zip(hosts, RELAYS, RELAYS6, strict=True):
            listen = (f"{ipv4}:3478", f"[{ipv6}]:3478", f"{ipv4}:3479")
            running.enter_context(relay(host, listen, lab.directory))
        yield Place(lab, home, laptop, portal)


@contextlib.contextmanager
def relay(host: Host, listen: Sequence[str], folder: Path) -> Iterator[None]:
    users = folder / "users"
    users.write_text("user:password\n")
    users.chmod(0o600)
    argv = [
        *HOLLOWAY, "relay", "--standalone", "--users-file", str(users),
        "--observability", "", *(word for each in listen for word in ("--listen", each)),
    ]  # fmt: skip
    process = host.spawn(argv, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while ":3479" not in host.run("ss", "-lun"):
            assert process.poll() is None, "the relay ended"
            assert time.monotonic() < deadline, "the relay does not listen"
            time.sleep(0.1)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def tls_server(host: Host, chain: Path, key: Path) -> Iterator[list[bytes]]:
    """Takes connections at the portal's port; the list is what was said to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    with host.entered():
        listener = socket.create_server(PORTAL)
    heard: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken, _ = listener.accept()
                taken.settimeout(10)
                with (
                    contextlib.suppress(OSError),
                    context.wrap_socket(taken, server_side=True) as tls,
                ):
                    heard.append(tls.recv(1_000))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield heard
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=20)


@contextlib.contextmanager
def udp_blocked(nat: Host) -> Iterator[None]:
    nat.nft(
        """
        table ip blockade {
          chain forward {
            type filter hook forward priority filter - 1;
            meta l4proto udp drop
          }
        }
        """
    )
    try:
        yield
    finally:
        nat.run("nft", "delete", "table", "ip", "blockade")


def set_nat(place: Place, kind: NatKind) -> None:
    place.home.set_nat(kind)
    place.home.flush_bindings()


@pytest.mark.parametrize(
    ("kind", "mapping", "ports", "outcome"),
    [
        ("port_restricted", "endpoint_independent", "preserve", "direct"),
        ("symmetric", "address_and_port_dependent", "random", "relayed"),
    ],
)
def test_what_it_says_of_a_nat_holds_in_the_simulator(
    place: Place, tmp_path: Path, kind: NatKind, mapping: str, ports: str, outcome: str
) -> None:
    set_nat(place, kind)
    file = tmp_path / "capture.toml"
    found = place.netcheck("--export", str(file), "--name", "flat")
    nat = found["ipv4"]["nat"]
    assert found["ipv4"]["udp"] == "works"
    assert (nat["present"], nat["mapping"], nat["ports"]) == (True, mapping, ports)
    assert (nat["filtering"], nat["hairpinning"]) == ("not_measured", "none")
    assert nat["public_hosts"] == [PUBLIC]
    assert found["link"] == {"name": "eth0", "mtu": 1_500, "prefix": "192.168.1.0/24"}
    assert PUBLIC not in file.read_text()

    whole = add(scenario(), load_capture(file), user="grace")
    outcomes = {pair.client: pair.outcome for pair in run(whole, 1).pairs}
    assert outcomes == {"laptop": "direct", "flat-client": outcome}

    saved = tmp_path / "scenario.toml"
    saved.write_text(dump(scenario(duration="3s")))
    report = tmp_path / "report.json"
    done = subprocess.run(
        [*HOLLOWAY, "sim", "run", str(saved), "--add", str(file), "--as", "grace",
         "--json", str(report)],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "flat-client" in report.read_text()


def test_one_port_of_each_relay_tells_that_a_hard_nat_is_hard(place: Place) -> None:
    set_nat(place, "symmetric")
    found = place.netcheck(servers=(SERVERS[0], SERVERS[2]))
    assert found["ipv4"]["nat"]["mapping"] == "endpoint_dependent"


def test_where_udp_is_blocked_the_portal_is_reached_by_tcp_and_proved_by_its_pin(
    place: Place, tmp_path: Path
) -> None:
    set_nat(place, "port_restricted")
    authority, other = Authority("ours"), Authority("another")
    chain, key = tmp_path / "chain", tmp_path / "key"
    for path, content in zip((chain, key), authority.issue_pem(PORTAL[0]), strict=True):
        path.write_bytes(content)
    found = []
    file = tmp_path / "capture.toml"
    with udp_blocked(place.home), tls_server(place.portal, chain, key) as heard:
        for pin in (authority.pin, other.pin):
            token = tmp_path / "token"
            token.touch(mode=0o600)
            address = f"{PORTAL[0]}:{PORTAL[1]}"
            secret = encode_token("client", UUID(int=1), b"s" * 32, address, pin)
            token.write_text(secret.reveal_text())
            found.append(place.netcheck("--token-file", str(token), "--export", str(file)))
    for each, proved in zip(found, (True, False), strict=True):
        assert each["ipv4"]["udp"] == "blocked"
        assert (each["portal"]["reachable"], each["portal"]["proved"]) == (True, proved)
    assert set(heard) <= {b""}, "something was said to it"
    (network,) = load_capture(file).networks
    assert network.firewall.udp == "drop"


def test_a_machine_without_a_nat_and_with_ipv6_is_found_to_be_one(
    place: Place, tmp_path: Path
) -> None:
    file = tmp_path / "capture.toml"
    servers = (*SERVERS, *(f"[{each}]:3478" for each in RELAYS6))
    found = place.netcheck("--export", str(file), servers=servers, on=place.portal)
    for family in ("ipv4", "ipv6"):
        assert found[family]["udp"] == "works"
        assert found[family]["nat"]["present"] is False
        assert found[family]["nat"]["mapping"] == "endpoint_independent"
    assert found["ipv6"]["local_host"] == "2001:db8:3::2"
    (network,) = load_capture(file).networks
    assert network.nat is None
    assert network.prefix6
    assert "2001:db8:3:" not in file.read_text()


def test_nobody_else_is_sent_anything(place: Place) -> None:
    set_nat(place, "port_restricted")
    place.home.nft(
        """
        table ip watch {
          set seen { type ipv4_addr . inet_service; flags dynamic; size 100; }
          chain early {
            type filter hook prerouting priority raw;
            iifname "lan" meta l4proto udp add @seen { ip daddr . udp dport }
          }
        }
        """
    )
    try:
        found = place.netcheck()
        seen = json.loads(place.home.run("nft", "-j", "list", "set", "ip", "watch", "seen"))
    finally:
        place.home.run("nft", "delete", "table", "ip", "watch")
    elements = seen["nftables"][1]["set"]["elem"]
    reached = {":".join(map(str, each["concat"])) for each in elements}
    own = {each for each in reached if each.startswith(PUBLIC)}
    assert reached - own == set(SERVERS)
    assert len(own) == 2  # both ways of the hairpin
    assert found["packets_sent"] <= 63
