"""The two commonest packets of a connection that is at peace, without aioquic's detours.

A portal node with thousands of agents spends its time on packets with a short header that carry
one acknowledgement, one piece of the one stream, or both. aioquic builds and reads them as it does
every other: through a builder that looks for fifteen kinds of frames, and a parser of headers. Here
they are written and read directly, where nothing else is due; everything else takes aioquic's way.
What a packet means (recovery, congestion, pacing, acknowledgements, keys, idle time) is told to the
same objects with the same values, and the tests hold each packet against aioquic's own.

One thing is decided here: an acknowledgement that waits for its delay leaves with the first data
that does (RFC 9000, section 13.2.1).
"""

from __future__ import annotations

from typing import Final

from aioquic._crypto import CryptoError
from aioquic.quic.connection import (
    NetworkAddress,
    QuicConnection,
    QuicConnectionError,
    QuicConnectionState,
    QuicReceiveContext,
)
from aioquic.quic.packet import QuicPacketType, decode_packet_number
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.quic.recovery import MAX_ACK_RANGES, QuicPacketSpace
from aioquic.quic.stream import QuicStream
from aioquic.tls import Epoch

# Every look at a key or a packet space hashes one of these, of which there are four for ever: by
# identity, which is what their equality is, and not by the hash of their name, in Python.
Epoch.__hash__ = object.__hash__  # type: ignore[method-assign]

CID_BYTES: Final = 8
"""Of the connection ids that are given out here; a peer's are as long as it likes."""

_ONE_RTT: Final = Epoch.ONE_RTT
_CONNECTED: Final = QuicConnectionState.CONNECTED
_TAG_BYTES: Final = 16
_NUMBER_BYTES: Final = 2
"""Of the packet numbers that are written."""
_HEADER_BYTES: Final = 1 + CID_BYTES
"""Of a short header that comes, before the packet number (RFC 9000, section 17.3.1)."""
_SAMPLE_AT: Final = _HEADER_BYTES + 4
"""Where the sample for the header's protection begins (RFC 9001, section 5.4.2)."""
_SAMPLE_BYTES: Final = 16
_ACK: Final = b"\x02"
_STREAM_WITH_LENGTH: Final = 0x0A
_STREAM_OFFSET_BIT: Final = 0x04


class ShortPackets(QuicConnection):
    """aioquic's connection, with short ways for what is common. `QuicCore` is made of it."""

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        """As aioquic's, which builds a packet to find that nothing stands in it: most connections
        that are looked at have only taken an acknowledgement."""
        if self._state is _CONNECTED:
            self._bring_acknowledgement_forward(now)
        if self._is_calm():
            if self._has_no_frame(now):
                self._pacing_at = None
                return []
            datagram = self._short_packet(now)
            if datagram is not None:
                return [(datagram, self._network_paths[0].addr)]
        return super().datagrams_to_send(now)

    def receive_datagram(self, data: bytes, addr: NetworkAddress, now: float) -> None:
        """As aioquic's. The short way is for a connection at peace, on its one path."""
        if not self._receive_short(data, addr, now):
            super().receive_datagram(data, addr, now)

    def get_timer(self) -> float | None:
        """As aioquic's, which asks the packet spaces of the handshake too."""
        if (
            self._state is not _CONNECTED
            or not self._handshake_confirmed
            or not self._network_paths[0].is_validated
            or self._close_at is None
        ):
            return super().get_timer()
        timer, space, loss = self._close_at, self._spaces[_ONE_RTT], self._loss
        if space.ack_at is not None and space.ack_at < timer:
            timer = space.ack_at
        loss_at = space.loss_time
        if loss_at is None and space.ack_eliciting_in_flight:
            loss_at = loss._time_of_last_sent_ack_eliciting_packet + (
                loss.get_probe_timeout() * 2**loss._pto_count
            )
        if loss_at is not None and loss_at < timer:
            timer = loss_at
        self._loss_at = loss_at
        if self._pacing_at is not None and self._pacing_at < timer:
            timer = self._pacing_at
        return timer

    def is_at_rest(self, now: float) -> bool:
        """Whether there is nothing to report, to send, or to wait for but the end of an idle
        connection: no look at it is needed before that, or before something comes."""
        if self._events or not self._is_calm() or not self._has_no_frame(now):
            return False
        space = self._spaces[_ONE_RTT]
        return (
            space.ack_at is None and space.loss_time is None and not space.ack_eliciting_in_flight
        )

    def _has_nothing_to_send(self, now: float) -> bool:
        """Whether a packet would be empty; False where that is not plain to see."""
        return self._is_calm() and self._has_no_frame(now)

    # --- helpers -------------------------------------------------------------------------------

    def _must_tell_limit(self, stream: QuicStream) -> bool:
        """Whether MAX_STREAM_DATA is due."""
        raise NotImplementedError

    def _is_calm(self) -> bool:
        """Whether nothing could stand in a packet but an acknowledgement and bytes of the stream;
        False where that is not plain to see."""
        paths = self._network_paths
        if (
            self._state is not _CONNECTED
            or not self._handshake_confirmed
            or len(paths) != 1
            or not paths[0].is_validated
            or self._handshake_done_pending
            or self._close_pending
            or paths[0].remote_challenges
            or self._probe_pending
            or self._ping_pending
            or self._retire_connection_ids
            or self._streams_blocked_pending
            or self._datagrams_pending
            or self._remote_preferred_address is not None
            or not self._crypto_streams[_ONE_RTT].sender.buffer_is_empty
            or len(self._streams) > 1
        ):
            return False
        for cid in self._host_cids:
            if not cid.was_sent:
                return False
        for stream in self._streams.values():
            if (
                stream.sender.reset_pending
                or stream.receiver.stop_pending
                or stream.is_finished
                or self._must_tell_limit(stream)
            ):
                return False
        return True

    def _has_no_frame(self, now: float) -> bool:
        """Of a calm connection: neither an acknowledgement is due, nor are there bytes to send."""
        ack_at = self._spaces[_ONE_RTT].ack_at
        return (ack_at is None or ack_at > now) and self._unsent() is None

    def _unsent(self) -> QuicStream | None:
        """The stream of a calm connection, if bytes of it wait to be sent."""
        for stream in self._streams.values():
            if not stream.sender.buffer_is_empty:
                return stream
        return None

    def _bring_acknowledgement_forward(self, now: float) -> None:
        space = self._spaces[_ONE_RTT]
        if space.ack_at is None or space.ack_at <= now:
            return
        for stream in self._streams.values():
            if len(stream.sender._pending):
                space.ack_at = now

    # --- one packet that is sent -----------------------------------------------------------------

    def _short_packet(self, now: float) -> bytes | None:
        """The packet of a calm connection that carries everything it has; None where that is more
        than one, or may not go now, or is not so simple: nothing is changed then."""
        space, crypto = self._spaces[_ONE_RTT], self._cryptos[_ONE_RTT]
        if self._quic_logger is not None or crypto._update_key_requested:
            return None
        if (space.ack_at is None or space.ack_at >= now) and (
            self._loss._pacer.next_send_time(now=now) is not None
        ):
            return None
        acknowledgement = b""
        if space.ack_at is not None and space.ack_at <= now:
            if len(space.ack_queue) != 1:
                return None
            acknowledgement = self._ack_frame(space, now)
        packet = QuicSentPacket(
            epoch=_ONE_RTT,
            in_flight=False,
            is_ack_eliciting=False,
            is_crypto_packet=False,
            packet_number=self._packet_number,
            packet_type=QuicPacketType.ONE_RTT,
            sent_time=now,
        )
        if acknowledgement:
            acknowledged = (space, space.largest_received_packet)
            packet.delivery_handlers.append((self._on_ack_delivery, acknowledged))
        payload, stream = acknowledgement, self._unsent()
        if stream is not None:
            frame = self._stream_frame(stream, packet, len(acknowledgement))
            if frame is None:
                return None
            payload += frame
        self._pacing_at = None
        if acknowledgement:
            space.ack_at = None
        datagram = self._sealed(payload, packet.packet_number)
        packet.sent_bytes = len(datagram)
        self._note_sent(packet, space, now)
        return datagram

    def _ack_frame(self, space: QuicPacketSpace, now: float) -> bytes:
        """RFC 9000, section 19.3, with one range."""
        acknowledged = space.ack_queue[0]
        assert space.largest_received_time is not None
        waited = now - space.largest_received_time
        delay = int(waited * 1_000_000) >> self._local_ack_delay_exponent
        largest = acknowledged.stop - 1
        range_ = _varint(largest - acknowledged.start)
        return _ACK + _varint(largest) + _varint(delay) + b"\0" + range_

    def _stream_frame(
        self, stream: QuicStream, packet: QuicSentPacket, before: int
    ) -> bytes | None:
        """All that waits on the stream as one frame (RFC 9000, section 19.8), noted in `packet`;
        None, and nothing is changed, where it does not go into one, after `before` bytes."""
        sender = stream.sender
        if stream.is_blocked or len(sender._pending) != 1 or sender._buffer_fin is not None:
            return None
        assert stream.stream_id is not None
        waiting = sender._pending[0]
        start, stop = waiting.start, waiting.stop
        kind, place = _STREAM_WITH_LENGTH, b""
        if start:
            kind, place = _STREAM_WITH_LENGTH | _STREAM_OFFSET_BIT, _varint(start)
        head = bytes((kind,)) + _varint(stream.stream_id) + place
        size = 1 + len(self._peer_cid.cid) + _NUMBER_BYTES + before + len(head) + 2 + _TAG_BYTES
        loss, fresh = self._loss, max(0, stop - sender.highest_offset)
        if (
            size + stop - start > self._max_datagram_size
            or loss.congestion_window - loss.bytes_in_flight < self._max_datagram_size
            or fresh > self._remote_max_data - self._remote_max_data_used
            or stop > stream.max_stream_data_remote
        ):
            return None
        begin = start - sender._buffer_start
        data = bytes(sender._buffer[begin : begin + stop - start])
        sender._pending.shift()
        sender.buffer_is_empty = True
        sender.highest_offset = max(stop, sender.highest_offset)
        self._remote_max_data_used += fresh
        packet.in_flight = packet.is_ack_eliciting = True
        packet.delivery_handlers.append((sender.on_data_delivery, (start, stop, False)))
        return head + (len(data) | 0x4000).to_bytes(2, "big") + data

    def _sealed(self, payload: bytes, number: int) -> bytes:
        """The packet: sealed (RFC 9001, section 5.3), and its header protected (section 5.4)."""
        crypto = self._cryptos[_ONE_RTT]
        aead, protection = crypto.send.aead, crypto.send.hp
        assert aead is not None
        assert protection is not None
        first = 0x40 | self._spin_bit << 5 | crypto.key_phase << 2 | _NUMBER_BYTES - 1
        cid, short = self._peer_cid.cid, number & 0xFFFF
        header = bytes((first,)) + cid + short.to_bytes(_NUMBER_BYTES, "big")
        sealed = aead.encrypt(payload, header, number)
        at = 4 - _NUMBER_BYTES
        mask = protection._mask(sealed[at : at + _SAMPLE_BYTES])
        hidden = short ^ (mask[1] << 8 | mask[2])
        return b"".join(
            (bytes((first ^ mask[0] & 0x1F,)), cid, hidden.to_bytes(_NUMBER_BYTES, "big"), sealed)
        )

    def _note_sent(self, packet: QuicSentPacket, space: QuicPacketSpace, now: float) -> None:
        """Tell recovery, congestion control, the pacer and the idle timer (RFC 9000, 10.1)."""
        self._loss._pacer.update_after_send(now=now)
        self._packet_number += 1
        self._loss.on_packet_sent(packet=packet, space=space)
        if packet.is_ack_eliciting and not self._ack_eliciting_sent_since_receipt:
            self._close_at = now + self._idle_timeout()
            self._ack_eliciting_sent_since_receipt = True
        self._network_paths[0].bytes_sent += packet.sent_bytes

    # --- one packet that came --------------------------------------------------------------------

    def _receive_short(self, data: bytes, addr: NetworkAddress, now: float) -> bool:
        """Take a datagram that is one packet with a short header, on the one path, to the
        connection id in use, under the keys in use. False, and nothing is changed, for others."""
        paths = self._network_paths
        if (
            len(data) < _SAMPLE_AT + _SAMPLE_BYTES
            or data[0] & 0xC0 != 0x40
            or self._state is not _CONNECTED
            or not self._handshake_confirmed
            or self._close_pending
            or self._quic_logger is not None
            or len(paths) != 1
            or not paths[0].is_validated
            or paths[0].addr != addr
            or data[1:_HEADER_BYTES] != self.host_cid
            or self._cryptos[Epoch.ZERO_RTT].recv.aead is not None
        ):
            return False
        space, crypto = self._spaces[_ONE_RTT], self._cryptos[_ONE_RTT].recv
        if crypto.aead is None or crypto.hp is None:
            return False
        mask = crypto.hp._mask(data[_SAMPLE_AT : _SAMPLE_AT + _SAMPLE_BYTES])
        first = data[0] ^ mask[0] & 0x1F
        if first >> 2 & 1 != crypto.key_phase or first & 0x18:
            return False  # new keys, or a mistake to be told
        size = (first & 0x03) + 1
        end = _HEADER_BYTES + size
        hidden = int.from_bytes(data[_HEADER_BYTES:end], "big")
        short = hidden ^ int.from_bytes(mask[1 : 1 + size], "big")
        number = decode_packet_number(short, size * 8, space.expected_packet_number)
        header = bytes((first,)) + data[1:_HEADER_BYTES] + short.to_bytes(size, "big")
        try:
            plain = crypto.aead.decrypt(data[end:], header, number)
        except CryptoError:
            return True  # it is not the peer's
        if number not in space.received_packets:
            self._take(plain, number, bool(first & 0x20), now)
        return True

    def _take(self, plain: bytes, number: int, spin_bit: bool, now: float) -> None:
        """Follow what a packet says, as aioquic does after it has opened one."""
        space = self._spaces[_ONE_RTT]
        if number > space.expected_packet_number:
            space.expected_packet_number = number + 1
        if number > self._spin_highest_pn:
            self._spin_bit = spin_bit != self._is_client
            self._spin_highest_pn = number
        context = QuicReceiveContext(
            epoch=_ONE_RTT,
            host_cid=self.host_cid,
            network_path=self._network_paths[0],
            quic_logger_frames=None,
            time=now,
            version=None,
        )
        try:
            is_ack_eliciting, _ = self._payload_received(context, plain)
        except QuicConnectionError as error:
            self._logger.warning(error)
            self.close(
                error_code=error.error_code,
                frame_type=error.frame_type,
                reason_phrase=error.reason_phrase,
            )
        if self._state is not _CONNECTED or self._close_pending:
            return
        self._close_at = now + self._idle_timeout()
        self._ack_eliciting_sent_since_receipt = False
        if number > space.largest_received_packet:
            space.largest_received_packet = number
            space.largest_received_time = now
        space.ack_queue.add(number)
        space.received_packets.add(number)
        if len(space.ack_queue) > MAX_ACK_RANGES:
            space.ack_queue.shift()
        if is_ack_eliciting and space.ack_at is None:
            space.ack_at = now + self._ack_delay


def _varint(value: int) -> bytes:
    """RFC 9000, section 16."""
    if value < 1 << 6:
        return value.to_bytes(1, "big")
    if value < 1 << 14:
        return (value | 1 << 14).to_bytes(2, "big")
    if value < 1 << 30:
        return (value | 2 << 30).to_bytes(4, "big")
    return (value | 3 << 62).to_bytes(8, "big")
