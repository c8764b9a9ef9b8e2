"""Several processes as one relay: who has which ports, what each gives, what all count."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relays.authentication import StampedCredentials, StaticCredentials
from relays.processes.fleet import Fleet, share_of
from relays.processes.messages import (
    DrainNow,
    Inherited,
    Report,
    Revoke,
    Setup,
    ShownCertificate,
    ToWorker,
    decode_from_worker,
    decode_to_worker,
    encode,
)
from relays.processes.siblings import port_slices, sibling_of, unwrap, wrap
from relays.settings import RelaySettings
from relays.transports.statistics import TransportStatistics
from relays.turn import channel_data
from runtime.net.address import Address
from tests.unit.relays.bench import LISTENER, RELAY_HOST, Bench, Caller

SETTINGS = RelaySettings(name="lyon", token_file=Path("/etc/holloway/token"), max_allocations=100)
SIBLINGS = 77


@given(st.integers(1024, 60_000), st.integers(0, 5000), st.integers(1, 64))
def test_slices_cover_all_ports_and_cut_no_even_pair(first: int, more: int, count: int) -> None:
    last = min(65_535, first + 4 * count + more)
    slices = port_slices(first, last, count)
    assert [port for one in slices for port in range(one[0], one[1] + 1)] == [
        *range(first, last + 1)
    ]
    assert all(begin % 2 == 0 for begin, _ in slices[1:])
    assert all(end > begin for begin, end in slices)
    for port in range(first, last + 1, 97):
        at = sibling_of(port, slices)
        assert at is not None
        assert slices[at][0] <= port <= slices[at][1]
    assert sibling_of(first - 1, slices) is None
    assert sibling_of(last + 1, slices) is None


def test_too_few_ports_for_the_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        port_slices(50_000, 50_006, 2)


def test_processes_share_what_a_relay_gives_in_all() -> None:
    shares = [share_of(SETTINGS, (50_000, 50_999), 3)] * 3
    assert sum(share.max_allocations for share in shares) in range(100, 103)
    assert shares[0].max_allocations_per_user == 22
    assert shares[0].unauthenticated_per_second == 34
    assert shares[0].relayed_ports == "50000-50999"
    assert shares[0].processes == 1
    small = attrs.evolve(SETTINGS, max_allocations_per_user=10)
    assert share_of(small, (50_000, 50_999), 64).max_allocations_per_user == 8
    smaller = attrs.evolve(SETTINGS, max_allocations_per_user=3)
    assert share_of(smaller, (50_000, 50_999), 64).max_allocations_per_user == 3


def fleet_of(count: int, told: list[ToWorker]) -> Fleet:
    credentials = StampedCredentials(b"s" * 32)
    fleet = Fleet(settings=SETTINGS, ports=(50_000, 50_999), count=count, credentials=credentials)
    fleet.tell = told.append
    return fleet


def test_what_a_process_counted_stays_counted_when_it_ends() -> None:
    fleet = fleet_of(2, [])
    for index, packets in ((0, 10), (1, 5)):
        statistics = {"allocations": 20, "relayed_packets": packets}
        over_tls = TransportStatistics(allocations=1, connections=2, accepted=packets)
        over_tls.errors[401] += packets
        over_tls.ended["idle"] += 1
        transports = {"tls": attrs.asdict(over_tls)}
        report = Report(allocations=20, statistics=statistics, transports=transports)
        fleet.reported(index, decode_from_worker(encode(report)))
    assert (fleet.serving, fleet.allocations, fleet.load) == (2, 40, 0.4)
    fleet.ended(0)
    fleet.ended(0)
    assert (fleet.serving, fleet.allocations, fleet.load) == (1, 20, 0.2)
    assert fleet.statistics() == {"allocations": 20, "relayed_packets": 15}
    over_tls = fleet.transports()["tls"]
    assert (over_tls.allocations, over_tls.connections, over_tls.accepted) == (1, 2, 15)
    assert (over_tls.errors, over_tls.ended) == ({401: 15}, {"idle": 2})


def test_all_are_told_of_a_revoked_user_and_until_when() -> None:
    told: list[ToWorker] = []
    fleet = fleet_of(2, told)
    assert isinstance(fleet.credentials, StampedCredentials)
    fleet.credentials.revoke("A" * 16, until_unix_s=1_800_000_000, unix_s=0)
    fleet.revoke_user("A" * 16)
    fleet.drain()
    assert told == [Revoke(user="A" * 16, until_unix_s=1_800_000_000), DrainNow()]
    assert fleet.draining


def test_what_is_said_between_processes_arrives_as_it_was_said() -> None:
    setup = Setup(
        index=1,
        slices=[(50_000, 50_499), (50_500, 50_999)],
        settings=SETTINGS,
        inherited=Inherited(listeners=[("127.0.0.1", 3478, 7)], inbox=8, posts=[9, -1]),
        users=None,
        stamp_secret=bytes(range(32)),
        relay_id=UUID(int=5),
        revoked_until={"A" * 16: 1},
        draining=False,
        certificate=ShownCertificate(chain=b"chain", key=b"key"),
    )
    assert decode_to_worker(encode(setup)) == setup
    report = Report(allocations=3, statistics={"allocations": 3}, transports={})
    assert decode_from_worker(encode(report)) == report
    with pytest.raises(msgspec.MsgspecError):
        decode_from_worker(b"{}")


def test_passwords_and_secrets_are_for_the_processes_of_the_relay_alone() -> None:
    assert StaticCredentials({"a": "b"}).reveal_passwords() == {"a": "b"}
    assert StampedCredentials(b"x").reveal_stamp_secret() == b"x"


# --- between siblings --------------------------------------------------------------------------


def test_data_for_a_siblings_port_goes_there_and_its_answer_comes_back() -> None:
    benches = [Bench.of(ports=ports) for ports in ((50_000, 50_099), (50_100, 50_199))]
    callers = [Caller(bench) for bench in benches]
    relayed = [caller.allocate() for caller in callers]
    for at, (bench, caller) in enumerate(zip(benches, callers, strict=True)):
        bench.server.use_siblings(SIBLINGS)
        caller.bind(0x4000, relayed[1 - at])
    for at in (0, 1):
        here, there = benches[at], benches[1 - at]
        packet = channel_data(0x4000, b"hello")
        here.server.receive(LISTENER, memoryview(packet), callers[at].source, here.now)
        [(number, wrapped, to)] = here.server.drain_transmits()
        assert (number, to) == (SIBLINGS, relayed[1 - at])
        there.server.receive_from_sibling(memoryview(wrapped), there.now)
        [sent] = there.server.drain_transmits()
        assert sent == (LISTENER, packet, callers[1 - at].source)
    assert [bench.server.relayed_packets for bench in benches] == [1, 1]


def test_a_siblings_data_needs_an_allocation_and_its_permission() -> None:
    bench = Bench.of()
    caller = Caller(bench)
    relayed = caller.allocate()
    sibling = (RELAY_HOST, 50_500)
    closed = relayed.port + 1 if relayed.port < 65_535 else relayed.port - 1
    for to in (relayed, Address(RELAY_HOST, closed)):
        bench.server.receive_from_sibling(memoryview(wrap(sibling, to, b"hello")), bench.now)
    assert bench.server.drain_transmits() == []
    assert bench.server.dropped_packets == 2
    caller.permit(RELAY_HOST)
    bench.server.receive_from_sibling(memoryview(wrap(sibling, relayed, b"hello")), bench.now)
    assert len(bench.server.drain_transmits()) == 1


def test_data_for_an_own_port_that_is_no_allocation_goes_to_no_sibling() -> None:
    bench = Bench.of(ports=(50_000, 50_099))
    bench.server.use_siblings(SIBLINGS)
    caller = Caller(bench)
    relayed = caller.allocate()
    port = 50_000 if relayed.port != 50_000 else 50_001
    caller.bind(0x4000, (RELAY_HOST, port))
    packet = memoryview(channel_data(0x4000, b"hello"))
    bench.server.receive(LISTENER, packet, caller.source, bench.now)
    assert bench.server.drain_transmits() == []
    assert bench.server.dropped_packets == 1


@given(st.binary(max_size=8))
def test_a_packet_between_siblings_that_is_cut_short_is_refused(packet: bytes) -> None:
    if len(packet) < 5:
        with pytest.raises(ValueError, match="head"):
            unwrap(memoryview(packet))
    else:
        assert unwrap(memoryview(packet))[3] == packet[5:]


def test_both_families_are_told_apart_between_siblings() -> None:
    for at, host in ((1, RELAY_HOST), (2, "2001:db8::6")):
        family, source_port, port, data = unwrap(memoryview(wrap((host, 1), (host, 2), b"x")))
        assert (family, source_port, port, bytes(data)) == (at, 1, 2, b"x")
