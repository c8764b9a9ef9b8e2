"""The preshared key of a WireGuard session, agreed end to end by ML-KEM-768 (FIPS 203).

The client makes a `KemKey` for a new connection and sends its public half with the request; the
gateway answers with a ciphertext; both derive the same 32 bytes with `preshared_key`. Whoever
only records the portal (or, later, owns a quantum computer and the recorded traffic) never
learns it. A portal that actively replaces keys is another matter: it could stand in the middle.

The derivation binds everything that names the connection, so that a key agreed for one
connection is worth nothing in another:

    HKDF-SHA-256(secret, salt = SHA-256(T), info = "holloway/1 wg-psk", 32 bytes)

where T is the concatenation of the arguments below, in their order, each preceded by its length
as a u32 big-endian; a UUID stands as its 16 bytes.
"""

from __future__ import annotations

import struct
from hashlib import sha256
from typing import Final
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from runtime.randomness import Randomness

PUBLIC_KEY_BYTES: Final = 1184
CIPHERTEXT_BYTES: Final = 1088
SECRET_BYTES: Final = 32
PRESHARED_KEY_BYTES: Final = 32
SEED_BYTES: Final = 64

_INFO: Final = b"holloway/1 wg-psk"


class KemError(Exception):
    """A public key or ciphertext from outside is not one of ML-KEM-768."""


class KemKey:
    """A decapsulation key for one connection. It never prints, copies or pickles its content."""

    __slots__ = ("_key", "_public")

    def __init__(self, seed: bytes) -> None:
        """Derive the key from a seed of 64 random bytes (d and z of FIPS 203, section 7.1)."""
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed has {SEED_BYTES} bytes")
        self._key = MLKEM768PrivateKey.from_seed_bytes(seed)
        self._public = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, randomness: Randomness | None = None) -> KemKey:
        """A new key, from the operating system's generator unless `randomness` is given."""
        if randomness is not None:
            return cls(randomness.bytes(SEED_BYTES))
        return cls(MLKEM768PrivateKey.generate().private_bytes_raw())

    def public_bytes(self) -> bytes:
        """The encapsulation key, 1184 bytes."""
        return self._public

    def decapsulate(self, ciphertext: bytes) -> bytes:
        """The 32-byte secret in `ciphertext`; raises KemError unless that has 1088 bytes.

        A ciphertext that was tampered with gives another secret, not an error (implicit
        rejection): the handshake that uses it fails.
        """
        if len(ciphertext) != CIPHERTEXT_BYTES:
            raise KemError(f"a ciphertext has {CIPHERTEXT_BYTES} bytes, not {len(ciphertext)}")
        return self._key.decapsulate(ciphertext)

    def __repr__(self) -> str:
        return "KemKey(...)"

    def __reduce__(self) -> str:
        raise TypeError("a KemKey cannot be pickled")


def encapsulate(public_key: bytes) -> tuple[bytes, bytes]:
    """A fresh secret (32 bytes) for the holder of `public_key`, and its ciphertext (1088 bytes).

    The randomness is always the operating system's: the library takes no other.
    Raises KemError for what is not a public key of ML-KEM-768 (FIPS 203, section 7.2).
    """
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise KemError(f"a public key has {PUBLIC_KEY_BYTES} bytes, not {len(public_key)}")
    try:
        return MLKEM768PublicKey.from_public_bytes(public_key).encapsulate()
    except ValueError as error:
        raise KemError("not a public key of ML-KEM-768") from error


def preshared_key(
    secret: bytes,
    *,
    account: UUID,
    connection: UUID,
    client: UUID,
    gateway: UUID,
    client_tunnel_key: bytes,
    gateway_tunnel_key: bytes,
    kem_public_key: bytes,
    ciphertext: bytes,
) -> bytes:
    """The 32-byte preshared key that both ends derive from the KEM's `secret`."""
    transcript = sha256()
    for part in (
        account.bytes,
        connection.bytes,
        client.bytes,
        gateway.bytes,
        client_tunnel_key,
        gateway_tunnel_key,
        kem_public_key,
        ciphertext,
    ):
        transcript.update(struct.pack("!I", len(part)))
        transcript.update(part)
    return HKDF(
        algorithm=SHA256(), length=PRESHARED_KEY_BYTES, salt=transcript.digest(), info=_INFO
    ).derive(secret)
