"""The XDP program in the kernel (BPF_PROG_TEST_RUN) beside a model of it, packet by packet, and its
source beside the object that is shipped."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from random import Random
from struct import pack
from typing import Final

import attrs
import pytest

from relays.fastpath.attaching import read_counts
from relays.fastpath.elf import parse_object
from relays.fastpath.loader import BpfError, LoadedProgram
from relays.fastpath.xdp import NAMES, OBJECT, SAMPLE_INTERVAL_NS
from simulations.kernel.lab import Host, Lab
from tests.fastpath_model import (
    LOOPBACK,
    PASS,
    PROGRAM,
    REDIRECT,
    TX,
    Model,
    Outcome,
    Way,
    datagram_of,
    frame_of,
    key_of,
    run_once,
    with_checksum_of_header,
)

pytestmark = pytest.mark.system

SOURCE: Final = OBJECT.with_suffix(".c")
CLANG: Final = "Debian clang version 14.0.6"
MUTATIONS: Final = 20_000
NEAR, FAR, NARROW, NOWHERE = "198.51.100.2", "192.0.2.10", "192.0.2.130", "192.0.2.200"
LISTENER: Final = ("203.0.113.6", 3478)
LISTENER_IPV6: Final = ("2001:db8:6::2", 3478)
RELAYED: Final = ("203.0.113.6", 50_000)
RELAYED_IPV6: Final = ("2001:db8:6::2", 50_000)
CLIENT: Final = (NEAR, 40_000)
CLIENT_IPV6: Final = ("2001:db8:2::2", 40_000)
PEER: Final = (FAR, 5000)
PEER_IPV6: Final = ("2001:db8:10::2", 5000)
CHANNEL: Final = 0x4000
DATA: Final = bytes(range(100))
GATEWAY_MAC, FAR_MAC = b"\x02\0\0\0\0\x99", b"\x02\0\0\0\0\x98"


@attrs.define
class Bench:
    """The program, loaded in a namespace with routes: `eth0` leads to most, `far` to some, and
    `narrow` has an MTU of 1280."""

    host: Host
    program: LoadedProgram
    eth0: Way
    far: Way
    narrow: Way
    flows: dict[bytes, bytes] = attrs.field(factory=dict)

    def way(self, target: bytes) -> Way | None:
        if target == ip_address(LISTENER[0]).packed:
            return None
        if target == ip_address(NOWHERE).packed:
            return attrs.evolve(self.far, target_mac=b"")
        if target in (ip_address(FAR).packed, ip_address(PEER_IPV6[0]).packed):
            return self.far
        return self.narrow if target == ip_address(NARROW).packed else self.eth0

    def model(self, ingress: int = LOOPBACK) -> Model:
        return Model(
            flows=self.flows,
            ways=self.way,
            devices={self.eth0.device, self.narrow.device},
            ingress=ingress,
            now=boot_ns(),
        )

    def put(
        self,
        came: tuple[tuple[str, int], tuple[str, int], int],
        goes: tuple[tuple[str, int], tuple[str, int], int],
        lasts_ns: int = 3600 * 10**9,
        sampled_ns: int | None = None,
    ) -> bytes:
        """An entry; its key."""
        now = boot_ns()
        times = pack("<QQ", now + lasts_ns, now if sampled_ns is None else sampled_ns)
        key, value = ends(*came), times + ends(*goes)
        self.program.maps["flows"].update(key, value)
        self.flows[key] = value
        return key

    def clear(self) -> None:
        for key in self.flows:
            self.program.maps["flows"].delete(key)
        self.flows.clear()

    def run(self, frame: bytes, ingress: int | None = None) -> Outcome:
        """The verdict, what it counted (which has to be one thing), and the frame."""
        before = read_counts(self.program.maps["counts"])
        with self.host.entered():
            verdict, out = run_once(self.program.descriptor, frame, ingress)
        after = read_counts(self.program.maps["counts"])
        [name] = [name for name in NAMES if after[name][0] != before[name][0]]
        assert after[name][0] == before[name][0] + 1
        return Outcome(verdict, name, out, after[name][1] - before[name][1])


def ends(source: tuple[str, int], target: tuple[str, int], channel: int) -> bytes:
    hosts = ip_address(source[0]).packed, ip_address(target[0]).packed
    return key_of(10 if ":" in source[0] else 2, *hosts, source[1], target[1], channel)


def boot_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@pytest.fixture(scope="module")
def loaded() -> Iterator[Bench]:
    with Lab() as lab:
        host = lab.public_host("relay", lab.router("core"), "203.0.113.6/30", "2001:db8:6::2/64")
        host.run("sysctl", "-qw", "net.ipv4.conf.lo.forwarding=1", "net.ipv6.conf.lo.forwarding=1")
        host.ip(
            "neigh replace 203.0.113.5 lladdr 02:00:00:00:00:99 dev eth0 nud permanent",
            "neigh replace 2001:db8:6::1 lladdr 02:00:00:00:00:99 dev eth0 nud permanent",
            "link add far address 02:00:00:00:01:01 type veth peer name beyond",
            "link add narrow address 02:00:00:00:01:02 mtu 1280 type veth peer name behind",
            *(f"link set {name} up" for name in ("far", "beyond", "narrow", "behind")),
            f"route add {FAR} dev far",
            f"route add {NARROW} dev narrow",
            f"route add {NOWHERE} dev far",
            f"route add {PEER_IPV6[0]} dev far",
            f"neigh replace {FAR} lladdr 02:00:00:00:00:98 dev far nud permanent",
            f"neigh replace {PEER_IPV6[0]} lladdr 02:00:00:00:00:98 dev far nud permanent",
            f"neigh replace {NARROW} lladdr 02:00:00:00:00:98 dev narrow nud permanent",
        )
        program = LoadedProgram(PROGRAM, "under_test")
        try:
            with host.entered():
                index = {name: socket.if_nametoindex(name) for name in ("eth0", "far", "narrow")}
            own_mac = host.run("cat", "/sys/class/net/eth0/address").strip()
            for name in ("eth0", "narrow"):
                program.maps["devices"].update(index[name].to_bytes(4, "little"), b"\1\0\0\0")
            yield Bench(
                host,
                program,
                Way(index["eth0"], bytes.fromhex(own_mac.replace(":", "")), GATEWAY_MAC),
                Way(index["far"], b"\x02\0\0\0\x01\x01", FAR_MAC),
                Way(index["narrow"], b"\x02\0\0\0\x01\x02", FAR_MAC, 1280),
            )
        finally:
            program.close()


@pytest.fixture
def bench(loaded: Bench) -> Iterator[Bench]:
    yield loaded
    loaded.clear()


def wrapped(data: bytes, number: int = CHANNEL, size: int | None = None) -> bytes:
    return pack("!HH", number, len(data) if size is None else size) + data


FAMILIES: Final = {
    "IPv4 on both sides": (CLIENT, LISTENER, RELAYED, (NEAR, 5000)),
    "IPv6 on both sides": (CLIENT_IPV6, LISTENER_IPV6, RELAYED_IPV6, ("2001:db8:11::2", 5000)),
    "IPv4 to the client": (CLIENT, LISTENER, RELAYED_IPV6, ("2001:db8:11::2", 5000)),
    "IPv6 to the client": (CLIENT_IPV6, LISTENER_IPV6, RELAYED, (NEAR, 5000)),
}


@pytest.mark.parametrize("families", FAMILIES)
@pytest.mark.parametrize("size", [32, 33, 148, 1000, 1400])
def test_data_is_unwrapped_and_wrapped_with_checksums_that_are_right(
    bench: Bench, families: str, size: int
) -> None:
    client, listener, relayed, peer = FAMILIES[families]
    bench.put((client, listener, CHANNEL), (relayed, peer, 0))
    bench.put((peer, relayed, 0), (listener, client, CHANNEL))
    data = Random(size).randbytes(size)
    directions = (
        (frame_of(client, listener, wrapped(data), tos=0xB8, ttl=9), relayed, peer, data),
        (frame_of(peer, relayed, data, tos=3, ttl=2), listener, client, wrapped(data)),
    )
    for frame, source, target, expected in directions:
        outcome = bench.run(frame, bench.eth0.device)
        assert outcome == bench.model(bench.eth0.device).judge(frame)
        assert outcome.verdict == TX
        assert outcome.data_bytes == size
        came, went, content, is_right = datagram_of(outcome.frame)
        assert came == (ip_address(source[0]).packed, source[1])
        assert went == (ip_address(target[0]).packed, target[1])
        assert content == expected
        assert is_right


def test_a_packet_that_leaves_by_another_device_is_redirected_there_if_that_one_takes_part(
    bench: Bench,
) -> None:
    bench.put((CLIENT, LISTENER, CHANNEL), (RELAYED, (NARROW, 5000), 0))
    bench.put((CLIENT, LISTENER, CHANNEL + 1), (RELAYED, PEER, 0))
    outcome = bench.run(frame_of(CLIENT, LISTENER, wrapped(DATA)))
    assert outcome.verdict == REDIRECT
    assert outcome.frame[:12] == bench.narrow.target_mac + bench.narrow.source_mac
    outcome = bench.run(frame_of(CLIENT, LISTENER, wrapped(DATA, CHANNEL + 1)))
    assert (outcome.verdict, outcome.counted) == (PASS, "other_device")


def test_a_checksum_that_was_wrong_is_as_wrong_afterwards(bench: Bench) -> None:
    bench.put((CLIENT, LISTENER, CHANNEL), (RELAYED, (NEAR, 5000), 0))
    frame = bytearray(frame_of(CLIENT, LISTENER, wrapped(DATA)))
    frame[60] ^= 0x10
    outcome = bench.run(bytes(frame))
    assert outcome.counted == "to_peer"
    assert outcome == bench.model().judge(bytes(frame))
    assert not datagram_of(outcome.frame)[3]


def test_what_is_not_exactly_as_expected_goes_to_the_kernel_unchanged(bench: Bench) -> None:
    bench.put((CLIENT, LISTENER, CHANNEL), (RELAYED, (NEAR, 5000), 0))
    bench.put((CLIENT, LISTENER, CHANNEL + 1), (RELAYED, (NOWHERE, 5000), 0))
    bench.put((CLIENT, LISTENER, CHANNEL + 2), (RELAYED, (NARROW, 5000), 0))
    bench.put((CLIENT, LISTENER, CHANNEL + 3), (RELAYED, (NEAR, 5000), 0), lasts_ns=0)
    bench.put((CLIENT, LISTENER, CHANNEL + 4), (RELAYED, (LISTENER[0], 5000), 0))
    bench.put((CLIENT_IPV6, LISTENER_IPV6, CHANNEL), (RELAYED_IPV6, CLIENT_IPV6, 0))
    good = frame_of(CLIENT, LISTENER, wrapped(DATA))
    ipv6 = frame_of(CLIENT_IPV6, LISTENER_IPV6, wrapped(DATA))
    pseudo = good[26:34] + pack("!HH", len(DATA) + 12, 17)
    partial = sum(int.from_bytes(pseudo[i : i + 2], "big") for i in range(0, len(pseudo), 2))
    partial = (partial & 0xFFFF) + (partial >> 16)
    more_fragments = frame_of(CLIENT, LISTENER, wrapped(DATA), fragment=0x2000)
    last_fragment = frame_of(CLIENT, LISTENER, wrapped(DATA), fragment=0x0010)
    options = with_checksum_of_header(
        good[:14] + b"\x46" + good[15:16] + pack("!H", len(good) - 10) + good[18:34]
        + b"\1\1\1\1" + good[34:]
    )  # fmt: skip
    cases = {
        "another channel": (frame_of(CLIENT, LISTENER, wrapped(DATA, 0x4100)), "no_entry"),
        "another source port": (frame_of((NEAR, 4), LISTENER, wrapped(DATA)), "no_entry"),
        "no ChannelData": (frame_of(CLIENT, LISTENER, DATA), "no_entry"),
        "less than a header": (frame_of(CLIENT, LISTENER, b"\x40\0\0"), "no_entry"),
        "no data at all": (frame_of(CLIENT, LISTENER, b""), "no_entry"),
        "padding in the datagram": (
            frame_of(CLIENT, LISTENER, wrapped(DATA) + b"\0"),
            "irregular",
        ),
        "less than it says": (frame_of(CLIENT, LISTENER, wrapped(DATA, size=101)), "irregular"),
        "padding of the frame": (good + b"\0", "irregular"),
        "cut short": (good[:-1], "irregular"),
        "nothing but a head": (good[:14], "irregular"),
        "half of an IPv4 header": (good[:30], "irregular"),
        "half of a UDP header": (good[:40], "irregular"),
        "half of an IPv6 header": (ipv6[:40], "irregular"),
        "an IPv4 checksum that is wrong": (good[:24] + b"\0\0" + good[26:], "irregular"),
        "a UDP length that is wrong": (good[:38] + b"\0\x20" + good[40:], "irregular"),
        "an IPv6 length that is wrong": (ipv6[:18] + b"\0\x20" + ipv6[20:], "irregular"),
        "no UDP checksum": (good[:40] + b"\0\0" + good[42:], "checksum"),
        "a checksum for hardware to complete": (
            good[:40] + partial.to_bytes(2, "big") + good[42:],
            "checksum",
        ),
        "the first fragment": (more_fragments, "fragment"),
        "the last fragment": (last_fragment, "fragment"),
        "an IPv6 fragment": (ipv6[:20] + b"\x2c" + ipv6[21:], "fragment"),
        "IPv4 options": (options, "options"),
        "IPv6 hop-by-hop options": (ipv6[:20] + b"\0" + ipv6[21:], "options"),
        "an IPv6 routing header": (ipv6[:20] + b"\x2b" + ipv6[21:], "options"),
        "IPv6 destination options": (ipv6[:20] + b"\x3c" + ipv6[21:], "options"),
        "TCP": (good[:23] + b"\x06" + good[24:], "not_udp"),
        "ICMPv6": (ipv6[:20] + b"\x3a" + ipv6[21:], "not_udp"),
        "a VLAN": (good[:12] + b"\x81\0\0\x0a" + good[12:], "not_udp"),
        "ARP": (good[:12] + b"\x08\x06" + good[14:], "not_udp"),
        "for a group of machines": (b"\x01" + good[1:], "not_udp"),
        "at the end of its hops": (frame_of(CLIENT, LISTENER, wrapped(DATA), ttl=1), "hop_limit"),
        "at the end of its IPv6 hops": (
            frame_of(CLIENT_IPV6, LISTENER_IPV6, wrapped(DATA), ttl=0),
            "hop_limit",
        ),
        "too little to fill a frame": (frame_of(CLIENT, LISTENER, wrapped(b"17 bytes are few."))
            , "too_short"),
        "too much for the way out": (
            frame_of(CLIENT, LISTENER, wrapped(bytes(1260), CHANNEL + 2)),
            "too_large",
        ),
        "a peer that is not known to its network": (
            frame_of(CLIENT, LISTENER, wrapped(DATA, CHANNEL + 1)),
            "no_route",
        ),
        "this machine itself": (frame_of(CLIENT, LISTENER, wrapped(DATA, CHANNEL + 4)), "no_route"),
        "an entry that has ended": (
            frame_of(CLIENT, LISTENER, wrapped(DATA, CHANNEL + 3)),
            "expired",
        ),
    }  # fmt: skip
    for what, (frame, reason) in cases.items():
        outcome = bench.run(frame)
        assert (what, outcome.verdict, outcome.counted) == (what, PASS, reason)
        assert outcome.frame == frame, what
        assert outcome == bench.model().judge(frame), what
    assert bench.run(frame_of(CLIENT, LISTENER, wrapped(bytes(1252), CHANNEL + 2))).verdict == (
        REDIRECT
    )


def test_one_packet_in_ten_seconds_takes_the_slow_path(bench: Bench) -> None:
    long_ago = boot_ns() - SAMPLE_INTERVAL_NS
    bench.put((CLIENT, LISTENER, CHANNEL), (RELAYED, (NEAR, 5000), 0), sampled_ns=long_ago)
    frame = frame_of(CLIENT, LISTENER, wrapped(DATA))
    counted = [bench.run(frame).counted for _ in range(5)]
    assert counted == ["sampled", "to_peer", "to_peer", "to_peer", "to_peer"]


def test_an_entry_ends_at_its_time_though_nobody_removes_it(bench: Bench) -> None:
    bench.put((CLIENT, LISTENER, CHANNEL), (RELAYED, (NEAR, 5000), 0), lasts_ns=300_000_000)
    end = boot_ns() + 300_000_000
    frame, counted = frame_of(CLIENT, LISTENER, wrapped(DATA)), {"to_peer"}
    while boot_ns() < end:
        counted.add(bench.run(frame).counted)
    assert counted == {"to_peer"} or counted == {"to_peer", "expired"}
    assert bench.run(frame).counted == "expired"


def test_whatever_a_packet_holds_the_program_does_what_the_model_says(bench: Bench) -> None:
    luck = Random(20)
    counted = dict.fromkeys(NAMES, 0)
    for number in range(MUTATIONS):
        if number % 500 == 0:
            frames = fresh_flows(bench, luck)
        frame = mutated(luck.choice(frames), luck)
        ingress = luck.choice((None, bench.eth0.device))
        outcome = bench.run(frame, ingress)
        expected = bench.model(ingress or LOOPBACK).judge(frame)
        assert outcome == expected, f"{number}: {frame.hex()}"
        counted[outcome.counted] += 1
    assert all(count > 10 for name, count in counted.items() if name not in ("sampled", "no_room"))
    assert counted["to_peer"] > 500
    assert counted["to_client"] > 500


def fresh_flows(bench: Bench, luck: Random) -> list[bytes]:
    """New entries of all families, and for each of them frames of several sizes."""
    bench.clear()
    targets = (NEAR, FAR, NARROW, NOWHERE, NEAR, "2001:db8:11::2", PEER_IPV6[0], "2001:db8:12::2")
    frames = []
    for number in range(12):
        client, listener = luck.choice(((CLIENT, LISTENER), (CLIENT_IPV6, LISTENER_IPV6)))
        peer = (luck.choice(targets), 5000 + number)
        relayed = RELAYED_IPV6 if ":" in peer[0] else RELAYED
        lasts_ns = luck.choice((10**12, 10**12, 10**12, 0))
        channel = CHANNEL + number
        bench.put((client, listener, channel), (relayed, peer, 0), lasts_ns)
        bench.put((peer, relayed, 0), (listener, client, channel), lasts_ns)
        for size in (0, 4, 18, luck.randrange(1240), luck.randrange(1240, 1480), 1480):
            data = luck.randbytes(size)
            tos, ttl = luck.choice((0, 1, 0xFF)), luck.choice((0, 1, 2, 64, 64, 64, 255))
            wrap = wrapped(data, channel)
            frames.append(frame_of(client, listener, wrap, tos=tos, ttl=ttl))
            frames.append(
                frame_of(peer, relayed, b"\x40\0" * (number % 2) + data, tos=tos, ttl=ttl)
            )
    return frames


def mutated(frame: bytes, luck: Random) -> bytes:
    """A third stays as it is; others lose, gain or change bytes, most of them in the headers, and
    half of the changed IPv4 headers get a checksum that is right again."""
    changed = bytearray(frame)
    for _ in range(luck.choice((0, 0, 1, 1, 2, 4))):
        what = luck.randrange(8)
        if what == 0:
            del changed[max(14, luck.randrange(len(changed))) :]
        elif what == 1:
            changed += luck.randbytes(luck.randrange(1, 8))
        elif what == 2 and len(changed) > 46:
            changed[40:42] = b"\0\0"
        elif what == 3 and len(changed) > 24:
            changed[20:22] = luck.choice((b"\x20\0", b"\x40\0", b"\0\1", b"\x80\0", b"\0\0"))
        elif what == 4 and len(changed) > 24:
            changed[14] = luck.choice((0x45, 0x46, 0x44, 0x60, 0x65))
            changed[20] = luck.choice((17, 0, 43, 44, 60, 58, changed[20]))
        else:
            at = luck.randrange(min(len(changed), luck.choice((14, 34, 62, 2000))))
            changed[at] = luck.choice((0, 0xFF, changed[at] ^ 1 << luck.randrange(8)))
    is_ipv4 = len(changed) > 34 and changed[12:14] == b"\x08\0" and changed[14] & 15 >= 5
    if is_ipv4 and luck.random() < 0.5:
        return with_checksum_of_header(bytes(changed))
    return bytes(changed)


# --- loading --------------------------------------------------------------------------------------


def test_a_program_that_the_verifier_refuses_says_why_in_a_few_words() -> None:
    exits_without_a_result = attrs.evolve(
        PROGRAM, instructions=bytes.fromhex("9500000000000000"), maps=(), map_by_offset={}
    )
    with pytest.raises(BpfError, match=r"loading the program: .*R0 !read_ok") as raised:
        LoadedProgram(exits_without_a_result, "refused")
    assert len(str(raised.value)) < 1000


def test_nothing_is_left_open_after_a_refusal() -> None:
    refused = attrs.evolve(
        PROGRAM, instructions=bytes.fromhex("9500000000000000"), map_by_offset={}
    )
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(BpfError):
        LoadedProgram(refused, "refused")
    assert len(set(Path("/proc/self/fd").iterdir())) == len(before)


def test_the_object_is_what_the_compiler_makes_of_the_source(tmp_path: Path) -> None:
    clang = shutil.which("clang-14") or shutil.which("clang")
    assert clang is not None, "apt-get install clang (tools/setup test does it)"
    version = subprocess.run([clang, "--version"], capture_output=True, text=True).stdout
    machine = subprocess.run([clang, "-print-multiarch"], capture_output=True, text=True).stdout
    made = tmp_path / "relay_xdp.o"
    include = f"-I/usr/include/{machine.strip() or 'x86_64-linux-gnu'}"
    subprocess.run(
        [clang, "-O2", "-Wall", "-Wextra", "-Werror", "-target", "bpf", include, "-c", str(SOURCE),
         "-o", str(made)],
        check=True,
    )  # fmt: skip
    built = parse_object(made.read_bytes())
    assert {one.name: one for one in built.maps} == {one.name: one for one in PROGRAM.maps}
    if version.startswith(CLANG):
        assert built.instructions == PROGRAM.instructions
        assert built.map_by_offset == PROGRAM.map_by_offset
    LoadedProgram(built, "rebuilt").close()
