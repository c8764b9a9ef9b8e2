"""A scenario on the kernel: namespaces and real processes give each pair what policy and the oracle
say, and what cannot be built is said beforehand."""

from __future__ import annotations

import attrs
import msgspec
import pytest

from simulations.kernel.lab import LabError
from simulations.kernel.twin import obstacles, run
from simulations.result import from_json, to_json
from simulations.scenario.schema import Fault, Population, Scenario

pytestmark = pytest.mark.system

FILE = """
format = 1
name = "an easy home, a hard one, and an office"

[[networks]]
name = "easy"
prefix = "192.168.1.0/24"
nat = { mapping = "endpoint_independent", filtering = "address_and_port_dependent" }

[[networks]]
name = "hard"
prefix = "192.168.2.0/24"

[networks.nat]
mapping = "address_and_port_dependent"
filtering = "address_and_port_dependent"
ports = "random"

[[networks]]
name = "office"
prefix = "10.20.0.0/24"
nat = { mapping = "endpoint_independent", filtering = "address_and_port_dependent" }
uplink = { latency = "5ms" }

[[relays]]
name = "relay"

[[gateways]]
name = "gateway"
network = "office"
site = "headquarters"

[[services]]
name = "echo"
network = "office"
address = "10.20.0.80"

[[clients]]
name = "ada-laptop"
network = "easy"
user = "ada"

[[clients]]
name = "grace-laptop"
network = "hard"
user = "grace"

[[clients]]
name = "eve-laptop"
network = "easy"
user = "eve"

[account]
sites = ["headquarters"]
users = [
  { name = "ada", groups = ["engineers"] },
  { name = "grace", groups = ["engineers"] },
  { name = "eve" },
]
resources = [{ name = "echoes", sites = ["headquarters"], service = "echo" }]
policies = [{ name = "engineers-echo", group = "engineers", resource = "echoes" }]
"""
SCENARIO = msgspec.toml.decode(FILE, type=Scenario)


def test_every_pair_gets_what_policy_and_the_oracle_say() -> None:
    result = run(SCENARIO, seed=1)
    assert result.backend == "kernel"
    assert from_json(to_json(result)) == result
    got = {pair.client: (pair.expected, pair.outcome) for pair in result.pairs}
    assert got == {
        "ada-laptop": ("direct", "direct"),
        "grace-laptop": ("relayed", "relayed"),
        "eve-laptop": ("", "denied"),
    }
    for pair in result.pairs[:2]:
        assert pair.gateway == "gateway"
        assert pair.why
        assert pair.round_trip_ns is not None
        assert pair.round_trip_ns >= 10_000_000  # the office is 5 ms away


def test_what_cannot_be_built_is_said_and_nothing_is_made() -> None:
    office = SCENARIO.networks[2]
    unfit = attrs.evolve(
        SCENARIO,
        networks=(attrs.evolve(office, nat=None), *SCENARIO.networks[:2]),
        faults=(Fault(at="1s", kind="crash", targets=("gateway",)),),
        populations=(Population(name="crowd", count=3),),
    )
    found = obstacles(unfit)
    assert any("office" in each for each in found)
    assert any("faults" in each for each in found)
    assert any("populations" in each for each in found)
    with pytest.raises(LabError, match="office"):
        run(unfit, seed=1)
    assert obstacles(SCENARIO) == []
