"""STUN messages (RFC 8489): the codec that the relay, its clients and ICE share.

A message is a 20-byte header (type, length, magic cookie, transaction id) and a list of
attributes, each padded to four bytes. `StunMessage.decode` reads one, `StunMessage.encode` writes
one, optionally with MESSAGE-INTEGRITY or MESSAGE-INTEGRITY-SHA256 and FINGERPRINT. What is
protected by an integrity attribute is what stands before it: the decoder drops what stands behind
(section 14.5), checks the fingerprint where there is one, and remembers the bytes, so that
`verify` can judge them once the key is known.

Attributes are kept as pairs of type and raw value; functions at the end of this file build values
and the methods of `StunMessage` read them. Whatever bytes come in, nothing but `StunError` is
raised.

    request = StunMessage(method=Method.BINDING, message_class=MessageClass.REQUEST,
                          transaction_id=randomness.bytes(12))
    datagram = request.encode(fingerprint=True)
    answer = StunMessage.decode(received)
    answer.xor_address(Attribute.XOR_MAPPED_ADDRESS)
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from enum import Enum, IntEnum
from hashlib import md5, sha256
from hmac import compare_digest
from ipaddress import ip_address
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from struct import Struct
from typing import Final
from zlib import crc32

import attrs

from runtime.keyed_hash import hmac_sha1, hmac_sha256
from runtime.net.address import Address

MAGIC_COOKIE: Final = 0x2112A442
HEADER_BYTES: Final = 20
TRANSACTION_ID_BYTES: Final = 12
MAX_MESSAGE_BYTES: Final = HEADER_BYTES + 65_532
MAX_ATTRIBUTES: Final = 128
MAX_TEXT_BYTES: Final = 763

_HEADER: Final = Struct("!HHI12s")
_LENGTH: Final = Struct("!H")
_LENGTH_AT: Final = 2
_ATTRIBUTE: Final = Struct("!HH")
_COOKIE_BYTES: Final = MAGIC_COOKIE.to_bytes(4, "big")
_FINGERPRINT_MASK: Final = 0x5354554E
_FINGERPRINT_BYTES: Final = 8


class StunError(Exception):
    """Bytes that are not a STUN message, or an attribute that breaks its format."""


class MessageClass(IntEnum):
    """RFC 8489, section 5."""

    REQUEST = 0
    INDICATION = 1
    SUCCESS = 2
    ERROR = 3


class Method(IntEnum):
    """RFC 8489, section 18.2 and RFC 8656, section 17."""

    BINDING = 0x001
    ALLOCATE = 0x003
    REFRESH = 0x004
    SEND = 0x006
    DATA = 0x007
    CREATE_PERMISSION = 0x008
    CHANNEL_BIND = 0x009


class Attribute(IntEnum):
    """RFC 8489, section 18.3; RFC 8656, section 18; RFC 8445, section 16.1; RFC 5780, section 7;
    the first ones of RFC 3489, section 11.2."""

    MAPPED_ADDRESS = 0x0001
    CHANGE_REQUEST = 0x0003
    SOURCE_ADDRESS = 0x0004
    CHANGED_ADDRESS = 0x0005
    USERNAME = 0x0006
    MESSAGE_INTEGRITY = 0x0008
    ERROR_CODE = 0x0009
    UNKNOWN_ATTRIBUTES = 0x000A
    CHANNEL_NUMBER = 0x000C
    LIFETIME = 0x000D
    XOR_PEER_ADDRESS = 0x0012
    DATA = 0x0013
    REALM = 0x0014
    NONCE = 0x0015
    XOR_RELAYED_ADDRESS = 0x0016
    REQUESTED_ADDRESS_FAMILY = 0x0017
    EVEN_PORT = 0x0018
    REQUESTED_TRANSPORT = 0x0019
    DONT_FRAGMENT = 0x001A
    MESSAGE_INTEGRITY_SHA256 = 0x001C
    PASSWORD_ALGORITHM = 0x001D
    USERHASH = 0x001E
    XOR_MAPPED_ADDRESS = 0x0020
    RESERVATION_TOKEN = 0x0022
    PRIORITY = 0x0024
    USE_CANDIDATE = 0x0025
    PADDING = 0x0026
    RESPONSE_PORT = 0x0027
    ADDITIONAL_ADDRESS_FAMILY = 0x8000
    ADDRESS_ERROR_CODE = 0x8001
    PASSWORD_ALGORITHMS = 0x8002
    ICMP = 0x8004
    SOFTWARE = 0x8022
    ALTERNATE_SERVER = 0x8023
    FINGERPRINT = 0x8028
    ICE_CONTROLLED = 0x8029
    ICE_CONTROLLING = 0x802A
    RESPONSE_ORIGIN = 0x802B
    OTHER_ADDRESS = 0x802C


_CLASSES: Final = tuple(MessageClass)
# As plain numbers, which are compared for every attribute of every message.
_FINGERPRINT: Final = int(Attribute.FINGERPRINT)
_SHA1: Final = int(Attribute.MESSAGE_INTEGRITY)
_SHA256: Final = int(Attribute.MESSAGE_INTEGRITY_SHA256)


class Integrity(Enum):
    """The two integrity attributes: type, length of the value in bytes, HMAC."""

    SHA1 = (Attribute.MESSAGE_INTEGRITY, 20, hmac_sha1)
    SHA256 = (Attribute.MESSAGE_INTEGRITY_SHA256, 32, hmac_sha256)

    def __init__(
        self, attribute: Attribute, size: int, hmac: Callable[[bytes, bytearray], bytes]
    ) -> None:
        self.attribute = int(attribute)
        self.size = size
        self.hmac = hmac


class PasswordAlgorithm(IntEnum):
    """How a long-term key is made from the password (RFC 8489, section 18.5)."""

    MD5 = 1
    SHA256 = 2


@attrs.frozen(kw_only=True)
class StunMessage:
    """One STUN message. `attributes` are pairs (type, raw value), in order of appearance.

    Integrity and fingerprint are not among `attributes`: `encode` appends them, `integrities` and
    `has_fingerprint` tell what a decoded message had.
    """

    method: int
    message_class: MessageClass
    transaction_id: bytes
    attributes: tuple[tuple[int, bytes], ...] = ()
    has_fingerprint: bool = attrs.field(default=False, eq=False)
    _received: bytes = attrs.field(default=b"", eq=False, repr=False)
    _integrity_offsets: dict[int, int] = attrs.field(factory=dict, eq=False, repr=False)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> StunMessage:
        """The message that fills `data` exactly. Raises StunError."""
        data = bytes(data)
        if not is_stun(data):
            raise StunError("no STUN header")
        if len(data) > MAX_MESSAGE_BYTES:
            raise StunError("longer than a STUN message can be")
        kind, length, _, transaction_id = _HEADER.unpack_from(data)
        if length != len(data) - HEADER_BYTES or length % 4:
            raise StunError("the length in the header is wrong")

        attributes: list[tuple[int, bytes]] = []
        sha1_at = sha256_at = 0
        has_fingerprint = False
        offset, count, total = HEADER_BYTES, 0, len(data)
        while offset < total:
            attribute, size = _ATTRIBUTE.unpack_from(data, offset)
            start, end = offset + 4, offset + 4 + size
            count += 1
            if end > total:
                raise StunError("an attribute is cut short")
            if count > MAX_ATTRIBUTES:
                raise StunError(f"more than {MAX_ATTRIBUTES} attributes")
            if attribute == _FINGERPRINT:
                _check_fingerprint(data, offset, size)
                has_fingerprint = True
            elif attribute == _SHA256:
                if not sha256_at:
                    _check_integrity_size(Integrity.SHA256, size)
                    sha256_at = offset
            elif sha256_at:
                pass
            elif attribute == _SHA1:
                if not sha1_at:
                    _check_integrity_size(Integrity.SHA1, size)
                    sha1_at = offset
            elif not sha1_at:
                attributes.append((attribute, data[start:end]))
            offset = end + (-size % 4)
        offsets: dict[int, int] = {}
        if sha1_at:
            offsets[_SHA1] = sha1_at
        if sha256_at:
            offsets[_SHA256] = sha256_at
        return cls(
            method=_method_of(kind),
            message_class=_CLASSES[(kind >> 7 & 0b10) | (kind >> 4 & 0b01)],
            transaction_id=transaction_id,
            attributes=tuple(attributes),
            has_fingerprint=has_fingerprint,
            received=data,
            integrity_offsets=offsets,
        )

    def encode(
        self,
        *,
        key: bytes | None = None,
        integrity: Integrity = Integrity.SHA1,
        fingerprint: bool = False,
    ) -> bytes:
        """The bytes of the message, with the integrity attribute named if a `key` is given.

        Raises ValueError for what no message can hold (own misuse).
        """
        kind = _type_of(self.method, self.message_class)
        if len(self.transaction_id) != TRANSACTION_ID_BYTES:
            raise ValueError("a transaction id has 12 bytes")
        message = bytearray(_HEADER.pack(kind, 0, MAGIC_COOKIE, self.transaction_id))
        for attribute, value in self.attributes:
            size = len(value)
            message += _ATTRIBUTE.pack(attribute, size)
            message += value
            if size & 3:
                message += bytes(-size & 3)
        if len(message) + 64 > MAX_MESSAGE_BYTES:
            raise ValueError("too much for one STUN message")
        # Both, integrity and fingerprint, cover the header with the length up to their own end.
        if key is not None:
            _set_length(message, len(message) + 4 + integrity.size)
            value = integrity.hmac(key, message)
            message += _ATTRIBUTE.pack(integrity.attribute, integrity.size)
            message += value
        if fingerprint:
            _set_length(message, len(message) + _FINGERPRINT_BYTES)
            checksum = crc32(message) ^ _FINGERPRINT_MASK
            message += _ATTRIBUTE.pack(_FINGERPRINT, 4)
            message += checksum.to_bytes(4, "big")
        _set_length(message, len(message))
        return bytes(message)

    def size(self, *, fingerprint: bool = False) -> int:
        """How many bytes `encode` makes of it without an integrity attribute."""
        body = sum(4 + len(value) + -len(value) % 4 for _, value in self.attributes)
        return HEADER_BYTES + body + (_FINGERPRINT_BYTES if fingerprint else 0)

    @property
    def integrities(self) -> frozenset[Integrity]:
        """The integrity attributes that a decoded message carried, valid or not."""
        return frozenset(each for each in Integrity if each.attribute in self._integrity_offsets)

    def verify(self, key: bytes, integrity: Integrity = Integrity.SHA1) -> bool:
        """Whether the decoded message carried this integrity attribute, made with `key`."""
        offset = self._integrity_offsets.get(integrity.attribute)
        if offset is None:
            return False
        covered = bytearray(self._received[:offset])
        start = offset + 4
        end = start + integrity.size
        _set_length(covered, end)
        return compare_digest(integrity.hmac(key, covered), self._received[start:end])

    def value(self, attribute: int) -> bytes | None:
        """The raw value of the first such attribute (later ones do not count: section 14)."""
        for kind, value in self.attributes:
            if kind == attribute:
                return value
        return None

    def values(self, attribute: int) -> list[bytes]:
        """The raw values of all such attributes."""
        return [value for kind, value in self.attributes if kind == attribute]

    def __contains__(self, attribute: int) -> bool:
        return self.value(attribute) is not None

    def integer(self, attribute: int, size: int) -> int | None:
        """An unsigned integer of exactly `size` bytes. Raises StunError."""
        value = self.value(attribute)
        if value is None:
            return None
        if len(value) != size:
            raise StunError(f"attribute {attribute:#06x} has a wrong length")
        return int.from_bytes(value, "big")

    def text(self, attribute: int) -> str | None:
        """UTF-8 text of at most 763 bytes. Raises StunError."""
        value = self.value(attribute)
        if value is None:
            return None
        if len(value) > MAX_TEXT_BYTES:
            raise StunError(f"attribute {attribute:#06x} is too long")
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise StunError(f"attribute {attribute:#06x} is not UTF-8") from None

    def xor_address(self, attribute: int) -> Address | None:
        """An address of the XOR kind (section 14.2). Raises StunError."""
        value = self.value(attribute)
        return None if value is None else read_xor_address(value, self.transaction_id)

    def xor_addresses(self, attribute: int) -> list[Address]:
        """All addresses of the XOR kind. Raises StunError."""
        return [read_xor_address(value, self.transaction_id) for value in self.values(attribute)]

    def address(self, attribute: int) -> Address | None:
        """An address in the clear (section 14.1, ALTERNATE-SERVER). Raises StunError."""
        value = self.value(attribute)
        return None if value is None else _read_address(value)

    def error(self) -> tuple[int, str] | None:
        """The code (300 to 699) and reason of ERROR-CODE (section 14.8). Raises StunError."""
        value = self.value(Attribute.ERROR_CODE)
        if value is None:
            return None
        if len(value) < 4 or not 3 <= value[2] & 7 <= 6 or value[3] > 99:
            raise StunError("ERROR-CODE has a wrong format")
        reason = value[4 : 4 + MAX_TEXT_BYTES].decode(errors="replace")
        return (value[2] & 7) * 100 + value[3], reason

    def password_algorithms(self, attribute: int) -> tuple[int, ...]:
        """The numbers of PASSWORD-ALGORITHM(S) (sections 14.11 and 14.12), parameters skipped.

        Raises StunError.
        """
        value = self.value(attribute)
        if value is None:
            return ()
        algorithms = []
        offset = 0
        while offset < len(value):
            if offset + 4 > len(value):
                raise StunError("a password algorithm is cut short")
            algorithm, size = _ATTRIBUTE.unpack_from(value, offset)
            offset += 4 + size
            if offset > len(value):
                raise StunError("the parameters of a password algorithm are cut short")
            offset += -size % 4
            algorithms.append(algorithm)
        return tuple(algorithms)


def is_stun(data: bytes | memoryview) -> bool:
    """Whether this begins like a STUN message: two zero bits and the cookie (section 6)."""
    return len(data) >= HEADER_BYTES and data[0] < 0x40 and data[4:8] == _COOKIE_BYTES


# --- values of attributes ----------------------------------------------------------------------


def xor_address_value(address: tuple[str, int], transaction_id: bytes) -> bytes:
    """The value of an XOR-…-ADDRESS attribute. Raises ValueError unless the host is an address."""
    plain = address_value(address)
    mask = _COOKIE_BYTES[:2] + _COOKIE_BYTES + transaction_id
    return plain[:2] + _xor(plain[2:], mask)


def read_xor_address(value: bytes, transaction_id: bytes) -> Address:
    """The address in the value of an XOR-…-ADDRESS attribute. Raises StunError."""
    mask = _COOKIE_BYTES[:2] + _COOKIE_BYTES + transaction_id
    if len(value) not in (8, 20):
        raise StunError("an address has a wrong length")
    return _read_address(value[:2] + _xor(value[2:], mask))


def address_value(address: tuple[str, int]) -> bytes:
    """The value of an address attribute in the clear. Raises ValueError."""
    host, port = address
    try:
        if ":" in host:
            return b"\0\x02" + port.to_bytes(2, "big") + inet_pton(AF_INET6, host)
        return b"\0\x01" + port.to_bytes(2, "big") + inet_pton(AF_INET, host)
    except (OSError, OverflowError):
        raise ValueError("not an address and a port") from None


def error_value(code: int, reason: str = "") -> bytes:
    """The value of ERROR-CODE."""
    return bytes((0, 0, code // 100, code % 100)) + reason.encode()


def password_algorithms_value(*algorithms: int) -> bytes:
    """The value of PASSWORD-ALGORITHM or PASSWORD-ALGORITHMS, without parameters."""
    return b"".join(_ATTRIBUTE.pack(algorithm, 0) for algorithm in algorithms)


# --- keys --------------------------------------------------------------------------------------


def short_term_key(password: str) -> bytes:
    """RFC 8489, section 9.1.1."""
    return _opaque(password).encode()


def long_term_key(algorithm: PasswordAlgorithm, username: str, realm: str, password: str) -> bytes:
    """RFC 8489, section 18.5.1: 16 bytes for MD5, 32 for SHA-256."""
    text = f"{username}:{_opaque(realm)}:{_opaque(password)}".encode()
    if algorithm is PasswordAlgorithm.MD5:
        return md5(text, usedforsecurity=False).digest()
    return sha256(text).digest()


def user_hash(username: str, realm: str) -> bytes:
    """RFC 8489, section 14.4: the 32 bytes of USERHASH."""
    return sha256(f"{_opaque(username)}:{_opaque(realm)}".encode()).digest()


# --- helpers -----------------------------------------------------------------------------------


def _opaque(text: str) -> str:
    """The OpaqueString profile (RFC 8265, section 4.2), without its refusals."""
    if text.isascii():
        return text
    spaced = "".join(" " if unicodedata.category(c) == "Zs" else c for c in text)
    return unicodedata.normalize("NFC", spaced)


def _type_of(method: int, message_class: MessageClass) -> int:
    if not 0 <= method <= 0xFFF:
        raise ValueError("a STUN method has 12 bits")
    return (
        (method & 0xF80) << 2
        | (method & 0x070) << 1
        | (method & 0x00F)
        | (message_class & 0b10) << 7
        | (message_class & 0b01) << 4
    )


def _set_length(message: bytearray, end: int) -> None:
    """Have the header say that the message ends at byte `end`."""
    _LENGTH.pack_into(message, _LENGTH_AT, end - HEADER_BYTES)


def _method_of(kind: int) -> int:
    return (kind >> 2 & 0xF80) | (kind >> 1 & 0x070) | (kind & 0x00F)


def _check_integrity_size(integrity: Integrity, size: int) -> None:
    if size != integrity.size:
        raise StunError(f"{Attribute(integrity.attribute).name} has a wrong length")


def _check_fingerprint(data: bytes, offset: int, size: int) -> None:
    if size != 4 or offset + _FINGERPRINT_BYTES != len(data):
        raise StunError("FINGERPRINT is not the last attribute")
    expected = crc32(data[:offset]) ^ _FINGERPRINT_MASK
    if int.from_bytes(data[offset + 4 : offset + 8], "big") != expected:
        raise StunError("FINGERPRINT is wrong")


def _xor(value: bytes, mask: bytes) -> bytes:
    size = len(value)
    return (int.from_bytes(value, "big") ^ int.from_bytes(mask[:size], "big")).to_bytes(size, "big")


def _read_address(value: bytes) -> Address:
    family, size = value[1:2], len(value)
    port = int.from_bytes(value[2:4], "big")
    if family == b"\x01" and size == 8:
        return Address(inet_ntop(AF_INET, value[4:]), port)
    if family == b"\x02" and size == 20:
        return Address(str(ip_address(value[4:])), port)
    raise StunError("an address has a wrong family or length")
