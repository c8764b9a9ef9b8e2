"""STUN servers behind a NAT that behaves as it is told, for tests of netcheck: what RFC 4787 says,
and no network."""

from __future__ import annotations

import random
from collections.abc import Callable

import attrs

from clients.netcheck.core import SOCKETS, Endpoint, Netcheck
from clients.netcheck.findings import FamilyFinding
from relays.stun import (
    Attribute,
    MessageClass,
    Method,
    StunMessage,
    address_value,
    xor_address_value,
)
from runtime.net.address import Address
from runtime.randomness import SeededRandomness

INSIDE = "192.168.1.10"
PUBLIC = "198.51.100.2"
A, B = "203.0.113.2", "203.0.113.6"
MS = 10**6
LOCALS = {number: Address(INSIDE, 40_000 + 977 * number) for number in range(SOCKETS)}


@attrs.define
class ModelNat:
    """Public ports by what the mapping depends on; an inbound packet is judged by the filtering."""

    mapping: str = "endpoint_independent"
    filtering: str = "address_and_port_dependent"
    ports: str = "preserve"
    hairpinning: str = "none"
    chance: random.Random = attrs.Factory(lambda: random.Random(1))
    next_port: int = 20_000
    port_by_flow: dict[object, int] = attrs.Factory(dict)
    inside_by_port: dict[int, Address] = attrs.Factory(dict)
    sent_to: dict[int, set[Address]] = attrs.Factory(dict)

    def out(self, inside: Address, to: Address) -> Address:
        depends: dict[str, object] = {
            "endpoint_independent": (),
            "address_dependent": to.host,
            "address_and_port_dependent": to,
        }
        flow = (inside, depends[self.mapping])
        if flow not in self.port_by_flow:
            self.port_by_flow[flow] = port = self._new_port(inside)
            self.inside_by_port[port] = inside
        port = self.port_by_flow[flow]
        self.sent_to.setdefault(port, set()).add(to)
        return Address(PUBLIC, port)

    def back(self, source: Address, port: int) -> Address | None:
        """Whose packet it is that comes to a public port, None if nobody's."""
        inside = self.inside_by_port.get(port)
        known = self.sent_to.get(port, set())
        lets_in = {
            "endpoint_independent": True,
            "address_dependent": source.host in {each.host for each in known},
            "address_and_port_dependent": source in known,
        }
        return inside if lets_in[self.filtering] else None

    def _new_port(self, inside: Address) -> int:
        if self.ports == "preserve" and inside.port not in self.inside_by_port:
            return inside.port
        if self.ports == "random" or self.ports == "preserve":
            return self.chance.randrange(1_024, 65_536)
        self.next_port += 1 if self.ports == "sequential" else self.chance.randrange(17, 60)
        return self.next_port


@attrs.define
class Outside:
    """Everything that is not this machine. `dead` servers never answer, `echoes` send back what
    they get. `other` maps a server to its OTHER-ADDRESS; one of `poor` changes the port alone.
    `twist` changes what a server sends. `loss` is a share of packets; the first `loses_first` are
    lost."""

    nat: ModelNat | None
    dead: frozenset[Address] = frozenset()
    echoes: frozenset[Address] = frozenset()
    poor: frozenset[Address] = frozenset()
    loss: float = 0.0
    loses_first: int = 0
    other: dict[Address, Address] = attrs.Factory(dict)
    twist: Callable[[Address, bytes], bytes] = lambda _, data: data
    chance: random.Random = attrs.Factory(lambda: random.Random(2))
    destinations: list[Address] = attrs.Factory(list)

    def carry(
        self, inside: Address, data: bytes, to: Address
    ) -> tuple[Address, bytes, Address] | None:
        """What comes back: to which own socket, what, from where."""
        self.destinations.append(to)
        source = self.nat.out(inside, to) if self.nat else inside
        if self.chance.random() < self.loss or len(self.destinations) <= self.loses_first:
            return None
        if self.nat and to.host == PUBLIC:
            return self._hairpin(inside, source, data, to)
        if to in self.dead:
            return None
        if to in self.echoes:
            return inside, data, to
        answer, sender = self._serve(data, source, to)
        target = self.nat.back(sender, source.port) if self.nat else inside
        return None if target is None else (target, self.twist(to, answer), sender)

    def _hairpin(
        self, inside: Address, source: Address, data: bytes, to: Address
    ) -> tuple[Address, bytes, Address] | None:
        assert self.nat is not None
        if self.nat.hairpinning == "none":
            return None
        target = self.nat.back(source, to.port)
        shown = inside if self.nat.hairpinning == "internal_source" else source
        return None if target is None else (target, data, shown)

    def _serve(self, data: bytes, source: Address, to: Address) -> tuple[bytes, Address]:
        request = StunMessage.decode(data)
        attributes: list[tuple[int, bytes]] = [
            (Attribute.XOR_MAPPED_ADDRESS, xor_address_value(source, request.transaction_id))
        ]
        sender = to
        if other := self.other.get(to):
            attributes.append((Attribute.OTHER_ADDRESS, address_value(other)))
            change = request.integer(Attribute.CHANGE_REQUEST, 4) or 0
            sender = Address(
                other.host if change & 4 and to not in self.poor else to.host,
                other.port if change & 2 else to.port,
            )
        answer = StunMessage(
            method=Method.BINDING,
            message_class=MessageClass.SUCCESS,
            transaction_id=request.transaction_id,
            attributes=tuple(attributes),
        )
        return answer.encode(fingerprint=True), sender


def netcheck(outside: Outside, *servers: Address, seed: int = 1) -> tuple[Netcheck, FamilyFinding]:
    """Carry a whole check out, with a round trip of 20 ms."""
    core = Netcheck(
        [Endpoint(str(each), each) for each in servers],
        LOCALS,
        randomness=SeededRandomness(seed, "netcheck"),
        now=0,
    )
    number_of = {address: number for number, address in LOCALS.items()}
    arriving: list[tuple[int, int, bytes, Address]] = []
    now = 0
    while True:
        for socket, data, to in core.transmits:
            if back := outside.carry(LOCALS[socket], data, to):
                arriving.append((now + 20 * MS, number_of[back[0]], back[1], back[2]))
        core.transmits.clear()
        arriving.sort(key=lambda each: each[0])
        due = core.poll_timeout()
        if due is None:
            return core, core.finding()
        if arriving and arriving[0][0] <= due:
            now, socket, data, source = arriving.pop(0)
            core.receive(socket, data, source, now)
        else:
            now = due
            core.handle_timeout(now)
