"""MAC1, MAC2 and cookie replies (WireGuard whitepaper, sections 5.3 and 5.4.4 to 5.4.7).

MAC1 proves that a sender knows this device's public key; MAC2 proves, while the device is under
load, that it owns the address that it sends from, since the cookie went there.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from ipaddress import ip_address

from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
)
from nacl.exceptions import CryptoError

from runtime.net.address import Address
from runtime.randomness import Randomness
from tunnel.wireguard.noise import COOKIE_BYTES, MAC_BYTES, MESSAGE_COOKIE, blake2s

COOKIE_LIFETIME_NS = 120 * 10**9
# A cookie is not used in its last seconds, when it might arrive after its maker dropped it.
COOKIE_MARGIN_NS = 5 * 10**9
NONCE_BYTES = 24
SECOND_NS = 10**9
HANDSHAKES_PER_SECOND = 200
# Per source and under load: 20 handshakes a second, 5 at once (the kernel's numbers).
SOURCE_INTERVAL_NS = SECOND_NS // 20
SOURCE_BURST_NS = 5 * SOURCE_INTERVAL_NS
MAX_SOURCES = 65_536
_COOKIE = struct.Struct("<II24s32s")
_NO_MAC = bytes(MAC_BYTES)


def _mac(key: bytes, *parts: bytes) -> bytes:
    return hashlib.blake2s(b"".join(parts), key=key, digest_size=MAC_BYTES).digest()


def mac1_key(public_key: bytes) -> bytes:
    """The key of MAC1 for messages to the owner of `public_key`."""
    return blake2s(b"mac1----", public_key)


def cookie_key(public_key: bytes) -> bytes:
    """The key under which the owner of `public_key` seals cookies."""
    return blake2s(b"cookie--", public_key)


class CookieChecker:
    """The receiving side: checks MACs, and makes cookies under load."""

    def __init__(self, public_key: bytes, randomness: Randomness) -> None:
        self._mac1_key = mac1_key(public_key)
        self._cookie_key = cookie_key(public_key)
        self._randomness = randomness
        self._secret = b""
        self._secret_born_ns = 0

    def valid_mac1(self, message: bytes) -> bool:
        end = len(message) - 2 * MAC_BYTES
        return hmac.compare_digest(
            message[end : end + MAC_BYTES], _mac(self._mac1_key, message[:end])
        )

    def valid_mac2(self, message: bytes, source: Address, now: int) -> bool:
        if not self._secret or now - self._secret_born_ns >= COOKIE_LIFETIME_NS:
            return False
        end = len(message) - MAC_BYTES
        return hmac.compare_digest(message[end:], _mac(self._cookie(source), message[:end]))

    def reply(self, message: bytes, source: Address, now: int) -> bytes:
        """A cookie reply (64 bytes) to a handshake message whose MAC1 was valid."""
        if not self._secret or now - self._secret_born_ns >= COOKIE_LIFETIME_NS:
            self._secret = self._randomness.bytes(32)
            self._secret_born_ns = now
        nonce = self._randomness.bytes(NONCE_BYTES)
        mac1 = message[-2 * MAC_BYTES : -MAC_BYTES]
        sealed = crypto_aead_xchacha20poly1305_ietf_encrypt(
            self._cookie(source), mac1, nonce, self._cookie_key
        )
        return _COOKIE.pack(MESSAGE_COOKIE, int.from_bytes(message[4:8], "little"), nonce, sealed)

    def _cookie(self, source: Address) -> bytes:
        return _mac(self._secret, f"{source.host} {source.port}".encode())


class CookieJar:
    """The sending side, one per peer: stamps MACs, and keeps the cookie that the peer gave."""

    def __init__(self, remote_public: bytes) -> None:
        self._mac1_key = mac1_key(remote_public)
        self._cookie_key = cookie_key(remote_public)
        self._cookie = b""
        self._cookie_born_ns = 0
        self._last_mac1 = b""

    def stamp(self, message: bytes, now: int) -> bytes:
        """The message with its two MACs (32 bytes) behind it."""
        mac1 = _mac(self._mac1_key, message)
        self._last_mac1 = mac1
        usable = self._cookie and now - self._cookie_born_ns < COOKIE_LIFETIME_NS - COOKIE_MARGIN_NS
        mac2 = _mac(self._cookie, message, mac1) if usable else _NO_MAC
        return message + mac1 + mac2

    def take(self, reply: bytes, now: int) -> bool:
        """Keep the cookie of a reply of 64 bytes; False if it answers nothing that was sent."""
        if len(reply) != COOKIE_BYTES or not self._last_mac1:
            return False
        _, _, nonce, sealed = _COOKIE.unpack(reply)
        try:
            cookie: bytes = crypto_aead_xchacha20poly1305_ietf_decrypt(
                sealed, self._last_mac1, nonce, self._cookie_key
            )
        except CryptoError:
            return False
        self._cookie = cookie
        self._cookie_born_ns = now
        self._last_mac1 = b""
        return True


class LoadGauge:
    """Tells when handshakes come too fast, and limits each source while they do.

    The device is under load from the moment that a second saw more than
    `HANDSHAKES_PER_SECOND` messages with a valid MAC1 until a second after the last such second.
    """

    def __init__(self, now: int) -> None:
        self._second_began_ns = now
        self._count = 0
        self._loaded_until_ns = now
        self._tokens_by_source: dict[str, tuple[int, int]] = {}

    def overloaded(self, now: int) -> bool:
        """Count one handshake message; whether the device is under load."""
        if now - self._second_began_ns >= SECOND_NS:
            self._second_began_ns = now
            self._count = 0
        self._count += 1
        if self._count > HANDSHAKES_PER_SECOND:
            self._loaded_until_ns = now + SECOND_NS
        return now < self._loaded_until_ns

    def admits(self, source: Address, now: int) -> bool:
        """Whether this source (an IPv4 address, an IPv6 /64) may have one more handshake."""
        name = _prefix_of(source.host)
        tokens_ns, then = self._tokens_by_source.get(name, (SOURCE_BURST_NS, now))
        tokens_ns = min(SOURCE_BURST_NS, tokens_ns + now - then)
        if tokens_ns < SOURCE_INTERVAL_NS:
            return False
        if name not in self._tokens_by_source and len(self._tokens_by_source) >= MAX_SOURCES:
            self._tokens_by_source.clear()
        self._tokens_by_source[name] = (tokens_ns - SOURCE_INTERVAL_NS, now)
        return True


def _prefix_of(host: str) -> str:
    return ip_address(host).packed[:8].hex() if ":" in host else host
