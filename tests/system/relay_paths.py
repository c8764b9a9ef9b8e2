"""A relay on loopback that moves data one way or the other, in the time of a test.

`RealBench` is to `tests.unit.relays.bench.Caller` what `Bench` is: it delivers what a client sends,
but over sockets, and by the shell of the relay. Loopback delivers while a datagram is being sent,
so nothing here waits.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Final

import attrs

from relays.authentication import StaticCredentials
from relays.fastpath import drain as fastpath_drain
from relays.fastpath.drain import CompiledDrain
from relays.peers import PeerPolicy
from relays.server import Server
from relays.stun import is_stun
from relays.transports.udp import UdpSockets
from relays.turn import NS, read_channel_data, read_indication
from runtime.clock import SystemClock
from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from tests.unit.relays.bench import LISTENER, USERS

PATHS: Final = ("python", "compiled")
RELAY: Final = "127.0.0.1"
UNIX_S: Final = 1_800_000_000
FIRST_PORT, LAST_PORT = 61_100, 61_900

_SEGMENT: Final = struct.Struct("=H")


def drain_for(path: str, extension: ModuleType | None = None) -> CompiledDrain | None:
    """What a relay of this path has. `make setup-test` builds the extension."""
    if path == "python":
        return None
    if extension is not None:
        return CompiledDrain(extension, 7)
    found = fastpath_drain.load(SeededRandomness(7, "drain"))
    assert found is not None, "relays/fastpath/_drain.c was not built, or its version differs"
    return found


@attrs.define
class End:
    """A socket of a client or a peer."""

    socket: socket.socket

    @classmethod
    def at(cls, host: str) -> End:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        opened = socket.socket(family, socket.SOCK_DGRAM)
        opened.setblocking(False)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
        opened.bind((host, 0))
        return cls(opened)

    @property
    def address(self) -> Address:
        name = self.socket.getsockname()
        return Address(name[0], name[1])

    def send(self, data: bytes, to: tuple[str, int], segment_bytes: int = 0) -> None:
        """One datagram, or with `segment_bytes` a train."""
        note = (socket.IPPROTO_UDP, 103, _SEGMENT.pack(segment_bytes))
        self.socket.sendmsg([data], [note] if 0 < segment_bytes < len(data) else [], 0, to)

    def received(self) -> list[tuple[bytes, tuple[str, int]]]:
        """All that has come, and from where."""
        found = []
        while True:
            try:
                data, source = self.socket.recvfrom(65_535)
            except BlockingIOError:
                return found
            found.append((data, source[:2]))


class RealBench:
    """A relay and the sockets around it. `now` passes only by `advance`."""

    def __init__(self, path: str, *, seed: int = 0, extension: ModuleType | None = None) -> None:
        self.seed = seed
        self.now = 1000 * NS
        drain = drain_for(path, extension)
        self.sockets = UdpSockets(bind_hosts={1: RELAY}, clock=SystemClock(), drain=drain)
        self.server = Server(
            credentials=StaticCredentials(USERS),
            realm="holloway",
            relay_addresses={1: RELAY},
            own_addresses=frozenset({RELAY}),
            sockets=self.sockets,
            randomness=SeededRandomness(seed, "server"),
            peers=PeerPolicy.of(allowed_peer_ranges=["127.0.0.0/8"]),
            first_port=FIRST_PORT,
            last_port=LAST_PORT,
            fast_path=drain,
            now=self.now,
            unix_s=UNIX_S,
        )
        number, self.listener = self.sockets.listen(Address(RELAY, 0))
        self.server.add_listener(number)
        self.end_by_source: dict[tuple[str, int], End] = {}

    def close(self) -> None:
        self.sockets.close_all()
        for end in self.end_by_source.values():
            end.socket.close()

    def end(self, host: str) -> End:
        end = End.at(host)
        self.end_by_source[end.address] = end
        return end

    def settle(self) -> None:
        while self.sockets.turn(self.server, self.now):
            pass

    def advance(self, seconds: float, *, tell: bool = True) -> None:
        """Let time pass. Unless `tell`, the core does not hear of it before the next datagram."""
        self.now += int(seconds * NS)
        if tell:
            self.server.handle_timeout(self.now)

    def from_client(
        self, data: bytes, source: tuple[str, int], listener: int = LISTENER
    ) -> list[bytes]:
        """As `Bench.from_client`: the answers to a request."""
        end = self.end_by_source[source]
        end.send(data, self.listener)
        self.settle()
        return [answer for answer, _ in end.received() if is_stun(memoryview(answer))]

    def counts(self) -> dict[str, int]:
        """What both paths have to count alike."""
        counts = self.server.statistics() | self.sockets.statistics()
        counts.pop("drain_routes", None)
        del counts["sent_trains"]
        return counts


@contextmanager
def real_bench(path: str, seed: int = 0) -> Iterator[RealBench]:
    bench = RealBench(path, seed=seed)
    try:
        yield bench
    finally:
        bench.close()


def opened(packet: bytes) -> tuple[object, bytes]:
    """What a client got: channel number or peer, and the data."""
    view = memoryview(packet)
    unpacked = read_indication(view) if is_stun(view) else read_channel_data(view)
    assert unpacked is not None
    return unpacked[0], bytes(unpacked[1])
