"""What a datagram is, by its first bytes, which of several belong together, and where they go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from runtime.net.address import Address
from tunnel.ice.candidates import Base
from tunnel.wireguard.noise import MESSAGE_TRANSPORT

_MIN_WIREGUARD_BYTES: Final = 32
_WIREGUARD_RESERVED: Final = b"\0\0\0"
_TRANSPORT_LABEL: Final = MESSAGE_TRANSPORT.to_bytes(4, "little")
_NOWHERE: Final = Address("", 0)
# The type of a WireGuard message, and the receiver's index of a transport message.
_LABEL_BYTES: Final = 8


class Transmit(NamedTuple):
    """A datagram to be sent from the host socket `local` to `remote`."""

    local: Address
    remote: Address
    data: bytes


class Relayed(NamedTuple):
    """A datagram of `peer` that came through the relay of `base`."""

    base: Base
    peer: Address
    data: bytes


def runs(datagrams: Iterable[tuple[bytes, Address]]) -> Iterator[tuple[Address, list[bytes]]]:
    """Neighbours of one source that begin with the same 8 bytes, in order."""
    run: list[bytes] = []
    label, sender = b"", _NOWHERE
    for data, source in datagrams:
        if data[:_LABEL_BYTES] == label and source == sender:
            run.append(data)
            continue
        if run:
            yield sender, run
        run, label, sender = [data], data[:_LABEL_BYTES], source
    if run:
        yield sender, run


def is_transport(data: bytes) -> bool:
    """WireGuard's messages of data."""
    return data[:4] == _TRANSPORT_LABEL and len(data) >= _MIN_WIREGUARD_BYTES


def is_wireguard(data: bytes) -> bool:
    """Messages of WireGuard: the first byte is 1 to 4, and three zeros follow."""
    return (
        len(data) >= _MIN_WIREGUARD_BYTES and 1 <= data[0] <= 4 and data[1:4] == _WIREGUARD_RESERVED
    )
