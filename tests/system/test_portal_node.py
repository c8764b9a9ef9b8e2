"""A whole portal as a process of its own: its first start, its ends, and what it survives."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import trio

from actors.store.embedded import EmbeddedPostgres
from actors.store.postgres import PostgresStore
from channel.credentials import (
    decode_token,
    device_key_of,
    join_statement,
    sign_join,
)
from channel.dialer import Dialer, Refused
from channel.frames import Frame
from channel.messages import TO_GATEWAY, Challenge, Disconnect, GatewayInit, Join, RelayJoin
from runtime.clock import SystemClock
from runtime.randomness import SystemRandomness
from tests.nodes import joined
from tests.ports import free_port
from tests.system.postgres_support import own_directory

pytestmark = pytest.mark.system

PATIENCE_S = 60.0
"""A deadline for what must happen at all; nothing is judged by it."""


class PatientClient(httpx.AsyncClient):
    """Waits and asks again where it makes more calls than a token may, as a program should."""

    async def request(self, *arguments: Any, **keywords: Any) -> httpx.Response:
        while True:
            answer = await super().request(*arguments, **keywords)
            if answer.status_code != 429:
                return answer
            await trio.sleep(float(answer.headers["retry-after"]))


@attrs.define
class Portal:
    """`holloway portal` in a process, with the state directory that outlives it."""

    directory: Path
    port: int = attrs.Factory(free_port)
    process: subprocess.Popen[bytes] | None = None
    within: list[str] = attrs.Factory(list)
    """A command that runs it, in a namespace for instance."""

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def spawn(self, **settings: str) -> None:
        environment = {
            "PATH": os.environ["PATH"],
            "HOLLOWAY_PORTAL_STATE_DIR": str(self.state),
            "HOLLOWAY_PORTAL_LISTEN": f"127.0.0.1:{self.port}",
            "HOLLOWAY_PORTAL_API_LISTEN": f"127.0.0.1:{self.port}",
            "HOLLOWAY_PORTAL_OBSERVABILITY": "",
            "HOLLOWAY_PORTAL_LOG_FORMAT": "json",
            **settings,
        }
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.within, sys.executable, "-m", "holloway", "portal"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def start(self, **settings: str) -> None:
        """Start and wait until it is ready."""
        self.spawn(**settings)
        await until(self.is_ready)

    async def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log
        if not (self.state / "ca.pem").exists() or not (self.state / "operator-token").exists():
            return False
        try:
            async with self.client("") as client:
                return (await client.get("/readyz")).status_code == 200
        except httpx.TransportError:
            return False

    async def end(self, sign: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the process; its exit status."""
        process, self.process = self.process, None
        assert process is not None
        process.send_signal(sign)
        return await trio.to_thread.run_sync(process.wait)

    @property
    def operator_token(self) -> str:
        return (self.state / "operator-token").read_text().strip()

    @property
    def postgres_id(self) -> int:
        """The process id of the embedded PostgreSQL."""
        pid_file = self.state / "database" / "data" / "postmaster.pid"
        return int(pid_file.read_text().split("\n", 1)[0])

    def client(self, token: str | None = None) -> httpx.AsyncClient:
        tls = ssl.create_default_context(cafile=self.state / "ca.pem")
        token = self.operator_token if token is None else token
        return PatientClient(
            base_url=f"https://127.0.0.1:{self.port}",
            verify=tls,
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=60,
            trust_env=False,
        )


@asynccontextmanager
async def portal() -> AsyncIterator[Portal]:
    """A portal that is ready, and gone after the block."""
    with own_directory("portal") as directory:
        here = Portal(directory)
        try:
            await here.start()
            yield here
        finally:
            if here.process is not None:
                with trio.CancelScope(shield=True):
                    await here.end()


async def until(holds: Callable[[], Awaitable[Any]]) -> Any:
    """Wait for something true, and return it."""
    with trio.fail_after(PATIENCE_S):
        while not (value := await holds()):
            await trio.sleep(0.05)
    return value


async def account_of(client: httpx.AsyncClient, slug: str = "acme") -> str:
    """A new account on which the client acts from now on."""
    made = await client.post("/v1/accounts", json={"name": slug, "slug": slug})
    assert made.status_code == 201, made.text
    client.headers["holloway-account"] = made.json()["id"]
    return str(made.json()["id"])


async def all_of(client: httpx.AsyncClient, noun: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = (await client.get(f"/v1/{noun}?limit=1000{cursor}")).json()
        found += page["items"]
        if page["next_cursor"] is None:
            return found
        cursor = f"&cursor={page['next_cursor']}"


class Writer:
    """Makes sites one after the other and remembers what was acknowledged.

    Whatever is not acknowledged (503, a broken connection) is tried again under its name, so a
    name may turn out to be taken by an attempt whose answer was lost.
    """

    def __init__(self, here: Portal, account_id: str, prefix: str) -> None:
        self.here = here
        self.account_id = account_id
        self.prefix = prefix
        self.acknowledged: dict[str, str] = {}
        self.unanswered = 0

    async def run(self) -> None:
        number = 0
        while True:
            try:
                async with self.here.client() as client:
                    client.headers["holloway-account"] = self.account_id
                    while True:
                        name = f"{self.prefix}{number}"
                        answer = await client.post("/v1/sites", json={"name": name})
                        if answer.status_code == 201:
                            self.acknowledged[answer.json()["id"]] = name
                        if answer.status_code in (201, 409):
                            number += 1
                            continue
                        assert answer.status_code in (429, 503), answer.text
                        self.unanswered += answer.status_code == 503
                        await trio.sleep(0.1)
            except (httpx.TransportError, ssl.SSLError):
                self.unanswered += 1
                await trio.sleep(0.1)

    async def write_more(self, count: int) -> None:
        """Wait until `count` more are acknowledged."""
        target = len(self.acknowledged) + count

        async def has_written() -> bool:
            return len(self.acknowledged) >= target

        await until(has_written)


async def test_a_first_start_leaves_a_token_by_which_everything_can_be_made() -> None:
    async with portal() as here:
        assert (here.state / "operator-token").stat().st_mode & 0o777 == 0o600
        decoded = decode_token(here.operator_token)
        assert decoded.kind == "operator"
        assert decoded.portal == f"127.0.0.1:{here.port}"
        async with here.client() as client:
            await account_of(client)
            site = (await client.post("/v1/sites", json={"name": "Berlin"})).json()
            resource = await client.post(
                "/v1/resources",
                json={
                    "name": "r",
                    "site_ids": [site["id"]],
                    "kind": "cidr",
                    "address": "10.0.0.0/8",
                },
            )
            group = await client.post("/v1/groups", json={"name": "Staff"})
            policy = await client.post(
                "/v1/policies",
                json={"group_id": group.json()["id"], "resource_id": resource.json()["id"]},
            )
            user = await client.post("/v1/principals", json={"name": "Uwe"})
            asked = {"principal_id": user.json()["id"], "resource_id": resource.json()["id"]}
            explained = (await client.post("/v1/policies/explain", json=asked)).json()
            assert (explained["allowed"], explained["violated"]) == (False, ["policy"])
            made = {"group_id": group.json()["id"], "principal_id": user.json()["id"]}
            assert (await client.post("/v1/memberships", json=made)).status_code == 201
            explained = (await client.post("/v1/policies/explain", json=asked)).json()
            assert (explained["allowed"], explained["policy_id"]) == (True, policy.json()["id"])
            again = await client.post("/v1/sites", json={"name": "Berlin"})
            assert again.status_code == 409
            assert [error["field"] for error in again.json()["errors"]] == ["name"]
            changes = await all_of(client, "changes")
            assert [each["number"] for each in changes] == list(range(1, len(changes) + 1))
        assert await here.end() == 0
        events = [json.loads(line)["event"] for line in here.log.splitlines()]
        assert events[-1] == "ended"
        assert "draining" in events
        assert "hlw_" not in here.log


async def test_a_second_start_finds_everything_and_brings_no_deleted_token_back() -> None:
    async with portal() as here:
        token, pin = here.operator_token, (here.state / "ca.pem").read_bytes()
        async with here.client() as client:
            await account_of(client)
            before = await all_of(client, "accounts")
        assert await here.end() == 0
        (here.state / "operator-token").unlink()
        here.spawn()

        async def answers() -> bool:
            try:
                async with here.client(token) as client:
                    return (await client.get("/readyz")).status_code == 200
            except httpx.TransportError:
                return False

        await until(answers)
        assert not (here.state / "operator-token").exists()
        assert (here.state / "ca.pem").read_bytes() == pin
        async with here.client(token) as client:
            assert await all_of(client, "accounts") == before


async def test_a_killed_postgresql_comes_back_and_nothing_acknowledged_is_lost() -> None:
    async with portal() as here:
        assert here.process is not None
        process_id = here.process.pid
        async with here.client() as client:
            account_id = await account_of(client)
            writer = Writer(here, account_id, "a")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writer.run)
                for _ in range(2):
                    await writer.write_more(10)
                    killed = here.postgres_id
                    os.kill(killed, signal.SIGKILL)

                    async def restarted(killed: int = killed) -> bool:
                        try:
                            return here.postgres_id != killed
                        except (OSError, ValueError):
                            return False

                    await until(restarted)
                    await writer.write_more(10)
                nursery.cancel_scope.cancel()
            await until(here.is_ready)
            sites = {site["id"]: site["name"] for site in await all_of(client, "sites")}
            assert writer.acknowledged.items() <= sites.items()
            changes = await all_of(client, "changes")
            assert [each["number"] for each in changes] == list(range(1, len(changes) + 1))
        assert here.process.pid == process_id


async def test_a_killed_portal_starts_again_and_nothing_acknowledged_is_lost() -> None:
    async with portal() as here:
        async with here.client() as client:
            account_id = await account_of(client)
        writers = [Writer(here, account_id, prefix) for prefix in "ab"]
        async with trio.open_nursery() as nursery:
            for writer in writers:
                nursery.start_soon(writer.run)
            for _ in range(2):
                for writer in writers:
                    await writer.write_more(10)
                assert await here.end(signal.SIGKILL) == -signal.SIGKILL
                await here.start()
            for writer in writers:
                await writer.write_more(10)
            nursery.cancel_scope.cancel()
        assert all(writer.unanswered for writer in writers)
        async with here.client() as client:
            client.headers["holloway-account"] = account_id
            sites = {site["id"]: site["name"] for site in await all_of(client, "sites")}
            for writer in writers:
                assert writer.acknowledged.items() <= sites.items()


async def test_a_portal_is_a_node_that_renews_its_lease_and_ends_when_its_place_is_taken() -> None:
    async with portal() as here:
        logins = EmbeddedPostgres(here.state / "database").logins()
        async with PostgresStore.open(logins, migrated=True) as store:
            (first,) = await store.nodes()
            assert first.name == "portal"

            remaining_ns = [first.remaining_ns]

            async def renewed() -> bool:
                (row,) = await store.nodes()
                remaining_ns.append(row.remaining_ns)
                return remaining_ns[-1] > remaining_ns[-2]

            await until(renewed)
            assert await here.end(signal.SIGKILL) == -signal.SIGKILL
            await here.start()
            (second,) = await store.nodes()
            assert (second.name, second.incarnation) == ("portal", first.incarnation + 1)
            assert second.remaining_ns > 0
            await joined(store, "portal")
            process, here.process = here.process, None
            assert process is not None
            assert await trio.to_thread.run_sync(process.wait) == 1
        assert "was superseded" in here.log
        assert "Traceback" not in here.log
        await here.start()


class PlainGateway:
    """The least agent that can join as a gateway, and remembers what it was told."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.seed = SystemRandomness().bytes(32)
        self.inits: list[GatewayInit] = []
        self.losses = 0

    def join(self, challenge: Challenge, now: int) -> Join | RelayJoin:
        tunnel_key = bytes(32)
        token_id = decode_token(self.token).id
        statement = join_statement(challenge.nonce, challenge.portal, token_id, tunnel_key)
        return Join(
            kind="gateway",
            token=self.token,
            device_key=device_key_of(self.seed),
            signature=sign_join(self.seed, statement),
            tunnel_key=tunnel_key,
            name="gw-1",
            incarnation=now,
        )

    def receive(self, frame: Frame, now: int) -> None:
        if isinstance(frame.message, GatewayInit):
            self.inits.append(frame.message)
        assert not isinstance(frame.message, Disconnect)

    def channel_lost(self, now: int) -> None:
        self.losses += 1


async def test_an_agent_with_nothing_but_its_token_joins_and_is_seen_and_sent_away() -> None:
    async with portal() as here, here.client() as client:
        await account_of(client)
        site = (await client.post("/v1/sites", json={"name": "Berlin"})).json()
        made = await client.post(
            "/v1/tokens", json={"kind": "gateway", "name": "gw", "site_id": site["id"]}
        )
        agent = PlainGateway(made.json()["token"])
        decoded = decode_token(agent.token)
        dialer = Dialer(
            portal=decoded.portal,
            pin=decoded.pin,
            events=TO_GATEWAY,
            agent=agent,
            clock=SystemClock(),
            randomness=SystemRandomness(),
            on_frame=lambda: None,
        )

        async def online() -> list[dict[str, Any]]:
            return [each for each in await all_of(client, "gateways") if each["online"]]

        refused = trio.Event()

        async def run_agent() -> None:
            with pytest.raises(Refused, match="invalid_token"):
                await dialer.run()
            refused.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_agent)
            (gateway,) = await until(online)
            assert gateway["site_id"] == site["id"]
            assert gateway["remote_ip"] == "127.0.0.1"
            assert str(agent.inits[0].gateway_id) == gateway["id"]
            assert (await client.delete(f"/v1/sites/{site['id']}")).status_code == 204
            with trio.fail_after(PATIENCE_S):
                await refused.wait()  # its token went with the site
            assert agent.losses == 1
            assert await online() == []


async def test_bad_settings_end_with_a_sentence(tmp_path: Path) -> None:
    for settings, words in [
        ({"HOLLOWAY_PORTAL_LISTEN": "nowhere"}, "listen"),
        ({"HOLLOWAY_PORTAL_ADDRESS": "a b:1"}, "address"),
        ({"HOLLOWAY_PORTAL_API_CONNECTIONS": "0"}, "api_connections"),
        ({"HOLLOWAY_PORTAL_DATABASE_URL_FILE": str(tmp_path / "none")}, "none"),
    ]:
        here = Portal(tmp_path)
        here.spawn(**settings)
        assert here.process is not None
        status = await trio.to_thread.run_sync(here.process.wait)
        assert status == 1, settings
        last = here.log.splitlines()[-1]
        assert last.startswith("holloway portal: ")
        assert words in last
        assert "Traceback" not in here.log


async def test_a_database_that_is_away_at_the_start_is_waited_for_and_never_shown() -> None:
    with own_directory("waiting") as directory:
        here = Portal(directory)
        observability = f"127.0.0.1:{free_port()}"
        here.spawn(
            DATABASE_URL=f"postgresql://holloway:hunter2@127.0.0.1:{free_port()}/holloway",
            HOLLOWAY_PORTAL_OBSERVABILITY=observability,
        )
        assert here.process is not None

        async def is_waiting() -> bool:
            try:
                async with httpx.AsyncClient(trust_env=False) as client:
                    answer = await client.get(f"http://{observability}/readyz")
            except httpx.TransportError:
                return False
            assert answer.status_code == 503
            return "cannot be reached" in answer.text

        await until(is_waiting)
        assert here.process.poll() is None
        assert not (here.state / "operator-token").exists()
        assert await here.end() == 0
        assert "database_unavailable" in here.log
        assert "hunter2" not in here.log
