"""The links of a portal node to the others: the real `runtime.cluster.link` over streams.

What `runtime.cluster.links` is on trio, this is in the world: who dials when, and which of several
connections is the link. TLS is left out; the first chunk of a connection says who dials.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import attrs

from actors.wire import node_codec
from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.cluster.frames import LinkProtocolError
from runtime.cluster.leases import NodeRow
from runtime.cluster.link import (
    Choice,
    Hello,
    Link,
    LinkLost,
    LinkRefused,
    LinkSettings,
    LinkState,
    Unreachable,
    choose,
)
from runtime.net.address import Address, split_host_port
from runtime.randomness import SeededRandomness
from runtime.testing import heap_sleep
from simulations.net.streams import PORT_CLOSED, Stream

if TYPE_CHECKING:
    from simulations.hosts.portal import PortalNode

LINK_PORT: Final = 7_946
NAME: Final = 1
BODY: Final = 2
_HEAD: Final = 5
REFUSES_WITHIN_NS: Final = NS_PER_S
REFUSES_LOOK_NS: Final = 5 * NS_PER_MS


class Chunks:
    """Takes a stream of bytes apart into (kind, body)."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        data = self._rest + data
        place, chunks = 0, []
        while len(data) - place >= _HEAD:
            end = place + _HEAD + int.from_bytes(data[place + 1 : place + _HEAD], "big")
            if end > len(data):
                break
            chunks.append((data[place], data[place + _HEAD : end]))
            place = end
        self._rest = data[place:]
        return chunks


def chunk(kind: int, body: bytes) -> bytes:
    """One chunk, as it travels: its kind, the length of its body, its body."""
    return bytes((kind,)) + len(body).to_bytes(4, "big") + body


@attrs.define(eq=False)
class _Connection:
    """A stream to another node, and the link on it once its name is known."""

    stream: Stream
    expected: str | None
    chunks: Chunks = attrs.field(factory=Chunks)
    link: Link | None = None
    installed: bool = False
    is_over: bool = False


@attrs.define(eq=False)
class _Peer:
    address: Address
    backoff_ns: int
    dial_at: int
    dialling: _Connection | None = None


class NodeLinks:
    """The links of one node. `send` is the `Send` of its remote actors, `refuses` its `Refuses`."""

    def __init__(self, node: PortalNode, randomness: SeededRandomness) -> None:
        self._node = node
        self._randomness = randomness
        self._codec = node_codec()
        self._settings = LinkSettings()
        self._hello = Hello(node=node.name, incarnation=node.incarnation)
        self._rows: tuple[NodeRow, ...] = ()
        self._peers: dict[str, _Peer] = {}
        self._connections: dict[_Connection, None] = {}
        self._link_by_node: dict[str, _Connection] = {}

    def start(self) -> None:
        self._node.host.listen(LINK_PORT, self._accept)

    def kill(self) -> None:
        self._peers.clear()
        for connection in list(self._connections):
            connection.is_over = True
        self._connections.clear()
        self._link_by_node.clear()

    # --- for the node ----------------------------------------------------------------------------

    def send(self, node: str, target: int, message: object) -> None:
        """Queue a message. Raises Unreachable, Congested."""
        connection = self._link_by_node.get(node)
        if connection is None or connection.link is None:
            raise Unreachable(node, "there is no link")
        connection.link.enqueue(target, message)
        self._node.touched()

    async def refuses(self, address: str) -> bool:
        """Whether connections to `host:port` are refused, as `runtime.cluster.process` asks."""
        found: list[bool] = []
        stream = self._node.host.connect(
            Address(*split_host_port(address)),
            protocol="tcp",
            opened=lambda: found.append(False),
            received=lambda data: None,
            closed=lambda code, reason: found.append(code == PORT_CLOSED),
        )
        for _ in range(REFUSES_WITHIN_NS // REFUSES_LOOK_NS):
            if found:
                break
            await heap_sleep(REFUSES_LOOK_NS)
        stream.close(0, "examined")
        return bool(found) and found[0]

    def poll_timeout(self) -> int | None:
        due = [
            connection.link.poll_timeout()
            for connection in self._connections
            if connection.link is not None
        ]
        due += [
            peer.dial_at
            for name, peer in self._peers.items()
            if peer.dialling is None and name not in self._link_by_node
        ]
        return min((each for each in due if each is not None), default=None)

    def handle_timeout(self, now: int) -> None:
        for connection in list(self._connections):
            link = connection.link
            due = None if link is None else link.poll_timeout()
            if link is None or due is None or due > now:
                continue
            try:
                link.handle_timeout(now)
            except LinkLost as error:
                self._end(connection, str(error))
        for name, peer in list(self._peers.items()):
            if name not in self._link_by_node and peer.dialling is None and peer.dial_at <= now:
                self._dial(name, peer)

    def flush(self, now: int) -> None:
        """Follow the roster; put out what there is to send."""
        if self._node.tenure.rows is not self._rows:
            self._follow(now)
        for connection in list(self._connections):
            link = connection.link
            while link is not None and link.has_output and not connection.is_over:
                connection.stream.send(chunk(BODY, bytes(link.take_batch())))

    # --- dialling --------------------------------------------------------------------------------

    def _follow(self, now: int) -> None:
        self._rows = self._node.tenure.rows
        rows = {row.name: row for row in self._rows if row.name != self._node.name}
        for name in [name for name in self._peers if name not in rows]:
            del self._peers[name]
        for name, row in rows.items():
            address = Address(*split_host_port(row.link_address))
            if name in self._peers and self._peers[name].address == address:
                continue
            least = self._settings.backoff_least_ns
            wait_ns = self._jittered(least) if self._node.name > name else 0
            self._peers[name] = _Peer(address, least, now + wait_ns)
        self._node.touched()

    def _jittered(self, most_ns: int) -> int:
        half = most_ns // 2
        return half + self._randomness.integer(half + 1)

    def _dial(self, name: str, peer: _Peer) -> None:
        def opened() -> None:
            if not connection.is_over:
                connection.stream.send(chunk(NAME, self._node.name.encode()))
                self._begin(connection, name)

        stream = self._node.host.connect(
            peer.address,
            protocol="tcp",
            opened=opened,
            received=lambda data: self._received(connection, data),
            closed=lambda code, reason: self._end(connection, reason),
        )
        connection = _Connection(stream, name)
        peer.dialling = connection
        self._connections[connection] = None

    def _accept(self, stream: Stream) -> None:
        connection = _Connection(stream, None)
        self._connections[connection] = None
        stream.received = partial(self._received, connection)
        stream.closed = lambda code, reason: self._end(connection, reason)

    # --- one connection --------------------------------------------------------------------------

    def _begin(self, connection: _Connection, name: str) -> None:
        connection.link = Link(self._hello, name, self._codec, self._settings, self._now)
        self._node.touched()

    def _received(self, connection: _Connection, data: bytes) -> None:
        if connection.is_over:
            return
        for kind, body in connection.chunks.feed(data):
            if kind == NAME and connection.link is None:
                self._begin(connection, body.decode())
            elif kind == BODY and connection.link is not None:
                self._take(connection, connection.link, body)
        self._node.touched()

    def _take(self, connection: _Connection, link: Link, body: bytes) -> None:
        was_ready = link.state is LinkState.READY
        try:
            messages = link.receive(body, self._now)
        except (LinkProtocolError, LinkRefused) as error:
            self._end(connection, str(error))
            return
        if link.state is LinkState.UNDECIDED:
            self._decide(connection, link)
        elif link.state is LinkState.READY and not was_ready:
            self._install(connection, link)
        if messages and not connection.is_over:
            self._node.cluster.remote.receive(link.peer, messages)

    def _decide(self, connection: _Connection, link: Link) -> None:
        """We are the arbiter."""
        standing = self._link_by_node.get(link.peer)
        if standing is not None and not self._prefers(link, standing):
            assert standing.link is not None
            standing.link.probe(self._now)
            link.refuse("there is a link already")
            self.flush(self._now)
            self._end(connection, "there is a link already")
            return
        link.accept(self._now)
        self._install(connection, link)

    def _prefers(self, link: Link, standing: _Connection) -> bool:
        stands = standing.link
        assert stands is not None
        assert stands.hello is not None
        assert stands.ready_ns is not None
        assert link.hello is not None
        choice = choose(
            standing=stands.hello.incarnation,
            candidate=link.hello.incarnation,
            age_ns=self._now - stands.ready_ns,
            settings=self._settings,
        )
        return choice is Choice.REPLACE

    def _install(self, connection: _Connection, link: Link) -> None:
        standing = self._link_by_node.get(link.peer)
        if standing is not None:
            self._end(standing, "another connection replaced it")
        self._link_by_node[link.peer] = connection
        connection.installed = True
        peer = self._peers.get(link.peer)
        if peer is not None:
            peer.backoff_ns = self._settings.backoff_least_ns
        self._node.cluster.link_changed(link.peer, True)

    def _end(self, connection: _Connection, reason: str) -> None:
        """The connection is over, whoever ended it."""
        if connection.is_over:
            return
        connection.is_over = True
        self._connections.pop(connection, None)
        connection.stream.close(0, reason)
        link = connection.link
        name = link.peer if link is not None else connection.expected
        if link is not None:
            link.state = LinkState.CLOSED
        peer = None if name is None else self._peers.get(name)
        if peer is not None:
            if peer.dialling is connection:
                peer.dialling = None
            peer.dial_at = self._now + self._jittered(peer.backoff_ns)
            peer.backoff_ns = min(2 * peer.backoff_ns, self._settings.backoff_most_ns)
        if name is not None and self._link_by_node.get(name) is connection:
            del self._link_by_node[name]
            self._node.cluster.link_changed(name, False)
        self._node.touched()

    @property
    def _now(self) -> int:
        return self._node.host.clock.monotonic_ns()
