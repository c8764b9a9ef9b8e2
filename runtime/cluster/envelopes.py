"""What the runtimes of two nodes say to each other: calls and answers, watches, links, broadcasts.

A plain cast needs none of these: it is a frame of its own, whose target is the actor's number. All
others are frames of kind 16 to 31 for target 0, the node itself, as MessagePack arrays. A message
within one is `kind, body`, as in a frame of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, final

import msgspec
from msgspec import Meta, Raw, Struct

from runtime.cluster.frames import LinkProtocolError, MessageCodec
from runtime.cluster.keyed import Locate, Located, Relinquish
from runtime.cluster.member import Renew
from runtime.cluster.reporter import AskNode, NodeAnswer
from runtime.presence.tracker import Farewell, Heartbeat, Transfer, TransferRequest
from runtime.refs import (
    MAX_REF_BYTES,
    ActorRef,
    InvalidRef,
    NamedRef,
    decode_ref,
    encode_ref,
)
from runtime.secret import Secret

FIRST_APPLICATION_KIND: Final = 64
MAX_REASON_CHARACTERS: Final = 500
PLAIN_KIND: Final = 0
"""The kind of an answer that is None, a bool, a number, text or bytes."""

_Number = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Kind = Annotated[int, Meta(ge=0, le=2**16 - 1)]
_Text = Annotated[str, Meta(max_length=MAX_REASON_CHARACTERS)]
_Written = Annotated[bytes, Meta(max_length=MAX_REF_BYTES)]


class NamedCast(Struct, array_like=True, frozen=True):
    """To whoever has this name (a NamedRef, written)."""

    name: _Written
    kind: _Kind
    body: Raw


class Call(Struct, array_like=True, frozen=True):
    """To an actor by number, or (number 0) by name. `sender` 0: not an actor."""

    id: _Number
    sender: _Number
    number: _Number
    name: _Written
    deadline_ns: _Number
    kind: _Kind
    body: Raw


class Answer(Struct, array_like=True, frozen=True):
    """The value that a call gave."""

    id: _Number
    kind: _Kind
    body: Raw


class Failure(Struct, array_like=True, frozen=True):
    """What a call raised: the name of the error, and its one argument."""

    id: _Number
    error: _Text
    text: _Text


class Watch(Struct, array_like=True, frozen=True):
    """Say when this actor ends."""

    id: _Number
    number: _Number


class Unwatch(Struct, array_like=True, frozen=True):
    """Do not say it any more."""

    id: _Number


class Ended(Struct, array_like=True, frozen=True):
    """An actor that was watched has ended."""

    id: _Number
    reason: _Text


class LinkWith(Struct, array_like=True, frozen=True):
    """The sender's actor `own` is linked with `number`."""

    own: _Number
    number: _Number


class UnlinkFrom(Struct, array_like=True, frozen=True):
    """The link is off."""

    own: _Number
    number: _Number


class Broken(Struct, array_like=True, frozen=True):
    """The sender's actor `own`, linked with `number`, has ended."""

    own: _Number
    number: _Number
    reason: _Text


class Signal(Struct, array_like=True, frozen=True):
    """An exit signal for `number`, as from the sender's actor `own` (0: not an actor)."""

    own: _Number
    number: _Number
    reason: _Text


class Broadcast(Struct, array_like=True, frozen=True):
    """To be published on a topic (a NamedRef of that name, written)."""

    topic: _Written
    kind: _Kind
    body: Raw


RUNTIME_KINDS: Final[Mapping[int, type]] = {
    16: NamedCast,
    17: Call,
    18: Answer,
    19: Failure,
    20: Watch,
    21: Unwatch,
    22: Ended,
    23: LinkWith,
    24: UnlinkFrom,
    25: Broken,
    26: Signal,
    27: Broadcast,
    48: Heartbeat,
    49: TransferRequest,
    50: Transfer,
    51: Farewell,
    52: Locate,
    53: Located,
    54: Relinquish,
    55: AskNode,
    56: NodeAnswer,
    57: Renew,
}
"""Part of the protocol between nodes, as are the kinds of an application, from 64 on."""


@final
class Enclosed:
    """A message of any registered class within another, where the field cannot name its class.

    Not an attrs class, since msgspec would write that by itself, and lose the class of `message`.
    """

    __slots__ = ("message",)

    def __init__(self, message: Any) -> None:
        self.message = message

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Enclosed) and self.message == other.message

    def __hash__(self) -> int:
        return hash(self.message)

    def __repr__(self) -> str:
        return f"Enclosed({self.message!r})"


def make_codec(
    class_by_kind: Mapping[int, type],
    *,
    write: Callable[[Any], Any] | None = None,
    read: Callable[[type, Any], Any] | None = None,
) -> MessageCodec:
    """The codec of a cluster whose actors say these classes to each other, beside what the runtime
    says. References, secrets and `Enclosed` messages may be in them (links are encrypted, and end
    in memory); `write` and `read` are msgspec's hooks for other types that it does not know.
    Raises ValueError."""
    if any(kind < FIRST_APPLICATION_KIND for kind in class_by_kind):
        raise ValueError(f"an application's kinds begin with {FIRST_APPLICATION_KIND}")

    def write_value(value: Any) -> Any:
        if isinstance(value, ActorRef | NamedRef):
            return encode_ref(value)
        if isinstance(value, Secret):
            return value.reveal()
        if isinstance(value, Enclosed):
            return codec.pack(value.message)
        if write is None:
            raise NotImplementedError
        return write(value)

    def read_value(wanted: type, value: Any) -> Any:
        if wanted in (ActorRef, NamedRef) and isinstance(value, bytes):
            return _read_ref(wanted, value)
        if wanted is Secret and isinstance(value, bytes):
            return Secret(value)
        if wanted is Enclosed:
            return Enclosed(_unpack(codec, value))
        if read is None:
            raise ValueError(f"not a {wanted.__name__}")
        return read(wanted, value)

    codec = MessageCodec(
        {**RUNTIME_KINDS, **class_by_kind}, enc_hook=write_value, dec_hook=read_value
    )
    return codec


def _read_ref(wanted: type, written: bytes) -> ActorRef | NamedRef:
    try:
        ref = decode_ref(written)
    except InvalidRef as error:
        raise ValueError(str(error)) from None
    if not isinstance(ref, wanted):
        raise ValueError("an address of the other form")
    return ref


def _unpack(codec: MessageCodec, value: Any) -> Any:
    match value:
        case [int(kind), bytes(body)]:
            try:
                return codec.decode(kind, body)
            except LinkProtocolError as error:
                raise ValueError(str(error)) from None
        case _:
            raise ValueError("not an enclosed message")


def write_plain(value: object) -> bytes:
    """An answer that is no message. Raises TypeError."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return msgspec.msgpack.encode(value)
    raise TypeError(f"a {type(value).__name__} does not travel: it is not registered")


def read_plain(body: Raw) -> Any:
    """Undo `write_plain`. Raises LinkProtocolError."""
    try:
        return msgspec.msgpack.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass
    raise LinkProtocolError("an answer is malformed")
