"""A portal whose PostgreSQL is killed again and again, hangs on its disk, or has a full one.

Meanwhile admins make, rename and delete sites through the API, and a client has access to a
resource by a gateway, both on real channels. What holds, whatever happens to the database:

- every call is answered: by a success, or by 503 with a code and `Retry-After`;
- what was answered by a success is there afterwards, and the changes have no gap;
- no agent loses its channel or anything that it was granted;
- when the database is back, all goes on by itself, and changes reach the agents.

HOLLOWAY_DATABASE_FAULTS=n makes everything n times as long (`make soak`): the outage lasts a minute
with 6.
"""

from __future__ import annotations

import json
import os
import random
import signal
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final
from uuid import UUID

import attrs
import httpx
import psycopg
import pytest
import trio

from channel.messages import AuthorizationCreated
from tests.system.admin_load import Admin, Record
from tests.system.faulty_postgres import FaultyServer, SmallDisk
from tests.system.light_agents import LightClient, LightGateway
from tests.system.postgres_support import own_directory
from tests.system.test_portal_node import Portal, account_of, all_of, free_port, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

TIMES: Final = int(os.environ.get("HOLLOWAY_DATABASE_FAULTS", "1"))
ADMINS: Final = 16
ACCOUNTS: Final = 12
"""More, both of them, than the portal has connections to its database. The last has the agents."""
OUTAGE_S: Final = 10 * TIMES
"""The longest: more than a lease of the node and the patience of an operation."""
DISK_BYTES: Final = 96 << 20


async def made(client: httpx.AsyncClient, noun: str, **fields: Any) -> dict[str, Any]:
    answer = await client.post(f"/v1/{noun}", json=fields)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


@attrs.define
class World:
    """What runs, and what is known of it."""

    portal: Portal
    operator: httpx.AsyncClient
    account_ids: list[UUID]
    policy_id: str
    resource_id: UUID
    record: Record
    client: LightClient
    gateway: LightGateway
    observability: str
    admins: trio.CancelScope

    async def goes_on(self) -> None:
        """Wait until some more calls were acknowledged, of each admin perhaps one."""
        target = self.record.acknowledged + ADMINS

        async def has_gone_on() -> bool:
            return self.record.acknowledged >= target

        await until(has_gone_on)

    async def refuses(self, code: str) -> None:
        """Wait until some more calls were refused for this reason."""
        target = self.record.codes[code] + ADMINS

        async def has_refused() -> bool:
            return self.record.codes[code] >= target

        await until(has_refused)

    async def says_that_storage_is_full(self) -> bool:
        """Whether the portal, which is ready to serve what can be served, says so."""
        async with httpx.AsyncClient(trust_env=False) as client:
            ready = await client.get(f"http://{self.observability}/readyz")
            metrics = await client.get(f"http://{self.observability}/metrics")
        assert ready.status_code == 200, ready.text
        is_full: bool = "is full" in ready.json()["checks"]["database"]["detail"]
        return is_full and "holloway_storage_full 1.0" in metrics.text

    async def reads(self) -> None:
        """What only reads is answered."""
        answer = await self.operator.get("/v1/policies")
        assert answer.status_code == 200, answer.text
        assert [each["id"] for each in answer.json()["items"]] == [self.policy_id]

    def keeps(self) -> None:
        """The agents have lost nothing."""
        for agent in (self.client, self.gateway):
            assert agent.losses == 0
            assert agent.dialer.connected
            assert agent.cut == {}
        assert self.client.held == self.gateway.held
        assert len(self.client.held) == 1

    async def is_whole(self) -> None:
        """End the load, and see that nothing acknowledged is lost and all works."""
        self.admins.cancel()
        assert self.record.unanswered == 0
        await until(self.portal.is_ready)
        async with self.portal.client() as self.operator:  # the other may be closed for idleness
            await self._nothing_is_lost()
            self.keeps()
            await self._changes_reach_agents()
        assert "Traceback" not in self.portal.log
        print("\n", self.record.acknowledged, "acknowledged;", dict(self.record.codes))

    async def _nothing_is_lost(self) -> None:
        sites = {}
        for account_id in self.account_ids:
            self.operator.headers["holloway-account"] = str(account_id)
            sites |= {
                UUID(each["id"]): each["name"] for each in await all_of(self.operator, "sites")
            }
            numbers = [each["number"] for each in await all_of(self.operator, "changes")]
            assert numbers == list(range(1, len(numbers) + 1))
        for id, site in self.record.site_by_id.items():
            # A call that was cancelled by the end of the load may have been carried out or not.
            if site.calls % 2 == 0:
                assert sites.get(id) in {site.acknowledged, *site.in_doubt}, site

    async def _changes_reach_agents(self) -> None:
        path = f"/v1/policies/{self.policy_id}"
        for disabled in (True, False):
            answer = await self.operator.patch(path, json={"disabled": disabled})
            assert answer.status_code == 200, answer.text
            if disabled:
                await until(self._have_nothing)
        await until(self._is_granted)  # the account's actor hears of the change after the admin

    async def _is_granted(self) -> bool:
        return isinstance(await self.client.ask(self.resource_id), AuthorizationCreated)

    async def _have_nothing(self) -> bool:
        return not self.client.held and not self.gateway.held


@asynccontextmanager
async def world(portal: Portal, **settings: str) -> AsyncIterator[World]:
    """All of it, with the load under way and access granted."""
    observability = f"127.0.0.1:{free_port()}"
    try:
        await portal.start(HOLLOWAY_PORTAL_OBSERVABILITY=observability, **settings)
        async with portal.client() as operator, trio.open_nursery() as nursery:
            yield await _populated(portal, operator, observability, nursery)
            nursery.cancel_scope.cancel()
    finally:
        if portal.process is not None:
            with trio.CancelScope(shield=True):
                await portal.end()


async def _populated(
    portal: Portal,
    operator: httpx.AsyncClient,
    observability: str,
    nursery: trio.Nursery,
) -> World:
    account_ids = [UUID(await account_of(operator, f"account-{n}")) for n in range(ACCOUNTS)]
    site = await made(operator, "sites", name="Berlin")
    resource = await made(
        operator, "resources", name="r", site_ids=[site["id"]], kind="cidr", address="10.0.0.0/8"
    )
    group = await made(operator, "groups", name="Staff")
    policy = await made(operator, "policies", group_id=group["id"], resource_id=resource["id"])
    user = await made(operator, "principals", name="Uwe")
    await made(operator, "memberships", group_id=group["id"], principal_id=user["id"])
    of_gateway = await made(operator, "tokens", kind="gateway", name="g", site_id=site["id"])
    of_client = await made(operator, "tokens", kind="client", name="c", principal_id=user["id"])
    gateway = LightGateway(of_gateway["token"], "gw")
    client = LightClient(of_client["token"], "laptop")
    resource_id = UUID(resource["id"])
    for agent in (gateway, client):
        nursery.start_soon(agent.dialer.run)

        async def is_in(agent: LightGateway | LightClient = agent) -> bool:
            return agent.joins > 0

        await until(is_in)
    assert isinstance(await client.ask(resource_id), AuthorizationCreated)
    record, admins = Record(), trio.CancelScope()
    it = World(
        portal=portal,
        operator=operator,
        account_ids=account_ids,
        policy_id=policy["id"],
        resource_id=resource_id,
        record=record,
        client=client,
        gateway=gateway,
        observability=observability,
        admins=admins,
    )
    # One for each, since a token is good for 50 calls a second.
    tokens = [await made(operator, "tokens", kind="operator", name="load") for _ in range(ADMINS)]
    nursery.start_soon(_load, it, [each["token"] for each in tokens])
    await it.goes_on()
    it.keeps()
    return it


async def _load(it: World, tokens: list[str]) -> None:
    tls = ssl.create_default_context(cafile=it.portal.state / "ca.pem")
    accounts, doors = it.account_ids, {"portal": f"127.0.0.1:{it.portal.port}"}
    with it.admins:
        async with trio.open_nursery() as nursery:
            for number, token in enumerate(tokens):
                admin = Admin(f"a{number}", it.record, token, tls, accounts, partial(dict, doors))
                nursery.start_soon(admin.run)


in_thread: Callable[[Callable[[], Any]], Awaitable[Any]] = trio.to_thread.run_sync


async def test_a_postgresql_that_is_killed_again_and_again_costs_a_503_and_nothing_else() -> None:
    with own_directory("killed") as directory, FaultyServer(directory / "postgres") as server:
        async with world(Portal(directory), DATABASE_URL=server.url) as it:
            for pause_s in (0.0, 2.0, OUTAGE_S, *[0.5] * (2 * TIMES - 1)):
                await trio.sleep(random.uniform(0.2, 2.0))
                await in_thread(server.kill)
                if pause_s:
                    await trio.sleep(pause_s)
                    it.keeps()
                await in_thread(server.start)
                await it.goes_on()
                it.keeps()
            for _ in range(3 * TIMES):
                await trio.sleep(random.uniform(0.2, 1.0))
                await in_thread(server.kill_a_backend)
                await it.goes_on()
            assert it.record.codes.keys() == {"unavailable"}
            await it.is_whole()


async def test_a_slow_disk_makes_writing_slow_and_one_that_hangs_stops_only_that() -> None:
    with own_directory("slow") as directory, FaultyServer(directory / "postgres") as server:
        async with world(Portal(directory), DATABASE_URL=server.url) as it:
            server.slow.latency_s = 0.2
            waited = server.slow.calls
            for _ in range(2 * TIMES):
                await it.goes_on()
                await it.reads()
            assert server.slow.calls > waited, "the disk was asked for, and was slow"
            it.keeps()
            for _ in range(TIMES):
                server.slow.hangs = True
                await it.refuses("unavailable")
                for _ in range(10 * TIMES):
                    await it.reads()
                    await trio.sleep(0.5)
                it.keeps()
                server.slow.hangs = False
                await it.goes_on()
            server.slow.latency_s = 0.0
            await it.goes_on()
            await it.is_whole()


async def test_a_full_disk_stops_writing_until_there_is_room_and_is_named() -> None:
    with (
        own_directory("full") as directory,
        FaultyServer(directory / "postgres", disk_bytes=DISK_BYTES) as server,
    ):
        assert server.small is not None
        async with world(Portal(directory), DATABASE_URL=server.url) as it:
            for _ in range(TIMES):
                await in_thread(server.small.fill)
                await it.refuses("storage_full")
                for _ in range(5):
                    await it.reads()
                it.keeps()
                await until(it.says_that_storage_is_full)
                server.small.make_room()
                await it.goes_on()
            await it.is_whole()
            assert "database_storage_full" in it.portal.log


async def test_a_disk_without_room_for_its_log_ends_postgresql_and_loses_nothing() -> None:
    with (
        own_directory("no-wal") as directory,
        FaultyServer(directory / "postgres", disk_bytes=DISK_BYTES) as server,
    ):
        assert server.small is not None
        async with world(Portal(directory), DATABASE_URL=server.url) as it:
            await in_thread(server.small.fill)

            async def ends_for_want_of_a_segment() -> bool:
                with suppress(psycopg.Error):
                    await in_thread(partial(server.administer, "SELECT pg_switch_wal()"))
                return server.ended()

            async def has_ended() -> bool:
                return server.ended()

            await until(ends_for_want_of_a_segment)
            await in_thread(server.spawn)  # as the service manager of its machine does
            await until(has_ended)
            await it.refuses("unavailable")
            it.keeps()
            server.small.make_room()
            await in_thread(server.start)
            await it.goes_on()
            await it.is_whole()


async def test_an_embedded_postgresql_that_dies_on_a_full_disk_is_back_when_there_is_room() -> None:
    with own_directory("embedded") as directory:
        portal = Portal(directory)
        database = portal.state / "database"
        database.mkdir(parents=True)
        with SmallDisk(database, DISK_BYTES) as disk:
            portal.within = disk.command()
            async with world(portal) as it:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_keep_full, disk)
                    await it.refuses("storage_full")

                    async def cannot_start() -> bool:
                        with suppress(OSError, ValueError, IndexError):
                            pid = int((disk.root / "data/postmaster.pid").read_text().split()[0])
                            os.kill(pid, signal.SIGKILL)
                        lines = map(json.loads, portal.log.splitlines())
                        failed = [e for e in lines if e["event"] == "postgres_restart_failed"]
                        return any(each["disk_free_bytes"] == 0 for each in failed)

                    await until(cannot_start)
                    it.keeps()
                    nursery.cancel_scope.cancel()
                await in_thread(disk.make_room)
                await it.goes_on()
                await it.is_whole()


async def _keep_full(disk: SmallDisk) -> None:
    """Take at once what is given back."""
    while True:
        await in_thread(disk.fill)
        await trio.sleep(0.01)
