"""The control plane in the world: one or more portal nodes, each on a host, on one store in memory.

A node is the real tree of actors on a `HeapHost` whose clock is the host's; it is a `Part` of the
world, so its timers are the world's events and it runs whenever something reached it. Agents come
to its door by streams, each of which carries a real `PortalChannel`; nodes reach each other by
`links`. Only sockets and TLS are left out, and the database's own network: whether the store
answers, and how fast, is said by `Database`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, cast
from uuid import UUID

from actors.policy.conditions import NOWHERE, Regions
from actors.tree import ControlPlane
from actors.wire import node_codec
from channel.binding import BindingProbe
from channel.credentials import NONCE_BYTES
from channel.listener import ChannelLimits, PortalChannel
from channel.messages import Disconnect, DoorAddress, IpText, RefusalCode, SocketAddress
from runtime.clock import NS_PER_MS, NS_PER_S, VirtualClock, earliest
from runtime.cluster.member import BeginDraining, Identity, Leave
from runtime.cluster.node import ClusterNode
from runtime.cluster.remote import RemoteActors
from runtime.cluster.tenure import Tenure
from runtime.inspection import CrashReport, Report
from runtime.net.address import Address, join_host_port
from runtime.net.quic_probe import negotiation
from runtime.scheduler import Scheduler
from runtime.testing import HeapHost, heap_sleep
from runtime.timers import TimerHeap
from simulations.checks.interface import Observer, hears
from simulations.hosts.database import Database, Reach, at_once
from simulations.hosts.links import LINK_PORT, NodeLinks
from simulations.hosts.relay_links import ask_over_stream, protocol_of
from simulations.net.streams import Stream
from simulations.net.world import Host, World

DOOR_PORT: Final = 443
PROBES: Final = 4
PROBE_NS: Final = NS_PER_S // 2
PROBE_LOOK_NS: Final = 10 * NS_PER_MS
DRAIN_TIMEOUT_NS: Final = 10 * NS_PER_S
DRAIN_SPREAD: Final = 0.5
DRAIN_LOOK_NS: Final = NS_PER_S // 10
LEASE_TTL_NS: Final = 3 * NS_PER_S


class _Door:
    """The portal's end of one agent's stream: a `Transport` with its `PortalChannel`."""

    __slots__ = ("_node", "_outbox", "_stream", "armed_ns", "channel", "due_ns")

    def __init__(self, node: PortalNode, stream: Stream, nonce: bytes, now: int) -> None:
        self._node = node
        self._stream = stream
        self._outbox: list[bytes] = []
        self.due_ns: int | None = None
        self.armed_ns: int | None = None
        kind = _Channel if node.told else PortalChannel
        self.channel = kind(
            self,
            remote=IpText(stream.remote.host),
            portal=node.portal,
            nonce=nonce,
            limits=node.limits,
            now=now,
        )
        if isinstance(self.channel, _Channel):
            self.channel.door = self

    # --- channel.listener.Transport ---

    def send(self, data: bytes) -> bool:
        self._outbox.append(data)
        self._node.door_touched(self)
        return True

    def ping(self) -> None:
        self._stream.ping()

    def close(self, code: int, reason: str, linger_ns: int) -> None:
        self.flush()
        if linger_ns:
            self._node.world.after(linger_ns, self._stream.close, code, reason)
        else:
            self._stream.close(code, reason)
        self._node.door_touched(self)

    # --- the stream ---

    @property
    def remote(self) -> Address:
        return self._stream.remote

    def received(self, data: bytes, now: int) -> None:
        self.channel.receive(data, now)
        self._node.door_touched(self)

    def moved(self, remote: Address) -> None:
        self.channel.moved(IpText(remote.host))
        self._node.door_touched(self)

    def ponged(self) -> None:
        self.channel.heard()
        self._node.door_touched(self)

    def flush(self) -> None:
        if self._outbox:
            self._stream.send(b"".join(self._outbox))
            self._outbox.clear()


class _Channel(PortalChannel):
    """A channel of which somebody hears what it says."""

    door: _Door

    def send(self, message: object, *, ref: int | None = None, epoch: int | None = None) -> None:
        super().send(message, ref=ref, epoch=epoch)
        if hasattr(self, "door"):
            self.door._node.say(self.door, message, epoch)


class PortalNode:
    """One life of a portal node, from `join` to its end."""

    def __init__(
        self,
        world: World,
        host: Host,
        database: Database,
        *,
        portal: str,
        door: str,
        alone: bool,
        observers: tuple[Observer, ...] = (),
        limits: ChannelLimits | None = None,
        on_crash: Callable[[CrashReport], None] | None = None,
        account_ids: Callable[[], tuple[UUID, ...]] = tuple,
        regions: Regions = NOWHERE,
    ) -> None:
        self.world = world
        self.host = host
        self.name = host.name
        self.portal = portal
        self.limits = limits or ChannelLimits()
        self.told = hears(observers, "told")
        self.is_draining = False
        self.is_over = False
        self.shed = 0
        self._database = database
        self._on_crash = on_crash
        self._account_ids = account_ids
        self._doors: dict[_Door, None] = {}
        self._unjoined: dict[_Door, None] = {}
        self._dirty: dict[_Door, None] = {}
        self._deadlines = TimerHeap()
        self._drain_step: Callable[[], None] | None = None
        self._drain_at: int | None = None
        address = host.ipv4 or host.ipv6
        assert address is not None
        identity = Identity(
            link_address=join_host_port(address, LINK_PORT),
            door_address=door,
            version="simulation",
        )
        self.incarnation: int = at_once(
            database.store.join_node(
                self.name,
                link_address=identity.link_address,
                door_address=identity.door_address,
                version=identity.version,
                ttl_ns=LEASE_TTL_NS,
            )
        )
        for node_joined in hears(observers, "node_joined"):
            node_joined(world.now, self.name, self.incarnation)
        drawn = world.randomness(f"portal {self.name}/{self.incarnation}")
        self._nonces = drawn.child("nonces")
        self._sheds = drawn.child("sheds")
        self._probes = drawn.child("probes")
        clock = cast(VirtualClock, host.clock)
        scheduler = Scheduler(
            clock=clock,
            randomness=drawn.child("actors"),
            node=self.name,
            incarnation=self.incarnation,
            report=self._report,
            crash_details=True,
        )
        self.heap = HeapHost(scheduler, clock)
        self.tenure = Tenure(self.name, self.incarnation)
        self.links = NodeLinks(self, drawn.child("links"))
        remote = RemoteActors(scheduler, node_codec(), self.links.send)
        store = cast(Any, Reach(database, self))
        self.cluster = ClusterNode(
            scheduler,
            remote,
            self.tenure,
            store,
            identity,
            self.links.refuses,
            incarnation=self.incarnation,
        )
        self.plane = ControlPlane(
            scheduler,
            store,
            clock,
            drawn.child("plane"),
            portal_name=portal,
            prove_address=self._prove,
            tenure=self.tenure,
            doors=tuple if alone else self._open_doors,
            regions=regions,
        )
        self.cluster.start()
        self.plane.start()
        database.attach(self)
        host.listen(DOOR_PORT, self._accept)
        host.bind(DOOR_PORT, self._asked)
        self.links.start()
        world.add(self, host=host)

    # --- Part ------------------------------------------------------------------------------------

    def poll_timeout(self) -> int | None:
        return earliest(
            self.heap.next_event_ns(),
            self._deadlines.next_due_ns(),
            self.links.poll_timeout(),
            self._drain_at,
        )

    def handle_timeout(self, now: int) -> None:
        while (door := self._deadlines.pop_due(now)) is not None:
            door.channel.handle_timeout(now)
            self.door_touched(door)
        self.links.handle_timeout(now)
        if self._drain_at is not None and now >= self._drain_at and self._drain_step is not None:
            self._drain_at = None
            self._drain_step()

    def flush(self, now: int) -> None:
        self.heap.run_until_idle()
        while self._dirty:
            dirty, self._dirty = self._dirty, {}
            for door in dirty:
                if door in self._doors:
                    self._settle(door)
            if self.heap.scheduler.has_work:
                self.heap.run_until_idle()
        self.links.flush(now)

    def _settle(self, door: _Door) -> None:
        door.flush()
        deadline = door.channel.poll_timeout()
        if deadline is None:
            self._forget(door, "closed")
            return
        self._deadlines.arm(door, deadline)
        if door.channel.is_open:
            self._unjoined.pop(door, None)

    def door_touched(self, door: _Door) -> None:
        self._dirty[door] = None
        self.world.touch(self)

    def wake(self, account_id: UUID) -> None:
        """The account changed: the database says so."""
        self.plane.wake(account_id)
        self.world.touch(self)

    def wake_all(self) -> None:
        """The database is reached again: every account counts as changed."""
        for account_id in self._account_ids():
            self.wake(account_id)

    def touched(self) -> None:
        """By a link."""
        self.world.touch(self)

    # --- the life of the node --------------------------------------------------------------------

    @property
    def is_online(self) -> bool:
        """Whether it takes agents, by its own lease."""
        return not self.is_draining and self.tenure.holds(self._now)

    def stop(self) -> None:
        """The process ends as by SIGTERM twice: it says goodbye to nobody but its agents."""
        if self.is_over:
            return
        for door in list(self._doors):
            door.channel.close(self._come_again("shutting_down", self.limits.shed_spread_ns))
            door.flush()
        self.host.stop_listening(DOOR_PORT)
        self.host.unbind(DOOR_PORT)
        self.host.stop_listening(LINK_PORT)
        self.kill()

    def kill(self) -> None:
        """It is gone at once; the host's sockets are the host's to lose."""
        self.is_over = True
        self._database.detach(self)
        self.links.kill()
        self.world.remove(self)

    def resumed(self) -> None:
        """The host goes on after a pause."""
        self.wake_all()

    def drain(self, gone: Callable[[], None]) -> None:
        """Leave in good order, as SIGTERM has it (`portal.node`); `gone` is called at the end."""
        self.is_draining = True
        self._tell_member(BeginDraining())
        deadline = self._now + NS_PER_S + DRAIN_TIMEOUT_NS

        def send_away() -> None:
            self.plane.drain(round(DRAIN_TIMEOUT_NS * DRAIN_SPREAD))
            look()

        def look() -> None:
            if (self._doors or self._still_owns()) and self._now < deadline:
                self._later(DRAIN_LOOK_NS, look)
                return
            for door in list(self._doors):
                door.channel.close(self._come_again("draining", DRAIN_TIMEOUT_NS))
            self._tell_member(Leave())
            self._later(NS_PER_S, end)

        def end() -> None:
            self.stop()
            gone()

        self._later(NS_PER_S // 10, send_away)

    def _later(self, delay_ns: int, step: Callable[[], None]) -> None:
        self._drain_at, self._drain_step = self._now + delay_ns, step
        self.world.touch(self)

    def _still_owns(self) -> bool:
        has_takers = any(not row.draining for row in self.tenure.rows)
        return has_takers and self.plane.statistics().accounts > 0

    def _tell_member(self, message: object) -> None:
        member = self.cluster.member
        if member is not None:
            self.heap.cast(member, message)
            self.world.touch(self)

    # --- doors -----------------------------------------------------------------------------------

    def _accept(self, stream: Stream) -> None:
        door = _Door(self, stream, self._nonces.bytes(NONCE_BYTES), self._now)
        stream.received = partial(self._received, door)
        stream.moved = door.moved
        stream.ponged = door.ponged
        stream.closed = lambda code, reason: self._lost(door, reason)
        if self.is_draining or len(self._unjoined) >= self.limits.max_unjoined:
            self.shed += 1
            reason: RefusalCode = "draining" if self.is_draining else "unavailable"
            door.channel.close(self._come_again(reason, self.limits.shed_spread_ns))
            return
        self._doors[door] = None
        self._unjoined[door] = None
        door.channel.start(self.plane.connected)
        self.door_touched(door)

    def _asked(self, data: bytes, source: Address, local: Address) -> None:
        """A datagram that is of no stream: whether QUIC is spoken here."""
        if (answer := negotiation(data)) is not None:
            self.host.send(DOOR_PORT, source, answer)

    def _received(self, door: _Door, data: bytes) -> None:
        if door in self._doors:
            door.received(data, self._now)

    def _lost(self, door: _Door, reason: str) -> None:
        self._forget(door, f"lost: {reason}")
        self.world.touch(self)

    def _forget(self, door: _Door, reason: str) -> None:
        if door in self._doors:
            del self._doors[door]
            self._unjoined.pop(door, None)
            self._deadlines.cancel(door)
            door.channel.lost(reason)

    def _come_again(self, reason: RefusalCode, spread_ns: int) -> Disconnect:
        after = self._sheds.integer(max(1, spread_ns))
        return Disconnect(reason=reason, retry=True, retry_after_ns=after)

    def _open_doors(self) -> tuple[DoorAddress, ...]:
        return tuple(map(DoorAddress, self.tenure.doors()))

    def say(self, door: _Door, message: object, epoch: int | None) -> None:
        """For observers: what goes to an agent."""
        for told in self.told:
            told(self.world.now, self.name, str(door.remote), message, epoch)

    @property
    def channels(self) -> int:
        """Agents that are connected to this node."""
        return len(self._doors)

    # --- effects ---------------------------------------------------------------------------------

    async def _prove(self, announced: SocketAddress, pins: tuple[str, ...]) -> bool:
        """`portal.probe.prove_address`, over the world's paths."""
        target = Address(str(announced.address), announced.port)
        probe = BindingProbe(self._probes)
        answers: list[bool] = []
        if announced.transport == "udp":
            return await self._prove_by_datagrams(target, probe, answers)
        stream = ask_over_stream(self.host, target, protocol_of(announced), probe, answers)
        try:
            return await self._is_answered(answers, PROBES * PROBE_NS)
        finally:
            stream.close(0, "asked")

    async def _prove_by_datagrams(
        self, target: Address, probe: BindingProbe, answers: list[bool]
    ) -> bool:
        def receive(data: bytes, source: Address, local: Address) -> None:
            if source == target and probe.answer(data) is not None:
                answers.append(True)

        port = self.host.ephemeral_port()
        self.host.bind(port, receive)
        try:
            for _ in range(PROBES):
                self.host.send(port, target, probe.request)
                if await self._is_answered(answers, PROBE_NS):
                    return True
        finally:
            self.host.unbind(port)
        return False

    async def _is_answered(self, answers: list[bool], within_ns: int) -> bool:
        for _ in range(within_ns // PROBE_LOOK_NS):
            await heap_sleep(PROBE_LOOK_NS)
            if answers:
                return True
        return False

    # --- helpers ---------------------------------------------------------------------------------

    @property
    def _now(self) -> int:
        return self.host.clock.monotonic_ns()

    def _report(self, report: Report) -> None:
        if isinstance(report, CrashReport) and self._on_crash is not None:
            self._on_crash(report)
