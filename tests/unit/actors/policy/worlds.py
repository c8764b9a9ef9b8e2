"""Small random accounts for the tests of policy, with every kind of condition in them.

`contents_of` and `mutated` keep an account as a plain dictionary of entities, as the tables of a
database would: what refers to a removed entity goes with it, found by reading everything.
"""

from __future__ import annotations

from datetime import time, timedelta
from ipaddress import IPv4Address, IPv6Address
from itertools import product
from typing import Any
from uuid import UUID

import attrs
from hypothesis import strategies as st

from actors.model import (
    KIND_OF,
    MEMBERS,
    REFERENCES,
    Account,
    AuthProvider,
    AuthProviderCondition,
    Change,
    Client,
    ClientPostureCondition,
    ClientVerifiedCondition,
    Conditions,
    CurrentTimeCondition,
    DayWindow,
    Entity,
    Fact,
    FactTest,
    Gateway,
    Group,
    Identity,
    Membership,
    Policy,
    Principal,
    RegionCondition,
    RemoteIpCondition,
    Resource,
    Site,
    TimeRange,
    Token,
)
from actors.store.interface import Contents

from .. import reading

T0 = reading.utc(2026, 3, 28, 12, 0)
A = UUID(int=1)


def id_of(kind: int, number: int) -> UUID:
    return UUID(int=kind * 1_000 + number)


ACCOUNT = Account(id=A, name="a", slug="a", created_at=T0)
USER = Principal(id=id_of(2, 0), account_id=A, name="user", created_at=T0)
ROBOT = Principal(id=id_of(2, 1), account_id=A, kind="service_account", name="robot", created_at=T0)
STAFF = Group(id=id_of(3, 0), account_id=A, name="staff", created_at=T0)
EVERYONE = Group(id=id_of(3, 1), account_id=A, kind="everyone", name="Everyone", created_at=T0)
SITE = Site(id=id_of(4, 0), account_id=A, name="site", created_at=T0)
WEB = Resource(
    id=id_of(5, 0),
    account_id=A,
    site_ids=(SITE.id,),
    name="web",
    kind="ip",
    address="10.0.0.1",
    created_at=T0,
)
DB = attrs.evolve(WEB, id=id_of(5, 1), name="db")


def token(number: int, principal: Principal, **fields: object) -> Token:
    base = Token(
        id=id_of(6, number),
        account_id=A,
        kind="client",
        name="t",
        hash=bytes(32),
        principal_id=principal.id,
        created_at=T0,
    )
    return attrs.evolve(base, **fields)  # type: ignore[arg-type]  # fields of the tests' choice


def client(number: int, principal: Principal, by: Token) -> Client:
    return Client(
        id=id_of(7, number),
        account_id=A,
        principal_id=principal.id,
        token_id=by.id,
        device_key=number.to_bytes(32, "big"),
        name="c",
        ipv4=IPv4Address("100.64.0.1"),
        ipv6=IPv6Address("fd48::1"),
        created_at=T0,
    )


def policy(number: int, group: Group, resource: Resource = WEB, **fields: object) -> Policy:
    base = Policy(
        id=id_of(8, number),
        account_id=A,
        group_id=group.id,
        resource_id=resource.id,
        created_at=T0,
    )
    return attrs.evolve(base, **fields)  # type: ignore[arg-type]  # fields of the tests' choice


def member(number: int, group: Group, principal: Principal) -> Membership:
    return Membership(
        id=id_of(9, number),
        account_id=A,
        group_id=group.id,
        principal_id=principal.id,
        created_at=T0,
    )


TOKEN = token(0, USER)
LAPTOP = client(0, USER, TOKEN)
OKTA = AuthProvider(id=id_of(10, 0), account_id=A, kind="okta", name="Okta", created_at=T0)
GOOGLE = attrs.evolve(OKTA, id=id_of(10, 1), kind="google", name="Google")


def identity(number: int, principal: Principal, provider: AuthProvider) -> Identity:
    return Identity(
        id=id_of(12, number),
        account_id=A,
        principal_id=principal.id,
        auth_provider_id=provider.id,
        issuer="https://id.example",
        subject=str(number),
        created_at=T0,
    )


OTHER = Principal(id=id_of(2, 2), account_id=A, name="other", created_at=T0)
OPS = attrs.evolve(STAFF, id=id_of(3, 2), name="ops")
BRANCH = attrs.evolve(SITE, id=id_of(4, 1), name="branch")

ADDRESSES = ["203.0.113.7", "::ffff:203.0.113.7", "198.51.100.1", "2001:db8::1", None]
NETWORKS = ["203.0.113.0/24", "198.51.100.0/25", "2001:db8::/64", "0.0.0.0/0", "::/0"]
COUNTRIES: dict[str | None, str] = {
    "203.0.113.7": "DE",
    "::ffff:203.0.113.7": "DE",
    "198.51.100.1": "FR",
}
INSTANTS = [T0, T0 + timedelta(hours=12), reading.utc(2026, 10, 25, 0, 30), T0 - timedelta(days=3)]


class Atlas:
    """Regions by the table above."""

    def country(self, address: str) -> str | None:
        return COUNTRIES.get(address)


moments = st.builds(time, st.integers(0, 23), st.sampled_from([0, 30]))
hours = st.builds(
    lambda zone, windows: CurrentTimeCondition(zone=zone, windows=tuple(windows)),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "No/Where"]),
    st.lists(
        st.builds(
            lambda day, ranges: DayWindow(day=day, ranges=tuple(ranges)),
            st.integers(0, 6),
            st.lists(
                st.builds(lambda a, b: TimeRange(start=a, end=b), moments, moments), max_size=2
            ),
        ),
        min_size=1,
        max_size=7,
    ),
)
operators: Any = st.sampled_from(["is_in", "is_not_in"])


def sets(values: list[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=3).map(tuple)


remotes = st.builds(RemoteIpCondition, operator=operators, values=sets(NETWORKS))
regions = st.builds(RegionCondition, operator=operators, values=sets(["DE", "FR", "US"]))
providers = st.builds(
    AuthProviderCondition, operator=operators, values=sets([OKTA.id, GOOGLE.id, UUID(int=404)])
)
verified = st.builds(ClientVerifiedCondition, value=st.booleans())
FACT_VALUES: list[Any] = [True, False, 1, 2, "14.2", "14.10", "14.2.0", "15", "jammy", ""]
fact_names = st.sampled_from(["os_version", "disk"])
fact_tests = st.builds(
    FactTest,
    name=fact_names,
    operator=st.sampled_from(["is", "is_not", "at_least", "at_most"]),
    value=st.sampled_from(FACT_VALUES),
)
postures = st.builds(
    ClientPostureCondition, facts=st.lists(fact_tests, min_size=1, max_size=3).map(tuple)
)
facts = st.lists(
    st.builds(Fact, name=fact_names, value=st.sampled_from(FACT_VALUES)),
    max_size=2,
    unique_by=lambda fact: fact.name,
).map(tuple)
seldom = st.integers(0, 3).map(lambda n: n == 0)


@st.composite
def conditions(draw: st.DrawFn) -> Conditions:
    def perhaps(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(strategy) if draw(seldom) else None

    return Conditions(
        remote_ip_location_region=perhaps(regions),
        remote_ip=perhaps(remotes),
        auth_provider=perhaps(providers),
        current_time=perhaps(hours),
        client_verified=perhaps(verified),
        client_posture=perhaps(postures),
    )


limits = st.one_of(
    st.none(), st.builds(lambda m: T0 + timedelta(minutes=m), st.integers(-3000, 3000))
)
PRINCIPALS = (USER, ROBOT, OTHER)
GROUPS = (STAFF, EVERYONE, OPS)
RESOURCES = (WEB, attrs.evolve(DB, site_ids=(BRANCH.id, SITE.id)))


@st.composite
def policies(draw: st.DrawFn, number: int) -> Policy:
    return policy(
        number,
        draw(st.sampled_from(GROUPS)),
        draw(st.sampled_from([WEB, WEB, DB])),
        disabled=draw(seldom) and draw(st.booleans()),
        expires_at=draw(limits) if draw(seldom) else None,
        lease_s=draw(st.sampled_from([60, 3600, 86_400])),
        conditions=draw(conditions()),
    )


@st.composite
def accounts(draw: st.DrawFn) -> tuple[Account, list[Entity]]:
    """An account, and all that it has."""
    account = attrs.evolve(ACCOUNT, disabled=draw(st.integers(0, 9)) == 0)
    principals = [attrs.evolve(each, disabled=draw(st.integers(0, 5)) == 0) for each in PRINCIPALS]
    signed_in = st.sampled_from([None, OKTA.id, GOOGLE.id])
    tokens = [
        token(
            n,
            each,
            expires_at=draw(limits),
            auth_provider_id=draw(signed_in),
            allowed_sources=(draw(st.sampled_from(NETWORKS)),) if draw(seldom) else (),
        )
        for n, each in enumerate(principals)
    ]
    known = [
        identity(n, each, provider)
        for n, (each, provider) in enumerate(product(principals, (OKTA, GOOGLE)))
        if draw(st.integers(0, 4)) > 0
    ]
    clients = [
        attrs.evolve(client(n, each, tokens[n]), verified=draw(st.booleans()), posture=draw(facts))
        for n, each in enumerate(principals)
    ]
    pairs = [(g, p) for g in (STAFF, OPS) for p in principals]
    members = [member(n, g, p) for n, (g, p) in enumerate(pairs) if draw(st.booleans())]
    made = [draw(policies(n)) for n in range(draw(st.integers(0, 5)))]
    gateways = [gateway(n, site) for n, site in enumerate((SITE, BRANCH, SITE))]
    present = [e for e in clients if draw(st.integers(0, 9)) > 0]
    return account, [
        *principals,
        OKTA,
        attrs.evolve(GOOGLE, disabled=draw(seldom)),
        *known,
        *GROUPS,
        SITE,
        BRANCH,
        SITE_TOKEN,
        *gateways,
        *RESOURCES,
        *members,
        *made,
        *tokens,
        *present,
    ]


def gateway(number: int, site: Site, **fields: Any) -> Gateway:
    base = Gateway(
        id=id_of(11, number),
        account_id=A,
        site_id=site.id,
        token_id=SITE_TOKEN.id,
        device_key=(100 + number).to_bytes(32, "big"),
        name="g",
        ipv4=IPv4Address("100.64.1.0") + number,
        ipv6=IPv6Address("fd48::100") + number,
        created_at=T0,
    )
    return attrs.evolve(base, **fields)


SITE_TOKEN = Token(
    id=id_of(6, 50),
    account_id=A,
    kind="gateway",
    name="site",
    hash=bytes(32),
    site_id=SITE.id,
    created_at=T0,
)


# --- changes of an account -----------------------------------------------------------------------


class Ledger:
    """An account as tables and a log of changes, without any index."""

    def __init__(self, account: Account, entities: list[Entity]) -> None:
        self.account = account
        self.entities: dict[UUID, Entity] = {entity.id: entity for entity in entities}
        self.changes: list[Change] = []
        self.first = 100

    def contents(self) -> Contents:
        return Contents(self.account, tuple(self.entities.values()), self.first + len(self.changes))

    def put(self, entity: Entity, at: Any = T0) -> None:
        if isinstance(entity, Account):
            before: Entity | None = self.account
            self.account = entity
        else:
            before = self.entities.get(entity.id)
            self.entities[entity.id] = entity
        self._log(before, entity, at)

    def remove(self, id: UUID, at: Any = T0) -> None:
        """What refers to it goes first; from a list of ids its own goes, and what has lost its
        last site goes too."""
        for other in tuple(self.entities.values()):
            fields = REFERENCES.get(KIND_OF[type(other)], {})
            refers = any(getattr(other, field) == id for field in fields)
            if refers and other.id in self.entities:
                self.remove(other.id, at)
        for other in tuple(self.entities.values()):
            for field in MEMBERS.get(KIND_OF[type(other)], {}):
                ids = getattr(other, field)
                if id not in ids:
                    continue
                left: dict[str, Any] = {field: tuple(each for each in ids if each != id)}
                if field == "site_ids" and not left[field]:
                    self.remove(other.id, at)
                else:
                    self.put(attrs.evolve(other, **left), at)
        self._log(self.entities.pop(id), None, at)

    def _log(self, before: Entity | None, after: Entity | None, at: Any) -> None:
        entity = after or before
        assert entity is not None
        self.changes.append(
            Change(
                account_id=A,
                number=self.first + len(self.changes) + 1,
                at=at,
                who="x",
                kind=KIND_OF[type(entity)],
                entity_id=entity.id,
                before=before,
                after=after,
            )
        )


REMOVABLE = [
    *(each.id for each in (*PRINCIPALS, *GROUPS, *RESOURCES, SITE, BRANCH, OKTA)),
    *(id_of(8, n) for n in range(6)),
    *(id_of(9, n) for n in range(6)),
    *(id_of(6, n) for n in range(3)),
    *(id_of(7, n) for n in range(3)),
    *(id_of(12, n) for n in range(6)),
]


@st.composite
def puts(draw: st.DrawFn) -> Entity:
    """Something to put into an account; it may refer to what is not there."""
    number = draw(st.integers(0, 5))
    kind = draw(st.integers(0, 7))
    if kind <= 2:
        return draw(policies(number))
    if kind == 3:
        group, principal = divmod(number, 3)
        return member(number, (STAFF, OPS)[group], PRINCIPALS[principal])
    if kind == 4:
        return attrs.evolve(PRINCIPALS[number % 3], disabled=draw(seldom))
    if kind == 5:
        return attrs.evolve(ACCOUNT, disabled=draw(seldom))
    if kind == 6:
        owner = PRINCIPALS[number % 3]
        made = client(number % 3, owner, token(number % 3, owner))
        return attrs.evolve(made, verified=draw(st.booleans()), posture=draw(facts))
    sites = draw(st.sampled_from([(SITE.id,), (BRANCH.id,), (SITE.id, BRANCH.id)]))
    return attrs.evolve(draw(st.sampled_from(RESOURCES)), site_ids=sites)


def is_sound(ledger: Ledger, entity: Entity) -> bool:
    """Whether all that it refers to is there."""
    fields = REFERENCES.get(KIND_OF[type(entity)], {})
    ids = [getattr(entity, field) for field in fields]
    for field in MEMBERS.get(KIND_OF[type(entity)], {}):
        ids += getattr(entity, field)
    return all(id is None or id in ledger.entities for id in ids)
