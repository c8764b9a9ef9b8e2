"""The settings of a relay, from one definition: flags, HOLLOWAY_RELAY_* variables, TOML keys."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Final, Literal

import attrs

from channel.messages import MAX_ADDRESSES
from relays.fastpath.attaching import FastPathMode
from relays.turn import FAMILY_IPV4, FAMILY_IPV6
from runtime.net.address import Address

Transport = Literal["udp", "tcp", "tls", "quic"]

PORT: Final = 3478
TLS_PORT: Final = 5349
"""The ports of STUN and TURN over UDP and TCP, and over TLS (RFC 8656, section 6.2)."""
LOWEST_RELAYED_PORT = 1024
MAX_USER_BYTES: Final = 508
"""Of a USERNAME (RFC 8489, section 14.3)."""
MAX_PROCESSES: Final = 64
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
        Two IP addresses with the same two ports each also offer NAT behaviour discovery (RFC 5780).
    listen_tcp
        Addresses on which clients are served over TCP. Without it, those of `listen`; empty for
        none.
    listen_tls
        Addresses on which clients are served over TLS. Without it, port 5349 of the hosts that
        `listen` has with port 3478, except for a stand-alone relay without `tls_certificate`;
        empty for none. Networks that block all else let port 443 through: a relay with an IP
        address of its own is reached there.
    listen_quic
        Addresses on which clients are served over QUIC (a protocol of Holloway's own, see
        docs/turn-over-quic.md). Without it, the same addresses as for TLS, on UDP, except for a
        stand-alone relay; empty for none.
    tls_certificate
        File with the certificate for TLS and QUIC and its chain (PEM). It is looked at every 5 s,
        and on SIGHUP: a new one serves from then on. Without it, the relay makes one of its own at
        its start, which agents know from the portal.
    tls_key
        File with the key of `tls_certificate` (PEM, mode 0600, not encrypted).
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
        Serve without a portal: users are `user` and those of `users_file`, and MD5 credentials are
        allowed.
    user
        For `standalone`: name of a user. The password is in `password_file`, or the variable
        HOLLOWAY_RELAY_PASSWORD, or the systemd credential `holloway-relay-password`, or is asked
        for at the terminal, since every user of a machine can read command lines. Several users
        given so have the same.
    password_file
        For `user`: file with the password (mode 0600).
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
        /56 over UDP; twice as many at once.
    max_connections
        Connections over TCP and TLS in all. Where all are taken, the oldest without an allocation
        ends for a new one.
    max_connections_per_prefix
        Connections of one IPv4 /24 or IPv6 /56.
    connections_per_second
        New connections that are taken each second of one IPv4 /24 or IPv6 /56; four times as many
        at once.
    processes
        How many processes serve, each on a core of its own at best; 0 for one on each core. Of
        what all clients share each has a part: relayed ports, limits of allocations and answers.
    compiled_drain
        Move data by the compiled drain, where it was built; otherwise in Python.
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
    listen_tcp: tuple[str, ...] | None = None
    listen_tls: tuple[str, ...] | None = None
    listen_quic: tuple[str, ...] | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    relay_address: tuple[str, ...] = ()
    external_ip: tuple[str, ...] = ()
    relayed_ports: str = "49152-65535"
    token_file: Path | None = None
    name: str = attrs.field(factory=socket.gethostname)
    region: str = ""
    failure_domain: str = ""
    standalone: bool = False
    user: tuple[str, ...] = ()
    password_file: Path | None = None
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
    max_connections: int = 16_384
    max_connections_per_prefix: int = 2_048
    connections_per_second: int = 100
    processes: int = 1
    compiled_drain: bool = True
    drain_timeout_s: float = 60.0
    fast_path: FastPathMode = "off"
    fast_path_device: tuple[str, ...] = ()
    observability: str = "127.0.0.1:9478"
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


@attrs.frozen(kw_only=True)
class Addresses:
    """What the settings say about addresses, checked.

    `listen_by_transport` says where to listen, `announced` what agents are told of it, as pairs of
    transport and address; both begin with `udp`. `bind_hosts` and `told_hosts` map a family (1:
    IPv4, 2: IPv6) to the local address of relayed ports and to what clients are told.
    """

    listen_by_transport: dict[Transport, tuple[Address, ...]]
    announced: tuple[tuple[Transport, Address], ...]
    bind_hosts: dict[int, str]
    told_hosts: dict[int, str]
    external_hosts: frozenset[str]
    first_port: int
    last_port: int
    alternate_servers: dict[int, Address]


def check(settings: RelaySettings) -> Addresses:
    """Read the addresses of `settings`. Raises SettingsError."""
    _check_users(settings)
    _check_the_rest(settings)
    listen_by_transport = _listen_by_transport(settings)
    listen = listen_by_transport["udp"]
    if not listen:
        raise SettingsError("listen: at least one address is needed")
    everywhere = [each for addresses in listen_by_transport.values() for each in addresses]
    bind_hosts = _bind_hosts(settings, everywhere)
    external_by_local = _external_by_local(settings, bind_hosts)
    told_hosts = {family: external_by_local.get(host, host) for family, host in bind_hosts.items()}
    announced = []
    for transport, addresses in listen_by_transport.items():
        for address in addresses:
            host = bind_hosts[_family(address.host)] if _is_any(address.host) else address.host
            announced.append((transport, Address(external_by_local.get(host, host), address.port)))
    if len(announced) > MAX_ADDRESSES and not settings.standalone:
        raise SettingsError(f"listen: at most {MAX_ADDRESSES} addresses of all transports together")
    first_port, last_port = _port_range(settings.relayed_ports)
    alternates = [_parse(text, "alternate_server") for text in settings.alternate_server]
    return Addresses(
        listen_by_transport=listen_by_transport,
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


def _check_users(settings: RelaySettings) -> None:
    if settings.standalone and settings.users_file is None and not settings.user:
        raise SettingsError("user, users_file: a stand-alone relay needs its users")
    if settings.user and not settings.standalone:
        raise SettingsError("user: only a stand-alone relay has users of its own")
    for name in settings.user:
        if not name.isprintable() or ":" in name or not 0 < len(name.encode()) <= MAX_USER_BYTES:
            raise SettingsError(f"user: 1 to {MAX_USER_BYTES} bytes, printable and without a colon")
    if settings.password_file is not None and not settings.user:
        raise SettingsError("password_file: whose is it? Set user")


def _check_the_rest(settings: RelaySettings) -> None:
    if not 0 <= settings.processes <= MAX_PROCESSES:
        raise SettingsError(f"processes: 0 to {MAX_PROCESSES}")
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


def _listen_by_transport(settings: RelaySettings) -> dict[Transport, tuple[Address, ...]]:
    udp = tuple(_parse(text, "listen") for text in settings.listen)
    tcp, tls = udp, tuple(Address(each.host, TLS_PORT) for each in udp if each.port == PORT)
    if settings.standalone and settings.tls_certificate is None:
        tls = ()  # nobody could know the certificate that the relay would make
    if settings.listen_tcp is not None:
        tcp = tuple(_parse(text, "listen_tcp") for text in settings.listen_tcp if text)
    if settings.listen_tls is not None:
        tls = tuple(_parse(text, "listen_tls") for text in settings.listen_tls if text)
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise SettingsError("tls_certificate, tls_key: both or neither")
    if settings.tls_certificate is not None and not (tls or settings.listen_quic):
        raise SettingsError("tls_certificate: nothing shows it, set listen_tls or listen_quic")
    if both := {each for each in tcp if each in tls and each.port}:
        raise SettingsError(f"listen_tcp, listen_tls: {min(both)} cannot be both")
    quic = () if settings.standalone else tls
    if settings.listen_quic is not None:
        quic = tuple(_parse(text, "listen_quic") for text in settings.listen_quic if text)
    if both := {each for each in udp if each in quic and each.port}:
        raise SettingsError(f"listen, listen_quic: {min(both)} cannot be both")
    return {"udp": udp, "tcp": tcp, "tls": tls, "quic": quic}


def _bind_hosts(settings: RelaySettings, listen: Sequence[Address]) -> dict[int, str]:
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
