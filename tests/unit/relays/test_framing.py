"""Messages on a byte stream: however the bytes are cut, and whatever they are."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relays.framing import (
    MAX_FRAME_BYTES,
    FramingError,
    StreamFrames,
    padding_of,
    take_frames,
)
from relays.stun import Attribute, MessageClass, Method, StunMessage
from relays.turn import channel_data

BINDING = StunMessage(
    method=Method.BINDING, message_class=MessageClass.REQUEST, transaction_id=bytes(12)
).encode()

messages = st.one_of(
    st.builds(channel_data, st.integers(0x4000, 0x7FFF), st.binary(max_size=70)),
    st.binary(max_size=60).map(
        lambda data: StunMessage(
            method=Method.SEND,
            message_class=MessageClass.INDICATION,
            transaction_id=bytes(12),
            attributes=((Attribute.DATA, data),),
        ).encode()
    ),
)


@given(st.lists(messages, max_size=12), st.data())
def test_how_the_bytes_are_cut_makes_no_difference(sent: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(each + padding_of(each) for each in sent)
    assert len(stream) % 4 == 0
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    frames, reader = [], StreamFrames()
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        frames += [bytes(each) for each in reader.feed(stream[begin:end])]
    assert frames == sent
    assert reader.waiting_bytes == 0


@given(st.lists(st.binary(max_size=200), max_size=20), st.integers(24, 400))
def test_no_bytes_do_more_than_violate_and_no_more_is_kept_than_allowed(
    chunks: list[bytes], limit: int
) -> None:
    reader = StreamFrames(limit)
    with contextlib.suppress(FramingError):
        for chunk in chunks:
            assert all(4 <= len(frame) <= limit for frame in reader.feed(chunk))
            assert reader.waiting_bytes < limit


@given(st.lists(messages, max_size=3), st.binary(min_size=1, max_size=40))
def test_what_comes_before_is_the_same_whatever_follows(sent: list[bytes], tail: bytes) -> None:
    stream = b"".join(each + padding_of(each) for each in sent)
    with contextlib.suppress(FramingError):
        frames, used = take_frames(memoryview(stream + tail))
        assert [bytes(each) for each in frames][: len(sent)] == sent
        assert used >= len(stream)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80",
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"SSH-2.0-OpenSSH_9\r\n",
        BINDING[:4] + b"\x21\x12\xa4\x43",
        BINDING[:3] + b"\x01" + BINDING[4:],
        b"\xff\xff\xff\xff",
    ],
    ids=["first-bit", "tls", "http", "ssh", "cookie", "length", "ones"],
)
def test_what_is_no_message_is_a_violation_as_soon_as_it_shows(data: bytes) -> None:
    with pytest.raises(FramingError):
        take_frames(memoryview(data), 4_096)


def test_a_message_may_be_as_long_as_the_limit_and_not_a_byte_longer() -> None:
    frame = channel_data(0x4000, bytes(93))
    assert len(frame + padding_of(frame)) == 100
    assert take_frames(memoryview(frame + padding_of(frame)), 100)[0] == [frame]
    for head in (frame[:4], frame):
        with pytest.raises(FramingError):
            take_frames(memoryview(head), 99)
    longest = b"\x40\x00\xff\xff" + bytes(65_536)
    assert take_frames(memoryview(longest)) == ([longest[:-1]], len(longest))
    assert len(longest) <= MAX_FRAME_BYTES


def test_channel_data_without_its_padding_waits_for_it() -> None:
    frame = channel_data(0x4001, b"12345")
    assert take_frames(memoryview(frame)) == ([], 0)
    assert take_frames(memoryview(frame + b"\0\0\0" + BINDING)) == ([frame, BINDING], 32)
