"""The short ways of `runtime.net.quic_short`, held against aioquic's own: the same fate befalls two
pairs of ends, one of which takes the short ways and one never."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import attrs
import pytest
from aioquic.quic.connection import NetworkAddress, QuicConnection, QuicReceiveContext
from aioquic.quic.packet import QuicErrorCode
from aioquic.tls import Epoch

from runtime.net.quic_core import QuicCore
from tests.unit.runtime_net.quic_pair import CLIENT, SERVER, Pair

WINDOW = 12_000
MAX_STREAM_BYTES = 100_000


class Recording(QuicCore):
    """Keeps what it read, and counts how."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.read: list[bytes] = []
        self.ways: Counter[str] = Counter()

    def _payload_received(
        self, context: QuicReceiveContext, plain: bytes, crypto_frame_required: bool = False
    ) -> tuple[bool, bool]:
        if context.epoch is Epoch.ONE_RTT:
            self.read.append(plain)
        return super()._payload_received(context, plain, crypto_frame_required)

    def get_timer(self) -> float | None:
        timer = super().get_timer()
        assert timer == QuicConnection.get_timer(self)
        return timer


class Short(Recording):
    def _short_packet(self, now: float) -> bytes | None:
        packet = super()._short_packet(now)
        self.ways["sent"] += packet is not None
        return packet

    def _receive_short(self, data: bytes, addr: NetworkAddress, now: float) -> bool:
        is_taken = super()._receive_short(data, addr, now)
        self.ways["received"] += is_taken
        return is_taken


class Long(Recording):
    """Takes aioquic's way always."""

    def _short_packet(self, now: float) -> bytes | None:
        return None

    def _receive_short(self, data: bytes, addr: NetworkAddress, now: float) -> bool:
        return False


def state(core: Recording) -> dict[str, object]:
    """Everything that a packet, sent or received, has an effect on."""
    space, loss = core._spaces[Epoch.ONE_RTT], core._loss
    streams = core._streams.values()
    return {
        "state": core._state,
        "number": core._packet_number,
        "path": [(path.bytes_sent, path.bytes_received) for path in core._network_paths],
        "spin": (core._spin_bit, core._spin_highest_pn),
        "close": (core._close_at, core._close_pending, core._ack_eliciting_sent_since_receipt),
        "keys": core._cryptos[Epoch.ONE_RTT].key_phase,
        "received": (
            space.ack_at,
            list(space.ack_queue),
            space.expected_packet_number,
            space.largest_received_packet,
            space.largest_received_time,
            space.received_packets._lower,
            space.received_packets._received,
        ),
        "sent": [
            (
                number,
                packet.epoch,
                packet.packet_type,
                packet.in_flight,
                packet.is_ack_eliciting,
                packet.is_crypto_packet,
                packet.packet_number,
                packet.sent_time,
                packet.sent_bytes,
                [handler.__name__ for handler, _ in packet.delivery_handlers],
            )
            for number, packet in space.sent_packets.items()
        ],
        "recovery": (
            space.ack_eliciting_in_flight,
            space.largest_acked_packet,
            space.loss_time,
            loss._pto_count,
            loss._rtt_smoothed,
            loss._rtt_variance,
            loss._time_of_last_sent_ack_eliciting_packet,
        ),
        "congestion": (loss.congestion_window, loss.bytes_in_flight),
        "pacer": attrs_of(loss._pacer),
        "data": core._remote_max_data_used,
        "streams": [
            (
                stream.stream_id,
                stream.max_stream_data_remote,
                stream.max_stream_data_local,
                stream.max_stream_data_local_sent,
                list(stream.sender._pending),
                list(stream.sender._acked),
                stream.sender._buffer,
                stream.sender.highest_offset,
                stream.receiver.starting_offset(),
            )
            for stream in streams
        ],
        "read": core.read,
    }


def attrs_of(thing: object) -> dict[str, object]:
    return dict(vars(thing))


@attrs.define
class Twins:
    """A pair that takes short ways and one that does not, and what happens to both."""

    pairs: tuple[Pair, Pair]

    @classmethod
    def made(cls) -> Twins:
        twins = cls((Pair.made(Short), Pair.made(Long)))
        for pair in twins.pairs:
            pair.establish()
            for core in (pair.client, pair.server):
                assert isinstance(core, Recording)
                # A handshake's packets are of random lengths: from here on the two are the same.
                core._loss._cc.congestion_window = WINDOW
                core._loss._pacer.update_rate(WINDOW, core._loss._rtt_smoothed)
                core._network_paths[0].bytes_sent = core._network_paths[0].bytes_received = 0
                core.read.clear()
        return twins

    def do(self, seed: int) -> None:
        """Some act of one end, and then the fate of each datagram."""
        for pair in self.pairs:
            rng = random.Random(seed)
            act(pair, rng)
            pass_on(pair, rng)
        self.compare()

    def compare(self) -> None:
        short, long = self.pairs
        for one, other in ((short.client, long.client), (short.server, long.server)):
            assert isinstance(one, Recording)
            assert isinstance(other, Recording)
            for core in (one, other):  # which aioquic's way does at each look
                core._loss._pacer.update_bucket(now=short.now)
            assert state(one) == state(other)

    def ways(self) -> Counter[str]:
        ends = (self.pairs[0].client, self.pairs[0].server)
        return sum((end.ways for end in ends if isinstance(end, Short)), Counter())


def act(pair: Pair, rng: random.Random) -> None:
    assert pair.stream is not None
    ends = (pair.client, pair.server)
    match rng.randrange(12):
        case 0 | 1 | 2 | 3:
            pair.stream.sender.write(rng.randbytes(rng.randrange(1, 1_500)))
        case 4 | 5 | 6:
            stream = pair.client.stream(pair.stream.stream_id or 0)
            if stream is not None:
                stream.sender.write(rng.randbytes(rng.randrange(1, 1_500)))
        case 7:
            pair.server.consume(pair.stream, MAX_STREAM_BYTES)
        case 8:
            pair.stream.sender.write(rng.randbytes(rng.randrange(1, MAX_STREAM_BYTES)))
        case 9:
            rng.choice(ends).request_key_update()
        case 10:
            rng.choice(ends).send_ping(rng.randrange(100))
        case 11:
            rng.choice(ends).probe()


def pass_on(pair: Pair, rng: random.Random) -> None:
    """Some turns in which datagrams are lost, doubled, overtaken and broken."""
    is_rough = rng.random() < 0.5
    for _ in range(rng.randrange(1, 6)):
        pair.now += rng.choice((0.0002, 0.002, 0.03))
        for sender, receiver, address in (
            (pair.client, pair.server, CLIENT),
            (pair.server, pair.client, SERVER),
        ):
            timer = sender.get_timer()
            if timer is not None and timer <= pair.now:
                sender.handle_timer(pair.now)
            datagrams = [data for data, _ in sender.datagrams_to_send(pair.now)]
            fates = [rng.random() if is_rough else 1.0 for _ in datagrams]
            for data, fate in zip(datagrams, fates, strict=True):
                if fate < 0.1:
                    continue  # lost
                if fate < 0.2:  # broken, and then as it was
                    broken = bytearray(data)
                    broken[10 + int(fate * 1000) % (len(data) - 10)] ^= 1
                    receiver.receive_datagram(bytes(broken), address, pair.now)
                receiver.receive_datagram(data, address, pair.now)
                if fate < 0.3:
                    receiver.receive_datagram(data, address, pair.now)
            while receiver.next_event() is not None:
                pass


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_the_short_ways_leave_the_same_state_as_aioquics(seed: int) -> None:
    twins = Twins.made()
    for turn in range(60):
        twins.do(seed << 16 | turn)
    ways = twins.ways()
    assert ways["sent"] > 20
    assert ways["received"] > 20


def test_what_is_sent_to_one_that_is_idle_is_one_short_packet_and_one_short_answer() -> None:
    pair = Pair.made(Short)
    pair.establish()
    pair.exchange()
    for core in (pair.client, pair.server):
        assert isinstance(core, Short)
        core.ways.clear()
    assert pair.stream is not None
    pair.stream.sender.write(b"news")
    assert not pair.server.is_at_rest(pair.now)
    pair.exchange()
    assert isinstance(pair.client, Short)
    assert isinstance(pair.server, Short)
    assert pair.server.ways == {"sent": 1, "received": 1}
    assert pair.client.ways == {"sent": 1, "received": 1}
    assert pair.server.is_at_rest(pair.now)


def test_an_acknowledgement_that_waits_leaves_with_the_first_data() -> None:
    pair = Pair.made(Short)
    pair.establish()
    assert pair.stream is not None
    pair.stream.sender.write(b"question")
    pair.exchange()
    (question,) = pair.client._streams.values()
    question.sender.write(b"answer")
    ((data, _),) = pair.client.datagrams_to_send(pair.now)
    pair.server.receive_datagram(data, CLIENT, pair.now)
    pair.stream.sender.write(b"at once")
    ((data, _),) = pair.server.datagrams_to_send(pair.now)
    assert pair.server._spaces[Epoch.ONE_RTT].ack_at is None
    pair.client.receive_datagram(data, SERVER, pair.now)
    assert not pair.client._spaces[Epoch.ONE_RTT].ack_eliciting_in_flight


def test_who_sets_reserved_bits_is_told_of_its_mistake() -> None:
    """RFC 9000, section 17.3.1: it can be seen only where the packet is the peer's own."""
    pair = Pair.made(Short)
    pair.establish()
    pair.exchange()
    server = pair.server
    crypto = server._cryptos[Epoch.ONE_RTT].send
    number, cid = server._packet_number, server._peer_cid.cid
    header = bytes((0x59,)) + cid + (number & 0xFFFF).to_bytes(2, "big")
    assert crypto.aead is not None
    assert crypto.hp is not None
    sealed = crypto.aead.encrypt(b"\x01" + bytes(9), header, number)
    pair.client.receive_datagram(crypto.hp.apply(header, sealed), SERVER, pair.now)
    assert pair.client._close_pending
    assert pair.client._close_event is not None
    assert pair.client._close_event.error_code == QuicErrorCode.PROTOCOL_VIOLATION


def test_a_frame_that_is_none_ends_the_connection_as_it_does_with_aioquic() -> None:
    pair = Pair.made(Short)
    pair.establish()
    pair.exchange()
    data = pair.server._sealed(b"\x40\xff" + bytes(9), pair.server._packet_number)
    assert isinstance(pair.client, Short)
    before = pair.client.ways["received"]
    pair.client.receive_datagram(data, SERVER, pair.now)
    assert pair.client.ways["received"] == before + 1
    assert pair.client._close_event is not None
    assert pair.client._close_event.error_code == QuicErrorCode.FRAME_ENCODING_ERROR


def test_lost_news_come_again_when_their_time_is_up() -> None:
    pair = Pair.made(Short)
    pair.establish()
    pair.exchange()
    assert pair.stream is not None
    pair.stream.sender.write(b"news")
    assert len(pair.server.datagrams_to_send(pair.now)) == 1, "which nobody gets"
    timer = pair.server.get_timer()
    assert timer is not None
    assert timer - pair.now < 0.5
    pair.now = timer
    pair.exchange()
    received = pair.client.stream(pair.stream.stream_id or 0)
    assert received is not None
    assert received.receiver.starting_offset() == 4
