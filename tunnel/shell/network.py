"""Which IP addresses this machine has, and word of it when that changes (Linux, rtnetlink)."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Collection
from ipaddress import IPv4Interface, IPv6Interface, ip_interface

import msgspec
import trio

from tunnel.shell.commands import CommandFailed, run_command

MAX_ADDRESSES = 16
# Several notices come for one change; they are taken as one.
SETTLE_S = 0.05
_RTMGRP_LINK = 0x1
_RTMGRP_IPV4_IFADDR, _RTMGRP_IPV4_ROUTE = 0x10, 0x40
_RTMGRP_IPV6_IFADDR, _RTMGRP_IPV6_ROUTE = 0x100, 0x400
_GROUPS = (
    _RTMGRP_LINK
    | _RTMGRP_IPV4_IFADDR
    | _RTMGRP_IPV4_ROUTE
    | _RTMGRP_IPV6_IFADDR
    | _RTMGRP_IPV6_ROUTE
)
_NETLINK_ROUTE = 0
_UNFIT_FLAGS = ("tentative", "dadfailed", "deprecated")

Interface = IPv4Interface | IPv6Interface


class _AddressInfo(msgspec.Struct):
    local: str = ""
    prefixlen: int = 0
    scope: str = ""
    tentative: bool = False
    dadfailed: bool = False
    deprecated: bool = False


class _Link(msgspec.Struct):
    ifname: str = ""
    flags: list[str] = []
    addr_info: list[_AddressInfo] = []


async def usable_addresses(without: Collection[str] = ()) -> list[Interface]:
    """The addresses, with their networks, from which a peer elsewhere can be reached.

    Left out are loopback, link-local and unfinished ones, interfaces that are down, and those
    named in `without` (TUN devices). At most 16, the system's order kept.
    Raises CommandFailed.
    """
    shown = await run_command(["ip", "-json", "address", "show", "up"])
    try:
        links = msgspec.json.decode(shown, type=list[_Link])
    except msgspec.MsgspecError as error:
        raise CommandFailed(f"`ip -json address` printed something else: {error}") from error
    found: list[Interface] = []
    for link in links:
        if link.ifname in without or "LOOPBACK" in link.flags:
            continue
        for info in link.addr_info:
            if info.scope != "global" or any(getattr(info, flag) for flag in _UNFIT_FLAGS):
                continue
            found.append(ip_interface(f"{info.local}/{info.prefixlen}"))
    return found[:MAX_ADDRESSES]


class NetworkMonitor:
    """Tells of changes of links, addresses and routes in this network namespace."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_ROUTE
        )
        self._socket.bind((0, _GROUPS))

    async def wait_for_change(self) -> None:
        """Return a moment after something changed; what followed within it counts as one."""
        await trio.lowlevel.wait_readable(self._socket)
        await trio.sleep(SETTLE_S)
        # ENOBUFS means that notices were lost: that something changed is all that matters.
        while True:
            with contextlib.suppress(OSError):
                self._socket.recv(65_536)
                continue
            return

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            trio.lowlevel.notify_closing(self._socket)
        self._socket.close()


def network_namespace() -> str:
    """A name of this process's network namespace, the same while the namespace lives."""
    return str(os.stat("/proc/self/ns/net").st_ino)
