"""Who is connected just now, as the API shows it: asked of the actors, never of the database."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from uuid import UUID

from actors.messages import PRESENCE, ListPresence, ListRelays, Presence, PresenceChanged
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
        keeper = self._control.accounts.keeper_of(account_id)
        if keeper is None:
            return None
        try:
            located = await self._host.call(keeper, Locate(account_id, start=False), PATIENCE_NS)
            if located.ref is None:  # nobody is connected, so the account has no actor; or it moves
                return {} if located.is_here else None
            presence: Presence = await self._host.call(located.ref, ListPresence(), PATIENCE_NS)
        except CallError:
            return None
        clients = {
            each.client_id: Online(kind="client", remote_ip=str(each.remote), number=each.number)
            for each in presence.clients
        }
        return clients | {
            each.gateway_id: Online(kind="gateway", remote_ip=str(each.remote), number=each.number)
            for each in presence.gateways
        }

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
