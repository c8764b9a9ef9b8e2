"""The demo, as a person runs it: every outcome holds, and nothing of it is left on the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parents[2]

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


def listed() -> set[str]:
    printed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return {line.split()[0] for line in printed.splitlines()}


@pytest.mark.timeout(600)
def test_every_outcome_of_the_demo_holds_and_nothing_is_left() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "holloway", "demo", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=500,
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["outcomes"] == dict.fromkeys(OUTCOMES, True), done.stderr
    assert report["held"]
    assert done.returncode == 0
    assert report["measured"]["relayed"]["path"]["kind"] == "relayed"
    assert report["measured"]["direct_path"]["path"]["kind"] == "direct"
    assert not [name for name in listed() if name.startswith(f"hlw-{report['run']}-")]
    assert not Path(report["directory"]).exists()
