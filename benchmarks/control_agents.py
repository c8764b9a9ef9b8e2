"""Agents of one portal node; a part of `benchmarks.control`.

A node as it is (`run_portal`: QUIC listener, API, actors) in a process of its own, a PostgreSQL,
and clients by real dialers in accounts of 1,000: most of them in one process, one in twenty of
those that are to hear of changes in another, beside a gateway (`benchmarks.control_crowd`). Only
the latter, the witnesses, are timed: a thousand agents that share a processor wait for each other,
which on machines of their own they would not. All is on loopback, and on the same processors.

    change_to_agent_ms_p50, _p99    from the moment that an API call (a resource gets another name)
                                    is sent to that at which a client has read the frame; over all
                                    witnesses and changes, with all `listeners` told each time
    listeners                       how many clients these are
    change_cpu_ms                   the node's processor time for such a change, with all that
                                    follows in 0.3 s: acknowledgements, heartbeats
    change_to_one_ms_p50, _p99      as change_to_agent, of a resource that one of them sees
    authorization_ms_p50            from a client's request to its answer, after a gateway's word
    agents_connected                clients that were connected at the same time
    bytes_per_agent                 what the node's memory (PSS) grew by, for each of them
    node_cpu                        processors that they keep busy while nothing happens
    joins_per_s                     clients that came for the first time: TLS, proof, enrolment
    join_cpu_ms, storm_cpu_ms       the node's processor time for each that came first, or again
    storm_agents, storm_dials       so many of 4,000 known clients dial at the same moment, and
                                    how often
    storm_recovery_s                until all of them are in

`python -m benchmarks.control_agents [--quick]` measures once and prints one JSON object; other
sizes by `--clients=2000 --storm=500`, and so on (`Size`).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import attrs
import httpx
import trio

from actors.model import (
    Account,
    Entity,
    Group,
    Membership,
    Policy,
    Principal,
    Resource,
    Site,
    Token,
    TokenKind,
)
from actors.store.embedded import EmbeddedPostgres
from actors.store.interface import Put
from actors.store.postgres import PostgresStore
from benchmarks.control_crowd import Plan
from channel.credentials import encode_token, hash_token
from portal.authority import Authority
from portal.node import PortalNode, run_portal
from portal.settings import PortalSettings
from runtime.clock import SystemClock
from runtime.randomness import SystemRandomness, uuid7
from runtime.service import configure_logging

SERVE: Final = "--serve"
CLOCK: Final = SystemClock()
RANDOMNESS: Final = SystemRandomness()
CLIENTS_PER_ACCOUNT: Final = 1_000
CLIENTS_PER_PRINCIPAL: Final = 10
RESOURCES: Final = 20
"""That every client of an account sees."""
AT_ONCE: Final = 32
SETTLE_S: Final = 3.0
PAUSE_S: Final = 0.3


@attrs.frozen(kw_only=True)
class Size:
    """How much is measured: `listeners` are connected when changes are timed, `storm_among` when
    `storm` of them dial anew, and `clients` in the end. (The crowd is one process: with 10,000 in
    it, it is itself too slow for a storm of the node.)"""

    clients: int
    listeners: int
    storm: int
    storm_among: int
    changes: int
    requests: int
    idle_s: int


FULL: Final = Size(
    clients=10_000,
    listeners=1_000,
    storm=2_000,
    storm_among=4_000,
    changes=30,
    requests=200,
    idle_s=10,
)
QUICK: Final = Size(
    clients=300,
    listeners=200,
    storm=150,
    storm_among=300,
    changes=5,
    requests=50,
    idle_s=3,
)
WITNESSES: Final = 20
"""One of so many listeners is timed."""
STEP: Final = 5
NOTED: Final = 1_000
"""After so many that joined it is said how far they are."""


@attrs.define
class Installed:
    """An account of the benchmark. `resource` is seen by all clients, `own` by the first alone."""

    id: UUID
    resource: UUID
    own: UUID
    clients: list[str]
    gateway: str


class Process:
    """A child that answers each line by a line."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._child.pid

    @classmethod
    def of(cls, plan: Plan, file: Path) -> Process:
        """A crowd."""
        file.write_text(json.dumps(attrs.asdict(plan)))
        return cls("benchmarks.control_crowd", str(file))

    async def line(self) -> str:
        assert self._child.stdout is not None
        line = await trio.to_thread.run_sync(self._child.stdout.readline)
        if not line:
            raise RuntimeError(f"{self._child.args!r} has ended")
        return line

    async def do(self, what: str, **values: object) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"do": what, **values}) + "\n")
        self._child.stdin.flush()
        answer: dict[str, Any] = json.loads(await self.line())
        return answer

    def end(self) -> None:
        self._child.kill()
        self._child.wait()


# --- the node ------------------------------------------------------------------------------------


async def serve(place: Path, port: int) -> None:
    """The node of the benchmark, over the database that runs already."""

    async def ready(*, task_status: trio.TaskStatus[PortalNode]) -> None:
        await run_portal(
            settings_of(place, port),
            stop=trio.Event(),
            database=EmbeddedPostgres(place / "database").logins(),
            task_status=task_status,
        )

    async with trio.open_nursery() as nursery:
        await nursery.start(ready)
        print("up", flush=True)


def settings_of(place: Path, port: int) -> PortalSettings:
    address = f"127.0.0.1:{port}"
    return PortalSettings(
        state_dir=place / "portal",
        address=address,
        listen=address,
        api_listen=address,
        observability="",
        log_level="error",
    )


@attrs.frozen
class Usage:
    """Of a process: proportional memory, and CPU time since its start."""

    pss_bytes: int
    cpu_s: float

    @classmethod
    def of(cls, pid: int) -> Usage:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        pss = next(line for line in rollup if line.startswith("Pss:"))
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(times[11]) + int(times[12])
        return cls(int(pss.split()[1]) * 1024, ticks / os.sysconf("SC_CLK_TCK"))


# --- the accounts --------------------------------------------------------------------------------


class Registrar:
    """Writes accounts, as the API would."""

    def __init__(self, store: PostgresStore, portal: str, pin: bytes) -> None:
        self._store = store
        self._portal = portal
        self._pin = pin

    async def install(self, number: int, clients: int) -> Installed:
        at = CLOCK.utc_now()
        account = Account(
            id=new_id(), name=f"account {number}", slug=f"account-{number}", created_at=at
        )
        common: dict[str, Any] = {"account_id": account.id, "created_at": at}
        site = Site(id=new_id(), name="site", **common)
        everybody, alone = (Group(id=new_id(), name=name, **common) for name in ("all", "alone"))
        resources = [
            Resource(
                id=new_id(),
                site_ids=(site.id,),
                name=f"resource {each}",
                kind="cidr",
                address=str(IPv4Network((0x0A000000 + (each << 8), 24))),
                **common,
            )
            for each in range(RESOURCES + 1)
        ]
        entities: list[Entity] = [account, site, everybody, alone, *resources]
        for resource in resources:
            group = alone if resource is resources[-1] else everybody
            entities.append(
                Policy(id=new_id(), group_id=group.id, resource_id=resource.id, **common)
            )
        texts: list[str] = []
        while len(texts) < clients:
            is_first = not texts
            principal = Principal(id=new_id(), name="user", **common)
            token, text = self._token("client", account.id, principal_id=principal.id)
            entities += [principal, token]
            for group in (everybody, alone) if is_first else (everybody,):
                entities.append(
                    Membership(id=new_id(), group_id=group.id, principal_id=principal.id, **common)
                )
            texts += [text] * (1 if is_first else min(CLIENTS_PER_PRINCIPAL, clients - len(texts)))
        token, gateway = self._token("gateway", account.id, site_id=site.id, approves_devices=True)
        entities.append(token)
        for begin in range(0, len(entities), 500):
            puts = [Put(each) for each in entities[begin : begin + 500]]
            await self._store.apply(account.id, puts, who="benchmark", at=at)
        return Installed(account.id, resources[0].id, resources[-1].id, texts, gateway)

    def _token(self, kind: TokenKind, account_id: UUID, **of: Any) -> tuple[Token, str]:
        id, secret = new_id(), RANDOMNESS.bytes(32)
        token = Token(
            id=id,
            account_id=account_id,
            kind=kind,
            name=kind,
            hash=hash_token(kind, id, secret),
            created_at=CLOCK.utc_now(),
            **of,
        )
        return token, encode_token(kind, id, secret, self._portal, self._pin).reveal_text()


def new_id() -> UUID:
    return uuid7(CLOCK, RANDOMNESS)


# --- what is measured ----------------------------------------------------------------------------


class Bench:
    """A node that is up, two crowds that wait for orders, and the accounts of their agents. The
    witnesses are of the first account, and the first of them sees what nobody else does."""

    def __init__(
        self,
        node: Process,
        crowd: Process,
        witnesses: Process,
        api: httpx.AsyncClient,
        account: Installed,
        size: Size,
    ) -> None:
        self._node = node
        self._crowd = crowd
        self._witnesses = witnesses
        self._api = api
        self._account = account
        self._size = size
        self._watching = size.listeners // WITNESSES
        self._name = 0

    async def run(self) -> dict[str, float]:
        size, watching = self._size, self._watching
        before = self._usage()
        for first in range(0, watching, STEP):  # mixed, as they are to be told
            last = min(first + STEP, watching)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(join, self._witnesses, first, last)
                others = WITNESSES - 1
                nursery.start_soon(join, self._crowd, first * others, last * others)
        figures = await self._changes()
        note(figures)
        figures["authorization_ms_p50"] = await self._authorization_ms()
        here, last = watching * (WITNESSES - 1), size.clients - watching
        among = max(here, min(size.storm_among - watching, last))
        some = await self._join(here, among)
        figures |= await self._storm(among)
        note(figures)
        others = await self._join(among, last)
        figures["joins_per_s"] = (last - here) / (some[0] + others[0])
        figures["join_cpu_ms"] = (some[1] + others[1]) / (last - here) * 1e3
        figures |= await self._at_rest(before)
        return figures

    async def _join(self, first: int, last: int) -> tuple[float, float]:
        """Have these of the crowd come in. The time it took, and the node's of its processor."""
        begun, cpu_s = time.monotonic(), self._usage().cpu_s
        for begin in range(first, last, NOTED):
            await join(self._crowd, begin, min(begin + NOTED, last))
            note({"joined": min(begin + NOTED, last), "seconds": time.monotonic() - begun})
        return time.monotonic() - begun, self._usage().cpu_s - cpu_s

    def _usage(self) -> Usage:
        return Usage.of(self._node.pid)

    async def _changes(self) -> dict[str, float]:
        """Both kinds of change in turn, with pauses."""
        await trio.sleep(SETTLE_S)
        all_ms: list[float] = []
        one_ms: list[float] = []
        cpu_s = 0.0
        for _ in range(self._size.changes):
            before_s = self._usage().cpu_s
            all_ms += await self._change(self._account.resource, self._watching)
            cpu_s += self._usage().cpu_s - before_s
            one_ms += await self._change(self._account.own, 1)
        return {
            "listeners": self._size.listeners,
            "change_to_agent_ms_p50": statistics.median(all_ms),
            "change_to_agent_ms_p99": quantile(all_ms, 0.99),
            "change_cpu_ms": cpu_s / self._size.changes * 1e3,
            "change_to_one_ms_p50": statistics.median(one_ms),
            "change_to_one_ms_p99": quantile(one_ms, 0.99),
        }

    async def _change(self, resource: UUID, watching: int) -> list[float]:
        self._name += 1
        name = f"named {self._name}"
        sent_ns = time.monotonic_ns()
        answer = await self._api.patch(
            f"/v1/resources/{resource}",
            json={"name": name},
            headers={"holloway-account": str(self._account.id)},
        )
        answer.raise_for_status()
        seen = await self._witnesses.do("seen", name=name, count=watching)
        others = watching * (WITNESSES - 1) if watching == self._watching else 0
        if others:
            await self._crowd.do("seen", name=name, count=others)
        await trio.sleep(PAUSE_S)
        return [(at_ns - sent_ns) / 1e6 for at_ns in seen["at_ns"]]

    async def _authorization_ms(self) -> float:
        asking = [number % self._watching for number in range(self._size.requests)]
        answer = await self._witnesses.do(
            "ask", clients=asking, resource=str(self._account.resource)
        )
        return statistics.median(answer["ms"])

    async def _at_rest(self, before: Usage) -> dict[str, float]:
        await trio.sleep(SETTLE_S)
        begin, begun = self._usage(), time.monotonic()
        await trio.sleep(self._size.idle_s)
        end, took = self._usage(), time.monotonic() - begun
        counts = [await each.do("count") for each in (self._crowd, self._witnesses)]
        connected = sum(count["clients"] for count in counts)
        return {
            "agents_connected": connected,
            "bytes_per_agent": (end.pss_bytes - before.pss_bytes) / connected,
            "node_cpu": (end.cpu_s - begin.cpu_s) / took,
        }

    async def _storm(self, last: int) -> dict[str, float]:
        """The newest of a crowd of so many are cut off, and all dial at once."""
        first = last - self._size.storm
        await self._crowd.do("cut", first=first, last=last)
        cpu_s = self._usage().cpu_s
        back = await join(self._crowd, first, last, at_once=self._size.storm)
        return {
            "storm_agents": self._size.storm,
            "storm_dials": back["dials"],
            "storm_recovery_s": back["seconds"],
            "storm_cpu_ms": (self._usage().cpu_s - cpu_s) / self._size.storm * 1e3,
        }


def note(figures: dict[str, float]) -> None:
    """How far it has come: it takes minutes."""
    print(json.dumps(figures), file=sys.stderr, flush=True)


async def join(crowd: Process, first: int, last: int, at_once: int = AT_ONCE) -> dict[str, Any]:
    """Have some of a crowd dial, so many at a time, until they are in."""
    return await crowd.do("join", first=first, last=last, at_once=at_once)


async def measure(place: Path, size: Size) -> dict[str, float]:
    port = free_port()
    settings = settings_of(place, port)
    processes: list[Process] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(EmbeddedPostgres(place / "database").run)
        try:
            node = Process("benchmarks.control_agents", SERVE, str(place), str(port))
            processes.append(node)
            await node.line()
            authority = Authority(
                settings.state_dir / "authority", clock=CLOCK, randomness=RANDOMNESS
            )
            accounts = await _installed(place, settings.address, authority.pin, size)
            texts = [text for account in accounts for text in account.clients]
            watching = size.listeners // WITNESSES
            gateways = [account.gateway for account in accounts]
            crowd = Process.of(Plan(texts[watching:], gateways[1:]), place / "crowd")
            processes.append(crowd)
            witnesses = Process.of(Plan(texts[:watching], gateways[:1]), place / "witnesses")
            processes.append(witnesses)
            for process in (crowd, witnesses):
                await process.do("settle")
            token = (settings.state_dir / "operator-token").read_text().strip()
            async with httpx.AsyncClient(
                base_url=f"https://{settings.address}",
                verify=ssl.create_default_context(cafile=settings.state_dir / "ca.pem"),
                headers={"authorization": f"Bearer {token}"},
                timeout=60,
                trust_env=False,
            ) as api:
                bench = Bench(node, crowd, witnesses, api, accounts[0], size)
                figures = await bench.run()
        finally:
            for process in reversed(processes):
                process.end()
        nursery.cancel_scope.cancel()
    return figures


async def _installed(place: Path, portal: str, pin: bytes, size: Size) -> list[Installed]:
    logins = EmbeddedPostgres(place / "database").logins()
    async with PostgresStore.open(logins, migrated=True) as store:
        registrar = Registrar(store, portal, pin)
        return [
            await registrar.install(number, min(size.clients - begin, CLIENTS_PER_ACCOUNT))
            for number, begin in enumerate(range(0, size.clients, CLIENTS_PER_ACCOUNT))
        ]


def free_port() -> int:
    """A port that was free for TCP and UDP a moment ago."""
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        port: int = tcp.getsockname()[1]
        udp.bind(("127.0.0.1", port))
        return port


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def rows() -> Iterator[tuple[str, str]]:
    """Figures and their units, as a table shows them."""
    yield "listeners", ""
    for name in ("change_to_agent", "change_to_one"):
        yield f"{name}_ms_p50", "ms"
        yield f"{name}_ms_p99", "ms"
    yield "change_cpu_ms", "ms"
    yield "authorization_ms_p50", "ms"
    yield "agents_connected", ""
    yield "bytes_per_agent", "B"
    yield "node_cpu", "processors"
    yield "joins_per_s", "1/s"
    yield "join_cpu_ms", "ms"
    yield "storm_agents", ""
    yield "storm_dials", ""
    yield "storm_recovery_s", "s"
    yield "storm_cpu_ms", "ms"


def size_of(arguments: list[str]) -> Size:
    """`--quick`, and `--FIELD=NUMBER` for other sizes."""
    size = QUICK if "--quick" in arguments else FULL
    given = [each[2:].split("=") for each in arguments if "=" in each]
    size = attrs.evolve(size, **{name: int(value) for name, value in given})
    size = attrs.evolve(size, storm_among=min(size.storm_among, size.clients))
    if not WITNESSES <= size.listeners < size.clients or size.storm > size.storm_among // 2:
        sys.exit("listeners: fewer than clients; storm: at most half of storm_among")
    return size


def main() -> None:
    configure_logging("text", "error")
    if len(sys.argv) == 4 and sys.argv[1] == SERVE:
        trio.run(serve, Path(sys.argv[2]), int(sys.argv[3]))
        return
    place = Path(tempfile.mkdtemp(prefix="holloway-benchmark-"))
    try:
        place.chmod(0o711)
        figures = trio.run(partial(measure, place, size_of(sys.argv[1:])))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
