"""Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s, as section 5.4 of the WireGuard whitepaper uses it.

How a handshake goes:

1. The initiator calls `initiate`: it gets an `Initiation` to keep and the first 116 bytes of the
   message (the two MACs are the device's business, see `cookies.py`).
2. The responder calls `open_initiation`, which tells who is asking, then `ReceivedInitiation.
   timestamp(...)`, which proves it, then `ReceivedInitiation.respond(...)`, which yields the first
   60 bytes of the response and the pair of session keys.
3. The initiator calls `Initiation.finish` with the response and has the same pair of keys.

Nothing here draws a random number or reads a clock: ephemeral private keys and timestamps are
arguments. Every message that does not authenticate raises `HandshakeError`, and so does a public
key of small order (the shared secret would be all zero).

Zeroisation is best effort: chaining keys live in `bytearray`s that are overwritten after use, but
Python and the libraries below make copies that nobody can reach.
"""

from __future__ import annotations

import hashlib
import struct

import attrs
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from nacl.bindings import crypto_scalarmult, crypto_scalarmult_base
from nacl.exceptions import CryptoError

from runtime.keyed_hash import hmac_blake2s

KEY_BYTES = 32
TAG_BYTES = 16
TIMESTAMP_BYTES = 12
MAC_BYTES = 16

MESSAGE_INITIATION = 1
MESSAGE_RESPONSE = 2
MESSAGE_COOKIE = 3
MESSAGE_TRANSPORT = 4

INITIATION_BYTES = 148
RESPONSE_BYTES = 92
COOKIE_BYTES = 64
TRANSPORT_HEADER_BYTES = 16
TRANSPORT_MIN_BYTES = TRANSPORT_HEADER_BYTES + TAG_BYTES

_CONSTRUCTION = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"
_IDENTIFIER = b"WireGuard v1 zx2c4 Jason@zx2c4.com"
_ZERO_NONCE = bytes(12)
_INITIATION = struct.Struct("<II32s48s28s")
_RESPONSE = struct.Struct("<III32s16s")
TAI64_BASE = 0x4000000000000000


class HandshakeError(Exception):
    """A handshake message that does not authenticate, or whose keys are unfit."""


def blake2s(*parts: bytes | bytearray) -> bytes:
    """HASH of the whitepaper: unkeyed BLAKE2s with 32 bytes of output."""
    digest = hashlib.blake2s()
    for part in parts:
        digest.update(part)
    return digest.digest()


_INITIAL_CHAINING_KEY = blake2s(_CONSTRUCTION)
_INITIAL_HASH = blake2s(_INITIAL_CHAINING_KEY, _IDENTIFIER)


def tai64n(unix_ns: int) -> bytes:
    """The 12 bytes of a TAI64N label; they compare like the instants that they name."""
    seconds, nanoseconds = divmod(unix_ns, 10**9)
    return struct.pack(">QI", TAI64_BASE + 10 + seconds, nanoseconds)


def public_key_of(private_key: bytes) -> bytes:
    """The Curve25519 public key of 32 private bytes (clamped by the multiplication itself)."""
    public: bytes = crypto_scalarmult_base(private_key)
    return public


def exchange(private_key: bytes, public_key: bytes) -> bytes:
    """Curve25519; raises HandshakeError for a result of all zeros."""
    try:
        shared: bytes = crypto_scalarmult(private_key, public_key)
    except CryptoError as error:
        raise HandshakeError("public key of small order") from error
    if not any(shared):
        raise HandshakeError("public key of small order")
    return shared


def wipe(buffer: bytearray) -> None:
    """Overwrite a secret where it lies."""
    buffer[:] = bytes(len(buffer))


@attrs.frozen(kw_only=True)
class StaticKey:
    """A long-term key pair of this device."""

    private: bytes = attrs.field(repr=False)
    public: bytes

    @classmethod
    def of(cls, private_key: bytes) -> StaticKey:
        if len(private_key) != KEY_BYTES:
            raise ValueError("a Curve25519 private key has 32 bytes")
        return cls(private=private_key, public=public_key_of(private_key))


@attrs.frozen(kw_only=True)
class SessionKeys:
    """The two transport keys of one session, from this device's point of view."""

    sending: ChaCha20Poly1305 = attrs.field(repr=False)
    receiving: ChaCha20Poly1305 = attrs.field(repr=False)


class _Symmetric:
    """Chaining key and transcript hash of a handshake in progress."""

    __slots__ = ("chaining_key", "hash")

    def __init__(self, responder_public: bytes) -> None:
        self.chaining_key = bytearray(_INITIAL_CHAINING_KEY)
        self.hash = blake2s(_INITIAL_HASH, responder_public)

    def copy(self) -> _Symmetric:
        twin = object.__new__(_Symmetric)
        twin.chaining_key = bytearray(self.chaining_key)
        twin.hash = self.hash
        return twin

    def mix_hash(self, data: bytes) -> None:
        self.hash = blake2s(self.hash, data)

    def mix_key(self, material: bytes) -> None:
        self._advance(material)

    def mix_key_and_derive(self, material: bytes) -> bytes:
        """KDF2: a new chaining key, and the key of the field that follows."""
        secret = self._advance(material)
        return hmac_blake2s(secret, self.chaining_key + b"\x02")

    def mix_preshared_key(self, preshared_key: bytes) -> bytes:
        """KDF3: chaining key, a value for the transcript, and the key of the last field."""
        secret = self._advance(preshared_key)
        middle = hmac_blake2s(secret, self.chaining_key + b"\x02")
        self.mix_hash(middle)
        return hmac_blake2s(secret, middle + b"\x03")

    def split(self) -> tuple[bytes, bytes]:
        """The two transport keys: initiator to responder first. The chaining key is wiped."""
        secret = self._advance(b"")
        first = bytes(self.chaining_key)
        second = hmac_blake2s(secret, first + b"\x02")
        wipe(self.chaining_key)
        return first, second

    def seal(self, key: bytes, plaintext: bytes) -> bytes:
        sealed = ChaCha20Poly1305(key).encrypt(_ZERO_NONCE, plaintext, self.hash)
        self.mix_hash(sealed)
        return sealed

    def open(self, key: bytes, sealed: bytes) -> bytes:
        try:
            plaintext = ChaCha20Poly1305(key).decrypt(_ZERO_NONCE, sealed, self.hash)
        except InvalidTag as error:
            raise HandshakeError("a field does not authenticate") from error
        self.mix_hash(sealed)
        return plaintext

    def _advance(self, material: bytes) -> bytes:
        secret = hmac_blake2s(self.chaining_key, material)
        self.chaining_key[:] = hmac_blake2s(secret, b"\x01")
        return secret


class Initiation:
    """The initiator's half of a handshake that waits for its response."""

    __slots__ = ("_ephemeral", "_preshared_key", "_static", "_symmetric", "sender_index")

    def __init__(
        self,
        *,
        static: StaticKey,
        ephemeral: bytes,
        preshared_key: bytes,
        symmetric: _Symmetric,
        sender_index: int,
    ) -> None:
        self._static = static
        self._ephemeral = bytearray(ephemeral)
        self._preshared_key = preshared_key
        self._symmetric = symmetric
        self.sender_index = sender_index

    def finish(self, message: bytes) -> tuple[int, SessionKeys]:
        """Take a response; answers the responder's index and the session keys.

        Raises HandshakeError, after which this object still waits: a forged response must not
        end a handshake in progress.
        """
        _, remote_index, _, ephemeral, empty = _RESPONSE.unpack_from(message)
        symmetric = self._symmetric.copy()
        symmetric.mix_key(ephemeral)
        symmetric.mix_hash(ephemeral)
        symmetric.mix_key(exchange(bytes(self._ephemeral), ephemeral))
        symmetric.mix_key(exchange(self._static.private, ephemeral))
        symmetric.open(symmetric.mix_preshared_key(self._preshared_key), empty)
        outbound, inbound = symmetric.split()
        self.forget()
        return remote_index, _session(outbound, inbound)

    def forget(self) -> None:
        """Wipe what the handshake held."""
        wipe(self._ephemeral)
        wipe(self._symmetric.chaining_key)


def initiate(
    *,
    static: StaticKey,
    remote_public: bytes,
    static_static: bytes,
    preshared_key: bytes,
    ephemeral: bytes,
    timestamp: bytes,
    sender_index: int,
) -> tuple[Initiation, bytes]:
    """The first 116 bytes of a handshake initiation, and what to keep for its response.

    `static_static` is `exchange(static.private, remote_public)`, which callers keep per peer.
    """
    symmetric = _Symmetric(remote_public)
    ephemeral_public = public_key_of(ephemeral)
    symmetric.mix_key(ephemeral_public)
    symmetric.mix_hash(ephemeral_public)
    key = symmetric.mix_key_and_derive(exchange(ephemeral, remote_public))
    sealed_static = symmetric.seal(key, static.public)
    key = symmetric.mix_key_and_derive(static_static)
    sealed_timestamp = symmetric.seal(key, timestamp)
    message = _INITIATION.pack(
        MESSAGE_INITIATION, sender_index, ephemeral_public, sealed_static, sealed_timestamp
    )
    kept = Initiation(
        static=static,
        ephemeral=ephemeral,
        preshared_key=preshared_key,
        symmetric=symmetric,
        sender_index=sender_index,
    )
    return kept, message


class ReceivedInitiation:
    """An initiation whose sender is named in `remote_public` but has proved nothing yet."""

    __slots__ = ("_ephemeral", "_sealed_timestamp", "_symmetric", "remote_index", "remote_public")

    def __init__(
        self,
        *,
        symmetric: _Symmetric,
        ephemeral: bytes,
        remote_public: bytes,
        remote_index: int,
        sealed_timestamp: bytes,
    ) -> None:
        self._symmetric = symmetric
        self._ephemeral = ephemeral
        self._sealed_timestamp = sealed_timestamp
        self.remote_public = remote_public
        self.remote_index = remote_index

    def timestamp(self, static_static: bytes) -> bytes:
        """The sender's TAI64N label; with it the sender has proved its static key."""
        key = self._symmetric.mix_key_and_derive(static_static)
        return self._symmetric.open(key, self._sealed_timestamp)

    def respond(
        self, *, preshared_key: bytes, ephemeral: bytes, sender_index: int
    ) -> tuple[bytes, SessionKeys]:
        """The first 60 bytes of the response, and the keys. Call once, after `timestamp`."""
        symmetric = self._symmetric
        ephemeral_public = public_key_of(ephemeral)
        symmetric.mix_key(ephemeral_public)
        symmetric.mix_hash(ephemeral_public)
        symmetric.mix_key(exchange(ephemeral, self._ephemeral))
        symmetric.mix_key(exchange(ephemeral, self.remote_public))
        empty = symmetric.seal(symmetric.mix_preshared_key(preshared_key), b"")
        message = _RESPONSE.pack(
            MESSAGE_RESPONSE, sender_index, self.remote_index, ephemeral_public, empty
        )
        inbound, outbound = symmetric.split()
        return message, _session(outbound, inbound)


def open_initiation(static: StaticKey, message: bytes) -> ReceivedInitiation:
    """Read who sent an initiation of 148 bytes. Raises HandshakeError."""
    _, remote_index, ephemeral, sealed_static, sealed_timestamp = _INITIATION.unpack_from(message)
    symmetric = _Symmetric(static.public)
    symmetric.mix_key(ephemeral)
    symmetric.mix_hash(ephemeral)
    key = symmetric.mix_key_and_derive(exchange(static.private, ephemeral))
    remote_public = symmetric.open(key, sealed_static)
    return ReceivedInitiation(
        symmetric=symmetric,
        ephemeral=ephemeral,
        remote_public=remote_public,
        remote_index=remote_index,
        sealed_timestamp=sealed_timestamp,
    )


def _session(outbound: bytes, inbound: bytes) -> SessionKeys:
    return SessionKeys(sending=ChaCha20Poly1305(outbound), receiving=ChaCha20Poly1305(inbound))
