"""The handshake with fixed keys, against a plain reading of the Noise specification."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st
from nacl.bindings import crypto_scalarmult, crypto_scalarmult_base

from tunnel.wireguard.noise import (
    HandshakeError,
    Initiation,
    StaticKey,
    exchange,
    initiate,
    open_initiation,
    tai64n,
)

INITIATOR = StaticKey.of(bytes(range(32)))
RESPONDER = StaticKey.of(bytes(range(32, 64)))
INITIATOR_EPHEMERAL = bytes(range(64, 96))
RESPONDER_EPHEMERAL = bytes(range(96, 128))
PRESHARED = bytes(range(128, 160))
TIMESTAMP = tai64n(1_700_000_000_123_456_789)
SENDER, RECEIVER = 0x01020304, 0x0A0B0C0D

INITIATION_SHA256 = "4c5dda59662441db4e2c48c8e12b6195fefca7da8b7df39bee1a6aa738fb8c5c"
RESPONSE_SHA256 = "4ab3b3374c77482e9b5bb539d55210fedcc7766daf2ab8adc4cd312f87538676"


class NoiseReading:
    """CipherState and SymmetricState of the Noise specification, revision 34, sections 5.1, 5.2."""

    def __init__(self, protocol_name: bytes, prologue: bytes) -> None:
        self.h = hashlib.blake2s(protocol_name).digest()
        self.ck = self.h
        self.k = b""
        self.n = 0
        self.mix_hash(prologue)

    def mix_hash(self, data: bytes) -> None:
        self.h = hashlib.blake2s(self.h + data).digest()

    def hkdf(self, material: bytes, outputs: int) -> list[bytes]:
        temporary = hmac.new(self.ck, material, hashlib.blake2s).digest()
        made: list[bytes] = []
        for number in range(1, outputs + 1):
            previous = made[-1] if made else b""
            made.append(hmac.new(temporary, previous + bytes([number]), hashlib.blake2s).digest())
        return made

    def mix_key(self, material: bytes) -> None:
        self.ck, self.k = self.hkdf(material, 2)
        self.n = 0

    def mix_key_and_hash(self, material: bytes) -> None:
        self.ck, middle, self.k = self.hkdf(material, 3)
        self.mix_hash(middle)
        self.n = 0

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        nonce = bytes(4) + self.n.to_bytes(8, "little")
        sealed = ChaCha20Poly1305(self.k).encrypt(nonce, plaintext, self.h)
        self.n += 1
        self.mix_hash(sealed)
        return sealed

    def split(self) -> list[bytes]:
        return self.hkdf(b"", 2)


def read_ikpsk2() -> tuple[bytes, bytes, list[bytes]]:
    """Noise_IKpsk2: <- s / -> e, es, s, ss / <- e, ee, se, psk; with `psk` modifiers, e is mixed
    into the key as well (section 9.2)."""
    noise = NoiseReading(
        b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s".ljust(32, b"\0"),
        b"WireGuard v1 zx2c4 Jason@zx2c4.com",
    )
    noise.mix_hash(RESPONDER.public)
    e1 = crypto_scalarmult_base(INITIATOR_EPHEMERAL)
    noise.mix_hash(e1)
    noise.mix_key(e1)
    noise.mix_key(crypto_scalarmult(INITIATOR_EPHEMERAL, RESPONDER.public))
    static = noise.encrypt_and_hash(INITIATOR.public)
    noise.mix_key(crypto_scalarmult(INITIATOR.private, RESPONDER.public))
    timestamp = noise.encrypt_and_hash(TIMESTAMP)
    first = bytes([1, 0, 0, 0]) + SENDER.to_bytes(4, "little") + e1 + static + timestamp
    e2 = crypto_scalarmult_base(RESPONDER_EPHEMERAL)
    noise.mix_hash(e2)
    noise.mix_key(e2)
    noise.mix_key(crypto_scalarmult(RESPONDER_EPHEMERAL, e1))
    noise.mix_key(crypto_scalarmult(RESPONDER_EPHEMERAL, INITIATOR.public))
    noise.mix_key_and_hash(PRESHARED)
    empty = noise.encrypt_and_hash(b"")
    second = bytes([2, 0, 0, 0]) + RECEIVER.to_bytes(4, "little") + SENDER.to_bytes(4, "little")
    return first, second + e2 + empty, noise.split()


def begin() -> tuple[Initiation, bytes]:
    return initiate(
        static=INITIATOR,
        remote_public=RESPONDER.public,
        static_static=exchange(INITIATOR.private, RESPONDER.public),
        preshared_key=PRESHARED,
        ephemeral=INITIATOR_EPHEMERAL,
        timestamp=TIMESTAMP,
        sender_index=SENDER,
    )


def test_the_transcript_is_the_one_that_the_noise_specification_gives() -> None:
    first, second, keys = read_ikpsk2()
    kept, initiation = begin()
    assert initiation == first
    received = open_initiation(RESPONDER, initiation + bytes(32))
    assert received.remote_public == INITIATOR.public
    assert received.remote_index == SENDER
    static_static = exchange(RESPONDER.private, INITIATOR.public)
    assert received.timestamp(static_static) == TIMESTAMP
    response, responder_keys = received.respond(
        preshared_key=PRESHARED, ephemeral=RESPONDER_EPHEMERAL, sender_index=RECEIVER
    )
    assert response == second
    remote_index, initiator_keys = kept.finish(response + bytes(32))
    assert remote_index == RECEIVER
    nonce = bytes(12)
    there = ChaCha20Poly1305(keys[0]).encrypt(nonce, b"there", None)
    back = ChaCha20Poly1305(keys[1]).encrypt(nonce, b"back", None)
    assert initiator_keys.sending.encrypt(nonce, b"there", None) == there
    assert responder_keys.receiving.decrypt(nonce, there, None) == b"there"
    assert responder_keys.sending.encrypt(nonce, b"back", None) == back
    assert initiator_keys.receiving.decrypt(nonce, back, None) == b"back"


def test_the_transcript_of_fixed_keys_never_changes() -> None:
    _, initiation = begin()
    received = open_initiation(RESPONDER, initiation + bytes(32))
    received.timestamp(exchange(RESPONDER.private, INITIATOR.public))
    response, _ = received.respond(
        preshared_key=PRESHARED, ephemeral=RESPONDER_EPHEMERAL, sender_index=RECEIVER
    )
    assert hashlib.sha256(initiation).hexdigest() == INITIATION_SHA256
    assert hashlib.sha256(response).hexdigest() == RESPONSE_SHA256


def test_a_label_of_tai64n_counts_from_1970_and_ten_seconds() -> None:
    # from the TAI64 page of D. J. Bernstein: 1992-06-02 08:07:09 TAI is 08:06:43 UTC, when the
    # difference was 26 s; Unix time ignores leap seconds, and WireGuard adds the first 10 alone
    assert tai64n(0) == bytes.fromhex("400000000000000a00000000")
    assert tai64n(10**9 + 5) == bytes.fromhex("400000000000000b00000005")


def test_a_public_key_of_small_order_is_refused() -> None:
    with pytest.raises(HandshakeError, match="small order"):
        exchange(INITIATOR.private, bytes(32))


def test_a_static_key_shows_no_private_part() -> None:
    assert "private" not in repr(INITIATOR)
    with pytest.raises(ValueError, match="32 bytes"):
        StaticKey.of(b"short")


@given(st.integers(0, 115), st.integers(1, 255))
def test_an_altered_initiation_is_refused(place: int, flip: int) -> None:
    _, message = begin()
    altered = bytearray(message + bytes(32))
    altered[place] ^= flip
    try:
        received = open_initiation(RESPONDER, bytes(altered))
        received.timestamp(exchange(RESPONDER.private, INITIATOR.public))
    except HandshakeError:
        return
    assert place < 8  # the type and the sender's index are protected by MAC1 alone
