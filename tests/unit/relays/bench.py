"""A relay in virtual time with clients and peers around it, all of it in one thread.

`MemorySockets` is the simulated machine under the server core: ports that are open or not.
`Caller` speaks TURN by hand, attribute by attribute; `Wire` connects `TurnClient` cores.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from relays.authentication import Credentials, StaticCredentials
from relays.client import Event, Family, TurnClient
from relays.fastpath import FastPath
from relays.peers import PeerPolicy
from relays.requests import ServerLimits
from relays.server import Server
from relays.stun import (
    Attribute,
    Integrity,
    MessageClass,
    Method,
    PasswordAlgorithm,
    StunMessage,
    long_term_key,
    password_algorithms_value,
    xor_address_value,
)
from relays.turn import NS, read_channel_data, read_indication
from runtime.net.address import Address
from runtime.randomness import SeededRandomness

RELAY_HOST = "203.0.113.6"
RELAY_HOST_IPV6 = "2001:db8:6::6"
SERVER = Address(RELAY_HOST, 3478)
LISTENER = 1
UNIX_S = 1_800_000_000
USERS = {"alice": "opensesame", "bob": "swordfish"}
UDP = (Attribute.REQUESTED_TRANSPORT, b"\x11\0\0\0")
LIFETIME_0 = (Attribute.LIFETIME, bytes(4))

Attributes = list[tuple[int, bytes]]


class MemorySockets:
    """Ports of a machine of which `busy` ones belong to other programs."""

    def __init__(self) -> None:
        self.busy: set[int] = set()
        self.open_ports: dict[int, tuple[int, int]] = {}
        self._next = 100

    def open(self, family: int, port: int) -> int | None:
        if port in self.busy or (family, port) in self.open_ports.values():
            return None
        self._next += 1
        self.open_ports[self._next] = (family, port)
        return self._next

    def close(self, socket: int) -> None:
        del self.open_ports[socket]


@attrs.define
class Bench:
    """A server, its machine and the time."""

    server: Server
    sockets: MemorySockets
    now: int = 1000 * NS
    seed: int = 0

    @classmethod
    def of(
        cls,
        *,
        credentials: Credentials | None = None,
        limits: ServerLimits | None = None,
        peers: PeerPolicy | None = None,
        ipv6: bool = False,
        external_ip: str | None = None,
        alternate: Address | None = None,
        ports: tuple[int, int] = (49_152, 65_535),
        seed: int = 0,
        realm: str = "holloway",
        fast_path: FastPath | None = None,
    ) -> Bench:
        sockets = MemorySockets()
        hosts = {1: external_ip or RELAY_HOST}
        if ipv6:
            hosts[2] = RELAY_HOST_IPV6
        server = Server(
            credentials=credentials or StaticCredentials(USERS),
            realm=realm,
            relay_addresses=hosts,
            own_addresses=frozenset({RELAY_HOST, "203.0.113.7", "127.0.0.1"}),
            sockets=sockets,
            randomness=SeededRandomness(seed, "server"),
            peers=peers,
            limits=limits,
            first_port=ports[0],
            last_port=ports[1],
            alternate_servers=None if alternate is None else {1: alternate},
            fast_path=fast_path,
            now=1000 * NS,
            unix_s=UNIX_S,
        )
        server.add_listener(LISTENER)
        return cls(server, sockets, seed=seed)

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * NS)
        self.server.handle_timeout(self.now)

    def from_client(
        self, data: bytes, source: tuple[str, int], listener: int = LISTENER
    ) -> list[bytes]:
        """Deliver a datagram of a client; what came back to that client."""
        self.server.receive(listener, memoryview(data), source, self.now)
        return [
            bytes(sent)
            for socket, sent, destination in self.server.drain_transmits()
            if socket == listener and destination == source
        ]

    def to_peers(self, data: bytes, source: tuple[str, int]) -> list[tuple[Address, bytes, str]]:
        """Deliver a datagram of a client; what left for peers: (peer, data, relay port)."""
        self.server.receive(LISTENER, memoryview(data), source, self.now)
        return [
            (Address(*destination), bytes(sent), str(self.sockets.open_ports[abs(socket)][1]))
            for socket, sent, destination in self.server.drain_transmits()
            if socket != LISTENER
        ]

    def from_peer(
        self, data: bytes, peer: tuple[str, int], relayed: Address
    ) -> list[tuple[tuple[str, int], bytes]]:
        """Deliver a datagram of a peer to a relayed address; what went to clients."""
        for socket, (_, port) in self.sockets.open_ports.items():
            if port == relayed.port:
                self.server.receive_from_peer(socket, memoryview(data), peer, self.now)
                break
        return [(to, bytes(sent)) for _, sent, to in self.server.drain_transmits()]


class Caller:
    """A client that builds each request by hand."""

    def __init__(
        self,
        bench: Bench,
        source: tuple[str, int] = ("198.51.100.2", 40_000),
        username: str = "alice",
        password: str | None = None,
        algorithm: PasswordAlgorithm = PasswordAlgorithm.SHA256,
        listener: int = LISTENER,
    ) -> None:
        self.bench = bench
        self.listener = listener
        self.source = source
        self.username = username
        self.password = USERS[username] if password is None else password
        self.algorithm = algorithm
        self.integrity = Integrity.SHA256
        self.nonce: bytes = b""
        self.offer: bytes = b""
        self.realm = b"holloway"
        self._randomness = SeededRandomness(bench.seed, f"{source}")

    @property
    def key(self) -> bytes:
        return long_term_key(self.algorithm, self.username, self.realm.decode(), self.password)

    def transaction_id(self) -> bytes:
        return self._randomness.bytes(12)

    def bare(self, method: int, attributes: Attributes | None = None) -> StunMessage | None:
        """Send a request without credentials; the answer."""
        message = StunMessage(
            method=method,
            message_class=MessageClass.REQUEST,
            transaction_id=self.transaction_id(),
            attributes=tuple(attributes or []),
        )
        answers = self.bench.from_client(message.encode(), self.source, self.listener)
        return StunMessage.decode(answers[0]) if answers else None

    def learn_nonce(self) -> StunMessage:
        challenge = self.bare(Method.ALLOCATE, [UDP])
        assert challenge is not None
        self.nonce = challenge.value(Attribute.NONCE) or b""
        self.offer = challenge.value(Attribute.PASSWORD_ALGORITHMS) or b""
        return challenge

    def encode(
        self, method: int, attributes: Attributes, transaction_id: bytes | None = None
    ) -> bytes:
        if not self.nonce:
            self.learn_nonce()
        credentials: Attributes = [
            (Attribute.USERNAME, self.username.encode()),
            (Attribute.REALM, self.realm),
            (Attribute.NONCE, self.nonce),
        ]
        if self.integrity is Integrity.SHA256:
            chosen = password_algorithms_value(self.algorithm)
            credentials.append((Attribute.PASSWORD_ALGORITHMS, self.offer))
            credentials.append((Attribute.PASSWORD_ALGORITHM, chosen))
        return StunMessage(
            method=method,
            message_class=MessageClass.REQUEST,
            transaction_id=transaction_id or self.transaction_id(),
            attributes=(*attributes, *credentials),
        ).encode(key=self.key, integrity=self.integrity)

    def call(
        self, method: int, attributes: Attributes, transaction_id: bytes | None = None
    ) -> StunMessage:
        """Send a request with credentials; its answer, whose integrity is checked unless it is a
        challenge."""
        data = self.encode(method, attributes, transaction_id)
        answers = self.bench.from_client(data, self.source, self.listener)
        assert len(answers) == 1
        answer = StunMessage.decode(answers[0])
        if code_of(answer) not in (400, 401, 438) or answer.integrities:
            assert answer.verify(self.key, self.integrity)
        return answer

    def allocate(self, *attributes: tuple[int, bytes]) -> Address:
        answer = self.call(Method.ALLOCATE, [UDP, *attributes])
        relayed = answer.xor_address(Attribute.XOR_RELAYED_ADDRESS)
        assert relayed is not None, answer.error()
        return relayed

    def refresh(self, *attributes: tuple[int, bytes]) -> StunMessage:
        return self.call(Method.REFRESH, list(attributes))

    def permit(self, *hosts: str) -> StunMessage:
        transaction_id = self.transaction_id()
        peers: Attributes = [
            (Attribute.XOR_PEER_ADDRESS, xor_address_value((host, 0), transaction_id))
            for host in hosts
        ]
        return self.call(Method.CREATE_PERMISSION, peers, transaction_id)

    def bind(self, number: int, peer: tuple[str, int]) -> StunMessage:
        transaction_id = self.transaction_id()
        return self.call(
            Method.CHANNEL_BIND,
            [
                (Attribute.CHANNEL_NUMBER, number.to_bytes(2, "big") + b"\0\0"),
                (Attribute.XOR_PEER_ADDRESS, xor_address_value(peer, transaction_id)),
            ],
            transaction_id,
        )


def code_of(answer: StunMessage | None) -> int:
    """The error code, 0 for a success."""
    assert answer is not None
    error = answer.error()
    return 0 if error is None else error[0]


def indication_of(packet: bytes | memoryview) -> tuple[tuple[str, int], bytes] | None:
    unpacked = read_indication(memoryview(packet))
    return None if unpacked is None else (unpacked[0], bytes(unpacked[1]))


def channel_data_of(packet: bytes | memoryview) -> tuple[int, bytes] | None:
    unpacked = read_channel_data(memoryview(packet))
    return None if unpacked is None else (unpacked[0], bytes(unpacked[1]))


class Wire:
    """`TurnClient` cores, the relay and peers; datagrams arrive at once unless they are lost."""

    def __init__(self, bench: Bench, loss_percent: int = 0) -> None:
        self.bench = bench
        self.clients: dict[tuple[str, int], TurnClient] = {}
        self.events: dict[tuple[str, int], list[Event]] = {}
        self.at_peers: list[tuple[Address, Address, bytes]] = []
        self.is_cut = False
        self.relayed_from: dict[Address, int] = {}
        self._loss_percent = loss_percent
        self._luck = SeededRandomness(bench.seed, "loss")

    def client(
        self,
        source: tuple[str, int] = ("198.51.100.2", 40_000),
        username: str = "alice",
        password: str | None = None,
        family: Family = "ipv4",
        *,
        reliable: bool = False,
        redirects: int = 0,
    ) -> TurnClient:
        life = "again " if source in self.clients else ""
        client = TurnClient(
            server=SERVER,
            username=username,
            password=USERS[username] if password is None else password,
            family=family,
            randomness=SeededRandomness(self.bench.seed, f"{life}client {source}"),
            now=self.bench.now,
            reliable=reliable,
            redirects=redirects,
        )
        self.clients[source] = client
        self.events[source] = []
        return client

    def settle(self) -> None:
        """Deliver until nothing moves; peers keep what they get in `at_peers`."""
        self.settle_until(lambda: False)

    def settle_until(self, is_enough: Callable[[], bool]) -> None:
        moving = True
        while moving and not is_enough():
            moving = False
            for source, client in self.clients.items():
                for datagram in client.drain_datagrams():
                    moving = True
                    if not self._is_lost():
                        self.bench.server.receive(
                            LISTENER, memoryview(datagram), source, self.bench.now
                        )
                self.events[source] += client.drain_events()
            for socket, data, destination in self.bench.server.drain_transmits():
                moving = True
                if self._is_lost():
                    continue
                if socket == LISTENER:
                    self.clients[destination].receive(bytes(data), self.bench.now)
                else:
                    port = self.bench.sockets.open_ports[socket][1]
                    relayed = Address(RELAY_HOST, port)
                    self.at_peers.append((Address(*destination), relayed, bytes(data)))

    def run(self, seconds: float) -> None:
        """Let time pass, with every timer at its moment."""
        end = self.bench.now + int(seconds * NS)
        self.settle()
        while True:
            deadlines = [client.poll_timeout() for client in self.clients.values()]
            deadlines.append(self.bench.server.poll_timeout())
            due = min((d for d in deadlines if d is not None), default=end + 1)
            if due > end:
                break
            self.bench.now = max(self.bench.now, due)
            for client in self.clients.values():
                client.handle_timeout(self.bench.now)
            self.bench.server.handle_timeout(self.bench.now)
            self.settle()
        self.bench.now = end

    def from_peer(self, data: bytes, peer: Address, relayed: Address) -> None:
        for to, packet in self.bench.from_peer(data, peer, relayed):
            self.clients[to].receive(packet, self.bench.now)
        self.settle()

    def _is_lost(self) -> bool:
        return self.is_cut or self._luck.integer(100) < self._loss_percent
