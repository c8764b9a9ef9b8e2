"""The settings of a client, from one definition: flags, HOLLOWAY_UP_* variables, TOML keys."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal

import attrs

DEFAULT_STATE_DIR = Path("/var/lib/holloway/client")
# "hlw" as a number that nobody else is likely to have chosen.
DEFAULT_MARK = 0x686C77
DEFAULT_TABLE = 26_727


@attrs.frozen(kw_only=True)
class ClientSettings:
    """How this device joins, and what it may change on this machine.

    Parameters
    ----------
    token_file
        File with the client's token (mode 0600). Otherwise the variable HOLLOWAY_UP_TOKEN or the
        systemd credential `holloway-up-token` is read.
    name
        Name under which this device is shown; the host name otherwise.
    state_dir
        Folder (made 0700) of the device key and of the control socket by which `status` and
        `down` reach the running client.
    interface
        Name of the TUN device; `%d` lets the system choose a number.
    mark
        Mark (SO_MARK) of the client's own sockets: packets with it are never routed into the
        tunnel.
    routing_table
        Number of the routing table that holds the routes of resources.
    rule_priority
        Priority of the `ip rule` that leads to that table; it has to come before the main table
        (32766).
    port
        UDP port that is tried first for direct paths; 0 lets the system choose.
    observability
        `host:port` of /metrics, /healthz and /readyz; empty for none.
    log_format
        `text` for people or `json` for machines.
    log_level
        The least level that is logged.
    """

    token_file: Path | None = None
    name: str = attrs.field(factory=socket.gethostname)
    state_dir: Path = DEFAULT_STATE_DIR
    interface: str = "hlw%d"
    mark: int = DEFAULT_MARK
    routing_table: int = DEFAULT_TABLE
    rule_priority: int = 5_210
    port: int = 0
    observability: str = "127.0.0.1:9480"
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
