"""Hypothesis strategies for the messages of the channel, read from their own annotations."""

from __future__ import annotations

import types
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints
from uuid import UUID

import attrs
from hypothesis import strategies as st
from msgspec import Meta

from channel.messages import EVENT_BY_TYPE, PRINTABLE, DoorAddress, IpText
from runtime.net.address import join_host_port

MAX_ITEMS = 3
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(min_value=-(2**63), max_value=2**63 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    bytes: st.binary(max_size=40),
    UUID: st.uuids(),
    type(None): st.none(),
    IpText: st.ip_addresses().map(lambda ip: IpText(str(ip))),
    DoorAddress: st.builds(
        lambda host, port: DoorAddress(join_host_port(str(host), port)),
        st.ip_addresses() | st.from_regex(r"\A[a-z][a-z0-9]{0,9}(\.[a-z]{1,9}){0,3}\Z"),
        st.integers(1, 65_535),
    ),
    IPv4Address: st.ip_addresses(v=4),
    IPv6Address: st.ip_addresses(v=6),
    IPv4Network: st.tuples(st.ip_addresses(v=4), st.integers(0, 32)).map(
        lambda pair: IPv4Network(pair, strict=False)
    ),
    IPv6Network: st.tuples(st.ip_addresses(v=6), st.integers(0, 128)).map(
        lambda pair: IPv6Network(pair, strict=False)
    ),
}


def messages() -> st.SearchStrategy[Any]:
    """Any message of the channel, within its limits."""
    return st.sampled_from(sorted(EVENT_BY_TYPE, key=lambda one: one.__name__)).flatmap(of_type)


def of_type(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of a type as the messages use it."""
    if attrs.has(annotation):
        hints = get_type_hints(annotation, include_extras=True)
        return st.builds(annotation, **{name: of_type(hint) for name, hint in hints.items()})
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _limited(arguments[0], arguments[1])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(of_type, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(of_type(arguments[0]), max_size=MAX_ITEMS).map(tuple)
    if origin is tuple:
        return st.tuples(*map(of_type, arguments))
    return PLAIN[annotation]


def _limited(plain: Any, meta: Meta) -> st.SearchStrategy[Any]:
    if plain is int:
        return st.integers(
            min_value=-(2**63) if meta.ge is None else int(meta.ge),
            max_value=2**63 - 1 if meta.le is None else int(meta.le),
        )
    if plain is float:
        return st.floats(min_value=meta.ge, max_value=meta.le)
    if meta.pattern == PRINTABLE:
        characters = st.characters(exclude_categories=["Cs", "Cc"])
        return st.text(characters, min_size=meta.min_length or 0, max_size=20)
    if meta.pattern is not None:
        return st.from_regex(meta.pattern.replace("$", r"\Z"))
    low = meta.min_length or 0
    high = min(meta.max_length if meta.max_length is not None else low + 20, low + 20)
    if plain is bytes:
        return st.binary(min_size=low, max_size=high)
    if plain is str:
        return st.text(st.characters(exclude_categories=["Cs"]), min_size=low, max_size=high)
    return st.lists(of_type(get_args(plain)[0]), min_size=low, max_size=MAX_ITEMS).map(tuple)
