"""Which IP addresses this machine (this network namespace) has, as Linux tells it."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

_IPV4_TABLE = Path("/proc/net/fib_trie")
_IPV6_TABLE = Path("/proc/net/if_inet6")


def local_addresses() -> frozenset[str]:
    """All IPv4 and IPv6 addresses of this machine in canonical text, loopback included.

    A family that the kernel does not have contributes none.
    """
    return frozenset(_ipv4_addresses() | _ipv6_addresses())


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
