"""Hosts that lie, as real processes beside honest ones: they disturb nobody, break no rule that
taps can see, and have the same outcomes as in virtual time. One or two habits of each role are in
the suite, all of them in `make soak` (HOLLOWAY_ALL_HABITS); in virtual time all are in both."""

from __future__ import annotations

import os
from typing import Any, Final

import attrs
import pytest

from simulations.result import Result
from simulations.scenario.schema import (
    Account,
    Check,
    Client,
    Fault,
    Gateway,
    NatBehaviour,
    Network,
    Policy,
    Portal,
    Relay,
    Resource,
    Scenario,
    Service,
    Traffic,
    User,
)
from tests.system.both_worlds import in_both_worlds

pytestmark = pytest.mark.system

MALLORY = "mallory"
IS_LONG: Final = bool(os.environ.get("HOLLOWAY_ALL_HABITS"))


def habits(*few: str, more: tuple[str, ...]) -> tuple[str, ...]:
    return (*few, *more) if IS_LONG else few


HARD = NatBehaviour(
    mapping="address_and_port_dependent", filtering="address_and_port_dependent", ports="random"
)
BASE = Scenario(
    format=1,
    name="somebody lies",
    duration="8s",
    settle="60s",
    networks=(
        Network(name="home", nat=NatBehaviour()),
        Network(name="cafe", nat=NatBehaviour()),
        Network(name="office", prefix="10.20.0.0/24", nat=NatBehaviour()),
    ),
    portals=(Portal(name="portal"),),
    relays=(Relay(name="relay"),),
    gateways=(Gateway(name="gateway", network="office", site="hq"),),
    services=(Service(name="wiki", network="office"), Service(name="vault", network="office")),
    clients=(Client(name="laptop", network="home", user="grace"),),
    account=Account(
        users=(User(name="grace", groups=("staff",)), User(name=MALLORY, groups=("guests",))),
        sites=("hq",),
        resources=(
            Resource(name="wiki", sites=("hq",), service="wiki"),
            Resource(name="vault", sites=("hq",), service="vault"),
        ),
        policies=(
            Policy(name="staff-wiki", group="staff", resource="wiki"),
            Policy(name="guests-wiki", group="guests", resource="wiki"),
            Policy(name="staff-vault", group="staff", resource="vault"),
        ),
    ),
    traffic=(Traffic(source=("laptop",), every="200ms"),),
    checks=(Check(kind="uninterrupted", source=("laptop",), at="1s", within="1s"),),
)


def both(**changes: Any) -> Result:
    _, kernel = in_both_worlds(attrs.evolve(BASE, **changes))
    return kernel


def lying(habit: str) -> Client:
    return Client(name=MALLORY, network="cafe", user=MALLORY, hostile=habit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "habit", habits("spoofs", "scans", more=("floods", "replays", "forged_candidates"))
)
def test_a_hostile_client_disturbs_nobody(habit: str) -> None:
    account = BASE.account
    if habit == "scans":  # gateways that it was never told of
        account = attrs.evolve(account, policies=(account.policies[0], account.policies[2]))
    kernel = both(
        account=account,
        clients=(*BASE.clients, lying(habit)),
        traffic=(*BASE.traffic, Traffic(source=(MALLORY,))),
    )
    for pair in kernel.pairs:
        if pair.client == "laptop":
            assert (pair.outcome, pair.answered) == ("direct", pair.asked)


def test_a_trespasser_is_cut_off_when_its_policy_goes_and_never_gets_further() -> None:
    kernel = both(
        duration="14s",
        clients=(*BASE.clients, lying("trespasses")),
        traffic=(*BASE.traffic, Traffic(source=(MALLORY,), every="200ms")),
        faults=(Fault(at="4s", kind="change", change="remove_policy", subject=("guests-wiki",)),),
        checks=(*BASE.checks, Check(kind="cut", source=(MALLORY,), at="4s", within="1s")),
    )
    mallory = next(pair for pair in kernel.pairs if pair.client == MALLORY)
    assert 0 < mallory.answered < mallory.asked


def test_a_token_that_is_none_gets_nobody_in() -> None:
    kernel = both(
        clients=(*BASE.clients, lying("stale_token")),
        traffic=(*BASE.traffic, Traffic(source=(MALLORY,))),
    )
    assert {pair.answered for pair in kernel.pairs if pair.client == MALLORY} == {0}


@pytest.mark.parametrize("habit", habits("silent", more=("spoofs", "replays")))
def test_a_hostile_gateway_breaks_no_rule(habit: str) -> None:
    bad = Gateway(name="bad", network="office", site="hq", hostile=habit)  # type: ignore[arg-type]
    kernel = both(gateways=(bad, *BASE.gateways), checks=())
    if habit == "silent":  # so that another is asked
        assert {pair.gateway for pair in kernel.pairs} == {"gateway"}


def test_of_a_gateway_that_drops_what_it_accepted_nobody_can_know() -> None:
    bad = Gateway(name="gateway", network="office", site="hq", hostile="acknowledges_and_drops")
    kernel = both(gateways=(bad,), checks=())
    assert {(pair.outcome, pair.answered) for pair in kernel.pairs} == {("failed", 0)}
    assert kernel.counters["questions_through_gateways"] == 0


@pytest.mark.parametrize(
    "habit", habits("redirects", more=("drops", "corrupts", "duplicates", "replays"))
)
def test_a_hostile_relay_is_no_better_than_a_bad_way(habit: str) -> None:
    home, cafe, office = BASE.networks
    kernel = both(
        networks=(attrs.evolve(home, nat=HARD), cafe, attrs.evolve(office, nat=HARD)),
        relays=(Relay(name="bad", hostile=habit), *BASE.relays),  # type: ignore[arg-type]
        checks=(),
    )
    assert {pair.outcome for pair in kernel.pairs} <= {"relayed", "failed"}
