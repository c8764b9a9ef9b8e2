"""`diff` against a direct reading of the account before and after: random accounts, random changes.

Soundness: each gain and loss has an example, which the reference decides as the difference says.
Completeness: no circumstances are found in which the reference decides otherwise without a pair
being named, and at no instant outside of the spans.
"""

from __future__ import annotations

from datetime import time, timedelta
from typing import Any
from uuid import UUID

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.model import (
    Account,
    ClientPostureCondition,
    ClientVerifiedCondition,
    Conditions,
    CurrentTimeCondition,
    DayWindow,
    Entity,
    Fact,
    FactTest,
    Policy,
    Principal,
    TimeRange,
)
from actors.policy.circumstances import Circumstances, Span
from actors.policy.diff import Difference, diff, edits_between, flips
from actors.policy.engine import Allowed, Request, Snapshot
from actors.policy.proposals import propose
from actors.store.interface import Contents, Mutation, Put, Remove

from .. import reading
from .worlds import (
    ACCOUNT,
    ADDRESSES,
    DB,
    EVERYONE,
    GOOGLE,
    OKTA,
    OTHER,
    PRINCIPALS,
    REMOVABLE,
    RESOURCES,
    STAFF,
    T0,
    USER,
    WEB,
    A,
    Ledger,
    accounts,
    facts,
    id_of,
    is_sound,
    member,
    policy,
    puts,
)

Pair = tuple[UUID, UUID]
QUARTER = timedelta(minutes=15)
PAIRS = [(principal.id, resource.id) for principal in PRINCIPALS for resource in RESOURCES]


def allowed(ledger: Ledger, pair: Pair, facts: Circumstances) -> bool:
    """Whether the principal may reach the resource, by reading the tables."""
    if ledger.account.disabled:
        return False
    entities = list(ledger.entities.values())
    principal, resource = ledger.entities.get(pair[0]), ledger.entities.get(pair[1])
    if not isinstance(principal, Principal) or principal.disabled or resource is None:
        return False
    for each in entities:
        if not isinstance(each, Policy) or each.resource_id != pair[1] or each.disabled:
            continue
        if not reading.in_group(entities, principal, each.group_id):
            continue
        if each.expires_at is not None and each.expires_at <= facts.instant:
            continue
        if reading.conditions_hold(each.conditions, facts):
            return True
    return False


@st.composite
def circumstances(draw: st.DrawFn, instants: Any) -> Circumstances:
    return Circumstances(
        instant=draw(instants),
        remote_ip=draw(st.sampled_from(ADDRESSES)),
        region=draw(st.sampled_from(["DE", "FR", "US", "AQ", None])),
        auth_provider_id=draw(st.sampled_from([OKTA.id, GOOGLE.id, None])),
        client_verified=draw(st.sampled_from([None, True, False])),
        posture=draw(facts),
    )


def carried_out(ledger: Ledger, mutations: list[Mutation]) -> Ledger:
    after = Ledger(ledger.account, list(ledger.entities.values()))
    for mutation in mutations:
        if isinstance(mutation, Put):
            after.put(mutation.entity)
        else:
            after.remove(mutation.id)
    return after


@st.composite
def mutations(draw: st.DrawFn, ledger: Ledger) -> list[Mutation]:
    """Mutations that a store would take, one after the other."""
    now = Ledger(ledger.account, list(ledger.entities.values()))
    made: list[Mutation] = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.integers(0, 2)) == 0:
            id = draw(st.sampled_from(REMOVABLE))
            entity = now.entities.get(id)
            if entity is None:
                continue
            made.append(Remove(reading.kind_of(entity), id))
            now.remove(id)
        else:
            entity = draw(puts())
            if is_sound(now, entity):
                made.append(Put(entity))
                now.put(entity)
    return made


def snapshot_of(ledger: Ledger) -> Snapshot:
    return Snapshot.of(ledger.contents())


@settings(max_examples=120, deadline=None)
@given(st.data(), accounts())
def test_every_gain_and_loss_is_one_and_none_is_missing(
    data: st.DataObject, drawn: tuple[Account, list[Entity]]
) -> None:
    was = Ledger(*drawn)
    made = data.draw(mutations(was))
    becomes = carried_out(was, made)
    proposal = propose(snapshot_of(was), made)
    found = diff(proposal.before, proposal.after, T0, edits=proposal.edits)
    assert found.complete
    assert found.exact
    gained = {(each.principal_id, each.resource_id): each for each in found.gained}
    lost = {(each.principal_id, each.resource_id): each for each in found.lost}
    assert len(gained) == len(found.gained)
    assert len(lost) == len(found.lost)
    for pair, each in gained.items():
        assert not allowed(was, pair, each.example)
        assert allowed(becomes, pair, each.example)
        assert each.example.instant == each.spans[0].start
    for pair, each in lost.items():
        assert allowed(was, pair, each.example)
        assert not allowed(becomes, pair, each.example)
        assert each.example.instant == each.spans[0].start
    instants = st.integers(0, 8 * 24 * 4 - 1).map(lambda quarters: T0 + quarters * QUARTER)
    for _ in range(15):
        some = data.draw(circumstances(instants))
        for pair in PAIRS:
            before, after = allowed(was, pair, some), allowed(becomes, pair, some)
            if after and not before:
                assert pair in gained
                assert gained[pair].at(some.instant)
            if before and not after:
                assert pair in lost
                assert lost[pair].at(some.instant)


def without_facts(entity: Entity) -> Entity:
    """A policy that asks for the time only."""
    if isinstance(entity, Policy):
        hours = entity.conditions.current_time
        return attrs.evolve(entity, conditions=Conditions(current_time=hours))
    return entity


@settings(max_examples=40, deadline=None)
@given(st.data(), accounts())
def test_without_facts_the_spans_are_exactly_when_the_decisions_differ(
    data: st.DataObject, drawn: tuple[Account, list[Entity]]
) -> None:
    was = Ledger(drawn[0], [without_facts(entity) for entity in drawn[1]])
    made: list[Mutation] = [
        Put(without_facts(each.entity)) if isinstance(each, Put) else each
        for each in data.draw(mutations(was))
    ]
    becomes = carried_out(was, made)
    before, after = snapshot_of(was), snapshot_of(becomes)
    found = diff(before, after, T0)
    for hour in range(0, 8 * 24, 3):
        instant = T0 + timedelta(hours=hour, minutes=30 * (hour % 2))
        nothing_known = Circumstances(instant=instant)
        gains = {
            pair
            for pair in PAIRS
            if allowed(becomes, pair, nothing_known) and not allowed(was, pair, nothing_known)
        }
        losses = {
            pair
            for pair in PAIRS
            if allowed(was, pair, nothing_known) and not allowed(becomes, pair, nothing_known)
        }
        assert {(e.principal_id, e.resource_id) for e in found.gained if e.at(instant)} == gains
        assert {(e.principal_id, e.resource_id) for e in found.lost if e.at(instant)} == losses


@settings(max_examples=100, deadline=None)
@given(st.data(), accounts())
def test_a_proposal_is_the_account_with_the_mutations_carried_out(
    data: st.DataObject, drawn: tuple[Account, list[Entity]]
) -> None:
    was = Ledger(*drawn)
    before = snapshot_of(was)
    made = data.draw(mutations(was))
    becomes = carried_out(was, made)
    proposal = propose(before, made)
    assert proposal.after.account == becomes.account
    assert set(proposal.after.entities()) == set(becomes.entities.values())
    assert set(before.entities()) == set(was.entities.values())
    assert indices(proposal.after) == indices(snapshot_of(becomes))
    assert indices(before) == indices(snapshot_of(was))
    with_edits = diff(before, proposal.after, T0, edits=proposal.edits)
    assert with_edits == diff(before, proposal.after, T0)
    assert {edit.id for edit in edits_between(before, proposal.after)} <= {
        edit.id for edit in proposal.edits
    }


def indices(snapshot: Snapshot) -> dict[str, Any]:
    """Everything that a snapshot keeps, compiled policies by their ids."""
    return {
        "everyone": snapshot.everyone_groups,
        "groups": snapshot.groups_by_principal,
        "members": snapshot.principals_by_group,
        "sessions": snapshot.sessions_by_principal,
        "gateways": snapshot.gateways_by_site,
        "by resource": {
            resource: {group: {each.id for each in of} for group, of in by_group.items()}
            for resource, by_group in snapshot.policies_by_resource.items()
        },
        "by group": {
            group: {key: each.policy for key, each in of.items()}
            for group, of in snapshot.policies_by_group.items()
        },
    }


# --- by example ----------------------------------------------------------------------------------

BASE: tuple[Entity, ...] = (*PRINCIPALS, STAFF, EVERYONE, *RESOURCES)
NINE_TO_FIVE = CurrentTimeCondition(
    zone="Europe/Berlin",
    windows=(DayWindow(day=0, ranges=(TimeRange(start=time(9), end=time(17)),)),),
)


def account(*more: Entity) -> Snapshot:
    return Snapshot.of(Contents(ACCOUNT, (*BASE, *more), 7))


def change(before: Snapshot, *made: Mutation) -> Difference:
    proposal = propose(before, made)
    return diff(before, proposal.after, T0, edits=proposal.edits)


def test_who_joins_a_group_gains_what_its_policies_give_at_the_hours_of_the_policy() -> None:
    conditions = Conditions(current_time=NINE_TO_FIVE)
    before = account(policy(0, STAFF, conditions=conditions), policy(1, STAFF, DB))
    found = change(before, Put(member(0, STAFF, USER)))
    assert found.lost == ()
    web, db = found.gained
    assert (web.principal_id, web.resource_id, db.resource_id) == (USER.id, WEB.id, DB.id)
    monday = Span(start=reading.utc(2026, 3, 30, 7, 0), until=reading.utc(2026, 3, 30, 15, 0))
    assert web.spans == (monday,)
    assert db.spans == (Span(start=T0, until=None),)
    assert db.policy_ids == (id_of(8, 1),)


def test_a_policy_that_another_covers_is_no_loss_and_a_lease_is_no_difference() -> None:
    conditions = Conditions(current_time=NINE_TO_FIVE)
    before = account(policy(0, EVERYONE), policy(1, EVERYONE, conditions=conditions))
    assert change(before, Remove("policy", id_of(8, 1))) == Difference(gained=(), lost=())
    shorter = policy(0, EVERYONE, lease_s=60, description="shorter")
    assert change(before, Put(shorter)) == Difference(gained=(), lost=())


def test_two_policies_together_cover_a_third() -> None:
    both = (
        policy(1, EVERYONE, conditions=on_verified(True)),
        policy(2, EVERYONE, conditions=on_verified(False)),
    )
    before = account(policy(0, EVERYONE), *both)
    (user, _) = change(before, Remove("policy", id_of(8, 0))).lost
    assert user.example == Circumstances(instant=T0)  # of no known device
    before = account(*both, policy(3, EVERYONE, conditions=on_verified(True)))
    assert change(before, Remove("policy", id_of(8, 3))) == Difference(gained=(), lost=())


def on_verified(value: bool) -> Conditions:
    return Conditions(client_verified=ClientVerifiedCondition(value=value))


def test_a_condition_that_is_moved_gives_here_and_takes_there() -> None:
    before = account(policy(0, EVERYONE, conditions=on_verified(True)))
    found = change(before, Put(policy(0, EVERYONE, conditions=on_verified(False))))
    assert [each.example.client_verified for each in found.gained] == [False, False]
    assert [each.example.client_verified for each in found.lost] == [True, True]


def test_an_expiry_that_is_moved_is_a_loss_between_the_two() -> None:
    late, soon = T0 + timedelta(days=400), T0 + timedelta(days=30)
    before = account(policy(0, EVERYONE, expires_at=late))
    found = change(before, Put(policy(0, EVERYONE, expires_at=soon)))
    assert {each.spans for each in found.lost} == {(Span(start=soon, until=late),)}
    assert not found.lost[0].at(T0)
    assert found.lost[0].at(soon)


def test_a_fact_that_is_true_is_not_one_that_is_1() -> None:
    def asks(value: bool | int) -> Conditions:
        test = FactTest(name="disk", operator="is", value=value)
        return Conditions(client_posture=ClientPostureCondition(facts=(test,)))

    before = account(policy(0, EVERYONE, conditions=asks(1)))
    found = change(before, Put(policy(0, EVERYONE, conditions=asks(True))))
    assert [each.example.posture for each in found.lost] == [(Fact(name="disk", value=1),)] * 2
    assert all(each.example.posture[0].value is True for each in found.gained)


def test_a_limit_is_said_to_cut_the_difference_off() -> None:
    before = account(policy(0, EVERYONE), policy(1, EVERYONE, DB))
    off = propose(before, [Put(attrs.evolve(ACCOUNT, disabled=True))])
    assert len(diff(before, off.after, T0).lost) == 4
    cut = diff(before, off.after, T0, limit=3)
    assert len(cut.lost) == 3
    assert not cut.complete


def test_conditions_that_are_too_many_are_said_to_be_worked_out_in_part() -> None:
    before = account(policy(0, EVERYONE), policy(1, EVERYONE, conditions=on_verified(True)))
    after = propose(before, [Remove("policy", id_of(8, 0))]).after
    found = diff(before, after, T0, max_pieces=0)
    assert not found.exact
    assert len(found.lost) == 2


def test_a_removed_account_loses_everything() -> None:
    before = account(policy(0, EVERYONE))
    found = change(before, Remove("account", A))
    assert {(each.principal_id, each.resource_id) for each in found.lost} == {
        (USER.id, WEB.id),
        (OTHER.id, WEB.id),
    }


def test_requests_whose_decision_changes_are_found_in_their_own_circumstances() -> None:
    before = account(policy(0, EVERYONE, conditions=on_verified(True)))
    after = propose(before, [Put(policy(0, EVERYONE, conditions=on_verified(False)))]).after
    base = Request(principal_id=USER.id, resource_id=WEB.id, remote_ip=None)
    asked = [attrs.evolve(base, client_verified=value) for value in (None, True, False)]
    assert [
        (flip.request.client_verified, isinstance(flip.after, Allowed))
        for flip in flips(before, after, asked, T0)
    ] == [(True, False), (False, True)]
