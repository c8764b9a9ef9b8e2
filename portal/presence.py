"""Who is connected just now, as the API shows it: asked of the actors, never of the database."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from actors.messages import ListPresence, ListRelays, Presence
from actors.tree import ControlPlane
from runtime.cluster.keyed import Locate
from runtime.errors import CallError
from runtime.host import TrioHost

PATIENCE_NS = 10**9


class LivePresence:
    """`portal.api.office.Live` over the control plane. Questions wait PATIENCE_NS at most."""

    def __init__(self, host: TrioHost, control: ControlPlane) -> None:
        self._host = host
        self._control = control

    async def online(self, account_id: UUID) -> Mapping[UUID, str] | None:
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
        addresses = {each.client_id: str(each.remote) for each in presence.clients}
        return addresses | {each.gateway_id: str(each.remote) for each in presence.gateways}

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
