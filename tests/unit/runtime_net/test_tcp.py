"""What is asked of the kernel about addresses and routes."""

from __future__ import annotations

import pytest

from runtime.net.address import Address
from runtime.net.tcp import has_address, route_to


def test_a_machine_knows_its_own_addresses() -> None:
    assert has_address("127.0.0.1")
    assert has_address("127.0.0.2")
    assert not has_address("192.0.2.1")
    assert not has_address("2001:db8::1")


def test_a_route_has_an_address_at_its_beginning_or_there_is_none() -> None:
    assert route_to(Address("127.0.0.1", 1), None) == "127.0.0.1"
    with pytest.raises(OSError, match=r"."):
        route_to(Address("255.255.255.255", 1), None)
