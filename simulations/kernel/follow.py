"""The timeline of one session on the kernel, packet by packet, by taps on the hosts of its client,
gateways, relays and portals. What was lost on the way is not seen as such: it was sent, and never
came."""

from __future__ import annotations

import socket

import attrs

from simulations.hosts.inner import ends_of
from simulations.kernel.taps import Seen
from simulations.kernel.topology import Topology
from simulations.result import Step
from simulations.scenario.schema import Scenario
from simulations.timeline import MAX_STEPS, kind_of

WIRE = "eth0"
TCP, ICMP, ICMP6 = 6, 1, 58


class Follow:
    """Follows a client on its way to a resource."""

    def __init__(self, scenario: Scenario, topology: Topology, client: str, resource: str) -> None:
        sites = next(
            each.sites for each in scenario.account.resources if each.name == resource
        )  # fmt: skip
        self._topology = topology
        self._client = client
        self._portals = [portal.name for portal in scenario.portals]
        self._partners = frozenset(
            [gateway.name for gateway in scenario.gateways if gateway.site in sites]
            + [relay.name for relay in scenario.relays]
            + self._portals
        )
        self._own: set[str] = set()
        self._doors: set[str] = set()
        self._steps: list[Step] = []
        self.refresh()

    def refresh(self) -> None:
        """Look where everybody is now."""
        topology = self._topology
        self._own |= {*topology.addresses_of(self._client), topology.outside_ipv4(self._client)}
        for name in self._portals:
            self._doors.update(topology.addresses_of(name))

    def steps(self, zero: int) -> tuple[Step, ...]:
        """All of them in the order of their instants, which are counted from `zero`."""
        return tuple(
            attrs.evolve(step, at_ns=step.at_ns - zero)
            for step in sorted(self._steps, key=lambda step: step.at_ns)
        )

    def fault(self, now: int, text: str) -> None:
        """A fault has struck."""
        self._add(Step(at_ns=now, kind="fault", where="", peer="", text=text))

    def see(self, seen: Seen) -> None:
        """For the taps."""
        if seen.device != WIRE or (seen.host != self._client and seen.host not in self._partners):
            return
        ends = _ends(seen.packet)
        if ends is None:
            return
        source, destination, peers, data = ends
        if seen.host == self._client:
            other = peers[1] if seen.outgoing else peers[0]
        elif source in self._own and not seen.outgoing:
            other = peers[1]
        elif destination in self._own and seen.outgoing:
            other = peers[0]
        else:
            return
        kind, text = self._kind(seen.packet, {source, destination}, data)
        word = "sent" if seen.outgoing else "delivered"
        self._add(
            Step(
                at_ns=seen.at_ns,
                kind=kind,
                where=seen.host,
                peer=other,
                text=f"{word} {text}" if text else word,
                size=len(seen.packet),
            )
        )

    def _kind(self, packet: bytes, ends: set[str], data: bytes) -> tuple[str, str]:
        protocol = packet[6] if packet[0] >> 4 == 6 else packet[9]
        if protocol in (ICMP, ICMP6):
            return "other", "ICMP"
        return ("channel", "") if ends & self._doors or protocol == TCP else kind_of(data)

    def _add(self, step: Step) -> None:
        if len(self._steps) < MAX_STEPS:
            self._steps.append(step)


def _ends(packet: bytes) -> tuple[str, str, tuple[str, str], bytes] | None:
    """Source and destination of an IP packet, both with their ports if it has any, and the data of
    a UDP datagram."""
    v6 = packet[0] >> 4 == 6
    if len(packet) < (40 if v6 else 20):
        return None
    family, size = (socket.AF_INET6, 16) if v6 else (socket.AF_INET, 4)
    at = 8 if v6 else 12
    source = socket.inet_ntop(family, packet[at : at + size])
    destination = socket.inet_ntop(family, packet[at + size : at + 2 * size])
    if v6 and destination.startswith(("ff", "fe80")):
        return None  # neighbours
    begin = 40 if v6 else (packet[0] & 0xF) * 4
    shown = (f"[{source}]", f"[{destination}]") if v6 else (source, destination)
    udp = ends_of(packet)
    if udp is not None:
        ports = (udp[2], udp[3])
    elif (packet[6] if v6 else packet[9]) == TCP and len(packet) >= begin + 4:
        both = int.from_bytes(packet[begin : begin + 4], "big")
        ports = (both >> 16, both & 0xFFFF)
    else:
        return source, destination, (source, destination), b""
    peers = (f"{shown[0]}:{ports[0]}", f"{shown[1]}:{ports[1]}")
    return source, destination, peers, b"" if udp is None else packet[udp[4] :]
