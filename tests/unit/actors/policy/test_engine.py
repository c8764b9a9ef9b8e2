from __future__ import annotations

from datetime import datetime, time, timedelta
from ipaddress import IPv4Address, IPv6Address
from uuid import UUID

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.model import (
    KIND_OF,
    Account,
    Change,
    Client,
    Conditions,
    CurrentTimeCondition,
    DayWindow,
    Entity,
    Group,
    Membership,
    Policy,
    Principal,
    RemoteIpCondition,
    Resource,
    Site,
    TimeRange,
    Token,
)
from actors.policy.engine import (
    PROPERTIES,
    Allowed,
    Denied,
    Gap,
    Request,
    Snapshot,
    decide,
    in_networks,
    visible_resources,
)
from actors.policy.explain import explain, summary
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
BASE: tuple[Entity, ...] = (USER, ROBOT, STAFF, EVERYONE, SITE, WEB, DB, TOKEN, LAPTOP)
ASK = Request(client_id=LAPTOP.id, resource_id=WEB.id, remote_ip="203.0.113.7", token_id=TOKEN.id)
IN_OFFICE = Conditions(remote_ip=RemoteIpCondition(operator="is_in", values=("203.0.113.0/24",)))
ELSEWHERE = Conditions(remote_ip=RemoteIpCondition(operator="is_in", values=("198.51.100.0/24",)))
WEEKDAYS = Conditions(
    current_time=CurrentTimeCondition(
        zone="Europe/Berlin", windows=tuple(DayWindow(day=day) for day in range(5))
    )
)


def snapshot(*more: Entity, account: Account = ACCOUNT) -> Snapshot:
    return Snapshot.of(Contents(account, (*BASE, *more), 7))


def test_without_a_policy_everything_is_denied() -> None:
    assert decide(snapshot(), ASK, T0) == Denied("forbidden", ("policy",))


def test_a_resource_that_is_not_there_is_not_found() -> None:
    asked = attrs.evolve(ASK, resource_id=UUID(int=404))
    assert decide(snapshot(), asked, T0) == Denied("not_found")


def test_a_policy_of_a_group_of_the_principal_allows_for_its_lease() -> None:
    state = snapshot(member(0, STAFF, USER), policy(0, STAFF, lease_s=3600))
    assert decide(state, ASK, T0) == Allowed(id_of(8, 0), T0 + timedelta(hours=1))


def test_a_policy_of_another_group_is_no_candidate() -> None:
    state = snapshot(policy(0, STAFF, conditions=ELSEWHERE))
    assert decide(state, ASK, T0) == Denied("forbidden", ("policy",))


def test_everyone_is_all_users_and_no_service_account_even_as_a_member() -> None:
    other = token(1, ROBOT)
    machine = client(1, ROBOT, other)
    state = snapshot(
        policy(0, EVERYONE),
        other,
        machine,
        Membership(
            id=id_of(9, 9),
            account_id=A,
            group_id=EVERYONE.id,
            principal_id=ROBOT.id,
            created_at=T0,
        ),
    )
    assert isinstance(decide(state, ASK, T0), Allowed)
    asked = attrs.evolve(ASK, client_id=machine.id, token_id=other.id)
    assert decide(state, asked, T0) == Denied("forbidden", ("policy",))
    assert visible_resources(state, machine.id) == {}
    assert list(visible_resources(state, LAPTOP.id)) == [WEB.id]


def test_the_policy_with_the_latest_expiry_wins() -> None:
    state = snapshot(
        policy(0, EVERYONE, lease_s=60),
        policy(1, EVERYONE, lease_s=600),
        policy(2, EVERYONE, expires_at=T0 + timedelta(seconds=500)),
        policy(3, EVERYONE, conditions=ELSEWHERE),
    )
    assert decide(state, ASK, T0) == Allowed(id_of(8, 1), T0 + timedelta(seconds=600))


def test_the_token_bounds_every_policy() -> None:
    soon = attrs.evolve(TOKEN, expires_at=T0 + timedelta(seconds=30))
    state = snapshot(policy(0, EVERYONE), soon)
    assert decide(state, ASK, T0) == Allowed(id_of(8, 0), T0 + timedelta(seconds=30))
    assert decide(state, ASK, T0 + timedelta(seconds=30)) == Denied("forbidden", ("token_expired",))


def test_the_end_of_the_time_window_bounds_the_access() -> None:
    state = snapshot(policy(0, EVERYONE, conditions=WEEKDAYS))
    friday = reading.utc(2026, 3, 27, 12, 0)
    assert decide(state, ASK, friday) == Allowed(id_of(8, 0), reading.utc(2026, 3, 27, 23, 0))


def test_a_denial_names_every_violated_property_of_the_candidates_once_and_no_value() -> None:
    state = snapshot(
        policy(0, EVERYONE, conditions=attrs.evolve(ELSEWHERE, current_time=WEEKDAYS.current_time)),
        policy(1, EVERYONE, conditions=ELSEWHERE, disabled=True),
        policy(2, EVERYONE, expires_at=T0),
        attrs.evolve(USER, disabled=True),
        account=attrs.evolve(ACCOUNT, disabled=True),
    )
    assert decide(state, ASK, T0) == Denied(
        "forbidden",
        (
            "account_disabled",
            "principal_disabled",
            "policy_disabled",
            "policy_expired",
            "remote_ip",
            "current_time",
        ),
    )


@pytest.mark.parametrize(
    ("remote_ip", "values", "inside"),
    [
        ("203.0.113.7", ("203.0.113.0/24",), True),
        ("::ffff:203.0.113.7", ("203.0.113.0/24",), True),
        ("203.0.113.7", ("::ffff:203.0.113.0/120",), True),
        ("2001:db8::7", ("203.0.113.0/24", "2001:db8::/32"), True),
        ("203.0.113.7", ("::/0",), False),
        ("203.0.113.7", ("0.0.0.0/0",), True),
        ("not an address", ("0.0.0.0/0",), False),
        ("203.0.113.7", ("203.0.113.7",), True),
        ("203.0.113.7", ("nonsense", "0.0.0.0/0"), False),
    ],
)
def test_addresses_of_both_families_are_found_in_networks(
    remote_ip: str, values: tuple[str, ...], inside: bool
) -> None:
    assert in_networks(values, remote_ip) is inside


@pytest.mark.parametrize(
    ("remote_ip", "values"), [(None, ("10.0.0.0/8",)), ("?", ("10.0.0.0/8",)), ("1.1.1.1", ("?",))]
)
def test_what_is_unknown_fails_a_negated_condition_too(
    remote_ip: str | None, values: tuple[str, ...]
) -> None:
    condition = RemoteIpCondition(operator="is_not_in", values=values)
    state = snapshot(policy(0, EVERYONE, conditions=Conditions(remote_ip=condition)))
    asked = attrs.evolve(ASK, remote_ip=remote_ip)
    assert decide(state, asked, T0) == Denied("forbidden", ("remote_ip",))


@pytest.mark.parametrize(
    "change",
    [
        {"token_id": UUID(int=404)},
        {"token_id": None},
        {"token_id": id_of(6, 1)},
    ],
)
def test_a_token_that_is_unknown_or_of_another_denies(change: dict[str, UUID | None]) -> None:
    state = snapshot(policy(0, EVERYONE), token(1, ROBOT))
    asked = attrs.evolve(ASK, **change)  # type: ignore[arg-type]  # fields of the table
    assert decide(state, asked, T0) == Denied("forbidden", ("token",))


def test_changes_apply_in_order_once_and_a_gap_raises() -> None:
    state = snapshot(policy(0, EVERYONE))
    new = policy(1, EVERYONE, DB)
    change = Change(
        account_id=A,
        number=8,
        at=T0,
        who="x",
        kind="policy",
        entity_id=new.id,
        before=None,
        after=new,
    )
    with pytest.raises(Gap) as caught:
        state.apply(attrs.evolve(change, number=9))
    assert (caught.value.number, caught.value.got) == (7, 9)
    assert state.apply(change)
    assert not state.apply(change)
    assert set(visible_resources(state, LAPTOP.id)) == {WEB.id, DB.id}
    with pytest.raises(ValueError, match="another account"):
        state.apply(attrs.evolve(change, account_id=UUID(int=2), number=9))


def test_an_account_that_is_removed_denies_everything() -> None:
    state = snapshot(policy(0, EVERYONE))
    state.apply(
        Change(
            account_id=A,
            number=8,
            at=T0,
            who="x",
            kind="account",
            entity_id=A,
            before=ACCOUNT,
            after=None,
        )
    )
    assert decide(state, ASK, T0) == Denied("not_found")
    assert visible_resources(state, LAPTOP.id) == {}


def test_an_explanation_agrees_with_the_decision_and_says_why() -> None:
    state = snapshot(
        policy(0, STAFF),
        policy(1, EVERYONE, conditions=ELSEWHERE),
        policy(2, EVERYONE, conditions=IN_OFFICE, expires_at=T0 + timedelta(hours=2)),
    )
    told = explain(state, ASK, T0)
    assert told.decision == decide(state, ASK, T0)
    outsider, elsewhere, winner = told.policies
    assert not outsider.member
    assert [check.property for check in elsewhere.checks if not check.holds] == ["remote_ip"]
    assert winner.expires_at == T0 + timedelta(hours=2)
    assert [bound.source for bound in winner.bounds] == ["policy", "lease"]
    assert "allowed by policy" in summary(told)


def test_the_explainer_can_be_asked_about_a_principal_without_a_device() -> None:
    state = snapshot(policy(0, EVERYONE))
    asked = Request(principal_id=USER.id, resource_id=WEB.id, remote_ip=None)
    assert isinstance(explain(state, asked, T0).decision, Allowed)
    asked = Request(principal_id=UUID(int=404), resource_id=WEB.id, remote_ip=None)
    assert explain(state, asked, T0).decision == Denied("forbidden", ("principal",))


# --- against a slow reading of the specification -----------------------------------------------

ADDRESSES = ["203.0.113.7", "::ffff:203.0.113.7", "198.51.100.1", "2001:db8::1", None]
NETWORKS = ["203.0.113.0/24", "198.51.100.0/25", "2001:db8::/64", "0.0.0.0/0", "::/0"]
INSTANTS = [T0, T0 + timedelta(hours=12), reading.utc(2026, 10, 25, 0, 30), T0 - timedelta(days=3)]

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
remotes = st.builds(
    lambda operator, values: RemoteIpCondition(operator=operator, values=tuple(values)),
    st.sampled_from(["is_in", "is_not_in"]),
    st.lists(st.sampled_from(NETWORKS), min_size=1, max_size=3),
)
limits = st.one_of(
    st.none(), st.builds(lambda m: T0 + timedelta(minutes=m), st.integers(-3000, 3000))
)


@st.composite
def accounts(draw: st.DrawFn) -> tuple[Account, list[Entity]]:
    account = attrs.evolve(ACCOUNT, disabled=draw(st.integers(0, 9)) == 0)
    principals = [
        attrs.evolve(each, disabled=draw(st.integers(0, 5)) == 0) for each in (USER, ROBOT)
    ]
    tokens = [token(n, each, expires_at=draw(limits)) for n, each in enumerate(principals)]
    clients = [client(n, each, tokens[n]) for n, each in enumerate(principals)]
    groups = [STAFF, EVERYONE, attrs.evolve(STAFF, id=id_of(3, 2), name="ops")]
    pairs = [(g, p) for g in (STAFF, groups[2]) for p in principals]
    members = [member(n, g, p) for n, (g, p) in enumerate(pairs) if draw(st.booleans())]
    policies = [
        policy(
            n,
            draw(st.sampled_from(groups)),
            draw(st.sampled_from([WEB, WEB, DB])),
            disabled=draw(st.integers(0, 4)) == 0,
            expires_at=draw(limits),
            lease_s=draw(st.sampled_from([60, 3600, 86_400])),
            conditions=Conditions(
                remote_ip=draw(st.none() | remotes), current_time=draw(st.none() | hours)
            ),
        )
        for n in range(draw(st.integers(0, 4)))
    ]
    present = [e for e in (*clients, *tokens) if draw(st.integers(0, 9)) > 0]
    return account, [*principals, *groups, SITE, WEB, DB, *members, *policies, *present]


@settings(max_examples=300, deadline=None)
@given(
    accounts(),
    st.sampled_from([id_of(7, 0), id_of(7, 1)]),
    st.sampled_from([id_of(6, 0), id_of(6, 1)]),
    st.sampled_from([WEB.id, DB.id]),
    st.sampled_from(ADDRESSES),
    st.sampled_from(INSTANTS),
)
def test_the_engine_decides_as_a_slow_reading_of_the_specification(
    drawn: tuple[Account, list[Entity]],
    client_id: UUID,
    token_id: UUID,
    resource_id: UUID,
    remote_ip: str | None,
    instant: datetime,
) -> None:
    account, entities = drawn
    state = Snapshot.of(Contents(account, tuple(entities), 0))
    asked = Request(
        client_id=client_id, token_id=token_id, resource_id=resource_id, remote_ip=remote_ip
    )
    decision = decide(state, asked, instant)
    expires_at, violated, winners = reading.decide(
        account, entities, client_id, resource_id, token_id, remote_ip, instant
    )
    if expires_at is None:
        assert isinstance(decision, Denied)
        assert set(decision.violated) == violated
        assert list(decision.violated) == sorted(decision.violated, key=PROPERTIES.index)
    else:
        assert decision == Allowed(min(winners), expires_at)  # type: ignore[type-var]  # ids
    told = explain(state, asked, instant)
    assert told.decision == decision
    assert any(trace.allows for trace in told.policies) == isinstance(decision, Allowed)


@settings(max_examples=100, deadline=None)
@given(accounts(), accounts())
def test_a_snapshot_that_followed_changes_equals_one_made_afresh(
    first: tuple[Account, list[Entity]], second: tuple[Account, list[Entity]]
) -> None:
    account, entities = first
    followed = Snapshot.of(Contents(account, tuple(entities), 0))
    number = 0
    old = {entity.id: entity for entity in entities}
    new = {entity.id: entity for entity in second[1]}
    for id in [*(i for i in old if i not in new), *new]:
        before, after = old.get(id), new.get(id)
        kind = KIND_OF[type(after or before)]  # type: ignore[index]  # one of them is there
        number += 1
        followed.apply(
            Change(
                account_id=A,
                number=number,
                at=T0,
                who="x",
                kind=kind,
                entity_id=id,
                before=before,
                after=after,
            )
        )
    fresh = Snapshot.of(Contents(account, tuple(second[1]), number))
    assert set(followed.entities()) == set(fresh.entities())
    for client_id in (id_of(7, 0), id_of(7, 1)):
        assert visible_resources(followed, client_id) == visible_resources(fresh, client_id)
        for resource in (WEB, DB):
            asked = attrs.evolve(ASK, client_id=client_id, resource_id=resource.id)
            assert decide(followed, asked, T0) == decide(fresh, asked, T0)
