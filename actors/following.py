"""The account's feed of changes, and what follows from them: the part of the account actor that
keeps its snapshot true, ends what may no longer be, and tells agents what is different.

A change costs what it touches: the authorisations, agents and views that it may concern are found
by index. Only what disables an account, or makes a group another kind of group, looks at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import chain
from typing import Any, Literal
from uuid import UUID

import attrs

from actors.attendance import Attendance, OnlineAgent
from actors.authorizations import AGAIN_NS
from actors.consequences import Touched, as_told, names_of
from actors.devices import Devices
from actors.enrolment import device_refusal, interface_of
from actors.ledger import Live
from actors.messages import (
    PRESENCE,
    REVOCATIONS,
    End,
    FromOwner,
    PostureReported,
    PresenceChanged,
    RegionsChanged,
    RevokeRelayUse,
    ViewChanged,
    Wake,
)
from actors.model import Change, Client, Fact, Gateway, Resource
from actors.policy.engine import candidates, visible_resources
from actors.questions import QuestionsOfAccount
from actors.services import Services
from actors.store.interface import (
    MAX_MUTATIONS,
    MAX_PAGE,
    Conflict,
    InvalidReference,
    NotFound,
    Outdated,
    Put,
    Unavailable,
)
from channel.messages import (
    MAX_RESOURCES,
    ConfigChanged,
    Disconnect,
    ResourceUpdated,
)
from channel.messages import Resource as ToldResource
from runtime.actor import Timer, handles
from runtime.cluster.envelopes import Enclosed

SLICE = 500
"""So many authorisations are looked at without a pause."""
SLICE_PAUSE_NS = 10**6
POSTURE_NS = 50 * 10**6
"""So long the reported facts of several devices are collected, to be written together."""
POSTURE_ATTEMPTS = 3
BY_DEVICES = "the devices themselves"
"""Who changed what devices report."""

_Side = tuple[Attendance, Mapping[UUID, Any]]


@attrs.frozen
class _AgentDue:
    """An agent's token may have expired."""

    kind: Literal["client", "gateway"]
    id: UUID
    number: int


@attrs.frozen
class _WritePostures:
    """Devices have reported facts."""


class FeedOfAccount(QuestionsOfAccount):
    """The part of the account actor that follows changes."""

    def __init__(self, services: Services, account_id: UUID) -> None:
        super().__init__(services, account_id)
        self._devices = Devices()
        self._pulled_ns = -1
        """When the last reading of the feed began that was carried through."""
        self._news: list[Change] = []
        self._told: dict[UUID, tuple[Resource, ToldResource]] = {}
        self._shared_views: dict[tuple[UUID, int, frozenset[UUID]], dict[UUID, ToldResource]] = {}
        self._shared_orders: dict[tuple[tuple[int, ...], tuple[UUID, ...]], FromOwner] = {}
        """What several clients are told alike: only while views are told."""
        self._postures: dict[UUID, tuple[Fact, ...]] = {}
        self._posture_timer: Timer | None = None

    # --- the feed ----------------------------------------------------------------------------

    @handles(Wake)
    async def _on_wake(self, message: Wake) -> None:
        if message.at_ns is not None and message.at_ns < self._pulled_ns and not self._news:
            return  # what wakes us was seen meanwhile, since it is mostly our own writing
        try:
            await self._pull()
        except Unavailable:
            self._wake_again()

    async def _pull(self) -> None:
        """Catch up with all that the feed had when this began, and see to it that what changed has
        its consequences. Who has slept for longer than changes are kept (`Pruned`) starts anew from
        the account's contents, as after every other error that is not expected here."""
        began_ns, is_last = self.context.now(), False
        while not is_last:
            changes = await self._changes_after(self._snapshot.number)
            is_last = len(changes) < MAX_PAGE
            for change in changes:
                if self._snapshot.apply(change):
                    self._devices.follow(change)
                    self._news.append(change)
            if changes:
                await self._follow()
        if self._news:
            await self._follow()
        self._pulled_ns = began_ns
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
        tokens = self._touched_tokens(touched)
        failure: Unavailable | None = None
        for live, reason in self._doomed(touched):
            await self._end(live, reason)
        for live in self._touched_lives(touched, tokens):
            try:
                await self._review(live)
            except Unavailable as error:
                failure = error
        self._tell_updated(touched.updated)
        await self._part_with_renewed(touched)
        for attendance, online in self._touched_agents(touched, tokens):
            rows = self._side(online.kind)[1]
            await self._check_presence(attendance, online, rows.get(online.id))
        for change in self._news:
            if change.kind in ("client", "gateway") and change.after is None:
                self._revoke_relay_use(change.entity_id, is_gone=True)  # connected or not
        if touched.config:
            self._tell_config()
        self._tell_views(touched, tokens)
        self._arm()
        if failure is not None:
            self._wake_again()
            raise failure
        self._news.clear()
        if self._snapshot.account is None:
            self.stop()

    @handles(RegionsChanged)
    async def _on_regions_changed(self, message: RegionsChanged) -> None:
        """Decide anew what depends on countries. Others have their turn after every SLICE."""
        policies = self._snapshot.policies
        try:
            for place, live in enumerate(self._ledger, 1):
                policy = policies.get(live.authorization.policy_id)
                if policy is None or policy.conditions.remote_ip_location_region is not None:
                    await self._review(live)
                if place % SLICE == 0:
                    await self.sleep(SLICE_PAUSE_NS)
        except Unavailable:
            self.send_after(AGAIN_NS, message)
        self._arm()

    # --- what is touched -----------------------------------------------------------------------

    def _touched_tokens(self, touched: Touched) -> set[UUID]:
        """The tokens of whatever may have made sessions worse."""
        tokens = set(touched.tokens)
        for id in touched.principals:
            principal = self._snapshot.principals.get(id)
            if principal is not None:  # else its tokens went with it
                tokens.update(token.id for token in self._snapshot.sessions_of(principal))
        if touched.auth_providers:
            tokens.update(
                token.id
                for token in self._snapshot.tokens.values()
                if token.auth_provider_id in touched.auth_providers
            )
        return tokens

    def _doomed(self, touched: Touched) -> Iterator[tuple[Live, str]]:
        """What ends whatever the policies say now."""
        ledger = self._ledger
        if touched.ranges:
            yield from ((live, "ranges_changed") for live in ledger)
        for id in touched.rebuilt:
            yield from ((live, "resource_changed") for live in ledger.of_resource(id))
        for id in touched.renewed_tokens:
            yield from ((live, "token") for live in ledger.of_token(id))
        for id in touched.renewed_devices:
            of_device = chain(ledger.of_client(id), ledger.of_gateway(id))
            yield from ((live, "device_changed") for live in of_device)

    def _touched_lives(self, touched: Touched, tokens: Iterable[UUID]) -> list[Live]:
        """The authorisations that have to be decided anew."""
        ledger = self._ledger
        if touched.everything:
            return list(ledger)
        found = chain(
            *map(ledger.of_client, touched.clients),
            *map(ledger.of_gateway, touched.gateways),
            *map(ledger.of_resource, touched.resources),
            *map(ledger.of_policy, touched.policies),
            *map(ledger.of_token, tokens),
        )
        return list({live.id: live for live in found}.values())

    def _touched_agents(
        self, touched: Touched, tokens: Iterable[UUID]
    ) -> list[tuple[Attendance, OnlineAgent]]:
        """Who is connected and may have lost the right to be."""
        found: list[tuple[Attendance, OnlineAgent]] = []
        for attendance, ids in (
            (self._clients, touched.clients),
            (self._gateways, touched.gateways),
        ):
            if touched.everything:
                found += [(attendance, online) for online in attendance]
                continue
            by_id = (attendance.get(id) for id in ids)
            by_token = chain(*map(attendance.by_token, tokens))
            agents = {each.id: each for each in chain(by_id, by_token) if each is not None}
            found += [(attendance, online) for online in agents.values()]
        return found

    # --- what agents are told ------------------------------------------------------------------

    def _tell_updated(self, resource_ids: Iterable[UUID]) -> None:
        for id in resource_ids:
            resource = self._snapshot.resources.get(id)
            lives = () if resource is None else self._ledger.of_resource(id)
            for gateway_id in {live.authorization.gateway_id for live in lives}:
                assert resource is not None
                self._tell(self._gateways, gateway_id, ResourceUpdated(resource=as_told(resource)))

    def _tell_config(self) -> None:
        """What the account's settings say to clients."""
        account = self._snapshot.account
        if account is None:
            return
        names = names_of(account)
        for online in self._clients:
            interface = interface_of(account, self._snapshot.clients[online.id])
            self._command(online.ref, ConfigChanged(interface=interface, names=names))

    def _tell_views(self, touched: Touched, tokens: Iterable[UUID]) -> None:
        """Tell clients what they see now and did not, or see no more."""
        try:
            self._tell_each_view(touched, tokens)
        finally:
            self._shared_views.clear()
            self._shared_orders.clear()

    def _tell_each_view(self, touched: Touched, tokens: Iterable[UUID]) -> None:
        if touched.everything:
            for online in self._clients:
                self._tell_view(online, None)
            return
        whole = {each.id for id in tokens for each in self._clients.by_token(id)}
        whole |= {id for id in touched.clients if self._clients.get(id) is not None}
        parts: dict[UUID, set[UUID]] = {}
        if touched.seen:
            for online in self._clients:
                seen = {id for id in touched.seen if id in online.visible} | touched.appeared
                if seen:
                    parts.setdefault(online.id, set()).update(seen)
        for group_id, resource_ids in touched.given.items():
            for online in self._clients_in(group_id):
                parts.setdefault(online.id, set()).update(resource_ids)
        for client_id in whole | parts.keys():
            online_client = self._clients.get(client_id)
            if online_client is not None:
                ids = None if client_id in whole else parts[client_id]
                self._tell_view(online_client, ids)

    def _clients_in(self, group_id: UUID) -> Iterator[OnlineAgent]:
        """The connected clients of the members of a group: by its members, or by who is connected,
        whichever are fewer."""
        snapshot = self._snapshot
        members = snapshot.principals_by_group.get(group_id.int, ())
        if group_id.int not in snapshot.everyone_groups and len(members) < len(self._clients):
            for principal in snapshot.members_of(group_id):
                for token in snapshot.sessions_of(principal):
                    yield from self._clients.by_token(token.id)
            return
        for online in self._clients:
            principal_id = snapshot.clients[online.id].principal_id
            if snapshot.is_member(snapshot.principals[principal_id], group_id):
                yield online

    def _tell_view(self, online: OnlineAgent, resource_ids: set[UUID] | None) -> None:
        """Tell a client how these resources (None: all) are to be seen by it."""
        before = online.visible
        if resource_ids is None or len(before) + len(resource_ids) > MAX_RESOURCES:
            after = self._visible(online)
            resource_ids = before.keys() | after.keys()
        else:
            after = self._visible_of(online, resource_ids)
        upserted = [after[id] for id in resource_ids if id in after and after[id] != before.get(id)]
        removed = [id for id in resource_ids if id in before and id not in after]
        if upserted or removed:
            for id in removed:
                del before[id]
            before.update({each.id: each for each in upserted})
            upserted.sort(key=lambda each: each.id)
            self._tell_changed(online, upserted, removed)

    def _tell_changed(
        self, online: OnlineAgent, upserted: list[ToldResource], removed: list[UUID]
    ) -> None:
        """One object tells all clients the same."""
        key = (tuple(map(id, upserted)), tuple(removed))
        order = self._shared_orders.get(key)
        if order is None:
            view = ViewChanged(tuple(upserted), tuple(sorted(removed)))
            order = self._shared_orders[key] = FromOwner(self.epoch, Enclosed(view))
        self.cast(online.ref, order)

    def _visible(self, online: OnlineAgent) -> dict[UUID, ToldResource]:
        """All that a client is to see."""
        resources = visible_resources(self._snapshot, online.id)
        kinds = self._services.spoken.carried(online.version)
        carried = [id for id in sorted(resources) if resources[id].kind in kinds]
        return {id: self._as_told(resources[id]) for id in carried[:MAX_RESOURCES]}

    def _visible_of(self, online: OnlineAgent, ids: Iterable[UUID]) -> dict[UUID, ToldResource]:
        """What of these resources a client is to see: what all clients of its principal are that
        speak the same version."""
        snapshot, kinds = self._snapshot, self._services.spoken.carried(online.version)
        principal = snapshot.principals[snapshot.clients[online.id].principal_id]
        key = (principal.id, online.version, frozenset(ids))
        if key in self._shared_views:
            return self._shared_views[key]
        resources = (snapshot.resources.get(id) for id in key[2])
        view = self._shared_views[key] = {
            each.id: self._as_told(each)
            for each in resources
            if each is not None and each.kind in kinds and candidates(snapshot, principal, each.id)
        }
        return view

    def _as_told(self, resource: Resource) -> ToldResource:
        """The same object for all clients, so that the next comparison is quick."""
        known = self._told.get(resource.id)
        if known is None or known[0] is not resource:
            if len(self._told) > 2 * len(self._snapshot.resources):
                self._told.clear()
            known = self._told[resource.id] = (resource, as_told(resource))
        return known[1]

    # --- who may be connected ------------------------------------------------------------------

    async def _part_with_renewed(self, touched: Touched) -> None:
        """Part with agents that have to join anew: another token, another device, other ranges."""
        for attendance, _ in self._sides():
            for id in touched.renewed_tokens:
                for online in attendance.by_token(id):
                    await self._part(attendance, online, self._refusal("invalid_token"))
            for id in touched.renewed_devices:
                device = attendance.get(id)
                if device is not None:
                    detail = "its address or key is another"
                    await self._part(attendance, device, self._refusal("unavailable", detail))
        if touched.ranges:
            for online in self._gateways:
                refused = self._refusal("unavailable", "the account has other ranges")
                await self._part(self._gateways, online, refused)

    async def _check_presence(
        self, attendance: Attendance, online: OnlineAgent, row: Client | Gateway | None
    ) -> None:
        """What an agent loses with its right to be connected ends before it is sent away."""
        if attendance.get(online.id) is not online:
            return
        refused = device_refusal(
            self._snapshot, row, online.token_id, online.remote, self.context.utc_now()
        )
        if refused is None:
            self._watch_token(online)
            return
        await self._part(attendance, online, refused)
        if row is not None:  # else its removal says so
            self._revoke_relay_use(online.id, is_gone=False)

    async def _part(self, attendance: Attendance, online: OnlineAgent, refused: Disconnect) -> None:
        is_client = online.kind == "client"
        of_agent = self._ledger.of_client if is_client else self._ledger.of_gateway
        for live in of_agent(online.id):
            await self._end(live, refused.reason)
        attendance.remove(online)
        self._tell_presence(online, is_online=False)
        self._command(online.ref, End(refused))

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

    # --- rows that agents change ---------------------------------------------------------------

    async def _write_rows(self, puts: Sequence[Put], who: str) -> bool:
        """Write rows of devices, and follow that; False if something else came first, which is
        known then. Raises Unavailable, Invalid."""
        try:
            await self._do(
                self._services.store.apply,
                self._account_id,
                puts,
                who=who,
                at=self.context.utc_now(),
            )
        except (Conflict, InvalidReference, NotFound, Outdated):
            await self._pull()
            return False
        await self._pull()
        return True

    @handles(PostureReported)
    def _on_posture(self, message: PostureReported) -> None:
        if self._clients.current(message.client_id, message.number) is not None:
            self._postures[message.client_id] = message.facts
            self._write_postures_after(POSTURE_NS)

    def _write_postures_after(self, delay_ns: int) -> None:
        if self._posture_timer is None or not self._posture_timer.pending:
            self._posture_timer = self.send_after(delay_ns, _WritePostures())

    @handles(_WritePostures)
    async def _on_write_postures(self, message: _WritePostures) -> None:
        """What devices report of themselves goes into their rows, where it differs; what follows
        from that is told by the feed."""
        try:
            for _ in range(POSTURE_ATTEMPTS):
                puts = self._changed_postures()
                if not puts or await self._write_rows(puts[:MAX_MUTATIONS], BY_DEVICES):
                    break
        except Unavailable:
            self._write_postures_after(AGAIN_NS)
            return
        if self._changed_postures():
            self._write_postures_after(POSTURE_NS)
        else:
            self._postures.clear()

    def _changed_postures(self) -> list[Put]:
        puts = []
        for id, facts in self._postures.items():
            row = self._snapshot.clients.get(id)
            if row is not None and row.posture != facts:
                puts.append(Put(attrs.evolve(row, posture=facts), row))
        return puts
