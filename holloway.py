"""The command line: one subcommand per component, nothing else.

Every setting of a component is one field of its settings class, and from that one definition a
flag (`--listen`), an environment variable (`HOLLOWAY_PORTAL_LISTEN`) and a TOML key
(`listen` under `[portal]`), in this order of precedence. Secrets have no flag: they come from a
file, the environment or a systemd credential.
"""

from __future__ import annotations

import os
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import App, Parameter

from runtime.memory import keep_memory_private

DEFAULT_CONFIG = Path("/etc/holloway/holloway.toml")
USAGE = 2
TABLES = (
    "portal",
    "cluster",
    "relay",
    "gateway",
    "up",
    "down",
    "status",
    "netcheck",
    "demo",
    "sim",
)

app = App(
    name="holloway",
    version=lambda: version("holloway"),
    help="Zero-trust remote access: private resources through hole-punched WireGuard tunnels.",
)
app.command("portal.command:app", name="portal", help="Run the control plane.")
app.command("portal.cluster_command:app", name="cluster", help="Look after several nodes.")
app.command("relays.command:relay", name="relay", help="Run a STUN and TURN relay.")
app.command("gateways.command:gateway", name="gateway", help="Run a gateway beside resources.")
app.command("clients.command:up", name="up", help="Connect this device.")
app.command("clients.command:down", name="down", help="Disconnect this device.")
app.command("clients.command:status", name="status", help="Show what an agent here is doing.")
app.command("clients.netcheck.command:netcheck", name="netcheck", help="Examine this network.")
app.command("admin.command:app", name="admin", help="Call the JSON API of a portal.")
app.command("simulations.command:demo", name="demo", help="Watch a whole access, end to end.")
app.command("simulations.command:sim_app", name="sim", help="Rehearse networks, faults, policies.")


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Path | None = None,
) -> None:
    """Read the settings file and run one subcommand.

    Parameters
    ----------
    config
        TOML file of settings, one table per subcommand. Without it, HOLLOWAY_CONFIG names the
        file, or else /etc/holloway/holloway.toml is read where it exists.
    """
    named = config or (
        Path(os.environ["HOLLOWAY_CONFIG"]) if "HOLLOWAY_CONFIG" in os.environ else None
    )
    file = named or DEFAULT_CONFIG
    if named is not None or file.exists():
        _check_tables(file)
    app.config = [
        cyclopts.config.Env("HOLLOWAY_", command=True),
        cyclopts.config.Toml(file),
    ]
    try:
        app(tokens, exit_on_error=False)
    except cyclopts.CycloptsError:
        sys.exit(USAGE)  # what is wrong has been said


def _check_tables(file: Path) -> None:
    """End with one line where the settings file cannot be read, or a table in it is nobody's.

    The keys of the table that is used are checked by its subcommand.
    """
    try:
        tables = tomllib.loads(file.read_text())
    except OSError as error:
        sys.exit(f"holloway: the settings file {file}: {error.strerror}")
    except ValueError as error:
        sys.exit(f"holloway: the settings file {file} is no TOML: {error}")
    for name, content in tables.items():
        if name not in TABLES or not isinstance(content, dict):
            known = ", ".join(f"[{table}]" for table in TABLES)
            sys.exit(f"holloway: the settings file {file}: {name!r} is none of {known}")


def main() -> None:
    keep_memory_private()  # before a component reads its first secret
    app.meta()


if __name__ == "__main__":
    main()
