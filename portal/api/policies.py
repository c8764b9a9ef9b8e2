"""Policies: members of a group may reach a resource while conditions hold; and why, or why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, time
from typing import Annotated, Literal
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
from litestar import Router, delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from actors.model import (
    DEFAULT_LEASE_S,
    MAX_CONDITION_VALUES,
    MIN_LEASE_S,
    Client,
    Conditions,
    CurrentTimeCondition,
    DayWindow,
    Description,
    Gateway,
    Policy,
    RemoteIpCondition,
    Resource,
    TimeRange,
)
from actors.policy.engine import Denied, Snapshot
from actors.policy.engine import Request as PolicyRequest
from actors.policy.explain import Check, PolicyTrace, explain, summary
from actors.store.interface import Contents
from channel.messages import IpText
from portal.api.inject import PathId, TheDesk, ThePage
from portal.api.pagination import Page
from portal.api.problems import Problem
from portal.api.requests import Body, Checks, Instant, canonical_source, changes_of

TimeText = Annotated[time, Meta(tz=False, description="A time of day such as 09:30:00.")]
Lease = Annotated[
    int,
    Meta(
        ge=MIN_LEASE_S,
        le=DEFAULT_LEASE_S,
        description="Seconds for which an access outlives the loss of the portal.",
    ),
]
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
LATEST = datetime(2200, 1, 1, tzinfo=UTC)


class RemoteIpBody(Body, frozen=True, kw_only=True):
    """The client's public address is in, or not in, one of these networks."""

    operator: Literal["is_in", "is_not_in"]
    values: Annotated[
        tuple[Annotated[str, Meta(max_length=49)], ...],
        Meta(min_length=1, max_length=MAX_CONDITION_VALUES),
    ]
    property: Literal["remote_ip"] = "remote_ip"


class TimeRangeBody(Body, frozen=True, kw_only=True):
    """From `start` up to, not including, `end`; an `end` of 00:00 means midnight."""

    start: TimeText
    end: TimeText


class DayWindowBody(Body, frozen=True, kw_only=True):
    """Ranges of one weekday (0 is Monday); none at all means the whole day."""

    day: Annotated[int, Meta(ge=0, le=6)]
    ranges: Annotated[tuple[TimeRangeBody, ...], Meta(max_length=24)] = ()


class CurrentTimeBody(Body, frozen=True, kw_only=True):
    """The instant lies in one of the windows, read in an IANA time zone."""

    zone: Annotated[str, Meta(min_length=1, max_length=64)]
    windows: Annotated[tuple[DayWindowBody, ...], Meta(min_length=1, max_length=7)]
    property: Literal["current_time"] = "current_time"


class ConditionsBody(Body, frozen=True, kw_only=True):
    """All of them have to hold."""

    remote_ip: RemoteIpBody | None = None
    current_time: CurrentTimeBody | None = None


class PolicyCreate(Body, frozen=True, kw_only=True):
    """Lets the members of one group reach one resource."""

    group_id: UUID
    resource_id: UUID
    conditions: ConditionsBody = ConditionsBody()
    disabled: bool = False
    description: Description = ""
    expires_at: Instant | None = None
    lease_s: Lease = DEFAULT_LEASE_S


class PolicyUpdate(Body, frozen=True, kw_only=True):
    """Whatever is no longer allowed after the change is cut at once."""

    group_id: UUID | UnsetType = UNSET
    resource_id: UUID | UnsetType = UNSET
    conditions: ConditionsBody | UnsetType = UNSET
    disabled: bool | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    expires_at: Instant | UnsetType | None = UNSET
    lease_s: Lease | UnsetType = UNSET


class ExplainRequest(Body, frozen=True, kw_only=True):
    """A question: may this client, or any device of this principal, reach this resource?

    Name a `client_id` or a `principal_id`. `remote_ip` is the client's public address (by default
    that of its connection, else unknown), `token_id` the token of its session (by default the one
    it enrolled with), `at` an instant (by default now).
    """

    resource_id: UUID
    client_id: UUID | None = None
    principal_id: UUID | None = None
    remote_ip: Annotated[str, Meta(max_length=45)] | None = None
    token_id: UUID | None = None
    at: Instant | None = None


class ExplainAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The decision, in a `sentence` and in parts: what holds whatever the policy (`common`), and
    what each policy of the resource says. `gateways_online` are those of the resource's site; null
    if that cannot be told just now."""

    allowed: bool
    sentence: str
    policy_id: UUID | None
    expires_at: datetime | None
    reason: str
    violated: tuple[str, ...]
    at: datetime
    common: tuple[Check, ...]
    policies: tuple[PolicyTrace, ...]
    gateways_online: tuple[UUID, ...] | None


@get("/")
async def list_policies(desk: TheDesk, page: ThePage) -> Page[Policy]:
    """List policies."""
    return await desk.list(Policy, page)


@get("/{id:uuid}")
async def get_policy(desk: TheDesk, id: PathId) -> Policy:
    """Show a policy."""
    return await desk.get(Policy, id)


@post("/")
async def create_policy(desk: TheDesk, data: JSONBody[PolicyCreate]) -> Policy:
    """Create a policy. It takes effect at once."""
    checks = Checks()
    conditions = _conditions(checks, data.conditions)
    expires_at = checks.future("expires_at", data.expires_at, desk.now)
    checks.finish()
    return await desk.create(
        Policy(
            id=desk.new_id(),
            account_id=desk.account_id,
            group_id=data.group_id,
            resource_id=data.resource_id,
            conditions=conditions,
            disabled=data.disabled,
            description=data.description,
            expires_at=expires_at,
            lease_s=data.lease_s,
            created_at=desk.now,
        )
    )


@patch("/{id:uuid}")
async def update_policy(desk: TheDesk, id: PathId, data: JSONBody[PolicyUpdate]) -> Policy:
    """Change a policy."""
    checks = Checks()
    changes = changes_of(data)
    if "conditions" in changes:
        changes["conditions"] = _conditions(checks, changes["conditions"])
    if "expires_at" in changes:
        changes["expires_at"] = checks.future("expires_at", changes["expires_at"], desk.now)
    checks.finish()
    return await desk.update(Policy, id, changes)


@delete("/{id:uuid}")
async def delete_policy(desk: TheDesk, id: PathId) -> None:
    """Delete a policy; accesses that no other policy allows end at once."""
    await desk.remove("policy", id)


@post("/explain", status_code=200)
async def explain_policies(desk: TheDesk, data: JSONBody[ExplainRequest]) -> ExplainAnswer:
    """Explain who may reach what, and why. Nothing is changed."""
    checks = Checks()
    instant = _instant(checks, data.at, desk.now)
    remote_ip = _remote_ip(checks, data.remote_ip)
    if (data.client_id is None) == (data.principal_id is None):
        checks.refuse("client_id", "name either a client_id or a principal_id")
    checks.finish()
    online = await desk.office.live.online(desk.account_id)
    contents = await desk.office.store.contents(desk.account_id)
    known = {entity.id: entity for entity in contents.entities}
    for field in ("resource_id", "client_id", "principal_id", "token_id"):
        id = getattr(data, field)
        if id is not None and id not in known:
            raise Problem(404, "not_found", f"{field} names nothing in this account.")
    client = known.get(data.client_id) if data.client_id else None
    token_id = client.token_id if isinstance(client, Client) else None
    request = PolicyRequest(
        client_id=data.client_id,
        principal_id=data.principal_id,
        resource_id=data.resource_id,
        remote_ip=remote_ip or (online or {}).get(data.client_id or data.resource_id),
        token_id=data.token_id or token_id,
    )
    explanation = explain(Snapshot.of(contents, desk.office.regions), request, instant)
    decision = explanation.decision
    denied = decision if isinstance(decision, Denied) else None
    return ExplainAnswer(
        allowed=denied is None,
        sentence=summary(explanation),
        policy_id=None if isinstance(decision, Denied) else decision.policy_id,
        expires_at=None if isinstance(decision, Denied) else decision.expires_at,
        reason=denied.reason if denied else "",
        violated=denied.violated if denied else (),
        at=instant,
        common=explanation.common,
        policies=explanation.policies,
        gateways_online=_gateways_online(contents, data.resource_id, online),
    )


# --- below: from bodies to the model ---


def _gateways_online(
    contents: Contents, resource_id: UUID, online: Mapping[UUID, str] | None
) -> tuple[UUID, ...] | None:
    if online is None:
        return None
    entities = contents.entities
    sites = {
        site_id
        for each in entities
        if isinstance(each, Resource) and each.id == resource_id
        for site_id in each.site_ids
    }
    return tuple(
        each.id
        for each in entities
        if isinstance(each, Gateway) and each.site_id in sites and each.id in online
    )


def _conditions(checks: Checks, body: ConditionsBody) -> Conditions:
    remote_ip = body.remote_ip and RemoteIpCondition(
        operator=body.remote_ip.operator,
        values=checks.networks("conditions.remote_ip.values", body.remote_ip.values),
    )
    return Conditions(
        remote_ip=remote_ip or None,
        current_time=_current_time(checks, body.current_time) if body.current_time else None,
    )


def _current_time(checks: Checks, body: CurrentTimeBody) -> CurrentTimeCondition:
    where = "conditions.current_time"
    if not _is_zone(body.zone):
        checks.refuse(f"{where}.zone", "must be an IANA zone such as Europe/Berlin")
    days = [window.day for window in body.windows]
    if len(days) != len(set(days)):
        checks.refuse(f"{where}.windows", "name each day once, with several ranges if need be")
    return CurrentTimeCondition(
        zone=body.zone,
        windows=tuple(
            DayWindow(day=window.day, ranges=_ranges(checks, f"{where}.windows[{i}]", window))
            for i, window in enumerate(body.windows)
        ),
    )


def _ranges(checks: Checks, where: str, window: DayWindowBody) -> tuple[TimeRange, ...]:
    ranges: Sequence[TimeRangeBody] = window.ranges
    for i, each in enumerate(ranges):
        if each.end != time(0) and each.end <= each.start:
            checks.refuse(f"{where}.ranges[{i}].end", "must be after start, or 00:00 for midnight")
    return tuple(TimeRange(start=each.start, end=each.end) for each in ranges)


def _is_zone(name: str) -> bool:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return False
    return True


def _instant(checks: Checks, at: datetime | None, now: datetime) -> datetime:
    if at is None:
        return now
    if not EARLIEST <= at <= LATEST:
        checks.refuse("at", f"must lie between {EARLIEST.year} and {LATEST.year}")
        return now
    return at.astimezone(UTC)


def _remote_ip(checks: Checks, text: str | None) -> str | None:
    if text is None:
        return None
    address = canonical_source(text)
    if address is None or "%" in text:
        checks.refuse("remote_ip", "must be an address such as 192.0.2.7 or 2001:db8::7")
        return None
    return IpText(str(address))


router = Router(
    "/v1/policies",
    route_handlers=[
        list_policies,
        get_policy,
        create_policy,
        update_policy,
        delete_policy,
        explain_policies,
    ],
    tags=["policies"],
)
