"""The compiled drain under AddressSanitizer and UndefinedBehaviorSanitizer, fed with anything.

`make soak` does it for longer (HOLLOWAY_DRAIN_FUZZ_S).
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "relays/fastpath/_drain.c"
SANITIZERS = "-fsanitize=address,undefined"


def test_nothing_that_is_sent_makes_the_compiled_drain_leave_its_bounds(tmp_path: Path) -> None:
    built = tmp_path / f"_drain{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(
        ["cc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror",
         "-Wno-missing-field-initializers", "-Wno-cast-function-type", SANITIZERS,
         "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-fPIC", "-shared",
         f"-I{sysconfig.get_path('include')}", str(SOURCE), "-o", str(built)],
        check=True,
    )  # fmt: skip
    libraries = [
        subprocess.run(
            ["cc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    seconds = os.environ.get("HOLLOWAY_DRAIN_FUZZ_S", "8")
    seed = os.environ.get("HOLLOWAY_DRAIN_FUZZ_SEED", "1")
    done = subprocess.run(
        [sys.executable, "-m", "tests.system.relay_drain_fuzz", str(built), seconds, seed],
        cwd=ROOT,
        env=os.environ
        | {
            "LD_PRELOAD": ":".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "PYTHONMALLOC": "malloc",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    relayed = int(done.stdout.split()[1])
    assert relayed > 1_000, "the fuzzing has to reach what it is for"
