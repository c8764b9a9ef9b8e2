"""An agent's end of the control channel.

`channel.agent_session` has the cores: one connection's life, and the rule of when to try again;
`channel.doors` that of where, `channel.transports` that of how: the race between QUIC and
WebSocket, and the way back to QUIC. `Dialer` is the shell around them: it resolves, has
`channel.reaching` dial and prove the portal by its pin before a byte is sent, keeps time, and
starts over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import attrs
import trio

from channel.agent_session import AgentSession, Backoff, ChannelAgent, DialerOptions
from channel.credentials import UntrustedPortal
from channel.doors import Doors
from channel.frames import CLOSE_CODES, RemoteProtocolError
from channel.messages import Disconnect, RefusalCode, Rejoining
from channel.reaching import Reach, Unreached
from channel.transports import (
    GOING_ON,
    Return,
    TransportMemory,
    TransportName,
    is_left_behind,
)
from runtime.clock import NS_PER_S, Clock
from runtime.guard import Guard
from runtime.net.address import Address, split_host_port
from runtime.net.connection import Connection, ConnectionClosed
from runtime.net.tcp import has_address
from runtime.net.websocket import WebSocketConnection
from runtime.randomness import Randomness
from runtime.service import get_logger

__all__ = [
    "AgentSession",
    "Backoff",
    "ChannelAgent",
    "Dialer",
    "DialerOptions",
    "DialerStatistics",
    "Refused",
]

MAX_ADDRESSES: Final = 8
_ROAMED: Final = "the network is another one"
_REJOIN_LINGER_NS: Final = NS_PER_S

log = get_logger("dialer")


class Refused(Exception):
    """The portal says not to come again. `code` and `detail` are its own words."""

    def __init__(self, code: RefusalCode, detail: str) -> None:
        printable = "".join(c if c.isprintable() else "?" for c in detail)
        super().__init__(f"the portal refused: {code}" + (f": {printable}" if printable else ""))
        self.code: RefusalCode = code
        self.detail = printable


@attrs.frozen(kw_only=True)
class DialerStatistics:
    """What a dialer did since it was made; `round_trip_ns` is of the last heartbeat, `door` where
    it is or was last and `transport` by what, `doors` how many it knows, `moves` how often it went
    from WebSocket back to QUIC."""

    connected: bool
    door: str
    transport: TransportName | None
    doors: int
    dials: int
    connections: int
    moves: int
    frames_sent: int
    frames_received: int
    unknown_events: int
    stale_frames: int
    round_trip_ns: int | None
    last_error: str


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
        self._portal = portal
        self._events = events
        self._agent = agent
        self._clock = clock
        self._on_frame = on_frame
        self._options = options or DialerOptions()
        self._reach = Reach(
            portal=portal, pin=pin, clock=clock, options=self._options, mark=mark, source=source
        )
        self._memory = TransportMemory(self._options.transports)
        self._transport: TransportName | None = None
        self._backoff = Backoff(self._options, randomness)
        self._randomness = randomness
        self._doors = Doors(portal, randomness)
        self._addresses_by_door: dict[str, list[Address]] = {}
        self._session: AgentSession | None = None
        self._connection: Connection | None = None
        self._left_behind: Connection | None = None
        self._waiting = trio.CancelScope()
        self._poked = trio.Event()
        self._look_for_quic = trio.Event()
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
        path, and we of a dead one), or dial at once where none stands, or the one that stands
        cannot follow."""
        self._poked.set()
        self._look_for_quic.set()
        if self._session is None or self._connection is None:
            return
        if self._is_left_behind(self._connection):
            self._left_behind = self._connection
            self._connection.close(0, _ROAMED)
            return
        now = self._clock.monotonic_ns()
        self._session.poke(now)
        remaining_ns = max(0, self._session.poll_timeout() - now)
        self._waiting.deadline = min(
            self._waiting.deadline, trio.current_time() + remaining_ns / NS_PER_S
        )

    def join_anew(self) -> None:
        """What a relay says of itself is another thing now: close the connection, so that the next
        one begins with another `join`, after telling the portal that it follows at once."""
        if self._connection is not None and self.send(Rejoining()):
            self._left_behind = self._connection
            self._connection.close(0, _ROAMED, linger_ns=_REJOIN_LINGER_NS)

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
            transport=self._transport,
            doors=len(self._doors.known),
            dials=totals.dials,
            connections=totals.connections,
            moves=totals.moves,
            frames_sent=totals.frames_sent + (session.frames_sent if session else 0),
            frames_received=totals.frames_received + (session.frames_received if session else 0),
            unknown_events=totals.unknown_events + (session.unknown_events if session else 0),
            stale_frames=totals.stale_frames + (session.stale_frames if session else 0),
            round_trip_ns=session.round_trip_ns if session else None,
            last_error=totals.last_error,
        )

    # --- helpers -------------------------------------------------------------------------------

    def _now(self) -> int:
        return self._clock.monotonic_ns()

    async def _pause(self, retry_after_ns: int) -> None:
        least_ns, delay_ns = self._backoff.window_ns(retry_after_ns)  # a poke shortens the wait
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
            return self._doors.ended(outcome, now)
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
        return self._doors.ended(outcome, now)

    async def _dial(self, door: str) -> Disconnect | str:
        """One attempt at a door, over each of its addresses until one answers; returns how it
        ended."""
        self._totals.dials += 1
        problems = await self._resolve(door)
        for address in self._addresses_by_door.get(door, ()):
            try:
                while (outcome := await self._meet(address)) == _ROAMED:
                    pass
            except (Unreached, OSError) as error:
                problems.append(f"{address}: {getattr(error, 'strerror', None) or error}")
            else:
                return outcome
        return "; ".join(problems) or "the portal's name has no address"

    async def _meet(self, address: Address) -> Disconnect | str:
        """A stay at an address, over one transport and perhaps then over QUIC; how it ended.
        Raises Unreached, OSError."""
        network = self._reach.network(address)
        move = _Move(Return(self._options.transports, self._randomness, self._now()))
        failure: Unreached | None = None
        outcome: Disconnect | str = ""
        async with trio.open_nursery() as nursery:
            try:
                async with self._reach.either(
                    address, self._memory.websocket_after_ns(network)
                ) as (transport, connection):
                    self._memory.worked(network, transport)
                    if transport == "websocket":
                        nursery.start_soon(self._return_to_quic, address, connection, move)
                    outcome = await self._serve(connection, transport)
            except Unreached as error:
                failure = error
            if move.rule.began:
                move.may_join.set()
            else:
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if move.outcome is not None:
            self._memory.worked(network, "quic")
        return outcome if move.outcome is None else move.outcome

    async def _return_to_quic(self, address: Address, older: Connection, move: _Move) -> None:
        """Move to QUIC once that works, and stay there."""
        rule = move.rule
        while not rule.began:
            await self._until_look(rule)
            if not rule.answered(await self._reach.quic_answers(address), self._now()):
                continue
            try:
                async with self._reach.quic(address) as connection:
                    challenge = await connection.receive()
                    stands = older.closed is None
                    if not rule.challenged(challenge, self._now(), older_stands=stands):
                        continue
                    older.close(0, GOING_ON)
                    await move.may_join.wait()
                    self._totals.moves += 1
                    move.outcome = await self._serve(connection, "quic", challenge)
            except (UntrustedPortal, ConnectionClosed, OSError) as error:
                rule.failed(self._now())
                log.info("quic_not_yet", portal=self._portal, reason=str(error))

    async def _until_look(self, rule: Return) -> None:
        """Wait until QUIC is to be asked, or the network is another one."""
        self._look_for_quic = trio.Event()
        while not rule.begin(now := self._now()):
            due = rule.poll_timeout()
            with trio.move_on_after(max(0, (due or now) - now) / NS_PER_S):
                await self._look_for_quic.wait()
                rule.hurry(self._now())

    def _is_left_behind(self, connection: Connection) -> bool:
        """Whether the connection is bound to an address that leads to the portal no more."""
        if not isinstance(connection, WebSocketConnection):
            return False
        try:
            network = self._reach.network(connection.remote)
        except OSError:  # no route, for now
            return not has_address(connection.local_host)
        return is_left_behind("websocket", connection.local_host, network)

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

    async def _serve(
        self, connection: Connection, transport: TransportName, begun: bytes = b""
    ) -> Disconnect | str:
        """One session on a connection, of which `begun` was received already."""
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
        self._transport = transport
        self._left_behind = None
        self._totals.connections += 1
        try:
            with self._guard:  # a frame that finds a mistake of ours costs the connection only
                try:
                    return await self._converse(session, connection, begun)
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
        self, session: AgentSession, connection: Connection, data: bytes
    ) -> Disconnect | str:
        while session.outcome is None:
            if data:
                self._hear(session, connection, data)
                data = b""
                continue
            remaining_ns = max(0, session.poll_timeout() - self._clock.monotonic_ns())
            with trio.move_on_after(remaining_ns / NS_PER_S) as self._waiting:
                try:
                    data = await connection.receive()
                except ConnectionClosed as closed:
                    return _ROAMED if connection is self._left_behind else str(closed)
            if self._waiting.cancelled_caught:
                session.handle_timeout(self._clock.monotonic_ns())
            elif not data:
                return "the portal ended its stream"
        return session.outcome

    def _hear(self, session: AgentSession, connection: Connection, data: bytes) -> None:
        now = self._clock.monotonic_ns()
        was_connected = session.connected
        session.receive(data, now)
        if session.connected and not was_connected:
            self._backoff.succeeded()
            self._doors.entered(now)
            log.info(
                "connected",
                portal=self._portal,
                address=str(connection.remote),
                transport=self._transport,
            )
        self._on_frame()


class _Move:
    """From WebSocket to QUIC: how far it is, when the older connection is gone for the portal too,
    and how the stay on the new one ended."""

    def __init__(self, rule: Return) -> None:
        self.rule = rule
        self.may_join = trio.Event()
        self.outcome: Disconnect | str | None = None


class _Totals:
    """Sums over the sessions that are over."""

    def __init__(self) -> None:
        self.dials = self.connections = self.moves = 0
        self.frames_sent = self.frames_received = 0
        self.unknown_events = self.stale_frames = 0
        self.last_error = ""

    def add(self, session: AgentSession) -> None:
        self.frames_sent += session.frames_sent
        self.frames_received += session.frames_received
        self.unknown_events += session.unknown_events
        self.stale_frames += session.stale_frames
