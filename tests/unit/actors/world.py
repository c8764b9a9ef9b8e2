"""A whole control plane in virtual time, with agents that are as simple as agents can be.

Every message to an agent goes through the real codec. Clients and gateways sign their joins with
real keys; a gateway acknowledges what it is asked unless it is told to be silent.

Longer than other files: every agent here is driven by, and asked about, the same few seams.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeVar
from uuid import UUID

import attrs

from actors.attachment import Attachment, OwnedChannel
from actors.logs import Log, Seen
from actors.messages import ACCOUNT, ListLive, ListPresence, ListRelays, OnlineRelay, Presence
from actors.model import (
    Account,
    Authorization,
    Change,
    Conditions,
    Entity,
    EntityKind,
    Group,
    Membership,
    Policy,
    Principal,
    Relay,
    Resource,
    Site,
    Token,
)
from actors.policy.conditions import NOWHERE, Regions
from actors.services import Limits
from actors.store.interface import MAX_PAGE, Mutation, Put, Remove, Unavailable
from actors.store.memory import MemoryStore
from actors.tree import ControlPlane
from actors.wire import node_codec
from channel.credentials import (
    decode_token,
    device_key_of,
    encode_token,
    hash_token,
    join_statement,
    sign_join,
)
from channel.frames import PORTAL_FRAME_LIMIT, Frame, FrameDecoder, encode_parts
from channel.joining import split_join
from channel.messages import (
    TO_CLIENT,
    TO_GATEWAY,
    TO_RELAY,
    Ack,
    AuthorizationCreated,
    AuthorizationDenied,
    AuthorizationRevoked,
    Authorize,
    Challenge,
    ClientInit,
    Disconnect,
    DoorAddress,
    GatewayInit,
    Held,
    HeldWanted,
    IpText,
    Join,
    MoreHeld,
    RelayJoin,
    RequestAuthorization,
    Revoke,
    SocketAddress,
)
from channel.versions import SPOKEN, Spoken
from runtime.actor import ActorRef, NamedRef
from runtime.clock import VirtualClock
from runtime.cluster.keyed import Locate, keeper_name
from runtime.cluster.node import start_alone
from runtime.inspection import CrashReport
from runtime.randomness import SeededRandomness, uuid7
from runtime.scheduler import Scheduler
from runtime.testing import FaultInjector, HeapHost, SeededScheduler, heap_sleep
from tests.nodes import joined

T = TypeVar("T")
S = 10**9
START = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)  # a Monday
PORTAL = "portal.test:443"
KEM = bytes(1184)
CIPHERTEXT = bytes(1088)
FRAMES: dict[str, dict[str, type]] = {
    "client": TO_CLIENT,
    "gateway": TO_GATEWAY,
    "relay": TO_RELAY,
}


class Store(MemoryStore):
    """The memory store, which can be out of reach for the control plane (not for `World.put`)."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(clock)
        self.is_away = False
        self.feed_reads = 0

    async def changes(
        self, account_id: UUID, *, after: int, limit: int = MAX_PAGE
    ) -> tuple[Change, ...]:
        self.feed_reads += 1
        self._reach()
        return await super().changes(account_id, after=after, limit=limit)

    async def write_authorization(self, authorization: Authorization, *, epoch: int) -> None:
        self._reach()
        await super().write_authorization(authorization, epoch=epoch)

    async def find_token(self, id: UUID) -> Token | None:
        self._reach()
        return await super().find_token(id)

    async def apply(
        self,
        account_id: UUID,
        mutations: Sequence[Mutation],
        **keywords: Any,
    ) -> tuple[Change, ...]:
        self._reach()
        return await super().apply(account_id, mutations, **keywords)

    async def write_logs(self, rows: Sequence[Log]) -> None:
        self._reach()
        await super().write_logs(rows)

    async def note_seen(self, account_id: UUID, seen: Sequence[Seen]) -> None:
        self._reach()
        await super().note_seen(account_id, seen)

    def _reach(self) -> None:
        if self.is_away:
            raise Unavailable("away")


class Line:
    """A channel in memory: it keeps what the portal says."""

    def __init__(self, world: World, remote: str) -> None:
        self._world = world
        self.remote = IpText(remote)
        self.frames: list[Frame] = []
        self.kind: str | None = None
        self.closed: Disconnect | None = None
        self.is_open = True
        self.attachment: Attachment | None = None
        self.agent: Agent | None = None

    def joined(self, kind: Literal["client", "gateway", "relay"]) -> None:
        assert self.kind is None
        self.kind = kind

    def send(self, message: object, *, ref: int | None = None, epoch: int | None = None) -> None:
        if not self.is_open:
            return
        assert self.kind is not None, "nothing but the challenge is said before the join"
        decoder = FrameDecoder(FRAMES[self.kind], PORTAL_FRAME_LIMIT)
        for part in encode_parts(message, ref=ref, epoch=epoch, seq=1, limit=PORTAL_FRAME_LIMIT):
            for frame in decoder.feed(part):
                self.frames.append(frame)
                self._world.log.append((self.agent.name if self.agent else "?", frame.message))
                if self.agent is not None and self.agent.line is self:
                    self.agent.hear(frame)

    def probe(self) -> None:
        """Answered by an agent that is there, and has not dialled anew."""
        is_there = self.agent is not None and self.agent.line is self
        if is_there and self.is_open and self.attachment is not None:
            self.attachment.heard()

    def close(self, disconnect: Disconnect | None) -> None:
        if self.is_open:
            self.is_open = False
            self.closed = disconnect
            if self.attachment is not None:
                self.attachment.closed("closed by the portal")


class Agent:
    """One device: what it was told, and what it holds by that."""

    kind = ""

    def __init__(self, world: World, name: str, token: str, remote: str) -> None:
        self.world = world
        self.name = name
        self.token = token
        self.remote = remote
        self.seed = world.randomness.bytes(32)
        self.tunnel_key = world.randomness.bytes(32)
        self.incarnation = 0
        self.line: Line | None = None
        self.init: Any = None
        self.live: dict[UUID, UUID] = {}  # authorisation -> connection
        self.more_held: list[MoreHeld] = []

    # --- joining ---

    def join(self, **changes: Any) -> Line:
        """Connect, and have the join carried through."""
        self.line = line = Line(self.world, self.remote)
        line.agent = self
        challenge = Challenge(nonce=self.world.randomness.bytes(32), portal=PORTAL)
        line.attachment = self.world.plane.connected(line, challenge)
        self.world.host.run_until_idle()
        self.incarnation += 1
        message, more_held = split_join(attrs.evolve(self._join(challenge), **changes))
        self.more_held = list(more_held)
        self.say(message)
        self.world.host.run_until_idle()
        return line

    def _join(self, challenge: Challenge) -> Any:
        statement = join_statement(
            challenge.nonce, challenge.portal, decode_token(self.token).id, self.tunnel_key
        )
        return Join(
            kind=self.kind,  # type: ignore[arg-type]  # client or gateway
            token=self.token,
            device_key=device_key_of(self.seed),
            signature=sign_join(self.seed, statement),
            tunnel_key=self.tunnel_key,
            name=self.name,
            incarnation=self.incarnation,
            held=tuple(
                Held(authorization_id=id, connection_id=connection)
                for id, connection in self.live.items()
            ),
        )

    def restart(self) -> None:
        """Forget everything but the device key."""
        self.tunnel_key = self.world.randomness.bytes(32)
        self.live.clear()

    def say(self, message: object, ref: int | None = None) -> None:
        assert self.line is not None
        assert self.line.attachment is not None
        self.line.attachment.received(Frame(event="", message=message, ref=ref))

    def lose_channel(self) -> None:
        assert self.line is not None
        assert self.line.attachment is not None
        self.line.is_open = False
        self.line.attachment.closed("lost")
        self.world.host.run_until_idle()

    def move(self, remote: str) -> None:
        self.remote = remote
        assert self.line is not None
        assert self.line.attachment is not None
        self.line.attachment.migrated(IpText(remote))
        self.world.host.run_until_idle()

    # --- hearing ---

    def hear(self, frame: Frame) -> None:
        match frame.message:
            case HeldWanted() if self.more_held:
                self.say(self.more_held.pop(0))
            case ClientInit() | GatewayInit():
                self.init = frame.message
                given = {each.authorization_id for each in frame.message.authorizations}
                self.live = {id: each for id, each in self.live.items() if id in given}
            case AuthorizationRevoked() | Revoke():
                self.live.pop(frame.message.authorization_id, None)

    def heard(self, kind: type[T]) -> list[T]:
        assert self.line is not None
        return [f.message for f in self.line.frames if isinstance(f.message, kind)]

    def frame(self, kind: type) -> Frame:
        """The last frame with a message of this kind."""
        assert self.line is not None
        return [each for each in self.line.frames if isinstance(each.message, kind)][-1]

    @property
    def is_connected(self) -> bool:
        return self.line is not None and self.line.is_open

    @property
    def refused(self) -> str | None:
        """The code with which the portal closed the channel."""
        assert self.line is not None
        return None if self.line.closed is None else self.line.closed.reason


class ClientAgent(Agent):
    kind = "client"

    def __init__(self, world: World, name: str, token: str, remote: str) -> None:
        super().__init__(world, name, token, remote)
        self.gateway_by_connection: dict[UUID, UUID] = {}

    def ask(
        self,
        resource: Resource,
        *,
        connected: tuple[UUID, ...] = (),
        failed: tuple[UUID, ...] = (),
    ) -> AuthorizationCreated | AuthorizationDenied | None:
        """Ask, let the actors work without time passing, and give the answer if there is one."""
        assert self.line is not None
        before = len(self.line.frames)
        self.request(resource, connected=connected, failed=failed)
        self.world.host.run_until_idle()
        return self.answer(before)

    def request(
        self,
        resource: Resource,
        *,
        connected: tuple[UUID, ...] = (),
        failed: tuple[UUID, ...] = (),
    ) -> None:
        self.say(
            RequestAuthorization(
                resource_id=resource.id,
                kem_public_key=KEM,
                connected_gateway_ids=connected,
                failed_gateway_ids=failed,
            )
        )

    def answer(self, after: int = 0) -> AuthorizationCreated | AuthorizationDenied | None:
        assert self.line is not None
        for frame in self.line.frames[after:]:
            if isinstance(frame.message, AuthorizationCreated | AuthorizationDenied):
                return frame.message
        return None

    def hear(self, frame: Frame) -> None:
        super().hear(frame)
        created = frame.message
        if not isinstance(created, AuthorizationCreated):
            return
        if created.kem_ciphertext is not None:  # one connection for each gateway
            self.live = {
                id: each
                for id, each in self.live.items()
                if self.gateway_by_connection.get(each) != created.gateway.id
            }
        self.gateway_by_connection[created.connection_id] = created.gateway.id
        self.live[created.authorization_id] = created.connection_id

    @property
    def id(self) -> UUID:
        return UUID(str(self.init.client_id))


class GatewayAgent(Agent):
    kind = "gateway"

    def __init__(self, world: World, name: str, token: str, remote: str) -> None:
        super().__init__(world, name, token, remote)
        self.is_silent = False
        self.refusal = ""
        self.connections: dict[UUID, UUID] = {}
        self.addresses: dict[UUID, str] = {}

    def restart(self) -> None:
        super().restart()
        self.connections.clear()

    def hear(self, frame: Frame) -> None:
        super().hear(frame)
        if not isinstance(frame.message, Authorize) or self.is_silent:
            return
        asked = frame.message
        refusal = self.refusal
        if asked.kem_public_key is None and asked.connection_id not in self.connections:
            refusal = "unknown_connection"
        if not refusal:
            if asked.connection_id not in self.connections:
                self._leave_older(asked.client.id)
            self.connections[asked.connection_id] = asked.client.id
            self.live[asked.authorization_id] = asked.connection_id
            self.addresses[asked.authorization_id] = asked.resource.address
        ack = Ack(
            authorization_id=asked.authorization_id,
            kem_ciphertext=CIPHERTEXT if asked.kem_public_key and not refusal else None,
            refusal=refusal,  # type: ignore[arg-type]  # one of the refusals
        )
        self.say(ack, ref=frame.ref)

    def _leave_older(self, client_id: UUID) -> None:
        """A client has one connection here."""
        older = {id for id, client in self.connections.items() if client == client_id}
        self.connections = {id: c for id, c in self.connections.items() if id not in older}
        self.live = {id: each for id, each in self.live.items() if each not in older}

    @property
    def id(self) -> UUID:
        return UUID(str(self.init.gateway_id))


class RelayAgent(Agent):
    kind = "relay"
    addresses: tuple[SocketAddress, ...] = (
        SocketAddress(address=IpText("203.0.113.50"), port=3478),
    )
    region = failure_domain = ""
    certificate_pins: tuple[str, ...] = ()

    def _join(self, challenge: Challenge) -> Any:
        return RelayJoin(
            token=self.token,
            addresses=self.addresses,
            stamp_secret=bytes(32),
            name=self.name,
            region=self.region,
            failure_domain=self.failure_domain,
            incarnation=self.incarnation,
            certificate_pins=self.certificate_pins,
        )


@attrs.define
class Lab:
    """Switches of the world: what an effect of the portal finds out there."""

    proven: bool = True
    proof_ns: int = 0
    blocked: str = ""
    """A transport over which no relay answers."""
    asked: list[tuple[SocketAddress, tuple[str, ...]]] = attrs.field(factory=list)
    """What the portal wanted proofs of, and by which certificates."""


class World:
    """An account with one site, one user in one group, and whatever a test adds."""

    def __init__(
        self,
        seed: int = 1,
        *,
        limits: Limits | None = None,
        effect_delay_ns: tuple[int, int] = (0, 0),
        injector: FaultInjector | None = None,
        regions: Regions = NOWHERE,
        spoken: Spoken = SPOKEN,
    ) -> None:
        self.regions = regions
        self.spoken = spoken
        self.injector = injector
        self.clock = VirtualClock(start_ns=1_000 * S, utc_start=START)
        self.randomness = SeededRandomness(seed, "world")
        self.store = Store(self.clock)
        self.lab = Lab()
        self.doors: tuple[DoorAddress, ...] = ()
        self.log: list[tuple[str, object]] = []
        self.crashes: list[CrashReport] = []
        self.limits = limits
        self.effect_delay_ns = effect_delay_ns
        self.account = Account(id=self.new_id(), name="acme", slug="acme", created_at=START)
        self.everyone = Group(kind="everyone", name="Everyone", **self.common())
        self.staff = Group(name="staff", **self.common())
        self.site = Site(name="site", **self.common())
        self.user = Principal(name="user", **self.common())
        self.web = self.resource("web", "10.0.0.1")
        self.db = self.resource("db", "10.0.0.2")
        self.start_portal()
        self.put(self.account, self.everyone, self.staff, self.site, self.user, self.web, self.db)
        self.user_token = self.token("client", principal_id=self.user.id)
        self.site_token = self.token("gateway", site_id=self.site.id)

    # --- the portal ---

    def start_portal(self) -> None:
        """Also after a crash of the whole portal: everything but the store is new."""
        owner = run(joined(self.store))
        options: dict[str, Any] = {
            "node": owner["owner"],
            "incarnation": owner["incarnation"],
            "clock": self.clock,
            "randomness": self.randomness.child("scheduler"),
            "report": self._report,
            "crash_details": True,
        }
        if self.injector is None:
            self.scheduler = Scheduler(**options)
        else:
            self.scheduler = SeededScheduler(injector=self.injector, **options)
        self.host = HeapHost(
            self.scheduler,
            self.clock,
            randomness=self.randomness.child("effects"),
            effect_delay_ns=self.effect_delay_ns,
        )
        tenure = start_alone(
            self.scheduler, self.store, node_codec(), incarnation=owner["incarnation"]
        )
        self.plane = ControlPlane(
            self.scheduler,
            self.store,
            self.clock,
            self.randomness.child("plane"),
            portal_name=PORTAL,
            prove_address=self._prove,
            tenure=tenure,
            limits=self.limits,
            doors=lambda: self.doors,
            regions=self.regions,
            spoken=self.spoken,
        )
        self.plane.start()
        self._unsubscribe = self.store.subscribe(self.plane.wake)
        self.host.run_until_idle()

    def kill_portal(self, *agents: Agent) -> None:
        """The process is gone; the agents notice."""
        self._unsubscribe()
        for agent in agents:
            if agent.line is not None:
                agent.line.is_open = False
                agent.line.attachment = None
        nobody = Scheduler(clock=self.clock, randomness=self.randomness.child("nobody"))
        self.host = HeapHost(nobody, self.clock)

    def run_for(self, seconds: float) -> None:
        self.host.run_for(int(seconds * S))

    def live(self) -> frozenset[UUID]:
        """Ids of the authorisations that the account actor holds for live."""
        answer: frozenset[UUID] = self.call(ListLive())
        return answer

    def presence(self) -> Presence:
        answer: Presence = self.call(ListPresence())
        return answer

    def call(self, message: object) -> Any:
        return self.host.call(self.account_actor(), message)

    def account_actor(self) -> ActorRef:
        """The account's actor, started if it does not live."""
        for _ in range(100):  # a portal that has just started has not renewed its lease yet
            located = self.host.call(NamedRef(keeper_name(ACCOUNT)), Locate(self.account.id))
            if located.ref is not None:
                ref: ActorRef = located.ref
                return ref
            self.host.run_for(S // 100)
        raise AssertionError("the account is not served")

    def relays(self) -> tuple[OnlineRelay, ...]:
        directory = self.plane.relay_directory
        assert directory is not None
        answer: tuple[OnlineRelay, ...] = self.host.call(directory, ListRelays())
        return answer

    def actor(self, label: str) -> ActorRef:
        """The living actor of this label."""
        (context,) = [
            each
            for each in self.scheduler._context_by_number.values()
            if each.label == label and self.scheduler.is_alive(each.ref)
        ]
        return context.ref

    def owner_of(self, agent: Agent) -> ActorRef:
        """The actor that owns the agent's channel."""
        assert agent.line is not None
        assert isinstance(agent.line.attachment, OwnedChannel)
        owner = agent.line.attachment._owner
        assert owner is not None
        return owner

    def crash(self, ref: Any) -> None:
        """Have an actor fail while it handles a message."""
        self.scheduler.stop(ref, "crashed: on purpose")
        self.host.run_until_idle()

    # --- the store ---

    def put(self, *entities: Entity) -> None:
        run(
            MemoryStore.apply(
                self.store,
                self.account.id,
                [Put(e) for e in entities],
                who="test",
                at=self.clock.utc_now(),
            )
        )
        self.host.run_until_idle()

    def remove(self, kind: EntityKind, id: UUID) -> None:
        run(
            MemoryStore.apply(
                self.store, self.account.id, [Remove(kind, id)], who="test", at=self.clock.utc_now()
            )
        )
        self.host.run_until_idle()

    def rows(self, *, live: bool = False) -> dict[UUID, Authorization]:
        at = self.clock.utc_now() if live else None
        page = run(self.store.authorizations(self.account.id, live_at=at, limit=1000))
        return {row.id: row for row in page}

    def changes(self) -> tuple[Change, ...]:
        page: tuple[Change, ...] = run(self.store.changes(self.account.id, after=0))
        return page

    def relay_rows(self) -> tuple[Relay, ...]:
        rows: tuple[Relay, ...] = run(self.store.relays())
        return rows

    def entities(self, kind: EntityKind) -> tuple[Any, ...]:
        """All entities of a kind."""
        page: tuple[Any, ...] = run(self.store.list(self.account.id, kind, limit=1000))
        return page

    def get(self, kind: EntityKind, id: UUID) -> Any:
        return run(self.store.get(self.account.id, kind, id))

    # --- entities ---

    def new_id(self) -> UUID:
        return uuid7(self.clock, self.randomness)

    def common(self) -> dict[str, Any]:
        return {
            "id": self.new_id(),
            "account_id": self.account.id,
            "created_at": self.clock.utc_now(),
        }

    def resource(self, name: str, address: str, **fields: Any) -> Resource:
        base = {"site_ids": (self.site.id,), "kind": "ip", "name": name, "address": address}
        return Resource(**self.common() | base | fields)

    def policy(self, resource: Resource | None = None, **fields: Any) -> Policy:
        """Put a policy for everyone."""
        base: dict[str, Any] = {
            "group_id": self.everyone.id,
            "resource_id": (resource or self.web).id,
            "conditions": Conditions(),
        }
        policy = Policy(**self.common() | base | fields)
        self.put(policy)
        return policy

    def membership(self, group: Group, principal: Principal) -> Membership:
        member = Membership(group_id=group.id, principal_id=principal.id, **self.common())
        self.put(member)
        return member

    def token(self, kind: Any, **fields: Any) -> str:
        """Put a token, and give its text."""
        secret = self.randomness.bytes(32)
        common = self.common()
        token = Token(
            **common
            | {"kind": kind, "name": "token", "hash": hash_token(kind, common["id"], secret)}
            | fields
        )
        if token.account_id is None:
            run(self.store.put_installation_token(token))
        else:
            self.put(token)
        return encode_token(kind, token.id, secret, PORTAL, bytes(32)).reveal_text()

    def change_token(self, text: str, **fields: Any) -> None:
        token = self.get("token", decode_token(text).id)
        self.put(attrs.evolve(token, **fields))

    # --- agents ---

    def client(
        self, *, remote: str = "203.0.113.7", token: str | None = None, **join: Any
    ) -> ClientAgent:
        agent = ClientAgent(self, "laptop", token or self.user_token, remote)
        agent.join(**join)
        return agent

    def gateway(
        self,
        name: str = "gateway",
        *,
        token: str | None = None,
        remote: str = "198.51.100.9",
        **join: Any,
    ) -> GatewayAgent:
        agent = GatewayAgent(self, name, token or self.site_token, remote)
        agent.join(**join)
        return agent

    def relay(
        self,
        name: str = "relay",
        *,
        address: str = "203.0.113.50",
        region: str = "",
        failure_domain: str = "",
    ) -> RelayAgent:
        agent = RelayAgent(self, name, self.relay_token(), address)
        agent.addresses = (SocketAddress(address=IpText(address), port=3478),)
        agent.region, agent.failure_domain = region, failure_domain
        agent.join()
        return agent

    def relay_token(self) -> str:
        if not hasattr(self, "_relay_token"):
            self._relay_token = self.token("relay", account_id=None)
        return self._relay_token

    # --- helpers ---

    def _report(self, report: Any) -> None:
        if isinstance(report, CrashReport):
            self.crashes.append(report)

    async def _prove(self, address: SocketAddress, pins: tuple[str, ...]) -> bool:
        self.lab.asked.append((address, pins))
        if self.lab.proof_ns:
            await heap_sleep(self.lab.proof_ns)
        return self.lab.proven and address.transport != self.lab.blocked


def run(coroutine: Any) -> Any:
    """A coroutine of the memory store, to its end."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it suspended")


def hours(count: float) -> timedelta:
    return timedelta(hours=count)
