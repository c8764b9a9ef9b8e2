"""What has happened at the listeners of one transport, in the same terms for each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, Protocol

import attrs

PRESENT: Final = frozenset(
    {
        "allocations",
        "reservations",
        "source_prefixes",
        "sockets",
        "drain_routes",
        "fast_path_channels",
        "processes",
    }
)
"""Statistics of a relay that are sizes and no counts: a process that ended takes them along."""

_ERROR_CODE_AT: Final = 20
_ERROR_CODE_HEAD: Final = b"\x00\x09\x00"


@attrs.define(kw_only=True)
class TransportStatistics:
    """Of a transport whose clients have connections. Everything but `allocations` and
    `connections` counts since the start.

    `packets` and `bytes` are data that was passed on, both ways, without what carried it; `dropped`
    is data for clients that read too slowly. `errors` counts error responses by STUN code,
    `refused` newcomers and `ended` connections by reason.
    """

    allocations: int = 0
    connections: int = 0
    accepted: int = 0
    handshake_failures: int = 0
    packets: int = 0
    bytes: int = 0
    dropped: int = 0
    errors: Counter[int] = attrs.field(factory=Counter)
    refused: Counter[str] = attrs.field(factory=Counter)
    ended: Counter[str] = attrs.field(factory=Counter)

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> TransportStatistics:
        """From what `attrs.asdict` made of one, and JSON of that: keys are text there."""
        made = cls()
        for name, value in told.items():
            if isinstance(value, int):
                setattr(made, name, value)
        made.errors.update({int(code): count for code, count in told["errors"].items()})
        made.refused.update(told["refused"])
        made.ended.update(told["ended"])
        return made

    def without_present(self) -> TransportStatistics:
        """What stays counted when a process has ended."""
        return attrs.evolve(self, allocations=0, connections=0)

    def add(self, other: TransportStatistics) -> None:
        """Count another listener of the same transport in."""
        for name in ("allocations", "connections", "accepted", "handshake_failures", "packets"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bytes += other.bytes
        self.dropped += other.dropped
        self.errors += other.errors
        self.refused += other.refused
        self.ended += other.ended


class Transport(Protocol):
    """Whoever serves clients that have connections: beside `relays.transports.udp`."""

    def transports(self) -> dict[str, TransportStatistics]:
        """By the name of the transport (`tcp`, `tls`, `quic`)."""


def error_code_of(message: bytes | memoryview) -> int:
    """The code of an error response that this relay made (ERROR-CODE is its first attribute); 0
    for any other message."""
    if not (message[0] & 1 and message[1] & 0x10) or len(message) < _ERROR_CODE_AT + 8:
        return 0
    if message[_ERROR_CODE_AT : _ERROR_CODE_AT + 3] != _ERROR_CODE_HEAD:
        return 0
    return (message[26] & 7) * 100 + message[27]
