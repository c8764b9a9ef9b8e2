"""Asking a portal that runs on this machine, at the control sockets in its state directory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from portal.answers import CLUSTER, CONTROL_DIRECTORY, SUFFIX, control_socket
from runtime.control import ControlUnavailable, ask_control


def ask(name: str, state_dir: Path, request: Mapping[str, Any]) -> dict[str, Any]:
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
            return _checked(name, ask_control(path, request))
        except ControlUnavailable:
            continue  # a node that was killed left it behind
        except PermissionError:
            sys.exit(f"holloway {name}: {path} belongs to another user; try with sudo")
    sys.exit(f"holloway {name}: no portal answers in {directory}; is it running?")


def ask_cluster(name: str, state_dir: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of the command that runs several nodes here; ends the process likewise."""
    path = control_socket(state_dir, CLUSTER)
    try:
        return _checked(name, ask_control(path, request))
    except ControlUnavailable:
        sys.exit(f"holloway {name}: no `holloway portal --nodes` answers at {path}; is it running?")
    except PermissionError:
        sys.exit(f"holloway {name}: {path} belongs to another user; try with sudo")


def _checked(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        sys.exit(f"holloway {name}: {answer['error']}")
    return answer
