"""Forwarding of a gateway and routes of a client, on the kernel: set up, used, exactly restored."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from simulations.kernel.lab import Host, Lab

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parents[2]

# Runs in a gateway's namespace. Commands come on standard input, one a line.
GATEWAY = """
import sys
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from pathlib import Path
import trio
from channel.messages import Interface
from gateways.agent import FlushTranslations
from gateways.forwarding import GatewayForwarding
from tunnel.agent import InterfaceChanged
from tunnel.shell.tun import TunDevice

INTERFACE = Interface(
    ipv4=IPv4Address("100.64.1.1"), ipv6=IPv6Address("fd48:4c57:5900::101"),
    range_ipv4=IPv4Network("100.64.0.0/11"), range_ipv6=IPv6Network("fd48:4c57:5900::/64"))

async def main(tun):
    forwarding = GatewayForwarding(directory=Path(sys.argv[1]))
    await forwarding.start(tun)
    await forwarding.perform(InterfaceChanged(interface=INTERFACE))
    print("ready", tun.name, flush=True)
    while True:
        line = (await trio.to_thread.run_sync(sys.stdin.readline)).split()
        if not line or line[0] == "stop":
            break
        if line[0] == "send":
            tun.write_batch([bytes.fromhex(line[1])])
        elif line[0] == "receive":
            packets = []  # the kernel's own chatter on a new device is IPv6
            with trio.move_on_after(float(line[1])):
                while not packets:
                    await tun.wait_readable()
                    packets += [p.hex() for p in tun.read_batch() if p[0] >> 4 == 4]
            print(*packets, flush=True)
            continue
        elif line[0] == "flush":
            await forwarding.perform(FlushTranslations(
                client=IPv4Address(line[1]), network=ip_network(line[2])))
        print("done", flush=True)
    await forwarding.stop()
    print("stopped", flush=True)

with TunDevice.create("hlw%d") as tun:
    trio.run(main, tun)
"""


class Gateway:
    """The program above, in a namespace."""

    def __init__(self, host: Host, directory: Path) -> None:
        self.host = host
        self.process = host.spawn(
            [sys.executable, "-c", GATEWAY, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        answer = self.read().split()
        assert answer[0] == "ready"
        self.device = answer[1]

    def ask(self, *words: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write((" ".join(words) + "\n").encode())
        self.process.stdin.flush()
        return self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def send(self, packet: bytes) -> None:
        assert self.ask("send", packet.hex()) == "done"

    def receive(self, seconds: float) -> list[bytes]:
        return [bytes.fromhex(word) for word in self.ask("receive", str(seconds)).split()]

    def stop(self) -> None:
        assert self.ask("stop") == "stopped"
        assert self.process.wait(timeout=10) == 0


def udp(source: str, destination: str, ports: tuple[int, int], data: bytes) -> bytes:
    header = struct.pack(">BBHHHBBH", 0x45, 0, 28 + len(data), 0, 0, 64, 17, 0)
    header += socket.inet_aton(source) + socket.inet_aton(destination)
    total = sum(struct.unpack(">10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    header = header[:10] + (~total & 0xFFFF).to_bytes(2, "big") + header[12:]
    return header + struct.pack(">HHHH", *ports, 8 + len(data), 0) + data


def switches(host: Host) -> dict[str, str]:
    keys = ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.ipv6.conf.eth0.accept_ra"]
    return {key: host.run("sysctl", "-n", key).strip() for key in keys}


def tables(host: Host) -> list[str]:
    shown = json.loads(host.run("nft", "-j", "list", "tables"))["nftables"]
    return [entry["table"]["name"] for entry in shown if "table" in entry]


ECHO = """
import socket, sys
bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
bound.bind((sys.argv[1], 5353))
print("up", flush=True)
while True:
    data, sender = bound.recvfrom(2000)
    bound.sendto(sender[0].encode() + b" said " + data, sender)
"""


@pytest.fixture
def lab() -> object:
    with Lab() as made:
        core = made.router("core")
        made.nat("office", core, wan="192.0.2.2/30", lan="10.20.0.1/24")
        made.host("gateway", made.hosts["office"], "10.20.0.11/24")
        made.host("server", made.hosts["office"], "10.20.0.80/24")
        yield made


def test_a_gateway_translates_lets_back_only_answers_and_restores_all(lab: Lab) -> None:
    host, server = lab.hosts["gateway"], lab.hosts["server"]
    before, routes_before = switches(host), host.run("ip", "route", "show")
    assert before["net.ipv4.ip_forward"] == "0"
    echo = server.spawn(
        [sys.executable, "-c", ECHO, "10.20.0.80"], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert echo.stdout is not None
    assert echo.stdout.readline() == b"up\n"
    gateway = Gateway(host, lab.directory / "state")
    assert switches(host)["net.ipv4.ip_forward"] == "1"

    gateway.send(udp("100.64.0.1", "10.20.0.80", (4_000, 5353), b"hello"))
    [answer] = gateway.receive(5)
    assert answer[16:20] == bytes([100, 64, 0, 1])
    assert answer[28:] == b"10.20.0.11 said hello"

    # what did not begin in the tunnel does not get into it, nor through this machine
    server.run("ip", "route", "add", "100.64.0.0/11", "via", "10.20.0.11")
    server.run("ip", "route", "add", "203.0.113.0/24", "via", "10.20.0.11")
    intruder = server.run(
        sys.executable,
        "-c",
        "import socket\n"
        "sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "sender.sendto(b'knock', ('100.64.0.1', 4_000))\n",
    )
    assert intruder == ""
    assert gateway.receive(0.5) == []
    # client to client is not forwarded
    gateway.send(udp("100.64.0.1", "100.64.0.2", (4_000, 5353), b"neighbour"))
    assert gateway.receive(0.5) == []

    # nor does a client reach the gateway itself, under any of its addresses
    own = host.spawn([sys.executable, "-c", ECHO, "0.0.0.0"], stdout=subprocess.PIPE, cwd=ROOT)
    assert own.stdout is not None
    assert own.stdout.readline() == b"up\n"
    for address in ("10.20.0.11", "100.64.1.1", "127.0.0.1", "10.20.0.255"):
        gateway.send(udp("100.64.0.1", address, (4_001, 5353), b"gateway?"))
    assert gateway.receive(0.5) == []
    assert "said" in server.run(
        sys.executable,
        "-c",
        "import socket\n"
        "sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "sender.sendto(b'neighbour', ('10.20.0.11', 5353))\n"
        "print(sender.recv(100))\n",
    )
    own.kill()
    own.wait()

    # a revocation makes the kernel forget the flow
    assert "100.64.0.1" in host.run("conntrack", "-L")
    assert gateway.ask("flush", "100.64.0.1", "10.20.0.80/32") == "done"
    assert "src=100.64.0.1" not in host.run("conntrack", "-L")

    gateway.stop()
    echo.kill()
    echo.wait()
    assert switches(host) == before
    assert tables(host) == []
    assert host.run("ip", "route", "show") == routes_before
    assert list((lab.directory / "state").iterdir()) == []


def test_the_start_after_a_crash_puts_back_what_the_dead_gateway_left(lab: Lab) -> None:
    host = lab.hosts["gateway"]
    before = switches(host)
    crashed = Gateway(host, lab.directory / "state")
    crashed.process.send_signal(signal.SIGKILL)
    crashed.process.wait()
    assert switches(host) != before
    assert tables(host) == [f"holloway_gateway_{crashed.device}"]
    second = Gateway(host, lab.directory / "state")
    assert tables(host) == [f"holloway_gateway_{second.device}"]
    second.stop()
    assert switches(host) == before
    assert tables(host) == []


def test_nothing_but_the_own_switches_is_written_on_the_word_of_a_restore_file(lab: Lab) -> None:
    host, state, victim = lab.hosts["gateway"], lab.directory / "state", lab.directory / "victim"
    victim.write_text("as it was")
    before = switches(host)
    inode = host.run("stat", "-L", "-c", "%i", "/proc/self/ns/net").strip()
    state.mkdir(mode=0o700)
    outside = "/".join([".."] * 12)
    for planted in (
        {f"{outside}{victim}": "1"},
        {"net/ipv4/ip_forward": "1; reboot"},
        {"net/ipv6/conf/../../../kernel/panic/accept_ra": "1"},
    ):
        file = state / f"forwarding-{inode}.json"
        file.write_text(json.dumps({"device": "hlw9", "switches": planted}))
        gateway = Gateway(host, state)
        gateway.stop()
        assert victim.read_text() == "as it was"
        assert switches(host) == before


def test_a_machine_that_forwarded_before_goes_on_forwarding(lab: Lab) -> None:
    host = lab.hosts["gateway"]
    host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    gateway = Gateway(host, lab.directory / "state")
    chain = host.run(
        "nft", "list", "chain", "inet", f"holloway_gateway_{gateway.device}", "forward"
    )
    assert chain.strip().splitlines()[-3].strip() == f'oifname "{gateway.device}" drop'
    gateway.stop()
    assert switches(host)["net.ipv4.ip_forward"] == "1"


CLIENT = """
import sys
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
import trio
from channel.messages import Interface
from clients.agent import RoutesChanged
from clients.routing import ClientRouting
from tunnel.agent import InterfaceChanged
from tunnel.shell.tun import TunDevice

INTERFACE = Interface(
    ipv4=IPv4Address("100.64.0.1"), ipv6=IPv6Address("fd48:4c57:5900::1"),
    range_ipv4=IPv4Network("100.64.0.0/11"), range_ipv6=IPv6Network("fd48:4c57:5900::/64"))

async def main(tun):
    routing = ClientRouting(mark=7, table=4711, priority=99)
    await routing.start(tun)
    first = frozenset(map(ip_network, ("10.99.0.0/16", "203.0.113.0/24", "fd99::/64")))
    await routing.perform(InterfaceChanged(interface=INTERFACE))
    await routing.perform(RoutesChanged(networks=first))
    print("ready", flush=True)
    await trio.to_thread.run_sync(sys.stdin.readline)
    await routing.perform(RoutesChanged(networks=frozenset([ip_network("10.99.0.0/16")])))
    print("changed", flush=True)
    await trio.to_thread.run_sync(sys.stdin.readline)
    await routing.stop()
    print("stopped", flush=True)

with TunDevice.create("hlw%d") as tun:
    trio.run(main, tun)
"""


def test_agents_do_without_ipv6_where_it_is_switched_off(lab: Lab) -> None:
    host = lab.hosts["gateway"]
    for scope in ("all", "default"):
        host.run("sysctl", "-qw", f"net.ipv6.conf.{scope}.disable_ipv6=1")
    gateway = Gateway(host, lab.directory / "state")
    assert "100.64.0.0/11" in host.run("ip", "route", "show")
    gateway.stop()
    client = host.spawn(
        [sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert client.stdout is not None
    assert client.stdout.readline() == b"ready\n"
    assert "dev hlw0" in host.run("ip", "route", "get", "10.99.1.1")
    client.communicate(b"\n\n", timeout=10)
    assert client.returncode == 0


def test_a_clients_routes_win_cannot_loop_and_are_removed(lab: Lab) -> None:
    host = lab.hosts["gateway"]
    before = host.run("ip", "rule", "show") + host.run("ip", "-6", "rule", "show")

    def start() -> subprocess.Popen[bytes]:
        return host.spawn(
            [sys.executable, "-c", CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )

    def step(process: subprocess.Popen[bytes], expected: str, *, go: bool = True) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        if go:
            process.stdin.write(b"\n")
            process.stdin.flush()
        assert process.stdout.readline().decode().strip() == expected

    crashed = start()
    step(crashed, "ready", go=False)
    crashed.kill()
    crashed.wait()
    client = start()
    step(client, "ready", go=False)
    assert "dev hlw0" in host.run("ip", "route", "get", "10.99.1.1")
    assert "src 100.64.0.1" in host.run("ip", "route", "get", "10.99.1.1")
    assert "dev hlw0" in host.run("ip", "route", "get", "203.0.113.2")
    assert "dev hlw0" in host.run("ip", "-6", "route", "get", "fd99::1")
    assert "dev eth0" in host.run("ip", "route", "get", "203.0.113.2", "mark", "7")
    assert host.run("ip", "rule", "show").count("4711") == 1
    assert tables(host) == ["holloway_client_hlw0"]
    step(client, "changed")
    assert "dev eth0" in host.run("ip", "route", "get", "203.0.113.2")
    assert "dev hlw0" in host.run("ip", "route", "get", "10.99.1.1")
    step(client, "stopped")
    client.wait(timeout=10)
    assert host.run("ip", "rule", "show") + host.run("ip", "-6", "rule", "show") == before
    assert tables(host) == []


def test_a_neighbour_of_a_client_cannot_feel_for_its_tunnel_addresses(lab: Lab) -> None:
    host, neighbour = lab.hosts["gateway"], lab.hosts["server"]
    client = host.spawn(
        [sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert client.stdout is not None
    assert client.stdout.readline() == b"ready\n"
    neighbour.run("ip", "route", "add", "100.64.0.1/32", "via", "10.20.0.11")
    probe = (
        "import socket, sys\n"
        "asking = socket.socket(socket.AF_INET, socket.SOCK_STREAM)\n"
        "asking.settimeout(0.5)\n"
        "try:\n"
        "    asking.connect((sys.argv[1], 9))\n"
        "except OSError as error:\n"
        "    print(type(error).__name__)\n"
    )
    heard = neighbour.run(sys.executable, "-c", probe, "10.20.0.11").strip()
    assert heard == "ConnectionRefusedError"  # the machine itself answers
    heard = neighbour.run(sys.executable, "-c", probe, "100.64.0.1").strip()
    assert heard == "TimeoutError"  # its tunnel address does not, not even by a reset
    client.communicate(b"\n\n", timeout=10)
