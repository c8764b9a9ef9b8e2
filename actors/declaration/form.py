"""What a declaration is made of: the types of its sections, decoded strictly.

The names of fields are those of the API and of `actors.model`; only where the model has an id, the
declaration has a reference (`Reference`).
"""

from __future__ import annotations

from datetime import datetime, time
from functools import cache
from typing import Annotated, Literal, TypeVar
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, structs

from actors.model import (
    DEFAULT_LEASE_S,
    MAX_CONDITION_VALUES,
    MAX_DNS_UPSTREAMS,
    MAX_FACTS,
    MAX_POOL_DEVICES,
    MAX_RETENTION_DAYS,
    MAX_SITES_PER_RESOURCE,
    MIN_LEASE_S,
    Cidr,
    Description,
    FactName,
    FactValue,
    Host,
    NameField,
    Region,
)

P = TypeVar("P", bound=Struct)

MAX_ENTRIES = 20_000
"""Entries of one section, and members of one group."""

Reference = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=255,
        description="A name (for a user with an e-mail address: that), or `id:<uuid>`.",
    ),
]
Days = Annotated[int, Meta(ge=1, le=MAX_RETENTION_DAYS)]
SecretText = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=4_096,
        description="Write-only. Left out, the one that is kept stays.",
    ),
]
Email = Annotated[
    str, Meta(max_length=254, pattern=r"^[^\x00-\x20\x7f@]+@[^\x00-\x20\x7f@]+$(?!\n)")
]
Instant = Annotated[datetime, Meta(tz=True)]
TimeOfDay = Annotated[time, Meta(tz=False)]


class Part(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of everything in a declaration. A field that is left out has its default."""


class Entry(Part, frozen=True, kw_only=True):
    """Base of what has a name. `was` is the reference by which the thing is known so far, if it is
    to be renamed; `id` says which of several that share a name is meant."""

    name: NameField
    was: Reference | UnsetType = UNSET
    id: UUID | UnsetType = UNSET


class DnsUpstreamPart(Part, frozen=True, kw_only=True):
    """See `model.DnsUpstream`."""

    kind: Literal["do53", "doh"]
    address: Annotated[str, Meta(min_length=1, max_length=512, pattern=r"^[!-~]+$(?!\n)")]


class RetentionPart(Part, frozen=True, kw_only=True):
    """Days for which each log is kept."""

    changes_days: Days = 365
    authorizations_days: Days = 90
    sessions_days: Days = 90
    flows_days: Days = 30
    requests_days: Days = 90


class AccountSection(Part, frozen=True, kw_only=True):
    """The settings of the account that its admins may change."""

    name: NameField
    search_domain: Host | None = None
    dns_upstreams: Annotated[tuple[DnsUpstreamPart, ...], Meta(max_length=MAX_DNS_UPSTREAMS)] = ()
    retention: RetentionPart = RetentionPart()


class AuthProviderEntry(Entry, frozen=True, kw_only=True):
    """A way to sign in."""

    kind: Literal["oidc", "google", "okta", "entra", "email"]
    issuer: Annotated[str, Meta(max_length=512, pattern=r"^https://[!-~]+$(?!\n)")] | None = None
    client_id: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    client_secret: SecretText | UnsetType = UNSET
    context: Literal["clients", "portal", "both"] = "both"
    client_session_s: Annotated[int, Meta(ge=3_600, le=90 * 86_400)] = 7 * 86_400
    portal_session_s: Annotated[int, Meta(ge=300, le=86_400)] = 8 * 3_600
    disabled: bool = False

    def __repr__(self) -> str:
        return f"AuthProviderEntry(name={self.name!r})"  # not its secret


class DirectoryEntry(Entry, frozen=True, kw_only=True):
    """Where principals and groups are synchronised from."""

    kind: Literal["google", "okta", "entra", "scim"]
    credentials: SecretText | UnsetType = UNSET
    disabled: bool = False

    def __repr__(self) -> str:
        return f"DirectoryEntry(name={self.name!r})"  # not its secret


class PrincipalEntry(Entry, frozen=True, kw_only=True):
    """A user or a service account."""

    kind: Literal["user", "service_account"] = "user"
    role: Literal["admin", "member"] = "member"
    email: Email | None = None
    disabled: bool = False


class GroupEntry(Entry, frozen=True, kw_only=True):
    """A static group. Without `members` those that it has are left alone."""

    members: Annotated[tuple[Reference, ...], Meta(max_length=MAX_ENTRIES)] | UnsetType = UNSET


class SiteEntry(Entry, frozen=True, kw_only=True):
    """A place with gateways and resources."""


class FilterPart(Part, frozen=True, kw_only=True):
    """Traffic that is accepted; both ports included."""

    protocol: Literal["tcp", "udp", "icmp"]
    port_start: Annotated[int, Meta(ge=0, le=65_535)] = 0
    port_end: Annotated[int, Meta(ge=0, le=65_535)] = 65_535


class ResourceEntry(Entry, frozen=True, kw_only=True):
    """What users reach. `devices` (of a pool) are ids: people name their devices as they like."""

    kind: Literal["cidr", "ip", "dns", "internet", "device_pool"]
    address: Annotated[str, Meta(max_length=253)] = ""
    sites: Annotated[tuple[Reference, ...], Meta(max_length=MAX_SITES_PER_RESOURCE)] = ()
    ip_stack: Literal["v4", "v6", "dual"] = "dual"
    devices: Annotated[tuple[UUID, ...], Meta(max_length=MAX_POOL_DEVICES)] = ()
    filters: Annotated[tuple[FilterPart, ...], Meta(max_length=64)] = ()


class RemoteIpPart(Part, frozen=True, kw_only=True):
    """See `model.RemoteIpCondition`."""

    operator: Literal["is_in", "is_not_in"]
    values: Annotated[tuple[Cidr, ...], Meta(min_length=1, max_length=MAX_CONDITION_VALUES)]


class RegionPart(Part, frozen=True, kw_only=True):
    """See `model.RegionCondition`."""

    operator: Literal["is_in", "is_not_in"]
    values: Annotated[tuple[Region, ...], Meta(min_length=1, max_length=MAX_CONDITION_VALUES)]


class AuthProviderPart(Part, frozen=True, kw_only=True):
    """See `model.AuthProviderCondition`; the values are names."""

    operator: Literal["is_in", "is_not_in"]
    values: Annotated[tuple[Reference, ...], Meta(min_length=1, max_length=MAX_CONDITION_VALUES)]


class ClientVerifiedPart(Part, frozen=True, kw_only=True, omit_defaults=False):
    """See `model.ClientVerifiedCondition`."""

    operator: Literal["is"] = "is"
    value: bool = True


class FactPart(Part, frozen=True, kw_only=True):
    """See `model.Fact`."""

    name: FactName
    value: FactValue


class FactTestPart(Part, frozen=True, kw_only=True):
    """See `model.FactTest`."""

    name: FactName
    operator: Literal["is", "is_not", "at_least", "at_most"]
    value: FactValue


class ClientPosturePart(Part, frozen=True, kw_only=True):
    """See `model.ClientPostureCondition`."""

    facts: Annotated[tuple[FactTestPart, ...], Meta(min_length=1, max_length=MAX_FACTS)]


class TimeRangePart(Part, frozen=True, kw_only=True):
    """From `start` up to, not including, `end`; 00:00 as `end` means midnight."""

    start: TimeOfDay
    end: TimeOfDay


class DayWindowPart(Part, frozen=True, kw_only=True):
    """Ranges of one weekday (0 is Monday); none means the whole day."""

    day: Annotated[int, Meta(ge=0, le=6)]
    ranges: Annotated[tuple[TimeRangePart, ...], Meta(max_length=24)] = ()


class CurrentTimePart(Part, frozen=True, kw_only=True):
    """See `model.CurrentTimeCondition`."""

    zone: Annotated[str, Meta(min_length=1, max_length=64)]
    windows: Annotated[tuple[DayWindowPart, ...], Meta(min_length=1, max_length=7)]


class ConditionsPart(Part, frozen=True, kw_only=True):
    """All of them have to hold."""

    remote_ip_location_region: RegionPart | None = None
    remote_ip: RemoteIpPart | None = None
    auth_provider: AuthProviderPart | None = None
    current_time: CurrentTimePart | None = None
    client_verified: ClientVerifiedPart | None = None
    client_posture: ClientPosturePart | None = None


class PolicyEntry(Part, frozen=True, kw_only=True):
    """Members of the group may reach the resource. It has no name: see `planning.pair_policies`."""

    group: Reference
    resource: Reference
    description: Description = ""
    conditions: ConditionsPart = ConditionsPart()
    disabled: bool = False
    expires_at: Instant | None = None
    lease_s: Annotated[int, Meta(ge=MIN_LEASE_S, le=DEFAULT_LEASE_S)] = DEFAULT_LEASE_S


class PolicyTestEntry(Entry, frozen=True, kw_only=True):
    """What must stay so. See `model.PolicyTest`."""

    principal: Reference
    resource: Reference
    expected: Literal["allowed", "denied"]
    at: Instant | None = None
    remote_ip: Annotated[str, Meta(min_length=2, max_length=45)] | None = None
    auth_provider: Reference | None = None
    client_verified: bool | None = None
    posture: Annotated[tuple[FactPart, ...], Meta(max_length=MAX_FACTS)] = ()


class Declaration(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An account as its admins want it. A section that is left out is left alone."""

    version: Literal[1] = 1
    account: AccountSection | UnsetType = UNSET
    auth_providers: (
        Annotated[tuple[AuthProviderEntry, ...], Meta(max_length=MAX_ENTRIES)] | UnsetType
    ) = UNSET
    directories: Annotated[tuple[DirectoryEntry, ...], Meta(max_length=MAX_ENTRIES)] | UnsetType = (
        UNSET
    )
    principals: Annotated[tuple[PrincipalEntry, ...], Meta(max_length=MAX_ENTRIES)] | UnsetType = (
        UNSET
    )
    groups: Annotated[tuple[GroupEntry, ...], Meta(max_length=MAX_ENTRIES)] | UnsetType = UNSET
    sites: Annotated[tuple[SiteEntry, ...], Meta(max_length=MAX_ENTRIES)] | UnsetType = UNSET
    resources: Annotated[tuple[ResourceEntry, ...], Meta(max_length=MAX_ENTRIES)] | UnsetType = (
        UNSET
    )
    policies: Annotated[tuple[PolicyEntry, ...], Meta(max_length=MAX_ENTRIES)] | UnsetType = UNSET
    policy_tests: (
        Annotated[tuple[PolicyTestEntry, ...], Meta(max_length=MAX_ENTRIES)] | UnsetType
    ) = UNSET


AnyEntry = Entry | PolicyEntry


def plain(part: Part | Declaration) -> dict[str, object]:
    """As JSON has it: dictionaries, lists, texts, numbers; defaults left out."""
    found = msgspec.to_builtins(without_defaults(part))
    assert isinstance(found, dict)
    return found


def without_defaults(part: P) -> P:
    """The same, with the very objects of the class where it has what they say: msgspec leaves out
    a default by its identity, not by its value."""
    changes: dict[str, object] = {}
    for name, default in _defaults(type(part)).items():
        value = getattr(part, name)
        if isinstance(value, Struct):
            value = without_defaults(value)
        elif isinstance(value, tuple):
            value = tuple(without_defaults(v) if isinstance(v, Struct) else v for v in value)
        changes[name] = default if value == default else value
    return structs.replace(part, **changes)


@cache
def _defaults(part_type: type[Struct]) -> dict[str, object]:
    return {field.name: field.default for field in structs.fields(part_type)}
