"""Questions end, however an account is made: what they cost is counted, and bounded."""

from __future__ import annotations

import attrs
import pytest

from actors.model import (
    ClientPostureCondition,
    Conditions,
    CurrentTimeCondition,
    DayWindow,
    Entity,
    FactTest,
    PolicyTest,
    Principal,
    RemoteIpCondition,
)
from actors.policy.diff import diff
from actors.policy.effort import Effort, Exhausted
from actors.policy.engine import Snapshot
from actors.policy.exposure import exposure
from actors.policy.history import reach
from actors.policy.proposals import failing_tests, newly_failing_tests, propose
from actors.store.interface import Contents, Put

from .worlds import ACCOUNT, EVERYONE, SITE, T0, USER, WEB, A, client, id_of, policy, token

FEW = 10_000
SUNDAYS = Conditions(current_time=CurrentTimeCondition(zone="UTC", windows=(DayWindow(day=6),)))


def entangled(number: int) -> Conditions:
    """Conditions that share no value with those of another number."""
    networks = tuple(f"198.{number // 256}.{number % 256}.{host}/32" for host in range(100))
    facts = tuple(FactTest(name=f"f{i}", operator="is", value=number) for i in range(32))
    return Conditions(
        remote_ip=RemoteIpCondition(operator="is_in", values=networks),
        client_posture=ClientPostureCondition(facts=facts),
    )


def snapshot(*more: Entity) -> Snapshot:
    return Snapshot.of(Contents(ACCOUNT, (USER, EVERYONE, SITE, WEB, *more), 1))


def test_a_thousand_entangled_policies_are_no_reason_to_work_for_hours() -> None:
    before = snapshot(*(policy(i, EVERYONE, conditions=entangled(i)) for i in range(1_000)))
    changed = policy(0, EVERYONE, conditions=entangled(0), description="as before")
    proposal = propose(before, [Put(changed)])
    assert not diff(before, proposal.after, T0, edits=proposal.edits).complete
    with pytest.raises(Exhausted):
        list(reach(before, T0))


def test_pairs_of_which_none_is_named_are_counted_as_well() -> None:
    many = [attrs.evolve(USER, id=id_of(2, i), name=f"u{i}") for i in range(1_000)]
    before = snapshot(*many, policy(0, EVERYONE, conditions=SUNDAYS))
    proposal = propose(before, [Put(policy(0, EVERYONE, conditions=SUNDAYS, description="x"))])
    found = diff(before, proposal.after, T0, edits=proposal.edits, limit=1, effort=Effort(FEW))
    assert found.gained == found.lost == ()
    assert not found.complete
    assert diff(before, proposal.after, T0, edits=proposal.edits, limit=1).complete
    with pytest.raises(Exhausted):
        list(reach(before, T0, effort=Effort(FEW)))
    assert list(reach(before, T0)) == []


def test_exposures_are_counted_by_the_members_that_are_looked_through() -> None:
    people: list[Entity] = []
    for i in range(100, 1_100):
        person: Principal = attrs.evolve(USER, id=id_of(2, i), name=f"u{i}")
        session = token(i, person, expires_at=T0)
        people += [person, session, client(i, person, session)]
    state = snapshot(*people, *(policy(i, EVERYONE) for i in range(10)))
    assert exposure(state, WEB.id, T0).disconnected_s == 0
    with pytest.raises(Exhausted):
        exposure(state, WEB.id, T0, Effort(FEW))


def test_policy_tests_are_counted_by_the_policies_that_they_ask() -> None:
    tests = [
        PolicyTest(
            id=id_of(20, i),
            account_id=A,
            name=f"t{i}",
            principal_id=USER.id,
            resource_id=WEB.id,
            expected="denied",
            created_at=T0,
        )
        for i in range(1_000)
    ]
    state = snapshot(*(policy(i, EVERYONE, conditions=SUNDAYS) for i in range(2_000)), *tests)
    with pytest.raises(Exhausted):
        newly_failing_tests(propose(state, []), T0)
    small = snapshot(*(policy(i, EVERYONE, conditions=SUNDAYS) for i in range(50)), *tests)
    assert failing_tests(small, T0) == ()
