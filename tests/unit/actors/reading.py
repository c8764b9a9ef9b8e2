"""A slow, direct reading of the specification's section on policy, to judge the engine by.

It shares no code with the engine: no index, no compiled condition, no offset arithmetic. Time
windows are stepped through minute by minute.
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from actors.model import (
    ENTITIES,
    Account,
    AuthProvider,
    AuthProviderCondition,
    Client,
    ClientPostureCondition,
    Conditions,
    CurrentTimeCondition,
    Entity,
    EntityKind,
    Fact,
    FactTest,
    Group,
    Identity,
    Membership,
    Policy,
    Principal,
    RegionCondition,
    RemoteIpCondition,
    Resource,
    Token,
)
from actors.policy.circumstances import Circumstances

MINUTE = timedelta(minutes=1)


def is_open(condition: CurrentTimeCondition, instant: datetime) -> bool:
    try:
        wall = instant.astimezone(ZoneInfo(condition.zone))
    except (KeyError, ValueError, OSError):
        return False
    for window in condition.windows:
        if window.day != wall.weekday():
            continue
        if not window.ranges:
            return True
        for each in window.ranges:
            till_midnight = each.end == time(0, 0)
            if each.start <= wall.time() and (till_midnight or wall.time() < each.end):
                return True
    return False


def closes(condition: CurrentTimeCondition, instant: datetime, cap: datetime) -> datetime | None:
    """Minute by minute; right when the ranges, the offsets and the instant are whole minutes."""
    if not is_open(condition, instant):
        return None
    at = instant
    while at < cap and is_open(condition, at):
        at += MINUTE
    return min(at, cap)


def address_holds(condition: RemoteIpCondition, remote_ip: str | None) -> bool:
    if remote_ip is None:
        return False
    address = ipaddress.ip_address(remote_ip)
    if address.version == 6 and address.ipv4_mapped:
        address = address.ipv4_mapped
    inside = any(address in ipaddress.ip_network(value) for value in condition.values)
    return inside if condition.operator == "is_in" else not inside


def region_holds(condition: RegionCondition, region: str | None) -> bool:
    if region is None:
        return False
    if condition.operator == "is_in":
        return region in condition.values
    return region not in condition.values


def provider_holds(condition: AuthProviderCondition, provider: object) -> bool:
    if provider is None:
        return False
    if condition.operator == "is_in":
        return provider in condition.values
    return provider not in condition.values


def posture_holds(condition: ClientPostureCondition, posture: tuple[Fact, ...]) -> bool:
    return all(
        any(fact.name == test.name and fact_meets(test, fact.value) for fact in posture)
        for test in condition.facts
    )


def fact_meets(test: FactTest, value: bool | int | str) -> bool:
    wanted = test.value
    if isinstance(value, bool) or isinstance(wanted, bool):
        if not (isinstance(value, bool) and isinstance(wanted, bool)):
            return False
        return {"is": value == wanted, "is_not": value != wanted}.get(test.operator, False)
    if isinstance(value, int) != isinstance(wanted, int):
        return False
    if test.operator == "is":
        return value == wanted
    if test.operator == "is_not":
        return value != wanted
    if isinstance(value, str) and isinstance(wanted, str):
        order = compare_versions(value, wanted)
    else:
        assert isinstance(value, int)
        assert isinstance(wanted, int)
        order = value - wanted
    if order is None:
        return False
    return order >= 0 if test.operator == "at_least" else order <= 0


def compare_versions(one: str, other: str) -> int | None:
    """Below zero if the first is older; None if one of them is no dotted version."""
    digits = "0123456789"
    left, right = one.split("."), other.split(".")
    if not all(part and all(c in digits for c in part) for part in left + right):
        return None
    for place in range(max(len(left), len(right))):
        a = int(left[place]) if place < len(left) else 0
        b = int(right[place]) if place < len(right) else 0
        if a != b:
            return a - b
    return 0


def conditions_hold(conditions: Conditions, facts: Circumstances) -> bool:
    """Whether all conditions hold in circumstances that are stated."""
    region = conditions.remote_ip_location_region
    if region is not None and not region_holds(region, facts.region):
        return False
    remote = conditions.remote_ip
    if remote is not None and not address_holds(remote, facts.remote_ip):
        return False
    provider = conditions.auth_provider
    if provider is not None and not provider_holds(provider, facts.auth_provider_id):
        return False
    hours = conditions.current_time
    if hours is not None and not is_open(hours, facts.instant):
        return False
    verified = conditions.client_verified
    if verified is not None and facts.client_verified is not verified.value:
        return False
    posture = conditions.client_posture
    return posture is None or posture_holds(posture, facts.posture)


def kind_of(entity: Entity) -> EntityKind:
    return next(kind for kind, each in ENTITIES.items() if type(entity) is each)


def decide(
    account: Account,
    entities: list[Entity],
    client_id: object,
    resource_id: object,
    token_id: object,
    remote_ip: str | None,
    instant: datetime,
    regions: dict[str | None, str] | None = None,
) -> tuple[datetime | None, set[str], set[object]]:
    """(expiry or None, violated names, ids of the policies that give that expiry)."""
    if not any(isinstance(e, Resource) and e.id == resource_id for e in entities):
        return None, {"not_found"}, set()
    common: set[str] = set()
    if account.disabled:
        common.add("account_disabled")
    clients = [e for e in entities if isinstance(e, Client) and e.id == client_id]
    if not clients:
        common.add("client")
    owners = [
        e for e in entities for c in clients if isinstance(e, Principal) and e.id == c.principal_id
    ]
    if any(owner.disabled for owner in owners):
        common.add("principal_disabled")
    tokens = [e for e in entities if isinstance(e, Token) and e.id == token_id]
    good = [t for t in tokens if t.kind == "client" and t.principal_id in {o.id for o in owners}]
    if not good and (owners or not tokens or tokens[0].kind != "client"):
        common.add("token")
    elif any(t.expires_at is not None and t.expires_at <= instant for t in tokens):
        common.add("token_expired")
    for session in tokens if "token" not in common else ():
        common |= faults_of_session(entities, session, remote_ip)
    if not owners:
        return None, common, set()
    violated = set(common)
    expiries: dict[object, datetime] = {}
    candidates = [
        e
        for e in entities
        if isinstance(e, Policy)
        and e.resource_id == resource_id
        and in_group(entities, owners[0], e.group_id)
    ]
    if not candidates:
        violated.add("policy")
    for policy in candidates:
        own: set[str] = set()
        limits = [instant + timedelta(seconds=policy.lease_s)]
        limits += [t.expires_at for t in tokens if t.expires_at is not None]
        if policy.disabled:
            own.add("policy_disabled")
        if policy.expires_at is not None:
            limits.append(policy.expires_at)
            if policy.expires_at <= instant:
                own.add("policy_expired")
        remote = policy.conditions.remote_ip
        if remote is not None and not address_holds(remote, remote_ip):
            own.add("remote_ip")
        region = policy.conditions.remote_ip_location_region
        if region is not None and not region_holds(region, (regions or {}).get(remote_ip)):
            own.add("remote_ip_location_region")
        provider = policy.conditions.auth_provider
        if provider is not None and not any(
            provider_holds(provider, t.auth_provider_id) for t in tokens
        ):
            own.add("auth_provider")
        verified = policy.conditions.client_verified
        if verified is not None and not any(c.verified == verified.value for c in clients):
            own.add("client_verified")
        posture = policy.conditions.client_posture
        if posture is not None and not any(posture_holds(posture, c.posture) for c in clients):
            own.add("client_posture")
        hours = policy.conditions.current_time
        if hours is not None:
            end = closes(hours, instant, min(limits))
            if end is None:
                own.add("current_time")
            else:
                limits.append(end)
        if own or common:
            violated |= own
        else:
            expiries[policy.id] = min(limits)
    if not expiries:
        return None, violated, set()
    latest = max(expiries.values())
    return latest, set(), {id for id, at in expiries.items() if at == latest}


def faults_of_session(entities: list[Entity], token: Token, remote_ip: str | None) -> set[str]:
    """From where a token is used, and what became of the sign-in by which it was made."""
    faults = set()
    if token.allowed_sources:
        sources = RemoteIpCondition(operator="is_in", values=token.allowed_sources)
        if not address_holds(sources, remote_ip):
            faults.add("token_source")
    if token.auth_provider_id is None:
        return faults
    enabled = [e.id for e in entities if isinstance(e, AuthProvider) and not e.disabled]
    known = [
        e
        for e in entities
        if isinstance(e, Identity)
        and (e.principal_id, e.auth_provider_id) == (token.principal_id, token.auth_provider_id)
    ]
    if token.auth_provider_id not in enabled:
        faults.add("auth_provider_disabled")
    elif not known:
        faults.add("identity")
    return faults


def in_group(entities: list[Entity], principal: Principal, group_id: object) -> bool:
    for group in entities:
        if isinstance(group, Group) and group.id == group_id and group.kind == "everyone":
            return principal.kind == "user"
    return any(
        isinstance(e, Membership) and e.group_id == group_id and e.principal_id == principal.id
        for e in entities
    )


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[arg-type, misc]  # year, month, day, ...
