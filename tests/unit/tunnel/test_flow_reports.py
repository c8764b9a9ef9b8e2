"""Flows are told of once: each packet in one row, whatever ends, waits or is too much."""

from __future__ import annotations

from collections import Counter
from ipaddress import IPv4Address
from itertools import pairwise
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channel.frames import AGENT_FRAME_LIMIT, encode_frame
from channel.messages import MAX_FLOWS, FlowReport, ReportedFlow
from tests.unit.clients.stage import ACK, FIN_ACK, SYN, answer, echo, tcp, udp
from tunnel import flow_reports
from tunnel.flow_reports import (
    GATHER_NS,
    MAX_LAST_REPORTS,
    MAX_SUMS,
    MAX_WAITING_FLOWS,
    REFUSED_PAUSE_NS,
    SWEEP_INTERVAL_NS,
    FlowReports,
    FlowSweep,
)
from tunnel.flows import PART_INTERVAL_NS, Ending, Flow, FlowTable, opens_flow
from tunnel.packet import parse

SECOND = 10**9
INTERVAL = SECOND // 2
GRANT = UUID(int=7)


class Bench:
    """A table whose flows are told of, as an agent has it; `by` is who answers for each tag."""

    def __init__(self, limit: int = 100) -> None:
        self.now = SECOND
        self.reports = FlowReports(interval_ns=INTERVAL)
        self.by: dict[str, UUID] = {"a": UUID(int=1), "b": UUID(int=2)}
        self.table = FlowTable(limit, on_part=self._part)
        self.sweep = FlowSweep(lambda: (self.table,), self.now)
        self.told: list[ReportedFlow] = []
        self.passed: Counter[UUID] = Counter()

    def _part(self, flow: Flow, ending: Ending, now: int) -> None:
        assert isinstance(flow.tag, str)
        self.reports.add(flow, self.by[flow.tag], ending, now)

    def send(self, packet: bytes, tag: str = "a") -> None:
        header = parse(packet)
        assert header is not None
        flow = self.table.outbound(packet, header, self.now)
        if flow is None and opens_flow(packet, header):
            flow = self.table.open(packet, header, tag, self.now)
        if flow is not None:
            flow.count_sent(1, len(packet))
            self.passed[self.by[str(flow.tag)]] += len(packet)

    def receive(self, packet: bytes) -> None:
        header = parse(packet)
        assert header is not None
        flow = self.table.inbound(packet, header, self.now)
        if flow is not None:
            flow.count_received(1, len(packet))
            self.passed[self.by[str(flow.tag)]] += len(packet)

    def take(self) -> FlowReport | None:
        report = self.reports.take(self.now)
        if report is not None:
            self.told += report.flows
        return report

    def run(self, seconds: float) -> None:
        """Let time pass, timer by timer, with the portal there."""
        end = self.now + int(seconds * SECOND)
        while True:
            report_at = self.reports.poll_timeout()
            at = min(self.sweep.poll_timeout(), end if report_at is None else report_at)
            if at >= end:
                break
            self.now = max(self.now, at)
            self.sweep.handle_timeout(self.now)
            self.take()
        self.now = end

    def finish(self) -> None:
        self.table.remove(lambda flow: True, "stopped", self.now)
        for report in self.reports.take_last(self.now):
            self.told += report.flows

    def told_bytes(self) -> Counter[UUID]:
        told: Counter[UUID] = Counter()
        for row in self.told:
            told[row.authorization_id] += row.bytes_sent + row.bytes_received
        return told


def endings(rows: list[ReportedFlow]) -> list[tuple[str, int]]:
    return [(row.ending, row.flows) for row in rows]


# --- one flow ------------------------------------------------------------------------------------


def test_a_tcp_flow_is_told_of_a_few_seconds_after_both_sides_closed_it() -> None:
    bench = Bench()
    for packet in (tcp(SYN), tcp(ACK, data=b"request"), tcp(FIN_ACK)):
        bench.send(packet)
        back = tcp(ACK if packet != tcp(FIN_ACK) else FIN_ACK, data=b"answer", source="10.0.0.5",
                   destination="100.64.0.1", ports=(80, 40_000))  # fmt: skip
        bench.receive(back)
    bench.run(2 * SWEEP_INTERVAL_NS / SECOND)
    [row] = bench.told
    assert (row.protocol, row.source, row.source_port) == ("tcp", "100.64.0.1", 40_000)
    assert (row.destination, row.destination_port) == ("10.0.0.5", 80)
    assert (row.packets_sent, row.packets_received) == (3, 3)
    assert (row.bytes_sent, row.bytes_received) == (3 * 40 + 7, 3 * 46)
    assert endings(bench.told) == [("closed", 1)]
    bench.send(tcp(ACK))  # the last acknowledgement, late: a rest, but not another flow
    bench.run(60)
    assert endings(bench.told[1:]) == [("closed", 0)]
    assert len(bench.table) == 0


def test_a_flow_that_goes_idle_is_told_of_with_the_time_of_its_last_packet() -> None:
    bench = Bench()
    bench.send(udp())
    bench.run(10)
    bench.send(udp())
    bench.run(100)
    [row] = bench.told
    assert endings([row]) == [("idle", 1)]
    assert row.began_ns_ago - row.ended_ns_ago == 10 * SECOND
    assert (row.packets_sent, row.packets_received) == (2, 0)


def test_a_flow_that_goes_on_is_told_of_in_parts_and_ends_once() -> None:
    bench = Bench()
    for _ in range(60):
        bench.send(udp())
        bench.receive(answer())
        bench.run(20)
    bench.run(400)
    assert endings(bench.told) == [("", 0)] * (len(bench.told) - 1) + [("idle", 1)]
    assert len(bench.told) == pytest.approx(1_200 * SECOND / PART_INTERVAL_NS, abs=1)
    assert sum(row.packets_sent for row in bench.told) == 60
    assert sum(row.packets_received for row in bench.told) == 60


def test_a_flow_that_said_nothing_since_its_last_part_still_ends() -> None:
    bench = Bench()
    bench.send(udp())
    bench.table.cut("a", bench.now)
    bench.run(100)
    assert endings(bench.told) == [("", 0), ("idle", 1)]
    assert [row.packets_sent for row in bench.told] == [1, 0]


def test_a_flow_that_never_carried_anything_is_not_told_of() -> None:
    bench = Bench()
    header = parse(udp())
    assert header is not None
    bench.table.open(
        udp(), header, "a", bench.now
    )  # it waits for an authorisation that never comes
    bench.run(100)
    assert bench.told == []


def test_the_next_authorisation_answers_only_for_what_follows() -> None:
    bench = Bench()
    bench.send(udp(b"before"))
    bench.table.cut("a", bench.now)
    bench.by["a"] = UUID(int=9)
    bench.send(udp(b"and after"))
    bench.run(100)
    assert [(row.authorization_id.int, row.bytes_sent) for row in bench.told] == [(1, 34), (9, 37)]


def test_the_same_ports_again_are_another_flow() -> None:
    bench = Bench()
    bench.send(tcp(SYN))
    bench.send(tcp(FIN_ACK))
    bench.send(tcp(SYN))
    bench.run(100)
    assert endings(bench.told) == [("closed", 1), ("idle", 1)]
    assert [row.packets_sent for row in bench.told] == [2, 1]


def test_an_echo_has_no_ports() -> None:
    bench = Bench()
    bench.send(echo(8))
    bench.run(100)
    assert [(row.protocol, row.source_port) for row in bench.told] == [("icmp", 0)]


# --- the portal is away, or slow -----------------------------------------------------------------


def test_what_waits_says_how_long_ago_it_was_when_it_leaves() -> None:
    bench = Bench()
    bench.send(udp())
    bench.now += 100 * SECOND
    bench.sweep.handle_timeout(bench.now)
    bench.now += 10_000 * SECOND  # the portal is away
    assert bench.take() is not None
    assert bench.told[0].began_ns_ago == bench.told[0].ended_ns_ago == 10_100 * SECOND


def test_what_the_channel_did_not_take_is_told_later_and_once() -> None:
    bench = Bench()
    bench.send(udp())
    bench.table.remove(lambda flow: True, "stopped", bench.now)
    bench.now += GATHER_NS
    report = bench.reports.take(bench.now)
    bench.reports.put_back(report, bench.now)
    bench.reports.put_back(report, bench.now)  # it was put back already
    assert bench.take() is None
    bench.now += REFUSED_PAUSE_NS
    assert bench.take() is not None
    assert len(bench.told) == 1
    assert bench.reports.counts.reported == 1
    bench.reports.put_back(FlowReport(flows=()), bench.now)  # not the one that left
    assert len(bench.reports) == 0


def test_reports_leave_at_their_pace_and_fit_into_a_frame() -> None:
    bench = Bench(1_000)
    for port in range(1_000):
        bench.send(udp(ports=(port, 53)))
    bench.table.remove(lambda flow: True, "stopped", bench.now)
    sent = []
    while (at := bench.reports.poll_timeout()) is not None:
        bench.now = at
        report = bench.take()
        assert report is not None
        assert len(encode_frame(report, limit=AGENT_FRAME_LIMIT)) < AGENT_FRAME_LIMIT
        sent.append(at)
    assert len(sent) == -(-1_000 // MAX_FLOWS)
    assert {after - before for before, after in pairwise(sent)} == {INTERVAL}


def test_the_longest_report_fits_into_half_a_frame() -> None:
    longest = ReportedFlow(
        authorization_id=GRANT,
        protocol="icmp",
        source="fd48:4c57:5900:1111:2222:3333:4444:5555",  # type: ignore[arg-type]
        source_port=65_535,
        destination="fd48:4c57:5900:1111:2222:3333:4444:5555",  # type: ignore[arg-type]
        destination_port=65_535,
        began_ns_ago=flow_reports.MAX_AGO_NS,
        ended_ns_ago=flow_reports.MAX_AGO_NS,
        packets_sent=2**63 - 1,
        packets_received=2**63 - 1,
        bytes_sent=2**63 - 1,
        bytes_received=2**63 - 1,
        ending="revoked",
        flows=2**63 - 1,
    )
    report = FlowReport(flows=(longest,) * MAX_FLOWS)
    assert len(encode_frame(report, limit=AGENT_FRAME_LIMIT)) < AGENT_FRAME_LIMIT * 3 // 4


# --- too much ------------------------------------------------------------------------------------


def flow_to(number: int) -> bytes:
    destination = str(IPv4Address("10.0.0.0") + number)
    return udp(destination=destination)


def test_what_is_too_much_is_told_as_a_sum_without_destination_and_ports() -> None:
    count = MAX_WAITING_FLOWS + 500
    bench = Bench(count)
    for number in range(count):
        bench.send(flow_to(number))
    bench.table.remove(lambda flow: True, "lost", bench.now)
    assert bench.reports.counts.summed == 500
    bench.run(count / MAX_FLOWS)
    [total] = [row for row in bench.told if row.flows > 1]
    assert (total.flows, total.packets_sent) == (500, 500)
    assert (total.destination, total.source_port, total.destination_port) == ("0.0.0.0", 0, 0)
    assert sum(row.flows for row in bench.told) == count
    assert bench.told_bytes() == bench.passed


def test_a_sum_does_not_wait_until_nothing_else_does() -> None:
    bench = Bench(2 * MAX_WAITING_FLOWS)
    for number in range(MAX_WAITING_FLOWS + 1):
        bench.send(flow_to(number))
    bench.table.remove(lambda flow: True, "lost", bench.now)
    bench.now += GATHER_NS
    assert bench.take() is not None
    assert bench.told[0].destination == "0.0.0.0"
    assert len(bench.told) == MAX_FLOWS


def test_beyond_all_sums_parts_are_counted_as_lost() -> None:
    reports = FlowReports(interval_ns=INTERVAL)
    header = parse(udp())
    assert header is not None
    flow = FlowTable(1).open(udp(), header, "a", 0)
    assert flow is not None
    flow.count_sent(1, 36)
    for number in range(MAX_WAITING_FLOWS + MAX_SUMS + 3):
        reports.add(flow, UUID(int=number), "idle", 0)
    assert len(reports) == MAX_WAITING_FLOWS + MAX_SUMS
    assert reports.counts.lost == 3


def test_an_agent_that_ends_tells_all_in_a_bounded_number_of_reports() -> None:
    count = MAX_WAITING_FLOWS
    bench = Bench(count)
    for number in range(count):
        bench.send(flow_to(number), "ab"[number % 2])
    bench.table.remove(lambda flow: True, "stopped", bench.now)
    reports = bench.reports.take_last(bench.now)
    assert len(reports) == MAX_LAST_REPORTS
    for report in reports:
        bench.told += report.flows
    assert bench.told_bytes() == bench.passed
    assert bench.reports.counts.lost == 0


def test_a_flow_without_an_authorisation_is_counted_as_lost() -> None:
    reports = FlowReports(interval_ns=INTERVAL)
    flow = Flow(key=(17, b"", 0, b"", 0), tag="a", expires_ns=SECOND, began_ns=0)
    reports.add(flow, None, "idle", 0)
    assert reports.counts.lost == 0
    flow.count_sent(1, 1)
    reports.add(flow, None, "idle", 0)
    assert reports.counts.lost == 1
    assert reports.poll_timeout() is None


# --- the sweep -----------------------------------------------------------------------------------


def test_the_sweep_looks_at_all_flows_of_all_tables_a_slice_at_a_time() -> None:
    ended: list[Flow] = []
    tables = [FlowTable(4_000, on_part=lambda flow, ending, now: ended.append(flow))
              for _ in range(3)]  # fmt: skip
    for table in tables:
        for number in range(3_000):
            packet = flow_to(number)
            header = parse(packet)
            assert header is not None
            flow = table.open(packet, header, "a", 0)
            assert flow is not None
            flow.count_sent(1, 1)
    sweep = FlowSweep(lambda: tables, 0)
    now, most = 100 * SECOND, 0
    for _ in range(10):
        before = len(ended)
        sweep.handle_timeout(now)
        most = max(most, len(ended) - before)
        now = sweep.poll_timeout()
    assert len(ended) == len(set(map(id, ended))) == 9_000
    assert most <= flow_reports.SWEEP_FLOWS
    assert not any(map(len, tables))


# --- whatever happens ----------------------------------------------------------------------------

PACKETS = st.sampled_from(
    [tcp(SYN), tcp(ACK, data=b"x" * 9), tcp(FIN_ACK), tcp(4), udp(), udp(ports=(1, 53)), echo(8)]
)
BACK = st.sampled_from(
    [answer(), answer(ports=(53, 1)), echo(0, source="10.0.0.5", destination="100.64.0.1")]
    + [
        tcp(flags, source="10.0.0.5", destination="100.64.0.1", ports=(80, 40_000), data=b"abc")
        for flags in (18, ACK, FIN_ACK, 4)
    ]
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), PACKETS, st.sampled_from("ab")),
        st.tuples(st.just("receive"), BACK, st.just("")),
        st.tuples(st.just("wait"), st.sampled_from([0.1, 3, 31, 61, 301, 7_500]), st.just("")),
        st.tuples(st.just("away"), st.sampled_from([3, 61, 7_500]), st.just("")),
        st.tuples(st.sampled_from(["remove", "cut", "refused"]), st.none(), st.sampled_from("ab")),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(STEPS, st.integers(1, 4))
def test_each_byte_that_passed_is_told_once_and_for_its_authorisation(
    steps: list[tuple[str, object, str]], limit: int
) -> None:
    bench = Bench(limit)
    number = 10
    for what, value, tag in steps:
        if what == "send":
            assert isinstance(value, bytes)
            bench.send(value, tag)
        elif what == "receive":
            assert isinstance(value, bytes)
            bench.receive(value)
        elif what == "wait":
            assert isinstance(value, int | float)
            bench.run(value)
        elif what == "away":
            assert isinstance(value, int)
            bench.now += value * SECOND
            bench.sweep.handle_timeout(bench.now)
        elif what == "refused":
            bench.reports.put_back(bench.reports.take(bench.now), bench.now)
        else:
            if what == "remove":
                bench.table.remove(lambda flow, tag=tag: flow.tag == tag, "revoked", bench.now)  # type: ignore[misc]
            bench.table.cut(tag, bench.now)
            number += 1
            bench.by[tag] = UUID(int=number)
    bench.finish()
    assert +bench.told_bytes() == bench.passed
    assert bench.reports.counts.lost == 0
    assert all(row.began_ns_ago >= row.ended_ns_ago >= 0 for row in bench.told)
