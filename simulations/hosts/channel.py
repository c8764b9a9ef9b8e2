"""An agent's end of the control channel in the world: the real `AgentSession`, `Backoff`, `Doors`
and `TransportMemory` over streams, by the rules of `channel.dialer.Dialer`, whose shell this is in
virtual time. `simulations.hosts.reaching` has the race of QUIC and WebSocket, and the way back.

All that one event has an agent say leaves together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from channel.credentials import DecodedToken
from channel.dialer import MAX_ADDRESSES, AgentSession, Backoff, ChannelAgent, DialerOptions
from channel.doors import Doors
from channel.frames import CLOSE_CODES, Frame, RemoteProtocolError
from channel.messages import Challenge, Disconnect, Join, RelayJoin
from channel.transports import TransportMemory, TransportName, is_left_behind
from runtime.net.address import Address, split_host_port
from runtime.randomness import Randomness
from simulations.hosts.reaching import Racing, Returning, network_towards
from simulations.net.streams import Stream
from simulations.net.world import Host, World

Lookup = Callable[[str], Sequence[str]]
"""The addresses of a name, or of an address itself."""


class ChannelOwner(Protocol):
    """Whose channel it is."""

    host: Host
    world: World

    def channel_touched(self) -> None:
        """There may be something to send, and another timeout."""

    def channel_refused(self, outcome: Disconnect) -> None:
        """The portal says not to come again: the process ends."""


class AgentChannel:
    """Keeps an agent connected for as long as it runs. Its owner calls `handle_timeout` at
    `poll_timeout`, and `flush` after whatever touched it."""

    def __init__(
        self,
        owner: ChannelOwner,
        agent: ChannelAgent,
        events: Mapping[str, type],
        token: DecodedToken,
        randomness: Randomness,
        *,
        now: int,
        lookup: Lookup,
        options: DialerOptions | None = None,
        heard: Callable[[object, int | None], None] | None = None,
    ) -> None:
        self._owner = owner
        self._lookup = lookup
        self.transport: TransportName | None = None
        self._agent = _Overheard(agent, heard) if heard is not None else agent
        self._events = events
        self._options = options or DialerOptions()
        self._randomness = randomness
        self._backoff = Backoff(self._options, randomness)
        self._doors = Doors(token.portal, randomness)
        self._memory = TransportMemory(self._options.transports)
        self._addresses: list[Address] = []
        self._problems: list[str] = []
        self._racing: Racing | None = None
        self._returning: Returning | None = None
        self._stream: Stream | None = None
        self._bound_to = ""
        self._outbox: list[bytes] = []
        self._session: AgentSession | None = None
        self._highest_epoch = 0
        self._deadline: int | None = now
        self._earliest = now
        self.door = ""
        self.dials = self.connections = self.moves = 0
        self.last_error = ""
        self.is_over = False

    # --- for the owner ---------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether the portal has taken the agent in."""
        return self._session is not None and self._session.connected

    def send(self, message: object, *, ref: int | None = None) -> bool:
        """See `Dialer.send`."""
        return self._session is not None and self._session.send(message, ref=ref)

    def poke(self, now: int) -> None:
        """The network changed: see `Dialer.poke`."""
        if self._returning is not None:
            self._returning.hurry(now)
        if self._stream is not None and self._session is not None:
            network = network_towards(self._owner.host, self._stream.remote)
            if self.transport is not None and is_left_behind(
                self.transport, self._bound_to, network
            ):
                address = self._stream.remote
                self._leave("the network is another one")
                self._meet(address)
            else:
                self._session.poke(now)
        elif self._deadline is not None:
            self._deadline = max(self._earliest, now)

    def poll_timeout(self) -> int | None:
        """When `handle_timeout` is due."""
        due = [self._deadline]
        for part in (self._racing, self._returning, self._session):
            if part is not None:
                due.append(part.poll_timeout())
        return min((each for each in due if each is not None), default=None)

    def handle_timeout(self, now: int) -> None:
        if self._racing is not None:
            self._racing.handle_timeout(now)
        if self._returning is not None:
            self._returning.handle_timeout(now)
        session = self._session
        if session is not None and session.poll_timeout() <= now:
            session.handle_timeout(now)
            self._look(now)
        if self._deadline is not None and self._deadline <= now and not self.is_over:
            self._dial(now)

    def flush(self) -> None:
        """Put out what there is to send."""
        if self._outbox and self._stream is not None and self._session is not None:
            self._stream.send(b"".join(self._outbox))
            self._outbox.clear()

    def close(self, reason: str) -> None:
        """The process ends in good order."""
        self.is_over = True
        stream, self._stream, self._session = self._stream, None, None
        self._deadline = None
        self._call_off(reason)
        if stream is not None:
            stream.close(0, reason)

    def insist(self, at: int) -> None:
        """Come again at an instant, though the portal said not to."""
        self.is_over = False
        self._deadline = self._earliest = at
        self._owner.channel_touched()

    def end_connection(self, now: int) -> None:
        """The connection breaks off, for whatever reason: dial again."""
        if self._session is not None:
            self._ended("broken off", now)

    # --- the stream ------------------------------------------------------------------------------

    def _dial(self, now: int) -> None:
        self.door = self._doors.next(now)
        self.dials += 1
        self._deadline = None
        self._problems = []
        self._addresses = self._resolve(self.door)[:MAX_ADDRESSES]
        self._try_next()

    def _try_next(self) -> None:
        """The next address of the door, or another door."""
        if self._addresses:
            self._meet(self._addresses.pop(0))
            return
        now = self._now()
        problems = "; ".join(self._problems) or "no address of the portal is of our families"
        self._again(self._take_in(problems, now), now)

    def _resolve(self, door: str) -> list[Address]:
        """The addresses of a door that this host can dial, IPv6 first (RFC 6724)."""
        name, port = split_host_port(door)
        host = self._owner.host
        found = self._lookup(name)
        return [
            Address(ip, port)
            for ip in sorted(found, key=lambda each: ":" not in each)
            if (host.ipv6 if ":" in ip else host.ipv4)
        ]

    def _meet(self, address: Address) -> None:
        """A stay at an address, over one transport and perhaps then over QUIC: `Dialer._meet`."""
        host = self._owner.host
        self._outbox.clear()
        self._racing = Racing(
            host,
            address,
            self._memory.websocket_after_ns(network_towards(host, address)),
            self._options,
            won=self._won,
            lost=partial(self._lost, address),
        )
        self._racing.handle_timeout(self._now())
        self._owner.channel_touched()

    def _lost(self, address: Address, why: str) -> None:
        self._racing = None
        self._problems.append(f"{address}: {why}")
        self._try_next()

    def _won(self, transport: TransportName, stream: Stream) -> None:
        self._racing = None
        if transport == "websocket":
            self._returning = Returning(
                self._owner.host,
                stream.remote,
                stream,
                self._options,
                self._randomness,
                leave=self._leave,
                join=self._join,
                touched=self._owner.channel_touched,
            )
        self._serve(transport, stream)

    def _leave(self, reason: str) -> None:
        """End the connection in good order, for another one to the same address."""
        stream, self._stream = self._stream, None
        self._end_session(self._now())
        if self._returning is not None and not self._returning.began:
            self._call_off(reason)
        if stream is not None:
            stream.close(0, reason)

    def _join(self, stream: Stream, begun: bytes) -> None:
        """The portal has heard that we left: go on over QUIC, where this came already."""
        self._returning = None
        self.moves += 1
        self._serve("quic", stream)
        if stream.state == "closed":
            self._ended("the new connection ended before the older one was left", self._now())
        else:
            self._received(stream, begun)

    def _serve(self, transport: TransportName, stream: Stream) -> None:
        """`Dialer._serve`: one session on a stream that is open."""
        now = self._now()
        self.transport = transport
        self._stream = stream
        self._outbox.clear()
        self._bound_to = network_towards(self._owner.host, stream.remote)
        self._memory.worked(self._bound_to, transport)
        self.connections += 1
        self._session = AgentSession(
            self._agent,
            self._events,
            send=self._take,
            ping=stream.ping,
            keepalive=stream.keepalive,
            learned=self._doors.learned,
            options=self._options,
            highest_epoch=self._highest_epoch,
            now=now,
        )
        stream.received = partial(self._received, stream)
        stream.closed = partial(self._closed, stream)
        stream.ponged = self._ponged
        self._owner.channel_touched()

    def _ponged(self) -> None:
        if self._session is not None:
            self._session.alive()
            self._owner.channel_touched()

    def _received(self, stream: Stream, data: bytes) -> None:
        session = self._session
        if session is None or stream is not self._stream:
            return
        now = self._now()
        was_connected = session.connected
        try:
            session.receive(data, now)
        except RemoteProtocolError as error:
            stream.close(CLOSE_CODES["protocol_error"], str(error))
            self._ended(f"the portal broke the protocol: {error}", now)
            return
        if session.connected and not was_connected:
            self._backoff.succeeded()
            self._doors.entered(now)
        self._look(now)

    def _closed(self, stream: Stream, code: int, reason: str) -> None:
        if stream is self._stream and not self.is_over:
            self._ended(reason, self._now())

    def _take(self, data: bytes) -> bool:
        self._outbox.append(data)
        return True

    # --- ends ------------------------------------------------------------------------------------

    def _look(self, now: int) -> None:
        """Whether the session is over by its own word."""
        session = self._session
        if session is not None and session.outcome is not None:
            self.flush()
            self._ended(session.outcome, now)
        else:
            self._owner.channel_touched()

    def _ended(self, outcome: Disconnect | str, now: int) -> None:
        """What was a connection is over."""
        stream, self._stream = self._stream, None
        self._end_session(now)
        self._call_off("")
        if stream is not None:
            stream.close(0, "")
        if isinstance(outcome, Disconnect) and not outcome.retry:
            self.last_error = outcome.reason
            self.is_over = True
            self._deadline = None
            self._owner.channel_refused(outcome)
            return
        self._again(self._take_in(outcome, now), now, was_there=True)

    def _end_session(self, now: int) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        self._highest_epoch = session.highest_epoch
        if session.joined:
            self._agent.channel_lost(now)

    def _call_off(self, reason: str) -> None:
        """What is under way beside a connection, or to one."""
        racing, self._racing = self._racing, None
        returning, self._returning = self._returning, None
        for each in (racing, returning):
            if each is not None:
                each.call_off(reason)

    def _again(self, retry_after_ns: int | None, now: int, *, was_there: bool = False) -> None:
        """When to dial next: `Dialer.run`."""
        self._deadline = self._earliest = now
        if retry_after_ns is not None or self._doors.round_is_over:
            least_ns, delay_ns = self._backoff.window_ns(retry_after_ns or 0)
            self._earliest, self._deadline = now + least_ns, now + delay_ns
        elif was_there:
            jitter = self._randomness.integer(max(1, self._options.move_jitter_ns))
            self._earliest = self._deadline = now + jitter
        self._owner.channel_touched()

    def _take_in(self, outcome: Disconnect | str, now: int) -> int | None:
        """`Dialer._take_in`: how long to wait because the portal said so, or None."""
        self.last_error = (
            outcome if isinstance(outcome, str) else f"{outcome.reason} {outcome.detail}".strip()
        )
        return self._doors.ended(outcome, now)

    def _now(self) -> int:
        return self._owner.host.clock.monotonic_ns()


class _Overheard:
    """An agent, and somebody who hears what it is told."""

    def __init__(self, agent: ChannelAgent, heard: Callable[[object, int | None], None]) -> None:
        self._agent = agent
        self._heard = heard
        self.join: Callable[[Challenge, int], Join | RelayJoin] = agent.join
        self.channel_lost: Callable[[int], None] = agent.channel_lost

    def receive(self, frame: Frame, now: int) -> None:
        self._heard(frame.message, frame.epoch)
        self._agent.receive(frame, now)
