"""An agent's end of the control channel in the world: the real `AgentSession`, `Backoff`, `Doors`
over a stream, by the rules of `channel.dialer.Dialer`, whose shell this is in virtual time.

A door is tried over "udp" (QUIC), and where that does not open within its handshake's time, over
"tcp"; the one that opened is tried first from then on, until the network changes. All
that one event has an agent say leaves together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

from channel.credentials import DecodedToken
from channel.dialer import AgentSession, Backoff, ChannelAgent, DialerOptions
from channel.doors import Doors
from channel.frames import CLOSE_CODES, Frame, RemoteProtocolError
from channel.messages import Challenge, Disconnect, Join, RelayJoin
from runtime.net.address import Address, split_host_port
from runtime.randomness import Randomness
from simulations.net.streams import Stream
from simulations.net.world import Host, World

Transport = Literal["udp", "tcp"]
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
        self.transport: Transport = "udp"
        self._agent = _Overheard(agent, heard) if heard is not None else agent
        self._events = events
        self._options = options or DialerOptions()
        self._randomness = randomness
        self._backoff = Backoff(self._options, randomness)
        self._doors = Doors(token.portal, randomness)
        self._transports: tuple[Transport, ...] = ("udp", "tcp")
        self._attempt = 0
        self._attempts: list[tuple[Address, Transport]] = []
        self._stream: Stream | None = None
        self._outbox: list[bytes] = []
        self._session: AgentSession | None = None
        self._highest_epoch = 0
        self._deadline: int | None = now
        self._earliest = now
        self.door = ""
        self.dials = self.connections = 0
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
        self._transports = ("udp", "tcp")
        if self._session is not None:
            self._session.poke(now)
        elif self._stream is None and self._deadline is not None:
            self._deadline = max(self._earliest, now)

    def poll_timeout(self) -> int | None:
        """When `handle_timeout` is due."""
        return self._deadline if self._session is None else self._session.poll_timeout()

    def handle_timeout(self, now: int) -> None:
        session = self._session
        if session is not None:
            if session.poll_timeout() <= now:
                session.handle_timeout(now)
                self._look(now)
        elif self._deadline is None or now < self._deadline or self.is_over:
            return
        elif self._stream is None:
            self._dial(now)
        else:
            self._stream.close(0, "no answer to the handshake")
            self._stream = None
            self._not_opened("the handshake took too long", now)

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
        self._attempt = 0
        self._attempts = [
            (address, transport)
            for transport in self._transports
            for address in self._resolve(self.door)
        ]
        if self._attempts:
            self._connect(now)
        else:
            self._again(self._take_in("no address of the portal is of our families", now), now)

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

    def _connect(self, now: int) -> None:
        address, self.transport = self._attempts[self._attempt]
        self._deadline = now + self._options.quic.handshake_timeout_ns
        self._outbox.clear()
        stream = self._owner.host.connect(
            address,
            protocol=self.transport,
            opened=lambda: self._opened(stream),
            received=lambda data: self._received(stream, data),
            closed=lambda code, reason: self._closed(stream, reason),
        )
        self._stream = stream

    def _opened(self, stream: Stream) -> None:
        if stream is not self._stream or self.is_over:
            stream.close(0, "too late")
            return
        now = self._now()
        self._transports = ("udp", "tcp") if self.transport == "udp" else ("tcp", "udp")
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

    def _closed(self, stream: Stream, reason: str) -> None:
        if stream is not self._stream or self.is_over:
            return
        if self._session is not None:
            self._ended(reason, self._now())
        else:
            self._stream = None
            self._not_opened(reason, self._now())

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

    def _not_opened(self, reason: str, now: int) -> None:
        if self._attempt + 1 < len(self._attempts):
            self._attempt += 1
            self._connect(now)
            self._owner.channel_touched()
            return
        self._again(self._take_in(reason, now), now)

    def _ended(self, outcome: Disconnect | str, now: int) -> None:
        """What was a connection is over."""
        session, self._session = self._session, None
        stream, self._stream = self._stream, None
        assert session is not None
        if stream is not None:
            stream.close(0, "")
        self._highest_epoch = session.highest_epoch
        if session.joined:
            self._agent.channel_lost(now)
        if isinstance(outcome, Disconnect) and not outcome.retry:
            self.last_error = outcome.reason
            self.is_over = True
            self._deadline = None
            self._owner.channel_refused(outcome)
            return
        self._again(self._take_in(outcome, now), now, was_there=True)

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
