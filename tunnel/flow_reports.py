"""What an agent tells the portal of its flows: parts that wait, sums, the pace; and the sweep.

    FlowTable --part--> FlowReports --FlowReport--> the agent's messages
        ^ FlowSweep looks at a slice of all flows now and then

Parts wait until the portal is there, at most MAX_WAITING_FLOWS of them. What comes beyond is added
to a sum of its authorisation, protocol and source: its packets and bytes are told, its destination
and ports are not. Beyond MAX_SUMS sums it is counted as lost. Reports leave at a pace below what
the portal takes, so nothing else that the agent has to say waits for them. A report that left is
gone: the portal does not acknowledge it, and nothing is told twice. A core.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from itertools import islice
from uuid import UUID

import attrs

from channel.messages import MAX_FLOWS, FlowReport, IpText, ReportedFlow
from tunnel.flows import Ending, Flow, FlowTable
from tunnel.packet import ICMP, ICMPV6, PROTOCOL_NAMES

SECOND_NS = 10**9
MAX_WAITING_FLOWS = 8_192
MAX_SUMS = 4_096
# How long the first of a report waits for company.
GATHER_NS = SECOND_NS
# So many rows of a report are for sums, if there are any.
SUMS_SHARE = 16
# The pause after a report that the channel did not take.
REFUSED_PAUSE_NS = SECOND_NS
# Reports in which an agent that ends tells the rest, as fast as the channel takes them.
MAX_LAST_REPORTS = 32
SWEEP_FLOWS = 1_024
SWEEP_PAUSE_NS = SECOND_NS // 10
SWEEP_INTERVAL_NS = 5 * SECOND_NS
MAX_AGO_NS = 400 * 86_400 * SECOND_NS


@attrs.define(kw_only=True)
class _Part:
    """A part of a flow, or the sum of several; `source` and `destination` are packed addresses."""

    authorization_id: UUID
    protocol: int
    source: bytes
    source_port: int
    destination: bytes
    destination_port: int
    began_ns: int
    ended_ns: int
    packets_sent: int
    packets_received: int
    bytes_sent: int
    bytes_received: int
    ending: str
    flows: int

    def add(self, other: _Part) -> None:
        self.began_ns = min(self.began_ns, other.began_ns)
        self.ended_ns = max(self.ended_ns, other.ended_ns)
        self.packets_sent += other.packets_sent
        self.packets_received += other.packets_received
        self.bytes_sent += other.bytes_sent
        self.bytes_received += other.bytes_received
        self.flows += other.flows


@attrs.define(kw_only=True)
class FlowReportStatistics:
    """Parts since the start. `summed`: told without destination and ports; `lost`: not told."""

    reported: int = 0
    summed: int = 0
    lost: int = 0


class FlowReports:
    """See the module. `interval_ns` is the least time between two reports."""

    def __init__(self, *, interval_ns: int) -> None:
        self._interval_ns = interval_ns
        self._waiting: deque[_Part] = deque()
        self._sums: dict[tuple[UUID, int, bytes], _Part] = {}
        self._under_way: tuple[FlowReport, list[_Part]] | None = None
        self._send_at = 0
        self.counts = FlowReportStatistics()

    def add(self, flow: Flow, authorization_id: UUID | None, ending: Ending, now: int) -> None:
        """A part of a flow, as a `FlowTable` hands it out. Without an authorisation there is
        nobody to tell it of: it is counted as lost, if it carried anything."""
        if authorization_id is None:
            self.counts.lost += bool(flow.packets_sent or flow.packets_received)
            return
        if not len(self):
            self._send_at = max(self._send_at, now + GATHER_NS)
        self._put(_part(flow, authorization_id, ending))

    def take(self, now: int) -> FlowReport | None:
        """The next report, if it is time for one."""
        if not len(self) or now < self._send_at:
            return None
        parts = self._next_parts()
        report = FlowReport(flows=tuple(_reported(part, now) for part in parts))
        self._under_way = (report, parts)
        self._send_at = now + self._interval_ns
        self.counts.reported += len(parts)
        return report

    def put_back(self, report: object, now: int) -> None:
        """The channel did not take a report: it is told later."""
        if self._under_way is None or report is not self._under_way[0]:
            return
        _, parts = self._under_way
        self._under_way = None
        self.counts.reported -= len(parts)
        self._waiting.extendleft(reversed(parts))
        self._send_at = now + REFUSED_PAUSE_NS

    def take_last(self, now: int) -> list[FlowReport]:
        """Everything, whatever the pace, in at most MAX_LAST_REPORTS reports: the agent ends."""
        room = MAX_LAST_REPORTS * MAX_FLOWS
        while self._waiting and len(self) > room:
            self._sum(self._waiting.pop())
        reports: list[FlowReport] = []
        for _ in range(MAX_LAST_REPORTS):
            self._send_at = now
            report = self.take(now)
            if report is None:
                return reports
            reports.append(report)
        self.counts.lost += len(self)
        return reports

    def poll_timeout(self) -> int | None:
        """When `take` has something."""
        return self._send_at if self._waiting or self._sums else None

    def __len__(self) -> int:
        return len(self._waiting) + len(self._sums)

    # --- helpers ---------------------------------------------------------------------------------

    def _put(self, part: _Part) -> None:
        if len(self._waiting) < MAX_WAITING_FLOWS:
            self._waiting.append(part)
        else:
            self._sum(part)

    def _sum(self, part: _Part) -> None:
        key = (part.authorization_id, part.protocol, part.source)
        known = self._sums.get(key)
        if known is not None:
            known.add(part)
        elif len(self._sums) < MAX_SUMS:
            unknown = bytes(len(part.destination))
            self._sums[key] = attrs.evolve(
                part, destination=unknown, source_port=0, destination_port=0, ending=""
            )
        else:
            self.counts.lost += 1
            return
        self.counts.summed += 1

    def _next_parts(self) -> list[_Part]:
        """Of both kinds: sums must not wait until nothing else does."""
        of_sums = max(SUMS_SHARE, MAX_FLOWS - len(self._waiting))
        parts = [self._sums.pop(key) for key in list(islice(self._sums, min(MAX_FLOWS, of_sums)))]
        while self._waiting and len(parts) < MAX_FLOWS:
            parts.append(self._waiting.popleft())
        return parts


class FlowSweep:
    """Looks at all flows of `tables`, a slice at a time, and begins again SWEEP_INTERVAL_NS after
    it is through."""

    def __init__(self, tables: Callable[[], Iterable[FlowTable]], now: int) -> None:
        self._tables = tables
        self._round: list[FlowTable] = []
        self._at = now + SWEEP_INTERVAL_NS

    def poll_timeout(self) -> int:
        """When `handle_timeout` is due."""
        return self._at

    def handle_timeout(self, now: int) -> None:
        if now < self._at:
            return
        if not self._round:
            self._round = list(self._tables())
        left = SWEEP_FLOWS
        while self._round and left > 0:
            table = self._round[-1]
            left -= 1 + table.sweep(now, left)
            if not table.sweeping:
                self._round.pop()
        self._at = now + (SWEEP_PAUSE_NS if self._round else SWEEP_INTERVAL_NS)


def _part(flow: Flow, authorization_id: UUID, ending: Ending) -> _Part:
    protocol, source, source_port, destination, destination_port = flow.key
    if protocol in (ICMP, ICMPV6):
        source_port = destination_port = 0
    return _Part(
        authorization_id=authorization_id,
        protocol=protocol,
        source=source,
        source_port=source_port,
        destination=destination,
        destination_port=destination_port,
        began_ns=flow.began_ns,
        ended_ns=max(flow.began_ns, flow.seen_ns),
        packets_sent=flow.packets_sent,
        packets_received=flow.packets_received,
        bytes_sent=flow.bytes_sent,
        bytes_received=flow.bytes_received,
        ending=ending,
        flows=int(bool(ending) and not flow.end_told),
    )


def _reported(part: _Part, now: int) -> ReportedFlow:
    protocol = PROTOCOL_NAMES[part.protocol]
    assert protocol in ("tcp", "udp", "icmp")
    return ReportedFlow(
        authorization_id=part.authorization_id,
        protocol=protocol,  # type: ignore[arg-type]  # one of the three
        source=IpText(str(ip_address(part.source))),
        source_port=part.source_port,
        destination=IpText(str(ip_address(part.destination))),
        destination_port=part.destination_port,
        began_ns_ago=_ago(part.began_ns, now),
        ended_ns_ago=_ago(part.ended_ns, now),
        packets_sent=part.packets_sent,
        packets_received=part.packets_received,
        bytes_sent=part.bytes_sent,
        bytes_received=part.bytes_received,
        ending=part.ending,
        flows=part.flows,
    )


def _ago(instant: int, now: int) -> int:
    return min(max(0, now - instant), MAX_AGO_NS)
