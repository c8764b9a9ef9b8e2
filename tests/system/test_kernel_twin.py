"""A scenario on the kernel: namespaces and real processes give each pair the outcome that it has in
virtual time, and what cannot be built is said beforehand."""

from __future__ import annotations

from itertools import product
from typing import get_args

import attrs
import pytest

from simulations.kernel.lab import LabError
from simulations.kernel.obstacles import as_built, liberties, obstacles
from simulations.kernel.twin import run
from simulations.scenario.load import ready, ready_names
from simulations.scenario.schema import (
    Account,
    Behaviour,
    Client,
    Fault,
    Gateway,
    NatBehaviour,
    Network,
    Policy,
    Portal,
    PortAssignment,
    Relay,
    Resource,
    Scenario,
    Service,
    Traffic,
    User,
)  # fmt: skip
from tests.system.both_worlds import MS, hastened, in_both_worlds

pytestmark = pytest.mark.system


def test_a_home_office_is_the_same_in_both_worlds() -> None:
    _, kernel = in_both_worlds(hastened(ready("home-office"), 3))
    outcomes = {pair.client: pair.outcome for pair in kernel.pairs}
    assert outcomes == {"laptop": "direct", "tablet": "denied", "desktop": "denied"}
    desktop = kernel.pairs[2]
    assert desktop.first_answer_ns is not None  # until its policy went
    assert desktop.answered < desktop.asked
    assert kernel.pairs[0].round_trip_ns is not None
    assert kernel.pairs[0].round_trip_ns >= 24 * MS  # 8 ms and 4 ms, there and back


def test_a_gateways_death_is_made_good_in_both_worlds() -> None:
    _, kernel = in_both_worlds(hastened(ready("gateway-death"), 2))
    deaths = [fault.recovery_ns for fault in kernel.faults if fault.kind == "crash"]
    assert None not in deaths
    assert any(deaths), "one of the two carried the traffic when it died"
    assert kernel.pairs[0].longest_gap_ns > 500 * MS


def test_two_hard_nats_need_a_relay_in_both_worlds() -> None:
    _, kernel = in_both_worlds(hastened(ready("symmetric-to-symmetric"), 6))
    outcomes = [(pair.client, pair.expected, pair.outcome) for pair in kernel.pairs]
    assert outcomes == [("laptop", "relayed", "relayed"), ("desktop", "direct", "direct")]


def test_a_commuter_stays_connected_in_both_worlds() -> None:
    _, kernel = in_both_worlds(hastened(ready("roaming-commuter"), 3))
    assert [fault.kind for fault in kernel.faults] == ["roam", "roam", "roam", "rebind"]
    assert kernel.pairs[0].client_nat == "EI/EI", "it is in the cafe at the end"


# --- the oracle ----------------------------------------------------------------------------------

BEHAVIOURS: tuple[Behaviour, ...] = get_args(Behaviour)
NINE = list(product(BEHAVIOURS, BEHAVIOURS))


def nat(mapping: Behaviour, filtering: Behaviour) -> NatBehaviour:
    """Ports in sequence where they change: two random ones of one NAT may be the same."""
    ports: PortAssignment = "preserve" if mapping == "endpoint_independent" else "sequential"
    return NatBehaviour(mapping=mapping, filtering=filtering, ports=ports)


def all_pairs() -> Scenario:
    """A client behind each of the nine NATs, each of whom may reach a gateway behind each."""
    homes = [Network(name=f"home-{n}", nat=nat(*each)) for n, each in enumerate(NINE)]
    offices = [
        Network(name=f"office-{n}", prefix=f"10.20.{n}.0/24", nat=nat(*each))
        for n, each in enumerate(NINE)
    ]
    numbers = range(len(NINE))
    return Scenario(
        format=1,
        name="all pairs of NATs",
        duration="30s",
        settle="120s",
        networks=(*homes, *offices),
        portals=(Portal(name="portal"),),
        relays=(Relay(name="relay"),),
        gateways=tuple(
            Gateway(name=f"gateway-{n}", network=f"office-{n}", site=f"site-{n}") for n in numbers
        ),
        services=tuple(Service(name=f"echo-{n}", network=f"office-{n}") for n in numbers),
        clients=tuple(
            Client(name=f"client-{n}", network=f"home-{n}", user="grace") for n in numbers
        ),
        account=Account(
            users=(User(name="grace"),),
            sites=tuple(f"site-{n}" for n in numbers),
            resources=tuple(
                Resource(name=f"web-{n}", sites=(f"site-{n}",), service=f"echo-{n}")
                for n in numbers
            ),
            policies=tuple(
                Policy(name=f"all-{n}", group="everyone", resource=f"web-{n}") for n in numbers
            ),
        ),
        traffic=(Traffic(every="2s"),),
    )


def test_the_oracle_agrees_with_real_processes_on_all_81_pairs_of_nats() -> None:
    virtual, kernel = in_both_worlds(all_pairs())
    for result in (virtual, kernel):
        assert len(result.pairs) == 81
        assert [pair for pair in result.pairs if pair.outcome != pair.expected] == []
    assert {pair.outcome for pair in kernel.pairs} == {"direct", "relayed"}


# --- what cannot be ------------------------------------------------------------------------------


def test_what_cannot_be_built_is_said_and_nothing_is_made() -> None:
    scenario = ready("home-office")
    home, *others = scenario.networks
    unfit = attrs.evolve(
        scenario,
        networks=(
            attrs.evolve(home, nat=None, prefix=""),
            *others,
        ),
        faults=(Fault(at="1s", kind="clock_skew", targets=("gateway",), offset="1h"),),
    )
    found = obstacles(unfit)
    for word in ("network home", "clock_skew"):
        assert any(word in each for each in found), word
    with pytest.raises(LabError, match="network home"):
        run(unfit, seed=1)


def test_what_is_built_otherwise_is_said_and_written_into_the_virtual_run() -> None:
    scenario = ready("carrier-grade")
    said = liberties(scenario)
    assert any("one public address" in each and "carrier" in each for each in said)
    assert obstacles(scenario) == []
    built = as_built(scenario)
    assert all(each.nat is None or each.nat.reply_binding for each in built.networks)
    assert liberties(attrs.evolve(built, traffic=(), checks=())) == []


def test_the_ready_made_scenarios_that_the_kernel_cannot_run_are_few() -> None:
    unfit = {name for name in ready_names() if obstacles(ready(name))}
    assert unfit == {"thundering-herd"}


def test_policies_with_a_lease_are_no_obstacle() -> None:
    scenario = ready("home-office")
    policy = Policy(name="p", group="engineers", resource="wiki", lease="60s", disabled=True)
    account = attrs.evolve(scenario.account, policies=(policy,))
    assert obstacles(attrs.evolve(scenario, account=account)) == []
