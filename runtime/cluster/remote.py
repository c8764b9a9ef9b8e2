"""Actors of other nodes: what a scheduler does with an address that is not of its own. A core.

    remote = RemoteActors(scheduler, codec, links.send)     # and now its actors reach further
    remote.node_up("b")
    remote.receive("b", messages)                           # what came over the link
    remote.node_down("b")                                   # the link is lost

An `ActorRef` or `NamedRef` of another node may be used wherever one of this node may: for cast,
call, monitor, link and exit. The guarantees are those of Erlang's distribution: between two actors
messages arrive in order or, from the moment at which the link is lost, not at all. With the link go
the calls under way (NodeLost: perhaps they were handled), the watches ("noconnection") and the
links of actors (an exit signal "noconnection"). A call that cannot be sent raises Unreachable.

What differs from one node: a cycle of calls that leads over another node is not found out, and runs
into its deadline; and `cast` says only that the message was queued for the link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, Final

import attrs
from msgspec import Raw

from runtime.cluster.envelopes import (
    MAX_REASON_CHARACTERS,
    PLAIN_KIND,
    Answer,
    Broadcast,
    Broken,
    Call,
    Ended,
    Failure,
    LinkWith,
    NamedCast,
    Signal,
    UnlinkFrom,
    Unwatch,
    Watch,
    read_plain,
    write_plain,
)
from runtime.cluster.frames import LinkProtocolError, MessageCodec
from runtime.cluster.link import Congested
from runtime.cluster.link import Unreachable as NoLink
from runtime.context import Caller, Monitor
from runtime.errors import (
    Crashed,
    Dead,
    NodeLost,
    NoHandler,
    Overloaded,
    Refused,
    Unreachable,
)
from runtime.links import NO_CONNECTION
from runtime.refs import ActorRef, AnyRef, InvalidRef, NamedRef, decode_ref, encode_ref
from runtime.scheduler import Scheduler

MAX_CALLS: Final = 100_000
"""Calls to other nodes that wait for an answer."""
MAX_WATCHES: Final = 1_000_000
"""Watches over actors of other nodes, and as many of other nodes over ours, per node."""
MAX_DEADLINE_NS: Final = 3_600 * 10**9
NODE: Final = 0
"""The target of what is said to a node itself: no actor has the number 0."""

Send = Callable[[str, int, object], None]
"""Queue a message for (node, target). Raises `runtime.cluster.link.Unreachable`, Congested."""

NodeMessage = Callable[[str, Any], None]
"""Given the node and a message of a class that is said to nodes, not to actors."""


@attrs.frozen(kw_only=True)
class RemoteStatistics:
    """Now, and counts since the start."""

    nodes: int
    calls: int
    watches: int
    watched: int
    """Our actors that other nodes watch, as often as they do."""
    sent: int
    unsent: int
    """What could not be queued: no link, or too much waits already."""
    received: int
    answers_lost: int
    broadcasts: int


@attrs.frozen
class _Pending:
    """A call of ours that another node has to answer."""

    caller: Caller
    node: str
    label: str


@attrs.frozen
class _Watching:
    node: str
    ended: Callable[[str], None]


class RemoteActors:
    """The `elsewhere` of a scheduler. Belongs where the scheduler runs."""

    def __init__(self, scheduler: Scheduler, codec: MessageCodec, send: Send) -> None:
        self._scheduler = scheduler
        self._codec = codec
        self._send = send
        self._ids = count(1)
        self._nodes: dict[str, int] = {}  # with the number of the link
        self._links_seen = 0
        self._calls: dict[int, _Pending] = {}
        self._sweep_at = 64
        self._watching: dict[int, _Watching] = {}
        self._watched: dict[str, dict[int, Monitor]] = {}
        self._links: dict[str, dict[tuple[ActorRef, ActorRef], None]] = {}
        self._services: dict[type, NodeMessage] = {}
        self._sent = 0
        self._unsent = 0
        self._received = 0
        self._answers_lost = 0
        self._broadcasts = 0
        self._handlers: dict[type, Callable[[str, Any], None]] = {
            NamedCast: self._on_named_cast,
            Call: self._on_call,
            Answer: self._on_answer,
            Failure: self._on_failure,
            Watch: self._on_watch,
            Unwatch: self._on_unwatch,
            Ended: self._on_ended,
            LinkWith: self._on_link,
            UnlinkFrom: self._on_unlink,
            Broken: self._on_broken,
            Signal: self._on_signal,
            Broadcast: self._on_broadcast,
        }
        scheduler.elsewhere = self

    # --- for the shell ---

    def serve(self, message_type: type, handler: NodeMessage) -> None:
        """Have what other nodes say to this one in messages of this type handled so."""
        self._services[message_type] = handler

    def tell(self, node: str, message: object) -> bool:
        """Say something to a node; see `serve`. False if it could not be queued."""
        try:
            self._post(node, NODE, message)
        except NoLink:
            return False
        return True

    def node_up(self, node: str) -> None:
        """There is a link with `node` now."""
        self._links_seen += 1
        self._nodes[node] = self._links_seen

    def node_down(self, node: str) -> None:
        """The link with `node` is lost, and with it all that went over it."""
        self._nodes.pop(node, None)
        for id, pending in [each for each in self._calls.items() if each[1].node == node]:
            del self._calls[id]
            error = NodeLost(pending.label, node)
            self._scheduler.answer_from(pending.caller, None, error)
        for id, watching in [each for each in self._watching.items() if each[1].node == node]:
            del self._watching[id]
            watching.ended(NO_CONNECTION)
        for monitor in self._watched.pop(node, {}).values():
            self._scheduler.unwatch(monitor)
        for ref, peer in self._links.pop(node, {}):
            self._scheduler.signal_from(ref, peer, NO_CONNECTION)

    def nodes(self) -> tuple[str, ...]:
        """The nodes to which there is a link."""
        return tuple(self._nodes)

    def receive(self, node: str, messages: Iterable[tuple[int, Any]]) -> None:
        """What came from `node`, in order. Raises LinkProtocolError for what no node may send."""
        deliver = self._scheduler.deliver
        for target, message in messages:
            self._received += 1
            if target != NODE:
                deliver(target, message)
                continue
            kind = type(message)
            handler = self._handlers.get(kind) or self._services.get(kind)
            if handler is None:
                raise LinkProtocolError(f"a {kind.__name__} is not for a node")
            handler(node, message)

    def statistics(self) -> RemoteStatistics:
        return RemoteStatistics(
            nodes=len(self._nodes),
            calls=len(self._calls),
            watches=len(self._watching),
            watched=sum(map(len, self._watched.values())),
            sent=self._sent,
            unsent=self._unsent,
            received=self._received,
            answers_lost=self._answers_lost,
            broadcasts=self._broadcasts,
        )

    # --- for the scheduler (see `mailroom.Elsewhere`) ---

    def cast(self, ref: AnyRef, message: object) -> bool:
        """Send and go on; False also for what is too long to travel. Raises TypeError for a message
        that may not travel."""
        node = _node_of(ref)
        try:
            if isinstance(ref, ActorRef):
                self._post(node, ref.number, message)
            else:
                kind, body = self._codec.pack(message)
                self._post(node, NODE, NamedCast(encode_ref(ref), kind, Raw(body)))
        except NoLink:
            return False
        except ValueError:
            self._unsent += 1
            return False
        return True

    def call(
        self,
        ref: AnyRef,
        message: object,
        caller: Caller,
        sender: ActorRef | None,
        deadline_ns: int,
    ) -> None:
        """Send a call. Raises Unreachable, Overloaded, and TypeError as `cast` does."""
        node = _node_of(ref)
        self._sweep()
        if len(self._calls) >= MAX_CALLS:
            raise Overloaded(repr(ref), MAX_CALLS)
        kind, body = self._codec.pack(message)
        call = Call(
            id=next(self._ids),
            sender=0 if sender is None else sender.number,
            number=ref.number if isinstance(ref, ActorRef) else 0,
            name=b"" if isinstance(ref, ActorRef) else encode_ref(ref),
            deadline_ns=max(0, min(deadline_ns, MAX_DEADLINE_NS)),
            kind=kind,
            body=Raw(body),
        )
        try:
            self._post(node, NODE, call)
        except Congested as error:
            raise Overloaded(repr(ref), error.limit) from None
        except NoLink:
            raise Unreachable(repr(ref), node) from None
        self._calls[call.id] = _Pending(caller, node, repr(ref))

    def watch(self, ref: AnyRef, ended: Callable[[str], None]) -> Callable[[], None]:
        """Have `ended` called when the actor ends, or its node is lost; maybe at once."""
        assert isinstance(ref, ActorRef)
        id = next(self._ids)
        if len(self._watching) >= MAX_WATCHES or not self.tell(ref.node, Watch(id, ref.number)):
            ended(NO_CONNECTION)
            return lambda: None
        self._watching[id] = _Watching(ref.node, ended)

        def off() -> None:
            if self._watching.pop(id, None) is not None:
                self.tell(ref.node, Unwatch(id))

        return off

    def exit(self, ref: AnyRef, reason: str, sender: ActorRef | None) -> bool:
        """Send an exit signal."""
        if not isinstance(ref, ActorRef):
            return False
        own = 0 if sender is None else sender.number
        return self.tell(ref.node, Signal(own, ref.number, _short(reason)))

    def link(self, ref: ActorRef, peer: ActorRef) -> bool:
        """Link our `ref` with `peer`. False: it is out of reach."""
        if not self.tell(peer.node, LinkWith(ref.number, peer.number)):
            return False
        self._links.setdefault(peer.node, {})[ref, peer] = None
        return True

    def unlink(self, ref: ActorRef, peer: ActorRef) -> None:
        """Take the link off."""
        self._links.get(peer.node, {}).pop((ref, peer), None)
        self.tell(peer.node, UnlinkFrom(ref.number, peer.number))

    def broken(self, ref: ActorRef, peer: ActorRef, reason: str) -> None:
        """Our `ref`, linked with `peer`, has ended."""
        self._links.get(peer.node, {}).pop((ref, peer), None)
        self.tell(peer.node, Broken(ref.number, peer.number, _short(reason)))

    def broadcast(self, topic: Any, message: object) -> None:
        """Have a message published on all nodes to which there is a link."""
        kind, body = self._codec.pack(message)
        told = Broadcast(encode_ref(NamedRef(topic)), kind, Raw(body))
        self._broadcasts += 1
        for node in self._nodes:
            self.tell(node, told)

    # --- what other nodes say ---

    def _on_named_cast(self, node: str, cast: NamedCast) -> None:
        message = self._codec.decode(cast.kind, cast.body)
        if message is not None:
            self._scheduler.cast(self._own_name(cast.name), message)

    def _on_call(self, node: str, call: Call) -> None:
        message = self._codec.decode(call.kind, call.body)
        if message is None:
            self.tell(node, Failure(call.id, "NoHandler", f"kind {call.kind}"))
            return

        link = self._nodes.get(node)

        def answered(value: Any, error: Exception | None) -> None:
            if self._nodes.get(node) == link:
                self._answer(node, call.id, value, error)
            else:  # nobody waits; in another life of the node the id may be that of another call
                self._answers_lost += 1

        if call.number:
            ref: AnyRef = ActorRef(self._scheduler.node, call.number)
        else:
            ref = self._own_name(call.name)
        self._scheduler.call_soon(
            ref,
            message,
            answered,
            deadline_ns=min(call.deadline_ns, MAX_DEADLINE_NS),
            sender=ActorRef(node, call.sender) if call.sender else None,
        )

    def _answer(self, node: str, id: int, value: Any, error: Exception | None) -> None:
        try:
            told = self._written_answer(id, value) if error is None else _failure(id, error)
            is_told = self.tell(node, told)  # does not take what is longer than a frame
        except (TypeError, ValueError) as problem:
            text = _short(f"the answer cannot travel: {problem}")
            is_told = self.tell(node, Failure(id, "Refused", text))
        if not is_told:
            self._answers_lost += 1

    def _written_answer(self, id: int, value: Any) -> Answer:
        if self._codec.travels(type(value)):
            kind, body = self._codec.pack(value)
            return Answer(id, kind, Raw(body))
        return Answer(id, PLAIN_KIND, Raw(write_plain(value)))

    def _on_answer(self, node: str, answer: Answer) -> None:
        pending = self._calls.get(answer.id)
        if pending is None or pending.node != node:
            return
        del self._calls[answer.id]
        if answer.kind == PLAIN_KIND:
            value = read_plain(answer.body)
        elif (value := self._codec.decode(answer.kind, answer.body)) is None:
            error = Refused(pending.label, f"an answer of the unknown kind {answer.kind}")
            self._scheduler.answer_from(pending.caller, None, error)
            return
        self._scheduler.answer_from(pending.caller, value, None)

    def _on_failure(self, node: str, failure: Failure) -> None:
        pending = self._calls.get(failure.id)
        if pending is None or pending.node != node:
            return
        del self._calls[failure.id]
        error = _error_of(failure, pending.label)
        self._scheduler.answer_from(pending.caller, None, error)

    def _on_watch(self, node: str, watch: Watch) -> None:
        watched = self._watched.setdefault(node, {})
        if len(watched) >= MAX_WATCHES or watch.id in watched:
            raise LinkProtocolError("too many watches, or one twice")

        def ended(reason: str) -> None:
            self._watched.get(node, {}).pop(watch.id, None)
            self.tell(node, Ended(watch.id, _short(reason)))

        ref = self._scheduler.local(watch.number)
        if ref is None:
            ended("dead")
        else:
            watched[watch.id] = self._scheduler.watch(ref, ended)

    def _on_unwatch(self, node: str, unwatch: Unwatch) -> None:
        monitor = self._watched.get(node, {}).pop(unwatch.id, None)
        if monitor is not None:
            self._scheduler.unwatch(monitor)

    def _on_ended(self, node: str, ended: Ended) -> None:
        watching = self._watching.get(ended.id)
        if watching is not None and watching.node == node:
            del self._watching[ended.id]
            watching.ended(ended.reason)

    def _on_link(self, node: str, link: LinkWith) -> None:
        ref, peer = self._pair(node, link.number, link.own)
        if self._scheduler.linked_from(ref, peer):
            self._links.setdefault(node, {})[ref, peer] = None
        else:
            self.tell(node, Broken(link.number, link.own, "dead"))

    def _on_unlink(self, node: str, unlink: UnlinkFrom) -> None:
        ref, peer = self._pair(node, unlink.number, unlink.own)
        self._links.get(node, {}).pop((ref, peer), None)
        self._scheduler.unlinked_from(ref, peer)

    def _on_broken(self, node: str, broken: Broken) -> None:
        ref, peer = self._pair(node, broken.number, broken.own)
        self._links.get(node, {}).pop((ref, peer), None)
        self._scheduler.signal_from(ref, peer, broken.reason)

    def _on_signal(self, node: str, signal: Signal) -> None:
        ref = self._scheduler.local(signal.number)
        if ref is not None:
            sender = ActorRef(node, signal.own) if signal.own else None
            self._scheduler.exit(ref, signal.reason, sender=sender)

    def _on_broadcast(self, node: str, told: Broadcast) -> None:
        message = self._codec.decode(told.kind, told.body)
        if message is not None:
            self._scheduler.pubsub.publish(self._own_name(told.topic).name, message)

    # --- helpers ---

    def _post(self, node: str, target: int, message: object) -> None:
        try:
            self._send(node, target, message)
        except NoLink:
            self._unsent += 1
            raise
        self._sent += 1

    def _sweep(self) -> None:
        """Forget calls for which nobody waits any more, whenever their number has doubled."""
        if len(self._calls) < self._sweep_at:
            return
        self._calls = {id: each for id, each in self._calls.items() if each.caller.waiting}
        self._sweep_at = max(64, 2 * len(self._calls))

    def _own_name(self, written: bytes) -> NamedRef:
        try:
            ref = decode_ref(written)
        except InvalidRef as error:
            raise LinkProtocolError(str(error)) from None
        if not isinstance(ref, NamedRef):
            raise LinkProtocolError("a number, where a name belongs")
        return NamedRef(ref.name)

    def _pair(self, node: str, number: int, own: int) -> tuple[ActorRef, ActorRef]:
        """Our actor, and the sender's."""
        ref = self._scheduler.local(number) or ActorRef(self._scheduler.node, number)
        return ref, ActorRef(node, own)


def _node_of(ref: AnyRef) -> str:
    assert ref.node is not None
    return ref.node


def _short(text: str) -> str:
    return text[:MAX_REASON_CHARACTERS]


def _failure(id: int, error: Exception) -> Failure:
    match error:
        case Dead() | Crashed() | NodeLost():
            text = error.node if isinstance(error, NodeLost) else error.reason
        case Overloaded():
            text = str(error.limit)
        case NoHandler():
            text = error.message_type
        case _:
            return Failure(id, "Refused", _short(f"{type(error).__name__}: {error}"))
    return Failure(id, type(error).__name__, _short(text))


def _error_of(failure: Failure, label: str) -> Exception:
    match failure.error:
        case "Dead":
            return Dead(label, failure.text)
        case "Crashed":
            return Crashed(label, failure.text)
        case "NodeLost":
            return NodeLost(label, failure.text)
        case "NoHandler":
            return NoHandler(label, failure.text)
        case "Overloaded":
            return Overloaded(label, int(failure.text) if failure.text.isdecimal() else 0)
        case _:
            return Refused(label, failure.text)
