"""One link between two nodes, as a core: no socket, clock or task of its own.

    connect + TLS        both sides have proved membership and name (`runtime.cluster.membership`)
    HELLO   <->  HELLO   protocol versions, name, incarnation
    READY                from the *arbiter*, the node whose name sorts first
    messages, PING, PONG

Both nodes may dial each other, and a dead link may look alive on one side, so there can be several
connections of one pair for a while. Only the arbiter says which is the link: it gives READY on one
at a time, and closes the one before first. So both always agree, and no message overtakes another.
`choose` is its rule.

A link is lost when nothing was heard for `silence_ns`; each side pings every `ping_ns`, so a peer
that is there is heard. Messages are queued up to a limit of bytes and of messages, and taken in
batches. What was queued or under way when a link is lost is lost: at most once, in order.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Any, Final

import attrs
import msgspec

from runtime.clock import NS_PER_S
from runtime.cluster.frames import (
    FIRST_MESSAGE_KIND,
    MAX_FRAME_BYTES,
    FrameSplitter,
    FrameWriter,
    LinkProtocolError,
    MessageCodec,
    frame,
)

PROTOCOL_LOW: Final = 1
PROTOCOL_HIGH: Final = 1
"""Versions of the link protocol that this code speaks."""

MAX_HELLO_BYTES: Final = 4_096
"""Length of a frame before the other side said its hello."""
MAX_REASON_CHARACTERS: Final = 200
MAX_INCARNATION: Final = 2**62

_HELLO: Final = 1
_READY: Final = 2
_PING: Final = 3
_PONG: Final = 4
_REFUSED: Final = 5


class Unreachable(Exception):
    """A message cannot go to a node: there is no link now, or the link takes no more."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"{node} is unreachable: {reason}")
        self.node = node
        self.reason = reason


class Congested(Unreachable):
    """The link stands, but its queue is full (`limit` messages, or as much in bytes): the other
    node reads too slowly."""

    def __init__(self, node: str, reason: str, limit: int) -> None:
        super().__init__(node, reason)
        self.limit = limit


class LinkRefused(Exception):
    """The other node does not want this connection; the text says why."""


class LinkLost(Exception):
    """The other node was not heard any more; the text says since when."""


@attrs.frozen(kw_only=True)
class Hello:
    """What each node says first. `incarnation` grows with each start of its process."""

    node: str
    incarnation: int
    protocol_low: int = PROTOCOL_LOW
    protocol_high: int = PROTOCOL_HIGH


@attrs.frozen(kw_only=True)
class LinkSettings:
    """Durations in nanoseconds; sizes of the queue of one link, and of a batch."""

    handshake_ns: int = 5 * NS_PER_S
    """For TCP, for TLS, and for HELLO and READY. Also how long a link is too young to be
    replaced."""
    ping_ns: int = NS_PER_S
    silence_ns: int = 3 * NS_PER_S
    stall_ns: int = 15 * NS_PER_S
    """How long a batch may take: the other node is there, but reads nothing."""
    max_queued_bytes: int = 8 * 1024 * 1024
    max_queued_messages: int = 65_536
    batch_bytes: int = 256 * 1024
    backoff_least_ns: int = NS_PER_S // 10
    backoff_most_ns: int = 5 * NS_PER_S

    def __attrs_post_init__(self) -> None:
        if not 0 < self.ping_ns < self.silence_ns <= self.stall_ns:
            raise ValueError("it must be ping < silence <= stall")
        if not 0 < self.backoff_least_ns <= self.backoff_most_ns:
            raise ValueError("back-off goes from least to most")
        least = min(self.handshake_ns, self.batch_bytes)
        if min(least, self.max_queued_bytes, self.max_queued_messages) <= 0:
            raise ValueError("durations and sizes are positive")


class LinkState(Enum):
    """Where a link is on its way; see the head of this file."""

    HELLO = "waits for the other's hello"
    UNDECIDED = "the arbiter has to choose"
    UNREADY = "waits for the arbiter"
    READY = "ready"
    CLOSED = "closed"


_READY_STATE: Final = LinkState.READY  # cheaper to look at


class Choice(Enum):
    """What the arbiter does with a new connection beside a link that stands."""

    REPLACE = "the new one becomes the link"
    REFUSE = "the link stays"


def choose(*, standing: int, candidate: int, age_ns: int, settings: LinkSettings) -> Choice:
    """The arbiter's rule, from the incarnations of the other node on both, and how long the link
    has been ready. A later life replaces an earlier. In one life, a node dials only when it has no
    link: so its link is dead, unless this one is so young that both were dialled at once."""
    if candidate != standing:
        return Choice.REPLACE if candidate > standing else Choice.REFUSE
    return Choice.REFUSE if age_ns < settings.handshake_ns else Choice.REPLACE


@attrs.frozen(kw_only=True)
class LinkStatistics:
    """One link: the queue now, counts since it was connected, and the last round trip."""

    node: str
    incarnation: int | None
    state: str
    queued_messages: int
    queued_bytes: int
    sent_messages: int
    sent_bytes: int
    received_messages: int
    received_bytes: int
    batches: int
    skipped: int
    """Messages of kinds that are not registered here, as their frames say."""
    congested: int
    rtt_ns: int | None


_encode_control = msgspec.msgpack.Encoder().encode
_decode_hello = msgspec.msgpack.Decoder(Hello).decode
_decode_reason = msgspec.msgpack.Decoder(str).decode


class Link:
    """One connection to the node `peer` (the name that it proved). `now` is in ns throughout.

    Feed it with `receive`, send what `take_batch` gives, call `handle_timeout` at `poll_timeout`.
    LinkProtocolError, LinkRefused and LinkLost end it: close the connection then."""

    def __init__(
        self, local: Hello, peer: str, codec: MessageCodec, settings: LinkSettings, now: int
    ) -> None:
        self.local = local
        self.peer = peer
        self.hello: Hello | None = None
        self.protocol: int | None = None
        self.state = LinkState.HELLO
        self.ready_ns: int | None = None
        self.busy = False
        self._codec = codec
        self._settings = settings
        self._deadline_ns = now + settings.handshake_ns
        self._heard_ns = now
        self._ping_due_ns = now + settings.ping_ns
        self._ping_number = 0
        self._pinged_ns = now
        self._pong_due: int | None = None
        self._rtt_ns: int | None = None
        self._splitter = FrameSplitter(MAX_HELLO_BYTES)
        self._control: list[bytes] = [frame(_HELLO, 0, _encode_control(local))]
        self._queue: deque[FrameWriter] = deque()  # full batches
        self._batch = FrameWriter(codec)  # the one that is being filled
        self._queued_messages = 0  # both in the queue and in the batch
        self._full_bytes = 0  # in the queue only
        self._sent_messages = 0
        self._sent_bytes = 0
        self._received_messages = 0
        self._received_bytes = 0
        self._batches = 0
        self._skipped = 0
        self._congested = 0

    @property
    def arbiter(self) -> bool:
        """Whether it is our side that says READY."""
        return self.local.node < self.peer

    # --- the arbiter's part ----------------------------------------------------------------------

    def accept(self, now: int) -> None:
        """We are the arbiter, and this is the link."""
        if self.state is not LinkState.UNDECIDED:
            raise RuntimeError(f"a link that is {self.state.value} cannot be accepted")
        self._control.append(frame(_READY, 0, b""))
        self._become_ready(now)

    def refuse(self, reason: str) -> None:
        """Have the other side told why, with the next batch; then close the connection."""
        body = _encode_control(reason[:MAX_REASON_CHARACTERS])
        self._control.append(frame(_REFUSED, 0, body))
        self._queue.clear()
        self._batch = FrameWriter(self._codec)
        self._queued_messages = 0
        self._full_bytes = 0
        self.state = LinkState.CLOSED

    # --- messages --------------------------------------------------------------------------------

    def enqueue(self, target: int, message: object) -> None:
        """Queue a message. Raises Unreachable (not ready), Congested, and whatever
        `FrameWriter.append` raises."""
        if self.state is not _READY_STATE:
            raise Unreachable(self.peer, f"the link {self.state.value}")
        settings, batch = self._settings, self._batch
        batch_bytes = len(batch.data)
        if (  # not `has_room`, without the call
            self._queued_messages >= settings.max_queued_messages
            or self._full_bytes + batch_bytes >= settings.max_queued_bytes
        ):
            self._congested += 1
            raise Congested(
                self.peer,
                f"{self.queued_bytes} bytes wait already",
                settings.max_queued_messages,
            )
        if batch_bytes >= settings.batch_bytes:
            batch.finish()
            self._queue.append(batch)
            self._full_bytes += len(batch.data)
            batch = self._batch = FrameWriter(self._codec)
        batch.append(target, message)
        self._queued_messages += 1

    @property
    def queued_bytes(self) -> int:
        """What waits to be taken, the link's own words apart."""
        return self._full_bytes + len(self._batch.data)

    @property
    def has_room(self) -> bool:
        """Whether one more message would be queued."""
        settings = self._settings
        return (
            self._queued_messages < settings.max_queued_messages
            and self.queued_bytes < settings.max_queued_bytes
        )

    @property
    def has_output(self) -> bool:
        """Whether `take_batch` would give anything."""
        return bool(self._control or self._queued_messages or self._pong_due is not None)

    def take_batch(self) -> bytes | bytearray:
        """What is to be sent next: the link's own words, then messages of about `batch_bytes`."""
        pieces: list[bytes | bytearray] = list(self._control)
        self._control.clear()
        if self._pong_due is not None:
            pieces.append(frame(_PONG, self._pong_due, b""))
            self._pong_due = None
        if self._queued_messages:
            if self._queue:
                queued = self._queue.popleft()
                self._full_bytes -= len(queued.data)
            else:
                queued = self._batch
                queued.finish()
                self._batch = FrameWriter(self._codec)
            pieces.append(queued.data)
            self._queued_messages -= queued.messages
            self._sent_messages += queued.messages
        batch = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._sent_bytes += len(batch)
        self._batches += 1
        return batch

    def receive(self, data: bytes | bytearray, now: int) -> list[tuple[int, Any]]:
        """Take what came; returns the messages in it as (target, message), in order. Raises
        LinkProtocolError, LinkRefused."""
        self._heard_ns = now
        self._received_bytes += len(data)
        messages: list[tuple[int, Any]] = []
        for kind, number, body in self._splitter.feed(data):
            if kind < FIRST_MESSAGE_KIND:
                self._receive_control(kind, number, body, now)
                continue
            if self.state is not LinkState.READY:
                raise LinkProtocolError("a message came before the link was ready")
            these = self._codec.decode_frame(kind, number, body)
            if these is None:
                self._skipped += number
            else:
                messages.extend(these)
        self._received_messages += len(messages)
        return messages

    # --- time ------------------------------------------------------------------------------------

    def poll_timeout(self) -> int | None:
        """When to call `handle_timeout`."""
        if self.state is LinkState.CLOSED:
            return None
        if self.state is not LinkState.READY:
            return self._deadline_ns
        if self.busy:
            return self._ping_due_ns
        return min(self._ping_due_ns, self._heard_ns + self._settings.silence_ns)

    def handle_timeout(self, now: int) -> None:
        """Raises LinkLost when the other side was silent for too long."""
        if self.state is LinkState.CLOSED:
            return
        if self.state is not LinkState.READY:
            if now >= self._deadline_ns:
                raise LinkLost(f"no link within the deadline: {self.state.value}")
            return
        if now - min(self._ping_due_ns, now) >= self._settings.silence_ns // 2:
            self._heard_ns = now  # it was us who were stopped: what came meanwhile is still unread
        if not self.busy and now - self._heard_ns >= self._settings.silence_ns:
            raise LinkLost(f"nothing heard for {(now - self._heard_ns) / NS_PER_S:.1f} s")
        if now >= self._ping_due_ns:
            self.probe(now)

    def set_busy(self, busy: bool, now: int) -> None:
        """While we do not read since the receiver still works on a batch, silence means nothing."""
        self.busy = busy
        self._heard_ns = now

    def probe(self, now: int) -> None:
        """Ping now: a connection that is dead on the other side is then soon found out."""
        self._ping_number += 1
        self._pinged_ns = now
        self._ping_due_ns = now + self._settings.ping_ns
        self._control.append(frame(_PING, self._ping_number, b""))

    def statistics(self) -> LinkStatistics:
        return LinkStatistics(
            node=self.peer,
            incarnation=None if self.hello is None else self.hello.incarnation,
            state=self.state.value,
            queued_messages=self._queued_messages,
            queued_bytes=self.queued_bytes,
            sent_messages=self._sent_messages,
            sent_bytes=self._sent_bytes,
            received_messages=self._received_messages,
            received_bytes=self._received_bytes,
            batches=self._batches,
            skipped=self._skipped,
            congested=self._congested,
            rtt_ns=self._rtt_ns,
        )

    # --- within ----------------------------------------------------------------------------------

    def _receive_control(self, kind: int, number: int, body: memoryview, now: int) -> None:
        if kind == _REFUSED:
            raise LinkRefused(_text_of(body))
        if kind == _HELLO and self.state is LinkState.HELLO:
            self._receive_hello(body)
            return
        if kind == _READY and self.state is LinkState.UNREADY:
            self._become_ready(now)
            return
        if self.state is not LinkState.READY or kind not in (_PING, _PONG):
            raise LinkProtocolError(f"a frame of kind {kind} on a link that {self.state.value}")
        if kind == _PING:
            self._pong_due = number  # at most one: the answer to the last
        elif number == self._ping_number:
            self._rtt_ns = now - self._pinged_ns

    def _receive_hello(self, body: memoryview) -> None:
        try:
            hello = _decode_hello(body)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            hello = None
        if hello is None or not 0 <= hello.incarnation <= MAX_INCARNATION:
            raise LinkProtocolError("a malformed hello")
        if hello.node != self.peer:
            raise LinkProtocolError("the hello names another node than the certificate")
        protocol = min(hello.protocol_high, self.local.protocol_high)
        if protocol < max(hello.protocol_low, self.local.protocol_low):
            raise LinkProtocolError(
                f"no common protocol: they speak {hello.protocol_low} to {hello.protocol_high}"
            )
        self.hello = hello
        self.protocol = protocol
        self._splitter.limit = MAX_FRAME_BYTES
        self.state = LinkState.UNDECIDED if self.arbiter else LinkState.UNREADY

    def _become_ready(self, now: int) -> None:
        self.state = LinkState.READY
        self.ready_ns = now
        self._heard_ns = now
        self._ping_due_ns = now + self._settings.ping_ns


def _text_of(body: memoryview) -> str:
    """What the other side gave as its reason, fit for a log."""
    try:
        text = _decode_reason(body)
    except (msgspec.MsgspecError, ValueError):
        return "no reason was given"
    return "".join(each if each.isprintable() else "?" for each in text[:MAX_REASON_CHARACTERS])
