"""Writes small databases in MaxMind's format (MaxMind DB, version 2.0), for tests.

The format is public: a binary search tree of nodes with two records, a data section of typed
fields, and the metadata at the end after a marker.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

_MARKER = b"\xab\xcd\xefMaxMind.com"
_SEPARATOR = bytes(16)
_STRING, _UINT16, _UINT32, _MAP, _UINT64, _ARRAY = 2, 5, 6, 7, 9, 11

_Node = list[Any]
"""Two records: None, another node, or an offset into the data section."""


def database(
    countries: Mapping[str, object],
    *,
    ip_version: int = 6,
    kind: str = "Test-Country",
    built_at: int = 1_700_000_000,
) -> bytes:
    """A database that gives each network its record: a country code, or any record as it is.

    In a database of IPv6, IPv4 networks lie at ::/96, where readers look for them.
    """
    data = bytearray()
    root: _Node = [None, None]
    for text, value in countries.items():
        record = {"country": {"iso_code": value}} if isinstance(value, str) else value
        offset = len(data)
        data += _encoded(record)
        _insert(root, ip_network(text), ip_version, offset)
    nodes = _numbered(root)
    tree = b"".join(
        b"".join(_record(side, nodes).to_bytes(4, "big") for side in node)
        for node in nodes.values()
    )
    metadata = {
        "binary_format_major_version": (_UINT16, 2),
        "binary_format_minor_version": (_UINT16, 0),
        "build_epoch": (_UINT64, built_at),
        "database_type": kind,
        "description": {"en": "made for a test"},
        "ip_version": (_UINT16, ip_version),
        "languages": ["en"],
        "node_count": (_UINT32, len(nodes)),
        "record_size": (_UINT16, 32),
    }
    return tree + _SEPARATOR + bytes(data) + _MARKER + _encoded(metadata)


def _insert(root: _Node, network: IPv4Network | IPv6Network, version: int, offset: int) -> None:
    bits = f"{int(network.network_address):0{network.max_prefixlen}b}"[: network.prefixlen]
    if version == 6 and network.version == 4:
        bits = "0" * 96 + bits
    node = root
    for bit in bits[:-1]:
        side = int(bit)
        if node[side] is None:
            node[side] = [None, None]
        node = node[side]
    node[int(bits[-1])] = offset


class _Nodes(dict[int, _Node]):
    """Nodes by their identity, in the order of their numbers."""

    numbers: dict[int, int]


def _numbered(root: _Node) -> _Nodes:
    nodes = _Nodes()
    waiting = [root]
    while waiting:
        node = waiting.pop(0)
        nodes[id(node)] = node
        waiting += [side for side in node if isinstance(side, list)]
    nodes.numbers = {key: number for number, key in enumerate(nodes)}
    return nodes


def _record(side: Any, nodes: _Nodes) -> int:
    if side is None:
        return len(nodes)
    if isinstance(side, list):
        return nodes.numbers[id(side)]
    return len(nodes) + len(_SEPARATOR) + int(side)


def _encoded(value: object) -> bytes:
    match value:
        case str():
            text = value.encode()
            return _control(_STRING, len(text)) + text
        case dict():
            parts = (_encoded(key) + _encoded(each) for key, each in value.items())
            return _control(_MAP, len(value)) + b"".join(parts)
        case list():
            return _control(_ARRAY, len(value)) + b"".join(map(_encoded, value))
        case (int(kind), int(number)):
            digits = number.to_bytes((number.bit_length() + 7) // 8, "big")
            return _control(kind, len(digits)) + digits
        case _:
            raise TypeError(f"{value!r} has no place in these databases")


def _control(kind: int, size: int) -> bytes:
    assert size < 29, "longer fields have another form"
    if kind < 8:
        return bytes([kind << 5 | size])
    return bytes([size, kind - 7])
