"""Seeds over a Ray of your own: one merged report, and a lost worker costs a rerun of its seeds.

Ray executes code for whoever reaches it, so it is reached as a portal's is (`runtime.hosting`):
with a token, and with TLS beyond loopback. Simulations have a namespace of their own, and are
refused on a Ray on which a portal runs: they take all the CPU that there is, and run scenarios of
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from runtime.hosting.interface import ClusterUnavailable
from runtime.hosting.ray_cluster import NAMESPACE as PORTALS
from runtime.hosting.ray_cluster import RayCluster, open_ray_cluster
from runtime.hosting.ray_settings import RayAccess, RayRefused, RayTls
from simulations.farm.job import Job, decode_job, perform
from simulations.farm.local import FarmError, FarmOptions, Take, run_interruptibly
from simulations.farm.seeds import Seeds
from simulations.report.progress import Watcher
from simulations.result import Result, from_json, to_json

NAMESPACE: Final = "holloway-simulation"
CHECK_EVERY: Final = 200
"""So many results between two looks whether a portal has come to this Ray."""
WAIT_S: Final = 0.5
MAX_JOBS: Final = 4_096


class RaySettings(Protocol):
    """Where a Ray is, and what lets us in (`sim_command.Ray`)."""

    @property
    def ray_address(self) -> str: ...
    @property
    def ray_token_file(self) -> Path | None: ...
    @property
    def ray_tls_directory(self) -> Path | None: ...


def run_on_ray(
    job: Job,
    seeds: Sequence[int],
    options: FarmOptions,
    settings: RaySettings,
    take: Take,
    watcher: Watcher,
) -> None:
    """Run all seeds; `take` is given what each gave, in their order. With `options.jobs` of 0 there
    are as many at a time as Ray has CPUs. Raises FarmError."""
    access = _access(settings)
    try:
        run_interruptibly(
            partial(_run, job, seeds, options, settings.ray_address, access, take, watcher)
        )
    except (ClusterUnavailable, RayRefused, ValueError) as error:
        raise FarmError(str(error)) from None
    except ModuleNotFoundError as error:
        raise FarmError(f"{error}: Ray comes with the extra `portal` of holloway") from None


def _access(settings: RaySettings) -> RayAccess:
    if settings.ray_token_file is None:
        raise FarmError("--ray-token-file: the token of the Ray at --ray-address is needed")
    place, tls = settings.ray_tls_directory, None
    if place is not None:
        certificate, key, authority = (place / each for each in ("tls.crt", "tls.key", "ca.crt"))
        tls = RayTls(certificate=certificate, key=key, authority=authority)
    return RayAccess(token_file=settings.ray_token_file, tls=tls)


async def _run(
    job: Job,
    seeds: Sequence[int],
    options: FarmOptions,
    address: str,
    access: RayAccess,
    take: Take,
    watcher: Watcher,
) -> None:
    async with open_ray_cluster(address, access, body="", namespace=NAMESPACE) as cluster:
        await refuse_portals(cluster)
        jobs = options.jobs or await trio.to_thread.run_sync(_cpus)
        jobs = max(1, min(jobs, len(seeds), MAX_JOBS))
        farm = _Farm(job, Seeds(seeds, ahead=4 * jobs), options, jobs, take, watcher)
        await farm.run(cluster)


async def refuse_portals(cluster: RayCluster) -> None:
    """Raises FarmError where nodes of a portal are on this Ray."""
    if names := await cluster.names_in(PORTALS):
        shown = ", ".join(names[:3])
        raise FarmError(
            f"a portal runs on this Ray (nodes {shown}): simulations never share one with it; "
            "start a Ray for them alone"
        )


class _Farm:
    """Keeps `jobs` seeds under way. Ray calls happen in threads, this object's state in trio's."""

    def __init__(
        self,
        job: Job,
        seeds: Seeds,
        options: FarmOptions,
        jobs: int,
        take: Take,
        watcher: Watcher,
    ) -> None:
        self._encoded = job.encoded()
        self._seeds = seeds
        self._options = options
        self._jobs = jobs
        self._take = take
        self._watcher = watcher
        self._under_way: dict[Any, int] = {}

    async def run(self, cluster: RayCluster) -> None:
        finished = 0
        try:
            while not self._seeds.over:
                await trio.to_thread.run_sync(self._start)
                for ref in await trio.to_thread.run_sync(self._ready):
                    finished += 1
                    seed = self._under_way.pop(ref)
                    self._settle(seed, await trio.to_thread.run_sync(_outcome, ref))
                    if finished % CHECK_EVERY == 0:
                        await refuse_portals(cluster)
                for outcome in self._seeds.leaving():
                    self._take(outcome)
                self._watcher.advanced(self._seeds.done, failed=self._seeds.failed)
                if self._options.stop_after and self._seeds.failed >= self._options.stop_after:
                    return
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._cancel)

    def _settle(self, seed: int, outcome: Result | str) -> None:
        if isinstance(outcome, Result):
            self._seeds.finished(seed, outcome)
            return
        again = self._seeds.died(seed, outcome)
        said = "it is run again" if again else "given up"
        self._watcher.say(f"seed {seed}: {outcome}; {said}")

    # --- in a thread ------------------------------------------------------------------------------

    def _start(self) -> None:
        import ray

        while len(self._under_way) < self._jobs and (seed := self._seeds.take()) is not None:
            task = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(run_seed)
            self._under_way[task.remote(self._encoded, seed)] = seed

    def _ready(self) -> list[Any]:
        import ray

        refs = list(self._under_way)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=WAIT_S, fetch_local=True)
        return ready  # type: ignore[no-any-return]

    def _cancel(self) -> None:
        import ray

        for ref in self._under_way:
            ray.cancel(ref, force=True)


def run_seed(job: bytes, seed: int) -> bytes:
    """What a worker of Ray does: one seed. The result as JSON: nothing of ours is unpickled from
    it."""
    return to_json(perform(decode_job(job), seed))


def _outcome(ref: Any) -> Result | str:
    """What a seed gave, or why it gave nothing."""
    import ray

    try:
        return from_json(ray.get(ref))
    except ray.exceptions.WorkerCrashedError:
        return "its worker of Ray died"
    except ray.exceptions.RayError as error:
        first = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        return f"Ray: {first[0][:300]}"


def _cpus() -> int:
    import ray

    return int(ray.cluster_resources().get("CPU", 1))
