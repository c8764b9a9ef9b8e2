"""Prefix tables against a model that compares every network."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from channel.prefixes import Network, PrefixTable

# Few distinct bits, so that networks nest and addresses hit.
ADDRESSES_4 = st.integers(0, 15).map(lambda n: IPv4Address(n << 28 | n))
ADDRESSES_6 = st.integers(0, 15).map(lambda n: IPv6Address(n << 124 | n))
NETWORKS: st.SearchStrategy[Network] = st.one_of(
    st.tuples(ADDRESSES_4, st.sampled_from([0, 1, 2, 3, 4, 30, 32])).map(
        lambda pair: IPv4Network(pair, strict=False)
    ),
    st.tuples(ADDRESSES_6, st.sampled_from([0, 1, 2, 3, 4, 126, 128])).map(
        lambda pair: IPv6Network(pair, strict=False)
    ),
)


@given(
    st.lists(st.tuples(NETWORKS, st.none() | st.integers(1, 1000)), max_size=30),
    st.lists(ADDRESSES_4 | ADDRESSES_6, max_size=10),
)
def test_a_lookup_finds_the_longest_prefix_after_any_history(
    steps: list[tuple[Network, int | None]], addresses: list[IPv4Address | IPv6Address]
) -> None:
    table: PrefixTable[int] = PrefixTable()
    model: dict[Network, int] = {}
    for network, value in steps:
        if value is not None:
            table.insert(network, value)
            model[network] = value
        elif network in model:
            assert table.remove(network) == model.pop(network)
        else:
            with pytest.raises(KeyError):
                table.remove(network)
    assert dict(table.items()) == model
    assert len(table) == len(model)
    for network, _ in steps:
        assert table.get(network) == model.get(network)
        assert (network in table) == (network in model)
    for address in addresses:
        holding = [one for one in model if one.version == address.version and address in one]
        longest = max(holding, key=lambda one: one.prefixlen, default=None)
        expected = None if longest is None else model[longest]
        assert table.lookup(address) == expected
        assert table.lookup(str(address)) == expected
        assert table.lookup(address.packed) == expected
        assert table.match(address) == (None if longest is None else (longest, expected))


def test_text_serves_as_a_network_and_the_default_routes_stay_apart() -> None:
    table: PrefixTable[str] = PrefixTable()
    table.insert("0.0.0.0/0", "four")
    table.insert("::/0", "six")
    table.insert("10.0.0.0/8", "ten")
    assert table.lookup("10.1.2.3") == "ten"
    assert table.lookup("192.0.2.1") == "four"
    assert table.lookup("::ffff:10.1.2.3") == "six"
    assert table.remove("10.0.0.0/8") == "ten"
    assert table.lookup("10.1.2.3") == "four"


def test_what_is_no_address_or_network_is_a_value_error() -> None:
    table: PrefixTable[str] = PrefixTable()
    for address in (b"", b"12345", "name", ""):
        with pytest.raises(ValueError, match=r".+"):
            table.lookup(address)
    for network in ("10.0.0.1/8", "ten"):
        with pytest.raises(ValueError, match=r".+"):
            table.insert(network, "x")
    assert "10.0.0.0/8" not in table
