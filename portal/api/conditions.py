"""The conditions of policies, as the API takes them: from bodies to the model."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import time
from typing import Annotated, Literal
from uuid import UUID
from zoneinfo import ZoneInfo

from msgspec import Meta

from actors.model import (
    MAX_CONDITION_VALUES,
    MAX_FACTS,
    AuthProviderCondition,
    ClientPostureCondition,
    ClientVerifiedCondition,
    Conditions,
    CurrentTimeCondition,
    DayWindow,
    Fact,
    FactName,
    FactTest,
    FactValue,
    Region,
    RegionCondition,
    RemoteIpCondition,
    TimeRange,
)
from portal.api.requests import Body, Checks

TimeText = Annotated[time, Meta(tz=False, description="A time of day such as 09:30:00.")]
Membership = Literal["is_in", "is_not_in"]
Values = Meta(min_length=1, max_length=MAX_CONDITION_VALUES)


class RegionBody(Body, frozen=True, kw_only=True):
    """The country of the client's address is, or is not, one of these. Unknown fails."""

    operator: Membership
    values: Annotated[tuple[Region, ...], Values]
    property: Literal["remote_ip_location_region"] = "remote_ip_location_region"


class RemoteIpBody(Body, frozen=True, kw_only=True):
    """The client's public address is in, or not in, one of these networks."""

    operator: Membership
    values: Annotated[tuple[Annotated[str, Meta(max_length=49)], ...], Values]
    property: Literal["remote_ip"] = "remote_ip"


class AuthProviderBody(Body, frozen=True, kw_only=True):
    """The provider by which the client signed in is, or is not, one of these."""

    operator: Membership
    values: Annotated[tuple[UUID, ...], Values]
    property: Literal["auth_provider"] = "auth_provider"


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


class ClientVerifiedBody(Body, frozen=True, kw_only=True):
    """An admin has (or, with false, has not) verified the device."""

    value: bool = True
    operator: Literal["is"] = "is"
    property: Literal["client_verified"] = "client_verified"


class FactBody(Body, frozen=True, kw_only=True):
    """One thing that a device reports of itself, such as `os_version` "14.2"."""

    name: FactName
    value: FactValue


class FactTestBody(FactBody, frozen=True, kw_only=True):
    """What a fact has to be. `at_least` and `at_most` compare numbers, and texts as versions."""

    operator: Literal["is", "is_not", "at_least", "at_most"]


class ClientPostureBody(Body, frozen=True, kw_only=True):
    """All of these hold of the device, as it last reported."""

    facts: Annotated[tuple[FactTestBody, ...], Meta(min_length=1, max_length=MAX_FACTS)]
    property: Literal["client_posture"] = "client_posture"


class ConditionsBody(Body, frozen=True, kw_only=True):
    """All of them have to hold."""

    remote_ip_location_region: RegionBody | None = None
    remote_ip: RemoteIpBody | None = None
    auth_provider: AuthProviderBody | None = None
    current_time: CurrentTimeBody | None = None
    client_verified: ClientVerifiedBody | None = None
    client_posture: ClientPostureBody | None = None


Facts = Annotated[
    tuple[FactBody, ...],
    Meta(max_length=MAX_FACTS, description="What the device reports of itself."),
]


def conditions_of(checks: Checks, body: ConditionsBody) -> Conditions:
    """The conditions as the model has them; what is wrong with them is noted."""
    region, remote_ip, provider = body.remote_ip_location_region, body.remote_ip, body.auth_provider
    time, verified, posture = body.current_time, body.client_verified, body.client_posture
    return Conditions(
        remote_ip_location_region=None
        if region is None
        else RegionCondition(operator=region.operator, values=tuple(dict.fromkeys(region.values))),
        remote_ip=None
        if remote_ip is None
        else RemoteIpCondition(
            operator=remote_ip.operator,
            values=checks.networks("conditions.remote_ip.values", remote_ip.values),
        ),
        auth_provider=None
        if provider is None
        else AuthProviderCondition(
            operator=provider.operator, values=tuple(dict.fromkeys(provider.values))
        ),
        current_time=None if time is None else _current_time(checks, time),
        client_verified=None if verified is None else ClientVerifiedCondition(value=verified.value),
        client_posture=None if posture is None else _posture(checks, posture),
    )


def facts_of(checks: Checks, field: str, facts: Sequence[FactBody]) -> tuple[Fact, ...]:
    """Facts as the model has them, each named once."""
    names = [fact.name for fact in facts]
    if len(set(names)) != len(names):
        checks.refuse(field, "names a fact twice")
    return tuple(Fact(name=fact.name, value=fact.value) for fact in facts)


def _posture(checks: Checks, body: ClientPostureBody) -> ClientPostureCondition:
    for i, fact in enumerate(body.facts):
        if fact.operator in ("at_least", "at_most") and isinstance(fact.value, bool):
            field = f"conditions.client_posture.facts[{i}].value"
            checks.refuse(field, "a truth is neither more nor less than another")
    return ClientPostureCondition(
        facts=tuple(
            FactTest(name=fact.name, operator=fact.operator, value=fact.value)
            for fact in body.facts
        )
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
