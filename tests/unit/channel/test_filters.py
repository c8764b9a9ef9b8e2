"""Filters against a model that looks at each one in turn."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from channel.filters import ICMP, ICMPV6, TCP, UDP, compile_filters
from channel.messages import Filter

PORTS = st.integers(0, 65_535)
FILTERS = st.lists(
    st.builds(
        Filter,
        protocol=st.sampled_from(["tcp", "udp", "icmp"]),
        port_start=PORTS,
        port_end=PORTS,
    ),
    max_size=8,
)
NUMBERS = {"tcp": {TCP}, "udp": {UDP}, "icmp": {ICMP, ICMPV6}}


def allowed_by_one(one: Filter, protocol: int, port: int) -> bool:
    if protocol not in NUMBERS[one.protocol] or one.port_start > one.port_end:
        return False
    return one.protocol == "icmp" or one.port_start <= port <= one.port_end


@given(FILTERS, st.sampled_from([TCP, UDP, ICMP, ICMPV6, 47]), PORTS)
def test_a_packet_passes_exactly_when_some_filter_lets_it(
    filters: list[Filter], protocol: int, port: int
) -> None:
    expected = not filters or any(allowed_by_one(one, protocol, port) for one in filters)
    assert compile_filters(tuple(filters)).allows(protocol, port) == expected


@given(FILTERS)
def test_edges_of_ranges_are_inside(filters: list[Filter]) -> None:
    compiled = compile_filters(filters)
    for one in filters:
        if one.protocol != "icmp" and one.port_start <= one.port_end:
            (protocol,) = NUMBERS[one.protocol]
            assert compiled.allows(protocol, one.port_start)
            assert compiled.allows(protocol, one.port_end)


def test_no_filter_lets_everything_through_and_one_filter_nothing_else() -> None:
    assert compile_filters(()).allows(47, None)
    assert compile_filters(()).allows_everything
    web = compile_filters((Filter(protocol="tcp", port_start=443, port_end=443),))
    assert web.allows(TCP, 443)
    assert not web.allows(TCP, 80)
    assert not web.allows(UDP, 443)
    assert not web.allows(ICMP, 0)
    assert not web.allows_everything


def test_an_unreadable_port_passes_only_where_every_port_does() -> None:
    halves = (
        Filter(protocol="udp", port_start=0, port_end=999),
        Filter(protocol="udp", port_start=1000, port_end=65_535),
    )
    assert compile_filters(halves).allows(UDP, None)
    assert not compile_filters(halves[:1]).allows(UDP, None)


def test_filters_that_mean_the_same_compile_to_the_same() -> None:
    split = (
        Filter(protocol="tcp", port_start=5, port_end=9),
        Filter(protocol="tcp", port_start=1, port_end=4),
    )
    whole = (Filter(protocol="tcp", port_start=1, port_end=9),)
    assert compile_filters(split) == compile_filters(whole)
    assert compile_filters(split) != compile_filters(())
