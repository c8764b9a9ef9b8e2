"""What stands behind gateways: services that echo, and a gateway's way to its network.

A gateway's kernel masquerades: each flow of a client leaves from a port of the gateway's own, and
the answer is turned back into a packet for the client. That is what `Masquerade` is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from typing import Final

from gateways.agent import FlushTranslations
from runtime.net.address import Address
from simulations.hosts.inner import ECHO_PORT, ends_of, packed, udp_packet
from simulations.net.world import Host, World

MAX_FLOWS: Final = 16_000


class EchoService:
    """One life of a server that echoes UDP datagrams."""

    def __init__(self, world: World, host: Host) -> None:
        self.host = host
        self.is_over = False
        self.echoed = 0
        host.bind(ECHO_PORT, self._receive)

    @property
    def is_online(self) -> bool:
        return self.host.runs

    def kill(self) -> None:
        self.is_over = True

    def stop(self) -> None:
        self.host.unbind(ECHO_PORT)
        self.kill()

    def _receive(self, data: bytes, source: Address, local: Address) -> None:
        self.echoed += 1
        self.host.send(ECHO_PORT, source, data)


class _Flow:
    """A flow of a client: its inner source, and the port of the gateway that stands for it."""

    __slots__ = ("client", "client_port", "destination", "destination_port", "port")

    def __init__(
        self, client: bytes, client_port: int, destination: bytes, destination_port: int, port: int
    ) -> None:
        self.client = client
        self.client_port = client_port
        self.destination = destination
        self.destination_port = destination_port
        self.port = port


class Masquerade:
    """A gateway's way to its network. `answer` gets packets for the TUN device."""

    def __init__(self, host: Host, answer: Callable[[bytes], None]) -> None:
        self._host = host
        self._answer = answer
        self._flows: dict[tuple[bytes, int, bytes, int], _Flow] = {}
        self._text: dict[bytes, str] = {}

    def forward(self, packet: bytes) -> None:
        """What the TUN device gave out. Only UDP has a service in this world."""
        ends = ends_of(packet)
        if ends is None:
            return
        source, destination, source_port, destination_port, at = ends
        key = (source, source_port, destination, destination_port)
        flow = self._flows.get(key)
        if flow is None:
            if len(self._flows) >= MAX_FLOWS:
                self._forget(next(iter(self._flows)))
            flow = _Flow(*key, self._host.ephemeral_port())
            self._flows[key] = flow
            self._host.bind(flow.port, partial(self._receive, flow))
        target = self._text.get(destination)
        if target is None:
            target = self._text[destination] = str(ip_address(destination))
        self._host.send(flow.port, Address(target, destination_port), packet[at:])

    def flush(self, event: FlushTranslations) -> None:
        """The kernel has to forget the flows of a client to a network."""
        client, network = event.client.packed, event.network
        for key in [key for key in self._flows if key[0] == client]:
            if network is None or ip_address(key[2]) in network:
                self._forget(key)

    def close(self) -> None:
        """The gateway's process ended in good order, and took its rules with it."""
        for key in list(self._flows):
            self._forget(key)

    def _forget(self, key: tuple[bytes, int, bytes, int]) -> None:
        self._host.unbind(self._flows.pop(key).port)

    def _receive(self, flow: _Flow, data: bytes, source: Address, local: Address) -> None:
        if source.port != flow.destination_port or packed(source.host) != flow.destination:
            return
        ports = (flow.destination_port, flow.client_port)
        self._answer(udp_packet(flow.destination, flow.client, ports, data))
