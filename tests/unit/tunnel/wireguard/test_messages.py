"""Every message of WireGuard comes back as it was written, and no bytes raise anything else than
a HandshakeError."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from tests.unit.tunnel.wireguard.two_devices import Wire
from tunnel.wireguard.cookies import CookieChecker, CookieJar
from tunnel.wireguard.noise import (
    HandshakeError,
    Initiation,
    StaticKey,
    exchange,
    initiate,
    open_initiation,
    tai64n,
)

KEYS = st.binary(min_size=32, max_size=32)
INDICES = st.integers(0, 2**32 - 1)
INSTANTS = st.integers(0, 2**61)
SOURCES = st.builds(Address, st.sampled_from(["192.0.2.1", "2001:db8::1"]), st.integers(1, 65_535))
NONCE = bytes(12)


def begin(
    initiator: StaticKey, responder: StaticKey, preshared: bytes, ephemeral: bytes
) -> tuple[Initiation, bytes]:
    return initiate(
        static=initiator,
        remote_public=responder.public,
        static_static=exchange(initiator.private, responder.public),
        preshared_key=preshared,
        ephemeral=ephemeral,
        timestamp=tai64n(0),
        sender_index=1,
    )


@given(KEYS, KEYS, KEYS, KEYS, KEYS, INSTANTS, INDICES, INDICES)
def test_a_handshake_between_any_keys_tells_who_when_and_which_and_ends_in_the_same_keys(
    one: bytes,
    other: bytes,
    preshared: bytes,
    first_ephemeral: bytes,
    second_ephemeral: bytes,
    instant: int,
    sender: int,
    receiver: int,
) -> None:
    initiator, responder = StaticKey.of(one), StaticKey.of(other)
    static_static = exchange(initiator.private, responder.public)
    kept, initiation = initiate(
        static=initiator,
        remote_public=responder.public,
        static_static=static_static,
        preshared_key=preshared,
        ephemeral=first_ephemeral,
        timestamp=tai64n(instant),
        sender_index=sender,
    )
    received = open_initiation(responder, initiation + bytes(32))
    assert (received.remote_public, received.remote_index) == (initiator.public, sender)
    assert received.timestamp(static_static) == tai64n(instant)
    response, theirs = received.respond(
        preshared_key=preshared, ephemeral=second_ephemeral, sender_index=receiver
    )
    remote_index, ours = kept.finish(response + bytes(32))
    assert remote_index == receiver
    there = ours.sending.encrypt(NONCE, b"there", None)
    back = theirs.sending.encrypt(NONCE, b"back", None)
    assert theirs.receiving.decrypt(NONCE, there, None) == b"there"
    assert ours.receiving.decrypt(NONCE, back, None) == b"back"
    assert there[:5] != theirs.sending.encrypt(NONCE, b"there", None)[:5]


@given(st.integers(0, 2**61), st.integers(0, 2**61))
def test_labels_compare_like_the_instants_that_they_name(one: int, other: int) -> None:
    assert (tai64n(one) < tai64n(other)) == (one < other)


@given(st.binary(max_size=200) | st.binary(min_size=148, max_size=148))
def test_no_bytes_are_taken_for_an_initiation(data: bytes) -> None:
    responder = StaticKey.of(bytes(range(32)))
    with contextlib.suppress(HandshakeError):
        opened = open_initiation(responder, data.ljust(148, b"\0")[:148])
        opened.timestamp(bytes(32))
        raise AssertionError("random bytes authenticated")


@given(st.binary(min_size=92, max_size=92))
def test_no_bytes_are_taken_for_a_response_and_the_true_one_still_is(data: bytes) -> None:
    initiator, responder = StaticKey.of(bytes(range(32))), StaticKey.of(bytes(range(1, 33)))
    kept, initiation = begin(initiator, responder, bytes(32), bytes(range(2, 34)))
    with contextlib.suppress(HandshakeError):
        kept.finish(data)
        raise AssertionError("random bytes authenticated")
    received = open_initiation(responder, initiation + bytes(32))
    received.timestamp(exchange(responder.private, initiator.public))
    response, _ = received.respond(
        preshared_key=bytes(32), ephemeral=bytes(range(3, 35)), sender_index=9
    )
    assert kept.finish(response + bytes(32))[0] == 9


@given(st.binary(min_size=8, max_size=116), SOURCES, SOURCES, KEYS)
def test_a_cookie_proves_its_own_source_and_no_other(
    message: bytes, source: Address, elsewhere: Address, private: bytes
) -> None:
    public = StaticKey.of(private).public
    checker, jar = CookieChecker(public, SeededRandomness(1, "checker")), CookieJar(public)
    first = jar.stamp(message, 0)
    assert checker.valid_mac1(first)
    assert not checker.valid_mac2(first, source, 0)
    assert jar.take(checker.reply(first, source, 0), 0)
    second = jar.stamp(message, 0)
    assert checker.valid_mac1(second)
    assert checker.valid_mac2(second, source, 0)
    assert checker.valid_mac2(second, elsewhere, 0) == (elsewhere == source)


@given(st.binary(max_size=100) | st.binary(min_size=64, max_size=64), st.booleans())
def test_no_bytes_are_taken_for_a_cookie(data: bytes, asked: bool) -> None:
    jar = CookieJar(bytes(range(32)))
    if asked:
        jar.stamp(b"an initiation", 0)
    assert not jar.take(data, 0)


@given(st.lists(st.binary(min_size=0, max_size=1260), min_size=1, max_size=4), st.booleans())
def test_packets_of_any_content_and_length_arrive_as_they_were(
    bodies: list[bytes], ipv6: bool
) -> None:
    wire = Wire()
    packets = []
    for body in bodies:
        if ipv6:
            body = body[:1240]
            packets.append(b"\x60\0\0\0" + len(body).to_bytes(2, "big") + bytes(34) + body)
        else:
            packets.append(b"\x45\0" + (20 + len(body)).to_bytes(2, "big") + bytes(16) + body)
    for packet in packets:
        wire.alice_sends(packet)
        wire.bob_sends(packet)
    assert [bytes(packet) for packet in wire.bob_got] == packets
    assert [bytes(packet) for packet in wire.alice_got] == packets
