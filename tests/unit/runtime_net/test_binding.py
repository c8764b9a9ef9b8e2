"""What an operator is told when an address cannot be listened on."""

from __future__ import annotations

import errno

import pytest

from runtime.net.address import Address
from runtime.net.binding import CannotListen, binding
from runtime.net.udp import UdpSocket


def test_a_port_that_is_taken_is_named_with_its_setting() -> None:
    with UdpSocket.bind(Address("127.0.0.1", 0)) as first:
        taken = first.local_address
        with pytest.raises(CannotListen) as said, binding("listen", taken):
            UdpSocket.bind(taken)
    assert str(said.value).startswith(f"listen: cannot listen on {taken}: Address already in use (")
    assert said.value.errno == errno.EADDRINUSE


def test_an_address_of_another_machine_and_no_address_at_all_are_told_apart() -> None:
    with pytest.raises(CannotListen, match="no such address"), binding("listen", "192.0.2.1:1"):
        UdpSocket.bind(Address("192.0.2.1", 1))
    with pytest.raises(CannotListen, match="listen: 'x' does not"), binding("listen", "x"):
        Address.of("x", 1)
