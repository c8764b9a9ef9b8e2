"""Seeds over a real Ray: the same report, lost workers, and none on a portal's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from runtime.hosting.ray_cluster import open_ray_cluster
from simulations.farm.job import Job, perform
from simulations.farm.local import FarmError, FarmOptions
from simulations.farm.ray_farm import run_on_ray
from simulations.farm.seeds import Gone
from simulations.report.merged import merge, report_to_json
from simulations.result import Result
from tests import farm_runners
from tests.system.own_raylets import Ray

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
SCENARIO = 'format = 1\nname = "empty"\n'


@attrs.frozen
class Settings:
    ray_address: str
    ray_token_file: Path | None
    ray_tls_directory: Path | None = None


class Watched:
    def __init__(self) -> None:
        self.said: list[str] = []

    def advanced(self, done: float, *, failed: int, text: str = "") -> None:
        pass

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def ray() -> Iterator[Ray]:
    with tempfile.TemporaryDirectory(prefix="hw", dir="/tmp") as directory:
        started = Ray(Path(directory))
        try:
            started.start()
            yield started
        finally:
            started.end()


def run(
    ray: Ray, runner: Any, seeds: range, scenario: str = SCENARIO
) -> tuple[list[Result | Gone], Watched]:
    taken: list[Result | Gone] = []
    watched = Watched()
    job = Job(scenario=scenario, name="empty", runner=f"tests.farm_runners:{runner.__name__}")
    assert ray.head.access is not None
    settings = Settings(ray.address, ray.head.access.token_file)
    run_on_ray(job, seeds, FarmOptions(jobs=3), settings, taken.append, watched)
    return taken, watched


def test_the_report_is_the_one_that_a_single_process_makes(ray: Ray) -> None:
    taken, _ = run(ray, farm_runners.made_up, range(1, 13))
    job = Job(scenario=SCENARIO, name="empty", runner="tests.farm_runners:made_up")
    alone = merge(*(perform(job, seed) for seed in range(1, 13)))
    assert all(isinstance(each, Result) for each in taken)
    merged = merge(*(each for each in taken if isinstance(each, Result)))
    assert report_to_json(merged) == report_to_json(alone)


def test_a_killed_worker_costs_a_rerun_of_its_seed_and_nothing_else(
    ray: Ray, tmp_path: Path
) -> None:
    scenario = f'{SCENARIO}description = "{tmp_path}"\n'
    taken, watched = run(ray, farm_runners.killed_at_first, range(1, 8), scenario)
    assert [each.seed for each in taken] == list(range(1, 8))
    assert all(isinstance(each, Result) for each in taken)
    assert len(watched.said) == 2
    assert all("it is run again" in each for each in watched.said)


def test_no_simulation_runs_on_the_ray_of_a_portal(ray: Ray) -> None:
    async def with_portal() -> None:
        body = "tests.system.node_bodies:plain"
        async with open_ray_cluster(ray.address, ray.head.access, body) as cluster:
            await cluster.start("portal-1")

    async def without_portal() -> None:
        body = "tests.system.node_bodies:plain"
        async with open_ray_cluster(ray.address, ray.head.access, body) as cluster:
            await cluster.drain("portal-1")

    trio.run(with_portal)
    try:
        with pytest.raises(FarmError, match=r"a portal runs on this Ray \(nodes portal-1\)"):
            run(ray, farm_runners.made_up, range(1, 4))
    finally:
        trio.run(without_portal)
    taken, _ = run(ray, farm_runners.made_up, range(1, 4))
    assert len(taken) == 3


def test_without_a_token_or_beyond_loopback_without_tls_it_is_refused(
    ray: Ray, tmp_path: Path
) -> None:
    job = Job(scenario=SCENARIO, name="empty", runner="tests.farm_runners:made_up")
    attempt = partial(run_on_ray, job, range(1, 3), FarmOptions(jobs=1))
    with pytest.raises(FarmError, match="--ray-token-file"):
        attempt(Settings(ray.address, None), print, Watched())
    assert ray.head.access is not None
    elsewhere = Settings("192.0.2.1:6379", ray.head.access.token_file)
    with pytest.raises(FarmError, match="it needs a token file and TLS"):
        attempt(elsewhere, print, Watched())
    with pytest.raises(FarmError, match="no Ray at 127"):
        attempt(Settings("127.0.0.1:1", ray.head.access.token_file), print, Watched())
