"""What a resource's filters let through: compiled once, asked for every new flow."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Final

from channel.messages import Filter

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
ICMPV6: Final = 58
MAX_PORT: Final = 65_535

_NUMBERS_BY_NAME: Final[dict[str, tuple[int, ...]]] = {
    "tcp": (TCP,),
    "udp": (UDP,),
    "icmp": (ICMP, ICMPV6),
}


class PacketFilter:
    """The union of some filters. Made by `compile_filters`; immutable."""

    __slots__ = ("_ranges_by_protocol",)

    def __init__(self, ranges_by_protocol: dict[int, list[tuple[int, int]]] | None) -> None:
        self._ranges_by_protocol = ranges_by_protocol

    @property
    def allows_everything(self) -> bool:
        """There is no filter, so every protocol and port passes."""
        return self._ranges_by_protocol is None

    def allows(self, protocol: int, destination_port: int | None) -> bool:
        """Whether a packet passes, by its IP protocol number (IANA) and its destination port.

        ICMP (1 and 58) has no ports: the argument is not looked at. For TCP and UDP, None means
        that the port cannot be read (a later fragment): it passes only where every port does.
        A protocol that no filter names passes only where there is no filter at all.
        """
        if self._ranges_by_protocol is None:
            return True
        ranges = self._ranges_by_protocol.get(protocol)
        if not ranges:
            return False
        if protocol in (ICMP, ICMPV6):
            return True
        if destination_port is None:
            return ranges[0] == (0, MAX_PORT)
        place = bisect_right(ranges, (destination_port, MAX_PORT)) - 1
        return place >= 0 and ranges[place][0] <= destination_port <= ranges[place][1]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PacketFilter):
            return NotImplemented
        return self._ranges_by_protocol == other._ranges_by_protocol

    __hash__ = None  # type: ignore[assignment]  # compared by content, never a key

    def __repr__(self) -> str:
        return f"PacketFilter({self._ranges_by_protocol})"


def compile_filters(filters: Iterable[Filter]) -> PacketFilter:
    """One `PacketFilter` for all of `filters`; none at all let everything through.

    A range that ends before it starts holds no port, so it lets nothing through.
    """
    filters = tuple(filters)
    if not filters:
        return PacketFilter(None)
    ranges_by_protocol: dict[int, list[tuple[int, int]]] = {}
    for one in filters:
        for protocol in _NUMBERS_BY_NAME[one.protocol]:
            ranges_by_protocol.setdefault(protocol, []).append((one.port_start, one.port_end))
    return PacketFilter(
        {protocol: _merge(ranges) for protocol, ranges in sorted(ranges_by_protocol.items())}
    )


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, disjoint ranges that do not touch."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if start > end:
            continue
        if merged and start <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
