"""Why a request is allowed or denied: the decision, and a trace of every policy that was asked.

The trace is for administrators of the account: unlike a denial it may hold values. It is made of
the same steps as `engine.decide`, so the two cannot disagree.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import attrs

from actors.policy.engine import (
    CompiledPolicy,
    Decision,
    Denied,
    Request,
    Snapshot,
    common_violations,
    decide,
    principal_of,
    token_expiry,
)


@attrs.frozen
class Check:
    """One property that was looked at, and whether it held."""

    property: str
    holds: bool
    detail: str = ""


@attrs.frozen(kw_only=True)
class Bound:
    """One limit of an access by a policy: `window`, `policy`, `lease` or `token`, and its end."""

    source: str
    at: datetime


@attrs.frozen(kw_only=True)
class PolicyTrace:
    """What one policy of the resource says. `expires_at` is None if it does not allow."""

    policy_id: UUID
    group_id: UUID
    group_name: str
    member: bool
    checks: tuple[Check, ...]
    bounds: tuple[Bound, ...]
    allows: bool
    expires_at: datetime | None


@attrs.frozen(kw_only=True)
class Explanation:
    """The decision; what holds whatever the policy; and each policy of the resource, by id."""

    decision: Decision
    common: tuple[Check, ...]
    policies: tuple[PolicyTrace, ...]


def explain(snapshot: Snapshot, request: Request, instant: datetime) -> Explanation:
    """Trace the decision on this request at this instant (aware)."""
    violated = set(common_violations(snapshot, request, instant))
    names: tuple[str, ...] = ("account_disabled", "client", "principal_disabled")
    if request.principal_id is not None:
        names = ("account_disabled", "principal", "principal_disabled")
    else:
        names += ("token", "token_expired")
    policies = snapshot.policies_by_resource.get(request.resource_id, {})
    return Explanation(
        decision=decide(snapshot, request, instant),
        common=tuple(Check(name, name not in violated) for name in names),
        policies=tuple(
            _trace(snapshot, request, instant, policies[id], bool(violated))
            for id in sorted(policies)
        ),
    )


def _trace(
    snapshot: Snapshot,
    request: Request,
    instant: datetime,
    compiled: CompiledPolicy,
    denied_anyway: bool,
) -> PolicyTrace:
    policy = compiled.policy
    group = snapshot.groups[policy.group_id]
    principal = principal_of(snapshot, request)
    member = principal is not None and snapshot.is_member(principal, policy.group_id)
    violated = compiled.violated(request.remote_ip, instant)
    checks = [Check("policy_disabled", not policy.disabled)]
    if policy.expires_at is not None:
        holds = "policy_expired" not in violated
        checks.append(Check("policy_expired", holds, policy.expires_at.isoformat()))
    remote = policy.conditions.remote_ip
    if remote is not None:
        detail = f"{request.remote_ip or 'unknown'} {remote.operator} {', '.join(remote.values)}"
        checks.append(Check("remote_ip", "remote_ip" not in violated, detail))
    hours = policy.conditions.current_time
    if hours is not None:
        checks.append(Check("current_time", "current_time" not in violated, hours.zone))
    allows = member and not violated and not denied_anyway
    expires_at = compiled.expiry(instant, token_expiry(snapshot, request)) if allows else None
    return PolicyTrace(
        policy_id=policy.id,
        group_id=group.id,
        group_name=group.name,
        member=member,
        checks=tuple(checks),
        bounds=_bounds(snapshot, request, instant, compiled) if allows else (),
        allows=allows,
        expires_at=expires_at,
    )


def _bounds(
    snapshot: Snapshot, request: Request, instant: datetime, compiled: CompiledPolicy
) -> tuple[Bound, ...]:
    policy = compiled.policy
    bounds = [Bound(source="lease", at=instant + compiled.lease)]
    if policy.expires_at is not None:
        bounds.append(Bound(source="policy", at=policy.expires_at))
    token_expires_at = token_expiry(snapshot, request)
    if token_expires_at is not None:
        bounds.append(Bound(source="token", at=token_expires_at))
    end = None if compiled.windows is None else compiled.windows.end(instant)
    if end is not None:
        bounds.append(Bound(source="window", at=end))
    return tuple(sorted(bounds, key=lambda bound: bound.at))


def summary(explanation: Explanation) -> str:
    """One sentence that a person can read."""
    decision = explanation.decision
    if isinstance(decision, Denied):
        return f"denied: {decision.reason} ({', '.join(decision.violated) or 'no such resource'})"
    return f"allowed by policy {decision.policy_id} until {decision.expires_at.isoformat()}"
