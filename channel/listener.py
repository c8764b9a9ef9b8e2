"""The portal's end of the control channel.

`PortalChannel` is a core: one agent's channel over any transport that carries bytes in order. It
sends the challenge, reads the join under a deadline, numbers what it sends, answers heartbeats,
and ends what is silent, malformed or too slow. `serve_channels` is the shell that puts it on QUIC;
`channel.websocket_listener` brings the same server those who come by WebSocket.

The life of a channel, by what it waits for:

    WAITING_FOR_JOIN --join--> WAITING_FOR_DECISION --joined()--> OPEN --> ENDED
           |                            |                          |
           +--------- deadline ---------+------- 30 s of silence --+--> ENDED

While the portal decides about a join nothing more is read: what the agent sends meanwhile is
decoded as what it turned out to be, or the connection ends unread.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Final, Literal, Protocol

import attrs
import trio

from channel.credentials import NONCE_BYTES
from channel.frames import (
    AGENT_FRAME_LIMIT,
    CLOSE_CODES,
    PORTAL_FRAME_LIMIT,
    Frame,
    FrameDecoder,
    RemoteProtocolError,
    encode_parts,
)
from channel.messages import (
    FROM_CLIENT,
    FROM_GATEWAY,
    FROM_RELAY,
    FROM_UNJOINED,
    Challenge,
    Disconnect,
    Heartbeat,
    IpText,
    Join,
    RefusalCode,
    RelayJoin,
)
from channel.transports import ALPN
from runtime.clock import NS_PER_S, Clock
from runtime.net.address import Address
from runtime.net.binding import binding
from runtime.net.connection import Connection, ConnectionClosed
from runtime.net.quic import LEAST_DATAGRAM_BYTES, QuicLimits, QuicListener
from runtime.net.udp import UdpSocket
from runtime.net.websocket_core import WebSocketLimits
from runtime.randomness import Randomness
from runtime.service import get_logger

CLOSE_LINGER_NS: Final = 2 * NS_PER_S

_EVENTS_BY_KIND: Final = {"client": FROM_CLIENT, "gateway": FROM_GATEWAY, "relay": FROM_RELAY}

log = get_logger("channel")

AgentKind = Literal["client", "gateway", "relay"]


class Channel(Protocol):
    """What the control plane holds of an agent's connection."""

    @property
    def remote(self) -> IpText:
        """The agent's address on the validated path."""

    def send(self, message: object, *, ref: int | None = None, epoch: int | None = None) -> None:
        """Queue a message; never waits. A channel that is over ignores it; one whose queue is
        full ends. Raises LocalProtocolError for what is no message of the portal."""

    def joined(self, kind: AgentKind) -> None:
        """The join is accepted: from now on the agent is heard as a `kind`."""

    def probe(self) -> None:
        """Have the attachment told (`heard`) as soon as the agent gives a sign of life; the
        transport asks it for one."""

    def close(self, disconnect: Disconnect | None) -> None:
        """End the channel, telling the agent why. Closing twice is harmless."""


class Attachment(Protocol):
    """What the control plane does with an agent's connection. None of these may block."""

    def received(self, frame: Frame) -> None:
        """A frame came: first the join, then whatever the kind of agent sends."""

    def heard(self) -> None:
        """The agent is there: once after each `Channel.probe`, unless it is not."""

    def migrated(self, remote: IpText) -> None:
        """The agent's address is another one now; the new path is validated."""

    def closed(self, reason: str) -> None:
        """The channel is over, whoever ended it. Called exactly once, and last."""


Connected = Callable[[Channel, Challenge], Attachment]


class Transport(Protocol):
    """What carries a channel: bytes in order, both ways."""

    def send(self, data: bytes) -> bool:
        """Queue bytes without waiting; False when that is too much."""

    def ping(self) -> None:
        """Have the agent's end of the transport answer."""

    def close(self, code: int, reason: str, linger_ns: int) -> None:
        """End, after at most `linger_ns` in which what was sent still arrives."""


@attrs.frozen(kw_only=True)
class ChannelLimits:
    """What one portal node allows its agents.

    `join_deadline_ns` runs from the connection to the agent's join, `decision_deadline_ns` from
    the join to `Channel.joined`, `silence_ns` from one frame to the next. Connections above
    `max_unjoined` that have not joined are told to come again within `shed_spread_ns`.
    """

    join_deadline_ns: int = 10 * NS_PER_S
    decision_deadline_ns: int = 20 * NS_PER_S
    silence_ns: int = 30 * NS_PER_S
    max_unjoined: int = 1_000
    shed_spread_ns: int = 10 * NS_PER_S
    protocol_error_retry_ns: int = 30 * NS_PER_S
    quic: QuicLimits = QuicLimits(receive_window_bytes=128 * 1024)
    websocket: WebSocketLimits = WebSocketLimits(receive_window_bytes=128 * 1024)


class _State(Enum):
    WAITING_FOR_JOIN = auto()
    WAITING_FOR_DECISION = auto()
    OPEN = auto()
    ENDED = auto()


class PortalChannel:
    """One agent's channel, a core. `start`, then `receive` bytes and keep time; `lost` ends it.

    Implements `Channel`. Calls its attachment from `receive`, `handle_timeout`, `moved` and
    `lost`, and from `joined` where frames were waiting for it.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        remote: IpText,
        portal: str,
        nonce: bytes,
        limits: ChannelLimits,
        now: int,
    ) -> None:
        self._transport = transport
        self._remote = remote
        self._challenge = Challenge(nonce=nonce, portal=portal)
        self._limits = limits
        self._decoder = FrameDecoder(FROM_UNJOINED, AGENT_FRAME_LIMIT)
        self._attachment: Attachment | None = None
        self._state = _State.WAITING_FOR_JOIN
        self._deadline = now + limits.join_deadline_ns
        self._now = now
        self._seq = 0
        self._reading = False
        self._probing = False
        self._end_reason: str | None = None
        self.broke_protocol = False

    @property
    def remote(self) -> IpText:
        return self._remote

    @property
    def is_open(self) -> bool:
        """The agent has joined, and the channel is not over."""
        return self._state is _State.OPEN

    def start(self, connected: Connected) -> None:
        """Send the challenge and attach the control plane."""
        self.send(self._challenge)
        self._attachment = connected(self, self._challenge)

    # --- Channel -------------------------------------------------------------------------------

    def send(self, message: object, *, ref: int | None = None, epoch: int | None = None) -> None:
        if self._state is _State.ENDED:
            return
        frames = encode_parts(
            message, ref=ref, epoch=epoch, seq=self._seq, limit=PORTAL_FRAME_LIMIT
        )
        self._seq += 1
        if not self._transport.send(b"".join(frames)):
            log.warning("channel_overflow", remote=self._remote)
            self._end("overflow", "unavailable", linger_ns=0)

    def joined(self, kind: AgentKind) -> None:
        if self._state is not _State.WAITING_FOR_DECISION:
            return
        self._state = _State.OPEN
        self._deadline = self._now + self._limits.silence_ns
        self._decoder.events = _EVENTS_BY_KIND[kind]
        self._read()

    def probe(self) -> None:
        if self._state is not _State.ENDED:
            self._probing = True
            self._transport.ping()

    def close(self, disconnect: Disconnect | None) -> None:
        if self._state is _State.ENDED:
            return
        if disconnect is None:
            self._end("closed", None, linger_ns=CLOSE_LINGER_NS)
            return
        self.send(disconnect)
        self._end(disconnect.reason, disconnect.reason, linger_ns=CLOSE_LINGER_NS)

    # --- for the shell -------------------------------------------------------------------------

    def receive(self, data: bytes, now: int) -> None:
        """Take bytes of the agent. Never raises for their sake."""
        self._now = now
        if self._state is _State.ENDED:
            return
        self.heard()
        self._decoder.push(data)
        waiting = self._state is _State.WAITING_FOR_DECISION
        if waiting and self._decoder.buffered_bytes > 2 * AGENT_FRAME_LIMIT:
            self._refuse(RemoteProtocolError("unexpected_message", "too much before the answer"))
            return
        self._read()

    def heard(self) -> None:
        """The agent gave a sign of life: data, or its transport's answer to a ping."""
        if self._probing and self._attachment is not None and self._state is not _State.ENDED:
            self._probing = False
            self._attachment.heard()

    def moved(self, remote: IpText) -> None:
        """The transport validated another path. Another port of the same address is no news."""
        if remote == self._remote:
            return
        self._remote = remote
        if self._attachment is not None and self._state is not _State.ENDED:
            self._attachment.migrated(remote)

    def lost(self, reason: str) -> None:
        """The transport is over: the last call."""
        self._state = _State.ENDED
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            attachment.closed(self._end_reason or reason)

    def poll_timeout(self) -> int | None:
        """When `handle_timeout` is due (ns), None once the channel is over."""
        return None if self._state is _State.ENDED else self._deadline

    def handle_timeout(self, now: int) -> None:
        self._now = now
        if self._state is _State.ENDED or now < self._deadline:
            return
        if self._state is _State.OPEN:
            self._end("silent", "unavailable", linger_ns=0)
            return
        reason: RefusalCode = "unavailable"
        detail = "the portal took too long"
        if self._state is _State.WAITING_FOR_JOIN:
            reason, detail = "protocol_error", "no join came"
        self.close(Disconnect(reason=reason, detail=detail, retry=True))

    # --- helpers -------------------------------------------------------------------------------

    def _read(self) -> None:
        """Handle the frames that are complete. `joined` may call it from within itself."""
        if self._reading:
            return
        self._reading = True
        try:
            while self._state in (_State.WAITING_FOR_JOIN, _State.OPEN):
                frame = self._decoder.next_frame()
                if frame is None:
                    return
                self._handle(frame)
        except RemoteProtocolError as error:
            self._refuse(error)
        finally:
            self._reading = False

    def _handle(self, frame: Frame) -> None:
        if self._attachment is None:
            return
        if isinstance(frame.message, Join | RelayJoin):
            if self._state is not _State.WAITING_FOR_JOIN:
                raise RemoteProtocolError("join_late", "a second join")
            self._state = _State.WAITING_FOR_DECISION
            self._deadline = self._now + self._limits.decision_deadline_ns
            self._attachment.received(frame)
            return
        self._deadline = self._now + self._limits.silence_ns
        if isinstance(frame.message, Heartbeat):
            self.send(frame.message)
            return
        self._attachment.received(frame)

    def _refuse(self, error: RemoteProtocolError) -> None:
        self.broke_protocol = True
        log.warning("protocol_error", remote=self._remote, code=error.code, detail=error.detail)
        self.close(
            Disconnect(
                reason="protocol_error",
                detail=f"{error.code}: {error.detail}",
                retry=True,
                retry_after_ns=self._limits.protocol_error_retry_ns,
            )
        )

    def _end(self, reason: str, code: RefusalCode | None, *, linger_ns: int) -> None:
        self._state = _State.ENDED
        self._end_reason = reason
        self._transport.close(0 if code is None else CLOSE_CODES[code], reason, linger_ns)


# --- the shell -----------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class ChannelServerStatistics:
    """Live channels, over whatever transport, and counts since the start: connections whose
    handshake was complete, those shed, channels ended for a protocol error, those that met a
    mistake of ours; then of QUIC alone, connections refused for a limit, clients asked to prove
    their address, strangers sent away, and datagrams that the kernel dropped (keepalives; all, when
    its buffer is full)."""

    channels: int
    unjoined: int
    connections: int
    shed: int
    protocol_errors: int
    failures: int
    refused_limit: int
    retries_sent: int
    resets_sent: int
    dropped_unread: int


class ChannelServer:
    """The listener of one portal node, as `serve_channels` hands it out when it has started."""

    def __init__(
        self,
        listener: QuicListener,
        connected: Connected,
        *,
        portal: str,
        clock: Clock,
        randomness: Randomness,
        limits: ChannelLimits,
    ) -> None:
        self._listener = listener
        self._connected = connected
        self._portal = portal
        self._clock = clock
        self._randomness = randomness
        self._limits = limits
        self._channels: set[PortalChannel] = set()
        self._connections = self._shed = self._failures = self._protocol_errors = 0
        self._draining = False

    @property
    def address(self) -> Address:
        """Where the server is bound, with its real port."""
        return self._listener.address

    def replace_certificate(self, certificate_chain_pem: bytes, key_pem: bytes) -> None:
        """Present another certificate to new connections. Raises ValueError."""
        self._listener.replace_certificate(certificate_chain_pem, key_pem)

    def refuse_newcomers(self) -> None:
        """Send every new agent elsewhere from now on; those that are here stay."""
        self._draining = True

    def drain(self, spread_ns: int) -> None:
        """Send every agent elsewhere, at once, and take no new one. Those that know no other node
        come back within `spread_ns`."""
        self.refuse_newcomers()
        for channel in list(self._channels):
            channel.close(self._come_again("draining", spread_ns))

    def statistics(self) -> ChannelServerStatistics:
        quic = self._listener.statistics()
        return ChannelServerStatistics(
            channels=len(self._channels),
            unjoined=self._count_unjoined(),
            connections=self._connections,
            shed=self._shed,
            protocol_errors=self._protocol_errors,
            failures=self._failures,
            refused_limit=quic.refused_limit,
            retries_sent=quic.retries_sent,
            resets_sent=quic.resets_sent,
            dropped_unread=quic.dropped_unread,
        )

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        await self._listener.serve(self.serve_connection, task_status=task_status)

    async def serve_connection(self, connection: Connection) -> None:
        """Serve an agent whose handshake is complete, until its channel is over; it has said so to
        the connection then. Raises nothing but a cancellation, of which the agent is told."""
        self._connections += 1
        channel = PortalChannel(
            _ConnectionTransport(connection),
            remote=IpText(connection.remote.host),
            portal=self._portal,
            nonce=self._randomness.bytes(NONCE_BYTES),
            limits=self._limits,
            now=self._clock.monotonic_ns(),
        )
        if self._must_shed():
            self._shed += 1
            reason: RefusalCode = "draining" if self._draining else "unavailable"
            channel.close(self._come_again(reason, self._limits.shed_spread_ns))
            return
        connection.on_migrated = lambda remote: channel.moved(IpText(remote.host))
        connection.on_pong = channel.heard
        self._channels.add(channel)
        end: str | None = None
        try:
            end = await self._run(channel, connection)
        except Exception:
            # A mistake of ours that one agent met: it costs that agent its channel.
            self._failures += 1
            log.error("channel_failed", remote=channel.remote, exc_info=True)
            channel.close(self._come_again("unavailable", self._limits.shed_spread_ns))
        finally:
            self._channels.discard(channel)
            self._protocol_errors += channel.broke_protocol
            if end is None:  # called off, while the agent is there
                channel.close(self._come_again("shutting_down", self._limits.shed_spread_ns))
            channel.lost(end or "shutting_down")
            connection.close()

    async def _run(self, channel: PortalChannel, connection: Connection) -> str:
        channel.start(self._connected)
        try:
            while (deadline := channel.poll_timeout()) is not None:
                remaining_ns = deadline - self._clock.monotonic_ns()
                with trio.move_on_after(max(0, remaining_ns) / NS_PER_S) as waiting:
                    await self._read(channel, connection, deadline)
                if waiting.cancelled_caught:
                    channel.handle_timeout(self._clock.monotonic_ns())
        except ConnectionClosed as closed:
            return f"lost: {closed}"
        except EOFError as ended:
            return str(ended)
        return "closed"

    async def _read(self, channel: PortalChannel, connection: Connection, until: int) -> None:
        """Pass on what comes until the channel is over or its deadline is before `until`. One that
        is later, as each heartbeat makes it, is looked at when `until` has come: a scope for each
        frame of thousands of agents would cost more than the frames. Raises ConnectionClosed, and
        EOFError.
        """
        while (deadline := channel.poll_timeout()) is not None and deadline >= until:
            data = await connection.receive()
            if not data:
                raise EOFError("the agent ended its stream")
            channel.receive(data, self._clock.monotonic_ns())

    def _must_shed(self) -> bool:
        if self._draining:
            return True
        limit = self._limits.max_unjoined
        # Counting is needed only where enough are connected at all.
        return len(self._channels) >= limit and self._count_unjoined() >= limit

    def _count_unjoined(self) -> int:
        return sum(not channel.is_open for channel in self._channels)

    def _come_again(self, reason: RefusalCode, spread_ns: int) -> Disconnect:
        after = self._randomness.integer(max(1, spread_ns))
        return Disconnect(reason=reason, retry=True, retry_after_ns=after)


class _ConnectionTransport:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, data: bytes) -> bool:
        return self._connection.send(data) or self._connection.closed is not None

    def ping(self) -> None:
        self._connection.ping()

    def close(self, code: int, reason: str, linger_ns: int) -> None:
        self._connection.close(code, reason, linger_ns=linger_ns)


async def serve_channels(
    listen: Address,
    certificate_chain_pem: bytes,
    key_pem: bytes,
    connected: Connected,
    *,
    portal: str,
    clock: Clock,
    randomness: Randomness,
    limits: ChannelLimits | None = None,
    reset_key: bytes | None = None,
    task_status: trio.TaskStatus[ChannelServer] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the control channel over QUIC at `listen` for ever; starts with a `ChannelServer`.

    `connected` is called for each connection once its challenge was sent, and gives what is to
    happen with it. `certificate_chain_pem` holds the server's certificate and the CA's, which
    agents find by its pin; `portal` is the name in each challenge. `reset_key` is a secret that
    outlives a restart (see `runtime.net.quic`). `::` is every address, of IPv4 too.
    Cancelled, it tells every agent to come again, and closes. Raises OSError, ValueError.
    """
    limits = limits or ChannelLimits()
    with binding("listen", f"{listen} (UDP)"):
        socket = UdpSocket.bind(
            listen, dont_fragment=True, dual_stack=True, least_bytes=LEAST_DATAGRAM_BYTES
        )
    try:
        listener = QuicListener(
            socket,
            certificate_chain_pem=certificate_chain_pem,
            key_pem=key_pem,
            alpn=ALPN,
            limits=limits.quic,
            reset_key=reset_key,
        )
    except BaseException:
        socket.close()
        raise
    server = ChannelServer(
        listener, connected, portal=portal, clock=clock, randomness=randomness, limits=limits
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        task_status.started(server)
