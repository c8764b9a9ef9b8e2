"""Running the system's own network tools (`ip`, `nft`, `conntrack`, `sysctl` files).

Arguments are made by callers from typed values (addresses, numbers, own constants), never from
text that the portal sent, and no shell is involved.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

import trio

SEARCH_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
TIMEOUT_S = 20.0


class CommandFailed(Exception):
    """A tool is missing, failed or took too long; the message says which and why."""


async def run_command(argv: Sequence[str], *, given: str = "") -> str:
    """Run a tool with `given` on its standard input; what it printed. Raises CommandFailed.

    Cancelling kills the tool.
    """
    return _checked(argv, await _run(argv, given))


async def try_command(argv: Sequence[str], *, given: str = "") -> bool:
    """As `run_command`, for what may fail harmlessly: whether it succeeded."""
    return (await _run(argv, given)).returncode == 0


def run_command_now(argv: Sequence[str], *, given: str = "") -> str:
    """As `run_command`, outside of an event loop."""
    try:
        done = subprocess.run(
            argv,
            input=given.encode(),
            capture_output=True,
            timeout=TIMEOUT_S,
            env=_environment(),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommandFailed(f"{argv[0]}: {error}") from error
    return _checked(argv, done)


async def _run(argv: Sequence[str], given: str) -> subprocess.CompletedProcess[bytes]:
    try:
        with trio.fail_after(TIMEOUT_S):
            return await trio.run_process(
                argv,
                stdin=given.encode(),
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=_environment(),
            )
    except (OSError, trio.TooSlowError) as error:
        raise CommandFailed(f"{argv[0]}: {error or 'took too long'}") from error


def _checked(argv: Sequence[str], done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise CommandFailed(f"`{' '.join(argv)}` ended with {done.returncode}: {said}")
    return done.stdout.decode(errors="replace")


def _environment() -> dict[str, str]:
    return {"PATH": SEARCH_PATH, "LC_ALL": "C", "HOME": os.environ.get("HOME", "/")}
