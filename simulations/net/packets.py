"""What travels, what a tap sees of it, and what the sender is told when it does not arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from runtime.net.address import Address

if TYPE_CHECKING:
    from simulations.net.host import Host

UDP: Final = 17
TCP: Final = 6
PROTOCOL_NAMES: Final = {UDP: "udp", TCP: "tcp"}
OVERHEAD4: Final = 28
"""Bytes of the IPv4 and UDP headers (RFC 791, RFC 768)."""
OVERHEAD6: Final = 48

What = Literal["sent", "translated", "copied", "dropped", "delivered"]
FailureKind = Literal["too_big", "port_unreachable", "prohibited"]


class Packet:
    """An IPv4 or IPv6 packet: a UDP datagram (`segment` None), or one of a stream.

    `source` and `destination` change where it is translated. `origin`, `local` and `wanted` (who
    sent it, from which address, where to) stay, and so does `number`, that of the sending.
    """

    __slots__ = (
        "corrupted",
        "data",
        "destination",
        "local",
        "number",
        "origin",
        "protocol",
        "segment",
        "sent_at",
        "size",
        "source",
        "v6",
        "wanted",
    )

    def __init__(
        self,
        protocol: int,
        origin: Host,
        source: Address,
        destination: Address,
        data: bytes,
        segment: tuple[Any, ...] | None = None,
    ) -> None:
        v6 = ":" in destination.host
        self.protocol = protocol
        self.origin = origin
        self.source = self.local = source
        self.destination = self.wanted = destination
        self.data = data
        self.segment = segment
        self.v6 = v6
        self.size = len(data) + (OVERHEAD6 if v6 else OVERHEAD4)
        self.sent_at = 0
        self.number = 0
        self.corrupted = False

    def copy(self) -> Packet:
        """Another one like it."""
        twin = Packet.__new__(Packet)
        for name in Packet.__slots__:
            setattr(twin, name, getattr(self, name))
        return twin

    def __repr__(self) -> str:
        name = PROTOCOL_NAMES[self.protocol]
        return f"<{name} {self.number} {self.source} to {self.destination}, {self.size} bytes>"


class Failure(NamedTuple):
    """What a sender is told by ICMP (RFC 792, RFC 1191, RFC 4443): the destination as it was sent
    to, and for "too_big" the MTU (bytes) of the link where it was dropped."""

    kind: FailureKind
    destination: Address
    mtu: int = 0


class Sighting(NamedTuple):
    """What a tap sees: a datagram or a packet of a stream at one place of its way.

    `where` is the name of the host, network or link; `why` the reason of "dropped" (one of
    `DROPS`); `source` and `destination` as they stand there after it. The sightings of one sending
    share `number`; a duplicate is "copied" first.
    """

    now: int
    what: What
    where: str
    why: str
    number: int
    origin: str
    protocol: str
    stream: bool
    source: Address
    destination: Address
    size: int
    data: bytes

    @classmethod
    def of(cls, now: int, what: What, where: str, why: str, packet: Packet) -> Sighting:
        return cls(
            now, what, where, why, packet.number, packet.origin.name,
            PROTOCOL_NAMES[packet.protocol], packet.segment is not None, packet.source,
            packet.destination, packet.size, packet.data,
        )  # fmt: skip


Tap = Callable[[Sighting], None]

DROPS: Final = (
    "no route",
    "no address",
    "no socket",
    "host down",
    "host buffer full",
    "loss",
    "queue full",
    "too big",
    "partition",
    "nat filter",
    "nat no mapping",
    "nat no port",
    "nat table full",
    "nat no hairpinning",
    "firewall",
    "firewall table full",
    "corrupt",
)
"""Every reason for which a packet is dropped."""
