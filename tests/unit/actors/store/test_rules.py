"""What every store refuses, and in which form it keeps the rest."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta, timezone
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any
from uuid import UUID

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.logs import (
    LOG_FILTERS,
    LOG_KINDS,
    LOG_RETENTION,
    FlowLog,
    RequestLog,
    Seen,
    SessionLog,
)
from actors.model import (
    ENTITIES,
    MEMBERS,
    REFERENCES,
    Account,
    AccountLimits,
    Authorization,
    AuthProvider,
    AuthProviderCondition,
    Client,
    ClientPostureCondition,
    Conditions,
    CurrentTimeCondition,
    DayWindow,
    Directory,
    DnsUpstream,
    Entity,
    Fact,
    FactTest,
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
from actors.store.codec import from_json, to_json
from actors.store.interface import Answer, Invalid, Put
from actors.store.postgres.migrate import known_migrations
from actors.store.rules import (
    HOLDERS,
    MAX_WHO,
    REFERRERS,
    REMOVAL_ORDER,
    UNIQUE,
    check_logs,
    check_mutations,
    without_secrets,
)
from actors.store.validity import kind_of, validate
from channel.messages import Filter, IpText, SocketAddress
from tests.store_machine import ACCOUNT_IDS, UPSTREAMS, entities

AT = datetime(2026, 1, 1, tzinfo=UTC)
ID = UUID(int=1)

ACCOUNT = Account(id=ID, name="Acme", slug="acme", created_at=AT)
PRINCIPAL = Principal(id=ID, account_id=ID, name="Ann", email="ann@example.com", created_at=AT)
SITE = Site(id=ID, account_id=ID, name="Hall", created_at=AT)
RESOURCE = Resource(
    id=ID,
    account_id=ID,
    site_ids=(ID,),
    name="web",
    kind="cidr",
    address="10.0.0.0/8",
    created_at=AT,
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
DNS = attrs.evolve(RESOURCE, kind="dns", address="*.corp.example")
INTERNET = attrs.evolve(RESOURCE, kind="internet", address="")
POOL = attrs.evolve(RESOURCE, kind="device_pool", address="", site_ids=(), device_ids=(ID,))
PROVIDER = AuthProvider(
    id=ID, account_id=ID, kind="okta", name="Okta", issuer="https://acme.okta.example",
    client_id="holloway", client_secret=SealedSecret(key_id=1, box=bytes(40)), created_at=AT,
)  # fmt: skip
EMAIL = AuthProvider(id=ID, account_id=ID, kind="email", name="E-mail", created_at=AT)
DIRECTORY = Directory(
    id=ID, account_id=ID, kind="entra", name="Entra",
    credentials=SealedSecret(key_id=1, box=bytes(40)), created_at=AT,
)  # fmt: skip
IDENTITY = Identity(
    id=ID, account_id=ID, principal_id=ID, auth_provider_id=ID, issuer="https://acme.okta.example",
    subject="00u1", created_at=AT,
)  # fmt: skip
GROUP = Group(id=ID, account_id=ID, name="Staff", created_at=AT)
SYNCED = attrs.evolve(GROUP, kind="synced", directory_id=ID, external_id="00g1")
TEST = PolicyTest(
    id=ID, account_id=ID, name="Ann reaches web", principal_id=ID, resource_id=ID,
    expected="allowed", created_at=AT,
)  # fmt: skip
API = attrs.evolve(TOKEN, kind="api", scopes=("*:read", "policies:write"))
SEEN = Seen(device_id=ID, at=AT, version="1.2", remote_ip=IpText("192.0.2.1"))
SESSION = SessionLog(
    id=ID, account_id=ID, at=AT, agent="client", event="connected", device_id=ID, token_id=ID,
    remote_ip=IpText("192.0.2.1"),
)  # fmt: skip
FLOW = FlowLog(
    id=ID, account_id=ID, at=AT, reporter="client", authorization_id=ID, client_id=ID,
    gateway_id=ID, resource_id=ID, protocol="tcp", source=IpText("100.64.0.1"), source_port=1,
    destination=IpText("10.0.0.1"), destination_port=443, started_at=AT, ended_at=AT,
)  # fmt: skip
REQUEST = RequestLog(
    id=ID, account_id=ID, at=AT, method="GET", path="/v1/sites", status=200, duration_us=7
)
ANSWER = Answer(token_id=ID, key="k", request_hash=bytes(32), status=201, body=b"{}", at=AT)
VALID = [
    ACCOUNT, PRINCIPAL, PROVIDER, EMAIL, DIRECTORY, IDENTITY, GROUP, SYNCED, SITE, RESOURCE, DNS,
    INTERNET, POOL, POLICY, TEST, TOKEN, API, CLIENT, AUTHORIZATION, RELAY, SEEN, SESSION, FLOW,
    REQUEST, ANSWER,
]  # fmt: skip
SMALL_BOX = SealedSecret(key_id=1, box=bytes(39))


def at_time(**condition: Any) -> Conditions:
    return Conditions(current_time=CurrentTimeCondition(**condition))


def window(start: time, end: time, *, day: int = 0) -> DayWindow:
    return DayWindow(day=day, ranges=(TimeRange(start=start, end=end),))


def from_ip(*values: str) -> Conditions:
    return Conditions(remote_ip=RemoteIpCondition(operator="is_in", values=values))


def in_region(*values: str) -> Conditions:
    region = RegionCondition(operator="is_in", values=values)
    return Conditions(remote_ip_location_region=region)


def by_provider(*values: UUID) -> Conditions:
    return Conditions(auth_provider=AuthProviderCondition(operator="is_in", values=values))


def fact_test(operator: Any, value: bool | int | str) -> FactTest:
    return FactTest(name="os_version", operator=operator, value=value)


def with_posture(*facts: FactTest) -> Conditions:
    return Conditions(client_posture=ClientPostureCondition(facts=facts))


def do53(address: str) -> DnsUpstream:
    return DnsUpstream(kind="do53", address=address)


def doh(address: str) -> DnsUpstream:
    return DnsUpstream(kind="doh", address=address)


@pytest.mark.parametrize("value", VALID)
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
        (RESOURCE, "kind", "robot"),
        (RESOURCE, "site_ids", ()),
        (RESOURCE, "site_ids", (ID, ID)),
        (RESOURCE, "site_ids", tuple(UUID(int=n) for n in range(9))),
        (RESOURCE, "device_ids", (ID,)),
        (RESOURCE, "ip_stack", "v4"),
        (INTERNET, "address", "0.0.0.0/0"),
        (INTERNET, "site_ids", (ID, UUID(int=2))),
        (POOL, "site_ids", (ID,)),
        (POOL, "device_ids", (ID, ID)),
        (POOL, "device_ids", tuple(UUID(int=n) for n in range(101))),
        (POOL, "address", "10.0.0.1"),
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
        (POLICY, "conditions", from_ip("10.0.0.0/8", "10.0.0.0/8")),
        (POLICY, "conditions", in_region("de")),
        (POLICY, "conditions", in_region("DE", "DE")),
        (POLICY, "conditions", in_region()),
        (POLICY, "conditions", by_provider(ID, ID)),
        (POLICY, "conditions", with_posture(FactTest(name="OS", operator="is", value=1))),
        (POLICY, "conditions", with_posture(fact_test("at_least", True))),
        (POLICY, "conditions", with_posture(fact_test("at_most", "14.x"))),
        (POLICY, "conditions", with_posture(fact_test("is", "two\nlines"))),
        (POLICY, "conditions", with_posture(fact_test("is", 2**63))),
        (POLICY, "conditions", with_posture(fact_test("is", 1), fact_test("is", 2))),
        (POLICY, "conditions", with_posture()),
        (CLIENT, "posture", (Fact(name="os", value="a"), Fact(name="os", value="b"))),
        (CLIENT, "posture", (Fact(name="os", value="half \ud83d"),)),
        (CLIENT, "posture", (Fact(name="os", value=2**70),)),
        (TEST, "posture", (Fact(name="os", value="nul\0"),)),
        (TEST, "at", NAIVE),
        (TEST, "remote_ip", "10.0.0.0/8"),
        (TEST, "expected", "maybe"),
        (ACCOUNT, "names_ipv4", IPv4Network("100.64.0.0/10")),
        (ACCOUNT, "names_ipv4", IPv4Network("100.100.111.0/25")),
        (ACCOUNT, "names_ipv6", IPv6Network("fd48:4c57:5900::/48")),
        (ACCOUNT, "resolver_ipv4", IPv4Address("100.64.7.7")),
        (ACCOUNT, "resolver_ipv4", IPv4Address("224.0.0.1")),
        (ACCOUNT, "search_domain", "corp..example"),
        (ACCOUNT, "search_domain", "10.0.0.1"),
        (ACCOUNT, "dns_upstreams", (UPSTREAMS[0],) * 2),
        (ACCOUNT, "dns_upstreams", tuple(do53(f"192.0.2.{n}") for n in range(9))),
        (ACCOUNT, "limits", AccountLimits(sites=-1)),
        (ACCOUNT, "limits", AccountLimits(sites=2**31)),
        (ACCOUNT, "retention", Retention(flows_days=0)),
        (ACCOUNT, "retention", Retention(changes_days=3_651)),
        (PROVIDER, "issuer", None),
        (PROVIDER, "issuer", "http://acme.okta.example"),
        (PROVIDER, "issuer", "https://acme.okta.example/?a=b"),
        (PROVIDER, "issuer", "https://user@acme.okta.example"),
        (PROVIDER, "client_id", None),
        (PROVIDER, "client_id", "two\nlines"),
        (PROVIDER, "client_secret", SMALL_BOX),
        (PROVIDER, "client_session_s", 3_599),
        (PROVIDER, "portal_session_s", 86_401),
        (EMAIL, "issuer", "https://acme.okta.example"),
        (EMAIL, "client_id", "holloway"),
        (EMAIL, "client_secret", PROVIDER.client_secret),
        (DIRECTORY, "credentials", SMALL_BOX),
        (DIRECTORY, "last_error", "red \x9b31m"),
        (IDENTITY, "subject", ""),
        (IDENTITY, "subject", "nul\0"),
        (IDENTITY, "issuer", "two\nlines"),
        (GROUP, "directory_id", ID),
        (GROUP, "external_id", "00g1"),
        (SYNCED, "directory_id", None),
        (SYNCED, "external_id", None),
        (SYNCED, "external_id", "nul\0"),
        (SITE, "kind", "everywhere"),
        (TOKEN, "scopes", ("*:read",)),
        (API, "scopes", ("*:read", "*:read")),
        (API, "scopes", ("policies:delete",)),
        (API, "scopes", tuple(f"{chr(97 + n // 26)}{chr(97 + n % 26)}:read" for n in range(65))),
        (API, "auth_provider_id", ID),
        (SEEN, "version", "two\nlines"),
        (SESSION, "reason", "x" * 256),
        (SESSION, "remote_ip", "nowhere"),
        (FLOW, "ended_at", AT - timedelta(microseconds=1)),
        (FLOW, "bytes_sent", -1),
        (FLOW, "bytes_sent", 2**63),
        (FLOW, "destination_port", 65_536),
        (REQUEST, "method", "get"),
        (REQUEST, "path", "x" * 513),
        (REQUEST, "status", 99),
        (REQUEST, "at", NAIVE),
        (ANSWER, "key", ""),
        (ANSWER, "key", "ü"),
        (ANSWER, "key", "x" * 256),
        (ANSWER, "request_hash", bytes(31)),
        (ANSWER, "body", bytes(65_537)),
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
    assert (refusal.value.kind, refusal.value.field) == (kind_of(value), field)


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


@pytest.mark.parametrize(
    "address",
    [
        "db.corp.example", "*.corp.example", "**.corp.example", "db-?.*.corp.example", "printer",
        "*-eu.example", "_ldap._tcp.corp.example", "xn--bcher-kva.example", "a.**.example",
        "1.example", "**.**.example", "x" * 63 + ".example",
    ],
)  # fmt: skip
def test_a_name_pattern_has_wildcards_anywhere_but_at_the_top(address: str) -> None:
    validate(attrs.evolve(DNS, address=address, ip_stack="v6"))


@pytest.mark.parametrize(
    "address",
    [
        "", "*", "**", "?", "corp.*", "corp.**", "corp.exampl?", "a**.example", "**a.example",
        "***.example", "a..example", ".example", "example.", "Corp.example", "-a.example",
        "a-.example", "ü.example", "a b.example", "a.example\n", "10.0.0.1", "corp.0",
        "a/b.example",
        "x" * 64 + ".example", "a." * 127 + "a",
    ],
)  # fmt: skip
def test_what_is_no_name_pattern_is_refused(address: str) -> None:
    with pytest.raises(Invalid, match="address"):
        validate(attrs.evolve(DNS, address=address))


@pytest.mark.parametrize(
    "upstream",
    [
        do53("192.0.2.53"), do53("192.0.2.53:5353"), do53("2001:db8::53"),
        do53("[2001:db8::53]:53"), doh("https://dns.example/dns-query"), doh("https://192.0.2.1"),
        doh("https://dns.example:8443/q?a=b"),
    ],
)  # fmt: skip
def test_an_upstream_is_an_address_or_a_url(upstream: DnsUpstream) -> None:
    validate(attrs.evolve(ACCOUNT, dns_upstreams=(upstream,)))


@pytest.mark.parametrize(
    "upstream",
    [
        do53("dns.example"), do53("192.0.2.53:0"), do53("192.0.2.053"), do53("2001:DB8::53"),
        do53("192.0.2.53:65536"), do53("https://dns.example"), do53("fe80::1%eth0"),
        do53("::ffff:192.0.2.1"), doh("http://dns.example/dns-query"), doh("192.0.2.53"),
        doh("https:///dns-query"), doh("https://user@dns.example/"), doh("https://dns.example/#x"),
        doh("https://dns.example:99999/"), doh("https://:443/"),
    ],
)  # fmt: skip
def test_what_is_no_upstream_is_refused(upstream: DnsUpstream) -> None:
    with pytest.raises(Invalid, match="dns_upstreams"):
        validate(attrs.evolve(ACCOUNT, dns_upstreams=(upstream,)))


def test_a_bound_of_a_fact_is_a_number_or_a_dotted_version() -> None:
    for value in (7, -7, "14", "14.10.3"):
        validate(attrs.evolve(POLICY, conditions=with_posture(fact_test("at_least", value))))
    both = with_posture(fact_test("at_least", "14"), fact_test("at_most", "15"))
    validate(attrs.evolve(POLICY, conditions=both))


def test_changes_tell_that_there_is_a_secret_and_not_which() -> None:
    shown = without_secrets(PROVIDER)
    assert shown.client_secret == SealedSecret(key_id=1, box=b"")
    with pytest.raises(Invalid, match="client_secret"):
        validate(shown)
    for value in (EMAIL, attrs.evolve(DIRECTORY, credentials=None), SITE):
        assert without_secrets(value) is value


def test_too_many_log_rows_are_a_mistake_of_the_caller() -> None:
    check_logs([REQUEST] * 1_000)
    with pytest.raises(ValueError, match="at most 1000"):
        check_logs([REQUEST] * 1_001)


def test_an_answer_needs_a_mutation() -> None:
    with pytest.raises(ValueError, match="answer"):
        check_mutations([], who="test", at=AT, answer=ANSWER)


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


def test_every_field_that_names_other_entities_is_a_reference_or_has_members() -> None:
    foreign = {"account_id", "external_id", "client_id"}  # of the provider, not a client
    for kind, as_type in ENTITIES.items():
        named = {name for name in names_of(as_type) if name.endswith("_id")} - foreign
        assert named == set(REFERENCES.get(kind, {}))
        several = {name for name in names_of(as_type) if name.endswith("_ids")}
        assert several == set(MEMBERS.get(kind, {}))


def test_every_field_by_which_logs_are_found_or_kept_exists() -> None:
    for kind, as_type in LOG_KINDS.items():
        assert set(LOG_FILTERS[kind]) <= {field.name for field in attrs.fields(as_type)}
        assert LOG_RETENTION[kind] in {field.name for field in attrs.fields(Retention)}


def test_an_account_is_emptied_of_referrers_first() -> None:
    assert sorted(REMOVAL_ORDER) == sorted(ENTITIES)
    assert REMOVAL_ORDER[-1] == "account"
    for kind, referrers in REFERRERS.items():
        for referrer, _ in referrers:
            assert REMOVAL_ORDER.index(referrer) < REMOVAL_ORDER.index(kind)
    for kind, holders in HOLDERS.items():
        for holder, _ in holders:
            assert REMOVAL_ORDER.index(holder) < REMOVAL_ORDER.index(kind)


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
