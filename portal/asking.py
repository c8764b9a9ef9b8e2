"""Asking a portal that runs on this machine, at the control sockets in its state directory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from portal.answers import CLUSTER, CONTROL_DIRECTORY, SUFFIX, control_socket
from runtime.control import REQUEST_TIMEOUT_NS, ControlUnavailable, ask_control

CHANGE_TIMEOUT_NS: Final = 3_600 * 10**9
"""A rolling restart answers at its end: up to 20 s for each node's drain, and its start."""


def ask(
    name: str,
    state_dir: Path,
    request: Mapping[str, Any],
    *,
    timeout_ns: int = REQUEST_TIMEOUT_NS,
) -> dict[str, Any]:
    """The answer of the first node here that gives one. Ends the process with a line where there
    is none; `name` is the subcommand that asks."""
    directory = state_dir / CONTROL_DIRECTORY
    try:
        found = sorted(directory.glob(f"*{SUFFIX}"))
    except PermissionError:
        sys.exit(f"holloway {name}: {directory} belongs to another user; try with sudo")
    for path in found:
        if path.stem == CLUSTER:
            continue
        try:
            return _checked(name, ask_control(path, request, timeout_ns=timeout_ns))
        except ControlUnavailable:
            continue  # a node that was killed left it behind
        except PermissionError:
            sys.exit(f"holloway {name}: {path} belongs to another user; try with sudo")
    sys.exit(f"holloway {name}: no portal answers in {directory}; is it running?")


def ask_cluster(name: str, state_dir: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of the command that runs several nodes here; ends the process likewise. It may
    be long in coming: see CHANGE_TIMEOUT_NS."""
    answer = find_cluster(name, state_dir, request, timeout_ns=CHANGE_TIMEOUT_NS)
    if answer is None:
        path = control_socket(state_dir, CLUSTER)
        sys.exit(f"holloway {name}: no `holloway portal --nodes` answers at {path}; is it running?")
    return answer


def find_cluster(
    name: str,
    state_dir: Path,
    request: Mapping[str, Any],
    *,
    timeout_ns: int = REQUEST_TIMEOUT_NS,
) -> dict[str, Any] | None:
    """As `ask_cluster`, but None if no such command answers: there is none, or it was killed and
    has left its socket behind."""
    path = control_socket(state_dir, CLUSTER)
    try:
        return _checked(name, ask_control(path, request, timeout_ns=timeout_ns))
    except ControlUnavailable:
        return None
    except PermissionError:
        sys.exit(f"holloway {name}: {path} belongs to another user; try with sudo")


def _checked(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        sys.exit(f"holloway {name}: {answer['error']}")
    return answer
