"""Several nodes in one process and in virtual time: a cluster for tests and simulations.

    cluster = HeapCluster(codec, SeededRandomness(1, "cluster"))
    a, b = cluster.add("a"), cluster.add("b")
    ref = b.scheduler.spawn(Counter())
    cluster.run_for(NS_PER_S)
    assert cluster.call("a", ref, Add(1)) == 1
    cluster.partition("a", "b")

Each node is a scheduler of its own on the real core of remote actors; messages travel as the bytes
of real frames, in order, after a latency drawn from the seed. Only sockets and TLS are left out. A
link is up between any two nodes that live and are not parted; it is lost at once when a node is
killed (the end of a TCP connection) or says what no node may, and after `silence_ns` when nothing
comes through any more (a partition, or a node that is stopped as by SIGSTOP).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import attrs

from runtime.actor import DEFAULT_DEADLINE_NS
from runtime.clock import NS_PER_MS, NS_PER_S, VirtualClock
from runtime.cluster.frames import (
    FrameSplitter,
    FrameWriter,
    LinkProtocolError,
    MessageCodec,
)
from runtime.cluster.link import Congested, Unreachable
from runtime.cluster.remote import RemoteActors
from runtime.inspection import Report
from runtime.randomness import SeededRandomness
from runtime.refs import AnyRef
from runtime.scheduler import Scheduler
from runtime.testing import FaultInjector, Faults, HeapHost, SeededScheduler
from runtime.timers import TimerHeap

MAX_IN_FLIGHT: Final = 65_536
"""Messages under way from one node to another."""
REDIAL_NS: Final = NS_PER_S // 10


@attrs.define(eq=False)
class _Event:
    """Something that happens at `due_ns`."""

    action: Callable[[], None]
    due_ns: int | None = None
    armed_ns: int | None = None


@attrs.define(eq=False)
class HeapNode:
    """A node of a HeapCluster."""

    name: str
    incarnation: int
    scheduler: Scheduler
    host: HeapHost
    remote: RemoteActors
    link_changed: Callable[[str, bool], None]
    """What is told that the link to a node stands or is lost: `remote`, or who comes before it."""
    alive: bool = True
    stopped: bool = False
    waiting: list[Callable[[], None]] = attrs.Factory(list)
    """What came while it was stopped."""


class HeapCluster:
    """See the module. `latency_ns` is (least, most) of one way, `silence_ns` after what time of
    silence a link is lost. `faults` are drawn anew for each life of a node."""

    def __init__(
        self,
        codec: MessageCodec,
        randomness: SeededRandomness,
        *,
        clock: VirtualClock | None = None,
        latency_ns: tuple[int, int] = (NS_PER_MS // 10, NS_PER_MS),
        silence_ns: int = 3 * NS_PER_S,
        effect_delay_ns: tuple[int, int] = (0, 0),
        faults: Faults | None = None,
        report: Callable[[Report], None] | None = None,
    ) -> None:
        self.clock = clock or VirtualClock()
        self.nodes: dict[str, HeapNode] = {}
        self.protocol_errors: list[str] = []
        self._codec = codec
        self._randomness = randomness
        self._latency_ns = latency_ns
        self._silence_ns = silence_ns
        self._effect_delay_ns = effect_delay_ns
        self._faults = faults
        self._report = report
        self._events = TimerHeap()
        self._links: dict[tuple[str, str], int] = {}  # which link of the pair (both ways) stands
        self._parted: set[tuple[str, str]] = set()
        self._arrival_ns: dict[tuple[str, str], int] = {}
        self._in_flight: dict[tuple[str, str], int] = {}
        self._link_number = 0
        self._incarnations: dict[str, int] = {}

    # --- the cluster ---------------------------------------------------------------------------

    def add(self, name: str, *, incarnation: int | None = None) -> HeapNode:
        """A node that starts now, linked with all others that live."""
        number = incarnation or self._incarnations.get(name, 0) + 1
        self._incarnations[name] = number
        drawn = self._randomness.child(f"{name}/{number}")
        scheduler = self._scheduler(name, number, drawn)
        host = HeapHost(
            scheduler,
            self.clock,
            randomness=drawn.child("effects"),
            effect_delay_ns=self._effect_delay_ns,
        )
        remote = RemoteActors(scheduler, self._codec, self._sender(name))
        node = HeapNode(name, number, scheduler, host, remote, partial(_tell, remote))
        self.nodes[name] = node
        for other in self.nodes.values():
            self._connect(node, other)
        return node

    def _scheduler(self, name: str, number: int, drawn: SeededRandomness) -> Scheduler:
        options: dict[str, Any] = {
            "clock": self.clock,
            "randomness": drawn,
            "node": name,
            "incarnation": number,
            "report": self._report,
            "crash_details": True,
        }
        if self._faults is None:
            return Scheduler(**options)
        faults = attrs.evolve(self._faults, seed=drawn.child("faults").integer(2**32))
        return SeededScheduler(injector=FaultInjector(faults), **options)

    def heal_faults(self) -> None:
        """From now on no fault is injected on any node that runs."""
        for node in self.nodes.values():
            node.host.heal()

    def kill(self, name: str) -> None:
        """End a node at once, as by SIGKILL."""
        node = self.nodes.pop(name)
        node.alive = False
        for other in self.nodes.values():
            self._disconnect(node, other)

    def stop(self, name: str) -> None:
        """Stop a node, as by SIGSTOP."""
        node = self.nodes[name]
        node.stopped = True
        for other in self.nodes.values():
            self._lose_by_silence(node, other)

    def resume(self, name: str) -> None:
        """Let a stopped node go on: first with what had come for it."""
        node = self.nodes[name]
        node.stopped = False
        waiting, node.waiting = node.waiting, []
        for action in waiting:
            action()
        for other in self.nodes.values():
            self._connect(node, other)

    def partition(self, name: str, other: str) -> None:
        """Nothing comes through between two nodes any more."""
        self._parted.add(_pair(name, other))
        self._lose_by_silence(self.nodes[name], self.nodes[other])

    def heal(self, name: str, other: str) -> None:
        """Undo `partition`."""
        self._parted.discard(_pair(name, other))
        if name in self.nodes and other in self.nodes:
            self._connect(self.nodes[name], self.nodes[other])

    def is_linked(self, name: str, other: str) -> bool:
        """Whether there is a link between two nodes."""
        return _pair(name, other) in self._links

    # --- time ----------------------------------------------------------------------------------

    def run_for(self, duration_ns: int) -> None:
        """Let virtual time pass on all nodes."""
        self.run_to(self.clock.monotonic_ns() + duration_ns)

    def run_to(self, instant_ns: int) -> None:
        """Let virtual time pass up to and including `instant_ns`."""
        self.settle()
        while (event_ns := self._next_event_ns()) is not None and event_ns <= instant_ns:
            self.clock.advance_to(max(event_ns, self.clock.monotonic_ns()))
            self.settle()
        self.clock.advance_to(max(instant_ns, self.clock.monotonic_ns()))

    def run_until(self, condition: Callable[[], bool], within_ns: int) -> bool:
        """Let time pass until the condition holds, at most so long. Whether it does."""
        end_ns = self.clock.monotonic_ns() + within_ns
        self.settle()
        while not condition():
            event_ns = self._next_event_ns()
            if event_ns is None or event_ns > end_ns:
                return False
            self.clock.advance_to(max(event_ns, self.clock.monotonic_ns()))
            self.settle()
        return True

    def settle(self) -> None:
        """Handle all that can be handled without time passing."""
        progress = True
        while progress:
            progress = False
            event: _Event | None
            while (event := self._events.pop_due(self.clock.monotonic_ns())) is not None:
                event.action()
                progress = True
            for node in list(self.nodes.values()):
                if node.alive and not node.stopped:
                    progress = node.host.run_until_idle() > 0 or progress

    def call(
        self, name: str, ref: AnyRef, message: object, deadline_ns: int = DEFAULT_DEADLINE_NS
    ) -> Any:
        """Call an actor as from outside of the actors of node `name`, and let time pass until it
        has answered. Raises as `Actor.call` does."""
        answers: list[tuple[Any, Exception | None]] = []
        self.nodes[name].scheduler.call_soon(
            ref,
            message,
            lambda value, error: answers.append((value, error)),
            deadline_ns=deadline_ns,
        )
        self.run_until(lambda: bool(answers), deadline_ns + NS_PER_S)
        value, error = answers[0]
        if error is not None:
            raise error
        return value

    # --- links ---------------------------------------------------------------------------------

    def _connect(self, node: HeapNode, other: HeapNode) -> None:
        pair = _pair(node.name, other.name)
        if node is other or pair in self._links or pair in self._parted:
            return
        if node.stopped or other.stopped:
            return
        self._link_number += 1
        self._links[pair] = self._link_number
        node.link_changed(other.name, True)
        other.link_changed(node.name, True)

    def _disconnect(self, node: HeapNode, other: HeapNode) -> None:
        if self._links.pop(_pair(node.name, other.name), None) is None:
            return
        for one, its_peer in ((node, other), (other, node)):
            if one.alive:
                self._do(one, partial(_lose, one, its_peer.name))

    def _lose_by_silence(self, node: HeapNode, other: HeapNode) -> None:
        pair = _pair(node.name, other.name)
        number = self._links.get(pair)

        def lose() -> None:
            if self._links.get(pair) != number:
                return
            if pair in self._parted or node.stopped or other.stopped:
                self._disconnect(node, other)

        if number is not None:
            self._at(self.clock.monotonic_ns() + self._silence_ns, lose)

    def _sender(self, name: str) -> Callable[[str, int, object], None]:
        def send(to: str, target: int, message: object) -> None:
            writer = FrameWriter(self._codec)
            writer.append(target, message)
            writer.finish()
            data = bytes(writer.data)
            number = self._links.get(_pair(name, to))
            if number is None:
                raise Unreachable(to, "there is no link")
            way = (name, to)
            if self._in_flight.get(way, 0) >= MAX_IN_FLIGHT:
                raise Congested(to, "too much is under way", MAX_IN_FLIGHT)
            self._in_flight[way] = self._in_flight.get(way, 0) + 1
            least, most = self._latency_ns
            arrival_ns = self.clock.monotonic_ns() + least + self._draw(most - least)
            arrival_ns = max(arrival_ns, self._arrival_ns.get(way, 0))
            self._arrival_ns[way] = arrival_ns
            self._at(arrival_ns, lambda: self._arrive(way, number, data))

        return send

    def _arrive(self, way: tuple[str, str], number: int, data: bytes) -> None:
        self._in_flight[way] -= 1
        name, to = way
        node = self.nodes.get(to)
        if node is None or _pair(name, to) in self._parted:
            return

        def receive() -> None:
            if self._links.get(_pair(name, to)) != number:
                return
            try:
                node.remote.receive(name, self._decoded(data))
            except LinkProtocolError as error:
                self.protocol_errors.append(str(error))
                self._break(name, to)

        self._do(node, receive)

    def _break(self, name: str, to: str) -> None:
        """End the link between two nodes; they dial anew."""
        self._disconnect(self.nodes[name], self.nodes[to])

        def dial() -> None:
            if name in self.nodes and to in self.nodes:
                self._connect(self.nodes[name], self.nodes[to])

        self._at(self.clock.monotonic_ns() + REDIAL_NS, dial)

    def _decoded(self, data: bytes) -> list[tuple[int, Any]]:
        messages: list[tuple[int, Any]] = []
        for kind, number, body in FrameSplitter().feed(data):
            messages.extend(self._codec.decode_frame(kind, number, body) or ())
        return messages

    def _do(self, node: HeapNode, action: Callable[[], None]) -> None:
        """On the node now, or as soon as it goes on."""
        if node.stopped:
            node.waiting.append(action)
        else:
            action()

    # --- helpers -------------------------------------------------------------------------------

    def _at(self, due_ns: int, action: Callable[[], None]) -> None:
        self._events.arm(_Event(action), due_ns)

    def _next_event_ns(self) -> int | None:
        due = [self._events.next_due_ns()]
        due += [node.host.next_event_ns() for node in self.nodes.values() if not node.stopped]
        return min((each for each in due if each is not None), default=None)

    def _draw(self, most: int) -> int:
        return self._randomness.integer(most + 1)


def _tell(remote: RemoteActors, node: str, is_up: bool) -> None:
    if is_up:
        remote.node_up(node)
    else:
        remote.node_down(node)


def _lose(node: HeapNode, other: str) -> None:
    node.link_changed(other, False)


def _pair(name: str, other: str) -> tuple[str, str]:
    return (name, other) if name < other else (other, name)
