"""Whether the ports of all nodes of one command are free, before anything of them is started.

Each node would find out by itself, but only when a database and a Ray are up, and in a log of its
own. What is free now may be taken a moment later; then it is the node that says so.
"""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack
from typing import Final

from portal.settings import PortalSettings, SettingsError, check, of_node
from runtime.net.address import Address
from runtime.net.binding import CannotListen, binding
from runtime.net.udp import UdpSocket

_PORTS: Final = (
    ("listen", "UDP"),
    ("api_listen", "TCP"),
    ("listen", "TCP"),
    ("observability", "TCP"),
    ("link_listen", "TCP"),
)


def check_ports(settings: PortalSettings) -> None:
    """Bind every port of every node once, and let go of all. Raises CannotListen for the first that
    cannot be bound, and SettingsError where two of them are one; both name flag, node and port."""
    taken: dict[tuple[str, int], str] = {}
    with ExitStack() as bound:
        for number in range(1, settings.nodes + 1):
            node = of_node(settings, number)
            own_door = check(node).websocket == "own"
            for setting, transport in _PORTS:
                if (setting, transport) == ("listen", "TCP") and not own_door:
                    continue
                text = getattr(node, setting)
                if not text or not (address := Address.parse(text)).port:
                    continue
                who = f"--{setting.replace('_', '-')} of {node.node}"
                key = (transport, address.port)
                try:
                    with binding(who, f"{address} ({transport})"):
                        bound.enter_context(_bind(address, setting, transport))
                except CannotListen as error:
                    if error.errno == errno.EADDRINUSE and key in taken:
                        raise SettingsError(
                            f"{who}: {address} ({transport}) is the port of {taken[key]} too:"
                            " set them further apart"
                        ) from None
                    raise
                taken.setdefault(key, who)


def _bind(address: Address, setting: str, transport: str) -> socket.socket | UdpSocket:
    """As the node will."""
    if transport == "UDP":
        return UdpSocket.bind(address, dual_stack=True)
    listening = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.family == socket.AF_INET6:
            only = setting not in ("listen", "api_listen")
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        listening.bind((address.host, address.port))
        listening.listen()  # two may bind a port that SO_REUSEADDR is set for, one may listen
    except BaseException:
        listening.close()
        raise
    return listening
