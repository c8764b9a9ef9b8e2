"""What TURN (RFC 8656) adds to STUN: its numbers, its data packets and its nonce cookie.

Data travels in two forms. A Send or Data indication is a whole STUN message that names the peer
(36 bytes of overhead for IPv4); ChannelData (section 12.4) is a channel number, a length and the
data (4 bytes). The functions here build and take apart both on the hot path, so they work on
memoryviews and make no message object. Over UDP ChannelData needs no padding.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from socket import AF_INET, AF_INET6, inet_ntop
from struct import Struct
from typing import Final

from relays.stun import MAGIC_COOKIE, Attribute, is_stun, xor_address_value

NS: Final = 10**9

DEFAULT_LIFETIME_S: Final = 600
MAX_LIFETIME_S: Final = 3600
PERMISSION_LIFETIME_NS: Final = 300 * NS
CHANNEL_LIFETIME_NS: Final = 600 * NS
RESERVATION_LIFETIME_NS: Final = 30 * NS
RESERVATION_TOKEN_BYTES: Final = 8
FIRST_CHANNEL: Final = 0x4000
LAST_CHANNEL: Final = 0x4FFF
# RFC 5766 went further, and clients of its time (coturn's among them) still do: a server serves
# them, a client of ours never asks for more than RFC 8656 allows.
LAST_CHANNEL_OF_RFC_5766: Final = 0x7FFF
TRANSPORT_UDP: Final = 17
FAMILY_IPV4: Final = 1
FAMILY_IPV6: Final = 2
MAX_DATA_BYTES: Final = 65_000

NONCE_COOKIE: Final = "obMatJos2"
FEATURE_PASSWORD_ALGORITHMS: Final = 1 << 23
FEATURE_USERNAME_ANONYMITY: Final = 1 << 22

_CHANNEL_DATA: Final = Struct("!HH")
_ATTRIBUTE: Final = Struct("!HH")
_HEADER: Final = Struct("!HHI12s")
_SEND: Final = 0x0016
_DATA: Final = 0x0017
_MAX_INDICATION_ATTRIBUTES: Final = 16

_COOKIE_HALF: Final = MAGIC_COOKIE >> 16


def is_channel_data(data: bytes | memoryview) -> bool:
    """Whether this begins like ChannelData: RFC 8656, section 12.5 (RFC 5766: section 11.5)."""
    return len(data) >= 4 and 0x40 <= data[0] <= 0x7F


def channel_data(number: int, data: bytes | memoryview) -> bytes:
    """One ChannelData message, unpadded. Raises ValueError for more than 65,535 bytes of data."""
    if len(data) > 0xFFFF:
        raise ValueError("too much for one ChannelData message")
    return b"".join((_CHANNEL_DATA.pack(number, len(data)), data))


def read_channel_data(data: memoryview) -> tuple[int, memoryview] | None:
    """Channel number and data; None when it is cut short. Bytes behind it are padding."""
    if len(data) < 4:
        return None
    number, size = _CHANNEL_DATA.unpack_from(data)
    if size > len(data) - 4:
        return None
    return number, data[4 : 4 + size]


def send_indication(
    peer: tuple[str, int], data: bytes | memoryview, transaction_id: bytes
) -> bytes:
    """A Send indication (section 11.1), from a client to its relay. Raises ValueError."""
    return _indication(_SEND, peer, data, transaction_id)


def data_indication(
    peer: tuple[str, int], data: bytes | memoryview, transaction_id: bytes
) -> bytes:
    """A Data indication (section 11.3), from a relay to its client. Raises ValueError."""
    return _indication(_DATA, peer, data, transaction_id)


def is_send_indication(data: memoryview) -> bool:
    """Whether this begins as a Send indication does (RFC 8656, section 11); the rest is unread."""
    return len(data) >= 20 and data[0] == 0 and data[1] == _SEND


def is_data_indication(data: memoryview) -> bool:
    """Whether this begins as a Data indication does (RFC 8656, section 11); the rest is unread."""
    return len(data) >= 20 and data[0] == 0 and data[1] == _DATA


def read_indication(data: memoryview) -> tuple[tuple[str, int], memoryview] | None:
    """Peer and data of a Send or Data indication; None when it is to be dropped.

    That is: malformed, without XOR-PEER-ADDRESS or DATA, or with a comprehension-required
    attribute that is not understood (DONT-FRAGMENT is one of them: it cannot be honoured).
    """
    if not is_stun(data) or int.from_bytes(data[2:4], "big") != len(data) - 20:
        return None
    peer: tuple[str, int] | None = None
    payload: memoryview | None = None
    offset, end = 20, len(data)
    for _ in range(_MAX_INDICATION_ATTRIBUTES):
        if offset + 4 > end:
            break
        kind, size = _ATTRIBUTE.unpack_from(data, offset)
        start = offset + 4
        offset = start + size + (-size % 4)
        if offset > end:
            return None
        if kind == Attribute.XOR_PEER_ADDRESS:
            peer = _read_peer(data, start, size)
            if peer is None:
                return None
        elif kind == Attribute.DATA:
            payload = data[start : start + size]
        elif kind < 0x8000:
            return None
    if peer is None or payload is None or offset != end:
        return None
    return peer, payload


# --- the nonce cookie (RFC 8489, section 9.2) ---------------------------------------------------


def nonce_cookie(features: int) -> str:
    """The 13 characters with which a nonce begins; `features` are 24 bits (section 18.1)."""
    return NONCE_COOKIE + b64encode(features.to_bytes(3, "big")).decode()


def nonce_features(nonce: str) -> int:
    """The security features that a nonce announces; 0 when it bears no cookie."""
    if not nonce.startswith(NONCE_COOKIE):
        return 0
    try:
        features = b64decode(nonce[len(NONCE_COOKIE) : len(NONCE_COOKIE) + 4], validate=True)
    except (Base64Error, ValueError):
        return 0
    return int.from_bytes(features, "big") if len(features) == 3 else 0


# --- helpers -----------------------------------------------------------------------------------


def _indication(
    kind: int, peer: tuple[str, int], data: bytes | memoryview, transaction_id: bytes
) -> bytes:
    size = len(data)
    if size > MAX_DATA_BYTES:
        raise ValueError("too much for one indication")
    address = xor_address_value(peer, transaction_id)
    padding = -size % 4
    return b"".join(
        (
            _HEADER.pack(kind, 8 + len(address) + size + padding, MAGIC_COOKIE, transaction_id),
            _ATTRIBUTE.pack(Attribute.XOR_PEER_ADDRESS, len(address)),
            address,
            _ATTRIBUTE.pack(Attribute.DATA, size),
            data,
            bytes(padding),
        )
    )


def _read_peer(data: memoryview, start: int, size: int) -> tuple[str, int] | None:
    port = int.from_bytes(data[start + 2 : start + 4], "big") ^ _COOKIE_HALF
    if size == 8 and data[start + 1] == FAMILY_IPV4:
        host = int.from_bytes(data[start + 4 : start + 8], "big") ^ MAGIC_COOKIE
        return inet_ntop(AF_INET, host.to_bytes(4, "big")), port
    if size == 20 and data[start + 1] == FAMILY_IPV6:
        mask = int.from_bytes(data[4:20], "big")
        host = int.from_bytes(data[start + 4 : start + 20], "big") ^ mask
        return inet_ntop(AF_INET6, host.to_bytes(16, "big")), port
    return None
