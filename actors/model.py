"""The entities of an account: what the database holds, what changes name, what policy reads.

Every entity is a frozen attrs class with an `id` (UUIDv7) and, but for what belongs to the
installation (relays, operator tokens), an `account_id`. Instants are aware datetimes in UTC.
`ENTITIES` names every kind; `REFERENCES` says which field refers to which kind, and is the one
source of cascades: what refers to a removed entity is removed with it, each with a change of its
own, in the same transaction.
"""

from __future__ import annotations

from datetime import datetime, time
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Annotated, Literal
from uuid import UUID

import attrs
from msgspec import Meta

from channel.messages import Filter, IpText, Key32, SocketAddress

# `$` alone would also match before a final line feed, hence `(?!\n)`.
NameField = Annotated[
    str, Meta(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$(?!\n)")
]
Slug = Annotated[str, Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$(?!\n)")]
Description = Annotated[str, Meta(max_length=1024, pattern=r"^[^\x00]*$")]
Cidr = Annotated[str, Meta(max_length=49)]

Host = Annotated[
    str, Meta(min_length=1, max_length=253, pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$(?!\n)")
]
"""A DNS name in lower case, or an IPv4 address, without a final dot."""
Region = Annotated[str, Meta(pattern=r"^[A-Z]{2}$(?!\n)")]
"""A country by ISO 3166-1 alpha-2."""
Scope = Annotated[str, Meta(pattern=r"^(\*|[a-z]+(_[a-z]+)*):(read|write)$(?!\n)", max_length=64)]
"""What an API token may do: `<noun>:read` or `<noun>:write` (which includes reading), `*` is every
noun. The nouns are those of the API's paths."""

DEFAULT_LEASE_S = 86_400
MIN_LEASE_S = 60
MAX_CONDITION_VALUES = 100
MAX_SITES_PER_RESOURCE = 8
MAX_POOL_DEVICES = 100
MAX_DNS_UPSTREAMS = 8
MAX_FACTS = 32
MAX_SCOPES = 64
MAX_RETENTION_DAYS = 3_650


@attrs.frozen(kw_only=True)
class DnsUpstream:
    """A resolver for names that are no resource: Do53 by `address` and port 53 unless it names
    another, or DoH by an `https://` URL."""

    kind: Literal["do53", "doh"]
    address: Annotated[str, Meta(min_length=1, max_length=512, pattern=r"^[!-~]+$(?!\n)")]


@attrs.frozen(kw_only=True)
class AccountLimits:
    """What an operator sets for one account below the installation's limits; None takes those."""

    principals: Annotated[int, Meta(ge=0)] | None = None
    groups: Annotated[int, Meta(ge=0)] | None = None
    sites: Annotated[int, Meta(ge=0)] | None = None
    resources: Annotated[int, Meta(ge=0)] | None = None
    policies: Annotated[int, Meta(ge=0)] | None = None
    policies_per_resource: Annotated[int, Meta(ge=0)] | None = None
    tokens: Annotated[int, Meta(ge=0)] | None = None
    clients: Annotated[int, Meta(ge=0)] | None = None
    gateways: Annotated[int, Meta(ge=0)] | None = None


@attrs.frozen(kw_only=True)
class Retention:
    """How many days each log of the account is kept. `changes_days` is also the horizon of
    questions about the past."""

    changes_days: Annotated[int, Meta(ge=1, le=MAX_RETENTION_DAYS)] = 365
    authorizations_days: Annotated[int, Meta(ge=1, le=MAX_RETENTION_DAYS)] = 90
    sessions_days: Annotated[int, Meta(ge=1, le=MAX_RETENTION_DAYS)] = 90
    flows_days: Annotated[int, Meta(ge=1, le=MAX_RETENTION_DAYS)] = 30
    requests_days: Annotated[int, Meta(ge=1, le=MAX_RETENTION_DAYS)] = 90


@attrs.frozen(kw_only=True)
class Account:
    """A tenant. The tunnel ranges hold every client's and gateway's address, the name ranges the
    addresses that clients' resolvers hand out for `dns` resources; the resolver answers at
    `resolver_ipv4`, whose /24 is reserved."""

    id: UUID
    name: NameField
    slug: Slug
    disabled: bool = False
    range_ipv4: IPv4Network = IPv4Network("100.64.0.0/11")
    range_ipv6: IPv6Network = IPv6Network("fd48:4c57:5900::/64")
    names_ipv4: IPv4Network = IPv4Network("100.96.0.0/11")
    names_ipv6: IPv6Network = IPv6Network("fd48:4c57:5901::/64")
    resolver_ipv4: IPv4Address = IPv4Address("100.100.111.1")
    search_domain: Host | None = None
    dns_upstreams: Annotated[tuple[DnsUpstream, ...], Meta(max_length=MAX_DNS_UPSTREAMS)] = ()
    limits: AccountLimits = AccountLimits()
    retention: Retention = Retention()
    created_at: datetime


@attrs.frozen(kw_only=True)
class Principal:
    """A user or a service account."""

    id: UUID
    account_id: UUID
    kind: Literal["user", "service_account"] = "user"
    role: Literal["admin", "member"] = "member"
    name: NameField
    email: Annotated[str, Meta(max_length=254)] | None = None
    disabled: bool = False
    created_at: datetime


@attrs.frozen(kw_only=True)
class SealedSecret:
    """A secret at rest: XChaCha20-Poly1305 under the key `key_id` of the installation's key ring,
    with the row it belongs to as associated data (see `actors.store.sealing`)."""

    key_id: Annotated[int, Meta(ge=0)]
    box: Annotated[bytes, Meta(max_length=8_192)] = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class AuthProvider:
    """A way to sign in: an OpenID Connect issuer, or one-time passwords by e-mail. `context` says
    to what; the session lifetimes are those of a sign-in by it."""

    id: UUID
    account_id: UUID
    kind: Literal["oidc", "google", "okta", "entra", "email"]
    name: NameField
    issuer: Annotated[str, Meta(max_length=512, pattern=r"^https://[!-~]+$(?!\n)")] | None = None
    client_id: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    client_secret: SealedSecret | None = attrs.field(default=None, repr=False)
    context: Literal["clients", "portal", "both"] = "both"
    client_session_s: Annotated[int, Meta(ge=3_600, le=90 * 86_400)] = 7 * 86_400
    portal_session_s: Annotated[int, Meta(ge=300, le=86_400)] = 8 * 3_600
    disabled: bool = False
    created_at: datetime


@attrs.frozen(kw_only=True)
class Directory:
    """Where principals and groups are synchronised from."""

    id: UUID
    account_id: UUID
    kind: Literal["google", "okta", "entra", "scim"]
    name: NameField
    credentials: SealedSecret | None = attrs.field(default=None, repr=False)
    disabled: bool = False
    synced_at: datetime | None = None
    last_error: Annotated[str, Meta(max_length=1_024)] = ""
    created_at: datetime


@attrs.frozen(kw_only=True)
class Identity:
    """A principal as a provider knows it, keyed by (provider, issuer, subject), never by e-mail."""

    id: UUID
    account_id: UUID
    principal_id: UUID
    auth_provider_id: UUID
    issuer: Annotated[str, Meta(min_length=1, max_length=512)]
    subject: Annotated[str, Meta(min_length=1, max_length=255)]
    created_at: datetime


@attrs.frozen(kw_only=True)
class Group:
    """A set of principals. `everyone` is managed: all users, no service accounts. `synced` ones
    follow the directory that knows them by `external_id`."""

    id: UUID
    account_id: UUID
    kind: Literal["static", "synced", "everyone"] = "static"
    name: NameField
    directory_id: UUID | None = None
    external_id: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    created_at: datetime


@attrs.frozen(kw_only=True)
class Membership:
    """One principal in one group (unique per pair)."""

    id: UUID
    account_id: UUID
    group_id: UUID
    principal_id: UUID
    created_at: datetime


@attrs.frozen(kw_only=True)
class Site:
    """A place with gateways and resources. `internet` is managed: its gateways carry the internet
    resource; there is at most one in an account."""

    id: UUID
    account_id: UUID
    kind: Literal["static", "internet"] = "static"
    name: NameField
    created_at: datetime


@attrs.frozen(kw_only=True)
class Resource:
    """What users reach.

    `address` is a network (`cidr`), an address (`ip`), a name pattern (`dns`), and empty for the
    internet (at most one, in the site `internet`) and for a pool of devices (`device_ids`, which
    are clients; it lies at no site). Any gateway of its sites may carry it. `ip_stack` says which
    addresses a name is given, and is `dual` for all other kinds.
    """

    id: UUID
    account_id: UUID
    site_ids: Annotated[tuple[UUID, ...], Meta(max_length=MAX_SITES_PER_RESOURCE)]
    name: NameField
    kind: Literal["cidr", "ip", "dns", "internet", "device_pool"]
    address: Annotated[str, Meta(max_length=253)] = ""
    ip_stack: Literal["v4", "v6", "dual"] = "dual"
    device_ids: Annotated[tuple[UUID, ...], Meta(max_length=MAX_POOL_DEVICES)] = ()
    filters: Annotated[tuple[Filter, ...], Meta(max_length=64)] = ()
    created_at: datetime


@attrs.frozen(kw_only=True)
class RemoteIpCondition:
    """The client's validated channel address is in (or not in) one of these networks."""

    property: Literal["remote_ip"] = "remote_ip"
    operator: Literal["is_in", "is_not_in"]
    values: Annotated[tuple[Cidr, ...], Meta(min_length=1, max_length=MAX_CONDITION_VALUES)]


@attrs.frozen(kw_only=True)
class RegionCondition:
    """The country that the region database gives for the client's address. Unknown fails, for
    `is_not_in` too."""

    property: Literal["remote_ip_location_region"] = "remote_ip_location_region"
    operator: Literal["is_in", "is_not_in"]
    values: Annotated[tuple[Region, ...], Meta(min_length=1, max_length=MAX_CONDITION_VALUES)]


@attrs.frozen(kw_only=True)
class AuthProviderCondition:
    """The provider by which the client's session signed in. A session of no provider fails."""

    property: Literal["auth_provider"] = "auth_provider"
    operator: Literal["is_in", "is_not_in"]
    values: Annotated[tuple[UUID, ...], Meta(min_length=1, max_length=MAX_CONDITION_VALUES)]


@attrs.frozen(kw_only=True)
class ClientVerifiedCondition:
    """An admin has (or has not) verified the device."""

    property: Literal["client_verified"] = "client_verified"
    operator: Literal["is"] = "is"
    value: bool = True


FactName = Annotated[str, Meta(max_length=64, pattern=r"^[a-z][a-z0-9_]*$(?!\n)")]
FactValue = bool | int | Annotated[str, Meta(max_length=255)]


@attrs.frozen(kw_only=True)
class Fact:
    """One thing that a device reports of itself, such as `os_version` "14.2"."""

    name: FactName
    value: FactValue


@attrs.frozen(kw_only=True)
class FactTest:
    """What a fact has to be. `at_least` and `at_most` compare numbers, and texts as dotted
    versions (`14.10` is above `14.9`). A fact that was not reported, or has another type, fails."""

    name: FactName
    operator: Literal["is", "is_not", "at_least", "at_most"]
    value: FactValue


@attrs.frozen(kw_only=True)
class ClientPostureCondition:
    """All of these facts hold of the device, as it last reported them."""

    property: Literal["client_posture"] = "client_posture"
    facts: Annotated[tuple[FactTest, ...], Meta(min_length=1, max_length=MAX_FACTS)]


@attrs.frozen(kw_only=True)
class TimeRange:
    """From `start` up to, not including, `end` on one day; `end` 00:00 means midnight."""

    start: time
    end: time


@attrs.frozen(kw_only=True)
class DayWindow:
    """Ranges of one weekday (0 is Monday); no range at all means the whole day."""

    day: Annotated[int, Meta(ge=0, le=6)]
    ranges: Annotated[tuple[TimeRange, ...], Meta(max_length=24)] = ()


@attrs.frozen(kw_only=True)
class CurrentTimeCondition:
    """The instant lies in one of the windows, read in an IANA time zone."""

    property: Literal["current_time"] = "current_time"
    zone: Annotated[str, Meta(min_length=1, max_length=64)]
    windows: Annotated[tuple[DayWindow, ...], Meta(min_length=1, max_length=7)]


@attrs.frozen(kw_only=True)
class Conditions:
    """The conditions of a policy, ANDed; at most one for each property."""

    remote_ip_location_region: RegionCondition | None = None
    remote_ip: RemoteIpCondition | None = None
    auth_provider: AuthProviderCondition | None = None
    current_time: CurrentTimeCondition | None = None
    client_verified: ClientVerifiedCondition | None = None
    client_posture: ClientPostureCondition | None = None


@attrs.frozen(kw_only=True)
class Policy:
    """Members of one group may reach one resource, while the conditions hold."""

    id: UUID
    account_id: UUID
    group_id: UUID
    resource_id: UUID
    conditions: Conditions = Conditions()
    disabled: bool = False
    description: Description = ""
    expires_at: datetime | None = None
    lease_s: Annotated[int, Meta(ge=MIN_LEASE_S, le=DEFAULT_LEASE_S)] = DEFAULT_LEASE_S
    created_at: datetime


@attrs.frozen(kw_only=True)
class PolicyTest:
    """What must stay so: that a principal may, or may not, reach a resource in these
    circumstances. A change of the account after which a test fails is refused.

    `at` is the instant of the question, None the instant of the change. Circumstances that are not
    named are unknown, as in a request; `token_expires_at` and devices play no part.
    """

    id: UUID
    account_id: UUID
    name: NameField
    principal_id: UUID
    resource_id: UUID
    expected: Literal["allowed", "denied"]
    at: datetime | None = None
    remote_ip: IpText | None = None
    auth_provider_id: UUID | None = None
    client_verified: bool | None = None
    posture: Annotated[tuple[Fact, ...], Meta(max_length=MAX_FACTS)] = ()
    created_at: datetime


TokenKind = Literal["client", "gateway", "relay", "api", "operator"]


@attrs.frozen(kw_only=True)
class Token:
    """A bearer token; only its SHA-256 is kept (see `channel.credentials`).

    `client` and `api` tokens belong to a principal, `gateway` tokens to a site (with
    `max_uses` 1 to one device of it); `relay` and `operator` tokens belong to the installation and
    have no account. `scopes` bound an `api` token, and are empty for all other kinds.
    `auth_provider_id` is that of the sign-in by which a client's token was made.
    """

    id: UUID
    account_id: UUID | None
    kind: TokenKind
    name: NameField
    hash: Key32 = attrs.field(repr=False)
    principal_id: UUID | None = None
    site_id: UUID | None = None
    auth_provider_id: UUID | None = None
    scopes: Annotated[tuple[Scope, ...], Meta(max_length=MAX_SCOPES)] = ()
    expires_at: datetime | None = None
    max_uses: Annotated[int, Meta(ge=1)] | None = None
    allowed_sources: Annotated[tuple[Cidr, ...], Meta(max_length=100)] = ()
    approves_devices: bool = True
    created_at: datetime


@attrs.frozen(kw_only=True)
class Client:
    """A user's device, known by its Ed25519 device key (unique within the account). `posture` is
    what it last reported of itself, by name."""

    id: UUID
    account_id: UUID
    principal_id: UUID
    token_id: UUID
    device_key: Key32
    name: NameField
    ipv4: IPv4Address
    ipv6: IPv6Address
    verified: bool = False
    posture: Annotated[tuple[Fact, ...], Meta(max_length=MAX_FACTS)] = ()
    created_at: datetime


@attrs.frozen(kw_only=True)
class Gateway:
    """An agent beside resources, known by its device key (unique within the account).

    `approved` is false while an unknown key awaits an admin, where the site's token asks for it.
    """

    id: UUID
    account_id: UUID
    site_id: UUID
    token_id: UUID
    device_key: Key32
    name: NameField
    ipv4: IPv4Address
    ipv6: IPv6Address
    approved: bool = True
    created_at: datetime


@attrs.frozen(kw_only=True)
class Relay:
    """A relay of the installation, known by its token and name. Its stamp secret is never kept."""

    id: UUID
    token_id: UUID
    name: NameField
    region: Annotated[str, Meta(max_length=64)] = ""
    failure_domain: Annotated[str, Meta(max_length=64)] = ""
    addresses: Annotated[tuple[SocketAddress, ...], Meta(max_length=16)]
    last_seen_at: datetime


@attrs.frozen(kw_only=True)
class Authorization:
    """One client may reach one resource through one gateway until `expires_at` (the lease).

    Not part of the change feed: the account actor owns these rows, writes each under its epoch
    before it tells a gateway, and ends them with a reason.
    """

    id: UUID
    account_id: UUID
    policy_id: UUID
    client_id: UUID
    gateway_id: UUID
    resource_id: UUID
    token_id: UUID
    connection_id: UUID
    remote_ip: IpText
    created_at: datetime
    expires_at: datetime
    ended_at: datetime | None = None
    end_reason: Annotated[str, Meta(max_length=255)] = ""


Entity = (
    Account
    | Principal
    | AuthProvider
    | Directory
    | Identity
    | Group
    | Membership
    | Site
    | Resource
    | Policy
    | PolicyTest
    | Token
    | Client
    | Gateway
)
EntityKind = Literal[
    "account",
    "principal",
    "auth_provider",
    "directory",
    "identity",
    "group",
    "membership",
    "site",
    "resource",
    "policy",
    "policy_test",
    "token",
    "client",
    "gateway",
]
ENTITIES: dict[EntityKind, type[Entity]] = {
    "account": Account,
    "principal": Principal,
    "auth_provider": AuthProvider,
    "directory": Directory,
    "identity": Identity,
    "group": Group,
    "membership": Membership,
    "site": Site,
    "resource": Resource,
    "policy": Policy,
    "policy_test": PolicyTest,
    "token": Token,
    "client": Client,
    "gateway": Gateway,
}
KIND_OF: dict[type[Entity], EntityKind] = {entity: kind for kind, entity in ENTITIES.items()}

REFERENCES: dict[EntityKind, dict[str, EntityKind]] = {
    "identity": {"principal_id": "principal", "auth_provider_id": "auth_provider"},
    "group": {"directory_id": "directory"},
    "membership": {"group_id": "group", "principal_id": "principal"},
    "policy": {"group_id": "group", "resource_id": "resource"},
    "policy_test": {
        "principal_id": "principal",
        "resource_id": "resource",
        "auth_provider_id": "auth_provider",
    },
    "token": {
        "principal_id": "principal",
        "site_id": "site",
        "auth_provider_id": "auth_provider",
    },
    "client": {"principal_id": "principal", "token_id": "token"},
    "gateway": {"site_id": "site", "token_id": "token"},
}
"""What goes with the entity that a field names."""

MEMBERS: dict[EntityKind, dict[str, EntityKind]] = {
    "resource": {"site_ids": "site", "device_ids": "client"},
}
"""Fields with several ids. When one of the entities goes, its id goes from the field; what has
lost its last site goes too."""


@attrs.frozen(kw_only=True)
class Change:
    """One mutation of an account, numbered without gaps in commit order.

    `before` is None for a creation, `after` for a removal. `who` names the token or the agent.
    """

    account_id: UUID
    number: int
    at: datetime
    who: str
    kind: EntityKind
    entity_id: UUID
    before: Entity | None
    after: Entity | None
