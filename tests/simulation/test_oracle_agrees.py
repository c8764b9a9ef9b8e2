"""The product in the simulator finds what theory says, between all kinds of NATs."""

from __future__ import annotations

from itertools import product
from typing import get_args

import attrs
import pytest

from simulations.run import run
from simulations.scenario.schema import Behaviour, NatBehaviour

from .scenarios import home, office, scenario

BEHAVIOURS: tuple[Behaviour, ...] = get_args(Behaviour)
NINE = list(product(BEHAVIOURS, BEHAVIOURS))


RULES = {
    "RFC 4787": NatBehaviour(),
    "inbound binding": NatBehaviour(inbound_binding=True),
    "reply binding": NatBehaviour(reply_binding=True),
}


def nat(mapping: Behaviour, filtering: Behaviour, rule: NatBehaviour) -> NatBehaviour:
    ports = "preserve" if mapping == "endpoint_independent" else "random"
    return attrs.evolve(rule, mapping=mapping, filtering=filtering, ports=ports)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("client", NINE, ids="/".join)
def test_a_client_finds_the_oracles_path_to_gateways_behind_all_nats(
    client: tuple[Behaviour, Behaviour], rule: str
) -> None:
    for gateway in NINE:
        networks = (home("home", nat(*client, RULES[rule])), office(nat(*gateway, RULES[rule])))
        result = run(scenario(duration="6s", networks=networks, checks=()), 1)
        (pair,) = result.pairs
        by_chance = pair.expected == "relayed" and pair.outcome == "direct"
        assert pair.outcome == pair.expected or by_chance, (gateway, pair.why)
        assert not by_chance or "too early" in pair.why, pair.why
