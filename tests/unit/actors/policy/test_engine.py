from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.enrolment import owner_refusal
from actors.model import (
    KIND_OF,
    Account,
    AuthProviderCondition,
    Change,
    ClientPostureCondition,
    ClientVerifiedCondition,
    Conditions,
    CurrentTimeCondition,
    DayWindow,
    Entity,
    Fact,
    FactTest,
    Membership,
    RegionCondition,
    RemoteIpCondition,
)
from actors.policy.engine import (
    PROPERTIES,
    Allowed,
    Denied,
    Gap,
    Request,
    Snapshot,
    common_violations,
    decide,
    expiry_by,
    in_networks,
    visible_resources,
)
from actors.policy.explain import explain, summary
from actors.store.interface import Contents

from .. import reading
from .worlds import (
    ACCOUNT,
    ADDRESSES,
    BRANCH,
    COUNTRIES,
    DB,
    EVERYONE,
    GOOGLE,
    INSTANTS,
    LAPTOP,
    OKTA,
    ROBOT,
    SITE,
    SITE_TOKEN,
    STAFF,
    T0,
    TOKEN,
    USER,
    WEB,
    A,
    Atlas,
    accounts,
    client,
    gateway,
    id_of,
    identity,
    member,
    policy,
    token,
)

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


SIGNED_IN = attrs.evolve(TOKEN, auth_provider_id=OKTA.id)
KNOWN = identity(0, USER, OKTA)


@pytest.mark.parametrize(
    ("entities", "violated"),
    [
        ((SIGNED_IN, OKTA, KNOWN), ()),
        ((SIGNED_IN, attrs.evolve(OKTA, disabled=True), KNOWN), ("auth_provider_disabled",)),
        ((SIGNED_IN, OKTA), ("identity",)),
        ((SIGNED_IN, OKTA, GOOGLE, identity(0, USER, GOOGLE)), ("identity",)),
        ((SIGNED_IN, OKTA, identity(0, ROBOT, OKTA)), ("identity",)),
        ((attrs.evolve(TOKEN, allowed_sources=("203.0.113.0/24",)),), ()),
        ((attrs.evolve(TOKEN, allowed_sources=("198.51.100.0/24",)),), ("token_source",)),
    ],
)
def test_a_session_is_good_while_its_sign_in_is_and_from_its_sources(
    entities: tuple[Entity, ...], violated: tuple[str, ...]
) -> None:
    state = snapshot(policy(0, EVERYONE), *entities)
    decision = decide(state, ASK, T0)
    told = explain(state, ASK, T0)
    assert told.decision == decision
    assert tuple(check.property for check in told.common if not check.holds) == violated
    assert {check.property for check in told.common} >= {
        "token_source",
        "auth_provider_disabled",
        "identity",
    }
    if violated:
        assert decision == Denied("forbidden", violated)
        assert violated[0] in summary(told)
        assert not told.path
    else:
        assert isinstance(decision, Allowed)
    assert (expiry_by(state, ASK, id_of(8, 0), T0) is None) == bool(violated)


def test_of_a_principal_no_session_is_asked() -> None:
    state = snapshot(policy(0, EVERYONE), SIGNED_IN, attrs.evolve(OKTA, disabled=True))
    asked = Request(principal_id=USER.id, resource_id=WEB.id, remote_ip=None)
    assert isinstance(decide(state, asked, T0), Allowed)
    assert [check.property for check in explain(state, asked, T0).common] == [
        "account_disabled",
        "principal",
        "principal_disabled",
    ]


@settings(max_examples=300, deadline=None)
@given(
    accounts(),
    st.integers(0, 2),
    st.sampled_from(["203.0.113.7", "198.51.100.1"]),
    st.sampled_from(INSTANTS),
)
def test_whoever_may_not_join_may_reach_nothing(
    drawn: tuple[Account, list[Entity]], number: int, remote_ip: str, instant: datetime
) -> None:
    """The life cycle's refusals and the engine's denials are one rule."""
    account, entities = drawn
    state = Snapshot.of(Contents(account, tuple(entities), 0), Atlas())
    refused = owner_refusal(state, id_of(6, number), remote_ip, instant)
    asked = Request(
        client_id=id_of(7, number),
        token_id=id_of(6, number),
        resource_id=WEB.id,
        remote_ip=remote_ip,
    )
    denied = set(common_violations(state, asked, instant)) - {"client"}
    if asked.client_id in state.clients:
        assert bool(denied) == (refused is not None)
    else:
        assert "client" in common_violations(state, asked, instant)


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
    assert summary(told) == (
        f"allowed by policy {winner.policy_id} for {winner.group_name} until"
        f" {T0 + timedelta(hours=2):%Y-%m-%d %H:%M:%S} UTC"
    )
    denied = explain(snapshot(policy(0, STAFF)), ASK, T0)
    assert summary(denied).startswith("denied: forbidden (policy): no policy of it")


def test_the_explainer_can_be_asked_about_a_principal_without_a_device() -> None:
    state = snapshot(policy(0, EVERYONE))
    asked = Request(principal_id=USER.id, resource_id=WEB.id, remote_ip=None)
    assert isinstance(explain(state, asked, T0).decision, Allowed)
    asked = Request(principal_id=UUID(int=404), resource_id=WEB.id, remote_ip=None)
    assert explain(state, asked, T0).decision == Denied("forbidden", ("principal",))


def one_condition(**condition: object) -> Snapshot:
    conditions = Conditions(**condition)  # type: ignore[arg-type]  # one of the tests' choice
    return Snapshot.of(
        Contents(ACCOUNT, (*BASE, policy(0, EVERYONE, conditions=conditions)), 7), Atlas()
    )


@pytest.mark.parametrize(
    ("operator", "remote_ip", "allowed"),
    [
        ("is_in", "203.0.113.7", True),
        ("is_in", "198.51.100.1", False),
        ("is_not_in", "198.51.100.1", True),
        ("is_not_in", "203.0.113.7", False),
        ("is_not_in", "2001:db8::1", False),
        ("is_not_in", None, False),
    ],
)
def test_a_country_that_is_unknown_fails_a_negated_condition_too(
    operator: str, remote_ip: str | None, allowed: bool
) -> None:
    condition = RegionCondition(operator=operator, values=("DE",))  # type: ignore[arg-type]
    state = one_condition(remote_ip_location_region=condition)
    decision = decide(state, attrs.evolve(ASK, remote_ip=remote_ip), T0)
    if allowed:
        assert isinstance(decision, Allowed)
    else:
        assert decision == Denied("forbidden", ("remote_ip_location_region",))


def test_without_a_region_database_every_country_is_unknown() -> None:
    condition = RegionCondition(operator="is_not_in", values=("KP",))
    state = snapshot(
        policy(0, EVERYONE, conditions=Conditions(remote_ip_location_region=condition))
    )
    assert decide(state, ASK, T0) == Denied("forbidden", ("remote_ip_location_region",))
    assert isinstance(decide(state, attrs.evolve(ASK, region="DE"), T0), Allowed)


@pytest.mark.parametrize(
    ("operator", "signed_in_by", "allowed"),
    [
        ("is_in", OKTA.id, True),
        ("is_in", UUID(int=404), False),
        ("is_not_in", UUID(int=404), True),
        ("is_not_in", OKTA.id, False),
        ("is_in", None, False),
        ("is_not_in", None, False),
    ],
)
def test_the_provider_is_that_of_the_session_and_a_session_of_none_fails(
    operator: str, signed_in_by: UUID | None, allowed: bool
) -> None:
    condition = AuthProviderCondition(operator=operator, values=(OKTA.id,))  # type: ignore[arg-type]
    conditions = Conditions(auth_provider=condition)
    session = attrs.evolve(TOKEN, auth_provider_id=signed_in_by)
    other = attrs.evolve(OKTA, id=UUID(int=404))
    known = (identity(0, USER, OKTA), identity(1, USER, other))
    state = snapshot(policy(0, EVERYONE, conditions=conditions), session, OKTA, other, *known)
    decision = decide(state, ASK, T0)
    assert isinstance(decision, Allowed) == allowed
    if isinstance(decision, Denied):
        assert decision.violated == ("auth_provider",)


@pytest.mark.parametrize("wanted", [True, False])
def test_whether_a_device_is_verified_is_unknown_without_a_device(wanted: bool) -> None:
    conditions = Conditions(client_verified=ClientVerifiedCondition(value=wanted))
    state = snapshot(
        policy(0, EVERYONE, conditions=conditions), attrs.evolve(LAPTOP, verified=wanted)
    )
    assert isinstance(decide(state, ASK, T0), Allowed)
    other = attrs.evolve(ASK, client_verified=not wanted)
    assert decide(state, other, T0) == Denied("forbidden", ("client_verified",))
    anybody = Request(principal_id=USER.id, resource_id=WEB.id, remote_ip=None)
    assert decide(state, anybody, T0) == Denied("forbidden", ("client_verified",))
    stated = attrs.evolve(anybody, client_verified=wanted)
    assert isinstance(decide(state, stated, T0), Allowed)


@pytest.mark.parametrize(
    ("operator", "wanted", "reported", "meets"),
    [
        ("is", True, True, True),
        ("is", True, 1, False),
        ("is", 1, True, False),
        ("is_not", True, "yes", False),
        ("is_not", "a", "b", True),
        ("is_not", "a", None, False),
        ("at_least", True, True, False),
        ("at_least", 3, 3, True),
        ("at_most", 3, 4, False),
        ("at_least", "14.9", "14.10", True),
        ("at_least", "14.10", "14.9", False),
        ("at_most", "14.0", "14", True),
        ("at_least", "14", "14.0.0", True),
        ("at_least", "14", "15-beta", False),
        ("at_least", "14", "", False),
        ("at_least", "14", "14.", False),
        ("at_least", "14", "\u0661\u0665", False),
        ("at_least", "jammy", "jammy", False),
        ("is", "jammy", "jammy", True),
    ],
)
def test_a_reported_fact_is_compared_with_its_own_type_only(
    operator: str, wanted: bool | int | str, reported: bool | int | str | None, meets: bool
) -> None:
    test = FactTest(name="x", operator=operator, value=wanted)  # type: ignore[arg-type]
    conditions = Conditions(client_posture=ClientPostureCondition(facts=(test,)))
    posture = () if reported is None else (Fact(name="x", value=reported),)
    device = attrs.evolve(LAPTOP, posture=posture)
    decision = decide(snapshot(policy(0, EVERYONE, conditions=conditions), device), ASK, T0)
    assert isinstance(decision, Allowed) == meets
    if isinstance(decision, Denied):
        assert decision.violated == ("client_posture",)


def test_a_principal_without_a_device_borrows_no_session_of_another() -> None:
    condition = AuthProviderCondition(operator="is_in", values=(OKTA.id,))
    session = attrs.evolve(TOKEN, auth_provider_id=OKTA.id)
    state = snapshot(policy(0, EVERYONE, conditions=Conditions(auth_provider=condition)), session)
    asked = Request(principal_id=USER.id, resource_id=WEB.id, remote_ip=None, token_id=session.id)
    assert decide(state, asked, T0) == Denied("forbidden", ("auth_provider",))


def test_an_explanation_names_gateways_of_all_sites_and_the_path() -> None:
    web = attrs.evolve(WEB, site_ids=(SITE.id, BRANCH.id))
    pending = gateway(1, BRANCH, approved=False)
    state = snapshot(web, BRANCH, SITE_TOKEN, gateway(0, SITE), pending, policy(0, EVERYONE))
    told = explain(state, ASK, T0, {id_of(11, 0)})
    assert [(each.gateway_id, each.approved, each.online) for each in told.gateways] == [
        (id_of(11, 0), True, True),
        (id_of(11, 1), False, False),
    ]
    assert [hop.kind for hop in told.path] == ["client", "principal", "group", "policy", "resource"]
    assert "but none" not in summary(told)
    assert summary(explain(state, ASK, T0, {id_of(11, 1)})).endswith(
        "; but none of its gateways is approved and online"
    )
    unknown = explain(state, ASK, T0)
    assert unknown.gateways[0].online is None
    assert "but none" not in summary(unknown)
    assert explain(state, attrs.evolve(ASK, resource_id=DB.id), T0).path == ()


# --- against a slow reading of the specification -----------------------------------------------


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
    state = Snapshot.of(Contents(account, tuple(entities), 0), Atlas())
    asked = Request(
        client_id=client_id, token_id=token_id, resource_id=resource_id, remote_ip=remote_ip
    )
    decision = decide(state, asked, instant)
    expires_at, violated, winners = reading.decide(
        account, entities, client_id, resource_id, token_id, remote_ip, instant, COUNTRIES
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
