"""One WebSocket (RFC 6455) as a byte stream: a core, around wsproto's.

    HANDSHAKE --request and its answer--> OPEN --close, either side--> CLOSING --> FINISHED
        |                                   |                            ^            ^
        +--- refused -----------------------|----------------------------|------------+
                                            +--- the peer broke a rule --+

Bytes of the transport go in by `receive`, and come out of `output` in pieces, as they can be
written; what the peer sent is in `received`. Messages are binary, and where one ends means nothing:
they carry one stream of bytes. No extension is spoken, so nothing is ever inflated.

What is bounded: a message (whichever way), by `message_bytes`; what waits to be sent, by the
caller, who asks for `queued_bytes`. However many pings come, only the last one is owed an answer
(section 5.5.3); however often one is asked for, one ping is owed to the peer.
"""

from __future__ import annotations

from collections import deque
from enum import Enum, auto
from typing import Final

import attrs
import h11
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    Pong,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from runtime.net.connection import ConnectionClosed

CONNECTION_LOST: Final = -1
"""TCP or TLS ended without a word of the peer's."""
HANDSHAKE_TIMEOUT: Final = -2
REFUSED: Final = -3
"""The server does not speak this here, or refused to."""
PEER_BROKE_RULES: Final = -4

NORMAL: Final = 1000
WRONG_TYPE: Final = 1003
TOO_LARGE: Final = 1009
CODE_BASE: Final = 4000
"""An application's code n above 0 travels as 4000 + n (section 7.4.2), 0 as 1000."""

_MAX_CODE: Final = 999
_MAX_REASON_BYTES: Final = 123
_FORBIDDEN, _NOT_FOUND, _BAD_REQUEST = 403, 404, 400
_NS_PER_S: Final = 10**9


@attrs.frozen(kw_only=True)
class WebSocketLimits:
    """What one end allows. From `max_connections` on, listeners alone.

    `message_bytes` is the most that a message has; `receive_window_bytes` may lie unread on a
    connection, `send_buffer_bytes` wait to be sent, beyond which `send` refuses (one call may go
    above it). `handshake_timeout_ns` is for TCP and TLS and the first line of the request, and
    again for the rest of it. Sources are IPv4 addresses and IPv6 /64 networks.
    """

    message_bytes: int = 64 * 1024
    receive_window_bytes: int = 256 * 1024
    send_buffer_bytes: int = 4 * 1024 * 1024
    handshake_timeout_ns: int = 10 * _NS_PER_S
    max_connections: int = 10_000
    max_connections_per_source: int = 1_000
    max_handshakes: int = 512
    max_handshakes_per_source: int = 128


class WebSocketClosed(ConnectionClosed):
    """The WebSocket is over: by an application's code, or CONNECTION_LOST, HANDSHAKE_TIMEOUT,
    REFUSED or PEER_BROKE_RULES."""


class _State(Enum):
    HANDSHAKE = auto()
    OPEN = auto()
    CLOSING = auto()
    FINISHED = auto()


class WebSocketCore:
    """One end. `path` and `subprotocol` are what is asked for, or what alone is granted; a client
    names the `host` (with its port) that it thinks it talks to. A server refuses whoever has an
    Origin: those are browsers, on behalf of some page.
    """

    def __init__(
        self, *, is_client: bool, path: str, subprotocol: str, host: str = "", message_bytes: int
    ) -> None:
        self._path = path
        self._subprotocol = subprotocol
        self._message_limit = message_bytes
        self._wsproto = WSConnection(ConnectionType.CLIENT if is_client else ConnectionType.SERVER)
        self._state = _State.HANDSHAKE
        self._handshake_output = b""
        self._queue: deque[memoryview] = deque()
        self._message_bytes = 0
        self._ping_owed = False
        self._pong_owed: bytes | None = None
        self._close_owed: CloseConnection | None = None
        self.queued_bytes = 0
        self.received: list[bytes] = []
        self.received_bytes = 0
        self.pongs = 0
        self.closed: WebSocketClosed | None = None
        if is_client:
            self._handshake_output = self._wsproto.send(
                Request(host=host, target=path, subprotocols=[subprotocol])
            )

    @property
    def is_open(self) -> bool:
        """The handshake is done, and the connection not over."""
        return self._state is _State.OPEN

    @property
    def is_finished(self) -> bool:
        """Nothing is left to be said or heard, once `output` gives nothing any more."""
        return self._state is _State.FINISHED

    def receive(self, data: bytes) -> None:
        """Take bytes of the peer's. Never raises for their sake."""
        if self.is_finished:
            return
        try:
            self._wsproto.receive_data(data)
            for event in self._wsproto.events():
                self._handle(event)
        except (RemoteProtocolError, UnicodeError) as error:
            hint = getattr(error, "event_hint", None)
            status = hint.status_code if isinstance(hint, RejectConnection) else _BAD_REQUEST
            self._refuse(status, str(error) or "no request of a WebSocket")

    def take_received(self) -> bytes:
        """What the peer has sent and was not taken yet."""
        data = b"".join(self.received)
        self.received.clear()
        self.received_bytes = 0
        return data

    def send(self, data: bytes) -> None:
        """Queue bytes for the peer; in pieces, so that none of them exceeds a message."""
        whole = memoryview(data)
        for start in range(0, len(data), self._message_limit):
            self._queue.append(whole[start : start + self._message_limit])
        self.queued_bytes += len(data)

    def ping(self) -> None:
        """Ask for a pong, before whatever is queued."""
        self._ping_owed = True

    def close(self, code: int, reason: str, *, keep_queue: bool) -> None:
        """Say that this is the end, after what is queued or instead of it."""
        if self._state is _State.HANDSHAKE:
            self._finish(WebSocketClosed(code, reason))
        elif self._state is _State.OPEN:
            if not keep_queue:
                self._drop_queue()
            self._end(WebSocketClosed(code, reason), _close_frame(code, reason))

    def lost(self, reason: str) -> None:
        """The transport is over."""
        self._finish(WebSocketClosed(CONNECTION_LOST, reason))

    def output(self) -> bytes:
        """The next bytes to write, b"" if there are none now. Answers and pings go first."""
        data, self._handshake_output = self._handshake_output, b""
        if data or self._state in (_State.HANDSHAKE, _State.FINISHED):
            return data
        if self._pong_owed is not None:
            pong, self._pong_owed = Pong(payload=self._pong_owed), None
            return self._encode(pong)
        if self._ping_owed:
            self._ping_owed = False
            return self._encode(Ping(payload=b""))
        if self._queue:
            piece = self._queue.popleft()
            self.queued_bytes -= len(piece)
            return self._encode(BytesMessage(data=bytes(piece)))
        if self._close_owed is not None:
            close, self._close_owed = self._close_owed, None
            data = self._encode(close)
            if self._wsproto.state is ConnectionState.CLOSED:
                self._state = _State.FINISHED
            return data
        return b""

    # --- helpers -------------------------------------------------------------------------------

    def _encode(self, event: Event) -> bytes:
        try:
            return self._wsproto.send(event)
        except LocalProtocolError:  # the peer has said its last word
            return b""

    def _handle(self, event: Event) -> None:
        if self.is_finished:
            return
        match event:
            case BytesMessage():
                self._handle_bytes(bytes(event.data), event.message_finished)
            case TextMessage():
                self._break("a message of text", WRONG_TYPE)
            case Ping():
                self._pong_owed = bytes(event.payload)
            case Pong():
                self.pongs += 1
            case CloseConnection():
                self._handle_close(event)
            case Request():
                self._judge(event)
            case AcceptConnection():
                if event.subprotocol == self._subprotocol:
                    self._state = _State.OPEN
                else:
                    self._finish(WebSocketClosed(REFUSED, "the server speaks another protocol"))
            case RejectConnection():
                said = f"the server answered {event.status_code}"
                self._finish(WebSocketClosed(REFUSED, said))
            case RejectData():
                pass

    def _handle_bytes(self, data: bytes, finished: bool) -> None:
        self._message_bytes += len(data)
        if self._message_bytes > self._message_limit:
            self._break(f"a message above {self._message_limit} B", TOO_LARGE)
            return
        if finished:
            self._message_bytes = 0
        if self._state is _State.OPEN and data:
            self.received.append(data)
            self.received_bytes += len(data)

    def _handle_close(self, event: CloseConnection) -> None:
        if self._wsproto.state is ConnectionState.CLOSED:  # the answer to ours
            self._state = _State.FINISHED
        elif self._wsproto.state is ConnectionState.REMOTE_CLOSING:
            self._drop_queue()
            code = int(event.code)
            known = WebSocketClosed(_code_of(code), event.reason or "closed by the peer")
            answer = CloseConnection(code=NORMAL if code == 1005 else code)
            self._end(known, answer)
        else:  # no frame of the peer's: wsproto found that it broke the rules
            self._break(event.reason or "not a WebSocket's frame", int(event.code))

    def _judge(self, request: Request) -> None:
        if request.target.partition("?")[0] != self._path:
            self._refuse(_NOT_FOUND, "no such path")
        elif any(name == b"origin" for name, _ in request.extra_headers):
            self._refuse(_FORBIDDEN, "a browser")
        elif self._subprotocol not in request.subprotocols:
            self._refuse(_BAD_REQUEST, "another subprotocol")
        else:
            self._handshake_output += self._wsproto.send(
                AcceptConnection(subprotocol=self._subprotocol)
            )
            self._state = _State.OPEN

    def _refuse(self, status: int, why: str) -> None:
        """End the handshake; a server says so by an HTTP status."""
        if self._state is not _State.HANDSHAKE:
            self._break(why, 1002)
            return
        if not self._wsproto.client:
            try:
                self._handshake_output += self._wsproto.send(
                    RejectConnection(status_code=status, headers=[(b"connection", b"close")])
                )
            except (LocalProtocolError, h11.LocalProtocolError):  # nothing that has an answer
                self._handshake_output = b""
        self._finish(WebSocketClosed(REFUSED, why))

    def _break(self, why: str, code: int) -> None:
        """The peer broke a rule: say so, and hear no more of it."""
        self._drop_queue()
        if self._state is _State.OPEN:
            self._end(WebSocketClosed(PEER_BROKE_RULES, why), CloseConnection(code=code))
        data = self.output() + self.output()  # what is left of the handshake, and the close frame
        self._finish(WebSocketClosed(PEER_BROKE_RULES, why))
        self._handshake_output = data

    def _end(self, closed: WebSocketClosed, farewell: CloseConnection) -> None:
        self.closed = self.closed or closed
        self._state = _State.CLOSING
        self._pong_owed, self._ping_owed = None, False
        self._close_owed = farewell

    def _finish(self, closed: WebSocketClosed) -> None:
        self.closed = self.closed or closed
        self._drop_queue()
        self._state = _State.FINISHED

    def _drop_queue(self) -> None:
        self._queue.clear()
        self.queued_bytes = 0


def _close_frame(code: int, reason: str) -> CloseConnection:
    """The close frame of an application's code; a reason that is too long is cut."""
    cut = reason.encode()[:_MAX_REASON_BYTES].decode(errors="ignore")
    return CloseConnection(code=CODE_BASE + code if 0 < code <= _MAX_CODE else NORMAL, reason=cut)


def _code_of(code: int) -> int:
    """The application's code of a close frame's; one that is no application's stays as it is."""
    if code in (NORMAL, 1005):  # none was given
        return 0
    return code - CODE_BASE if CODE_BASE < code <= CODE_BASE + _MAX_CODE else code
