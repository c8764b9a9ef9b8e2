"""The table of flows: its limits, and what it forgets. Its rules are tried with the filters."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.clients.stage import ACK, SYN, answer, tcp, udp
from tunnel.deadlines import Deadlines
from tunnel.flows import FlowTable, opens_flow
from tunnel.packet import parse

SECOND = 10**9


def opened(table: FlowTable, packet: bytes, now: int = 0) -> bool:
    header = parse(packet)
    assert header is not None
    return table.open(packet, header, "tag", now) is not None


def test_a_full_table_takes_a_new_flow_only_in_the_place_of_an_expired_one() -> None:
    table = FlowTable(3)
    for port in range(3):
        assert opened(table, udp(ports=(port, 53)), 20 * SECOND)
    assert not opened(table, udp(ports=(9, 53)), 21 * SECOND)
    assert table.refused == 1
    assert opened(table, udp(ports=(9, 53)), 100 * SECOND)
    assert len(table) == 1


def test_a_table_that_keeps_packets_has_the_last_headers_of_tcp() -> None:
    table = FlowTable(3, keep_packets=True)
    assert opened(table, tcp(SYN))
    last = tcp(ACK, data=b"payload")
    header = parse(last)
    assert header is not None
    assert table.outbound(last, header, 0) is not None
    [flow] = table.remove(lambda flow: True, "stopped", 0)
    assert flow.last_packet == last[:40]
    assert len(table) == 0


def test_only_first_packets_open_flows() -> None:
    for packet, expected in ((tcp(SYN), True), (tcp(ACK), False), (udp(), True), (answer(), True)):
        header = parse(packet)
        assert header is not None
        assert opens_flow(packet, header) is expected


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.one_of(st.none(), st.integers(0, 50))), max_size=50
    ),
    st.integers(0, 60),
)
def test_deadlines_agree_with_a_dictionary(steps: list[tuple[str, int | None]], now: int) -> None:
    deadlines: Deadlines[str] = Deadlines()
    model: dict[str, int] = {}
    for key, at in steps:
        if at is None:
            deadlines.cancel(key)
            model.pop(key, None)
        else:
            deadlines.set(key, at)
            model[key] = at
        assert deadlines.next() == min(model.values(), default=None)
        assert len(deadlines) == len(model)
    due = deadlines.take_due(now)
    assert sorted(due) == sorted(key for key, at in model.items() if at <= now)
    assert [model[key] for key in due] == sorted(model[key] for key in due)
    assert deadlines.next() == min((at for at in model.values() if at > now), default=None)
