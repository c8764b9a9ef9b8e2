"""The messages of the control channel: what an agent and the portal say to each other.

Every message is a frozen attrs class that travels as the JSON payload of one frame
(see `channel.frames`). The classes are grouped by direction in `FROM_CLIENT`, `FROM_GATEWAY`,
`FROM_RELAY`, `TO_CLIENT`, `TO_GATEWAY` and `TO_RELAY`: dictionaries of event name to class.
An event that is not in the receiver's dictionary is ignored and counted.

Durations are integer nanoseconds counted from the moment of sending (a wrong clock on an agent
never extends access). Byte strings travel as base64. Limits are part of the types: a value that
breaks one is refused by the codec.

(The file has more lines than others: it is the one list of all that can be said.)
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Annotated, Literal
from uuid import UUID

import attrs
from msgspec import Meta

from runtime.net.address import join_host_port, split_host_port

PROTOCOL_VERSION = 1
OLDEST_VERSION = 1
"""The portal speaks all versions from this one on, an agent those of its `join`."""

# Text may end up on a terminal or in a log of the far end: no control characters (C0, DEL, C1).
PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\ud800-\udfff]*\Z"
Name = Annotated[str, Meta(min_length=1, max_length=255, pattern=PRINTABLE)]
Text = Annotated[str, Meta(max_length=1024, pattern=PRINTABLE)]
DurationNs = Annotated[int, Meta(ge=0, le=400 * 86_400 * 10**9)]
Port = Annotated[int, Meta(ge=1, le=65_535)]
Key32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Nonce = Annotated[bytes, Meta(min_length=16, max_length=64)]
CertificatePin = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""SHA-256 of a certificate's SubjectPublicKeyInfo (DER), in hexadecimal."""


class IpText(str):
    """An IPv4 or IPv6 address in its canonical text form, without a scope id.

    Raises ValueError for anything else. It is a `str`, so it serves as a socket address as it is.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> IpText:
        return super().__new__(cls, _canonical_ip(text))


@lru_cache(maxsize=4_096)  # the same few come in message after message
def _canonical_ip(text: str) -> str:
    address = ip_address(text)
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise ValueError("an address with a scope id means nothing to another machine")
    return str(address)


_LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
_NUMBER = r"(?:[0-9]+|0[xX][0-9A-Fa-f]*)"
# A name whose last label is a number is an old way to write an IPv4 address.
_DNS_NAME = re.compile(rf"(?!(?:.*\.)?{_NUMBER}\Z)(?:{_LABEL}\.)*{_LABEL}\Z")


class DoorAddress(str):
    """`host:port` of a node's channel listener: an IP address (IPv6 in brackets) or a DNS name, in
    canonical form, and a port of 1 to 65535. Raises ValueError for anything else."""

    __slots__ = ()

    def __new__(cls, text: str) -> DoorAddress:
        host, port = split_host_port(text)
        if port < 1:
            raise ValueError("port 0 is no door")
        try:
            host = IpText(host)
        except ValueError:
            if not _DNS_NAME.match(host):
                raise ValueError("neither an IP address nor a DNS name") from None
            host = host.lower()
        return super().__new__(cls, join_host_port(host, port))


MAX_CANDIDATES = 32
MAX_RESOURCES = 10_000
MAX_AUTHORIZATIONS = 50_000
MAX_RELAYS = 16
MAX_FILTERS = 64
MAX_ADDRESSES = 16
MAX_DOORS = 64
MAX_FACTS = 32
MAX_DNS_UPSTREAMS = 8
MAX_CERTIFICATE_PINS = 4


# --- values ------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class IceCredentials:
    """ICE user fragment (48 bits) and password (192 bits) in ice-chars (RFC 8839, section 5.4)."""

    fragment: Annotated[str, Meta(pattern=r"^[A-Za-z0-9+/]{8}$(?!\n)")]
    password: Annotated[str, Meta(pattern=r"^[A-Za-z0-9+/]{32}$(?!\n)")] = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class IceParameters:
    """The ICE credentials of both ends of one connection; made by the portal."""

    client: IceCredentials
    gateway: IceCredentials


@attrs.frozen(kw_only=True)
class Candidate:
    """One ICE candidate (RFC 8445, section 5.1). `base` is the address it was gathered from."""

    kind: Literal["host", "srflx", "prflx", "relay"]
    address: IpText
    port: Port
    priority: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    foundation: Annotated[str, Meta(pattern=r"^[A-Za-z0-9+/]{1,32}$(?!\n)")]


@attrs.frozen(kw_only=True)
class Interface:
    """What an agent's TUN device carries: its own two addresses and the account's tunnel ranges."""

    ipv4: IPv4Address
    ipv6: IPv6Address
    range_ipv4: IPv4Network
    range_ipv6: IPv6Network
    mtu: Annotated[int, Meta(ge=1280, le=9000)] = 1280


@attrs.frozen(kw_only=True)
class DnsUpstream:
    """A resolver for names that are no resource: Do53 at an address (and port), or a DoH URL."""

    kind: Literal["do53", "doh"]
    address: Annotated[str, Meta(pattern=r"^[!-~]{1,512}\Z")]


@attrs.frozen(kw_only=True)
class NameSettings:
    """How the account has names resolved: `names_*` hold the addresses that a client hands out for
    names of resources, its own resolver answers at `resolver_ipv4`. No upstream: the system's."""

    names_ipv4: IPv4Network
    names_ipv6: IPv6Network
    resolver_ipv4: IPv4Address
    search_domain: (
        Annotated[str, Meta(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?\Z")] | None
    ) = None
    upstreams: Annotated[tuple[DnsUpstream, ...], Meta(max_length=MAX_DNS_UPSTREAMS)] = ()


@attrs.frozen(kw_only=True)
class SocketAddress:
    """An IP address and a port of one transport."""

    address: IpText
    port: Port
    transport: Literal["udp", "tcp", "tls", "quic"] = "udp"


@attrs.frozen(kw_only=True)
class RelayServer:
    """A relay that an agent may use, with credentials made for this agent and this relay alone.

    `addresses` may be of any transport; an agent passes over those that it does not speak. At those
    of `tls` and `quic` the relay shows a certificate with one of `certificate_pins`; neither its
    chain nor its name nor its dates are looked at, and without pins they are not to be used.
    """

    id: UUID
    addresses: Annotated[tuple[SocketAddress, ...], Meta(min_length=1, max_length=MAX_ADDRESSES)]
    username: Name
    password: Name = attrs.field(repr=False)
    expires_in_ns: DurationNs
    certificate_pins: Annotated[
        tuple[CertificatePin, ...], Meta(max_length=MAX_CERTIFICATE_PINS)
    ] = ()


@attrs.frozen(kw_only=True)
class Filter:
    """Traffic that a resource accepts. No filter at all means everything. ICMP has no ports."""

    protocol: Literal["tcp", "udp", "icmp"]
    port_start: Annotated[int, Meta(ge=0, le=65_535)] = 0
    port_end: Annotated[int, Meta(ge=0, le=65_535)] = 65_535


@attrs.frozen(kw_only=True)
class Resource:
    """A resource as agents see it: `address` is a network (`cidr`, `ip`) or a pattern (`dns`)."""

    id: UUID
    name: Name
    kind: Literal["cidr", "ip", "dns", "internet"]
    address: Annotated[str, Meta(max_length=253, pattern=PRINTABLE)]
    filters: Annotated[tuple[Filter, ...], Meta(max_length=MAX_FILTERS)] = ()


@attrs.frozen(kw_only=True)
class Peer:
    """The far end of a tunnel: who it is, its WireGuard public key, its tunnel addresses."""

    id: UUID
    public_key: Key32
    ipv4: IPv4Address
    ipv6: IPv6Address
    name: Name = "unnamed"


@attrs.frozen(kw_only=True)
class Held:
    """An authorisation that an agent says it holds, and of which portal `epoch` it learned it."""

    authorization_id: UUID
    connection_id: UUID


# --- both directions ---------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Heartbeat:
    """Sent by an agent every 10 s; the portal answers with the same `sent_ns`."""

    sent_ns: Annotated[int, Meta(ge=0)] = 0


@attrs.frozen(kw_only=True)
class Candidates:
    """Trickled candidates of one connection. The sender is known from the channel alone.

    `generation` rises each time the sender gathers anew; a receiver drops older generations.
    `remove` names candidates of the same generation that are gone. `wants_answer`: the sender
    joined anew and may have missed some, so the receiver is to tell all of its own again.
    """

    connection_id: UUID
    generation: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    add: Annotated[tuple[Candidate, ...], Meta(max_length=MAX_CANDIDATES)] = ()
    remove: Annotated[tuple[Candidate, ...], Meta(max_length=MAX_CANDIDATES)] = ()
    wants_answer: bool = False


MAX_FLOWS = 64
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


@attrs.frozen(kw_only=True)
class ReportedFlow:
    """A part of a flow that this side of a tunnel carried, as it counted it: each packet is in one
    part only. `sent` is from the client to the resource. `name` is what the client asked for, where
    the resource has names; ICMP has the ports 0. Both instants are said as how long ago they were:
    no clock has to be right.

    `ending`: empty for a flow that goes on, else why it ended (`closed`, `idle`, `revoked`, `lost`,
    `stopped`; there may be others one day). `flows`: how many flows this tells the end of: 0 for a
    part; more than 1 for the sum of several, which has the ports 0 and no destination (`0.0.0.0`
    or `::`). Agents that do not know these two tell of ended flows only.
    """

    authorization_id: UUID
    protocol: Literal["tcp", "udp", "icmp"]
    source: IpText
    source_port: Annotated[int, Meta(ge=0, le=65_535)] = 0
    destination: IpText
    destination_port: Annotated[int, Meta(ge=0, le=65_535)] = 0
    name: Annotated[str, Meta(max_length=253, pattern=PRINTABLE)] = ""
    began_ns_ago: DurationNs
    ended_ns_ago: DurationNs
    packets_sent: Count = 0
    packets_received: Count = 0
    bytes_sent: Count = 0
    bytes_received: Count = 0
    ending: Annotated[str, Meta(pattern=r"^[a-z_]{0,32}$(?!\n)")] = ""
    flows: Count = 1


@attrs.frozen(kw_only=True)
class FlowReport:
    """Parts of flows. They count only if an authorisation of the sender carried them, which is
    live or ended in the last quarter of an hour."""

    flows: Annotated[tuple[ReportedFlow, ...], Meta(max_length=MAX_FLOWS)]


# --- joining -----------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Challenge:
    """First frame of the portal on a new connection: what a join has to sign."""

    nonce: Nonce
    portal: Name
    versions: tuple[int, int] = (OLDEST_VERSION, PROTOCOL_VERSION)


@attrs.frozen(kw_only=True)
class Join:
    """First frame of a client or gateway. `versions` is an inclusive range.

    `signature` is Ed25519 by `device_key` over `channel.credentials.join_statement(...)`:
    "holloway/1 join", the portal's nonce and name, the token's id and the tunnel key.
    `incarnation` rises with every start and every reconnection of the agent's process.
    With `held_follow` the portal asks for the rest of what is held by `HeldWanted`.
    """

    kind: Literal["client", "gateway"]
    versions: tuple[int, int] = (PROTOCOL_VERSION, PROTOCOL_VERSION)
    software: Name = "holloway"
    token: Annotated[str, Meta(min_length=1, max_length=2048)] = attrs.field(repr=False)
    device_key: Key32
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]
    tunnel_key: Key32
    name: Name
    incarnation: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    held: Annotated[tuple[Held, ...], Meta(max_length=MAX_AUTHORIZATIONS)] = ()
    held_follow: bool = False


@attrs.frozen(kw_only=True)
class HeldWanted:
    """The portal has checked who joins, and wants the next `MoreHeld`.

    It may ask for several before the first has come; an agent that has no more ignores it."""


@attrs.frozen(kw_only=True)
class MoreHeld:
    """Further held authorisations of a join; `more` says whether these are the last."""

    held: Annotated[tuple[Held, ...], Meta(max_length=MAX_AUTHORIZATIONS)]
    more: bool


@attrs.frozen(kw_only=True)
class RelayJoin:
    """First frame of a relay: where it listens, and the secret from which credentials are made.

    Relays that fail together (a rack, a provider) name the same `failure_domain`; without one the
    portal takes the region, or else the network. `certificate_pins` are of the certificates that
    it shows at its addresses of `tls` and `quic`: a relay with another certificate joins anew.
    """

    versions: tuple[int, int] = (PROTOCOL_VERSION, PROTOCOL_VERSION)
    software: Name = "holloway"
    token: Annotated[str, Meta(min_length=1, max_length=2048)] = attrs.field(repr=False)
    addresses: Annotated[tuple[SocketAddress, ...], Meta(min_length=1, max_length=MAX_ADDRESSES)]
    stamp_secret: Key32 = attrs.field(repr=False)
    name: Name
    region: Annotated[str, Meta(max_length=64, pattern=PRINTABLE)] = ""
    failure_domain: Annotated[str, Meta(max_length=64, pattern=PRINTABLE)] = ""
    incarnation: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    load: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    certificate_pins: Annotated[
        tuple[CertificatePin, ...], Meta(max_length=MAX_CERTIFICATE_PINS)
    ] = ()


RefusalCode = Literal[
    "invalid_token",
    "token_expired",
    "invalid_signature",
    "version_unsupported",
    "account_disabled",
    "limits_exceeded",
    "awaiting_approval",
    "superseded",
    "protocol_error",
    "unavailable",
    "draining",
    "shutting_down",
]


@attrs.frozen(kw_only=True)
class Disconnect:
    """Last frame of the portal. `retry` says whether to dial again, `retry_after_ns` how soon.

    `door` is of the node that can serve this agent: to be tried first, and at once.
    """

    reason: RefusalCode
    detail: Text = ""
    retry: bool
    retry_after_ns: DurationNs = 0
    door: DoorAddress | None = None


@attrs.frozen(kw_only=True)
class Portals:
    """The doors of all nodes of the portal that take agents now, in no order that means anything.

    It replaces what was said before. The door of the agent's token stays one, named or not.
    """

    addresses: Annotated[tuple[DoorAddress, ...], Meta(min_length=1, max_length=MAX_DOORS)]


# --- client ------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class RequestAuthorization:
    """A client asks for a resource.

    `kem_public_key` is an ML-KEM-768 encapsulation key (1184 bytes), for a new connection.
    `connected_gateway_ids`: gateways to which the client holds a working connection;
    `failed_gateway_ids`: gateways that it could not reach or lost within the last minute.
    """

    resource_id: UUID
    kem_public_key: Annotated[bytes, Meta(min_length=1184, max_length=1184)]
    connected_gateway_ids: Annotated[tuple[UUID, ...], Meta(max_length=64)] = ()
    failed_gateway_ids: Annotated[tuple[UUID, ...], Meta(max_length=64)] = ()


@attrs.frozen(kw_only=True)
class ReportedFact:
    """One thing that a device knows of itself, such as `os_version` "14.2"."""

    name: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,63}\Z")]
    value: (
        bool
        | Annotated[int, Meta(ge=0, le=2**63 - 1)]
        | Annotated[str, Meta(max_length=255, pattern=PRINTABLE)]
    )


@attrs.frozen(kw_only=True)
class Posture:
    """All that a client's device reports of itself, after each `init` and whenever it is another.
    What is not named is not known (any more); of a name that comes twice the last one counts."""

    facts: Annotated[tuple[ReportedFact, ...], Meta(max_length=MAX_FACTS)]


@attrs.frozen(kw_only=True)
class LiveAuthorization:
    """An authorisation that still holds, as told on a rejoin."""

    authorization_id: UUID
    connection_id: UUID
    resource_id: UUID
    expires_in_ns: DurationNs


@attrs.frozen(kw_only=True)
class ClientInit:
    """The truth for a client after its join. Held authorisations that are absent are revoked."""

    account_id: UUID
    client_id: UUID
    interface: Interface
    resources: Annotated[tuple[Resource, ...], Meta(max_length=MAX_RESOURCES)]
    relays: Annotated[tuple[RelayServer, ...], Meta(max_length=MAX_RELAYS)]
    authorizations: Annotated[tuple[LiveAuthorization, ...], Meta(max_length=MAX_AUTHORIZATIONS)]
    names: NameSettings | None = None


@attrs.frozen(kw_only=True)
class ConfigChanged:
    """The account's settings are others now: both values replace those of the `init`. A client
    whose interface changes with that holds nothing any more."""

    interface: Interface
    names: NameSettings


@attrs.frozen(kw_only=True)
class ResourceUpserted:
    resource: Resource


@attrs.frozen(kw_only=True)
class ResourceRemoved:
    resource_id: UUID


@attrs.frozen(kw_only=True)
class Relays:
    """Relays to use from now on, and those to leave."""

    added: Annotated[tuple[RelayServer, ...], Meta(max_length=MAX_RELAYS)] = ()
    removed: Annotated[tuple[UUID, ...], Meta(max_length=MAX_RELAYS)] = ()


@attrs.frozen(kw_only=True)
class AuthorizationCreated:
    """A client may reach a resource through this gateway.

    `kem_ciphertext` (1088 bytes) is present exactly when `connection_id` is a new connection;
    otherwise the resource is added to the connection that the client already has.
    """

    authorization_id: UUID
    connection_id: UUID
    resource_id: UUID
    gateway: Peer
    ice: IceParameters
    kem_ciphertext: Annotated[bytes, Meta(max_length=1088)] | None = None
    expires_in_ns: DurationNs


DenialReason = Literal["forbidden", "offline", "not_found", "unavailable", "limits_exceeded"]


@attrs.frozen(kw_only=True)
class AuthorizationDenied:
    """Why not: `offline` no gateway answered, `forbidden` with every violated property, never
    its value; `not_found`; `unavailable` with a time to ask again."""

    resource_id: UUID
    reason: DenialReason
    violated: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    retry_after_ns: DurationNs = 0


@attrs.frozen(kw_only=True)
class AuthorizationRenewed:
    """The lease of an authorisation now ends `expires_in_ns` from now."""

    authorization_id: UUID
    expires_in_ns: DurationNs


@attrs.frozen(kw_only=True)
class AuthorizationRevoked:
    authorization_id: UUID
    resource_id: UUID
    reason: Text = ""


# --- gateway -----------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class GatewayInit:
    """The truth for a gateway after its join. Held authorisations that are absent are revoked."""

    account_id: UUID
    gateway_id: UUID
    interface: Interface
    relays: Annotated[tuple[RelayServer, ...], Meta(max_length=MAX_RELAYS)]
    authorizations: Annotated[tuple[LiveAuthorization, ...], Meta(max_length=MAX_AUTHORIZATIONS)]


@attrs.frozen(kw_only=True)
class Authorize:
    """Let this client reach this resource. Carries a frame `ref`; answered by `Ack`.

    With `kem_public_key` a new connection is to be made (one that `connection_id` already names
    is kept); without it the connection exists and the resource joins it.
    """

    authorization_id: UUID
    connection_id: UUID
    client: Peer
    resource: Resource
    ice: IceParameters
    kem_public_key: Annotated[bytes, Meta(min_length=1184, max_length=1184)] | None = None
    expires_in_ns: DurationNs


@attrs.frozen(kw_only=True)
class Ack:
    """A gateway's answer to `Authorize`, with the same frame `ref`.

    `refusal` is empty when accepted; `ceiling` when the gateway's own --allow forbids it;
    `unsupported` when this gateway cannot serve such a resource.
    """

    authorization_id: UUID
    kem_ciphertext: Annotated[bytes, Meta(min_length=1088, max_length=1088)] | None = None
    refusal: Literal["", "ceiling", "limits_exceeded", "unknown_connection", "unsupported"] = ""


@attrs.frozen(kw_only=True)
class Revoke:
    authorization_id: UUID
    reason: Text = ""


@attrs.frozen(kw_only=True)
class ResourceUpdated:
    """Filters of a live resource changed; its address and kind never do (that is a revocation)."""

    resource: Resource


@attrs.frozen(kw_only=True)
class Stats:
    """A gateway's load: live connections, and bytes forwarded since its start."""

    connections: Annotated[int, Meta(ge=0)]
    bytes_in: Annotated[int, Meta(ge=0)]
    bytes_out: Annotated[int, Meta(ge=0)]


# --- relay -------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class RelayInit:
    relay_id: UUID


@attrs.frozen(kw_only=True)
class Load:
    allocations: Annotated[int, Meta(ge=0)]
    load: Annotated[float, Meta(ge=0.0, le=1.0)]


@attrs.frozen(kw_only=True)
class Rejoining:
    """The last frame of a relay that comes back at once, with other certificates: its allocations
    stand, so agents are not to leave it meanwhile."""


@attrs.frozen(kw_only=True)
class Drain:
    """Accept no new allocation; agents are being moved."""


@attrs.frozen(kw_only=True)
class RevokeUser:
    """End the allocations of user names that end in `user` (what follows their colon), and give
    no others to it: an agent lost its right to be connected. Its credentials end by themselves
    within `expires_in_ns`, so for that long it has to be remembered."""

    user: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{16}$(?!\n)")]
    expires_in_ns: DurationNs


FROM_CLIENT: dict[str, type] = {
    "join": Join,
    "more_held": MoreHeld,
    "heartbeat": Heartbeat,
    "request_authorization": RequestAuthorization,
    "posture": Posture,
    "candidates": Candidates,
    "flow_log": FlowReport,
}
FROM_GATEWAY: dict[str, type] = {
    "join": Join,
    "more_held": MoreHeld,
    "heartbeat": Heartbeat,
    "ack": Ack,
    "candidates": Candidates,
    "stats": Stats,
    "flow_log": FlowReport,
}
FROM_RELAY: dict[str, type] = {
    "relay_join": RelayJoin,
    "heartbeat": Heartbeat,
    "load": Load,
    "rejoining": Rejoining,
}
FROM_UNJOINED: dict[str, type] = {"join": Join, "relay_join": RelayJoin}
TO_CLIENT: dict[str, type] = {
    "challenge": Challenge,
    "held_wanted": HeldWanted,
    "init": ClientInit,
    "heartbeat": Heartbeat,
    "portals": Portals,
    "config_changed": ConfigChanged,
    "resource_upserted": ResourceUpserted,
    "resource_removed": ResourceRemoved,
    "relays": Relays,
    "authorization_created": AuthorizationCreated,
    "authorization_denied": AuthorizationDenied,
    "authorization_renewed": AuthorizationRenewed,
    "authorization_revoked": AuthorizationRevoked,
    "candidates": Candidates,
    "disconnect": Disconnect,
}
TO_GATEWAY: dict[str, type] = {
    "challenge": Challenge,
    "held_wanted": HeldWanted,
    "init": GatewayInit,
    "heartbeat": Heartbeat,
    "portals": Portals,
    "authorize": Authorize,
    "authorization_renewed": AuthorizationRenewed,
    "revoke": Revoke,
    "resource_updated": ResourceUpdated,
    "relays": Relays,
    "candidates": Candidates,
    "disconnect": Disconnect,
}
TO_RELAY: dict[str, type] = {
    "challenge": Challenge,
    "init": RelayInit,
    "revoke_user": RevokeUser,
    "heartbeat": Heartbeat,
    "portals": Portals,
    "drain": Drain,
    "disconnect": Disconnect,
}
EVENT_BY_TYPE: dict[type, str] = {
    message_type: event
    for table in (FROM_CLIENT, FROM_GATEWAY, FROM_RELAY, TO_CLIENT, TO_GATEWAY, TO_RELAY)
    for event, message_type in table.items()
}
