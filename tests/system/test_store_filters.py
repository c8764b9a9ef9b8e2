"""Entities asked for by their fields: PostgreSQL finds what a slow look at everything finds, and so
does the memory store; and answers that are kept with a token of the installation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import attrs
import pytest

from actors.model import (
    Account,
    Authorization,
    AuthProvider,
    Client,
    Entity,
    EntityKind,
    Fact,
    Gateway,
    Group,
    Identity,
    Membership,
    Policy,
    PolicyTest,
    Principal,
    Resource,
    Site,
    Token,
)
from actors.store.interface import Answer, Conflict, Put, Repeated, Store
from actors.store.memory import MemoryStore
from actors.store.postgres import Logins, PostgresStore
from channel.messages import IpText
from runtime.clock import SystemClock
from runtime.randomness import SystemRandomness, uuid7

pytestmark = pytest.mark.system

NOW = datetime(2026, 11, 26, tzinfo=UTC)


def new_id() -> UUID:
    return uuid7(SystemClock(), SystemRandomness())


@asynccontextmanager
async def opened(kind: str, database: Logins) -> AsyncIterator[Store]:
    if kind == "memory":
        yield MemoryStore()
    else:
        async with PostgresStore.open(database, migrated=True) as store:
            yield store


def entities(account_id: UUID) -> tuple[Entity, ...]:
    """Two or three of each kind, alike in some fields and not in others."""
    common: dict[str, Any] = {"account_id": account_id, "created_at": NOW}
    users = [
        Principal(id=new_id(), name=name, email=email, role=role, **common)
        for name, email, role in [
            ("twin", None, "admin"),
            ("twin", "a@example.org", "member"),
            ("one", "a@example.org", "member"),
        ]
    ]
    sites = [Site(id=new_id(), name=f"s{i}", **common) for i in range(3)]
    groups = [Group(id=new_id(), name=f"g{i}", **common) for i in range(2)]
    provider = AuthProvider(id=new_id(), kind="email", name="mail", **common)
    tokens = [
        Token(id=new_id(), kind="client", name="t", hash=bytes(32), principal_id=user.id, **common)
        for user in users
    ]
    gate = Token(
        id=new_id(), kind="gateway", name="t", hash=bytes(32), site_id=sites[0].id, **common
    )
    clients = [
        Client(
            id=new_id(),
            principal_id=user.id,
            token_id=token.id,
            device_key=bytes(31) + bytes([i]),
            name="laptop",
            ipv4=Account.__attrs_attrs__.range_ipv4.default[10 + i],  # type: ignore[attr-defined]
            ipv6=Account.__attrs_attrs__.range_ipv6.default[10 + i],  # type: ignore[attr-defined]
            verified=i == 1,
            posture=(Fact(name="os", value="linux"),),
            **common,
        )
        for i, (user, token) in enumerate(zip(users, tokens, strict=True))
    ]
    gateway = Gateway(
        id=new_id(),
        site_id=sites[0].id,
        token_id=gate.id,
        device_key=bytes(32),
        name="gw",
        ipv4=Account.__attrs_attrs__.range_ipv4.default[20],  # type: ignore[attr-defined]
        ipv6=Account.__attrs_attrs__.range_ipv6.default[20],  # type: ignore[attr-defined]
        **common,
    )
    resources = [
        Resource(
            id=new_id(),
            name=f"r{i}",
            kind="ip",
            address=f"10.0.0.{i + 1}",
            site_ids=tuple(site.id for site in each),
            **common,
        )
        for i, each in enumerate([sites[:1], sites[:2], sites[1:]])
    ]
    pool = Resource(
        id=new_id(),
        name="pool",
        kind="device_pool",
        site_ids=(),
        device_ids=tuple(client.id for client in clients[:2]),
        **common,
    )
    return (
        *users,
        provider,
        *(
            Identity(
                id=new_id(),
                principal_id=user.id,
                auth_provider_id=provider.id,
                issuer="mail",
                subject=f"{i}",
                **common,
            )
            for i, user in enumerate(users)
        ),
        *groups,
        *(
            Membership(id=new_id(), group_id=group.id, principal_id=user.id, **common)
            for group in groups
            for user in users[:2]
        ),
        *sites,
        *tokens,
        gate,
        *clients,
        gateway,
        *resources,
        pool,
        *(
            Policy(
                id=new_id(), group_id=groups[0].id, resource_id=each.id, disabled=i == 1, **common
            )
            for i, each in enumerate(resources)
        ),
        PolicyTest(
            id=new_id(),
            name="t",
            principal_id=users[0].id,
            resource_id=pool.id,
            expected="denied",
            remote_ip=IpText("192.0.2.1"),
            **common,
        ),
    )


def values_of(every: list[Entity]) -> list[dict[str, Any]]:
    """Filters that some of the entities meet: by each field, and by two fields at once."""
    found: list[dict[str, Any]] = []
    for entity in every:
        one: dict[str, Any] = {}
        for field in attrs.fields_dict(type(entity)):
            value = getattr(entity, field)
            if field.endswith("_ids") and value:
                one[field] = value[-1]
            elif isinstance(value, UUID | bool | str) and field not in ("id", "account_id"):
                one[field] = value
        found += [{field: value} for field, value in one.items()]
        found += [dict(list(one.items())[:2]), dict(list(one.items())[-2:])]
    return found


def slowly(every: list[Entity], wanted: dict[str, Any]) -> list[UUID]:
    return sorted(
        entity.id
        for entity in every
        if all(
            value in getattr(entity, field)
            if field.endswith("_ids")
            else getattr(entity, field) == value
            for field, value in wanted.items()
        )
    )


@pytest.mark.parametrize("kind", ["memory", "postgres"])
async def test_what_has_these_values_is_found_and_nothing_else(kind: str, database: Logins) -> None:
    async with opened(kind, database) as store:
        accounts = [
            Account(id=new_id(), name="same", slug=slug, created_at=NOW) for slug in ("a", "b")
        ]
        own: list[Entity] = []
        for account in accounts:
            own = list(entities(account.id))
            puts = [Put(account), *map(Put, own)]
            await store.apply(account.id, puts, who="test", at=NOW)
        account = accounts[-1]
        by_kind: dict[EntityKind, list[Entity]] = {}
        for change in await store.changes(account.id, after=0):
            if change.after is not None and change.kind != "account":
                by_kind.setdefault(change.kind, []).append(change.after)
        tried = 0
        for entity_kind, every in by_kind.items():
            for wanted in values_of(every):
                expected = slowly(every, wanted)
                found = await store.list(account.id, entity_kind, equals=wanted)
                assert [each.id for each in found] == expected, (entity_kind, wanted)
                rest = await store.list(
                    account.id, entity_kind, after=expected[0], limit=1, equals=wanted
                )
                assert [each.id for each in rest] == expected[1:2]
                tried += 1
            assert await store.count(account.id, entity_kind) == len(every)
            assert await store.list(account.id, entity_kind, equals={"account_id": new_id()}) == ()
        assert tried > 100
        assert [each.slug for each in await store.accounts(equals={"name": "same"})] == ["a", "b"]
        assert [each.slug for each in await store.accounts(equals={"slug": "b"})] == ["b"]
        sites = await store.changes(account.id, after=0, equals={"kind": "site", "who": "test"})
        assert [change.entity_id for change in sites] == [each.id for each in by_kind["site"]]
        one = await store.changes(account.id, after=0, equals={"entity_id": own[0].id})
        assert [change.entity_id for change in one] == [own[0].id]
        assert await store.last_number(account.id) == len(own) + 1
        assert await store.last_number(new_id()) == 0


@pytest.mark.parametrize("kind", ["memory", "postgres"])
async def test_authorisations_are_found_by_whom_they_concern(kind: str, database: Logins) -> None:
    async with opened(kind, database) as store:
        account = Account(id=new_id(), name="a", slug="a", created_at=NOW)
        own = entities(account.id)
        await store.apply(account.id, [Put(account), *map(Put, own)], who="test", at=NOW)
        clients = [each for each in own if isinstance(each, Client)]
        policies = [each for each in own if isinstance(each, Policy)]
        (gateway,) = (each for each in own if isinstance(each, Gateway))
        incarnation = await store.join_node(
            "n", link_address="a:1", door_address="a:2", version="1", ttl_ns=10**10
        )
        epoch = await store.acquire(account.id, owner="n", incarnation=incarnation)
        for client in clients:
            for policy in policies:
                await store.write_authorization(
                    Authorization(
                        id=new_id(),
                        account_id=account.id,
                        policy_id=policy.id,
                        client_id=client.id,
                        gateway_id=gateway.id,
                        resource_id=policy.resource_id,
                        token_id=client.token_id,
                        connection_id=new_id(),
                        remote_ip=IpText("192.0.2.1"),
                        created_at=NOW,
                        expires_at=NOW + timedelta(hours=1 if policy is policies[0] else 2),
                    ),
                    epoch=epoch,
                )
        wanted = {"client_id": clients[0].id}
        found = await store.authorizations(account.id, equals=wanted)
        assert [each.policy_id for each in found] == [each.id for each in policies]
        later = NOW + timedelta(minutes=90)
        live = await store.authorizations(account.id, live_at=later, equals=wanted)
        assert live == found[1:]
        both = wanted | {"policy_id": policies[2].id}
        assert await store.authorizations(account.id, equals=both) == found[2:]


@pytest.mark.parametrize("kind", ["memory", "postgres"])
async def test_a_token_of_the_installation_is_kept_with_the_answer_or_not_at_all(
    kind: str, database: Logins
) -> None:
    async with opened(kind, database) as store:

        def token(**fields: Any) -> Token:
            values = {"kind": "operator", "name": "o", "hash": bytes(32), "created_at": NOW}
            return Token(id=new_id(), account_id=None, **(values | fields))

        operator = token()
        await store.put_installation_token(operator)
        answer = Answer(
            token_id=operator.id, key="k", request_hash=bytes(32), status=201, body=b"{}", at=NOW
        )
        new = token(kind="relay", name="relays")
        with pytest.raises(Conflict):
            await store.put_installation_token(operator, answer=answer)
        assert await store.answer_of(operator.id, "k") is None
        await store.put_installation_token(new, answer=answer)
        assert await store.answer_of(operator.id, "k") == answer
        with pytest.raises(Repeated) as repeated:
            await store.put_installation_token(token(), answer=attrs.evolve(answer, body=b"[]"))
        assert repeated.value.record == answer
        found = await store.installation_tokens(equals={"kind": "relay"})
        assert [each.id for each in found] == [new.id]
        assert len(await store.installation_tokens()) == 2
