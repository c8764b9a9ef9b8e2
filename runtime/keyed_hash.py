"""HMAC (RFC 2104) of short messages: the same bytes as the standard library's, for less.

With OpenSSL 3 `hmac.digest` looks its algorithm up anew at each call, which costs more than the
hash of a STUN message or of a step of a handshake. Here the hash is called twice, and that is all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final, Protocol

_BLOCK_BYTES: Final = 64
"""Of SHA-1, SHA-256 and BLAKE2s alike."""
_INNER_PAD: Final = bytes(byte ^ 0x36 for byte in range(256))
_OUTER_PAD: Final = bytes(byte ^ 0x5C for byte in range(256))


class _Hash(Protocol):
    def digest(self) -> bytes: ...


class HmacSha256:
    """HMAC-SHA-256 under one key for several messages: what depends on the key alone is hashed
    once. It holds what is as secret as the key, and prints nothing of it."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes) -> None:
        block = (hashlib.sha256(key).digest() if len(key) > _BLOCK_BYTES else key).ljust(
            _BLOCK_BYTES, b"\0"
        )
        self._inner = hashlib.sha256(block.translate(_INNER_PAD))
        self._outer = hashlib.sha256(block.translate(_OUTER_PAD))

    def digest(self, message: bytes) -> bytes:
        """32 bytes."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(message)
        outer.update(inner.digest())
        return outer.digest()


def hmac_sha1(key: bytes, message: bytes | bytearray) -> bytes:
    """20 bytes."""
    return _hmac(hashlib.sha1, key, message)


def hmac_sha256(key: bytes, message: bytes | bytearray) -> bytes:
    """32 bytes."""
    return _hmac(hashlib.sha256, key, message)


def hmac_blake2s(key: bytes | bytearray, message: bytes | bytearray) -> bytes:
    """32 bytes (the HMAC of the WireGuard whitepaper, section 5.4; not BLAKE2's keyed mode)."""
    return _hmac(hashlib.blake2s, key, message)


def _hmac(
    new: Callable[[bytes | bytearray], _Hash], key: bytes | bytearray, message: bytes | bytearray
) -> bytes:
    if len(key) > _BLOCK_BYTES:
        key = new(key).digest()
    block = key.ljust(_BLOCK_BYTES, b"\0")
    inner = new(block.translate(_INNER_PAD) + message).digest()
    return new(block.translate(_OUTER_PAD) + inner).digest()
