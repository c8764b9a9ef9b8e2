"""Entities as JSON: the form in which a store keeps what has no column type.

msgspec reads attrs classes by itself; only addresses need a hand. Whoever decodes checks every
limit of the model (`msgspec.Meta`) on the way.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TypeVar

import msgspec

from channel.messages import DoorAddress, IpText

T = TypeVar("T")

_TEXTUAL = (IPv4Address, IPv6Address, IPv4Network, IPv6Network, IpText, DoorAddress)


def to_json(value: object) -> bytes:
    """UTF-8 JSON. Raises UnicodeEncodeError for half a surrogate."""
    return msgspec.json.encode(value, enc_hook=write_value)


def from_json(data: bytes | str, as_type: type[T]) -> T:
    """The inverse of `to_json`. Raises msgspec.ValidationError or msgspec.DecodeError."""
    return msgspec.json.decode(data, type=as_type, dec_hook=read_value)


def write_value(value: object) -> str:
    """msgspec's `enc_hook` for addresses. Raises NotImplementedError for anything else."""
    if isinstance(value, _TEXTUAL):
        return str(value)
    raise NotImplementedError(f"cannot encode {type(value).__name__}")


def read_value(as_type: type, value: object) -> object:
    """msgspec's `dec_hook` for addresses. Raises ValueError, NotImplementedError."""
    if issubclass(as_type, _TEXTUAL) and isinstance(value, str):
        return as_type(value)
    raise NotImplementedError(f"cannot decode {as_type.__name__}")
