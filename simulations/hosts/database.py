"""The store in memory behind all portal nodes of a world, and how each of them reaches it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar
from uuid import UUID

from actors.model import Authorization, Change
from actors.store.interface import Unavailable
from actors.store.memory import MemoryStore
from runtime.testing import heap_sleep
from simulations.checks.interface import Observer, hears
from simulations.net.world import World

T = TypeVar("T")


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never suspends, as those of the memory store."""
    try:
        work.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    work.close()
    raise RuntimeError("this coroutine wants an event loop")


class Follower(Protocol):
    """A node, as the database sees it."""

    name: str
    incarnation: int

    def wake(self, account_id: UUID) -> None: ...
    def wake_all(self) -> None: ...


class Database:
    """One database for all nodes. `is_away`: it cannot be reached; `slow_ns`: so long each answer
    takes. The world's own hand (the admin, the observers) reaches it always, by `store`."""

    def __init__(self, world: World, observers: tuple[Observer, ...] = ()) -> None:
        self.world = world
        self.store = _WatchedStore(world, observers)
        self.is_away = False
        self.slow_ns = 0
        self.claimed = hears(observers, "owner_claimed")
        self.released = hears(observers, "owner_released")
        self.written = hears(observers, "authorization_written")
        self._nodes: dict[Follower, None] = {}
        self.store.subscribe(self._changed)

    def attach(self, node: Follower) -> None:
        """The node listens for changes from now on."""
        self._nodes[node] = None

    def detach(self, node: Follower) -> None:
        self._nodes.pop(node, None)

    def fail(self, slow_ns: int = 0) -> None:
        """Away, or that slow, until `recover`."""
        self.is_away, self.slow_ns = slow_ns == 0, slow_ns

    def recover(self) -> None:
        self.is_away, self.slow_ns = False, 0
        for node in tuple(self._nodes):
            node.wake_all()

    def _changed(self, account_id: UUID) -> None:
        if self.is_away:
            return
        for node in tuple(self._nodes):
            node.wake(account_id)


class _WatchedStore(MemoryStore):
    """The memory store, which tells observers what became durable."""

    def __init__(self, world: World, observers: tuple[Observer, ...]) -> None:
        super().__init__(world.clock)
        self._world = world
        self._told = hears(observers, "changed")

    async def apply(self, *arguments: Any, **keywords: Any) -> tuple[Change, ...]:
        changes = await super().apply(*arguments, **keywords)
        for changed in self._told:
            changed(self._world.now, changes)
        return changes


class Reach:
    """The store, as one node reaches it: a `Store` whose every method may fail or take long."""

    def __init__(self, database: Database, node: Follower) -> None:
        self._database = database
        self._node = node

    def __getattr__(self, name: str) -> Any:
        method: Callable[..., Coroutine[Any, Any, Any]] = getattr(self._database.store, name)
        database = self._database

        async def ask(*arguments: Any, **keywords: Any) -> Any:
            if database.slow_ns:
                await heap_sleep(database.slow_ns)
            if database.is_away:
                raise Unavailable("the database is away")
            return await method(*arguments, **keywords)

        self.__dict__[name] = ask  # found at once from now on
        return ask

    async def acquire(self, key: UUID, *, owner: str, incarnation: int) -> int:
        epoch: int = await self._ask("acquire", key, owner=owner, incarnation=incarnation)
        for claimed in self._database.claimed:
            claimed(self._database.world.now, owner, incarnation, key, epoch)
        return epoch

    async def release(self, key: UUID, *, owner: str, incarnation: int) -> None:
        await self._ask("release", key, owner=owner, incarnation=incarnation)
        for released in self._database.released:
            released(self._database.world.now, owner, key)

    async def write_authorization(self, authorization: Authorization, *, epoch: int) -> None:
        await self._ask("write_authorization", authorization, epoch=epoch)
        for written in self._database.written:
            written(self._database.world.now, self._node.name, authorization, epoch)

    async def _ask(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        database = self._database
        if database.slow_ns:
            await heap_sleep(database.slow_ns)
        if database.is_away:
            raise Unavailable("the database is away")
        return await getattr(database.store, name)(*arguments, **keywords)
