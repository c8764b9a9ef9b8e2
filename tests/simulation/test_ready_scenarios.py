"""The scenarios that come with Holloway: each is sound, says what it shows, and holds."""

from __future__ import annotations

import pytest

from simulations.farm.job import Job, perform, written_out
from simulations.report.merged import merge, reasons
from simulations.report.page import page
from simulations.scenario.load import checked, dump, ready, ready_names

WANTED = {
    "home-office", "carrier-grade", "hotel-udp-blocked", "symmetric-to-symmetric",
    "roaming-commuter", "gateway-death", "relay-death", "portal-node-death", "database-outage",
    "partition", "rolling-upgrade", "thundering-herd", "shrinking-directory", "demo", "chaos",
}  # fmt: skip


def test_all_that_were_promised_are_there() -> None:
    assert set(ready_names()) >= WANTED


@pytest.mark.parametrize("name", ready_names())
def test_each_says_what_it_shows_and_has_checks(name: str) -> None:
    scenario = ready(name)
    assert scenario.name == name
    assert len(scenario.description) > 60
    assert scenario.checks or scenario.chaos  # chaos has to hold by the rules alone
    assert scenario.traffic
    assert checked(written_out(scenario, 1)).clients


@pytest.mark.parametrize("seed", range(1, 31))
def test_what_chaos_draws_is_a_sound_file_that_can_be_saved(seed: int) -> None:
    drawn = written_out(ready("chaos"), seed)
    assert checked(drawn) == drawn
    assert len(drawn.faults) > 6
    assert drawn.seed == seed


@pytest.mark.parametrize("name", ready_names())
def test_each_holds(name: str) -> None:
    result = perform(Job(scenario=dump(ready(name)), name=name), seed=1)
    assert reasons(result) == ()
    assert result.held
    assert f"<h1>{name}</h1>" in page(merge(result))
