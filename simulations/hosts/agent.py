"""Clients and gateways in the world: the real agents, each with its engine, on a host.

`AgentHost` is in virtual time what `tunnel.shell.driver` and `tunnel.shell.process` are on trio:
sockets for each address of the host, timers by the host's clock, the channel, and what comes out of
the TUN device. It is one life of a process: a restart makes another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from channel.credentials import decode_token
from channel.messages import (
    TO_CLIENT,
    TO_GATEWAY,
    Authorize,
    ClientInit,
    Disconnect,
    GatewayInit,
)
from clients.agent import ClientAgent
from gateways.agent import FlushTranslations, GatewayAgent, _Connection
from runtime.clock import earliest
from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from runtime.secret import Secret
from simulations.checks.interface import Observer, hears
from simulations.hosts.channel import AgentChannel, Lookup
from simulations.hosts.relay_links import AgentLinks
from simulations.hosts.service import Masquerade
from simulations.net.world import Host, World
from tunnel.agent import AgentIdentity, Outgoing
from tunnel.engine import Engine

ENGINE_PORT: Final = 51_820
_TRANSPORT: Final = b"\x04\0\0\0"


class AgentHost:
    """One life of a client or a gateway. `on_init` is told what the portal says of it;
    `engine_type` may put another engine in the place of the real one, for hosts that lie."""

    events: Mapping[str, type]

    def __init__(
        self,
        world: World,
        host: Host,
        *,
        name: str,
        token: Secret,
        device_seed: bytes,
        life: int,
        lookup: Lookup,
        on_init: Callable[[str, Any], None],
        observers: tuple[Observer, ...] = (),
        engine_type: type[Engine] = Engine,
    ) -> None:
        self.world = world
        self.host = host
        self.name = name
        self.observers = observers
        self._on_init = on_init
        self.refused = ""
        self.is_over = False
        self._drawn = world.randomness(f"{name}/{life}")
        self._sockets: dict[Address, None] = {}
        self._engine_at: int | None = None
        self._agent_at: int | None = None
        self._channel_at: int | None = None
        # Whether more than the engine was touched; most datagrams concern nobody else.
        self._is_touched = True
        self._sealed = hears(observers, "sealed")
        self._listeners = hears(observers, "heard")
        now = self.now
        engine = engine_type(
            private_key=self._drawn.bytes(32), randomness=self._drawn.child("engine"), now=now
        )
        identity = AgentIdentity(
            kind="client" if isinstance(self, ClientHost) else "gateway",
            name=name,
            software="holloway simulation",
            token=token,
            device_seed=Secret(device_seed),
            incarnation=int(host.clock.utc_now().timestamp() * 10**9),
        )
        self.agent = self._make_agent(identity, engine, self._drawn.child("agent"), now)
        self.engine = engine
        self._links = AgentLinks(host, engine, lambda: self.now, self.touched)
        decoded = decode_token(token)
        self.channel = AgentChannel(
            self,
            self.agent,
            self.events,
            decoded,
            self._drawn.child("channel"),
            now=now,
            lookup=lookup,
            heard=self._heard,
        )
        host.bind(ENGINE_PORT, self._datagram)
        host.on_moved.append(self._moved)
        self._follow_addresses(now)
        world.add(self, host=host)

    def _make_agent(
        self, identity: AgentIdentity, engine: Engine, randomness: SeededRandomness, now: int
    ) -> ClientAgent | GatewayAgent:
        raise NotImplementedError

    def _take_packets(self, packets: list[bytes]) -> None:
        raise NotImplementedError

    # --- Part ------------------------------------------------------------------------------------

    def poll_timeout(self) -> int | None:
        self._engine_at = self.engine.poll_timeout()
        if self._is_touched:
            self._is_touched = False
            self._agent_at = self.agent.poll_timeout()
            self._channel_at = self.channel.poll_timeout()
        return earliest(self._engine_at, self._agent_at, self._channel_at)

    def handle_timeout(self, now: int) -> None:
        # Whatever touched a part since has had its timer read anew.
        if self._engine_at is not None and self._engine_at <= now:
            self.engine.handle_timeout(now)
        if self._agent_at is not None and self._agent_at <= now:
            self._is_touched = True
            self.agent.handle_timeout(now)
        if self._channel_at is not None and self._channel_at <= now:
            self._is_touched = True
            self.channel.handle_timeout(now)

    def flush(self, now: int) -> None:
        agent = self.agent
        if agent.pump(now):
            self._is_touched = True
        for transmit in self.engine.drain_transmits():
            self.transmit(transmit.local, transmit.remote, bytes(transmit.data))
        self._links.flush()
        if not self._is_touched:
            return
        packets = agent.drain_packets()
        if packets:
            self._take_packets(packets)
        for outgoing in agent.drain_messages():
            self._say(outgoing)
        for event in agent.drain_events():
            self._perform(event)
        self.channel.flush()

    # --- the life of the process -----------------------------------------------------------------

    @property
    def now(self) -> int:
        return self.host.clock.monotonic_ns()

    @property
    def is_online(self) -> bool:
        """Whether the portal has taken it in."""
        return self.agent.joined

    def kill(self) -> None:
        """It is gone at once; the host's sockets are the host's to lose."""
        self.is_over = True
        self.channel.is_over = True
        if self._moved in self.host.on_moved:
            self.host.on_moved.remove(self._moved)
        self.world.remove(self)

    def stop(self) -> None:
        """It ends in good order: relays get their allocations back, the channel is closed."""
        if self.is_over:
            return
        self.engine.end(self.now)
        self.flush(self.now)
        self.channel.close("ended")
        self.host.unbind(ENGINE_PORT)
        self.kill()

    def transmit(self, local: Address, remote: Address, data: bytes) -> None:
        """A datagram of the engine."""
        if self._sealed:
            self._tell_sealed(data)
        self.host.send(local.port, remote, data)

    def touched(self) -> None:
        """Something happened to the agent, the channel or the engine."""
        self._is_touched = True
        self.world.touch(self)

    def _say(self, outgoing: Outgoing) -> None:
        """A message of the agent for the portal."""
        if not self.channel.send(outgoing.message, ref=outgoing.ref):
            self.agent.unsent(outgoing, self.now)

    # --- channel owner ---------------------------------------------------------------------------

    def channel_touched(self) -> None:
        self.touched()

    def channel_refused(self, outcome: Disconnect) -> None:
        self.refused = outcome.reason
        self.world.after(0, self.stop)

    # --- helpers ---------------------------------------------------------------------------------

    def _datagram(self, data: bytes, source: Address, local: Address) -> None:
        self.engine.receive_datagrams(local, ((data, source),), self.now)
        self.world.touch(self)

    def _moved(self, host: Host) -> None:
        """As the driver does when the machine's addresses are others."""
        if self.is_over:
            return
        now = self.now
        if self._follow_addresses(now):
            self.engine.path_suspect(now)
            self.channel.poke(now)
        self.touched()

    def _follow_addresses(self, now: int) -> bool:
        host = self.host
        wanted = {
            Address(ip, ENGINE_PORT): None if pool is None else str(pool.network)
            for ip, pool in ((host.ipv4, host.network.pool4), (host.ipv6, host.network.pool6))
            if ip is not None
        }
        gone = [local for local in self._sockets if local not in wanted]
        for local in gone:
            del self._sockets[local]
            self.engine.remove_socket(local, now)
        added = [local for local in wanted if local not in self._sockets]
        for local in added:
            self._sockets[local] = None
            self.engine.add_socket(local, now, network=wanted[local])
        return bool(gone or added)

    def _perform(self, event: Any) -> None:
        """What the shell would do to the system."""

    def _heard(self, message: object, epoch: int | None) -> None:
        if isinstance(message, ClientInit | GatewayInit):
            self._on_init(self.name, message)
        for heard in self._listeners:
            heard(self.world.now, self.name, message, epoch)

    def _tell_sealed(self, data: bytes) -> None:
        if data[:4] != _TRANSPORT and 0x40 <= data[0] <= 0x7F:
            data = data[4:]  # ChannelData (RFC 8656, section 12.4)
        if data[:4] == _TRANSPORT and len(data) >= 32:
            counter = int.from_bytes(data[8:16], "little")
            for sealed in self._sealed:
                sealed(self.world.now, self.name, data[4:8], counter, data)


class ClientHost(AgentHost):
    """A client. `on_answer` gets inner packets for the applications of the device."""

    events = TO_CLIENT
    agent: ClientAgent
    agent_type: type[ClientAgent] = ClientAgent

    def __init__(self, *args: Any, on_answer: Callable[[bytes], None], **keywords: Any) -> None:
        self._on_answer = on_answer
        super().__init__(*args, **keywords)

    def _make_agent(
        self, identity: AgentIdentity, engine: Engine, randomness: SeededRandomness, now: int
    ) -> ClientAgent:
        return self.agent_type(identity, engine, randomness=randomness, now=now)

    def addresses(self) -> tuple[bytes, bytes] | None:
        """The packed tunnel addresses (IPv4, IPv6), once the portal has given them."""
        interface = self.agent.interface
        return None if interface is None else (interface.ipv4.packed, interface.ipv6.packed)

    def send_packet(self, packet: bytes) -> None:
        """An application sends a packet that is routed into the TUN device."""
        self.agent.receive_packets((packet,), self.now)
        self.touched()

    def _take_packets(self, packets: list[bytes]) -> None:
        for packet in packets:
            self._on_answer(packet)


class GatewayHost(AgentHost):
    """A gateway. `network` makes its way to the network of its site, given where answers go."""

    events = TO_GATEWAY
    agent: GatewayAgent

    def __init__(
        self,
        *args: Any,
        network: Callable[[Callable[[bytes], None]], Masquerade],
        client_name: Callable[[UUID], str],
        **keywords: Any,
    ) -> None:
        self.network = network(self.return_packet)
        self._client_name = client_name
        super().__init__(*args, **keywords)

    def _make_agent(
        self, identity: AgentIdentity, engine: Engine, randomness: SeededRandomness, now: int
    ) -> GatewayAgent:
        forwarded = hears(self.observers, "forwarded")
        granted = hears(self.observers, "granted")
        if not forwarded and not granted:
            return GatewayAgent(identity, engine, randomness=randomness, now=now)
        agent = _WatchedGateway(identity, engine, randomness=randomness, now=now)

        def on_forwarded(client_id: UUID, packets: Sequence[bytes]) -> None:
            client = self._client_name(client_id)
            for each in forwarded:
                for packet in packets:
                    each(self.world.now, self.name, client, packet)

        def on_granted(message: Authorize) -> None:
            client = self._client_name(message.client.id)
            for each in granted:
                each(
                    self.world.now,
                    self.name,
                    client,
                    message.authorization_id,
                    message.resource.id,
                )

        agent.on_forwarded = on_forwarded
        agent.on_granted = on_granted
        return agent

    def stop(self) -> None:
        if not self.is_over:
            self.network.close()
        super().stop()

    def return_packet(self, packet: bytes) -> None:
        """The gateway's kernel routes a packet into the TUN device."""
        if self.is_over:
            return
        for returned in hears(self.observers, "returned"):
            returned(self.world.now, self.name, packet)
        self.agent.receive_packets((packet,), self.now)
        self.touched()

    def _take_packets(self, packets: list[bytes]) -> None:
        for packet in packets:
            self.network.forward(packet)

    def _perform(self, event: Any) -> None:
        if isinstance(event, FlushTranslations):
            self.network.flush(event)


class _WatchedGateway(GatewayAgent):
    """The real agent, which says by whose tunnel a packet came that it forwards."""

    on_forwarded: Callable[[UUID, Sequence[bytes]], None]
    on_granted: Callable[[Authorize], None]

    def _forward(self, connection: _Connection, run: Sequence[bytes], now: int) -> int:
        self.on_forwarded(connection.client.id, run)
        return super()._forward(connection, run, now)

    def _grant(self, message: Authorize, now: int) -> None:
        super()._grant(message, now)
        self.on_granted(message)
