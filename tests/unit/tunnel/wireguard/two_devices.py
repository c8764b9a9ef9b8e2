"""Two WireGuard devices and the wire between them, in virtual time."""

from __future__ import annotations

from collections.abc import Callable

from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from tunnel.wireguard.device import Device, Event

SECOND = 10**9
ALICE_ADDRESS = Address("192.0.2.1", 51_820)
BOB_ADDRESS = Address("192.0.2.2", 51_820)
PRESHARED = bytes(range(32))


def inner(number: int, length: int = 64) -> bytes:
    """An IPv4 packet that carries a number."""
    header = bytes([0x45, 0]) + length.to_bytes(2, "big") + number.to_bytes(4, "big")
    header += bytes([64, 17, 0, 0]) + bytes([100, 64, 0, 1]) + bytes([10, 0, 0, 1])
    return header + bytes((number + index) % 256 for index in range(length - 20))


def device(seed: int, name: str) -> Device:
    randomness = SeededRandomness(seed, name)
    return Device(randomness.bytes(32), randomness=randomness, now=0)


class Wire:
    """Alice and Bob, who know each other. `lose(datagram)` decides what does not arrive."""

    def __init__(self, seed: int = 1, *, keepalive_ns: int | None = None) -> None:
        self.now = 0
        self.alice = device(seed, "alice")
        self.bob = device(seed, "bob")
        self.alice_got: list[bytes] = []
        self.bob_got: list[bytes] = []
        self.alice_events: list[Event] = []
        self.bob_events: list[Event] = []
        self.carried: list[bytes] = []
        self.lose: Callable[[bytes], bool] = lambda datagram: False
        self.alice.add_peer(
            "bob",
            public_key=self.bob.public_key,
            preshared_key=PRESHARED,
            keepalive_ns=keepalive_ns,
            now=0,
        )
        self.bob.add_peer(
            "alice",
            public_key=self.alice.public_key,
            preshared_key=PRESHARED,
            keepalive_ns=None,
            now=0,
        )

    def settle(self) -> None:
        """Carry datagrams until there are none."""
        while True:
            moved = self._carry(self.alice, self.bob, ALICE_ADDRESS, self.bob_got)
            moved |= self._carry(self.bob, self.alice, BOB_ADDRESS, self.alice_got)
            self.alice_events += self.alice.drain_events()
            self.bob_events += self.bob.drain_events()
            if not moved:
                return

    def advance(self, seconds: float) -> None:
        """Let time pass, timer by timer."""
        end = self.now + int(seconds * SECOND)
        self.settle()
        while True:
            due = [at for at in (self.alice.poll_timeout(), self.bob.poll_timeout()) if at]
            at = min(due, default=end)
            if at >= end:
                break
            self.now = max(self.now, at)
            self.alice.handle_timeout(self.now)
            self.bob.handle_timeout(self.now)
            self.settle()
        self.now = end

    def alice_sends(self, packet: bytes) -> None:
        self.alice.send("bob", packet, self.now)
        self.settle()

    def bob_sends(self, packet: bytes) -> None:
        self.bob.send("alice", packet, self.now)
        self.settle()

    def kinds(self) -> list[int]:
        """The types of the messages carried so far (1 initiation, 2 response, 3 cookie, 4 data)."""
        return [datagram[0] for datagram in self.carried]

    def _carry(self, origin: Device, target: Device, source: Address, got: list[bytes]) -> bool:
        datagrams = origin.drain_datagrams()
        for _, datagram in datagrams:
            if self.lose(datagram):
                continue
            self.carried.append(datagram)
            answer = target.receive(datagram, source, self.now)
            if answer is not None:
                got += answer[1]
        return bool(datagrams)
