"""The settings of a relay, from one definition: flags, HOLLOWAY_RELAY_* variables, TOML keys."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Literal

import attrs

from relays.fastpath.attaching import FastPathMode
from relays.turn import FAMILY_IPV4, FAMILY_IPV6
from runtime.net.address import Address

LOWEST_RELAYED_PORT = 1024
MAX_PLACE_LENGTH = 64
"""Characters of a region or a failure domain, as the portal takes them."""


class SettingsError(ValueError):
    """The settings contradict each other or lack something; the message names the setting."""


@attrs.frozen(kw_only=True)
class RelaySettings:
    """Where a relay listens, whom it serves, and how much it gives.

    Parameters
    ----------
    listen
        Addresses on which clients are served over UDP, as `192.0.2.1:3478` or `[2001:db8::1]:3478`.
    relay_address
        IP addresses of this machine on which relayed ports are opened, at most one of each
        family. Without it, the hosts of `listen`, which then have to be real addresses.
    external_ip
        For a relay behind one-to-one NAT: the public address by which a local one is known, as
        `PUBLIC` or `PUBLIC/LOCAL`. Clients and the portal are told the public one.
    relayed_ports
        Range of ports for allocations, `first-last`.
    token_file
        File with the relay's token (mode 0600). Otherwise the variable HOLLOWAY_RELAY_TOKEN or
        the systemd credential `holloway-relay-token` is read.
    name
        Name under which the relay is shown; the host name otherwise.
    region
        The country where the relay is (ISO 3166-1 alpha-2, such as `DE`), or any name of a place.
        The portal prefers relays in an agent's country; without a country here it looks the
        relay's address up.
    failure_domain
        A name for what fails together: relays of one rack, provider or line have the same. The
        portal gives each agent relays of different ones. Without it, the region is meant, and
        without that the network (IPv4 /24, IPv6 /64) of the first address.
    standalone
        Serve without a portal: users come from `users_file`, and MD5 credentials are allowed.
    users_file
        For `standalone`: lines of `user:password` (mode 0600, at most 16 KiB).
    realm
        For `standalone`: the realm. One longer than 8 characters leaves a bare request of a
        client unanswered, since an answer is never more than twice as large.
    allow_private_peers
        Also relay to 10/8, 172.16/12, 192.168/16 and fc00::/7.
    allowed_peer_ranges
        Networks in CIDR form that are allowed as peers beyond the default, for laboratories.
    alternate_server
        Where clients are sent while this relay drains (300 Try Alternate), at most one of each
        family. Without it they get 508 Insufficient Capacity.
    max_allocations
        Allocations in all. Each needs an open file; the limit of open files is raised if allowed.
    max_allocations_per_user
        Allocations of one user name (486 beyond).
    max_allocations_per_source
        Allocations of one IPv4 address or one IPv6 /56 (486 beyond).
    max_permissions
        Permissions of one allocation (508 beyond).
    max_channels
        Channels of one allocation (508 beyond).
    unauthenticated_per_second
        Requests without valid credentials that are answered each second to one IPv4 /24 or IPv6
        /56; twice as many at once.
    drain_timeout_s
        How long a relay that was told to end waits for agents to leave.
    fast_path
        Have the kernel relay the data of channels by an XDP program at the network devices:
        `driver` (run by the device's driver), `generic` (by the kernel), `auto` (the better one
        that works), or `off`. Without the rights or the kernel for it all goes the usual way.
        Packets that it relays do not pass the machine's packet filter.
    fast_path_device
        Network devices for `fast_path`; otherwise those that have the relay's addresses.
    observability
        `host:port` of /metrics, /healthz and /readyz; empty for none.
    log_format
        `text` for people or `json` for machines.
    log_level
        The least level that is logged.
    """

    listen: tuple[str, ...] = ("0.0.0.0:3478",)
    relay_address: tuple[str, ...] = ()
    external_ip: tuple[str, ...] = ()
    relayed_ports: str = "49152-65535"
    token_file: Path | None = None
    name: str = attrs.field(factory=socket.gethostname)
    region: str = ""
    failure_domain: str = ""
    standalone: bool = False
    users_file: Path | None = None
    realm: str = "holloway"
    allow_private_peers: bool = False
    allowed_peer_ranges: tuple[str, ...] = ()
    alternate_server: tuple[str, ...] = ()
    max_allocations: int = 20_000
    max_allocations_per_user: int = 64
    max_allocations_per_source: int = 4096
    max_permissions: int = 1024
    max_channels: int = 1024
    unauthenticated_per_second: int = 100
    drain_timeout_s: float = 60.0
    fast_path: FastPathMode = "off"
    fast_path_device: tuple[str, ...] = ()
    observability: str = "127.0.0.1:9478"
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


@attrs.frozen(kw_only=True)
class Addresses:
    """What the settings say about addresses, checked: `bind_hosts` and `told_hosts` map a family
    (1: IPv4, 2: IPv6) to the local address of relayed ports and to what clients are told."""

    listen: tuple[Address, ...]
    announced: tuple[Address, ...]
    bind_hosts: dict[int, str]
    told_hosts: dict[int, str]
    external_hosts: frozenset[str]
    first_port: int
    last_port: int
    alternate_servers: dict[int, Address]


def check(settings: RelaySettings) -> Addresses:
    """Read the addresses of `settings`. Raises SettingsError."""
    if settings.standalone and settings.users_file is None:
        raise SettingsError("users_file: a stand-alone relay needs its users")
    listen = tuple(_parse(text, "listen") for text in settings.listen)
    if not listen:
        raise SettingsError("listen: at least one address is needed")
    bind_hosts = _bind_hosts(settings, listen)
    external_by_local = _external_by_local(settings, bind_hosts)
    told_hosts = {family: external_by_local.get(host, host) for family, host in bind_hosts.items()}
    announced = []
    for address in listen:
        host = bind_hosts[_family(address.host)] if _is_any(address.host) else address.host
        announced.append(Address(external_by_local.get(host, host), address.port))
    first_port, last_port = _port_range(settings.relayed_ports)
    alternates = [_parse(text, "alternate_server") for text in settings.alternate_server]
    for setting, text in (
        ("region", settings.region),
        ("failure_domain", settings.failure_domain),
    ):
        if len(text) > MAX_PLACE_LENGTH or not text.isprintable():
            raise SettingsError(f"{setting}: up to {MAX_PLACE_LENGTH} printable characters")
    for text in settings.allowed_peer_ranges:
        try:
            ip_network(text)
        except ValueError as error:
            raise SettingsError(f"allowed_peer_ranges: {error}") from None
    return Addresses(
        listen=listen,
        announced=tuple(announced),
        bind_hosts=bind_hosts,
        told_hosts=told_hosts,
        external_hosts=frozenset(external_by_local.values()),
        first_port=first_port,
        last_port=last_port,
        alternate_servers={_family(one.host): one for one in alternates},
    )


def parse_users(text: str) -> dict[str, str]:
    """Lines of `user:password`; empty lines and lines that begin with # are skipped.

    Raises SettingsError, which never quotes the text.
    """
    users = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        username, colon, password = line.strip().partition(":")
        if not (colon and username and password):
            raise SettingsError(f"users_file: line {number} is not user:password")
        users[username] = password
    if not users:
        raise SettingsError("users_file: there is no user in it")
    return users


def _bind_hosts(settings: RelaySettings, listen: tuple[Address, ...]) -> dict[int, str]:
    hosts = [_parse_host(text, "relay_address") for text in settings.relay_address]
    if not hosts:
        hosts = [address.host for address in listen if not _is_any(address.host)]
    by_family: dict[int, str] = {}
    for host in hosts:
        by_family.setdefault(_family(host), host)
    for address in listen:
        if _family(address.host) not in by_family and _is_any(address.host):
            raise SettingsError(
                f"relay_address: say which address of this machine is meant by {address}"
            )
    return by_family


def _external_by_local(settings: RelaySettings, bind_hosts: dict[int, str]) -> dict[str, str]:
    external_by_local = {}
    for text in settings.external_ip:
        public, slash, local = text.partition("/")
        public = _parse_host(public, "external_ip")
        if slash:
            local = _parse_host(local, "external_ip")
        else:
            local = bind_hosts.get(_family(public), "")
        if not local:
            raise SettingsError(f"external_ip: there is no relay address of the family of {public}")
        external_by_local[local] = public
    return external_by_local


def _port_range(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        raise SettingsError("relayed_ports: first-last is needed")
    if not LOWEST_RELAYED_PORT <= int(first) < int(last) <= 65_535:
        raise SettingsError(f"relayed_ports: within {LOWEST_RELAYED_PORT}-65535, in rising order")
    return int(first), int(last)


def _parse(text: str, setting: str) -> Address:
    try:
        return Address.parse(text)
    except ValueError as error:
        raise SettingsError(f"{setting}: {error}") from None


def _parse_host(text: str, setting: str) -> str:
    try:
        return Address.of(text, 0).host
    except ValueError as error:
        raise SettingsError(f"{setting}: {error}") from None


def _family(host: str) -> int:
    return FAMILY_IPV6 if ":" in host else FAMILY_IPV4


def _is_any(host: str) -> bool:
    return ip_address(host).is_unspecified
