"""TCP under trio where its own helpers are not enough: one socket for both families, and dialling
with a mark or from a given address."""

from __future__ import annotations

import socket
from ipaddress import IPv6Address, ip_address
from typing import Final

import trio

from runtime.net.address import Address

BACKLOG: Final = 256
_IP_BIND_ADDRESS_NO_PORT: Final = 24


def listening_socket(
    listen: Address, *, ipv6_only: bool = False, reuse_port: bool = False
) -> socket.socket:
    """A socket that listens at `listen`; `::` is every address, of IPv4 too unless `ipv6_only`.
    With `reuse_port` it is one of several there. Raises OSError."""
    listening = socket.socket(listen.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if reuse_port:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if listen.family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(ipv6_only))
        listening.bind((listen.host, listen.port))
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening


async def connect_tcp(
    remote: Address, *, mark: int | None = None, source: str | None = None
) -> trio.SocketStream:
    """Connect to an address. `mark` is the socket's SO_MARK, `source` the address of this machine
    to dial from, if it is not the kernel's to choose. Raises OSError."""
    dialling = trio.socket.socket(remote.family, socket.SOCK_STREAM)
    try:
        if mark is not None:
            dialling.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        if source is not None:
            dialling.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            await dialling.bind((source, 0))
        await dialling.connect((remote.host, remote.port))
    except BaseException:
        dialling.close()
        raise
    return trio.SocketStream(dialling)


def peer_of(stream: trio.SocketStream) -> Address:
    """Who is at the other end, IPv4 under its plain address. Raises OSError when nobody is any
    more."""
    host, port = stream.socket.getpeername()[:2]
    ip = ip_address(host.partition("%")[0])
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return Address(str(ip), port)


def route_to(remote: Address, mark: int | None) -> str:
    """The address of this machine from which the kernel would send there. Sends nothing. Raises
    OSError where there is no route."""
    with socket.socket(remote.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        if mark is not None:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        probe.connect(remote)
        return str(probe.getsockname()[0])


def has_address(host: str) -> bool:
    """Whether this machine has that address now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True
