"""What one client may do through this gateway: sources, resources, ports, and replies.

A `ClientFilter` belongs to one connection. A packet of the client passes if its source is one of
the client's own two addresses and it continues a flow or begins one to a granted resource whose
filters allow it. A packet towards the client passes only as part of such a flow: resources never
initiate. The most specific resource that holds the destination decides, as in routing.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from uuid import UUID

from channel.filters import PacketFilter, compile_filters
from channel.messages import Resource
from channel.prefixes import PrefixTable
from tunnel.flows import Ending, Flow, FlowTable, OnPart, opens_flow
from tunnel.packet import ICMP, ICMPV6, TCP, TCP_RST, UDP, Header, tcp_flags
from tunnel.resources import FORBIDDEN_NETWORKS, Network, networks_of

MAX_FLOWS_PER_CLIENT = 16_384
FORWARDED_PROTOCOLS = frozenset((TCP, UDP, ICMP, ICMPV6))


class Verdict(Enum):
    """What to do with a packet of a client."""

    FORWARD = "forward"
    PROHIBIT = "prohibit"  # answer: administratively prohibited
    RESET = "reset"  # answer: TCP reset, its flow lived in another gateway
    DROP = "drop"  # say nothing


class ClientFilter:
    """Grants and flows of one client. `tunnel_ranges` are never reached: no client to client.
    `on_part` is handed what flows carried; their tags are the ids of resources."""

    def __init__(
        self, sources: frozenset[bytes], tunnel_ranges: Iterable[Network], on_part: OnPart
    ) -> None:
        self._sources = sources
        self._forbidden: PrefixTable[bool] = PrefixTable()
        for network in (*FORBIDDEN_NETWORKS, *tunnel_ranges):
            self._forbidden.insert(network, True)
        self._resources: dict[UUID, tuple[Resource, PacketFilter]] = {}
        self._ids_by_network: PrefixTable[tuple[UUID, ...]] = PrefixTable()
        self._flows = FlowTable(MAX_FLOWS_PER_CLIENT, on_part=on_part)
        self.spoofed = 0

    @property
    def flow_table(self) -> FlowTable:
        return self._flows

    def grant(self, resource: Resource, now: int) -> None:
        """Let the client reach a resource, or change the filters of one that it reaches."""
        if resource.id in self._resources:
            self.update(resource, now)
            return
        self._resources[resource.id] = (resource, compile_filters(resource.filters))
        for network in networks_of(resource):
            ids = self._ids_by_network.get(network) or ()
            self._ids_by_network.insert(network, (*ids, resource.id))

    def update(self, resource: Resource, now: int) -> bool:
        """New filters of a granted resource: flows that they forbid are dropped at once."""
        if resource.id not in self._resources:
            return False
        allowed = compile_filters(resource.filters)
        # The address never changes (that would be a revocation), so the old one stands.
        self._resources[resource.id] = (self._resources[resource.id][0], allowed)
        self._flows.remove(
            lambda flow: flow.tag == resource.id and not allowed.allows(flow.key[0], flow.key[4]),
            "revoked",
            now,
        )
        return True

    def withdraw(self, resource_id: UUID, now: int) -> tuple[Network, ...]:
        """Take a resource away; its flows are dropped at once. Answers its networks."""
        entry = self._resources.pop(resource_id, None)
        if entry is None:
            return ()
        networks = networks_of(entry[0])
        for network in networks:
            left = tuple(
                other for other in self._ids_by_network.get(network) or () if other != resource_id
            )
            if left:
                self._ids_by_network.insert(network, left)
            else:
                self._ids_by_network.remove(network)
        self._flows.remove(lambda flow: flow.tag == resource_id, "revoked", now)
        return networks

    def end_flows(self, ending: Ending, now: int) -> None:
        """The end of all flows."""
        self._flows.remove(lambda flow: True, ending, now)

    def continues(self, packet: bytes, header: Header, now: int) -> Flow | None:
        """The flow that a packet of the client continues, in which it is to be counted; None:
        ask `from_client`."""
        if header.source not in self._sources:
            return None
        return self._flows.outbound(packet, header, now)

    def from_client(self, packet: bytes, header: Header, now: int) -> Verdict:
        """Judge a packet that came out of the client's tunnel; one that passes is counted."""
        if header.source not in self._sources:
            self.spoofed += 1
            return Verdict.DROP
        flow = self._flows.outbound(packet, header, now)
        if flow is not None:
            flow.count_sent(1, len(packet))
            return Verdict.FORWARD
        if header.is_icmp_error or not header.first_fragment:
            return Verdict.DROP
        if header.protocol not in FORWARDED_PROTOCOLS:
            return Verdict.PROHIBIT
        resource_id = self._permitting(header)
        if resource_id is None:
            return Verdict.PROHIBIT
        if opens_flow(packet, header):
            opened = self._flows.open(packet, header, resource_id, now)
            if opened is None:
                return Verdict.DROP
            opened.count_sent(1, len(packet))
            return Verdict.FORWARD
        if header.protocol == TCP and not tcp_flags(packet, header) & TCP_RST:
            return Verdict.RESET
        return Verdict.DROP

    def to_client(self, packet: bytes, header: Header, now: int) -> Flow | None:
        """The flow that a packet for the client answers, in which it is to be counted; None: it
        may not pass."""
        if header.destination not in self._sources:
            return None
        return self._flows.inbound(packet, header, now)

    def resource_ids(self) -> tuple[UUID, ...]:
        """The resources that are granted."""
        return tuple(self._resources)

    def flows(self) -> int:
        """How many flows are known."""
        return len(self._flows)

    def _permitting(self, header: Header) -> UUID | None:
        if self._forbidden.lookup(header.destination):
            return None
        for resource_id in self._ids_by_network.lookup(header.destination) or ():
            allowed = self._resources[resource_id][1]
            if allowed.allows(header.protocol, header.destination_port):
                return resource_id
        return None
