"""Who is connected just now, as the API shows it: asked of the actors, never of the database."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

from actors.messages import (
    PRESENCE,
    AskExposure,
    Exposures,
    ListPresence,
    ListRelays,
    Presence,
    PresenceChanged,
    ResourceExposure,
)
from actors.tree import ControlPlane
from portal.api.office import Online
from runtime.actor import Actor, handles
from runtime.cluster.keyed import Locate
from runtime.errors import CallError
from runtime.host import TrioHost

PATIENCE_NS = 10**9


class LivePresence:
    """`portal.api.office.Live` over the control plane. Questions wait PATIENCE_NS at most."""

    def __init__(self, host: TrioHost, control: ControlPlane) -> None:
        self._host = host
        self._control = control

    async def online(self, account_id: UUID) -> Mapping[UUID, Online] | None:
        nobody = Presence(clients=(), gateways=())
        presence: Presence | None = await self._ask(account_id, ListPresence(), nobody)
        if presence is None:
            return None
        clients = {
            each.client_id: Online(kind="client", remote_ip=str(each.remote), number=each.number)
            for each in presence.clients
        }
        return clients | {
            each.gateway_id: Online(kind="gateway", remote_ip=str(each.remote), number=each.number)
            for each in presence.gateways
        }

    async def exposed(
        self, account_id: UUID, resource_ids: tuple[UUID, ...]
    ) -> Mapping[UUID, ResourceExposure] | None:
        found: Exposures | None = await self._ask(account_id, AskExposure(resource_ids))
        return None if found is None else {each.resource_id: each for each in found.resources}

    async def _ask(self, account_id: UUID, question: object, of_nobody: Any = None) -> Any:
        """The answer of the account's actor; None if it cannot be asked just now, or moves. Where
        it does not run, since nobody has been connected for a while, it is started, or the answer
        is `of_nobody`."""
        keeper = self._control.accounts.keeper_of(account_id)
        if keeper is None:
            return None
        try:
            where = Locate(account_id, start=of_nobody is None)
            located = await self._host.call(keeper, where, PATIENCE_NS)
            if located.ref is None:
                return of_nobody if located.is_here else None
            return await self._host.call(located.ref, question, PATIENCE_NS)
        except CallError:
            return None

    def watch(self, told: Callable[[PresenceChanged], None]) -> None:
        self._host.scheduler.spawn(PresenceWatcher(told), label="presence watcher")

    def wake_relays(self) -> None:
        self._control.wake_relays()

    async def relays_online(self) -> frozenset[UUID] | None:
        directory = self._control.relay_directory
        if directory is None:
            return None
        try:
            relays = await self._host.call(directory, ListRelays(), PATIENCE_NS)
        except CallError:
            return None
        return frozenset(each.relay.id for each in relays)


class PresenceWatcher(Actor):
    """Hears of agents that come and go, on all nodes."""

    mailbox_limit = 20_000

    def __init__(self, told: Callable[[PresenceChanged], None]) -> None:
        self._told = told

    def started(self) -> None:
        self.subscribe(PRESENCE)

    @handles(PresenceChanged)
    def _on_change(self, change: PresenceChanged) -> None:
        self._told(change)
