"""Plain UDP sockets in namespaces, by which a NAT shows what it does, as RFC 5780 asks it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence

import attrs

from simulations.kernel.lab import Host
from simulations.kernel.nats import Behaviour

Endpoint = tuple[str, int]
SERVERS = ("203.0.113.2", "203.0.113.3")
PORTS = (3478, 3479)
SO_RCVBUFFORCE = 33
FAR = 2.0
"""Seconds after which what has to come did not."""


@contextlib.contextmanager
def udp_socket(host: Host, address: Endpoint) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with host.entered():
        made = socket.socket(family, socket.SOCK_DGRAM)
    with made:
        made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
        made.bind(address)
        made.settimeout(FAR)
        yield made


def seen_from(receiver: socket.socket) -> Endpoint:
    """Where the next datagram comes from."""
    address = receiver.recvfrom(2_000)[1]
    return address[0], address[1]


def nothing_but(receiver: socket.socket, last: bytes) -> list[bytes]:
    """What arrives before the datagram `last`, which was sent after all that must not come."""
    found: list[bytes] = []
    while True:
        data = receiver.recv(2_000)
        if data == last:
            return found
        found.append(data)


@attrs.define
class Prober:
    """Four server sockets (two addresses with two ports each), and sockets inside."""

    server: Host
    inside: Host
    inside_ip: str
    sockets: dict[Endpoint, socket.socket] = attrs.field(factory=dict)
    _next_port: int = 41_000

    @contextlib.contextmanager
    def open(self) -> Iterator[Prober]:
        with contextlib.ExitStack() as stack:
            for ip in SERVERS:
                for port in PORTS:
                    self.sockets[ip, port] = stack.enter_context(
                        udp_socket(self.server, (ip, port))
                    )
            yield self

    @contextlib.contextmanager
    def fresh(self) -> Iterator[socket.socket]:
        """A socket inside with a port that was not used before."""
        self._next_port += 1
        with udp_socket(self.inside, (self.inside_ip, self._next_port)) as made:
            yield made

    def mapped(self, inside: socket.socket, server: Endpoint) -> Endpoint:
        """What a server sees of a socket inside."""
        inside.sendto(b"who am I?", server)
        return seen_from(self.sockets[server])

    def mapping(self) -> Behaviour:
        """RFC 5780, section 4.3."""
        with self.fresh() as inside:
            first, other_port, other_ip, both = (
                self.mapped(inside, (ip, port)) for ip in SERVERS for port in PORTS
            )
        if len({first, other_port, other_ip, both}) == 1:
            return "endpoint_independent"
        if first == other_port and other_ip == both:
            return "address_dependent"
        assert len({first, other_port, other_ip, both}) == 4
        return "address_and_port_dependent"

    def filtering(self) -> Behaviour:
        """RFC 5780, section 4.4."""
        known = (SERVERS[0], PORTS[0])
        with self.fresh() as inside:
            mapped = self.mapped(inside, known)
            got = self.arriving(
                inside, mapped, [(SERVERS[1], PORTS[1]), (SERVERS[0], PORTS[1])], known
            )
        match got:
            case [True, True]:
                return "endpoint_independent"
            case [False, True]:
                return "address_dependent"
        assert got == [False, False]
        return "address_and_port_dependent"

    def arriving(
        self,
        inside: socket.socket,
        mapped: Endpoint,
        strangers: Sequence[Endpoint],
        known: Endpoint,
    ) -> list[bool]:
        """Which servers' datagrams to `mapped` arrive; the last one, of `known`, has to."""
        for number, server in enumerate(strangers):
            self.sockets[server].sendto(b"from %d" % number, mapped)
        self.sockets[known].sendto(b"last", mapped)
        got = nothing_but(inside, b"last")
        return [b"from %d" % number in got for number in range(len(strangers))]
