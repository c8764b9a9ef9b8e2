"""Hole punching tried out on small NATs, packet by packet, in every order: the oracle's judge.

Nothing is concluded here. NATs are tables, agents send and answer, and whether a path came to be is
looked up at the end. The first events happen in every order that there is; what follows is a fair
turn after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Literal

import attrs

from simulations.oracle import Behaviour, Nat

Endpoint = tuple[str, int]
SERVER: Endpoint = ("server", 3478)
FREE_EVENTS = 5
ROUNDS = 6


def part(address: Endpoint, behaviour: Behaviour) -> object:
    """What of an address such a NAT looks at."""
    return {
        "endpoint_independent": None,
        "address_dependent": address[0],
        "address_and_port_dependent": address,
    }[behaviour]


class Box:
    """One NAT that works."""

    def __init__(self, ip: str, nat: Nat) -> None:
        self.ip = ip
        self.nat = nat
        self._ports = count(1)
        self._mappings: dict[tuple[Endpoint, object], int] = {}
        self._flows: dict[tuple[Endpoint, Endpoint], int] = {}
        self._owners: dict[int, Endpoint] = {}
        self._sent: dict[tuple[int, Endpoint], None] = {}
        self._own: set[tuple[int, Endpoint]] = set()

    def out(self, source: Endpoint, destination: Endpoint) -> Endpoint:
        port = self._flows.get((source, destination))
        if port is None:
            key = (source, part(destination, self.nat.mapping))
            port = self._mappings.get(key)
            if port is None:
                port = self._mappings[key] = self._new_port(source)
            if (port, destination) in self._own:
                port = self._flows[source, destination] = self._new_port(source)
        self._sent[port, destination] = None
        return self.ip, port

    def into(self, source: Endpoint, port: int) -> Endpoint | None:
        inside = self._owners.get(port)
        if inside is None or (port, source) in self._own or not self._lets_in(source, port):
            if self.nat.inbound_binding:
                self._own.add((port, source))
            return None
        if self.nat.reply_binding:
            self._flows[inside, source] = port
        return inside

    def _lets_in(self, source: Endpoint, port: int) -> bool:
        if self.nat.filtering == "endpoint_independent":
            return True
        return any(
            part(peer, self.nat.filtering) == part(source, self.nat.filtering)
            for through, peer in self._sent
            if through == port
            or (self.nat.filters_per == "endpoint" and self._owners[through] == self._owners[port])
        )

    def _new_port(self, inside: Endpoint) -> int:
        port = next(self._ports)
        self._owners[port] = inside
        return port


@attrs.define
class Agent:
    """One socket behind its NATs: what it knows of the other, and which checks were answered."""

    name: str
    boxes: list[Box]
    known: list[Endpoint] = attrs.field(factory=list)
    answered: set[Endpoint] = attrs.field(factory=set)

    def out(self, destination: Endpoint) -> Endpoint:
        source: Endpoint = (self.name, 1)
        for box in self.boxes:
            source = box.out(source, destination)
        return source

    def lets_in(self, source: Endpoint, destination: Endpoint) -> bool:
        """Whether what was sent to a public address of this side arrives at the agent."""
        for box in reversed(self.boxes):
            if destination[0] != box.ip:
                return False
            inside = box.into(source, destination[1])
            if inside is None:
                return False
            destination = inside
        return destination == (self.name, 1)


@attrs.frozen
class Packet:
    kind: Literal["check", "answer"]
    source: Endpoint
    destination: Endpoint
    checked: Endpoint


class Punch:
    """Two agents who learnt their reflexive addresses from a server, and told each other."""

    def __init__(self, one: Sequence[Nat], other: Sequence[Nat]) -> None:
        self.agents = [
            Agent(name, [Box(f"{name}{n}", nat) for n, nat in enumerate(nats)])
            for name, nats in (("a", one), ("b", other))
        ]
        reflexive = [agent.out(SERVER) for agent in self.agents]
        for agent, address in zip(self.agents, reversed(reflexive), strict=True):
            agent.known.append(address)
        self.under_way: tuple[deque[Packet], deque[Packet]] = (deque(), deque())

    @property
    def met(self) -> bool:
        return all(agent.answered for agent in self.agents)

    def check(self, number: int, remote: Endpoint) -> None:
        source = self.agents[number].out(remote)
        self.under_way[number].append(Packet("check", source, remote, remote))

    def deliver(self, number: int) -> None:
        """The oldest packet of this agent that is under way arrives, or is dropped."""
        packet = self.under_way[number].popleft()
        receiver = self.agents[1 - number]
        if not receiver.lets_in(packet.source, packet.destination):
            return
        if packet.kind == "answer":
            if packet.source == packet.checked:
                receiver.answered.add(packet.checked)
            return
        if packet.source not in receiver.known:
            receiver.known.append(packet.source)
        source = receiver.out(packet.source)
        self.under_way[1 - number].append(Packet("answer", source, packet.source, packet.checked))

    def choices(self) -> list[tuple[Literal["check", "deliver"], int]]:
        """What may happen next. A check goes to the address that was heard of last."""
        sent = [("check", number) for number in (0, 1)]
        arrive = [("deliver", number) for number in (0, 1) if self.under_way[number]]
        return [*sent, *arrive]  # type: ignore[list-item]

    def happen(self, what: Literal["check", "deliver"], number: int) -> None:
        if what == "check":
            self.check(number, self.agents[number].known[-1])
        else:
            self.deliver(number)

    def settle(self) -> bool:
        """Turn by turn each checks all that it knows: whether both get an answer."""
        for _ in range(ROUNDS):
            for number, agent in enumerate(self.agents):
                for remote in list(agent.known):
                    self.check(number, remote)
                    while self.under_way[0] or self.under_way[1]:
                        self.deliver(0 if self.under_way[0] else 1)
                    if self.met:
                        return True
        return False


def outcomes(
    one: Sequence[Nat], other: Sequence[Nat], free_events: int = FREE_EVENTS
) -> Iterator[bool]:
    """Whether the two meet, in every order of the first events."""
    orders: list[tuple[int, ...]] = [()]
    while orders:
        order = orders.pop()
        punch = Punch(one, other)
        for choice in order:
            punch.happen(*punch.choices()[choice])
        if len(order) == free_events:
            yield punch.met or punch.settle()
        else:
            orders += [(*order, choice) for choice in range(len(punch.choices()))]
