"""Hosts that lie disturb nobody else, and break no rule of safety."""

from __future__ import annotations

from typing import Any

import pytest

from simulations.checks.safety import all_rules
from simulations.result import Result
from simulations.run import run
from simulations.scenario.schema import (
    Account,
    Check,
    Client,
    Gateway,
    Policy,
    Relay,
    Resource,
    User,
)

from .scenarios import HARD, home, office, scenario

MALLORY = "mallory"


def with_mallory(habit: str, **changes: Any) -> Result:
    """The laptop as ever, and a hostile client whose user may reach the same service, unless it
    looks for gateways that it was never told of."""
    groups = () if habit == "scans" else ("engineers",)
    account = Account(
        users=(
            User(name="grace", groups=("engineers",)),
            User(name=MALLORY, groups=groups),
        ),
        sites=("hq",),
        resources=(Resource(name="web", sites=("hq",), service="echo"),),
        policies=(Policy(name="engineers-web", group="engineers", resource="web"),),
    )
    clients = (
        Client(name="laptop", network="home", user="grace"),
        Client(name=MALLORY, network="cafe", user=MALLORY, hostile=habit),  # type: ignore[arg-type]
    )
    return judged(scenario(account=account, clients=clients, **changes))


def judged(told: Any) -> Result:
    result = run(told, 1, monitors=all_rules())
    assert result.error == ""
    assert result.violations == ()
    assert [check.detail for check in result.checks if not check.held] == []
    return result


def outcomes(result: Result) -> dict[str, str]:
    return {f"{pair.client} to {pair.resource}": pair.outcome for pair in result.pairs}


@pytest.mark.parametrize("habit", ["spoofs", "floods", "replays", "forged_candidates", "scans"])
def test_a_hostile_client_disturbs_nobody(habit: str) -> None:
    result = with_mallory(habit)
    assert outcomes(result)["laptop to web"] == "direct"
    (laptop,) = (pair for pair in result.pairs if pair.client == "laptop")
    assert laptop.answered == laptop.asked


def test_a_token_that_is_none_gets_nobody_in() -> None:
    result = with_mallory("stale_token")
    assert outcomes(result) == {"laptop to web": "direct", "mallory to web": "failed"}


@pytest.mark.parametrize("habit", ["silent", "acknowledges_and_drops", "spoofs", "replays"])
def test_a_hostile_gateway_breaks_no_rule(habit: str) -> None:
    gateways = (
        Gateway(name="bad", network="office", site="hq", hostile=habit),  # type: ignore[arg-type]
        Gateway(name="good", network="office", site="hq"),
    )
    result = judged(scenario(gateways=gateways, checks=()))
    if habit != "acknowledges_and_drops":  # of which no client can know
        assert outcomes(result)["laptop to web"] == "direct"


@pytest.mark.parametrize("habit", ["drops", "corrupts", "duplicates", "redirects", "replays"])
def test_traffic_passes_by_an_honest_relay_where_another_lies(habit: str) -> None:
    relays = (
        Relay(name="bad", hostile=habit),  # type: ignore[arg-type]
        Relay(name="good"),
    )
    networks = (home("home", HARD), office(HARD))
    result = judged(
        scenario(
            duration="20s",
            relays=relays,
            networks=networks,
            checks=(Check(kind="reach", source=("laptop",), to=("web",), path="relayed"),),
        )
    )
    assert outcomes(result)["laptop to web"] == "relayed"
