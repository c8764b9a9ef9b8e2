"""What TURN (RFC 8656) adds to STUN: its numbers, its data packets and its nonce cookie.

Data travels in two forms. A Send or Data indication is a whole STUN message that names the peer
(36 bytes of overhead for IPv4); ChannelData (section 12.4) is a channel number, a length and the
data (4 bytes). The functions here build and take apart both on the hot path, so they work on
memoryviews and make no message object. Over UDP ChannelData needs no padding. Two rare forms are
read by way of a message: Send with DONT-FRAGMENT, and Data with ICMP in the place of data.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from socket import AF_INET, AF_INET6, inet_ntop
from struct import Struct
from typing import Final

import attrs

from relays.stun import (
    MAGIC_COOKIE,
    Attribute,
    MessageClass,
    Method,
    StunError,
    StunMessage,
    is_stun,
    xor_address_value,
)
from runtime.net.address import Address

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
    peer: tuple[str, int],
    data: bytes | memoryview,
    transaction_id: bytes,
    *,
    dont_fragment: bool = False,
) -> bytes:
    """A Send indication (section 11.1), from a client to its relay. Raises ValueError."""
    first = _ATTRIBUTE.pack(Attribute.DONT_FRAGMENT, 0) if dont_fragment else b""
    return _indication(_SEND, peer, data, transaction_id, first)


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
    attribute that is not understood. DONT-FRAGMENT is one of them: it has its own reader.
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


def read_unfragmented_indication(data: memoryview) -> tuple[Address, memoryview] | None:
    """Peer and data of a Send indication with DONT-FRAGMENT (section 18.9); None if it is none."""
    message = _read_message(data, Method.SEND, {Attribute.DATA, Attribute.DONT_FRAGMENT})
    payload = None if message is None else message.value(Attribute.DATA)
    if message is None or payload is None or Attribute.DONT_FRAGMENT not in message:
        return None
    peer = message.xor_address(Attribute.XOR_PEER_ADDRESS)
    return None if peer is None else (peer, memoryview(payload))


@attrs.frozen
class IcmpError:
    """An ICMP error about a datagram to a peer (RFC 8656, section 18.13). `data` is the MTU of the
    next hop where it says that the datagram was too big, and 0 otherwise."""

    kind: int
    code: int
    data: int = 0


# Destination unreachable, time exceeded; and for IPv6: packet too big (section 11.5).
RELAYED_ICMP: Final = {FAMILY_IPV4: frozenset({3, 11}), FAMILY_IPV6: frozenset({1, 2, 3})}


def icmp_indication(peer: tuple[str, int], error: IcmpError, transaction_id: bytes) -> bytes:
    """A Data indication that tells of an ICMP error (section 11.5), from a relay to its client."""
    number = (error.kind & 0x7F) << 9 | (error.code & 0x1FF)
    value = number.to_bytes(4, "big") + error.data.to_bytes(4, "big")
    return StunMessage(
        method=Method.DATA,
        message_class=MessageClass.INDICATION,
        transaction_id=transaction_id,
        attributes=(
            (Attribute.XOR_PEER_ADDRESS, xor_address_value(peer, transaction_id)),
            (Attribute.ICMP, value),
        ),
    ).encode()


def read_icmp_indication(data: memoryview) -> tuple[Address, IcmpError] | None:
    """Peer and error of a Data indication that tells of an ICMP error; None if it is none."""
    message = _read_message(data, Method.DATA, set())
    value = None if message is None else message.value(Attribute.ICMP)
    if message is None or value is None or len(value) != 8:
        return None
    peer = message.xor_address(Attribute.XOR_PEER_ADDRESS)
    if peer is None:
        return None
    number = int.from_bytes(value[2:4], "big")
    return peer, IcmpError(number >> 9, number & 0x1FF, int.from_bytes(value[4:], "big"))


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


def _read_message(data: memoryview, method: Method, understood: set[int]) -> StunMessage | None:
    """An indication whose comprehension-required attributes are `understood`, or the peer."""
    try:
        message = StunMessage.decode(data)
        message.xor_address(Attribute.XOR_PEER_ADDRESS)
    except StunError:
        return None
    is_wanted = message.method == method and message.message_class is MessageClass.INDICATION
    kinds = {kind for kind, _ in message.attributes if kind < 0x8000}
    if not is_wanted or kinds - understood - {Attribute.XOR_PEER_ADDRESS}:
        return None
    return message


def _indication(
    kind: int,
    peer: tuple[str, int],
    data: bytes | memoryview,
    transaction_id: bytes,
    first: bytes = b"",
) -> bytes:
    size = len(data)
    if size > MAX_DATA_BYTES:
        raise ValueError("too much for one indication")
    address = xor_address_value(peer, transaction_id)
    padding = -size % 4
    return b"".join(
        (
            _HEADER.pack(
                kind, len(first) + 8 + len(address) + size + padding, MAGIC_COOKIE, transaction_id
            ),
            first,
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
