"""The ways to a relay: over UDP from sockets of either family, and by a link."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal
from uuid import UUID

import attrs

from channel.messages import RelayServer
from relays.client import TurnClient
from runtime.net.address import Address
from runtime.randomness import Randomness
from tunnel.ice.candidates import MAX_LOCAL_PREFERENCE, Base, priority_of

MAX_LINK_PREFERENCE: Final = 1_000
"""Below all that go over UDP, so that traffic moves there when it works."""

Family = Literal["ipv4", "ipv6"]
Way = Literal["ipv4", "ipv6", "link"]


@attrs.define(kw_only=True, eq=False)
class RelayWay:
    """One relay over UDP in one address family, or by a link, and the allocation on it. One that
    is left is given back at `leave_at`, and the link of one that `ails` is silent."""

    server: Address
    way: Way
    family: Family
    link: int | None = None
    username: str
    password: str = attrs.field(repr=False)
    base_priority: int
    client: TurnClient | None = None
    base: Base | None = None
    socket: Address | None = None
    refused_hosts: dict[str, None] = attrs.field(factory=dict)
    failures: int = 0
    retry_at: int | None = None
    leave_at: int | None = None
    ails: bool = False

    def begin(self, randomness: Randomness, now: int) -> None:
        """Ask for an allocation."""
        self.client = TurnClient(
            server=self.server,
            username=self.username,
            password=self.password,
            family=self.family,
            randomness=randomness,
            now=now,
            reliable=self.way == "link",
        )


def ways_to(server: RelayServer, used: int) -> Iterator[tuple[tuple[UUID, Way], RelayWay]]:
    """The ways to one relay: over UDP for each family, and a link. `used`: priorities that are
    taken."""
    families: dict[Family, Address] = {}
    for place in server.addresses:
        family: Family = "ipv6" if ":" in place.address else "ipv4"
        if place.transport == "udp":
            families.setdefault(family, Address(str(place.address), place.port))
    ways: list[tuple[Way, Family, Address]] = [
        (family, family, address) for family, address in families.items()
    ]
    others = [place for place in server.addresses if place.transport != "udp"]
    if others:
        has_ipv4 = any(":" not in place.address for place in server.addresses)
        door = Address(str(others[0].address), others[0].port)
        ways.append(("link", "ipv4" if has_ipv4 else "ipv6", door))
    for number, (way, family, address) in enumerate(ways, used):
        best = MAX_LINK_PREFERENCE if way == "link" else MAX_LOCAL_PREFERENCE
        yield (
            (server.id, way),
            RelayWay(
                server=address,
                way=way,
                family=family,
                username=server.username,
                password=server.password,
                base_priority=priority_of("relay", best - 2 * number),
            ),
        )
