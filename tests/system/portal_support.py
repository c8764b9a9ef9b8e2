"""An API on loopback for tests: the real application over a real store, behind a real door."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any
from uuid import UUID

import attrs
import httpx
import trio

from actors.messages import PresenceChanged, ResourceExposure
from actors.model import Authorization, Client, Gateway, Token, TokenKind
from actors.store.interface import Put, Store
from actors.store.memory import MemoryStore
from actors.store.postgres import Logins, PostgresStore
from actors.store.sealing import KeyRing
from channel.credentials import encode_token, hash_token
from channel.messages import IpText
from portal.api.application import create_api
from portal.api.authentication import CALLS_PER_S, Authenticator
from portal.api.frontdoor import FrontDoor
from portal.api.office import Office, Online
from portal.authority import Authority
from portal.doors import Door
from runtime.clock import Clock, SystemClock
from runtime.net.address import Address
from runtime.randomness import SystemRandomness
from runtime.secret import Secret


class Agents:
    """Who is online, as a test says; nobody at first."""

    def __init__(self) -> None:
        self.by_account: dict[UUID, dict[UUID, Online]] = {}
        self._told: list[Callable[[PresenceChanged], None]] = []

    async def online(self, account_id: UUID) -> Mapping[UUID, Online] | None:
        return dict(self.by_account.get(account_id, {}))

    async def exposed(
        self, account_id: UUID, resource_ids: tuple[UUID, ...]
    ) -> Mapping[UUID, ResourceExposure] | None:
        return {}

    async def relays_online(self) -> frozenset[UUID] | None:
        return frozenset()

    def watch(self, told: Callable[[PresenceChanged], None]) -> None:
        self._told.append(told)

    def wake_relays(self) -> None:
        pass

    def comes(self, account_id: UUID, id: UUID, number: int, remote: str = "192.0.2.7") -> None:
        online = Online(kind="client", remote_ip=remote, number=number)
        self.by_account.setdefault(account_id, {})[id] = online
        self._say(account_id, id, online, is_online=True)

    def goes(self, account_id: UUID, id: UUID) -> None:
        self._say(account_id, id, self.by_account[account_id].pop(id), is_online=False)

    def _say(self, account_id: UUID, id: UUID, online: Online, *, is_online: bool) -> None:
        change = PresenceChanged(
            account_id=account_id,
            kind=online.kind,
            id=id,
            number=online.number,
            online=is_online,
            remote=IpText(online.remote_ip),
        )
        for told in self._told:
            told(change)


@attrs.define
class Installation:
    """A running API, its operator's token, and how to call it."""

    store: Store
    door: Door
    api: FrontDoor
    agents: Agents
    office: Office
    operator_token: str
    tls: ssl.SSLContext

    def client(self, token: str | None = None, **options: Any) -> httpx.AsyncClient:
        """An HTTPS client that trusts this installation's CA alone."""
        headers = {"authorization": f"Bearer {token}"} if token else {}
        headers |= options.pop("headers", {})
        return httpx.AsyncClient(
            base_url=f"https://{self.door.address}",
            verify=self.tls,
            headers=headers,
            timeout=60,
            trust_env=False,
            **options,
        )

    async def admin_of(self, slug: str) -> tuple[str, str]:
        """A new account with an admin: the account's id and the admin's api token."""
        async with self.client(self.operator_token) as operator:
            account = (
                await operator.post("/v1/accounts", json={"name": slug.title(), "slug": slug})
            ).json()
            on_account = {"holloway-account": account["id"]}
            admin = await operator.post(
                "/v1/principals", json={"name": "Ada", "role": "admin"}, headers=on_account
            )
            token = await operator.post(
                f"/v1/accounts/{account['id']}/tokens",
                json={"kind": "api", "name": "admin", "principal_id": admin.json()["id"]},
            )
            assert token.status_code == 201, token.text
            return account["id"], token.json()["token"]

    async def insert_token(self, kind: TokenKind, **fields: Any) -> str:
        """An installation token straight into the store; its text."""
        token, text = make_token(self.office, kind, **fields)
        await self.store.put_installation_token(token)
        return text


def make_token(office: Office, kind: TokenKind, **fields: Any) -> tuple[Token, str]:
    """A token with these fields, and its text."""
    id, secret = office.new_id(), office.randomness.bytes(32)
    text = encode_token(kind, id, secret, office.portal, office.pin).reveal_text()
    scopes = ("*:write",) if kind == "api" else ()
    values: dict[str, Any] = {
        "id": id,
        "scopes": scopes,
        "account_id": None,
        "kind": kind,
        "name": kind,
        "hash": hash_token(kind, id, secret),
        "created_at": office.clock.utc_now() - timedelta(days=1),
    }
    return Token(**(values | fields)), text


@asynccontextmanager
async def installation(
    directory: Path,
    *,
    store: Store | None = None,
    clock: Clock | None = None,
    calls_per_s: float = CALLS_PER_S,
    **door: Any,
) -> AsyncIterator[Installation]:
    """Serve the API over `store` (a MemoryStore by default) for the length of the block."""
    store = store or MemoryStore()
    clock = clock or SystemClock()
    authority = Authority(directory, clock=clock, randomness=SystemRandomness())
    certificate = authority.server_certificate(["127.0.0.1"])
    agents = Agents()
    office = Office(
        store=store,
        clock=clock,
        randomness=SystemRandomness(),
        live=agents,
        portal="127.0.0.1:443",
        pin=authority.pin,
        key_ring=key_ring(),
    )
    api = create_api(office, authenticator=Authenticator(store, clock, calls_per_s=calls_per_s))
    tls = ssl.create_default_context(cadata=authority.certificate_pem.decode())
    served = Door(
        api,
        listen=Address("127.0.0.1", 0),
        certificate_chain=certificate.chain_file,
        certificate_key=certificate.key_file,
        **({"grace_time_s": 1.0} | door),
    )
    here = Installation(
        store=store,
        door=served,
        api=api,
        agents=agents,
        office=office,
        operator_token="",
        tls=tls,
    )
    here.operator_token = await here.insert_token("operator")
    async with trio.open_nursery() as nursery:
        await nursery.start(served.serve)
        async with trio.open_nursery() as behind:
            await behind.start(api.feeds.run)
            await behind.start(api.feeds.follow)
            behind.start_soon(api.journal.run)
            try:
                yield here
            finally:
                served.stop()
                api.feeds.close()
                behind.cancel_scope.cancel()


async def made(client: httpx.AsyncClient, noun: str, **fields: Any) -> dict[str, Any]:
    """What a create answered."""
    answer = await client.post(f"/v1/{noun}", json=fields)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def key_ring() -> KeyRing:
    """A key for secrets at rest, of tests alone."""
    return KeyRing({1: Secret(bytes(32))}, SystemRandomness())


async def world(here: Installation, client: httpx.AsyncClient) -> dict[str, str]:
    """One entity of every noun in the client's account: ids by noun."""
    user = await made(client, "principals", name="Uwe", email="uwe@example.org")
    group = await made(client, "groups", name="Staff")
    membership = await made(client, "memberships", group_id=group["id"], principal_id=user["id"])
    site = await made(client, "sites", name="Berlin")
    resource = await made(
        client,
        "resources",
        site_ids=[site["id"]],
        name="Intranet",
        kind="cidr",
        address="10.1.0.0/16",
    )
    provider = await made(
        client,
        "auth_providers",
        kind="oidc",
        name="Keycloak",
        issuer="https://id.example.org",
        client_id="holloway",
    )
    identity = await made(
        client,
        "identities",
        principal_id=user["id"],
        auth_provider_id=provider["id"],
        subject="uwe",
    )
    directory = await made(client, "directories", kind="scim", name="Staff")
    policy = await made(client, "policies", group_id=group["id"], resource_id=resource["id"])
    policy_test = await made(
        client,
        "policy_tests",
        name="Nora does not reach the intranet",
        principal_id=(await made(client, "principals", name="Nora"))["id"],
        resource_id=resource["id"],
        expected="denied",
    )
    token = await made(client, "tokens", kind="client", name="laptop", principal_id=user["id"])
    gateway_token = await made(client, "tokens", kind="gateway", name="gw", site_id=site["id"])
    account_id = UUID(site["account_id"])
    now = here.office.clock.utc_now()
    device = Client(
        id=here.office.new_id(),
        account_id=account_id,
        principal_id=UUID(user["id"]),
        token_id=UUID(token["id"]),
        device_key=bytes(31) + b"c",
        name="laptop",
        ipv4=IPv4Address("100.64.0.2"),
        ipv6=IPv6Address("fd48:4c57:5900::2"),
        created_at=now,
    )
    gateway = Gateway(
        id=here.office.new_id(),
        account_id=account_id,
        site_id=UUID(site["id"]),
        token_id=UUID(gateway_token["id"]),
        device_key=bytes(31) + b"g",
        name="gw-1",
        ipv4=IPv4Address("100.64.0.3"),
        ipv6=IPv6Address("fd48:4c57:5900::3"),
        approved=False,
        created_at=now,
    )
    await here.store.apply(account_id, [Put(device), Put(gateway)], who="test", at=now)
    return {
        "principals": user["id"],
        "groups": group["id"],
        "memberships": membership["id"],
        "auth_providers": provider["id"],
        "identities": identity["id"],
        "directories": directory["id"],
        "policy_tests": policy_test["id"],
        "sites": site["id"],
        "resources": resource["id"],
        "policies": policy["id"],
        "tokens": token["id"],
        "clients": str(device.id),
        "gateways": str(gateway.id),
    }


@asynccontextmanager
async def two_nodes(directory: Path, database: Logins) -> AsyncIterator[list[Installation]]:
    """Two of them on one PostgreSQL."""
    async with AsyncExitStack() as stack:
        nodes = []
        for name in "ab":
            store = await stack.enter_async_context(PostgresStore.open(database, migrated=True))
            here = installation(directory / name, store=store)
            nodes.append(await stack.enter_async_context(here))
        yield nodes


async def access(
    here: Installation,
    account_id: UUID,
    ids: Mapping[str, str],
    *,
    lasts: timedelta = timedelta(0),
) -> str:
    """An authorisation that was given just now, over the things of `world`."""
    now = here.office.clock.utc_now()
    given = Authorization(
        id=here.office.new_id(),
        account_id=account_id,
        policy_id=UUID(ids["policies"]),
        client_id=UUID(ids["clients"]),
        gateway_id=UUID(ids["gateways"]),
        resource_id=UUID(ids["resources"]),
        token_id=UUID(ids["tokens"]),
        connection_id=here.office.new_id(),
        remote_ip=IpText("192.0.2.1"),
        created_at=now,
        expires_at=now + lasts,
    )
    owner = str(given.id)
    incarnation = await here.store.join_node(
        owner, link_address="a:1", door_address="a:2", version="1", ttl_ns=10**10
    )
    epoch = await here.store.acquire(account_id, owner=owner, incarnation=incarnation)
    await here.store.write_authorization(given, epoch=epoch)
    return owner
