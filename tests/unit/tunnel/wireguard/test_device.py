"""The WireGuard device: sessions, timers, cookies, and what it refuses."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.net.address import Address
from tests.unit.tunnel.wireguard.two_devices import (
    ALICE_ADDRESS,
    BOB_ADDRESS,
    PRESHARED,
    SECOND,
    Wire,
    device,
    inner,
)
from tunnel.wireguard.cookies import HANDSHAKES_PER_SECOND
from tunnel.wireguard.device import HandshakeFailed, SessionEstablished, SessionExpired
from tunnel.wireguard.peer import MAX_STAGED_PACKETS, sealed_length


def test_a_packet_waits_for_the_handshake_and_arrives() -> None:
    wire = Wire()
    wire.alice_sends(inner(1))
    assert wire.bob_got == [inner(1)]
    assert wire.kinds() == [1, 2, 4]
    assert wire.alice_events == [SessionEstablished(peer_key="bob")]
    assert wire.bob_events == [SessionEstablished(peer_key="alice")]
    wire.bob_sends(inner(2))
    assert wire.alice_got == [inner(2)]


def test_a_handshake_without_data_is_confirmed_by_a_keepalive() -> None:
    wire = Wire()
    wire.alice.initiate("bob", 0)
    wire.settle()
    assert wire.kinds() == [1, 2, 4]
    assert len(wire.carried[2]) == 32
    assert wire.bob_events == [SessionEstablished(peer_key="alice")]


def test_another_preshared_key_gives_no_session() -> None:
    wire = Wire()
    wire.bob.add_peer(
        "alice",
        public_key=wire.alice.public_key,
        preshared_key=bytes(32),
        keepalive_ns=None,
        now=0,
    )
    wire.alice_sends(inner(1))
    assert wire.bob_got == []
    assert wire.alice.statistics().refused_handshakes == 1


def test_both_sides_may_start_at_the_same_moment() -> None:
    wire = Wire()
    wire.alice.send("bob", inner(1), 0)
    wire.bob.send("alice", inner(2), 0)
    wire.settle()
    wire.alice_sends(inner(3))
    wire.bob_sends(inner(4))
    assert wire.bob_got == [inner(1), inner(3)]
    assert wire.alice_got == [inner(2), inner(4)]


@pytest.mark.parametrize("length", [20, 21, 36, 1264, 1265, 1279, 1280])
def test_packets_are_padded_to_sixteen_bytes_but_never_past_the_mtu(length: int) -> None:
    wire = Wire()
    wire.alice_sends(inner(1, length))
    expected = min(-(-length // 16) * 16, 1280) + 32
    assert len(wire.carried[-1]) == expected == sealed_length(length, 1280)
    assert wire.bob_got == [inner(1, length)]


def test_a_replayed_transport_message_is_refused() -> None:
    wire = Wire()
    wire.alice_sends(inner(1))
    assert wire.bob.receive(wire.carried[-1], ALICE_ADDRESS, 0) is None
    assert wire.bob.statistics().refused_transports == 1


def test_a_replayed_initiation_is_refused() -> None:
    wire = Wire()
    wire.alice_sends(inner(1))
    wire.advance(30)
    assert wire.bob.receive(wire.carried[0], ALICE_ADDRESS, wire.now) is None
    assert wire.bob.statistics().refused_handshakes == 1
    assert wire.bob.drain_datagrams() == []


def test_a_forged_response_does_not_end_the_handshake_in_progress() -> None:
    wire = Wire()
    wire.alice.send("bob", inner(1), 0)
    [(_, initiation)] = wire.alice.drain_datagrams()
    assert wire.bob.receive(initiation, ALICE_ADDRESS, 0) == ("alice", [])
    [(_, response)] = wire.bob.drain_datagrams()
    for place in range(len(response)):
        forged = bytearray(response)
        forged[place] ^= 1
        if place < 60:
            assert wire.alice.receive(bytes(forged), BOB_ADDRESS, 0) is None
    assert wire.alice.receive(response, BOB_ADDRESS, 0) == ("bob", [])
    wire.settle()
    assert wire.bob_got == [inner(1)]


def test_the_initiator_renews_the_keys_after_two_minutes_of_use() -> None:
    wire = Wire()
    for number in range(130):
        wire.alice_sends(inner(number))
        wire.bob_sends(inner(number))
        wire.advance(1)
    assert wire.kinds().count(1) == 2
    assert len(wire.bob_got) == len(wire.alice_got) == 130


def test_an_initiator_that_only_receives_renews_before_the_keys_are_rejected() -> None:
    wire = Wire()
    wire.alice_sends(inner(0))
    for number in range(170):
        wire.advance(1)
        wire.bob_sends(inner(number))
    # 165 s = REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT, if keepalives did not do it
    assert wire.kinds().count(1) == 2
    assert len(wire.alice_got) == 170


def test_keys_are_not_used_after_three_minutes() -> None:
    wire = Wire()
    wire.alice_sends(inner(1))
    late = wire.carried[-1]
    wire.advance(181)
    wire.alice_sends(inner(2))
    assert wire.kinds() == [1, 2, 4, 4, 1, 2, 4]
    assert wire.bob.receive(late, ALICE_ADDRESS, wire.now) is None


def test_a_packet_under_way_during_a_renewal_still_arrives() -> None:
    wire = Wire()
    wire.alice_sends(inner(1))
    wire.advance(6)
    wire.alice.send("bob", inner(2), wire.now)
    [(_, late)] = wire.alice.drain_datagrams()
    wire.alice.initiate("bob", wire.now)
    wire.settle()
    assert wire.bob.receive(late, ALICE_ADDRESS, wire.now) == ("alice", [inner(2)])


def test_a_receiver_answers_with_a_keepalive_after_ten_seconds() -> None:
    wire = Wire()
    wire.alice_sends(inner(1))
    wire.advance(9.9)
    assert wire.kinds() == [1, 2, 4]
    wire.advance(0.2)
    assert wire.kinds() == [1, 2, 4, 4]
    wire.advance(60)
    assert wire.kinds() == [1, 2, 4, 4]


def test_persistent_keepalives_flow_while_nothing_else_does() -> None:
    wire = Wire(keepalive_ns=25 * SECOND)
    wire.alice.initiate("bob", 0)
    wire.advance(101)
    assert wire.kinds() == [1, 2, 4, 4, 4, 4, 4]


def test_silence_after_data_starts_a_new_handshake() -> None:
    wire = Wire()
    wire.alice_sends(inner(1))
    wire.lose = lambda datagram: True
    wire.alice_sends(inner(2))
    wire.advance(14.9)
    wire.lose = lambda datagram: False
    wire.advance(2)
    assert wire.kinds().count(1) == 2


def test_attempts_end_after_ninety_seconds_and_the_next_packet_starts_anew() -> None:
    wire = Wire()
    sent: list[int] = []

    def lose(datagram: bytes) -> bool:
        sent.append(wire.now)
        return True

    wire.lose = lose
    wire.alice_sends(inner(1))
    wire.advance(120)
    assert wire.alice_events == [HandshakeFailed(peer_key="bob")]
    assert len(sent) == 19
    gaps = [later - earlier for earlier, later in pairwise(sent)]
    assert all(5 * SECOND <= gap < 5.4 * SECOND for gap in gaps)
    assert len(set(gaps)) > 1
    wire.lose = lambda datagram: False
    wire.alice_sends(inner(2))
    assert wire.bob_got == [inner(2)]


def test_a_lost_response_is_made_good_by_the_next_attempt() -> None:
    wire = Wire()
    wire.lose = lambda datagram: datagram[0] == 2
    wire.alice_sends(inner(1))
    wire.lose = lambda datagram: False
    wire.advance(6)
    assert wire.bob_got == [inner(1)]


def test_unused_keys_are_wiped_after_nine_minutes() -> None:
    wire = Wire()
    wire.alice_sends(inner(1))
    wire.advance(541)
    assert SessionExpired(peer_key="bob") in wire.alice_events
    assert SessionExpired(peer_key="alice") in wire.bob_events
    assert wire.alice.poll_timeout() is None
    wire.alice_sends(inner(2))
    assert wire.bob_got == [inner(1), inner(2)]


def test_the_oldest_waiting_packets_go_when_too_many_wait() -> None:
    wire = Wire()
    for number in range(MAX_STAGED_PACKETS + 10):
        wire.alice.send("bob", inner(number), 0)
    wire.settle()
    assert wire.bob_got == [inner(number) for number in range(10, MAX_STAGED_PACKETS + 10)]


def test_a_removed_peer_is_gone_at_once() -> None:
    wire = Wire()
    wire.alice_sends(inner(1))
    wire.bob.remove_peer("alice")
    wire.alice_sends(inner(2))
    assert wire.bob_got == [inner(1)]
    assert wire.bob.statistics().unknown_index == 1
    wire.bob.send("alice", inner(3), 0)
    wire.bob.initiate("alice", 0)
    assert wire.bob.drain_datagrams() == []
    assert wire.bob.poll_timeout() is None


def test_a_peer_of_small_order_is_refused() -> None:
    with pytest.raises(ValueError, match="small order"):
        device(1, "alice").add_peer(
            "evil", public_key=bytes(32), preshared_key=bytes(32), keepalive_ns=None, now=0
        )


def flood(wire: Wire, *, seed: int = 9) -> None:
    """More initiations of a stranger, who knows Bob's key, than Bob answers in a second."""
    stranger = device(seed, "stranger")
    for number in range(HANDSHAKES_PER_SECOND + 1):
        stranger.add_peer(
            number,
            public_key=wire.bob.public_key,
            preshared_key=PRESHARED,
            keepalive_ns=None,
            now=0,
        )
        stranger.initiate(number, wire.now)
        for _, datagram in stranger.drain_datagrams():
            wire.bob.receive(datagram, Address("198.51.100.66", 1), wire.now)
    wire.bob.drain_datagrams()


def test_under_load_a_cookie_is_asked_for_and_lets_the_honest_in() -> None:
    wire = Wire()
    flood(wire)
    wire.alice_sends(inner(1))
    assert wire.kinds() == [1, 3]
    assert wire.bob_got == []
    wire.now += 5 * SECOND + SECOND // 2
    flood(wire, seed=10)
    wire.alice.handle_timeout(wire.now)
    wire.settle()
    # a response that Bob stamps and Alice, who is not under load, accepts
    assert wire.kinds() == [1, 3, 1, 2, 4]
    assert wire.carried[2][-16:] != bytes(16)
    assert wire.bob_got == [inner(1)]


def test_a_cookie_is_worth_nothing_from_another_address() -> None:
    wire = Wire()
    flood(wire)
    wire.alice_sends(inner(1))
    wire.now += 5 * SECOND + SECOND // 2
    flood(wire, seed=10)
    wire.alice.handle_timeout(wire.now)
    [(_, initiation)] = wire.alice.drain_datagrams()
    assert wire.bob.receive(initiation, Address("192.0.2.99", 51_820), wire.now) is None
    [(target, cookie)] = wire.bob.drain_datagrams()
    assert target == Address("192.0.2.99", 51_820)
    assert len(cookie) == 64


def test_without_a_valid_mac1_nothing_is_answered_under_load_either() -> None:
    wire = Wire()
    flood(wire)
    wire.alice.initiate("bob", 0)
    [(_, initiation)] = wire.alice.drain_datagrams()
    forged = initiation[:116] + bytes(32)
    assert wire.bob.receive(forged, ALICE_ADDRESS, 0) is None
    assert wire.bob.drain_datagrams() == []
    assert wire.bob.statistics().invalid_mac1 == 1


@given(st.binary(max_size=200))
def test_no_datagram_raises(datagram: bytes) -> None:
    bob = Wire().bob
    assert bob.receive(datagram, ALICE_ADDRESS, 0) is None


@given(st.integers(1, 4), st.binary(min_size=12, max_size=160), st.integers(0, 3))
def test_no_datagram_of_a_known_shape_raises(kind: int, rest: bytes, which: int) -> None:
    wire = Wire()
    wire.alice_sends(inner(1))
    sizes = {1: 148, 2: 92, 3: 64, 4: 48}
    known = wire.carried[which % len(wire.carried)]
    body = (kind.to_bytes(4, "little") + known[4:12] + rest).ljust(sizes[kind], b"\0")
    assert wire.bob.receive(body[: sizes[kind]], ALICE_ADDRESS, 0) is None
    assert wire.alice.receive(body[: sizes[kind]], BOB_ADDRESS, 0) is None


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    loss=st.sampled_from([0.0, 0.1, 0.4]),
    duplicated=st.sampled_from([0.0, 0.3]),
    corrupted=st.sampled_from([0.0, 0.1]),
    steps=st.integers(20, 120),
)
def test_no_packet_arrives_twice_or_altered_whatever_the_network_does(
    seed: int, loss: float, duplicated: float, corrupted: float, steps: int
) -> None:
    chance = random.Random(seed)
    wire = Wire(seed)
    ends = {"alice": wire.alice, "bob": wire.bob}
    names = {"alice": "bob", "bob": "alice"}
    addresses = {"alice": ALICE_ADDRESS, "bob": BOB_ADDRESS}
    under_way: list[tuple[str, bytes]] = []
    sent: dict[str, set[bytes]] = {"alice": set(), "bob": set()}
    got: dict[str, list[bytes]] = {"alice": [], "bob": []}
    now = 0
    for number in range(steps):
        now += chance.choice([0, SECOND // 100, SECOND, 7 * SECOND, 40 * SECOND])
        name = chance.choice(["alice", "bob"])
        packet = inner(number, chance.choice([20, 33, 700, 1280]))
        sent[name].add(packet)
        ends[name].send(names[name], packet, now)
        for origin, end in ends.items():
            end.handle_timeout(now)
            under_way += [(origin, datagram) for _, datagram in end.drain_datagrams()]
        chance.shuffle(under_way)
        for _ in range(chance.randrange(len(under_way) + 1)):
            origin, datagram = under_way.pop()
            if chance.random() < loss:
                continue
            if chance.random() < duplicated:
                under_way.append((origin, datagram))
            if chance.random() < corrupted:
                place = chance.randrange(len(datagram))
                flipped = datagram[place] ^ (1 << chance.randrange(8))
                datagram = datagram[:place] + bytes([flipped]) + datagram[place + 1 :]
            answer = ends[names[origin]].receive(datagram, addresses[origin], now)
            if answer is not None:
                got[names[origin]] += answer[1]
    for name, packets in got.items():
        assert len(packets) == len(set(packets))
        assert set(packets) <= sent[names[name]]
