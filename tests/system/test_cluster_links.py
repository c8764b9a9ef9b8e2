"""Node links over loopback: real TCP, real TLS, real trio; peers that lie, stall and vanish."""

from __future__ import annotations

import contextlib
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import attrs
import pytest
import trio
from trio import SSLStream

from runtime.clock import NS_PER_MS, NS_PER_S, SystemClock
from runtime.cluster.frames import MAX_FRAME_BYTES, LinkProtocolError, MessageCodec, frame
from runtime.cluster.link import Congested, Hello, Link, LinkSettings, Unreachable
from runtime.cluster.links import Deliver, NodeLinks
from runtime.cluster.membership import Membership, make_secret
from runtime.guard import surface_failures
from runtime.net.address import Address
from runtime.randomness import SystemRandomness
from runtime.secret import Secret

pytestmark = pytest.mark.system

RANDOMNESS = SystemRandomness()
LOOPBACK = Address("127.0.0.1", 0)
SETTINGS = LinkSettings(
    handshake_ns=2 * NS_PER_S,
    ping_ns=100 * NS_PER_MS,
    silence_ns=20 * NS_PER_S,
    stall_ns=60 * NS_PER_S,
    backoff_least_ns=20 * NS_PER_MS,
    backoff_most_ns=200 * NS_PER_MS,
)

IMPATIENT = attrs.evolve(SETTINGS, silence_ns=600 * NS_PER_MS, stall_ns=900 * NS_PER_MS)


@attrs.frozen
class Note:
    number: int
    text: str = ""


CODEC = MessageCodec({16: Note})


class Node:
    """A node with what it got, and what it was told of links."""

    def __init__(
        self,
        name: str,
        secret: Secret,
        incarnation: int = 1,
        settings: LinkSettings = SETTINGS,
        deliver: Deliver | None = None,
    ) -> None:
        self.name = name
        self.got: list[tuple[str, int, Any]] = []
        self.heard: list[tuple[str, int, bool]] = []
        self.address = LOOPBACK
        self.open = trio.Event()  # unset: this node takes nothing up
        self.open.set()
        self.scope = trio.CancelScope()
        self.links = NodeLinks(
            Membership(secret, name),
            incarnation,
            CODEC,
            deliver=deliver or self.deliver,
            changed=lambda *change: self.heard.append(change),
            clock=SystemClock(),
            randomness=RANDOMNESS,
            settings=settings,
        )

    async def deliver(self, node: str, messages: Sequence[tuple[int, Any]]) -> None:
        await self.open.wait()
        self.got.extend((node, target, message) for target, message in messages)

    async def run(
        self, listen: Address, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                self.address = await nursery.start(self.links.run, listen)
                task_status.started()


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.005)


async def start(nursery: trio.Nursery, node: Node, listen: Address = LOOPBACK) -> Node:
    await nursery.start(node.run, listen)
    return node


def acquaint(*nodes: Node) -> None:
    addresses = {node.name: node.address for node in nodes}
    for node in nodes:
        node.links.set_peers(addresses)


async def linked(*nodes: Node) -> None:
    """Wait until every node has a link with every other."""
    await until(lambda: all(len(node.links.linked()) == len(nodes) - 1 for node in nodes))


@asynccontextmanager
async def pair(settings: LinkSettings = SETTINGS) -> AsyncIterator[tuple[Node, Node]]:
    secret = make_secret(RANDOMNESS)
    async with trio.open_nursery() as nursery:
        a = await start(nursery, Node("a", secret, settings=settings))
        b = await start(nursery, Node("b", secret, settings=settings))
        acquaint(a, b)
        await linked(a, b)
        yield a, b
        nursery.cancel_scope.cancel()


class RawPeer:
    """A member of the cluster that says what the test wants, through a link core of its own."""

    def __init__(self, stream: SSLStream[trio.SocketStream], link: Link) -> None:
        self.stream = stream
        self.link = link

    async def become_ready(self) -> None:
        with trio.fail_after(10):
            while self.link.ready_ns is None:
                if self.link.has_output:
                    await self.stream.send_all(self.link.take_batch())
                self.link.receive(bytes(await self.stream.receive_some(9_000)), 0)

    async def ended(self) -> None:
        """Wait until the other side has closed."""
        with trio.fail_after(20):
            try:
                while await self.stream.receive_some(65_536):
                    pass
            except trio.BrokenResourceError:
                return


async def raw_peer(node: Node, secret: Secret, name: str = "z", incarnation: int = 1) -> RawPeer:
    """Dial `node` as the member `name`; TLS is done."""
    raw = await trio.open_tcp_stream(node.address.host, node.address.port)
    stream = SSLStream(raw, Membership(secret, name).client, https_compatible=True)
    await stream.do_handshake()
    hello = Hello(node=name, incarnation=incarnation)
    return RawPeer(stream, Link(hello, node.name, CODEC, SETTINGS, 0))


async def test_three_nodes_find_one_link_each_whoever_dialled():
    secret = make_secret(RANDOMNESS)
    async with trio.open_nursery() as nursery:
        nodes = [await start(nursery, Node(name, secret, 7)) for name in ("a", "b", "c")]
        acquaint(*nodes)
        await linked(*nodes)
        for node in nodes:
            for other in nodes:
                if other is not node:
                    node.links.send(other.name, 1, Note(1, f"from {node.name}"))
        await until(lambda: all(len(node.got) == 2 for node in nodes))
        assert nodes[0].links.linked() == {"b": 7, "c": 7}
        assert all(up for node in nodes for _, _, up in node.heard)
        nursery.cancel_scope.cancel()


async def test_when_all_dial_all_at_once_one_link_is_left_and_no_message_is_lost():
    secret = make_secret(RANDOMNESS)
    eager = attrs.evolve(SETTINGS, backoff_least_ns=NS_PER_MS)
    async with trio.open_nursery() as nursery:
        nodes = [await start(nursery, Node(name, secret, settings=eager)) for name in "abcde"]
        acquaint(*nodes)
        await linked(*nodes)
        for number in range(200):
            for node in nodes:
                for other in nodes:
                    if other is not node:
                        node.links.send(other.name, 1, Note(number))
            await trio.sleep(0.001)
        await until(lambda: all(len(node.got) == 4 * 200 for node in nodes))
        for node in nodes:
            for other in nodes:
                numbers = [note.number for name, _, note in node.got if name == other.name]
                assert numbers == ([] if other is node else list(range(200)))
        assert sum(node.links.statistics().lost for node in nodes) == 0
        nursery.cancel_scope.cancel()


async def test_messages_between_two_nodes_keep_their_order_both_ways():
    count = 20_000
    async with pair() as (a, b):

        async def send_all(source: Node, to: Node) -> None:
            for number in range(count):
                await source.links.send_when_possible(to.name, number % 7, Note(number))
                if number % 500 == 0:
                    await trio.sleep(0)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all, a, b)
            nursery.start_soon(send_all, b, a)
        await until(lambda: len(a.got) == len(b.got) == count)
        for node, other in ((a, "b"), (b, "a")):
            assert node.got == [(other, number % 7, Note(number)) for number in range(count)]


async def test_another_secret_is_refused_before_anything_is_read():
    secret, wrong = make_secret(RANDOMNESS), make_secret(RANDOMNESS)
    async with trio.open_nursery() as nursery:
        a = await start(nursery, Node("a", secret))
        b = await start(nursery, Node("b", wrong))
        acquaint(a, b)
        await until(lambda: a.links.statistics().refused_membership >= 2)
        assert a.links.linked() == b.links.linked() == {}

        careless = Membership(wrong, "b").client
        careless.verify_mode = ssl.CERT_NONE
        before = a.links.statistics()
        raw = await trio.open_tcp_stream(a.address.host, a.address.port)
        stream = SSLStream(raw, careless, https_compatible=True)
        answer = b""
        with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(20):
            await stream.send_all(frame(16, 1, b"\x92\x01\xa0"))
            answer = bytes(await stream.receive_some(1))
        assert answer == b"", "not even our hello"
        await until(lambda: a.links.statistics().refused_membership > before.refused_membership)
        assert a.got == []
        assert a.links.statistics().refused_protocol == 0, "no frame was looked at"
        nursery.cancel_scope.cancel()


async def test_bytes_that_are_no_tls_are_refused_and_others_are_served_on():
    async with pair() as (a, b):
        refused = a.links.statistics().refused_membership
        raw = await trio.open_tcp_stream(a.address.host, a.address.port)
        await raw.send_all(b"GET / HTTP/1.1\r\n\r\n" * 100)
        await until(lambda: a.links.statistics().refused_membership > refused)
        await raw.aclose()
        a.links.send("b", 1, Note(1))
        await until(lambda: b.got)


async def test_a_node_that_answers_under_another_name_than_was_dialled_is_refused():
    secret = make_secret(RANDOMNESS)
    async with trio.open_nursery() as nursery:
        a = await start(nursery, Node("a", secret))
        c = await start(nursery, Node("c", secret))
        a.links.set_peers({"b": c.address})
        await until(lambda: a.links.statistics().refused_membership >= 1)
        assert a.links.linked() == {}
        with pytest.raises(Unreachable, match="b is unreachable"):
            a.links.send("b", 1, Note(1))
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 100,
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big") + bytes(100),
        b"\0\0\0\3" + bytes(100),
        frame(16, 1, b"\xc1\xc1"),
        frame(16, 1, b"\x80\x04\x95cposix\nsystem\n."),  # a pickle is bytes like any other
        frame(1, 0, b"\x80"),
        frame(7, 0, b""),
    ],
    ids=["garbage", "oversize", "undersize", "malformed", "pickle", "second hello", "unknown word"],
)
async def test_a_member_that_sends_what_no_node_may_is_cut_off(data: bytes):
    secret = make_secret(RANDOMNESS)
    async with trio.open_nursery() as nursery:
        a = await start(nursery, Node("a", secret))
        peer = await raw_peer(a, secret)
        await peer.become_ready()
        await until(lambda: "z" in a.links.linked())
        await peer.stream.send_all(data)
        await peer.ended()
        await until(lambda: a.heard == [("z", 1, True), ("z", 1, False)])
        assert a.links.statistics().refused_protocol == 1
        assert a.got == []
        nursery.cancel_scope.cancel()


async def test_a_member_that_says_what_no_actor_may_hear_is_cut_off_too():
    """Found only when it is delivered; in production, where mistakes of ours are held back."""
    secret, before = make_secret(RANDOMNESS), surface_failures(False)

    async def deliver(node: str, messages: Sequence[tuple[int, Any]]) -> None:
        raise LinkProtocolError("a Note is not for a node")

    try:
        async with trio.open_nursery() as nursery:
            a = await start(nursery, Node("a", secret, deliver=deliver))
            peer = await raw_peer(a, secret)
            await peer.become_ready()
            await until(lambda: "z" in a.links.linked())
            await peer.stream.send_all(frame(16, 0, b"\x82\xa6number\x01\xa4text\xa0"))
            await peer.ended()
            await until(lambda: a.heard == [("z", 1, True), ("z", 1, False)])
            assert a.links.statistics().refused_protocol == 1
            assert a.links.statistics().delivery_failures == 0
            nursery.cancel_scope.cancel()
    finally:
        surface_failures(before)


async def test_a_peer_that_only_holds_the_connection_is_lost_by_its_silence():
    secret = make_secret(RANDOMNESS)
    async with trio.open_nursery() as nursery:
        a = await start(nursery, Node("a", secret, settings=IMPATIENT))
        peer = await raw_peer(a, secret)
        await peer.become_ready()
        await until(lambda: "z" in a.links.linked())
        await until(lambda: a.heard[-1] == ("z", 1, False))  # the socket stays open all the while
        with pytest.raises(Unreachable, match="no link"):
            a.links.send("z", 1, Note(1))
        await peer.stream.transport_stream.aclose()
        nursery.cancel_scope.cancel()


async def test_a_connection_that_never_proves_itself_is_closed_at_the_deadline():
    secret = make_secret(RANDOMNESS)
    async with trio.open_nursery() as nursery:
        a = await start(nursery, Node("a", secret))
        silent = await trio.open_tcp_stream(a.address.host, a.address.port)
        mute = await raw_peer(a, secret)  # TLS, but no hello
        await until(lambda: a.links.statistics().unproven == 2)
        await until(lambda: a.links.statistics().unproven == 0)
        await mute.ended()
        await silent.aclose()
        nursery.cancel_scope.cancel()


async def test_a_slow_reader_makes_its_sender_wait_and_loses_nothing():
    settings = attrs.evolve(SETTINGS, max_queued_messages=64, silence_ns=NS_PER_S)
    text = "x" * 20_000
    async with pair(settings) as (a, b):
        b.open = trio.Event()
        sent = 0
        with pytest.raises(Congested):  # noqa: PT012  # how many fit is the kernel's affair
            while True:
                a.links.send("b", 1, Note(sent, text))
                sent += 1
                if sent % 16 == 0:
                    await trio.sleep(0.002)
        while True:  # a busy kernel may still find room for some
            assert sent < 5_000
            with trio.move_on_after(1.5) as waited:
                await a.links.send_when_possible("b", 1, Note(sent, text))
            if waited.cancelled_caught:
                break
            sent += 1
        assert a.links.linked()
        assert b.links.linked(), "deafness of our own is not silence of the other"
        b.open.set()
        await a.links.send_when_possible("b", 1, Note(sent, text))
        await until(lambda: len(b.got) == sent + 1)
        assert [note.number for _, _, note in b.got] == list(range(sent + 1))


async def test_a_peer_that_reads_nothing_at_all_is_lost():
    secret = make_secret(RANDOMNESS)
    async with trio.open_nursery() as nursery:
        a = await start(nursery, Node("a", secret, settings=IMPATIENT))
        peer = await raw_peer(a, secret)
        await peer.become_ready()
        await until(lambda: "z" in a.links.linked())

        async def keep_pinging() -> None:
            with trio.CancelScope():
                try:
                    while True:
                        await peer.stream.send_all(frame(3, 1, b""))
                        await trio.sleep(0.05)
                except trio.BrokenResourceError:
                    return

        nursery.start_soon(keep_pinging)
        with pytest.raises(Unreachable, match="no link"), trio.fail_after(20):  # noqa: PT012
            while True:
                await a.links.send_when_possible("z", 1, Note(1, "x" * 100_000))
                await trio.sleep(0)
        nursery.cancel_scope.cancel()


ROOT = Path(__file__).parents[2]


class Process:
    """`cluster_node` as the node b, in a process of its own; killed at the end."""

    def __init__(self, secret: Secret, incarnation: int, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.cluster_node", "b", str(incarnation), str(port)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(secret.reveal_text() + "\n")
        self.process.stdin.flush()

    async def address(self) -> Address:
        assert self.process.stdout is not None
        return Address(
            "127.0.0.1", int(await trio.to_thread.run_sync(self.process.stdout.readline))
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


async def test_a_killed_process_is_unreachable_at_once_and_linked_again_when_it_returns():
    secret = make_secret(RANDOMNESS)
    async with trio.open_nursery() as nursery:
        a = await start(nursery, Node("a", secret))
        with Process(secret, 1) as first:
            address = await first.address()
            a.links.set_peers({"b": address})
            await linked_to(a, "b", 1)
            a.links.send("b", 5, Note(1))
            await until(lambda: ("b", 5, Note(1)) in a.got)  # it echoes
            first.process.kill()
            await until(lambda: a.links.linked() == {})
            with pytest.raises(Unreachable):
                a.links.send("b", 5, Note(2))
        with Process(secret, 2, address.port):
            await linked_to(a, "b", 2)
            a.links.send("b", 5, Note(3))
            await until(lambda: ("b", 5, Note(3)) in a.got)
        assert a.heard[:3] == [("b", 1, True), ("b", 1, False), ("b", 2, True)]
        nursery.cancel_scope.cancel()


async def test_a_stopped_process_is_lost_by_its_silence_and_linked_again_when_it_goes_on():
    secret = make_secret(RANDOMNESS)
    async with trio.open_nursery() as nursery:
        a = await start(nursery, Node("a", secret, settings=IMPATIENT))
        with Process(secret, 1) as b:
            a.links.set_peers({"b": await b.address()})
            await linked_to(a, "b", 1)
            b.process.send_signal(signal.SIGSTOP)
            await until(lambda: a.links.linked() == {})
            assert a.heard == [("b", 1, True), ("b", 1, False)]
            b.process.send_signal(signal.SIGCONT)
            await linked_to(a, "b", 1)
            a.links.send("b", 5, Note(3))
            await until(lambda: ("b", 5, Note(3)) in a.got)
        nursery.cancel_scope.cancel()


async def linked_to(node: Node, other: str, incarnation: int) -> None:
    await until(lambda: node.links.linked().get(other) == incarnation)


async def test_a_later_life_replaces_an_earlier_at_once_and_never_the_other_way():
    secret = make_secret(RANDOMNESS)
    async with trio.open_nursery() as nursery:
        a = await start(nursery, Node("a", secret))
        first = await raw_peer(a, secret, incarnation=1)
        await first.become_ready()
        second = await raw_peer(a, secret, incarnation=2)
        await second.become_ready()
        await first.ended()
        assert a.links.linked() == {"z": 2}
        stale = await raw_peer(a, secret, incarnation=1)
        await stale.stream.send_all(stale.link.take_batch())
        await stale.ended()
        assert a.links.linked() == {"z": 2}
        statistics = a.links.statistics()
        assert (statistics.replaced, statistics.duplicates) == (1, 1)
        assert a.heard == [("z", 1, True), ("z", 1, False), ("z", 2, True)]
        nursery.cancel_scope.cancel()


async def test_a_second_connection_of_one_life_waits_while_the_link_is_young_then_replaces_it():
    secret = make_secret(RANDOMNESS)
    settings = attrs.evolve(SETTINGS, handshake_ns=NS_PER_S)
    async with trio.open_nursery() as nursery:
        a = await start(nursery, Node("a", secret, settings=settings))
        first = await raw_peer(a, secret)
        await first.become_ready()
        early = await raw_peer(a, secret)
        await early.stream.send_all(early.link.take_batch())
        await early.ended()
        assert a.links.statistics().duplicates == 1
        await trio.sleep(1.2)
        later = await raw_peer(a, secret)
        await later.become_ready()
        await first.ended()
        assert a.links.linked() == {"z": 1}
        nursery.cancel_scope.cancel()


async def test_a_node_that_is_no_peer_any_more_is_let_go():
    async with pair() as (a, b):
        b.links.set_peers({})
        a.links.set_peers({})
        await until(lambda: a.links.linked() == b.links.linked() == {})


async def test_throughput_between_two_nodes_of_one_process():
    """Printed, never asserted; both nodes share one thread here."""
    count = 100_000
    async with pair(LinkSettings()) as (a, b):
        begin, cpu = perf_counter(), process_time()
        for number in range(count):
            await a.links.send_when_possible("b", 1, Note(number))
            if number % 1_000 == 0:
                await trio.sleep(0)
        await until(lambda: len(b.got) == count, 60)
        took_s, cpu_s = perf_counter() - begin, process_time() - cpu
        print(
            f"\nnode links, both ends in one thread: {count / took_s:,.0f} messages/s, "
            f"{count / cpu_s:,.0f} per CPU second"
        )
