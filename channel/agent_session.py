"""One connection of an agent with its portal, from the challenge to the loss: a core; and the times
that it keeps. `channel.dialer` makes the connections, one after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import attrs

from channel.credentials import NONCE_BYTES
from channel.frames import (
    AGENT_FRAME_LIMIT,
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
    RelayJoin,
)
from channel.transports import TransportOptions
from runtime.clock import NS_PER_S, earliest
from runtime.net.quic_core import QuicLimits
from runtime.net.websocket_core import WebSocketLimits
from runtime.randomness import Randomness

LEAST_REDIAL_NS: Final = NS_PER_S


class ChannelAgent(Protocol):
    """What an agent's core does with the channel. None of these may block."""

    def join(self, challenge: Challenge, now: int) -> Join | RelayJoin:
        """The join that answers a challenge, freshly signed, with the next incarnation."""

    def receive(self, frame: Frame, now: int) -> None:
        """A frame of the portal, the init first; heartbeats, the portal's doors and the disconnect
        are kept back."""

    def channel_lost(self, now: int) -> None:
        """The connection on which `join` was called is over; another will call `join` again."""


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
    which they learn of their node's end while nobody asks for anything (over QUIC; TCP tells them).
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
    websocket: WebSocketLimits = WebSocketLimits(
        receive_window_bytes=PORTAL_FRAME_LIMIT,
        send_buffer_bytes=1024 * 1024,
        handshake_timeout_ns=4 * NS_PER_S,
    )
    transports: TransportOptions = TransportOptions()


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

    def window_ns(self, retry_after_ns: int = 0) -> tuple[int, int]:
        """How long to wait at least, and at most: `delay_ns`, which news of the network may cut
        short, but to no less than LEAST_REDIAL_NS and what the portal asked for."""
        delay_ns = self.delay_ns(retry_after_ns)
        return min(delay_ns, max(retry_after_ns, LEAST_REDIAL_NS)), delay_ns

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
        at = earliest(
            self._answer_deadline,
            self._heartbeat_at,
            self._keepalive_at,
            self._doubt_at,
            self._probe_at,
            self._probe_deadline,
        )
        assert at is not None  # it waits for an answer, or it beats
        return at

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
