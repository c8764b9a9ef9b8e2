"""The table of docs/control-plane.md, "What a change does", walked row by row.

Every change that the document names is carried out in a world where a client reaches `web` through
a gateway, and what became of that, and what the two heard, is compared with the row. What the
changes did to entities is collected: no kind and no field of the model is without a row.

Longer than other files: it has a function for every row, in the order of the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import time, timedelta
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any
from uuid import UUID

import attrs
import pytest

from actors.model import (
    ENTITIES,
    AccountLimits,
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
    Fact,
    FactTest,
    Gateway,
    Group,
    Identity,
    PolicyTest,
    Principal,
    RegionCondition,
    RemoteIpCondition,
    Retention,
    SealedSecret,
    Site,
    TimeRange,
)
from channel.credentials import decode_token
from channel.messages import (
    EVENT_BY_TYPE,
    AuthorizationCreated,
    AuthorizationRenewed,
    AuthorizationRevoked,
    Filter,
    IpText,
    Revoke,
)

from .world import START, ClientAgent, GatewayAgent, World, hours

TEXT = (Path(__file__).parents[3] / "docs" / "control-plane.md").read_text()
NEVER_CHANGED = {"id", "account_id", "created_at"}
OF_ITS_OWN = (Revoke, AuthorizationRevoked, AuthorizationRenewed)
ISSUER = "https://id.example"


@attrs.frozen
class Row:
    """Of the document: what becomes of the authorisation, and what the two hear besides."""

    effect: str
    client: frozenset[str]
    gateway: frozenset[str]


def rows() -> dict[str, Row]:
    found: dict[str, Row] = {}
    lines = TEXT.split("| change | authorisations |")[1].splitlines()[2:]
    for line in lines:
        if not line.startswith("|"):
            return found
        names, effect, client, gateway = (cell.strip() for cell in line.strip("|").split("|"))
        for name in names.split("; "):
            assert name not in found
            found[name] = Row(effect.strip("*"), ticked(client), ticked(gateway))
    raise AssertionError("the table does not end")


def ticked(cell: str) -> frozenset[str]:
    return frozenset(re.findall(r"`(\w+)`", cell))


class Atlas:
    """Everybody is in Germany."""

    def country(self, address: str) -> str | None:
        return "DE"


class House(World):
    """A world with one entity of every kind; the client signed in by a provider. Two policies give
    `web`: one to the staff, and with `fallback` another to everyone, which ends sooner."""

    def __init__(self, fallback: bool = False, conditions: Conditions | None = None) -> None:
        super().__init__(regions=Atlas())
        self.provider = AuthProvider(
            kind="oidc", name="id", issuer=ISSUER, client_id="us", **self.common()
        )
        self.identity = Identity(
            principal_id=self.user.id,
            auth_provider_id=self.provider.id,
            issuer=ISSUER,
            subject="user",
            **self.common(),
        )
        self.other = Principal(name="other", **self.common())
        self.directory = Directory(kind="scim", name="people", **self.common())
        self.synced = Group(
            kind="synced",
            name="synced",
            directory_id=self.directory.id,
            external_id="x",
            **self.common(),
        )
        self.annex = Site(name="annex", **self.common())
        self.web = attrs.evolve(self.web, site_ids=(self.site.id, self.annex.id))
        self.put(self.provider, self.identity, self.other, self.directory, self.synced)
        self.put(self.annex, self.web)
        self.change_token(self.user_token, auth_provider_id=self.provider.id)
        self.membership(self.staff, self.user)
        self.membership(self.synced, self.user)
        self.main = self.policy(
            group_id=self.staff.id, lease_s=7_200, conditions=conditions or Conditions()
        )
        if fallback:
            self.policy(lease_s=3_600)

    @property
    def member(self) -> Any:
        return next(e for e in self.entities("membership") if e.group_id == self.staff.id)

    def of(self, agent: ClientAgent | GatewayAgent) -> Any:
        return self.get(agent.kind, agent.id)  # type: ignore[arg-type]  # client or gateway

    def narrow(self, **fields: Any) -> None:
        self.put(attrs.evolve(self.main, **fields))

    def demand(self, conditions: Conditions) -> None:
        self.narrow(conditions=conditions)


def hours_of(*days: int) -> Conditions:
    each = TimeRange(start=time(0), end=time(0))
    windows = tuple(DayWindow(day=day, ranges=(each,)) for day in days)
    return Conditions(current_time=CurrentTimeCondition(zone="UTC", windows=windows))


def address_in(*values: str) -> Conditions:
    return Conditions(remote_ip=RemoteIpCondition(operator="is_in", values=values))


def region_in(*values: str) -> Conditions:
    return Conditions(remote_ip_location_region=RegionCondition(operator="is_in", values=values))


def provider_in(*ids: UUID) -> Conditions:
    return Conditions(auth_provider=AuthProviderCondition(operator="is_in", values=ids))


def os_at_least(version: str) -> Conditions:
    test = FactTest(name="os_version", operator="at_least", value=version)
    return Conditions(client_posture=ClientPostureCondition(facts=(test,)))


VERIFIED = Conditions(client_verified=ClientVerifiedCondition())
OLD = (Fact(name="os_version", value="12.1"),)
NEW = (Fact(name="os_version", value="14.2"),)


# --- what is done --------------------------------------------------------------------------------

Do = Callable[[House], None]
CASES: dict[str, Do] = {}
PREPARE: dict[str, Do] = {}
BY_EVERYONE: set[str] = set()
"""Cases in which the policy for everyone is the one that is lost."""


def case(name: str, *, before: Do | None = None, by_everyone: bool = False) -> Callable[[Do], Do]:
    def register(do: Do) -> Do:
        CASES[name] = do
        if before is not None:
            PREPARE[name] = before
        if by_everyone:
            BY_EVERYONE.add(name)
        return do

    return register


case("policy removed")(lambda w: w.remove("policy", w.main.id))
case("policy disabled")(lambda w: w.narrow(disabled=True))
case("policy for another group")(lambda w: w.narrow(group_id=new_group(w).id))
case("policy for another resource")(lambda w: w.narrow(resource_id=w.db.id))
case("policy expired")(lambda w: w.narrow(expires_at=START))
case("membership removed")(lambda w: w.remove("membership", w.member.id))
case("membership of another group")(
    lambda w: w.put(attrs.evolve(w.member, group_id=new_group(w).id))
)
case("membership of another principal")(
    lambda w: w.put(attrs.evolve(w.member, principal_id=w.other.id))
)
case("group removed")(lambda w: w.remove("group", w.staff.id))
case("directory of the group removed", before=lambda w: w.narrow(group_id=w.synced.id))(
    lambda w: w.remove("directory", w.directory.id)
)
case("user becomes a service account", by_everyone=True)(
    lambda w: w.put(attrs.evolve(w.user, kind="service_account"))
)
case("everyone becomes another group", by_everyone=True)(
    lambda w: w.put(attrs.evolve(w.everyone, kind="static"))
)
case("address no longer met")(lambda w: w.demand(address_in("192.0.2.0/24")))
case("region no longer met")(lambda w: w.demand(region_in("FR", "CH")))
case("provider no longer met")(lambda w: w.demand(provider_in(w.new_id())))
case("time window closed")(lambda w: w.demand(hours_of(3)))
case("verification no longer met")(lambda w: w.demand(VERIFIED))
case("posture no longer met")(lambda w: w.demand(os_at_least("1")))
case("condition that is met")(lambda w: w.demand(region_in("DE")))
case("lease shortened")(lambda w: w.narrow(lease_s=60))
case("lease lengthened")(lambda w: w.narrow(lease_s=86_400))
case("expiry brought nearer")(lambda w: w.narrow(expires_at=START + hours(1)))
case("end of the token brought nearer")(
    lambda w: w.change_token(w.user_token, expires_at=START + hours(1))
)
case("token of another provider", before=lambda w: w.demand(provider_in(w.provider.id)))(
    lambda w: w.change_token(w.user_token, auth_provider_id=second_provider(w).id)
)


def set_client(w: House, **fields: Any) -> None:
    w.put(attrs.evolve(w.of(w.laptop), **fields))


case("policy made")(lambda w: w.policy(w.db) and None)
case("policy enabled", before=lambda w: w.policy(w.db, disabled=True) and None)(
    lambda w: w.put(*(attrs.evolve(e, disabled=False) for e in w.entities("policy")))
)
case("membership made", before=lambda w: w.policy(w.db, group_id=new_group(w).id) and None)(
    lambda w: w.membership(named(w, "group", "new"), w.user) and None
)


@case("group and policy made")
def _group_and_policy(w: House) -> None:
    group = new_group(w)
    w.policy(w.db, group_id=group.id)
    w.membership(group, w.user)


case("another policy removed")(lambda w: w.remove("policy", w.policy(w.db, disabled=True).id))
case("another membership removed")(
    lambda w: w.remove("membership", w.membership(w.staff, w.other).id)
)
case("filters of the resource")(
    lambda w: w.put(
        attrs.evolve(w.web, filters=(Filter(protocol="tcp", port_start=443, port_end=443),))
    )
)
case("name of the resource")(lambda w: w.put(attrs.evolve(w.web, name="intranet")))
case("resource has another address")(lambda w: w.put(attrs.evolve(w.web, address="10.0.0.9")))
case("resource becomes a network")(
    lambda w: w.put(attrs.evolve(w.web, kind="cidr", address="10.0.0.0/24"))
)
case("resource becomes a name")(
    lambda w: w.put(attrs.evolve(w.web, kind="dns", address="web.example", ip_stack="v4"))
)
case("resource removed")(lambda w: w.remove("resource", w.web.id))
case("resource in another site")(lambda w: w.put(attrs.evolve(w.web, site_ids=(new_site(w).id,))))
case("the gateway's site taken from the resource")(
    lambda w: w.put(attrs.evolve(w.web, site_ids=(w.annex.id,)))
)
case("site added to the resource")(
    lambda w: w.put(attrs.evolve(w.web, site_ids=(*w.web.site_ids, new_site(w).id)))
)
case("another site taken from the resource")(
    lambda w: w.put(attrs.evolve(w.web, site_ids=(w.site.id,)))
)
case("another site removed")(lambda w: w.remove("site", w.annex.id))
case("the gateway's site removed")(lambda w: w.remove("site", w.site.id))
case("resource made")(lambda w: w.put(w.resource("new", "10.0.0.7")))
case("another resource removed")(lambda w: w.remove("resource", w.db.id))


def with_name(w: House) -> None:
    wiki = w.resource("wiki", "wiki.example", kind="dns")
    w.put(wiki)
    w.policy(wiki)


def with_pool(w: House) -> None:
    pool = w.resource("pool", "", kind="device_pool", site_ids=())
    w.put(pool)
    w.policy(pool)


case("a name has another IP stack", before=with_name)(
    lambda w: w.put(attrs.evolve(named(w, "resource", "wiki"), ip_stack="v6"))
)
case("devices of a pool", before=with_pool)(
    lambda w: w.put(attrs.evolve(named(w, "resource", "pool"), device_ids=(w.laptop.id,)))
)
case("resource kind of a pool", before=with_pool)(
    lambda w: w.put(
        attrs.evolve(
            named(w, "resource", "pool"), kind="dns", address="p.example", site_ids=(w.site.id,)
        )
    )
)
case("principal disabled")(lambda w: w.put(attrs.evolve(w.user, disabled=True)))
case("principal removed")(lambda w: w.remove("principal", w.user.id))
case("auth provider disabled")(lambda w: w.put(attrs.evolve(w.provider, disabled=True)))
case("auth provider removed")(lambda w: w.remove("auth_provider", w.provider.id))
case("identity removed")(lambda w: w.remove("identity", w.identity.id))
case("identity of another principal")(
    lambda w: w.put(attrs.evolve(w.identity, principal_id=w.other.id))
)
case("identity at another provider")(
    lambda w: w.put(attrs.evolve(w.identity, auth_provider_id=new_provider(w).id))
)
case("client removed")(lambda w: w.remove("client", w.laptop.id))
case("client of another principal")(lambda w: set_client(w, principal_id=w.other.id))
case("client has another address")(
    lambda w: set_client(w, ipv4=IPv4Address("100.64.9.9"), ipv6=IPv6Address("fd48:4c57:5900::9:9"))
)
case("client has another key")(lambda w: set_client(w, device_key=bytes(32)))
case("client verified")(lambda w: set_client(w, verified=True))
case("client reports another fact")(lambda w: set_client(w, posture=NEW))
case("client's token removed")(lambda w: w.remove("token", decode_token(w.user_token).id))
case("client's token of another principal")(
    lambda w: w.change_token(w.user_token, principal_id=w.other.id)
)
case("client's token for other sources")(
    lambda w: w.change_token(w.user_token, allowed_sources=("192.0.2.0/24",))
)
case("client's token has another secret")(lambda w: w.change_token(w.user_token, hash=bytes(32)))
case("client's token of another kind")(
    lambda w: w.change_token(w.user_token, kind="api", auth_provider_id=None)
)
case("client's token expired")(lambda w: w.change_token(w.user_token, expires_at=START))


def set_gateway(w: House, **fields: Any) -> None:
    w.put(attrs.evolve(w.of(w.gate), **fields))


case("gateway removed")(lambda w: w.remove("gateway", w.gate.id))
case("gateway in another site")(lambda w: set_gateway(w, site_id=w.annex.id))
case("gateway no longer approved")(lambda w: set_gateway(w, approved=False))
case("gateway has another address")(
    lambda w: set_gateway(
        w, ipv4=IPv4Address("100.64.9.9"), ipv6=IPv6Address("fd48:4c57:5900::9:9")
    )
)
case("gateway has another key")(lambda w: set_gateway(w, device_key=bytes(32)))
case("gateway's token removed")(lambda w: w.remove("token", decode_token(w.site_token).id))
case("gateway's token of another site")(lambda w: w.change_token(w.site_token, site_id=w.annex.id))
case("gateway's token for other sources")(
    lambda w: w.change_token(w.site_token, allowed_sources=("192.0.2.0/24",))
)
case("gateway's token has another secret")(lambda w: w.change_token(w.site_token, hash=bytes(32)))
case("gateway's token expired")(lambda w: w.change_token(w.site_token, expires_at=START))


def set_account(w: House, **fields: Any) -> None:
    w.put(attrs.evolve(w.account, **fields))


case("account disabled")(lambda w: set_account(w, disabled=True))
case("account removed")(lambda w: w.remove("account", w.account.id))
case("ranges of the account")(
    lambda w: set_account(
        w,
        range_ipv4=IPv4Network("100.64.0.0/10"),
        range_ipv6=IPv6Network("fd48:4c57:5900::/60"),
        names_ipv4=IPv4Network("198.18.0.0/16"),
        resolver_ipv4=IPv4Address("198.19.0.1"),
    )
)
case("search domain")(lambda w: set_account(w, search_domain="corp.example"))
case("upstream resolvers")(
    lambda w: set_account(w, dns_upstreams=(DnsUpstream(kind="do53", address="192.0.2.53"),))
)
case("ranges of names")(
    lambda w: set_account(
        w, names_ipv4=IPv4Network("198.18.0.0/16"), names_ipv6=IPv6Network("fd00:1::/64")
    )
)
case("address of the resolver")(lambda w: set_account(w, resolver_ipv4=IPv4Address("198.19.0.1")))
case("anything else of the account")(
    lambda w: set_account(
        w,
        name="renamed",
        slug="renamed",
        limits=AccountLimits(clients=1),
        retention=Retention(flows_days=1),
    )
)
case("of a principal")(
    lambda w: w.put(attrs.evolve(w.user, role="admin", name="renamed", email="a@b.example"))
)
case("of an auth provider")(
    lambda w: w.put(
        attrs.evolve(
            w.provider,
            kind="okta",
            name="renamed",
            issuer="https://other.example",
            client_id="them",
            client_secret=SealedSecret(key_id=1, box=bytes(64)),
            context="portal",
            client_session_s=3_600,
            portal_session_s=300,
        )
    )
)
case("of a directory")(
    lambda w: w.put(
        attrs.evolve(
            w.directory,
            kind="okta",
            name="renamed",
            credentials=SealedSecret(key_id=1, box=bytes(64)),
            disabled=True,
            synced_at=START,
            last_error="away",
        )
    )
)
case("of an identity")(
    lambda w: w.put(attrs.evolve(w.identity, issuer="https://other.example", subject="x"))
)


@case("of a group")
def _group(w: House) -> None:
    other = new_directory(w)
    w.put(attrs.evolve(w.synced, name="renamed", directory_id=other.id, external_id="y"))
    w.put(attrs.evolve(w.staff, name="crew"))


case("of a site")(lambda w: w.put(attrs.evolve(w.site, name="renamed", kind="internet")))
case("of a policy")(lambda w: w.narrow(description="told"))


@case("of a token")
def _token(w: House) -> None:
    w.change_token(w.user_token, name="renamed", max_uses=9)
    w.change_token(w.site_token, approves_devices=False)
    api = w.token("api", principal_id=w.user.id)
    w.change_token(api, scopes=("policies:read",))


@case("of a client")
def _client(w: House) -> None:
    token = w.token("client", principal_id=w.user.id, auth_provider_id=w.provider.id)
    set_client(w, name="renamed", token_id=decode_token(token).id)


@case("of a gateway")
def _gateway(w: House) -> None:
    token = w.token("gateway", site_id=w.site.id)
    set_gateway(w, name="renamed", token_id=decode_token(token).id)


@case("principal made and removed")
def _principal(w: House) -> None:
    someone = Principal(name="someone", **w.common())
    w.put(someone)
    w.remove("principal", someone.id)


case("auth provider made")(lambda w: new_provider(w) and None)


@case("directory made and removed")
def _directory(w: House) -> None:
    w.remove("directory", new_directory(w).id)


@case("identity made")
def _identity(w: House) -> None:
    w.put(attrs.evolve(w.identity, id=w.new_id(), subject="another"))


case("site made")(lambda w: new_site(w) and None)
case("token made")(lambda w: w.token("client", principal_id=w.user.id) and None)
case("client made")(
    lambda w: w.put(
        Client(
            principal_id=w.user.id,
            token_id=decode_token(w.user_token).id,
            device_key=bytes(32),
            name="phone",
            ipv4=IPv4Address("100.64.9.9"),
            ipv6=IPv6Address("fd48:4c57:5900::9:9"),
            **w.common(),
        )
    )
)
case("gateway made")(
    lambda w: w.put(
        Gateway(
            site_id=w.site.id,
            token_id=decode_token(w.site_token).id,
            device_key=bytes(32),
            name="second",
            ipv4=IPv4Address("100.64.9.9"),
            ipv6=IPv6Address("fd48:4c57:5900::9:9"),
            **w.common(),
        )
    )
)


@case("policy test made, changed and removed")
def _policy_test(w: House) -> None:
    test = PolicyTest(
        name="test",
        principal_id=w.user.id,
        resource_id=w.web.id,
        expected="denied",
        **w.common(),
    )
    w.put(test)
    w.put(
        attrs.evolve(
            test,
            name="renamed",
            principal_id=w.other.id,
            resource_id=w.db.id,
            expected="allowed",
            at=START,
            remote_ip=IpText("192.0.2.1"),
            auth_provider_id=w.provider.id,
            client_verified=True,
            posture=NEW,
        )
    )
    w.remove("policy_test", test.id)


def new_group(w: House) -> Any:
    group = Group(name="new", **w.common())
    w.put(group)
    return group


def new_site(w: House) -> Any:
    site = Site(name="new", **w.common())
    w.put(site)
    return site


def new_directory(w: House) -> Any:
    directory = Directory(kind="scim", name="new", **w.common())
    w.put(directory)
    return directory


def new_provider(w: House) -> Any:
    provider = attrs.evolve(w.provider, id=w.new_id(), name="new")
    w.put(provider)
    return provider


def second_provider(w: House) -> Any:
    """One that knows the user too."""
    provider = new_provider(w)
    w.put(attrs.evolve(w.identity, id=w.new_id(), auth_provider_id=provider.id))
    return provider


def named(w: House, kind: Any, name: str) -> Any:
    (found,) = (each for each in w.entities(kind) if each.name == name)
    return found


@case("client unverified", before=lambda w: w.demand(VERIFIED))
def _unverified(w: House) -> None:
    set_client(w, verified=False)


@case("client reports a worse posture", before=lambda w: w.demand(os_at_least("14")))
def _worse(w: House) -> None:
    set_client(w, posture=OLD)


# --- walking -------------------------------------------------------------------------------------


@attrs.frozen
class Walk:
    """What happened: `log` in the order in which it was said."""

    kept: bool
    log: tuple[tuple[str, object], ...]
    client: frozenset[str]
    gateway: frozenset[str]
    changes: tuple[Change, ...]
    crashes: int
    rows: tuple[Any, ...]
    expires_at: Any


@cache
def walk(name: str, fallback: bool = False) -> Walk:
    by_everyone = name in BY_EVERYONE
    w = House(fallback=fallback or by_everyone)
    if by_everyone and not fallback:
        w.remove("policy", w.main.id)
    if by_everyone and fallback:
        w.narrow(lease_s=1_800)
    w.gate, w.laptop = w.gateway(), w.client()
    set_client(w, verified=name == "client unverified", posture=NEW if "posture" in name else ())
    if name == "posture no longer met":
        set_client(w, posture=())
    PREPARE.get(name, lambda _: None)(w)
    answer = w.laptop.ask(w.web)
    assert isinstance(answer, AuthorizationCreated)
    w.run_for(1)
    w.log.clear()
    number = w.changes()[-1].number
    CASES[name](w)
    # An account's removal is a change, too, but its feed goes with it.
    changes = tuple(each for each in w.changes() if each.number > number)
    log = tuple(w.log)
    gone = name == "account removed"
    return Walk(
        kept=not gone and w.live() == {answer.authorization_id},
        log=log,
        client=heard(w.laptop, log),
        gateway=heard(w.gate, log),
        changes=changes,
        crashes=len(w.crashes),
        rows=() if gone else tuple(w.rows(live=True).values()),
        expires_at=w.rows().get(answer.authorization_id),
    )


def heard(agent: ClientAgent | GatewayAgent, log: tuple[tuple[str, object], ...]) -> frozenset[str]:
    events = {
        EVENT_BY_TYPE[type(message)]
        for name, message in log
        if name == agent.name and not isinstance(message, OF_ITS_OWN)
    }
    return frozenset(events | ({"disconnect", agent.refused} if agent.refused else set()))


ROWS = rows()


def test_every_row_is_a_case_and_every_case_a_row() -> None:
    assert ROWS.keys() == CASES.keys()


@pytest.mark.parametrize("change", ROWS)
def test_a_change_does_what_the_document_says(change: str) -> None:
    row, walked = ROWS[change], walk(change)
    assert not walked.crashes
    assert (walked.client, walked.gateway) == (row.client, row.gateway)
    said = [(name, type(message)) for name, message in walked.log]
    own = [each for each in said if each[1] in OF_ITS_OWN]
    match row.effect:
        case "cut" | "decided":
            assert not walked.kept
            assert not walked.rows
            wanted = [] if "disconnect" in row.gateway else [("gateway", Revoke)]
            if "disconnect" not in row.client:
                wanted.append(("laptop", AuthorizationRevoked))
            assert [each for each in own if each in wanted] == wanted
        case "shorter":
            assert walked.kept
            assert own == [("gateway", AuthorizationRenewed), ("laptop", AuthorizationRenewed)]
        case "kept":
            assert walked.kept
            assert not own
        case other:
            raise AssertionError(other)


@pytest.mark.parametrize("change", [name for name, row in ROWS.items() if row.effect == "decided"])
def test_what_another_policy_allows_is_kept_through(change: str) -> None:
    walked = walk(change, fallback=True)
    assert walked.kept
    assert not walked.crashes
    types = {type(message) for _, message in walked.log}
    assert not types & {Revoke, AuthorizationRevoked}
    assert "resource_removed" not in walked.client
    assert walked.expires_at.expires_at <= START + timedelta(hours=2)


def test_no_kind_and_no_field_is_without_a_row() -> None:
    covered: set[tuple[str, str]] = set()
    for change in CASES:
        for each in walk(change).changes:
            if each.before is None or each.after is None:
                covered.add((each.kind, "made" if each.before is None else "removed"))
                continue
            names = [field.name for field in attrs.fields(type(each.before))]
            covered |= {
                (each.kind, name)
                for name in names
                if getattr(each.before, name) != getattr(each.after, name)
            }
    wanted = {
        (kind, field.name)
        for kind, entity in ENTITIES.items()
        for field in attrs.fields(entity)
        if field.name not in NEVER_CHANGED
    }
    wanted |= {(kind, what) for kind in ENTITIES for what in ("made", "removed")}
    assert wanted - covered == {("account", "made")}  # nobody is connected to an account before
