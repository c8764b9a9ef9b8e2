"""What policy decides, read off the tables of PostgreSQL as a person would who knows SQL and the
specification, and nothing of the engine: no index, no compiled condition, time stepped through
minute by minute."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, time, timedelta
from itertools import product
from typing import Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs
import psycopg

Pair = tuple[UUID, UUID]
"""A principal and a resource."""
MINUTE: Final = timedelta(minutes=1)

_PAIRS: Final = """
SELECT principal.id, resource.id FROM principal CROSS JOIN resource
WHERE principal.account_id = %(account)s AND resource.account_id = %(account)s
"""
_POLICIES: Final = """
SELECT principal.id, policy.resource_id, policy.id, policy.conditions, policy.expires_at,
       policy.lease_s
FROM policy, principal, "group", account
WHERE account.id = %(account)s AND policy.account_id = account.id
  AND principal.account_id = account.id AND "group".account_id = account.id
  AND NOT account.disabled AND NOT principal.disabled AND NOT policy.disabled
  AND policy.group_id = "group".id
  AND CASE "group".kind WHEN 'everyone' THEN principal.kind = 'user' ELSE EXISTS (
      SELECT FROM membership WHERE membership.account_id = account.id
      AND membership.group_id = "group".id AND membership.principal_id = principal.id
  ) END
"""


@attrs.frozen(kw_only=True)
class Facts:
    """The circumstances of a request; None is unknown."""

    remote_ip: str | None = None
    region: str | None = None
    auth_provider_id: str | None = None
    client_verified: bool | None = None
    os_version: str | None = None


@attrs.frozen
class Row:
    """A policy that concerns a pair."""

    id: UUID
    conditions: dict[str, Any]
    expires_at: datetime | None
    lease_s: int


@attrs.frozen
class Tables:
    """An account as it was read: every pair, and the policies in force that concern it."""

    policies: dict[Pair, list[Row]]

    @classmethod
    def read(cls, connection: psycopg.Connection, account_id: UUID) -> Tables:
        account = {"account": account_id}
        with connection.transaction():
            connection.execute("SELECT set_config('holloway.account', %s, true)", [str(account_id)])
            policies: dict[Pair, list[Row]] = {
                (principal, resource): []
                for principal, resource in connection.execute(_PAIRS, account)
            }
            for principal, resource, *row in connection.execute(_POLICIES, account):
                policies[principal, resource].append(Row(*row))
        return cls(policies)

    def until(self, pair: Pair, facts: Facts, instant: datetime) -> datetime | None:
        """The end of what the pair is allowed at this instant (of a whole minute); None: denied."""
        ends = [_end(each, facts, instant) for each in self.policies.get(pair, [])]
        return max((end for end in ends if end is not None), default=None)

    def allows(self, pair: Pair, facts: Facts, instant: datetime) -> bool:
        return any(_holds(each, facts, instant) for each in self.policies.get(pair, []))


def every(**values: list[Any]) -> list[Facts]:
    """All combinations."""
    return [Facts(**dict(zip(values, each, strict=True))) for each in product(*values.values())]


def _end(policy: Row, facts: Facts, instant: datetime) -> datetime | None:
    if not _holds(policy, facts, instant):
        return None
    end = instant + timedelta(seconds=policy.lease_s)
    if policy.expires_at is not None:
        end = min(end, policy.expires_at)
    hours = policy.conditions.get("current_time")
    if hours is not None:
        at = instant
        while at < end and _is_open(hours, at):
            at += MINUTE
        end = min(end, at)
    return end.astimezone(UTC)


def _holds(policy: Row, facts: Facts, instant: datetime) -> bool:
    if policy.expires_at is not None and policy.expires_at <= instant:
        return False
    for name, condition in policy.conditions.items():
        if condition is None:
            continue
        match name:
            case "remote_ip":
                holds = facts.remote_ip is not None and _is_member(
                    condition, _is_inside(facts.remote_ip, condition["values"])
                )
            case "remote_ip_location_region":
                holds = facts.region is not None and _is_member(
                    condition, facts.region in condition["values"]
                )
            case "auth_provider":
                holds = facts.auth_provider_id is not None and _is_member(
                    condition, facts.auth_provider_id in condition["values"]
                )
            case "client_verified":
                holds = facts.client_verified is condition["value"]
            case "client_posture":
                holds = all(_is_met(test, facts.os_version) for test in condition["facts"])
            case "current_time":
                holds = _is_open(condition, instant)
            case _:
                raise AssertionError(name)
        if not holds:
            return False
    return True


def _is_member(condition: dict[str, Any], inside: bool) -> bool:
    return inside if condition["operator"] == "is_in" else not inside


def _is_inside(address: str, networks: list[str]) -> bool:
    return any(ipaddress.ip_address(address) in ipaddress.ip_network(each) for each in networks)


def _is_met(test: dict[str, Any], version: str | None) -> bool:
    """A test of `os_version`, which is a number of two parts here."""
    assert test["name"] == "os_version"
    if version is None:
        return False
    ours, wanted = (tuple(map(int, text.split("."))) for text in (version, test["value"]))
    outcomes = {"at_least": ours >= wanted, "at_most": ours <= wanted, "is": ours == wanted}
    return outcomes[test["operator"]]


def _is_open(hours: dict[str, Any], instant: datetime) -> bool:
    wall = instant.astimezone(ZoneInfo(hours["zone"]))
    for window in hours["windows"]:
        if window["day"] != wall.weekday():
            continue
        if not window["ranges"]:
            return True
        for each in window["ranges"]:
            start, end = time.fromisoformat(each["start"]), time.fromisoformat(each["end"])
            if start <= wall.time() and (end == time(0) or wall.time() < end):
                return True
    return False
