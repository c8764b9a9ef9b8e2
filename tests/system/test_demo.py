"""The demo, as a person runs it: every outcome holds, and nothing of it is left on the machine,
however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simulations.installation import HOME_NAT, OFFICE_NAT, PAGE, wait_until

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parents[2]
DEMO = [sys.executable, "-m", "holloway", "demo"]

OUTCOMES = {
    "installed",
    "denied_without_policy",
    "direct_path",
    "cut_by_revocation",
    "allowed_again",
    "large_download",
    "failed_over",
    "relayed",
}


def left_of(run: str) -> list[str]:
    """Namespaces, directories and processes that bear the name of a run."""
    printed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    found = [line.split()[0] for line in printed.splitlines()]
    found += os.listdir(tempfile.gettempdir())
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return [name for name in found if f"hlw-{run}-" in name]


def is_shown_by_both(path: dict[str, Any]) -> bool:
    return all(
        re.fullmatch(rf"{re.escape(nat)}:\d+", path[side])
        for side, nat in (("local", HOME_NAT), ("remote", OFFICE_NAT))
    )


@pytest.mark.timeout(600)
def test_every_outcome_of_two_demos_side_by_side_holds_and_nothing_is_left() -> None:
    running = [
        subprocess.Popen(
            [*DEMO, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(2)
    ]
    for demo in running:
        printed, said = demo.communicate(timeout=500)
        assert printed, said
        report = json.loads(printed)
        assert report["outcomes"] == dict.fromkeys(OUTCOMES, True), said
        assert report["held"]
        assert demo.returncode == 0
        assert report["measured"]["relayed"]["path"]["kind"] == "relayed"
        assert report["measured"]["direct_path"]["path"]["kind"] == "direct"
        assert is_shown_by_both(report["measured"]["direct_path"]["path"])
        assert not left_of(report["run"])


# --- a demo that is interrupted ------------------------------------------------------------------


def heed_interrupts() -> None:
    """As one that is started at a terminal does; what a script runs in the background does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class RunningDemo:
    """A demo, and what it has printed so far. With `moment` it is sent a signal as soon as it has
    printed a line with those words."""

    def __init__(self, *options: str, moment: tuple[str, signal.Signals] | None = None) -> None:
        self._moment = moment
        self.process = subprocess.Popen(
            [*DEMO, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            preexec_fn=heed_interrupts,
        )
        self.printed = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def run(self) -> str | None:
        """The name of its run, once it is known."""
        found = re.search(r"hlw-([0-9a-f]+)-", self.printed)
        return found and found[1]

    def has_come_to(self, words: str) -> bool:
        assert self.process.poll() is None, self.printed
        return words in self.printed

    def end(self) -> int:
        code = self.process.wait(timeout=120)
        self._reader.join(timeout=30)
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed += line
            if self._moment is not None and self._moment[0] in line:
                self.process.send_signal(self._moment[1])
                self._moment = None


@pytest.fixture
def demos() -> Iterator[list[RunningDemo]]:
    """Demos that the test starts; what still runs at its end is told to end."""
    started: list[RunningDemo] = []
    yield started
    for demo in started:
        if demo.process.poll() is None:
            demo.process.terminate()
            demo.end()


@pytest.mark.timeout(300)
def test_a_demo_that_is_interrupted_or_killed_leaves_nothing(demos: list[RunningDemo]) -> None:
    moments = [
        ("hlw-", signal.SIGKILL),  # while it lays out the network
        ("hlw-", signal.SIGINT),
        ("are online", signal.SIGTERM),  # while curl waits for a denial
        ("through a hole-punched", signal.SIGKILL),  # during a download
        ("through a hole-punched", signal.SIGINT),
    ]
    demos += [RunningDemo(moment=moment) for moment in moments]
    for demo, (words, number) in zip(demos, moments, strict=True):
        code = demo.end()
        assert demo.run is not None
        assert code == (-number if number == signal.SIGKILL else 1), demo.printed
        assert "Traceback" not in demo.printed
        if number != signal.SIGKILL:
            assert "interrupted; everything was removed" in demo.printed
            assert not left_of(demo.run), words
        # The janitor of one that was killed takes a moment.
        wait_until(lambda d=demo: not left_of(d.run), what="all is removed", timeout_s=60)


@pytest.mark.timeout(300)
def test_a_demo_that_is_kept_runs_on_until_it_is_interrupted(demos: list[RunningDemo]) -> None:
    demo = RunningDemo("--keep")
    demos.append(demo)
    wait_until(lambda: demo.has_come_to("Ctrl-C removes it all"), what="it is kept", timeout_s=200)
    inside = re.search(r"ip netns exec hlw-\S+ curl \S+", demo.printed)
    assert inside is not None
    page = subprocess.run(inside[0].split(), capture_output=True, text=True, timeout=30)
    assert page.stdout == PAGE
    demo.process.send_signal(signal.SIGINT)
    assert demo.end() == 0
    assert demo.run is not None
    assert not left_of(demo.run)


# --- a machine on which it cannot run ------------------------------------------------------------


def in_virtual_time(argv: list[str], **env: str) -> tuple[str, str]:
    """What it says and prints where it has to fall back."""
    done = subprocess.run(
        argv, capture_output=True, text=True, cwd=ROOT, env=os.environ | env, timeout=120
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    return done.stderr, done.stdout


def test_where_a_program_is_missing_it_is_named_and_the_story_is_told_in_virtual_time(
    tmp_path: Path,
) -> None:
    said, printed = in_virtual_time([*DEMO, "--json"], PATH=str(tmp_path))
    assert "`curl` is missing: apt-get install curl" in said
    report = json.loads(printed)
    assert report["world"] == "virtual"
    assert report["held"]
    assert set(report["outcomes"]) == OUTCOMES - {"installed", "large_download"} | {
        "failed_over_again"
    }


def test_whoever_is_not_root_is_told_so_and_sees_the_story_in_virtual_time() -> None:
    # It may read files, wherever this interpreter is installed, and nothing else.
    right = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    as_nobody = ["setpriv", "--reuid", "65534", "--clear-groups", *right]
    said, printed = in_virtual_time([*as_nobody, *DEMO])
    assert said == "holloway demo: root is needed to make network namespaces: run with sudo\n"
    assert "this is the story in virtual time" in printed
    assert "7 of 7 outcomes held." in printed


def test_there_is_nothing_to_keep_in_virtual_time(tmp_path: Path) -> None:
    done = subprocess.run(
        [*DEMO, "--keep"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PATH": str(tmp_path)},
        timeout=60,
    )
    assert done.returncode == 2
    assert "there is nothing to keep without namespaces" in done.stderr
