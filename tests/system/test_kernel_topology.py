"""The networks of a scenario on namespaces do what its file says, and change with its faults."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import msgspec
import pytest

from simulations.installation import wait_until
from simulations.kernel.lab import Lab, LabError
from simulations.kernel.links import Impairment, Quality, impaired
from simulations.kernel.topology import Topology
from simulations.scenario.schema import Scenario

pytestmark = pytest.mark.system

FILE = """
format = 1
name = "all kinds of places"

[[networks]]
name = "carrier"
prefix = "100.64.0.0/24"
nat = { mapping = "endpoint_independent", filtering = "endpoint_independent" }

[[networks]]
name = "home"
behind = "carrier"
prefix = "192.168.1.0/24"
nat = {}
uplink = { latency = "20ms" }

[[networks]]
name = "campus"
prefix = "203.0.113.0/24"
uplink = { latency = "0ms" }

[[networks]]
name = "annex"
behind = "campus"
prefix = "203.0.114.0/24"
uplink = { latency = "5ms" }

[[networks]]
name = "office"
prefix = "10.20.0.0/24"
nat = {}
firewall = { udp_ports = [53], tcp_ports = [443] }
uplink = { latency = "0ms" }

[[faults]]
at = "1s"
kind = "link"
targets = ["home"]
quality = { latency = "100ms" }
"""
SCENARIO = msgspec.toml.decode(FILE, type=Scenario)
PLACES = {
    "laptop": "home", "tablet": "home", "phone": "carrier", "server": "campus",
    "printer": "annex", "gateway": "office", "relay": "internet",
}  # fmt: skip
PORT = 53


class Ground:
    """All hosts of PLACES, and who reaches whom."""

    def __init__(self, lab: Lab) -> None:
        self.topology = Topology(lab, SCENARIO)
        for name, network in PLACES.items():
            self.topology.host(name, network)
        self.ways: dict[str, Impairment] = {}

    def ping_ms(self, one: str, other: str) -> float | None:
        """The round trip, or None without an answer."""
        host = self.topology.place(one).host
        address = self.topology.address_of(other)
        said = host.run("ping", "-n", "-c1", "-W1", address, check=False)
        found = re.search(r"time=([0-9.]+)", said)
        return float(found[1]) if found else None

    def seen_as(self, one: str, other: str, port: int = PORT) -> str | None:
        """As whom one's datagram comes to the other, or None if it does not."""
        with self.topology.place(other).host.entered():
            hearing = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with self.topology.place(one).host.entered():
            sending = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with hearing, sending:
            hearing.bind(("", port))
            hearing.settimeout(1.0)
            sending.sendto(b"who am I?", (self.topology.address_of(other), port))
            try:
                return str(hearing.recvfrom(100)[1][0])
            except TimeoutError:
                return None


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Lab() as lab:
        made = Ground(lab)
        changing = {made.topology.router("home").name}
        ways = list(made.topology.links.values())
        contexts = [impaired(router, links, changing=changing) for router, links in ways]
        for (router, _), context in zip(ways, contexts, strict=True):
            made.ways[router.name] = context.__enter__()
        yield made
        for context in contexts:
            context.__exit__(None, None, None)


def test_a_way_to_a_carriers_nat_is_long_and_both_nats_are_on_it(ground: Ground) -> None:
    trip = ground.ping_ms("laptop", "relay")
    assert trip is not None
    assert 40 <= trip < 400
    near = ground.ping_ms("phone", "relay")
    assert near is not None
    assert near < 40
    assert ground.topology.describe("home") == "EI/APD, EI/EI"
    assert ground.seen_as("laptop", "relay") == ground.topology.outside("laptop")
    assert ground.topology.outside("laptop") == ground.topology.outside("phone")
    assert ground.topology.shared_nats("home", "carrier") == 1


def test_networks_without_a_nat_are_found_from_everywhere(ground: Ground) -> None:
    assert ground.ping_ms("relay", "server") is not None
    assert ground.ping_ms("relay", "printer") is not None
    assert ground.ping_ms("laptop", "printer") is not None
    assert ground.seen_as("printer", "relay") == ground.topology.address_of("printer")
    assert ground.seen_as("relay", "printer") == ground.topology.address_of("relay")
    assert ground.topology.side("annex", relay_port=3_478).nats == ()


def test_a_firewall_lets_out_to_its_ports_alone(ground: Ground) -> None:
    assert ground.seen_as("gateway", "relay", 53) == ground.topology.outside("gateway")
    assert ground.seen_as("gateway", "relay", 54) is None
    assert ground.topology.side("office", relay_port=53).udp == "relays"
    assert ground.topology.side("office", relay_port=3_478).udp == "blocked"


def test_a_link_changes_and_is_as_before(ground: Ground) -> None:
    attached, router, usual = ground.topology.link_of("home")
    ground.ways[attached.name].change(router, Quality(latency_us=150_000))
    wait_until(lambda: (ground.ping_ms("laptop", "relay") or 0) >= 300, what="the way is long")
    ground.ways[attached.name].change(router, usual)
    wait_until(lambda: 0 < (ground.ping_ms("laptop", "relay") or 0) < 300, what="it is as before")
    attached, router, _ = ground.topology.link_of("office")
    with pytest.raises(LabError, match="not made to be changed"):
        ground.ways[attached.name].change(router, Quality(latency_us=1))


def test_blocked_udp_is_blocked_until_nobody_blocks_it(ground: Ground) -> None:
    for _ in range(2):
        ground.topology.block_udp("campus", blocked=True)
    assert ground.seen_as("server", "relay") is None
    assert ground.ping_ms("server", "relay") is not None
    ground.topology.block_udp("campus", blocked=False)
    assert ground.seen_as("server", "relay") is None
    ground.topology.block_udp("campus", blocked=False)
    assert ground.seen_as("server", "relay") is not None


def test_the_parted_do_not_reach_one_another_and_all_others_do(ground: Ground) -> None:
    parted = ground.topology.part(["server"], ["relay", "printer"])
    assert ground.ping_ms("server", "relay") is None
    assert ground.ping_ms("printer", "server") is None
    assert ground.seen_as("relay", "server") is None
    assert ground.ping_ms("printer", "relay") is not None
    assert ground.ping_ms("laptop", "server") is not None
    ground.topology.join(parted)
    assert ground.ping_ms("server", "relay") is not None


def test_who_is_behind_one_nat_with_others_is_parted_with_all_of_them_or_not(
    ground: Ground,
) -> None:
    with pytest.raises(LabError, match="cannot tell"):
        ground.topology.part(["laptop"], ["server"])
    assert ground.ping_ms("laptop", "server") is not None
    behind = ground.topology.hosts_within("carrier")
    assert behind == ["laptop", "tablet", "phone"]
    parted = ground.topology.part(behind, ["server"])
    assert ground.ping_ms("laptop", "server") is None
    ground.topology.join(parted)


def test_a_renumbered_nat_has_another_address_and_works(ground: Ground) -> None:
    before = ground.topology.outside("gateway")
    ground.topology.rebind("office", renumber=True)
    assert ground.topology.outside("gateway") != before
    assert ground.seen_as("gateway", "relay") == ground.topology.outside("gateway")
    ground.topology.rebind("home", renumber=True)  # at the end of a way of its own
    assert ground.seen_as("laptop", "relay") == ground.topology.outside("laptop")


def test_a_host_that_roams_has_another_address_and_the_same_sockets(ground: Ground) -> None:
    with ground.topology.place("tablet").host.entered():
        kept = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with ground.topology.place("relay").host.entered():
        hearing = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    hearing.bind(("", 5_353))
    hearing.settimeout(2.0)
    with kept, hearing:
        for network in ("office", "campus", "internet", "home"):
            ground.topology.move("tablet", network)
            assert ground.topology.network_of("tablet") == network
            if network == "office":  # port 5353 is not let out
                assert ground.seen_as("tablet", "relay") == ground.topology.outside("tablet")
                continue
            kept.sendto(b"here", (ground.topology.address_of("relay"), 5_353))
            assert hearing.recvfrom(100)[1][0] == ground.topology.outside("tablet")
