"""Frames: every message survives the journey, and no bytes do harm."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any
from uuid import UUID

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channel.frames import (
    AGENT_FRAME_LIMIT,
    PORTAL_FRAME_LIMIT,
    REASSEMBLY_LIMIT,
    Frame,
    FrameDecoder,
    LocalProtocolError,
    RemoteProtocolError,
    encode_frame,
    encode_parts,
)
from channel.messages import (
    EVENT_BY_TYPE,
    FROM_CLIENT,
    FROM_GATEWAY,
    FROM_UNJOINED,
    TO_CLIENT,
    TO_GATEWAY,
    AuthorizationDenied,
    ClientInit,
    Disconnect,
    Heartbeat,
    Interface,
    Relays,
    Resource,
    ResourceRemoved,
    ResourceUpserted,
)
from tests.unit.channel.strategies import messages

COUNTERS = st.none() | st.integers(0, 2**63 - 1)


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def refusal_of(decoder: FrameDecoder, stream: bytes) -> RemoteProtocolError | None:
    """What the decoder raises, if anything; any other exception fails the test."""
    try:
        decoder.feed(stream)
    except RemoteProtocolError as error:
        refusal = error
    else:
        return None
    assert refusal.detail.isprintable()
    return refusal


def large_init(resources: int) -> ClientInit:
    return ClientInit(
        account_id=UUID(int=1),
        client_id=UUID(int=2),
        interface=Interface(
            ipv4=IPv4Address("100.64.0.1"),
            ipv6=IPv6Address("fd48::1"),
            range_ipv4=IPv4Network("100.64.0.0/11"),
            range_ipv6=IPv6Network("fd48::/64"),
        ),
        resources=tuple(
            Resource(id=UUID(int=n), name=f"résource {n} " + "x" * 200, kind="cidr", address="")
            for n in range(resources)
        ),
        relays=(),
        authorizations=(),
    )


@given(messages(), COUNTERS, COUNTERS, COUNTERS)
def test_every_message_comes_back_as_it_was(
    message: Any, ref: int | None, epoch: int | None, seq: int | None
) -> None:
    event = EVENT_BY_TYPE[type(message)]
    data = encode_frame(message, ref=ref, epoch=epoch, seq=seq, limit=PORTAL_FRAME_LIMIT)
    decoder = FrameDecoder({event: type(message)}, PORTAL_FRAME_LIMIT)
    assert decoder.feed(data) == [
        Frame(event=event, message=message, ref=ref, epoch=epoch, seq=seq)
    ]


def test_what_many_are_told_is_to_each_as_if_it_were_told_alone() -> None:
    """Its JSON is made once: for the same message, and for one that says the same."""
    one, other = (
        ResourceUpserted(resource=Resource(id=UUID(int=1), name=name, kind="cidr", address="x"))
        for name in ("one", "other")
    )
    gone = ResourceRemoved(resource_id=UUID(int=1))
    said = [one, one, other, gone, one, attrs.evolve(one), gone, other]
    for number, message in enumerate(said):
        (data,) = encode_parts(message, epoch=number + 7, seq=number, limit=PORTAL_FRAME_LIMIT)
        (frame,) = FrameDecoder(TO_CLIENT, PORTAL_FRAME_LIMIT).feed(data)
        assert (frame.message, frame.epoch, frame.seq) == (message, number + 7, number)


@given(st.lists(messages(), max_size=4), st.data())
def test_how_the_bytes_are_cut_makes_no_difference(sent: list[Any], data: st.DataObject) -> None:
    events = {EVENT_BY_TYPE[type(message)]: type(message) for message in sent}
    sent = [message for message in sent if events[EVENT_BY_TYPE[type(message)]] is type(message)]
    stream = b"".join(encode_frame(message, limit=PORTAL_FRAME_LIMIT) for message in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    decoder = FrameDecoder(events, PORTAL_FRAME_LIMIT)
    received: list[Frame] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += decoder.feed(stream[start:end])
    assert [frame.message for frame in received] == sent


@given(st.binary(max_size=300), st.sampled_from([FROM_UNJOINED, FROM_GATEWAY, TO_CLIENT]))
def test_no_bytes_raise_anything_but_a_remote_protocol_error(
    data: bytes, events: dict[str, type]
) -> None:
    for stream in (data, framed(data)):
        decoder = FrameDecoder(events, 256, reassembly_limit=256)
        error = refusal_of(decoder, stream)
        if error is not None:
            assert refusal_of(decoder, b"") is error


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    st.sampled_from(sorted({*FROM_CLIENT, *FROM_GATEWAY, *TO_CLIENT, *TO_GATEWAY})),
    JSON,
    st.none() | JSON,
    st.none() | st.lists(st.integers(-1, 5), min_size=1, max_size=3),
)
def test_no_json_raises_anything_but_a_remote_protocol_error(
    event: str, payload: Any, ref: Any, part: Any
) -> None:
    body = json.dumps({"event": event, "payload": payload, "ref": ref, "part": part}).encode()
    for events in (FROM_CLIENT, FROM_GATEWAY, TO_CLIENT, TO_GATEWAY):
        refusal_of(FrameDecoder(events, 1 << 16, reassembly_limit=1 << 16), framed(body))


@settings(max_examples=200)
@given(messages(), st.data())
def test_a_damaged_message_raises_nothing_but_a_remote_protocol_error(
    message: Any, data: st.DataObject
) -> None:
    event = EVENT_BY_TYPE[type(message)]
    body = bytearray(encode_frame(message, limit=PORTAL_FRAME_LIMIT))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(4, len(body) - 1))] = data.draw(st.integers(0, 255))
    refusal_of(FrameDecoder({event: type(message)}, PORTAL_FRAME_LIMIT), bytes(body))


def test_ten_megabytes_are_refused_by_their_length_alone() -> None:
    decoder = FrameDecoder(FROM_CLIENT, AGENT_FRAME_LIMIT)
    with pytest.raises(RemoteProtocolError, match="10485760 B, the limit is 65536 B") as caught:
        decoder.feed((10 * 1024 * 1024).to_bytes(4, "big"))
    assert caught.value.code == "frame_too_large"


def test_a_frame_may_be_as_large_as_the_limit_and_not_a_byte_larger() -> None:
    data = encode_frame(Heartbeat(sent_ns=5), limit=1000)
    size = len(data) - 4
    assert FrameDecoder(FROM_CLIENT, size).feed(data)
    with pytest.raises(RemoteProtocolError):
        FrameDecoder(FROM_CLIENT, size - 1).feed(data)
    with pytest.raises(LocalProtocolError, match="above the limit"):
        encode_frame(Heartbeat(sent_ns=5), limit=size - 1)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "frame_empty"),
        (b"{", "frame_malformed"),
        (b"[" * 60_000, "frame_malformed"),
        (b'{"event":"heartbeat","payload":' + b"[" * 60_000, "frame_malformed"),
        (b'{"event":"\xff","payload":{}}', "frame_malformed"),
        (b'{"event":"heartbeat"}', "frame_malformed"),
        (b'{"event":"heartbeat","ref":-1,"payload":{}}', "frame_malformed"),
        (b'{"event":"heartbeat","payload":{"sent_ns":-1}}', "message_malformed"),
        (b'{"event":"heartbeat","payload":{"sent_ns":1e400}}', "message_malformed"),
        (b'{"event":"init","part":[0,2],"payload":"AAAA"}', "parts_out_of_order"),
    ],
)
def test_each_malformation_has_its_code(body: bytes, code: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        FrameDecoder({**FROM_CLIENT, "init": ClientInit}, AGENT_FRAME_LIMIT).feed(framed(body))
    assert caught.value.code == code


def test_unknown_events_and_fields_are_skipped_and_events_counted() -> None:
    decoder = FrameDecoder(FROM_CLIENT, AGENT_FRAME_LIMIT)
    frames = decoder.feed(
        framed(b'{"event":"mood","payload":{"disk":"encrypted"}}')
        + framed(b'{"event":"heartbeat","colour":3,"payload":{"sent_ns":7,"mood":"good"}}')
    )
    assert [frame.message for frame in frames] == [Heartbeat(sent_ns=7)]
    assert decoder.statistics().unknown_events == 1
    assert decoder.statistics().frames == 2


def test_a_report_of_an_older_or_a_newer_agent_is_understood() -> None:
    older = {
        "authorization_id": str(UUID(int=1)),
        "protocol": "tcp",
        "source": "100.64.0.1",
        "destination": "10.0.0.1",
        "began_ns_ago": 2,
        "ended_ns_ago": 1,
    }
    newer = {**older, "ending": "of_another_kind", "flows": 0, "colour": "red"}
    payload = {"flows": [older, newer]}
    body = json.dumps({"event": "flow_log", "payload": payload}).encode()
    for events in (FROM_CLIENT, FROM_GATEWAY):
        [frame] = FrameDecoder(events, AGENT_FRAME_LIMIT).feed(framed(body))
        told = [(flow.ending, flow.flows) for flow in frame.message.flows]  # type: ignore[attr-defined]
        assert told == [("", 1), ("of_another_kind", 0)]


def test_a_relay_without_pins_is_understood_and_a_pin_that_is_none_refused() -> None:
    relay = {
        "id": str(UUID(int=1)),
        "addresses": [{"address": "192.0.2.1", "port": 443, "transport": "tls"}],
        "username": "u",
        "password": "p",
        "expires_in_ns": 1,
    }

    def told(fields: dict[str, Any]) -> bytes:
        payload = {"added": [{**relay, **fields}]}
        return framed(json.dumps({"event": "relays", "payload": payload}).encode())

    decoder = FrameDecoder(TO_CLIENT, PORTAL_FRAME_LIMIT)
    for extra, pins in (({}, ()), ({"certificate_pins": ["ab" * 32]}, ("ab" * 32,))):
        [frame] = decoder.feed(told(extra))
        assert isinstance(frame.message, Relays)
        assert frame.message.added[0].certificate_pins == pins
    for wrong in (["AB" * 32], ["ab" * 31], ["ab" * 32] * 5):
        assert refusal_of(
            FrameDecoder(TO_CLIENT, PORTAL_FRAME_LIMIT), told({"certificate_pins": wrong})
        )


def test_an_address_with_a_scope_or_as_a_number_is_refused() -> None:
    for address in ("fe80::1%;reboot", 5, "1.2.3.4/8"):
        body = {
            "event": "candidates",
            "payload": {
                "connection_id": str(UUID(int=1)),
                "generation": 0,
                "add": [
                    {"kind": "host", "address": address, "port": 5, "priority": 1,
                     "foundation": "a"}
                ],
            },
        }  # fmt: skip
        with pytest.raises(RemoteProtocolError) as caught:
            FrameDecoder(FROM_CLIENT, AGENT_FRAME_LIMIT).feed(framed(json.dumps(body).encode()))
        assert str(address) not in caught.value.detail


def test_events_may_change_between_two_frames_of_one_chunk() -> None:
    decoder = FrameDecoder(FROM_UNJOINED, AGENT_FRAME_LIMIT)
    beat = encode_frame(Heartbeat(), limit=1000)
    decoder.push(beat + beat)
    decoder.events = FROM_CLIENT
    assert decoder.next_frame() is not None
    decoder.events = FROM_UNJOINED
    assert decoder.next_frame() is None
    assert decoder.statistics().unknown_events == 1


def test_a_large_init_travels_in_parts_of_which_none_is_above_the_limit() -> None:
    message = large_init(6_000)
    frames = encode_parts(message, epoch=3, seq=1, limit=PORTAL_FRAME_LIMIT)
    assert len(frames) > 1
    assert all(len(frame) <= PORTAL_FRAME_LIMIT + 4 for frame in frames)
    decoder = FrameDecoder(TO_CLIENT, PORTAL_FRAME_LIMIT, reassembly_limit=REASSEMBLY_LIMIT)
    for frame in frames[:-1]:
        assert decoder.feed(frame) == []
    (received,) = decoder.feed(frames[-1])
    assert received.message == message
    assert (received.epoch, received.seq) == (3, 1)


def test_a_small_init_is_one_frame_and_another_message_never_in_parts() -> None:
    assert len(encode_parts(large_init(1), limit=PORTAL_FRAME_LIMIT)) == 1
    with pytest.raises(LocalProtocolError, match="above the limit"):
        encode_parts(Disconnect(reason="draining", detail="x" * 1000, retry=True), limit=600)


def test_parts_that_are_missing_mixed_or_too_many_are_refused() -> None:
    frames = encode_parts(large_init(20), limit=2_000)
    other = encode_parts(large_init(30), limit=2_000)
    beat = encode_frame(Heartbeat(), limit=1000)
    for stream, code in (
        (frames[1], "parts_out_of_order"),
        (frames[0] + frames[2], "parts_out_of_order"),
        (frames[0] + frames[0], "parts_out_of_order"),
        (frames[0] + other[1], "parts_out_of_order"),
        (frames[0] + beat, "parts_out_of_order"),
        (b"".join(frames), "parts_too_large"),
    ):
        decoder = FrameDecoder(TO_CLIENT, 2_000, reassembly_limit=4_000)
        with pytest.raises(RemoteProtocolError) as caught:
            decoder.feed(stream)
        assert caught.value.code == code


def test_what_is_no_message_is_our_own_mistake() -> None:
    with pytest.raises(LocalProtocolError, match="str is not a message"):
        encode_frame("hello", limit=1000)
    with pytest.raises(LocalProtocolError, match="cannot be encoded"):
        encode_frame(Heartbeat(sent_ns=object()), limit=1000)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "two\nlines", "\x9b31m", "\x7f", "\x00"])
def test_text_that_would_steer_a_terminal_is_refused_in_every_message(text: str) -> None:
    told = [
        ResourceUpserted(
            resource=Resource(id=UUID(int=1), name=text, kind="cidr", address="10.0.0.0/8")
        ),
        ResourceUpserted(resource=Resource(id=UUID(int=1), name="web", kind="dns", address=text)),
        AuthorizationDenied(resource_id=UUID(int=1), reason="forbidden", violated=(text,)),
        Disconnect(reason="unavailable", detail=text, retry=True),
    ]
    for message in told:
        decoder = FrameDecoder(TO_CLIENT, PORTAL_FRAME_LIMIT)
        with pytest.raises(RemoteProtocolError) as caught:
            decoder.feed(encode_frame(message, limit=PORTAL_FRAME_LIMIT))
        assert caught.value.code == "message_malformed"
        assert caught.value.detail.isprintable()
