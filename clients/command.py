"""`holloway up`, `down` and `status`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import trio
from cyclopts import Parameter

from channel.credentials import InvalidToken
from channel.dialer import Refused
from clients.daemon import run_client
from clients.settings import DEFAULT_STATE_DIR, ClientSettings
from clients.status import render
from runtime.control import ControlUnavailable, ask_control
from runtime.service import SecretUnavailable
from tunnel.shell.commands import CommandFailed
from tunnel.shell.lock import AlreadyRunning
from tunnel.shell.process import CONTROL_SOCKET
from tunnel.shell.tun import TunError

_EXPECTED = (
    SecretUnavailable,
    InvalidToken,
    AlreadyRunning,
    TunError,
    CommandFailed,
    Refused,
    OSError,
)


def up(settings: Annotated[ClientSettings, Parameter(name="*")] | None = None) -> None:
    """Connect this device, until Ctrl-C or `holloway down`.

    Resources are routed into a TUN device, and tunnels are made as they are used. Needs root or
    CAP_NET_ADMIN.
    """
    try:
        trio.run(run_client, settings or ClientSettings())
    except _EXPECTED as error:
        sys.exit(f"holloway up: {error}")


def down(*, state_dir: Path = DEFAULT_STATE_DIR) -> None:
    """Disconnect this device: ends the running `holloway up` in good order.

    Parameters
    ----------
    state_dir
        The folder that `holloway up` was given.
    """
    _ask("down", state_dir)


def status(
    *,
    state_dir: Path = DEFAULT_STATE_DIR,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Show what the client or gateway here is doing: one entry for each peer.

    Parameters
    ----------
    state_dir
        The folder that `holloway up` (or `holloway gateway`) was given.
    json
        Print everything that is known as one JSON object.
    """
    answer = _ask("status", state_dir)
    if json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode() + "\n")
    else:
        render(answer)


def _ask(command: str, state_dir: Path) -> dict[str, Any]:
    path = state_dir / CONTROL_SOCKET
    try:
        answer = ask_control(path, {"command": command})
    except ControlUnavailable as error:
        sys.exit(f"holloway {command}: nobody answers ({error}); is it running?")
    except PermissionError:
        sys.exit(f"holloway {command}: {path} belongs to another user; try with sudo")
    if "error" in answer:
        sys.exit(f"holloway {command}: {answer['error']}")
    return answer
