"""Who gains and who loses what by a change, before it is made.

The exact statement. A principal *gains* a resource if there is a request (some circumstances, some
instant from now on) that is denied before the change and allowed after it, and *loses* it if there
is one that is allowed before and denied after. Both may be true of one pair: a condition on the
network that is moved from one office to another gives here and takes there. `spans` says at which
instants such circumstances exist, `example` names the first of them, which `decide` confirms.

A request here is that of a principal, as for `explain`: with any device, address, country,
provider, verification and reported facts, each independent of the others. So tokens, devices and
gateways play no part, nor does how long an access lasts: a change of the lease, of an address or
of a filter gives and takes nothing.

Only pairs that the change touches are looked at, and pairs with the same policies on both sides
are worked out once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from uuid import UUID

import attrs

from actors.model import Account, EntityKind, Group, Membership, Policy, Principal, Resource
from actors.policy.circumstances import (
    MAX_PIECES,
    Box,
    Circumstances,
    Space,
    Span,
    subtract,
)
from actors.policy.engine import CompiledPolicy, Decision, Request, Snapshot, candidates, decide
from actors.policy.proposals import Edit

MAX_PAIRS = 100_000
"""How many gains and losses a difference names."""
MAX_SPANS = 100
"""How many stretches of time are named for each."""

_Policies = frozenset[CompiledPolicy]


@attrs.frozen(kw_only=True)
class Changed:
    """A principal gains (or loses) a resource: when, in what circumstances for example, and by
    which policies (those that give it after a gain, or gave it before a loss)."""

    principal_id: UUID
    resource_id: UUID
    spans: tuple[Span, ...]
    example: Circumstances
    policy_ids: tuple[UUID, ...]

    def at(self, instant: datetime) -> bool:
        """Whether it is so at an instant within the spans that are named."""
        return any(
            span.start <= instant and (span.until is None or instant < span.until)
            for span in self.spans
        )


@attrs.frozen(kw_only=True)
class Difference:
    """All gains and losses, by principal and resource.

    `complete` is false if there are more than the limit. `exact` is false if conditions were too
    many to be worked out: then some of what is named may be no gain or loss, but none is missing.
    """

    gained: tuple[Changed, ...]
    lost: tuple[Changed, ...]
    complete: bool = True
    exact: bool = True


@attrs.frozen
class Flip:
    """A request that is decided otherwise after a change."""

    request: Request
    before: Decision
    after: Decision


def diff(
    before: Snapshot,
    after: Snapshot,
    instant: datetime,
    *,
    edits: Iterable[Edit] | None = None,
    limit: int = MAX_PAIRS,
    max_pieces: int = MAX_PIECES,
) -> Difference:
    """Who gains and who loses what from `instant` on (aware), if `before` becomes `after`.

    `edits` are all entities that differ (`Proposal.edits`); without them the two are compared,
    which reads all of the account.
    """
    if edits is None:
        edits = edits_between(before, after)
    gained: list[Changed] = []
    lost: list[Changed] = []
    known: dict[tuple[_Policies, _Policies], _Outcome] = {}
    exact = complete = True
    for principal_key, resource_id in _touched_pairs(before, after, edits):
        was = _candidates(before, principal_key, resource_id)
        becomes = _candidates(after, principal_key, resource_id)
        if was == becomes:
            continue
        if len(gained) + len(lost) >= limit:
            complete = False
            break
        if (was, becomes) not in known:
            known[was, becomes] = _Outcome.of(was, becomes, instant, max_pieces)
        outcome = known[was, becomes]
        exact = exact and outcome.exact
        principal_id = UUID(int=principal_key)
        for found, changed in ((gained, outcome.gained), (lost, outcome.lost)):
            if changed is not None:
                found.append(
                    attrs.evolve(changed, principal_id=principal_id, resource_id=resource_id)
                )
    return Difference(
        gained=_in_order(gained), lost=_in_order(lost), complete=complete, exact=exact
    )


def flips(
    before: Snapshot, after: Snapshot, requests: Iterable[Request], instant: datetime
) -> Iterator[Flip]:
    """Which of these requests, those of all connected clients for instance, are allowed by one
    of the two and denied by the other, at this instant and in their own circumstances."""
    for request in requests:
        was, becomes = decide(before, request, instant), decide(after, request, instant)
        if type(was) is not type(becomes):
            yield Flip(request, was, becomes)


def edits_between(before: Snapshot, after: Snapshot) -> Iterator[Edit]:
    """What differs between two snapshots of an account, as far as policy asks. Entities are
    compared by identity: copies and snapshots that were rewound share what did not change."""
    for kind in _KINDS:
        was, becomes = before.table(kind), after.table(kind)
        for id, entity in was.items():
            other = becomes.get(id)
            if other is not entity:
                yield Edit(kind, id, entity, other)
        for id, entity in becomes.items():
            if id not in was:
                yield Edit(kind, id, None, entity)


# --- helpers ---

_KINDS: tuple[EntityKind, ...] = (
    "account",
    "principal",
    "group",
    "membership",
    "resource",
    "policy",
)
_NOBODY = UUID(int=0)


@attrs.frozen
class _Outcome:
    """What is gained and lost by whoever has these policies before and those after; the ids of
    principal and resource are to be filled in."""

    gained: Changed | None
    lost: Changed | None
    exact: bool

    @classmethod
    def of(cls, was: _Policies, becomes: _Policies, instant: datetime, max_pieces: int) -> _Outcome:
        policies = was | becomes
        space = Space(policies, instant)
        boxes = {policy: space.box(policy) for policy in policies}
        gained, gain_exact = _surplus(space, boxes, becomes, was, max_pieces)
        lost, loss_exact = _surplus(space, boxes, was, becomes, max_pieces)
        return cls(gained, lost, space.exact and gain_exact and loss_exact)


def _surplus(
    space: Space,
    boxes: dict[CompiledPolicy, Box],
    more: _Policies,
    less: _Policies,
    max_pieces: int,
) -> tuple[Changed | None, bool]:
    """What the first policies allow and the second do not, and whether that is exact."""
    taken = [boxes[policy] for policy in less]
    left: list[Box] = []
    policy_ids: list[UUID] = []
    exact = True
    for policy in more - less:
        pieces = subtract(boxes[policy], taken, max_pieces=max_pieces)
        if pieces is None:
            pieces, exact = [boxes[policy]], False
        if pieces:
            left += pieces
            policy_ids.append(policy.id)
    if not left:
        return None, exact
    first = min(left, key=_place)
    changed = Changed(
        principal_id=_NOBODY,
        resource_id=_NOBODY,
        spans=tuple(islice(space.spans(left), MAX_SPANS)),
        example=space.example(first),
        policy_ids=tuple(sorted(policy_ids)),
    )
    return changed, exact


def _place(box: Box) -> tuple[int, ...]:
    return tuple(bits & -bits for bits in box)


def _candidates(snapshot: Snapshot, principal_key: int, resource_id: UUID) -> _Policies:
    principal = snapshot.principals.by_key.get(principal_key)
    return frozenset() if principal is None else candidates(snapshot, principal, resource_id)


def _touched_pairs(
    before: Snapshot, after: Snapshot, edits: Iterable[Edit]
) -> Iterator[tuple[int, UUID]]:
    """Each (key of a principal, id of a resource) of which the edits may change something, once:
    by resource, so that a limit cuts off whole resources but for one."""
    groups: dict[int, set[int]] = {}
    """By resource: groups all of whose members are touched."""
    principals: dict[int, set[int]] = {}
    """By resource: principals that are touched."""
    edits = tuple(edits)
    for snapshot in (before, after):
        for edit in edits:
            for policy in _policies_of_groups(snapshot, edit):
                groups.setdefault(policy.policy.resource_id.int, set()).add(policy.group_key)
            for principal_key, policy in _policies_of_principals(snapshot, edit):
                principals.setdefault(policy.policy.resource_id.int, set()).add(principal_key)
    for resource_key in sorted(groups.keys() | principals.keys()):
        touched = principals.get(resource_key, set())
        for group_key in groups.get(resource_key, ()):
            for snapshot in (before, after):
                members = snapshot.members_of(UUID(int=group_key))
                touched.update(member.id.int for member in members)
        for principal_key in sorted(touched):
            yield principal_key, UUID(int=resource_key)


def _policies_of_groups(snapshot: Snapshot, edit: Edit) -> Sequence[CompiledPolicy]:
    """The policies of a snapshot whose every member an edit touches."""
    match edit.after or edit.before:
        case Account():
            if _is_disabled(edit.before) is _is_disabled(edit.after):
                return ()
            everything = snapshot.policies_by_group.values()
            return [policy for of_group in everything for policy in of_group.values()]
        case Group():
            return tuple(snapshot.policies_by_group.get(edit.id.int, {}).values())
        case Resource() if edit.before is None or edit.after is None:
            return snapshot.policies_on(edit.id)
        case Policy():
            policy = snapshot.compiled(edit.id)
            return () if policy is None else (policy,)
        case _:
            return ()


def _policies_of_principals(snapshot: Snapshot, edit: Edit) -> Iterator[tuple[int, CompiledPolicy]]:
    """(key of a principal, policy of the snapshot) that an edit touches for it alone."""
    for entity in (edit.before, edit.after):
        if isinstance(entity, Membership):
            of_group = snapshot.policies_by_group.get(entity.group_id.int, {})
            for policy in of_group.values():
                yield entity.principal_id.int, policy
        elif isinstance(entity, Principal):
            principal = snapshot.principals.by_key.get(entity.id.int)
            if principal is not None and _standing(edit.before) != _standing(edit.after):
                for policy in snapshot.policies_of(principal):
                    yield principal.id.int, policy


def _standing(principal: object) -> tuple[str, bool] | None:
    """What policy asks of a principal, if it is there."""
    return (principal.kind, principal.disabled) if isinstance(principal, Principal) else None


def _is_disabled(account: object) -> bool | None:
    """Whether an account is disabled, if it is there."""
    return account.disabled if isinstance(account, Account) else None


def _in_order(changed: list[Changed]) -> tuple[Changed, ...]:
    return tuple(sorted(changed, key=lambda each: (each.principal_id.int, each.resource_id.int)))
