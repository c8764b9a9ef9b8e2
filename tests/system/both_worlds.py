"""A scenario in virtual time and on the kernel, beside each other."""

from __future__ import annotations

import attrs

from simulations.farm.job import Job, perform
from simulations.kernel.against import compare
from simulations.kernel.obstacles import as_built
from simulations.report.merged import reasons
from simulations.result import Result, from_json, to_json
from simulations.scenario.load import dump
from simulations.scenario.schema import Scenario
from simulations.scenario.units import duration_ns

MS = 10**6


def hastened(scenario: Scenario, times: int) -> Scenario:
    """The same with everything so many times sooner, but for the bounds of checks."""

    def sooner(written: str) -> str:
        return f"{duration_ns(written) // MS // times}ms" if written else written

    return attrs.evolve(
        scenario,
        duration=sooner(scenario.duration),
        faults=tuple(
            attrs.evolve(each, at=sooner(each.at), duration=sooner(each.duration))
            for each in scenario.faults
        ),
        checks=tuple(
            attrs.evolve(each, at=sooner(each.at), until=sooner(each.until))
            for each in scenario.checks
        ),
    )


def in_both_worlds(
    scenario: Scenario, *, follow: tuple[str, str] | None = None
) -> tuple[Result, Result]:
    """In virtual time, and on the kernel: with the same outcomes, and every check held in both."""
    virtual = perform(Job(scenario=dump(as_built(scenario)), name="virtual", follow=follow), 1)
    kernel = perform(
        Job(scenario=dump(scenario), name="kernel", backend="kernel", follow=follow), 1
    )
    for result in (virtual, kernel):
        assert reasons(result) == (), (result.backend, reasons(result))
    lying = [each.name for each in scenario.clients if each.hostile]
    comparison = compare(virtual, kernel, lying)
    assert comparison.agrees, comparison
    assert from_json(to_json(kernel)) == kernel
    return virtual, kernel
