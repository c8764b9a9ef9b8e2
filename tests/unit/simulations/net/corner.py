"""A corner of a world for tests: sockets that keep what comes, and taps that keep what was seen."""

from __future__ import annotations

from runtime.net.address import Address
from simulations.net.host import Host
from simulations.net.packets import Failure, Sighting
from simulations.net.streams import Stream
from simulations.net.world import World

MS = 10**6
NS = 10**9
PORT = 3_478


class Socket:
    """A bound port of a host: `got` is (instant, data, source), `failures` what ICMP said."""

    def __init__(self, host: Host, port: int) -> None:
        self.host = host
        self.port = port
        self.got: list[tuple[int, bytes, Address]] = []
        self.failures: list[Failure] = []
        self.bind()

    def bind(self) -> None:
        self.host.bind(self.port, self._received, failed=self.failures.append)

    def send(self, to: Address, data: bytes = b"data") -> None:
        self.host.send(self.port, to, data)

    @property
    def data(self) -> list[bytes]:
        return [data for _, data, _ in self.got]

    @property
    def sources(self) -> list[Address]:
        return [source for _, _, source in self.got]

    @property
    def instants(self) -> list[int]:
        return [at for at, _, _ in self.got]

    def _received(self, data: bytes, source: Address, local: Address) -> None:
        assert local.port == self.port
        assert local.host in (self.host.ipv4, self.host.ipv6)
        self.got.append((self.host.world.now, data, source))


class Client:
    """The connecting side of a stream, and what befell it."""

    def __init__(self, host: Host, to: Address, protocol: str = "udp") -> None:
        self.opened_at: list[int] = []
        self.data = b""
        self.closed: list[tuple[int, str]] = []
        self.stream = host.connect(
            to,
            protocol="tcp" if protocol == "tcp" else "udp",
            opened=self._opened,
            received=self._received,
            closed=self._closed,
        )

    def _opened(self) -> None:
        self.opened_at.append(self.stream.host.world.now)

    def _received(self, data: bytes) -> None:
        assert data
        self.data += data

    def _closed(self, code: int, reason: str) -> None:
        self.closed.append((code, reason))


class Server:
    """A host that listens, keeps what comes and, with `echoes`, sends it back."""

    def __init__(self, host: Host, port: int = 443, *, echoes: bool = False) -> None:
        self.address = Address(host.ipv4 or host.ipv6 or "", port)
        self.echoes = echoes
        self.streams: list[Stream] = []
        self.data: list[bytes] = []
        self.closed: list[tuple[int, int, str]] = []
        self.moved: list[Address] = []
        host.listen(port, self._accept)

    def _accept(self, stream: Stream) -> None:
        number = len(self.streams)
        self.streams.append(stream)
        self.data.append(b"")

        def received(data: bytes) -> None:
            self.data[number] += data
            if self.echoes:
                assert stream.send(data)

        stream.received = received
        stream.closed = lambda code, reason: self.closed.append((number, code, reason))
        stream.moved = self.moved.append


def at(host: Host, port: int = PORT) -> Address:
    """A port of a host, by its IPv4 address (or IPv6, if it has no other)."""
    return Address(host.ipv4 or host.ipv6 or "", port)


def at6(host: Host, port: int = PORT) -> Address:
    return Address(host.ipv6 or "", port)


def watched(world: World) -> list[Sighting]:
    """All that a tap sees from now on."""
    seen: list[Sighting] = []
    world.watch(seen.append)
    return seen


def drops(world: World) -> dict[str, int]:
    return dict(world.dropped)
