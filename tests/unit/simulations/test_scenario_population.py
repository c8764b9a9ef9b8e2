"""Populations: drawn from published mixes, each client from a stream of its own."""

from __future__ import annotations

import re
from collections import Counter

import attrs
import pytest

from simulations.scenario.load import checked, loads
from simulations.scenario.population import expand, mix_names, mixes
from simulations.scenario.schema import Client, Network, Population, Scenario
from simulations.scenario.units import PPM, share_ppm

HEAD = """
format = 1
name = "crowd"
duration = "60s"
[[portals]]
name = "p1"
[account]
sites = ["s"]
resources = [{ name = "wiki", sites = ["s"], address = "10.20.0.80" }]
policies = [{ name = "p", group = "staff", resource = "wiki" }]
[[populations]]
name = "crowd"
count = 400
groups = ["staff"]
"""


def crowd(count: int, mix: str = "general", roaming: float = 0.0) -> Scenario:
    population = Population(name="crowd", count=count, mix=mix, groups=("staff",), roaming=roaming)
    return attrs.evolve(loads(HEAD), populations=(population,))


def of(scenario: Scenario, name: str) -> tuple[Client, Network]:
    client = next(each for each in scenario.clients if each.name == name)
    return client, next(each for each in scenario.networks if each.name == client.network)


@pytest.mark.parametrize("mix", mix_names())
def test_whatever_is_drawn_is_a_sound_scenario(mix: str) -> None:
    drawn = expand(crowd(150, mix, roaming=0.3), seed=3)
    assert checked(drawn) == drawn
    assert len(drawn.clients) == len(drawn.account.users) == 150
    assert not drawn.populations
    assert expand(drawn, 4) == drawn


def test_a_seed_gives_the_same_and_another_seed_gives_others() -> None:
    assert expand(crowd(50), 1) == expand(crowd(50), 1)
    assert expand(crowd(50), 1).networks != expand(crowd(50), 2).networks


def test_a_client_is_the_same_however_many_others_there_are() -> None:
    few, many = expand(crowd(20), 9), expand(crowd(21), 9)
    for number in range(1, 21):
        assert of(few, f"crowd-{number}") == of(many, f"crowd-{number}")


@pytest.mark.parametrize("mix", mix_names())
def test_shares_come_out_as_the_mix_says(mix: str) -> None:
    drawn = expand(crowd(3_000, mix), 5)
    counted: Counter[tuple[str, str, str]] = Counter()
    by_name = {each.name: each for each in drawn.networks}
    for client in drawn.clients:
        network = by_name[client.network]
        nat = network.nat or getattr(by_name.get(network.behind), "nat", None)
        counted[
            (nat.mapping if nat else "", nat.hairpinning if nat else "", network.firewall.udp)
        ] += 1
    wanted: Counter[tuple[str, str, str]] = Counter()
    for kind in mixes()[mix].networks:
        nat = kind.nat or kind.carrier
        key = (nat.mapping if nat else "", nat.hairpinning if nat else "", kind.firewall.udp)
        wanted[key] += share_ppm(kind.share)
    for key, share in wanted.items():
        assert abs(counted[key] / 3_000 - share / PPM) < 0.03, key


def test_carriers_are_shared_and_only_those_exist_that_have_clients() -> None:
    drawn = expand(crowd(1_000, "mobile"), 1)
    carriers = [each for each in drawn.networks if "-carrier-" in each.name and each.nat]
    behind = Counter(each.behind for each in drawn.networks)
    assert 10 < len(carriers) < 30
    assert all(behind[carrier.name] for carrier in carriers)


def test_names_of_populations_stand_for_their_clients() -> None:
    text = (
        HEAD
        + """
[[traffic]]
source = ["crowd"]
[[faults]]
at = "5s"
kind = "reconnect"
targets = ["crowd"]
[[checks]]
kind = "online"
targets = ["crowd"]
"""
    )
    drawn = expand(attrs.evolve(loads(text), populations=crowd(3).populations), 1)
    names = ("crowd-1", "crowd-2", "crowd-3")
    assert drawn.traffic[0].source == drawn.faults[0].targets == drawn.checks[0].targets == names


def test_those_who_roam_move_away_and_back() -> None:
    drawn = expand(crowd(200, roaming=0.25), 1)
    moves = [fault for fault in drawn.faults if fault.kind == "roam"]
    roamers = {fault.targets[0] for fault in moves}
    assert 30 < len(roamers) < 70
    for name in roamers:
        there = [fault.to for fault in moves if fault.targets == (name,)]
        assert there == [f"{name}-phone", f"{name}-net", f"{name}-phone"]


@pytest.mark.parametrize("mix", mix_names())
def test_shares_of_a_mix_are_one_and_every_figure_has_its_source(mix: str) -> None:
    found = mixes()[mix]
    assert sum(share_ppm(kind.share) for kind in found.networks) == PPM
    assert found.assumptions
    assert all(re.search(r"\b(19|20)\d\d\b", figure) for figure in found.figures)
    assert all(0 <= kind.ipv6 <= 1 for kind in found.networks)
