"""What chaos and the ready scenarios found, made small: each file failed once, and holds now."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.farm.job import Job, perform
from simulations.report.merged import reasons
from simulations.scenario.load import dump, load

FOUND = sorted((Path(__file__).parent / "found").glob("*.toml"))


def test_there_is_something_to_hold() -> None:
    assert FOUND


@pytest.mark.parametrize("file", FOUND, ids=lambda file: file.stem)
def test_what_was_found_does_not_come_back(file: Path) -> None:
    scenario = load(file)
    assert scenario.seed is not None
    result = perform(Job(scenario=dump(scenario), name=file.stem), scenario.seed)
    assert reasons(result) == ()
    assert result.held
