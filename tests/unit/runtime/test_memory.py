"""The memory of a process that may hold secrets is private."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import resource, signal, subprocess, sys
from runtime.memory import is_memory_private, keep_memory_private
print(is_memory_private())
keep_memory_private()
print(is_memory_private())
limit = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE))"
print(subprocess.check_output([sys.executable, "-c", limit]).decode(), end="", flush=True)
signal.raise_signal(signal.SIGABRT)
"""


def test_a_process_leaves_no_core_dump_and_neither_do_its_children() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.split("\n")[:3] == ["False", "True", "(0, 0)"]
    assert not os.WCOREDUMP(-done.returncode)


def test_every_subcommand_begins_with_it() -> None:
    program = (
        "import atexit, sys, holloway\n"
        "from runtime.memory import is_memory_private\n"
        "atexit.register(lambda: print('private', is_memory_private()))\n"
        "sys.argv = ['holloway', '--version']\n"
        "holloway.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "private True" in done.stdout, done.stderr
