"""`holloway sim run`, `replay`, `shrink`, `compare`, `list`: scenarios from the command line.

Exit status: 0 everything held (or is not worse), 1 something did not, 2 the command or a file is
wrong, 3 something of ours failed, so nothing can be said; 130 it was interrupted.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, Literal

import attrs
import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from admin.safety import printable
from runtime.service import configure_logging
from simulations.chaos import describe
from simulations.farm.job import MAX_SEEDS, Job, perform, runner_of, written_out
from simulations.farm.local import FarmError, FarmOptions, cores, run_local
from simulations.farm.seeds import Gone
from simulations.kernel.against import Comparison, shown
from simulations.kernel.against import compare as compare_backends
from simulations.report import compare as comparing
from simulations.report.merged import Merger, Report, report_from_json, report_to_json
from simulations.report.page import write_page
from simulations.report.progress import watching
from simulations.report.table import show
from simulations.report.wording import budget
from simulations.result import Result
from simulations.scenario.capture import add as add_capture
from simulations.scenario.capture import load_capture
from simulations.scenario.load import (
    ScenarioError,
    checked,
    dump,
    load,
    loads,
    ready,
    ready_names,
    save,
)
from simulations.scenario.schema import Scenario
from simulations.scenario.structure import suggestion

HELD: Final = 0
FAILED: Final = 1
UNUSABLE: Final = 2
INTERNAL: Final = 3
INTERRUPTED: Final = 130
MAX_REPORT_BYTES: Final = 512 << 20
MAX_SAVED: Final = 20
"""Failures of one command that are written to files."""
WIDTH: Final = 120
"""Of what goes into a file or a pipe."""

Backend = Literal["virtual", "kernel"]
LogLevel = Literal["debug", "info", "warning", "error"]


class Unusable(Exception):
    """The command or a file is wrong; says what, and what to do."""


@attrs.frozen(kw_only=True)
class Ray:
    """A Ray of your own, on which seeds are run; never one that has a portal.

    Parameters
    ----------
    ray_address
        `host:port` of the head of that Ray. Without it, seeds are run by processes of this machine.
    ray_token_file
        File (mode 0600) with that Ray's token.
    ray_tls_directory
        Directory with `tls.crt`, `tls.key` and `ca.crt`: needed for a Ray that is not on loopback.
    """

    ray_address: str = ""
    ray_token_file: Path | None = None
    ray_tls_directory: Path | None = None


def run(
    scenario: str,
    /,
    *,
    seed: int | None = None,
    seeds: str = "",
    jobs: int = 0,
    on: Backend = "virtual",
    follow: str = "",
    json: Path | None = None,
    html: Path | None = None,
    add: Annotated[tuple[Path, ...], Parameter(negative="")] = (),
    as_: Annotated[str, Parameter(name="--as")] = "",
    stop_after: int = 0,
    save_to: Path | None = None,
    ray: Annotated[Ray | None, Parameter(name="*")] = None,
    log_level: LogLevel = "error",
) -> None:
    """Run a scenario: from one seed, or from many side by side.

    The exit status is 0 when every run held, 1 when one did not, 2 when the scenario or the command
    is wrong, 3 when something of the simulator failed.

    Parameters
    ----------
    scenario
        TOML file, or the name of a ready-made scenario (`holloway sim list`).
    seed
        From which everything random is drawn; by default that of the file, or 1.
    seeds
        Many: `100` for 1 to 100, or `201-300`.
    jobs
        Processes side by side, for many seeds; by default one for each core (on Ray: its CPUs).
    on
        Where: in virtual time, or on network namespaces with real processes. What came of each pair
        there is compared with virtual time, and the exit status is 1 where they differ.
    follow
        CLIENT:RESOURCE, whose packets are listed one by one in the report.
    json
        Write the report to this file, for machines and for `holloway sim compare`.
    html
        Write the report to this file, as one page that stands alone.
    add
        A network that `holloway netcheck --export` captured: a client in it is added to the
        scenario. May be said several times.
    as_
        Whose the added clients are: a user of the scenario, instead of those that the files name.
    stop_after
        End when so many runs did not hold; 0: run all seeds.
    save_to
        Write each seed that did not hold (the first 20) to a file in this directory, with all that
        was drawn: `holloway sim replay` runs it again.
    log_level
        Of what the system in the simulation logs, to the standard error.
    """
    configure_logging("text", log_level)
    with _exits():
        found = with_captures(find(scenario), add, as_)
        numbers = _seeds(found, seed, seeds)
        job = Job(
            scenario=dump(found),
            name=scenario,
            backend=on,
            follow=_follow(found, numbers[0], follow, wanted=html is not None),
        )
        console = Console(stderr=True)
        _check_backend(job, found, numbers, ray or Ray(), console)
        _check_places(json, html, save_to)
        merger = _merger(found)
        status = HELD
        alone = on == "kernel"  # an installation that others run beside is not the one of the file
        options = FarmOptions(jobs=jobs or (1 if alone else cores()), stop_after=stop_after)
        compared: list[Comparison] = []
        try:
            _run_all(job, numbers, options, jobs, ray or Ray(), merger, console, compared)
        except KeyboardInterrupt:
            console.print("interrupted; this is what there is so far", markup=False)
            status = INTERRUPTED
        except FarmError as error:
            console.print(f"holloway sim run: {printable(str(error))}", markup=False)
            status = INTERNAL
        report = merger.report()
        _give(report, json, html)
        if save_to is not None:
            _save_failures(report, found, save_to)
        for each in compared:
            output_console().print(shown(each))
        if not all(each.agrees for each in compared):
            status = status or FAILED
        sys.exit(status or status_of(report))


def replay(
    file: Path,
    /,
    *,
    seed: int | None = None,
    follow: str = "",
    json: Path | None = None,
    html: Path | None = None,
    log_level: LogLevel = "error",
) -> None:
    """Run a saved failure again, with its seed, and say whether it fails again.

    The exit status is 1 when it fails again, and 0 when it does not.

    Parameters
    ----------
    file
        A scenario that was saved: by `holloway sim shrink`, say.
    seed
        Another seed than that of the file.
    follow
        CLIENT:RESOURCE, whose packets are listed one by one in the report.
    json
        Write the report to this file.
    html
        Write the report to this file, as one page that stands alone.
    log_level
        Of what the system in the simulation logs, to the standard error.
    """
    configure_logging("text", log_level)
    with _exits():
        found = find(str(file))
        number = found.seed if seed is None else seed
        if number is None:
            raise Unusable(f"{file}: has no `seed`, so say --seed")
        followed = _follow(found, number, follow, wanted=html is not None)
        job = Job(scenario=dump(found), name=str(file), follow=followed)
        _check_places(json, html)
        merger = _merger(found)
        _run_all(job, [number], FarmOptions(jobs=1), 1, Ray(), merger, Console(stderr=True))
        report = merger.report()
        _give(report, json, html)
        again = "it does not fail any more" if report.all_held else "it fails again"
        sys.stdout.write(f"{again} with seed {number}\n")
        sys.exit(status_of(report))


def shrink(
    scenario: str,
    /,
    *,
    seed: int,
    output: Annotated[Path, Parameter(name=("--output", "-o"))],
    runs: int = 500,
    log_level: LogLevel = "error",
) -> None:
    """Make a failing scenario small: whatever can be left out while it fails in the same way.

    The exit status is 0 when a smaller file was written, 1 when the seed does not fail.

    Parameters
    ----------
    scenario
        TOML file, or the name of a ready-made scenario.
    seed
        One that fails.
    output
        Where the small scenario is saved, with its seed: `holloway sim replay` runs it again.
    runs
        At most so many runs are tried.
    log_level
        Of what the system in the simulation logs, to the standard error.
    """
    from simulations.shrink import Failure, size
    from simulations.shrink import shrink as shrunk

    configure_logging("text", log_level)
    with _exits():
        found = written_out(find(scenario), seed)
        _check_places(output)
        console = Console(stderr=True)

        def once(candidate: Scenario) -> Result:
            return perform(Job(scenario=dump(candidate), name=scenario), seed)

        failure = Failure.of(once(found))
        if failure is None:
            sys.stdout.write(
                f"seed {seed} of {scenario} does not fail: there is nothing to shrink\n"
            )
            sys.exit(FAILED)
        console.print(f"seed {seed} fails: {printable(str(failure))}", markup=False)
        whole = size(found)
        with watching(console, "shrinking", runs, steps=True) as watcher:
            small = shrunk(
                found,
                failure,
                once,
                is_valid=is_valid,
                max_runs=runs,
                progress=lambda done, best: watcher.advanced(
                    done, failed=0, text=f"{size(best)} of {whole}"
                ),
            )
        head = f"Shrunk from {scenario}, seed {seed}, in {small.runs} runs.\nFails: {small.failure}"
        saved = attrs.evolve(small.scenario, seed=seed)
        save(saved, output, head=head)
        end = "" if small.is_minimal else "; more runs could make it smaller"
        sys.stdout.write(f"{output}: {size(saved)} of {whole} parts are left{end}\n")


def compare(
    before: Path,
    after: Path,
    /,
    *,
    share: float = 1.0,
    relative: float = 10.0,
    absolute_ms: float = 10.0,
    everything: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Compare two reports of `--json`: which outcomes, latencies and recoveries changed.

    The exit status is 1 when the second is worse: a smaller share of runs or checks held, or of
    pairs was direct; more failed; a rule was broken more often; or the median or 95th percentile of
    a time grew, beyond the tolerance.

    Parameters
    ----------
    before
        A report, of one run or of many.
    after
        Another one of the same scenario.
    share
        Shares that differ by so many percentage points are the same.
    relative
        Times that differ by so many percent are the same.
    absolute_ms
        Times that differ by so many milliseconds are the same.
    everything
        Show what did not change, too.
    json
        Print one JSON object.
    """
    with _exits():
        tolerance = comparing.Tolerance(
            share=share / 100, relative=relative / 100, absolute_ns=int(absolute_ms * 1e6)
        )
        one, other = read_report(before), read_report(after)
        if one.scenario != other.scenario:
            raise Unusable(f"these are of two scenarios: {one.scenario}, {other.scenario}")
        found = comparing.compare(one, other, tolerance)
        if json:
            sys.stdout.write(found.to_json().decode())
        else:
            console = output_console()
            for part in comparing.tables(found, everything=everything):
                console.print(part)
        sys.exit(FAILED if found.worse else HELD)


def list_(
    *, output: Annotated[Literal["table", "json"], Parameter(("--output", "-o"))] = "table"
) -> None:
    """List the ready-made scenarios.

    Parameters
    ----------
    output
        `table` for people, `json` for machines.
    """
    with _exits():
        found = {name: ready(name) for name in ready_names()}
        if output == "json":
            rows = [{"name": name, "description": each.description} for name, each in found.items()]
            sys.stdout.write(
                msgspec.json.format(msgspec.json.encode(rows), indent=1).decode() + "\n"
            )
            return
        table = Table(box=None, pad_edge=False)
        table.add_column("name", no_wrap=True)
        table.add_column("what it shows")
        for name, each in found.items():
            table.add_row(name, Text(each.description))
        output_console().print(table)


# --- scenarios and seeds --------------------------------------------------------------------------


def find(scenario: str) -> Scenario:
    """A scenario by its file or its name. Raises Unusable, ScenarioError."""
    if scenario in ready_names() and not Path(scenario).is_file():
        return ready(scenario)
    if "/" in scenario or scenario.endswith(".toml") or Path(scenario).is_file():
        return load(Path(scenario))
    near = suggestion(scenario, ready_names())
    raise Unusable(
        f"there is no file and no ready-made scenario {scenario!r}{near} "
        "(`holloway sim list` shows them)"
    )


def with_captures(scenario: Scenario, files: Sequence[Path], user: str) -> Scenario:
    """The scenario with the captured networks of these files. Raises ScenarioError, Unusable."""
    if user and not files:
        raise Unusable("--as says whose the clients of --add are: there is none")
    for file in files:
        scenario = add_capture(scenario, load_capture(file), user=user, name=str(file))
    return scenario


def is_valid(scenario: Scenario) -> bool:
    """Whether a made scenario makes sense."""
    try:
        checked(scenario)
    except ScenarioError:
        return False
    return True


def parse_seeds(text: str) -> range:
    """`100` is 1 to 100; `201-300` these. Raises Unusable."""
    first, dash, last = text.partition("-")
    try:
        numbers = range(int(first), int(last) + 1) if dash else range(1, int(first) + 1)
    except ValueError:
        raise Unusable(
            f"--seeds: {text!r} is no number of seeds, nor a range like 201-300"
        ) from None
    if not 0 < len(numbers) <= MAX_SEEDS or numbers[-1] >= 1 << 63:
        raise Unusable(f"--seeds: {text!r} is not from one to {MAX_SEEDS:,} seeds")
    return numbers


def _seeds(scenario: Scenario, seed: int | None, seeds: str) -> Sequence[int]:
    if seeds:
        if seed is not None:
            raise Unusable("--seed and --seeds: say one of them")
        return parse_seeds(seeds)
    number = seed if seed is not None else scenario.seed if scenario.seed is not None else 1
    if not 0 <= number < 1 << 63:
        raise Unusable(f"--seed: {number} is out of range")
    return [number]


def _follow(scenario: Scenario, seed: int, follow: str, *, wanted: bool) -> tuple[str, str] | None:
    """Whose packets are listed. For a page the first client with a right, if none is named."""
    whole = written_out(scenario, seed)
    if not follow:
        return first_pair(whole) if wanted else None
    client, colon, resource = follow.partition(":")
    clients = [each.name for each in whole.clients]
    resources = [each.name for each in whole.account.resources]
    if not colon:
        raise Unusable(f"--follow: {follow!r} is not CLIENT:RESOURCE")
    for name, known, kind in ((client, clients, "client"), (resource, resources, "resource")):
        if name not in known:
            near = suggestion(name, known)
            raise Unusable(f"--follow: there is no {kind} {name!r}{near}")
    return client, resource


def first_pair(scenario: Scenario) -> tuple[str, str] | None:
    """The first client that a policy lets reach something, and what."""
    groups = {user.name: {"everyone", *user.groups} for user in scenario.account.users}
    for client in scenario.clients:
        for policy in scenario.account.policies:
            if policy.group in groups.get(client.user, ()) and not policy.disabled:
                return client.name, policy.resource
    return None


def _check_backend(
    job: Job, scenario: Scenario, seeds: Sequence[int], ray: Ray, console: Console
) -> None:
    """Whatever keeps it from running is said before anything is made."""
    if job.backend == "kernel":
        from simulations.kernel.lab import missing_requirements
        from simulations.kernel.obstacles import as_built
        from simulations.kernel.twin import REQUIRED_PROGRAMS, liberties, obstacles

        if ray.ray_address:
            raise Unusable("--on kernel: namespaces are of this machine, not of a Ray")
        if missing := missing_requirements(REQUIRED_PROGRAMS):
            raise Unusable("--on kernel: " + "; ".join(missing))
        written = [written_out(scenario, seed) for seed in seeds]
        found = {line: None for each in written for line in obstacles(each)}
        if found:
            raise Unusable("\n".join(f"--on kernel: {line}" for line in found))
        for each in written:
            checked(as_built(each))
        for line in {line: None for each in written for line in liberties(each)}:
            console.print(f"on the kernel, {line}", markup=False, highlight=False)
    try:
        runner_of(job)
    except (ImportError, AttributeError):
        raise Unusable(f"--on {job.backend}: this release cannot run scenarios there") from None


def _check_places(*files: Path | None) -> None:
    """A report that cannot be written is found out before it is made."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise Unusable(f"{file}: there is no directory {file.parent}")


# --- running --------------------------------------------------------------------------------------


def _merger(scenario: Scenario) -> Merger:
    chaos = None if scenario.chaos is None else describe(scenario.chaos)
    return Merger(scenario.name, scenario.description, chaos)


def _save_failures(report: Report, scenario: Scenario, directory: Path) -> None:
    """Each seed that did not hold as a file of its own, with everything drawn written out."""
    directory.mkdir(exist_ok=True)
    for failure in report.failures[:MAX_SAVED]:
        file = (
            directory / f"{re.sub('[^a-z0-9-]+', '-', scenario.name.lower())}-{failure.seed}.toml"
        )
        head = "\n".join((f"Seed {failure.seed} did not hold:", *failure.reasons))
        if report.chaos:
            head += f"\nDrawn by chaos: {budget(report)}"
        save(written_out(scenario, failure.seed), file, head=head)
        sys.stdout.write(f"seed {failure.seed} saved: {file}\n")


def _run_all(
    job: Job,
    numbers: Sequence[int],
    options: FarmOptions,
    jobs: int,
    ray: Ray,
    merger: Merger,
    console: Console,
    compared: list[Comparison] | None = None,
) -> None:
    """Raises FarmError, Unusable, KeyboardInterrupt; the merger has what there is then, and
    `compared` what came of each run on the kernel beside one in virtual time."""

    def take(outcome: Result | Gone) -> None:
        if isinstance(outcome, Gone):
            merger.lose(outcome.seed, outcome.why)
            return
        merger.add(outcome)
        if compared is not None and outcome.backend == "kernel":
            lying = [each.name for each in loads(job.scenario).clients if each.hostile]
            compared.append(compare_backends(beside(job, outcome.seed), outcome, lying))

    title = job.name if len(numbers) == 1 else f"{job.name}, {len(numbers):,} seeds"
    if ray.ray_address:
        from simulations.farm.ray_farm import run_on_ray

        with watching(console, title, len(numbers), steps=True) as watcher:
            run_on_ray(job, numbers, attrs.evolve(options, jobs=jobs), ray, take, watcher)
    elif len(numbers) == 1:
        with watching(console, title, 1.0, steps=False) as watcher:
            take(
                perform(
                    job,
                    numbers[0],
                    lambda over, whole: watcher.advanced(over / max(whole, 1), failed=0),
                )
            )
    else:
        with watching(console, title, len(numbers), steps=True) as watcher:
            run_local(job, numbers, options, take, watcher)


def beside(job: Job, seed: int) -> Result:
    """The run in virtual time of what a job runs on the kernel, with the networks of that."""
    from simulations.kernel.obstacles import as_built

    scenario = as_built(written_out(loads(job.scenario, job.name), seed))
    return perform(Job(scenario=dump(scenario), name=job.name), seed)


def _give(report: Report, json: Path | None, html: Path | None) -> None:
    show(report, output_console())
    if json is not None:
        json.write_bytes(report_to_json(report))
        sys.stdout.write(f"the report: {json}\n")
    if html is not None:
        write_page(report, html)
        sys.stdout.write(f"the page: {html}\n")


def status_of(report: Report) -> int:
    """The exit status for a report."""
    if report.all_held:
        return HELD
    return FAILED if report.held < report.runs else INTERNAL


def read_report(file: Path) -> Report:
    """A report that `--json` wrote. Raises Unusable."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_REPORT_BYTES + 1)
        if len(data) > MAX_REPORT_BYTES:
            raise Unusable(f"{file}: larger than {MAX_REPORT_BYTES >> 20} MiB")
        return report_from_json(data)
    except OSError as error:
        raise Unusable(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{file}: no report of `holloway sim run --json`: {error}") from None


def output_console() -> Console:
    """The standard output, wide enough where nobody sees it."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


@contextmanager
def _exits() -> Iterator[None]:
    """Mistakes of whoever calls end with 2 and a sentence for each."""
    try:
        yield
    except (Unusable, ScenarioError) as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"holloway sim: {printable(line)}\n")
        sys.exit(UNUSABLE)
    except OSError as error:
        sys.stderr.write(f"holloway sim: {printable(str(error))}\n")
        sys.exit(UNUSABLE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
