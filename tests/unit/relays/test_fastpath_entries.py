"""The entries of the XDP program: what they carry is what the core would carry, and no more."""

from __future__ import annotations

import errno
from ipaddress import ip_address
from random import Random
from typing import Final

import attrs

from relays.fastpath.several import SeveralFastPaths
from relays.fastpath.xdp import NAMES, SWEEP_INTERVAL_NS, XdpFastPath, relayed_port_of
from relays.stun import Attribute
from relays.turn import NS
from runtime.net.address import Address
from tests.fastpath_model import TX, Flow, Model, Outcome, Way, datagram_of, frame_of
from tests.unit.relays.bench import (
    LIFETIME_0,
    LISTENER,
    RELAY_HOST,
    RELAY_HOST_IPV6,
    SERVER,
    Bench,
    Caller,
    channel_data_of,
    code_of,
)

CHANNEL: Final = 0x4000
PEER: Final = Address("192.0.2.10", 5000)
OTHER_PEER: Final = Address("192.0.2.11", 5000)
DATA: Final = b"a packet of WireGuard, or so"
WAY: Final = Way(1, b"\x02\0\0\0\0\x02", b"\x02\0\0\0\0\x03")


class MemoryFlows(dict[bytes, bytes]):
    """A map with so much room."""

    def __init__(self, room: int = 1000) -> None:
        super().__init__()
        self.room = room
        self.is_broken = False

    def update(self, key: bytes, value: bytes) -> None:  # type: ignore[override]
        assert (len(key), len(value)) == (40, 56)
        if key not in self and len(self) >= self.room:
            raise OSError(errno.E2BIG, "the map is full")
        self[key] = value

    def delete(self, key: bytes) -> None:
        if self.is_broken:
            raise OSError(errno.EBUSY, "another time")
        self.pop(key, None)


@attrs.define
class Fast:
    """A relay whose fast path is a dictionary, and the model of the program that reads it."""

    bench: Bench
    flows: MemoryFlows
    path: XdpFastPath

    @classmethod
    def of(cls, room: int = 1000, seed: int = 0, listens: bool = True) -> Fast:
        flows = MemoryFlows(room)
        path = XdpFastPath(
            flows=flows, counts=dict, relayed_hosts={1: RELAY_HOST, 2: RELAY_HOST_IPV6}
        )
        if listens:
            path.add_listener(LISTENER, SERVER)
        return cls(Bench.of(ipv6=True, seed=seed, fast_path=path), flows, path)

    def judge(self, frame: bytes) -> Outcome:
        model = Model(flows=self.flows, ways=lambda _: WAY, devices=set(), now=self.bench.now)
        return model.judge(frame)

    def from_client(self, caller: Caller, number: int = CHANNEL) -> Outcome:
        return self.judge(frame_of(caller.source, SERVER, wrapped(number, DATA)))

    def from_peer(self, relayed: Address, peer: Address = PEER) -> Outcome:
        return self.judge(frame_of(peer, relayed, DATA))

    def speak(self, relayed: Address, peer: Address = PEER) -> None:
        self.bench.from_peer(DATA, peer, relayed)


def wrapped(number: int, data: bytes) -> bytes:
    return number.to_bytes(2, "big") + len(data).to_bytes(2, "big") + data


def established(fast: Fast) -> tuple[Caller, Address]:
    """A client with a channel to a peer that has answered."""
    caller = Caller(fast.bench)
    relayed = caller.allocate()
    assert code_of(caller.bind(CHANNEL, PEER)) == 0
    fast.speak(relayed)
    return caller, relayed


def test_a_channel_goes_the_fast_way_both_ways_once_the_peer_has_answered() -> None:
    fast = Fast.of()
    caller = Caller(fast.bench)
    relayed = caller.allocate()
    caller.bind(CHANNEL, PEER)
    assert fast.flows == {}
    assert fast.from_client(caller).counted == "no_entry"
    fast.speak(relayed)
    to_peer, to_client = fast.from_client(caller), fast.from_peer(relayed)
    assert to_peer.verdict == to_client.verdict == TX
    ends = ((b"\xcb\x00\x71\x06", relayed.port), (b"\xc0\x00\x02\x0a", PEER.port))
    assert datagram_of(to_peer.frame) == (*ends, DATA, True)
    source, target, data, is_right = datagram_of(to_client.frame)
    assert (source, target) == ((b"\xcb\x00\x71\x06", 3478), (b"\xc6\x33\x64\x02", 40_000))
    assert channel_data_of(data) == (CHANNEL, DATA)
    assert is_right


def test_a_channel_bound_to_a_peer_that_has_answered_before_is_fast_at_once() -> None:
    fast = Fast.of()
    caller = Caller(fast.bench)
    relayed = caller.allocate()
    caller.permit(PEER.host)
    fast.speak(relayed)
    assert fast.flows == {}
    caller.bind(CHANNEL, PEER)
    assert fast.from_client(caller).verdict == TX


def test_other_channels_ports_and_peers_stay_with_the_core() -> None:
    fast = Fast.of()
    caller, relayed = established(fast)
    assert fast.from_client(caller, CHANNEL + 1).counted == "no_entry"
    assert fast.from_peer(relayed, OTHER_PEER).counted == "no_entry"
    assert fast.from_peer(relayed, Address(PEER.host, PEER.port + 1)).counted == "no_entry"
    stranger = Caller(fast.bench, ("198.51.100.3", 40_000))
    assert fast.from_client(stranger).counted == "no_entry"


def test_entries_end_with_the_permission_and_come_back_when_the_peer_answers_again() -> None:
    fast = Fast.of()
    caller, relayed = established(fast)
    fast.bench.now += 300 * NS - 1
    assert fast.from_client(caller).counted == "sampled"
    fast.bench.now += 1
    assert fast.from_client(caller).counted == "expired"
    assert fast.from_peer(relayed).counted == "expired"
    caller.bind(CHANNEL, PEER)
    assert fast.flows == {}  # the permission is a new one: its peer is a stranger again
    fast.speak(relayed)
    assert fast.from_client(caller).verdict == TX


def test_refreshing_the_permission_channel_and_allocation_moves_the_end() -> None:
    fast = Fast.of()
    caller, _ = established(fast)
    for minutes in range(4, 60, 4):
        fast.bench.now += 240 * NS
        caller.learn_nonce()
        caller.permit(PEER.host)
        if minutes % 8 == 0:
            caller.bind(CHANNEL, PEER)
            caller.refresh()
        assert fast.from_client(caller).verdict == TX
        [value, _] = fast.flows.values()
        assert Flow.read(value).expires_ns <= fast.bench.now + 300 * NS


def test_the_first_end_counts_that_of_the_allocation_too() -> None:
    fast = Fast.of()
    caller, _ = established(fast)
    fast.bench.now += 590 * NS
    caller.permit(PEER.host)
    caller.bind(CHANNEL, PEER)
    fast.speak(next(iter(fast.bench.server._table.by_relayed)))  # type: ignore[arg-type]
    ends = {Flow.read(value).expires_ns for value in fast.flows.values()}
    assert ends == {fast.bench.now + 10 * NS}


def test_an_allocation_given_back_or_expired_or_revoked_leaves_no_entry() -> None:
    for ending in ("given back", "expired", "revoked"):
        fast = Fast.of()
        caller, _ = established(fast)
        assert len(fast.flows) == 2
        if ending == "given back":
            caller.refresh(LIFETIME_0)
        elif ending == "expired":
            fast.bench.advance(600)
        else:
            assert fast.bench.server.revoke_user("alice") == 1
        assert fast.flows == {}, ending
        assert fast.path.statistics()["fast_path_channels"] == 0


def test_a_number_bound_to_another_peer_later_reaches_that_one_alone() -> None:
    fast = Fast.of()
    caller, relayed = established(fast)
    caller.refresh((Attribute.LIFETIME, (3600).to_bytes(4, "big")))
    fast.bench.now += 600 * NS
    caller.learn_nonce()
    assert code_of(caller.bind(CHANNEL, OTHER_PEER)) == 0
    fast.speak(relayed, OTHER_PEER)
    assert datagram_of(fast.from_client(caller).frame)[1] == (b"\xc0\x00\x02\x0b", 5000)
    assert len(fast.flows) == 2


def test_a_peer_bound_to_another_number_later_keeps_its_entries_when_the_old_are_swept() -> None:
    fast = Fast.of()
    caller, relayed = established(fast)
    caller.refresh((Attribute.LIFETIME, (3600).to_bytes(4, "big")))
    fast.bench.now += 600 * NS
    caller.learn_nonce()
    assert code_of(caller.bind(CHANNEL + 1, PEER)) == 0
    fast.speak(relayed)
    fast.path.handle_timeout(fast.bench.now + SWEEP_INTERVAL_NS)
    assert fast.from_client(caller, CHANNEL + 1).verdict == TX
    assert channel_data_of(datagram_of(fast.from_peer(relayed).frame)[2]) == (CHANNEL + 1, DATA)
    assert len(fast.flows) == 2


def test_own_addresses_never_go_the_fast_way() -> None:
    fast = Fast.of()
    caller, other = Caller(fast.bench), Caller(fast.bench, ("198.51.100.3", 40_000))
    relayed, to = caller.allocate(), other.allocate()
    caller.bind(CHANNEL, to)
    other.bind(CHANNEL, relayed)
    for each in (caller, other, caller):
        fast.bench.from_client(wrapped(CHANNEL, DATA), each.source)
    assert fast.bench.server.relayed_packets >= 3
    assert fast.flows == {}


def test_a_listener_that_is_not_known_by_its_address_has_no_entries() -> None:
    fast = Fast.of(listens=False)
    established(fast)
    assert fast.flows == {}


def test_a_full_map_leaves_no_half_of_a_channel() -> None:
    fast = Fast.of(room=3)
    _, _ = established(fast)
    caller = Caller(fast.bench, ("198.51.100.3", 40_000))
    relayed = caller.allocate()
    caller.bind(CHANNEL, PEER)
    fast.speak(relayed)
    assert len(fast.flows) == 2
    assert fast.path.statistics()["fast_path_refused_channels"] == 1
    assert fast.from_client(caller).counted == "no_entry"


def test_what_cannot_be_deleted_is_tried_again_and_holds_no_longer_than_it_said() -> None:
    fast = Fast.of()
    caller, _ = established(fast)
    fast.flows.is_broken = True
    fast.bench.server.revoke_user("alice")
    assert {Flow.read(value).expires_ns for value in fast.flows.values()} == {
        fast.bench.now + 300 * NS
    }
    fast.flows.is_broken = False
    fast.path.handle_timeout(fast.bench.now + SWEEP_INTERVAL_NS)
    assert fast.flows == {}
    assert fast.from_client(caller).counted == "no_entry"


def test_entries_that_have_ended_are_swept_out_of_the_map() -> None:
    fast = Fast.of()
    established(fast)
    fast.path.handle_timeout(fast.bench.now + 299 * NS)
    assert len(fast.flows) == 2
    fast.path.handle_timeout(fast.bench.now + 299 * NS + SWEEP_INTERVAL_NS)
    assert fast.flows == {}


def test_what_the_program_carried_is_part_of_what_the_relay_says_it_relayed() -> None:
    counts = {"to_peer": (5, 500), "to_client": (7, 700), "no_entry": (3, 0)}
    path = XdpFastPath(flows=MemoryFlows(), counts=lambda: counts, relayed_hosts={1: RELAY_HOST})
    said = Bench.of(fast_path=path).server.statistics()
    assert (said["relayed_packets"], said["relayed_bytes"]) == (12, 1200)
    assert said["fast_path_to_peer_packets"] == 5
    assert said["fast_path_passed_no_entry"] == 3
    assert {f"fast_path_passed_{name}" for name in NAMES[2:]} <= said.keys()


def test_several_fast_paths_are_told_alike_and_count_together() -> None:
    counted: list[dict[str, tuple[int, int]]] = [{"to_peer": (5, 500)}, {"to_client": (7, 700)}]
    maps = MemoryFlows(), MemoryFlows()
    paths = [
        XdpFastPath(flows=flows, counts=counts.copy, relayed_hosts={1: RELAY_HOST})
        for flows, counts in zip(maps, counted, strict=True)
    ]
    for path in paths:
        path.add_listener(LISTENER, SERVER)
    bench = Bench.of(fast_path=SeveralFastPaths(paths))
    caller = Caller(bench)
    relayed = caller.allocate()
    caller.bind(CHANNEL, PEER)
    bench.from_peer(DATA, PEER, relayed)
    assert len(maps[0]) == 2
    assert maps[0] == maps[1]
    assert {relayed_port_of(*entry) for entry in maps[0].items()} == {relayed.port}
    assert bench.server.statistics()["relayed_packets"] == 13
    SeveralFastPaths(paths).handle_timeout(bench.now + 300 * NS)
    assert not any(maps)
    bench.from_peer(DATA, PEER, relayed)
    caller.permit(PEER.host)
    caller.refresh(LIFETIME_0)
    assert not any(maps)


# --- histories ------------------------------------------------------------------------------------

PEERS: Final = (
    PEER,
    OTHER_PEER,
    Address(PEER.host, 5001),
    Address("2001:db8:9::1", 5000),
    Address(RELAY_HOST, 50_000),
)
OFTEN: Final = {
    "allocate": 3,
    "bind": 8,
    "permit": 3,
    "refresh": 3,
    "give back": 1,
    "speak": 8,
    "wait": 6,
    "revoke": 1,
    "sweep": 1,
}
HISTORIES: Final = 30
STEPS: Final = 120


def test_whatever_happens_the_program_carries_only_what_the_core_would_carry_alike() -> None:
    assert sum(history(seed) for seed in range(HISTORIES)) > 500


def history(seed: int) -> int:
    """One history; how many packets went the fast way in it."""
    fast, luck, carried = Fast.of(seed=seed), Random(seed), 0
    callers = [Caller(fast.bench), Caller(fast.bench, ("198.51.100.3", 40_000), "bob")]
    for caller in callers:
        caller.allocate()
    for _ in range(STEPS):
        [what] = luck.choices(list(OFTEN), list(OFTEN.values()))
        act(fast, what, luck.choice(callers), luck.choice(PEERS), luck)
        for each in callers:
            each.nonce = b""
        carried += compare(fast, callers)
    return carried


def act(fast: Fast, what: str, caller: Caller, peer: Address, luck: Random) -> None:
    server = fast.bench.server
    if what == "allocate":
        if caller.source not in server._table.by_client[LISTENER]:
            ipv6 = (Attribute.REQUESTED_ADDRESS_FAMILY, b"\2\0\0\0")
            caller.allocate(*([ipv6] if ":" in peer.host else []))
    elif what == "bind":
        caller.bind(CHANNEL + luck.randrange(3), peer)
    elif what == "permit":
        caller.permit(peer.host)
    elif what == "refresh":
        caller.refresh((Attribute.LIFETIME, luck.choice((600, 3600)).to_bytes(4, "big")))
    elif what == "give back":
        caller.refresh(LIFETIME_0)
    elif what == "speak":
        for relayed in list(server._table.by_relayed):
            fast.speak(Address(*relayed), peer)
    elif what == "wait":
        fast.bench.advance(luck.choice((1, 40, 100, 290)))
    elif what == "revoke":
        server.revoke_user(caller.username)
    else:
        fast.path.handle_timeout(fast.bench.now)


def compare(fast: Fast, callers: list[Caller]) -> int:
    """Send everything that could be sent the fast way; what goes, the core sends likewise. How
    much that was."""
    server, carried = fast.bench.server, 0
    fast.bench.server.drain_transmits()
    model = Model(flows=fast.flows, ways=lambda _: WAY, devices=set(), now=fast.bench.now)
    for key, value in list(fast.flows.items()):  # the sampling is not of interest here
        fast.flows[key] = value[:8] + fast.bench.now.to_bytes(8, "little") + value[16:]
    for caller in callers:
        for number in range(CHANNEL, CHANNEL + 3):
            data = wrapped(number, DATA)
            outcome = model.judge(frame_of(caller.source, SERVER, data))
            server.receive(LISTENER, memoryview(data), caller.source, fast.bench.now)
            sent = server.drain_transmits()
            if outcome.verdict == TX:
                carried += 1
                [(socket, core_data, destination)] = sent
                source, target, fast_data, _ = datagram_of(outcome.frame)
                assert bytes(core_data) == fast_data
                assert target == (ip_address(destination[0]).packed, destination[1])
                assert source[1] == fast.bench.sockets.open_ports[socket][1]
    for relayed in list(server._table.by_relayed):
        for peer in PEERS:
            if (":" in peer.host) != (":" in relayed[0]):
                continue
            outcome = model.judge(frame_of(peer, relayed, DATA))
            if outcome.verdict == TX:
                carried += 1
                [(destination, packet)] = fast.bench.from_peer(DATA, peer, Address(*relayed))
                _, target, fast_data, _ = datagram_of(outcome.frame)
                assert packet == fast_data
                assert target == (ip_address(destination[0]).packed, destination[1])
    held = fast.path.statistics()["fast_path_channels"]
    assert len(fast.flows) == 2 * held
    assert carried <= 2 * held
    return carried
