"""Changes that are not made yet: the account as it would be, and what its tests say of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import attrs

from actors.model import KIND_OF, MEMBERS, REFERENCES, Entity, EntityKind, PolicyTest
from actors.policy.effort import OF_A_POLICY, Effort
from actors.policy.engine import Allowed, Decision, Request, Snapshot, decide
from actors.store.interface import Mutation, Put


@attrs.frozen
class Edit:
    """One entity as it was and as it would be; None where it is not there."""

    kind: EntityKind
    id: UUID
    before: Entity | None
    after: Entity | None


@attrs.frozen
class Proposal:
    """An account before and after mutations that were not made. `edits` holds each entity that
    they touch once, those among them that go with what is removed."""

    before: Snapshot
    after: Snapshot
    edits: tuple[Edit, ...]


@attrs.frozen
class FailedTest:
    """A policy test that does not hold, and the decision that was found instead."""

    test: PolicyTest
    decision: Decision


def propose(snapshot: Snapshot, mutations: Sequence[Mutation]) -> Proposal:
    """The account with the mutations carried out, as a store would: what refers to a removed
    entity goes with it. Nothing is validated, and `snapshot` is not touched.

    Copies the tables of the account (some ten milliseconds for 10,000 users).
    """
    after = snapshot.copy()
    workshop = _Workshop(after)
    for mutation in mutations:
        if isinstance(mutation, Put):
            workshop.put(mutation.entity)
        else:
            workshop.remove(mutation.kind, mutation.id)
    return Proposal(snapshot, after, tuple(_edits(snapshot, after, workshop.touched)))


def proposed(snapshot: Snapshot, mutations: Sequence[Mutation]) -> Snapshot:
    """The snapshot of the account with the mutations carried out."""
    return propose(snapshot, mutations).after


def failing_tests(
    snapshot: Snapshot, instant: datetime, effort: Effort | None = None
) -> tuple[FailedTest, ...]:
    """The account's policy tests that do not hold, by id. Those without an instant of their own
    are asked at `instant`. Raises Exhausted."""
    failed: list[FailedTest] = []
    effort = effort or Effort()
    for test in sorted(snapshot.policy_tests.values(), key=lambda test: test.id):
        effort.spend(OF_A_POLICY * (1 + snapshot.count_policies_on(test.resource_id)))
        decision = decide(snapshot, request_of(test), test.at or instant)
        if isinstance(decision, Allowed) != (test.expected == "allowed"):
            failed.append(FailedTest(test, decision))
    return tuple(failed)


def newly_failing_tests(proposal: Proposal, instant: datetime) -> tuple[FailedTest, ...]:
    """Those that a proposal breaks, or adds though they fail: what is to be refused. A test that
    fails already, because time went by, stands in nobody's way. Raises Exhausted."""
    failing = failing_tests(proposal.after, instant)
    if not failing:
        return ()
    known = [failed.test for failed in failing_tests(proposal.before, instant)]
    return tuple(new for new in failing if not any(new.test is each for each in known))


def request_of(test: PolicyTest) -> Request:
    """What a policy test asks: what it does not name is unknown."""
    return Request(
        principal_id=test.principal_id,
        resource_id=test.resource_id,
        remote_ip=test.remote_ip,
        auth_provider_id=test.auth_provider_id,
        client_verified=test.client_verified,
        posture=test.posture,
    )


# --- helpers ---


class _Workshop:
    """A snapshot on which mutations are tried."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._referrers: dict[tuple[EntityKind, str], dict[int, set[int]]] = {}
        """Who refers to whom by a field: made when it is first needed, then kept true."""
        self.touched: dict[UUID, EntityKind] = {}

    def put(self, entity: Entity) -> None:
        self._replace(KIND_OF[type(entity)], entity.id, entity)

    def remove(self, kind: EntityKind, id: UUID) -> None:
        if kind != "account":
            self._remove_what_refers_to(kind, id)
        elif self._snapshot.account is not None:
            for entity in self._snapshot.entities():
                self._replace(KIND_OF[type(entity)], entity.id, None)
        self._replace(kind, id, None)

    def _remove_what_refers_to(self, kind: EntityKind, id: UUID) -> None:
        for referrer, fields in REFERENCES.items():
            for field, target in fields.items():
                if target == kind:
                    for entity in self._referring(referrer, field, id):
                        self.remove(referrer, entity.id)
        for holder, fields in MEMBERS.items():
            for field, target in fields.items():
                if target == kind:
                    for entity in self._referring(holder, field, id):
                        self._leave(holder, field, entity, id)

    def _leave(self, holder: EntityKind, field: str, entity: Entity, id: UUID) -> None:
        left = tuple(each for each in getattr(entity, field) if each != id)
        if field == "site_ids" and not left:
            self.remove(holder, entity.id)
        else:
            changes: dict[str, Any] = {field: left}
            self.put(attrs.evolve(entity, **changes))

    def _referring(self, kind: EntityKind, field: str, id: UUID) -> list[Entity]:
        if (kind, field) not in self._referrers:
            index: dict[int, set[int]] = {}
            for entity in self._snapshot.table(kind).values():
                for target in _ids(entity, field):
                    index.setdefault(target.int, set()).add(entity.id.int)
            self._referrers[kind, field] = index
        table = self._snapshot.table(kind)
        keys = sorted(self._referrers[kind, field].get(id.int, ()))
        return [table[UUID(int=key)] for key in keys]

    def _replace(self, kind: EntityKind, id: UUID, after: Entity | None) -> None:
        before = self._snapshot.table(kind).get(id)
        if before is None and after is None:
            return
        self.touched.setdefault(id, kind)
        self._snapshot.replace(kind, id, after)
        for (referrer, field), index in self._referrers.items():
            if referrer != kind:
                continue
            for target in () if before is None else _ids(before, field):
                index[target.int].discard(id.int)
            for target in () if after is None else _ids(after, field):
                index.setdefault(target.int, set()).add(id.int)


def _ids(entity: Entity, field: str) -> tuple[UUID, ...]:
    """The ids in a field that holds one, or none, or several."""
    value = getattr(entity, field)
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _edits(before: Snapshot, after: Snapshot, touched: dict[UUID, EntityKind]) -> Iterable[Edit]:
    for id, kind in touched.items():
        was, becomes = before.table(kind).get(id), after.table(kind).get(id)
        if was is not becomes:
            yield Edit(kind, id, was, becomes)
