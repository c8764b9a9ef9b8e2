"""How an agent in the world reaches an address of its portal: what `channel.reaching` and a part of
`channel.dialer` are on trio, over streams in virtual time. QUIC is a stream of protocol "udp",
WebSocket one of "tcp"; the rules are those of `channel.transports`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from channel.agent_session import DialerOptions
from channel.transports import GOING_ON, Race, Return, TransportName
from runtime.net.address import Address
from runtime.net.quic_probe import QuicProbe
from runtime.randomness import Randomness
from simulations.net.streams import Stream
from simulations.net.world import Host

_PROTOCOLS: Final[dict[TransportName, Literal["udp", "tcp"]]] = {"quic": "udp", "websocket": "tcp"}
_TOO_LONG: Final = "the handshake took too long"


def network_towards(host: Host, address: Address) -> str:
    """The address that the host has towards another: `Reach.network`."""
    return (host.ipv6 if ":" in address.host else host.ipv4) or ""


def handshake_timeout_ns(options: DialerOptions, transport: TransportName) -> int:
    limits = options.quic if transport == "quic" else options.websocket
    return limits.handshake_timeout_ns


class Racing:
    """A race to one address. `won` gets who was first, still without owner; `lost` why nobody came
    in. Exactly one of them is called, once, and not after `call_off`."""

    def __init__(
        self,
        host: Host,
        address: Address,
        websocket_after_ns: int,
        options: DialerOptions,
        *,
        won: Callable[[TransportName, Stream], None],
        lost: Callable[[str], None],
    ) -> None:
        self._host = host
        self._address = address
        self._options = options
        self._won = won
        self._lost = lost
        self._rule = Race(websocket_after_ns, self._now)
        self._streams: dict[TransportName, Stream] = {}
        self._deadlines: dict[TransportName, int] = {}

    def poll_timeout(self) -> int | None:
        due = self._rule.poll_timeout()
        return min((*self._deadlines.values(), *(() if due is None else (due,))), default=None)

    def handle_timeout(self, now: int) -> None:
        for name, deadline in list(self._deadlines.items()):
            if deadline <= now and name in self._streams:
                self._streams[name].close(0, _TOO_LONG)
                self._failed(name, _TOO_LONG)
        for name in self._rule.begin(now):
            self._begin(name, now)

    def call_off(self, reason: str) -> None:
        """Nobody wants to arrive any more."""
        streams, self._streams = self._streams, {}
        self._deadlines.clear()
        for stream in streams.values():
            stream.close(0, reason)

    def _begin(self, name: TransportName, now: int) -> None:
        self._deadlines[name] = now + handshake_timeout_ns(self._options, name)
        self._streams[name] = self._host.connect(
            self._address,
            protocol=_PROTOCOLS[name],
            opened=lambda: self._opened(name),
            received=lambda data: None,
            closed=lambda code, reason: self._failed(name, reason),
        )

    def _opened(self, name: TransportName) -> None:
        if name in self._streams and self._rule.opened(name):
            winner = self._streams.pop(name)
            self.call_off("the other transport was first")
            self._won(name, winner)

    def _failed(self, name: TransportName, why: str) -> None:
        if self._streams.pop(name, None) is None:
            return
        del self._deadlines[name]
        self._rule.failed(name, why, self._now)
        if self._rule.is_over:
            self._lost("; ".join(self._rule.problems))
        else:
            self.handle_timeout(self._now)

    @property
    def _now(self) -> int:
        return self._host.clock.monotonic_ns()


class Returning:
    """The way from WebSocket back to QUIC, beside the stream `older`.

    `leave` is called when the older one is to be ended, for GOING_ON; the portal has heard of that
    a round trip later, when `join` gets the new stream, with what has come over it already. Both
    are called at most once, and not after `call_off`, which ends what is under way.
    """

    def __init__(
        self,
        host: Host,
        address: Address,
        older: Stream,
        options: DialerOptions,
        randomness: Randomness,
        *,
        leave: Callable[[str], None],
        join: Callable[[Stream, bytes], None],
        touched: Callable[[], None],
    ) -> None:
        self._host = host
        self._address = address
        self._older = older
        self._options = options
        self._randomness = randomness
        self._leave = leave
        self._join = join
        self._touched = touched
        self._rule = Return(options.transports, randomness, self._now)
        self._probe: QuicProbe | None = None
        self._port = 0
        self._stream: Stream | None = None
        self._deadline: int | None = None
        self._heard = b""

    @property
    def began(self) -> bool:
        """The older stream is left."""
        return self._rule.began

    def hurry(self, now: int) -> None:
        """The network is another one."""
        self._rule.hurry(now)

    def poll_timeout(self) -> int | None:
        probe_at = None if self._probe is None else self._probe.poll_timeout()
        due = (self._rule.poll_timeout(), probe_at, self._deadline)
        return min((each for each in due if each is not None), default=None)

    def handle_timeout(self, now: int) -> None:
        if self._rule.begin(now):
            self._ask(now)
        if self._probe is not None:
            self._look(self._probe, now)
        if self._deadline is not None and self._deadline <= now:
            self._deadline = None
            stream, heard = self._stream, self._heard
            assert stream is not None
            if self.began:
                self._stream = None
                self._join(stream, heard)
            else:
                stream.close(0, _TOO_LONG)
                self._failed()

    def call_off(self, reason: str) -> None:
        """The stay is over, or the process is."""
        self._end_probe()
        self._deadline = None
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close(0, reason)

    # --- helpers ---

    def _ask(self, now: int) -> None:
        self._probe = probe = QuicProbe(self._randomness.bytes, now)
        self._port = self._host.ephemeral_port()

        def receive(data: bytes, source: Address, local: Address) -> None:
            if source == self._address:
                probe.receive(data)
                self._touched()
                self._look(probe, self._now)

        self._host.bind(self._port, receive)

    def _look(self, probe: QuicProbe, now: int) -> None:
        """Go on by what the probe says."""
        if self._probe is not probe:
            return
        if (question := probe.handle_timeout(now)) is not None:
            self._host.send(self._port, self._address, question)
        if probe.outcome is None:
            return
        self._end_probe()
        if self._rule.answered(probe.outcome, now):
            self._dial(now)

    def _end_probe(self) -> None:
        if self._probe is not None:
            self._probe = None
            self._host.unbind(self._port)

    def _dial(self, now: int) -> None:
        self._heard = b""
        self._deadline = now + handshake_timeout_ns(self._options, "quic")
        stream = self._host.connect(
            self._address,
            protocol="udp",
            opened=self._opened,
            received=lambda data: self._received(stream, data),
            closed=lambda code, reason: self._closed(stream),
        )
        self._stream = stream

    def _opened(self) -> None:
        self._deadline = None
        self._touched()

    def _received(self, stream: Stream, data: bytes) -> None:
        if stream is not self._stream:
            return
        self._heard += data
        if self.began:
            return
        stands = self._older.state == "open"
        if self._rule.challenged(data, self._now, older_stands=stands):
            self._deadline = self._now + self._older.round_trip_ns
            self._leave(GOING_ON)
        else:
            stream.close(0, "")
            self._stream = None
        self._touched()

    def _closed(self, stream: Stream) -> None:
        if stream is self._stream and not self.began:
            self._failed()

    def _failed(self) -> None:
        self._stream = self._deadline = None
        self._rule.failed(self._now)
        self._touched()

    @property
    def _now(self) -> int:
        return self._host.clock.monotonic_ns()
