"""Flows: which packets answer which, for a stateful filter at either end of a tunnel.

A flow belongs to whoever sent its first packet, the originator (always a client: resources never
initiate). It is known by protocol, addresses and ports; an ICMP echo by its identifier. A reply
is a packet of the same flow with its ends exchanged, or an ICMP error that quotes a packet of the
flow. Timeouts follow the protocol (RFC 4787, RFC 5382, RFC 5508), and the numbers of flows and of
remembered fragments have limits.

Whoever lets a packet pass counts it in its flow. What was counted is handed out in parts
(`OnPart`), each packet in exactly one of them: when the flow ends, every five minutes while it goes
on, and whenever another authorisation is to answer for what follows (`cut`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Literal

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
# A flow that goes on is told of this often; what is no TCP and silent will soon end, and waits for
# that. TCP that both sides closed is told of once it is silent.
PART_INTERVAL_NS = 300 * SECOND_NS
SILENT_NS = 60 * SECOND_NS
CLOSED_SILENT_NS = 2 * SECOND_NS
MAX_FRAGMENTED_PACKETS = 1_024
TCP_HEADER_BYTES = 20

FlowKey = tuple[int, bytes, int, bytes, int]
Ending = Literal["", "closed", "idle", "revoked", "lost", "stopped"]
"""Why a part is told of: the flow goes on (empty); TCP closed it; nothing came for its timeout; its
authorisation ended, or no longer allows it; its tunnel ended; the agent ends."""


@attrs.define(eq=False)
class Flow:
    """One conversation. `tag` says what permitted it; `last_packet` are the headers of the
    originator's latest TCP packet, where the table keeps them.

    The counts are those since `began_ns`: of what was not handed out yet. `sent` is by the
    originator. `told`: parts were handed out before; `end_told`: also its end.
    """

    key: FlowKey
    tag: Hashable
    expires_ns: int
    began_ns: int
    answered: bool = False
    originator_closed: bool = False
    responder_closed: bool = False
    last_packet: bytes = b""
    packets_sent: int = 0
    packets_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    told: bool = False
    end_told: bool = False

    def count_sent(self, packets: int, packets_bytes: int) -> None:
        """Packets of the originator passed."""
        self.packets_sent += packets
        self.bytes_sent += packets_bytes

    def count_received(self, packets: int, packets_bytes: int) -> None:
        """Answers passed."""
        self.packets_received += packets
        self.bytes_received += packets_bytes

    @property
    def seen_ns(self) -> int:
        """When its last packet came."""
        return self.expires_ns - _lifetime_ns(self)

    @property
    def is_closed(self) -> bool:
        return self.originator_closed and self.responder_closed

    @property
    def responder(self) -> bytes:
        """The packed address of the far end."""
        return self.key[3]

    @property
    def is_tcp(self) -> bool:
        return self.key[0] == TCP


OnPart = Callable[[Flow, Ending, int], None]
"""Takes what a flow carried since its `began_ns` (of its counts nothing is kept after the call),
why, and the time."""


def _unheeded(flow: Flow, ending: Ending, now: int) -> None:
    """The parts of a table that nobody asked for."""


class FlowTable:
    """The flows of one side. `limit` bounds them; `keep_packets` remembers TCP headers; `on_part`
    is handed what was counted."""

    def __init__(
        self, limit: int, *, keep_packets: bool = False, on_part: OnPart = _unheeded
    ) -> None:
        self._limit = limit
        self._keep_packets = keep_packets
        self._on_part = on_part
        self._flow_by_key: dict[FlowKey, Flow] = {}
        self._round: list[Flow] = []
        self._flow_by_fragment: dict[tuple[bytes, bytes, int, int], tuple[Flow, int]] = {}
        self._swept_ns = 0
        self.refused = 0

    def outbound(self, packet: bytes, header: Header, now: int) -> Flow | None:
        """The flow that a packet of the originator continues, renewed; None if there is none."""
        if header.is_icmp_error:
            return self.find(packet, header, now)
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

    def find(self, packet: bytes, header: Header, now: int) -> Flow | None:
        """The flow of a packet of the originator that was seen before; nothing is renewed."""
        if header.is_icmp_error:
            inner = quoted(packet, header)
            return None if inner is None else self._live(_reply_key(inner), now)
        return self._find(header, _key(header), now)

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
        older = self._flow_by_key.get(key)
        if older is not None:
            self._drop([older], "closed", now)
        flow = Flow(key=key, tag=tag, expires_ns=0, began_ns=now)
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

    def remove(self, doomed: Callable[[Flow], bool], ending: Ending, now: int) -> list[Flow]:
        """Drop every flow for which `doomed` holds; they are returned."""
        dropped = [flow for flow in self._flow_by_key.values() if doomed(flow)]
        self._drop(dropped, ending, now)
        return dropped

    def cut(self, tag: Hashable, now: int) -> None:
        """Hand out what the flows of a tag carried so far; they go on."""
        for flow in self._flow_by_key.values():
            if flow.tag == tag:
                self._tell(flow, "", now)

    def sweep(self, now: int, limit: int) -> int:
        """Look at the next `limit` flows of a round (see `sweeping`): forget what expired, hand out
        what is due. Answers how many were looked at."""
        if not self._round:
            self._round = list(self._flow_by_key.values())
        looked = self._round[-limit:]
        del self._round[-limit:]
        expired = []
        for flow in looked:
            if self._flow_by_key.get(flow.key) is not flow:
                continue
            if flow.expires_ns <= now:
                expired.append(flow)
            elif flow.is_closed:
                if not flow.end_told and now - flow.seen_ns >= CLOSED_SILENT_NS:
                    self._tell(flow, "closed", now)
            elif now - flow.began_ns >= PART_INTERVAL_NS and _goes_on(flow, now):
                self._tell(flow, "", now)
        self._expire(expired, now)
        return len(looked)

    @property
    def sweeping(self) -> bool:
        """Whether a round is under way."""
        return bool(self._round)

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
            self._expire([flow], now)
            return None
        return flow

    def _expire(self, flows: list[Flow], now: int) -> None:
        self._drop([flow for flow in flows if flow.is_closed], "closed", now)
        self._drop([flow for flow in flows if not flow.is_closed], "idle", now)

    def _drop(self, flows: list[Flow], ending: Ending, now: int) -> None:
        for flow in flows:
            del self._flow_by_key[flow.key]
            self._tell(flow, ending, now)
        if flows and self._flow_by_fragment:
            gone = set(map(id, flows))
            for fragment, (flow, _) in list(self._flow_by_fragment.items()):
                if id(flow) in gone:
                    del self._flow_by_fragment[fragment]

    def _tell(self, flow: Flow, ending: Ending, now: int) -> None:
        """Hand out a part, if there is anything to tell: packets, or the end of what was told."""
        its_end = bool(ending) and flow.told and not flow.end_told
        if flow.packets_sent or flow.packets_received or its_end:
            self._on_part(flow, ending, now)
            flow.told = True
        flow.end_told |= bool(ending)
        flow.began_ns = max(flow.began_ns, flow.seen_ns)
        flow.packets_sent = flow.packets_received = flow.bytes_sent = flow.bytes_received = 0

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
        self._expire([flow for flow in self._flow_by_key.values() if flow.expires_ns <= now], now)


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


def _goes_on(flow: Flow, now: int) -> bool:
    return flow.is_tcp or now - flow.seen_ns < SILENT_NS


def _lifetime_ns(flow: Flow) -> int:
    protocol = flow.key[0]
    if protocol == TCP:
        if flow.originator_closed and flow.responder_closed:
            return TCP_CLOSING_NS
        return TCP_ESTABLISHED_NS if flow.answered else TCP_OPENING_NS
    if protocol in (ICMP, ICMPV6):
        return ICMP_NS
    return UDP_ANSWERED_NS if flow.answered else UDP_UNANSWERED_NS
