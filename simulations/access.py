"""One whole access in virtual time: the actors, agents, relay and NATs of a small installation.

A client behind one NAT reaches an echo service behind another: first in vain, then by a policy,
through a punched path or (between symmetric NATs) a relay, until the policy goes. It proves that
the seams hold: nothing here but the shells of `simulations.hosts` differs from a real machine.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from uuid import UUID

import attrs

from actors.logs import FlowLog
from actors.model import (
    Account,
    Entity,
    Group,
    Membership,
    Policy,
    Principal,
    Resource,
    Site,
    Token,
    TokenKind,
)
from actors.store.interface import Put, Remove
from channel.credentials import encode_token, hash_token
from channel.messages import IpText, SocketAddress
from clients.agent import ClientAgent
from gateways.agent import GatewayAgent
from relays.agent import RelayAgent
from relays.authentication import StampedCredentials
from runtime.secret import Secret
from simulations.hosts import RELAY_PORT, AgentHost, ControlHost, RelayHost, at_once, id_at
from simulations.nat import PORT_RESTRICTED, Nat, NatBehaviour
from simulations.world import World
from tunnel.agent import AgentIdentity
from tunnel.engine import Engine

NS = 10**9
PORTAL = "203.0.113.2:443"
RELAY_IP = "203.0.113.6"
ECHO_IP = "10.20.0.80"
ECHO_PORT = 7
QUESTION = b"who is there?"


@attrs.frozen(kw_only=True)
class LoggedFlow:
    """What a row of the flow log says of one flow, as one side counted it."""

    reporter: str
    destination: str
    packets_sent: int
    packets_received: int
    bytes_sent: int
    ending: str


@attrs.frozen(kw_only=True)
class AccessReport:
    """What happened in one run. `path` is how the first answer came; times are virtual ns; `flows`
    are what stands in the store's log at the end."""

    seed: int
    denied_at_first: bool
    answered: bool
    path: str
    first_answer_ns: int
    cut_after_revocation: bool
    flows: tuple[LoggedFlow, ...]
    datagrams: int
    trace: str


class Access:
    """The installation of one access; `run` tells the story."""

    def __init__(self, seed: int, behaviour: NatBehaviour = PORT_RESTRICTED) -> None:
        self.world = World(seed)
        self.control = ControlHost(self.world, portal=PORTAL)
        self.answers: list[bytes] = []
        self._ids: dict[str, UUID] = {}
        self._make_account()
        home = self.world.nat("198.51.100.2", behaviour)
        office = self.world.nat("192.0.2.2", behaviour)
        self._start_relay()
        self.gateway = self._start_gateway(office)
        self.client = self._start_client(home)
        self.world.run_until(lambda: self._joined(), limit_ns=30 * NS)

    def run(self) -> AccessReport:
        """Ask in vain, allow, ask, forbid, ask in vain."""
        denied = not self._ask(limit_ns=3 * NS)
        self.allow()
        asked_at = self.world.now
        answered = self._ask(limit_ns=20 * NS)
        first_answer_ns = self.world.now - asked_at
        path = self._path()
        self.forbid()
        self.world.run_for(NS)
        cut = not self._ask(limit_ns=5 * NS)
        return AccessReport(
            seed=self.world.seed,
            denied_at_first=denied,
            answered=answered,
            path=path,
            first_answer_ns=first_answer_ns,
            cut_after_revocation=cut,
            flows=self._logged(),
            datagrams=self.world.datagrams,
            trace=self.world.trace,
        )

    def allow(self) -> None:
        """Make the policy."""
        self._put(
            Policy(
                id=self._id("policy"),
                account_id=self._id("account"),
                group_id=self._id("group"),
                resource_id=self._id("resource"),
                created_at=self.world.clock.utc_now(),
            )
        )

    def forbid(self) -> None:
        """Delete the policy."""
        self._apply(Remove("policy", self._id("policy")))

    # --- acting ---

    def _ask(self, *, limit_ns: int) -> bool:
        """Send the question about every second, until an answer comes or the time is over."""
        known = len(self.answers)
        end = self.world.now + limit_ns
        while self.world.now < end:
            interface = self.client.agent.interface
            if interface is not None:
                self.client.receive_packets(question(interface.ipv4))
            if self.world.run_until(lambda: len(self.answers) > known, limit_ns=NS):
                return self.answers[-1] == QUESTION
        return False

    def _path(self) -> str:
        engine = self.client.agent.engine
        paths = [engine.path(connection_id) for connection_id in engine.connection_ids]
        return next((path.kind for path in paths if path is not None), "none")

    def _logged(self) -> tuple[LoggedFlow, ...]:
        rows = at_once(self.control.store.logs(self._id("account"), "flow", limit=100))
        return tuple(
            LoggedFlow(
                reporter=row.reporter,
                destination=f"{row.destination}:{row.destination_port}",
                packets_sent=row.packets_sent,
                packets_received=row.packets_received,
                bytes_sent=row.bytes_sent,
                ending=row.ending,
            )
            for row in reversed(rows)
            if isinstance(row, FlowLog)
        )

    def _joined(self) -> bool:
        return (
            self.client.agent.joined
            and isinstance(self.gateway.agent, GatewayAgent)
            and (self.gateway.agent.joined)
        )

    # --- building ---

    def _make_account(self) -> None:
        at = self.world.clock.utc_now()
        account = self._id("account")
        self._put(
            Account(id=account, name="Demo", slug="demo", created_at=at),
            Group(id=self._id("group"), account_id=account, name="Engineers", created_at=at),
            Principal(id=self._id("user"), account_id=account, name="Grace", created_at=at),
            Membership(
                id=self._id("membership"),
                account_id=account,
                group_id=self._id("group"),
                principal_id=self._id("user"),
                created_at=at,
            ),
            Site(id=self._id("site"), account_id=account, name="Office", created_at=at),
            Resource(
                id=self._id("resource"),
                account_id=account,
                site_ids=(self._id("site"),),
                name="Echo",
                kind="ip",
                address=ECHO_IP,
                created_at=at,
            ),
        )

    def _start_relay(self) -> None:
        token = self._token("relay")
        machine = self.world.machine("relay", RELAY_IP)
        stamp_secret = self.world.randomness("stamp").bytes(32)
        agent = RelayAgent(
            token=token,
            addresses=(SocketAddress(address=IpText(RELAY_IP), port=RELAY_PORT),),
            stamp_secret=stamp_secret,
            name="relay",
            region="",
            software="simulation",
            incarnation=1,
        )
        RelayHost(self.world, self.control, machine, agent, StampedCredentials(stamp_secret))

    def _start_gateway(self, nat: Nat) -> AgentHost:
        machine = self.world.machine("gateway", "10.20.0.11", nat=nat)
        randomness = self.world.randomness("gateway")
        now = self.world.now
        agent = GatewayAgent(
            self._identity("gateway"),
            Engine(private_key=randomness.bytes(32), randomness=randomness, now=now),
            randomness=randomness,
            now=now,
        )

        def resource_network(packet: bytes) -> None:
            if packet[16:20] == IPv4Address(ECHO_IP).packed:
                answer = echoed(packet)
                self.world.after(10**6, lambda: host.receive_packets(answer))

        host = AgentHost(self.world, self.control, machine, "gateway", agent, resource_network)
        return host

    def _start_client(self, nat: Nat) -> AgentHost:
        machine = self.world.machine("laptop", "192.168.1.10", nat=nat)
        randomness = self.world.randomness("client")
        now = self.world.now
        agent = ClientAgent(
            self._identity("client"),
            Engine(private_key=randomness.bytes(32), randomness=randomness, now=now),
            randomness=randomness,
            now=now,
        )

        def kernel(packet: bytes) -> None:
            if packet[9] == 17:
                self.answers.append(packet[28:])

        return AgentHost(self.world, self.control, machine, "client", agent, kernel)

    def _identity(self, kind: TokenKind) -> AgentIdentity:
        assert kind in ("client", "gateway")
        return AgentIdentity(
            kind="client" if kind == "client" else "gateway",
            name=kind,
            token=self._token(kind),
            device_seed=Secret(self.world.randomness(f"device {kind}").bytes(32)),
            incarnation=1,
        )

    def _token(self, kind: TokenKind) -> Secret:
        token_id = self._id(f"{kind} token")
        secret = self.world.randomness(f"token {kind}").bytes(32)
        token = Token(
            id=token_id,
            account_id=None if kind == "relay" else self._id("account"),
            kind=kind,
            name=kind,
            hash=hash_token(kind, token_id, secret),
            principal_id=self._id("user") if kind == "client" else None,
            site_id=self._id("site") if kind == "gateway" else None,
            created_at=self.world.clock.utc_now(),
        )
        if kind == "relay":
            at_once(self.control.store.put_installation_token(token))
        else:
            self._put(token)
        return encode_token(kind, token_id, secret, PORTAL, bytes(32))

    def _id(self, name: str) -> UUID:
        if name not in self._ids:
            self._ids[name] = id_at(self.world, name)
        return self._ids[name]

    def _put(self, *entities: Entity) -> None:
        self._apply(*(Put(entity) for entity in entities))

    def _apply(self, *mutations: Put | Remove) -> None:
        at_once(
            self.control.store.apply(
                self._id("account"), mutations, who="admin", at=self.world.clock.utc_now()
            )
        )
        self.control.plane.wake(self._id("account"))


def question(source: IPv4Address) -> bytes:
    """A UDP datagram to the echo service, as an IPv4 packet (RFC 791, RFC 768; no UDP checksum)."""
    return _udp(source.packed, IPv4Address(ECHO_IP).packed, 40_000, ECHO_PORT, QUESTION)


def echoed(packet: bytes) -> bytes:
    """The same datagram with its ends exchanged."""
    source_port, destination_port = struct.unpack("!HH", packet[20:24])
    return _udp(packet[16:20], packet[12:16], destination_port, source_port, packet[28:])


def _udp(source: bytes, destination: bytes, from_port: int, to_port: int, data: bytes) -> bytes:
    length = 28 + len(data)
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, length, 1, 0, 64, 17, 0, source, destination)
    total = sum(struct.unpack("!10H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    header = header[:10] + struct.pack("!H", total ^ 0xFFFF) + header[12:]
    return header + struct.pack("!HHHH", from_port, to_port, 8 + len(data), 0) + data
