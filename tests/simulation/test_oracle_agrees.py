"""The product in the simulator finds what theory says, between all kinds of NATs."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest

from simulations.run import run
from simulations.scenario.schema import Behaviour, NatBehaviour

from .scenarios import home, office, scenario

BEHAVIOURS: tuple[Behaviour, ...] = get_args(Behaviour)
NINE = list(product(BEHAVIOURS, BEHAVIOURS))


def nat(mapping: Behaviour, filtering: Behaviour, inbound_binding: bool) -> NatBehaviour:
    ports = "preserve" if mapping == "endpoint_independent" else "random"
    return NatBehaviour(
        mapping=mapping,
        filtering=filtering,
        ports=ports,  # type: ignore[arg-type]
        inbound_binding=inbound_binding,
    )


@pytest.mark.parametrize("inbound_binding", [False, True])
@pytest.mark.parametrize("client", NINE, ids="/".join)
def test_a_client_finds_the_oracles_path_to_gateways_behind_all_nats(
    client: tuple[Behaviour, Behaviour], inbound_binding: bool
) -> None:
    for gateway in NINE:
        networks = (
            home("home", nat(*client, inbound_binding)),
            office(nat(*gateway, inbound_binding)),
        )
        result = run(scenario(duration="6s", networks=networks, checks=()), 1)
        (pair,) = result.pairs
        by_chance = inbound_binding and pair.expected == "relayed" and pair.outcome == "direct"
        assert pair.outcome == pair.expected or by_chance, (gateway, pair.why)
        assert not by_chance or "too early" in pair.why, pair.why
