"""The policy engine: one pure function of a snapshot of the account, a request and an instant.

How it works. A `Snapshot` holds the entities of one account with the indices that decisions
read, and is carried forward by the numbered changes of the account's feed. `decide` takes the
*candidates* (the policies of the resource whose group the client's principal is in), asks each
for the properties that it sees violated, and allows if one of them sees none. The default is to
deny: no candidate, no access; what is unknown (a zone, a network, an address) is violated.

Properties that do not depend on a policy (`account_disabled`, `principal_disabled`, `client`,
`token`, `token_expired`) are violated for all candidates alike. The names in a denial are in the
order of `PROPERTIES`; values (addresses, times, networks) never appear in it.

Expiry of one policy: the least of the end of its time window, its own `expires_at`, its lease
counted from the instant, and the token's `expires_at`. Of several policies that allow, the one
with the latest expiry wins; between equals the one with the lowest id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal, TypeVar, cast
from uuid import UUID

import attrs

from actors.model import (
    KIND_OF,
    Account,
    AuthProvider,
    Change,
    Client,
    Directory,
    Entity,
    EntityKind,
    Gateway,
    Group,
    Identity,
    Membership,
    Policy,
    PolicyTest,
    Principal,
    RemoteIpCondition,
    Resource,
    Site,
    Token,
)
from actors.policy.windows import Windows
from actors.store.interface import Contents

PROPERTIES = (
    "account_disabled",
    "client",
    "principal",
    "principal_disabled",
    "token",
    "token_expired",
    "policy",
    "policy_disabled",
    "policy_expired",
    "remote_ip",
    "current_time",
)
"""Every name that a denial can hold, in the order in which it holds them."""

_RANK = {name: rank for rank, name in enumerate(PROPERTIES)}
_E = TypeVar("_E", bound=Entity)


class Gap(Exception):
    """A change was given that is not the next one: read the feed after `number` first."""

    def __init__(self, number: int, got: int) -> None:
        super().__init__(f"the snapshot is at change {number}, so change {got} leaves a gap")
        self.number = number
        self.got = got


@attrs.frozen(kw_only=True)
class Request:
    """Who asks for what. `remote_ip` is the validated path of the channel, None if unknown.

    A live request names a client and the token of its session. The explainer may name a
    principal instead: then the question is about any device of it, and no token is looked at.
    """

    client_id: UUID | None = None
    principal_id: UUID | None = None
    resource_id: UUID
    remote_ip: str | None
    token_id: UUID | None = None


@attrs.frozen
class Allowed:
    """The request is allowed by this policy until `expires_at` (aware; the lease counted in)."""

    policy_id: UUID
    expires_at: datetime


@attrs.frozen
class Denied:
    """The request is denied: `not_found` if the account has no such resource, else `forbidden`
    with every violated property over the candidate policies, in the order of `PROPERTIES`."""

    reason: Literal["forbidden", "not_found"]
    violated: tuple[str, ...] = ()


Decision = Allowed | Denied


class Snapshot:
    """One account at one change number. Its account actor is the only one that applies changes.

    `account` is None once the account was removed. The dictionaries are to be read, not written.
    """

    def __init__(self, account: Account, number: int) -> None:
        self.account: Account | None = account
        self.account_id = account.id
        self.number = number
        self.principals: dict[UUID, Principal] = {}
        self.groups: dict[UUID, Group] = {}
        self.memberships: dict[UUID, Membership] = {}
        self.sites: dict[UUID, Site] = {}
        self.resources: dict[UUID, Resource] = {}
        self.policies: dict[UUID, Policy] = {}
        self.tokens: dict[UUID, Token] = {}
        self.clients: dict[UUID, Client] = {}
        self.gateways: dict[UUID, Gateway] = {}
        self.everyone_groups: set[UUID] = set()
        self.groups_by_principal: dict[UUID, set[UUID]] = {}
        self.policies_by_resource: dict[UUID, dict[UUID, CompiledPolicy]] = {}
        self.policies_by_group: dict[UUID, dict[UUID, CompiledPolicy]] = {}
        self.gateways_by_site: dict[UUID, set[UUID]] = {}
        self.auth_providers: dict[UUID, AuthProvider] = {}
        self.directories: dict[UUID, Directory] = {}
        self.identities: dict[UUID, Identity] = {}
        self.policy_tests: dict[UUID, PolicyTest] = {}
        self._tables = cast(  # each holds its own kind only
            "dict[EntityKind, dict[UUID, Entity]]",
            {
                "principal": self.principals,
                "auth_provider": self.auth_providers,
                "directory": self.directories,
                "identity": self.identities,
                "policy_test": self.policy_tests,
                "group": self.groups,
                "membership": self.memberships,
                "site": self.sites,
                "resource": self.resources,
                "policy": self.policies,
                "token": self.tokens,
                "client": self.clients,
                "gateway": self.gateways,
            },
        )

    @classmethod
    def of(cls, contents: Contents) -> Snapshot:
        """The snapshot of a consistent picture of the account."""
        snapshot = cls(contents.account, contents.number)
        for entity in contents.entities:
            snapshot._insert(entity)
        return snapshot

    def apply(self, change: Change) -> bool:
        """Carry out one change. False, and nothing done, for one that is known already.

        Raises Gap if a change before it is missing, ValueError for one of another account.
        """
        if change.account_id != self.account_id:
            raise ValueError("a change of another account")
        if change.number <= self.number:
            return False
        if change.number != self.number + 1:
            raise Gap(self.number, change.number)
        self._remove(change.kind, change.entity_id)
        if change.after is not None:
            self._insert(change.after)
        elif change.kind == "account":
            self.account = None
        self.number = change.number
        return True

    def is_member(self, principal: Principal, group_id: UUID) -> bool:
        """Whether the principal is in the group; `everyone` is all users, no service accounts."""
        if group_id in self.everyone_groups:
            return principal.kind == "user"
        return group_id in self.groups_by_principal.get(principal.id, ())

    def groups_of(self, principal: Principal) -> Iterator[UUID]:
        """The groups that the principal is in."""
        for group_id in self.groups_by_principal.get(principal.id, ()):
            if group_id not in self.everyone_groups:
                yield group_id
        if principal.kind == "user":
            yield from self.everyone_groups

    def gateways_of(self, resource: Resource) -> Iterator[UUID]:
        """The gateways that may carry a resource, each once: those of its sites."""
        for site_id in resource.site_ids:
            yield from self.gateways_by_site.get(site_id, ())

    def entities(self) -> tuple[Entity, ...]:
        """Everything but the account itself, in no particular order."""
        return tuple(entity for table in self._tables.values() for entity in table.values())

    # --- helpers ---

    def _insert(self, entity: Entity) -> None:
        if isinstance(entity, Account):
            self.account = entity
            return
        self._tables[KIND_OF[type(entity)]][entity.id] = entity
        match entity:
            case Group(kind="everyone"):
                self.everyone_groups.add(entity.id)
            case Membership():
                self.groups_by_principal.setdefault(entity.principal_id, set()).add(entity.group_id)
            case Policy():
                compiled = CompiledPolicy(entity)
                self.policies_by_resource.setdefault(entity.resource_id, {})[entity.id] = compiled
                self.policies_by_group.setdefault(entity.group_id, {})[entity.id] = compiled
            case Gateway():
                self.gateways_by_site.setdefault(entity.site_id, set()).add(entity.id)
            case _:
                pass

    def _remove(self, kind: EntityKind, id: UUID) -> None:
        if kind == "account":
            return
        entity = self._tables[kind].pop(id, None)
        match entity:
            case Group():
                self.everyone_groups.discard(id)
            case Membership():
                self.groups_by_principal[entity.principal_id].discard(entity.group_id)
            case Policy():
                del self.policies_by_resource[entity.resource_id][id]
                del self.policies_by_group[entity.group_id][id]
            case Gateway():
                self.gateways_by_site[entity.site_id].discard(id)
            case _:
                pass


class CompiledPolicy:
    """A policy with its conditions made ready to be asked."""

    __slots__ = ("lease", "networks", "policy", "windows")

    def __init__(self, policy: Policy) -> None:
        conditions = policy.conditions
        self.policy = policy
        self.lease = timedelta(seconds=policy.lease_s)
        self.networks = None if conditions.remote_ip is None else Networks(conditions.remote_ip)
        self.windows = None if conditions.current_time is None else Windows(conditions.current_time)

    def violated(self, remote_ip: str | None, instant: datetime) -> list[str]:
        """The properties that this policy sees violated at the instant."""
        names: list[str] = []
        policy = self.policy
        if policy.disabled:
            names.append("policy_disabled")
        if policy.expires_at is not None and policy.expires_at <= instant:
            names.append("policy_expired")
        if self.networks is not None and not self.networks.holds(remote_ip):
            names.append("remote_ip")
        if self.windows is not None and not self.windows.contains(instant):
            names.append("current_time")
        return names

    def expiry(self, instant: datetime, token_expires_at: datetime | None) -> datetime:
        """When access by this policy, which must allow at the instant, ends at the latest."""
        expires_at = instant + self.lease
        if token_expires_at is not None and token_expires_at < expires_at:
            expires_at = token_expires_at
        policy_expires_at = self.policy.expires_at
        if policy_expires_at is not None and policy_expires_at < expires_at:
            expires_at = policy_expires_at
        if self.windows is not None:
            expires_at = self.windows.end(instant, expires_at) or instant
        return expires_at


class Networks:
    """A `remote_ip` condition, compiled. A value that is no network makes it hold for nobody."""

    __slots__ = ("_is_in", "_prefixes")

    def __init__(self, condition: RemoteIpCondition) -> None:
        self._is_in = condition.operator == "is_in"
        self._prefixes = _prefixes(condition.values)

    def holds(self, remote_ip: str | None) -> bool:
        """Whether the condition holds for this address; an unknown or malformed one fails."""
        address = None if remote_ip is None else parse_address(remote_ip)
        if address is None or self._prefixes is None:
            return False
        return _contains(self._prefixes, address) == self._is_in


def in_networks(networks: Iterable[str], remote_ip: str) -> bool:
    """Whether the address is in one of the networks, as `remote_ip` conditions read them."""
    prefixes, address = _prefixes(tuple(networks)), parse_address(remote_ip)
    return prefixes is not None and address is not None and _contains(prefixes, address)


def decide(snapshot: Snapshot, request: Request, instant: datetime) -> Decision:
    """Allow with a policy and an expiry, or deny with every violated property.

    `instant` is aware. The answer holds until `expires_at`, as long as nothing that it depends on
    changes: the account, the client, its principal, token and address, the group, the policy.
    """
    if snapshot.account is None or request.resource_id not in snapshot.resources:
        return Denied("not_found")
    common = common_violations(snapshot, request, instant)
    principal = principal_of(snapshot, request)
    if principal is None:
        return Denied("forbidden", _ordered(common))
    token_expires_at = token_expiry(snapshot, request)
    best: Allowed | None = None
    violated = set(common)
    candidates = 0
    for compiled in snapshot.policies_by_resource.get(request.resource_id, {}).values():
        if not snapshot.is_member(principal, compiled.policy.group_id):
            continue
        candidates += 1
        names = compiled.violated(request.remote_ip, instant)
        if names or common:
            violated.update(names)
            continue
        allowed = Allowed(compiled.policy.id, compiled.expiry(instant, token_expires_at))
        if best is None or _is_better(allowed, best):
            best = allowed
    if best is not None:
        return best
    if not candidates:
        violated.add("policy")
    return Denied("forbidden", _ordered(violated))


def expiry_by(
    snapshot: Snapshot, request: Request, policy_id: UUID, instant: datetime
) -> datetime | None:
    """When access by this policy alone ends, or None if it does not allow the request."""
    compiled = snapshot.policies_by_resource.get(request.resource_id, {}).get(policy_id)
    principal = principal_of(snapshot, request)
    if compiled is None or principal is None:
        return None
    if not snapshot.is_member(principal, compiled.policy.group_id):
        return None
    if common_violations(snapshot, request, instant):
        return None
    if compiled.violated(request.remote_ip, instant):
        return None
    return compiled.expiry(instant, token_expiry(snapshot, request))


def common_violations(snapshot: Snapshot, request: Request, instant: datetime) -> list[str]:
    """The violated properties of a request that do not depend on any policy."""
    violated: list[str] = []
    if snapshot.account is None or snapshot.account.disabled:
        violated.append("account_disabled")
    principal = principal_of(snapshot, request)
    if principal is None:
        violated.append("client" if request.principal_id is None else "principal")
    elif principal.disabled:
        violated.append("principal_disabled")
    if request.principal_id is not None:
        return violated
    token = None if request.token_id is None else snapshot.tokens.get(request.token_id)
    if (
        token is None
        or token.kind != "client"
        or (principal is not None and token.principal_id != principal.id)
    ):
        violated.append("token")
    elif token.expires_at is not None and token.expires_at <= instant:
        violated.append("token_expired")
    return violated


def principal_of(snapshot: Snapshot, request: Request) -> Principal | None:
    """Whose request it is."""
    if request.principal_id is not None:
        return snapshot.principals.get(request.principal_id)
    client = None if request.client_id is None else snapshot.clients.get(request.client_id)
    return None if client is None else snapshot.principals.get(client.principal_id)


def token_expiry(snapshot: Snapshot, request: Request) -> datetime | None:
    """When the token of the request ends, if it names one that does."""
    token = None if request.token_id is None else snapshot.tokens.get(request.token_id)
    return None if token is None else token.expires_at


def visible_resources(snapshot: Snapshot, client_id: UUID) -> dict[UUID, Resource]:
    """The resources that a client is told of, by id.

    Those that an enabled policy gives to a group of its principal. Conditions and expiry do not
    count: they are named when access is asked for, since they may hold again a minute later.
    """
    client = snapshot.clients.get(client_id)
    principal = None if client is None else snapshot.principals.get(client.principal_id)
    if snapshot.account is None or snapshot.account.disabled:
        return {}
    if principal is None or principal.disabled:
        return {}
    visible: dict[UUID, Resource] = {}
    for group_id in snapshot.groups_of(principal):
        for compiled in snapshot.policies_by_group.get(group_id, {}).values():
            if not compiled.policy.disabled:
                resource_id = compiled.policy.resource_id
                visible[resource_id] = snapshot.resources[resource_id]
    return visible


# --- helpers ---

_Address = tuple[int, int]
"""IP version and value."""
_Prefixes = dict[int, dict[int, set[int]]]
"""Per IP version, per count of host bits: the network parts."""


@lru_cache(maxsize=4096)
def parse_address(text: str) -> _Address | None:
    """Version and value of an address, IPv4-mapped ones as IPv4 (RFC 4291, section 2.5.5.2)."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return 4, int(address.ipv4_mapped)
    return address.version, int(address)


_MAPPED = IPv6Network("::ffff:0:0/96")


def _prefixes(values: tuple[str, ...]) -> _Prefixes | None:
    prefixes: _Prefixes = {4: {}, 6: {}}
    for value in values:
        try:
            network = ip_network(value, strict=False)
        except ValueError:
            return None
        if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
            low = int(network.network_address) & 0xFFFF_FFFF
            network = IPv4Network((low, network.prefixlen - 96))
        host_bits = network.max_prefixlen - network.prefixlen
        parts = prefixes[network.version].setdefault(host_bits, set())
        parts.add(int(network.network_address) >> host_bits)
    return prefixes


def _contains(prefixes: _Prefixes, address: _Address) -> bool:
    version, value = address
    return any(value >> host_bits in parts for host_bits, parts in prefixes[version].items())


def _is_better(one: Allowed, other: Allowed) -> bool:
    if one.expires_at != other.expires_at:
        return one.expires_at > other.expires_at
    return one.policy_id < other.policy_id


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names), key=_RANK.__getitem__))
