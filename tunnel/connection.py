"""One peer connection: an ICE agent that finds the way, and a WireGuard peer that travels it.

The controlling side (the client) shakes hands as soon as a pair works. Until the session stands,
and whenever there is no path, inner packets wait in a bounded buffer; the oldest goes first. What
WireGuard sends in a moment without a path (the answer to a handshake that arrived before our own
check was answered) waits for two seconds at most.

A handshake message is sent up to three times within a second as it is, since WireGuard itself
would wait five seconds: the receiver takes the first copy and refuses the others as replays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple
from uuid import UUID

import attrs

from channel.messages import Candidate, Candidates, IceCredentials
from runtime.clock import NS_PER_MS, NS_PER_S, earliest
from runtime.net.address import Address
from tunnel.ice.agent import (
    Doubted,
    GaveUp,
    IceAgent,
    Lost,
    Outgoing,
    Path,
    Selected,
    Silent,
)
from tunnel.ice.candidates import Base
from tunnel.wireguard.device import Device

MAX_BUFFERED_PACKETS: Final = 64
MAX_BUFFERED_BYTES: Final = 64 * 1024
MAX_WAITING_DATAGRAMS: Final = 8
WAITING_NS: Final = 2 * NS_PER_S
HANDSHAKE_REPEATS_NS: Final = (250 * NS_PER_MS, 750 * NS_PER_MS)

_INITIATION: Final = 1
_HANDSHAKE: Final = (1, 2)
_TRANSPORT: Final = 4
_EMPTY_TRANSPORT_BYTES: Final = 32


@attrs.frozen(kw_only=True)
class ConnectionParameters:
    """What both ends of a connection know before it begins. `controlling`: True at the client."""

    connection_id: UUID
    peer_public_key: bytes
    preshared_key: bytes = attrs.field(repr=False)
    local_ice: IceCredentials
    remote_ice: IceCredentials
    controlling: bool


@attrs.frozen(kw_only=True)
class LocalCandidates:
    """To be brought to the peer of `message.connection_id`."""

    message: Candidates


@attrs.frozen(kw_only=True)
class Connected:
    """Packets flow: the session stands and has a path. Reported once."""

    connection_id: UUID
    path: Path


@attrs.frozen(kw_only=True)
class PathChanged:
    """Another path is in use, also the first one after `PathLost`."""

    connection_id: UUID
    path: Path


@attrs.frozen(kw_only=True)
class PathLost:
    """No path works any more; it is looked for, and packets wait in a bounded buffer."""

    connection_id: UUID


@attrs.frozen(kw_only=True)
class Failed:
    """It is to be closed: no path was found (again) in time, the handshake was never answered
    (as when the preshared keys differ), or a newer connection to the same peer replaced it."""

    connection_id: UUID
    reason: Literal["unreachable", "handshake", "replaced"]


Event = LocalCandidates | Connected | PathChanged | PathLost | Failed


class Train(NamedTuple):
    """Datagrams to be sent one after the other from a base to one address."""

    base: Base
    remote: Address
    datagrams: Sequence[bytes]


@attrs.define(kw_only=True)
class ConnectionStatistics:
    """Present sizes, and counts since the start."""

    buffered_packets: int = 0
    dropped_packets: int = 0
    dropped_datagrams: int = 0
    sent_datagrams: int = 0
    heard_datagrams: int = 0


class Connection:
    """One connection of an engine, which owns the Device. `now`: nanoseconds, monotonic."""

    def __init__(self, parameters: ConnectionParameters, *, device: Device, agent: IceAgent):
        self.id = parameters.connection_id
        self.parameters = parameters
        self.agent = agent
        self.deadline: int | None = None
        self.needs_relay = not parameters.controlling
        """Whether we are to have a relayed address of our own for it. The controlled side has one
        at once, and mostly serves many by it; the controlling one where that is not enough."""
        self._device = device
        self._established = False
        self._connected = False
        self._buffer: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._repeats: list[tuple[int, bytes]] = []
        self._announced: dict[Candidate, None] = {}
        self._announced_generation = -1
        self._announced_at = 0
        self._outgoing: list[Outgoing] = []
        self._trains: list[Train] = []
        self._events: list[Event] = []
        self._counts = ConnectionStatistics()

    # --- packets and datagrams ----------------------------------------------------------------

    def send_packets(self, packets: Sequence[bytes], now: int) -> None:
        """Send inner packets, or keep them until that is possible."""
        if self._established and self.agent.selected is not None:
            self._device.send_all(self.id, packets, now)
            return
        self._buffer += packets
        self._buffered_bytes += sum(map(len, packets))
        while len(self._buffer) > MAX_BUFFERED_PACKETS or self._buffered_bytes > MAX_BUFFERED_BYTES:
            self._buffered_bytes -= len(self._buffer.popleft())
            self._counts.dropped_packets += 1

    def carry(self, datagrams: Sequence[bytes], now: int) -> None:
        """Datagrams that WireGuard made for this peer; data travels as one train."""
        if self.agent.selected is not None and all(each[0] == _TRANSPORT for each in datagrams):
            self._send_train(datagrams, now)
            return
        for datagram in datagrams:
            self._carry(datagram, now)

    def _carry(self, datagram: bytes, now: int) -> None:
        if datagram[0] in _HANDSHAKE:
            self._repeats = [(now + delay, datagram) for delay in HANDSHAKE_REPEATS_NS]
        if self.agent.selected is not None:
            self._send(datagram, now)
            return
        self._waiting.append((now + WAITING_NS, datagram))
        if len(self._waiting) > MAX_WAITING_DATAGRAMS:
            self._waiting.popleft()
            self._counts.dropped_datagrams += 1

    def heard(self, kind: int, base: Base, source: Address, *, datagrams: int = 1) -> None:
        """WireGuard took authentic datagrams of the peer, of one message type, whichever way they
        came."""
        self._counts.heard_datagrams += datagrams
        self.agent.heard(base.address, source)
        if kind == _TRANSPORT:
            self._repeats.clear()

    def session_established(self, now: int) -> None:
        """WireGuard can send; it says so for each renewal of the keys too."""
        self._repeats.clear()
        self._established = True
        self._flush(now)
        self._report_connected()

    def handshake_failed(self) -> None:
        """WireGuard gave up, after 90 s."""
        self._events.append(Failed(connection_id=self.id, reason="handshake"))

    # --- candidates ---------------------------------------------------------------------------

    def announce(
        self,
        candidates: Sequence[Candidate],
        generation: int,
        now: int,
        *,
        anew: bool = False,
        wants_answer: bool = False,
    ) -> None:
        """Tell the peer what it has not been told of this generation; `anew`: all of it, since
        some may not have come to it. `wants_answer`: it is to tell all of its own."""
        first = self._announced_generation < 0
        if anew or generation != self._announced_generation:
            self._announced_generation = generation
            self._announced = {}
        elif all(candidate in self._announced for candidate in candidates):
            return
        new = tuple(c for c in candidates if c not in self._announced)
        if first and not new:
            return
        self._announced.update(dict.fromkeys(new))
        self._announced_at = now
        message = Candidates(
            connection_id=self.id, generation=generation, add=new, wants_answer=wants_answer
        )
        self._events.append(LocalCandidates(message=message))

    def announced_within(self, span_ns: int, now: int) -> bool:
        """Whether the peer was told something within this time."""
        return self._announced_generation >= 0 and now - self._announced_at < span_ns

    @property
    def is_direct(self) -> bool:
        """Whether data takes a direct path at present."""
        path = self.agent.path()
        return path is not None and path.kind == "direct"

    # --- time and output ------------------------------------------------------------------------

    def poll_timeout(self) -> int | None:
        """When `handle_timeout` is due; None: nothing is waited for."""
        agent_at = self.agent.poll_timeout()
        if not self._repeats:
            return agent_at
        return earliest(agent_at, *(at for at, _ in self._repeats))

    def handle_timeout(self, now: int) -> None:
        self.agent.handle_timeout(now)
        if not self._repeats:
            return
        due = [datagram for at, datagram in self._repeats if at <= now]
        self._repeats = [(at, datagram) for at, datagram in self._repeats if at > now]
        for datagram in due:
            if self.agent.selected is not None:
                self._send(datagram, now)

    def advance(self, now: int) -> bool:
        """Act on what the agent reports. True: our own NAT may have forgotten us."""
        doubted = False
        for event in self.agent.drain_events():
            if isinstance(event, Selected):
                self._path_selected(event.path, now)
            elif isinstance(event, Doubted):
                doubted = True
            elif isinstance(event, Silent):
                self.needs_relay = True
            elif isinstance(event, Lost):
                doubted = self.needs_relay = True
                if self._connected:
                    self._events.append(PathLost(connection_id=self.id))
            elif isinstance(event, GaveUp):
                self._events.append(Failed(connection_id=self.id, reason="unreachable"))
        self._outgoing += self.agent.drain_checks()
        return doubted

    def drain_outgoing(self) -> list[Outgoing]:
        """Checks and single WireGuard datagrams to send, before the trains."""
        drained, self._outgoing = self._outgoing, []
        return drained

    def drain_trains(self) -> list[Train]:
        """WireGuard data to send."""
        drained, self._trains = self._trains, []
        return drained

    def drain_events(self) -> list[Event]:
        drained, self._events = self._events, []
        return drained

    def statistics(self) -> ConnectionStatistics:
        return attrs.evolve(self._counts, buffered_packets=len(self._buffer))

    # --- helpers ---------------------------------------------------------------------------------

    def _path_selected(self, path: Path, now: int) -> None:
        while self._waiting:
            until, datagram = self._waiting.popleft()
            if until >= now:
                self._send(datagram, now)
        if self._connected:
            self._events.append(PathChanged(connection_id=self.id, path=path))
        elif self.parameters.controlling and not self._established:
            self._shake_hands(now)
        self._flush(now)
        self._report_connected()

    def _shake_hands(self, now: int) -> None:
        """The first packet that waits confirms the keys, so that no keepalive has to."""
        if not self._buffer:
            self._device.initiate(self.id, now)
            return
        first = self._buffer.popleft()
        self._buffered_bytes -= len(first)
        self._device.send_all(self.id, (first,), now)

    def _report_connected(self) -> None:
        path = self.agent.path()
        if self._established and path is not None and not self._connected:
            self._connected = True
            self._events.append(Connected(connection_id=self.id, path=path))

    def _flush(self, now: int) -> None:
        if not self._established or self.agent.selected is None:
            return
        buffered, self._buffer = self._buffer, deque()
        self._buffered_bytes = 0
        if buffered:
            self._device.send_all(self.id, tuple(buffered), now)

    def _send_train(self, datagrams: Sequence[bytes], now: int) -> None:
        pair = self.agent.selected
        assert pair is not None
        self._trains.append(Train(pair.base, pair.remote.address, datagrams))
        self._counts.sent_datagrams += len(datagrams)
        carries_data = any(len(each) > _EMPTY_TRANSPORT_BYTES for each in datagrams)
        self.agent.sent(now, expects_answer=carries_data)

    def _send(self, datagram: bytes, now: int) -> None:
        pair = self.agent.selected
        assert pair is not None
        self._outgoing.append(Outgoing(pair.base, pair.remote.address, datagram))
        self._counts.sent_datagrams += 1
        kind = datagram[0]
        carries_data = kind == _TRANSPORT and len(datagram) > _EMPTY_TRANSPORT_BYTES
        self.agent.sent(now, expects_answer=kind == _INITIATION or carries_data)
