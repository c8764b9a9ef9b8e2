"""Why a request is allowed or denied: the decision, and a trace of every policy that was asked.

The trace is for administrators of the account: unlike a denial it may hold values. It is made of
the same steps as `engine.decide`, so the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from uuid import UUID

import attrs

from actors.model import EntityKind, Principal
from actors.policy.conditions import Condition, Countries, Facts, Hours, Networks, Providers
from actors.policy.conditions import Verified as VerifiedDevice
from actors.policy.engine import (
    OF_A_SESSION,
    OF_EVERYBODY,
    CompiledPolicy,
    Decision,
    Denied,
    Request,
    Snapshot,
    common_violations,
    decide,
    facts_of,
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
class GatewayTrace:
    """A gateway of the resource's sites. It may carry the resource if it is `approved`; whether
    it is `online` is None where that is not known (a question about the past, or a proposal)."""

    gateway_id: UUID
    name: str
    site_id: UUID
    site_name: str
    approved: bool
    online: bool | None


@attrs.frozen(kw_only=True)
class Hop:
    """One entity on the way from who asks to what is asked for."""

    kind: EntityKind
    id: UUID
    name: str


@attrs.frozen(kw_only=True)
class Explanation:
    """The decision; what holds whatever the policy; each policy of the resource, by id; and its
    gateways, by id.

    `path` is the way by which access is given: client (if one asks), principal, group, policy,
    resource; empty if it is denied. Any gateway that is approved and online can be its next hop:
    an access that is allowed and has no such gateway is answered `offline`.
    """

    decision: Decision
    common: tuple[Check, ...]
    policies: tuple[PolicyTrace, ...]
    gateways: tuple[GatewayTrace, ...] = ()
    path: tuple[Hop, ...] = ()


def explain(
    snapshot: Snapshot,
    request: Request,
    instant: datetime,
    online_gateway_ids: Collection[UUID] | None = None,
) -> Explanation:
    """Trace the decision on this request at this instant (aware)."""
    violated = set(common_violations(snapshot, request, instant))
    names = tuple(name for name in OF_EVERYBODY if name != "principal") + OF_A_SESSION
    if request.principal_id is not None:
        names = tuple(name for name in OF_EVERYBODY if name != "client")
    decision = decide(snapshot, request, instant)
    return Explanation(
        decision=decision,
        common=tuple(Check(name, name not in violated) for name in names),
        policies=tuple(
            _trace(snapshot, request, instant, policy, bool(violated))
            for policy in snapshot.policies_on(request.resource_id)
        ),
        gateways=tuple(_gateways(snapshot, request.resource_id, online_gateway_ids)),
        path=() if isinstance(decision, Denied) else tuple(_path(snapshot, request, decision)),
    )


def summary(explanation: Explanation) -> str:
    """One sentence that a person can read."""
    decision = explanation.decision
    if isinstance(decision, Denied):
        if decision.violated == ("policy",):
            return "denied: forbidden (policy): no policy of it is for a group of the principal"
        return f"denied: {decision.reason} ({', '.join(decision.violated) or 'no such resource'})"
    group = next(
        trace.group_name for trace in explanation.policies if trace.policy_id == decision.policy_id
    )
    until = _told(decision.expires_at)
    online = [each.online for each in explanation.gateways if each.approved]
    is_cut_off = explanation.gateways and not any(each is not False for each in online)
    offline = "; but none of its gateways is approved and online" if is_cut_off else ""
    return f"allowed by policy {decision.policy_id} for {group} until {until}{offline}"


# --- helpers ---


def _trace(
    snapshot: Snapshot,
    request: Request,
    instant: datetime,
    compiled: CompiledPolicy,
    denied_anyway: bool,
) -> PolicyTrace:
    policy = compiled.policy
    principal = principal_of(snapshot, request)
    member = principal is not None and snapshot.is_member(principal, policy.group_id)
    facts = facts_of(snapshot, request, instant)
    violated = compiled.violated(facts)
    checks = [Check("policy_disabled", not policy.disabled)]
    if policy.expires_at is not None:
        holds = "policy_expired" not in violated
        checks.append(Check("policy_expired", holds, _told(policy.expires_at)))
    for condition in compiled.conditions:
        name = condition.property
        detail = _detail(condition, facts, compiled)
        checks.append(Check(name, name not in violated, detail))
    allows = member and not violated and not denied_anyway
    expires_at = compiled.expiry(instant, token_expiry(snapshot, request)) if allows else None
    return PolicyTrace(
        policy_id=policy.id,
        group_id=policy.group_id,
        group_name=snapshot.groups[policy.group_id].name,
        member=member,
        checks=tuple(checks),
        bounds=_bounds(snapshot, request, instant, compiled) if allows else (),
        allows=allows,
        expires_at=expires_at,
    )


def _detail(condition: Condition, facts: Facts, compiled: CompiledPolicy) -> str:
    """What was compared with what, for a person."""
    conditions = compiled.policy.conditions
    match condition:
        case Countries():
            asked = conditions.remote_ip_location_region
            assert asked is not None
            return f"{facts.region or 'unknown'} {asked.operator} {', '.join(asked.values)}"
        case Networks():
            networks = conditions.remote_ip
            assert networks is not None
            known = facts.remote_ip or "unknown"
            return f"{known} {networks.operator} {', '.join(networks.values)}"
        case Providers():
            providers = conditions.auth_provider
            assert providers is not None
            values = ", ".join(map(str, providers.values))
            return f"{facts.auth_provider_id or 'none'} {providers.operator} {values}"
        case Hours():
            assert conditions.current_time is not None
            return conditions.current_time.zone
        case VerifiedDevice():
            state = {None: "unknown", True: "verified", False: "not verified"}
            assert conditions.client_verified is not None
            wanted = state[conditions.client_verified.value]
            return f"{state[facts.client_verified]}, to be {wanted}"
        case _:
            return "; ".join(
                f"{test.name} {_shown(facts.posture.get(test.name))} "
                f"{test.operator} {_shown(test.value)}"
                for test in condition.tests
            )


def _shown(value: object) -> str:
    return "not reported" if value is None else repr(value)


def _told(instant: datetime) -> str:
    return f"{instant.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


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


def _gateways(
    snapshot: Snapshot, resource_id: UUID, online: Collection[UUID] | None
) -> Iterator[GatewayTrace]:
    resource = snapshot.resources.get(resource_id)
    for id in () if resource is None else sorted(snapshot.gateways_of(resource)):
        gateway = snapshot.gateways[id]
        yield GatewayTrace(
            gateway_id=id,
            name=gateway.name,
            site_id=gateway.site_id,
            site_name=snapshot.sites[gateway.site_id].name,
            approved=gateway.approved,
            online=None if online is None else id in online,
        )


def _path(snapshot: Snapshot, request: Request, decision: Decision) -> Iterator[Hop]:
    assert not isinstance(decision, Denied)
    policy = snapshot.policies[decision.policy_id]
    client = None if request.client_id is None else snapshot.clients.get(request.client_id)
    if client is not None and request.principal_id is None:
        yield Hop(kind="client", id=client.id, name=client.name)
    principal = principal_of(snapshot, request)
    assert isinstance(principal, Principal)
    yield Hop(kind="principal", id=principal.id, name=principal.name)
    group = snapshot.groups[policy.group_id]
    yield Hop(kind="group", id=group.id, name=group.name)
    yield Hop(kind="policy", id=policy.id, name=policy.description)
    resource = snapshot.resources[policy.resource_id]
    yield Hop(kind="resource", id=resource.id, name=resource.name)
