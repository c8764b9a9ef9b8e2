"""The NAT of the virtual world behaves as RFC 4787 names it, on every axis."""

from __future__ import annotations

import pytest

from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from simulations.nat import PORT_RESTRICTED, SYMMETRIC, Behaviour, Nat, NatBehaviour

INSIDE = Address("192.168.1.10", 40_000)
FIRST = Address("203.0.113.2", 3_478)
FIRST_OTHER_PORT = Address("203.0.113.2", 3_479)
SECOND = Address("203.0.113.6", 3_478)


def nat(behaviour: NatBehaviour) -> Nat:
    return Nat("198.51.100.2", behaviour, randomness=SeededRandomness(1, "nat"))


@pytest.mark.parametrize(
    ("mapping", "distinct"),
    [
        ("endpoint_independent", 1),
        ("address_dependent", 2),
        ("address_and_port_dependent", 3),
    ],
)
def test_the_mapping_depends_on_what_its_name_says(mapping: Behaviour, distinct: int) -> None:
    box = nat(NatBehaviour(mapping=mapping))
    seen = {box.outbound(INSIDE, peer, 0) for peer in (FIRST, FIRST_OTHER_PORT, SECOND)}
    assert len(seen) == distinct


@pytest.mark.parametrize(
    ("filtering", "admitted"),
    [
        ("endpoint_independent", [FIRST, FIRST_OTHER_PORT, SECOND]),
        ("address_dependent", [FIRST, FIRST_OTHER_PORT]),
        ("address_and_port_dependent", [FIRST]),
    ],
)
def test_the_filter_admits_whom_its_name_says(
    filtering: Behaviour, admitted: list[Address]
) -> None:
    box = nat(NatBehaviour(filtering=filtering))
    port = box.outbound(INSIDE, FIRST, 0).port
    for peer in (FIRST, FIRST_OTHER_PORT, SECOND):
        assert box.inbound(peer, port, 1) == (INSIDE if peer in admitted else None)


def test_an_easy_nat_preserves_the_port_and_a_symmetric_one_does_not() -> None:
    assert nat(PORT_RESTRICTED).outbound(INSIDE, FIRST, 0).port == INSIDE.port
    hard = nat(SYMMETRIC)
    assert hard.outbound(INSIDE, FIRST, 0) != hard.outbound(INSIDE, SECOND, 0)


def test_two_hosts_with_the_same_port_get_different_ones() -> None:
    box = nat(PORT_RESTRICTED)
    other = Address("192.168.1.11", INSIDE.port)
    assert box.outbound(INSIDE, FIRST, 0).port != box.outbound(other, FIRST, 0).port


def test_a_binding_ends_after_its_timeout_and_at_a_flush() -> None:
    box = nat(PORT_RESTRICTED)
    port = box.outbound(INSIDE, FIRST, 0).port
    assert box.inbound(FIRST, port, PORT_RESTRICTED.timeout_ns) == INSIDE
    assert box.inbound(FIRST, port, PORT_RESTRICTED.timeout_ns + 1) is None
    box.outbound(INSIDE, FIRST, PORT_RESTRICTED.timeout_ns + 2)
    assert box.inbound(FIRST, port, PORT_RESTRICTED.timeout_ns + 3) == INSIDE
    box.flush()
    assert box.inbound(FIRST, port, PORT_RESTRICTED.timeout_ns + 4) is None
