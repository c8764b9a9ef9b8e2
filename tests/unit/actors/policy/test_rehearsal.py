"""Policy tests, replay and exposure: what a change breaks, and what a revocation cannot reach."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.model import (
    Account,
    Authorization,
    Conditions,
    CurrentTimeCondition,
    DayWindow,
    Entity,
    PolicyTest,
    RegionCondition,
)
from actors.policy.engine import Allowed, Denied, Request, Snapshot, decide
from actors.policy.exposure import Exposure, exposure
from actors.policy.proposals import failing_tests, newly_failing_tests, propose
from actors.policy.replay import replay
from actors.store.interface import Contents, Put, Remove

from .. import reading
from .test_diff import on_verified, snapshot_of
from .worlds import (
    ACCOUNT,
    EVERYONE,
    LAPTOP,
    OTHER,
    PRINCIPALS,
    RESOURCES,
    STAFF,
    T0,
    TOKEN,
    USER,
    WEB,
    A,
    Atlas,
    Ledger,
    accounts,
    id_of,
    member,
    policy,
    token,
)

BASE: tuple[Entity, ...] = (*PRINCIPALS, STAFF, EVERYONE, *RESOURCES, TOKEN, LAPTOP)
MINUTE = timedelta(minutes=1)
WEEKDAYS = Conditions(
    current_time=CurrentTimeCondition(
        zone="Europe/Berlin", windows=tuple(DayWindow(day=day) for day in range(5))
    )
)


def account(*more: Entity) -> Snapshot:
    return Snapshot.of(Contents(ACCOUNT, (*BASE, *more), 7), Atlas())


def test_of(number: int, **fields: Any) -> PolicyTest:
    base = PolicyTest(
        id=id_of(12, number),
        account_id=A,
        name="t",
        principal_id=USER.id,
        resource_id=WEB.id,
        expected="allowed",
        created_at=T0,
    )
    return attrs.evolve(base, **fields)


test_of.__test__ = False  # type: ignore[attr-defined]  # makes one, is none


def test_a_policy_test_fails_when_the_decision_is_not_the_one_expected() -> None:
    german = RegionCondition(operator="is_in", values=("DE",))
    state = account(
        policy(0, EVERYONE, conditions=Conditions(remote_ip_location_region=german)),
        test_of(0, remote_ip="203.0.113.7"),
        test_of(1, remote_ip="198.51.100.1", expected="denied"),
        test_of(2),
        test_of(3, remote_ip="203.0.113.7", expected="denied"),
    )
    failed = failing_tests(state, T0)
    assert [each.test.id for each in failed] == [id_of(12, 2), id_of(12, 3)]
    assert failed[0].decision == Denied("forbidden", ("remote_ip_location_region",))
    assert isinstance(failed[1].decision, Allowed)


def test_a_policy_test_asks_at_its_own_instant_or_at_that_of_the_change() -> None:
    friday = reading.utc(2026, 3, 27, 12, 0)
    state = account(policy(0, EVERYONE, conditions=WEEKDAYS), test_of(0, at=friday), test_of(1))
    assert [each.test.id for each in failing_tests(state, T0)] == [id_of(12, 1)]  # a Saturday
    assert failing_tests(state, friday) == ()


def test_a_proposal_is_held_to_what_it_breaks_and_not_to_what_failed_before() -> None:
    before = account(policy(0, EVERYONE), test_of(0), test_of(1, expected="denied"))
    harmless = propose(before, [Put(policy(1, EVERYONE, conditions=WEEKDAYS))])
    assert newly_failing_tests(harmless, T0) == ()
    breaking = propose(before, [Remove("policy", id_of(8, 0))])
    assert [each.test.id for each in newly_failing_tests(breaking, T0)] == [id_of(12, 0)]
    added = propose(before, [Put(test_of(2, expected="denied"))])
    assert [each.test.id for each in newly_failing_tests(added, T0)] == [id_of(12, 2)]


# --- replay --------------------------------------------------------------------------------------


def recorded(**fields: Any) -> Authorization:
    base = Authorization(
        id=id_of(13, 0),
        account_id=A,
        policy_id=id_of(8, 0),
        client_id=LAPTOP.id,
        gateway_id=id_of(11, 0),
        resource_id=WEB.id,
        token_id=TOKEN.id,
        connection_id=id_of(14, 0),
        remote_ip="203.0.113.7",
        created_at=T0,
        expires_at=T0 + timedelta(hours=8),
    )
    return attrs.evolve(base, **fields)


def test_an_access_is_cut_where_no_policy_would_have_carried_it_on() -> None:
    friday = reading.utc(2026, 3, 27, 20, 0)
    row = recorded(created_at=friday, expires_at=friday + timedelta(days=1))
    (stands,) = replay(account(policy(0, EVERYONE, lease_s=60)), [row])
    assert (stands.outcome, stands.cut_at) == ("stands", None)
    (cut,) = replay(account(policy(0, EVERYONE, conditions=WEEKDAYS)), [row])
    assert (cut.outcome, cut.cut_at) == ("shortened", reading.utc(2026, 3, 27, 23, 0))
    assert cut.violated == ("current_time",)
    ended = attrs.evolve(row, ended_at=friday + timedelta(hours=3))
    (short,) = replay(account(policy(0, EVERYONE, conditions=WEEKDAYS)), [ended])
    assert short.outcome == "stands"
    (denied,) = replay(account(policy(0, STAFF)), [row])
    assert (denied.outcome, denied.violated) == ("denied", ("policy",))
    (gone,) = replay(account(policy(0, EVERYONE)), [attrs.evolve(row, client_id=UUID(int=404))])
    assert gone.outcome == "unknown"


@settings(max_examples=80, deadline=None)
@given(accounts(), st.integers(-3000, 3000), st.integers(1, 300))
def test_a_replay_is_what_deciding_minute_by_minute_finds(
    drawn: tuple[Account, list[Entity]], start: int, length: int
) -> None:
    state = snapshot_of(Ledger(*drawn))
    created = T0 + start * MINUTE
    row = recorded(created_at=created, expires_at=created + length * MINUTE)
    (found,) = replay(state, [row])
    if LAPTOP.id not in state.clients:
        assert found.outcome == "unknown"
        return
    asked = Request(
        client_id=LAPTOP.id, token_id=TOKEN.id, resource_id=WEB.id, remote_ip=row.remote_ip
    )
    denied_at = next(
        (
            minute
            for minute in range(length)
            if isinstance(decide(state, asked, created + minute * MINUTE), Denied)
        ),
        None,
    )
    if denied_at is None:
        assert found.outcome == "stands"
    elif denied_at == 0:
        assert found.outcome == "denied"
    else:
        assert found.outcome == "shortened"
        assert found.cut_at == created + denied_at * MINUTE


# --- exposure ------------------------------------------------------------------------------------


def test_a_resource_is_exposed_for_the_longest_lease_of_a_policy_that_serves_somebody() -> None:
    state = account(policy(0, EVERYONE, lease_s=600), policy(1, STAFF, lease_s=3600))
    ten_minutes = Exposure(resource_id=WEB.id, disconnected_s=600, policy_id=id_of(8, 0))
    assert exposure(state, WEB.id, T0) == ten_minutes  # nobody is in the staff
    state = account(
        member(0, STAFF, USER), policy(0, EVERYONE, lease_s=600), policy(1, STAFF, lease_s=3600)
    )
    assert exposure(state, WEB.id, T0).disconnected_s == 3600


def test_a_token_an_expiry_and_a_window_bound_the_exposure() -> None:
    soon = attrs.evolve(TOKEN, expires_at=T0 + timedelta(seconds=90, microseconds=1))
    assert exposure(account(policy(0, EVERYONE), soon), WEB.id, T0).disconnected_s == 91
    other = token(1, OTHER, expires_at=T0 + timedelta(hours=2))
    assert exposure(account(policy(0, EVERYONE), soon, other), WEB.id, T0).disconnected_s == 7200
    expiring = policy(0, EVERYONE, expires_at=T0 + timedelta(seconds=30))
    assert exposure(account(expiring), WEB.id, T0).disconnected_s == 30
    friday = reading.utc(2026, 3, 27, 22, 0)
    closing = account(policy(0, EVERYONE, conditions=WEEKDAYS))
    assert exposure(closing, WEB.id, friday).disconnected_s == 3600


def test_what_nobody_can_be_given_is_not_exposed() -> None:
    nothing = Exposure(resource_id=WEB.id, disconnected_s=0, policy_id=None)
    for state in (
        account(),
        account(policy(0, EVERYONE, disabled=True)),
        account(policy(0, EVERYONE, expires_at=T0)),
        account(policy(0, EVERYONE, conditions=WEEKDAYS)),  # it is a Saturday
        account(policy(0, EVERYONE), attrs.evolve(USER, disabled=True)),
        account(policy(0, EVERYONE), attrs.evolve(TOKEN, expires_at=T0)),
        account(policy(0, EVERYONE), attrs.evolve(ACCOUNT, disabled=True)),
    ):
        assert exposure(state, WEB.id, T0) == nothing
    assert exposure(account(policy(0, EVERYONE, conditions=on_verified(True))), WEB.id, T0) == (
        Exposure(resource_id=WEB.id, disconnected_s=86_400, policy_id=id_of(8, 0))
    )


@settings(max_examples=80, deadline=None)
@given(accounts(), st.integers(-3000, 3000))
def test_no_authorisation_lasts_longer_than_the_exposure(
    drawn: tuple[Account, list[Entity]], minutes: int
) -> None:
    state = snapshot_of(Ledger(*drawn))
    instant = T0 + minutes * MINUTE
    for resource in RESOURCES:
        bound = exposure(state, resource.id, instant).disconnected_s
        for client in state.clients.values():
            asked = Request(
                client_id=client.id,
                token_id=client.token_id,
                resource_id=resource.id,
                remote_ip="203.0.113.7",
            )
            decision = decide(state, asked, instant)
            if isinstance(decision, Allowed):
                assert decision.expires_at - instant <= timedelta(seconds=bound)
