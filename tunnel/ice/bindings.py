"""What relays say of our sockets: STUN Binding requests (RFC 8489), asked again and again."""

from __future__ import annotations

import attrs

from relays.stun import Attribute, MessageClass, Method, StunError, StunMessage
from runtime.net.address import Address


@attrs.define(kw_only=True, eq=False)
class Binding:
    """What the server says of a socket. `due`: the next request, None while at rest."""

    socket: Address
    server: Address
    transaction_id: bytes = b""
    attempt: int = 0
    due: int | None = None
    reflexive: Address | None = None
    answered: bool = False


def binding_request(transaction_id: bytes) -> bytes:
    """The smallest request that everybody answers."""
    request = StunMessage(
        method=Method.BINDING, message_class=MessageClass.REQUEST, transaction_id=transaction_id
    )
    return request.encode(fingerprint=True)


def read_reflexive(data: bytes) -> Address | None:
    """The address that a success response tells; None for anything else."""
    try:
        message = StunMessage.decode(data)
        reflexive = message.xor_address(Attribute.XOR_MAPPED_ADDRESS)
    except StunError:
        return None
    return reflexive if message.message_class is MessageClass.SUCCESS else None
