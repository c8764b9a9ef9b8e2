"""Frames of the control channel: how messages become bytes on one stream, and come back.

A frame is a length (4 bytes, big endian, of what follows) and a JSON object:

    {"event": "...", "ref"?: int, "epoch"?: int, "seq"?: int, "part"?: [index, count],
     "payload": {...}}

`event` names the class of the payload (see `channel.messages`). `ref` ties an answer to its
question. `epoch` and `seq` stand on frames of the portal: which incarnation of the account's
owner speaks, and the how-many-th message of this connection it is. A field that the receiver
does not know is skipped, and so is a whole event, counted.

One message alone may exceed a frame: `init`. It then travels in parts: frames with `part`, whose
payload is a piece (base64) of the payload's own JSON. The parts of a message follow each other
with nothing between them.

This is a core: bytes in, frames out. Whatever the bytes are, nothing but `RemoteProtocolError` is
raised, and after it the decoder takes no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Annotated, Any, Final, Literal, get_args

import attrs
import msgspec
from msgspec import Meta, Raw, Struct

from channel.messages import EVENT_BY_TYPE, DoorAddress, IpText, RefusalCode

LENGTH_BYTES: Final = 4
AGENT_FRAME_LIMIT: Final = 64 * 1024
PORTAL_FRAME_LIMIT: Final = 1024 * 1024
REASSEMBLY_LIMIT: Final = 64 * 1024 * 1024
MAX_PARTS: Final = 1024
MAX_DETAIL_CHARACTERS: Final = 200
EVENTS_IN_PARTS: Final = frozenset({"init"})
EVENTS_TO_MANY: Final = frozenset({"resource_upserted", "resource_removed", "portals"})
"""A portal says the same to thousands of agents, one after the other."""

# Application error codes of a QUIC close by reason, in the order of `RefusalCode`, from 1.
CLOSE_CODES: Final[dict[RefusalCode, int]] = {
    reason: code for code, reason in enumerate(get_args(RefusalCode), start=1)
}

ErrorCode = Literal[
    "frame_empty",
    "frame_too_large",
    "frame_malformed",
    "message_malformed",
    "parts_out_of_order",
    "parts_too_large",
    "join_late",
    "unexpected_message",
]


class LocalProtocolError(Exception):
    """This side was about to break the protocol: a mistake in our own code or data."""


class RemoteProtocolError(Exception):
    """The far side broke the protocol. `code` says how, `detail` (printable, short) where.

    `detail` names fields and expectations, never the values of secrets.
    """

    def __init__(self, code: ErrorCode, detail: str) -> None:
        printable = "".join(c if c.isprintable() else "?" for c in detail[:MAX_DETAIL_CHARACTERS])
        super().__init__(f"{code}: {printable}")
        self.code: ErrorCode = code
        self.detail = printable


@attrs.frozen(kw_only=True)
class Frame:
    """One message as it came, with the fields of its envelope."""

    event: str
    message: Any
    ref: int | None = None
    epoch: int | None = None
    seq: int | None = None


@attrs.frozen(kw_only=True)
class FrameStatistics:
    """Counts since the decoder was made."""

    frames: int
    bytes: int
    unknown_events: int


def encode_frame(
    message: object,
    *,
    ref: int | None = None,
    epoch: int | None = None,
    seq: int | None = None,
    limit: int,
) -> bytes:
    """One frame. `limit` is the most bytes after the length field.

    Raises LocalProtocolError for a class that is no message, or a message above the limit.
    """
    event, payload = _encode_payload(message)
    return _frame(event, payload, ref, epoch, seq, limit)


def encode_parts(
    message: object,
    *,
    ref: int | None = None,
    epoch: int | None = None,
    seq: int | None = None,
    limit: int,
) -> list[bytes]:
    """One frame, or as many parts as a large `init` needs: all with the same `seq`.

    Raises LocalProtocolError as `encode_frame` does, and above REASSEMBLY_LIMIT.
    """
    event, payload = _encode_payload(message)
    size = (limit - 512) * 3 // 4
    if event not in EVENTS_IN_PARTS or len(payload) <= limit - 512:
        return [_frame(event, payload, ref, epoch, seq, limit)]
    count = -(-len(payload) // size)
    if len(payload) > REASSEMBLY_LIMIT or count > MAX_PARTS:
        raise LocalProtocolError(f"{event} of {len(payload)} B is above the limit of an init")
    frames = []
    for index in range(count):
        piece = msgspec.json.encode(payload[index * size : (index + 1) * size])
        body = _envelope(
            _Envelope(
                event=event,
                ref=ref,
                epoch=epoch,
                seq=seq,
                part=(index, count),
                payload=Raw(piece),
            )
        )
        frames.append(len(body).to_bytes(LENGTH_BYTES, "big") + body)
    return frames


class FrameDecoder:
    """Bytes of one stream in, frames out.

    `events` says which events are understood, and as which class; it may be replaced between two
    frames (after a join). `limit` is the most bytes that a frame may announce;
    `reassembly_limit` the most that the parts of one message may add up to, 0 for a side that
    takes no parts. Memory is bounded by the two and by what one call passes in.
    """

    def __init__(
        self, events: Mapping[str, type], limit: int, *, reassembly_limit: int = 0
    ) -> None:
        self.events = events
        self._limit = limit
        self._reassembly_limit = reassembly_limit
        self._buffer = bytearray()
        self._parts: _Parts | None = None
        self._failure: RemoteProtocolError | None = None
        self._frames = 0
        self._bytes = 0
        self._unknown_events = 0

    def feed(self, data: bytes) -> list[Frame]:
        """Take bytes as they come, return the frames that they complete.

        Raises RemoteProtocolError; frames completed by the same call before the broken one are
        lost with the connection. Use `push` and `next_frame` where they matter.
        """
        self.push(data)
        frames = []
        while (frame := self.next_frame()) is not None:
            frames.append(frame)
        return frames

    def push(self, data: bytes) -> None:
        """Take bytes without looking at them."""
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """The next complete frame of a known event, None while there is none.

        Raises RemoteProtocolError, and again each time it is called thereafter.
        """
        if self._failure is not None:
            raise self._failure
        try:
            while (body := self._next_body()) is not None:
                frame = self._decode(body)
                if frame is not None:
                    return frame
        except RemoteProtocolError as error:
            self._failure = error
            self._buffer.clear()
            self._parts = None
            raise
        return None

    @property
    def buffered_bytes(self) -> int:
        """Bytes taken that are no frame yet, or were not asked for."""
        return len(self._buffer)

    def statistics(self) -> FrameStatistics:
        return FrameStatistics(
            frames=self._frames, bytes=self._bytes, unknown_events=self._unknown_events
        )

    # --- helpers -------------------------------------------------------------------------------

    def _next_body(self) -> bytes | None:
        if len(self._buffer) < LENGTH_BYTES:
            return None
        length = int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
        if length == 0:
            raise RemoteProtocolError("frame_empty", "a frame of 0 B")
        if length > self._limit:
            raise RemoteProtocolError(
                "frame_too_large", f"a frame of {length} B, the limit is {self._limit} B"
            )
        end = LENGTH_BYTES + length
        if len(self._buffer) < end:
            return None
        body = bytes(memoryview(self._buffer)[LENGTH_BYTES:end])
        del self._buffer[:end]
        self._frames += 1
        self._bytes += end
        return body

    def _decode(self, body: bytes) -> Frame | None:
        try:
            envelope = _ENVELOPE_DECODER.decode(body)
        except _DECODING_ERRORS as error:
            raise RemoteProtocolError("frame_malformed", _explain(error)) from None
        message_type = self.events.get(envelope.event)
        if message_type is None:
            self._unknown_events += 1
            return None
        payload = self._payload(envelope)
        if payload is None:
            return None
        try:
            message = _message_decoder(message_type).decode(payload)
        except _DECODING_ERRORS as error:
            raise RemoteProtocolError(
                "message_malformed", f"{envelope.event}: {_explain(error)}"
            ) from None
        return Frame(
            event=envelope.event,
            message=message,
            ref=envelope.ref,
            epoch=envelope.epoch,
            seq=envelope.seq,
        )

    def _payload(self, envelope: _Envelope) -> bytes | Raw | None:
        """The payload itself, or None while more parts of it are to come."""
        if envelope.part is None:
            if self._parts is not None:
                raise RemoteProtocolError("parts_out_of_order", "a frame between two parts")
            return envelope.payload
        if not self._reassembly_limit or envelope.event not in EVENTS_IN_PARTS:
            raise RemoteProtocolError("parts_out_of_order", "no parts are taken of this")
        index, count = envelope.part
        if self._parts is None:
            self._parts = _Parts(envelope.event, count)
        elif envelope.event != self._parts.event or count != self._parts.count:
            raise RemoteProtocolError("parts_out_of_order", "a part of another message")
        if index != self._parts.taken or count > MAX_PARTS or index >= count:
            raise RemoteProtocolError("parts_out_of_order", f"part {index} of {count}")
        try:
            piece = _PIECE_DECODER.decode(envelope.payload)
        except _DECODING_ERRORS as error:
            raise RemoteProtocolError("message_malformed", _explain(error)) from None
        if len(self._parts.content) + len(piece) > self._reassembly_limit:
            raise RemoteProtocolError("parts_too_large", f"the limit is {self._reassembly_limit} B")
        self._parts.content += piece
        self._parts.taken += 1
        if self._parts.taken < count:
            return None
        content, self._parts = self._parts.content, None
        return bytes(content)


# --- JSON --------------------------------------------------------------------------------------

_Counter = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_PartNumber = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class _Envelope(Struct, omit_defaults=True, kw_only=True):
    event: Annotated[str, Meta(min_length=1, max_length=64)]
    ref: _Counter | None = None
    epoch: _Counter | None = None
    seq: _Counter | None = None
    part: tuple[_PartNumber, _PartNumber] | None = None
    payload: Raw


class _Parts:
    """A message of which not all parts are there yet."""

    __slots__ = ("content", "count", "event", "taken")

    def __init__(self, event: str, count: int) -> None:
        self.event = event
        self.count = count
        self.taken = 0
        self.content = bytearray()


# What msgspec raises for bytes that are not what they should be: its own errors and broken UTF-8
# are ValueErrors; nesting beyond the interpreter's limit is a RecursionError.
_DECODING_ERRORS: Final = (ValueError, RecursionError)

_TEXT_TYPES: Final = (DoorAddress, IpText, IPv4Address, IPv6Address, IPv4Network, IPv6Network)


def _to_json(value: object) -> str:
    if isinstance(value, _TEXT_TYPES):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} does not travel")


def _from_json(wanted: type, value: object) -> object:
    if wanted not in _TEXT_TYPES or not isinstance(value, str):
        raise ValueError(f"{wanted.__name__} is text")
    if "%" in value:
        raise ValueError("an address with a scope id means nothing to another machine")
    try:
        return wanted(value)
    except ValueError:
        raise ValueError(f"not the text of an {wanted.__name__}") from None


_ENCODER: Final = msgspec.json.Encoder(enc_hook=_to_json)
_ENVELOPE_DECODER: Final = msgspec.json.Decoder(_Envelope)
_PIECE_DECODER: Final = msgspec.json.Decoder(bytes)
_DECODERS: Final[dict[type, msgspec.json.Decoder[Any]]] = {}
_LATEST: Final[dict[str, tuple[object, bytes]]] = {}
"""Of each of EVENTS_TO_MANY the message that was encoded last, and its JSON."""


def _message_decoder(message_type: type) -> msgspec.json.Decoder[Any]:
    decoder = _DECODERS.get(message_type)
    if decoder is None:
        decoder = msgspec.json.Decoder(message_type, dec_hook=_from_json)
        _DECODERS[message_type] = decoder
    return decoder


def _encode_payload(message: object) -> tuple[str, bytes]:
    """The event and its JSON, which is made once for all who are told the same in a row."""
    event = EVENT_BY_TYPE.get(type(message))
    if event is None:
        raise LocalProtocolError(f"{type(message).__name__} is not a message of the channel")
    if event not in EVENTS_TO_MANY:
        return event, _encode(event, message)
    latest = _LATEST.get(event)
    if latest is None or latest[0] != message:
        latest = _LATEST[event] = (message, _encode(event, message))
    return event, latest[1]


def _encode(event: str, message: object) -> bytes:
    try:
        return _ENCODER.encode(message)
    except (TypeError, ValueError, NotImplementedError, OverflowError) as error:
        raise LocalProtocolError(f"{event} cannot be encoded: {error}") from error


def _frame(
    event: str,
    payload: bytes,
    ref: int | None,
    epoch: int | None,
    seq: int | None,
    limit: int,
) -> bytes:
    body = _envelope(_Envelope(event=event, ref=ref, epoch=epoch, seq=seq, payload=Raw(payload)))
    if len(body) > limit:
        raise LocalProtocolError(f"{event} of {len(body)} B is above the limit of {limit} B")
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def _envelope(envelope: _Envelope) -> bytes:
    try:
        return _ENCODER.encode(envelope)
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"{envelope.event} cannot be encoded: {error}") from error


def _explain(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return str(error)
