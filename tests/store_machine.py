"""Stores against a naive model: the same random operations on every store and on the model.

The model knows no index and no order of checks: it tries a mutation, then looks at the whole
state for whatever breaks a rule. So it says which refusals are right, and a store must give one of
them. In all else several stores must agree with each other exactly.

Longer than other files: model, operations and machine are one reading of the store's rules.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, time, timedelta
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_network
from itertools import combinations
from typing import Any
from uuid import UUID

import attrs
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule, run_state_machine_as_test

from actors.model import (
    ENTITIES,
    KIND_OF,
    REFERENCES,
    Account,
    AccountLimits,
    Authorization,
    AuthProvider,
    AuthProviderCondition,
    Change,
    Client,
    ClientPostureCondition,
    ClientVerifiedCondition,
    Conditions,
    CurrentTimeCondition,
    DayWindow,
    Directory,
    DnsUpstream,
    Entity,
    EntityKind,
    Fact,
    FactTest,
    Gateway,
    Group,
    Identity,
    Membership,
    Policy,
    PolicyTest,
    Principal,
    RegionCondition,
    Relay,
    RemoteIpCondition,
    Resource,
    Retention,
    SealedSecret,
    Site,
    TimeRange,
    Token,
)
from actors.store.interface import (
    ANSWER_KEPT,
    Answer,
    Conflict,
    Contents,
    Fenced,
    Invalid,
    InvalidReference,
    LastOperator,
    Mutation,
    NotFound,
    Outdated,
    Pruned,
    Put,
    Remove,
    Repeated,
    Store,
)
from channel.messages import Filter, IpText, SocketAddress
from tests.lease_machine import LONG_NS, Refusal, choices, lease_steps, ttls
from tests.records_machine import Records, RecordsMachine

START = datetime(2026, 1, 1, tzinfo=UTC)
ACCOUNT_IDS = [UUID(int=0xA00 + n) for n in range(2)]
KINDS: list[EntityKind] = list(ENTITIES)
accounts = st.sampled_from(ACCOUNT_IDS)

# --- entities from small pools, so that they meet ------------------------------------------------


def ids(kind: EntityKind) -> st.SearchStrategy[UUID]:
    """Ids of one kind; accounts share them, as ids of different accounts may be equal."""
    return st.sampled_from([id_of(kind, n) for n in range(5 if kind == "token" else 3)])


def id_of(kind: EntityKind, number: int) -> UUID:
    return UUID(int=0x100 * (KINDS.index(kind) + 1) + number)


names = st.sampled_from(["Hall", "Loft", "Käfer"])
instants = st.integers(0, 5).map(lambda minutes: START + timedelta(minutes=minutes))
keys = st.sampled_from([bytes([n]) * 32 for n in range(3)])
networks = st.sampled_from(["10.0.0.0/8", "192.0.2.0/24", "2001:db8::/32", "0.0.0.0/0"])
ipv4s = st.sampled_from(["100.64.0.1", "100.64.0.2", "100.72.0.1", "10.0.0.1"]).map(IPv4Address)
ipv6s = st.sampled_from(["fd48:4c57:5900::1", "fd48:4c57:5900::2", "fd00::1"]).map(IPv6Address)
ranges_ipv4 = st.sampled_from(["100.64.0.0/11", "100.64.0.0/16"]).map(ip_network)
UPSTREAMS = (
    DnsUpstream(kind="do53", address="192.0.2.53"),
    DnsUpstream(kind="do53", address="[2001:db8::53]:5353"),
    DnsUpstream(kind="doh", address="https://dns.example/dns-query"),
)
ONE_DAY = Retention(
    changes_days=1, authorizations_days=1, sessions_days=1, flows_days=1, requests_days=1
)
retentions = st.just(ONE_DAY) | st.builds(
    Retention,
    changes_days=st.sampled_from([1, 2]), authorizations_days=st.sampled_from([1, 2]),
    sessions_days=st.sampled_from([1, 2]), flows_days=st.sampled_from([1, 2]),
    requests_days=st.sampled_from([1, 400]),
)  # fmt: skip
filters = st.builds(Filter, protocol=st.sampled_from(["tcp", "udp"]), port_start=st.integers(0, 9))
facts = st.one_of(
    st.builds(Fact, name=st.just("os_version"), value=st.sampled_from(["14.2", "14.10"])),
    st.builds(Fact, name=st.just("disk_encrypted"), value=st.booleans()),
    st.builds(Fact, name=st.just("build"), value=st.integers(-(2**63), 2**63 - 1)),
)
postures = st.lists(facts, max_size=2, unique_by=lambda fact: fact.name).map(tuple)
secrets = st.none() | st.builds(
    SealedSecret, key_id=st.integers(0, 2), box=st.binary(min_size=40, max_size=60)
)
conditions = st.builds(
    Conditions,
    remote_ip_location_region=st.none()
    | st.builds(
        RegionCondition,
        operator=st.sampled_from(["is_in", "is_not_in"]),
        values=st.sampled_from([("DE",), ("AT", "CH")]),
    ),
    auth_provider=st.none()
    | st.builds(
        AuthProviderCondition,
        operator=st.just("is_in"),
        values=st.tuples(st.deferred(lambda: ids("auth_provider"))),
    ),
    client_verified=st.none() | st.builds(ClientVerifiedCondition, value=st.booleans()),
    client_posture=st.none()
    | st.builds(
        ClientPostureCondition,
        facts=st.sampled_from(
            [
                (FactTest(name="os_version", operator="at_least", value="14.9"),),
                (FactTest(name="build", operator="at_most", value=7),),
                (FactTest(name="disk_encrypted", operator="is", value=True),),
            ]
        ),
    ),
    remote_ip=st.none()
    | st.builds(
        RemoteIpCondition,
        operator=st.sampled_from(["is_in", "is_not_in"]),
        values=st.tuples(networks),
    ),
    current_time=st.none()
    | st.builds(
        CurrentTimeCondition,
        zone=st.sampled_from(["UTC", "Europe/Berlin"]),
        windows=st.tuples(
            st.builds(
                DayWindow,
                day=st.integers(0, 6),
                ranges=st.lists(
                    st.builds(
                        TimeRange,
                        start=st.times(max_value=time(11)),
                        end=st.times(min_value=time(12)),
                    ),
                    max_size=2,
                ).map(tuple),
            )
        ),
    ),
)


def entities(account_id: UUID) -> st.SearchStrategy[Entity]:
    """Entities of one account; some break a rule."""
    return st.one_of(*entities_by_kind(account_id).values())


@cache
def entities_by_kind(account_id: UUID) -> dict[EntityKind, st.SearchStrategy[Any]]:
    common = {"account_id": st.just(account_id), "created_at": instants}
    user, site = ids("principal"), ids("site")
    agent = {**common, "token_id": ids("token"), "device_key": keys, "name": names}
    address = {"ipv4": ipv4s, "ipv6": ipv6s}
    owners = {"client": (user, st.none()), "api": (user, st.none()), "gateway": (st.none(), site)}

    def token(kind: str) -> st.SearchStrategy[Token]:
        principal_id, site_id = owners.get(kind, (st.none(), st.none()))
        provider = st.none() | ids("auth_provider") if kind == "client" else st.none()
        scopes = (
            st.sampled_from([(), ("*:read", "policies:write")]) if kind == "api" else st.just(())
        )
        return st.builds(
            Token, **common, id=ids("token"), kind=st.just(kind), name=names, hash=keys,
            principal_id=principal_id, site_id=site_id, max_uses=st.sampled_from([None, 1, 2]),
            expires_at=st.none() | instants, allowed_sources=st.just(()) | st.tuples(networks),
            auth_provider_id=provider, scopes=scopes,
        )  # fmt: skip

    some_sites = st.lists(site, min_size=1, max_size=3, unique=True).map(tuple)
    some_devices = st.lists(ids("client"), max_size=3, unique=True).map(tuple)
    lying = {**common, "id": ids("resource"), "name": names}
    lying["filters"] = st.lists(filters, max_size=2).map(tuple)
    directory = ids("directory")

    return {
        "account": st.builds(
            Account, id=st.just(account_id), name=names, slug=st.sampled_from(["a", "b"]),
            range_ipv4=ranges_ipv4, created_at=instants, disabled=st.booleans(),
            search_domain=st.sampled_from([None, "corp.example"]),
            dns_upstreams=st.sampled_from([(), UPSTREAMS]),
            limits=st.builds(AccountLimits, principals=st.sampled_from([None, 0, 7])),
            retention=retentions,
        ),
        "principal": st.builds(
            Principal, **common, id=user, name=names,
            kind=st.sampled_from(["user", "service_account"]),
            email=st.sampled_from([None, "a@example.com"]),
        ),
        "auth_provider": st.builds(
            AuthProvider, **common, id=ids("auth_provider"), name=names,
            kind=st.sampled_from(["oidc", "google", "okta", "entra"]), client_secret=secrets,
            issuer=st.just("https://id.example/realm"), client_id=st.just("holloway"),
            context=st.sampled_from(["clients", "both"]), disabled=st.booleans(),
        ) | st.builds(
            AuthProvider, **common, id=ids("auth_provider"), name=names, kind=st.just("email")
        ),
        "directory": st.builds(
            Directory, **common, id=directory, name=names, credentials=secrets,
            kind=st.sampled_from(["google", "scim"]), synced_at=st.none() | instants,
            last_error=st.sampled_from(["", "429"]),
        ),
        "identity": st.builds(
            Identity, **common, id=ids("identity"), principal_id=user,
            auth_provider_id=ids("auth_provider"), issuer=st.just("https://id.example/realm"),
            subject=st.sampled_from(["s1", "s2"]),
        ),
        "group": st.builds(
            Group, **common, id=ids("group"), name=names,
            kind=st.sampled_from(["static", "static", "everyone"]),
        ) | st.builds(
            Group, **common, id=ids("group"), name=names, kind=st.just("synced"),
            directory_id=directory, external_id=st.sampled_from(["g1", "g2"]),
        ),
        "membership": st.builds(
            Membership, **common, id=ids("membership"), group_id=ids("group"), principal_id=user
        ),
        "site": st.builds(
            Site, **common, id=site, name=names,
            kind=st.sampled_from(["static", "static", "internet"]),
        ),
        "resource": st.one_of(
            st.builds(
                Resource, **lying, site_ids=some_sites, kind=st.just("cidr"), address=networks
            ),
            st.builds(
                Resource, **lying, site_ids=some_sites, kind=st.just("dns"),
                address=st.sampled_from(["*.corp.example", "**.example", "db-?.corp.example"]),
                ip_stack=st.sampled_from(["v4", "v6", "dual"]),
            ),
            st.builds(Resource, **lying, site_ids=st.tuples(site), kind=st.just("internet")),
            st.builds(
                Resource, **lying, site_ids=st.just(()), kind=st.just("device_pool"),
                device_ids=some_devices,
            ),
        ),
        "policy": st.builds(
            Policy, **common, id=ids("policy"), group_id=ids("group"), resource_id=ids("resource"),
            conditions=conditions, description=st.sampled_from(["", "two\nlines"]),
            expires_at=st.none() | instants, lease_s=st.sampled_from([60, 86_400]),
        ),
        "policy_test": st.builds(
            PolicyTest, **common, id=ids("policy_test"), name=names, principal_id=user,
            resource_id=ids("resource"), expected=st.sampled_from(["allowed", "denied"]),
            at=st.none() | instants, remote_ip=st.sampled_from([None, IpText("2001:db8::7")]),
            auth_provider_id=st.none() | ids("auth_provider"),
            client_verified=st.sampled_from([None, True]), posture=postures,
        ),
        "token": st.sampled_from(["client", "api", "gateway", "gateway", "client", "relay"])
        .flatmap(token),
        "client": st.builds(
            Client, **agent, **address, id=ids("client"), principal_id=user, posture=postures
        ),
        "gateway": st.builds(Gateway, **agent, **address, id=ids("gateway"), site_id=site),
    }  # fmt: skip


def mutations(account_id: UUID) -> st.SearchStrategy[Mutation]:
    """Mostly Puts; Removes of every kind but, mostly, the account."""
    removable = [kind for kind in KINDS if kind != "account"]
    remove = st.sampled_from(removable).flatmap(
        lambda kind: ids(kind).map(lambda id: Remove(kind, id))
    )
    put = entities(account_id).map(Put)
    whole = st.just(Remove("account", account_id))
    return st.integers(0, 19).flatmap(lambda n: whole if n == 0 else remove if n < 5 else put)


def population(account_id: UUID) -> list[Put]:
    """One entity of each kind, so that most references of later Puts have something to meet."""
    number = ACCOUNT_IDS.index(account_id)
    common: dict[str, Any] = {"account_id": account_id, "created_at": START}
    person, group, place = id_of("principal", 0), id_of("group", 0), id_of("site", 0)
    provider = id_of("auth_provider", 0)
    enrolling, joining = id_of("token", 2 * number), id_of("token", 2 * number + 1)
    address = {"ipv4": IPv4Address("100.64.0.1"), "ipv6": IPv6Address("fd48:4c57:5900::1")}
    other = {"ipv4": IPv4Address("100.64.0.2"), "ipv6": IPv6Address("fd48:4c57:5900::2")}
    everything: list[Entity] = [
        Account(
            id=account_id, name="N", slug="ab"[number], created_at=START, retention=ONE_DAY
        ),
        Principal(**common, id=person, name="Hall"),
        Group(**common, id=group, name="Hall"),
        Group(**common, id=id_of("group", 1), name="Loft", kind="everyone"),
        AuthProvider(
            **common, id=provider, name="Hall", kind="oidc", issuer="https://id.example/realm",
            client_id="holloway", client_secret=SealedSecret(key_id=1, box=bytes(40)),
        ),
        Directory(**common, id=id_of("directory", 0), name="Hall", kind="okta"),
        Identity(
            **common, id=id_of("identity", 0), principal_id=person, auth_provider_id=provider,
            issuer="https://id.example/realm", subject="s1",
        ),
        Group(
            **common, id=id_of("group", 2), name="Käfer", kind="synced",
            directory_id=id_of("directory", 0), external_id="g1",
        ),
        Membership(**common, id=id_of("membership", 0), group_id=group, principal_id=person),
        Site(**common, id=place, name="Hall"),
        Site(**common, id=id_of("site", 1), name="Loft", kind="internet"),
        Resource(
            **common, id=id_of("resource", 0), site_ids=(place, id_of("site", 1)), name="Hall",
            kind="cidr", address="10.0.0.0/8",
        ),
        Resource(
            **common, id=id_of("resource", 1), site_ids=(id_of("site", 1),), name="Loft",
            kind="internet",
        ),
        PolicyTest(
            **common, id=id_of("policy_test", 0), name="Hall", principal_id=person,
            resource_id=id_of("resource", 0), expected="allowed", auth_provider_id=provider,
        ),
        Policy(**common, id=id_of("policy", 0), group_id=group, resource_id=id_of("resource", 0)),
        Token(
            **common, id=enrolling, kind="client", name="T", hash=bytes(32), principal_id=person,
            max_uses=1, auth_provider_id=provider,
        ),
        Token(**common, id=joining, kind="gateway", name="T", hash=bytes(32), site_id=place),
        Client(
            **common, **address, id=id_of("client", 0), principal_id=person, token_id=enrolling,
            device_key=bytes(32), name="C",
        ),
        Gateway(
            **common, **other, id=id_of("gateway", 0), site_id=place, token_id=joining,
            device_key=bytes(32), name="G",
        ),
        Resource(
            **common, id=id_of("resource", 2), site_ids=(), name="Käfer", kind="device_pool",
            device_ids=(id_of("client", 0),),
        ),
    ]  # fmt: skip
    return [Put(entity) for entity in everything]


# --- the naive model -----------------------------------------------------------------------------


UNIQUE_TOGETHER = {
    "auth_provider": [["name"]],
    "directory": [["name"]],
    "identity": [["auth_provider_id", "issuer", "subject"]],
    "group": [["name"], ["directory_id", "external_id"]],
    "membership": [["group_id", "principal_id"]],
    "site": [["name"]],
    "resource": [["name"]],
    "policy_test": [["name"]],
    "client": [["device_key"]],
    "gateway": [["device_key"]],
}
COUPLED: dict[type[Entity], set[str]] = {
    Token: {"kind", "auth_provider_id", "scopes"},
    Group: {"kind", "directory_id", "external_id"},
    Resource: {"kind", "address", "ip_stack", "site_ids", "device_ids"},
    AuthProvider: {"kind", "issuer", "client_id", "client_secret"},
}
"""Fields that fit each other only within one entity."""


@attrs.define
class Model(Records):
    """The state as lists, and what the interface promises of it."""

    uses: dict[UUID, int] = attrs.Factory(dict)
    installation_tokens: list[Token] = attrs.Factory(list)
    epochs: dict[UUID, int] = attrs.Factory(dict)
    answers: dict[tuple[UUID, str], Answer] = attrs.Factory(dict)
    relays: dict[UUID, Relay] = attrs.Factory(dict)

    def find(self, account_id: UUID, kind: EntityKind, id: UUID) -> Entity | None:
        for entity in self.entities:
            if KIND_OF[type(entity)] == kind and entity.id == id and owner(entity) == account_id:
                return entity
        return None

    def of(self, account_id: UUID, kind: EntityKind) -> list[Entity]:
        found = [e for e in self.entities if owner(e) == account_id and KIND_OF[type(e)] == kind]
        return sorted(found, key=lambda entity: entity.id)

    def put(self, account_id: UUID, entity: Entity) -> tuple[list[Entity], set[Refusal]]:
        """The entities after the Put, and what is wrong with them."""
        kind = KIND_OF[type(entity)]
        if kind != "account" and self.find(account_id, "account", account_id) is None:
            return [], {(NotFound, "", "")}
        before = self.find(account_id, kind, entity.id)
        after = [each for each in self.entities if each is not before] + [entity]
        return after, set(wrong(after, self.installation_tokens, entity))

    def closure(self, account_id: UUID, kind: EntityKind, id: UUID) -> list[Entity]:
        """The entity and everything that refers to it, however indirectly."""
        gone = [entity for entity in [self.find(account_id, kind, id)] if entity is not None]
        if kind == "account" and gone:
            return [entity for entity in self.entities if owner(entity) == account_id]
        for entity in gone:
            for other in self.entities:
                if (
                    owner(other) == account_id
                    and other not in gone
                    and (refers(other, entity) or has_lost_its_last_site(other, gone))
                ):
                    gone.append(other)
        return gone

    def without(self, account_id: UUID, gone: list[Entity]) -> list[Entity]:
        """What is left, and knows nothing any more of what is gone."""
        return [
            bereft(entity, gone) if owner(entity) == account_id else entity
            for entity in self.entities
            if entity not in gone
        ]


def owner(entity: Entity) -> UUID | None:
    return entity.id if isinstance(entity, Account) else entity.account_id


def refers(entity: Entity, target: Entity) -> bool:
    fields = REFERENCES.get(KIND_OF[type(entity)], {})
    return any(
        kind == KIND_OF[type(target)] and getattr(entity, field) == target.id
        for field, kind in fields.items()
    )


def has_lost_its_last_site(entity: Entity, gone: list[Entity]) -> bool:
    if not isinstance(entity, Resource) or not entity.site_ids:
        return False
    sites = [each.id for each in gone if isinstance(each, Site)]
    return all(id in sites for id in entity.site_ids)


def bereft(entity: Entity, gone: list[Entity]) -> Entity:
    """An entity whose members are only those that are still there."""
    if not isinstance(entity, Resource):
        return entity
    sites = [each.id for each in gone if isinstance(each, Site)]
    devices = [each.id for each in gone if isinstance(each, Client)]
    return attrs.evolve(
        entity,
        site_ids=tuple(id for id in entity.site_ids if id not in sites),
        device_ids=tuple(id for id in entity.device_ids if id not in devices),
    )


def shown(entity: Entity | None) -> Entity | None:
    """What changes and contents tell of an entity."""
    if isinstance(entity, AuthProvider) and entity.client_secret is not None:
        return attrs.evolve(entity, client_secret=attrs.evolve(entity.client_secret, box=b""))
    if isinstance(entity, Directory) and entity.credentials is not None:
        return attrs.evolve(entity, credentials=attrs.evolve(entity.credentials, box=b""))
    return entity


def wrong(entities: list[Entity], installation: list[Token], entity: Entity) -> list[Refusal]:
    """Every reason why `entity` must not be among `entities`."""
    kind = KIND_OF[type(entity)]
    found: list[Refusal] = []
    if isinstance(entity, Token):
        if entity.kind in ("relay", "operator"):
            found.append((Invalid, "token", "account_id"))
        others = [each for each in entities if isinstance(each, Token) and each is not entity]
        if any(each.id == entity.id for each in (*others, *installation)):
            found.append((Conflict, "token", "id"))
    for field, target in REFERENCES.get(kind, {}).items():
        id = getattr(entity, field)
        if id is not None and not any(
            KIND_OF[type(each)] == target and each.id == id and owner(each) == owner(entity)
            for each in entities
        ):
            found.append((InvalidReference, kind, field))
    if isinstance(entity, Resource):
        mine = [each for each in entities if owner(each) == entity.account_id]
        if not {e.id for e in mine if isinstance(e, Site)} >= set(entity.site_ids):
            found.append((InvalidReference, "resource", "site_ids"))
        if not {e.id for e in mine if isinstance(e, Client)} >= set(entity.device_ids):
            found.append((InvalidReference, "resource", "device_ids"))
    if isinstance(entity, Resource | Site):
        mine = [each for each in entities if owner(each) == entity.account_id]
        internet = [e for e in mine if isinstance(e, Resource) and e.kind == "internet"]
        places = [e for e in mine if isinstance(e, Site) and e.kind != "internet"]
        for each in internet:
            if any(place.id in each.site_ids and entity in (each, place) for place in places):
                found.append((Invalid, "resource", "site_ids"))
    for one, other in combinations(entities, 2):
        if entity in (one, other):
            found += clashes(entity, other if entity is one else one)
    if isinstance(entity, Account):
        for each in entities:
            if owner(each) == entity.id and isinstance(each, Client | Gateway):
                for field in out_of_range(each, entity):
                    found.append((Invalid, "account", f"range_{field}"))
    if isinstance(entity, Client | Gateway):
        for each in entities:
            if isinstance(each, Account) and each.id == entity.account_id:
                found += [(Invalid, kind, field) for field in out_of_range(entity, each)]
    return found


def clashes(entity: Entity, other: Entity) -> list[Refusal]:
    kind = KIND_OF[type(entity)]
    if isinstance(entity, Account):
        same = isinstance(other, Account) and other.slug == entity.slug
        return [(Conflict, "account", "slug")] if same else []
    if owner(entity) != owner(other):
        return []
    found: list[Refusal] = []
    for fields in UNIQUE_TOGETHER.get(kind, []) if type(entity) is type(other) else []:
        values = [getattr(entity, field) for field in fields]
        if None not in values and values == [getattr(other, field) for field in fields]:
            found.append((Conflict, kind, fields[-1]))
    if isinstance(entity, Group) and isinstance(other, Group):
        found += [(Conflict, kind, "kind")] if entity.kind == other.kind == "everyone" else []
    for managed in (Site, Resource):
        if isinstance(entity, managed) and isinstance(other, managed):
            found += [(Conflict, kind, "kind")] if entity.kind == other.kind == "internet" else []
    if isinstance(entity, Client | Gateway) and isinstance(other, Client | Gateway):
        for field in ("ipv4", "ipv6"):
            if getattr(entity, field) == getattr(other, field):
                found.append((Conflict, kind, field))
    return found


def out_of_range(agent: Client | Gateway, account: Account) -> list[str]:
    inside = {"ipv4": agent.ipv4 in account.range_ipv4, "ipv6": agent.ipv6 in account.range_ipv6}
    return [field for field, is_inside in inside.items() if not is_inside]


# --- the machine ---------------------------------------------------------------------------------


class StoreMachine(RecordsMachine):
    """Runs in a worker thread of trio; `stores` are empty at the start of each example."""

    model: Model

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    @initialize(populated=st.sampled_from([ACCOUNT_IDS, ACCOUNT_IDS, ACCOUNT_IDS[:1], []]))
    def populate(self, populated: list[UUID]) -> None:
        for account_id, name in zip(populated, ["north", "south"], strict=False):
            self.carry_out(account_id, population(account_id), START)
            self.join(name, ttl_ns=LONG_NS)
            self.acquire(account_id, life=0)

    @rule(account_id=accounts, at=instants)
    def repopulate(self, account_id: UUID, at: datetime) -> None:
        """What was removed comes back, with the same ids."""
        for mutation in population(account_id):
            entity = mutation.entity
            if self.model.find(account_id, KIND_OF[type(entity)], entity.id) is None:
                self.carry_out(account_id, [mutation], at)

    @rule(data=st.data(), account_id=accounts, at=instants)
    def apply(self, data: st.DataObject, account_id: UUID, at: datetime) -> None:
        wanted = data.draw(st.lists(mutations(account_id), min_size=1, max_size=4))
        self.carry_out(account_id, wanted, at)

    @rule(data=st.data(), account_id=accounts, at=instants)
    def apply_one(self, data: st.DataObject, account_id: UUID, at: datetime) -> None:
        self.carry_out(account_id, [data.draw(mutations(account_id))], at)

    @rule(data=st.data(), account_id=accounts, at=instants)
    def edit(self, data: st.DataObject, account_id: UUID, at: datetime) -> None:
        """Give an entity some fields of another of its kind, or put it back as it is."""
        mine = [entity for entity in self.model.entities if owner(entity) == account_id]
        if not mine:
            return
        entity = data.draw(st.sampled_from(mine))
        donor = data.draw(entities_by_kind(account_id)[KIND_OF[type(entity)]])
        fixed = {"id", "account_id", "principal_id", "site_id", "token_id"}
        fixed |= COUPLED.get(type(entity), set())
        names = {field.name for field in attrs.fields(type(entity))} - fixed
        taken = data.draw(st.sets(st.sampled_from(sorted(names)), max_size=2))
        fields = {name: getattr(donor, name) for name in taken}
        self.carry_out(account_id, [Put(attrs.evolve(entity, **fields))], at)

    @rule(data=st.data(), account_id=accounts, at=instants)
    def remove(self, data: st.DataObject, account_id: UUID, at: datetime) -> None:
        mine = [entity for entity in self.model.entities if owner(entity) == account_id]
        if mine:
            entity = data.draw(st.sampled_from(mine))
            self.carry_out(account_id, [Remove(KIND_OF[type(entity)], entity.id)], at)

    @rule(data=st.data(), account_id=accounts, at=instants, late=st.sampled_from([0, 0, 0, 1]))
    def apply_once(self, data: st.DataObject, account_id: UUID, at: datetime, late: int) -> None:
        """With an idempotency key, and only on top of the change that the caller knows."""
        days = data.draw(st.integers(0, 2))
        answer = Answer(
            token_id=data.draw(ids("token")), key=data.draw(st.sampled_from(["k1", "k2"])),
            request_hash=data.draw(keys), status=201, body=b"{}", at=at + timedelta(days=days),
        )  # fmt: skip
        number = len(self.model.changes.get(account_id, [])) - late
        wanted = [data.draw(mutations(account_id))]
        self.carry_out(account_id, wanted, at, number=number, answer=answer)
        kept = self.model.answers.get((answer.token_id, answer.key))
        given = self.ask(lambda store: store.answer_of(answer.token_id, answer.key))
        assert given == ("done", kept)

    @rule(
        account_id=accounts,
        kinds=st.lists(
            st.sampled_from(["site", "client", "token", "principal", "auth_provider", "directory"]),
            min_size=1,
            max_size=3,
        ),
        at=instants,
    )
    def fall_apart(self, account_id: UUID, kinds: list[EntityKind], at: datetime) -> None:
        """What others refer to, or have as a member, goes from a full account."""
        self.repopulate(account_id, START)
        for kind in kinds:
            for entity in self.model.of(account_id, kind)[:1]:
                self.carry_out(account_id, [Remove(kind, entity.id)], at)

    def carry_out(
        self,
        account_id: UUID,
        wanted: Sequence[Mutation],
        at: datetime,
        *,
        number: int | None = None,
        answer: Answer | None = None,
    ) -> None:
        answers = self.ask_each(
            lambda store: store.apply(
                account_id, wanted, who="t", at=at, number=number, answer=answer
            )
        )
        if answers[0][0] == "refused":
            for kind, refusal in answers:
                assert kind == "refused"
                self.check_refusal(account_id, wanted, refusal, number, answer)
            return
        assert self.refused_at_once(account_id, number, answer) is None
        if answer is not None:
            self.model.answers[answer.token_id, answer.key] = answer
        for answer in answers[1:]:
            assert answer == answers[0], [a for a in answers if a[0] == "refused"]
        self.check_changes(account_id, wanted, list(answers[0][1]), at)

    def refused_at_once(
        self, account_id: UUID, number: int | None, answer: Answer | None
    ) -> Refusal | None:
        """Why not even the first mutation is looked at."""
        if answer is not None:
            known = self.model.answers.get((answer.token_id, answer.key))
            if known is not None and known.at > answer.at - ANSWER_KEPT:
                return Repeated, "", ""
            tokens = [each for each in self.model.entities if isinstance(each, Token)]
            if all(
                each.id != answer.token_id for each in (*tokens, *self.model.installation_tokens)
            ):
                return InvalidReference, "answer", "token_id"
        if number is not None and number != len(self.model.changes.get(account_id, [])):
            return Outdated, "", ""
        return None

    def check_refusal(
        self,
        account_id: UUID,
        wanted: Sequence[Mutation],
        given: Refusal,
        number: int | None,
        answer: Answer | None,
    ) -> None:
        trial = attrs.evolve(self.model, entities=list(self.model.entities))
        invalid = [
            refusal
            for mutation in wanted
            if isinstance(mutation, Put)
            for refusal in wrong([mutation.entity], [], mutation.entity)
            if refusal == (Invalid, "token", "account_id")
        ]
        if invalid:
            assert given in invalid
            return
        at_once = self.refused_at_once(account_id, number, answer)
        if at_once is not None:
            assert given == at_once
            return
        for mutation in wanted:
            if isinstance(mutation, Put):
                after, refusals = trial.put(account_id, mutation.entity)
            else:
                gone = trial.closure(account_id, mutation.kind, mutation.id)
                after = trial.without(account_id, gone)
                refusals = set() if gone else {(NotFound, "", "")}
            if refusals:
                assert given in refusals
                return
            trial.entities = after
        raise AssertionError(f"refused for no reason: {given}")

    def check_changes(
        self, account_id: UUID, wanted: Sequence[Mutation], given: list[Change], at: datetime
    ) -> None:
        model = self.model
        log = model.changes.setdefault(account_id, [])
        numbers = range(len(log) + 1, len(log) + len(given) + 1)
        assert [change.number for change in given] == list(numbers)
        assert all((change.at, change.who) == (at, "t") for change in given)
        log.extend(given)
        for mutation in wanted:
            if isinstance(mutation, Put):
                entity = mutation.entity
                before = model.find(account_id, KIND_OF[type(entity)], entity.id)
                after, refusals = model.put(account_id, entity)
                assert not refusals
                if before != entity:
                    change = given.pop(0)
                    assert (change.before, change.after) == (shown(before), shown(entity))
                model.entities = after
                continue
            gone = model.closure(account_id, mutation.kind, mutation.id)
            assert len(gone) > 0
            count = next(
                place
                for place, change in enumerate(given, 1)
                if (change.kind, change.entity_id) == (mutation.kind, mutation.id)
                and change.after is None
            )
            steps, given = given[:count], given[count:]
            removed = [change.before for change in steps if change.after is None]
            assert sorted(map(repr, removed)) == sorted(repr(shown(entity)) for entity in gone)
            for position, entity in enumerate(removed):
                assert not any(refers(later, entity) for later in removed[position + 1 :] if later)
            after = model.without(account_id, gone)
            self.check_members(account_id, [c for c in steps if c.after is not None], after)
            model.entities = after
            for entity in gone:
                if isinstance(entity, Token):
                    self.forget_token(entity.id)
                model.seen.pop((account_id, entity.id), None)
            if mutation.kind == "account":
                self.forget(account_id)
        assert given == []

    def check_members(self, account_id: UUID, changes: list[Change], after: list[Entity]) -> None:
        """Whatever is left lost its members one by one."""
        now = {each.id: each for each in self.model.of(account_id, "resource")}
        for change in changes:
            assert now[change.entity_id] == change.before
            assert isinstance(change.before, Resource)
            assert isinstance(change.after, Resource)
            for field in ("site_ids", "device_ids"):
                left = getattr(change.after, field)
                assert left == tuple(i for i in getattr(change.before, field) if i in left)
            members = [len(e.site_ids) + len(e.device_ids) for e in (change.before, change.after)]
            assert members[0] == members[1] + 1
            now[change.entity_id] = change.after
        for entity in after:
            if isinstance(entity, Resource) and entity.account_id == account_id:
                assert now[entity.id] == entity

    def forget_token(self, id: UUID) -> None:
        model = self.model
        model.uses.pop(id, None)
        model.used_at.pop(id, None)
        for key in [key for key in model.answers if key[0] == id]:
            del model.answers[key]

    def forget(self, account_id: UUID) -> None:
        model = self.model
        self.leases.owners.pop(account_id, None)
        for key in [key for key in model.authorizations if key[0] == account_id]:
            del model.authorizations[key]

    @rule(data=st.data(), account_id=accounts, kind=st.sampled_from(KINDS))
    def read(self, data: st.DataObject, account_id: UUID, kind: EntityKind) -> None:
        id = account_id if kind == "account" else data.draw(ids(kind))
        after = data.draw(st.none() | ids(kind))
        limit = data.draw(st.integers(1, 3))
        expected = self.model.find(account_id, kind, id)
        given = self.ask(lambda store: store.get(account_id, kind, id))
        assert given == (("done", expected) if expected else ("refused", (NotFound, "", "")))
        listed = [e for e in self.model.of(account_id, kind) if after is None or e.id > after]
        assert self.ask(lambda store: store.list(account_id, kind, after=after, limit=limit)) == (
            "done",
            tuple(listed[:limit]),
        )

    @rule(account_id=accounts, after=st.integers(0, 9), limit=st.integers(1, 9))
    def read_account(self, account_id: UUID, after: int, limit: int) -> None:
        log = self.model.changes.get(account_id, [])
        given = self.ask(lambda store: store.changes(account_id, after=after, limit=limit))
        if after < self.model.pruned.get(account_id, 0):
            assert given == ("refused", (Pruned, "", ""))
        else:
            assert given == ("done", tuple(log[after : after + limit]))
        counts = {each: len(self.model.of(account_id, each)) for each in KINDS}
        assert self.ask(lambda store: store.counts(account_id)) == ("done", counts)
        known = [self.model.find(id, "account", id) for id in ACCOUNT_IDS]
        assert self.ask(lambda store: store.accounts()) == (
            "done",
            tuple(account for account in known if account),
        )
        account = self.model.find(account_id, "account", account_id)
        _, contents = self.ask(lambda store: store.contents(account_id))
        if account is None:
            assert contents[0] is NotFound
            return
        every = [shown(e) for each in KINDS[1:] for e in self.model.of(account_id, each)]
        assert contents == Contents(account, tuple(every), len(log))

    @rule(id=ids("token"), at=instants)
    def use_token(self, id: UUID, at: datetime) -> None:
        tokens = [e for e in self.model.entities if isinstance(e, Token)]
        found = [e for e in (*tokens, *self.model.installation_tokens) if e.id == id]
        token = found[0] if found else None
        assert self.ask(lambda store: store.find_token(id)) == ("done", token)
        uses = self.model.uses.get(id, 0)
        allowed = token is not None and (token.max_uses is None or uses < token.max_uses)
        assert self.ask(lambda store: store.use_token(id, at=at)) == ("done", allowed)
        if allowed:
            self.model.uses[id] = uses + 1
            self.model.used_at[id] = max(at, self.model.used_at.get(id, at))

    @rule(
        id=ids("token"),
        kind=st.sampled_from(["relay", "operator"]),
        hash=keys,
        expires_at=st.none() | instants,
    )
    def put_installation_token(
        self, id: UUID, kind: Any, hash: bytes, expires_at: datetime | None
    ) -> None:
        token = Token(
            id=id, account_id=None, kind=kind, name="T", hash=hash, created_at=START,
            expires_at=expires_at,
        )  # fmt: skip
        tokens = [e for e in self.model.entities if isinstance(e, Token)]
        taken = any(each.id == id for each in (*tokens, *self.model.installation_tokens))
        given = self.ask(lambda store: store.put_installation_token(token))
        assert given == (("refused", (Conflict, "token", "id")) if taken else ("done", None))
        if not taken:
            self.model.installation_tokens.append(token)

    @rule(after=st.none() | ids("token"), limit=st.integers(1, 3))
    def read_installation_tokens(self, after: UUID | None, limit: int) -> None:
        known = sorted(self.model.installation_tokens, key=lambda token: token.id)
        expected = tuple(token for token in known if after is None or token.id > after)[:limit]
        given = self.ask(lambda store: store.installation_tokens(after=after, limit=limit))
        assert given == ("done", expected)

    @rule(id=ids("token"), at=instants)
    def remove_installation_token(self, id: UUID, at: datetime) -> None:
        tokens = {token.id: token for token in self.model.installation_tokens}
        given = self.ask(lambda store: store.remove_installation_token(id, at=at))
        if id not in tokens:
            assert given == ("refused", (NotFound, "", ""))
            return
        token = tokens.pop(id)
        operators = [
            each
            for each in tokens.values()
            if each.kind == "operator" and (each.expires_at is None or each.expires_at > at)
        ]
        if token.kind == "operator" and not operators:
            assert given == ("refused", (LastOperator, "", ""))
            return
        assert given == ("done", None)
        self.model.installation_tokens.remove(token)
        self.forget_token(id)
        relays = {key: each for key, each in self.model.relays.items() if each.token_id != id}
        self.model.relays = relays

    @rule(
        id=ids("gateway"), token_id=ids("token"), at=instants, domain=st.sampled_from(["", "rack"])
    )
    def put_relay(self, id: UUID, token_id: UUID, at: datetime, domain: str) -> None:
        address = SocketAddress(address=IpText("192.0.2.1"), port=3478)
        other = SocketAddress(address=IpText("2001:db8::1"), port=443, transport="tls")
        relay = Relay(
            id=id,
            token_id=token_id,
            name="R",
            failure_domain=domain,
            addresses=(address, other),
            last_seen_at=at,
        )
        tokens = [each for each in self.model.installation_tokens if each.id == token_id]
        given = self.ask(lambda store: store.put_relay(relay))
        if tokens and tokens[0].kind == "relay":
            assert given == ("done", None)
            self.model.relays[id] = relay
        else:
            assert given == ("refused", (InvalidReference, "relay", "token_id"))
        relays = tuple(self.model.relays[id] for id in sorted(self.model.relays))
        assert self.ask(lambda store: store.relays()) == ("done", relays)

    @rule(account_id=accounts, life=choices)
    def acquire(self, account_id: UUID, life: int) -> None:
        node = self.leases.choose(life)
        given = self.ask(
            lambda store: store.acquire(account_id, owner=node.name, incarnation=node.incarnation)
        )
        if self.model.find(account_id, "account", account_id) is None:
            assert given == ("refused", (NotFound, "", ""))
            return
        refusal = self.leases.refusal(account_id, node)
        if refusal is not None:
            assert given == ("refused", refusal)
            return
        kind, epoch = given
        assert kind == "done"
        assert epoch > self.model.epochs.get(account_id, 0), "an epoch only grows"
        self.model.epochs[account_id] = epoch
        self.leases.take_over(account_id, node)

    @rule(account_id=accounts, life=choices)
    def release(self, account_id: UUID, life: int) -> None:
        node = self.leases.choose(life)
        assert self.ask(
            lambda store: store.release(account_id, owner=node.name, incarnation=node.incarnation)
        ) == ("done", None)
        if self.leases.owners.get(account_id) is node:
            del self.leases.owners[account_id]

    @rule(data=st.data(), account_id=accounts, steps=st.lists(lease_steps, min_size=4, max_size=12))
    def contend(self, data: st.DataObject, account_id: UUID, steps: list[str]) -> None:
        """What nodes do to one account, close together, as other rules seldom meet."""
        if self.model.find(account_id, "account", account_id) is None:
            self.repopulate(account_id, START)
        for name in ("north", "south"):
            self.join(name, LONG_NS)
        for step in steps:
            match step:
                case "join":
                    self.join(data.draw(st.sampled_from(["north", "south"])), data.draw(ttls))
                case "renew":
                    self.renew(data.draw(choices), data.draw(st.booleans()), data.draw(ttls))
                case "expel":
                    self.expel(data.draw(choices))
                case "leave":
                    self.leave(data.draw(choices))
                case "acquire":
                    self.acquire(account_id, data.draw(choices))
                case "release":
                    self.release(account_id, data.draw(choices))
                case "write":
                    self.write_authorization(data, account_id, data.draw(st.integers(0, 1)))

    @rule(data=st.data(), account_id=accounts, late=st.sampled_from([0, 0, 0, 0, 1, -1]))
    def write_authorization(self, data: st.DataObject, account_id: UUID, late: int) -> None:
        some = data.draw(ids("policy"))
        ended_at = data.draw(st.none() | st.none() | instants)
        created_at = data.draw(instants)
        asked_at = data.draw(st.none() | instants)
        authorization = Authorization(
            id=some, account_id=account_id, policy_id=some, client_id=some, gateway_id=some,
            resource_id=some, token_id=some, connection_id=some,
            remote_ip=IpText(data.draw(st.sampled_from(["192.0.2.7", "2001:db8::7"]))),
            created_at=created_at, expires_at=created_at + timedelta(minutes=2),
            ended_at=ended_at, end_reason="gone" if ended_at else "",
        )  # fmt: skip
        epoch = self.model.epochs.get(account_id, 0) - late
        given = self.ask(lambda store: store.write_authorization(authorization, epoch=epoch))
        if account_id in self.leases.owners and not late:
            assert given == ("done", None)
            self.model.authorizations[account_id, some] = authorization
        else:
            assert given == ("refused", (Fenced, "", ""))
        self.check_authorizations(account_id, asked_at)

    def check_authorizations(self, account_id: UUID, at: datetime | None) -> None:
        expected = tuple(
            each
            for (owner_id, _), each in sorted(self.model.authorizations.items())
            if owner_id == account_id
            and (at is None or (each.ended_at is None and each.expires_at > at))
        )
        given = self.ask(lambda store: store.authorizations(account_id, live_at=at))
        assert given == ("done", expected)


async def check_stores(
    make_stores: Callable[[], Awaitable[list[Store]]], *, examples: int, steps: int
) -> None:
    """Run the machine; `make_stores` gives empty stores at the start of each example."""

    class Machine(StoreMachine):
        def __init__(self) -> None:
            super().__init__()
            self.stores = trio.from_thread.run(make_stores)

    await trio.to_thread.run_sync(
        lambda: run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    )
