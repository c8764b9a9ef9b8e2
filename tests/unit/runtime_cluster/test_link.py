"""Frames and the core of a link, with two cores talking to each other."""

from __future__ import annotations

import contextlib
from typing import Any

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.clock import NS_PER_S
from runtime.cluster.frames import (
    FULL_FRAME_BYTES,
    MAX_FRAME_BYTES,
    MAX_FRAME_MESSAGES,
    FrameSplitter,
    FrameWriter,
    LinkProtocolError,
    MessageCodec,
    frame,
)
from runtime.cluster.link import (
    Choice,
    Congested,
    Hello,
    Link,
    LinkLost,
    LinkRefused,
    LinkSettings,
    LinkState,
    Unreachable,
    choose,
)
from runtime.presence.crdt import Entry, Replica, Slice
from runtime.presence.tracker import Heartbeat
from runtime.refs import ActorRef, decode_ref, encode_ref


@attrs.frozen
class Note:
    text: str
    number: int = 0


@attrs.frozen
class Stranger:
    """Not registered."""


@attrs.frozen
class Letter:
    """Has a field of a type that msgspec does not know."""

    to: ActorRef


CODEC = MessageCodec({16: Note, 17: Heartbeat})
SETTINGS = LinkSettings(max_queued_messages=100, max_queued_bytes=10_000, batch_bytes=1_000)


def links(now: int = 0, *, incarnation: int = 1, codec: MessageCodec = CODEC) -> tuple[Link, Link]:
    """Both ends of a connection of nodes a (the arbiter) and b."""
    a = Link(Hello(node="a", incarnation=incarnation), "b", CODEC, SETTINGS, now)
    b = Link(Hello(node="b", incarnation=incarnation), "a", codec, SETTINGS, now)
    return a, b


def exchange(a: Link, b: Link, now: int = 0) -> tuple[list[object], list[object]]:
    """Carry everything both ways; what arrived at a, and at b."""
    at_a: list[object] = []
    at_b: list[object] = []
    while a.has_output or b.has_output:
        if a.has_output:
            at_b.extend(b.receive(a.take_batch(), now))
        if b.has_output:
            at_a.extend(a.receive(b.take_batch(), now))
        if a.state is LinkState.UNDECIDED:
            a.accept(now)
    return at_a, at_b


def ready(now: int = 0) -> tuple[Link, Link]:
    a, b = links(now)
    exchange(a, b, now)
    assert a.state is b.state is LinkState.READY
    return a, b


def test_messages_pass_both_ways_in_order_once_the_arbiter_has_chosen():
    a, b = ready()
    for number in range(50):
        a.enqueue(number, Note("from a", number))
    b.enqueue(7, Note("from b"))
    at_a, at_b = exchange(a, b)
    assert at_a == [(7, Note("from b"))]
    assert at_b == [(number, Note("from a", number)) for number in range(50)]
    assert a.protocol == b.protocol == 1
    assert a.statistics().sent_messages == b.statistics().received_messages == 50
    assert a.statistics().batches > 2, "a batch is limited"


def test_a_heartbeat_of_presence_crosses_unchanged():
    a, b = ready()
    replica = Replica("a", 1)
    beat = Heartbeat(replica, 3, (Slice(replica, 1, 3, (Entry(2, "t", "k", 1, b"\xff"),), (1,)),))
    a.enqueue(1, beat)
    assert exchange(a, b)[1] == [(1, beat)]


def test_hooks_carry_a_type_that_msgpack_does_not_know_and_refuse_what_is_none():
    codec = MessageCodec(
        {16: Letter}, enc_hook=encode_ref, dec_hook=lambda _type, value: decode_ref(value)
    )
    letter = Letter(ActorRef("a", 3))
    writer = FrameWriter(codec)
    writer.append(1, letter)
    writer.finish()
    ((kind, number, body),) = FrameSplitter().feed(bytes(writer.data))
    assert codec.decode_frame(kind, number, body) == [(1, letter)]
    for malformed in (b"\x81\xa2to\x07", b"\x81\xa2to\xc4\x01\x07"):
        with pytest.raises(LinkProtocolError, match="malformed"):
            codec.decode(16, memoryview(malformed))
    with pytest.raises(TypeError):
        FrameWriter(MessageCodec({16: Letter})).append(1, letter)


def test_before_it_is_ready_nothing_is_sent():
    a, _ = links()
    with pytest.raises(Unreachable, match="hello"):
        a.enqueue(1, Note("x"))


def test_what_is_not_registered_here_is_not_sent_and_from_there_is_skipped():
    a, b = ready()
    with pytest.raises(TypeError, match="Stranger"):
        a.enqueue(1, Stranger())
    a, b = links(codec=MessageCodec({17: Heartbeat}))
    exchange(a, b)
    a.enqueue(1, Note("new"))
    assert exchange(a, b)[1] == []
    assert b.statistics().skipped == 1


def test_a_full_queue_refuses_and_takes_again_when_a_batch_has_gone():
    a, b = ready()
    for _ in range(100):
        a.enqueue(1, Note("x"))
    with pytest.raises(Congested, match="b is unreachable"):
        a.enqueue(1, Note("x"))
    assert a.statistics().queued_messages == 100
    a.take_batch()
    a.enqueue(1, Note("x"))
    for _ in range(3):
        b.enqueue(1, Note("x" * 4_000))
    with pytest.raises(Congested):
        b.enqueue(1, Note("x"))
    assert b.statistics().congested == 1


def test_a_silent_peer_is_lost_and_one_that_answers_is_not():
    a, b = ready()
    now = 0
    while now < 10 * NS_PER_S:
        now = min(each for each in (a.poll_timeout(), b.poll_timeout()) if each is not None)
        for link in (a, b):
            link.handle_timeout(now)
        exchange(a, b, now)
    assert a.statistics().rtt_ns == 0
    for _ in range(2):
        now += SETTINGS.ping_ns
        a.handle_timeout(now)
    with pytest.raises(LinkLost, match="nothing heard"):
        a.handle_timeout(now + SETTINGS.ping_ns)


def test_a_node_that_was_stopped_itself_does_not_blame_the_other():
    a, _ = ready()
    a.handle_timeout(60 * NS_PER_S)
    assert a.has_output, "it asks"
    a.handle_timeout(61 * NS_PER_S)
    a.handle_timeout(62 * NS_PER_S)
    with pytest.raises(LinkLost):
        a.handle_timeout(63 * NS_PER_S)


def test_a_receiver_at_work_does_not_take_its_own_deafness_for_silence():
    a, _ = ready()
    a.set_busy(True, 0)
    a.handle_timeout(SETTINGS.silence_ns)
    assert a.poll_timeout() == SETTINGS.silence_ns + SETTINGS.ping_ns
    a.set_busy(False, SETTINGS.silence_ns)
    a.handle_timeout(SETTINGS.silence_ns + 1)


def test_who_says_no_hello_is_lost_at_the_deadline():
    a, _ = links()
    assert a.poll_timeout() == SETTINGS.handshake_ns
    with pytest.raises(LinkLost, match="hello"):
        a.handle_timeout(SETTINGS.handshake_ns)


def test_a_refusal_tells_why_and_its_text_is_made_harmless():
    a, b = links()
    b.receive(a.take_batch(), 0)
    a.refuse("there is\x1b[31m one already")
    with pytest.raises(LinkRefused, match=r"there is\?\[31m one"):
        b.receive(a.take_batch(), 0)
    assert a.poll_timeout() is None


def test_another_name_or_version_or_incarnation_than_can_be_is_refused():
    for hello in (
        Hello(node="c", incarnation=1),
        Hello(node="b", incarnation=-1),
        Hello(node="b", incarnation=1, protocol_low=2, protocol_high=9),
    ):
        a, _ = links()
        liar = Link(hello, "a", CODEC, SETTINGS, 0)
        with pytest.raises(LinkProtocolError):
            a.receive(liar.take_batch(), 0)


@pytest.mark.parametrize(
    "data",
    [
        frame(16, 1, b"\x92\xa1x\x01"),  # a message first
        frame(2, 0, b""),  # READY from whoever is not the arbiter
        frame(3, 0, b""),
        frame(1, 0, b"\xc1"),
        frame(1, 0, b"\x91" * 3_000),
        frame(9, 0, b""),
        b"\0\0\0\0",
        b"\0\0\x20\0",  # longer than a hello may be
        b"\xff" * 10,
    ],
)
def test_what_may_not_come_first_ends_the_link(data: bytes):
    a, _ = links()
    with pytest.raises(LinkProtocolError):
        a.receive(data, 0)


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x91" * 100_000, b"\x82"])
def test_a_malformed_message_ends_the_link_without_its_content(body: bytes):
    a, _ = ready()
    with pytest.raises(LinkProtocolError, match=r"^a message of kind 16 is malformed"):
        a.receive(frame(16, 1, body), 0)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_make_messages_or_a_protocol_error(data: bytes, begun: bool):
    link = ready()[0] if begun else links()[0]
    with contextlib.suppress(LinkProtocolError, LinkRefused):
        link.receive(data, 0)


@given(st.lists(st.binary(max_size=40), max_size=12), st.lists(st.integers(1, 30)))
def test_frames_survive_any_cutting_of_the_stream(bodies: list[bytes], cuts: list[int]):
    stream = b"".join(frame(16 + place, place, body) for place, body in enumerate(bodies))
    splitter = FrameSplitter()
    found = []
    position = 0
    for size in [*cuts, len(stream)]:
        chunk = stream[position : position + size]
        position += size
        found.extend((kind, target, bytes(body)) for kind, target, body in splitter.feed(chunk))
    assert found == [(16 + place, place, body) for place, body in enumerate(bodies)]


@attrs.frozen
class Parcel:
    content: Any


@attrs.frozen
class Nudge:
    """The smallest message."""


PARCELS = MessageCodec({16: Note, 18: Parcel, 19: Nudge})
SENT = st.tuples(
    st.integers(0, 2**64 - 1),
    st.builds(Note, st.text(max_size=5), st.integers(0, 9)) | st.builds(Parcel, st.binary()),
)
UNSENDABLE = st.sampled_from(
    [(1, Stranger()), (-1, Note("x")), (2**64, Note("x")), (1, Parcel(object()))]
)


def written(writer: FrameWriter) -> list[tuple[int, int, list[tuple[int, object]] | None]]:
    """What a reader makes of each frame, with its kind and the number in its header."""
    writer.finish()
    frames = FrameSplitter().feed(bytes(writer.data))
    return [(kind, n, PARCELS.decode_frame(kind, n, body)) for kind, n, body in frames]


@given(st.lists(SENT | UNSENDABLE | st.just(None), max_size=30))
def test_messages_are_framed_by_class_and_what_cannot_be_sent_leaves_nothing(
    steps: list[tuple[int, object] | None],
):
    writer = FrameWriter(PARCELS)
    sent = []
    for step in steps:
        if step is None:
            writer.finish()
            continue
        try:
            writer.append(*step)
        except (TypeError, ValueError):
            continue
        sent.append(step)
    frames = written(writer)
    assert [message for _, _, messages in frames for message in messages or ()] == sent
    assert all(n == len(messages or ()) > 0 for _, n, messages in frames)
    assert writer.messages == len(sent)


VAST_BYTES = MAX_FRAME_BYTES - 100
"""Fits into a frame of its own, but not beside another message."""


def test_a_frame_takes_only_so_many_messages_and_bytes_and_the_next_takes_the_rest():
    writer = FrameWriter(PARCELS)
    for number in range(MAX_FRAME_MESSAGES + 1):
        writer.append(number % 100, Nudge())
    assert [number for _, number, _ in written(writer)] == [MAX_FRAME_MESSAGES, 1]
    writer = FrameWriter(PARCELS)
    small, full, vast = (Parcel(bytes(size)) for size in (100, FULL_FRAME_BYTES, VAST_BYTES))
    for parcel in (small, full, small, vast, small):
        writer.append(1, parcel)
        with pytest.raises(ValueError, match="at most"):
            writer.append(1, Parcel(bytes(MAX_FRAME_BYTES)))
    one, two, three, four = (messages for _, _, messages in written(writer))
    assert one == [(1, small), (1, full)]
    assert (two, three, four) == ([(1, small)], [(1, vast)], [(1, small)])


@pytest.mark.parametrize("number", [0, 2, 2**64 - 1])
def test_a_frame_of_another_number_of_messages_than_it_says_ends_the_link(number: int):
    a, _ = ready()
    with pytest.raises(LinkProtocolError, match="1 messages in a frame of"):
        a.receive(frame(16, number, msgspec.msgpack.encode([(1, Note("x"))])), 0)


def test_a_frame_of_too_many_messages_ends_the_link():
    a, _ = ready()
    many = [(1, Note("x"))] * (MAX_FRAME_MESSAGES + 1)
    with pytest.raises(LinkProtocolError, match="malformed"):
        a.receive(frame(16, len(many), msgspec.msgpack.encode(many)), 0)


def test_limits_of_frames_and_codecs():
    with pytest.raises(ValueError, match="at most"):
        frame(16, 0, bytes(MAX_FRAME_BYTES))
    with pytest.raises(ValueError, match="number"):
        frame(16, -1, b"")
    with pytest.raises(ValueError, match="kinds"):
        MessageCodec({15: Note})
    with pytest.raises(ValueError, match="two kinds"):
        MessageCodec({16: Note, 17: Note})
    with pytest.raises(ValueError, match="ping"):
        LinkSettings(ping_ns=5, silence_ns=5)


def test_the_arbiters_rule():
    young, old = SETTINGS.handshake_ns - 1, SETTINGS.handshake_ns
    for standing, candidate, age_ns, expected in (
        (1, 2, young, Choice.REPLACE),
        (2, 1, old, Choice.REFUSE),
        (1, 1, young, Choice.REFUSE),
        (1, 1, old, Choice.REPLACE),
    ):
        choice = choose(standing=standing, candidate=candidate, age_ns=age_ns, settings=SETTINGS)
        assert choice is expected
