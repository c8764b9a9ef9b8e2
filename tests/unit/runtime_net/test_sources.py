"""Whom connections count against."""

from __future__ import annotations

import pytest

from runtime.net.sources import SourceLimit, source_of


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:0:0:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
    ],
)
def test_an_ipv4_address_is_a_source_and_an_ipv6_network_of_64_bits(
    one: str, other: str, same: bool
) -> None:
    assert (source_of(one) == source_of(other)) is same


def test_places_are_bounded_in_all_and_for_each_source_and_come_back() -> None:
    places = SourceLimit(3, 2)
    assert [places.enter(source) for source in "aaabb"] == [True, True, False, True, False]
    assert len(places) == 3
    places.leave("a")
    assert places.enter("b")
    assert not places.enter("b")
    for source in "abb":
        places.leave(source)
    assert len(places) == 0
