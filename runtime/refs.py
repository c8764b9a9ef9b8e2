"""Addresses of actors, and how they travel.

An `ActorRef` is one incarnation of an actor; a `NamedRef` is whoever has a name when the message is
sent. Both are taken wherever an actor is addressed, and both can be written to bytes or text and
read back on any node. The form is typed (MessagePack, checked by msgspec) and bounded; nothing that
comes from outside is ever unpickled.

    bytes: an array, [0, node, number] or [1, node or nil, name]
    text:  the same in base64url without padding
    name:  a text, an integer, a UUID (extension 1, 16 bytes), or an array of 1 to 8 of these
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from collections.abc import Hashable
from typing import TYPE_CHECKING, Annotated, Final, final
from uuid import UUID

import attrs
import msgspec

from runtime.errors import ActorError

if TYPE_CHECKING:
    from runtime.context import Context

MAX_REF_BYTES: Final = 1_024
MAX_NAME_PARTS: Final = 8
_UUID_CODE: Final = 1


class InvalidRef(ActorError):
    """Not an address of an actor, or one whose name has no written form."""


@final
class ActorRef:
    """The address of one incarnation of an actor: a node and a number, never reused.

    Equal and hashable by these two; the rest is a shortcut to the actor on its own node."""

    __slots__ = ("_context", "node", "number")

    def __init__(self, node: str, number: int) -> None:
        self.node = node
        self.number = number
        self._context: Context | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ActorRef):
            return NotImplemented
        return self.number == other.number and self.node == other.node

    def __hash__(self) -> int:
        return self.number

    def __repr__(self) -> str:
        return f"<{self.node}.{self.number}>"

    def __reduce__(self) -> tuple[type[ActorRef], tuple[str, int]]:
        return ActorRef, (self.node, self.number)


@final
@attrs.frozen
class NamedRef:
    """Whoever is registered under `name` on `node` (None: on the node that looks it up) at the
    moment of sending. Local names may be any hashable; only those of the module's text travel."""

    name: Hashable
    node: str | None = None

    _context = None  # it is looked up each time

    def __repr__(self) -> str:
        return f"<{self.name!r} on {self.node or 'this node'}>"


AnyRef = ActorRef | NamedRef


def encode_ref(ref: AnyRef) -> bytes:
    """The written form. Raises InvalidRef."""
    if isinstance(ref, ActorRef):
        written = msgspec.msgpack.encode(_Anonymous(ref.node, ref.number))
    else:
        written = msgspec.msgpack.encode(_Named(ref.node, _write_name(ref.name)))
    if len(written) > MAX_REF_BYTES:
        raise InvalidRef(f"an address has at most {MAX_REF_BYTES} bytes")
    return written


def decode_ref(written: bytes) -> AnyRef:
    """Read the written form. Raises InvalidRef, whatever the bytes are."""
    if len(written) > MAX_REF_BYTES:
        raise InvalidRef(f"an address has at most {MAX_REF_BYTES} bytes")
    try:
        read = _DECODER.decode(written)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise InvalidRef("not an address of an actor") from None
    if isinstance(read, _Anonymous):
        return ActorRef(read.node, read.number)
    return NamedRef(_read_name(read.name), read.node)


def ref_to_text(ref: AnyRef) -> str:
    """`encode_ref` as text of letters, digits, "-" and "_". Raises InvalidRef."""
    return urlsafe_b64encode(encode_ref(ref)).decode("ascii").rstrip("=")


def ref_from_text(text: str) -> AnyRef:
    """Undo `ref_to_text`. Raises InvalidRef."""
    if len(text) > 2 * MAX_REF_BYTES:
        raise InvalidRef("too long for an address")
    try:
        return decode_ref(urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (Base64Error, ValueError):
        raise InvalidRef("not an address of an actor") from None


_Part = str | int | msgspec.msgpack.Ext
_Node = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]


class _Anonymous(msgspec.Struct, array_like=True, tag=0, frozen=True, forbid_unknown_fields=True):
    node: _Node
    number: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


class _Named(msgspec.Struct, array_like=True, tag=1, frozen=True, forbid_unknown_fields=True):
    node: _Node | None
    name: _Part | Annotated[list[_Part], msgspec.Meta(min_length=1, max_length=MAX_NAME_PARTS)]


_DECODER: Final = msgspec.msgpack.Decoder(_Anonymous | _Named)


def _write_name(name: Hashable) -> _Part | list[_Part]:
    if not isinstance(name, tuple):
        return _write_part(name)
    if not 1 <= len(name) <= MAX_NAME_PARTS:
        raise InvalidRef(f"a name has 1 to {MAX_NAME_PARTS} parts")
    return [_write_part(part) for part in name]


def _write_part(part: Hashable) -> _Part:
    if type(part) is UUID:
        return msgspec.msgpack.Ext(_UUID_CODE, part.bytes)
    if type(part) is str:
        return part
    if type(part) is int and -(2**63) <= part < 2**63:
        return part
    raise InvalidRef(f"a {type(part).__name__} in a name has no written form")


def _read_name(written: _Part | list[_Part]) -> Hashable:
    if isinstance(written, list):
        return tuple(_read_part(part) for part in written)
    return _read_part(written)


def _read_part(written: _Part) -> Hashable:
    if not isinstance(written, msgspec.msgpack.Ext):
        return written
    data = bytes(written.data)
    if written.code != _UUID_CODE or len(data) != 16:
        raise InvalidRef("not an address of an actor")
    return UUID(bytes=data)
