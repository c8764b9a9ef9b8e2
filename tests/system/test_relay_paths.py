"""Data moves the same way by the compiled drain and in Python: what arrives where, in which order
within a flow, and what is counted."""

from __future__ import annotations

import resource
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relays.allocations import Allocation, Channel, Permission, Relayed
from relays.fastpath import drain as fastpath_drain
from relays.stun import Method
from relays.turn import NS, channel_data, send_indication
from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from tests.system.relay_paths import PATHS, End, RealBench, drain_for, opened, real_bench
from tests.unit.relays.bench import LIFETIME_0, UDP, Caller, code_of

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = [0x4000, 0x4001, 0x7FFF]
HOSTS = ["127.0.0.2", "127.0.0.2", "127.0.0.3"]


@attrs.define
class World:
    """Two clients and three peers (two of one address) around one relay."""

    bench: RealBench
    callers: list[Caller]
    peers: list[End]
    relayed: list[Address]

    @classmethod
    def of(cls, bench: RealBench) -> World:
        ends = [bench.end(f"127.0.0.{host}") for host in (4, 5)]
        callers = [
            Caller(bench, end.address, user)  # type: ignore[arg-type]
            for end, user in zip(ends, ("alice", "bob"), strict=True)
        ]
        peers = [bench.end(host) for host in HOSTS]
        return cls(bench, callers, peers, [caller.allocate() for caller in callers])

    def client(self, who: int) -> End:
        return self.bench.end_by_source[self.callers[who].source]

    def arrived(self) -> dict[object, list[bytes]]:
        """What has arrived, by flow: (end, from whom or which channel)."""
        self.bench.settle()
        names = {peer.address: f"peer {at}" for at, peer in enumerate(self.peers)}
        flows: dict[object, list[bytes]] = {}
        for at, peer in enumerate(self.peers):
            for data, source in peer.received():
                flows.setdefault((f"peer {at}", self.relayed.index(Address(*source))), []).append(
                    data
                )
        for at in range(len(self.callers)):
            for packet, source in self.client(at).received():
                assert source == self.bench.listener
                by, data = opened(packet)
                whom = names.get(by, "a relayed address") if isinstance(by, tuple) else by
                flows.setdefault((f"client {at}", whom), []).append(data)
        return flows


@pytest.fixture(params=PATHS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with real_bench(request.param) as bench:
        yield World.of(bench)


def numbered(count: int, size: int) -> list[bytes]:
    return [bytes([at]) * size for at in range(count)]


# --- the same outcome ----------------------------------------------------------------------------

who = st.integers(0, 1)
peer_of = st.integers(0, 2)
number_of = st.sampled_from(NUMBERS)
numbers_of = st.lists(number_of, min_size=1, max_size=3)
sizes = st.sampled_from([0, 1, 2, 100, 100, 1000, 1021, 1400, 9000])
as_trains = st.booleans()
steps = st.one_of(
    st.tuples(st.just("bind"), who, number_of, peer_of),
    st.tuples(
        st.just("client"), who, st.lists(number_of, min_size=1, max_size=3), sizes, as_trains
    ),
    st.tuples(
        st.just("client"), who, st.lists(number_of, min_size=1, max_size=1), sizes, as_trains
    ),
    st.tuples(st.just("peer"), peer_of, who, sizes, as_trains),
    st.tuples(st.just("peer"), peer_of, who, sizes, as_trains),
    st.tuples(st.just("permit"), who, peer_of),
    st.tuples(st.just("send"), who, peer_of, sizes),
    st.tuples(st.just("raw"), who, st.binary(max_size=40)),
    st.tuples(st.just("other"), who, who, sizes),
    st.tuples(st.just("wait"), st.sampled_from([0.001, 1, 120, 290, 400]), st.booleans()),
    st.tuples(st.just("anew"), who),
)


def live(path: str, history: list[tuple]) -> list[object]:  # type: ignore[type-arg]
    """What comes of a history, step by step."""
    outcome: list[object] = []
    with real_bench(path) as bench:
        world = World.of(bench)
        for at, step in enumerate([("bind", 0, NUMBERS[0], 0), ("peer", 0, 0, 5, False), *history]):
            outcome.append(do(world, step, at))
            outcome.append(world.arrived())
            outcome.append(bench.counts())
    return outcome


def do(world: World, step: tuple, at: int) -> object:  # type: ignore[type-arg]
    bench = world.bench
    match step:
        case "bind", client, number, peer:
            return code_of(world.callers[client].bind(number, world.peers[peer].address))
        case "permit", client, peer:
            return code_of(world.callers[client].permit(world.peers[peer].address.host))
        case "client", client, numbers, size, as_train:
            data = [
                channel_data(numbers[n % len(numbers)], one)
                for n, one in enumerate(numbered(min(40, 60_000 // (size + 4)), size))
            ]
            send(world.client(client), data, bench.listener, as_train)
        case "peer", peer, client, size, as_train:
            count = min(64, 60_000 // max(1, size))
            send(world.peers[peer], numbered(count, size), world.relayed[client], as_train)
        case "send", client, peer, size:
            packet = send_indication(world.peers[peer].address, bytes(size), bytes(12))
            world.client(client).send(packet, bench.listener)
        case "raw", client, data:
            world.client(client).send(data, bench.listener)
        case "other", client, other, size:
            caller = world.callers[client]
            code = code_of(caller.bind(0x5000 + other, world.relayed[other]))
            world.callers[other].permit(world.relayed[client].host)
            packet = channel_data(0x5000 + other, bytes(size))
            world.client(client).send(packet, bench.listener)
            return code
        case "wait", seconds, tell:
            bench.advance(seconds, tell=tell)
        case "anew", client:
            caller = world.callers[client]
            codes = [code_of(caller.refresh(LIFETIME_0))]
            answer = caller.call(Method.ALLOCATE, [UDP])
            if code_of(answer) == 438:
                caller.learn_nonce()
                answer = caller.call(Method.ALLOCATE, [UDP])
            relayed = answer.xor_address(0x0016)
            if relayed is not None:
                world.relayed[client] = relayed
            return [*codes, code_of(answer)]
    return None


def send(end: End, datagrams: list[bytes], to: tuple[str, int], as_train: bool) -> None:
    if as_train and datagrams and datagrams[0]:
        shorter = datagrams[-1][: max(1, len(datagrams[-1]) // 2)]
        end.send(b"".join([*datagrams[:-1], shorter]), to, len(datagrams[0]))
    else:
        for one in datagrams:
            end.send(one, to)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(steps, max_size=25))
def test_both_paths_have_the_same_outcome(history: list[tuple]) -> None:  # type: ignore[type-arg]
    assert live("python", history) == live("compiled", history)


# --- what each path does -------------------------------------------------------------------------


def bound(world: World) -> tuple[End, End]:
    """Client 0 and peer 0, which has answered on channel 0x4000."""
    assert code_of(world.callers[0].bind(0x4000, world.peers[0].address)) == 0
    world.peers[0].send(b"hello", world.relayed[0])
    assert world.arrived() == {("client 0", 0x4000): [b"hello"]}
    return world.client(0), world.peers[0]


def trains_sent(world: World) -> int:
    return world.bench.sockets.statistics()["sent_trains"]


def test_a_train_passes_as_one_both_ways(world: World) -> None:
    client, peer = bound(world)
    data = numbered(40, 1200)
    train = b"".join(channel_data(0x4000, one) for one in data)
    client.send(train, world.bench.listener, 1204)
    assert world.arrived() == {("peer 0", 0): data}
    assert trains_sent(world) == 1
    peer.send(b"".join(data), world.relayed[0], 1200)
    assert world.arrived() == {("client 0", 0x4000): data}
    assert trains_sent(world) == 2


def test_where_trains_are_refused_datagrams_go_one_by_one(world: World) -> None:
    client, peer = bound(world)
    for one in world.bench.sockets._socket_by_number.values():
        one.setsockopt(socket.SOL_SOCKET, 11, 1)  # SO_NO_CHECK: no trains without checksums
    data = numbered(40, 1200)
    for _ in range(2):
        client.send(b"".join(channel_data(0x4000, one) for one in data), world.bench.listener, 1204)
        assert world.arrived() == {("peer 0", 0): data}
        peer.send(b"".join(data), world.relayed[0], 1200)
        assert world.arrived() == {("client 0", 0x4000): data}
    assert trains_sent(world) == 0
    assert world.bench.sockets.statistics()["send_dropped_refused"] == 0


def test_what_a_stranger_may_get_is_counted_in_the_same_way(world: World) -> None:
    world.callers[0].bind(0x4000, world.peers[0].address)
    for _ in range(40):
        world.client(0).send(channel_data(0x4000, b"hello?"), world.bench.listener)
    assert world.arrived() == {("peer 0", 0): [b"hello?"] * 20}


@pytest.mark.parametrize("tell", [True, False])
def test_a_channel_ends_by_itself(world: World, tell: bool) -> None:
    client, peer = bound(world)
    world.bench.advance(301, tell=tell)
    client.send(channel_data(0x4000, b"late"), world.bench.listener)
    peer.send(b"late", world.relayed[0])
    assert world.arrived() == {}
    world.callers[0].permit(peer.address.host)
    peer.send(b"again", world.relayed[0])
    client.send(channel_data(0x4000, b"again"), world.bench.listener)
    assert world.arrived() == {("client 0", 0x4000): [b"again"], ("peer 0", 0): [b"again"]}


def test_nothing_passes_once_its_user_is_revoked(world: World) -> None:
    client, peer = bound(world)
    world.bench.server.revoke_user("alice")
    client.send(channel_data(0x4000, b"late"), world.bench.listener)
    peer.send(b"late", world.relayed[0])
    assert world.arrived() == {}


def test_a_relay_without_files_refuses_allocations_and_goes_on(world: World) -> None:
    bound(world)
    third = Caller(world.bench, world.bench.end("127.0.0.6").address)  # type: ignore[arg-type]
    third.learn_nonce()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert code_of(third.call(Method.ALLOCATE, [UDP])) == 508
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert world.bench.sockets.statistics()["sockets_not_opened"] > 0
    assert third.allocate()
    bound_again = channel_data(0x4000, b"still")
    world.client(0).send(bound_again, world.bench.listener)
    assert world.arrived() == {("peer 0", 0): [b"still"]}


def test_what_came_one_by_one_leaves_as_a_train_where_it_waited_together() -> None:
    with real_bench("compiled") as bench:
        world = World.of(bench)
        client, _ = bound(world)
        data = numbered(30, 172)
        for one in data:
            client.send(channel_data(0x4000, one), bench.listener)
        assert world.arrived() == {("peer 0", 0): data}
        assert trains_sent(world) == 1


def test_the_compiled_drain_moves_ipv6_and_knows_link_local_addresses_from_others() -> None:
    drain = drain_for("compiled")
    assert drain is not None
    listener, relayed, client, peer = (End.at("::1") for _ in range(4))
    ends = (listener, relayed, client, peer)
    drain.watch(listener.socket.fileno(), 1, is_listener=True)
    drain.watch(relayed.socket.fileno(), 2, is_listener=False)
    leg = Relayed(2, relayed.address, 2, 9 * NS)
    permission = Permission(9 * NS, leg, False, answered=True)
    allocation = Allocation(
        relayed=(leg,), listener=1, client=client.address, username="", transaction_id=b""
    )
    for number, to in ((0x4000, peer.address), (0x4001, Address("fe80::1", 2000))):
        channel = Channel(number, to, 9 * NS, permission)
        allocation.channel_by_number[number] = channel
    drain.channels_changed(allocation, NS)
    assert drain.statistics() == {"drain_routes": 2}
    with select.epoll() as epoll:
        epoll.register(listener.socket, select.EPOLLIN)
        epoll.register(relayed.socket, select.EPOLLIN)
        client.send(channel_data(0x4000, b"hello"), listener.address)
        client.send(channel_data(0x4001, b"nobody"), listener.address)
        peer.send(b"hello", relayed.address)
        peer.send(b"", relayed.address)
        _, unknown, failing = drain.turn(epoll.fileno(), 2 * NS)
    assert sorted(unknown) == [
        (1, channel_data(0x4001, b"nobody"), client.address, 0),
        (2, b"", peer.address, 0),
    ]
    assert failing == []
    assert peer.received() == [(b"hello", relayed.address)]
    assert client.received() == [(channel_data(0x4000, b"hello"), listener.address)]
    drain.allocation_ended(allocation)
    assert drain.statistics() == {"drain_routes": 0}
    for end in ends:
        end.socket.close()


NOT_BUILT = """
import sys

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name == "relays.fastpath._drain":
            raise ImportError("not built")

sys.meta_path.insert(0, Refusal())
from relays.fastpath.drain import load
from runtime.clock import SystemClock
from runtime.randomness import SystemRandomness
from relays.authentication import StaticCredentials
from relays.serving import Serving
from relays.settings import RelaySettings, check

assert load(SystemRandomness()) is None
settings = RelaySettings(listen=("127.0.0.1:0",), standalone=True, users_file="none")
serving = Serving(
    settings, check(settings), StaticCredentials({}), SystemClock(), certificates=None
)
print(serving.data_path)
"""


def test_a_relay_does_without_the_extension_and_with_no_other_version_of_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOT_BUILT], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "python\n", done.stderr
    other = ModuleType("_drain")
    other.__dict__["VERSION"] = fastpath_drain.VERSION + 1
    assert fastpath_drain.load(SeededRandomness(1, "drain"), other) is None


def test_routes_by_the_thousand_are_found_forgotten_and_bounded() -> None:
    """The table beside a dictionary: it grows, drops what has ended, and loses nothing else."""
    drain = drain_for("compiled")
    assert drain is not None
    listener, relayed = End.at("127.0.0.1"), End.at("127.0.0.1")
    drain.watch(listener.socket.fileno(), 1, is_listener=True)
    drain.watch(relayed.socket.fileno(), 2, is_listener=False)
    luck = SeededRandomness(5, "routes")
    held: dict[tuple[int, int], Allocation] = {}
    for _ in range(20_000):
        key = (luck.integer(40), 0x4000 + luck.integer(64))
        if key in held and luck.integer(2):
            drain.allocation_ended(held.pop(key))
            continue
        port = 2000 + key[0] * 64 + key[1] - 0x4000
        leg = Relayed(2, relayed.address, 1, 9 * NS)
        channel = Channel(
            key[1], Address("192.0.2.1", port), 9 * NS, Permission(9 * NS, leg, False, True)
        )
        allocation = Allocation(
            relayed=(leg,), listener=1, client=("198.51.100.2", 1024 + key[0]), username="",
            transaction_id=b"", channel_by_number={key[1]: channel},
        )  # fmt: skip
        drain.channels_changed(allocation, NS)
        held[key] = allocation
        assert drain.statistics() == {"drain_routes": 2 * len(held)}
    for allocation in held.values():
        drain.allocation_ended(allocation)
    assert drain.statistics() == {"drain_routes": 0}
    listener.socket.close()
    relayed.socket.close()
