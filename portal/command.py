"""`holloway portal`: the settings from flags, environment and TOML, and run."""

from __future__ import annotations

import sys
from typing import Annotated

import trio
from cyclopts import Parameter

from actors.store.interface import StoreError
from channel.credentials import InvalidToken
from portal.authority import AuthorityError
from portal.node import run_portal
from portal.settings import PortalSettings, SettingsError
from runtime.cluster.process import NodeSuperseded
from runtime.service import SecretUnavailable, configure_logging


def portal(settings: Annotated[PortalSettings, Parameter(name="*")] | None = None) -> None:
    """Run the control plane: actors, control channel, JSON API, and by default the database.

    The first start makes the installation's certificate authority and writes the token of its
    first operator to `operator-token` in the state directory.
    """
    settings = settings or PortalSettings()
    configure_logging(settings.log_format, settings.log_level)
    try:
        trio.run(run_portal, settings)
    except (
        SettingsError,
        SecretUnavailable,
        AuthorityError,
        InvalidToken,
        StoreError,
        NodeSuperseded,
        OSError,
    ) as error:
        sys.exit(f"holloway portal: {error}")
