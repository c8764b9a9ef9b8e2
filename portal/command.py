"""`holloway portal`, `portal tree`, `portal reseal`: settings from flags, environment and TOML.

`holloway cluster ...` is in `portal.cluster_command`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import trio
from cyclopts import App, Parameter

from actors.store.interface import StoreError
from channel.credentials import InvalidToken
from portal.asking import CHANGE_TIMEOUT_NS, ask
from portal.authority import AuthorityError
from portal.node import run_portal
from portal.settings import DEFAULT_STATE_DIR, PortalSettings, SettingsError
from runtime.cluster.leases import ClusterFull
from runtime.cluster.process import MembershipEnded, NodeSuperseded
from runtime.hosting.interface import ClusterError
from runtime.hosting.ray_settings import RayRefused
from runtime.service import SecretUnavailable, configure_logging

app = App(name="portal", help="Run the control plane.")


@app.default
def portal(settings: Annotated[PortalSettings, Parameter(name="*")] | None = None) -> None:
    """Run the control plane: actors, control channel, JSON API, and by default the database.

    The first start makes the installation's certificate authority and writes the token of its
    first operator to `operator-token` in the state directory.
    """
    settings = settings or PortalSettings()
    configure_logging(settings.log_format, settings.log_level)
    try:
        if settings.nodes == 1 and not settings.ray_address:
            trio.run(run_portal, settings)
        else:
            from portal.cluster import run_nodes  # brings Ray, which takes seconds

            trio.run(run_nodes, settings)
    except (
        SettingsError,
        SecretUnavailable,
        AuthorityError,
        InvalidToken,
        StoreError,
        NodeSuperseded,
        MembershipEnded,
        ClusterError,
        ClusterFull,
        RayRefused,
        OSError,
    ) as error:
        sys.exit(f"holloway portal: {error}")


@app.command
def tree(
    *,
    node: str = "",
    state_dir: Path = DEFAULT_STATE_DIR,
) -> None:
    """Print the actors of a portal that runs here, each below its supervisor.

    A line has the actor, its state, mail that waits, restarts and age.

    Parameters
    ----------
    node
        Of which node; by default of one that runs on this machine.
    state_dir
        The state directory that `holloway portal` was given.
    """
    answer = ask("portal tree", state_dir, {"command": "tree", "node": node})
    sys.stdout.write(answer["tree"] + "\n")


@app.command
def reseal(*, state_dir: Path = DEFAULT_STATE_DIR) -> None:
    """Seal all secrets in the database by the newest encryption key, while the portal runs.

    Give the ring with the new key to every node first, and restart them. Once this has ended, the
    older keys can be taken out of the ring.

    Parameters
    ----------
    state_dir
        The state directory that `holloway portal` was given.
    """
    answer = ask("portal reseal", state_dir, {"command": "reseal"}, timeout_ns=CHANGE_TIMEOUT_NS)
    sys.stdout.write(f"{answer['resealed']} sealed anew\n")
