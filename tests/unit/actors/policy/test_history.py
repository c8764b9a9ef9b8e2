from __future__ import annotations

from datetime import datetime, timedelta

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.model import Account, Change, Entity
from actors.policy.engine import Gap, Request, Snapshot, decide
from actors.policy.history import BeyondHorizon, Reach, at, reach
from actors.store.interface import Contents

from .test_diff import PAIRS, QUARTER, allowed, circumstances, indices, on_verified, snapshot_of
from .worlds import (
    ACCOUNT,
    DB,
    EVERYONE,
    LAPTOP,
    OTHER,
    PRINCIPALS,
    REMOVABLE,
    RESOURCES,
    STAFF,
    T0,
    TOKEN,
    USER,
    WEB,
    Ledger,
    accounts,
    id_of,
    is_sound,
    member,
    policy,
    puts,
)

MINUTE = timedelta(minutes=1)


def live(ledger: Ledger, data: st.DataObject, steps: int) -> None:
    """Some changes, none to two each minute."""
    instant = T0
    for _ in range(steps):
        instant += data.draw(st.sampled_from([timedelta(0), MINUTE]))
        if data.draw(st.integers(0, 2)) == 0:
            id = data.draw(st.sampled_from(REMOVABLE))
            if id in ledger.entities:
                ledger.remove(id, instant)
            continue
        entity = data.draw(puts())
        if is_sound(ledger, entity):
            ledger.put(entity, instant)


@settings(max_examples=100, deadline=None)
@given(st.data(), accounts())
def test_the_account_at_a_past_instant_is_the_snapshot_that_was_kept_then(
    data: st.DataObject, drawn: tuple[Account, list[Entity]]
) -> None:
    ledger = Ledger(*drawn)
    live(ledger, data, 8)
    followed = snapshot_of(Ledger(*drawn))
    kept: dict[datetime, Snapshot] = {T0 - MINUTE: followed.copy()}
    for change in ledger.changes:
        assert followed.apply(change)
        kept[change.at] = followed.copy()
    fresh = snapshot_of(ledger)
    assert set(followed.entities()) == set(fresh.entities())
    assert indices(followed) == indices(fresh)
    for minute in range(-1, 10):
        instant = T0 + minute * MINUTE
        then = kept[max(each for each in kept if each <= instant)]
        past = at(followed, reversed(ledger.changes), instant, T0 - MINUTE)
        assert past.number == then.number
        assert past.account == then.account
        assert set(past.entities()) == set(then.entities())
        assert indices(past) == indices(then)
        for resource in RESOURCES:
            asked = Request(
                client_id=LAPTOP.id,
                token_id=TOKEN.id,
                resource_id=resource.id,
                remote_ip="203.0.113.7",
            )
            assert decide(past, asked, instant) == decide(then, asked, instant)
    assert indices(followed) == indices(fresh)


def log(*entities: Entity) -> list[Change]:
    ledger = Ledger(ACCOUNT, list(BASE))
    for minute, entity in enumerate(entities):
        ledger.put(entity, T0 + minute * MINUTE)
    return ledger.changes


BASE: tuple[Entity, ...] = (*PRINCIPALS, STAFF, EVERYONE, *RESOURCES, TOKEN, LAPTOP)


def present(changes: list[Change]) -> Snapshot:
    state = Snapshot.of(Contents(ACCOUNT, BASE, changes[0].number - 1))
    for change in changes:
        state.apply(change)
    return state


def test_the_past_ends_where_the_log_is_not_complete_any_more() -> None:
    changes = log(policy(0, STAFF), policy(1, STAFF))
    state = present(changes)
    with pytest.raises(BeyondHorizon) as caught:
        at(state, reversed(changes), T0 - timedelta(seconds=1), horizon=T0)
    assert caught.value.horizon == T0
    assert len(at(state, reversed(changes), T0, horizon=T0).policies) == 1


def test_a_change_that_is_missing_from_the_log_is_noticed() -> None:
    changes = log(policy(0, STAFF), policy(1, STAFF))
    state = present(changes)
    with pytest.raises(Gap):
        at(state, [changes[0]], T0 - MINUTE, horizon=T0 - MINUTE)


def test_before_it_was_made_an_account_reaches_nothing() -> None:
    made = Ledger(ACCOUNT, [])
    made.first = 0
    made.put(ACCOUNT, T0)
    changes = [attrs.evolve(made.changes[0], before=None)]
    state = Snapshot.of(Contents(ACCOUNT, (), 1))
    past = at(state, changes, T0 - MINUTE, horizon=T0 - timedelta(days=1))
    assert past.account is None
    assert past.number == 0
    assert list(reach(past, T0)) == []


def test_no_more_of_the_log_is_read_than_is_needed() -> None:
    changes = log(*(policy(number % 6, STAFF) for number in range(20)))
    read = []

    def backwards() -> object:
        for change in reversed(changes):
            read.append(change.number)
            yield change

    at(present(changes), backwards(), T0 + 17 * MINUTE, horizon=T0)  # type: ignore[arg-type]
    assert len(read) == 3


# --- who could reach what ------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.data(), accounts())
def test_reach_is_who_is_allowed_in_some_circumstances_and_certain_who_is_in_all(
    data: st.DataObject, drawn: tuple[Account, list[Entity]]
) -> None:
    ledger = Ledger(*drawn)
    instant = T0 + data.draw(st.integers(0, 100)) * QUARTER
    found = {
        (each.principal_id, each.resource_id): each for each in reach(snapshot_of(ledger), instant)
    }
    for pair in PAIRS:
        only = list(reach(snapshot_of(ledger), instant, principal_id=pair[0], resource_id=pair[1]))
        assert only == ([found[pair]] if pair in found else [])
    for _ in range(15):
        some = data.draw(circumstances(st.just(instant)))
        for pair in PAIRS:
            if allowed(ledger, pair, some):
                assert pair in found
            elif pair in found:
                assert not found[pair].certain


def test_what_depends_on_unknown_facts_is_not_certain_unless_all_are_covered() -> None:
    one, other = on_verified(True), on_verified(False)
    state = Snapshot.of(
        Contents(
            ACCOUNT,
            (
                *BASE,
                member(0, STAFF, USER),
                policy(0, STAFF, conditions=one),
                policy(1, STAFF, DB, conditions=other),
                policy(2, STAFF, DB),
                policy(3, STAFF, DB, disabled=True),
                policy(4, STAFF, DB, expires_at=T0),
            ),
            7,
        )
    )
    assert list(reach(state, T0, principal_id=USER.id)) == [
        Reach(principal_id=USER.id, resource_id=WEB.id, policy_ids=(id_of(8, 0),), certain=False),
        Reach(
            principal_id=USER.id,
            resource_id=DB.id,
            policy_ids=(id_of(8, 1), id_of(8, 2)),
            certain=True,
        ),
    ]
    assert list(reach(state, T0, principal_id=OTHER.id)) == []
