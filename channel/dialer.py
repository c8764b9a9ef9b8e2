"""An agent's end of the control channel.

`AgentSession` is a core: one connection's life, from the challenge to the loss. `Backoff` is the
pure rule of when to try again, `channel.doors` that of where. `Dialer` is the shell around them: it
resolves, dials over QUIC, proves the portal by its pin before a byte is sent, keeps time, and
starts over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import attrs
import trio
from cryptography.x509 import Certificate

from channel.credentials import NONCE_BYTES, UntrustedPortal, verify_portal
from channel.doors import Doors
from channel.frames import (
    AGENT_FRAME_LIMIT,
    CLOSE_CODES,
    PORTAL_FRAME_LIMIT,
    REASSEMBLY_LIMIT,
    Frame,
    FrameDecoder,
    RemoteProtocolError,
    encode_frame,
)
from channel.joining import split_join
from channel.messages import (
    Challenge,
    Disconnect,
    Heartbeat,
    HeldWanted,
    Join,
    MoreHeld,
    Portals,
    RefusalCode,
    RelayJoin,
)
from runtime.clock import NS_PER_S, Clock
from runtime.guard import Guard
from runtime.net.address import Address, split_host_port
from runtime.net.quic import QuicClosed, QuicConnection, QuicLimits, connect_quic
from runtime.randomness import Randomness
from runtime.service import get_logger

ALPN: Final = "holloway/1"
MAX_ADDRESSES: Final = 8
MIN_REDIAL_NS: Final = NS_PER_S
_ELSEWHERE: Final = ("draining", "shutting_down")
"""With these reasons a node sends an agent to the others."""
_UNABLE: Final = ("unavailable", "limits_exceeded")
"""With these it says that it cannot serve now; another may."""

log = get_logger("dialer")


class ChannelAgent(Protocol):
    """What an agent's core does with the channel. None of these may block."""

    def join(self, challenge: Challenge, now: int) -> Join | RelayJoin:
        """The join that answers a challenge, freshly signed, with the next incarnation."""

    def receive(self, frame: Frame, now: int) -> None:
        """A frame of the portal, the init first; heartbeats, the portal's doors and the disconnect
        are kept back."""

    def channel_lost(self, now: int) -> None:
        """The connection on which `join` was called is over; another will call `join` again."""


class Refused(Exception):
    """The portal says not to come again. `code` and `detail` are its own words."""

    def __init__(self, code: RefusalCode, detail: str) -> None:
        printable = "".join(c if c.isprintable() else "?" for c in detail)
        super().__init__(f"the portal refused: {code}" + (f": {printable}" if printable else ""))
        self.code: RefusalCode = code
        self.detail = printable


@attrs.frozen(kw_only=True)
class DialerOptions:
    """The times of an agent's channel.

    A heartbeat goes out every `heartbeat_interval_ns`; `missed_heartbeats` without an answer end
    the connection. When nothing at all was heard for `doubt_after_ns` after one, the portal is
    probed every `probe_interval_ns`, and the connection ends when that is not answered within
    `doubt_timeout_ns`; after a poke (the network changed, and may need a moment) within
    `probe_timeout_ns`. `answer_timeout_ns` is for the portal's answer to a join. The back-off
    doubles from `backoff_base_ns` to `backoff_cap_ns`. An agent that lost one door goes to another
    within `move_jitter_ns`. Gateways and relays send a keepalive every `keepalive_interval_ns`, by
    which they learn of their node's end while nobody asks for anything.
    """

    heartbeat_interval_ns: int = 10 * NS_PER_S
    missed_heartbeats: int = 3
    keepalive_interval_ns: int = NS_PER_S
    answer_timeout_ns: int = 30 * NS_PER_S
    doubt_after_ns: int = 3 * NS_PER_S
    doubt_timeout_ns: int = 3 * NS_PER_S
    probe_timeout_ns: int = 5 * NS_PER_S
    probe_interval_ns: int = NS_PER_S // 2
    backoff_base_ns: int = NS_PER_S
    backoff_cap_ns: int = 60 * NS_PER_S
    move_jitter_ns: int = NS_PER_S // 4
    quic: QuicLimits = QuicLimits(
        receive_window_bytes=PORTAL_FRAME_LIMIT,
        send_buffer_bytes=1024 * 1024,
        handshake_timeout_ns=5 * NS_PER_S,
    )


@attrs.frozen(kw_only=True)
class DialerStatistics:
    """What a dialer did since it was made; `round_trip_ns` is of the last heartbeat, `door` where
    it is or was last, `doors` how many it knows."""

    connected: bool
    door: str
    doors: int
    dials: int
    connections: int
    frames_sent: int
    frames_received: int
    unknown_events: int
    stale_frames: int
    round_trip_ns: int | None
    last_error: str


class Backoff:
    """When to dial again: a uniformly random time below a bound that doubles with each failure."""

    def __init__(self, options: DialerOptions, randomness: Randomness) -> None:
        self._options = options
        self._randomness = randomness
        self._failures = 0

    def delay_ns(self, retry_after_ns: int = 0) -> int:
        """The wait before the next attempt, which counts as failed until `succeeded`.

        `retry_after_ns` is what the portal asked for: never less, and spread by a quarter more.
        """
        exponent = min(self._failures, 30)
        bound = min(self._options.backoff_cap_ns, self._options.backoff_base_ns << exponent)
        self._failures += 1
        jitter = self._randomness.integer(max(1, max(bound, retry_after_ns // 4)))
        return retry_after_ns + jitter

    def succeeded(self) -> None:
        """The portal took us in: the next failure is the first."""
        self._failures = 0


class AgentSession:
    """One connection of an agent, a core.

    `send` passes bytes to the transport and says whether they were taken; `ping` has it ask the
    portal's transport for a sign of life, which is told to `alive`; `keepalive` has it send what
    nothing answers but a machine whose port is closed. `highest_epoch` is what earlier connections
    have seen; `learned` gets the portal's doors when it tells them. The session is over once
    `outcome` is set: the portal's `Disconnect`, or a text saying what was wrong; the transport's
    own end is the shell's to see.
    """

    def __init__(
        self,
        agent: ChannelAgent,
        events: Mapping[str, type],
        *,
        send: Callable[[bytes], bool],
        ping: Callable[[], None],
        keepalive: Callable[[], None],
        learned: Callable[[Sequence[str]], None],
        options: DialerOptions,
        highest_epoch: int,
        now: int,
    ) -> None:
        self._agent = agent
        self._send = send
        self._ping = ping
        self._keepalive = keepalive
        self._learned = learned
        self._options = options
        self._decoder = FrameDecoder(events, PORTAL_FRAME_LIMIT, reassembly_limit=REASSEMBLY_LIMIT)
        self._answer_deadline: int | None = now + options.answer_timeout_ns
        self._heartbeat_at: int | None = None
        self._keepalive_at: int | None = None
        self._doubt_at: int | None = None
        self._probe_at: int | None = None
        self._probe_deadline: int | None = None
        self._unanswered = 0
        self._more_held: deque[MoreHeld] = deque()
        self.highest_epoch = highest_epoch
        self.joined = False
        self.connected = False
        self.outcome: Disconnect | str | None = None
        self.stale_frames = 0
        self.frames_sent = 0
        self.frames_received = 0
        self.round_trip_ns: int | None = None

    @property
    def unknown_events(self) -> int:
        return self._decoder.statistics().unknown_events

    def receive(self, data: bytes, now: int) -> None:
        """Take bytes of the portal. Raises RemoteProtocolError: the connection is to be ended."""
        self.alive()
        self._decoder.push(data)
        while self.outcome is None and (frame := self._decoder.next_frame()) is not None:
            self._handle(frame, now)

    def send(self, message: object, *, ref: int | None = None) -> bool:
        """Send a message of the agent; False when not connected, or when too much is under way.
        Raises LocalProtocolError."""
        if not self.connected or self.outcome is not None:
            return False
        return self._transmit(message, ref=ref)

    def poke(self, now: int) -> None:
        """The network may have changed: probe at once, and hear something soon, or end."""
        self._probe(now, self._options.probe_timeout_ns)

    def alive(self) -> None:
        """The portal was heard (data, or the transport's answer to a probe)."""
        self._doubt_at = self._probe_at = self._probe_deadline = None

    def poll_timeout(self) -> int:
        """When `handle_timeout` is due (ns)."""
        deadlines = (
            self._answer_deadline,
            self._heartbeat_at,
            self._keepalive_at,
            self._doubt_at,
            self._probe_at,
            self._probe_deadline,
        )
        return min(deadline for deadline in deadlines if deadline is not None)

    def handle_timeout(self, now: int) -> None:
        if self._answer_deadline is not None and now >= self._answer_deadline:
            self.outcome = "the portal did not answer the join"
        elif self._probe_deadline is not None and now >= self._probe_deadline:
            self.outcome = "no answer to a probe"
        elif self._probe_at is not None and now >= self._probe_at:
            self._probe_at = now + self._options.probe_interval_ns
            self._ping()
        elif self._doubt_at is not None and now >= self._doubt_at:
            self._doubt_at = None
            if self._probe_deadline is None:
                self._probe(now, self._options.doubt_timeout_ns)
        elif self._heartbeat_at is not None and now >= self._heartbeat_at:
            self._beat(now)
        elif self._keepalive_at is not None and now >= self._keepalive_at:
            self._keepalive_at = now + self._options.keepalive_interval_ns
            self._keepalive()

    # --- helpers -------------------------------------------------------------------------------

    def _handle(self, frame: Frame, now: int) -> None:
        self.frames_received += 1
        message = frame.message
        if isinstance(message, Disconnect):
            self.outcome = message
        elif isinstance(message, Challenge):
            self._join(message, now)
        elif not self.joined:
            raise RemoteProtocolError("unexpected_message", f"{frame.event} before the challenge")
        elif isinstance(message, Heartbeat):
            self._unanswered = 0
            if message.sent_ns <= now:
                self.round_trip_ns = now - message.sent_ns
        elif isinstance(message, HeldWanted):
            self._tell_more_held(now)
        elif not self.connected and frame.event != "init":
            raise RemoteProtocolError("unexpected_message", f"{frame.event} before the init")
        elif isinstance(message, Portals):
            self._learned(message.addresses)
        elif self._is_stale(frame):
            self.stale_frames += 1
            if frame.event == "init":
                # Whoever answers us is not the owner any more: find the one who is.
                self.outcome = "answered by a former owner of the account"
        else:
            self._answer_deadline = None
            self.connected = True
            self._agent.receive(frame, now)

    def _is_stale(self, frame: Frame) -> bool:
        if frame.epoch is None:
            return False
        if frame.epoch < self.highest_epoch:
            return True
        self.highest_epoch = frame.epoch
        return False

    def _join(self, challenge: Challenge, now: int) -> None:
        if self.joined:
            raise RemoteProtocolError("unexpected_message", "a second challenge")
        if len(challenge.nonce) != NONCE_BYTES:
            raise RemoteProtocolError("unexpected_message", "a nonce of another length")
        self.joined = True
        join, more_held = split_join(self._agent.join(challenge, now))
        self._more_held.extend(more_held)
        if not self._transmit(join):
            self.outcome = "the join could not be sent"
        self._heartbeat_at = now + self._options.heartbeat_interval_ns
        if not isinstance(join, Join) or join.kind != "client":
            self._keepalive_at = now + self._options.keepalive_interval_ns

    def _tell_more_held(self, now: int) -> None:
        if not self._more_held:
            return
        self._answer_deadline = now + self._options.answer_timeout_ns
        if not self._transmit(self._more_held.popleft()):
            self.outcome = "the join could not be sent"

    def _beat(self, now: int) -> None:
        if self._unanswered >= self._options.missed_heartbeats:
            self.outcome = f"{self._unanswered} heartbeats without an answer"
            return
        self._unanswered += 1
        if self._doubt_at is None and self._probe_deadline is None:
            self._doubt_at = now + self._options.doubt_after_ns
        self._heartbeat_at = now + self._options.heartbeat_interval_ns
        self._transmit(Heartbeat(sent_ns=now))

    def _probe(self, now: int, timeout_ns: int) -> None:
        """Ask at once, even while an earlier probe is unanswered; the first deadline holds."""
        if self._probe_deadline is None:
            self._probe_deadline = now + timeout_ns
        self._probe_at = now + self._options.probe_interval_ns
        self._ping()

    def _transmit(self, message: object, *, ref: int | None = None) -> bool:
        taken = self._send(encode_frame(message, ref=ref, limit=AGENT_FRAME_LIMIT))
        self.frames_sent += taken
        return taken


class Dialer:
    """Keeps one agent connected to its portal, for ever, by whichever door of it is open.

    `portal` is `host:port` and `pin` the CA's, both of the token; `events` the dictionary of what
    the agent understands (`TO_CLIENT` and so on). Whatever door is dialled, who answers has to show
    a certificate of that CA for the host of `portal`. `on_frame` is called after the agent was
    given frames, or told of a loss: time to see what it wants. `mark` is the socket's SO_MARK,
    `source` the address of this machine to dial from, if not any.
    """

    def __init__(
        self,
        portal: str,
        pin: bytes,
        events: Mapping[str, type],
        agent: ChannelAgent,
        clock: Clock,
        randomness: Randomness,
        *,
        mark: int | None = None,
        source: str | None = None,
        on_frame: Callable[[], None],
        options: DialerOptions | None = None,
    ) -> None:
        self._host, _ = split_host_port(portal)
        self._portal = portal
        self._pin = pin
        self._events = events
        self._agent = agent
        self._clock = clock
        self._mark = mark
        self._source = source
        self._on_frame = on_frame
        self._options = options or DialerOptions()
        self._backoff = Backoff(self._options, randomness)
        self._randomness = randomness
        self._doors = Doors(portal, randomness)
        self._addresses_by_door: dict[str, list[Address]] = {}
        self._session: AgentSession | None = None
        self._connection: QuicConnection | None = None
        self._waiting = trio.CancelScope()
        self._poked = trio.Event()
        self._highest_epoch = 0
        self._totals = _Totals()
        self._guard = Guard("dialer")

    @property
    def connected(self) -> bool:
        """The portal has taken the agent in, and the connection stands as far as is known."""
        return (
            self._session is not None
            and self._session.connected
            and self._connection is not None
            and self._connection.closed is None
        )

    def send(self, message: object, *, ref: int | None = None) -> bool:
        """Send a message; never waits. False when not connected, or too much is under way.
        Raises LocalProtocolError for what is no message, or above 64 KiB."""
        return self.connected and self._session is not None and self._session.send(message, ref=ref)

    def poke(self) -> None:
        """The network changed: probe the connection at once (so the portal learns of the new
        path, and we of a dead one), or dial at once where none stands."""
        self._poked.set()
        if self._session is None or self._connection is None:
            return
        now = self._clock.monotonic_ns()
        self._session.poke(now)
        remaining_ns = max(0, self._session.poll_timeout() - now)
        self._waiting.deadline = min(
            self._waiting.deadline, trio.current_time() + remaining_ns / NS_PER_S
        )

    async def run(self) -> None:
        """Dial, serve, dial again. Returns only by raising: Refused when the portal says not to
        come again, trio.Cancelled (the connection is then closed in good order)."""
        retry_after_ns: int | None = None
        while True:
            if retry_after_ns is not None or self._doors.round_is_over:
                await self._pause(retry_after_ns or 0)
            door = self._doors.next(self._clock.monotonic_ns())
            connections = self._totals.connections
            outcome = await self._dial(door)
            retry_after_ns = self._take_in(door, outcome)
            was_there = self._totals.connections > connections
            if was_there and retry_after_ns is None and not self._doors.round_is_over:
                jitter_ns = self._randomness.integer(max(1, self._options.move_jitter_ns))
                await trio.sleep(jitter_ns / NS_PER_S)

    def statistics(self) -> DialerStatistics:
        session, totals = self._session, self._totals
        return DialerStatistics(
            connected=self.connected,
            door=self._doors.current,
            doors=len(self._doors.known),
            dials=totals.dials,
            connections=totals.connections,
            frames_sent=totals.frames_sent + (session.frames_sent if session else 0),
            frames_received=totals.frames_received + (session.frames_received if session else 0),
            unknown_events=totals.unknown_events + (session.unknown_events if session else 0),
            stale_frames=totals.stale_frames + (session.stale_frames if session else 0),
            round_trip_ns=session.round_trip_ns if session else None,
            last_error=totals.last_error,
        )

    # --- helpers -------------------------------------------------------------------------------

    async def _pause(self, retry_after_ns: int) -> None:
        delay_ns = self._backoff.delay_ns(retry_after_ns)
        # A poke shortens the wait, but never what the portal asked for.
        least_ns = min(delay_ns, max(retry_after_ns, MIN_REDIAL_NS))
        self._poked = trio.Event()
        await trio.sleep(least_ns / NS_PER_S)
        with trio.move_on_after((delay_ns - least_ns) / NS_PER_S):
            await self._poked.wait()

    def _take_in(self, door: str, outcome: Disconnect | str) -> int | None:
        """Note how the attempt at a door ended. How long to wait because the portal said so, or
        None; raises Refused."""
        now = self._clock.monotonic_ns()
        if isinstance(outcome, str):
            self._totals.last_error = outcome
            log.warning("channel_lost", portal=self._portal, door=door, reason=outcome)
            self._doors.failed(now)
            return None
        self._totals.last_error = f"{outcome.reason} {outcome.detail}".strip()
        log.warning(
            "disconnected",
            portal=self._portal,
            door=door,
            reason=outcome.reason,
            detail=outcome.detail,
            retry=outcome.retry,
            to=outcome.door,
        )
        if not outcome.retry:
            raise Refused(outcome.reason, outcome.detail)
        if outcome.door is not None:
            return None if self._doors.sent_on(outcome.door, now) else outcome.retry_after_ns
        if outcome.reason in _ELSEWHERE:
            self._doors.sent_away(now)
            # What the node asks for is for those who come back to it.
            return outcome.retry_after_ns if self._doors.round_is_over else None
        if outcome.reason in _UNABLE:
            self._doors.failed(now)
        else:
            self._doors.left(now)
        return outcome.retry_after_ns

    async def _dial(self, door: str) -> Disconnect | str:
        """One attempt at a door, over each of its addresses until one answers; returns how it
        ended."""
        self._totals.dials += 1
        problems = await self._resolve(door)
        for address in self._addresses_by_door.get(door, ()):
            try:
                async with connect_quic(
                    address,
                    server_name=self._host,
                    alpn=ALPN,
                    verify=self._verify,
                    limits=self._options.quic,
                    mark=self._mark,
                    source=self._source,
                ) as connection:
                    return await self._serve(connection)
            except (UntrustedPortal, QuicClosed) as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{address}: {error.strerror or error}")
        return "; ".join(problems) or "the portal's name has no address"

    async def _resolve(self, door: str) -> list[str]:
        """Find a door's addresses; where that fails, those of the last time serve. What failed."""
        host, port = split_host_port(door)
        try:
            found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_DGRAM)
        except (OSError, UnicodeError) as error:  # a name that IDNA does not take
            return [f"{host}: {getattr(error, 'strerror', None) or error}"]
        addresses = dict.fromkeys(
            Address(str(entry[4][0]), int(entry[4][1]))
            for entry in found
            if "%" not in str(entry[4][0])
        )
        self._addresses_by_door[door] = list(addresses)[:MAX_ADDRESSES]
        return []

    def _learn(self, addresses: Sequence[str]) -> None:
        self._doors.learned(addresses)
        known = set(self._doors.known)
        for door in self._addresses_by_door.keys() - known:
            del self._addresses_by_door[door]
        log.info("doors_learned", portal=self._portal, doors=len(known))

    def _verify(self, chain: Sequence[Certificate]) -> None:
        verify_portal(chain, pin=self._pin, host=self._host, at=self._clock.utc_now())

    async def _serve(self, connection: QuicConnection) -> Disconnect | str:
        session = AgentSession(
            self._agent,
            self._events,
            send=connection.send,
            ping=connection.ping,
            keepalive=connection.keepalive,
            learned=self._learn,
            options=self._options,
            highest_epoch=self._highest_epoch,
            now=self._clock.monotonic_ns(),
        )
        connection.on_pong = session.alive
        self._session, self._connection = session, connection
        self._totals.connections += 1
        try:
            with self._guard:  # a frame that finds a mistake of ours costs the connection only
                try:
                    return await self._converse(session, connection)
                except RemoteProtocolError as error:
                    connection.close(CLOSE_CODES["protocol_error"], str(error))
                    return f"the portal broke the protocol: {error}"
            return "a frame of the portal could not be handled"
        finally:
            self._session = self._connection = None
            self._highest_epoch = session.highest_epoch
            self._totals.add(session)
            if session.joined:
                self._agent.channel_lost(self._clock.monotonic_ns())
                self._on_frame()

    async def _converse(
        self, session: AgentSession, connection: QuicConnection
    ) -> Disconnect | str:
        while session.outcome is None:
            remaining_ns = max(0, session.poll_timeout() - self._clock.monotonic_ns())
            with trio.move_on_after(remaining_ns / NS_PER_S) as self._waiting:
                try:
                    data = await connection.receive()
                except QuicClosed as closed:
                    return str(closed)
            now = self._clock.monotonic_ns()
            if self._waiting.cancelled_caught:
                session.handle_timeout(now)
                continue
            if not data:
                return "the portal ended its stream"
            was_connected = session.connected
            session.receive(data, now)
            if session.connected and not was_connected:
                self._backoff.succeeded()
                self._doors.entered(now)
                log.info("connected", portal=self._portal, address=str(connection.remote))
            self._on_frame()
        return session.outcome


class _Totals:
    """Sums over the sessions that are over."""

    def __init__(self) -> None:
        self.dials = self.connections = 0
        self.frames_sent = self.frames_received = 0
        self.unknown_events = self.stale_frames = 0
        self.last_error = ""

    def add(self, session: AgentSession) -> None:
        self.frames_sent += session.frames_sent
        self.frames_received += session.frames_received
        self.unknown_events += session.unknown_events
        self.stale_frames += session.stale_frames
