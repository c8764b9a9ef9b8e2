"""Chaos: nothing forbidden happens under drawn faults, and in the end all who may have access.

Each seed draws its faults anew. `make soak` runs seeds for ten minutes (HOLLOWAY_CHAOS_MINUTES),
beginning at HOLLOWAY_CHAOS_FIRST_SEED.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Final

import attrs

from simulations.farm.job import Job, perform
from simulations.report.merged import reasons
from simulations.result import Result
from simulations.scenario.load import dump, ready

SEEDS: Final = 4
MINUTES: Final = float(os.environ.get("HOLLOWAY_CHAOS_MINUTES", "0"))
FIRST_SEED: Final = int(os.environ.get("HOLLOWAY_CHAOS_FIRST_SEED", "1"))
JOB: Final = Job(scenario=dump(ready("chaos")), name="chaos")


def seeds() -> Iterator[int]:
    """So many, and more for as long as there is time."""
    until = time.monotonic() + MINUTES * 60
    seed = FIRST_SEED
    while seed < FIRST_SEED + SEEDS or time.monotonic() < until:
        yield seed
        seed += 1


def test_every_seed_is_safe_and_ends_with_access_for_all() -> None:
    ran = 0
    failed: dict[int, tuple[str, ...]] = {}
    for seed in seeds():
        result = perform(JOB, seed)
        ran += 1
        if not result.held:
            failed[seed] = reasons(result)
    print(f"{ran} seeds from {FIRST_SEED} on, {len(failed)} failed")
    assert not failed, f"of {ran} seeds: holloway sim shrink chaos --seed N"


def test_a_run_of_chaos_is_the_same_each_time() -> None:
    def again() -> Result:
        return attrs.evolve(perform(JOB, FIRST_SEED), cost={})

    assert again() == again()
