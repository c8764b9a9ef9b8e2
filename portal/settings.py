"""The settings of a portal, from one definition: flags, HOLLOWAY_PORTAL_* variables, TOML keys."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal

import attrs

from runtime.net.address import Address, join_host_port, split_host_port

DEFAULT_PORT = 443


class SettingsError(ValueError):
    """The settings contradict each other or lack something; the message names the setting."""


@attrs.frozen(kw_only=True)
class PortalSettings:
    """Where a portal listens, under which name it is known, and where it keeps its state.

    Parameters
    ----------
    state_dir
        Directory of the installation's certificate authority, the operator's first token and
        (unless a database is named) the embedded PostgreSQL. Whoever can read it is the portal.
        Under root the embedded PostgreSQL has an account of its own, which must be able to pass
        through the directories above.
    address
        `host:port` by which agents reach the control channel; it is part of every token. Without
        it, this machine's host name and the port of `listen`.
    listen
        Address of the control channel (QUIC, UDP), as `192.0.2.1:443` or `[::]:443`.
    api_listen
        Address of the JSON API (HTTPS, TCP).
    names
        Further DNS names and IP addresses for the server certificate. It always names the hosts
        of `address`, `listen` and `api_listen`, and `localhost`.
    database_url_file
        File (mode 0600) with the URL of a PostgreSQL. Otherwise the variable DATABASE_URL or the
        systemd credential `holloway-database-url` is read; without any, PostgreSQL is embedded.
    database_connections
        Connections to the database at most.
    api_connections
        Connections to the API at most; further ones are closed at once.
    drain_timeout_s
        How long a portal that was told to end waits for calls and agents to leave.
    observability
        `host:port` of /metrics, /healthz and /readyz; empty for none.
    log_format
        `text` for people or `json` for machines.
    log_level
        The least level that is logged.
    """

    state_dir: Path = Path("/var/lib/holloway")
    address: str = ""
    listen: str = f"[::]:{DEFAULT_PORT}"
    api_listen: str = f"[::]:{DEFAULT_PORT}"
    names: tuple[str, ...] = ()
    database_url_file: Path | None = None
    database_connections: int = 8
    api_connections: int = 512
    drain_timeout_s: float = 5.0
    observability: str = "127.0.0.1:9470"
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


@attrs.frozen(kw_only=True)
class Places:
    """What the settings say about addresses, checked: where to listen, what tokens name, and
    the names of the server certificate."""

    listen: Address
    api_listen: Address
    portal: str
    names: tuple[str, ...]


def check(settings: PortalSettings) -> Places:
    """Read the addresses and numbers of `settings`. Raises SettingsError."""
    listen = _address(settings.listen, "listen")
    api_listen = _address(settings.api_listen, "api_listen")
    for setting in ("database_connections", "api_connections"):
        if not 1 <= getattr(settings, setting) <= 100_000:
            raise SettingsError(f"{setting}: from 1 to 100000")
    if not 0 <= settings.drain_timeout_s <= 3_600:
        raise SettingsError("drain_timeout_s: from 0 to 3600")
    try:
        host, port = split_host_port(settings.address or _own_name(listen), DEFAULT_PORT)
    except ValueError as error:
        raise SettingsError(f"address: {error}") from None
    hosts = (host, listen.host, api_listen.host, "localhost", *settings.names)
    return Places(
        listen=listen,
        api_listen=api_listen,
        portal=join_host_port(host, port),
        names=tuple(dict.fromkeys(name for name in hosts if name not in ("0.0.0.0", "::"))),  # noqa: S104  # compared, not bound
    )


def _own_name(listen: Address) -> str:
    host = listen.host if listen.host not in ("0.0.0.0", "::") else socket.getfqdn()  # noqa: S104  # compared, not bound
    return join_host_port(host, listen.port)


def _address(text: str, setting: str) -> Address:
    try:
        return Address.parse(text)
    except ValueError as error:
        raise SettingsError(f"{setting}: {error}") from None
