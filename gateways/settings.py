"""The settings of a gateway, defined once: flags, HOLLOWAY_GATEWAY_* variables, TOML keys."""

from __future__ import annotations

import socket
from ipaddress import ip_network
from pathlib import Path
from typing import Literal

import attrs

from tunnel.resources import Network

DEFAULT_STATE_DIR = Path("/run/holloway/gateway")


class SettingsError(ValueError):
    """The settings contradict each other or lack something; the message names the setting."""


@attrs.frozen(kw_only=True)
class GatewaySettings:
    """How this gateway joins its site, and what it may forward and change on this machine.

    Parameters
    ----------
    token_file
        File with the site's gateway token (mode 0600). Otherwise the variable
        HOLLOWAY_GATEWAY_TOKEN or the systemd credential `holloway-gateway-token` is read.
    name
        Name under which this gateway is shown; the host name otherwise.
    allow
        Networks in CIDR form outside of which nothing is ever forwarded, whatever the portal
        says. Without it, the portal alone decides.
    device_key_file
        File (mode 0600, made if it does not exist) of the device key by which the portal knows
        this gateway again. Without it, each start makes a new key, and a new gateway.
    state_dir
        Folder (made 0700) of the control socket by which `status` reaches the running gateway,
        and of what has to be put back after a crash. Nothing in it needs to outlive a reboot.
    interface
        Name of the TUN device; `%d` lets the system choose a number.
    masquerade
        Give forwarded packets the gateway's own address. Without it, resources need a route for
        the tunnel ranges to this gateway.
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
    allow: tuple[str, ...] = ()
    device_key_file: Path | None = None
    state_dir: Path = DEFAULT_STATE_DIR
    interface: str = "hlw%d"
    masquerade: bool = True
    port: int = 0
    observability: str = "127.0.0.1:9479"
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def ceiling_of(settings: GatewaySettings) -> tuple[Network, ...]:
    """The networks of `allow`. Raises SettingsError."""
    try:
        return tuple(ip_network(text) for text in settings.allow)
    except ValueError as error:
        raise SettingsError(f"allow: {error}") from None
