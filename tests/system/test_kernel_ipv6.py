"""IPv6 on the kernel: no translation, firewalls that let in only what was asked for, and real
processes that find one another by it where IPv4 needs a relay."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import attrs
import msgspec
import pytest

from simulations.kernel.lab import Lab
from simulations.kernel.obstacles import obstacles
from simulations.kernel.topology import Topology
from simulations.scenario.schema import Fault, Portal, Scenario
from tests.system.both_worlds import in_both_worlds

pytestmark = pytest.mark.system

HARD = """nat = { mapping = "address_and_port_dependent", \
filtering = "address_and_port_dependent", ports = "random" }"""
FILE = f"""
format = 1
name = "both families"
duration = "8s"
settle = "60s"

[[networks]]
name = "home"
prefix6 = "2001:db8:1::/64"
{HARD}

[[networks]]
name = "carrier"
prefix = "100.64.0.0/24"
{HARD}

[[networks]]
name = "flat"
behind = "carrier"
prefix6 = "2001:db8:3::/64"
uplink = {{ latency = "5ms" }}
{HARD}

[[networks]]
name = "six"
prefix6 = "2001:db8:4::/64"
firewall = {{ ipv6_inbound = true }}

[[networks]]
name = "four"
{HARD}

[[networks]]
name = "office"
prefix = "10.20.0.0/16"
prefix6 = "2001:db8:2::/64"
{HARD}

[[portals]]
name = "portal"

[[relays]]
name = "relay"

[[gateways]]
name = "gateway"
network = "office"
site = "office"

[[services]]
name = "wiki"
network = "office"
address = "10.20.0.80"

[[services]]
name = "wiki6"
network = "office"
address = "2001:db8:2::80"

[[clients]]
name = "laptop"
network = "home"
user = "grace"

[[clients]]
name = "tablet"
network = "flat"
user = "grace"

[[clients]]
name = "phone"
network = "six"
user = "grace"

[[clients]]
name = "desktop"
network = "four"
user = "grace"

[account]
sites = ["office"]
users = [{{ name = "grace" }}]
resources = [
  {{ name = "wiki", sites = ["office"], service = "wiki" }},
  {{ name = "wiki6", sites = ["office"], service = "wiki6" }},
]
policies = [
  {{ name = "wiki", group = "everyone", resource = "wiki" }},
  {{ name = "wiki6", group = "everyone", resource = "wiki6" }},
]

[[traffic]]
every = "500ms"

[[faults]]
at = "4s"
kind = "roam"
targets = ["phone"]
to = "home"

[[checks]]
kind = "reach"
within = "5s"

[[checks]]
kind = "recovered"
source = ["phone"]
at = "4s"
within = "4s"
"""
SCENARIO = msgspec.toml.decode(FILE, type=Scenario)
PORT = 7_001


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with Lab() as lab:
        made = Topology(lab, SCENARIO)
        made.host("relay", "internet")
        for name in ("laptop", "tablet", "phone", "desktop"):
            made.host(name, {each.name: each.network for each in SCENARIO.clients}[name])
        yield made


def sixth(topology: Topology, name: str) -> str:
    return next(each for each in topology.addresses_of(name) if ":" in each)


def reaches(topology: Topology, one: str, other: str, *, asked: bool = False) -> str | None:
    """As whom a datagram of one comes to the other by IPv6, or None. `asked`: the other has sent
    one before."""
    ends = {}
    for name in (one, other):
        with topology.place(name).host.entered():
            ends[name] = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        ends[name].bind(("::", PORT))
        ends[name].settimeout(0.5)
    with ends[one], ends[other]:
        if asked:
            ends[other].sendto(b"come", (sixth(topology, one), PORT))
        ends[one].sendto(b"here", (sixth(topology, other), PORT))
        try:
            return str(ends[other].recvfrom(100)[1][0])
        except TimeoutError:
            return None


def test_an_address_is_the_same_everywhere_and_only_answers_come_in(topology: Topology) -> None:
    assert reaches(topology, "relay", "laptop") is None
    assert reaches(topology, "relay", "tablet") is None
    assert reaches(topology, "laptop", "relay") == sixth(topology, "laptop")
    assert reaches(topology, "tablet", "relay") == sixth(topology, "tablet")
    assert reaches(topology, "tablet", "laptop", asked=True) == sixth(topology, "tablet")
    assert reaches(topology, "relay", "phone") == sixth(topology, "relay")


def test_who_has_which_family_has_its_addresses(topology: Topology) -> None:
    assert [":" in each for each in topology.addresses_of("laptop")] == [False, True]
    assert [":" in each for each in topology.addresses_of("phone")] == [True]
    assert [":" in each for each in topology.addresses_of("desktop")] == [False]
    assert topology.outside("laptop") == sixth(topology, "laptop")
    assert topology.side("home", relay_port=3_478).ipv6
    assert not topology.side("four", relay_port=3_478).ipv6


def test_blocked_udp_is_blocked_of_both_families_and_all_else_passes(topology: Topology) -> None:
    topology.block_udp("flat", blocked=True)
    assert reaches(topology, "tablet", "relay") is None
    said = topology.place("tablet").host.run("ping", "-n", "-c1", sixth(topology, "relay"))
    assert re.search(r"time=[0-9]", said)
    topology.block_udp("flat", blocked=False)
    assert reaches(topology, "tablet", "relay") is not None


def test_the_parted_are_parted_by_both_families(topology: Topology) -> None:
    parted = topology.part(["phone", "laptop"], ["relay"])
    assert reaches(topology, "phone", "relay") is None
    assert reaches(topology, "laptop", "relay") is None
    assert reaches(topology, "phone", "tablet", asked=True) is not None
    topology.join(parted)
    assert reaches(topology, "phone", "relay") is not None


def test_who_roams_has_the_addresses_of_where_it_is(topology: Topology) -> None:
    before = topology.addresses_of("phone")
    for network, families in (("internet", 2), ("four", 1), ("six", 1)):
        topology.move("phone", network)
        assert len(topology.addresses_of("phone")) == families
    assert topology.addresses_of("phone") != before
    assert reaches(topology, "phone", "relay") == sixth(topology, "phone")


def test_hosts_reach_each_other_by_ipv6_where_ipv4_needs_a_relay_in_both_worlds() -> None:
    _, kernel = in_both_worlds(SCENARIO)
    outcomes = {(pair.client, pair.resource): pair.outcome for pair in kernel.pairs}
    relayed = {pair for pair, outcome in outcomes.items() if outcome == "relayed"}
    assert relayed == {("desktop", "wiki"), ("desktop", "wiki6")}
    assert len(outcomes) == 8
    assert {pair.outcome == pair.expected for pair in kernel.pairs} == {True}


def test_two_portals_are_found_by_both_families_when_one_dies() -> None:
    crash = Fault(at="2s", kind="crash", targets=("portal",))
    first = next(each for each in SCENARIO.clients if each.name == "laptop")
    scenario = attrs.evolve(
        SCENARIO,
        portals=(Portal(name="portal"), Portal(name="portal-2")),
        clients=(first, *(each for each in SCENARIO.clients if each.name == "phone")),
        faults=(crash,),
        checks=SCENARIO.checks[:1],
    )
    _, kernel = in_both_worlds(scenario)
    assert {pair.outcome for pair in kernel.pairs} == {"direct"}


def test_a_portal_without_ipv4_is_an_obstacle() -> None:
    scenario = attrs.evolve(SCENARIO, portals=(Portal(name="portal", network="six"),))
    assert any("without IPv4" in each for each in obstacles(scenario))
