"""The tunnel engine: all connections of a client or a gateway, as one core.

It joins four cores and adds little of its own: the `Gatherer` (sockets, relays, candidates), one
`Connection` per peer (an `IceAgent` each) and the WireGuard `Device` that all of them share.

    datagram --> demultiplexed by its first bytes --+--> Gatherer   (from a relay: unwrapped, again)
                                                    +--> IceAgent   (user name or transaction id)
                                                    +--> Device     --> inner packets
    inner packet --> Connection --> Device --> Connection's best pair --> datagram

The engine reads no clock, opens no socket and draws no random number of its own. After any call,
drain transmits, packets and events, and ask `poll_timeout` again. Whatever a datagram contains,
nothing raises; what is refused is counted.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Hashable, Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Final
from uuid import UUID

import attrs

from channel.messages import Candidates, RelayServer
from relays.stun import MessageClass, Method, StunError, StunMessage, is_stun
from relays.turn import is_channel_data
from runtime.clock import NS_PER_MS, NS_PER_S, earliest
from runtime.net.address import Address
from runtime.randomness import Randomness
from tunnel.connection import (
    Connected,
    Connection,
    ConnectionParameters,
    ConnectionStatistics,
    Event,
    Failed,
    LocalCandidates,
    PathChanged,
    PathLost,
)
from tunnel.datagrams import Transmit, is_transport, is_wireguard, runs
from tunnel.ice.agent import TRANSACTION_PREFIX_BYTES, IceAgent, IceStatistics, Path
from tunnel.ice.candidates import Base, IpNetwork, network_of
from tunnel.ice.checks import local_fragment_of
from tunnel.ice.gathering import Gatherer
from tunnel.ice.links import CloseLink, LinkCommand, OpenLink
from tunnel.wireguard.device import (
    Device,
    DeviceStatistics,
    HandshakeFailed,
    PeerStatistics,
    SessionEstablished,
)
from tunnel.wireguard.noise import MESSAGE_TRANSPORT

__all__ = [
    "CloseLink",
    "Connected",
    "ConnectionParameters",
    "Engine",
    "EngineStatistics",
    "Event",
    "Failed",
    "LinkCommand",
    "LocalCandidates",
    "OpenLink",
    "Path",
    "PathChanged",
    "PathLost",
    "Transmit",
]

MAX_CONNECTIONS: Final = 50_000
REST_AFTER_NS: Final = 60 * NS_PER_S
# A control channel that died carried nothing to its end for up to 15 s before that was seen.
TOLD_ANEW_NS: Final = 60 * NS_PER_S
OWN_RELAY_AFTER_NS: Final = 300 * NS_PER_MS
"""A client asks relays for addresses of its own unless by then a direct path works, and beside it a
relayed one, by the gateway's."""


@attrs.frozen(kw_only=True)
class ConnectionReport:
    """The statistics of one connection, of each of its parts."""

    connection: ConnectionStatistics
    ice: IceStatistics
    wireguard: PeerStatistics | None


@attrs.frozen(kw_only=True)
class EngineStatistics:
    """Counts since the start, and present sizes; `refused` are datagrams that nobody took."""

    connections: int
    refused: int
    unknown_connection: int
    gathering: dict[str, int]
    device: DeviceStatistics


@attrs.define(kw_only=True)
class _Counts:
    refused: int = 0
    unknown_connection: int = 0


class Engine:
    """See the head of this file. `now` is nanoseconds of one monotonic clock (CLOCK_BOOTTIME).

    `private_key` is the WireGuard key (32 bytes), made anew at each start.
    """

    def __init__(self, *, private_key: bytes, randomness: Randomness, now: int) -> None:
        self._randomness = randomness
        self._device = Device(private_key, randomness=randomness, now=now)
        self._gatherer = Gatherer(randomness=randomness)
        self._seen_version = -1
        self._connections: dict[UUID, Connection] = {}
        self._by_fragment: dict[str, Connection] = {}
        self._by_prefix: dict[bytes, Connection] = {}
        self._by_public_key: dict[bytes, Connection] = {}
        self._dirty: dict[Connection, None] = {}
        self._stale_deadlines: dict[Connection, None] = {}
        self._deadlines: list[tuple[int, int, Connection]] = []
        self._deadline_number = 0
        self._rest_at: int | None = None
        self._look_at: int | None = None  # whether connections need relays of our own
        self._base_by_source: dict[Address, Base] = {}
        self._transmits: list[Transmit] = []
        self._packets: list[tuple[UUID, bytes]] = []
        self._events: list[Event] = []
        self._counts = _Counts()

    @property
    def public_key(self) -> bytes:
        """The WireGuard public key, 32 bytes."""
        return self._device.public_key

    # --- sockets and relays --------------------------------------------------------------------

    def add_socket(
        self, local: Address, now: int, *, network: IpNetwork | str | None = None
    ) -> None:
        """A UDP socket bound to `local`, one per local IP address.

        `network` is the subnet of the interface (`192.168.1.7/24`): private addresses of a peer
        are tried only from a socket whose subnet they are in, and never if it is not given.
        """
        self._gatherer.add_socket(local, network_of(network), now)
        self._settle(now)

    def remove_socket(self, local: Address, now: int) -> None:
        """The socket is closed; pairs and allocations over it end at once."""
        self._gatherer.remove_socket(local, now)
        self._settle(now)

    def set_relays(self, servers: Sequence[RelayServer], now: int) -> None:
        """All the relays to use from now on. Others are left within `LEAVE_NS`."""
        self._gatherer.set_relays(servers, now)
        self._settle(now)

    def end(self, now: int) -> None:
        """Nothing follows: give the allocations back."""
        self._gatherer.rest(now)
        self._transmits += self._gatherer.drain_transmits()

    def link_opened(self, link: int, now: int) -> None:
        """A connection to a relay that `drain_link_commands` asked for stands."""
        self._gatherer.link_opened(link, now)
        self._settle(now)

    def link_closed(self, link: int, now: int) -> None:
        """A connection to a relay ended, or could not be opened."""
        self._gatherer.link_closed(link, now)
        self._settle(now)

    def receive_from_link(self, link: int, messages: Sequence[bytes], now: int) -> None:
        """STUN messages and ChannelData that came by a connection to a relay, in order."""
        self._gatherer.receive_from_link(link, messages, now)
        self._take_relayed(now)
        self._settle(now)

    # --- connections ---------------------------------------------------------------------------

    def open(self, parameters: ConnectionParameters, now: int) -> None:
        """Begin a connection; one of the same id is left as it is.

        An older connection to the same public key is closed and reported as `Failed` with reason
        "replaced". Raises ValueError for unfit keys or more than `MAX_CONNECTIONS`.
        """
        if parameters.connection_id in self._connections:
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            raise ValueError(f"at most {MAX_CONNECTIONS} connections")
        self._device.add_peer(
            parameters.connection_id,
            public_key=parameters.peer_public_key,
            preshared_key=parameters.preshared_key,
            keepalive_ns=None,
            now=now,
        )
        older = self._by_public_key.get(parameters.peer_public_key)
        if older is not None:
            self._remove(older, now)
            self._events.append(Failed(connection_id=older.id, reason="replaced"))
        prefix = self._fresh_prefix()
        agent = IceAgent(
            local=parameters.local_ice,
            remote=parameters.remote_ice,
            controlling=parameters.controlling,
            randomness=self._randomness,
            transaction_prefix=prefix,
            now=now,
        )
        connection = Connection(parameters, device=self._device, agent=agent)
        self._connections[connection.id] = connection
        self._by_fragment[parameters.local_ice.fragment] = connection
        self._by_prefix[prefix] = connection
        self._by_public_key[parameters.peer_public_key] = connection
        self._rest_at = None
        self._gatherer.start(now)
        self._look_later(now)
        agent.set_bases(self._gatherer.bases(), now, leaving=self._gatherer.leaving())
        connection.announce(self._gatherer.candidates(), self._gatherer.generation, now)
        self._touch(connection)
        self._settle(now)

    def close(self, connection_id: UUID, now: int) -> None:
        """End a connection at once and without a word; nothing happens if there is none."""
        connection = self._connections.get(connection_id)
        if connection is None:
            return
        self._device.remove_peer(connection_id)
        self._remove(connection, now)
        if not self._connections:
            self._rest_at = now + REST_AFTER_NS
        self._settle(now)

    def add_candidates(self, message: Candidates, now: int) -> None:
        """Candidates that the peer of a connection sent; dropped if there is no such connection."""
        connection = self._connections.get(message.connection_id)
        if connection is None:
            self._counts.unknown_connection += 1
            return
        connection.agent.add_candidates(message, now)
        self._look_later(now)
        if message.wants_answer:
            candidates = self._gatherer.candidates()
            connection.announce(candidates, self._gatherer.generation, now, anew=True)
        self._touch(connection)
        self._settle(now)

    def tell_again(self, untold: Container[UUID], now: int) -> None:
        """The way to the peers stands anew: tell those of `untold`, those who were told something
        in the last `TOLD_ANEW_NS`, and those to whom there is no direct path, all candidates."""
        candidates = self._gatherer.candidates()
        for connection in self._connections.values():
            is_certain = connection.id not in untold and not connection.announced_within(
                TOLD_ANEW_NS, now
            )
            if connection.is_direct and is_certain:
                continue
            connection.announce(
                candidates,
                self._gatherer.generation,
                now,
                anew=True,
                wants_answer=not connection.is_direct,
            )
            self._touch(connection)
        self._settle(now)

    @property
    def connection_ids(self) -> list[UUID]:
        return list(self._connections)

    def path(self, connection_id: UUID) -> Path | None:
        """The way that packets of a connection take at present; None: there is none."""
        connection = self._connections.get(connection_id)
        return None if connection is None else connection.agent.path()

    def relay_reached_by(self, relay_id: UUID) -> str | None:
        """`udp`, `quic`, `tls` or `tcp`: by what this relay holds an address for us, or would if
        one were wanted; or None."""
        return self._gatherer.reached_by(relay_id)

    # --- traffic -------------------------------------------------------------------------------

    def receive_datagrams(
        self, local: Address, datagrams: Iterable[tuple[bytes, Address]], now: int
    ) -> None:
        """Datagrams with their sources, as the socket bound to `local` received them."""
        base = self._gatherer.host_base(local)
        if base is None:
            return
        for source, run in runs(datagrams):
            if is_transport(run[0]):
                self._receive_transports(base, run, source, now)
                continue
            for data in run:
                self._receive(base, data, source, now)
        self._settle(now)

    def send_packet(self, connection_id: UUID, packet: bytes, now: int) -> None:
        """Send an inner packet; it waits (64 packets, 64 KiB) while there is no session or path."""
        self.send_packets(connection_id, (packet,), now)

    def send_packets(self, connection_id: UUID, packets: Sequence[bytes], now: int) -> None:
        """Send inner packets by one connection, in order, as `send_packet` does with each."""
        connection = self._connections.get(connection_id)
        if connection is None:
            self._counts.unknown_connection += len(packets)
            return
        connection.send_packets(packets, now)
        self._touch(connection)
        self._settle(now)

    def path_suspect(self, now: int) -> None:
        """The network changed: probe everything now."""
        if self._connections:
            self._gatherer.allocate(now)
        self._gatherer.suspect(now)
        for connection in self._connections.values():
            connection.agent.suspect(now)
            self._touch(connection)
        self._settle(now)

    # --- time and output -----------------------------------------------------------------------

    def poll_timeout(self) -> int | None:
        """When `handle_timeout` is due, on the scale of `now`; None: nothing is waited for."""
        for connection in self._stale_deadlines:
            at = connection.poll_timeout()
            if at != connection.deadline:
                connection.deadline = at
                if at is not None:
                    self._deadline_number += 1
                    heapq.heappush(self._deadlines, (at, self._deadline_number, connection))
        self._stale_deadlines = {}
        while self._deadlines and not self._is_current(self._deadlines[0]):
            heapq.heappop(self._deadlines)
        connections_at = self._deadlines[0][0] if self._deadlines else None
        return earliest(
            connections_at,
            self._gatherer.poll_timeout(),
            self._device.poll_timeout(),
            self._rest_at,
            self._look_at,
        )

    def handle_timeout(self, now: int) -> None:
        """Do whatever is due."""
        self.poll_timeout()
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = heapq.heappop(self._deadlines)
            if self._is_current(entry):
                connection = entry[2]
                connection.deadline = None
                connection.handle_timeout(now)
                self._touch(connection)
        self._gatherer.handle_timeout(now)
        self._device.handle_timeout(now)
        if self._rest_at is not None and self._rest_at <= now:
            self._rest_at = None
            self._gatherer.rest(now)
        if self._look_at is not None and self._look_at <= now:
            self._look_at = None
            if not all(each.agent.is_backed for each in self._connections.values()):
                self._gatherer.allocate(now)
        self._settle(now)

    def drain_transmits(self) -> list[Transmit]:
        """Datagrams to send, in order."""
        drained, self._transmits = self._transmits, []
        return drained

    def drain_link_messages(self) -> list[tuple[int, bytes]]:
        """Messages to send by connections to relays, in order; before the commands are obeyed."""
        return self._gatherer.drain_link_messages()

    def drain_link_commands(self) -> list[LinkCommand]:
        """Which connections to relays to open and to close."""
        return self._gatherer.drain_link_commands()

    def drain_packets(self) -> list[tuple[UUID, bytes]]:
        """Inner packets that arrived, with the connection they came by. They are authentic, but
        whether the peer may use their addresses is the caller's to decide."""
        drained, self._packets = self._packets, []
        return drained

    def drain_events(self) -> list[Event]:
        """What happened, oldest first."""
        drained, self._events = self._events, []
        return drained

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            connections=len(self._connections),
            refused=self._counts.refused,
            unknown_connection=self._counts.unknown_connection,
            gathering=self._gatherer.statistics(),
            device=self._device.statistics(),
        )

    def connection_statistics(self, connection_id: UUID) -> ConnectionReport | None:
        """Of one connection; None if there is no such one."""
        connection = self._connections.get(connection_id)
        if connection is None:
            return None
        return ConnectionReport(
            connection=connection.statistics(),
            ice=connection.agent.statistics(),
            wireguard=self._device.peer_statistics(connection_id),
        )

    # --- demultiplexing ------------------------------------------------------------------------

    def _receive(self, base: Base, data: bytes, source: Address, now: int) -> None:
        """A datagram from a host socket: WireGuard's first byte is 1 to 4 and three zeros follow,
        which no STUN message and no ChannelData of ours can begin with (RFC 7983 in spirit)."""
        if is_wireguard(data):
            self._receive_wireguard(base, data, source, now)
        elif not is_channel_data(data) and not is_stun(data):
            self._counts.refused += 1
        elif self._gatherer.receive(base.socket, data, source, now):
            self._take_relayed(now)
        else:
            self._receive_stun(base, data, source, now)

    def _take_relayed(self, now: int) -> None:
        for base, peer, data in self._gatherer.drain_received():
            if is_wireguard(data):
                self._receive_wireguard(base, data, peer, now)
            else:
                self._receive_stun(base, data, peer, now)

    def _receive_stun(self, base: Base, data: bytes, source: Address, now: int) -> None:
        try:
            message = StunMessage.decode(data)
        except StunError:
            self._counts.refused += 1
            return
        connection: Connection | None = None
        if message.method == Method.BINDING:
            if message.message_class is MessageClass.REQUEST:
                connection = self._by_fragment.get(local_fragment_of(message) or "")
            elif message.message_class is not MessageClass.INDICATION:
                prefix = message.transaction_id[:TRANSACTION_PREFIX_BYTES]
                connection = self._by_prefix.get(prefix)
        if connection is None:
            self._counts.refused += 1
            return
        if message.message_class is MessageClass.REQUEST:
            connection.agent.receive_request(message, base, source, now)
        else:
            connection.agent.receive_response(message, base, source, now)
        self._touch(connection)

    def _receive_wireguard(self, base: Base, data: bytes, source: Address, now: int) -> None:
        self._base_by_source[source] = base
        received = self._device.receive(data, source, now)
        if received is None:
            return
        peer_key, packets = received
        connection = self._connection_of(peer_key)
        if connection is None:
            return
        connection.heard(data[0], base, source)
        self._packets += [(connection.id, packet) for packet in packets]
        self._touch(connection)

    def _receive_transports(
        self, base: Base, datagrams: Sequence[bytes], source: Address, now: int
    ) -> None:
        received = self._device.receive_transports(datagrams, now)
        connection = None if received is None else self._connection_of(received[0])
        if received is None or connection is None:
            return
        _, accepted, packets = received
        connection.heard(MESSAGE_TRANSPORT, base, source, datagrams=accepted)
        connection_id = connection.id
        self._packets += [(connection_id, packet) for packet in packets]
        self._touch(connection)

    # --- settling ------------------------------------------------------------------------------

    def _settle(self, now: int) -> None:
        """Pass on what the parts have for each other, until none has anything."""
        while True:
            if self._gatherer.version != self._seen_version:
                self._seen_version = self._gatherer.version
                self._spread_candidates(now)
            self._settle_device(now)
            if not self._dirty:
                break
            dirty, self._dirty = self._dirty, {}
            for connection in dirty:
                self._settle_connection(connection, now)
        self._base_by_source.clear()
        self._transmits += self._gatherer.drain_transmits()

    def _spread_candidates(self, now: int) -> None:
        gatherer = self._gatherer
        bases, leaving, candidates = gatherer.bases(), gatherer.leaving(), gatherer.candidates()
        for connection in self._connections.values():
            connection.agent.set_bases(bases, now, leaving=leaving)
            connection.announce(candidates, gatherer.generation, now)
            self._touch(connection)

    def _settle_device(self, now: int) -> None:
        for event in self._device.drain_events():
            connection = self._connection_of(event.peer_key)
            if connection is None:
                continue
            if isinstance(event, SessionEstablished):
                connection.session_established(now)
            elif isinstance(event, HandshakeFailed):
                connection.handshake_failed()
            self._touch(connection)
        made = self._device.drain_datagrams()
        for target, group in groupby(made, key=itemgetter(0)) if made else ():
            datagrams = [datagram for _, datagram in group]
            if isinstance(target, Address):
                base = self._base_by_source.get(target)
                if base is not None:
                    self._gatherer.send_all(base, target, datagrams, now)
                continue
            connection = self._connection_of(target)
            if connection is not None:
                connection.carry(datagrams, now)
                self._touch(connection)

    def _settle_connection(self, connection: Connection, now: int) -> None:
        if connection.advance(now):
            self._gatherer.review(now)
        if connection.needs_relay and not self._gatherer.allocates:
            self._gatherer.allocate(now)
        for event in connection.drain_events():
            self._events.append(event)
            if isinstance(event, Connected | PathChanged):
                self._bind_channel(connection, now)
        for outgoing in connection.drain_outgoing():
            self._gatherer.send(outgoing.base, outgoing.remote, outgoing.data, now)
        for train in connection.drain_trains():
            self._gatherer.send_all(train.base, train.remote, train.datagrams, now)

    def _bind_channel(self, connection: Connection, now: int) -> None:
        pair = connection.agent.selected
        if pair is not None and pair.base.server is not None:
            self._gatherer.bind(pair.base, pair.remote.address, now)

    # --- helpers -------------------------------------------------------------------------------

    def _connection_of(self, peer_key: Hashable) -> Connection | None:
        return self._connections.get(peer_key) if isinstance(peer_key, UUID) else None

    def _look_later(self, now: int) -> None:
        """Paths are looked for anew: see soon whether it takes a relay of our own."""
        if self._look_at is None and not self._gatherer.allocates:
            self._look_at = now + OWN_RELAY_AFTER_NS

    def _touch(self, connection: Connection) -> None:
        self._dirty[connection] = None
        self._stale_deadlines[connection] = None

    def _remove(self, connection: Connection, now: int) -> None:
        parameters = connection.parameters
        del self._connections[connection.id]
        self._dirty.pop(connection, None)
        self._stale_deadlines.pop(connection, None)
        connection.deadline = None
        if self._by_fragment.get(parameters.local_ice.fragment) is connection:
            del self._by_fragment[parameters.local_ice.fragment]
        if self._by_public_key.get(parameters.peer_public_key) is connection:
            del self._by_public_key[parameters.peer_public_key]
        del self._by_prefix[connection.agent.transaction_prefix]
        still_used = {a for c in self._connections.values() for a in c.agent.remote_addresses}
        for address in connection.agent.remote_addresses:
            if address not in still_used:
                self._gatherer.forget(address, now)

    def _fresh_prefix(self) -> bytes:
        while True:
            prefix = self._randomness.bytes(TRANSACTION_PREFIX_BYTES)
            if prefix not in self._by_prefix:
                return prefix

    def _is_current(self, entry: tuple[int, int, Connection]) -> bool:
        return entry[2].deadline == entry[0]  # it has none any more, once it is removed
