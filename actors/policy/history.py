"""Questions about the past, and about everybody: who could reach what at an instant.

The state of an account at a past instant is the present one with the changes after that instant
taken back, newest first. It is that after the last change, in the order of their numbers, whose
`at` is not after the instant. What is remembered is the entities; what a request depends on besides
(the address, the country, what was not reported yet) was not recorded, and counts as unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from uuid import UUID

import attrs

from actors.model import Change, Principal
from actors.policy.circumstances import Space, subtract
from actors.policy.effort import OF_A_PAIR, Effort
from actors.policy.engine import CompiledPolicy, Snapshot, candidates


class BeyondHorizon(Exception):
    """The change log does not reach back to the instant; it is complete from `horizon` on."""

    def __init__(self, horizon: datetime) -> None:
        super().__init__(f"the change log reaches back to {horizon.isoformat()} only")
        self.horizon = horizon


@attrs.frozen(kw_only=True)
class Reach:
    """A principal that may reach a resource at an instant, and the policies that allow it.

    `certain`: whatever the circumstances. Otherwise it depends on some that are not known here.
    """

    principal_id: UUID
    resource_id: UUID
    policy_ids: tuple[UUID, ...]
    certain: bool


def at(
    snapshot: Snapshot, backwards: Iterable[Change], instant: datetime, horizon: datetime
) -> Snapshot:
    """The account as it was at an instant (aware); its `account` is None if it was not there.

    `backwards` are the changes from that of the snapshot's number on, newest first; no more of
    them is read than is needed. `horizon` is since when the log is complete.

    Raises BeyondHorizon if the instant is before it, `Gap` if a change is missing.
    """
    if instant < horizon:
        raise BeyondHorizon(horizon)
    past = snapshot.copy()
    rewind(past, backwards, instant)
    return past


def rewind(past: Snapshot, backwards: Iterable[Change], instant: datetime) -> bool:
    """Take back changes, newest first, up to one that is not after the instant: True if there is
    one, so that no more are needed. Raises `Gap`."""
    for change in backwards:
        if change.at <= instant:
            return True
        past.undo(change)
    return False


def reach(
    snapshot: Snapshot,
    instant: datetime,
    *,
    principal_id: UUID | None = None,
    resource_id: UUID | None = None,
    effort: Effort | None = None,
) -> Iterator[Reach]:
    """Who may reach what at the instant, of all or of one principal, resource or both: by resource
    and principal. Raises Exhausted."""
    effort = effort or Effort()
    known: dict[frozenset[CompiledPolicy], tuple[tuple[UUID, ...], bool]] = {}
    for resource_key in sorted(snapshot.policies_by_resource):
        if resource_id is not None and resource_key != resource_id.int:
            continue
        resource = UUID(int=resource_key)
        for principal in _principals(snapshot, resource, principal_id):
            policies = candidates(snapshot, principal, resource)
            effort.spend(OF_A_PAIR + len(policies))
            if policies not in known:
                known[policies] = _at_instant(policies, instant, effort)
            policy_ids, certain = known[policies]
            if policy_ids:
                yield Reach(
                    principal_id=principal.id,
                    resource_id=resource,
                    policy_ids=policy_ids,
                    certain=certain,
                )


# --- helpers ---


def _principals(
    snapshot: Snapshot, resource_id: UUID, principal_id: UUID | None
) -> Iterable[Principal]:
    """Those that a policy of the resource may concern, by id."""
    if principal_id is not None:
        principal = snapshot.principals.get(principal_id)
        return () if principal is None else (principal,)
    groups = snapshot.policies_by_resource[resource_id.int]
    members = {
        member.id.int: member
        for group_key in groups
        for member in snapshot.members_of(UUID(int=group_key))
    }
    return [members[key] for key in sorted(members)]


def _at_instant(
    policies: frozenset[CompiledPolicy], instant: datetime, effort: Effort
) -> tuple[tuple[UUID, ...], bool]:
    """The policies that allow in some circumstances at the instant, and whether one of them allows
    in any."""
    space = Space(policies, instant, effort)
    boxes = {policy: space.now(policy) for policy in policies}
    allowing = tuple(sorted(policy.id for policy, box in boxes.items() if all(box)))
    return allowing, subtract(space.all_now(), boxes.values(), effort) == []
