"""A failing scenario is made as small as it can be while it still fails in the same way."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest

from simulations.chaos import draw
from simulations.result import Checked, Result, Violation
from simulations.scenario.schema import (
    Check,
    Client,
    Fault,
    NatBehaviour,
    Network,
    Scenario,
    Traffic,
)
from simulations.scenario.units import duration_ns
from simulations.shrink import Failure, shrink, size, tidy
from tests.small_scenario import SCENARIO

LEAK = Violation(at_ns=5, rule="no_plaintext", detail="seen")
STALL = Violation(at_ns=9, rule="liveness", detail="no answer")
CLIENTS = tuple(Client(name=f"laptop-{n}", network="home", user="grace") for n in range(6))
LARGE = attrs.evolve(
    draw(SCENARIO, 4),
    clients=CLIENTS,
    traffic=(Traffic(source=("laptop-1",)), Traffic(source=("laptop-3", "laptop-4"))),
    checks=(Check(kind="reach", source=("laptop-3",), to=("intranet",)),),
)


def runner(fails: Callable[[Scenario], Violation | None]) -> Callable[[Scenario], Result]:
    def run(scenario: Scenario) -> Result:
        found = fails(scenario)
        violations = () if found is None else (found,)
        return Result(scenario=scenario.name, seed=1, violations=violations)

    return run


def a_crash_with_the_third_laptop(scenario: Scenario) -> Violation | None:
    crashes = any(fault.kind == "pause" for fault in scenario.faults)
    is_there = any(each.name == "laptop-3" for each in scenario.clients)
    return LEAK if crashes and is_there else None


def test_only_what_makes_it_fail_is_left() -> None:
    pause = Fault(at="7350ms", kind="pause", targets=("gateway", "relay-1"), duration="8s")
    scenario = attrs.evolve(LARGE, faults=(*LARGE.faults, pause))
    run = runner(a_crash_with_the_third_laptop)
    failure = Failure.of(run(scenario))
    assert failure is not None

    shrunk = shrink(scenario, failure, run, is_valid=lambda each: True)

    assert shrunk.is_minimal
    assert [each.name for each in shrunk.scenario.clients] == ["laptop-3"]
    assert [fault.kind for fault in shrunk.scenario.faults] == ["pause"]
    assert not shrunk.scenario.traffic
    assert not shrunk.scenario.checks
    assert len(shrunk.scenario.hosts) == 2  # the laptop, and whom the pause is of
    assert not shrunk.scenario.networks
    assert shrunk.scenario.seed == scenario.seed
    assert size(shrunk.scenario) < size(scenario)
    assert a_crash_with_the_third_laptop(shrunk.scenario)


def test_another_failure_met_on_the_way_is_not_taken_for_it() -> None:
    def fails(scenario: Scenario) -> Violation | None:
        return LEAK if len(scenario.clients) == len(CLIENTS) else STALL

    run = runner(fails)
    failure = Failure.of(run(LARGE))
    assert failure is not None
    shrunk = shrink(LARGE, failure, run, is_valid=lambda each: True)
    assert len(shrunk.scenario.clients) == len(CLIENTS)
    assert not shrunk.scenario.faults


def test_what_makes_no_sense_is_never_run() -> None:
    def is_valid(scenario: Scenario) -> bool:
        return bool(scenario.portals)

    def run(scenario: Scenario) -> Result:
        assert scenario.portals
        return Result(scenario=scenario.name, seed=1, violations=(LEAK,))

    shrunk = shrink(LARGE, Failure(frozenset({"rule no_plaintext"})), run, is_valid=is_valid)
    assert len(shrunk.scenario.portals) == 1


def test_the_budget_of_runs_is_kept() -> None:
    run = runner(lambda scenario: LEAK)
    failure = Failure(frozenset({"rule no_plaintext"}))
    shrunk = shrink(LARGE, failure, run, is_valid=lambda each: True, max_runs=3)
    assert shrunk.runs == 3
    assert not shrunk.is_minimal


def test_ways_and_times_become_simpler() -> None:
    run = runner(lambda it: LEAK if any(each.nat for each in it.networks) else None)
    failure = Failure(frozenset({"rule no_plaintext"}))
    shrunk = shrink(LARGE, failure, run, is_valid=lambda each: True)
    assert [each.nat for each in shrunk.scenario.networks] == [NatBehaviour()]


def test_time_to_recover_is_kept() -> None:
    late = Fault(at="60s", kind="pause", targets=("gateway",), duration="8s")
    scenario = attrs.evolve(LARGE, faults=(late,), duration="120s")

    def fails(it: Scenario) -> Violation | None:
        is_there = any(fault.kind == "pause" for fault in it.faults)
        end = max((duration_ns(fault.at) for fault in it.faults), default=0)
        return LEAK if is_there and duration_ns(it.duration) - end >= 60 * 10**9 else None

    failure = Failure(frozenset({"rule no_plaintext"}))
    shrunk = shrink(scenario, failure, runner(fails), is_valid=lambda each: True)
    assert shrunk.scenario.faults[0].at == "10s"
    assert shrunk.scenario.duration == "70000ms"


def test_no_path_is_another_failure_than_no_direct_one() -> None:
    def failed(how: str) -> Failure:
        violation = Violation(at_ns=1, rule="liveness", detail=f"a to b (x to y): {how} (so); 1")
        found = Failure.of(Result(scenario="x", seed=1, violations=(violation,)))
        assert found is not None
        return found

    assert not failed("failed, not relayed").is_like(failed("relayed, not direct"))
    assert failed("failed, not relayed").is_like(failed("failed, not relayed"))


def test_a_failure_is_known_by_its_rules_checks_and_error() -> None:
    checked = Checked(number=1, kind="reach", text="laptop to intranet", held=False)
    result = Result(scenario="x", seed=1, violations=(LEAK,), checks=(checked,), error="Boom: 7")
    failure = Failure.of(result)
    assert str(failure) == "check reach, error Boom, rule no_plaintext"
    assert Failure.of(Result(scenario="x", seed=1)) is None


def test_tidying_leaves_out_what_names_something_that_is_gone() -> None:
    scenario = attrs.evolve(
        LARGE,
        clients=CLIENTS[:4],
        faults=(
            Fault(at="1s", kind="reconnect", targets=("laptop-5",)),
            Fault(at="2s", kind="reconnect", targets=("laptop-5", "laptop-1")),
            Fault(at="3s", kind="change", change="delete_token", subject=("laptop-5",)),
            Fault(at="4s", kind="change", change="delete_token", subject=("laptop-1",)),
        ),
    )
    tidied = tidy(scenario)
    assert [fault.targets for fault in tidied.faults] == [("laptop-1",), ()]
    assert tidied.faults[1].subject == ("laptop-1",)
    assert [each.source for each in tidied.traffic] == [("laptop-1",), ("laptop-3",)]


def test_a_check_that_does_not_hold_otherwise_is_another_failure() -> None:
    def failed(detail: str) -> Failure:
        check = Checked(number=1, kind="reach", text="a reaches b", held=False, detail=detail)
        found = Failure.of(Result(scenario="x", seed=1, checks=(check,)))
        assert found is not None
        return found

    late = failed("laptop to wiki had its first answer after 23662 ms")
    never = "laptop to wiki is denied; laptop to wiki had its first answer after never"
    assert late.is_like(failed("tablet to intranet had its first answer after 900 ms"))
    assert not late.is_like(failed(never))
    assert str(late) == "check reach (had its first answer after N ms)"


@pytest.mark.parametrize(("prefix", "keeps"), [("203.0.113.0/24", False), ("10.20.0.0/16", True)])
def test_a_network_of_private_addresses_keeps_its_nat(prefix: str, keeps: bool) -> None:
    network = Network(name="office", prefix=prefix, nat=NatBehaviour(ports="random"))
    shrunk = shrink(
        attrs.evolve(LARGE, networks=(network,)),
        Failure(frozenset({"rule no_plaintext"})),
        runner(lambda _: LEAK),
        is_valid=lambda scenario: len(scenario.networks) == 1,
    )
    assert shrunk.scenario.networks[0].nat == (NatBehaviour() if keeps else None)
