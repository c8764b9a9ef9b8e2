"""aioquic's connection, bent where its public interface has no word for what is needed.

Everything that reaches into aioquic is in this file and in `runtime.net.quic_short` (the common
packets, written and read directly): a receive window that follows the reader, one stream and no
other, stateless resets (RFC 9000, section 10.3), the validated path, the peer's chain. The
dependency is pinned; the tests on real sockets would show a change.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Callable
from functools import cache
from typing import Final

import attrs
from aioquic.quic import connection as aioquic_connection
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.connection import (
    MAX_STREAM_DATA_FRAME_CAPACITY,
    QuicConnectionState,
    QuicReceiveContext,
)
from aioquic.quic.events import ConnectionTerminated, QuicEvent
from aioquic.quic.packet import QuicFrameType, QuicProtocolVersion
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.stream import QuicStream
from cryptography.x509 import Certificate

from runtime.net.quic_short import CID_BYTES, ShortPackets

RESET_TOKEN_BYTES: Final = 16
MIN_RESET_BYTES: Final = 21
LEAST_DATAGRAM_BYTES: Final = 21
"""Nothing shorter is a QUIC packet (RFC 9000, section 10.3): a server's socket need not take it."""

TIMER_GRAIN_S: Final = 0.004
"""Far below the 25 ms for which peers are told that acknowledgements may wait (`max_ack_delay`)."""
_MAX_CIDS: Final = 3
"""Of a connection at a time. Each change of path takes one, which is replaced; aioquic makes 8."""
_UNLIMITED: Final = 2**61
_MAX_DATAGRAM_FRAME_BYTES: Final = 65_535
"""What RFC 9221, section 3, recommends to announce."""
_DATAGRAM_FRAME_HEAD_BYTES: Final = 3
_SHORT_PACKET_BYTES: Final = 1 + 4 + 16
"""Beside the connection id: the first byte, the longest packet number, and the tag."""
_DRAINING: Final = QuicConnectionState.DRAINING
_NS_PER_S: Final = 10**9

# Every connection has a table of 33 frame types; most of it is these sets, of which there are few.
aioquic_connection.EPOCHS = cache(aioquic_connection.EPOCHS)


@attrs.frozen(kw_only=True)
class QuicLimits:
    """What one endpoint allows. From `max_connections` on, listeners alone.

    `receive_window_bytes` may lie unread on a connection; `send_buffer_bytes` unacknowledged,
    beyond which `send` refuses (one call may go above it). Sources are IPv4 addresses and
    IPv6 /64 networks. `resets_per_s` bounds answers to packets of unknown connections.
    `datagram_bytes` is the size of UDP datagrams. With `carries_datagrams` a connection takes
    DATAGRAM frames (RFC 9221) beside its stream, of which `waiting_datagrams` may wait to be sent.
    `client_opens` says who opens the stream.
    """

    receive_window_bytes: int = 256 * 1024
    send_buffer_bytes: int = 4 * 1024 * 1024
    datagram_bytes: int = SMALLEST_MAX_DATAGRAM_SIZE
    carries_datagrams: bool = False
    waiting_datagrams: int = 256
    client_opens: bool = False
    idle_timeout_ns: int = 15 * _NS_PER_S
    handshake_timeout_ns: int = 10 * _NS_PER_S
    max_connections: int = 20_000
    max_connections_per_source: int = 1_000
    max_handshakes: int = 512
    max_handshakes_per_source: int = 128
    retry_above_handshakes: int = 32
    resets_per_s: int = 100


class QuicCore(ShortPackets):
    """aioquic's connection, with a receive window that follows the reader and no other streams."""

    def __init__(
        self,
        configuration: QuicConfiguration,
        window: int,
        reset_token: Callable[[bytes], bytes] | None = None,
        original_destination: bytes | None = None,
        retry_source: bytes | None = None,
        *,
        client_opens: bool = False,
    ) -> None:
        self._reset_token = reset_token
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination,
            retry_source_connection_id=retry_source,
        )
        self._window = window
        self._consumed = 0
        self.packets_heard = 0
        self.is_released = False
        streams_of_peer = 0 if configuration.is_client == client_opens else 1
        for limit, value in (
            (self._local_max_streams_bidi, streams_of_peer),
            (self._local_max_streams_uni, 0),
        ):
            limit.value = limit.sent = value
        if reset_token is not None:
            self._host_cids[0].stateless_reset_token = reset_token(self.host_cid)

    def forget_handshake(self) -> None:
        """Let go of what only the handshake needed, half of what a connection holds: three buffers
        of 16 KiB, and a server's keys of TLS. A message of TLS that still comes is refused by its
        state alone (a server), or read without answer (a client: tickets)."""
        self._crypto_buffers.clear()
        if not self._is_client:
            tls = self.tls
            tls.key_schedule = tls._key_schedule_psk = tls._key_schedule_proxy = None
            tls._x25519_private_key = tls._x448_private_key = None
            tls._ec_private_keys.clear()
            tls.handshake_extensions, tls.received_extensions = [], None

    def release(self) -> None:
        """The connection is over: undo what holds it in circles, so that its memory is free at
        once, and not when the garbage collector has been everywhere. Nothing is to be asked of it
        any more but `peer_chain`, and what its streams hold."""
        self.is_released = True
        vars(self)["_QuicConnection__frame_handlers"].clear()
        for space in self._loss.spaces:
            space.sent_packets.clear()
        del self._loss
        self._cryptos, self._cryptos_initial = {}, {}
        if hasattr(self, "tls"):
            self.tls.alpn_cb = None
            self.tls.update_traffic_key_cb = lambda *_: None

    def open_stream(self) -> QuicStream:
        return self._get_or_create_stream_for_send(self.get_next_available_stream_id())

    def stream(self, stream_id: int) -> QuicStream | None:
        return self._streams.get(stream_id)

    def datagram_room(self) -> int:
        """Bytes of the largest DATAGRAM frame's data that the peer takes and one packet carries;
        0 where the peer takes none."""
        frame = min(self._remote_max_datagram_frame_size or 0, _MAX_DATAGRAM_FRAME_BYTES)
        packet = self._max_datagram_size - _SHORT_PACKET_BYTES - len(self._peer_cid.cid)
        return max(0, min(frame, packet) - _DATAGRAM_FRAME_HEAD_BYTES)

    def waiting_datagrams(self) -> int:
        return len(self._datagrams_pending)

    def buffered_bytes(self, stream: QuicStream) -> int:
        return len(stream.sender._buffer)

    def consume(self, stream: QuicStream, size: int) -> bool:
        """Count what was read; True when the peer should be told of the room."""
        self._consumed += size
        return self._consumed + self._window - stream.max_stream_data_local >= self._window // 2

    def _must_tell_limit(self, stream: QuicStream) -> bool:
        limit = stream.max_stream_data_local
        return (
            stream.max_stream_data_local_sent != limit
            or self._consumed + self._window - limit >= self._window // 2
        )

    def has_begun(self) -> bool:
        """Whether any packet of the peer could be read yet (a server's connection)."""
        return self._state is not QuicConnectionState.FIRSTFLIGHT

    def next_event(self) -> QuicEvent | None:
        return self._events.popleft() if self._events else None

    def next_look(self) -> float:
        """When `handle_timer` is to be called, if nothing comes before (seconds; infinity: never).
        It is `get_timer`, put off to the next TIMER_GRAIN_S, so that the timers of thousands of
        connections come up together; only where the pacer waits it is exact."""
        timer = self.get_timer()
        if timer is None:
            return math.inf
        if self._pacing_at is not None:
            return timer
        return math.ceil(timer / TIMER_GRAIN_S) * TIMER_GRAIN_S

    def probe(self) -> None:
        """Have the next packet ask for an answer, even beyond the congestion window."""
        self._probe_pending = True

    def probe_timeout(self) -> float:
        """How long an answer may take (seconds): PTO, RFC 9002, section 6.2.1."""
        return self._loss.get_probe_timeout()

    def ended_by_peer(self) -> ConnectionTerminated | None:
        """How the peer closed, at once: aioquic itself tells only after its draining period."""
        return self._close_event if self._state is _DRAINING else None

    def validated_address(self) -> tuple[str, int] | None:
        """The address of the active path, None while that is being validated."""
        paths = self._network_paths
        if not paths or not paths[0].is_validated:
            return None
        address: tuple[str, int] = paths[0].addr
        return address

    def peer_chain(self) -> tuple[Certificate, ...]:
        own = getattr(self.tls, "_peer_certificate", None) if hasattr(self, "tls") else None
        return () if own is None else (own, *self.tls._peer_certificate_chain)

    def is_reset(self, datagram: bytes) -> bool:
        """Whether a datagram is a stateless reset by the peer (RFC 9000, section 10.3.1)."""
        if len(datagram) < MIN_RESET_BYTES or datagram[0] & 0x80:
            return False
        tail = datagram[-RESET_TOKEN_BYTES:]
        return any(
            cid.stateless_reset_token and hmac.compare_digest(cid.stateless_reset_token, tail)
            for cid in (self._peer_cid, *self._peer_cid_available)
        )

    def _payload_received(
        self, context: QuicReceiveContext, plain: bytes, crypto_frame_required: bool = False
    ) -> tuple[bool, bool]:
        self.packets_heard += 1  # it could be decrypted, so the peer sealed it
        return super()._payload_received(context, plain, crypto_frame_required)

    def _replenish_connection_ids(self) -> None:
        self._remote_active_connection_id_limit = min(
            self._remote_active_connection_id_limit, _MAX_CIDS
        )
        super()._replenish_connection_ids()
        if self._reset_token is not None:
            for cid in self._host_cids:
                if not cid.was_sent:
                    cid.stateless_reset_token = self._reset_token(cid.cid)

    def _write_stream_limits(
        self, builder: QuicPacketBuilder, space: object, stream: QuicStream
    ) -> None:
        """Raise MAX_STREAM_DATA by what was read, in steps of half a window."""
        limit = self._consumed + self._window
        if limit - stream.max_stream_data_local >= self._window // 2:
            stream.max_stream_data_local = limit
        told = stream.max_stream_data_local_sent == stream.max_stream_data_local
        if told or stream.stream_id is None:
            return
        buffer = builder.start_frame(
            QuicFrameType.MAX_STREAM_DATA,
            capacity=MAX_STREAM_DATA_FRAME_CAPACITY,
            handler=self._on_max_stream_data_delivery,
            handler_args=(stream,),
        )
        buffer.push_uint_var(stream.stream_id)
        buffer.push_uint_var(stream.max_stream_data_local)
        stream.max_stream_data_local_sent = stream.max_stream_data_local


def make_configuration(limits: QuicLimits, alpn: str, *, is_client: bool) -> QuicConfiguration:
    """aioquic's settings for one protocol; certificates are the caller's to add. No 0-RTT."""
    return QuicConfiguration(
        alpn_protocols=[alpn],
        is_client=is_client,
        connection_id_length=CID_BYTES,
        idle_timeout=limits.idle_timeout_ns / _NS_PER_S,
        max_datagram_size=limits.datagram_bytes,
        # There is one stream, so its own limit is the one that counts.
        max_data=_UNLIMITED,
        max_stream_data=limits.receive_window_bytes,
        max_datagram_frame_size=_MAX_DATAGRAM_FRAME_BYTES if limits.carries_datagrams else None,
        supported_versions=[QuicProtocolVersion.VERSION_1],
    )
