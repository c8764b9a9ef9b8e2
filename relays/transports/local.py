"""Which IP addresses this machine (this network namespace) has, as Linux tells it."""

from __future__ import annotations

import ctypes
import fcntl
import socket
from ipaddress import ip_address
from pathlib import Path
from struct import pack, unpack_from
from typing import Final

_IPV4_TABLE = Path("/proc/net/fib_trie")
_IPV6_TABLE = Path("/proc/net/if_inet6")
_SIOCGIFCONF: Final = 0x8912
_ENTRY_BYTES: Final = 40
_MAX_ENTRIES: Final = 1024


def local_addresses() -> frozenset[str]:
    """All IPv4 and IPv6 addresses of this machine in canonical text, loopback included.

    A family that the kernel does not have contributes none.
    """
    return frozenset(_ipv4_addresses() | _ipv6_addresses())


def outer_addresses(family: int) -> frozenset[str]:
    """Those of a family (1: IPv4, 2: IPv6) at which others may reach this machine."""
    wanted = [ip_address(text) for text in local_addresses() if (":" in text) == (family == 2)]
    return frozenset(str(one) for one in wanted if not one.is_loopback and not one.is_link_local)


def _ipv4_addresses() -> set[str]:
    found = set()
    candidate = ""
    for line in _lines(_IPV4_TABLE):
        text = line.strip()
        if text.startswith("|-- "):
            candidate = text[4:]
        elif text == "/32 host LOCAL":
            found.add(candidate)
    return found


def _ipv6_addresses() -> set[str]:
    addresses = (line.split()[0] for line in _lines(_IPV6_TABLE) if line.strip())
    return {str(ip_address(bytes.fromhex(text))) for text in addresses}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def device_by_address() -> dict[str, str]:
    """Which network device has an address (canonical text), link-local ones left out."""
    found: dict[str, str] = {}
    for line in _lines(_IPV6_TABLE):
        words = line.split()
        ipv6 = ip_address(bytes.fromhex(words[0]))
        if not ipv6.is_link_local:
            found[str(ipv6)] = words[5]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for label, ipv4 in _ipv4_configuration(asking):
            found[ipv4] = label.partition(":")[0]
    return found


def _ipv4_configuration(asking: socket.socket) -> list[tuple[str, str]]:
    """Labels (a device's name, or that of an alias: `eth0:1`) and addresses: SIOCGIFCONF of
    netdevice(7), up to 1024."""
    room = ctypes.create_string_buffer(_MAX_ENTRIES * _ENTRY_BYTES)
    request = pack("iP", len(room), ctypes.addressof(room))
    [size] = unpack_from("i", fcntl.ioctl(asking, _SIOCGIFCONF, request))
    entries = [room.raw[at : at + _ENTRY_BYTES] for at in range(0, size, _ENTRY_BYTES)]
    return [
        (entry[:16].partition(b"\0")[0].decode(), socket.inet_ntoa(entry[20:24]))
        for entry in entries
    ]
