"""Addresses: one text form each, and nothing that is not one."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.net.address import Address, join_host_port, split_host_port


@given(
    st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)),
    st.integers(min_value=0, max_value=65_535),
)
def test_every_address_comes_back_from_its_text(ip: IPv4Address | IPv6Address, port: int) -> None:
    address = Address.of(str(ip), port)
    assert Address.parse(str(address)) == address
    assert address.family == (socket.AF_INET if ip.version == 4 else socket.AF_INET6)


def test_two_spellings_of_a_place_are_one_address() -> None:
    assert Address.of("2001:DB8:0:0::1", 80) == Address.parse("[2001:db8::1]:80")


def test_a_name_is_split_but_is_no_address() -> None:
    assert split_host_port("portal.example.com:443") == ("portal.example.com", 443)
    assert split_host_port("portal.example.com", 443) == ("portal.example.com", 443)
    assert split_host_port("[::1]", 443) == ("::1", 443)
    assert join_host_port("portal.example.com", 443) == "portal.example.com:443"
    with pytest.raises(ValueError, match="does not appear"):
        Address.parse("portal.example.com:443")


@pytest.mark.parametrize(
    "text",
    ["", ":", ":80", "a:", "a:b", "a:-1", "a:65536", "a:0x10", "a:٣", "::1:80", "[::1", "[a]:1",
     "[::1]80", "a b:1", "a\n:1", "x" * 254 + ":1", "a:123456", "[fe80::1%eth0]:1"],
)  # fmt: skip
def test_what_is_no_address_is_refused_as_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Address.parse(text)


@given(st.text(max_size=300))
def test_no_text_raises_anything_but_value_error(text: str) -> None:
    try:
        host, port = split_host_port(text)
    except ValueError:
        return
    assert split_host_port(join_host_port(host, port)) == (host, port)
