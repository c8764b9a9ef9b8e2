"""`holloway sim`, as somebody meets it: exit status, files, and one sentence for each mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from simulations.installation import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]
ROOT = Path(__file__).resolve().parents[2]
READY = ROOT / "simulations" / "scenario" / "ready"


def sim(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `holloway sim argv` to its end."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HOLLOWAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "holloway", "sim", *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean,
        timeout=200,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def written(directory: Path, *changes: tuple[str, str]) -> Path:
    """A file of the home office, with changes."""
    text = (READY / "home-office.toml").read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    file = directory / "mine.toml"
    file.write_text(text)
    return file


BROKEN = ('path = "direct"\nwithin', 'path = "relayed"\nwithin')


def test_a_ready_made_scenario_holds_and_its_reports_are_written(tmp_path: Path) -> None:
    done = sim("run", "home-office", "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    assert "home-office, seed 1 (virtual): held" in done.stdout
    report = json.loads((tmp_path / "r.json").read_bytes())
    assert (report["runs"], report["held"]) == (1, 1)
    assert report["example"]["timeline"]  # a page has one session packet by packet, unasked
    assert "The session, packet by packet" in (tmp_path / "r.html").read_text()


def test_many_seeds_are_one_report_and_can_be_compared(tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    assert sim("run", "home-office", "--seeds", "4", "--json", one).returncode == 0
    again = sim("run", written(tmp_path, BROKEN), "--seeds", "1-4", "--json", other)
    assert again.returncode == 1
    assert "4 runs of 4 did NOT hold" in again.stdout
    assert "FAIL laptop reaches wiki (relayed)" in again.stdout
    assert sim("compare", one, one).returncode == 0
    worse = sim("compare", one, other)
    assert worse.returncode == 1
    assert "runs that held" in worse.stdout
    assert json.loads(sim("compare", one, other, "--json").stdout)["worse"] is True


def test_a_seed_gives_the_same_trace_in_every_process() -> None:
    [one, other] = [sim("run", "home-office", "--seed", "7").stdout for _ in range(2)]
    [trace] = [line for line in one.splitlines() if line.startswith("trace of seed 7:")]
    assert trace in other


def test_a_failure_is_made_small_and_the_small_one_fails_again(tmp_path: Path) -> None:
    small = tmp_path / "small.toml"
    file = written(tmp_path, BROKEN)
    done = sim("shrink", file, "--seed", "3", "-o", small, "--runs", "40")
    assert done.returncode == 0, done.stderr
    assert len(small.read_text()) < len(file.read_text())
    assert "seed = 3" in small.read_text()
    again = sim("replay", small)
    assert again.returncode == 1
    assert "it fails again with seed 3" in again.stdout


def test_what_does_not_fail_is_neither_shrunk_nor_said_to_fail(tmp_path: Path) -> None:
    done = sim("shrink", "home-office", "--seed", "1", "-o", tmp_path / "small.toml")
    assert done.returncode == 1
    assert "there is nothing to shrink" in done.stdout
    assert not (tmp_path / "small.toml").exists()
    done = sim("replay", READY / "home-office.toml", "--seed", "1")
    assert done.returncode == 0
    assert "it does not fail any more" in done.stdout


def test_the_ready_made_ones_are_listed() -> None:
    assert "hotel-udp-blocked" in sim("list").stdout
    rows = json.loads(sim("list", "-o", "json").stdout)
    assert {"name", "description"} == set(rows[0])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("run", "home-offic"), "did you mean 'home-office'?"),
        (("run", "/nowhere/x.toml"), "No such file"),
        (("run", "home-office", "--seeds", "0"), "--seeds"),
        (("run", "home-office", "--seeds", "9-3"), "--seeds"),
        (("run", "home-office", "--seeds", "many"), "--seeds: 'many' is no number"),
        (("run", "home-office", "--seed", "1", "--seeds", "3"), "say one of them"),
        (("run", "home-office", "--seed", "-1"), "out of range"),
        (("run", "home-office", "--follow", "laptop"), "is not CLIENT:RESOURCE"),
        (("run", "home-office", "--follow", "lap:wiki"), "no client 'lap'"),
        (("run", "home-office", "--follow", "laptop:wik"), "did you mean 'wiki'?"),
        (("run", "home-office", "--json", "/nowhere/r.json"), "there is no directory /nowhere"),
        (("compare", "/nowhere/a", "/nowhere/b"), "No such file"),
        (("compare", READY / "home-office.toml", READY / "partition.toml"), "no report of"),
        (("replay", READY / "home-office.toml"), "has no `seed`, so say --seed"),
        (("run",), "SCENARIO"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_a_mistake_is_told_in_a_sentence_and_ends_with_2(
    argv: tuple[str | Path, ...], words: str
) -> None:
    done = sim(*argv)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())
    assert done.stdout == ""


def test_a_ray_is_not_reached_without_its_token() -> None:
    done = sim("run", "home-office", "--seeds", "3", "--ray-address", "127.0.0.1:1")
    assert done.returncode == 3
    assert "--ray-token-file" in done.stderr


def test_all_that_is_wrong_with_a_file_is_told_with_places(tmp_path: Path) -> None:
    file = written(
        tmp_path, ('network = "flat"', 'network = "flt"'), ('at = "40s"\nkind = "ch', 'kind = "ch')
    )
    done = sim("run", file)
    assert done.returncode == 2
    assert (
        "clients[2].network: there is no network named 'flt'; did you mean 'flat'?" in done.stderr
    )
    assert "faults[0].at: is missing" in done.stderr


def started(*argv: str) -> tuple[subprocess.Popen[str], list[str]]:
    """`holloway sim run` of many seeds, with the ids of its two workers."""
    command = [sys.executable, "-m", "holloway", "sim", "run", "rolling-upgrade"]
    running = subprocess.Popen(
        [*command, "--seeds", "500", "--jobs", "2", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    workers: list[str] = []
    while len(workers) < 2:
        assert running.poll() is None
        workers = children.read_text().split()
    return running, workers


def lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_interrupted_run_tells_what_there_is_and_leaves_no_process(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    running, workers = started("--json", str(file))
    running.send_signal(signal.SIGINT)
    told, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "interrupted" in said
    assert json.loads(file.read_bytes())["kind"] == "holloway simulation report"
    assert "did NOT hold" not in told
    assert not any(map(lives, workers))


def test_workers_end_when_the_command_is_killed() -> None:
    running, workers = started()
    running.kill()
    running.communicate(timeout=60)
    wait_until(lambda: not any(map(lives, workers)), what="the workers have ended")


def test_failures_are_saved_as_files_that_fail_again(tmp_path: Path) -> None:
    saved = tmp_path / "failures"
    done = sim("run", written(tmp_path, BROKEN), "--seeds", "2", "--save-to", saved)
    assert done.returncode == 1
    assert sorted(each.name for each in saved.iterdir()) == [
        "home-office-1.toml",
        "home-office-2.toml",
    ]
    assert "# Seed 2 did not hold:" in (saved / "home-office-2.toml").read_text()
    again = sim("replay", saved / "home-office-2.toml")
    assert again.returncode == 1
    assert "it fails again with seed 2" in again.stdout


def test_what_the_kernel_cannot_run_is_refused_with_a_line_for_each_reason(tmp_path: Path) -> None:
    others = (
        '[[networks]]\nname = "west"\nprefix = "198.51.100.0/25"\n\n'
        '[[networks]]\nname = "east"\nprefix = "198.51.100.128/25"\n\n'
        '[[links]]\nbetween = ["west", "east"]\n\n'
        '[[faults]]\nat = "10s"\nkind = "clock_skew"\ntargets = ["tablet"]\noffset = "5s"\n\n'
    )
    fault = '[[faults]]\nat = "40s"'
    done = sim("run", written(tmp_path, (fault, others + fault)), "--on", "kernel")
    assert done.returncode == 2, done.stdout
    first, second = sorted(done.stderr.splitlines())
    assert "clock_skew" in first
    assert "further links between networks are not built on the kernel" in second


def test_on_the_kernel_outcomes_are_set_beside_those_of_virtual_time(tmp_path: Path) -> None:
    soon = [('duration = "60s"', 'duration = "12s"'), ('at = "40s"', 'at = "6s"'),
            ('at = "39s"', 'at = "5s"')]  # fmt: skip
    text = written(tmp_path, *soon[:1]).read_text()
    for before, after in soon[1:]:
        text = text.replace(before, after)
    file = tmp_path / "soon.toml"
    file.write_text(text)
    page = tmp_path / "kernel.html"
    done = sim("run", file, "--on", "kernel", "--json", tmp_path / "kernel.json", "--html", page)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on the kernel, bounds of checks" in done.stderr
    assert "virtual time and the kernel agree, seed 1:" in done.stdout
    assert json.loads((tmp_path / "kernel.json").read_bytes())["backend"] == "kernel"
    assert "kernel namespaces" in page.read_text()
