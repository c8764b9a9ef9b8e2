"""Mutation: deliberate defects are found by the simulator, each within its number of seeds, and the
system without them is clean."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.proving.defects import DEFECTS, ROOT, Defect, mutated

PROVING = Path(__file__).parent / "proving"
ROUND = """
import json, sys
from runtime.service import configure_logging
from simulations.farm.job import Job, perform
from simulations.scenario.load import dump, load
from simulations.shrink import Failure
from pathlib import Path
configure_logging("text", "error")
job = Job(scenario=dump(load(Path(sys.argv[1]))), name="ground")
for seed in range(1, int(sys.argv[2]) + 1):
    failure = Failure.of(perform(job, seed))
    print(json.dumps(sorted(failure.signs) if failure else []), flush=True)
    if failure and any(sign.startswith(tuple(sys.argv[3:])) for sign in failure.signs):
        break
"""
CLEAN_SEEDS = 4


def signs_of(source: Path, seeds: int, *wanted: str, ground: str = "ground") -> list[set[str]]:
    """What went wrong in each seed, with this source; no more once one of `wanted` did."""
    done = subprocess.run(
        [sys.executable, "-c", ROUND, str(PROVING / f"{ground}.toml"), str(seeds), *wanted],
        env=os.environ | {"PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        cwd=source,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda each: each.name)
def test_a_deliberate_defect_is_found(defect: Defect) -> None:
    with mutated(defect.edits) as source:
        found = signs_of(source, defect.seeds, *defect.signs, ground=defect.ground)
    wanted = tuple(defect.signs)
    assert any(sign.startswith(wanted) for signs in found for sign in signs), found


def test_without_defects_the_proving_ground_is_clean() -> None:
    assert signs_of(ROOT, CLEAN_SEEDS) == [set()] * CLEAN_SEEDS
