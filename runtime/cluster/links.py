"""The links of one node to all others: the trio shell around `runtime.cluster.link`.

    links = NodeLinks(
        membership, incarnation, codec, deliver=deliver, changed=changed, clock=..., randomness=...
    )
    address = await nursery.start(links.run, Address("127.0.0.1", 0))
    links.set_peers({"b": Address("127.0.0.1", 7000)})
    links.send("b", 17, Hello())            # or: await links.send_when_possible(...)

Every node dials every peer that it was told of and has no link with, again and again with a
jittered, doubling back-off; and it listens. Who may dial, who proved what, and which of several
connections is the link is said in `link` and `membership`; here are sockets, tasks and timers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from ssl import SSLError
from typing import Any, Final

import attrs
import trio

from runtime.clock import NS_PER_S, Clock
from runtime.cluster.frames import LinkProtocolError, MessageCodec
from runtime.cluster.link import (
    Choice,
    Congested,
    Hello,
    Link,
    LinkLost,
    LinkRefused,
    LinkSettings,
    LinkState,
    LinkStatistics,
    Unreachable,
    choose,
)
from runtime.cluster.membership import Membership, MembershipError, check_node_name, peer_name
from runtime.guard import Guard
from runtime.net.address import Address
from runtime.net.binding import binding
from runtime.randomness import Randomness
from runtime.service import get_logger

MAX_PEERS: Final = 256
MAX_UNPROVEN: Final = 64
"""Incoming connections that have not become a link yet; more are closed at once."""
READ_BYTES: Final = 256 * 1024
FAREWELL_NS: Final = NS_PER_S
"""How long a refusal may take to be sent."""

Deliver = Callable[[str, Sequence[tuple[int, Any]]], Awaitable[None]]
"""Given the node and its messages as (target, message), in order. Nothing more is read from that
node until it returns, so the sender feels it when the receiver is slow."""

Changed = Callable[[str, int, bool], None]
"""Given the node, its incarnation, and whether there is a link with it now. Must not raise."""

_log = get_logger("cluster.links")


@attrs.frozen(kw_only=True)
class NodeLinksStatistics:
    """The links now, and counts since the start."""

    links: tuple[LinkStatistics, ...]
    peers: int
    unproven: int
    dialled: int
    dials_failed: int
    accepted: int
    refused_membership: int
    """Connections that did not prove membership, or another name than expected."""
    refused_protocol: int
    """Connections that were ended for what they sent."""
    refused_crowded: int
    duplicates: int
    replaced: int
    lost: int
    delivery_failures: int


@attrs.define(eq=False)
class _Connection:
    """A link with its socket and tasks."""

    link: Link
    stream: trio.SSLStream[trio.SocketStream]
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    ended: trio.Event = attrs.field(factory=trio.Event)
    output: trio.Event = attrs.field(factory=trio.Event)
    """There is something to send, or a new timeout to wait for."""
    room: trio.Event = attrs.field(factory=trio.Event)
    installed: bool = False
    reason: str = "closed"

    def end(self, reason: str) -> None:
        if not self.scope.cancel_called:
            self.reason = reason
            self.link.state = LinkState.CLOSED
            self.scope.cancel()


@attrs.define
class _Peer:
    """A node to dial."""

    address: Address
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    wake: trio.Event = attrs.field(factory=trio.Event)
    """Its link is lost: dial again."""


async def open_link_listeners(listen: Address) -> list[trio.SocketListener]:
    """Where nodes may connect. Raises CannotListen."""
    with binding("node links", listen):
        return await trio.open_tcp_listeners(listen.port, host=listen.host)


class NodeLinks:
    """All links of one node. Belongs to one trio run, and one thread.

    `incarnation` must be higher at each start of this node's process."""

    def __init__(
        self,
        membership: Membership,
        incarnation: int,
        codec: MessageCodec,
        *,
        deliver: Deliver,
        changed: Changed,
        clock: Clock,
        randomness: Randomness,
        settings: LinkSettings | None = None,
    ) -> None:
        self.node = membership.node
        self._membership = membership
        self._hello = Hello(node=membership.node, incarnation=incarnation)
        self._codec = codec
        self._deliver = deliver
        self._changed = changed
        self._clock = clock
        self._randomness = randomness
        self._settings = settings or LinkSettings()
        self._nursery: trio.Nursery | None = None
        self._peers: dict[str, _Peer] = {}
        self._connection_by_node: dict[str, _Connection] = {}
        self._guard = Guard("cluster.links", passes=(LinkProtocolError,))
        self._unproven = 0
        self._dialled = 0
        self._dials_failed = 0
        self._accepted = 0
        self._refused_membership = 0
        self._refused_protocol = 0
        self._refused_crowded = 0
        self._duplicates = 0
        self._replaced = 0
        self._lost = 0

    async def run(
        self,
        listen: Address | list[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen (at an address, or on what listens already), dial and carry messages until
        cancelled; `task_status` is given the address. Raises CannotListen."""
        listeners = await open_link_listeners(listen) if isinstance(listen, Address) else listen
        bound = listeners[0].socket.getsockname()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for peer_node in self._peers:
                    self._start_dialling(peer_node)
                task_status.started(Address(bound[0], bound[1]))
                await trio.serve_listeners(self._serve, listeners)
        finally:
            self._nursery = None

    def set_peers(self, address_by_node: Mapping[str, Address]) -> None:
        """The other nodes, all of them, and where they listen. Those that are not named any more
        are not dialled, and their links closed; a changed address counts for the next dial.
        Ourselves may be among them. Raises ValueError."""
        wanted = {
            check_node_name(node): address
            for node, address in address_by_node.items()
            if node != self.node
        }
        if len(wanted) > MAX_PEERS:
            raise ValueError(f"a node has at most {MAX_PEERS} peers")
        for node in [each for each in self._peers if each not in wanted]:
            self._peers.pop(node).scope.cancel()
            if node in self._connection_by_node:
                self._connection_by_node[node].end("the node is no peer any more")
        for node, address in wanted.items():
            if node in self._peers:
                self._peers[node].address = address
                continue
            self._peers[node] = _Peer(address)
            self._start_dialling(node)

    def send(self, node: str, target: int, message: object) -> None:
        """Queue a message for the actor numbered `target` of `node` and go on. Messages to one node
        arrive in order, or not at all when the link is lost.

        Raises Unreachable (no link), Congested (the queue is full), TypeError and ValueError (see
        `FrameWriter.append`)."""
        connection = self._connection_by_node.get(node)
        if connection is None:
            raise Unreachable(node, "there is no link")
        connection.link.enqueue(target, message)
        connection.output.set()

    async def send_when_possible(self, node: str, target: int, message: object) -> None:
        """As `send`, but waits while the queue is full. Raises Unreachable when the link is lost
        meanwhile. A checkpoint only when it waits."""
        while True:
            try:
                self.send(node, target, message)
            except Congested:
                await self._connection_by_node[node].room.wait()
            else:
                return

    def linked(self) -> dict[str, int]:
        """The incarnations of the nodes with which there is a link now, by name."""
        return {
            node: connection.link.hello.incarnation
            for node, connection in self._connection_by_node.items()
            if connection.link.hello is not None
        }

    def statistics(self) -> NodeLinksStatistics:
        return NodeLinksStatistics(
            links=tuple(each.link.statistics() for each in self._connection_by_node.values()),
            peers=len(self._peers),
            unproven=self._unproven,
            dialled=self._dialled,
            dials_failed=self._dials_failed,
            accepted=self._accepted,
            refused_membership=self._refused_membership,
            refused_protocol=self._refused_protocol,
            refused_crowded=self._refused_crowded,
            duplicates=self._duplicates,
            replaced=self._replaced,
            lost=self._lost,
            delivery_failures=self._guard.failures,
        )

    # --- connecting ------------------------------------------------------------------------------

    def _start_dialling(self, node: str) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._dial_for_ever, node, self._peers[node])

    async def _dial_for_ever(self, node: str, peer: _Peer) -> None:
        settings = self._settings
        backoff_ns = settings.backoff_least_ns
        with peer.scope:
            if self.node > node:  # the arbiter dials first, so that few connections are doubled
                await self._pause(backoff_ns)
            while True:
                if node in self._connection_by_node:
                    backoff_ns = settings.backoff_least_ns
                    peer.wake = trio.Event()
                    await peer.wake.wait()
                elif await self._dial(node, peer.address):
                    backoff_ns = settings.backoff_least_ns
                if node not in self._connection_by_node:
                    await self._pause(backoff_ns)
                    backoff_ns = min(2 * backoff_ns, settings.backoff_most_ns)

    async def _pause(self, most_ns: int) -> None:
        """Between half of `most_ns` and all of it."""
        half = most_ns // 2
        await trio.sleep((half + self._randomness.integer(half + 1)) / NS_PER_S)

    async def _dial(self, node: str, address: Address) -> bool:
        """Connect, and run the link to its end. Whether it ever was one."""
        self._dialled += 1
        patience_s = self._settings.handshake_ns / NS_PER_S
        try:
            with trio.fail_after(patience_s):
                raw = await trio.open_tcp_stream(address.host, address.port)
        except (OSError, trio.TooSlowError):
            self._dials_failed += 1
            return False
        stream = trio.SSLStream(raw, self._membership.client, https_compatible=True)
        became_link = await self._use(stream, expected=node)
        self._dials_failed += not became_link
        return became_link

    async def _serve(self, raw: trio.SocketStream) -> None:
        if self._unproven >= MAX_UNPROVEN:
            self._refused_crowded += 1
            await trio.aclose_forcefully(raw)
            return
        self._accepted += 1
        stream = trio.SSLStream(
            raw, self._membership.server, server_side=True, https_compatible=True
        )
        await self._use(stream, expected=None)

    async def _use(self, stream: trio.SSLStream[trio.SocketStream], expected: str | None) -> bool:
        """Prove membership, then run the link to its end. Whether it ever was one."""
        incoming = expected is None
        self._unproven += incoming
        connection: _Connection | None = None
        try:
            node = await self._prove(stream, expected)
            if node is None:
                return False
            link = Link(self._hello, node, self._codec, self._settings, self._clock.monotonic_ns())
            connection = _Connection(link, stream)
            await self._run(connection)
            return connection.installed
        finally:
            self._unproven -= incoming and not (connection is not None and connection.installed)
            await trio.aclose_forcefully(stream)

    async def _prove(
        self, stream: trio.SSLStream[trio.SocketStream], expected: str | None
    ) -> str | None:
        """TLS, with certificates on both sides. The other's name, or None if it is not to be."""
        try:
            with trio.fail_after(self._settings.handshake_ns / NS_PER_S):
                await stream.do_handshake()
            node = peer_name(stream.getpeercert())
            if node == self.node or (expected is not None and node != expected):
                raise MembershipError(f"it is {node}")
        except (trio.BrokenResourceError, SSLError, MembershipError) as error:
            self._refused_membership += 1
            reason = error.__cause__ if isinstance(error, trio.BrokenResourceError) else error
            count = self._refused_membership
            if count & (count - 1) == 0:  # any stranger can repeat it: log the 1st, 2nd, 4th, ...
                text = str(reason)[:200]
                _log.warning("link_refused", expected=expected, reason=text, count=count)
            return None
        except trio.TooSlowError:
            return None
        return node

    # --- one connection --------------------------------------------------------------------------

    async def _run(self, connection: _Connection) -> None:
        try:
            with connection.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read, connection)
                    nursery.start_soon(self._write, connection)
                    nursery.start_soon(self._keep_time, connection)
        finally:
            self._drop(connection)
            connection.ended.set()

    async def _read(self, connection: _Connection) -> None:
        link = connection.link
        try:
            while data := await connection.stream.receive_some(READ_BYTES):
                was_ready = link.state is LinkState.READY
                messages = link.receive(bytes(data), self._clock.monotonic_ns())
                connection.output.set()
                if link.state is LinkState.UNDECIDED:
                    await self._decide(connection)
                elif link.state is LinkState.READY and not was_ready:
                    await self._install(connection)
                if messages:
                    link.set_busy(True, self._clock.monotonic_ns())
                    with self._guard:
                        await self._deliver(link.peer, messages)
                    link.set_busy(False, self._clock.monotonic_ns())
            connection.end("the other node closed it")
        except LinkProtocolError as error:
            self._refused_protocol += 1
            _log.warning("link_protocol_error", node=link.peer, detail=str(error))
            await self._refuse(connection, str(error))
        except LinkRefused as error:
            connection.end(f"refused: {error}")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            connection.end("the connection broke")

    async def _write(self, connection: _Connection) -> None:
        link = connection.link
        stall_s = self._settings.stall_ns / NS_PER_S
        try:
            while True:
                while link.has_output:
                    batch = link.take_batch()
                    connection.room.set()
                    connection.room = trio.Event()
                    with trio.fail_after(stall_s):
                        await connection.stream.send_all(batch)
                connection.output = trio.Event()
                await connection.output.wait()
        except trio.TooSlowError:
            connection.end("the other node reads nothing")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            connection.end("the connection broke")

    async def _keep_time(self, connection: _Connection) -> None:
        """Looks at the clock in steps, since trio's own stands still while a machine sleeps."""
        link = connection.link
        step_ns = min(self._settings.ping_ns, self._settings.handshake_ns) // 4
        while (due_ns := link.poll_timeout()) is not None:
            now = self._clock.monotonic_ns()
            if now < due_ns:
                await trio.sleep(min(due_ns - now, step_ns) / NS_PER_S)
                continue
            try:
                link.handle_timeout(now)
            except LinkLost as error:
                connection.end(str(error))
                return
            connection.output.set()
            await trio.lowlevel.checkpoint()

    # --- which connection is the link ------------------------------------------------------------

    async def _decide(self, connection: _Connection) -> None:
        """We are the arbiter: take this connection as the link, or refuse it."""
        link = connection.link
        standing = self._connection_by_node.get(link.peer)
        if standing is not None and not self._prefer(connection, standing):
            self._duplicates += 1
            standing.link.probe(self._clock.monotonic_ns())
            standing.output.set()
            await self._refuse(connection, "there is a link already")
            return
        await self._make_way(connection)
        link.accept(self._clock.monotonic_ns())
        self._installed(connection)

    def _prefer(self, connection: _Connection, standing: _Connection) -> bool:
        candidate, stands = connection.link.hello, standing.link.hello
        ready_ns = standing.link.ready_ns
        assert candidate is not None
        assert stands is not None
        assert ready_ns is not None
        choice = choose(
            standing=stands.incarnation,
            candidate=candidate.incarnation,
            age_ns=self._clock.monotonic_ns() - ready_ns,
            settings=self._settings,
        )
        return choice is Choice.REPLACE

    async def _install(self, connection: _Connection) -> None:
        """The arbiter said READY."""
        await self._make_way(connection)
        self._installed(connection)

    async def _make_way(self, connection: _Connection) -> None:
        """End the link that stands, wholly: nothing of it is delivered after this."""
        while (standing := self._connection_by_node.get(connection.link.peer)) is not None:
            self._replaced += 1
            standing.end("another connection replaced it")
            await standing.ended.wait()

    def _installed(self, connection: _Connection) -> None:
        link = connection.link
        assert link.hello is not None
        self._connection_by_node[link.peer] = connection
        connection.installed = True
        self._unproven -= bool(connection.stream.server_side)
        connection.output.set()
        _log.info("link_up", node=link.peer, incarnation=link.hello.incarnation)
        self._changed(link.peer, link.hello.incarnation, True)

    async def _refuse(self, connection: _Connection, reason: str) -> None:
        """Say why, then end. What else was queued is dropped."""
        connection.link.refuse(reason)
        connection.output.set()
        await trio.sleep(0)
        with trio.move_on_after(FAREWELL_NS / NS_PER_S):
            while connection.link.has_output:
                await trio.sleep(0.01)
        connection.end(reason)

    def _drop(self, connection: _Connection) -> None:
        """The connection has ended: if it was the link, there is none now."""
        link = connection.link
        connection.room.set()
        if self._connection_by_node.get(link.peer) is not connection:
            return
        del self._connection_by_node[link.peer]
        self._lost += 1
        assert link.hello is not None
        _log.info("link_down", node=link.peer, reason=connection.reason)
        self._changed(link.peer, link.hello.incarnation, False)
        if link.peer in self._peers:
            self._peers[link.peer].wake.set()
