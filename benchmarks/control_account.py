"""The account that `benchmarks.control` measures with: large, and with every kind of condition.

10,000 users with a device and a session each, 200 groups and Everyone, 5 groups for each user,
1,000 resources at 50 sites with two gateways each, 5,000 policies: half of them plain, the others
with one or two conditions. The same in every run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, time, timedelta
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final
from uuid import UUID

from actors.model import (
    Account,
    AuthProvider,
    AuthProviderCondition,
    Client,
    ClientPostureCondition,
    ClientVerifiedCondition,
    Conditions,
    CurrentTimeCondition,
    DayWindow,
    Entity,
    Fact,
    FactTest,
    Gateway,
    Group,
    Membership,
    Policy,
    Principal,
    RegionCondition,
    RemoteIpCondition,
    Resource,
    Site,
    TimeRange,
    Token,
)
from actors.policy.engine import Request
from actors.store.interface import Contents

USERS: Final = 10_000
GROUPS: Final = 200
GROUPS_OF_A_USER: Final = 5
SITES: Final = 50
RESOURCES: Final = 1_000
POLICIES: Final = 5_000
NOW: Final = datetime(2026, 3, 27, 10, 30, tzinfo=UTC)
"""A Friday, two days before the clocks of Europe change."""
ACCOUNT_ID: Final = UUID(int=1)
_LONG_AGO: Final = datetime(2025, 1, 1, tzinfo=UTC)

IDS: Final[dict[type, int]] = {
    kind: number
    for number, kind in enumerate(
        (Principal, Group, Membership, Site, Resource, Policy, Token, Client, Gateway, AuthProvider)
    )
}


def id_of(kind: type, number: int) -> UUID:
    """The id of the so-and-so-many-th entity of a kind: a new object each time, as off the wire."""
    return UUID(int=(0x0193 << 112) | (7 << 76) | (2 << 62) | (IDS[kind] << 40) | number)


def contents() -> Contents:
    """The whole account, as a store hands it over."""
    account = Account(id=ACCOUNT_ID, name="Large", slug="large", created_at=_LONG_AGO)
    return Contents(account, tuple(_entities(random.Random(4))), 1)


def requests(of: Contents, count: int, seed: int) -> list[Request]:
    """What clients chosen at random ask for: half of it resources that a policy gives to a group
    of theirs (whatever its conditions), half of it any resource."""
    chance = random.Random(seed)
    groups: dict[UUID, list[UUID]] = {}
    resources: dict[UUID, list[UUID]] = {}
    for entity in of.entities:
        if isinstance(entity, Membership):
            groups.setdefault(entity.principal_id, []).append(entity.group_id)
        elif isinstance(entity, Policy):
            resources.setdefault(entity.group_id, []).append(entity.resource_id)
    asked = []
    for number in range(count):
        user = chance.randrange(USERS)
        resource_id = id_of(Resource, chance.randrange(RESOURCES))
        if number % 2:
            group_id = chance.choice(groups[id_of(Principal, user)])
            resource_id = UUID(int=chance.choice(resources[group_id]).int)
        asked.append(
            Request(
                client_id=id_of(Client, user),
                token_id=id_of(Token, user),
                resource_id=resource_id,
                remote_ip=f"203.0.{chance.randrange(256)}.{chance.randrange(256)}",
            )
        )
    return asked


def _entities(chance: random.Random) -> Iterator[Entity]:
    yield _made(AuthProvider, 0, kind="oidc", name="Okta")
    yield _made(Group, GROUPS, name="Everyone", kind="everyone")
    for number in range(GROUPS):
        yield _made(Group, number, name=f"group {number}")
    for number in range(SITES):
        yield _made(Site, number, name=f"site {number}")
        yield _made(
            Token,
            USERS + number,
            kind="gateway",
            name="gateways",
            hash=(USERS + number).to_bytes(32, "big"),
            site_id=id_of(Site, number),
        )
        yield from (_gateway(number * 2 + each, number) for each in (0, 1))
    for number in range(RESOURCES):
        yield _resource(number, chance)
    for number in range(USERS):
        yield from _user(number, chance)
    for number in range(POLICIES):
        yield _policy(number, chance)


def _made(entity: type, number: int, /, **fields: Any) -> Any:
    return entity(id=id_of(entity, number), account_id=ACCOUNT_ID, created_at=_LONG_AGO, **fields)


def _gateway(number: int, site: int) -> Entity:
    made: Entity = _made(
        Gateway,
        number,
        site_id=id_of(Site, site),
        token_id=id_of(Token, USERS + site),
        device_key=number.to_bytes(32, "big"),
        name=f"gateway {number}",
        ipv4=IPv4Address("100.64.0.0") + number,
        ipv6=IPv6Address("fd48:4c57:5900::") + number,
    )
    return made


def _resource(number: int, chance: random.Random) -> Entity:
    sites = chance.sample(range(SITES), chance.choice((1, 1, 1, 2, 3)))
    made: Entity = _made(
        Resource,
        number,
        site_ids=tuple(id_of(Site, site) for site in sites),
        name=f"resource {number}",
        kind="ip",
        address=str(IPv4Address("10.0.0.0") + number),
    )
    return made


def _user(number: int, chance: random.Random) -> Iterator[Entity]:
    principal_id = id_of(Principal, number)
    yield _made(Principal, number, name=f"user {number}", email=f"user{number}@example.net")
    yield _made(
        Token,
        number,
        kind="client",
        name="sign-in",
        hash=number.to_bytes(32, "big"),
        principal_id=principal_id,
        auth_provider_id=id_of(AuthProvider, 0),
        expires_at=NOW + timedelta(hours=chance.randrange(1, 168)),
    )
    yield _made(
        Client,
        number,
        principal_id=principal_id,
        token_id=id_of(Token, number),
        device_key=number.to_bytes(32, "big"),
        name=f"laptop {number}",
        ipv4=IPv4Address("100.65.0.0") + number,
        ipv6=IPv6Address("fd48:4c57:5900::1:0") + number,
        verified=chance.random() < 0.8,
        posture=(
            Fact(name="os_version", value=f"14.{chance.randrange(8)}"),
            Fact(name="disk_encrypted", value=chance.random() < 0.9),
        ),
    )
    for each, group in enumerate(chance.sample(range(GROUPS), GROUPS_OF_A_USER)):
        yield _made(
            Membership,
            number * GROUPS_OF_A_USER + each,
            group_id=id_of(Group, group),
            principal_id=principal_id,
        )


def _policy(number: int, chance: random.Random) -> Entity:
    everyone = chance.random() < 0.02
    made: Entity = _made(
        Policy,
        number,
        group_id=id_of(Group, GROUPS if everyone else chance.randrange(GROUPS)),
        resource_id=id_of(Resource, chance.randrange(RESOURCES)),
        conditions=_conditions(chance),
        lease_s=chance.choice((3_600, 28_800, 86_400)),
        disabled=chance.random() < 0.02,
        expires_at=NOW + timedelta(days=chance.randrange(1, 90)) if chance.random() < 0.1 else None,
    )
    return made


def _conditions(chance: random.Random) -> Conditions:
    if chance.random() < 0.5:
        return Conditions()
    kinds = chance.sample(tuple(_CONDITIONS), chance.choice((1, 2)))
    return Conditions(**{kind: chance.choice(_CONDITIONS[kind]) for kind in kinds})


def _working_hours(zone: str, start: int, end: int) -> CurrentTimeCondition:
    hours = TimeRange(start=time(start), end=time(end))
    return CurrentTimeCondition(
        zone=zone, windows=tuple(DayWindow(day=day, ranges=(hours,)) for day in range(5))
    )


_CONDITIONS: dict[str, tuple[Any, ...]] = {
    "remote_ip": tuple(
        RemoteIpCondition(operator="is_in", values=(f"203.0.{number}.0/24", "198.51.100.0/22"))
        for number in range(0, 256, 8)
    ),
    "remote_ip_location_region": (
        RegionCondition(operator="is_in", values=("DE", "AT", "CH")),
        RegionCondition(operator="is_not_in", values=("KP",)),
    ),
    "auth_provider": (AuthProviderCondition(operator="is_in", values=(id_of(AuthProvider, 0),)),),
    "current_time": tuple(
        _working_hours(zone, start, start + 10)
        for zone in ("Europe/Berlin", "America/New_York", "Asia/Kolkata")
        for start in (6, 7, 8, 9)
    ),
    "client_verified": (ClientVerifiedCondition(),),
    "client_posture": tuple(
        ClientPostureCondition(
            facts=(
                FactTest(name="disk_encrypted", operator="is", value=True),
                FactTest(name="os_version", operator="at_least", value=f"14.{minor}"),
            )
        )
        for minor in range(4)
    ),
}
