"""Frames of a node link: registered message classes, and nothing else.

    u32 length of what follows | u16 kind | u64 number | body

All big-endian. `kind` says what the body is: below FIRST_MESSAGE_KIND the link's own words, above,
messages of a class that both sides have registered under that number: `number` of them, as one
MessagePack (msgspec) array of pairs [target, message]. So messages of one class in a row share a
frame, and are read in one go. Nothing is ever unpickled: a body can become objects of its
registered class, or an error. A kind that is not registered here (the other node is newer) is
counted and skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from struct import Struct
from typing import Annotated, Any, Final

import msgspec

FIRST_MESSAGE_KIND: Final = 16
MAX_KIND: Final = 2**16 - 1
MAX_TARGET: Final = 2**64 - 1
MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
"""The length field of a frame, at most."""
MAX_FRAME_MESSAGES: Final = 4_096
"""Messages in one frame."""
FULL_FRAME_BYTES: Final = 16 * 1024
"""A frame that has so much takes no further message: what is in it waits for its end, and whoever
reads gets a TLS record of this size at a time."""

HEADER: Final = Struct("!IHQ")
_LENGTH: Final = Struct("!I")
_LEAST: Final = HEADER.size - _LENGTH.size
_MESSAGES: Final = Struct("!IHQBI")  # the header, and that of an array of 32 bits of length
_ARRAY: Final = 0xDD
_EMPTY: Final = bytes(_MESSAGES.size)


class LinkProtocolError(Exception):
    """The other node sent what no node may. The link is closed; the text holds no content."""


class MessageCodec:
    """Which classes may cross a link, by number. Numbers belong to the protocol: never give one to
    another class. A class must be one that msgspec can check (attrs, Struct, dataclass).

    `enc_hook` and `dec_hook` are msgspec's, for fields of types that it does not know (an address
    of an actor, say): `enc_hook(value)` gives something that it does, `dec_hook(type, value)` the
    value back. Whatever `dec_hook` raises means that the message is malformed.

    Raises ValueError (a number out of range, or a class twice) and TypeError."""

    def __init__(
        self,
        class_by_kind: Mapping[int, type],
        *,
        enc_hook: Callable[[Any], Any] | None = None,
        dec_hook: Callable[[type, Any], Any] | None = None,
    ) -> None:
        if not all(FIRST_MESSAGE_KIND <= kind <= MAX_KIND for kind in class_by_kind):
            raise ValueError(f"kinds of messages are {FIRST_MESSAGE_KIND} to {MAX_KIND}")
        self.kind_by_class = {each: kind for kind, each in class_by_kind.items()}
        if len(self.kind_by_class) < len(class_by_kind):
            raise ValueError("a class has two kinds")
        encoder = msgspec.msgpack.Encoder(enc_hook=enc_hook)
        self._encode = encoder.encode
        self.encode_into = encoder.encode_into
        self._decode_by_kind: dict[int, Callable[[Any], Any]] = {
            kind: msgspec.msgpack.Decoder(each, dec_hook=dec_hook).decode
            for kind, each in class_by_kind.items()
        }
        self._decode_frame_by_kind: dict[int, Callable[[memoryview], list[tuple[int, Any]]]] = {
            kind: msgspec.msgpack.Decoder(_messages_of(each), dec_hook=dec_hook).decode
            for kind, each in class_by_kind.items()
        }

    def travels(self, message_type: type) -> bool:
        """Whether messages of this class may cross a link."""
        return message_type in self.kind_by_class

    def pack(self, message: object) -> tuple[int, bytes]:
        """Kind and body of a message that travels within another. Raises TypeError, ValueError."""
        kind = self.kind_by_class.get(type(message))
        if kind is None:
            raise TypeError(f"{type(message).__name__} may not cross a link: it is not registered")
        return kind, self._encode(message)

    def decode(self, kind: int, body: memoryview | bytes | msgspec.Raw) -> Any | None:
        """Undo `pack`; None if the kind is not registered. Raises LinkProtocolError."""
        decode = self._decode_by_kind.get(kind)
        return None if decode is None else _read(decode, body, kind)

    def decode_frame(
        self, kind: int, number: int, body: memoryview
    ) -> list[tuple[int, Any]] | None:
        """The messages of a frame as (target, message); None if the kind is not registered. Raises
        LinkProtocolError."""
        decode = self._decode_frame_by_kind.get(kind)
        if decode is None:
            return None
        messages: list[tuple[int, Any]] = _read(decode, body, kind)
        if len(messages) != number:
            raise LinkProtocolError(f"{len(messages)} messages in a frame of {number}")
        return messages


def _messages_of(message_type: type) -> Any:
    target = Annotated[int, msgspec.Meta(ge=0)]
    limit = msgspec.Meta(max_length=MAX_FRAME_MESSAGES)
    return Annotated[list[tuple[target, message_type]], limit]  # type: ignore[valid-type]  # made here


def _read(decode: Callable[[Any], Any], body: object, kind: int) -> Any:
    try:
        return decode(body)
    except Exception as error:  # of a hook, too: what came from outside decides what it raises
        text = f"a message of kind {kind} is malformed ({type(error).__name__})"
    raise LinkProtocolError(text)


class FrameWriter:
    """Messages as frames, one after the other in `data`; the last is complete after `finish`."""

    __slots__ = (
        "_count", "_encode_into", "_kind", "_kind_by_class", "_start", "data", "messages",
    )  # fmt: skip

    def __init__(self, codec: MessageCodec) -> None:
        self.data = bytearray()
        self.messages = 0
        self._kind_by_class = codec.kind_by_class
        self._encode_into = codec.encode_into
        self._kind = 0
        self._start = 0  # of the frame in hand
        self._count = 0  # of the messages in it

    def append(self, target: int, message: object) -> None:
        """Raises TypeError for a class that is not registered or a field that no hook can write,
        ValueError when the message does not fit into a frame or the target is out of range, and
        what the codec's `enc_hook` raises; then nothing is appended."""
        kind = self._kind_by_class.get(type(message))
        if kind is None:
            raise TypeError(f"{type(message).__name__} may not cross a link: it is not registered")
        if not 0 <= target <= MAX_TARGET:
            raise ValueError("the target is out of range")
        data = self.data
        if (
            kind != self._kind
            or self._count == MAX_FRAME_MESSAGES
            or len(data) - self._start >= FULL_FRAME_BYTES
        ):
            self._begin(kind)
        before = len(data)
        try:
            self._encode_into((target, message), data, -1)
            if len(data) - self._start > MAX_FRAME_BYTES:
                self._begin_with_last(before)
        except BaseException:
            del data[before:]
            raise
        self._count += 1
        self.messages += 1

    def finish(self) -> None:
        """Write the header of the frame in hand; the next message begins another."""
        if self._count:
            length = len(self.data) - self._start - _LENGTH.size
            fields = (length, self._kind, self._count, _ARRAY, self._count)
            _MESSAGES.pack_into(self.data, self._start, *fields)
        else:
            del self.data[self._start :]
        self._kind = self._count = 0
        self._start = len(self.data)

    def _begin(self, kind: int) -> None:
        self.finish()
        self._kind = kind
        self.data += _EMPTY

    def _begin_with_last(self, position: int) -> None:
        """What begins at `position` is too much for the frame: it goes into the next."""
        written = self.data[position:]
        if len(written) + _MESSAGES.size > MAX_FRAME_BYTES:
            raise ValueError(f"a frame has at most {MAX_FRAME_BYTES} bytes")
        del self.data[position:]
        self._begin(self._kind)
        self.data += written


def frame(kind: int, number: int, body: bytes) -> bytes:
    """One frame. Raises ValueError."""
    length = _LEAST + len(body)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame has at most {MAX_FRAME_BYTES} bytes")
    if not 0 <= number <= MAX_TARGET:
        raise ValueError("the number is out of range")
    return HEADER.pack(length, kind, number) + body


class FrameSplitter:
    """Cuts a byte stream into frames. Holds at most one unfinished frame and what `feed` was given
    with it. `limit` is the longest frame's length field."""

    __slots__ = ("_chunks", "_held", "_needed", "limit")

    def __init__(self, limit: int = MAX_FRAME_BYTES) -> None:
        self._chunks: list[bytes | bytearray] = []  # joined only when a frame is complete
        self._held = 0
        self._needed = 0
        self.limit = limit

    def feed(self, data: bytes | bytearray) -> Iterator[tuple[int, int, memoryview]]:
        """The frames that are complete now, as (kind, number, body). Iterate to the end before the
        next feed. Raises LinkProtocolError, as soon as a header says too much or too little."""
        self._chunks.append(data)
        self._held += len(data)
        if self._held < self._needed:
            return
        buffer = data if len(self._chunks) == 1 else b"".join(self._chunks)
        view = memoryview(buffer)
        position, end, limit = 0, len(buffer), self.limit
        self._needed = _LENGTH.size
        while end - position >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, position)
            if not _LEAST <= length <= limit:
                raise LinkProtocolError(f"a frame of {length} bytes")
            after = position + _LENGTH.size + length
            if after > end:
                self._needed = after - position
                break
            _, kind, number = HEADER.unpack_from(buffer, position)
            yield kind, number, view[position + HEADER.size : after]
            limit = self.limit  # it rises with the hello
            position = after
        self._chunks = [buffer[position:]] if position < end else []
        self._held = end - position
