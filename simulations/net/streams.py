"""Reliable byte streams over the paths of a world: what QUIC ("udp") and TLS over TCP ("tcp") do,
without their bytes.

How a stream works
    A stream is a conversation of packets that travel as every datagram does, through the same NATs,
    queues and partitions; so delay, loss and blocking need no model of their own. Each packet
    carries the stream's number, as QUIC's connection id. The handshake takes one round trip over
    "udp" and two over "tcp" (TCP's and TLS 1.3's); the accepting side learns of the stream with the
    first packet after it. What is sent is cut into segments of at most SEGMENT_BYTES; each is
    acknowledged, and sent again when no acknowledgement came within the time-out (RFC 6298:
    smoothed round trip and four deviations, doubled at each loss). Every second segment is
    acknowledged at once, a single one with the next that goes the other way or after ACK_DELAY_NS,
    one out of order by its number at once (RFC 9000, section 13.2; RFC 5681, section 4.2). At most
    `window` segments are under way: ten at first, one more for each acknowledged, half at each
    loss. The receiver hands them on in order, each exactly once. A corrupted packet is a lost one.

How it ends
    By `close` (the other side is told once; afterwards every packet of the stream is answered with
    the same), by silence for IDLE_NS, or by the answer of a host that does not know it (RESET), has
    no listener or process (PORT_CLOSED), or of a firewall (PROHIBITED). `closed` is called once,
    but not for one's own `close`, and not on a host that crashed.

What becomes of it when an address changes
    Over "udp" the accepting side notices packets that come from elsewhere and asks that address;
    with the answer, a round trip later, `remote` is that address and what was unacknowledged is
    sent there (RFC 9000, section 9). Over "tcp" such a packet is answered with a reset, and a host
    that moves ends its own streams. Only the connecting side can move.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal

from runtime.net.address import Address
from simulations.net.packets import TCP, UDP, Packet

if TYPE_CHECKING:
    from simulations.net.stream_endpoint import Streams

NS: Final = 10**9
MS: Final = 10**6

IDLE_TIMEOUT: Final = -1
RESET: Final = -2
HANDSHAKE_TIMEOUT: Final = -3
PORT_CLOSED: Final = -4
PROHIBITED: Final = -5
ADDRESS_LOST: Final = -6
NO_ADDRESS: Final = -7

SEGMENT_BYTES: Final = 1_170
OVERHEAD_BYTES: Final = 30
"""Of a packet, beside its IP and UDP headers: QUIC's header and tag; about TCP's and TLS's. With it
a full segment is the 1,200 bytes that every path of QUIC must carry (RFC 9000, section 14)."""
SEND_LIMIT_BYTES: Final = 4 * 1024 * 1024
IDLE_NS: Final = 15 * NS
LINGER_NS: Final = 3 * NS
ACK_DELAY_NS: Final = 25 * MS
"""RFC 9000, section 18.2 (max_ack_delay); TCP's is commonly 40 ms."""
ACK_EVERY: Final = 2
FIRST_TIMEOUT_NS: Final = 1 * NS
LEAST_TIMEOUT_NS: Final = 200 * MS
MAX_TIMEOUT_NS: Final = 60 * NS
FIRST_WINDOW: Final = 10
LEAST_WINDOW: Final = 2
MAX_WINDOW: Final = 512

Protocol = Literal["udp", "tcp"]
_NUMBERS: Final = {"udp": UDP, "tcp": TCP}

# Kinds of packets. A segment is (stream, from the client, is a first one, kind, *rest).
HELLO: Final = "hello"  # round
WELCOME: Final = "welcome"  # round
DATA: Final = "data"  # number, acknowledged are all below, the newest of them waited so long (ns)
ACK: Final = "ack"  # all below, this one too, the newest waited so long (ns)
CLOSE: Final = "close"  # code, reason
GONE: Final = "gone"  # code
ASK: Final = "ask"  # is it you, there? (PATH_CHALLENGE)
HERE: Final = "here"  # PATH_RESPONSE
PING: Final = "ping"
PONG: Final = "pong"
KEEP: Final = "keep"  # nothing, for the sake of NATs and of ICMP

REASONS: Final = {
    IDLE_TIMEOUT: "nothing came for too long",
    RESET: "the other side does not know this connection",
    HANDSHAKE_TIMEOUT: "nobody answered",
    PORT_CLOSED: "nobody listens at that port",
    PROHIBITED: "a firewall forbids it",
    ADDRESS_LOST: "the own address is gone",
    NO_ADDRESS: "no address of that family",
}


def _nothing(*_: object) -> None:
    return None


class _Sent:
    """A segment under way."""

    __slots__ = ("at", "data", "number", "times")

    def __init__(self, number: int, data: bytes) -> None:
        self.number = number
        self.data = data
        self.at = 0
        self.times = 0


class Stream:
    """One side of a stream. Made by `Host.connect`, or given to the `accept` of `Host.listen`.

    `remote` is the other side's address as this side sees it (behind its NATs), `port` the own
    port. `received(data)`, `closed(code, reason)`, `moved(address)` (`remote` changed) and
    `ponged()` (a `ping` was answered) may be set at any time.
    """

    __slots__ = (
        "_accept",
        "_ack_at",
        "_alarm_at",
        "_asked",
        "_early",
        "_heard_at",
        "_next_in",
        "_next_out",
        "_opening",
        "_owed",
        "_owed_since",
        "_round",
        "_round_trip",
        "_rounds",
        "_streams",
        "_timeouts",
        "_unacked",
        "_unsent",
        "_unsent_bytes",
        "_variation",
        "_window",
        "client",
        "closed",
        "host",
        "moved",
        "number",
        "opened",
        "ponged",
        "port",
        "protocol",
        "received",
        "remote",
        "state",
        "total_in",
        "total_out",
    )

    def __init__(
        self, streams: Streams, number: int, protocol: Protocol, port: int, remote: Address, *,
        client: bool,
    ) -> None:  # fmt: skip
        self._streams = streams
        self.host = streams.host
        self.number = number
        self.protocol: Protocol = protocol
        self.port = port
        self.remote = remote
        self.client = client
        self.state: Literal["opening", "open", "closed"] = "opening"
        self.opened: Callable[[], None] = _nothing
        self.received: Callable[[bytes], None] = _nothing
        self.closed: Callable[[int, str], None] = _nothing
        self.moved: Callable[[Address], None] = _nothing
        self.ponged: Callable[[], None] = _nothing
        self.total_in = self.total_out = 0
        self._accept: Callable[[Stream], None] = _nothing
        self._rounds = 1 if protocol == "udp" else 2
        self._round = 0
        self._opening: _Sent | None = None
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._unacked: dict[int, _Sent] = {}  # in the order of sending
        self._next_out = 0
        self._next_in = 0
        self._early: dict[int, bytes] = {}
        self._owed = 0  # segments that are not acknowledged yet
        self._owed_since = 0
        self._ack_at: int | None = None
        self._window: float = FIRST_WINDOW
        self._round_trip = 0
        self._variation = 0
        self._timeouts = 0
        self._heard_at = self.host.world.now
        self._alarm_at: int | None = None
        self._asked: Address | None = None

    # --- for its owner ---

    @property
    def local(self) -> Address:
        """The own address, as the own host knows it."""
        own = self.host.ipv6 if ":" in self.remote.host else self.host.ipv4
        return Address(own or "", self.port)

    @property
    def round_trip_ns(self) -> int:
        """Smoothed; 0 before the first measurement."""
        return self._round_trip

    def send(self, data: bytes) -> bool:
        """Put bytes into the stream, also while it opens. False (and nothing is sent) when it is
        closed or SEND_LIMIT_BYTES wait."""
        if self.state == "closed" or self._unsent_bytes + len(data) > SEND_LIMIT_BYTES:
            return False
        for start in range(0, len(data), SEGMENT_BYTES):
            self._unsent.append(data[start : start + SEGMENT_BYTES])
        self._unsent_bytes += len(data)
        self._push()
        return True

    def close(self, code: int = 0, reason: str = "") -> None:
        """End it at once: what is under way may be lost. Nothing happens the second time."""
        if self.state == "closed":
            return
        self._end()
        self._transmit(CLOSE, code, reason)
        self._streams.linger(self, code, reason)

    def ping(self) -> None:
        """Ask the other side for a sign of life, which keeps both from the idle time-out. It is
        not sent again when it is lost."""
        if self.state == "open":
            self._transmit(PING)

    def keepalive(self) -> None:
        """One byte that the other side drops: it keeps NATs awake, and where the other process is
        dead ICMP says so. Neither side's idle time-out is moved."""
        if self.state == "open":
            self._transmit(KEEP, data=b"\xff")

    # --- opening ---

    def begin(self) -> None:
        """The connecting side sends its first packet."""
        self._opening = _Sent(0, b"")
        self.host.world.after(IDLE_NS, self._watch)
        self._greet()

    def accept_with(self, accept: Callable[[Stream], None]) -> None:
        """The accepting side: call this when the handshake is done."""
        self._accept = accept
        self.host.world.after(IDLE_NS, self._watch)

    def _greet(self) -> None:
        assert self._opening is not None
        self._opening.at = self.host.world.now
        self._opening.times += 1
        self._transmit(HELLO, self._round, data=bytes(SEGMENT_BYTES))
        self._arm()

    def _welcomed(self, round_number: int) -> None:
        if self._opening is None or round_number != self._round:
            return
        if self._opening.times == 1:
            self._measure(self.host.world.now - self._opening.at)
        self._round += 1
        self._timeouts = 0
        if self._round < self._rounds:
            self._opening = _Sent(0, b"")
            self._greet()
            return
        self._opening = None
        self.state = "open"
        self._unsent.appendleft(b"")  # tells the other side that the handshake is done
        self._push()
        self.opened()

    # --- packets ---

    def receive(self, packet: Packet) -> None:
        """A packet of this stream came."""
        assert packet.segment is not None
        kind, *rest = packet.segment[3:]
        if kind == KEEP:
            return
        if packet.source != self.remote and kind != GONE and not self._follow(packet, kind):
            return
        self._heard_at = self.host.world.now
        if kind == DATA:
            if rest[1]:
                self._acknowledged(rest[1], None, rest[2])
            self._take(rest[0], packet)
        elif kind == ACK:
            self._acknowledged(*rest)
        elif kind == HELLO:
            self._transmit(WELCOME, rest[0], to=packet.source)
        elif kind == WELCOME:
            self._welcomed(rest[0])
        elif kind == CLOSE:
            self._end()
            self._streams.linger(self, *rest)
            self.closed(*rest)
        elif kind == GONE:
            self.fail(rest[0])
        elif kind == ASK:
            self._transmit(HERE, to=packet.source)
        elif kind == PING:
            self._transmit(PONG, to=packet.source)
        elif kind == PONG:
            self.ponged()

    def _follow(self, packet: Packet, kind: str) -> bool:
        """A packet came from another address than before. Whether to read it."""
        if self.protocol == "tcp":
            self._streams.refuse(packet, RESET)
            return False
        if self.client:
            return False
        if kind == HERE and packet.source == self._asked:
            self._asked = None
            self.remote = packet.source
            self._timeouts = 0
            for sent in self._unacked.values():
                self._emit(sent)
            self.moved(self.remote)
        else:
            self._asked = packet.source
            self._transmit(ASK, to=packet.source)
        return True

    def _take(self, number: int, packet: Packet) -> None:
        ready = []
        if number == self._next_in and not self._early:
            self._next_in += 1
            ready.append(packet.data)
            self._owe(packet)
        else:
            if number >= self._next_in:
                self._early[number] = packet.data
            while (data := self._early.pop(self._next_in, None)) is not None:
                self._next_in += 1
                ready.append(data)
            self._owed = 0
            self._transmit(ACK, self._next_in, number, 0, to=packet.source)
        if not self.client and self.state == "opening":
            if not ready:
                return
            self.state = "open"
            self._accept(self)
        for data in ready:
            if data and self.state != "closed":
                self.total_in += len(data)
                self.received(data)

    def _owe(self, packet: Packet) -> None:
        """A segment came in order: acknowledge it, now or soon."""
        now = self.host.world.now
        self._owed += 1
        if self._owed >= ACK_EVERY or packet.source != self.remote:
            self._owed = 0
            self._transmit(ACK, self._next_in, None, 0, to=packet.source)
            return
        self._owed_since = now
        if self._ack_at is None:
            self._ack_at = now + ACK_DELAY_NS
            self.host.world.after(ACK_DELAY_NS, self._acknowledge)

    def _acknowledge(self) -> None:
        """ACK_DELAY_NS went by since some segment came."""
        if self.state == "closed":
            return
        if self.host.paused:
            self.host.hold(self._acknowledge)
            return
        self._ack_at = None
        if not self._owed:
            return
        world = self.host.world
        held_ns = world.now - self._owed_since
        if held_ns < ACK_DELAY_NS:  # that one was acknowledged, and another came
            self._ack_at = self._owed_since + ACK_DELAY_NS
            world.after(self._ack_at - world.now, self._acknowledge)
            return
        self._owed = 0
        self._transmit(ACK, self._next_in, None, held_ns)

    def _acknowledged(self, below: int, number: int | None, held_ns: int) -> None:
        """All below a number have come to the other side, and one out of order. The newest of them
        waited so long for being acknowledged."""
        unacked = self._unacked
        done = [unacked.pop(number)] if number is not None and number in unacked else []
        while unacked and (oldest := next(iter(unacked))) < below:
            done.append(unacked.pop(oldest))
        if not done:
            return
        newest = done[-1]
        if newest.times == 1:
            self._measure(max(0, self.host.world.now - newest.at - held_ns))
        self._timeouts = 0
        self._window = min(self._window + len(done), MAX_WINDOW)
        self._push()

    def _push(self) -> None:
        """Send what the window admits."""
        if self.state != "open":
            return
        while self._unsent and len(self._unacked) < self._window:
            data = self._unsent.popleft()
            self._unsent_bytes -= len(data)
            self.total_out += len(data)
            sent = _Sent(self._next_out, data)
            self._next_out += 1
            self._unacked[sent.number] = sent
            self._emit(sent)
        self._arm()

    def _emit(self, sent: _Sent) -> None:
        now = self.host.world.now
        sent.at = now
        sent.times += 1
        held_ns = now - self._owed_since if self._owed else 0
        self._owed = 0
        self._transmit(DATA, sent.number, self._next_in, held_ns, data=sent.data)

    def _transmit(
        self, kind: str, *rest: object, data: bytes = b"", to: Address | None = None
    ) -> None:
        self._streams.transmit(
            _NUMBERS[self.protocol],
            self.port,
            to or self.remote,
            (self.number, self.client, self.client and kind == HELLO, kind, *rest),
            data,
        )

    # --- time ---

    def _measure(self, round_trip: int) -> None:
        """RFC 6298, section 2."""
        if not self._round_trip:
            self._round_trip, self._variation = round_trip, round_trip // 2
            return
        self._variation += (abs(self._round_trip - round_trip) - self._variation) // 4
        self._round_trip += (round_trip - self._round_trip) // 8

    def _timeout_ns(self) -> int:
        if not self._round_trip:
            base = FIRST_TIMEOUT_NS
        else:
            base = max(LEAST_TIMEOUT_NS, self._round_trip + 4 * self._variation)
        return min(base << min(self._timeouts, 8), MAX_TIMEOUT_NS)

    def _retry_at(self) -> int | None:
        """When the oldest of what is under way counts as lost."""
        if self._opening is not None:
            return self._opening.at + self._timeout_ns()
        if not self._unacked:
            return None
        return min(sent.at for sent in self._unacked.values()) + self._timeout_ns()

    def _arm(self) -> None:
        due = self._retry_at()
        if due is not None and (self._alarm_at is None or due < self._alarm_at):
            self._alarm_at = due
            world = self.host.world
            world.after(max(0, due - world.now), self._alarm, due)

    def _alarm(self, due: int) -> None:
        if self._alarm_at != due or self.state == "closed":
            return
        if self.host.paused:
            self.host.hold(self._alarm, due)
            return
        self._alarm_at = None
        retry_at = self._retry_at()
        if retry_at is not None and retry_at <= self.host.world.now:
            self._lost(self.host.world.now)
        self._arm()

    def _watch(self) -> None:
        """Whether the other side has been silent for too long."""
        if self.state == "closed":
            return
        if self.host.paused:
            self.host.hold(self._watch)
            return
        world = self.host.world
        left = self._heard_at + IDLE_NS - world.now
        if left > 0:
            world.after(left, self._watch)
        else:
            self.fail(IDLE_TIMEOUT if self.state == "open" else HANDSHAKE_TIMEOUT)

    def _lost(self, now: int) -> None:
        """The time-out went by: send again what is that old."""
        late = now - self._timeout_ns()
        self._timeouts += 1
        if self._opening is not None:
            self._greet()
            return
        self._window = max(self._window / 2, LEAST_WINDOW)
        for sent in list(self._unacked.values()):
            if sent.at <= late:
                self._emit(sent)

    # --- ending ---

    def fail(self, code: int) -> None:
        """It ended otherwise than by a `close`."""
        if self.state == "closed":
            return
        silent = not self.client and self.state == "opening"
        self._end()
        self._streams.forget(self)
        if not silent:
            self.closed(code, REASONS[code])

    def address_changed(self) -> None:
        if self.protocol == "tcp":
            self.host.world.after(0, self.fail, ADDRESS_LOST)
        elif self.state == "open":
            self._transmit(PING)

    def _end(self) -> None:
        self.state = "closed"
        self._unsent.clear()
        self._unacked.clear()
        self._early.clear()
        self._unsent_bytes = 0
        self._opening = None

    def vanish(self) -> None:
        """The host died."""
        self._end()

    def __repr__(self) -> str:
        return f"<stream {self.number} of {self.host.name} to {self.remote}, {self.state}>"
