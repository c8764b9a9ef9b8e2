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

DEFAULT_LEASE_S = 86_400
MIN_LEASE_S = 60
MAX_CONDITION_VALUES = 100


@attrs.frozen(kw_only=True)
class Account:
    """A tenant. The tunnel ranges hold every client's and gateway's address."""

    id: UUID
    name: NameField
    slug: Slug
    disabled: bool = False
    range_ipv4: IPv4Network = IPv4Network("100.64.0.0/11")
    range_ipv6: IPv6Network = IPv6Network("fd48:4c57:5900::/64")
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
class Group:
    """A set of principals. `everyone` is managed: all users, no service accounts."""

    id: UUID
    account_id: UUID
    kind: Literal["static", "everyone"] = "static"
    name: NameField
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
    """A place with gateways and resources."""

    id: UUID
    account_id: UUID
    name: NameField
    created_at: datetime


@attrs.frozen(kw_only=True)
class Resource:
    """What users reach: a network (`cidr`), an address (`ip`), later names and the internet."""

    id: UUID
    account_id: UUID
    site_id: UUID
    name: NameField
    kind: Literal["cidr", "ip"]
    address: Cidr
    filters: Annotated[tuple[Filter, ...], Meta(max_length=64)] = ()
    created_at: datetime


@attrs.frozen(kw_only=True)
class RemoteIpCondition:
    """The client's validated channel address is in (or not in) one of these networks."""

    property: Literal["remote_ip"] = "remote_ip"
    operator: Literal["is_in", "is_not_in"]
    values: Annotated[tuple[Cidr, ...], Meta(min_length=1, max_length=MAX_CONDITION_VALUES)]


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

    remote_ip: RemoteIpCondition | None = None
    current_time: CurrentTimeCondition | None = None


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


TokenKind = Literal["client", "gateway", "relay", "api", "operator"]


@attrs.frozen(kw_only=True)
class Token:
    """A bearer token; only its SHA-256 is kept (see `channel.credentials`).

    `client` and `api` tokens belong to a principal, `gateway` tokens to a site; `relay` and
    `operator` tokens belong to the installation and have no account.
    """

    id: UUID
    account_id: UUID | None
    kind: TokenKind
    name: NameField
    hash: Key32 = attrs.field(repr=False)
    principal_id: UUID | None = None
    site_id: UUID | None = None
    expires_at: datetime | None = None
    max_uses: Annotated[int, Meta(ge=1)] | None = None
    allowed_sources: Annotated[tuple[Cidr, ...], Meta(max_length=100)] = ()
    approves_devices: bool = True
    created_at: datetime


@attrs.frozen(kw_only=True)
class Client:
    """A user's device, known by its Ed25519 device key (unique within the account)."""

    id: UUID
    account_id: UUID
    principal_id: UUID
    token_id: UUID
    device_key: Key32
    name: NameField
    ipv4: IPv4Address
    ipv6: IPv6Address
    verified: bool = False
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
    Account | Principal | Group | Membership | Site | Resource | Policy | Token | Client | Gateway
)
EntityKind = Literal[
    "account",
    "principal",
    "group",
    "membership",
    "site",
    "resource",
    "policy",
    "token",
    "client",
    "gateway",
]
ENTITIES: dict[EntityKind, type[Entity]] = {
    "account": Account,
    "principal": Principal,
    "group": Group,
    "membership": Membership,
    "site": Site,
    "resource": Resource,
    "policy": Policy,
    "token": Token,
    "client": Client,
    "gateway": Gateway,
}
KIND_OF: dict[type[Entity], EntityKind] = {entity: kind for kind, entity in ENTITIES.items()}

REFERENCES: dict[EntityKind, dict[str, EntityKind]] = {
    "membership": {"group_id": "group", "principal_id": "principal"},
    "resource": {"site_id": "site"},
    "policy": {"group_id": "group", "resource_id": "resource"},
    "token": {"principal_id": "principal", "site_id": "site"},
    "client": {"principal_id": "principal", "token_id": "token"},
    "gateway": {"site_id": "site", "token_id": "token"},
}


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
