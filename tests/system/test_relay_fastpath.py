"""The XDP fast path between real network devices: a relay as a process, its clients and peers in
namespaces, and what becomes of their packets when the right to send them ends. Some 650 lines,
since the namespaces, which take a second, and the ends in them are those of all its tests."""

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
from typing import Final

import attrs
import pytest

from relays.authentication import StaticCredentials
from relays.client import Allocated, Event, Permitted, TurnClient
from relays.fastpath.attaching import (
    Attached,
    Unavailable,
    attach_fast_path,
    read_counts,
    shared_fast_path,
)
from relays.fastpath.elf import ProgramObject
from relays.fastpath.loader import LoadedProgram
from relays.server import Server
from relays.turn import NS
from runtime.clock import SystemClock
from runtime.net.address import Address
from runtime.randomness import SeededRandomness, SystemRandomness
from simulations.kernel.lab import Host, Lab
from tests.unit.relays.bench import LIFETIME_0, LISTENER, USERS, Bench, Caller, MemorySockets

pytestmark = pytest.mark.system

ROOT: Final = Path(__file__).resolve().parent.parent.parent
RELAY, RELAY_IPV6 = "203.0.113.6", "2001:db8:6::2"
CLIENT, CLIENT_IPV6 = "198.51.100.2", "2001:db8:2::2"
PEER, PEER_IPV6 = "192.0.2.10", "2001:db8:10::2"
SECOND = "192.0.2.194"
BEHIND = "198.18.0.2"
UDP_SEGMENT: Final = 103
PORT: Final = 3478
METRICS: Final = ("127.0.0.1", 9478)
PACKETS: Final = 200
CHANNEL: Final = 0x4000
# r0 = XDP_PASS; exit
PASSES: Final = bytes.fromhex("b700000002000000") + bytes.fromhex("9500000000000000")


@attrs.frozen(kw_only=True)
class Network:
    """Hosts around a router. `second` has its checksums completed by (what passes for) hardware,
    `client` and `peer` complete them themselves. `behind` hangs on the relay's second device."""

    core: Host
    relay: Host
    client: Host
    peer: Host
    second: Host
    behind: Host
    folder: Path


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Lab() as lab:
        core = lab.router("core")
        built = Network(
            core=core,
            relay=lab.public_host("relay", core, f"{RELAY}/30", f"{RELAY_IPV6}/64"),
            client=lab.public_host("client", core, f"{CLIENT}/30", f"{CLIENT_IPV6}/64"),
            peer=lab.public_host("peer", core, f"{PEER}/25", f"{PEER_IPV6}/64"),
            second=lab.public_host("second", core, f"{SECOND}/26"),
            behind=lab.public_host("behind", core, "198.51.100.66/30"),
            folder=lab.directory,
        )
        built.relay.ip(
            f"link add eth1 type veth peer name eth1 netns {built.behind.name}",
            "addr add 198.18.0.1/30 dev eth1",
            "link set eth1 up",
        )
        built.behind.ip(
            f"addr add {BEHIND}/30 dev eth1",
            "link set eth1 up",
            f"route add {RELAY} via 198.18.0.1",
        )
        for host, device in ((built.client, "eth0"), (built.peer, "eth0"), (built.behind, "eth1")):
            host.run("ethtool", "-K", device, "tx", "off")
        # the other end of a veth takes what driver mode sends only if it has a program too
        taking = LoadedProgram(
            ProgramObject(instructions=PASSES, license=b"GPL", maps=(), map_by_offset={}), "passes"
        )
        try:
            for host, device in ((core, built.relay.uplink), (built.behind, "eth1")):
                with host.entered():
                    taking.attach(socket.if_nametoindex(device), "driver")
            yield built
        finally:
            taking.close()


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)


@contextlib.contextmanager
def relay_process(
    network: Network, *flags: str, before: tuple[str, ...] = (), listen: str = f"{RELAY}:{PORT}"
) -> Iterator[subprocess.Popen[bytes]]:
    """`holloway relay --standalone` in the relay's namespace, ready to serve. `before` are words
    before the command."""
    users = network.folder / "users"
    users.write_text("alice:opensesame\n")
    users.chmod(0o600)
    log = (network.folder / "relay.log").open("wb")
    argv = [
        *before, sys.executable, "-m", "holloway", "relay", "--standalone", "--users-file",
        str(users), "--listen", listen, "--listen", f"[{RELAY_IPV6}]:{PORT}", "--relay-address",
        RELAY, "--relay-address", RELAY_IPV6, "--log-format", "json", *flags,
    ]  # fmt: skip
    process = network.relay.spawn(argv, stderr=log, stdout=log, cwd=ROOT)
    try:
        wait_until(lambda: "listening" in said(network), "the relay listens")
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def said(network: Network) -> str:
    return (network.folder / "relay.log").read_text()


def metrics(network: Network) -> dict[str, int]:
    """What /metrics says, without the common beginning of the names."""
    with network.relay.connect(METRICS) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n")
        text = b"".join(iter(lambda: connection.recv(65_536), b"")).decode()
    found = re.findall(r"^holloway_relay_(\S+?)(?:_total)?(\{.*\})? (\S+)$", text, re.M)
    return {name + labels: int(float(value)) for name, labels, value in found}


def udp_socket(host: Host, address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with host.entered():
        made = socket.socket(family, socket.SOCK_DGRAM)
    made.bind((address, 0))
    made.settimeout(0.2)
    return made


def end_of(made: socket.socket) -> Address:
    return Address(*made.getsockname()[:2])


@attrs.define
class Pair:
    """A client with a channel to a peer that has answered, through a relay that is a process."""

    client: socket.socket
    peer: socket.socket
    turn: TurnClient
    server: Address
    relayed: Address
    events: list[Event]

    def step(self) -> None:
        now = SystemClock().monotonic_ns()
        for datagram in self.turn.drain_datagrams():
            self.client.sendto(datagram, self.server)
        with contextlib.suppress(TimeoutError):
            self.turn.receive(self.client.recv(2048), now)
        self.turn.handle_timeout(now)
        self.events += self.turn.drain_events()

    def until(self, kind: type[Event]) -> Event:
        def came() -> bool:
            self.step()
            return any(isinstance(event, kind) for event in self.events)

        wait_until(came, kind.__name__)
        found = next(event for event in self.events if isinstance(event, kind))
        self.events.remove(found)
        return found

    def settle(self) -> None:
        def is_settled() -> bool:
            self.step()
            return self.turn.statistics()["transactions"] == 0

        wait_until(is_settled, "answers")

    def give_back(self) -> None:
        self.turn.close(SystemClock().monotonic_ns())
        self.settle()


@contextlib.contextmanager
def pair(
    network: Network,
    is_ipv6: bool = False,
    client: tuple[Host, str] | None = None,
    peer: tuple[Host, str] | None = None,
) -> Iterator[Pair]:
    client = client or (network.client, CLIENT_IPV6 if is_ipv6 else CLIENT)
    peer = peer or (network.peer, PEER_IPV6 if is_ipv6 else PEER)
    now = SystemClock().monotonic_ns()
    made = Pair(
        client=udp_socket(*client),
        peer=udp_socket(*peer),
        turn=TurnClient(
            server=Address(RELAY_IPV6 if is_ipv6 else RELAY, PORT),
            username="alice",
            password="opensesame",
            family="ipv6" if is_ipv6 else "ipv4",
            randomness=SystemRandomness(),
            now=now,
        ),
        server=Address(RELAY_IPV6 if is_ipv6 else RELAY, PORT),
        relayed=Address("", 0),
        events=[],
    )
    with made.client, made.peer:
        allocated = made.until(Allocated)
        assert isinstance(allocated, Allocated)
        made.relayed = allocated.relayed
        made.turn.bind(end_of(made.peer), now)
        made.until(Permitted)
        made.settle()
        made.peer.sendto(b"the peer answers", made.relayed)
        made.step()
        yield made


def exchange(client: socket.socket, server: Address, peer: socket.socket, relayed: Address) -> int:
    """Send so many packets both ways, of several sizes; how many arrived unharmed."""
    arrived = 0
    for end in (client, peer):
        end.settimeout(2.0)
    for number in range(PACKETS):
        data = number.to_bytes(2, "big") * (20 + number % 7 * 100)
        client.sendto(wrapped(data), server)
        with contextlib.suppress(TimeoutError):
            received, sender = peer.recvfrom(2048)
            arrived += received == data and sender[:2] == relayed
        peer.sendto(data, relayed)
        with contextlib.suppress(TimeoutError):
            arrived += client.recv(2048) == wrapped(data)
    for end in (client, peer):
        end.settimeout(0.2)
    return arrived


def assert_nothing_passes(
    client: socket.socket, server: Address, peer: socket.socket, relayed: Address
) -> None:
    for _ in range(50):
        with contextlib.suppress(ConnectionRefusedError):
            client.sendto(wrapped(bytes(100)), server)
        with contextlib.suppress(ConnectionRefusedError):
            peer.sendto(bytes(100), relayed)
    for end in (client, peer):
        with pytest.raises((TimeoutError, ConnectionRefusedError)):
            end.recv(2048)


def all_of(end: socket.socket) -> Iterator[bytes]:
    """What has arrived there, until nothing does for a while."""
    with contextlib.suppress(TimeoutError):
        while True:
            yield end.recv(2048)


def wrapped(data: bytes, number: int = CHANNEL) -> bytes:
    return number.to_bytes(2, "big") + len(data).to_bytes(2, "big") + data


def attached_programs(host: Host) -> str:
    found = re.search(r"xdp\S*", host.run("ip", "link", "show", "dev", "eth0"))
    return found[0] if found else ""


def test_several_processes_share_the_fast_way_and_one_that_is_killed_leaves_it(
    network: Network,
) -> None:
    flags = ("--fast-path", "driver", "--processes", "2")
    with relay_process(network, *flags) as process, pair(network) as made:
        ends = made.client, made.server, made.peer, made.relayed
        list(all_of(made.client))  # answers to what was asked twice while the processes started
        assert exchange(*ends) == 2 * PACKETS
        wait_until(lambda: metrics(network)["fast_path_channels"] == 1, "both have reported")
        carried = metrics(network)
        for name in ("to_peer", "to_client"):
            assert carried[f"fast_path_{name}_packets"] >= PACKETS - 10
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        for worker in [int(one) for each in tasks for one in each.read_text().split()]:
            os.kill(worker, signal.SIGKILL)
        wait_until(lambda: metrics(network)["process_restarts"] == 2, "both have ended")
        assert_nothing_passes(*ends)
        after = metrics(network)
        assert after["fast_path_to_peer_packets"] == carried["fast_path_to_peer_packets"]
        assert after["fast_path_to_client_packets"] == carried["fast_path_to_client_packets"]


@pytest.mark.parametrize("is_ipv6", [False, True], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("mode", ["driver", "generic"])
def test_data_goes_the_fast_way_until_the_allocation_is_given_back(
    network: Network, mode: str, is_ipv6: bool
) -> None:
    with relay_process(network, "--fast-path", mode), pair(network, is_ipv6) as made:
        assert f'"mode":"{mode}"' in said(network)
        assert attached_programs(network.relay) == ("xdp" if mode == "driver" else "xdpgeneric")
        ends = made.client, made.server, made.peer, made.relayed
        before = metrics(network)
        assert before["fast_path_channels"] == 1
        assert exchange(*ends) == 2 * PACKETS
        after = metrics(network)
        fast = {
            name: after[f"fast_path_{name}_packets"] - before[f"fast_path_{name}_packets"]
            for name in ("to_peer", "to_client")
        }
        assert min(fast.values()) >= PACKETS - 10  # but for what is sampled
        assert after["relayed_packets"] - before["relayed_packets"] == 2 * PACKETS
        assert after["relayed_bytes"] - before["relayed_bytes"] > 100 * PACKETS
        assert after["sent_datagrams"] - before["sent_datagrams"] <= 20
        made.give_back()
        assert metrics(network)["fast_path_channels"] == 0
        assert_nothing_passes(*ends)
        last = metrics(network)
        assert last["fast_path_to_peer_packets"] == after["fast_path_to_peer_packets"]
        assert last["fast_path_to_client_packets"] == after["fast_path_to_client_packets"]
        assert last['fast_path_passed_packets{reason="no_entry"}'] >= 100


def test_a_relay_that_is_killed_leaves_no_program_and_no_way_through(network: Network) -> None:
    with relay_process(network, "--fast-path", "driver") as process, pair(network) as made:
        ends = made.client, made.server, made.peer, made.relayed
        assert exchange(*ends) == 2 * PACKETS
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: attached_programs(network.relay) == "", "the kernel detaches it")
        assert_nothing_passes(*ends)


def test_a_listener_on_all_addresses_is_fast_where_there_is_one(network: Network) -> None:
    everywhere = ("--fast-path", "generic", "--fast-path-device", "eth0")
    network.relay.ip("addr del 198.18.0.1/30 dev eth1")
    try:
        with (
            relay_process(network, *everywhere, listen=f"0.0.0.0:{PORT}"),
            pair(network) as made,
        ):
            assert exchange(made.client, made.server, made.peer, made.relayed) == 2 * PACKETS
            assert metrics(network)["fast_path_to_peer_packets"] >= PACKETS - 10
    finally:
        network.relay.ip("addr add 198.18.0.1/30 dev eth1")
    with (
        relay_process(network, *everywhere, listen=f"0.0.0.0:{PORT}"),
        pair(network) as made,
    ):
        assert "listen on each by name" in said(network)
        assert exchange(made.client, made.server, made.peer, made.relayed) == 2 * PACKETS
        assert metrics(network)["fast_path_to_peer_packets"] == 0


def test_packets_whose_checksum_hardware_was_to_complete_go_the_usual_way(
    network: Network,
) -> None:
    with (
        relay_process(network, "--fast-path", "generic"),
        pair(network, client=(network.second, SECOND)) as made,
    ):
        assert exchange(made.client, made.server, made.peer, made.relayed) == 2 * PACKETS
        counts = metrics(network)
        assert counts["fast_path_to_peer_packets"] == 0
        assert counts["fast_path_to_client_packets"] >= PACKETS - 10
        assert counts['fast_path_passed_packets{reason="checksum"}'] >= PACKETS


@pytest.mark.parametrize("mode", ["driver", "generic"])
def test_trains_that_the_kernel_carries_as_one_packet_arrive_as_they_were_sent(
    network: Network, mode: str
) -> None:
    """The program would take a train for one datagram, and wrap it as one."""
    packets = [bytes([number]) * 100 for number in range(10)]
    with (
        relay_process(network, "--fast-path", mode),
        pair(network, peer=(network.second, SECOND)) as made,
    ):
        made.peer.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 100)
        made.peer.sendto(b"".join(packets), made.relayed)
        assert list(all_of(made.client)) == [wrapped(packet) for packet in packets]
    with (
        relay_process(network, "--fast-path", mode),
        pair(network, client=(network.second, SECOND)) as made,
    ):
        made.client.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 104)
        made.client.sendto(b"".join(map(wrapped, packets)), made.server)
        assert list(all_of(made.peer)) == packets


@pytest.mark.parametrize("mode", ["driver", "generic"])
def test_a_relay_with_two_devices_passes_from_one_to_the_other(network: Network, mode: str) -> None:
    behind = network.behind
    peer = (behind, BEHIND)
    for devices, is_fast in ((("eth0", "eth1"), True), (("eth0",), False)):
        flags = [word for device in devices for word in ("--fast-path-device", device)]
        with (
            relay_process(network, "--fast-path", mode, *flags),
            pair(network, peer=peer) as made,
        ):
            assert exchange(made.client, made.server, made.peer, made.relayed) == 2 * PACKETS
            counts = metrics(network)
            assert (counts["fast_path_to_peer_packets"] >= PACKETS - 10) == is_fast
            assert (counts["fast_path_to_client_packets"] >= PACKETS - 10) == is_fast
            other = counts['fast_path_passed_packets{reason="other_device"}']
            assert (other >= PACKETS) == (not is_fast)


@pytest.mark.parametrize("mode", ["auto", "driver"])
def test_without_the_right_to_it_the_relay_says_so_and_relays_all_the_same(
    network: Network, mode: str
) -> None:
    powerless = ("setpriv", "--inh-caps", "-all", "--bounding-set", "-all")
    with (
        relay_process(network, "--fast-path", mode, before=powerless),
        pair(network) as made,
    ):
        assert "no_fast_path" in said(network)
        assert "CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN are needed" in said(network)
        assert exchange(made.client, made.server, made.peer, made.relayed) == 2 * PACKETS
        assert "fast_path_channels" not in metrics(network)


def test_the_loopback_setting_is_the_machines_where_the_relay_may_not_set_it(
    network: Network,
) -> None:
    may_not = 'mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "$@"'
    before = ("sh", "-c", may_not, "sh")
    for family in ("ipv4", "ipv6"):
        network.relay.run("sysctl", "-qw", f"net.{family}.conf.lo.forwarding=0")
    with relay_process(network, "--fast-path", "driver", before=before), pair(network) as made:
        reason = "net.ipv4.conf.lo.forwarding is to be 1 and cannot be set (Read-only file system)"
        assert reason in said(network)
        assert exchange(made.client, made.server, made.peer, made.relayed) == 2 * PACKETS
    for family in ("ipv4", "ipv6"):
        network.relay.run("sysctl", "-qw", f"net.{family}.conf.lo.forwarding=1")
    with relay_process(network, "--fast-path", "driver", before=before), pair(network):
        assert '"mode":"driver"' in said(network)
    assert network.relay.run("sysctl", "-n", "net.ipv4.conf.eth0.forwarding").strip() == "0"


def test_what_no_device_can_do_is_refused_with_the_reason(network: Network) -> None:
    relay = Address(RELAY, PORT)
    with network.relay.entered():
        for words, listen, devices in (
            ("no network device has the address 192.0.2.77", Address("192.0.2.77", 1), ()),
            ("the loopback device are not carried", Address("127.0.0.1", 1), ()),
            ("there is no network device elsewhere", relay, ("elsewhere",)),
            ("1 to 64 devices are needed, not 65", relay, tuple(map(str, range(65)))),
        ):
            hosts = {1: listen.host}
            with pytest.raises(Unavailable, match=words):
                attach_fast_path("generic", listen=[listen], relayed_hosts=hosts, devices=devices)
    assert attached_programs(network.relay) == ""


def test_three_capabilities_are_enough(network: Network) -> None:
    bounded = ("setpriv", "--inh-caps", "-all", "--bounding-set", "-all,+bpf,+perfmon,+net_admin")
    with (
        relay_process(network, "--fast-path", "driver", before=bounded),
        pair(network) as made,
    ):
        assert exchange(made.client, made.server, made.peer, made.relayed) == 2 * PACKETS
        assert metrics(network)["fast_path_to_client_packets"] >= PACKETS - 10


def test_a_veth_is_not_taken_in_driver_mode_unless_told_so(network: Network) -> None:
    with relay_process(network, "--fast-path", "auto"):
        assert '"mode":"generic"' in said(network)


def test_a_device_that_has_a_program_already_keeps_it(network: Network) -> None:
    other = LoadedProgram(
        ProgramObject(instructions=PASSES, license=b"GPL", maps=(), map_by_offset={}), "other"
    )
    try:
        with network.relay.entered():
            other.attach(socket.if_nametoindex("eth0"), "generic")
        with relay_process(network, "--fast-path", "auto"), pair(network) as made:
            assert "another program is attached there" in said(network)
            assert exchange(made.client, made.server, made.peer, made.relayed) == 2 * PACKETS
    finally:
        other.close()


# --- the core and the program, with no socket of a relay between them -----------------------------


@attrs.define
class Bare:
    """A relay's core that is told requests by hand, and the program on a real device. There are no
    sockets, so whatever arrives has gone the fast way."""

    attached: Attached
    bench: Bench
    caller: Caller
    client: socket.socket
    peer: socket.socket
    relayed: Address

    @property
    def ends(self) -> tuple[socket.socket, Address, socket.socket, Address]:
        return self.client, Address(RELAY, PORT), self.peer, self.relayed

    def carried(self) -> int:
        counts = read_counts(self.attached.program.maps["counts"])
        return counts["to_peer"][0] + counts["to_client"][0]

    def begin(self, ago_s: float = 0) -> None:
        """Allocate, bind and hear from the peer, so long ago."""
        self.bench.now = boot_ns() - int(ago_s * NS)
        self.relayed = self.caller.allocate()
        self.caller.bind(CHANNEL, end_of(self.peer))
        self.bench.from_peer(b"the peer answers", end_of(self.peer), self.relayed)
        self.bench.now = boot_ns()


def boot_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@pytest.fixture
def bare(network: Network) -> Iterator[Bare]:
    with network.relay.entered():
        attached = attach_fast_path(
            "driver", listen=[Address(RELAY, PORT)], relayed_hosts={1: RELAY}
        )
    attached.add_listener(LISTENER, Address(RELAY, PORT))
    sockets = MemorySockets()
    server = Server(
        credentials=StaticCredentials(USERS),
        realm="holloway",
        relay_addresses={1: RELAY},
        own_addresses=frozenset({RELAY}),
        sockets=sockets,
        randomness=SeededRandomness(1, "server"),
        fast_path=attached.path,
        now=boot_ns(),
        unix_s=1_800_000_000,
    )
    server.add_listener(LISTENER)
    bench = Bench(server, sockets)
    client, peer = udp_socket(network.client, CLIENT), udp_socket(network.peer, PEER)
    try:
        with client, peer:
            caller = Caller(bench, end_of(client))
            yield Bare(attached, bench, caller, client, peer, Address("", 0))
    finally:
        attached.close()


def test_a_user_who_is_revoked_sends_and_gets_not_one_packet_more(bare: Bare) -> None:
    bare.begin()
    assert exchange(*bare.ends) == 2 * PACKETS
    flows = bare.attached.program.maps["flows"]
    assert len(flows.all_keys()) == 2
    assert bare.bench.server.revoke_user("alice") == 1
    assert flows.all_keys() == []
    carried = bare.carried()
    assert_nothing_passes(*bare.ends)
    assert bare.carried() == carried == 2 * PACKETS


@pytest.mark.parametrize(
    ("ends", "ago_s"),
    [("the permission", 297), ("the allocation", 597), ("the channel", 597)],
)
def test_when_a_right_ends_packets_end_though_the_relay_hangs(
    bare: Bare, ends: str, ago_s: float
) -> None:
    """Nothing is told to the core after its last word: the entries themselves know the time."""
    bare.begin(ago_s)
    if ends != "the permission":
        bare.caller.permit(PEER)
        bare.bench.from_peer(b"still here", end_of(bare.peer), bare.relayed)
    if ends == "the channel":
        bare.caller.refresh()
    for _ in range(2):  # the first of each direction is long due for a look by the kernel
        bare.client.sendto(wrapped(bytes(100)), (RELAY, PORT))
        bare.peer.sendto(bytes(100), bare.relayed)
    assert set(all_of(bare.peer)) == {bytes(100)}
    assert set(all_of(bare.client)) == {wrapped(bytes(100))}
    wait_until(lambda: boot_ns() > bare.bench.now + 3 * NS, "three seconds are over")
    carried = bare.carried()
    assert_nothing_passes(*bare.ends)
    assert bare.carried() == carried > 0


def test_whoever_gives_its_allocation_back_is_not_heard_again(bare: Bare) -> None:
    bare.begin()
    assert exchange(*bare.ends) == 2 * PACKETS
    bare.caller.refresh(LIFETIME_0)
    carried = bare.carried()
    assert_nothing_passes(*bare.ends)
    assert bare.carried() == carried


def test_of_a_process_that_has_ended_the_one_that_holds_the_program_forgets_the_ports(
    bare: Bare,
) -> None:
    """Several processes of one relay share the map; each has a slice of the relayed ports."""
    shared = shared_fast_path(os.dup(bare.attached.flows_descriptor), relayed_hosts={1: RELAY})
    shared.add_listener(LISTENER, Address(RELAY, PORT))
    other = Server(
        credentials=StaticCredentials(USERS),
        realm="holloway",
        relay_addresses={1: RELAY},
        own_addresses=frozenset({RELAY}),
        sockets=bare.bench.sockets,
        randomness=SeededRandomness(2, "another server"),
        fast_path=shared,
        first_port=30_000,
        last_port=30_099,
        now=boot_ns(),
        unix_s=1_800_000_000,
    )
    other.add_listener(LISTENER)
    bare.begin()
    of_other = Caller(Bench(other, bare.bench.sockets, now=boot_ns()), (CLIENT, 40_000))
    relayed = of_other.allocate()
    of_other.bind(CHANNEL, end_of(bare.peer))
    of_other.bench.from_peer(b"the peer answers", end_of(bare.peer), relayed)
    flows = bare.attached.program.maps["flows"]
    assert len(flows.all_keys()) == 4
    assert bare.attached.forget_ports(30_000, 30_099) == 2
    assert len(flows.all_keys()) == 2
    assert exchange(*bare.ends) == 2 * PACKETS
    assert bare.attached.forget_ports(49_152, 65_535) == 2
    assert flows.all_keys() == []
    carried = bare.carried()
    assert_nothing_passes(*bare.ends)
    assert bare.carried() == carried
