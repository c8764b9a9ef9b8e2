"""A host: its addresses, sockets and clock, and what can befall it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

from runtime.net.address import Address
from simulations.net.packets import UDP, Failure, Packet
from simulations.net.stream_endpoint import Streams
from simulations.net.streams import Stream

if TYPE_CHECKING:
    from simulations.net.routing import Network
    from simulations.net.world import World

RECEIVE_BUFFER_BYTES: Final = 212_992
"""What a paused host keeps for its processes (Linux, net.core.rmem_default)."""
FIRST_EPHEMERAL_PORT: Final = 49_152
_MILLION: Final = 10**6

Receiver = Callable[[bytes, Address, Address], None]
"""(data, source, local): `local` is the own address it came to."""
Failed = Callable[[Failure], None]


class HostClock:
    """What a host takes for the time: `runtime.clock.Clock` with an offset and a drift.

    `drift_ppm`: by so many millionths the clock is fast (slow, if negative); both kinds of time
    drift. `jump` sets the wall clock only. Monotonic time never goes back.
    """

    __slots__ = ("_ahead_ns", "_at_local", "_at_world", "_drift_ppm", "_offset_ns", "_world")

    def __init__(self, world: World) -> None:
        self._world = world
        self._at_world = self._at_local = 0
        self._ahead_ns = 0  # of the world's time, while the clock does not drift
        self._drift_ppm = 0
        self._offset_ns = 0

    def monotonic_ns(self) -> int:
        if not self._drift_ppm:
            return self._world.now + self._ahead_ns
        return self.local_time(self._world.now)

    def utc_now(self) -> datetime:
        beside_ns = self.monotonic_ns() - self._world.now + self._offset_ns
        return self._world.clock.utc_now() + timedelta(microseconds=beside_ns // 1_000)

    @property
    def drift_ppm(self) -> int:
        return self._drift_ppm

    @property
    def offset_ns(self) -> int:
        return self._offset_ns

    def local_time(self, world_ns: int) -> int:
        """The host's monotonic time at an instant of the world."""
        if not self._drift_ppm:
            return world_ns + self._ahead_ns
        passed = world_ns - self._at_world
        return self._at_local + passed * (_MILLION + self._drift_ppm) // _MILLION

    def world_time(self, local_ns: int) -> int:
        """The first instant of the world at which the host's monotonic time is `local_ns`."""
        if not self._drift_ppm:
            return local_ns - self._ahead_ns
        passed = local_ns - self._at_local
        return self._at_world - (-passed * _MILLION // (_MILLION + self._drift_ppm))

    def jump(self, offset_ns: int) -> None:
        """Set the wall clock forward by so much (back, if negative)."""
        self._offset_ns += offset_ns

    def drift(self, ppm: int) -> None:
        """Run so much too fast from now on. Use `Host.drift`, which wakes the parts too."""
        if ppm <= -_MILLION:
            raise ValueError("a clock does not stand still")
        now = self._world.now
        self._at_local = self.local_time(now)
        self._at_world = now
        self._ahead_ns = self._at_local - now
        self._drift_ppm = ppm


class Host:
    """Made by `World.host`."""

    def __init__(
        self, world: World, name: str, network: Network, number: int, ipv4: str | None,
        ipv6: str | None,
    ) -> None:  # fmt: skip
        self.world = world
        self.name = name
        self.network = network
        self.number = number
        self.ipv4 = ipv4
        self.ipv6 = ipv6
        self.alive = True
        self.answers = True
        self.paused = False
        self.clock = HostClock(world)
        self.local_time, self.world_time = self.clock.local_time, self.clock.world_time
        self.on_moved: list[Callable[[Host], None]] = []
        self._receivers: dict[int, tuple[Receiver, Failed | None]] = {}
        self._streams: Streams | None = None
        self._next_port = FIRST_EPHEMERAL_PORT
        self._waiting: list[Packet] = []
        self._waiting_bytes = 0
        self._held: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    # --- datagrams ---

    def bind(self, port: int, receiver: Receiver, *, failed: Failed | None = None) -> None:
        """Take datagrams at `port` of every own address, and what ICMP says of those sent from it.
        Raises ValueError where the port is taken."""
        if port in self._receivers:
            raise ValueError(f"port {port} of {self.name} is bound")
        self._receivers[port] = (receiver, failed)

    def unbind(self, port: int) -> None:
        """Nothing happens where it is not bound."""
        self._receivers.pop(port, None)

    def ephemeral_port(self) -> int:
        """A port that nothing holds, one after the other. Raises RuntimeError if there is none."""
        for _ in range(65_536 - FIRST_EPHEMERAL_PORT):
            port = self._next_port
            self._next_port = port + 1 if port < 65_535 else FIRST_EPHEMERAL_PORT
            if port not in self._receivers and not (
                self._streams is not None and self._streams.holds(port)
            ):
                return port
        raise RuntimeError(f"{self.name} has no port left")

    def send(self, port: int, destination: Address, data: bytes) -> None:
        """A UDP datagram leaves `port`. What comes of it shows at the receivers and in taps; a host
        that is paused or dead sends nothing."""
        if not self.alive or self.paused:
            return
        own = self.ipv6 if ":" in destination.host else self.ipv4
        source = Address(own or "", port)
        self.world.transmit(Packet(UDP, self, source, destination, data), self)

    # --- streams ---

    @property
    def streams(self) -> Streams:
        if self._streams is None:
            self._streams = Streams(self)
        return self._streams

    def listen(self, port: int, accept: Callable[[Stream], None]) -> None:
        """Take streams of both protocols at `port`. `accept` is called once the handshake is done;
        it sets `stream.received` and `stream.closed`. Raises ValueError where it is taken."""
        self.streams.listen(port, accept)

    def stop_listening(self, port: int) -> None:
        """New ones are refused; accepted ones live on."""
        self.streams.stop_listening(port)

    def connect(
        self,
        destination: Address,
        *,
        protocol: Literal["udp", "tcp"] = "udp",
        opened: Callable[[], None],
        received: Callable[[bytes], None],
        closed: Callable[[int, str], None],
    ) -> Stream:
        """See `streams.py`. None of the three is called before this has returned."""
        return self.streams.connect(destination, protocol, opened, received, closed)

    # --- what can befall it ---

    @property
    def runs(self) -> bool:
        """Whether its processes act."""
        return self.alive and not self.paused

    def move(self, network: Network, *, ipv4: str | None = None, ipv6: str | None = None) -> None:
        """Roam: new addresses at once; sockets stay, streams over TCP end, those over UDP go on
        from the new address. `on_moved` observers are called in the order in which they came."""
        self.world.move_host(self, network, ipv4, ipv6)
        if self._streams is not None:
            self._streams.moved()
        for observer in list(self.on_moved):
            observer(self)

    def crash(self, *, answers: bool = True) -> None:
        """All sockets and streams are gone, with no word to their owners. With `answers` only the
        processes died and the kernel refuses what comes; otherwise the power failed: silence."""
        self.alive = False
        self.answers = answers
        self.paused = False
        self._receivers.clear()
        if self._streams is not None:
            self._streams.die()
            self._streams = None
        for packet in self._waiting:
            self.world.drop(packet, "host down", self.name)
        self._waiting.clear()
        self._waiting_bytes = 0
        self._held.clear()

    def restart(self) -> None:
        """Up again after a crash, with its addresses and without sockets."""
        self.alive = True
        self.answers = True
        self.world.touch_all_on(self)

    def pause(self) -> None:
        """Its processes stand still (SIGSTOP, a suspended laptop): nothing is sent, timers do not
        fire, and what comes waits, up to RECEIVE_BUFFER_BYTES."""
        self.paused = self.alive

    def resume(self) -> None:
        """What waited is received now, in order, and what was due meanwhile is due now."""
        if not self.paused:
            return
        self.paused = False
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        for packet in waiting:
            self.world.after(0, self.arrive, packet)
        held, self._held = self._held, []
        for act, args in held:
            self.world.after(0, act, *args)
        self.world.touch_all_on(self)

    def drift(self, ppm: int) -> None:
        """Let its clock run too fast by so many millionths from now on."""
        self.clock.drift(ppm)
        self.world.touch_all_on(self)

    # --- for the world and the streams ---

    def hold(self, act: Callable[..., object], *args: Any) -> None:
        """Do it when the host goes on."""
        self._held.append((act, args))

    def arrive(self, packet: Packet) -> None:
        """A packet is at its interface."""
        world = self.world
        if not self.alive:
            self._refuse(packet, "host down", answers=self.answers)
        elif self.paused:
            if self._waiting_bytes + packet.size > RECEIVE_BUFFER_BYTES:
                world.drop(packet, "host buffer full", self.name)
            else:
                self._waiting.append(packet)
                self._waiting_bytes += packet.size
        elif packet.segment is not None:
            if packet.corrupted:
                world.drop(packet, "corrupt", self.name)
            else:
                world.delivered(packet, self)
                self.streams.receive(packet)
        else:
            entry = self._receivers.get(packet.destination.port)
            if entry is None:
                self._refuse(packet, "no socket", answers=True)
            else:
                world.delivered(packet, self)
                entry[0](packet.data, packet.source, packet.destination)

    def fail(self, packet: Packet, failure: Failure) -> None:
        """ICMP about a packet that left here."""
        if not self.alive:
            return
        if self.paused:
            self.hold(self.fail, packet, failure)
        elif packet.segment is not None:
            self.streams.fail(packet, failure)
        else:
            entry = self._receivers.get(packet.local.port)
            if entry is not None and entry[1] is not None:
                entry[1](failure)

    def waiting(self) -> int:
        """Packets that wait for the host to go on."""
        return len(self._waiting)

    def _refuse(self, packet: Packet, why: str, *, answers: bool) -> None:
        self.world.drop(packet, why, self.name)
        if answers:
            self.world.tell(packet, "port_unreachable", by=self)

    def __repr__(self) -> str:
        return f"<host {self.name} {self.ipv4 or self.ipv6}>"
