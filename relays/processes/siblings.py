"""What passes between the processes of one relay: data of a client of one to a client of another.

Each process has a slice of the relayed ports. A client may have the relayed address of another as
its peer, and that may be in a sibling's slice. Then the data goes to the sibling, with the two
relayed addresses, and only there it is decided whether it arrives: as in one process, an address
that is no allocation gets nothing, and nothing leaves for the machine's other sockets.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from relays.turn import FAMILY_IPV4, FAMILY_IPV6

_HEAD: Final = Struct("!BHH")
HEAD_BYTES: Final = _HEAD.size


def port_slices(first: int, last: int, count: int) -> list[tuple[int, int]]:
    """The ports from `first` to `last` in so many slices, each of first and last port. They begin
    at even ports (but for the first), so that a pair of EVEN-PORT stays in one. Raises ValueError
    when there are fewer than two ports for each."""
    ports = last - first + 1
    if ports < 4 * count and count > 1:
        raise ValueError(f"{ports} relayed ports are too few for {count} processes")
    begins = [first, *((first + ports * at // count + 1) // 2 * 2 for at in range(1, count))]
    return list(zip(begins, [*(begin - 1 for begin in begins[1:]), last], strict=True))


def sibling_of(port: int, slices: list[tuple[int, int]]) -> int | None:
    """Which process has this port."""
    return next((at for at, (first, last) in enumerate(slices) if first <= port <= last), None)


def wrap(source: tuple[str, int], to: tuple[str, int], data: bytes | memoryview) -> bytes:
    """Data from one relayed address to another, both of one family."""
    family = FAMILY_IPV6 if ":" in source[0] else FAMILY_IPV4
    return b"".join((_HEAD.pack(family, source[1], to[1]), data))


def unwrap(packet: memoryview) -> tuple[int, int, int, memoryview]:
    """Family, port it comes from, port it goes to, data. Raises ValueError."""
    if len(packet) < HEAD_BYTES:
        raise ValueError("shorter than its head")
    return *_HEAD.unpack_from(packet), packet[HEAD_BYTES:]
