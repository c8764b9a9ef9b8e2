"""A world in virtual time: machines, NATs, and datagrams on an event heap.

The same cores and actors that run on real machines run here, driven by one loop: take the next
event, or the next deadline of a part; let it act; let every part put out what it has. All times
are integer nanoseconds, all randomness comes from the world's seed by name, so a run is the same
in every process. The trace is a hash over what travelled: the instant, the ends and the size of
every datagram, and every frame of the control channel.

Contents of datagrams are left out of the trace, since one secret comes from outside of the seed:
ML-KEM encapsulation draws from the operating system (the library offers no seam).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from heapq import heappop, heappush
from ipaddress import ip_network
from typing import Protocol

import attrs

from runtime.clock import VirtualClock
from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from simulations.nat import Nat, NatBehaviour

LATENCY_NS = 10 * 10**6
LAN_LATENCY_NS = 10**6
MAX_STEPS = 2_000_000

Receiver = Callable[[bytes, Address], None]


class Part(Protocol):
    """Something that acts in the world: an agent with its engine, a relay, the control plane."""

    def poll_timeout(self) -> int | None:
        """When (world time, ns) `handle_timeout` is due."""

    def handle_timeout(self, now: int) -> None: ...

    def flush(self, now: int) -> None:
        """Put out what the core has: datagrams, frames, packets."""


@attrs.define(eq=False)
class Machine:
    """A host. `lan` is its subnet when it stands behind a NAT; `sockets` are its UDP ports."""

    name: str
    ip: str
    nat: Nat | None = None
    lan: str | None = None
    alive: bool = True
    sockets: dict[int, Receiver] = attrs.field(factory=dict)

    @property
    def public_ip(self) -> str:
        """The address by which the rest of the world sees it."""
        return self.ip if self.nat is None else self.nat.public_ip


class World:
    """See the head of this file."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.clock = VirtualClock()
        self.parts: list[Part] = []
        self.machines: dict[str, Machine] = {}
        self.nats: dict[str, Nat] = {}
        self.datagrams = 0
        self.dropped = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._serial = 0
        self._trace = hashlib.sha256()

    # --- building ---

    def randomness(self, name: str) -> SeededRandomness:
        """The stream of that name: adding one for somebody else disturbs none."""
        return SeededRandomness(self.seed, name)

    def nat(self, public_ip: str, behaviour: NatBehaviour) -> Nat:
        self.nats[public_ip] = Nat(
            public_ip, behaviour, randomness=self.randomness(f"nat {public_ip}")
        )
        return self.nats[public_ip]

    def machine(self, name: str, ip: str, *, nat: Nat | None = None) -> Machine:
        """A machine with a public address, or one behind a NAT on the /24 of its address."""
        lan = None if nat is None else str(ip_network(f"{ip}/24", strict=False))
        self.machines[ip] = Machine(name, ip, nat, lan)
        return self.machines[ip]

    # --- time ---

    @property
    def now(self) -> int:
        return self.clock.monotonic_ns()

    @property
    def trace(self) -> str:
        """The hash (hex) of all that happened so far."""
        return self._trace.hexdigest()

    def after(self, delay_ns: int, act: Callable[[], None]) -> None:
        """Do something later; what is due at the same instant happens in the order of asking."""
        self._serial += 1
        heappush(self._heap, (self.now + delay_ns, self._serial, act))

    def note(self, *what: object) -> None:
        """Add to the trace."""
        self._trace.update(repr((self.now, *what)).encode())

    def run_until(self, holds: Callable[[], object], *, limit_ns: int = 60 * 10**9) -> bool:
        """Let time pass until the condition holds; False if it does not within the limit."""
        end = self.now + limit_ns
        for _ in range(MAX_STEPS):
            self._settle()
            if holds():
                return True
            due = self._next_instant()
            if due is None or due > end:
                self.clock.advance_to(end)
                return bool(holds())
            self.clock.advance_to(max(due, self.now))
            self._act()
        raise RuntimeError(f"the world does not come to rest at {self.now} ns")

    def run_for(self, duration_ns: int) -> None:
        self.run_until(lambda: False, limit_ns=duration_ns)

    # --- datagrams ---

    def send(self, machine: Machine, port: int, destination: Address, data: bytes) -> None:
        """A UDP datagram leaves `port` of a machine."""
        if not machine.alive:
            return
        source = Address(machine.ip, port)
        self.datagrams += 1
        self.note("udp", source, destination, len(data))
        target = self.machines.get(destination.host)
        if machine.nat is not None and target is not None and target.nat is machine.nat:
            self.after(LAN_LATENCY_NS, lambda: self._deliver(target, source, destination, data))
            return
        if machine.nat is not None:
            source = machine.nat.outbound(source, destination, self.now)
        self.after(LATENCY_NS, lambda: self._arrive(source, destination, data))

    def _arrive(self, source: Address, destination: Address, data: bytes) -> None:
        if (nat := self.nats.get(destination.host)) is not None:
            inside = nat.inbound(source, destination.port, self.now)
            if inside is not None:
                self._deliver(self.machines[inside.host], source, inside, data)
                return
        target = self.machines.get(destination.host)
        if target is None or target.nat is not None:
            self.dropped += 1
            return
        self._deliver(target, source, destination, data)

    def _deliver(self, target: Machine, source: Address, to: Address, data: bytes) -> None:
        receiver = target.sockets.get(to.port)
        if receiver is None or not target.alive:
            self.dropped += 1
            return
        receiver(data, source)

    # --- the loop ---

    def _settle(self) -> None:
        for part in self.parts:
            part.flush(self.now)

    def _next_instant(self) -> int | None:
        instants = [part.poll_timeout() for part in self.parts]
        if self._heap:
            instants.append(self._heap[0][0])
        return min((each for each in instants if each is not None), default=None)

    def _act(self) -> None:
        while self._heap and self._heap[0][0] <= self.now:
            heappop(self._heap)[2]()
        for part in self.parts:
            due = part.poll_timeout()
            if due is not None and due <= self.now:
                part.handle_timeout(self.now)
