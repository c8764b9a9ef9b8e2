"""`Address`: an IP address and a port, in one text form for each.

Two addresses are equal exactly when they name the same place, so an `Address` may be a key of a
dictionary. It is a tuple, so the socket functions take it as it is.
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address
from socket import AF_INET, AF_INET6, AddressFamily
from typing import NamedTuple

MAX_PORT = 65_535
MAX_HOST_CHARACTERS = 253


class Address(NamedTuple):
    """An IP address (canonical text, no scope id) and a port (0 to 65535, 0 means "any").

    The constructor checks nothing, since it stands on hot paths: addresses from outside go
    through `Address.of` or `Address.parse`.
    """

    host: str
    port: int

    @classmethod
    def of(cls, host: str, port: int) -> Address:
        """A checked address, its host brought into canonical form. Raises ValueError."""
        if not 0 <= port <= MAX_PORT:
            raise ValueError(f"port {port} is not in 0..{MAX_PORT}")
        ip = ip_address(host)
        if isinstance(ip, IPv6Address) and ip.scope_id is not None:
            raise ValueError("an address with a scope id means nothing to another machine")
        return cls(str(ip), port)

    @classmethod
    def parse(cls, text: str) -> Address:
        """From `192.0.2.1:80` or `[2001:db8::1]:80`. Raises ValueError, for a name too."""
        return cls.of(*split_host_port(text))

    @property
    def family(self) -> AddressFamily:
        """AF_INET or AF_INET6."""
        return AF_INET6 if ":" in self.host else AF_INET

    def __str__(self) -> str:
        return join_host_port(self.host, self.port)


def split_host_port(text: str, default_port: int | None = None) -> tuple[str, int]:
    """Split `name:port`, `192.0.2.1:port` or `[2001:db8::1]:port`; the host is not resolved.

    Without a port, `default_port` is taken where it is given. Raises ValueError.
    """
    host, port_text = _split(text.strip())
    if not host or len(host) > MAX_HOST_CHARACTERS or any(c <= " " or c > "~" for c in host):
        raise ValueError(f"no host in {text[:80]!r}")
    if port_text is None:
        if default_port is None:
            raise ValueError(f"no port in {text[:80]!r}")
        return host, default_port
    if not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5):
        raise ValueError(f"no port in {text[:80]!r}")
    port = int(port_text)
    if port > MAX_PORT:
        raise ValueError(f"port {port} is not in 0..{MAX_PORT}")
    return host, port


def join_host_port(host: str, port: int) -> str:
    """The inverse of `split_host_port`: an IPv6 address is put into brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _split(text: str) -> tuple[str, str | None]:
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or ":" not in host or (rest and not rest.startswith(":")):
            raise ValueError(f"not an address: {text[:80]!r}")
        return host, rest[1:] if rest else None
    host, colon, port = text.rpartition(":")
    if not colon:
        return text, None
    if ":" in host:
        raise ValueError(f"an IPv6 address goes into brackets: {text[:80]!r}")
    return host, port
