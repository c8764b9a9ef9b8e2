"""The account's feed of changes, and what follows from them: the part of the account actor that
keeps its snapshot true, ends what may no longer be, and tells agents what is different.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Literal
from uuid import UUID

import attrs

from actors.attendance import Attendance, OnlineAgent
from actors.consequences import Touched, as_told
from actors.enrolment import device_refusal
from actors.messages import (
    PRESENCE,
    REVOCATIONS,
    End,
    PresenceChanged,
    RevokeRelayUse,
    VisibleResources,
    Wake,
)
from actors.model import Change, Client, Gateway
from actors.policy.engine import visible_resources
from actors.questions import QuestionsOfAccount
from actors.services import Services
from actors.store.interface import MAX_PAGE, Unavailable
from channel.messages import MAX_RESOURCES, ResourceUpdated
from channel.messages import Resource as ToldResource
from runtime.actor import handles

_Side = tuple[Attendance, Mapping[UUID, Any]]


@attrs.frozen
class _AgentDue:
    """An agent's token may have expired."""

    kind: Literal["client", "gateway"]
    id: UUID
    number: int


class FeedOfAccount(QuestionsOfAccount):
    """The part of the account actor that follows changes."""

    def __init__(self, services: Services, account_id: UUID) -> None:
        super().__init__(services, account_id)
        self._news: list[Change] = []

    # --- the feed ----------------------------------------------------------------------------

    @handles(Wake)
    async def _on_wake(self, message: Wake) -> None:
        try:
            await self._pull()
        except Unavailable:
            self._wake_again()

    async def _pull(self) -> None:
        """Catch up with the feed, and see to it that what changed has its consequences. Who has
        slept for longer than changes are kept (`Pruned`) starts anew from the account's contents,
        as after every other error that is not expected here."""
        while changes := await self._changes_after(self._snapshot.number):
            self._news += [change for change in changes if self._snapshot.apply(change)]
            await self._follow()
        if self._news:
            await self._follow()
        await self._write_ends()

    async def _changes_after(self, number: int) -> tuple[Change, ...]:
        changes: tuple[Change, ...] = await self._do(
            self._services.store.changes, self._account_id, after=number, limit=MAX_PAGE
        )
        return changes

    async def _follow(self) -> None:
        """Carry out the consequences of the news. Raises Unavailable if some could not be written;
        the news are then kept, and followed once more (which is harmless) with the next pull."""
        touched = Touched.by(self._news)
        failure: Unavailable | None = None
        for live in self._ledger:
            try:
                if live.authorization.resource_id in touched.rebuilt:
                    await self._end(live, "resource_changed")
                elif touched.concerns(live.authorization, self._snapshot):
                    await self._review(live)
            except Unavailable as error:
                failure = error
        self._tell_updated(touched.updated)
        if touched.presences:
            await self._check_presences()
        for change in self._news:
            if change.kind in ("client", "gateway") and change.after is None:
                self._revoke_relay_use(change.entity_id, is_gone=True)  # connected or not
        for online in self._clients:
            if touched.concerns_view(online.id, online.visible, self._snapshot):
                self._tell_visible(online)
        self._arm()
        if failure is not None:
            self._wake_again()
            raise failure
        self._news.clear()
        if self._snapshot.account is None:
            self.stop()

    def _tell_updated(self, resource_ids: Iterable[UUID]) -> None:
        for id in resource_ids:
            resource = self._snapshot.resources.get(id)
            carriers = {
                each.authorization.gateway_id
                for each in self._ledger
                if each.authorization.resource_id == id
            }
            for gateway_id in carriers if resource is not None else ():
                assert resource is not None
                self._tell(self._gateways, gateway_id, ResourceUpdated(resource=as_told(resource)))

    def _tell_visible(self, online: OnlineAgent) -> None:
        visible = self._visible(online.id)
        if visible != online.visible:
            online.visible = visible
            self._command(online.ref, VisibleResources(visible))

    def _visible(self, client_id: UUID) -> dict[UUID, ToldResource]:
        resources = visible_resources(self._snapshot, client_id)
        carried = [id for id in sorted(resources) if resources[id].kind != "device_pool"]
        return {id: as_told(resources[id]) for id in carried[:MAX_RESOURCES]}

    async def _check_presences(self) -> None:
        """Part with agents that may not be connected any more."""
        for attendance, rows in self._sides():
            for online in attendance:
                await self._check_presence(attendance, online, rows.get(online.id))

    async def _check_presence(
        self, attendance: Attendance, online: OnlineAgent, row: Client | Gateway | None
    ) -> None:
        """What an agent loses with its right to be connected ends before it is sent away."""
        refused = device_refusal(
            self._snapshot, row, online.token_id, online.remote, self.context.utc_now()
        )
        if refused is None:
            self._watch_token(online)
            return
        is_client = online.kind == "client"
        of_agent = self._ledger.of_client if is_client else self._ledger.of_gateway
        for live in of_agent(online.id):
            await self._end(live, refused.reason)
        attendance.remove(online)
        self._tell_presence(online, is_online=False)
        self._command(online.ref, End(refused))
        if row is not None:  # else its removal says so
            self._revoke_relay_use(online.id, is_gone=False)

    def _tell_presence(self, online: OnlineAgent, *, is_online: bool) -> None:
        self.broadcast(
            PRESENCE,
            PresenceChanged(
                account_id=self._account_id,
                kind=online.kind,
                id=online.id,
                number=online.number,
                online=is_online,
                remote=online.remote,
            ),
        )

    def _revoke_relay_use(self, agent_id: UUID, *, is_gone: bool) -> None:
        self.broadcast(REVOCATIONS, RevokeRelayUse(agent_id, is_gone))

    def _watch_token(self, online: OnlineAgent) -> None:
        expires_at = self._snapshot.tokens[online.token_id].expires_at
        if expires_at == online.token_expires_at:
            return
        online.token_expires_at = expires_at
        if expires_at is not None:
            delay = (expires_at - self.context.utc_now()) // timedelta(microseconds=1) * 1_000
            self.send_after(max(0, delay), _AgentDue(online.kind, online.id, online.number))

    @handles(_AgentDue)
    async def _on_agent_due(self, message: _AgentDue) -> None:
        attendance, rows = self._side(message.kind)
        online = attendance.get(message.id)
        if online is not None and online.number == message.number:
            online.token_expires_at = None
            await self._check_presence(attendance, online, rows.get(online.id))

    def _sides(self) -> tuple[_Side, _Side]:
        return self._side("client"), self._side("gateway")

    def _side(self, kind: Literal["client", "gateway"]) -> _Side:
        """Who of this kind is connected, and the rows of all that are known."""
        if kind == "client":
            return self._clients, self._snapshot.clients
        return self._gateways, self._snapshot.gateways
