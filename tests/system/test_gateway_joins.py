"""Gateways join the real actors over real QUIC: with thousands of live authorisations, and where
another one with the same device key is connected."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import attrs
import pytest
import trio

from actors.model import (
    Account,
    Authorization,
    Client,
    Conditions,
    Gateway,
    Group,
    Policy,
    Principal,
    Resource,
    Site,
    Token,
)
from actors.store.interface import Put
from actors.store.memory import MemoryStore
from actors.tree import ControlPlane
from actors.wire import node_codec
from channel.credentials import (
    decode_token,
    device_key_of,
    encode_token,
    hash_token,
    join_statement,
    sign_join,
)
from channel.dialer import Dialer
from channel.frames import Frame
from channel.listener import ChannelServer, serve_channels
from channel.messages import (
    TO_GATEWAY,
    Challenge,
    GatewayInit,
    Held,
    IpText,
    Join,
    SocketAddress,
)
from runtime.clock import SystemClock
from runtime.cluster.node import start_alone
from runtime.host import TrioHost
from runtime.net.address import Address
from runtime.randomness import SystemRandomness, uuid7
from runtime.scheduler import Scheduler
from tests.nodes import joined
from tests.system.rebinding import Rebinding
from tests.unit.channel.certificates import Authority

pytestmark = pytest.mark.system

AUTHORITY = Authority("installation")
CHAIN, KEY = AUTHORITY.issue_pem("localhost", "127.0.0.1")
CLOCK, RANDOMNESS = SystemClock(), SystemRandomness()
PATIENCE_S = 60.0
MANY = 5_000
SEED = RANDOMNESS.bytes(32)


class HoldingGateway:
    """A `ChannelAgent` with a real device key, that holds what it is given."""

    def __init__(self, token: str, held: tuple[Held, ...]) -> None:
        self._token = token
        self._held = held
        self._tunnel_key = RANDOMNESS.bytes(32)
        self.told: list[object] = []

    def join(self, challenge: Challenge, now: int) -> Join:
        token_id = decode_token(self._token).id
        statement = join_statement(challenge.nonce, challenge.portal, token_id, self._tunnel_key)
        return Join(
            kind="gateway",
            token=self._token,
            device_key=device_key_of(SEED),
            signature=sign_join(SEED, statement),
            tunnel_key=self._tunnel_key,
            name="gateway",
            incarnation=now,
            held=self._held,
        )

    def receive(self, frame: Frame, now: int) -> None:
        self.told.append(frame.message)

    def channel_lost(self, now: int) -> None:
        pass


async def filled_store(count: int) -> tuple[MemoryStore, Token, bytes, list[Authorization]]:
    """An account in which one gateway carries `count` live authorisations of one client."""
    store, at = MemoryStore(), CLOCK.utc_now()
    account = Account(id=uuid7(CLOCK, RANDOMNESS), name="acme", slug="acme", created_at=at)

    def common() -> dict[str, Any]:
        return {"id": uuid7(CLOCK, RANDOMNESS), "account_id": account.id, "created_at": at}

    def device(token: Token, number: int) -> dict[str, Any]:
        ipv4, ipv6 = account.range_ipv4[number], account.range_ipv6[number]
        assert isinstance(ipv4, IPv4Address)
        assert isinstance(ipv6, IPv6Address)
        return {**common(), "token_id": token.id, "name": "device", "ipv4": ipv4, "ipv6": ipv6}

    secret, ids = RANDOMNESS.bytes(32), common()
    user, site = Principal(**common(), name="user"), Site(**common(), name="site")
    everyone = Group(**common(), kind="everyone", name="Everyone")
    resource = Resource(**common(), site_ids=(site.id,), kind="ip", name="web", address="10.0.0.1")
    policy = Policy(
        **common(), group_id=everyone.id, resource_id=resource.id, conditions=Conditions()
    )
    token = Token(
        **ids, kind="gateway", name="gateway", site_id=site.id,
        hash=hash_token("gateway", ids["id"], secret),
    )  # fmt: skip
    users = Token(**common(), kind="client", name="user", principal_id=user.id, hash=bytes(32))
    client = Client(**device(users, 5), principal_id=user.id, device_key=bytes(32))
    gateway = Gateway(**device(token, 6), site_id=site.id, device_key=device_key_of(SEED))
    entities = (
        account, user, site, everyone, resource, policy, token, users, client,
        attrs.evolve(gateway, approved=True),
    )  # fmt: skip
    await store.apply(account.id, [Put(each) for each in entities], who="test", at=at)
    epoch = await store.acquire(account.id, **await joined(store, "portal"))
    connection_id = uuid7(CLOCK, RANDOMNESS)
    rows = [
        Authorization(
            id=uuid7(CLOCK, RANDOMNESS),
            account_id=account.id,
            policy_id=policy.id,
            client_id=client.id,
            gateway_id=gateway.id,
            resource_id=resource.id,
            token_id=users.id,
            connection_id=connection_id,
            remote_ip=IpText("192.0.2.7"),
            created_at=at,
            expires_at=at + timedelta(hours=1),
        )
        for _ in range(count)
    ]
    for row in rows:
        await store.write_authorization(row, epoch=epoch)
    return store, token, secret, rows


@asynccontextmanager
async def portal(store: MemoryStore) -> AsyncIterator[int]:
    """The actors behind a real listener on loopback; its port."""

    async def prove(address: SocketAddress, pins: tuple[str, ...]) -> bool:
        return True

    owner = await joined(store, "portal")
    scheduler = Scheduler(
        clock=CLOCK, randomness=RANDOMNESS, node="portal", incarnation=owner["incarnation"]
    )
    host = TrioHost(scheduler)
    plane = ControlPlane(
        host.scheduler,
        store,
        CLOCK,
        RANDOMNESS,
        portal_name="localhost",
        prove_address=prove,
        tenure=start_alone(scheduler, store, node_codec(), incarnation=owner["incarnation"]),
    )
    plane.start()
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        server: ChannelServer = await nursery.start(
            lambda task_status: serve_channels(
                Address("127.0.0.1", 0),
                CHAIN,
                KEY,
                plane.connected,
                portal="localhost",
                clock=CLOCK,
                randomness=RANDOMNESS,
                task_status=task_status,
            )
        )
        yield server.address.port
        nursery.cancel_scope.cancel()


async def test_a_gateway_keeps_what_its_join_had_no_room_for() -> None:
    store, token, secret, rows = await filled_store(MANY)
    held = tuple(Held(authorization_id=row.id, connection_id=row.connection_id) for row in rows)
    async with portal(store) as port, trio.open_nursery() as nursery:
        agent = HoldingGateway(token_for(port, token, secret), held)
        nursery.start_soon(dialer_of(agent, port).run)
        await until(lambda: bool(agent.told))
        nursery.cancel_scope.cancel()
    init = agent.told[0]
    assert isinstance(init, GatewayInit)
    assert {each.authorization_id for each in init.authorizations} == {row.id for row in rows}


async def test_a_copy_of_a_device_key_waits_until_the_one_that_serves_has_gone() -> None:
    store, token, secret, _ = await filled_store(0)
    async with portal(store) as port, trio.open_nursery() as nursery:
        text = token_for(port, token, secret)
        first, second = HoldingGateway(text, ()), HoldingGateway(text, ())
        serving, waiting = dialer_of(first, port), dialer_of(second, port)
        scope = trio.CancelScope()

        async def serve() -> None:
            with scope:
                await serving.run()

        nursery.start_soon(serve)
        await until(lambda: bool(first.told))
        nursery.start_soon(waiting.run)
        await until(lambda: waiting.statistics().last_error.startswith("superseded"))
        assert serving.connected
        assert not second.told
        scope.cancel()
        await until(lambda: bool(second.told))
        nursery.cancel_scope.cancel()


async def test_a_gateway_whose_older_connection_is_mute_is_taken_in() -> None:
    store, token, secret, _ = await filled_store(0)
    async with portal(store) as port, trio.open_nursery() as nursery:
        text = token_for(port, token, secret)
        first, second = HoldingGateway(text, ()), HoldingGateway(text, ())
        path = Rebinding(Address("127.0.0.1", port))
        scope = trio.CancelScope()

        async def carry() -> None:
            with scope:
                await path.run()

        nursery.start_soon(carry)
        nursery.start_soon(dialer_of(first, path.inside.local_address.port).run)
        await until(lambda: bool(first.told))
        scope.cancel()
        nursery.start_soon(dialer_of(second, port).run)
        await until(lambda: bool(second.told))
        nursery.cancel_scope.cancel()


def token_for(port: int, token: Token, secret: bytes) -> str:
    at = f"127.0.0.1:{port}"
    return encode_token("gateway", token.id, secret, at, AUTHORITY.pin).reveal_text()


def dialer_of(agent: HoldingGateway, port: int) -> Dialer:
    return Dialer(
        f"127.0.0.1:{port}",
        AUTHORITY.pin,
        TO_GATEWAY,
        agent,
        CLOCK,
        RANDOMNESS,
        on_frame=lambda: None,
    )


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not holds():
            await trio.sleep(0.02)
