"""Whole nodes of a cluster in virtual time, with keyed actors that count in a store under their
epoch, and what must be true of them whatever happens.

    world = KeyedWorld(seed=1, keys=3)
    world.start("a")
    world.start("b")
    world.run_for(NS_PER_S)
    asked = world.ask("a", world.keys[0])
    world.run_for(NS_PER_S)
    assert asked.total == 1
    world.check()
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar
from uuid import UUID

import attrs

from actors.model import Account, Authorization
from actors.store.interface import Put, Unavailable
from actors.store.memory import MemoryStore
from runtime.actor import LATER, Actor, ActorError, ActorRef, Raise, handles
from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.cluster.envelopes import make_codec
from runtime.cluster.keyed import Keeper, KeyedActor, KeyedActors, keeper_name
from runtime.cluster.leases import NodeRow
from runtime.cluster.member import BeginDraining, Identity, Leave
from runtime.cluster.node import ClusterNode
from runtime.cluster.tenure import Tenure
from runtime.cluster.testing import HeapCluster, HeapNode
from runtime.inspection import CrashReport, Report
from runtime.randomness import SeededRandomness, uuid7
from runtime.supervisor import ChildSpec, Supervisor
from runtime.testing import Faults, heap_sleep

KIND = "tally"
DAY = timedelta(days=1)
ASK_DEADLINE_NS = 5 * NS_PER_S


@attrs.frozen
class Add:
    """Count one more; answered by Total. `stays`: keep the call, and never answer it."""

    id: UUID
    takes_ns: int = 0
    stays: bool = False


@attrs.frozen
class Total:
    """What was counted, this one included."""

    value: int
    epoch: int
    node: str


@attrs.frozen
class Fail:
    pass


@attrs.frozen
class End:
    """Give up the lease and end, as after a long idle time."""


CODEC = make_codec({64: Add, 65: Total, 66: Fail, 67: End})


@attrs.define(eq=False)
class Asked:
    """A call that was made, and what came of it."""

    node: str
    key: UUID
    id: UUID
    at_ns: int
    outcomes: list[Total | Exception] = attrs.Factory(list)
    ended_ns: int = 0

    @property
    def total(self) -> int:
        """What was answered."""
        (outcome,) = self.outcomes
        if isinstance(outcome, Exception):
            raise outcome
        return outcome.value

    @property
    def epoch(self) -> int:
        (outcome,) = self.outcomes
        assert isinstance(outcome, Total), outcome
        return outcome.epoch

    @property
    def is_answered(self) -> bool:
        return any(isinstance(each, Total) for each in self.outcomes)

    @property
    def took_ns(self) -> int:
        return self.ended_ns - self.at_ns


@attrs.define(eq=False)
class Way:
    """How one node reaches the store: with delays both ways, and outages in which what was asked
    may have been done and nobody is told."""

    world: KeyedWorld
    name: str
    chance: SeededRandomness
    is_cut: bool = False

    async def _carry(
        self, function: Callable[..., Awaitable[Any]], *args: Any, **named: Any
    ) -> Any:
        await self._pass_time()
        error: Exception | None = None
        value: Any = None
        try:
            value = await function(*args, **named)
        except Exception as problem:
            error = problem
        await self._pass_time()
        if error is not None:
            raise error
        return value

    async def _pass_time(self) -> None:
        least, most = self.world.store_delay_ns
        await heap_sleep(least + self.chance.integer(most - least + 1))
        if self.is_cut:
            await heap_sleep(self.chance.integer(NS_PER_S))
            raise Unavailable("cut")

    async def join_node(self, name: str, **named: Any) -> int:
        answer: int = await self._carry(self.world.store.join_node, name, **named)
        return answer

    async def renew_node(self, name: str, incarnation: int, **named: Any) -> tuple[NodeRow, ...]:
        rows: tuple[NodeRow, ...] = await self._carry(
            self.world.store.renew_node, name, incarnation, **named
        )
        return rows

    async def nodes(self) -> tuple[NodeRow, ...]:
        rows: tuple[NodeRow, ...] = await self._carry(self.world.store.nodes)
        return rows

    async def expel_node(self, name: str, incarnation: int) -> None:
        await self._carry(self.world.store.expel_node, name, incarnation)

    async def leave_node(self, name: str, incarnation: int) -> None:
        await self._carry(self.world.store.leave_node, name, incarnation)

    async def acquire(self, key: UUID, *, owner: str, incarnation: int) -> int:
        epoch: int = await self._carry(
            self.world.store.acquire, key, owner=owner, incarnation=incarnation
        )
        return epoch

    async def release(self, key: UUID, *, owner: str, incarnation: int) -> None:
        await self._carry(self.world.store.release, key, owner=owner, incarnation=incarnation)

    async def count(self, key: UUID) -> int:
        """How much was counted."""
        rows = await self._carry(self.world.store.authorizations, key, limit=1_000)
        return len(rows)

    async def write(self, key: UUID, id: UUID, epoch: int) -> None:
        """Count one more, under the fence."""
        await self._carry(self._write, key, id, epoch)

    async def _write(self, key: UUID, id: UUID, epoch: int) -> None:
        at = self.world.cluster.clock.utc_now()
        row = Authorization(
            id=id,
            account_id=key,
            policy_id=id,
            client_id=id,
            gateway_id=id,
            resource_id=id,
            token_id=id,
            connection_id=id,
            remote_ip="192.0.2.1",
            created_at=at,
            expires_at=at + DAY,
        )
        await self.world.store.write_authorization(row, epoch=epoch)
        self.world.accepted.setdefault(key, []).append((epoch, id))


class Tally(KeyedActor):
    """Counts in the store; what it has in memory must be what is there."""

    kind: ClassVar[str] = KIND
    mailbox_limit = 50

    def __init__(self, key: UUID, tenure: Tenure, way: Way) -> None:
        super().__init__(key, tenure, way)
        self._way = way
        self._world = way.world
        self._total = 0
        self._kept: list[Any] = []

    async def took_over(self) -> None:
        self._world.owners.append((self.key, self.epoch, self.tenure.node, self.context.ref))
        self._total = await self.perform(self._way.count, self.key)

    async def about_to_move(self) -> None:
        if self.key in self._world.fail_to_move:
            raise KeyError("on purpose")
        await self.sleep(self._world.move_takes_ns)

    def terminated(self, reason: str) -> None:
        self._world.ends.append((self.key, self.epoch, reason))

    @handles(Add)
    async def add(self, message: Add) -> object:
        if message.stays and self.key not in self._world.kept:
            self._world.kept.add(self.key)
            self._kept.append(self.context.caller)
            return LATER
        if not await self.confirm():
            return Raise(Unavailable("not entitled"))
        self._world.handled.append((self.key, self.epoch, message.id))
        await self.sleep(message.takes_ns)
        await self.perform(self._way.write, self.key, message.id, self.epoch)
        self._total += 1
        return Total(self._total, self.epoch, self.tenure.node)

    @handles(Fail)
    def fail(self, message: Fail) -> None:
        raise KeyError("on purpose")

    @handles(End)
    async def end(self, message: End) -> None:
        await self.give_up("normal")


@attrs.frozen
class _Begin:
    pass


class Asker(Actor):
    """Makes one call."""

    def __init__(self, actors: KeyedActors, asked: Asked, add: Add, deadline_ns: int) -> None:
        self._actors = actors
        self._asked = asked
        self._add = add
        self._deadline_ns = deadline_ns

    def started(self) -> None:
        self.cast(self.context.ref, _Begin())

    @handles(_Begin)
    async def _on_begin(self, message: _Begin) -> None:
        outcome: Total | Exception
        try:
            outcome = await self._actors.call(self, self._asked.key, self._add, self._deadline_ns)
        except (ActorError, Unavailable) as error:
            outcome = error
        self._asked.ended_ns = self.context.now()
        self._asked.outcomes.append(outcome)
        self.stop()


@attrs.frozen(eq=False)
class WholeNode:
    """One node of the world, in one life."""

    heap: HeapNode
    cluster: ClusterNode
    tenure: Tenure
    way: Way
    actors: KeyedActors

    @property
    def keeper(self) -> ActorRef:
        ref = self.heap.scheduler.registry.whereis(keeper_name(KIND))
        assert ref is not None
        return ref

    def holds(self) -> bool:
        return self.tenure.holds(self.heap.scheduler.clock.monotonic_ns())

    def actor(self, key: UUID) -> ActorRef | None:
        """The keyed actor that runs here."""
        return self.heap.scheduler.registry.whereis((KIND, key))


class KeyedWorld:
    """See the module."""

    def __init__(
        self,
        seed: int = 1,
        *,
        keys: int = 4,
        latency_ns: tuple[int, int] = (NS_PER_MS // 10, NS_PER_MS),
        effect_delay_ns: tuple[int, int] = (0, 0),
        store_delay_ns: tuple[int, int] = (NS_PER_MS // 5, 2 * NS_PER_MS),
        faults: Faults | None = None,
    ) -> None:
        self.randomness = SeededRandomness(seed, "keyed world")
        self.cluster = HeapCluster(
            CODEC,
            self.randomness.child("cluster"),
            latency_ns=latency_ns,
            effect_delay_ns=effect_delay_ns,
            faults=faults,
            report=self._report,
        )
        self.store_delay_ns = store_delay_ns
        self.store = MemoryStore(self.cluster.clock)
        self.nodes: dict[str, WholeNode] = {}
        self.crashes: list[str] = []
        self.owners: list[tuple[UUID, int, str, ActorRef]] = []
        self.handled: list[tuple[UUID, int, UUID]] = []
        self.accepted: dict[UUID, list[tuple[int, UUID]]] = {}
        self.ends: list[tuple[UUID, int, str]] = []
        self.asked: list[Asked] = []
        self.fail_to_move: set[UUID] = set()
        self.kept: set[UUID] = set()
        self.move_takes_ns = 0
        self.over: list[tuple[str, HeapNode]] = []
        self.parted: set[frozenset[str]] = set()
        self.keys = tuple(self._make_account(number) for number in range(keys))

    # --- nodes ---

    def start(self, name: str) -> WholeNode:
        """A node begins a life; one of its name that still lives is superseded (and not ended)."""
        incarnation = finish(self.store.join_node(name, **_identity(name), ttl_ns=3 * NS_PER_S))
        heap = self.cluster.add(name, incarnation=incarnation)
        tenure = Tenure(name, incarnation)
        way = Way(self, name, self.randomness.child(f"{name}/{incarnation}"))
        cluster = ClusterNode(
            heap.scheduler,
            heap.remote,
            tenure,
            way,
            Identity(**_identity(name)),
            partial(self._refuses, name),
            incarnation=incarnation,
        )
        heap.link_changed = cluster.link_changed
        heap.scheduler.watch(cluster.start(), lambda reason: self.over.append((name, heap)))
        keeper = ChildSpec(
            id="keeper",
            factory=lambda: Keeper(
                KIND, tenure, way, lambda key: Tally(key, tenure, way), limit=1_000
            ),
            name=keeper_name(KIND),
        )
        heap.scheduler.spawn(Supervisor([keeper], intensity=1_000))
        node = self.nodes[name] = WholeNode(heap, cluster, tenure, way, KeyedActors(KIND, tenure))
        return node

    def kill(self, name: str) -> None:
        del self.nodes[name]
        self.cluster.kill(name)
        for asked in self.asked:
            if asked.node == name and not asked.outcomes:
                asked.outcomes.append(RuntimeError("whoever asked was killed"))

    def drain(self, name: str) -> None:
        self._tell_member(name, BeginDraining())

    def leave(self, name: str) -> None:
        self._tell_member(name, Leave())

    def part(self, *pair: str) -> None:
        self.parted.add(frozenset(pair))
        self.cluster.partition(*pair)

    def heal(self, *pair: str) -> None:
        self.parted.discard(frozenset(pair))
        self.cluster.heal(*pair)

    def _tell_member(self, name: str, message: object) -> None:
        node = self.nodes[name]
        member = node.cluster.member
        if member is not None:
            node.heap.scheduler.call_soon(member, message, lambda value, error: None)

    async def _refuses(self, asker: str, address: str) -> bool:
        """A node that was killed refuses, unless nothing comes through to where it was."""
        name = address.partition(":")[0]
        await heap_sleep(NS_PER_MS)
        return name not in self.nodes and frozenset((asker, name)) not in self.parted

    # --- calls ---

    def ask(
        self,
        name: str,
        key: UUID,
        *,
        deadline_ns: int = ASK_DEADLINE_NS,
        takes_ns: int = 0,
        stays: bool = False,
    ) -> Asked:
        """Call the key's actor from a node."""
        clock = self.cluster.clock
        id = uuid7(clock, self.randomness)
        asked = Asked(name, key, id, clock.monotonic_ns())
        self.asked.append(asked)
        node = self.nodes[name]
        add = Add(id, takes_ns, stays)
        node.heap.scheduler.spawn(Asker(node.actors, asked, add, deadline_ns))
        return asked

    def ask_all(self, **named: Any) -> list[Asked]:
        """Every key, from every node."""
        return [self.ask(name, key, **named) for key in self.keys for name in self.nodes]

    def cast(self, key: UUID, message: object) -> None:
        """To the key's actor, wherever it runs."""
        for node in self.nodes.values():
            ref = node.actor(key)
            if ref is not None:
                node.heap.scheduler.cast(ref, message)

    def run_for(self, duration_ns: int) -> None:
        """Let time pass. A process whose membership has ended for good ends then, as NodeProcess
        does."""
        self.cluster.run_for(duration_ns)
        over, self.over = self.over, []
        for name, heap in over:
            if name in self.nodes and self.nodes[name].heap is heap:
                self.kill(name)

    def run_asking(self, duration_ns: int, every_ns: int = 10 * NS_PER_MS) -> list[Asked]:
        """Let time pass, with a call again and again, of each key in turn and from each node."""
        asked: list[Asked] = []
        for number in range(duration_ns // every_ns):
            names = sorted(self.nodes)
            key = self.keys[number % len(self.keys)]
            asked.append(self.ask(names[number % len(names)], key))
            self.run_for(every_ns)
        return asked

    def answered(self, asked: list[Asked]) -> None:
        """Let time pass until all have their outcome; all of them are answers."""
        self.cluster.run_until(lambda: all(each.outcomes for each in asked), 10 * NS_PER_S)
        assert [each.outcomes for each in asked if not each.is_answered] == []

    def serving(self, key: UUID) -> list[str]:
        """On which nodes an actor of the key runs."""
        return [name for name, node in self.nodes.items() if node.actor(key) is not None]

    # --- what must be true ---

    def check(self) -> None:
        """No two owners, nothing lost, nothing twice."""
        owned = Counter((key, epoch) for key, epoch, _, _ in self.owners)
        assert all(count == 1 for count in owned.values()), "an epoch with two owners"
        place: dict[UUID, int] = {}
        for key, writes in self.accepted.items():
            epochs = [epoch for epoch, _ in writes]
            assert epochs == sorted(epochs), "a write under an old epoch"
            assert all((key, epoch) in owned for epoch in epochs), "an epoch that nobody has"
            place.update({id: number + 1 for number, (_, id) in enumerate(writes)})
        handled = Counter(id for _, _, id in self.handled)
        for asked in self.asked:
            assert len(asked.outcomes) <= 1, "a call with two answers"
            assert handled[asked.id] <= 1, "a call that was handled twice"
            if asked.is_answered:
                assert asked.total == place.get(asked.id), "acknowledged, and not so in the store"

    def check_orderly(self) -> None:
        """Where nobody died, no owner handles anything after the next one has begun to."""
        self.check()
        for key in self.keys:
            epochs = [epoch for each, epoch, _ in self.handled if each == key]
            assert epochs == sorted(epochs)

    # --- helpers ---

    def _make_account(self, number: int) -> UUID:
        clock = self.cluster.clock
        id = uuid7(clock, self.randomness)
        account = Account(id=id, name=f"k{number}", slug=f"k{number}", created_at=clock.utc_now())
        finish(self.store.apply(id, [Put(account)], who="test", at=clock.utc_now()))
        return id

    def _report(self, report: Report) -> None:
        if isinstance(report, CrashReport):
            self.crashes.append(f"{report.actor}: {report.reason}")


def _identity(name: str) -> dict[str, str]:
    return {"link_address": f"{name}:1", "door_address": f"{name}:2", "version": "test"}


def finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """A coroutine of the memory store, to its end."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it suspended")
