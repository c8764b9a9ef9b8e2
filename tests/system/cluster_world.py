"""A portal of several nodes as it would run on three machines, under load, with all that may fail.

    Ray                  a head and three raylets of this run alone
    PostgreSQL           one that the nodes reach by TCP, each through a forwarder of its own
    nodes                through `RayCluster`, linked through forwarders
    accounts             each with a client and a gateway over QUIC
    load                 admin changes through the API of every node, access requests of all clients

All of it lives in a thread with an event loop of its own, so that many tests can share it: each
gives it something to do by `World.run`.

Longer than other files: set-up, load and what is asked of it are one world with one loop.
"""

from __future__ import annotations

import queue
import random
import shutil
import ssl
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar
from uuid import UUID

import attrs
import httpx
import psycopg
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
from actors.store.interface import Put
from actors.store.postgres import PostgresStore, migrate
from actors.store.postgres.connection import Logins
from channel.credentials import encode_token, hash_token
from channel.messages import AuthorizationCreated, AuthorizationDenied
from portal.authority import Authority
from portal.cluster import BODY, to_plain
from portal.first_start import (
    load_cluster_secret,
    load_key_ring,
    load_reset_key,
    prepare_state,
)
from portal.settings import PortalSettings
from runtime.clock import SystemClock
from runtime.hosting.interface import ClusterError, NodeStatus
from runtime.hosting.ray_cluster import RayCluster, open_ray_cluster
from runtime.hosting.ray_machine import RayMachine
from runtime.randomness import SystemRandomness, uuid7
from tests.ports import free_port
from tests.system.admin_load import Admin, Record
from tests.system.forwarder import Forwarders
from tests.system.light_agents import Answer, LightClient, LightGateway
from tests.system.own_raylets import Ray
from tests.system.postgres_support import ForeignServer, foreign_server, own_directory

PATIENCE_S: Final = 90.0
"""A deadline for what must happen at all; nothing is judged by it."""
ACCOUNTS: Final = 200
ATTENDED: Final = 40
"""Accounts with agents. All 200 with agents pass too, but 400 channels keep two processors so busy
that it takes ten minutes; the others are changed and asked about through the API."""
SHARES: Final = 4
"""In so many the other accounts are asked about, one after each event."""
AT_ONCE: Final = 40
ADMINS: Final = 3
REQUEST_S: Final = 0.1
"""Between two access requests of the load."""
AGAIN_S: Final = 0.2
ARRIVAL_S: Final = 0.03
"""Between two agents that come for the first time: they share two processors with the portal."""

T = TypeVar("T")

# Notes, in the transaction that writes an authorisation, who wrote it and who was the owner: the
# writer is known by the name that its connection bears, the owner by the lease.
AUDIT: Final = """
CREATE TABLE written (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id uuid NOT NULL, id uuid NOT NULL, ended boolean NOT NULL,
    writer text NOT NULL, owner text NOT NULL, incarnation bigint NOT NULL, epoch bigint NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE FUNCTION note_written() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = holloway AS $$
BEGIN
    INSERT INTO written (account_id, id, ended, writer, owner, incarnation, epoch)
    SELECT NEW.account_id, NEW.id, NEW.ended_at IS NOT NULL,
           current_setting('application_name'), owner, incarnation, epoch
    FROM lease WHERE account_id = NEW.account_id;
    RETURN NULL;
END $$;
CREATE TRIGGER note_written AFTER INSERT OR UPDATE ON "authorization"
FOR EACH ROW EXECUTE FUNCTION note_written();
"""


@attrs.define(eq=False)
class Customer:
    """An account with its two agents. `closed_id` is a resource that no policy opens."""

    id: UUID
    resource_id: UUID
    closed_id: UUID
    client: LightClient
    gateway: LightGateway

    @property
    def settled(self) -> bool:
        return self.client.door is not None and self.gateway.door is not None


@attrs.frozen
class Quiet:
    """An account whose agents are not there."""

    id: UUID
    principal_id: UUID
    resource_id: UUID


@attrs.define
class Node:
    """What is particular to one node."""

    settings: PortalSettings
    links: int
    """The port of the forwarder by which other nodes reach it."""
    database: int
    """The port of the forwarder by which it reaches the database."""

    @property
    def door(self) -> str:
        return self.settings.listen


@attrs.define(kw_only=True)
class Recovery:
    """How long it took until accounts were served again, in seconds since the event."""

    seconds: list[float]
    refusals: Counter[str] = attrs.Factory(Counter)
    """Requests that were denied (why), or not answered, before."""

    def __str__(self) -> str:
        ordered = sorted(self.seconds)
        if not ordered:
            return f"no account, {dict(self.refusals)}"
        middle, last = ordered[len(ordered) // 2], ordered[-1]
        when = f"half after {middle:.1f} s, all after {last:.1f} s"
        return f"{len(ordered)} accounts, {when}, {dict(self.refusals)} before"


class World:
    """See the module. Methods that are coroutines belong to its thread: `run` them."""

    def __init__(
        self, directory: Path, server: ForeignServer, ray: Ray, between: Forwarders
    ) -> None:
        self.ray = ray
        self.between = between
        self.nodes: dict[str, Node] = {}
        self.account_ids: list[UUID] = []
        self.customers: list[Customer] = []
        self.quiet: list[Quiet] = []
        self.state = directory / "state"
        self._directory = directory
        self._server = server
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="world")
        self._started: queue.Queue[BaseException | None] = queue.Queue()
        self._number = 0
        self._shares = list(range(SHARES))
        self.held: frozenset[UUID] = frozenset()
        """The authorisations that both their agents held when `note_held` was called last."""
        self.asked: Counter[str] = Counter()
        """What became of the requests of the load."""

    # --- from the tests' thread ------------------------------------------------------------------

    def run(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Do something in the thread of the world."""
        return trio.from_thread.run(function, *arguments, trio_token=self._token)

    def __enter__(self) -> World:
        self._thread.start()
        error = self._started.get()
        if error is not None:
            self._thread.join()
            raise error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._nursery.cancel_scope.cancel)
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    # --- its life --------------------------------------------------------------------------------

    _failure: BaseException | None = None

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            self._failure = error
            self._started.put(error)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with AsyncExitStack() as stack:
            self._prepare()
            await migrate(Logins.of(self._url("holloway_login")))
            self._server.administer("SET search_path = holloway; " + AUDIT, database="holloway")
            # Its connections bear no node's name.
            store = PostgresStore.open(self._url("holloway_login"), migrated=True)
            self.store = await stack.enter_async_context(store)
            through = self.ray.raylets[0].settings.directory
            opened = open_ray_cluster(self.ray.address, self.ray.head.access, BODY, through=through)
            self.cluster: RayCluster = await stack.enter_async_context(opened)
            self._nursery = await stack.enter_async_context(trio.open_nursery())
            try:
                begun = time.monotonic()
                for _ in range(3):
                    await self.start_node()
                print(f"\nthree nodes are up after {time.monotonic() - begun:.1f} s")
                begun = time.monotonic()
                await self._populate()
                await self.settle()
                print(f"{2 * ATTENDED} agents have joined after {time.monotonic() - begun:.1f} s")
                self._begin_load()
                self._started.put(None)
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    for name in list(self.nodes):
                        with suppress(ClusterError):
                            await self.cluster.drain(name, deadline_ns=15 * 10**9)

    def _prepare(self) -> None:
        prepare_state(self.state)
        clock, randomness = SystemClock(), SystemRandomness()
        authority = Authority(self.state / "authority", clock=clock, randomness=randomness)
        authority.server_certificate(["127.0.0.1", "localhost"])
        self._pin = authority.pin
        self.tls = ssl.create_default_context(cadata=authority.certificate_pem.decode())
        self._address = f"127.0.0.1:{free_port()}"
        load_cluster_secret(PortalSettings(state_dir=self.state), randomness)
        load_key_ring(PortalSettings(state_dir=self.state), randomness)
        load_reset_key(self.state, randomness)

    def _url(self, name: str, port: int = 0) -> str:
        url = self._server.url("holloway_login", "holloway", port=port)
        return f"{url}?application_name={name}&connect_timeout=5"

    # --- nodes -----------------------------------------------------------------------------------

    async def start_node(self) -> str:
        """Start one more node; its name."""
        self._number += 1
        name = f"n{self._number}"
        link_port, links = free_port(), free_port()
        # The door that tokens name is that of the first node.
        own = self._address if self._number == 1 else f"127.0.0.1:{free_port()}"
        database = free_port()
        self.between.open(links, link_port)
        self.between.open(database, self._server.port)
        url_file = self._directory / f"{name}.url"
        url_file.touch(mode=0o600)
        url_file.write_text(self._url(name, database))
        settings = PortalSettings(
            state_dir=self.state,
            address=self._address,
            listen=own,
            api_listen=own,
            node=name,
            link_listen=f"127.0.0.1:{link_port}",
            link_address=f"127.0.0.1:{links}",
            database_url_file=url_file,
            database_connections=6,
            observability="",
            log_format="json",
        )
        await self.cluster.start(name, to_plain(settings))
        self.nodes[name] = Node(settings, links, database)
        return name

    async def drain_node(self, name: str) -> None:
        await self.cluster.drain(name)
        del self.nodes[name]

    async def part(self, name: str, other: str) -> None:
        """Let nothing pass between two nodes, whoever of them dials; undone by `join`."""
        for one, dialler in ((name, other), (other, name)):
            self.between.part(self.nodes[one].links, await self.pid_of(dialler))

    def join(self, name: str, other: str) -> None:
        self.between.tell("release", self.nodes[name].links, self.nodes[other].links)

    async def are_linked(self, name: str, other: str) -> bool:
        return other in (await self.status_of(name))["links"]

    async def pid_of(self, name: str) -> int:
        return int((await self.cluster.ask(name, "status"))["pid"])

    async def status_of(self, name: str) -> dict[str, Any]:
        answer: dict[str, Any] = await self.cluster.ask(name, "status")
        return answer

    async def is_back(self, name: str, old_pid: int) -> None:
        """Wait until another process of the node is up."""
        await until(lambda: self._is_back(name, old_pid))

    async def _is_back(self, name: str, old_pid: int) -> bool:
        status = await self.status_of(name)
        return bool(status["pid"] != old_pid and status["ready"])

    async def hosted(self) -> tuple[NodeStatus, ...]:
        return await self.cluster.nodes()

    def raylet_of(self, pid: int) -> RayMachine:
        return next(raylet for raylet in self.ray.raylets if pid in raylet.processes())

    # --- accounts --------------------------------------------------------------------------------

    async def _populate(self) -> None:
        limiter = trio.CapacityLimiter(8)
        async with trio.open_nursery() as nursery:
            for number in range(ACCOUNTS):
                nursery.start_soon(self._add_account, number, limiter)
        for customer in self.customers:
            self._nursery.start_soon(customer.client.dialer.run)
            self._nursery.start_soon(customer.gateway.dialer.run)
            await trio.sleep(ARRIVAL_S)

    async def _add_account(self, number: int, limiter: trio.CapacityLimiter) -> None:
        clock, randomness = SystemClock(), SystemRandomness()
        now = clock.utc_now()
        account = Account(
            id=uuid7(clock, randomness), name="A", slug=f"account-{number}", created_at=now
        )

        def new(of_type: type[T], /, **fields: Any) -> T:
            return of_type(
                id=uuid7(clock, randomness), account_id=account.id, created_at=now, **fields
            )

        user = new(Principal, name="Uwe")
        group, site = new(Group, name="Staff"), new(Site, name="Berlin")
        member = new(Membership, group_id=group.id, principal_id=user.id)
        opened, closed = (
            new(Resource, site_ids=(site.id,), name=name, kind="cidr", address=address)
            for name, address in (("open", "10.1.0.0/16"), ("closed", "10.2.0.0/16"))
        )
        policy = new(Policy, group_id=group.id, resource_id=opened.id)
        tokens, texts = [], []
        doors = [node.door for node in self.nodes.values()]
        for kind, of in (("client", {"principal_id": user.id}), ("gateway", {"site_id": site.id})):
            # Any door names the portal, and agents begin there: every second pair at two of them.
            is_astray = kind == "gateway" and number % 2 == 1
            door = doors[(number + is_astray) % len(doors)]
            token, text = self._make_token(kind, account.id, door, **of)
            tokens.append(token)
            texts.append(text)
        entities: Sequence[Entity] = (
            account, user, group, site, member, opened, closed, policy, *tokens
        )  # fmt: skip
        async with limiter:
            await self.store.apply(account.id, [Put(each) for each in entities], who="t", at=now)
        self.account_ids.append(account.id)
        if number >= ATTENDED:
            self.quiet.append(Quiet(account.id, user.id, opened.id))
            return
        self.customers.append(
            Customer(
                account.id,
                opened.id,
                closed.id,
                LightClient(texts[0], f"client-{number}"),
                LightGateway(texts[1], f"gateway-{number}"),
            )
        )

    def _make_token(
        self, kind: TokenKind, account_id: UUID, door: str, **of: UUID
    ) -> tuple[Token, str]:
        clock, randomness = SystemClock(), SystemRandomness()
        id, secret = uuid7(clock, randomness), randomness.bytes(32)
        token = Token(
            id=id,
            account_id=account_id,
            kind=kind,
            name=kind,
            hash=hash_token(kind, id, secret),
            created_at=clock.utc_now(),
            **of,
        )
        return token, encode_token(kind, id, secret, door, self._pin).reveal_text()

    # --- service ---------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Wait until all agents are connected."""

        async def settled() -> bool:
            return all(customer.settled for customer in self.customers)

        await until(settled)

    async def served(
        self, customers: Sequence[Customer] | None = None, *, since: float | None = None
    ) -> Recovery:
        """Have every client ask, again and again, until it is granted; how long that took."""
        begun = time.monotonic() if since is None else since
        recovery = Recovery(seconds=[])
        limiter = trio.CapacityLimiter(AT_ONCE)
        last: dict[UUID, str] = {}

        async def serve(customer: Customer) -> None:
            while True:
                async with limiter:
                    answer = await customer.client.ask(customer.resource_id)
                last[customer.id] = f"{customer.client.door} {customer.gateway.door} {answer}"
                if isinstance(answer, AuthorizationCreated):
                    del last[customer.id]
                    recovery.seconds.append(time.monotonic() - begun)
                    return
                recovery.refusals[what_became(answer)] += 1
                await trio.sleep(AGAIN_S)

        with trio.move_on_after(PATIENCE_S) as patience:
            async with trio.open_nursery() as nursery:
                for customer in self.customers if customers is None else customers:
                    nursery.start_soon(serve, customer)
        assert not patience.cancelled_caught, f"{recovery}; not served: {last}"
        return recovery

    async def served_since(self, begun: float) -> Recovery:
        """As `served`, for all, since an event."""
        return await self.served(since=begun)

    async def at_home(self) -> list[Customer]:
        """Those whose agents and account are all at one node."""
        doors = {name: node.door for name, node in self.nodes.items()}
        owners = dict(await self.in_thread(self.query, "SELECT account_id, owner FROM lease"))
        return [
            each
            for each in self.customers
            if doors.get(owners[each.id]) == each.client.door == each.gateway.door
        ]

    async def places(self) -> dict[UUID, tuple[str, str, str]]:
        """The nodes of each customer's account, client and gateway."""
        name_by_door = {node.door: name for name, node in self.nodes.items()}
        owners = dict(await self.in_thread(self.query, "SELECT account_id, owner FROM lease"))
        return {
            each.id: (
                owners[each.id],
                name_by_door.get(each.client.door or "", ""),
                name_by_door.get(each.gateway.door or "", ""),
            )
            for each in self.customers
        }

    async def denied(self) -> list[Answer]:
        """What some clients are told about a resource that no policy opens, as soon as anybody can
        tell them."""
        answers: list[Answer] = []
        for customer in self.customers[:: ATTENDED // 8]:

            async def told(customer: Customer = customer) -> Answer:
                answer = await customer.client.ask(customer.closed_id)
                is_late = isinstance(answer, AuthorizationDenied) and answer.reason == "unavailable"
                return None if is_late else answer

            answers.append(await until(told))
        return answers

    async def unexplained(self) -> list[Quiet]:
        """Ask the nodes in turn, and another where one is away, about some of the quiet accounts,
        each time about others: those whose user may not reach the resource."""
        token = (self.state / "operator-token").read_text().strip()
        doors = [node.door for node in self.nodes.values()]
        refused = []
        self._shares = self._shares[1:] + self._shares[:1]
        async with httpx.AsyncClient(
            verify=self.tls, headers={"authorization": f"Bearer {token}"}, timeout=60,
            trust_env=False,
        ) as client:  # fmt: skip

            async def explain(quiet: Quiet, door: str) -> bool | None:
                with suppress(httpx.TransportError):
                    answer = await client.post(
                        f"https://{door}/v1/policies/explain",
                        headers={"holloway-account": str(quiet.id)},
                        json={
                            "principal_id": str(quiet.principal_id),
                            "resource_id": str(quiet.resource_id),
                        },
                    )
                    if answer.status_code not in (429, 503):
                        return bool(answer.json()["allowed"])
                return None

            for number, quiet in enumerate(self.quiet[self._shares[0] :: SHARES]):
                with trio.fail_after(PATIENCE_S):
                    while (found := await explain(quiet, doors[number % len(doors)])) is None:
                        number += 1
                        await trio.sleep(AGAIN_S)
                if not found:
                    refused.append(quiet)
        return refused

    def note_held(self) -> None:
        self.held = frozenset(
            id for each in self.customers for id in each.client.held.keys() & each.gateway.held
        )

    # --- load ------------------------------------------------------------------------------------

    def _begin_load(self) -> None:
        token = (self.state / "operator-token").read_text().strip()
        self.record = Record()
        for number in range(ADMINS):
            admin = Admin(
                f"a{number}",
                self.record,
                token,
                self.tls,
                self.account_ids,
                lambda: {name: node.door for name, node in self.nodes.items()},
            )
            self._nursery.start_soon(admin.run)
        self._nursery.start_soon(self._ask_for_ever)

    async def _ask_for_ever(self) -> None:
        """Requests of clients at random, one after the other begun, each answered in its time."""

        async def ask(customer: Customer) -> None:
            self.asked[what_became(await customer.client.ask(customer.resource_id))] += 1

        while True:
            self._nursery.start_soon(ask, random.choice(self.customers))
            await trio.sleep(REQUEST_S)

    # --- the database ----------------------------------------------------------------------------

    def query(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """As the administrator, who sees every row."""
        with psycopg.connect(self._server.url("admin", "holloway")) as connection:
            connection.execute("SET search_path = holloway")
            return connection.execute(sql, parameters).fetchall()

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await trio.to_thread.run_sync(partial(function, *arguments))


@contextmanager
def open_world() -> Iterator[World]:
    """A world that is up; everything that it started is gone after the block."""
    short = Path(tempfile.mkdtemp(prefix="hc"))  # for the names of Ray's sockets
    ray = Ray(short)
    try:
        with own_directory("cluster") as directory:
            (directory / "postgres").mkdir(mode=0o711)
            with foreign_server(directory / "postgres") as server:
                server.administer(
                    "CREATE ROLE holloway_login LOGIN CREATEROLE PASSWORD 'correct horse'"
                )
                server.administer(
                    "CREATE DATABASE holloway OWNER holloway_login ENCODING 'UTF8'"
                    " TEMPLATE template0"
                )
                ray.start()
                with Forwarders() as between, World(directory, server, ray, between) as world:
                    yield world
                ray.end()
    finally:
        ray.end()
        left = [pid for machine in ray.started for pid in machine.processes()]
        shutil.rmtree(short, ignore_errors=True)
    assert left == []


def what_became(answer: Answer) -> str:
    """Of a request."""
    if answer is None:
        return "unanswered"
    return answer.reason if isinstance(answer, AuthorizationDenied) else "granted"


async def until(holds: Callable[[], Awaitable[Any]], seconds: float = PATIENCE_S) -> Any:
    """Wait for something true, and return it. Who cannot answer yet is waited for."""
    with trio.fail_after(seconds):
        while True:
            with suppress(ClusterError):
                if value := await holds():
                    return value
            await trio.sleep(0.1)
