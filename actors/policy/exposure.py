"""How late a revocation can take effect: what bounds an access that nobody can be told to end.

A gateway that is connected hears of a revocation at once (within the time that the channel takes).
One that is not keeps what it was given until its lease ends, so the bound is the longest that an
authorisation given just now may last: over all policies of the resource and all client tokens of
their members, the least of the lease, the policy's own expiry, the end of its time window and the
token's expiry.

Conditions on the request (address, country, provider, device) are taken to be met. A lease that
was longer when it was given is not known here; a change of a policy shortens only what a connected
gateway holds.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from math import ceil
from uuid import UUID

import attrs

from actors.policy.effort import OF_A_POLICY, Effort
from actors.policy.engine import CompiledPolicy, Snapshot, sign_in_violation


@attrs.frozen(kw_only=True)
class Exposure:
    """How long an access to a resource, given at the instant, can outlive its revocation.

    `disconnected_s` is that at a gateway which is not connected, in whole seconds, rounded up; 0
    if nobody can be given the resource now. `policy_id` names the policy that bounds it so.
    """

    resource_id: UUID
    disconnected_s: int
    policy_id: UUID | None


def exposure(
    snapshot: Snapshot, resource_id: UUID, instant: datetime, effort: Effort | None = None
) -> Exposure:
    """How late a revocation of accesses to a resource can take effect, as of an instant (aware).
    Raises Exhausted."""
    effort = effort or Effort()
    longest, policy_id = timedelta(0), None
    if snapshot.account is not None and not snapshot.account.disabled:
        for policy in snapshot.policies_on(resource_id):
            effort.spend(OF_A_POLICY)
            lasts = _lasts(snapshot, policy, instant, longest, effort)
            if lasts > longest:
                longest, policy_id = lasts, policy.id
    return Exposure(
        resource_id=resource_id,
        disconnected_s=ceil(longest / timedelta(seconds=1)),
        policy_id=policy_id,
    )


# --- helpers ---


def _lasts(
    snapshot: Snapshot,
    policy: CompiledPolicy,
    instant: datetime,
    known: timedelta,
    effort: Effort,
) -> timedelta:
    """How long the longest authorisation by a policy lasts, if that is longer than is known."""
    expires_at = policy.policy.expires_at
    if policy.policy.disabled or (expires_at is not None and expires_at <= instant):
        return timedelta(0)
    if policy.windows is not None and not policy.windows.contains(instant):
        return timedelta(0)
    bound = policy.expiry(instant, None) - instant
    if bound <= known:
        return timedelta(0)
    longest = timedelta(0)
    for principal in snapshot.members_of(policy.policy.group_id):
        effort.spend(1)
        if principal.disabled:
            continue
        for token in snapshot.sessions_of(principal):
            effort.spend(1)
            if sign_in_violation(snapshot, token) is not None:
                continue
            if token.expires_at is None or token.expires_at >= instant + bound:
                return bound
            longest = max(longest, token.expires_at - instant)
    return longest
