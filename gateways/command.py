"""`holloway gateway`: the settings from flags, environment and TOML, and run."""

from __future__ import annotations

import sys
from typing import Annotated

import trio
from cyclopts import Parameter

from channel.credentials import InvalidToken
from channel.dialer import Refused
from gateways.daemon import run_gateway
from gateways.settings import GatewaySettings, SettingsError
from runtime.service import SecretUnavailable
from tunnel.shell.commands import CommandFailed
from tunnel.shell.lock import AlreadyRunning
from tunnel.shell.tun import TunError

_EXPECTED = (
    SettingsError,
    SecretUnavailable,
    InvalidToken,
    AlreadyRunning,
    TunError,
    CommandFailed,
    Refused,
    OSError,
)


def gateway(settings: Annotated[GatewaySettings, Parameter(name="*")] | None = None) -> None:
    """Run a gateway beside resources.

    It joins the site that its token names, opens no inbound port, and forwards what the portal
    authorises (within `--allow`). Needs root or CAP_NET_ADMIN.
    """
    try:
        trio.run(run_gateway, settings or GatewaySettings())
    except _EXPECTED as error:
        sys.exit(f"holloway gateway: {error}")
