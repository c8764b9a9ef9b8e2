"""Accounts and declarations at random, and a store in memory to apply them to."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from datetime import UTC, datetime, time, timedelta
from typing import Any, TypeVar
from uuid import UUID

import attrs
from hypothesis import strategies as st
from msgspec import UNSET, structs

from actors.declaration import SECTIONS, Declaration, Plan, plan
from actors.declaration.exporting import key_of, sort_key
from actors.declaration.form import (
    AccountSection,
    AuthProviderEntry,
    AuthProviderPart,
    ClientPosturePart,
    ClientVerifiedPart,
    ConditionsPart,
    CurrentTimePart,
    DayWindowPart,
    DirectoryEntry,
    DnsUpstreamPart,
    FactPart,
    FactTestPart,
    FilterPart,
    GroupEntry,
    PolicyEntry,
    PolicyTestEntry,
    PrincipalEntry,
    RegionPart,
    RemoteIpPart,
    ResourceEntry,
    RetentionPart,
    SiteEntry,
    TimeRangePart,
)
from actors.model import KIND_OF, Account, EntityKind, Group, SealedSecret, Site
from actors.store.interface import Contents, Put
from actors.store.memory import MemoryStore
from actors.store.validity import SECRETS

START = datetime(2026, 1, 1, tzinfo=UTC)
ACCOUNT_ID = UUID(int=0xA)
T = TypeVar("T")


def done(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a method of a store in memory, which never waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("it waits")


class Plainly:
    """Seals nothing: what is sealed, and for what, can be read in the box."""

    def seal(self, text: str, *, kind: EntityKind, field: str, id: UUID) -> SealedSecret:
        return SealedSecret(key_id=0, box=f"{kind} {field} {id} {text}".encode())

    def holds(
        self, sealed: SealedSecret, text: str, *, kind: EntityKind, field: str, id: UUID
    ) -> bool:
        return sealed == self.seal(text, kind=kind, field=field, id=id)


@attrs.define
class Installation:
    """A store in memory with one account, as an operator makes it."""

    store: MemoryStore = attrs.field(factory=MemoryStore)
    _ids: Iterator[int] = attrs.field(factory=lambda: iter(range(0x1000, 1 << 30)))

    def __attrs_post_init__(self) -> None:
        common: dict[str, Any] = {"account_id": ACCOUNT_ID, "created_at": START}
        self.put(
            Account(id=ACCOUNT_ID, name="Acme", slug="acme", created_at=START),
            Group(id=self.new_id(), kind="everyone", name="Everyone", **common),
            Site(id=self.new_id(), kind="internet", name="Internet", **common),
        )

    def new_id(self) -> UUID:
        return UUID(int=next(self._ids))

    def put(self, *entities: Any) -> None:
        puts = [Put(entity) for entity in entities]
        done(self.store.apply(ACCOUNT_ID, puts, who="test", at=START))

    @property
    def contents(self) -> Contents:
        """With the secrets, which the store gives out one by one."""
        found = done(self.store.contents(ACCOUNT_ID))
        entities = (
            done(self.store.get(ACCOUNT_ID, kind, each.id)) if kind in SECRETS else each
            for each in found.entities
            for kind in [KIND_OF[type(each)]]
        )
        return attrs.evolve(found, entities=tuple(entities))

    def plan(self, declaration: Declaration) -> Plan:
        return plan(self.contents, declaration, new_id=self.new_id, at=START, vault=Plainly())

    def apply(self, declaration: Declaration) -> Plan:
        """Plan, and carry it out."""
        made = self.plan(declaration)
        done(self.store.apply(ACCOUNT_ID, made.mutations, who="test", at=START))
        return made


def normal(declaration: Declaration) -> Declaration:
    """What an export says of an account that is as declared, section by section."""

    def tidy(entry: Any) -> Any:
        changes: dict[str, Any] = {}
        for field in ("was", "client_secret", "credentials"):
            if hasattr(entry, field):
                changes[field] = UNSET
        for field in ("members", "sites", "devices"):
            if getattr(entry, field, UNSET) is not UNSET:
                changes[field] = tuple(sorted(set(getattr(entry, field))))
        if isinstance(entry, PolicyEntry) and entry.conditions.auth_provider:
            part = entry.conditions.auth_provider
            part = structs.replace(part, values=tuple(sorted(set(part.values))))
            changes["conditions"] = structs.replace(entry.conditions, auth_provider=part)
        return structs.replace(entry, **changes)

    changes = {
        section: tuple(sorted(map(tidy, entries), key=sort_key))
        for section in SECTIONS.values()
        if (entries := getattr(declaration, section)) is not UNSET
    }
    return structs.replace(declaration, **changes)


# --- declarations that mean something ------------------------------------------------------------

names = st.sampled_from(["Hall", "Loft", "Käfer", "two words", "id:x"])
emails = st.sampled_from(["a@example.org", "b@example.org"])
networks = st.sampled_from(["10.0.0.0/8", "192.0.2.0/24", "2001:db8::/32"])
instants = st.integers(1, 5).map(lambda days: START + timedelta(days=days))
operators = st.sampled_from(["is_in", "is_not_in"])
facts = st.sampled_from(["os_version", "disk_encrypted"])
values = st.sampled_from([True, 7, "14.2"])


def several(element: st.SearchStrategy[T], *, least: int = 0, most: int = 3) -> Any:
    return st.lists(element, min_size=least, max_size=most, unique=True).map(tuple)


def entries(entry: st.SearchStrategy[T], most: int = 4) -> st.SearchStrategy[tuple[T, ...]]:
    return st.lists(entry, max_size=most, unique_by=lambda each: key_of(each)).map(tuple)  # type: ignore[arg-type]  # of whatever entry


def conditions(providers: list[str]) -> st.SearchStrategy[ConditionsPart]:
    ranges = st.builds(
        TimeRangePart, start=st.times(max_value=time(11)), end=st.times(min_value=time(12))
    )
    windows = st.lists(
        st.builds(DayWindowPart, day=st.integers(0, 6), ranges=several(ranges, most=2)),
        min_size=1, max_size=3, unique_by=lambda window: window.day,
    ).map(tuple)  # fmt: skip
    signed_in = (
        st.builds(
            AuthProviderPart,
            operator=operators,
            values=several(st.sampled_from(providers), least=1),
        )
        if providers
        else st.none()
    )
    return st.builds(
        ConditionsPart,
        remote_ip=st.none()
        | st.builds(RemoteIpPart, operator=operators, values=several(networks, least=1)),
        remote_ip_location_region=st.none()
        | st.builds(RegionPart, operator=operators, values=st.just(("DE", "FR"))),
        auth_provider=st.none() | signed_in,
        current_time=st.none()
        | st.builds(CurrentTimePart, zone=st.just("Europe/Berlin"), windows=windows),
        client_verified=st.none() | st.builds(ClientVerifiedPart, value=st.booleans()),
        client_posture=st.none()
        | st.builds(
            ClientPosturePart,
            facts=st.builds(FactTestPart, name=facts, operator=st.just("is"), value=values).map(
                lambda test: (test,)
            ),
        ),
    )  # fmt: skip


@st.composite
def declarations(draw: st.DrawFn) -> Declaration:
    """Whole ones, whose references mean something in an account that has nothing else."""
    providers = draw(
        entries(
            st.builds(
                AuthProviderEntry, name=names, kind=st.sampled_from(["oidc", "google"]),
                issuer=st.sampled_from(["https://a.example", "https://b.example"]),
                client_id=st.just("holloway"),
                client_secret=st.sampled_from([UNSET, "one", "two"]), disabled=st.booleans(),
            )
        )
    )  # fmt: skip
    directories = draw(
        entries(
            st.builds(
                DirectoryEntry, name=names, kind=st.sampled_from(["okta", "scim"]),
                credentials=st.sampled_from([UNSET, "one", "two"]),
            )
        )
    )  # fmt: skip
    principals = draw(
        entries(
            st.builds(
                PrincipalEntry, name=names, email=st.none() | emails, disabled=st.booleans(),
                kind=st.sampled_from(["user", "service_account"]),
                role=st.sampled_from(["admin", "member"]),
            ).map(lambda each: each if each.kind == "user" else structs.replace(each, email=None))
        )
    )  # fmt: skip
    # A name that looks like an id is known by its id, which only an export can tell.
    people = [key for key in map(key_of, principals) if not key.startswith("id:")]
    groups = draw(
        entries(
            st.builds(
                GroupEntry,
                name=names,
                members=several(st.sampled_from(people)) if people else st.just(()),
            )
        )
    )
    sites = draw(entries(st.builds(SiteEntry, name=names)))
    places = [key for key in map(key_of, sites) if not key.startswith("id:")] + ["Internet"]
    filters = st.builds(
        FilterPart, protocol=st.sampled_from(["tcp", "udp"]), port_start=st.integers(0, 9)
    )
    resources = draw(
        entries(
            st.builds(
                ResourceEntry, name=names, kind=st.just("cidr"), address=networks,
                sites=several(st.sampled_from(places), least=1), filters=several(filters, most=2),
            )
        )
    )  # fmt: skip
    things = [key for key in map(key_of, resources) if not key.startswith("id:")]
    crowds = [key for key in map(key_of, groups) if not key.startswith("id:")] + ["Everyone"]
    known = [key for key in map(key_of, providers) if not key.startswith("id:")]
    policies: Any = st.just(())
    tests: Any = st.just(())
    if things:
        policies = several(
            st.builds(
                PolicyEntry, group=st.sampled_from(crowds), resource=st.sampled_from(things),
                description=st.sampled_from(["", "two\nlines"]), conditions=conditions(known),
                disabled=st.booleans(), expires_at=st.none() | instants,
                lease_s=st.sampled_from([60, 86_400]),
            ),
            most=4,
        )  # fmt: skip
    if things and people:
        tests = entries(
            st.builds(
                PolicyTestEntry, name=names, principal=st.sampled_from(people),
                resource=st.sampled_from(things), expected=st.sampled_from(["allowed", "denied"]),
                at=st.none() | instants, remote_ip=st.sampled_from([None, "192.0.2.7"]),
                auth_provider=st.none() | st.sampled_from(known) if known else st.none(),
                client_verified=st.sampled_from([None, True, False]),
                posture=st.builds(FactPart, name=facts, value=values).map(lambda fact: (fact,)),
            )
        )  # fmt: skip
    upstreams = st.builds(
        DnsUpstreamPart,
        kind=st.just("do53"),
        address=st.sampled_from(["192.0.2.53", "[2001:db8::1]:5353"]),
    )
    account = st.builds(
        AccountSection, name=names, search_domain=st.sampled_from([None, "acme.example"]),
        dns_upstreams=several(upstreams),
        retention=st.builds(RetentionPart, flows_days=st.integers(1, 9)),
    )  # fmt: skip
    return Declaration(
        account=draw(account), auth_providers=providers, directories=directories,
        principals=principals, groups=groups, sites=sites, resources=resources,
        policies=draw(policies), policy_tests=draw(tests),
    )  # fmt: skip


@st.composite
def partial_declarations(draw: st.DrawFn) -> Declaration:
    """Some sections of one."""
    declaration = draw(declarations())
    left_out = draw(st.sets(st.sampled_from(["account", *SECTIONS.values()])))
    return structs.replace(declaration, **dict.fromkeys(left_out, UNSET))
