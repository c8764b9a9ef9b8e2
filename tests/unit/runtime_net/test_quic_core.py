"""aioquic's connection as it is bent here: two that pass datagrams to each other in memory."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from aioquic.quic.connection import NetworkAddress, QuicConnection, QuicConnectionState
from aioquic.quic.events import ConnectionTerminated
from aioquic.tls import Epoch

from runtime.net.quic_core import TIMER_GRAIN_S, QuicCore
from tests.unit.runtime_net.quic_pair import Pair


class Watched(QuicCore):
    """What it says by a look alone is held against aioquic itself."""

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        if self._has_nothing_to_send(now):
            assert QuicConnection.datagrams_to_send(self, now) == []
        return super().datagrams_to_send(now)

    def get_timer(self) -> float | None:
        timer = super().get_timer()
        assert timer == QuicConnection.get_timer(self)
        return timer


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("seed", range(10))
def test_that_there_is_nothing_to_send_is_said_only_where_aioquic_sends_nothing(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair.made(Watched)
    pair.establish()
    assert pair.stream is not None
    looks = 0
    for _ in range(40):
        match rng.randrange(5):
            case 0:
                pair.stream.sender.write(rng.randbytes(rng.randrange(1, 5_000)))
            case 1:
                rng.choice((pair.client, pair.server)).send_ping(rng.randrange(100))
            case 2:
                received = pair.client.stream(pair.stream.stream_id)
                if received is not None:
                    received.sender.write(rng.randbytes(rng.randrange(1, 60_000)))
                    pair.server.consume(pair.stream, rng.randrange(0, 60_000))
            case 3:
                rng.choice((pair.client, pair.server)).probe()
            case 4:
                pair.client.change_connection_id()
        pair.exchange(rng)
        looks += pair.client._has_nothing_to_send(pair.now)
        looks += pair.server._has_nothing_to_send(pair.now)
    assert looks > 20, "it is seen often enough to be worth a look"
    for core in (pair.client, pair.server):
        assert core._state is QuicConnectionState.CONNECTED
    for _ in range(100):
        pair.exchange()
    received = pair.client.stream(pair.stream.stream_id)
    if received is not None:
        assert received.receiver.starting_offset() == pair.stream.sender.highest_offset


def test_after_the_handshake_its_buffers_and_keys_are_gone() -> None:
    pair = Pair.made()
    assert sum(buffer.capacity for buffer in pair.server._crypto_buffers.values()) > 40_000
    pair.establish()
    assert not pair.server._crypto_buffers
    assert pair.server.tls.key_schedule is None
    assert pair.server.tls._x25519_private_key is None
    assert not pair.server.tls._ec_private_keys


def test_a_message_of_tls_after_the_handshake_ends_that_connection() -> None:
    pair = Pair.made()
    pair.establish()
    pair.client._crypto_streams[Epoch.ONE_RTT].sender.write(b"\x14\x00\x00\x00")
    pair.exchange()
    assert pair.server.ended_by_peer() is None
    closed = pair.client.ended_by_peer()
    assert isinstance(closed, ConnectionTerminated)
    assert closed.error_code == 0x100 + 10, "unexpected_message (RFC 8446, section 6.2)"


def test_a_connection_that_was_released_is_gone_without_the_garbage_collector() -> None:
    pair = Pair.made()
    pair.establish()
    pair.server.close()
    pair.exchange()
    watched = [weakref.ref(pair.client), weakref.ref(pair.server)]
    with without_collector():
        pair.client.release()
        pair.server.release()
        del pair
        assert [reference() for reference in watched] == [None, None]


def test_few_connection_ids_are_held_and_a_used_one_is_replaced() -> None:
    pair = Pair.made()
    pair.establish()
    pair.exchange()
    for _ in range(12):
        assert len(pair.server._host_cids) == 3
        before = pair.client._peer_cid.cid
        pair.client.change_connection_id()
        pair.exchange()
        assert pair.client._peer_cid.cid != before


def test_timers_come_up_together_and_never_early() -> None:
    pair = Pair.made()
    pair.establish()
    assert pair.stream is not None
    for _ in range(50):
        pair.stream.sender.write(bytes(3_000))
        pair.now += 0.0137
        pair.exchange()
        for core in (pair.client, pair.server):
            timer, look = core.get_timer(), core.next_look()
            assert timer is not None
            assert timer <= look < timer + TIMER_GRAIN_S
            assert core._pacing_at is not None or look % TIMER_GRAIN_S in (
                pytest.approx(0, abs=1e-9),
                pytest.approx(TIMER_GRAIN_S, abs=1e-9),
            )


def test_a_timer_of_the_pacer_is_not_put_off() -> None:
    pair = Pair.made()
    pair.establish()
    assert pair.stream is not None
    pair.stream.sender.write(bytes(100_000))
    assert pair.server.datagrams_to_send(pair.now)
    assert pair.server._pacing_at is not None
    assert pair.server.next_look() == pair.server.get_timer()
