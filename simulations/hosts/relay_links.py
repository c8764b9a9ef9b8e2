"""Connections to relays in the world: what `tunnel.shell.links` and `relays.transports` do on trio.

TURN over TLS, TCP and QUIC goes over the world's streams. Certificates are left out, as for every
stream there; over QUIC data arrives in order too, which real DATAGRAM frames need not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from channel.binding import BindingProbe
from channel.messages import SocketAddress
from relays.framing import FramingError, StreamFrames, padding_of
from relays.server import Server
from runtime.net.address import Address
from simulations.net.streams import Protocol, Stream
from simulations.net.world import Host
from tunnel.engine import Engine, OpenLink
from tunnel.ice.links import LinkTransport

DOOR_PORT: Final = 443
DOORS: Final[tuple[LinkTransport, ...]] = ("quic", "tls")
PIN: Final = "5e" * 32
_PROTOCOL: Final[dict[str, Protocol]] = {"quic": "udp", "tls": "tcp", "tcp": "tcp"}


def protocol_of(address: SocketAddress) -> Protocol:
    """What a firewall sees of a connection to a relay's door."""
    return _PROTOCOL[address.transport]


class AgentLinks:
    """The links of one agent. `touched` is called after whatever came."""

    def __init__(
        self, host: Host, engine: Engine, now: Callable[[], int], touched: Callable[[], None]
    ) -> None:
        self._host = host
        self._engine = engine
        self._now = now
        self._touched = touched
        self._streams: dict[int, Stream] = {}

    def flush(self) -> None:
        """Send what the engine has for its links, and do with them what it says."""
        for link, message in self._engine.drain_link_messages():
            if link in self._streams:
                self._streams[link].send(message + padding_of(message))
        for command in self._engine.drain_link_commands():
            if isinstance(command, OpenLink):
                self._open(command)
            else:
                stream = self._streams.pop(command.link, None)
                if stream is not None:
                    stream.close(0, "not needed")

    def _open(self, command: OpenLink) -> None:
        link = command.link
        frames = StreamFrames()

        def opened() -> None:
            if link in self._streams:
                self._engine.link_opened(link, self._now())
                self._touched()

        def received(data: bytes) -> None:
            if link in self._streams:
                messages = [bytes(message) for message in frames.feed(data)]
                self._engine.receive_from_link(link, messages, self._now())
                self._touched()

        def closed(code: int, reason: str) -> None:
            if self._streams.pop(link, None) is not None:
                self._engine.link_closed(link, self._now())
                self._touched()

        self._streams[link] = self._host.connect(
            command.address,
            protocol=_PROTOCOL[command.transport],
            opened=opened,
            received=received,
            closed=closed,
        )


class RelayDoors:
    """A relay's listener for connections, which is `number` in `server`."""

    def __init__(
        self,
        host: Host,
        server: Server,
        number: int,
        now: Callable[[], int],
        touched: Callable[[], None],
    ) -> None:
        self._host = host
        self._server = server
        self._number = number
        self._now = now
        self._touched = touched
        self._streams: dict[tuple[str, int], Stream] = {}
        server.add_listener(number, reliable=True)
        host.listen(DOOR_PORT, self._accept)

    def send(self, data: bytes, client: tuple[str, int]) -> None:
        """A message for whoever is connected as `client`."""
        stream = self._streams.get(client)
        if stream is not None:
            stream.send(data + padding_of(data))

    def close(self) -> None:
        """The process ends: so do its connections."""
        self._host.stop_listening(DOOR_PORT)
        for stream in self._streams.values():
            stream.close(0, "ended")
        self._streams.clear()

    def _accept(self, stream: Stream) -> None:
        client = (stream.remote.host, stream.remote.port)
        self._streams[client] = stream
        stream.received = partial(self._received, stream, client, StreamFrames())
        stream.closed = partial(self._closed, stream, client)

    def _received(
        self, stream: Stream, client: tuple[str, int], frames: StreamFrames, data: bytes
    ) -> None:
        try:
            messages = frames.feed(data)
        except FramingError as error:
            stream.close(1, str(error))
            self._closed(stream, client, 1, "")
            return
        for message in messages:
            self._server.receive(self._number, message, client, self._now())
        self._touched()

    def _closed(self, stream: Stream, client: tuple[str, int], code: int, reason: str) -> None:
        if self._streams.get(client) is stream:
            del self._streams[client]
            self._server.client_gone(self._number, client)
            self._touched()


def ask_over_stream(
    host: Host, target: Address, protocol: Protocol, probe: BindingProbe, answers: list[bool]
) -> Stream:
    """Ask a relay's door by one Binding request; when it is answered, `answers` says so."""
    frames = StreamFrames()

    def opened() -> None:
        stream.send(probe.request)

    def received(data: bytes) -> None:
        if any(probe.answer(bytes(message)) is not None for message in frames.feed(data)):
            answers.append(True)

    stream = host.connect(
        target, protocol=protocol, opened=opened, received=received, closed=lambda *_: None
    )
    return stream
