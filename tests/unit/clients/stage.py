"""A client, gateways and a portal of a few lines on one network in virtual time.

The agents and engines are the real ones. The portal knows which resources are allowed and passes
messages on; it stands for the control wing, which tests of the data wing do not know.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any
from uuid import UUID

from channel.credentials import encode_token
from channel.frames import Frame
from channel.messages import (
    EVENT_BY_TYPE,
    Ack,
    AuthorizationCreated,
    AuthorizationDenied,
    AuthorizationRevoked,
    Authorize,
    Candidates,
    Challenge,
    ClientInit,
    Filter,
    FlowReport,
    GatewayInit,
    IceCredentials,
    IceParameters,
    Interface,
    LiveAuthorization,
    Peer,
    Posture,
    ReportedFlow,
    RequestAuthorization,
    Resource,
    Revoke,
)
from channel.prefixes import Network
from clients.agent import ClientAgent, Survey
from clients.renewal import A_DAY, RenewalTimes
from gateways.agent import GatewayAgent
from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from runtime.secret import Secret
from tunnel.agent import AgentIdentity, TunnelAgent
from tunnel.engine import Engine

SECOND = 10**9
HOUR = 3_600 * SECOND
ACCOUNT = UUID(int=1)
CLIENT = UUID(int=2)
CLIENT_IPV4, CLIENT_IPV6 = IPv4Address("100.64.0.1"), IPv6Address("fd48:4c57:5900::1")
RANGE_IPV4, RANGE_IPV6 = IPv4Network("100.64.0.0/11"), IPv6Network("fd48:4c57:5900::/64")
WEB = Resource(
    id=UUID(int=100),
    name="web",
    kind="cidr",
    address="10.0.0.0/24",
    filters=(
        Filter(protocol="tcp", port_start=80, port_end=80),
        Filter(protocol="udp", port_start=53, port_end=53),
        Filter(protocol="icmp"),
    ),
)
SERVER = "10.0.0.5"


def gateway_id(number: int) -> UUID:
    return UUID(int=10 + number)


def interface(ipv4: IPv4Address, ipv6: IPv6Address) -> Interface:
    return Interface(ipv4=ipv4, ipv6=ipv6, range_ipv4=RANGE_IPV4, range_ipv6=RANGE_IPV6)


class Stage:
    """Everything, and `now`. `allowed` are resource ids; `offline` are gateways that are dead."""

    def __init__(
        self,
        *,
        gateways: int = 1,
        ceiling: tuple[Network, ...] = (),
        lease_ns: int = HOUR,
        renewal_times: RenewalTimes = A_DAY,
        survey: Survey | None = None,
    ) -> None:
        self.now = SECOND
        self.randomness = SeededRandomness(1, "stage")
        self.lease_ns = lease_ns
        self.resources = {WEB.id: WEB}
        self.allowed: set[UUID] = {WEB.id}
        self.offline: set[int] = set()
        self.portal_away = False
        self.requests: list[RequestAuthorization] = []
        self.acks: list[Ack] = []
        self.postures: list[Posture] = []
        self.flows: dict[bool, list[ReportedFlow]] = {True: [], False: []}
        """What the client (True) and the gateways told of flows."""
        self.candidates: list[Candidates] = []
        self.authorizations: dict[UUID, AuthorizationCreated] = {}
        self.to_client: list[bytes] = []
        self.to_servers: dict[int, list[bytes]] = {number: [] for number in range(gateways)}
        self.events: dict[str, list[Any]] = {}
        self._pending: dict[int, tuple[int, Authorize]] = {}
        self._gateway_of_connection: dict[UUID, int] = {}
        self._ref = 0
        self.client = ClientAgent(
            self._identity("client", 0),
            self._engine("client"),
            randomness=self.randomness.child("client"),
            now=self.now,
            renewal_times=renewal_times,
            survey=survey,
        )
        self.gateways = [
            GatewayAgent(
                self._identity("gateway", number + 1),
                self._engine(f"gateway {number}"),
                randomness=self.randomness.child(f"gateway {number}"),
                now=self.now,
                ceiling=ceiling,
            )
            for number in range(gateways)
        ]
        self.agents: dict[Address, TunnelAgent] = {Address("192.0.2.1", 1_111): self.client}
        for number, agent in enumerate(self.gateways):
            self.agents[Address(f"198.51.100.{number + 1}", 2_222)] = agent
        for address, agent in self.agents.items():
            agent.engine.add_socket(address, self.now, network=f"{address.host}/24")
            agent.join(self.challenge(), self.now)
        for number, agent in enumerate(self.gateways):
            self.tell(agent, self.gateway_init(number))
        self.tell(self.client, self.client_init())
        self.settle()

    # --- what a test does -----------------------------------------------------------------------

    def client_sends(self, *packets: bytes) -> None:
        self.client.receive_packets(packets, self.now)
        self.settle()

    def server_answers(self, *packets: bytes, number: int = 0) -> None:
        self.gateways[number].receive_packets(packets, self.now)
        self.settle()

    def tell(self, agent: TunnelAgent, message: Any, ref: int | None = None) -> None:
        """The portal says something to an agent."""
        frame = Frame(event=EVENT_BY_TYPE[type(message)], message=message, ref=ref)
        agent.receive(frame, self.now)

    def revoke(self, authorization_id: UUID) -> None:
        created = self.authorizations.pop(authorization_id)
        number = self._gateway_of_connection[created.connection_id]
        self.tell(self.gateways[number], Revoke(authorization_id=authorization_id))
        revoked = AuthorizationRevoked(
            authorization_id=authorization_id, resource_id=created.resource_id
        )
        self.tell(self.client, revoked)
        self.settle()

    def advance(self, seconds: float) -> None:
        """Let time pass, timer by timer."""
        end = self.now + int(seconds * SECOND)
        self.settle()
        while True:
            due = [agent.poll_timeout() for agent in self.agents.values()]
            due += [agent.engine.poll_timeout() for agent in self.agents.values()]
            at = min((at for at in due if at is not None), default=end)
            if at >= end:
                break
            self.now = max(self.now, at)
            for agent in self.agents.values():
                agent.engine.handle_timeout(self.now)
                agent.handle_timeout(self.now)  # type: ignore[attr-defined]  # both kinds have it
            self.settle()
        self.now = end

    def run_until(self, done: Any, *, seconds: float = 30) -> None:
        for _ in range(int(seconds * 20)):
            if done():
                return
            self.advance(0.05)
        raise AssertionError("it never happened")

    # --- the network and the portal ---------------------------------------------------------------

    def settle(self) -> None:
        moving = True
        while moving:
            moving = False
            for number, (address, agent) in enumerate(list(self.agents.items())):
                agent.pump(self.now)
                silent = number - 1 in self.offline
                for transmit in agent.engine.drain_transmits():
                    target = self.agents.get(transmit.remote)
                    if silent or target is None or self._is_offline(target):
                        continue
                    moving = True
                    target.engine.receive_datagrams(
                        transmit.remote, [(transmit.data, address)], self.now
                    )
                for outgoing in agent.drain_messages():
                    if not silent and not self.portal_away:
                        moving = True
                        self._portal(agent, outgoing.message, outgoing.ref)
                    else:
                        agent.unsent(outgoing, self.now)
                self.events.setdefault(str(number), []).extend(agent.drain_events())
            self.to_client += self.client.drain_packets()
            for number, gateway in enumerate(self.gateways):
                self.to_servers[number] += gateway.drain_packets()

    def challenge(self) -> Challenge:
        return Challenge(nonce=self.randomness.bytes(32), portal="portal.example")

    def client_init(self) -> ClientInit:
        return ClientInit(
            account_id=ACCOUNT,
            client_id=CLIENT,
            interface=interface(CLIENT_IPV4, CLIENT_IPV6),
            resources=tuple(self.resources.values()),
            relays=(),
            authorizations=self._live(),
        )

    def gateway_init(self, number: int) -> GatewayInit:
        return GatewayInit(
            account_id=ACCOUNT,
            gateway_id=gateway_id(number),
            interface=interface(
                IPv4Address("100.64.1.1") + number, IPv6Address("fd48:4c57:5900::101") + number
            ),
            relays=(),
            authorizations=self._live(),
        )

    def _live(self) -> tuple[LiveAuthorization, ...]:
        return tuple(
            LiveAuthorization(
                authorization_id=created.authorization_id,
                connection_id=created.connection_id,
                resource_id=created.resource_id,
                expires_in_ns=self.lease_ns,
            )
            for created in self.authorizations.values()
        )

    def _portal(self, agent: TunnelAgent, message: object, ref: int | None) -> None:
        match message:
            case RequestAuthorization():
                self._request(message)
            case Ack():
                self._ack(message, ref)
            case Posture():
                self.postures.append(message)
            case FlowReport():
                self.flows[agent is self.client] += message.flows
            case Candidates():
                self.candidates.append(message)
                number = self._gateway_of_connection.get(message.connection_id)
                if number is None:
                    return
                self.tell(self.gateways[number] if agent is self.client else self.client, message)

    def _request(self, message: RequestAuthorization) -> None:
        self.requests.append(message)
        if message.resource_id not in self.allowed:
            denied = AuthorizationDenied(
                resource_id=message.resource_id, reason="forbidden", violated=("remote_ip",)
            )
            self.tell(self.client, denied)
            return
        failed = message.failed_gateway_ids
        order = sorted(
            range(len(self.gateways)),
            key=lambda number: (
                gateway_id(number) in failed,
                gateway_id(number) not in message.connected_gateway_ids,
            ),
        )
        number = next((n for n in order if n not in self.offline), None)
        if number is None:
            denied = AuthorizationDenied(resource_id=message.resource_id, reason="offline")
            self.tell(self.client, denied)
            return
        connected = gateway_id(number) in message.connected_gateway_ids
        connection_id = self._uuid()
        for other in self.authorizations.values():
            if connected and self._gateway_of_connection[other.connection_id] == number:
                connection_id = other.connection_id
        self._gateway_of_connection[connection_id] = number
        self._ref += 1
        authorize = Authorize(
            authorization_id=self._uuid(),
            connection_id=connection_id,
            client=Peer(
                id=CLIENT,
                public_key=self.client.engine.public_key,
                ipv4=CLIENT_IPV4,
                ipv6=CLIENT_IPV6,
                name="laptop",
            ),
            resource=self.resources[message.resource_id],
            ice=IceParameters(
                client=IceCredentials(fragment="clientXX", password="c" * 32),
                gateway=IceCredentials(fragment=f"gatewa{self._ref % 90 + 10}", password="g" * 32),
            ),
            kem_public_key=message.kem_public_key,
            expires_in_ns=self.lease_ns,
        )
        self._pending[self._ref] = (number, authorize)
        self.tell(self.gateways[number], authorize, self._ref)

    def _ack(self, ack: Ack, ref: int | None) -> None:
        self.acks.append(ack)
        if ref not in self._pending:
            return  # answers what a test asked, and not this portal
        number, authorize = self._pending.pop(ref)
        if ack.refusal:
            denied = AuthorizationDenied(resource_id=authorize.resource.id, reason="offline")
            self.tell(self.client, denied)
            return
        created = AuthorizationCreated(
            authorization_id=ack.authorization_id,
            connection_id=authorize.connection_id,
            resource_id=authorize.resource.id,
            gateway=Peer(
                id=gateway_id(number),
                public_key=self.gateways[number].engine.public_key,
                ipv4=IPv4Address("100.64.1.1") + number,
                ipv6=IPv6Address("fd48:4c57:5900::101") + number,
                name=f"gateway {number}",
            ),
            ice=authorize.ice,
            kem_ciphertext=ack.kem_ciphertext,
            expires_in_ns=authorize.expires_in_ns,
        )
        for older in [
            older for older in self.authorizations.values() if older.resource_id == WEB.id
        ]:
            if created.resource_id == WEB.id:
                del self.authorizations[older.authorization_id]
        self.authorizations[created.authorization_id] = created
        self.tell(self.client, created)

    def _is_offline(self, agent: TunnelAgent) -> bool:
        return any(self.gateways[number] is agent for number in self.offline)

    def _uuid(self) -> UUID:
        return UUID(bytes=self.randomness.bytes(16), version=4)

    def _engine(self, name: str) -> Engine:
        randomness = self.randomness.child(f"{name}/engine")
        return Engine(private_key=randomness.bytes(32), randomness=randomness, now=self.now)

    def _identity(self, kind: Any, number: int) -> AgentIdentity:
        token = encode_token(
            kind, UUID(int=200 + number), bytes(32), "portal.example:443", bytes(32)
        )
        return AgentIdentity(
            kind=kind,
            name=f"{kind} {number}",
            token=token,
            device_seed=Secret(bytes([number + 1]) * 32),
            incarnation=number,
        )


# --- packets -----------------------------------------------------------------------------------


def ipv4(protocol: int, payload: bytes, source: str, destination: str) -> bytes:
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 7, 0, 64, protocol, 0)
    return header + ip_address(source).packed + ip_address(destination).packed + payload


def tcp(
    flags: int,
    *,
    source: str = str(CLIENT_IPV4),
    destination: str = SERVER,
    ports: tuple[int, int] = (40_000, 80),
    data: bytes = b"",
) -> bytes:
    segment = struct.pack(">HHIIBBHHH", *ports, 1_000, 2_000, 0x50, flags, 0, 0, 0) + data
    return ipv4(6, segment, source, destination)


def udp(
    data: bytes = b"question",
    *,
    source: str = str(CLIENT_IPV4),
    destination: str = SERVER,
    ports: tuple[int, int] = (40_000, 53),
) -> bytes:
    return ipv4(17, struct.pack(">HHHH", *ports, 8 + len(data), 0) + data, source, destination)


def echo(kind: int, *, source: str = str(CLIENT_IPV4), destination: str = SERVER) -> bytes:
    return ipv4(1, struct.pack(">BBHHH", kind, 0, 0, 7, 1), source, destination)


def answer(data: bytes = b"answer", ports: tuple[int, int] = (53, 40_000)) -> bytes:
    return udp(data, source=SERVER, destination=str(CLIENT_IPV4), ports=ports)


SYN, ACK, SYN_ACK, FIN_ACK, RST = 2, 16, 18, 17, 4
