"""Hosts that do not keep to the rules: what clients, gateways and relays try that lie.

Each is the real thing but for one habit, so it gets as far as the real thing would. They act every
`EVERY_NS` for as long as the process lives. What must hold beside them is said in `checks.safety`;
of a hostile host itself nothing is expected.

    client     spoofs              sends packets under inner addresses that are not its own
               trespasses          keeps what was taken from it, and tries every resource by it
               floods              sends junk of every shape to gateways, relays and the portal
               replays             sends datagrams of its past again, its own and those it was sent
               stale_token         comes again and again with a token that is none
               forged_candidates   names connections and addresses that are not its own
               scans               looks for gateways that it was never told of
    gateway    silent              never answers an authorisation
               acknowledges_and_drops    accepts everything, and forwards nothing
               spoofs              sends to its clients under addresses that it does not serve
               replays             as a client
    relay      drops, corrupts, duplicates, redirects, replays    what it is to relay
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol
from uuid import UUID

from channel.credentials import decode_token, encode_token
from channel.messages import (
    Ack,
    Candidate,
    Candidates,
    Disconnect,
    IpText,
    RequestAuthorization,
)
from clients.agent import ClientAgent
from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from runtime.secret import Secret
from simulations.hosts.agent import ENGINE_PORT, AgentHost, ClientHost, GatewayHost
from simulations.hosts.inner import APP_PORT, ECHO_PORT, udp_packet
from simulations.hosts.relay import RELAY_PORT, RelayHost
from tunnel.agent import Outgoing
from tunnel.engine import Engine
from tunnel.flows import Ending

EVERY_NS: Final = 200 * NS_PER_MS
FLOOD: Final = 20
"""Datagrams to each target at a time."""
REMEMBERED: Final = 256
REPLAYED: Final = 8
FIRST_TUNNEL_ADDRESS: Final = bytes((100, 64, 0, 0))
VICTIMS: Final = ("127.0.0.1", "169.254.169.254", "10.0.0.1", "224.0.0.1", "192.0.2.1")
KEM_KEY_BYTES: Final = 1_184

Targets = Callable[[], Sequence[Address]]
"""Where gateways and relays can be found on the internet."""


class Hand(Protocol):
    """What a client that misbehaves acts with; on the heap it is the host itself."""

    engine: Engine
    draws: SeededRandomness
    record: Recorder
    resources: Sequence[bytes]
    targets: Targets

    @property
    def now(self) -> int: ...
    @property
    def channel(self) -> Any: ...
    def addresses(self) -> tuple[bytes, bytes] | None: ...
    def hurl(self, target: Address, data: bytes) -> None: ...


class Recorder:
    """The last datagrams that a host sent or was sent, with whom it had them."""

    def __init__(self) -> None:
        self._kept: deque[tuple[Address, bytes]] = deque(maxlen=REMEMBERED)

    def note(self, peer: Address, data: bytes) -> None:
        self._kept.append((peer, data))

    def some(self, draws: SeededRandomness) -> list[tuple[Address, bytes]]:
        """Some of them, at random."""
        if not self._kept:
            return []
        return [self._kept[draws.integer(len(self._kept))] for _ in range(REPLAYED)]


class _Recorded(AgentHost):
    """An agent's host that keeps what it sends and is sent."""

    record: Recorder

    def transmit(self, local: Address, remote: Address, data: bytes) -> None:
        self.record.note(remote, data)
        super().transmit(local, remote, data)

    def _datagram(self, data: bytes, source: Address, local: Address) -> None:
        self.record.note(source, data)
        super()._datagram(data, source, local)


# --- clients --------------------------------------------------------------------------------------


class HostileClient(_Recorded, ClientHost):
    """A client with one of the habits. `targets`: where gateways and relays are; `resources`: the
    packed addresses of resources."""

    def __init__(
        self,
        *args: Any,
        habit: str,
        targets: Targets,
        resources: Sequence[bytes],
        token: Secret,
        **keywords: Any,
    ) -> None:
        self.targets = targets
        self.resources = resources
        self.record = Recorder()
        self._act = CLIENT_HABITS.get(habit)
        if habit == "trespasses":
            self.agent_type = Keeper
        if habit == "stale_token":
            token = forged(token)
        super().__init__(*args, token=token, **keywords)
        self.draws = self._drawn.child("mischief")
        self.world.after(EVERY_NS, self._again)

    def _again(self) -> None:
        if self.is_over:
            return
        if self._act is not None and self.host.runs:
            self._act(self)
            self.touched()
        self.world.after(EVERY_NS, self._again)

    def channel_refused(self, outcome: Disconnect) -> None:
        """Honest ones end; this one comes again."""
        self.refused = outcome.reason
        self.channel.insist(self.now + NS_PER_S)

    def hurl(self, target: Address, data: bytes) -> None:
        """A datagram of no engine's."""
        self.host.send(ENGINE_PORT, target, data)


def _spoof(client: Hand) -> None:
    """Inner packets under the addresses of other clients, of gateways and of resources."""
    for connection_id in client.engine.connection_ids:
        packets = []
        for destination in client.resources:
            if len(destination) != 4:
                continue
            number = client.draws.integer(64)
            foreign = FIRST_TUNNEL_ADDRESS[:3] + bytes((number,))
            for source in (foreign, destination, bytes((127, 0, 0, 1))):
                if source != (client.addresses() or (b"",))[0]:
                    data = b"spoofed by a client"
                    packets.append(udp_packet(source, destination, (APP_PORT, ECHO_PORT), data))
        client.engine.send_packets(connection_id, packets, client.now)


def _trespass(client: Hand) -> None:
    """Packets of its own to every resource, through whatever tunnel it ever had."""
    own = client.addresses() or ()
    for connection_id in client.engine.connection_ids:
        packets = [
            udp_packet(source, destination, (APP_PORT, ECHO_PORT), client.draws.bytes(16))
            for destination in client.resources
            for source in own
            if len(source) == len(destination)
        ]
        client.engine.send_packets(connection_id, packets, client.now)


class Keeper(ClientAgent):
    """Heeds no revocation, and no end of a lease."""

    def _end(self, authorization_id: UUID, now: int, ending: Ending = "") -> None:
        pass

    def _remove(self, resource_id: UUID, now: int) -> None:
        pass


def _flood(client: Hand) -> None:
    """Junk of the shapes that agents and relays look at, and questions to the portal."""
    for target in client.targets():
        for _ in range(FLOOD):
            client.hurl(target, _junk(client.draws))
    for _ in range(FLOOD):
        request = RequestAuthorization(
            resource_id=UUID(bytes=client.draws.bytes(16), version=4),
            kem_public_key=client.draws.bytes(KEM_KEY_BYTES),
        )
        client.channel.send(request)


def _replay(client: Hand) -> None:
    """To those it had them with, and to all others."""
    for peer, data in client.record.some(client.draws):
        client.hurl(peer, data)
        for target in client.targets():
            client.hurl(target, data)


def _forge_candidates(client: Hand) -> None:
    """Candidates of its own connections at addresses of others, and of connections of others."""
    unknown = UUID(bytes=client.draws.bytes(16), version=4)
    add = tuple(
        Candidate(
            kind="host" if number % 2 else "srflx",
            address=IpText(victim),
            port=(22, 53, 443, ENGINE_PORT)[number % 4],
            priority=2**31 - 1 - number,
            foundation=f"forged{number}",
        )
        for number, victim in enumerate(VICTIMS)
    )
    for connection_id in (*client.engine.connection_ids, unknown):
        generation = client.draws.integer(1_000)
        client.channel.send(Candidates(connection_id=connection_id, generation=generation, add=add))


def _scan(client: Hand) -> None:
    """STUN, handshakes and nothing in particular, to ports of gateways."""
    for target in client.targets():
        for port in (target.port, 1_024 + client.draws.integer(64_512)):
            for shape in range(_SHAPES):
                client.hurl(Address(target.host, port), _junk(client.draws, shape))


CLIENT_HABITS: Final[dict[str, Callable[[Hand], None]]] = {
    "spoofs": _spoof,
    "trespasses": _trespass,
    "floods": _flood,
    "replays": _replay,
    "forged_candidates": _forge_candidates,
    "scans": _scan,
}
_SHAPES: Final = 5


def _junk(draws: SeededRandomness, shape: int | None = None) -> bytes:
    """Random bytes with a beginning that somebody will look at."""
    shape = draws.integer(_SHAPES) if shape is None else shape
    match shape:
        case 0:  # a Binding request (RFC 8489) with neither user name nor integrity
            return b"\x00\x01\x00\x00\x21\x12\xa4\x42" + draws.bytes(12)
        case 1:  # a handshake initiation of WireGuard
            return b"\x01\0\0\0" + draws.bytes(144)
        case 2:  # a transport message
            return b"\x04\0\0\0" + draws.bytes(60)
        case 3:  # ChannelData (RFC 8656)
            return b"\x40\x00\x00\x20" + draws.bytes(32)
        case _:
            return draws.bytes(1 + draws.integer(200))


def forged(token: Secret) -> Secret:
    """A token of the same id whose secret is another."""
    real = decode_token(token)
    return encode_token(real.kind, real.id, bytes(32), real.portal, real.pin)


# --- gateways -------------------------------------------------------------------------------------


class HostileGateway(_Recorded, GatewayHost):
    """A gateway with one of the habits. `resources` are packed addresses."""

    def __init__(self, *args: Any, habit: str, resources: Sequence[bytes], **keywords: Any) -> None:
        self.habit = habit
        self.resources = resources
        self.record = Recorder()
        super().__init__(*args, **keywords)
        self.draws = self._drawn.child("mischief")
        self.world.after(EVERY_NS, self._again)

    def _again(self) -> None:
        if self.is_over:
            return
        if self.host.runs:
            if self.habit == "spoofs":
                spoof_clients(self.engine, self.resources, self.now)
            elif self.habit == "replays":
                for peer, data in self.record.some(self.draws):
                    self.host.send(ENGINE_PORT, peer, data)
            self.touched()
        self.world.after(EVERY_NS, self._again)

    def _say(self, outgoing: Outgoing) -> None:
        if self.habit == "silent" and isinstance(outgoing.message, Ack):
            return
        super()._say(outgoing)

    def _take_packets(self, packets: list[bytes]) -> None:
        if self.habit != "acknowledges_and_drops":
            super()._take_packets(packets)


def spoof_clients(engine: Engine, resources: Sequence[bytes], now: int) -> None:
    """To each client, under addresses that it asked nothing of this gateway."""
    for connection_id in engine.connection_ids:
        packets = []
        for source in resources:
            if len(source) != 4:
                continue
            for number in range(1, 8):
                client = FIRST_TUNNEL_ADDRESS[:3] + bytes((number,))
                for ports in ((ECHO_PORT, APP_PORT), (22, 22)):
                    packets.append(udp_packet(source, client, ports, b"spoofed by a gateway"))
        engine.send_packets(connection_id, packets, now)


# --- relays ---------------------------------------------------------------------------------------


class HostileRelay(RelayHost):
    """A relay with one of the habits. It serves its clients' requests; what it is to relay, either
    way, does not come out as it went in."""

    def __init__(self, *args: Any, habit: str, **keywords: Any) -> None:
        self.habit = habit
        self.record = Recorder()
        super().__init__(*args, **keywords)
        self.draws = self.world.randomness(f"{self.name} mischief")

    def transmit(self, local: tuple[str, int], destination: Address, data: bytes) -> None:
        if local[1] == RELAY_PORT and not carries(data):
            super().transmit(local, destination, data)
            return
        self.record.note(destination, data)
        match self.habit:
            case "drops":
                return
            case "corrupts":
                at = self.draws.integer(len(data)) if data else 0
                data = data[:at] + bytes((data[at] ^ 0x55,)) + data[at + 1 :] if data else data
            case "duplicates":
                super().transmit(local, destination, data)
            case "redirects":
                destination = self.record.some(self.draws)[0][0]
            case "replays":
                peer, old = self.record.some(self.draws)[0]
                super().transmit(local, peer, old)
        super().transmit(local, destination, data)


def carries(data: bytes) -> bool:
    """Whether it is ChannelData or a Data indication: what a peer said (RFC 8656)."""
    return bool(data) and (0x40 <= data[0] <= 0x7F or data[:2] == b"\x00\x17")
