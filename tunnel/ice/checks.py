"""The STUN messages of connectivity checks (RFC 8445, section 7): built, and judged when received.

Both ends use short-term credentials: a check carries the user name `their fragment:our fragment`
and is protected by the password of the end that receives it, and so is its answer.
"""

from __future__ import annotations

from typing import Final, Literal

import attrs

from channel.messages import IceCredentials
from relays.stun import (
    Attribute,
    MessageClass,
    Method,
    StunError,
    StunMessage,
    error_value,
    short_term_key,
    xor_address_value,
)
from runtime.net.address import Address

MAX_PRIORITY: Final = 2**31 - 1
_KNOWN: Final = frozenset((Attribute.USERNAME, Attribute.PRIORITY, Attribute.USE_CANDIDATE))

Role = Literal["controlling", "controlled"]
_ROLE_ATTRIBUTE: Final[dict[Role, Attribute]] = {
    "controlling": Attribute.ICE_CONTROLLING,
    "controlled": Attribute.ICE_CONTROLLED,
}


@attrs.frozen(kw_only=True)
class CheckRequest:
    """A check of the peer that proved to know our password.

    `role` is what the peer takes itself for, if it says so; `unknown` are attributes that it
    must not have sent unless they are understood (RFC 8489, section 6.3.1).
    """

    transaction_id: bytes
    priority: int
    nominates: bool
    role: Role | None
    tie_breaker: int
    unknown: tuple[int, ...]


@attrs.frozen(kw_only=True)
class CheckAnswer:
    """An answer of the peer: `mapped` is how it sees us; `error` is 0 for success."""

    mapped: Address | None
    error: int


class CheckMessages:
    """Builds and judges the checks of one connection."""

    __slots__ = ("_key_in", "_key_out", "_username_in", "_username_out")

    def __init__(self, local: IceCredentials, remote: IceCredentials) -> None:
        self._username_in = f"{local.fragment}:{remote.fragment}"
        self._username_out = f"{remote.fragment}:{local.fragment}".encode()
        self._key_in = short_term_key(local.password)
        self._key_out = short_term_key(remote.password)

    def request(
        self,
        transaction_id: bytes,
        *,
        priority: int,
        role: Role,
        tie_breaker: int,
        nominates: bool,
    ) -> bytes:
        attributes: list[tuple[int, bytes]] = [
            (Attribute.USERNAME, self._username_out),
            (Attribute.PRIORITY, priority.to_bytes(4, "big")),
            (_ROLE_ATTRIBUTE[role], tie_breaker.to_bytes(8, "big")),
        ]
        if nominates:
            attributes.append((Attribute.USE_CANDIDATE, b""))
        message = StunMessage(
            method=Method.BINDING,
            message_class=MessageClass.REQUEST,
            transaction_id=transaction_id,
            attributes=tuple(attributes),
        )
        return message.encode(key=self._key_out, fingerprint=True)

    def success(self, transaction_id: bytes, source: Address) -> bytes:
        """The answer to a check that came from `source`."""
        mapped = (Attribute.XOR_MAPPED_ADDRESS, xor_address_value(source, transaction_id))
        return self._response(MessageClass.SUCCESS, transaction_id, (mapped,))

    def error(self, transaction_id: bytes, code: int, unknown: tuple[int, ...] = ()) -> bytes:
        """An error response; `unknown` goes with code 420."""
        attributes: list[tuple[int, bytes]] = [(Attribute.ERROR_CODE, error_value(code))]
        if unknown:
            value = b"".join(kind.to_bytes(2, "big") for kind in unknown)
            attributes.append((Attribute.UNKNOWN_ATTRIBUTES, value))
        return self._response(MessageClass.ERROR, transaction_id, tuple(attributes))

    def judge_request(self, message: StunMessage) -> CheckRequest | None:
        """What a request says; None unless it is a well-formed check made with our password."""
        try:
            username = message.text(Attribute.USERNAME)
            priority = message.integer(Attribute.PRIORITY, 4)
            role, tie_breaker = _role_of(message)
        except StunError:
            return None
        if username != self._username_in or not priority or not message.verify(self._key_in):
            return None
        return CheckRequest(
            transaction_id=message.transaction_id,
            priority=min(priority, MAX_PRIORITY),
            nominates=Attribute.USE_CANDIDATE in message,
            role=role,
            tie_breaker=tie_breaker,
            unknown=tuple(a for a, _ in message.attributes if a < 0x8000 and a not in _KNOWN),
        )

    def judge_answer(self, message: StunMessage) -> CheckAnswer | None:
        """What a response says; None unless it was made with the peer's password."""
        if not message.verify(self._key_out):
            return None
        try:
            error = message.error()
            mapped = message.xor_address(Attribute.XOR_MAPPED_ADDRESS)
        except StunError:
            return None
        if message.message_class is MessageClass.SUCCESS:
            return CheckAnswer(mapped=mapped, error=0)
        return None if error is None else CheckAnswer(mapped=None, error=error[0])

    def _response(
        self,
        message_class: MessageClass,
        transaction_id: bytes,
        attributes: tuple[tuple[int, bytes], ...],
    ) -> bytes:
        message = StunMessage(
            method=Method.BINDING,
            message_class=message_class,
            transaction_id=transaction_id,
            attributes=attributes,
        )
        return message.encode(key=self._key_in, fingerprint=True)


def local_fragment_of(message: StunMessage) -> str | None:
    """The first half of the user name: whom a request is for. None: it names nobody."""
    try:
        username = message.text(Attribute.USERNAME)
    except StunError:
        return None
    return None if username is None else username.partition(":")[0]


def _role_of(message: StunMessage) -> tuple[Role | None, int]:
    for role, attribute in _ROLE_ATTRIBUTE.items():
        tie_breaker = message.integer(attribute, 8)
        if tie_breaker is not None:
            return role, tie_breaker
    return None, 0
