"""A small network in memory: engines behind NATs, the real TURN server core, a signalling channel.

Datagrams take `latency_ns` and may be lost, doubled or delayed by chance drawn from a seed; so a
run with the same seed is the same run. `trace` notes every datagram that left a host.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from hashlib import sha256
from uuid import UUID

import attrs

from channel.messages import Candidates, IceCredentials, IpText, RelayServer, SocketAddress
from relays.authentication import StaticCredentials
from relays.server import Server
from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from simulations.net.nat import PORT_RESTRICTED, Nat, NatBehaviour
from simulations.net.packets import UDP
from tunnel.connection import Connected, Event, LocalCandidates, PathChanged, PathLost
from tunnel.engine import ConnectionParameters, Engine, LinkCommand, OpenLink
from tunnel.ice.links import LinkTransport

RELAY = Address("198.51.100.10", 3478)
RELAY_ID = UUID(int=0xE1A)
SECOND_RELAY = Address("198.51.101.20", 3478)
SECOND_RELAY_ID = UUID(int=0xE1B)
CONNECTION = UUID(int=0xC0)
USER, PASSWORD = "user", "password"
LINKS = 1_000_000  # the number of the relay's listener for connections
GREETING = 999_999  # the number of the packet that opens a tunnel before a conversation
MAX_STEPS = 200_000


@attrs.define(kw_only=True)
class Weather:
    """What may happen to a datagram: probabilities in permille."""

    latency_ns: int = 10 * NS_PER_MS
    jitter_ns: int = 0
    lost: int = 0
    doubled: int = 0


class Host:
    """An engine with one socket, perhaps behind a NAT."""

    def __init__(self, network: Network, name: str, address: Address, nat: Nat | None) -> None:
        self.network = network
        self.name = name
        self.address = address
        self.nat = nat
        self.alive = True
        self.events: list[Event] = []
        self.event_times: list[int] = []
        self.packets: list[tuple[UUID, bytes]] = []
        self.other: Host | None = None
        randomness = network.randomness.child(name)
        self.engine = Engine(
            private_key=randomness.bytes(32), randomness=randomness, now=network.now
        )
        self.engine.add_socket(address, network.now, network=f"{address.host}/24")

    def poll_timeout(self) -> int | None:
        return self.engine.poll_timeout() if self.alive else None

    def handle_timeout(self, now: int) -> None:
        self.engine.handle_timeout(now)
        self.flush()

    def receive(self, data: bytes, source: Address, to: Address) -> None:
        if self.alive:
            self.engine.receive_datagrams(to, [(data, source)], self.network.now)
            self.flush()

    def send(self, packet: bytes, connection: UUID = CONNECTION) -> None:
        self.engine.send_packet(connection, packet, self.network.now)
        self.flush()

    def move(self, address: Address, nat: Nat | None) -> None:
        """Change the network: another address, perhaps behind another NAT. Links of the old one
        are silent from then on."""
        now = self.network.now
        self.network.silence_links(self)
        self.engine.remove_socket(self.address, now)
        self.network.forget(self)
        self.address, self.nat = address, nat
        self.network.attach(self)
        self.engine.add_socket(address, now, network=f"{address.host}/24")
        self.flush()

    def flush(self) -> None:
        now = self.network.now
        for local, remote, data in self.engine.drain_transmits():
            source = local if self.nat is None else self.nat.outbound(UDP, local, remote, now)
            if source is not None:
                self.network.send(source, remote, data)
        for link, message in self.engine.drain_link_messages():
            self.network.send_by_link(self, link, message)
        for command in self.engine.drain_link_commands():
            self.network.obey(self, command)
        self.packets += self.engine.drain_packets()
        for event in self.engine.drain_events():
            self.events.append(event)
            self.event_times.append(now)
            if isinstance(event, LocalCandidates) and self.other is not None:
                self.network.signal(self.other, event.message)

    def happened(self, kind: type) -> bool:
        return any(isinstance(event, kind) for event in self.events)

    def time_of(self, kind: type) -> int:
        """When the last event of this kind happened."""
        return [t for t, e in zip(self.event_times, self.events, strict=True) if type(e) is kind][
            -1
        ]

    def path_kind(self) -> str | None:
        path = self.engine.path(CONNECTION)
        return None if path is None else path.kind


class RelayHost:
    """The real TURN server core on a public address."""

    def __init__(self, network: Network, address: Address) -> None:
        self.network = network
        self.address = address
        self.alive = True
        self._ports: dict[int, int] = {0: address.port}
        self._next = 1
        self.restart()

    def restart(self) -> None:
        """Forget every allocation, as a crash does."""
        self._ports = {0: self.address.port}
        self.server = Server(
            credentials=StaticCredentials({USER: PASSWORD}),
            realm="holloway",
            relay_addresses={1: self.address.host},
            own_addresses=frozenset({self.address.host}),
            sockets=self,
            randomness=self.network.randomness.child(f"relay {self._next}"),
            now=self.network.now,
            unix_s=0,
        )
        self.server.add_listener(0)
        self.server.add_listener(LINKS, reliable=True)

    def open(self, family: int, port: int) -> int | None:
        if port in self._ports.values():
            return None
        self._ports[self._next] = port
        self._next += 1
        return self._next - 1

    def close(self, socket: int) -> None:
        self._ports.pop(socket, None)

    def poll_timeout(self) -> int | None:
        return self.server.poll_timeout() if self.alive else None

    def handle_timeout(self, now: int) -> None:
        self.server.handle_timeout(now)
        self.flush()

    def receive(self, data: bytes, source: Address, to: Address) -> None:
        if not self.alive:
            return
        for socket, port in self._ports.items():
            if port == to.port:
                if socket == 0:
                    self.server.receive(0, memoryview(data), source, self.network.now)
                else:
                    self.server.receive_from_peer(
                        socket, memoryview(data), source, self.network.now
                    )
                break
        self.flush()

    def flush(self) -> None:
        for socket, data, destination in self.server.drain_transmits():
            if socket in self._ports:
                source = Address(self.address.host, self._ports[socket])
                self.network.send(source, Address(*destination), bytes(data))
            elif socket == LINKS:
                self.network.answer_by_link(self, destination, bytes(data))


class Network:
    def __init__(self, seed: int = 1, weather: Weather | None = None) -> None:
        self.now = NS_PER_S
        self.weather = weather or Weather()
        self.randomness = SeededRandomness(seed, "network")
        self.trace: list[tuple[int, Address, Address, bytes]] = []
        self.blocked: Callable[[Address, Address, bytes], bool] = lambda _s, _d, _data: False
        self.altered: Callable[[Address, bytes], bytes] = lambda _destination, data: data
        self.closed_doors: set[str] = set()
        self.link_log: list[tuple[int, str, str]] = []
        self._links: dict[tuple[str, int], tuple[Host, OpenLink]] = {}
        self._silent_links: set[tuple[str, int]] = set()
        self._chance = self.randomness.child("weather")
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._number = 0
        self._nodes: list[Host | RelayHost] = []
        self._owner: dict[str, Host | RelayHost] = {}
        self._nats: dict[str, Nat] = {}

    def host(self, name: str, address: str, behind: NatBehaviour | None = None) -> Host:
        """A host; with `behind`, its NAT has the public address 203.0.113.N like its own N."""
        ip = Address(address, 41_000)
        nat = None
        if behind is not None:
            public = f"203.0.113.{address.rpartition('.')[2]}"
            nat = self.nat(public, behind)
        host = Host(self, name, ip, nat)
        self._nodes.append(host)
        self.attach(host)
        return host

    def nat(self, public: str, behaviour: NatBehaviour) -> Nat:
        """A NAT with this public address."""
        return Nat(public, (public,), behaviour, seed=self.randomness.seed)

    def relay(self, address: Address = RELAY) -> RelayHost:
        relay = self.relay_host = RelayHost(self, address)
        self._nodes.append(relay)
        self._owner[address.host] = relay
        return relay

    def relay_at(self, address: Address) -> RelayHost:
        relay = self._owner[address.host]
        assert isinstance(relay, RelayHost)
        return relay

    def attach(self, host: Host) -> None:
        self._owner[host.address.host] = host
        if host.nat is not None:
            self._nats[host.nat.addresses[0]] = host.nat

    def forget(self, host: Host) -> None:
        self._owner.pop(host.address.host, None)
        if host.nat is not None:
            self._nats.pop(host.nat.addresses[0], None)

    def send(self, source: Address, destination: Address, data: bytes) -> None:
        self.trace.append((self.now, source, destination, sha256(data).digest()))
        if self.blocked(source, destination, data):
            return
        copies = 2 if self._happens(self.weather.doubled) else 1
        for _ in range(copies):
            if self._happens(self.weather.lost):
                continue
            delay = self.weather.latency_ns
            if self.weather.jitter_ns:
                delay += self._chance.integer(self.weather.jitter_ns)
            self.at(delay, lambda: self._deliver(source, destination, data))

    # --- links: connections to the relay that lose nothing ---

    def obey(self, host: Host, command: LinkCommand) -> None:
        """Two round trips to open one, where the relay lives and the door is not closed."""
        key = (host.name, command.link)
        if not isinstance(command, OpenLink):
            self.link_log.append((self.now, host.name, "close"))
            _, opened = self._links.pop(key, (host, None))
            if opened is not None:
                relay = self.relay_at(opened.address)
                relay.server.client_gone(LINKS, ("203.0.113.200", 10_000 + command.link))
            return
        self.link_log.append((self.now, host.name, command.transport))
        self._links[key] = (host, command)

        def settle() -> None:
            if key not in self._links:
                return
            relay = self.relay_at(command.address)
            if command.transport in self.closed_doors or not relay.alive:
                del self._links[key]
                host.engine.link_closed(command.link, self.now)
            else:
                host.engine.link_opened(command.link, self.now)
            host.flush()

        self.at(4 * self.weather.latency_ns, settle)

    def close_door(self, transport: str) -> None:
        """From now on nothing passes there, and what stands breaks."""
        self.closed_doors.add(transport)
        for (name, link), (_, opened) in list(self._links.items()):
            if opened.transport == transport:
                self._break(name, link)

    def break_links_to(self, relay: RelayHost) -> None:
        """The relay's process died."""
        for (name, link), (_, opened) in list(self._links.items()):
            if self.relay_at(opened.address) is relay:
                self._break(name, link)

    def _break(self, name: str, link: int) -> None:
        host, opened = self._links.pop((name, link))
        relay = self.relay_at(opened.address)
        relay.server.client_gone(LINKS, ("203.0.113.200", 10_000 + link))
        host.engine.link_closed(link, self.now)
        host.flush()

    def silence_links(self, host: Host) -> None:
        """From now on nothing passes by the links that stand, and nobody is told."""
        self._silent_links |= {key for key in self._links if key[0] == host.name}

    def restore_links(self) -> None:
        """They pass again, as TCP does that was cut off for a while (what was sent is lost)."""
        self._silent_links.clear()

    def _passes(self, name: str, link: int) -> bool:
        return (name, link) in self._links and (name, link) not in self._silent_links

    def send_by_link(self, host: Host, link: int, message: bytes) -> None:
        def arrive() -> None:
            if not self._passes(host.name, link):
                return
            relay = self.relay_at(self._links[host.name, link][1].address)
            if relay.alive:
                client = ("203.0.113.200", 10_000 + link)
                relay.server.receive(LINKS, memoryview(message), client, self.now)
                relay.flush()

        self.at(self.weather.latency_ns, arrive)

    def answer_by_link(self, answering: RelayHost, client: tuple[str, int], message: bytes) -> None:
        def arrive() -> None:
            for (name, link), (host, opened) in list(self._links.items()):
                is_its = link == client[1] - 10_000 and self._passes(name, link)
                if is_its and self.relay_at(opened.address) is answering:
                    host.engine.receive_from_link(link, [message], self.now)
                    host.flush()

        self.at(self.weather.latency_ns, arrive)

    def signal(self, to: Host, message: Candidates) -> None:
        """The control channel: ordered, 30 ms."""

        def arrive() -> None:
            if to.alive:
                to.engine.add_candidates(message, self.now)
                to.flush()

        self.at(30 * NS_PER_MS, arrive)

    def at(self, delay_ns: int, act: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self.now + delay_ns, self._number, act))

    def run(self, duration_ns: int, until: Callable[[], bool] | None = None) -> bool:
        """Run for a time, or until something holds: whether it does."""
        end = self.now + duration_ns
        for _ in range(MAX_STEPS):
            if until is not None and until():
                return True
            timeouts = [(at, n) for n, at in self._timeouts() if at is not None]
            node_at = min((at for at, _ in timeouts), default=end + 1)
            heap_at = self._heap[0][0] if self._heap else end + 1
            if min(node_at, heap_at) > end:
                self.now = end
                return until is not None and until()
            if heap_at <= node_at:
                self.now, _, act = heapq.heappop(self._heap)
                act()
                continue
            self.now = max(self.now, node_at)
            for at, number in timeouts:
                if at <= self.now:
                    self._nodes[number].handle_timeout(self.now)
        raise AssertionError("the network does not come to rest")

    def _timeouts(self) -> list[tuple[int, int | None]]:
        return [(number, node.poll_timeout()) for number, node in enumerate(self._nodes)]

    def _deliver(self, source: Address, destination: Address, data: bytes) -> None:
        nat = self._nats.get(destination.host)
        if nat is not None:
            inside = nat.inbound(UDP, source, destination, self.now)
            if inside is None:
                return
            destination = inside
        owner = self._owner.get(destination.host)
        if owner is not None and (isinstance(owner, RelayHost) or owner.address == destination):
            owner.receive(self.altered(destination, data), source, destination)

    def _happens(self, permille: int) -> bool:
        return permille > 0 and self._chance.integer(1000) < permille


def relay_server(
    address: Address = RELAY, password: str = PASSWORD, doors: tuple[LinkTransport, ...] = ()
) -> RelayServer:
    host = IpText(address.host)
    relay_id = RELAY_ID if address == RELAY else SECOND_RELAY_ID
    others = tuple(SocketAddress(address=host, port=443, transport=each) for each in doors)
    return RelayServer(
        id=relay_id,
        addresses=(SocketAddress(address=host, port=address.port), *others),
        certificate_pins=("ab" * 32,),
        username=USER,
        password=password,
        expires_in_ns=3600 * NS_PER_S,
    )


def ice(name: str) -> IceCredentials:
    return IceCredentials(fragment=f"{name:_<8}"[:8], password=f"{name:-<32}")


def connect(
    client: Host, gateway: Host, connection: UUID = CONNECTION, preshared_key: bytes = b"p" * 32
) -> None:
    """Open a connection on both, the gateway first, as the portal does."""
    client.other, gateway.other = gateway, client
    ends = ice(f"c{connection.int:x}"), ice(f"g{connection.int:x}")
    for host, peer, (local, remote) in (
        (gateway, client, (ends[1], ends[0])),
        (client, gateway, ends),
    ):
        host.engine.open(
            ConnectionParameters(
                connection_id=connection,
                peer_public_key=peer.engine.public_key,
                preshared_key=preshared_key,
                local_ice=local,
                remote_ice=remote,
                controlling=host is client,
            ),
            client.network.now,
        )
        host.flush()


def pair_of_hosts(
    network: Network,
    client_nat: NatBehaviour | None = PORT_RESTRICTED,
    gateway_nat: NatBehaviour | None = PORT_RESTRICTED,
) -> tuple[Host, Host]:
    """A client and a gateway in different private networks, and a relay for both."""
    network.relay()
    client = network.host("client", "192.168.1.7" if client_nat else "192.0.2.7", client_nat)
    gateway = network.host("gateway", "10.20.30.8" if gateway_nat else "192.0.2.8", gateway_nat)
    for host in (client, gateway):
        host.engine.set_relays([relay_server()], network.now)
        host.flush()
    return client, gateway


class Conversation:
    """The client sends a numbered packet every `interval_ns`, the gateway answers each with a
    packet of its own (where `answers`), until `stop`."""

    def __init__(
        self,
        client: Host,
        gateway: Host,
        *,
        interval_ns: int = 50 * NS_PER_MS,
        answers: bool = True,
    ) -> None:
        self.client, self.gateway = client, gateway
        self.sent = 0
        self._interval_ns = interval_ns
        self._answers = answers
        self._running = True
        self._tick()

    def stop(self) -> None:
        self._running = False

    def delivered(self) -> list[int]:
        """The numbers of the client's packets as they reached the gateway."""
        return [n for n in _numbers(self.gateway) if n != GREETING]

    def answered(self) -> list[int]:
        """The numbers of the gateway's packets as they reached the client."""
        return _numbers(self.client)

    def _tick(self) -> None:
        if not self._running:
            return
        network = self.client.network
        if self.client.alive:
            self.client.send(ip_packet(self.sent))
        if self._answers and self.gateway.alive and self.gateway.packets:
            self.gateway.send(ip_packet(1_000_000 + self.sent))
        self.sent += 1
        network.at(self._interval_ns, self._tick)


def _numbers(host: Host) -> list[int]:
    return [int.from_bytes(packet[20:24], "big") for _, packet in host.packets]


def ip_packet(number: int, size: int = 60) -> bytes:
    """An IPv4 packet whose content tells which one it is."""
    header = bytes((0x45, 0)) + size.to_bytes(2, "big") + bytes(16)
    return (
        header
        + number.to_bytes(4, "big")
        + sha256(b"%d" % number).digest()[: size - 24].ljust(size - 24, b".")
    )


__all__ = [
    "CONNECTION",
    "GREETING",
    "RELAY",
    "SECOND_RELAY",
    "Connected",
    "Conversation",
    "Host",
    "Network",
    "PathChanged",
    "PathLost",
    "Weather",
    "connect",
    "ip_packet",
    "pair_of_hosts",
    "relay_server",
]
