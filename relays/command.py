"""`holloway relay`: the settings of `relays.settings` from flags, environment and TOML, and run."""

from __future__ import annotations

import gc
import sys
from typing import Annotated

import trio
from cyclopts import Parameter

from channel.credentials import InvalidToken
from channel.dialer import Refused
from relays.daemon import run_relay
from relays.settings import RelaySettings, SettingsError
from relays.transports.tls import CertificateError
from runtime.service import SecretUnavailable


def relay(settings: Annotated[RelaySettings, Parameter(name="*")] | None = None) -> None:
    """Run a STUN and TURN relay.

    It joins the portal that its token names and serves the agents of the installation. With
    `--standalone` it needs no portal and serves the users that it is told.
    """
    # The modules stay, and walking over all of them time and again would only delay datagrams.
    gc.freeze()
    try:
        trio.run(run_relay, settings or RelaySettings())
    except (
        SettingsError,
        SecretUnavailable,
        InvalidToken,
        CertificateError,
        Refused,
        OSError,
    ) as error:
        sys.exit(f"holloway relay: {error}")
