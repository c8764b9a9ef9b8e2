"""STUN Binding: what an address asks of a relay about itself and about the NAT before it.

Where a relay listens at two IP addresses and at the same two ports of each, it offers RFC 5780: the
answer says from where it came (RESPONSE-ORIGIN) and where another one would come from
(OTHER-ADDRESS); on request it comes from there (CHANGE-REQUEST), goes to another port of the asking
address (RESPONSE-PORT) or is as large as the request (PADDING). Clients of RFC 3489, whose messages
have no magic cookie, get the same in their words; their RESPONSE-ADDRESS is not obeyed, as it would
send answers to whomever they like.

An answer is a message and its wishes: attributes that are left out where the answer would be too
large for a source that has proved nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import Final

import attrs

from relays.peers import LOWEST_PEER_PORT
from relays.requests import (
    SOFTWARE,
    Attributes,
    error_response,
    success_response,
    unknown_attributes,
)
from relays.stun import (
    HEADER_BYTES,
    Attribute,
    StunError,
    StunMessage,
    address_value,
    error_value,
    xor_address_value,
)
from runtime.net.address import Address

MAX_PADDING_BYTES: Final = 1_500
CHANGE_HOST: Final = 0x4
CHANGE_PORT: Final = 0x2

_DISCOVERY: Final = frozenset(
    {Attribute.CHANGE_REQUEST, Attribute.RESPONSE_PORT, Attribute.PADDING}
)
_CHANGE_REQUEST: Final = frozenset({Attribute.CHANGE_REQUEST})


@attrs.frozen(kw_only=True)
class Place:
    """A listener at one of the four corners: its address, the one that differs in both parts, and
    the numbers of the other listeners by what is changed."""

    origin: Address
    other: Address
    changed: Mapping[int, int]


def places(addresses: Mapping[int, Address]) -> dict[int, Place]:
    """Those among listeners (number and address) that can offer RFC 5780: two IP addresses of one
    family with the same two ports. Each belongs to one such four."""
    number_by_address = {address: number for number, address in addresses.items()}
    found: dict[int, Place] = {}
    for address in number_by_address:
        for other in number_by_address:
            if address.family != other.family or not _differ(address, other):
                continue
            corners = [
                address,
                Address(other.host, address.port),
                Address(address.host, other.port),
                other,
            ]
            numbers = [number_by_address[one] for one in corners if one in number_by_address]
            if len(numbers) < 4 or not found.keys().isdisjoint(numbers):
                continue
            for index, number in enumerate(numbers):
                found[number] = Place(
                    origin=corners[index],
                    other=corners[index ^ 3],
                    changed={
                        0: number,
                        CHANGE_HOST: numbers[index ^ 1],
                        CHANGE_PORT: numbers[index ^ 2],
                        CHANGE_HOST | CHANGE_PORT: numbers[index ^ 3],
                    },
                )
    return found


def _differ(one: Address, other: Address) -> bool:
    return one.host != other.host and one.port != other.port


@attrs.frozen(kw_only=True)
class Answer:
    """To be sent from `listener` to `destination`."""

    listener: int
    destination: tuple[str, int]
    message: StunMessage
    wishes: Attributes = SOFTWARE


def answer_binding(
    place_by_listener: Mapping[int, Place],
    listener: int,
    request: StunMessage,
    source: tuple[str, int],
) -> Answer:
    """RFC 8489, section 6.3; RFC 5780, section 6.1."""
    place = place_by_listener.get(listener)
    try:
        change = request.integer(Attribute.CHANGE_REQUEST, 4) or 0
        port = _response_port(request)
    except StunError:
        return _refusal(listener, request, source, 400)
    # Whoever asks for no change, as old clients do in so many words, can be served everywhere.
    understood = _CHANGE_REQUEST if place is None and not change else frozenset()
    unknown = unknown_attributes(request, understood if place is None else _DISCOVERY)
    if unknown is not None:
        return _refusal(listener, request, source, 420, (unknown,))
    padding = request.value(Attribute.PADDING)
    if port is not None and (padding is not None or port < LOWEST_PEER_PORT):
        return _refusal(listener, request, source, 400)
    wishes: list[tuple[int, bytes]] = []
    if place is not None:
        listener = place.changed[change & (CHANGE_HOST | CHANGE_PORT)]
        origin = place_by_listener[listener].origin
        wishes.append((Attribute.OTHER_ADDRESS, address_value(place.other)))
        wishes.append((Attribute.RESPONSE_ORIGIN, address_value(origin)))
        # In the clear as well, so that a middlebox is noticed that replaces addresses in packets.
        wishes.append((Attribute.MAPPED_ADDRESS, address_value(source)))
    if padding is not None:
        wishes.append((Attribute.PADDING, bytes(min(len(padding), MAX_PADDING_BYTES))))
    mapped = xor_address_value(source, request.transaction_id)
    return Answer(
        listener=listener,
        destination=source if port is None else (source[0], port),
        message=success_response(request, ((Attribute.XOR_MAPPED_ADDRESS, mapped),)),
        wishes=(*wishes, *SOFTWARE),
    )


def _response_port(request: StunMessage) -> int | None:
    """RFC 5780, section 7.5: two bytes; some send the two of padding as part of the value."""
    value = request.value(Attribute.RESPONSE_PORT)
    if value is None:
        return None
    if len(value) not in (2, 4):
        raise StunError("RESPONSE-PORT has a wrong length")
    return int.from_bytes(value[:2], "big")


def _refusal(
    listener: int,
    request: StunMessage,
    source: tuple[str, int],
    code: int,
    attributes: Attributes = (),
) -> Answer:
    message = error_response(request, code, "", attributes)
    return Answer(listener=listener, destination=source, message=message)


# --- RFC 3489 ------------------------------------------------------------------------------------

_CLASSIC_HEADER: Final = Struct("!HH16s")
_ATTRIBUTE: Final = Struct("!HH")
_CLASSIC_REQUEST: Final = 0x0001
_CLASSIC_SUCCESS: Final = 0x0101
_CLASSIC_ERROR: Final = 0x0111
_LAST_CLASSIC_ATTRIBUTE: Final = 0x000B
_MAX_CLASSIC_ATTRIBUTES: Final = 16


@attrs.frozen(kw_only=True)
class ClassicAnswer:
    """To be sent from `listener` to whoever asked; `encode` with as many bytes as it may have."""

    listener: int
    kind: int
    transaction_id: bytes
    attributes: Attributes
    wishes: Attributes = ()

    def encode(self, room: int) -> bytes:
        """At most `room` bytes, if the wishes have to be left out for that."""
        body = b"".join(_encoded(*pair) for pair in self.attributes)
        for pair in self.wishes:
            wish = _encoded(*pair)
            if HEADER_BYTES + len(body) + len(wish) <= room:
                body += wish
        return _CLASSIC_HEADER.pack(self.kind, len(body), self.transaction_id) + body


def is_classic_request(data: memoryview) -> bool:
    """Whether this begins as a Binding request of RFC 3489 does, and is as long as it says."""
    return (
        len(data) >= HEADER_BYTES
        and int.from_bytes(data[:2], "big") == _CLASSIC_REQUEST
        and int.from_bytes(data[2:4], "big") == len(data) - HEADER_BYTES
    )


def answer_classic(
    place_by_listener: Mapping[int, Place],
    listener: int,
    data: memoryview,
    source: tuple[str, int],
) -> ClassicAnswer | None:
    """None: there is no answer, as to a request to answer from an address that there is not. An
    error would be taken for an answer from there."""
    attributes = _classic_attributes(data)
    if attributes is None:
        return None
    transaction_id = bytes(data[4:HEADER_BYTES])
    unknown = sorted(kind for kind in attributes if _LAST_CLASSIC_ATTRIBUTE < kind < 0x8000)
    if unknown:
        # An even number of them, the last one said twice if need be (section 11.2.10).
        even = unknown + unknown[-1:] * (len(unknown) % 2)
        listed = b"".join(kind.to_bytes(2, "big") for kind in even)
        return ClassicAnswer(
            listener=listener,
            kind=_CLASSIC_ERROR,
            transaction_id=transaction_id,
            attributes=(
                (Attribute.ERROR_CODE, error_value(420)),
                (Attribute.UNKNOWN_ATTRIBUTES, listed),
            ),
        )
    value = attributes.get(Attribute.CHANGE_REQUEST, bytes(4))
    change = int.from_bytes(value, "big") & (CHANGE_HOST | CHANGE_PORT)
    place = place_by_listener.get(listener)
    if len(value) != 4 or (place is None and change):
        return None
    wishes: Attributes = ()
    if place is not None:
        listener = place.changed[change]
        wishes = (
            (Attribute.CHANGED_ADDRESS, address_value(place.other)),
            (Attribute.SOURCE_ADDRESS, address_value(place_by_listener[listener].origin)),
        )
    return ClassicAnswer(
        listener=listener,
        kind=_CLASSIC_SUCCESS,
        transaction_id=transaction_id,
        attributes=((Attribute.MAPPED_ADDRESS, address_value(source)),),
        wishes=wishes,
    )


def _classic_attributes(data: memoryview) -> dict[int, bytes] | None:
    """The first of each kind; None where they do not fill the message, or are too many."""
    found: dict[int, bytes] = {}
    offset = HEADER_BYTES
    for _ in range(_MAX_CLASSIC_ATTRIBUTES):
        if offset + 4 > len(data):
            break
        kind, size = _ATTRIBUTE.unpack_from(data, offset)
        found.setdefault(kind, bytes(data[offset + 4 : offset + 4 + size]))
        offset += 4 + size
    return found if offset == len(data) else None


def _encoded(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(kind, len(value)) + value
