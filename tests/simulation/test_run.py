"""A run of a scenario: the whole system in virtual time, and the same one each time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from simulations.result import Result, from_json, to_json
from simulations.run import run
from simulations.scenario.schema import (
    Check,
    Client,
    Fault,
    Firewall,
    Gateway,
    NatBehaviour,
    Network,
    Policy,
    Population,
    Resource,
    Service,
    User,
)

from .scenarios import EASY, FAULTY, HARD, home, office, scenario

ROOT = Path(__file__).resolve().parents[2]
IN_A_PROCESS = (
    "from simulations.result import to_json; from simulations.run import run; "
    "from tests.simulation.scenarios import FAULTY; print(to_json(run(FAULTY, 7)).decode())"
)
S = 10**9


def without_cost(result: Result) -> dict[str, object]:
    told = {name: getattr(result, name) for name in Result.__annotations__}
    del told["cost"]
    return told


@pytest.mark.parametrize(
    ("client", "gateway", "path"),
    [(EASY, EASY, "direct"), (EASY, HARD, "relayed"), (HARD, HARD, "relayed")],
)
def test_a_pair_finds_the_path_that_its_nats_admit(
    client: NatBehaviour, gateway: NatBehaviour, path: str
) -> None:
    result = run(scenario(networks=(home("home", client), office(gateway))), 1)
    assert result.error == ""
    assert [pair.outcome for pair in result.pairs] == [path]
    assert result.pairs[0].answered == result.pairs[0].asked == 20
    assert result.held


def test_two_processes_with_different_hash_seeds_give_the_same_result_with_faults() -> None:
    results = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        results.append(without_cost(from_json(done.stdout.splitlines()[-1])))
    assert results[0] == results[1]
    assert results[0]["error"] == ""
    assert results[0]["trace"] == run(FAULTY, 7).trace


def test_another_seed_gives_another_trace() -> None:
    assert run(scenario(), 1).trace != run(scenario(), 2).trace


def test_a_result_goes_to_json_and_back() -> None:
    result = run(scenario(duration="2s"), 1, follow=("laptop", "web"))
    assert from_json(to_json(result)) == result


@pytest.mark.parametrize("seed", range(3))
def test_every_part_of_the_system_comes_back_after_its_fault(seed: int) -> None:
    result = run(FAULTY, seed)
    assert result.error == ""
    assert result.pairs[0].outcome == "direct"
    late = {
        fault.text: fault.recovery_ns
        for fault in result.faults
        if fault.recovery_ns is None or fault.recovery_ns > 5 * S
    }
    assert not late


def test_a_revoked_access_is_cut_and_comes_back_with_its_policy() -> None:
    result = run(
        scenario(
            faults=(
                Fault(at="3s", kind="change", change="remove_policy", subject=("engineers-web",)),
                Fault(at="6s", kind="change", change="add_policy", subject=("engineers-web",)),
            ),
            checks=(
                Check(kind="cut", at="3s", within="250ms", until="6s"),
                Check(kind="recovered", at="6s", within="3s"),
                Check(kind="uninterrupted", at="0s", until="3s", within="600ms"),
            ),
        ),
        1,
    )
    assert [(check.held, check.detail) for check in result.checks] == [(True, "")] * 3
    assert result.pairs[0].outcome == "direct"


def test_who_lost_the_token_is_cut_with_all_devices_of_the_user_and_nobody_else_is() -> None:
    account = scenario().account
    hers, his = User(name="grace", groups=("engineers",)), User(name="alan", groups=("engineers",))
    result = run(
        scenario(
            clients=(
                Client(name="laptop", network="home", user="grace"),
                Client(name="phone", network="cafe", user="grace"),
                Client(name="desktop", network="cafe", user="alan"),
            ),
            account=attrs.evolve(account, users=(hers, his)),
            faults=(Fault(at="3s", kind="change", change="delete_token", subject=("laptop",)),),
            checks=(
                Check(kind="uninterrupted", source=("laptop",), until="3s", within="600ms"),
                Check(kind="cut", source=("laptop", "phone"), at="3s", within="250ms"),
                Check(kind="uninterrupted", source=("desktop",), at="1s", within="600ms"),
                Check(kind="reach", source=("desktop",)),
            ),
        ),
        1,
    )
    assert result.error == ""
    assert [fault.text for fault in result.faults] == ["delete_token laptop"]
    assert [(check.held, check.detail) for check in result.checks] == [(True, "")] * 4
    assert [pair.outcome for pair in result.pairs] == ["denied", "denied", "direct"]


def test_a_population_that_an_admin_changes_is_changed_as_a_whole() -> None:
    for change in ("delete_token", "remove_user", "disable_user"):
        result = run(
            scenario(
                clients=(),
                populations=(Population(name="crowd", count=3, groups=("engineers",)),),
                faults=(Fault(at="3s", kind="change", change=change, subject=("crowd",)),),
                checks=(Check(kind="cut", source=("crowd",), at="3s", within="250ms"),),
            ),
            1,
        )
        assert result.error == ""
        texts = [fault.text for fault in result.faults]
        assert texts == [f"{change} crowd-{number}" for number in (1, 2, 3)]
        assert [(check.held, check.detail) for check in result.checks] == [(True, "")]


def test_a_hostile_client_that_holds_on_to_a_dead_gateway_is_no_failed_recovery() -> None:
    """It heeds no revocation, so it never goes to the other gateway."""
    account = scenario().account
    guests = User(name="mallory", groups=("engineers", "guests"))
    again = Resource(name="archive", sites=("hq",), service="old")
    crash = Fault(at="9s", kind="crash", targets=("gateway-1",), duration="3s")
    whose = ("mallory", "engineers")
    result = run(
        scenario(
            duration="20s",
            gateways=tuple(
                Gateway(name=f"gateway-{n}", network="office", site="hq") for n in range(2)
            ),
            services=(
                *scenario().services,
                Service(name="old", network="office", address="10.20.0.81"),
            ),
            clients=(
                *scenario().clients,
                Client(name="trespasser", network="cafe", user="mallory", hostile="trespasses"),
            ),
            account=attrs.evolve(
                account,
                users=(*account.users, guests),
                resources=(*account.resources, again),
                policies=(
                    *account.policies,
                    Policy(name="guests-archive", group="guests", resource="archive"),
                ),
            ),
            faults=(
                Fault(at="2s", kind="change", change="remove_membership", subject=whose),
                Fault(at="5s", kind="change", change="add_membership", subject=whose),
                crash,
            ),
        ),
        1,
    )
    assert result.error == ""
    outcomes = {(pair.client, pair.resource): pair.outcome for pair in result.pairs}
    assert outcomes["trespasser", "archive"] == "failed"
    assert outcomes["laptop", "web"] == "direct"
    recovery_ns = result.faults[2].recovery_ns
    assert recovery_ns is not None
    assert recovery_ns < S


def test_a_followed_session_is_told_packet_by_packet() -> None:
    hard = (home("home", HARD), office(HARD))
    result = run(scenario(duration="2s", networks=hard), 1, follow=("laptop", "web"))
    kinds = {step.kind for step in result.timeline}
    assert {"stun", "turn", "wireguard", "channel"} <= kinds
    assert list(result.timeline) == sorted(result.timeline, key=lambda step: step.at_ns)


def test_an_error_in_the_run_is_told_and_not_raised() -> None:
    unknown = Fault(at="1s", kind="roam", targets=("laptop",), to="nowhere")
    result = run(scenario(faults=(unknown,)), 1)
    assert result.error == ""
    assert result.faults[0].text == "nothing: there is no network 'nowhere'"


@pytest.mark.parametrize(("country", "outcome"), [("CH", "direct"), ("FR", "denied")])
def test_a_policy_may_ask_for_the_country_of_a_network(country: str, outcome: str) -> None:
    condition = {"remote_ip_location_region": {"operator": "is_in", "values": ["CH"]}}
    account = scenario().account
    policies = (attrs.evolve(account.policies[0], conditions=condition),)
    result = run(
        scenario(
            networks=(home("home", country=country), office()),
            account=attrs.evolve(account, policies=policies),
            checks=(),
        ),
        1,
    )
    assert result.error == ""
    assert [pair.outcome for pair in result.pairs] == [outcome]


def test_what_never_worked_is_not_blamed_on_a_fault() -> None:
    blocked = Firewall(udp="drop")
    result = run(
        scenario(
            networks=(home("home", firewall=blocked), office()),
            relays=(),
            faults=(Fault(at="5s", kind="reconnect", targets=("laptop",)),),
            checks=(Check(kind="online", targets=("laptop",), at="6s", within="2s"),),
        ),
        1,
    )
    assert result.pairs[0].outcome == "failed"
    assert result.faults[0].recovery_ns == 0
    assert result.held


def test_hosts_with_ipv6_reach_each_other_by_it_where_ipv4_needs_a_relay() -> None:
    networks = (
        home("home", HARD, prefix6="2001:db8:1::/64"),
        attrs.evolve(office(HARD), prefix6="2001:db8:2::/64"),
    )
    result = run(scenario(networks=networks), 1, follow=("laptop", "web"))
    assert [pair.outcome for pair in result.pairs] == ["direct"]
    assert result.pairs[0].expected == "direct"
    assert any(
        step.peer.startswith("[2001:db8:2:") for step in result.timeline if step.kind == "wireguard"
    )


def test_a_host_with_ipv6_alone_is_served() -> None:
    networks = (
        Network(name="home", prefix6="2001:db8:1::/64"),
        attrs.evolve(office(), prefix6="2001:db8:2::/64"),
    )
    result = run(scenario(networks=networks), 1)
    assert [pair.outcome for pair in result.pairs] == ["direct"]


def test_a_gateway_that_is_restarted_in_good_order_serves_again_at_once() -> None:
    restart = Fault(at="4s", kind="restart", targets=("gateway",))
    result = run(scenario(faults=(restart,)), 1)
    assert result.pairs[0].outcome == "direct"
    recovery_ns = result.faults[0].recovery_ns
    assert recovery_ns is not None
    assert recovery_ns < 5 * S
