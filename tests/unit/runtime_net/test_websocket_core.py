"""One end of a WebSocket against the other, and against whoever breaks the rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage

from runtime.net.websocket_core import (
    CONNECTION_LOST,
    PEER_BROKE_RULES,
    REFUSED,
    WebSocketCore,
)

LIMIT = 1_000
REQUEST = (
    b"GET /channel HTTP/1.1\r\nHost: portal.example.org:443\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: test.1\r\n\r\n"
)


def server() -> WebSocketCore:
    return WebSocketCore(
        is_client=False, path="/channel", subprotocol="test.1", message_bytes=LIMIT
    )


def client(subprotocol: str = "test.1") -> WebSocketCore:
    return WebSocketCore(
        is_client=True,
        path="/channel",
        subprotocol=subprotocol,
        host="portal.example.org:443",
        message_bytes=LIMIT,
    )


def written(core: WebSocketCore) -> bytes:
    """All that an end has to say now."""
    pieces = []
    while piece := core.output():
        pieces.append(piece)
    return b"".join(pieces)


def exchange(one: WebSocketCore, other: WebSocketCore) -> None:
    """Until neither has anything to say."""
    while True:
        data = written(one)
        answer = written(other)
        if not data and not answer:
            return
        if data:
            other.receive(data)
        if answer:
            one.receive(answer)


def connected() -> tuple[WebSocketCore, WebSocketCore]:
    near, far = client(), server()
    exchange(near, far)
    assert near.is_open
    assert far.is_open
    return near, far


def opened_server() -> tuple[WebSocketCore, Connection]:
    """A server, and wsproto's own connection of a client that it has let in."""
    core = server()
    core.receive(REQUEST)
    assert written(core).startswith(b"HTTP/1.1 101 ")
    return core, Connection(ConnectionType.CLIENT)


# --- the ordinary course -----------------------------------------------------------------------


@given(
    pieces=st.lists(st.binary(max_size=3 * LIMIT), max_size=8),
    cuts=st.lists(st.integers(1, 700), min_size=1, max_size=20),
    from_client=st.booleans(),
)
def test_bytes_arrive_as_they_were_sent_however_they_are_cut(
    pieces: list[bytes], cuts: list[int], from_client: bool
) -> None:
    sender, receiver = connected() if from_client else connected()[::-1]
    for piece in pieces:
        sender.send(piece)
    assert sender.queued_bytes == sum(map(len, pieces))
    data = written(sender)
    assert sender.queued_bytes == 0
    step = 0
    while data:
        size = cuts[step % len(cuts)]
        receiver.receive(data[:size])
        data = data[size:]
        step += 1
    assert receiver.take_received() == b"".join(pieces)
    assert receiver.received_bytes == 0
    assert receiver.closed is None


def test_a_ping_passes_what_is_queued_and_is_answered_once() -> None:
    near, far = connected()
    near.send(b"x" * 2 * LIMIT)
    near.ping()
    near.ping()
    far.receive(near.output())
    assert far.received_bytes == 0
    far.ping()  # its own is no reason to leave out the answer
    exchange(near, far)
    assert near.pongs == 1
    assert far.pongs == 1
    assert far.received_bytes == 2 * LIMIT


def test_of_many_pings_the_last_is_answered() -> None:
    core, peer = opened_server()
    core.receive(b"".join(peer.send(Ping(payload=bytes([n]))) for n in range(200)))
    peer.receive_data(written(core))
    assert list(peer.events()) == [Pong(payload=b"\xc7")]


@pytest.mark.parametrize("code", [0, 1, 12, 999])
def test_an_end_carries_its_code_and_is_answered(code: int) -> None:
    near, far = connected()
    far.send(b"last words")
    far.close(code, "enough", keep_queue=True)
    assert far.closed is not None
    exchange(near, far)
    assert near.take_received() == b"last words"
    assert near.closed is not None
    assert (near.closed.code, near.closed.reason) == (code, "enough")
    assert near.is_finished
    assert far.is_finished


def test_without_a_wait_an_end_comes_instead_of_what_is_queued() -> None:
    near, far = connected()
    far.send(b"x" * 5 * LIMIT)
    far.close(3, "overflow", keep_queue=False)
    assert far.queued_bytes == 0
    exchange(near, far)
    assert near.received_bytes == 0
    assert near.closed is not None
    assert near.closed.code == 3


def test_both_may_end_it_at_once() -> None:
    near, far = connected()
    near.close(0, "I", keep_queue=True)
    far.close(4, "you", keep_queue=True)
    exchange(near, far)
    assert near.is_finished
    assert far.is_finished
    assert near.closed is not None
    assert near.closed.reason == "I"


def test_a_reason_of_any_length_fits() -> None:
    near, far = connected()
    far.close(9, "ä" * 500, keep_queue=True)
    exchange(near, far)
    assert near.closed is not None
    assert near.closed.reason == "ä" * 61


def test_what_comes_after_the_end_is_not_kept() -> None:
    near, far = connected()
    far.close(0, "", keep_queue=True)
    near.send(b"too late")
    far.receive(near.output())
    assert far.received_bytes == 0
    exchange(near, far)
    assert far.is_finished


def test_a_connection_that_broke_is_lost() -> None:
    near, _ = connected()
    near.lost("reset")
    assert near.closed is not None
    assert near.closed.code == CONNECTION_LOST
    assert near.is_finished
    near.receive(b"anything")
    assert near.output() == b""


# --- whoever breaks the rules ------------------------------------------------------------------


def close_code(peer: Connection, data: bytes) -> int:
    """Of the close frame that a server said last."""
    peer.receive_data(data)
    *_, last = peer.events()
    assert isinstance(last, CloseConnection)
    return int(last.code)


def test_a_message_above_the_limit_ends_it_before_it_is_there() -> None:
    core, peer = opened_server()
    whole = peer.send(BytesMessage(data=b"x" * (LIMIT + 1)))
    core.receive(whole[: LIMIT + 7])
    assert core.closed is None
    core.receive(whole[LIMIT + 7 :])
    assert core.closed is not None
    assert core.closed.code == PEER_BROKE_RULES
    assert core.is_finished
    assert close_code(peer, written(core)) == 1009


def test_a_message_above_the_limit_in_fragments_is_one_too() -> None:
    core, peer = opened_server()
    for _ in range(LIMIT // 100):
        core.receive(peer.send(BytesMessage(data=b"x" * 100, message_finished=False)))
    assert core.closed is None
    core.receive(peer.send(BytesMessage(data=b"x", message_finished=True)))
    assert close_code(peer, written(core)) == 1009


def test_fragments_are_joined_and_pings_may_come_between() -> None:
    core, peer = opened_server()
    core.receive(peer.send(BytesMessage(data=b"ab", message_finished=False)))
    core.receive(peer.send(Ping(payload=b"?")))
    core.receive(peer.send(BytesMessage(data=b"", message_finished=False)))
    core.receive(peer.send(BytesMessage(data=b"cd", message_finished=True)))
    assert core.take_received() == b"abcd"
    peer.receive_data(written(core))
    assert list(peer.events()) == [Pong(payload=b"?")]


def test_text_is_refused() -> None:
    core, peer = opened_server()
    core.receive(peer.send(TextMessage(data="{}")))
    assert core.received_bytes == 0
    assert close_code(peer, written(core)) == 1003


@pytest.mark.parametrize(
    "frame",
    [
        b"\x82\x01x",  # a client's frame without a mask
        b"\xc2\x81\0\0\0\0x",  # a bit of an extension that nobody agreed on
        b"\x80\x81\0\0\0\0x",  # the continuation of nothing
        b"\x83\x81\0\0\0\0x",  # an opcode that does not exist
        b"\x09\x80\0\0\0\0",  # a ping in fragments
        b"\x89\xfe\x00\x7e\0\0\0\0" + bytes(126),  # a ping of 126 bytes
        b"\x88\x81\0\0\0\0x",  # half a close code
        b"\x82\xff" + b"\xff" * 8 + b"\0\0\0\0",  # 2**64 - 1 bytes to come
    ],
)
def test_what_is_no_frame_ends_it_with_a_code(frame: bytes) -> None:
    core, peer = opened_server()
    core.receive(frame)
    assert core.closed is not None
    assert core.closed.code == PEER_BROKE_RULES
    assert close_code(peer, written(core)) == 1002


@given(st.binary(max_size=2_000))
def test_no_bytes_raise(data: bytes) -> None:
    fresh = server()
    fresh.receive(data)
    fresh.receive(data)
    written(fresh)
    core, _ = opened_server()
    core.receive(data)
    core.receive(data)
    written(core)
    assert core.received_bytes <= 2 * len(data)
    near = client()
    written(near)
    near.receive(data)
    near.receive(data)
    written(near)
    open_client, _ = connected()
    open_client.receive(data)
    open_client.receive(data)
    written(open_client)


# --- who is let in -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        (b"/channel", b"/", 404),
        (b"/channel", b"/channels", 404),
        (b"test.1", b"test.2", 400),
        (b"Sec-WebSocket-Protocol: test.1\r\n", b"", 400),
        (b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Version: 8", 426),
        (b"Upgrade: websocket", b"Upgrade: h2c", 400),
        (b"Host: portal", b"Origin: https://evil.example\r\nHost: portal", 403),
        (b"Host: portal", b"origin: null\r\nHost: portal", 403),
        (b"GET", b"POST", 400),
        (b"Host: portal.example.org:443\r\n", b"", 400),
    ],
)
def test_whoever_asks_for_something_else_is_refused(old: bytes, new: bytes, status: int) -> None:
    core = server()
    core.receive(REQUEST.replace(old, new))
    assert core.closed is not None
    assert core.closed.code == REFUSED
    assert written(core).startswith(b"HTTP/1.1 %d " % status)
    assert core.is_finished


def test_no_extension_is_spoken_though_it_is_offered() -> None:
    core = server()
    core.receive(
        REQUEST[:-2]
        + b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
    )
    assert b"xtensions" not in written(core)
    assert core.is_open


def test_headers_without_end_are_refused() -> None:
    core = server()
    for _ in range(40):
        core.receive(
            b"GET /channel HTTP/1.1\r\n" if core.output() else b"X-Filler: " + b"x" * 1_000
        )
    assert core.closed is not None


def test_a_client_that_is_refused_or_answered_by_something_else_says_so() -> None:
    for answer in (
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: x\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    ):
        near = client()
        written(near)
        near.receive(answer)
        assert near.closed is not None
        assert near.closed.code == REFUSED


def test_a_client_takes_no_other_subprotocol_than_its_own() -> None:
    near, far = client(), server()
    far.receive(written(near))
    near.receive(written(far).replace(b"Sec-WebSocket-Protocol: test.1\r\n", b""))
    assert near.closed is not None
    assert near.closed.code == REFUSED
