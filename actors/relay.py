"""Relays: an actor for each that is connected, and the directory that hands them out.

A relay whose channel is only moving (its portal node drains, or died, or is parted from this one,
or it joins anew with another certificate) serves as before meanwhile, so it is handed out on: else
agents would give up allocations that are as good as ever. One that went away by itself, or was sent
away, is not.

A relay's stamp secret lives in memory only, here and in the relay; from it the directory makes TURN
credentials for one agent and one relay. An address that a relay announced is handed out only after
it was proven that a relay answers there.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from uuid import UUID

import attrs
import structlog

from actors.attachment import Channel
from actors.channel_owner import ChannelOwner
from actors.enrolment import refusal, token_refusal
from actors.messages import (
    DIRECTORY,
    DRAINING,
    RELAY_OWNERS,
    RELAYS,
    REVOCATIONS,
    AssignedRelay,
    AssignRelays,
    CheckToken,
    Closed,
    End,
    ListRelays,
    Moved,
    OnlineRelay,
    Received,
    RelayLoad,
    RelayOnline,
    RelayRegistered,
    RelaysChanged,
    RevokeRelayUse,
)
from actors.model import Relay, Token
from actors.owner import AGAIN_NS
from actors.relay_choice import ChoosableRelay, choose_relays, country_of, domain_of
from actors.services import Services
from actors.store.interface import InvalidReference, StoreError
from channel.credentials import turn_password, turn_user, turn_username_of
from channel.messages import (
    Heartbeat,
    Load,
    Rejoining,
    RelayInit,
    RelayJoin,
    RelayServer,
    RevokeUser,
    SocketAddress,
)
from runtime.actor import Actor, ActorRef, CallError, Down, NamedRef, Timer, handles
from runtime.cluster.tenure import RosterChanged
from runtime.links import NO_CONNECTION
from runtime.net.address import Address
from runtime.randomness import uuid7
from runtime.secret import Secret

PROVE_DEADLINE_NS = 10 * 10**9
REGISTER_DEADLINE_NS = 10**9
REGISTER_AGAIN_NS = AGAIN_NS
AWAY_NS = 30 * 10**9
"""So long a relay whose channel was lost with its node, or its node with the way to it, may take to
come back. An agent that is told of one that is dead finds out, and has another."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_log = structlog.get_logger("holloway.relays")


# --- the directory -------------------------------------------------------------------------------


@attrs.frozen(kw_only=True, eq=False)
class _Entry:
    ref: ActorRef
    relay: Relay
    stamp: Secret
    load: float
    certificate_pins: tuple[str, ...] = ()
    away_since_ns: int | None = None
    """Its actor is gone or out of reach, and it is expected to come back."""


@attrs.frozen
class _Awaited:
    """Whether the relay has come back since. `incarnation`: of the node that it was at, if that
    lives, and is only out of reach."""

    relay_id: UUID
    since_ns: int
    incarnation: int | None


class RelayDirectory(Actor):
    """Knows every relay that is online, at whatever node: each has one. Nothing of it is kept:
    relays come to a new one anew."""

    mailbox_limit = 20_000

    def __init__(self, services: Services) -> None:
        self._services = services
        self._by_id: dict[UUID, _Entry] = {}
        self._user_key = services.randomness.bytes(32)
        self._generation_by_agent: dict[UUID, int] = {}  # of revoked ones that are known still

    def started(self) -> None:
        self.subscribe(REVOCATIONS)

    @handles(RelayOnline)
    def _on_online(self, message: RelayOnline) -> RelayRegistered | None:
        caller = self.context.caller
        if caller is None or caller.ref is None:
            return None
        before = self._by_id.get(message.relay.id)
        if before is not None and before.ref != caller.ref:  # of two connections the newer stands
            self.cast(before.ref, End(refusal("superseded")))
        self._by_id[message.relay.id] = _Entry(
            ref=caller.ref,
            relay=message.relay,
            stamp=message.stamp,
            load=message.load,
            certificate_pins=message.certificate_pins,
        )
        if before is None or before.ref != caller.ref or before.away_since_ns is not None:
            self.monitor(caller.ref)
        self.publish(RELAYS, RelaysChanged())
        return RelayRegistered(self.context.ref)

    @handles(RelayLoad)
    def _on_load(self, message: RelayLoad) -> None:
        entry = self._by_id.get(message.relay_id)
        if entry is not None:
            self._by_id[message.relay_id] = attrs.evolve(entry, load=message.load)

    @handles(Down)
    def _on_down(self, message: Down) -> None:
        lost = [id for id, entry in self._by_id.items() if entry.ref == message.ref]
        for id in lost:
            if message.reason in (DRAINING, NO_CONNECTION):
                self._await(id, self._by_id[id], parted=message.reason == NO_CONNECTION)
            else:
                self._remove(id)

    def _await(self, relay_id: UUID, entry: _Entry, *, parted: bool) -> None:
        now = self.context.now()
        row = self._services.tenure.row(entry.ref.node) if parted else None
        incarnation = None if row is None else row.incarnation
        self._by_id[relay_id] = attrs.evolve(entry, away_since_ns=now)
        self.send_after(AWAY_NS, _Awaited(relay_id, now, incarnation))

    @handles(_Awaited)
    def _on_awaited(self, message: _Awaited) -> None:
        entry = self._by_id.get(message.relay_id)
        if entry is None or entry.away_since_ns != message.since_ns:
            return
        row = self._services.tenure.row(entry.ref.node)
        if message.incarnation is not None and row and row.incarnation == message.incarnation:
            # Its node lives. `Down` follows if that is out of reach still, or the relay has gone.
            self._by_id[message.relay_id] = attrs.evolve(entry, away_since_ns=None)
            self.monitor(entry.ref)
        else:
            self._remove(message.relay_id)

    def _remove(self, relay_id: UUID) -> None:
        del self._by_id[relay_id]
        self.publish(RELAYS, RelaysChanged())

    @handles(AssignRelays)
    def _on_assign(self, message: AssignRelays) -> tuple[AssignedRelay, ...]:
        """Those in use stay; then near ones of different failure domains: see `relay_choice`. A
        relay that drains has left its channel, and is none of them."""
        regions = self._services.regions
        country = None if message.remote is None else regions.country(message.remote)
        chosen = choose_relays(
            [self._choosable(entry, country) for entry in self._by_id.values()],
            count=self._services.limits.relays_per_agent,
            current=message.current,
            randomness=self._services.randomness,
        )
        entries = [self._by_id[id] for id in chosen]
        agent_id = message.agent_id
        return tuple(AssignedRelay(self._server(each, agent_id), each.ref) for each in entries)

    def _choosable(self, entry: _Entry, country: str | None) -> ChoosableRelay:
        relay = entry.relay
        return ChoosableRelay(
            relay_id=relay.id,
            load=entry.load,
            domain=domain_of(relay),
            near=country is not None and country_of(relay, self._services.regions) == country,
        )

    @handles(RevokeRelayUse)
    def _on_revoke(self, message: RevokeRelayUse) -> None:
        """Every relay ends what the agent has there. If it may come back, it comes as another."""
        life_ns = self._services.limits.relay_credentials_ns
        for entry in self._by_id.values():
            user = self._user(entry, message.agent_id)
            self.cast(entry.ref, RevokeUser(user=user, expires_in_ns=life_ns))
        generation = self._generation_by_agent.pop(message.agent_id, 0)
        if not message.is_gone:
            self._generation_by_agent[message.agent_id] = generation + 1

    @handles(ListRelays)
    def _on_list(self, message: ListRelays) -> tuple[OnlineRelay, ...]:
        return tuple(
            OnlineRelay(relay=self._by_id[id].relay, load=self._by_id[id].load)
            for id in sorted(self._by_id)
        )

    def _user(self, entry: _Entry, agent_id: UUID) -> str:
        generation = self._generation_by_agent.get(agent_id, 0)
        return turn_user(self._user_key, entry.relay.id, agent_id, generation)

    def _server(self, entry: _Entry, agent_id: UUID) -> RelayServer:
        life_ns = self._services.limits.relay_credentials_ns
        now_s = (self.context.utc_now() - _EPOCH) // timedelta(seconds=1)
        username = turn_username_of(now_s + life_ns // 10**9, self._user(entry, agent_id))
        return RelayServer(
            id=entry.relay.id,
            addresses=entry.relay.addresses,
            username=username,
            password=turn_password(entry.stamp.reveal(), entry.relay.id, username),
            expires_in_ns=life_ns,
            certificate_pins=entry.certificate_pins,
        )


# --- one relay ------------------------------------------------------------------------------------


PROVEN = "proven"
"""Why a `_Proof` ends that succeeded."""


@attrs.frozen
class _Begin:
    """Begin with what takes its time."""


@attrs.frozen
class _Record:
    """All addresses are proven or not: write the relay's row, then register."""


@attrs.frozen
class _Register:
    """Tell the directories that do not know of us."""


class _Proof(Actor):
    """Whether a relay answers at an address that it announced, over the transport that it said, and
    over TLS and QUIC with one of the certificates that it said. Its end says so."""

    def __init__(self, services: Services, address: SocketAddress, pins: tuple[str, ...]) -> None:
        self._services = services
        self._address = address
        self._pins = pins

    def started(self) -> None:
        self.cast(self.context.ref, _Begin())

    @handles(_Begin)
    async def _on_begin(self, message: _Begin) -> None:
        answers = False
        with suppress(CallError, OSError):
            answers = await self.perform(
                self._services.prove_address,
                self._address,
                self._pins,
                deadline_ns=PROVE_DEADLINE_NS,
            )
        self.stop(PROVEN if answers else "normal")


class RelayActor(ChannelOwner):
    """One connected relay: it owns the relay's channel, and its secret while it is connected."""

    def __init__(
        self,
        services: Services,
        channel: Channel,
        *,
        token_id: UUID,
        join: RelayJoin,
    ) -> None:
        super().__init__(services, channel, "relay")
        self._token_id = token_id
        self._name = join.name
        self._region = join.region
        self._failure_domain = join.failure_domain
        self._announced = join.addresses
        self._pins = join.certificate_pins
        self._is_rejoining = False
        self._stamp = Secret(join.stamp_secret)
        self._load = join.load
        self._remote = channel.remote
        self._relay: Relay | None = None
        self._address_by_proof: dict[ActorRef, SocketAddress] = {}
        self._proven: set[SocketAddress] = set()
        self._directory_by_node: dict[str, ActorRef] = {}
        self._register_timer: Timer | None = None
        self._token_timer: Timer | None = None

    def started(self) -> None:
        super().started()
        self.subscribe(RELAY_OWNERS)
        self.cast(self.context.ref, _Begin())

    @handles(_Begin)
    def _on_begin(self, message: _Begin) -> None:
        """Prove all addresses at once: those where nobody answers cost no more than one."""
        for each in dict.fromkeys(self._announced):
            proof = self.spawn(_Proof(self._services, each, self._pins), label="proof")
            self._address_by_proof[proof] = each
            self.monitor(proof)

    def _proof_ended(self, proof: ActorRef, reason: str) -> None:
        address = self._address_by_proof.pop(proof)
        if reason == PROVEN:
            self._proven.add(address)
        if not self._address_by_proof:
            self.cast(self.context.ref, _Record())

    @handles(_Record)
    async def _on_record(self, message: _Record) -> None:
        proven = tuple(each for each in self._announced if each in self._proven)
        for each in self._announced:
            if proven and each not in proven:
                place = Address(each.address, each.port)
                _log.warning(
                    "relay_address_unproven",
                    name=self._name,
                    address=str(place),
                    transport=each.transport,
                )
        if not proven:
            _log.warning("relay_unproven", name=self._name, announced=len(self._announced))
            self.refuse("unavailable", "no announced address answered")
            return
        try:
            self._relay = await self._record(proven)
        except InvalidReference:  # the token was deleted meanwhile
            self.refuse("invalid_token")
            return
        except StoreError:
            self.refuse("unavailable")
            return
        self.say(RelayInit(relay_id=self._relay.id))
        self.begin_doors()
        self.cast(self.context.ref, _Register())
        self.cast(self.context.ref, CheckToken())

    @handles(CheckToken)
    async def _on_check_token(self, message: CheckToken) -> None:
        """Part with a relay whose token is gone; then look again, at the latest when it expires."""
        again_ns = self._services.limits.relay_token_check_ns
        try:
            token: Token | None = await self.perform(
                self._services.store.find_token, self._token_id
            )
        except StoreError:
            pass  # what the store does not say now it says the next time
        else:
            now = self.context.utc_now()
            refused = (
                refusal("invalid_token")
                if token is None
                else token_refusal(token, self._remote, now)
            )
            if refused is not None:
                self.part(refused)
                return
            if token is not None and token.expires_at is not None:
                left_ns = (token.expires_at - now) // timedelta(microseconds=1) * 1_000
                again_ns = min(again_ns, left_ns)
        if self._token_timer is not None:
            self.cancel(self._token_timer)
        self._token_timer = self.send_after(again_ns, message)

    async def _record(self, proven: tuple[SocketAddress, ...]) -> Relay:
        """The relay's row: that of its token and name, or a new one."""
        store = self._services.store
        known = [
            each
            for each in await self.perform(store.relays)
            if (each.token_id, each.name) == (self._token_id, self._name)
        ]
        id = known[0].id if known else uuid7(self._services.clock, self._services.randomness)
        relay = Relay(
            id=id,
            token_id=self._token_id,
            name=self._name,
            region=self._region,
            failure_domain=self._failure_domain,
            addresses=proven,
            last_seen_at=self.context.utc_now(),
        )
        await self.perform(store.put_relay, relay)
        return relay

    @handles(RosterChanged)
    def _on_roster_changed(self, message: RosterChanged) -> None:
        super()._on_roster_changed(message)
        self._register_soon(0)

    @handles(_Register)
    async def _on_register(self, message: _Register) -> None:
        """Each node has a directory; those that do not answer now are asked once more."""
        tenure = self._services.tenure
        missing = [node for node in self._nodes() if node not in self._directory_by_node]
        assert self._relay is not None
        online = RelayOnline(
            relay=self._relay,
            stamp=self._stamp,
            load=self._load,
            certificate_pins=self._pins,
        )
        for node in missing:
            name = NamedRef(DIRECTORY, None if node == tenure.node else node)
            try:
                known: RelayRegistered = await self.call(name, online, REGISTER_DEADLINE_NS)
            except CallError:
                self._register_soon(REGISTER_AGAIN_NS)
                continue
            self._directory_by_node[node] = known.directory
            self.monitor(known.directory)

    def _nodes(self) -> tuple[str, ...]:
        """This one first."""
        own = self._services.tenure.node
        others = (row.name for row in self._services.tenure.rows if row.name != own)
        return (own, *others)

    def _register_soon(self, delay_ns: int) -> None:
        if self._relay is None:
            return
        if self._register_timer is not None:
            self.cancel(self._register_timer)
        self._register_timer = self.send_after(delay_ns, _Register())

    @handles(Down)
    def _on_down(self, message: Down) -> None:
        if message.ref in self._address_by_proof:
            self._proof_ended(message.ref, message.reason)
            return
        for node, directory in list(self._directory_by_node.items()):
            if directory == message.ref:
                del self._directory_by_node[node]
                self._register_soon(REGISTER_AGAIN_NS)

    @handles(Received)
    def _on_received(self, message: Received) -> None:
        said = message.frame.message
        match said:
            case Load():
                self._load = said.load
                if self._relay is not None:
                    load = RelayLoad(relay_id=self._relay.id, load=said.load)
                    for directory in self._directory_by_node.values():
                        self.cast(directory, load)
            case Rejoining():
                self._is_rejoining = True
            case Heartbeat():
                pass  # answered by the channel itself
            case _:
                self.refuse("protocol_error", "not in place after the join")

    @handles(Closed)
    def _on_closed(self, message: Closed) -> None:
        """Who watches us learns whether the relay will be back at once."""
        self._goodbye = None
        self.stop(DRAINING if self._is_rejoining else "normal")

    @handles(RevokeUser)
    def _on_revoke_user(self, message: RevokeUser) -> None:
        self.say(message)

    @handles(Moved)
    def _on_moved(self, message: Moved) -> None:
        """A relay is known by what it announced; its token may be good from some places only."""
        self._remote = message.remote
        self.cast(self.context.ref, CheckToken())
