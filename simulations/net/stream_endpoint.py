"""The streams of one host: who listens, which packet belongs to which stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from runtime.net.address import Address
from simulations.net.packets import TCP, UDP, Failure, Packet
from simulations.net.streams import (
    CLOSE,
    GONE,
    KEEP,
    LINGER_NS,
    NO_ADDRESS,
    OVERHEAD_BYTES,
    PORT_CLOSED,
    PROHIBITED,
    RESET,
    Protocol,
    Stream,
)

if TYPE_CHECKING:
    from simulations.net.host import Host

_NAMES: Final[dict[int, Protocol]] = {UDP: "udp", TCP: "tcp"}


class Streams:
    """The streams of one host, by number. A host may hold both sides of one."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._listeners: dict[int, Callable[[Stream], None]] = {}
        self._streams: dict[tuple[int, bool], Stream] = {}  # (number, is the client's)
        self._ports: dict[int, int] = {}  # how many streams have connected from it
        self._lingering: dict[tuple[int, bool], tuple[int, str]] = {}

    def listen(self, port: int, accept: Callable[[Stream], None]) -> None:
        if port in self._listeners:
            raise ValueError(f"port {port} of {self.host.name} is taken")
        self._listeners[port] = accept

    def stop_listening(self, port: int) -> None:
        self._listeners.pop(port, None)

    def connect(
        self,
        destination: Address,
        protocol: Protocol,
        opened: Callable[[], None],
        received: Callable[[bytes], None],
        closed: Callable[[int, str], None],
    ) -> Stream:
        port = self.host.ephemeral_port()
        number = self.host.world.next_stream()
        stream = Stream(self, number, protocol, port, destination, client=True)
        stream.opened, stream.received, stream.closed = opened, received, closed
        self._streams[(number, True)] = stream
        self._ports[port] = number
        if not stream.local.host or not self.host.runs:
            self.host.world.after(0, stream.fail, NO_ADDRESS)
        else:
            stream.begin()
        return stream

    def holds(self, port: int) -> bool:
        return port in self._ports or port in self._listeners

    def receive(self, packet: Packet) -> None:
        """A packet of a stream came to this host."""
        assert packet.segment is not None
        number, from_client, is_hello, kind = packet.segment[:4]
        key = (number, not from_client)
        stream = self._streams.get(key)
        if stream is not None:
            stream.receive(packet)
            return
        if kind in (GONE, CLOSE):
            return
        accept = self._listeners.get(packet.destination.port)
        if (last_word := self._lingering.get(key)) is not None:
            self._answer(packet, CLOSE, *last_word)
        elif accept is None and (is_hello or (from_client and packet.protocol == UDP)):
            self.refuse(packet, PORT_CLOSED)
        elif accept is None or not is_hello:
            if kind != KEEP:
                self.refuse(packet, RESET)
        else:
            protocol = _NAMES[packet.protocol]
            port = packet.destination.port
            stream = Stream(self, number, protocol, port, packet.source, client=False)
            self._streams[key] = stream
            stream.accept_with(accept)
            stream.receive(packet)

    def refuse(self, packet: Packet, code: int) -> None:
        self._answer(packet, GONE, code)

    def _answer(self, packet: Packet, kind: str, *rest: object) -> None:
        assert packet.segment is not None
        number, from_client = packet.segment[:2]
        segment = (number, not from_client, False, kind, *rest)
        self.transmit(packet.protocol, packet.destination.port, packet.source, segment, b"")

    def transmit(
        self,
        protocol: int,
        port: int,
        to: Address,
        segment: tuple[Any, ...],
        data: bytes,
    ) -> None:
        host = self.host
        if not host.runs:
            return
        own = host.ipv6 if ":" in to.host else host.ipv4
        packet = Packet(protocol, host, Address(own or "", port), to, data, segment)
        packet.size += OVERHEAD_BYTES
        host.world.transmit(packet, host)

    def fail(self, packet: Packet, failure: Failure) -> None:
        """ICMP about a packet of a stream."""
        assert packet.segment is not None
        stream = self._streams.get((packet.segment[0], packet.segment[1]))
        if stream is None or failure.destination != stream.remote:
            return
        if failure.kind == "port_unreachable":
            stream.fail(PORT_CLOSED)
        elif failure.kind == "prohibited" and stream.state == "opening":
            stream.fail(PROHIBITED)

    def moved(self) -> None:
        for stream in list(self._streams.values()):
            stream.address_changed()

    def linger(self, stream: Stream, code: int, reason: str) -> None:
        """Forget it, but know its last word for a while."""
        self.forget(stream)
        key = (stream.number, stream.client)
        self._lingering[key] = (code, reason)
        self.host.world.after(LINGER_NS, self._lingering.pop, key, None)

    def forget(self, stream: Stream) -> None:
        self._streams.pop((stream.number, stream.client), None)
        if stream.client:
            self._ports.pop(stream.port, None)

    def die(self) -> None:
        for stream in self._streams.values():
            stream.vanish()
        self._streams.clear()
        self._listeners.clear()
        self._lingering.clear()

    def statistics(self) -> dict[str, int]:
        return {"streams": len(self._streams), "listeners": len(self._listeners)}
