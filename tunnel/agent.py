"""What the agents of a client and of a gateway share: joining, relays, candidates, the engine.

An agent is a core. Its shell hands in frames of the portal (`receive`), packets of the TUN
(`receive_packets`) and, whenever the engine was touched, asks it to look at the engine (`pump`);
it takes messages for the portal, packets for the TUN and events for itself from the three
`drain_*` methods, and honours `poll_timeout`. The engine belongs to the agent, but its datagrams
and timers are the shell's to move.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal
from uuid import UUID

import attrs

from channel.credentials import decode_token, device_key_of, join_statement, sign_join
from channel.frames import Frame, RemoteProtocolError
from channel.messages import (
    Candidates,
    Challenge,
    ClientInit,
    ConfigChanged,
    GatewayInit,
    Held,
    Interface,
    Join,
    Relays,
    RelayServer,
)
from channel.reserved import RESERVED
from runtime.clock import earliest
from runtime.net.address import Address
from runtime.randomness import Randomness
from runtime.secret import Secret
from tunnel.deadlines import Deadlines
from tunnel.engine import Connected, Engine, Failed, LocalCandidates, PathChanged, PathLost
from tunnel.flow_reports import FlowReports, FlowSweep
from tunnel.flows import FlowTable
from tunnel.packet import Header, runs

SECOND_NS = 10**9
SHORTEST_RANGE_IPV4 = 8
SHORTEST_RANGE_IPV6 = 32
MAX_WAITING_MESSAGES = 10_000
# A portal that has just started learns of its relays within seconds.
UNNAMED_RELAY_NS = 30 * SECOND_NS

EngineEvent = LocalCandidates | Connected | PathChanged | PathLost | Failed


@attrs.frozen(kw_only=True)
class AgentIdentity:
    """Who joins. `device_seed` is the private half of the device key (Ed25519, 32 bytes).

    `incarnation` is the first of this process; each join takes the next, so a later start should
    begin higher (Unix time in ns serves). Raises InvalidToken, or ValueError for another seed.
    """

    kind: Literal["client", "gateway"]
    name: str
    software: str = "holloway"
    token: Secret = attrs.field(repr=False)
    device_seed: Secret = attrs.field(repr=False)
    incarnation: int
    token_id: UUID = attrs.field(init=False)
    device_key: bytes = attrs.field(init=False)

    @token_id.default
    def _token_id(self) -> UUID:
        return decode_token(self.token).id

    @device_key.default
    def _device_key(self) -> bytes:
        return device_key_of(self.device_seed.reveal())


@attrs.frozen(kw_only=True)
class Outgoing:
    """A message for the portal; `ref` where it answers a question."""

    message: object
    ref: int | None = None


@attrs.frozen(kw_only=True)
class InterfaceChanged:
    """The TUN device is to carry these addresses and this MTU from now on."""

    interface: Interface


class TunnelAgent(ABC):
    """The common half of `ClientAgent` and `GatewayAgent`."""

    def __init__(
        self,
        identity: AgentIdentity,
        engine: Engine,
        *,
        randomness: Randomness,
        now: int,
        flow_interval_ns: int,
    ) -> None:
        self.engine = engine
        self.account_id: UUID | None = None
        self.own_id: UUID | None = None
        self.interface: Interface | None = None
        self.joined = False
        self.reports = FlowReports(interval_ns=flow_interval_ns)
        self._sweep = FlowSweep(self._flow_tables, now)
        self._identity = identity
        self._randomness = randomness
        self._started_ns = now
        self._incarnation = identity.incarnation
        self._relay_by_id: dict[UUID, RelayServer] = {}
        self._unnamed_relays: Deadlines[UUID] = Deadlines()
        self._messages: list[Outgoing] = []
        self._packets: list[bytes] = []
        self._events: list[Any] = []
        self._untold: dict[UUID, None] = {}

    # --- ChannelAgent ----------------------------------------------------------------------------

    def join(self, challenge: Challenge, now: int) -> Join:
        """The first frame of a connection: proof of the device, and what is held."""
        statement = join_statement(
            challenge.nonce, challenge.portal, self._identity.token_id, self.engine.public_key
        )
        join = Join(
            kind=self._identity.kind,
            software=self._identity.software,
            token=self._identity.token.reveal_text(),
            device_key=self._identity.device_key,
            signature=sign_join(self._identity.device_seed.reveal(), statement),
            tunnel_key=self.engine.public_key,
            name=self._identity.name,
            incarnation=self._incarnation,
            held=self.held(),
        )
        self._incarnation += 1
        return join

    def receive(self, frame: Frame, now: int) -> None:
        """One frame of the portal. Raises RemoteProtocolError for an interface that no account
        can have: its routes would take away the machine's own network."""
        if isinstance(frame.message, ClientInit | GatewayInit | ConfigChanged):
            problem = unfit(frame.message.interface)
            if problem:
                raise RemoteProtocolError("unexpected_message", problem)
        self._received(frame.message, frame.ref, now)

    def channel_lost(self, now: int) -> None:
        """The portal is away: what is held stays to the end of its lease."""
        self.joined = False
        for outgoing in self._messages:
            self.unsent(outgoing, now)
        self._messages.clear()

    def unsent(self, outgoing: Outgoing, now: int) -> None:
        """The channel did not take a message. Reports of flows are kept, and candidates are told
        after the next join."""
        self._note_untold(outgoing.message)
        self.reports.put_back(outgoing.message, now)

    def finish(self, now: int) -> None:
        """The last thing that is asked of an agent: its flows end, and it tells of them."""
        for table in self._flow_tables():
            table.remove(lambda flow: True, "stopped", now)
        if self.joined:
            for report in self.reports.take_last(now):
                self._send(report)

    # --- what a shell takes out ------------------------------------------------------------------

    def drain_messages(self) -> list[Outgoing]:
        """Messages for the portal, in order; none while the channel is not joined."""
        drained, self._messages = self._messages, []
        return drained

    def drain_packets(self) -> list[bytes]:
        """IP packets for the TUN device."""
        drained, self._packets = self._packets, []
        return drained

    def drain_events(self) -> list[Any]:
        """What the shell has to do to the system, in order."""
        drained, self._events = self._events, []
        return drained

    def pump(self, now: int) -> bool:
        """Take what the engine has, if anything. Call it after whatever touched the engine."""
        events = self.engine.drain_events()
        for event in events:
            if isinstance(event, LocalCandidates):
                self._trickle(event.message)
            else:
                self._path_event(event, now)
        packets = self.engine.drain_packets()
        for connection_id, group in groupby(packets, key=itemgetter(0)) if packets else ():
            for header, run in runs(packet for _, packet in group):
                self._tunnelled(connection_id, header, run, now)
        return bool(events or packets)

    # --- what the two kinds of agent fill in -----------------------------------------------------

    @abstractmethod
    def held(self) -> tuple[Held, ...]:
        """The authorisations that this agent holds."""

    @abstractmethod
    def _received(self, message: object, ref: int | None, now: int) -> None: ...

    @abstractmethod
    def _path_event(self, event: Connected | PathChanged | PathLost | Failed, now: int) -> None: ...

    @abstractmethod
    def _tunnelled(
        self, connection_id: UUID, header: Header | None, run: Sequence[bytes], now: int
    ) -> None:
        """A run of packets (`tunnel.packet.runs`) that came out of a tunnel."""

    @abstractmethod
    def _flow_tables(self) -> Iterable[FlowTable]:
        """All tables of flows; their parts go to `reports`."""

    # --- flows -----------------------------------------------------------------------------------

    def _flows_timeout(self) -> int | None:
        """When `_tell_flows` is due."""
        report_at = self.reports.poll_timeout() if self.joined else None
        return earliest(report_at, self._sweep.poll_timeout())

    def _tell_flows(self, now: int) -> None:
        """Look at flows, and report those that ended or go on for long."""
        self._sweep.handle_timeout(now)
        if self.joined and len(self._messages) < MAX_WAITING_MESSAGES:
            report = self.reports.take(now)
            if report is not None:
                self._send(report)

    def _flow_metrics(self) -> dict[str, int]:
        counts = attrs.asdict(self.reports.counts)
        return {f"flow_parts_{name}": value for name, value in counts.items()}

    # --- helpers of both -------------------------------------------------------------------------

    def _send(self, message: object, ref: int | None = None) -> bool:
        if not self.joined or len(self._messages) >= MAX_WAITING_MESSAGES:
            return False
        self._messages.append(Outgoing(message=message, ref=ref))
        return True

    def _begin(
        self,
        *,
        account_id: UUID,
        own_id: UUID,
        interface: Interface,
        relays: tuple[RelayServer, ...],
        now: int,
    ) -> None:
        """The part of `init` that both kinds have."""
        self.joined = True
        self.account_id = account_id
        self.own_id = own_id
        if interface != self.interface:
            self.interface = interface
            self._events.append(InterfaceChanged(interface=interface))
        self._name_relays(relays, now)
        untold, self._untold = self._untold, {}
        self.engine.tell_again(untold, now)

    def _name_relays(self, relays: tuple[RelayServer, ...], now: int) -> None:
        """These are named by a portal that may know of no others yet: those of before are used on
        for a while, since they may carry what would stand still else."""
        named = {relay.id: relay for relay in relays}
        for relay_id in self._relay_by_id:
            if relay_id in named:
                self._unnamed_relays.cancel(relay_id)
            elif self._unnamed_relays.get(relay_id) is None:
                self._unnamed_relays.set(relay_id, now + UNNAMED_RELAY_NS)
        self._relay_by_id = named | {
            relay_id: relay
            for relay_id, relay in self._relay_by_id.items()
            if relay_id not in named
        }
        self.engine.set_relays(list(self._relay_by_id.values()), now)

    def _drop_unnamed_relays(self, now: int) -> None:
        dropped = self._unnamed_relays.take_due(now)
        for relay_id in dropped:
            self._relay_by_id.pop(relay_id, None)
        if dropped:
            self.engine.set_relays(list(self._relay_by_id.values()), now)

    def _change_relays(self, message: Relays, now: int) -> None:
        for relay_id in message.removed:
            self._relay_by_id.pop(relay_id, None)
            self._unnamed_relays.cancel(relay_id)
        for relay in message.added:
            self._relay_by_id[relay.id] = relay
            self._unnamed_relays.cancel(relay.id)
        self.engine.set_relays(list(self._relay_by_id.values()), now)

    def _trickle(self, message: Candidates) -> None:
        if not self._send(message):
            self._note_untold(message)

    def _note_untold(self, message: object) -> None:
        """Candidates that do not reach the portal are told after the next join."""
        if isinstance(message, Candidates):
            self._untold[message.connection_id] = None

    def told_relays(self) -> list[dict[str, object]]:
        """The relays that the portal named, as a status shows them: without their credentials.
        `by` is the transport by which an allocation there stands, or None."""
        return [
            {
                "id": str(relay.id),
                "by": self.engine.relay_reached_by(relay.id),
                "addresses": [
                    str(Address(each.address, each.port))
                    for each in relay.addresses
                    if each.transport == "udp"
                ],
            }
            for relay in self._relay_by_id.values()
        ]

    def _path_status(self, connection_id: UUID) -> dict[str, object] | None:
        """The path of a connection as a status shows it; None while there is none."""
        path = self.engine.path(connection_id)
        if path is None:
            return None
        return {
            "kind": path.kind,
            "local": str(path.local),
            "remote": str(path.remote),
            "relay": None if path.relay is None else str(path.relay),
            "by": None if path.relay is None else self._carried_by(path.relay),
            "rtt_ns": path.rtt_ns,
        }

    def _carried_by(self, place: Address) -> str:
        """The transport by which what we send to a relay goes there. Where the peer alone uses one,
        that is UDP."""
        for relay in self._relay_by_id.values():
            by = self.engine.relay_reached_by(relay.id)
            doors = (e for e in relay.addresses if Address(str(e.address), e.port) == place)
            if by is not None and any(each.transport == by for each in doors):
                return by
        return "udp"

    def _close(self, connection_id: UUID, now: int) -> None:
        self._untold.pop(connection_id, None)
        self.engine.close(connection_id, now)


def own_addresses(ipv4: IPv4Address, ipv6: IPv6Address) -> frozenset[bytes]:
    """The two tunnel addresses of one agent, packed."""
    return frozenset((ipv4.packed, ipv6.packed))


def unfit(interface: Interface) -> str:
    """What is wrong with a TUN device's addresses and ranges; empty if nothing is.

    The ranges hold at most 2**24 IPv4 addresses and a /32 of IPv6, nothing that no resource
    reaches, and the device's own addresses.
    """
    for own, network, shortest in (
        (interface.ipv4, interface.range_ipv4, SHORTEST_RANGE_IPV4),
        (interface.ipv6, interface.range_ipv6, SHORTEST_RANGE_IPV6),
    ):
        if network.prefixlen < shortest:
            return f"a tunnel range of more than a /{shortest}"
        if any(network.version == one.version and network.overlaps(one) for _, one in RESERVED):
            return "a tunnel range with reserved addresses"
        if own not in network:
            return "an own address outside of the tunnel range"
    return ""
