"""Whether anything that speaks STUN answers at an address: a probe of one Binding exchange.

The portal asks this of every address that a relay announces, before it hands the address to
anybody. It is all of STUN (RFC 8489) that the control channel knows; the codec proper is the
relays' own.

A core: make a `BindingProbe`, send its `request`, pass what comes back from the address to
`answer`.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Final

from runtime.net.address import Address
from runtime.randomness import Randomness

MAX_RESPONSE_BYTES: Final = 1_500

_HEADER_BYTES: Final = 20
_BINDING_REQUEST: Final = 0x0001
_BINDING_SUCCESS: Final = 0x0101
_MAGIC_COOKIE: Final = 0x2112A442
_XOR_MAPPED_ADDRESS: Final = 0x0020
_FAMILY_IPV4: Final = 1
_FAMILY_IPV6: Final = 2


class BindingProbe:
    """One Binding request with a transaction id (96 random bits) of its own.

    The same request may be sent several times, since UDP loses datagrams.
    """

    __slots__ = ("_transaction_id", "request")

    def __init__(self, randomness: Randomness) -> None:
        self._transaction_id = randomness.bytes(12)
        self.request: bytes = (
            _BINDING_REQUEST.to_bytes(2, "big")
            + bytes(2)
            + _MAGIC_COOKIE.to_bytes(4, "big")
            + self._transaction_id
        )

    def answer(self, datagram: bytes) -> Address | None:
        """The address that the far end saw this request come from (XOR-MAPPED-ADDRESS).

        None for anything but a well-formed success response to this very request: whoever did
        not see the request cannot guess its transaction id. Never raises.
        """
        if not _HEADER_BYTES <= len(datagram) <= MAX_RESPONSE_BYTES:
            return None
        length = int.from_bytes(datagram[2:4], "big")
        if datagram[:2] != _BINDING_SUCCESS.to_bytes(2, "big"):
            return None
        if length % 4 or length != len(datagram) - _HEADER_BYTES:
            return None
        if datagram[4:20] != self.request[4:20]:
            return None
        return self._mapped_address(datagram)

    def _mapped_address(self, datagram: bytes) -> Address | None:
        """RFC 8489, sections 14 and 14.2."""
        place = _HEADER_BYTES
        while place + 4 <= len(datagram):
            kind = int.from_bytes(datagram[place : place + 2], "big")
            size = int.from_bytes(datagram[place + 2 : place + 4], "big")
            value = datagram[place + 4 : place + 4 + size]
            if len(value) != size:
                return None
            if kind == _XOR_MAPPED_ADDRESS:
                return self._unmask(value)
            place += 4 + (size + 3) // 4 * 4
        return None

    def _unmask(self, value: bytes) -> Address | None:
        mask = self.request[4:20]
        if len(value) == 8 and value[1] == _FAMILY_IPV4:
            host = str(IPv4Address(_xor(value[4:8], mask)))
        elif len(value) == 20 and value[1] == _FAMILY_IPV6:
            host = str(IPv6Address(_xor(value[4:20], mask)))
        else:
            return None
        return Address(host, int.from_bytes(_xor(value[2:4], mask), "big"))


def _xor(value: bytes, mask: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(value, mask, strict=False))
