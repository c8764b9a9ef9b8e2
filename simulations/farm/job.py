"""What is run for each seed: the same in this process, in a process of the farm, and on Ray."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any, Final

import attrs
import msgspec

from simulations.chaos import draw
from simulations.checks.liveness import judged
from simulations.checks.safety import all_rules
from simulations.result import Backend, Result
from simulations.scenario.load import loads
from simulations.scenario.population import expand
from simulations.scenario.schema import Scenario

MAX_SEEDS: Final = 1_000_000
MAX_TRIES: Final = 3
"""How often a seed is run whose worker died, before it is given up."""
MAX_TRACEBACK: Final = 4_000

RUNNERS: Final[dict[Backend, str]] = {
    "virtual": "simulations.run:run",
    "kernel": "simulations.kernel.twin:run",
}
"""Functions `(scenario, seed, *, follow, progress, monitors) -> Result`."""

Progress = Callable[[int, int], object]
"""Is told (virtual ns that are over, virtual ns in all) now and then."""


@attrs.frozen(kw_only=True)
class Job:
    """One scenario, as the text of its file, and how it is run. `follow`: the client and the
    resource whose packets make the timeline. `runner` is for tests."""

    scenario: str
    name: str
    backend: Backend = "virtual"
    follow: tuple[str, str] | None = None
    runner: str = ""

    def encoded(self) -> bytes:
        return msgspec.json.encode(self)


def decode_job(data: bytes | str) -> Job:
    """The inverse of `Job.encoded`. Raises msgspec.ValidationError."""
    return msgspec.json.decode(data, type=Job)


def written_out(scenario: Scenario, seed: int) -> Scenario:
    """What is run for a seed: populations and chaos drawn from it. Saved, it is replayed as it is,
    with `seed` in it."""
    return draw(expand(scenario, seed), seed)


def perform(job: Job, seed: int, progress: Progress | None = None) -> Result:
    """Run one seed, watched by all rules of safety and judged by those of liveness. Whatever is
    raised in it is a finding: a result with an `error`."""
    scenario = _scenario(job.scenario, job.name)
    try:
        result: Result = runner_of(job)(
            written_out(scenario, seed),
            seed,
            follow=job.follow,
            progress=progress,
            monitors=all_rules(),
        )
    except Exception as error:
        told = traceback.format_exc()[-MAX_TRACEBACK:]
        return Result(
            scenario=scenario.name,
            seed=seed,
            backend=job.backend,
            error=f"{type(error).__name__}: {error}\n{told}",
        )
    return judged(result)


def runner_of(job: Job) -> Callable[..., Any]:
    """The function that runs a job's seeds. Raises ImportError, AttributeError."""
    module, _, name = (job.runner or RUNNERS[job.backend]).partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


@lru_cache(maxsize=4)
def _scenario(text: str, name: str) -> Scenario:
    return loads(text, name)
