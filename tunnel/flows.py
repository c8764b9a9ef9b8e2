"""Flows: which packets answer which, for a stateful filter at either end of a tunnel.

A flow belongs to whoever sent its first packet, the originator (always a client: resources never
initiate). It is known by protocol, addresses and ports; an ICMP echo by its identifier. A reply
is a packet of the same flow with its ends exchanged, or an ICMP error that quotes a packet of the
flow. Timeouts follow the protocol (RFC 4787, RFC 5382, RFC 5508), and the numbers of flows and of
remembered fragments have limits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

import attrs

from tunnel.packet import (
    ICMP,
    ICMPV6,
    TCP,
    TCP_ACK,
    TCP_FIN,
    TCP_RST,
    TCP_SYN,
    UDP,
    Header,
    quoted,
    tcp_flags,
)

SECOND_NS = 10**9
TCP_OPENING_NS = 60 * SECOND_NS
TCP_ESTABLISHED_NS = 7_440 * SECOND_NS
TCP_CLOSING_NS = 30 * SECOND_NS
UDP_UNANSWERED_NS = 60 * SECOND_NS
UDP_ANSWERED_NS = 300 * SECOND_NS
ICMP_NS = 60 * SECOND_NS
FRAGMENTS_NS = 30 * SECOND_NS
SWEEP_INTERVAL_NS = 10 * SECOND_NS
MAX_FRAGMENTED_PACKETS = 1_024
TCP_HEADER_BYTES = 20

FlowKey = tuple[int, bytes, int, bytes, int]


@attrs.define(eq=False)
class Flow:
    """One conversation. `tag` says what permitted it; `last_packet` are the headers of the
    originator's latest TCP packet, where the table keeps them."""

    key: FlowKey
    tag: Hashable
    expires_ns: int
    answered: bool = False
    originator_closed: bool = False
    responder_closed: bool = False
    last_packet: bytes = b""

    @property
    def responder(self) -> bytes:
        """The packed address of the far end."""
        return self.key[3]

    @property
    def is_tcp(self) -> bool:
        return self.key[0] == TCP


class FlowTable:
    """The flows of one side. `limit` bounds them; `keep_packets` remembers TCP headers."""

    def __init__(self, limit: int, *, keep_packets: bool = False) -> None:
        self._limit = limit
        self._keep_packets = keep_packets
        self._flow_by_key: dict[FlowKey, Flow] = {}
        self._flow_by_fragment: dict[tuple[bytes, bytes, int, int], tuple[Flow, int]] = {}
        self._swept_ns = 0
        self.refused = 0

    def outbound(self, packet: bytes, header: Header, now: int) -> Flow | None:
        """The flow that a packet of the originator continues, renewed; None if there is none."""
        if header.is_icmp_error:
            inner = quoted(packet, header)
            return None if inner is None else self._live(_reply_key(inner), now)
        flow = self._find(header, _key(header), now)
        if flow is None:
            return None
        if header.protocol == TCP:
            flags = tcp_flags(packet, header)
            if flags & TCP_SYN and (flow.originator_closed or flow.responder_closed):
                return None  # the ports are used again: this is a new flow
            if self._keep_packets and header.first_fragment:
                flow.last_packet = packet[: header.offset + TCP_HEADER_BYTES]
            flow.originator_closed |= bool(flags & (TCP_FIN | TCP_RST))
            flow.responder_closed |= bool(flags & TCP_RST)
        flow.expires_ns = now + _lifetime_ns(flow)
        return flow

    def open(self, packet: bytes, header: Header, tag: Hashable, now: int) -> Flow | None:
        """Begin a flow with its first packet; None, counted, if the table is full.

        Ask `opens_flow` first, and whether `tag` permits it.
        """
        if len(self._flow_by_key) >= self._limit:
            self._sweep(now)
            if len(self._flow_by_key) >= self._limit:
                self.refused += 1
                return None
        key = _key(header)
        flow = Flow(key=key, tag=tag, expires_ns=0)
        flow.expires_ns = now + _lifetime_ns(flow)
        if self._keep_packets and header.protocol == TCP:
            flow.last_packet = packet[: header.offset + TCP_HEADER_BYTES]
        self._flow_by_key[key] = flow
        self._note_fragment(header, flow, now)
        return flow

    def inbound(self, packet: bytes, header: Header, now: int) -> Flow | None:
        """The flow that a packet answers, renewed; None for what answers nothing."""
        if header.is_icmp_error:
            inner = quoted(packet, header)
            if inner is None or inner.source != header.destination:
                return None
            return self._live(_key(inner), now)
        flow = self._find(header, _reply_key(header), now)
        if flow is None:
            return None
        if header.protocol == TCP:
            flags = tcp_flags(packet, header)
            flow.responder_closed |= bool(flags & (TCP_FIN | TCP_RST))
            flow.originator_closed |= bool(flags & TCP_RST)
        flow.answered = True
        flow.expires_ns = now + _lifetime_ns(flow)
        return flow

    def remove(self, doomed: Callable[[Flow], bool]) -> list[Flow]:
        """Drop every flow for which `doomed` holds; they are returned."""
        dropped = [flow for flow in self._flow_by_key.values() if doomed(flow)]
        for flow in dropped:
            del self._flow_by_key[flow.key]
        if dropped:
            gone = set(map(id, dropped))
            for fragment, (flow, _) in list(self._flow_by_fragment.items()):
                if id(flow) in gone:
                    del self._flow_by_fragment[fragment]
        return dropped

    def __iter__(self) -> Iterator[Flow]:
        return iter(self._flow_by_key.values())

    def __len__(self) -> int:
        return len(self._flow_by_key)

    # --- helpers -------------------------------------------------------------------------------

    def _find(self, header: Header, key: FlowKey, now: int) -> Flow | None:
        if header.first_fragment:
            flow = self._live(key, now)
            if flow is not None:
                self._note_fragment(header, flow, now)
            return flow
        assert header.fragment is not None
        name = (header.source, header.destination, header.protocol, header.fragment)
        found = self._flow_by_fragment.get(name)
        if found is None or found[1] <= now:
            return None
        return found[0]

    def _live(self, key: FlowKey, now: int) -> Flow | None:
        flow = self._flow_by_key.get(key)
        if flow is None:
            return None
        if flow.expires_ns <= now:
            del self._flow_by_key[key]
            return None
        return flow

    def _note_fragment(self, header: Header, flow: Flow, now: int) -> None:
        if header.fragment is None:
            return
        if len(self._flow_by_fragment) >= MAX_FRAGMENTED_PACKETS:
            self._flow_by_fragment = {
                name: entry for name, entry in self._flow_by_fragment.items() if entry[1] > now
            }
            if len(self._flow_by_fragment) >= MAX_FRAGMENTED_PACKETS:
                return
        name = (header.source, header.destination, header.protocol, header.fragment)
        self._flow_by_fragment[name] = (flow, now + FRAGMENTS_NS)

    def _sweep(self, now: int) -> None:
        if now - self._swept_ns < SWEEP_INTERVAL_NS:
            return
        self._swept_ns = now
        self.remove(lambda flow: flow.expires_ns <= now)


def opens_flow(packet: bytes, header: Header) -> bool:
    """Whether a packet may be the first of a flow: a TCP SYN, any UDP, an echo request."""
    if not header.first_fragment:
        return False
    if header.protocol == TCP:
        return tcp_flags(packet, header) & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN) == TCP_SYN
    return header.protocol == UDP or header.is_echo_request


def _key(header: Header) -> FlowKey:
    return (
        header.protocol,
        header.source,
        header.source_port,
        header.destination,
        header.destination_port,
    )


def _reply_key(header: Header) -> FlowKey:
    return (
        header.protocol,
        header.destination,
        header.destination_port,
        header.source,
        header.source_port,
    )


def _lifetime_ns(flow: Flow) -> int:
    protocol = flow.key[0]
    if protocol == TCP:
        if flow.originator_closed and flow.responder_closed:
            return TCP_CLOSING_NS
        return TCP_ESTABLISHED_NS if flow.answered else TCP_OPENING_NS
    if protocol in (ICMP, ICMPV6):
        return ICMP_NS
    return UDP_ANSWERED_NS if flow.answered else UDP_UNANSWERED_NS
