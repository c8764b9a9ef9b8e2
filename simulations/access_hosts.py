"""What runs on the machines of a virtual world: the real cores, each in a shell of a few lines.

`AgentHost` drives a client's or gateway's agent with its engine, `RelayHost` the TURN server and
`ControlHost` the actors of the control plane on the in-memory store; a `Link` is a control channel
that carries the real frames, with the world's latency in place of QUIC.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Literal, TypeVar
from uuid import UUID

from actors.attachment import Attachment
from actors.store.memory import MemoryStore
from actors.tree import ControlPlane
from actors.wire import node_codec
from channel.frames import (
    AGENT_FRAME_LIMIT,
    PORTAL_FRAME_LIMIT,
    REASSEMBLY_LIMIT,
    FrameDecoder,
    encode_frame,
    encode_parts,
)
from channel.joining import split_join
from channel.messages import (
    FROM_CLIENT,
    FROM_GATEWAY,
    FROM_RELAY,
    FROM_UNJOINED,
    TO_CLIENT,
    TO_GATEWAY,
    TO_RELAY,
    Challenge,
    Disconnect,
    HeldWanted,
    IpText,
    MoreHeld,
    SocketAddress,
)
from clients.agent import ClientAgent
from gateways.agent import GatewayAgent
from relays.agent import Joined, RelayAgent
from relays.authentication import StampedCredentials
from relays.server import Server
from runtime.cluster.leases import MAX_NODE_LEASE_NS
from runtime.cluster.node import start_alone
from runtime.net.address import Address
from runtime.randomness import uuid7
from runtime.scheduler import Scheduler
from runtime.testing import HeapHost
from simulations.world import LATENCY_NS, Machine, World

NS = 10**9
ENGINE_PORT = 51_820
RELAY_PORT = 3_478
LISTENER = 0
HEARTBEAT_NS = 10 * NS

Kind = Literal["client", "gateway", "relay"]
_FROM = {"client": FROM_CLIENT, "gateway": FROM_GATEWAY, "relay": FROM_RELAY}
_TO = {"client": TO_CLIENT, "gateway": TO_GATEWAY, "relay": TO_RELAY}
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


class ControlHost:
    """The control plane of one portal."""

    def __init__(self, world: World, *, portal: str) -> None:
        self._world = world
        self.portal = portal
        self.store = MemoryStore(world.clock)
        incarnation = at_once(
            self.store.join_node(
                "portal",
                link_address="127.0.0.1:0",
                door_address=portal,
                version="simulation",
                ttl_ns=MAX_NODE_LEASE_NS,
            )
        )
        randomness = world.randomness("portal")
        scheduler = Scheduler(
            clock=world.clock, randomness=randomness, node="portal", incarnation=incarnation
        )
        tenure = start_alone(scheduler, self.store, node_codec(), incarnation=incarnation)
        self._heap_host = HeapHost(scheduler, world.clock)
        self._nonces = world.randomness("portal nonces")
        self.plane = ControlPlane(
            scheduler,
            self.store,
            world.clock,
            randomness,
            portal_name=portal,
            prove_address=self._prove,
            tenure=tenure,
        )
        self.plane.start()
        self._heap_host.run_until_idle()
        world.parts.append(self)

    def connect(self, link: Link) -> Attachment:
        challenge = Challenge(nonce=self._nonces.bytes(32), portal=self.portal)
        link.send(challenge)
        return self.plane.connected(link, challenge)

    def poll_timeout(self) -> int | None:
        return self._heap_host.next_event_ns()

    def handle_timeout(self, now: int) -> None:
        self._heap_host.run_until_idle()

    def flush(self, now: int) -> None:
        self._heap_host.run_until_idle()

    async def _prove(self, announced: SocketAddress) -> bool:
        """Whether somebody serves at the announced address: in this world, whether it listens."""
        machine = self._world.machines.get(str(announced.address))
        return machine is not None and announced.port in machine.sockets


class Link:
    """One control channel between an agent and the portal, as the portal's actors see it."""

    def __init__(
        self,
        world: World,
        control: ControlHost,
        machine: Machine,
        kind: Kind,
        agent: ClientAgent | GatewayAgent | RelayAgent,
    ) -> None:
        self._world = world
        self._machine = machine
        self._agent = agent
        self._open = True
        self._seq = 0
        self._more_held: deque[MoreHeld] = deque()
        self._from_agent = FrameDecoder(FROM_UNJOINED, AGENT_FRAME_LIMIT)
        self._from_portal = FrameDecoder(
            _TO[kind], PORTAL_FRAME_LIMIT, reassembly_limit=REASSEMBLY_LIMIT
        )
        self._attachment: Attachment | None = None
        self._attachment = control.connect(self)

    # --- actors.attachment.Channel ---

    @property
    def remote(self) -> IpText:
        return IpText(self._machine.public_ip)

    def joined(self, kind: Kind) -> None:
        self._from_agent.events = _FROM[kind]

    def send(self, message: object, *, ref: int | None = None, epoch: int | None = None) -> None:
        if not self._open:
            return
        seq, self._seq = self._seq, self._seq + 1
        parts = encode_parts(message, ref=ref, epoch=epoch, seq=seq, limit=PORTAL_FRAME_LIMIT)
        self._world.note("to", self._machine.name, type(message).__name__, len(parts))
        for data in parts:
            self._world.after(LATENCY_NS, partial(self._at_agent, data))

    def probe(self) -> None:
        self._world.after(2 * LATENCY_NS, self._answer_probe)

    def _answer_probe(self) -> None:
        if self._open and self._machine.alive and self._attachment is not None:
            self._attachment.heard()

    def close(self, disconnect: Disconnect | None) -> None:
        if disconnect is not None:
            self.send(disconnect)
        if self._open:
            self._open = False
            if self._attachment is not None:
                self._attachment.closed("closed by the portal")

    # --- the agent's side ---

    def say(self, message: object, ref: int | None = None) -> None:
        """The agent sends a message."""
        if not self._machine.alive:
            return
        data = encode_frame(message, ref=ref, limit=AGENT_FRAME_LIMIT)
        self._world.note("from", self._machine.name, type(message).__name__)
        self._world.after(LATENCY_NS, lambda: self._at_portal(data))

    def _at_portal(self, data: bytes) -> None:
        if self._open and self._attachment is not None:
            for frame in self._from_agent.feed(data):
                self._attachment.received(frame)

    def _at_agent(self, data: bytes) -> None:
        if not self._machine.alive:
            return
        now = self._world.now
        for frame in self._from_portal.feed(data):
            if isinstance(frame.message, Challenge):
                join, more_held = split_join(self._agent.join(frame.message, now))
                self._more_held.extend(more_held)
                self.say(join)
            elif isinstance(frame.message, HeldWanted):
                if self._more_held:
                    self.say(self._more_held.popleft())
            else:
                self._agent.receive(frame, now)


class AgentHost:
    """A client or gateway on a machine. `on_packet` gets what the agent writes to its TUN."""

    def __init__(
        self,
        world: World,
        control: ControlHost,
        machine: Machine,
        kind: Kind,
        agent: ClientAgent | GatewayAgent,
        on_packet: Callable[[bytes], None],
    ) -> None:
        self.machine = machine
        self.agent = agent
        self.events: list[object] = []
        self._world = world
        self._on_packet = on_packet
        self._local = Address(machine.ip, ENGINE_PORT)
        machine.sockets[ENGINE_PORT] = self._datagram
        agent.engine.add_socket(self._local, world.now, network=machine.lan)
        self._link = Link(world, control, machine, kind, agent)
        world.parts.append(self)

    def receive_packets(self, *packets: bytes) -> None:
        """Packets that the machine's kernel routes into the TUN."""
        self.agent.receive_packets(packets, self._world.now)

    def poll_timeout(self) -> int | None:
        if not self.machine.alive:
            return None
        instants = (self.agent.poll_timeout(), self.agent.engine.poll_timeout())
        return min((each for each in instants if each is not None), default=None)

    def handle_timeout(self, now: int) -> None:
        self.agent.engine.handle_timeout(now)
        self.agent.handle_timeout(now)

    def flush(self, now: int) -> None:
        if not self.machine.alive:
            return
        self.agent.pump(now)
        for outgoing in self.agent.drain_messages():
            self._link.say(outgoing.message, outgoing.ref)
        for transmit in self.agent.engine.drain_transmits():
            data = bytes(transmit.data)
            self._world.send(self.machine, transmit.local.port, transmit.remote, data)
        self.events.extend(self.agent.drain_events())
        for packet in self.agent.drain_packets():
            self._on_packet(packet)

    def _datagram(self, data: bytes, source: Address) -> None:
        self.agent.engine.receive_datagrams(self._local, [(data, source)], self._world.now)


class RelayHost:
    """A relay on a machine: the TURN server, and its side of the control channel."""

    def __init__(
        self,
        world: World,
        control: ControlHost,
        machine: Machine,
        agent: RelayAgent,
        credentials: StampedCredentials,
    ) -> None:
        self._world = world
        self._machine = machine
        self._agent = agent
        self._credentials = credentials
        self._ports: dict[int, int] = {LISTENER: RELAY_PORT}
        self.server = Server(
            credentials=credentials,
            realm="holloway",
            relay_addresses={1: machine.ip},
            own_addresses=frozenset({machine.ip}),
            sockets=self,
            randomness=world.randomness("relay"),
            now=world.now,
            unix_s=int(world.clock.utc_now().timestamp()),
        )
        self.server.add_listener(LISTENER)
        machine.sockets[RELAY_PORT] = self._from_client
        self._link = Link(world, control, machine, "relay", agent)
        world.parts.append(self)

    # --- relays.allocations.Sockets ---

    def open(self, family: int, port: int) -> int | None:
        if family != 1 or port in self._machine.sockets:
            return None
        number = max(self._ports) + 1
        self._ports[number] = port
        self._machine.sockets[port] = lambda data, source: self.server.receive_from_peer(
            number, memoryview(data), source, self._world.now
        )
        return number

    def close(self, socket: int) -> None:
        self._machine.sockets.pop(self._ports[socket], None)

    # --- Part ---

    def poll_timeout(self) -> int | None:
        instants = (self.server.poll_timeout(), self._agent.poll_timeout())
        return min((each for each in instants if each is not None), default=None)

    def handle_timeout(self, now: int) -> None:
        self.server.handle_timeout(now)
        self._agent.load_changed(self.server.allocations, self.server.load, now)
        self._agent.handle_timeout(now)

    def flush(self, now: int) -> None:
        for message in self._agent.drain_messages():
            self._link.say(message)
        for event in self._agent.drain_events():
            if isinstance(event, Joined):
                self._credentials.relay_id = event.relay_id
        for socket, data, (host, port) in self.server.drain_transmits():
            self._world.send(self._machine, self._ports[socket], Address(host, port), bytes(data))

    def _from_client(self, data: bytes, source: Address) -> None:
        self.server.receive(LISTENER, memoryview(data), source, self._world.now)


def id_at(world: World, name: str) -> UUID:
    """A UUIDv7 of the world's clock, from the stream of that name."""
    return uuid7(world.clock, world.randomness(f"id {name}"))
