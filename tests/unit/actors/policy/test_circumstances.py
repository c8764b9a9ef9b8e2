"""The classes of circumstances: no value is outside of them, and boxes are sets of classes."""

from __future__ import annotations

from datetime import timedelta
from functools import reduce
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Any

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.model import (
    ClientPostureCondition,
    Conditions,
    Fact,
    FactTest,
    RemoteIpCondition,
)
from actors.policy.circumstances import Circumstances, Space, Span, subtract
from actors.policy.snapshot import CompiledPolicy

from .. import reading
from .test_diff import circumstances
from .worlds import EVERYONE, T0, conditions, limits, policy

VERSIONS = ["0", "14", "14.0", "14.2", "14.2.0", "14.2.0.0", "14.2.1", "14.10", "15", "15.0.1"]
VALUES: list[Any] = [*VERSIONS, "", "jammy", "noble", ".", "14.", True, False, -1, 0, 1, 2, 5]
OPERATORS: Any = st.sampled_from(["is", "is_not", "at_least", "at_most"])


def compiled(number: int, **fields: Any) -> CompiledPolicy:
    return CompiledPolicy(policy(number, EVERYONE, **fields))


def told_apart(policies: list[CompiledPolicy], boxes: list[tuple[int, ...]]) -> set[Any]:
    """For each class of the last axis: which of the policies admit it."""
    width = max(box[-1].bit_length() for box in boxes)
    return {tuple(box[-1] >> place & 1 == 1 for box in boxes) for place in range(width + 1)}


@st.composite
def several_tests(draw: st.DrawFn) -> list[FactTest]:
    """Several tests of few values."""
    values = draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=2))
    test = st.builds(FactTest, name=st.just("x"), operator=OPERATORS, value=st.sampled_from(values))
    return draw(st.lists(test, min_size=1, max_size=5))


@settings(max_examples=300, deadline=None)
@given(several_tests())
def test_every_value_of_a_fact_is_in_a_class(tests: list[FactTest]) -> None:
    policies = [
        compiled(
            number,
            conditions=Conditions(client_posture=ClientPostureCondition(facts=(test,))),
        )
        for number, test in enumerate(tests)
    ]
    space = Space(policies, T0)
    classes = told_apart(policies, [space.box(each) for each in policies])
    for value in VALUES:
        admitted = tuple(
            reading.posture_holds(
                ClientPostureCondition(facts=(test,)), (Fact(name="x", value=value),)
            )
            for test in tests
        )
        assert admitted in classes


networks = st.one_of(
    st.builds(
        lambda value, length: str(ip_network((value, length), strict=False)),
        st.integers(0, 2**32 - 1),
        st.integers(0, 32),
    ),
    st.builds(
        lambda value, length: str(ip_network((IPv6Address(value), length), strict=False)),
        st.one_of(st.integers(0, 2**128 - 1), st.integers(0xFFFE_0000_0000, 2**50)),
        st.integers(0, 128),
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(networks, min_size=1, max_size=4), st.data())
def test_every_address_is_in_a_class(values: list[str], data: st.DataObject) -> None:
    asked = [RemoteIpCondition(operator="is_in", values=(value,)) for value in values]
    policies = [
        compiled(number, conditions=Conditions(remote_ip=each)) for number, each in enumerate(asked)
    ]
    space = Space(policies, T0)
    classes = told_apart(policies, [space.box(each) for each in policies])
    ends = [ip_network(value)[place] for value in values for place in (0, -1)]
    near = [
        type(end)(int(end) + step)
        for end in ends
        for step in (-1, 0, 1)
        if 0 <= int(end) + step < 2**end.max_prefixlen
    ]
    far = [
        IPv4Address(data.draw(st.integers(0, 2**32 - 1))),
        IPv6Address(data.draw(st.integers(0, 2**128 - 1))),
    ]
    for address in [*near, *far]:
        held = tuple(networks_hold(value, str(address)) for value in values)
        assert held in classes


def networks_hold(value: str, address: str) -> bool:
    """As read by hand: an IPv4-mapped address or network is one of IPv4."""
    network, parsed = ip_network(value), ip_address_of(address)
    if network.version == 6 and network.subnet_of(ip_network("::ffff:0:0/96")):
        low = int(network.network_address) & 0xFFFF_FFFF
        network = ip_network((low, network.prefixlen - 96))
    return parsed.version == network.version and parsed in network


def ip_address_of(text: str) -> IPv4Address | IPv6Address:
    parsed = IPv6Address(text) if ":" in text else IPv4Address(text)
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        return parsed.ipv4_mapped
    return parsed


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(conditions(), limits), min_size=1, max_size=4), st.data())
def test_what_is_left_of_a_box_is_what_it_admits_and_no_other_does(
    drawn: list[tuple[Conditions, Any]], data: st.DataObject
) -> None:
    policies = [
        compiled(number, conditions=each, expires_at=expires_at)
        for number, (each, expires_at) in enumerate(drawn)
    ]
    space = Space(policies, T0)
    first, *others = (space.box(each) for each in policies)
    left = subtract(first, others)
    assert left is not None
    for box in left:
        example = space.example(box)
        assert admits(policies[0], example)
        assert not any(admits(each, example) for each in policies[1:])
    spans = list(space.spans(left))
    quarters = st.integers(0, 8 * 96 - 1).map(lambda number: T0 + number * timedelta(minutes=15))
    for _ in range(10):
        some = data.draw(circumstances(quarters))
        if admits(policies[0], some) and not any(admits(each, some) for each in policies[1:]):
            assert any(holds(span, some) for span in spans)


def admits(compiled: CompiledPolicy, some: Circumstances) -> bool:
    expires_at = compiled.policy.expires_at
    if expires_at is not None and expires_at <= some.instant:
        return False
    return reading.conditions_hold(compiled.policy.conditions, some)


def holds(span: Span, some: Circumstances) -> bool:
    return span.start <= some.instant and (span.until is None or some.instant < span.until)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 7)] * 3), min_size=1, max_size=5))
def test_boxes_are_subtracted_as_sets(boxes: list[tuple[int, int, int]]) -> None:
    def cells(box: tuple[int, ...]) -> set[tuple[int, ...]]:
        sides = [[bit for bit in range(3) if side >> bit & 1] for side in box]
        return {(a, b, c) for a in sides[0] for b in sides[1] for c in sides[2]}

    left = subtract(boxes[0], boxes[1:])
    assert left is not None
    expected = reduce(lambda kept, box: kept - cells(box), boxes[1:], cells(boxes[0]))
    found = [cell for box in left for cell in cells(box)]
    assert set(found) == expected
    assert len(found) == len(expected)  # disjoint


def test_an_example_has_no_more_in_it_than_it_needs() -> None:
    policies = [compiled(0), compiled(1, conditions=Conditions(client_posture=None))]
    space = Space(policies, T0)
    assert space.example(space.box(policies[0])) == Circumstances(instant=T0)
    assert attrs.asdict(space.example(space.box(policies[1])))["posture"] == ()
