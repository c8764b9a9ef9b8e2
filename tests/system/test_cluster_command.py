"""`holloway portal --nodes 2` and `holloway cluster`, as an operator runs them, with agents."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import attrs
import httpx
import pytest
import trio

from channel.messages import AuthorizationCreated
from runtime.hosting.own_directory import LOCK, PREFIX
from tests.ports import free_ports
from tests.system.light_agents import LightClient, LightGateway
from tests.system.postgres_support import own_directory
from tests.system.test_portal_node import Portal, account_of, portal, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

ACCOUNTS = 6


async def holloway(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [sys.executable, "-m", "holloway", *map(str, argv)]
    return await trio.to_thread.run_sync(
        lambda: subprocess.run(command, capture_output=True, text=True, timeout=200)
    )


async def nodes_of(state: Path) -> dict[str, dict[str, Any]]:
    done = await holloway("cluster", "status", "--state-dir", state, "-o", "json")
    assert done.returncode == 0, done.stderr
    return {each["name"]: each for each in json.loads(done.stdout)["nodes"]}


@asynccontextmanager
async def two_nodes() -> AsyncIterator[Portal]:
    with own_directory("nodes") as directory:
        here = Portal(directory, free_ports(3))
        try:
            await here.start(
                HOLLOWAY_PORTAL_NODES="2", HOLLOWAY_PORTAL_ADDRESS=f"127.0.0.1:{here.port}"
            )
            yield here
        finally:
            if here.process is not None:
                with trio.CancelScope(shield=True):
                    await here.end()


@attrs.frozen
class Pair:
    """The two agents of an account, and what the client asks for."""

    client: LightClient
    gateway: LightGateway
    resource_id: UUID

    async def is_granted(self) -> bool:
        return isinstance(await self.client.ask(self.resource_id), AuthorizationCreated)


async def pair_of(client: httpx.AsyncClient, slug: str) -> Pair:
    """The two agents of a new account."""

    async def made(noun: str, **fields: Any) -> dict[str, Any]:
        answer = await client.post(f"/v1/{noun}", json=fields)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    await account_of(client, slug)
    site = await made("sites", name="Berlin")
    resource = await made(
        "resources", name="r", site_ids=[site["id"]], kind="cidr", address="10.0.0.0/8"
    )
    group = await made("groups", name="Staff")
    await made("policies", group_id=group["id"], resource_id=resource["id"])
    user = await made("principals", name="Uwe")
    await made("memberships", group_id=group["id"], principal_id=user["id"])
    tokens = [
        (await made("tokens", kind="client", name="c", principal_id=user["id"]))["token"],
        (await made("tokens", kind="gateway", name="g", site_id=site["id"]))["token"],
    ]
    return Pair(LightClient(tokens[0], slug), LightGateway(tokens[1], slug), UUID(resource["id"]))


async def test_a_rolling_restart_loses_no_session_and_nodes_come_and_go() -> None:
    async with two_nodes() as here, trio.open_nursery() as agents:
        async with here.client() as client:
            pairs = [await pair_of(client, f"account-{number}") for number in range(ACCOUNTS)]

        async def both_are_up() -> bool:
            nodes = await nodes_of(here.state)
            return len(nodes) == 2 and all(each["status"] for each in nodes.values())

        async def all_are_connected() -> bool:
            return all(pair.client.door and pair.gateway.door for pair in pairs)

        async def all_are_granted() -> None:
            for pair in pairs:
                await until(pair.is_granted)

        await until(both_are_up)
        for pair in pairs:
            agents.start_soon(pair.client.dialer.run)
            agents.start_soon(pair.gateway.dialer.run)
        await until(all_are_connected)
        await all_are_granted()
        held = [dict(pair.client.held) for pair in pairs]
        joins = [pair.client.joins for pair in pairs]
        assert all(len(each) == 1 for each in held)
        before = await nodes_of(here.state)

        begun = time.monotonic()
        done = await holloway("cluster", "restart", "--state-dir", here.state)
        assert (done.returncode, done.stdout) == (0, "restarted: portal-1, portal-2\n"), done.stderr
        print(f"\nrolling restart of two nodes: {time.monotonic() - begun:.1f} s")
        begun = time.monotonic()
        await until(all_are_connected)
        print(f"all agents are connected after {time.monotonic() - begun:.1f} s more")
        after = await nodes_of(here.state)
        for name in ("portal-1", "portal-2"):
            assert after[name]["status"]["pid"] != before[name]["status"]["pid"]
        assert all(pair.client.joins > number for pair, number in zip(pairs, joins, strict=True))
        for pair, mine in zip(pairs, held, strict=True):
            assert pair.client.held == mine, "what it had before"
            assert mine.items() <= pair.gateway.held.items()
            assert pair.client.cut == {}
            assert not mine.keys() & pair.gateway.cut.keys()
        await all_are_granted()

        tree = await holloway("portal", "tree", "--node", "portal-2", "--state-dir", here.state)
        assert tree.returncode == 0
        assert "control plane" in tree.stdout
        table = await holloway("cluster", "status", "--state-dir", here.state)
        assert {"portal-1", "portal-2"} <= set(table.stdout.split())

        done = await holloway("cluster", "drain", "portal-1", "--state-dir", here.state)
        assert (done.returncode, done.stdout) == (0, "drained: portal-1\n"), done.stderr
        assert list(await nodes_of(here.state)) == ["portal-2"]
        await until(all_are_connected)
        await all_are_granted()
        done = await holloway("cluster", "drain", "portal-9", "--state-dir", here.state)
        assert done.returncode == 1
        assert done.stderr == "holloway cluster drain: name one of portal-2\n"
        done = await holloway("cluster", "start", "--state-dir", here.state)
        assert (done.returncode, done.stdout) == (0, "started: portal-1\n"), done.stderr
        assert list(await nodes_of(here.state)) == ["portal-1", "portal-2"]

        logs = [here.log, *(each.read_text() for each in here.state.glob("log/*.log"))]
        assert len(logs) == 3
        assert not any("Traceback" in each or "actor_crashed" in each for each in logs)
        agents.cancel_scope.cancel()
        assert await here.end() == 0


async def test_a_killed_command_leaves_no_ray_and_a_taken_port_is_named_before_one_starts() -> None:
    short = Path(tempfile.mkdtemp(prefix="hc", dir="/tmp"))  # for the names of Ray's sockets
    settings = {"HOLLOWAY_PORTAL_NODES": "2", "TMPDIR": str(short)}

    def directories() -> set[Path]:
        return set(short.glob(f"{PREFIX}*"))

    async def is_free(lock: Path) -> bool:
        with lock.open("r+b") as opened, suppress(BlockingIOError):
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    try:
        with own_directory("nodes") as directory:
            here = Portal(directory, free_ports(2))
            settings["HOLLOWAY_PORTAL_ADDRESS"] = f"127.0.0.1:{here.port}"
            second = ("127.0.0.1", here.port + 1)
            with socket.create_server(second):
                here.spawn(**settings)
                assert here.process is not None
                assert await trio.to_thread.run_sync(here.process.wait) == 1
            assert here.log.splitlines()[-1].startswith(
                f"holloway portal: --api-listen of portal-2: cannot listen on 127.0.0.1:{second[1]}"
                " (TCP): Address already in use"
            )
            assert list(short.iterdir()) == []
            assert not here.state.exists()

            await here.start(**settings)
            killed = directories()
            (lock,) = (path / LOCK for path in killed)
            assert not await is_free(lock)
            assert await here.end(signal.SIGKILL) == -signal.SIGKILL
            await until(partial(is_free, lock))  # all that it had started is gone
            await here.start(**settings)
            assert len(directories()) == 1
            assert not directories() & killed

            async def both_are_up() -> bool:
                nodes = await nodes_of(here.state)
                return len(nodes) == 2 and all(each["status"] for each in nodes.values())

            await until(both_are_up)
            assert await here.end() == 0
            assert list(short.iterdir()) == []
    finally:
        shutil.rmtree(short, ignore_errors=True)


async def test_a_single_portal_tells_of_itself_and_has_no_cluster_to_command() -> None:
    async with portal() as here:
        assert here.process is not None
        nodes = await nodes_of(here.state)
        assert nodes["portal"]["status"]["pid"] == here.process.pid
        tree = await holloway("portal", "tree", "--state-dir", here.state)
        assert "control plane" in tree.stdout
        resealed = await holloway("portal", "reseal", "--state-dir", here.state)
        assert resealed.stdout == "0 sealed anew\n"
        for command in (("restart",), ("start",), ("drain", "portal")):
            done = await holloway("cluster", *command, "--state-dir", here.state)
            assert done.returncode == 1
            assert "is it running?" in done.stderr
            assert len(done.stderr.splitlines()) == 1


async def test_where_nothing_runs_a_line_says_so(tmp_path: Path) -> None:
    for command in (
        ("cluster", "status"),
        ("cluster", "restart"),
        ("portal", "tree"),
        ("portal", "reseal"),
    ):
        done = await holloway(*command, "--state-dir", tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith(f"holloway {' '.join(command)}: no ")
        assert len(done.stderr.splitlines()) == 1


async def test_another_user_is_told_whose_it_is(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir(mode=0o700)
    program = (
        "import os, sys; from pathlib import Path; from portal.asking import ask\n"
        "os.setuid(65534); ask('cluster status', Path(sys.argv[1]), {'command': 'cluster'})"
    )
    argv = [sys.executable, "-c", program, str(tmp_path)]
    done = await trio.to_thread.run_sync(
        lambda: subprocess.run(argv, capture_output=True, text=True, timeout=60)
    )
    assert done.returncode == 1
    assert "belongs to another user; try with sudo" in done.stderr
