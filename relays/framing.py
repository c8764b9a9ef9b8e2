"""STUN messages and ChannelData on a byte stream (RFC 8489, section 6.2.2; RFC 8656, 12.5).

Over TCP and TLS the messages follow one another without anything in between; each says its own
length. ChannelData is padded to a multiple of four bytes there, and the padding is in no length.
Whatever begins like neither, or is longer than allowed, is a violation: what follows it could not
be told apart any more, so the connection has to end.

`take_frames` works on one buffer and copies nothing, for a server with many connections;
`StreamFrames` keeps what is incomplete, for whoever has one.
"""

from __future__ import annotations

from typing import Final

from relays.stun import MAGIC_COOKIE

MAX_FRAME_BYTES: Final = 65_552
"""Of the longest message there can be: a STUN header and a length of 65,532; ChannelData has less
with its padding."""

_HEADER_BYTES: Final = 20
_COOKIE: Final = MAGIC_COOKIE.to_bytes(4, "big")
_PADDING: Final = (b"", b"\0\0\0", b"\0\0", b"\0")


class FramingError(ValueError):
    """What came is no STUN message and no ChannelData, or longer than allowed."""


def take_frames(view: memoryview, limit: int = MAX_FRAME_BYTES) -> tuple[list[memoryview], int]:
    """The complete messages at the head of `view`, as views without their padding, and how many
    bytes those took. What remains is shorter than `limit`, the most bytes of a message with its
    padding. Raises FramingError as soon as a violation can be seen."""
    frames = []
    start, end = 0, len(view)
    while end - start >= 4:
        first = view[start]
        size = view[start + 2] << 8 | view[start + 3]
        if 0x40 <= first <= 0x7F:
            stop = start + 4 + size
            after = stop + (-size & 3)
        elif first < 0x40 and not size & 3:
            stop = after = start + _HEADER_BYTES + size
            if end - start >= 8 and view[start + 4 : start + 8] != _COOKIE:
                raise FramingError("no STUN message: the magic cookie is missing")
        else:
            raise FramingError("neither a STUN message nor ChannelData")
        if after - start > limit:
            raise FramingError(f"a message of {after - start} bytes, where {limit} are allowed")
        if after > end:
            break
        frames.append(view[start:stop])
        start = after
    if start < end < start + 4 and view[start] > 0x7F:
        raise FramingError("neither a STUN message nor ChannelData")
    return frames, start


def padding_of(data: bytes | memoryview) -> bytes:
    """What has to follow this message on a stream: 0 to 3 bytes after ChannelData, which is given
    without its padding; nothing after a STUN message."""
    return _PADDING[len(data) & 3] if data[0] >= 0x40 else b""


class StreamFrames:
    """The messages of one stream, however its bytes are cut. `limit` may be changed."""

    def __init__(self, limit: int = MAX_FRAME_BYTES) -> None:
        self.limit = limit
        self._rest = b""

    @property
    def waiting_bytes(self) -> int:
        """What is kept of a message that is not complete; less than the limit."""
        return len(self._rest)

    def feed(self, data: bytes | bytearray | memoryview) -> list[memoryview]:
        """The messages that `data` completes, which stay as they are. Raises FramingError; then
        nothing more is to be fed."""
        view = memoryview(b"".join((self._rest, data)))
        frames, used = take_frames(view, self.limit)
        self._rest = bytes(view[used:])
        return frames
