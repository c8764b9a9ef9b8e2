"""`holloway sim run FILE --on kernel`: what the kernel twin and virtual time say of the same pairs.

The twin asks every pair once and carries out neither faults nor checks nor traffic of the file;
`left_out` names what that means for a scenario. Each pair becomes a check: that the kernel's
outcome is that of virtual time.
"""

from __future__ import annotations

from typing import Any, Final

import attrs

from simulations import run as virtual
from simulations.kernel import twin
from simulations.result import Checked, Pair, Result
from simulations.scenario.schema import Scenario, Traffic

DURATION: Final = "30s"
PARTS: Final = ("faults", "checks", "traffic", "chaos")


def left_out(scenario: Scenario) -> tuple[str, ...]:
    """The parts of the file that are not carried out on the kernel."""
    return tuple(part for part in PARTS if getattr(scenario, part))


def bare(scenario: Scenario) -> Scenario:
    """The scenario without those."""
    return attrs.evolve(scenario, faults=(), checks=(), traffic=(), chaos=None)


def obstacles(scenario: Scenario) -> list[str]:
    """Why the rest cannot run on the kernel, a sentence each; empty if it can."""
    return twin.obstacles(bare(scenario))


def run(scenario: Scenario, seed: int, **_: Any) -> Result:
    """Run it on the kernel and in virtual time. Raises as `twin.run` does."""
    real = twin.run(bare(scenario), seed)
    asked = attrs.evolve(bare(scenario), duration=DURATION, traffic=(Traffic(every="500ms"),))
    simulated = virtual.run(asked, seed)
    by_name = {(pair.client, pair.resource): pair for pair in simulated.pairs}
    twins = [(pair, by_name.get((pair.client, pair.resource))) for pair in real.pairs]
    return attrs.evolve(
        real,
        pairs=tuple(_labelled(pair, other) for pair, other in twins),
        checks=tuple(_same(number, *each) for number, each in enumerate(twins, 1)),
        nodes=simulated.nodes,
    )


def _labelled(pair: Pair, other: Pair | None) -> Pair:
    """With the names of NATs that virtual time has, so that reports of both can be compared."""
    if other is None:
        return pair
    return attrs.evolve(pair, client_nat=other.client_nat, gateway_nat=other.gateway_nat)


def _same(number: int, pair: Pair, other: Pair | None) -> Checked:
    """In virtual time nobody asks for what no policy shows him: that is denied."""
    expected = "unasked" if other is None else other.outcome
    wanted = "denied" if expected == "unasked" else expected
    text = f"{pair.client} to {pair.resource} is {wanted}, as in virtual time"
    held = pair.outcome == wanted
    return Checked(
        number=number, text=text, held=held, detail="" if held else f"on the kernel: {pair.outcome}"
    )
