"""The settings of a portal, from one definition: flags, HOLLOWAY_PORTAL_* variables, TOML keys."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal

import attrs

from channel.messages import DoorAddress
from runtime.cluster.membership import check_node_name
from runtime.net.address import Address, join_host_port, split_host_port

DEFAULT_PORT = 443
DEFAULT_STATE_DIR = Path("/var/lib/holloway")
MAX_PORT = 65_535
MAX_LOCAL_NODES = 64
ANY_PORT = 1
"""Stands for a port that is not known yet, of a node that has no others."""


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
        Address of the control channel, as `192.0.2.1:443` or `[::]:443`: QUIC on UDP and, for
        agents whose network blocks UDP, WebSocket on TCP.
    websocket
        Whether agents may come by WebSocket.
    api_listen
        Address of the JSON API (HTTPS, TCP). It may be that of `listen`: both are served there.
    names
        Further DNS names and IP addresses for the server certificate. It always names the hosts
        of `address`, `listen` and `api_listen`, and `localhost`.
    nodes
        How many nodes this command runs. One is this process; more are processes of their own on
        Ray, each with the ports of `listen`, `api_listen` and `observability` plus its number.
    node
        This node's name: letters, digits, dots and hyphens. No two nodes of an installation have
        the same. With several nodes it is followed by their numbers.
    node_address
        `host:port` by which agents reach this node's channel; by default the host of `listen` (if
        that is a wildcard, of `address`) with the port of `listen`. Agents learn those of all nodes
        once they have joined.
    link_listen
        Address at which other nodes reach this one (TCP), as `192.0.2.1:7400`. Without it the
        portal is one node. Nodes prove to each other that they know the cluster's secret.
    link_address
        Host, or `host:port`, by which other nodes reach `link_listen`, if that is another.
    cluster_secret_file
        File (mode 0600) with the secret that all nodes share; by default `cluster-secret` in the
        state directory, made at the first start. Copy it to the machines of all nodes.
    encryption_keys_file
        File (mode 0600) with the keys that seal secrets in the database. Otherwise the variable
        HOLLOWAY_ENCRYPTION_KEYS or the systemd credential `holloway-encryption-keys` is read;
        without any it is `encryption-keys` in the state directory, made at the first start. All
        nodes need the same keys.
    ray_address
        `host:port` of the head of a Ray on which to run the nodes. Without it, several nodes run on
        a Ray that this command starts and ends, on this machine alone.
    ray_token_file
        File (mode 0600) with that Ray's token.
    ray_tls_directory
        Directory with `tls.crt`, `tls.key` and `ca.crt`: needed for a Ray that is not on loopback.
    database_url_file
        File (mode 0600) with the URL of a PostgreSQL. Otherwise the variable DATABASE_URL or the
        systemd credential `holloway-database-url` is read; without any, PostgreSQL is embedded.
    database_connections
        Connections to the database at most.
    region_database
        File with the countries of addresses (MaxMind DB with `country.iso_code`, such as GeoLite2
        Country), for policies that ask for the region. Without it every region is unknown, and
        such policies let nobody in. A newer file in its place is read within a minute.
    api_connections
        Connections to the API at most. A further one takes the place of the oldest that is in no
        call, of whoever holds the most; where all are in calls it is closed at once.
    api_connections_per_source
        The same for one IPv4 address or IPv6 /64, among its own. Raise it where many come by one
        address.
    drain_timeout_s
        How long a portal that was told to end waits for calls and agents to leave.
    observability
        `host:port` of /metrics, /healthz and /readyz; empty for none.
    log_format
        `text` for people or `json` for machines.
    log_level
        The least level that is logged.
    """

    state_dir: Path = DEFAULT_STATE_DIR
    address: str = ""
    listen: str = f"[::]:{DEFAULT_PORT}"
    websocket: bool = True
    api_listen: str = f"[::]:{DEFAULT_PORT}"
    names: tuple[str, ...] = ()
    nodes: int = 1
    node: str = "portal"
    node_address: str = ""
    link_listen: str = ""
    link_address: str = ""
    cluster_secret_file: Path | None = None
    encryption_keys_file: Path | None = None
    ray_address: str = ""
    ray_token_file: Path | None = None
    ray_tls_directory: Path | None = None
    database_url_file: Path | None = None
    database_connections: int = 8
    region_database: Path | None = None
    api_connections: int = 512
    api_connections_per_source: int = 128
    drain_timeout_s: float = 5.0
    observability: str = "127.0.0.1:9470"
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


WebSocketPlace = Literal["nowhere", "own", "api"]
"""Where agents come by WebSocket: at a socket of their own, or where the API listens."""


@attrs.frozen(kw_only=True)
class Places:
    """What the settings say about addresses, checked: where to listen, what tokens name, and
    the names of the server certificate."""

    listen: Address
    api_listen: Address
    websocket: WebSocketPlace
    portal: str
    names: tuple[str, ...]
    link_listen: Address | None
    door: DoorAddress


def check(settings: PortalSettings) -> Places:
    """Read the addresses and numbers of `settings`. Raises SettingsError."""
    listen = _address(settings.listen, "listen")
    api_listen = _address(settings.api_listen, "api_listen")
    for setting in ("database_connections", "api_connections", "api_connections_per_source"):
        if not 1 <= getattr(settings, setting) <= 100_000:
            raise SettingsError(f"{setting}: from 1 to 100000")
    if not 0 <= settings.drain_timeout_s <= 3_600:
        raise SettingsError("drain_timeout_s: from 0 to 3600")
    try:
        host, port = split_host_port(settings.address or _own_name(listen), DEFAULT_PORT)
    except ValueError as error:
        raise SettingsError(f"address: {error}") from None
    if not 1 <= settings.nodes <= MAX_LOCAL_NODES:
        raise SettingsError(f"nodes: from 1 to {MAX_LOCAL_NODES}")
    try:
        check_node_name(settings.node)
    except ValueError as error:
        raise SettingsError(f"node: {error}") from None
    hosts = (host, listen.host, api_listen.host, "localhost", *settings.names)
    return Places(
        listen=listen,
        api_listen=api_listen,
        websocket=websocket_place(listen, api_listen) if settings.websocket else "nowhere",
        portal=join_host_port(host, port),
        names=tuple(dict.fromkeys(name for name in hosts if name not in ("0.0.0.0", "::"))),  # noqa: S104  # compared, not bound
        link_listen=_links(settings),
        door=_door(settings, listen, host),
    )


def websocket_place(listen: Address, api_listen: Address) -> WebSocketPlace:
    """Where WebSockets of the channel at `listen` are served. Raises SettingsError where that would
    be half of what the API's socket has, which no two sockets can share."""
    if listen.port != api_listen.port or not listen.port:
        return "own"
    if listen.host == api_listen.host or _contains(api_listen.host, listen.host):
        return "api"
    if _contains(listen.host, api_listen.host) or "::" in (listen.host, api_listen.host):
        raise SettingsError(
            f"api_listen: {api_listen} is a part of what listen has ({listen}), which serves"
            " WebSockets too: set another port, the same address, or websocket to false"
        )
    return "own"


def _contains(wildcard: str, host: str) -> bool:
    """Whether a socket at `wildcard` has what one at `host` would."""
    return wildcard == "::" or (wildcard == "0.0.0.0" and ":" not in host)  # noqa: S104  # compared


def of_node(settings: PortalSettings, number: int) -> PortalSettings:
    """The settings of the node of this number (from 1) of several that one command runs: each has
    a name and ports of its own. Raises SettingsError."""

    def moved(setting: str) -> str:
        text = getattr(settings, setting)
        if not text:
            return ""
        address = _address(text, setting)
        if not 0 < address.port <= MAX_PORT - MAX_LOCAL_NODES:
            raise SettingsError(f"{setting}: several nodes count on from a port")
        return str(Address(address.host, address.port + number - 1))

    return attrs.evolve(
        settings,
        nodes=1,
        node=f"{settings.node}-{number}",
        address=settings.address or _own_name(_address(settings.listen, "listen")),
        listen=moved("listen"),
        api_listen=moved("api_listen"),
        observability=moved("observability"),
        node_address=_moved_host(settings.node_address, number),
        link_listen=moved("link_listen") or "127.0.0.1:0",
    )


def _moved_host(text: str, number: int) -> str:
    """As `moved`, for an address that may have a name."""
    if not text:
        return ""
    try:
        host, port = split_host_port(text)
    except ValueError as error:
        raise SettingsError(f"node_address: {error}") from None
    return join_host_port(host, port + number - 1)


def _door(settings: PortalSettings, listen: Address, host: str) -> DoorAddress:
    wildcard = listen.host in ("0.0.0.0", "::")  # noqa: S104  # compared, not bound
    port = listen.port or ANY_PORT
    text = settings.node_address or join_host_port(host if wildcard else listen.host, port)
    try:
        return DoorAddress(text)
    except ValueError as error:
        raise SettingsError(f"node_address: {error}") from None


def _links(settings: PortalSettings) -> Address | None:
    """Where other nodes reach this one, and that they can."""
    if settings.link_address:
        try:
            split_host_port(settings.link_address, ANY_PORT)
        except ValueError as error:
            raise SettingsError(f"link_address: {error}") from None
    if not settings.link_listen:
        return None
    listen = _address(settings.link_listen, "link_listen")
    if listen.host in ("0.0.0.0", "::") and not settings.link_address:  # noqa: S104  # compared
        raise SettingsError("link_address: which address do other nodes reach link_listen by?")
    return listen


def _own_name(listen: Address) -> str:
    host = listen.host if listen.host not in ("0.0.0.0", "::") else socket.getfqdn()  # noqa: S104  # compared, not bound
    return join_host_port(host, listen.port)


def _address(text: str, setting: str) -> Address:
    try:
        return Address.parse(text)
    except ValueError as error:
        raise SettingsError(f"{setting}: {error}") from None
