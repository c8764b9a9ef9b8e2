"""Trains have the outcome of their datagrams: two relays live through the same history, one gets
trains and the other each datagram of them, and both send and count the same."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relays import trains
from relays.allocations import Allocation
from relays.fastpath import NoFastPath
from relays.server import Server
from relays.turn import NS, channel_data, send_indication
from runtime.net.address import Address
from tests.unit.relays.bench import LISTENER, RELAY_HOST, Bench, Caller

PEERS = [Address(f"192.0.2.{host}", port) for host, port in ((1, 2000), (1, 3000), (2, 2000))]
NUMBERS = [0x4000, 0x4001, 0x4002]
SOURCE = ("198.51.100.2", 40_000)
STRANGER = ("198.51.100.9", 9)

Sent = tuple[int, bytes, tuple[str, int]]


def sent_by(server: Server) -> list[Sent]:
    """All that the core has to send, datagram by datagram."""
    sent: list[Sent] = []
    for number, pieces, segment_bytes, datagrams, to in server.trains:
        train = b"".join(pieces)
        assert 0 < len(train) <= trains.MAX_TRAIN_BYTES
        assert 1 <= datagrams <= trains.MAX_SEGMENTS
        cut = [train[at : at + segment_bytes] for at in range(0, len(train), segment_bytes)]
        assert len(cut) == datagrams
        sent += [(number, one, to) for one in cut]
    server.trains.clear()
    return sent + [(number, bytes(data), to) for number, data, to in server.drain_transmits()]


@attrs.define
class Pair:
    """One relay that gets trains, and one that gets their datagrams."""

    whole: Bench
    apart: Bench
    relayed: Address
    sockets: list[int]
    trains_sent: int = 0

    @classmethod
    def of(cls) -> Pair:
        benches = [Bench.of(seed=3), Bench.of(seed=3)]
        relayed = {Caller(bench, SOURCE).allocate() for bench in benches}
        [one] = relayed
        sockets = [max(bench.sockets.open_ports) for bench in benches]
        return cls(*benches, one, sockets)

    def each(self) -> list[Caller]:
        return [Caller(bench, SOURCE) for bench in (self.whole, self.apart)]

    def advance(self, seconds: float) -> None:
        for bench in (self.whole, self.apart):
            bench.now += int(seconds * NS)

    def from_client(self, data: bytes, segment_bytes: int, source: tuple[str, int]) -> list[Sent]:
        now = self.whole.now
        self.whole.server.receive_train(LISTENER, memoryview(data), segment_bytes, source, now)
        for at in range(0, len(data), segment_bytes):
            one = memoryview(data)[at : at + segment_bytes]
            self.apart.server.receive(LISTENER, one, source, now)
        return self.compare()

    def from_peer(self, data: bytes, segment_bytes: int, peer: Address) -> list[Sent]:
        now = self.whole.now
        self.whole.server.receive_train_from_peer(
            self.sockets[0], memoryview(data), segment_bytes, peer, now
        )
        for at in range(0, len(data), segment_bytes):
            one = memoryview(data)[at : at + segment_bytes]
            self.apart.server.receive_from_peer(self.sockets[1], one, peer, now)
        return self.compare()

    def compare(self) -> list[Sent]:
        whole, apart = self.whole.server, self.apart.server
        self.trains_sent += len(whole.trains)
        sent = sent_by(whole)
        assert sent == sent_by(apart)
        assert whole.statistics() == apart.statistics()
        return sent


segments = st.integers(1, 40)
one_size = st.tuples(st.sampled_from([0, 1, 3, 4, 96, 196, 1000, 1199, 1400, 8000]), segments)


@st.composite
def client_trains(draw: st.DrawFn) -> tuple[bytes, int]:
    """Mostly what a client sends: ChannelData of one size. Sometimes other numbers, lengths that
    lie, padding, indications, garbage."""
    size, count = draw(one_size)
    number = draw(st.sampled_from(NUMBERS))
    padding = draw(st.sampled_from([0, 0, 0, 1, 3]))
    cut = [bytearray(channel_data(number, bytes(size)) + bytes(padding)) for _ in range(count)]
    for one in draw(st.lists(st.integers(0, count - 1), max_size=2)):
        match draw(st.integers(0, 3)):
            case 0:
                cut[one][0:2] = draw(st.sampled_from(NUMBERS)).to_bytes(2, "big")
            case 1:
                cut[one][2:4] = draw(st.integers(0, 65_535)).to_bytes(2, "big")
            case 2:
                other = send_indication(draw(st.sampled_from(PEERS)), bytes(size), bytes(12))
                cut[one] = bytearray(other[: len(cut[one])]).ljust(len(cut[one]))
            case _:
                cut[one] = bytearray(draw(st.binary(max_size=len(cut[one])))).ljust(len(cut[one]))
    segment_bytes = len(cut[0])
    if draw(st.booleans()):
        last = draw(st.integers(0, size))
        cut[-1] = bytearray(channel_data(number, bytes(last)))
    data = b"".join(cut)[: 65_507 // segment_bytes * segment_bytes]
    return data, segment_bytes


@st.composite
def peer_trains(draw: st.DrawFn) -> tuple[bytes, int]:
    size, count = draw(one_size)
    size = max(1, size)
    last = draw(st.integers(1, size))
    data = draw(st.binary(min_size=1, max_size=3)) * (size * count)
    return data[: min(size * (count - 1) + last, 65_507)], size


steps = st.one_of(
    st.tuples(st.just("client"), client_trains(), st.sampled_from([SOURCE, SOURCE, STRANGER])),
    st.tuples(st.just("client"), client_trains(), st.just(SOURCE)),
    st.tuples(st.just("peer"), peer_trains(), st.sampled_from(PEERS)),
    st.tuples(st.just("peer"), peer_trains(), st.just(Address(RELAY_HOST, 50_000))),
    st.tuples(st.just("bind"), st.sampled_from(NUMBERS), st.sampled_from(PEERS)),
    st.tuples(st.just("bind"), st.sampled_from(NUMBERS), st.just(Address(RELAY_HOST, 50_000))),
    st.tuples(st.just("permit"), st.sampled_from(PEERS), st.none()),
    st.tuples(st.just("wait"), st.sampled_from([0.001, 0.1, 1, 200, 299, 350]), st.none()),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=30))
def test_a_train_has_the_outcome_of_its_datagrams(history: list[tuple]) -> None:  # type: ignore[type-arg]
    pair = Pair.of()
    for kind, what, who in [("bind", NUMBERS[0], PEERS[0]), *history]:
        match kind:
            case "client":
                pair.from_client(*what, who)
            case "peer":
                pair.from_peer(*what, who)
            case "bind":
                for caller in pair.each():
                    caller.bind(what, who)
            case "permit":
                for caller in pair.each():
                    caller.permit(what.host)
            case "wait":
                pair.advance(what)


def bound_pair() -> Pair:
    pair = Pair.of()
    for caller in pair.each():
        caller.bind(NUMBERS[0], PEERS[0])
    return pair


def test_a_train_to_a_peer_that_answered_leaves_as_one() -> None:
    pair = bound_pair()
    pair.from_peer(b"x", 1, PEERS[0])
    train = channel_data(NUMBERS[0], bytes(1200)) * 53 + channel_data(NUMBERS[0], bytes(7))
    sent = pair.from_client(train, 1204, SOURCE)
    assert pair.trains_sent == 1
    assert [len(data) for _, data, _ in sent] == [1200] * 53 + [7]


def test_a_train_of_a_peer_leaves_as_one_and_as_two_where_the_headers_make_it_too_long() -> None:
    pair = bound_pair()
    assert len(pair.from_peer(bytes(1400) * 46, 1400, PEERS[0])) == 46
    assert pair.trains_sent == 1
    assert len(pair.from_peer(bytes(1021) * 64, 1021, PEERS[0])) == 64
    assert pair.trains_sent == 3


def test_no_stranger_gets_a_train() -> None:
    pair = bound_pair()
    sent = pair.from_client(channel_data(NUMBERS[0], bytes(100)) * 40, 104, SOURCE)
    assert pair.trains_sent == 0
    assert len(sent) == 20


def test_clients_on_connections_get_the_datagrams_of_a_train_one_by_one() -> None:
    bench = Bench.of()
    bench.server.add_listener(LISTENER, reliable=True)
    caller = Caller(bench, SOURCE)
    caller.allocate()
    caller.bind(NUMBERS[0], PEERS[0])
    socket = max(bench.sockets.open_ports)
    data = memoryview(bytes(4000))
    bench.server.receive_train_from_peer(socket, data, 1000, PEERS[0], bench.now)
    assert bench.server.trains == []
    assert len(bench.server.drain_transmits()) == 4


class Told(NoFastPath):
    """A fast path that remembers that it was told."""

    def __init__(self) -> None:
        self.answered: list[str | None] = []

    def channels_changed(self, allocation: Allocation, now: int, host: str | None = None) -> None:
        if host is not None and allocation.permission_by_host[host].answered:
            self.answered.append(host)


def test_a_fast_path_is_told_of_a_train_that_is_the_first_word_of_a_peer() -> None:
    told = Told()
    bench = Bench.of(fast_path=told)
    caller = Caller(bench, SOURCE)
    caller.allocate()
    caller.bind(NUMBERS[0], PEERS[0])
    socket = max(bench.sockets.open_ports)
    for _ in range(2):
        train = memoryview(bytes(200))
        bench.server.receive_train_from_peer(socket, train, 100, PEERS[0], bench.now)
    assert told.answered == [PEERS[0].host]


@pytest.mark.parametrize("segment_bytes", [1, 3, 4, 5])
def test_trains_of_no_more_than_a_header_are_taken_apart(segment_bytes: int) -> None:
    pair = bound_pair()
    pair.from_peer(b"x", 1, PEERS[0])
    pair.from_client(b"\x40\0\0\0" * 10, segment_bytes, SOURCE)
    assert pair.trains_sent == 0
