"""Rough ways on the kernel: what is copied, overtaken, spoilt, lost in bursts or too large, by both
families, and that real processes get through as they do in virtual time."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator

import attrs
import pytest

from simulations.kernel.lab import Host, Lab
from simulations.kernel.links import Quality, impaired
from simulations.kernel.obstacles import obstacles
from simulations.scenario.load import ready
from simulations.scenario.schema import Fault, LinkQuality, Traffic
from tests.system.both_worlds import hastened, in_both_worlds

pytestmark = pytest.mark.system

COUNT = 1_000
PORT = 7_002
NEAR = ("198.51.100.2/30", "2001:db8:a::2/64")
FAR = ("203.0.113.2/30", "2001:db8:b::2/64")
FAMILIES = {socket.AF_INET: FAR[0], socket.AF_INET6: FAR[1]}
families = pytest.mark.parametrize("family", FAMILIES)


@attrs.frozen
class Stretch:
    """Two hosts and the way between them."""

    core: Host
    near: Host
    far: Host

    def sent(
        self, family: int, quality: Quality, *, count: int = COUNT, seed: int = 1
    ) -> list[bytes]:
        """So many datagrams over a way of this quality, as they arrive at the other end."""
        target = FAMILIES[socket.AddressFamily(family)].partition("/")[0]
        with self.far.entered():
            hearing = socket.socket(family, socket.SOCK_DGRAM)
        with self.near.entered():
            sending = socket.socket(family, socket.SOCK_DGRAM)
        found = []
        with hearing, sending, impaired(self.core, [(self.near, quality)], seed=seed):
            hearing.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
            hearing.bind(("", PORT))
            hearing.settimeout(0.5)
            for number in range(count):
                sending.sendto(number.to_bytes(4, "big") + bytes(60), (target, PORT))
            with contextlib.suppress(TimeoutError):
                while True:
                    found.append(hearing.recv(2_000))
        return found


@pytest.fixture(scope="module")
def stretch() -> Iterator[Stretch]:
    with Lab() as lab:
        core = lab.router("core")
        yield Stretch(
            core, lab.public_host("near", core, *NEAR), lab.public_host("far", core, *FAR)
        )


def number_of(datagram: bytes) -> int:
    return int.from_bytes(datagram[:4], "big")


@families
def test_some_datagrams_come_twice(stretch: Stretch, family: int) -> None:
    counts = Counter(stretch.sent(family, Quality(duplication=0.2)))
    assert len(counts) == COUNT
    assert set(counts.values()) == {1, 2}
    assert 150 < sum(counts.values()) - COUNT < 250


def test_a_copy_on_the_way_in_comes_once_more_too(stretch: Stretch) -> None:
    """The link of the far end: there its queue is on the way out of the router."""
    turned = Stretch(stretch.core, stretch.far, stretch.near)
    for each in (stretch, turned):
        with impaired(each.core, [(each.near, Quality(duplication=1.0))]):
            said = each.near.run("ping", "-n", "-c3", "-i0.2", _address(each.near, stretch))
        for number in (1, 2):  # the way out and the way back each double it; the third ends ping
            assert said.count(f"icmp_seq={number} ") == 4


def _address(near: Host, stretch: Stretch) -> str:
    return (FAR if near is stretch.near else NEAR)[0].partition("/")[0]


@families
def test_some_datagrams_are_overtaken(stretch: Stretch, family: int) -> None:
    numbers = [number_of(each) for each in stretch.sent(family, Quality(reordering=0.1))]
    assert sorted(numbers) == list(range(COUNT))
    late = sum(number < max(numbers[:index]) for index, number in enumerate(numbers) if index)
    assert 50 < late < 150


@families
def test_some_datagrams_come_with_one_bit_flipped(stretch: Stretch, family: int) -> None:
    arrived = stretch.sent(family, Quality(corruption=0.2))
    assert len(arrived) == COUNT
    spoilt = 0
    for number, each in enumerate(arrived):
        bits = int.from_bytes(each, "big") ^ (number << 480)
        assert bits.bit_count() <= 1
        spoilt += bits != 0
    assert 150 < spoilt < 250


def test_what_is_lost_follows_from_the_seed(stretch: Stretch) -> None:
    quality = Quality(loss=0.3, burst=3.0)
    one, same, other = (
        [number_of(each) for each in stretch.sent(socket.AF_INET, quality, count=300, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other
    assert 100 < len(one) < 300


def test_what_is_too_large_is_told_and_the_way_is_as_before_then(stretch: Stretch) -> None:
    def large(address: str) -> str:
        argv = ["ping", "-n", "-c1", "-W1", "-M", "do", "-s", "1400", address.partition("/")[0]]
        return stretch.far.run(*argv, check=False)

    with impaired(stretch.core, [(stretch.near, Quality(mtu=1_300))]):
        assert "mtu = 1300" in large(NEAR[0]) or "mtu=1300" in large(NEAR[0])
        assert "mtu" in large(NEAR[1]).lower()
    stretch.far.run("ip", "route", "flush", "cache")
    assert " 0% packet loss" in large(NEAR[0])


def test_a_stream_is_whole_on_the_roughest_way(stretch: Stretch) -> None:
    rough = Quality(corruption=0.02, duplication=0.05, reordering=0.05, loss=0.02)
    with stretch.far.entered():
        door = socket.create_server(("", PORT))
    said = bytes(range(256)) * 400
    got: list[bytes] = []

    def take() -> None:
        connection, _ = door.accept()
        with connection:
            while data := connection.recv(65_536):
                got.append(data)

    with door, impaired(stretch.core, [(stretch.near, rough)]):
        taking = threading.Thread(target=take)
        taking.start()
        with stretch.near.connect((FAR[0].partition("/")[0], PORT)) as connection:
            connection.sendall(said)
        taking.join(60)
    assert b"".join(got) == said


def test_nothing_is_left_of_a_way_that_was_rough(stretch: Stretch) -> None:
    with impaired(stretch.core, [(stretch.near, Quality(corruption=1.0, mtu=1_400))]):
        pass
    rules = stretch.core.run("iptables-nft-save", "-t", "mangle")
    assert "-A" not in rules
    shown = subprocess.run(
        ["ip", "-n", stretch.near.name, "link", "show", "eth0"], capture_output=True, text=True
    )
    assert "mtu 1500" in shown.stdout


def test_rough_ways_are_the_same_in_both_worlds() -> None:
    scenario = hastened(ready("home-office"), 3)
    rough = LinkQuality(
        latency="8ms", jitter="4ms", loss="2%", burst=3.0, duplication="5%", reordering="5%",
        corruption="3%", bandwidth="5Mbit", mtu=1_400,
    )  # fmt: skip
    home, *others = scenario.networks
    worse = Fault(
        at="4s",
        kind="link",
        targets=("office",),
        quality=LinkQuality(latency="20ms", duplication="20%", corruption="5%"),
        duration="4s",
    )
    scenario = attrs.evolve(
        scenario,
        networks=(attrs.evolve(home, uplink=rough), *others),
        faults=(*scenario.faults, worse),
        traffic=(*scenario.traffic, Traffic(every="50ms", size=1_200)),
    )
    assert obstacles(scenario) == []
    _, kernel = in_both_worlds(scenario)
    laptop = kernel.pairs[0]
    assert laptop.outcome == "direct"
    assert laptop.answered < laptop.asked
