"""Frames of a node link: registered message classes, and nothing else.

    u32 length of what follows | u16 kind | u64 target | body

All big-endian. `kind` says what the body is: below FIRST_MESSAGE_KIND the link's own words, above a
class that both sides have registered under that number, as MessagePack (msgspec). Nothing is ever
unpickled: a body can become an object of its registered class, or an error. A kind that is not
registered here (the other node is newer) is counted and skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from struct import Struct
from typing import Any, Final

import msgspec

FIRST_MESSAGE_KIND: Final = 16
MAX_KIND: Final = 2**16 - 1
MAX_TARGET: Final = 2**64 - 1
MAX_FRAME_BYTES: Final = 4 * 1024 * 1024
"""The length field of a frame, at most."""

HEADER: Final = Struct("!IHQ")
_LENGTH: Final = Struct("!I")
_EMPTY_HEADER: Final = bytes(HEADER.size)
_LEAST: Final = HEADER.size - _LENGTH.size


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
        self._kind_by_class = {each: kind for kind, each in class_by_kind.items()}
        if len(self._kind_by_class) < len(class_by_kind):
            raise ValueError("a class has two kinds")
        encoder = msgspec.msgpack.Encoder(enc_hook=enc_hook)
        self._encode = encoder.encode
        self._encode_into = encoder.encode_into
        self._decode_by_kind: dict[int, Callable[[Any], Any]] = {
            kind: msgspec.msgpack.Decoder(each, dec_hook=dec_hook).decode
            for kind, each in class_by_kind.items()
        }

    def encode_into(self, buffer: bytearray, target: int, message: object) -> None:
        """Append the frame to `buffer`, or leave it as it was. Raises TypeError for a class that is
        not registered or a field that no hook can write, ValueError when the frame would be longer
        than MAX_FRAME_BYTES or the target is out of range, and what `enc_hook` raises."""
        kind = self._kind_by_class.get(type(message))
        if kind is None:
            raise TypeError(f"{type(message).__name__} may not cross a link: it is not registered")
        if not 0 <= target <= MAX_TARGET:
            raise ValueError("the target is out of range")
        start = len(buffer)
        buffer += _EMPTY_HEADER
        try:
            self._encode_into(message, buffer, -1)
            length = len(buffer) - start - _LENGTH.size
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame has at most {MAX_FRAME_BYTES} bytes")
        except BaseException:
            del buffer[start:]
            raise
        HEADER.pack_into(buffer, start, length, kind, target)

    def travels(self, message_type: type) -> bool:
        """Whether messages of this class may cross a link."""
        return message_type in self._kind_by_class

    def pack(self, message: object) -> tuple[int, bytes]:
        """Kind and body of a message that travels within another. Raises TypeError, ValueError."""
        kind = self._kind_by_class.get(type(message))
        if kind is None:
            raise TypeError(f"{type(message).__name__} may not cross a link: it is not registered")
        return kind, self._encode(message)

    def decode(self, kind: int, body: memoryview | bytes | msgspec.Raw) -> Any | None:
        """The message; None if the kind is not registered. Raises LinkProtocolError."""
        decode = self._decode_by_kind.get(kind)
        if decode is None:
            return None
        try:
            return decode(body)
        except Exception as error:  # of a hook, too: what came from outside decides what it raises
            text = f"a message of kind {kind} is malformed ({type(error).__name__})"
        raise LinkProtocolError(text)


def frame(kind: int, target: int, body: bytes) -> bytes:
    """One frame. Raises ValueError."""
    length = _LEAST + len(body)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame has at most {MAX_FRAME_BYTES} bytes")
    if not 0 <= target <= MAX_TARGET:
        raise ValueError("the target is out of range")
    return HEADER.pack(length, kind, target) + body


class FrameSplitter:
    """Cuts a byte stream into frames. Holds at most one unfinished frame and what `feed` was given
    with it. `limit` is the longest frame's length field."""

    __slots__ = ("_chunks", "_held", "_needed", "limit")

    def __init__(self, limit: int = MAX_FRAME_BYTES) -> None:
        self._chunks: list[bytes] = []  # joined only when a frame is complete
        self._held = 0
        self._needed = 0
        self.limit = limit

    def feed(self, data: bytes) -> Iterator[tuple[int, int, memoryview]]:
        """The frames that are complete now, as (kind, target, body). Iterate to the end before the
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
            _, kind, target = HEADER.unpack_from(buffer, position)
            yield kind, target, view[position + HEADER.size : after]
            limit = self.limit  # it rises with the hello
            position = after
        self._chunks = [buffer[position:]] if position < end else []
        self._held = end - position
