"""The relay as a process before foreign clients: coturn's turnutils and aioice; and our client
before coturn's server. Everything runs in namespaces with public-looking addresses."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from relays.client import Allocated, Event, Family, Lost, Permitted, Received, TurnClient
from runtime.clock import SystemClock
from runtime.net.address import Address
from runtime.randomness import SystemRandomness
from simulations.kernel.lab import Host, Lab
from tests.system.relay_lab import MESSAGES, METRICS, ROOT, running, wait_until

pytestmark = pytest.mark.system

RELAY = "203.0.113.6"
RELAY_IPV6 = "2001:db8:6::2"
CLIENT = "198.51.100.2"
CLIENT_IPV6 = "2001:db8:2::2"
PEER = "192.0.2.10"
SERVER = Address(RELAY, 3478)


@attrs.frozen(kw_only=True)
class Network:
    """Three hosts around a router, and a folder for this run."""

    relay: Host
    client: Host
    peer: Host
    folder: Path


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Lab() as lab:
        core = lab.router("core")
        yield Network(
            relay=lab.public_host("relay", core, f"{RELAY}/30", f"{RELAY_IPV6}/64"),
            client=lab.public_host("client", core, f"{CLIENT}/30", f"{CLIENT_IPV6}/64"),
            peer=lab.public_host("peer", core, f"{PEER}/24", "2001:db8:10::2/64"),
            folder=lab.directory,
        )


@contextlib.contextmanager
def relay_process(network: Network, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """`holloway relay --standalone` in the relay's namespace, ready to serve."""
    users = network.folder / "users"
    users.write_text("# of this test\nalice:opensesame\nbob:swordfish\n")
    users.chmod(0o600)
    log = (network.folder / "relay.log").open("wb")
    argv = [
        sys.executable, "-m", "holloway", "relay", "--standalone",
        "--users-file", str(users), "--listen", f"{RELAY}:3478", "--listen", f"[{RELAY_IPV6}]:3478",
        "--log-format", "json", *flags,
    ]  # fmt: skip
    with running(network.relay.spawn(argv, stderr=log, cwd=ROOT)) as process:
        wait_until(lambda: is_answering(network), "the relay answers")
        yield process


def is_answering(network: Network) -> bool:
    with network.client.entered():
        asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with asking:
        asking.settimeout(0.2)
        asking.sendto(b"\0\1\0\0\x21\x12\xa4\x42" + bytes(12), SERVER)
        try:
            return asking.recv(100)[:2] == b"\1\1"
        except (TimeoutError, ConnectionError):
            return False


def is_bound(host: Host, address: tuple[str, int]) -> bool:
    """Whether some program there has this UDP port."""
    with host.entered():
        trying = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with trying:
        try:
            trying.bind(address)
        except OSError:
            return True
    return False


def http_get(network: Network, path: str) -> str:
    with network.relay.connect(METRICS) as connection:
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n".encode()
        )
        parts = []
        while part := connection.recv(65_536):
            parts.append(part)
    return b"".join(parts).decode()


def metric(network: Network, name: str) -> float:
    found = re.search(
        rf"^holloway_relay_{name}(?:_total)? (\S+)$", http_get(network, "/metrics"), re.M
    )
    return float(found[1]) if found else 0.0


def udp_socket(host: Host, address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with host.entered():
        made = socket.socket(family, socket.SOCK_DGRAM)
    made.bind((address, 0))
    made.settimeout(0.1)
    return made


@pytest.mark.parametrize("way", [(), ("--no-compiled-drain",), ("--processes", "2")])
def test_coturns_clients_lose_nothing(network: Network, way: tuple[str, ...]) -> None:
    """Side by side: an echoing peer or other clients (`-y`), channels or Send indications (`-s`),
    pairs of ports or not (`-c`), and so on. A port that one of several processes reserved is not
    found by the other: there the pairs are left out."""
    no_pairs = ("-c",) if "--processes" in way else ()
    forms = {
        "a peer, channels, pairs of ports": ("-e", PEER),
        "a peer, indications": ("-e", PEER, "-s"),
        "between clients": ("-y",),
        "between clients, indications": ("-s", "-y"),
        "fragments forbidden, no pairs": ("-e", PEER, "-g", "-c"),
        "fragments forbidden, indications": ("-y", "-g", "-s"),
        "padded ChannelData": ("-e", PEER, "-D", "-l", "173"),
        "more requests than needed": ("-e", PEER, "-G"),
        "more requests, indications": ("-e", PEER, "-s", "-c", "-G"),
        "IPv4 asked for": ("-e", PEER, "-X"),
        "IPv6 relayed addresses": ("-x", "-y"),
        "clients that come by IPv6": ("-y", "-x", "-L", CLIENT_IPV6),
        "large messages": ("-e", PEER, "-c", "-l", "180", "-m", "5"),
    }
    with (
        relay_process(network, *way),
        running(network.peer.spawn(["turnutils_peer", "-L", PEER], stdout=subprocess.DEVNULL)),
        contextlib.ExitStack() as stack,
    ):
        clients = {
            name: stack.enter_context(
                running(
                    network.client.spawn(
                        ["turnutils_uclient", "-L", CLIENT, *flags, *no_pairs, "-u", "alice",
                         "-w", "opensesame", "-n", str(MESSAGES or 5),
                         RELAY_IPV6 if CLIENT_IPV6 in flags else RELAY],
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                    )
                )
            )
            for name, flags in forms.items()
        }  # fmt: skip
        for name, client in clients.items():
            output = client.communicate(timeout=60 + MESSAGES)[0].decode()
            sent = re.search(r"tot_send_msgs=(\d+), tot_recv_msgs=(\d+)\n.*tot_send_bytes", output)
            assert sent is not None, f"{name}:\n{output}"
            assert int(sent[1]) == int(sent[2]) > 0, f"{name}:\n{output}"
            assert "Total lost packets 0 (0.0" in output, f"{name}:\n{output}"


def test_coturns_clients_are_told_what_is_not_served(network: Network) -> None:
    with relay_process(network):
        for flags, words in (
            (("-y", "-w", "guess"), "Cannot complete Allocation"),
            (("-w", "opensesame", "-e", "10.0.0.1"), "error 403"),
        ):
            output = network.client.run(
                "turnutils_uclient", "-u", "alice", *flags, "-n", "1", RELAY, check=False
            )
            assert words in output


def test_aioices_turn_client_gets_its_answer(network: Network) -> None:
    script = f"""
import asyncio
from aioice import turn

class Receiver(asyncio.DatagramProtocol):
    def __init__(self):
        self.heard = asyncio.get_running_loop().create_future()
    def datagram_received(self, data, address):
        self.heard.set_result((data, address))

async def main():
    transport, receiver = await turn.create_turn_endpoint(
        Receiver, server_addr=({RELAY!r}, 3478), username="bob", password="swordfish")
    transport.sendto(b"hello from aioice", ({PEER!r}, 3480))
    print(await asyncio.wait_for(receiver.heard, 20), transport.get_extra_info("sockname"))
    transport.close()
    await asyncio.sleep(0.5)
asyncio.run(main())
"""
    with (
        relay_process(network),
        running(network.peer.spawn(["turnutils_peer", "-L", PEER], stdout=subprocess.DEVNULL)),
    ):
        output = network.client.run(sys.executable, "-c", script, timeout_s=60)
        assert f"(b'hello from aioice', ({PEER!r}, 3480)) ({RELAY!r}," in output
        wait_until(lambda: metric(network, "allocations") == 0, "aioice gave its allocation back")


class Driven:
    """Our client core on a real socket, driven by hand."""

    def __init__(
        self, network: Network, password: str = "opensesame", family: Family = "ipv4"
    ) -> None:
        self.socket = udp_socket(network.client, CLIENT)
        self.events: list[Event] = []
        self._clock = SystemClock()
        self.client = TurnClient(
            server=SERVER,
            username="alice",
            password=password,
            family=family,
            randomness=SystemRandomness(),
            now=self.now(),
        )

    def now(self) -> int:
        return self._clock.monotonic_ns()

    def turn(self) -> None:
        for datagram in self.client.drain_datagrams():
            self.socket.sendto(datagram, SERVER)
        with contextlib.suppress(TimeoutError):
            self.client.receive(self.socket.recv(2048), self.now())
        self.client.handle_timeout(self.now())
        self.events += self.client.drain_events()

    def until(self, kind: type[Event]) -> Event:
        def came() -> bool:
            self.turn()
            return any(isinstance(event, kind) for event in self.events)

        wait_until(came, kind.__name__)
        found = next(event for event in self.events if isinstance(event, kind))
        self.events.remove(found)
        return found

    def settle(self) -> None:
        """Until every request has its answer."""

        def is_settled() -> bool:
            self.turn()
            return self.client.statistics()["transactions"] == 0

        wait_until(is_settled, "answers")


def hold_a_conversation(network: Network) -> None:
    """Our client allocates, talks by indication and by channel, and gives back."""
    driven, peer = Driven(network), udp_socket(network.peer, PEER)
    at_peer = Address(*peer.getsockname())
    with driven.socket, peer:
        allocated = driven.until(Allocated)
        assert isinstance(allocated, Allocated)
        assert allocated.relayed.host == RELAY
        assert allocated.reflexive == driven.socket.getsockname()
        for ask, data in (
            (driven.client.permit, b"by indication"),
            (driven.client.bind, b"by channel"),
        ):
            ask(at_peer, driven.now())
            driven.until(Permitted)
            driven.settle()
            assert driven.client.send(at_peer, data, driven.now())
            driven.turn()
            received, sender = peer.recvfrom(2048)
            assert (received, sender) == (data, allocated.relayed)
            peer.sendto(data[::-1], sender)
            assert driven.until(Received) == Received(at_peer, data[::-1])
        driven.client.probe(driven.now())
        driven.settle()
        driven.client.close(driven.now())
        driven.settle()
        assert driven.client.state == "over"
        assert driven.events == []


def test_our_client_talks_through_our_relay(network: Network) -> None:
    with relay_process(network):
        hold_a_conversation(network)
        assert metric(network, "allocations") == 0
        assert metric(network, "allocations_made") == 1
        assert metric(network, "relayed_packets") >= 4
        assert '"ready":true' in http_get(network, "/readyz")


def test_our_client_talks_through_coturn(network: Network) -> None:
    argv = [
        "turnserver", "-n", "--no-cli", "--no-tls", "--no-dtls", "--lt-cred-mech", "-L", RELAY,
        "-r", "holloway", "-u", "alice:opensesame", "--log-file", "stdout",
        "--pidfile", str(network.folder / "turnserver.pid"),
        "--userdb", str(network.folder / "turndb"),
    ]  # fmt: skip
    log = (network.folder / "coturn.log").open("wb")
    with running(network.relay.spawn(argv, stdout=log, stderr=log, cwd=network.folder)):
        wait_until(lambda: is_answering(network), "coturn answers")
        hold_a_conversation(network)
        driven = Driven(network, "guess")
        with driven.socket:
            lost = driven.until(Lost)
        assert isinstance(lost, Lost)
        assert lost.code == 401


def test_a_relay_that_is_killed_and_started_again_is_noticed(network: Network) -> None:
    with relay_process(network):
        driven = Driven(network)
        driven.until(Allocated)
    with driven.socket, relay_process(network):
        driven.client.probe(driven.now())
        lost = driven.until(Lost)
        assert isinstance(lost, Lost)
        assert lost.code == 437


def test_sigterm_drains_and_ends_when_the_last_guest_has_left(network: Network) -> None:
    with relay_process(network, "--alternate-server", "203.0.113.99:3478") as process:
        guest = Driven(network)
        guest.until(Allocated)
        os.killpg(process.pid, signal.SIGTERM)
        wait_until(lambda: '"ready":false' in http_get(network, "/readyz"), "draining")
        late = Driven(network)
        lost = late.until(Lost)
        assert isinstance(lost, Lost)
        assert lost.code == 300
        guest.client.permit(Address(PEER, 5000), guest.now())
        guest.until(Permitted)
        assert process.poll() is None
        guest.client.close(guest.now())
        guest.turn()
        assert process.wait(timeout=30) == 0
        guest.socket.close()
        late.socket.close()


def test_a_draining_relay_does_not_wait_for_ever(network: Network) -> None:
    with relay_process(network, "--drain-timeout-s", "0.5") as process:
        guest = Driven(network)
        guest.until(Allocated)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        guest.socket.close()


def test_settings_that_cannot_work_are_explained(network: Network) -> None:
    users = network.folder / "open-users"
    users.write_text("alice:opensesame\n")
    users.chmod(0o644)
    for flags, words in (
        (["--standalone"], "users_file"),
        (["--listen", "0.0.0.0:3478"], "relay_address"),
        (["--listen", "203.0.113.6"], "listen"),
        (["--standalone", "--users-file", str(users), "--listen", f"{RELAY}:3478"], "0600"),
        (["--listen", f"{RELAY}:3478", "--relayed-ports", "5-9"], "relayed_ports"),
        (["--listen", f"{RELAY}:3478"], "no token is given"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "holloway", "relay", *flags],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
        )
        assert done.returncode == 1
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert "opensesame" not in done.stderr
