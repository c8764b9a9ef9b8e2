"""Where a node takes agents by WebSocket, and how many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs
import trio

from channel.listener import ChannelLimits
from channel.websocket_listener import WebSocketDoor
from portal.authority import ServerCertificate
from portal.doors import Door
from portal.settings import Places, PortalSettings
from runtime.descriptors import raise_file_limit
from runtime.net.address import Address

OTHER_DESCRIPTORS: Final = 512
"""For files, databases, links with other nodes and the rest."""
LEAST_WEBSOCKETS: Final = 64


async def admit_websockets(
    nursery: trio.Nursery,
    websockets: WebSocketDoor,
    api: Door,
    places: Places,
    port: int,
    certificate: ServerCertificate,
) -> list[Callable[[], None]]:
    """Have agents come to `websockets` as the settings say: at the channel's host and this port of
    its (which those of a channel at any port do not know), or through the API's door. What is to be
    called once the certificate's files hold another one. Raises CannotListen."""
    renewals: list[Callable[[], None]] = [api.renew]
    if places.websocket == "api":
        api.channels = websockets
    elif places.websocket == "own":
        listen = Address(places.listen.host, port)
        files = certificate.chain_file, certificate.key_file
        renewals.append(await nursery.start(websockets.serve, listen, *files))
    return renewals


def channel_limits(settings: PortalSettings) -> ChannelLimits:
    """What agents are allowed. By WebSocket each takes a file descriptor of the process: where it
    may not have enough of them fewer agents come in, so that something is left for all else."""
    limits = ChannelLimits()
    websocket = limits.websocket
    others = settings.api_connections + websocket.max_handshakes + OTHER_DESCRIPTORS
    room = raise_file_limit(websocket.max_connections + others) - others
    most = max(LEAST_WEBSOCKETS, min(websocket.max_connections, room))
    return attrs.evolve(limits, websocket=attrs.evolve(websocket, max_connections=most))
