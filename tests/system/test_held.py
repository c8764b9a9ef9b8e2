"""A gateway with thousands of live authorisations joins over real QUIC, and keeps them all."""

from __future__ import annotations

from collections.abc import AsyncIterator
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
from runtime.host import TrioHost
from runtime.net.address import Address
from runtime.randomness import SystemRandomness, uuid7
from runtime.scheduler import Scheduler
from tests.unit.channel.certificates import Authority

pytestmark = pytest.mark.system

AUTHORITY = Authority("installation")
CHAIN, KEY = AUTHORITY.issue_pem("localhost", "127.0.0.1")
CLOCK, RANDOMNESS = SystemClock(), SystemRandomness()
PATIENCE_S = 60.0
MANY = 5_000
SEED, TUNNEL_KEY = RANDOMNESS.bytes(32), RANDOMNESS.bytes(32)


class HoldingGateway:
    """A `ChannelAgent` with a real device key, that holds what it is given."""

    def __init__(self, token: str, held: tuple[Held, ...]) -> None:
        self._token = token
        self._held = held
        self.told: list[object] = []

    def join(self, challenge: Challenge, now: int) -> Join:
        token_id = decode_token(self._token).id
        statement = join_statement(challenge.nonce, challenge.portal, token_id, TUNNEL_KEY)
        return Join(
            kind="gateway",
            token=self._token,
            device_key=device_key_of(SEED),
            signature=sign_join(SEED, statement),
            tunnel_key=TUNNEL_KEY,
            name="gateway",
            incarnation=now,
            held=self._held,
        )

    def receive(self, frame: Frame, now: int) -> None:
        self.told.append(frame.message)

    def channel_lost(self, now: int) -> None:
        pass


async def filled_store() -> tuple[MemoryStore, Token, bytes, list[Authorization]]:
    """An account in which one gateway carries MANY live authorisations of one client."""
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
    resource = Resource(**common(), site_id=site.id, kind="ip", name="web", address="10.0.0.1")
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
    epoch = await store.acquire(account.id, owner="before")
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
        for _ in range(MANY)
    ]
    for row in rows:
        await store.write_authorization(row, epoch=epoch)
    return store, token, secret, rows


@asynccontextmanager
async def portal(store: MemoryStore) -> AsyncIterator[int]:
    """The actors behind a real listener on loopback; its port."""

    async def prove(address: SocketAddress) -> bool:
        return True

    host = TrioHost(Scheduler(clock=CLOCK, randomness=RANDOMNESS))
    plane = ControlPlane(
        host.scheduler, store, CLOCK, RANDOMNESS, portal_name="localhost", prove_address=prove
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
    store, token, secret, rows = await filled_store()
    held = tuple(Held(authorization_id=row.id, connection_id=row.connection_id) for row in rows)
    async with portal(store) as port, trio.open_nursery() as nursery:
        at = f"127.0.0.1:{port}"
        text = encode_token("gateway", token.id, secret, at, AUTHORITY.pin).reveal_text()
        agent = HoldingGateway(text, held)
        dialer = Dialer(
            at, AUTHORITY.pin, TO_GATEWAY, agent, CLOCK, RANDOMNESS, on_frame=lambda: None
        )
        nursery.start_soon(dialer.run)
        with trio.fail_after(PATIENCE_S):
            while not agent.told:
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    init = agent.told[0]
    assert isinstance(init, GatewayInit)
    assert {each.authorization_id for each in init.authorizations} == {row.id for row in rows}
