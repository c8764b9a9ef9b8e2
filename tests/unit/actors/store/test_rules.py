"""What every store refuses, and in which form it keeps the rest."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta, timezone
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from uuid import UUID

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.model import (
    ENTITIES,
    REFERENCES,
    Account,
    Authorization,
    Client,
    Conditions,
    CurrentTimeCondition,
    DayWindow,
    Entity,
    Membership,
    Policy,
    Principal,
    Relay,
    RemoteIpCondition,
    Resource,
    Site,
    TimeRange,
    Token,
)
from actors.store.codec import from_json, to_json
from actors.store.interface import Invalid, Put
from actors.store.postgres.migrate import known_migrations
from actors.store.rules import (
    MAX_WHO,
    REFERRERS,
    REMOVAL_ORDER,
    UNIQUE,
    check_mutations,
    validate,
)
from channel.messages import Filter, IpText, SocketAddress
from tests.store_machine import ACCOUNT_IDS, entities

AT = datetime(2026, 1, 1, tzinfo=UTC)
ID = UUID(int=1)

ACCOUNT = Account(id=ID, name="Acme", slug="acme", created_at=AT)
PRINCIPAL = Principal(id=ID, account_id=ID, name="Ann", email="ann@example.com", created_at=AT)
SITE = Site(id=ID, account_id=ID, name="Hall", created_at=AT)
RESOURCE = Resource(
    id=ID, account_id=ID, site_id=ID, name="web", kind="cidr", address="10.0.0.0/8", created_at=AT
)
POLICY = Policy(id=ID, account_id=ID, group_id=ID, resource_id=ID, created_at=AT)
TOKEN = Token(
    id=ID, account_id=ID, kind="client", name="t", hash=bytes(32), principal_id=ID, created_at=AT
)
CLIENT = Client(
    id=ID, account_id=ID, principal_id=ID, token_id=ID, device_key=bytes(32), name="laptop",
    ipv4=IPv4Address("100.64.0.1"), ipv6=IPv6Address("fd48:4c57:5900::1"), created_at=AT,
)  # fmt: skip
AUTHORIZATION = Authorization(
    id=ID, account_id=ID, policy_id=ID, client_id=ID, gateway_id=ID, resource_id=ID, token_id=ID,
    connection_id=ID, remote_ip=IpText("192.0.2.1"), created_at=AT, expires_at=AT,
)  # fmt: skip
ENDED = attrs.evolve(AUTHORIZATION, ended_at=AT)
RELAY = Relay(
    id=ID, token_id=ID, name="r", last_seen_at=AT,
    addresses=(SocketAddress(address=IpText("192.0.2.1"), port=3478),),
)  # fmt: skip
NAIVE = AT.replace(tzinfo=None)


def at_time(**condition: Any) -> Conditions:
    return Conditions(current_time=CurrentTimeCondition(**condition))


def window(start: time, end: time, *, day: int = 0) -> DayWindow:
    return DayWindow(day=day, ranges=(TimeRange(start=start, end=end),))


def from_ip(*values: str) -> Conditions:
    return Conditions(remote_ip=RemoteIpCondition(operator="is_in", values=values))


@pytest.mark.parametrize(
    "value", [ACCOUNT, PRINCIPAL, SITE, RESOURCE, POLICY, TOKEN, CLIENT, AUTHORIZATION, RELAY]
)
def test_what_the_other_tests_start_from_is_valid(value: Any) -> None:
    validate(value)


@pytest.mark.parametrize(
    ("value", "field", "content"),
    [
        (ACCOUNT, "name", ""),
        (ACCOUNT, "name", "two\nlines"),
        (ACCOUNT, "name", "trailing\n"),
        (ACCOUNT, "name", "nul\0"),
        (ACCOUNT, "name", "red \x9b31m"),
        (ACCOUNT, "name", "x" * 256),
        (ACCOUNT, "name", "half \ud83d"),
        (ACCOUNT, "slug", "acme\n"),
        (ACCOUNT, "slug", "Acme"),
        (ACCOUNT, "slug", "-acme"),
        (ACCOUNT, "slug", "x" * 64),
        (ACCOUNT, "created_at", NAIVE),
        (ACCOUNT, "created_at", datetime.max.replace(tzinfo=UTC)),
        (ACCOUNT, "id", "not an id"),
        (PRINCIPAL, "kind", "robot"),
        (PRINCIPAL, "email", "nobody"),
        (PRINCIPAL, "email", "a@b\0"),
        (RESOURCE, "address", "10.0.0.1/8"),
        (RESOURCE, "address", "10.0.0.0"),
        (RESOURCE, "address", "010.0.0.0/8"),
        (RESOURCE, "address", "10.0.0.0/255.0.0.0"),
        (RESOURCE, "address", "2001:DB8::/32"),
        (RESOURCE, "address", "::ffff:10.0.0.0/104"),
        (RESOURCE, "address", "::ffff:a00:0/104"),
        (RESOURCE, "address", "fe80::%eth0/64"),
        (RESOURCE, "address", "intranet"),
        (RESOURCE, "filters", (Filter(protocol="tcp", port_start=2, port_end=1),)),
        (RESOURCE, "filters", (Filter(protocol="icmp", port_start=2),)),
        (RESOURCE, "filters", (Filter(protocol="tcp"),) * 65),
        (RESOURCE, "kind", "dns"),
        (POLICY, "lease_s", 59),
        (POLICY, "lease_s", 86_401),
        (POLICY, "description", "nul\0"),
        (POLICY, "expires_at", NAIVE),
        (POLICY, "conditions", from_ip()),
        (POLICY, "conditions", from_ip("10.0.0.1/8")),
        (POLICY, "conditions", from_ip(*["10.0.0.0/8"] * 101)),
        (POLICY, "conditions", at_time(zone="UTC", windows=())),
        (POLICY, "conditions", at_time(zone="../../etc/passwd", windows=(DayWindow(day=0),))),
        (POLICY, "conditions", at_time(zone="UTC\n", windows=(DayWindow(day=0),))),
        (POLICY, "conditions", at_time(zone="UTC", windows=(DayWindow(day=7),))),
        (POLICY, "conditions", at_time(zone="UTC", windows=(DayWindow(day=1),) * 2)),
        (POLICY, "conditions", at_time(zone="UTC", windows=(window(time(2), time(1)),))),
        (POLICY, "conditions", at_time(zone="UTC", windows=(window(time(1), time(1)),))),
        (
            POLICY,
            "conditions",
            at_time(zone="UTC", windows=(window(time(1, tzinfo=UTC), time(2, tzinfo=UTC)),)),
        ),
        (TOKEN, "hash", bytes(31)),
        (TOKEN, "account_id", None),
        (TOKEN, "principal_id", None),
        (TOKEN, "site_id", ID),
        (TOKEN, "max_uses", 0),
        (TOKEN, "max_uses", 2**31),
        (TOKEN, "allowed_sources", ("10.0.0.1/8",)),
        (CLIENT, "device_key", b""),
        (CLIENT, "ipv4", IPv6Address("::1")),
        (AUTHORIZATION, "expires_at", AT - timedelta(microseconds=1)),
        (ENDED, "end_reason", "two\nlines"),
        (RELAY, "region", "two\nlines"),
    ],
)
def test_a_value_outside_of_the_model_is_refused_by_the_name_of_its_field(
    value: Any, field: str, content: object
) -> None:
    with pytest.raises(Invalid) as refusal:
        validate(attrs.evolve(value, **{field: content}))
    assert (refusal.value.kind, refusal.value.field) == (type(value).__name__.lower(), field)


@pytest.mark.parametrize(
    ("kind", "owner"),
    [("client", "principal_id"), ("api", "principal_id"), ("gateway", "site_id")],
)
def test_a_token_has_the_one_owner_of_its_kind(kind: Any, owner: str) -> None:
    bare = attrs.evolve(TOKEN, kind=kind, principal_id=None)
    validate(attrs.evolve(bare, **{owner: ID}))
    with pytest.raises(Invalid):
        validate(bare)


@pytest.mark.parametrize("kind", ["relay", "operator"])
def test_a_token_of_the_installation_has_neither_account_nor_owner(kind: Any) -> None:
    validate(attrs.evolve(TOKEN, kind=kind, account_id=None, principal_id=None))
    with pytest.raises(Invalid, match="account_id"):
        validate(attrs.evolve(TOKEN, kind=kind, principal_id=None))
    with pytest.raises(Invalid, match="principal_id"):
        validate(attrs.evolve(TOKEN, kind=kind, account_id=None))


def test_an_authorization_ends_with_a_reason_or_not_at_all() -> None:
    validate(attrs.evolve(AUTHORIZATION, ended_at=AT, end_reason="revoked"))
    with pytest.raises(Invalid, match="ended_at"):
        validate(attrs.evolve(AUTHORIZATION, end_reason="revoked"))


@pytest.mark.parametrize("address", ["0.0.0.0", "192.0.2.1", "::1", "2001:db8::1"])
def test_an_ip_resource_has_one_address_without_a_prefix(address: str) -> None:
    resource = attrs.evolve(RESOURCE, kind="ip")
    validate(attrs.evolve(resource, address=address))
    with pytest.raises(Invalid, match="address"):
        validate(attrs.evolve(resource, address=f"{address}/32"))


def test_a_range_of_hours_may_end_at_midnight_and_a_day_may_have_several() -> None:
    ranges = (TimeRange(start=time(9), end=time(12)), TimeRange(start=time(22), end=time(0)))
    windows = (DayWindow(day=0, ranges=ranges), DayWindow(day=1))
    validate(attrs.evolve(POLICY, conditions=at_time(zone="Europe/Berlin", windows=windows)))


@pytest.mark.parametrize("who", ["", "x" * (MAX_WHO + 1), "two\nlines", "half \ud83d"])
def test_whoever_makes_a_change_has_a_printable_name(who: str) -> None:
    with pytest.raises(ValueError, match="printable"):
        check_mutations([Put(SITE)], who=who, at=AT)


def test_too_many_mutations_and_a_naive_instant_are_mistakes_of_the_caller() -> None:
    with pytest.raises(ValueError, match="at most 1000"):
        check_mutations([Put(SITE)] * 1001, who="test", at=AT)
    with pytest.raises(ValueError, match="aware"):
        check_mutations([Put(SITE)], who="test", at=NAIVE)


# --- the tables that the stores share ------------------------------------------------------------


def test_every_field_that_the_tables_name_exists() -> None:
    for kind, fields in REFERENCES.items():
        assert set(fields) <= names_of(ENTITIES[kind])
    for kind, together in UNIQUE.items():
        assert {field for fields in together for field in fields} <= names_of(ENTITIES[kind])


def test_every_field_that_names_another_entity_is_a_reference() -> None:
    for kind, as_type in ENTITIES.items():
        named = {name for name in names_of(as_type) if name.endswith("_id")} - {"account_id"}
        assert named == set(REFERENCES.get(kind, {}))


def test_an_account_is_emptied_of_referrers_first() -> None:
    assert sorted(REMOVAL_ORDER) == sorted(ENTITIES)
    assert REMOVAL_ORDER[-1] == "account"
    for kind, referrers in REFERRERS.items():
        for referrer, _ in referrers:
            assert REMOVAL_ORDER.index(referrer) < REMOVAL_ORDER.index(kind)


def names_of(as_type: type[Entity]) -> set[str]:
    return {field.name for field in attrs.fields(as_type)}


# --- the codec -----------------------------------------------------------------------------------


@given(st.sampled_from(ACCOUNT_IDS).flatmap(entities))
def test_an_entity_survives_json(entity: Entity) -> None:
    assert from_json(to_json(entity), type(entity)) == entity


@given(st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30))])))
def test_an_instant_survives_in_whatever_zone_it_was_written(instant: datetime) -> None:
    entity = attrs.evolve(SITE, created_at=instant)
    assert from_json(to_json(entity), Site).created_at == instant


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_the_codecs_errors(data: bytes) -> None:
    for as_type in (Account, Membership, Policy, Client, Relay):
        with pytest.raises((msgspec.MsgspecError, UnicodeDecodeError)):
            from_json(data, as_type)


def test_migrations_are_numbered_from_one_without_a_gap() -> None:
    numbers = [migration.number for migration in known_migrations()]
    assert numbers == list(range(1, len(numbers) + 1))
