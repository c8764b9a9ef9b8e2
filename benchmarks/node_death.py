"""How long a portal node's accounts are away when it dies; a part of `benchmarks.runtime`.

Three nodes in processes of their own, with a PostgreSQL and real links; the accounts live on
them. One node is ended by SIGKILL. From then until the last of its accounts has answered a question
from its new place:

    node_death_to_service_s     the median of the rounds
    accounts                    how many there are in all

There is no other peer to measure: the goal (3 s) is the issue's. `python -m benchmarks.node_death
[--quick]` measures and prints these as one JSON object.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final
from uuid import UUID

import attrs
import trio

from actors.messages import ListPresence
from actors.model import Account
from actors.store.embedded import EmbeddedPostgres
from actors.store.interface import Put
from actors.store.postgres import Logins, PostgresStore
from actors.tree import ControlPlane
from actors.wire import node_codec
from channel.messages import SocketAddress
from runtime.actor import Actor, handles
from runtime.clock import SystemClock
from runtime.cluster.membership import make_secret
from runtime.cluster.process import NodeProcess
from runtime.host import TrioHost
from runtime.net.address import Address
from runtime.randomness import SystemRandomness, uuid7
from runtime.scheduler import Scheduler
from runtime.secret import Secret
from runtime.service import configure_logging

NODES: Final = ("one", "two", "three")
SERVE: Final = "--serve"
PATIENCE_S: Final = 60
CLOCK: Final = SystemClock()
RANDOMNESS: Final = SystemRandomness()


@attrs.frozen
class Ask:
    """Have the account with this id answer. The reply is the node that did."""

    id: UUID


class Asker(Actor):
    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    @handles(Ask)
    async def ask(self, message: Ask) -> str:
        accounts, patience_ns = self._plane.accounts, PATIENCE_S * 10**9
        while True:
            ref = await accounts.locate(self, message.id, deadline_ns=patience_ns)
            try:
                await self.call(ref, ListPresence(), 10**9)
            except Exception:  # it is just dying: ask again
                continue
            return ref.node


class Node:
    """A node without doors, hosted by this process."""

    def __init__(self, process: NodeProcess, store: PostgresStore) -> None:
        self.process = process
        self.scheduler = Scheduler(
            clock=CLOCK, randomness=RANDOMNESS, node=process.name, incarnation=process.incarnation
        )
        self.host = TrioHost(self.scheduler)
        process.attach(self.scheduler, node_codec())
        self.plane = ControlPlane(
            self.scheduler,
            store,
            CLOCK,
            RANDOMNESS,
            portal_name="portal:443",
            prove_address=_prove,
            tenure=process.tenure,
        )
        self.plane.start()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.host.run)
            await nursery.start(self.process.run)
            task_status.started()


async def _prove(address: SocketAddress, pins: tuple[str, ...]) -> bool:
    return False


async def _join(name: str, store: PostgresStore, secret: Secret) -> Node:
    process = await NodeProcess.join(
        name,
        store=store,
        door_address="127.0.0.1:1",
        version="benchmark",
        clock=CLOCK,
        randomness=RANDOMNESS,
        secret=secret,
        listen=Address("127.0.0.1", 0),
    )
    return Node(process, store)


async def serve(name: str, directory: Path, secret: Secret) -> None:
    """A node of the benchmark, in a process that is killed."""
    async with PostgresStore.open(_logins(directory), migrated=True) as store:
        node = await _join(name, store, secret)
        async with trio.open_nursery() as nursery:
            await nursery.start(node.run)
            print("up", flush=True)
            await trio.sleep_forever()


def _logins(directory: Path) -> Logins:
    return EmbeddedPostgres(directory).logins()


def _start(name: str, directory: Path, secret: Secret) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.node_death", SERVE, name, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    child.stdin.write(secret.reveal_text() + "\n")
    child.stdin.close()
    return child


async def measure(directory: Path, accounts: int, rounds: int) -> dict[str, float]:
    secret = make_secret(RANDOMNESS)
    children: dict[str, subprocess.Popen[str]] = {}
    async with trio.open_nursery() as nursery:
        await nursery.start(EmbeddedPostgres(directory).run)
        try:
            async with PostgresStore.open(_logins(directory)) as store:
                ids = [await _make_account(store, number) for number in range(accounts)]
                for name in NODES:
                    children[name] = await _started(name, directory, secret)
                node = await _join("observer", store, secret)
                await nursery.start(node.run)
                await node.process.drain(node.host)  # it asks, and owns nothing
                taken = [
                    await _round(node, ids, children, NODES[number % len(NODES)], directory, secret)
                    for number in range(rounds)
                ]
        finally:
            for child in children.values():
                child.kill()
                child.wait()
        nursery.cancel_scope.cancel()
    return {"node_death_to_service_s": statistics.median(taken), "accounts": accounts}


async def _round(
    node: Node,
    ids: list[UUID],
    children: dict[str, subprocess.Popen[str]],
    victim: str,
    directory: Path,
    secret: Secret,
) -> float:
    while len(node.process.tenure.rows) <= len(NODES) or len(_links(node)) < len(NODES):
        await trio.sleep(0.1)
    owners = await _ask_all(node, ids)
    lost = [id for id in ids if owners[id] == victim]
    began = time.monotonic()
    children[victim].send_signal(signal.SIGKILL)
    await trio.to_thread.run_sync(children[victim].wait)
    while victim in (await _ask_all(node, lost)).values():
        await trio.sleep(0.01)
    taken = time.monotonic() - began
    children[victim] = await _started(victim, directory, secret)
    return taken


def _links(node: Node) -> tuple[object, ...]:
    links = node.process.link_statistics()
    return () if links is None else links.links


async def _ask_all(node: Node, ids: list[UUID]) -> dict[UUID, str]:
    owners: dict[UUID, str] = {}

    async def ask(id: UUID) -> None:
        asker = node.scheduler.spawn(Asker(node.plane))
        owners[id] = await node.host.call(asker, Ask(id), PATIENCE_S * 10**9)
        node.scheduler.stop(asker)

    async with trio.open_nursery() as nursery:
        for id in ids:
            nursery.start_soon(ask, id)
    return owners


async def _make_account(store: PostgresStore, number: int) -> UUID:
    id, at = uuid7(CLOCK, RANDOMNESS), CLOCK.utc_now()
    account = Account(id=id, name=f"account {number}", slug=f"account-{number}", created_at=at)
    await store.apply(id, [Put(account)], who="benchmark", at=at)
    return id


async def _started(name: str, directory: Path, secret: Secret) -> subprocess.Popen[str]:
    child = await trio.to_thread.run_sync(_start, name, directory, secret)
    assert child.stdout is not None
    line = await trio.to_thread.run_sync(child.stdout.readline)
    if line.strip() != "up":
        raise RuntimeError(f"node {name} did not start")
    return child


def main() -> None:
    configure_logging("text", "error")
    if len(sys.argv) == 4 and sys.argv[1] == SERVE:
        trio.run(serve, sys.argv[2], Path(sys.argv[3]), Secret(input().strip()))
        return
    quick = "--quick" in sys.argv[1:]
    place = Path(tempfile.mkdtemp(prefix="holloway-benchmark-"))
    try:
        place.chmod(0o711)
        figures = trio.run(measure, place / "database", 40 if quick else 200, 2 if quick else 6)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
