"""The same cores and actors do one whole access in virtual time, and the same one each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from simulations.access import QUESTION, Access
from simulations.nat import PORT_RESTRICTED, SYMMETRIC, NatBehaviour

ROOT = Path(__file__).resolve().parents[2]
IN_A_PROCESS = (
    "import json, attrs; from simulations.access import Access; "
    "print(json.dumps(attrs.asdict(Access(7).run())))"
)


@pytest.mark.parametrize(
    ("behaviour", "path"), [(PORT_RESTRICTED, "direct"), (SYMMETRIC, "relayed")]
)
def test_an_access_is_denied_allowed_and_cut(behaviour: NatBehaviour, path: str) -> None:
    report = Access(1, behaviour).run()
    assert report.denied_at_first
    assert report.answered
    assert report.path == path
    assert report.cut_after_revocation
    by_client, by_gateway = sorted(report.flows, key=lambda flow: flow.reporter)
    assert (by_client.reporter, by_gateway.reporter) == ("client", "gateway")
    for flow in (by_client, by_gateway):
        assert flow.destination == "10.20.0.80:7"
        assert flow.bytes_sent == flow.packets_sent * (28 + len(QUESTION))
        assert flow.packets_received >= 1
        assert flow.ending == "revoked"
    assert by_client.packets_sent >= by_gateway.packets_sent >= by_gateway.packets_received


def test_a_seed_gives_the_same_trace_in_processes_with_different_hash_seeds() -> None:
    reports = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        reports.append(json.loads(done.stdout.splitlines()[-1]))
    assert reports[0] == reports[1]
    assert reports[0] == json.loads(json.dumps(attrs.asdict(Access(7).run())))


def test_another_seed_gives_another_trace() -> None:
    assert Access(1).run().trace != Access(2).run().trace


@pytest.mark.parametrize("seed", range(10, 20))
def test_every_seed_finds_a_direct_path_between_easy_nats(seed: int) -> None:
    report = Access(seed).run()
    assert (report.answered, report.path, report.cut_after_revocation) == (True, "direct", True)
