"""The server core beside a small reference model of allocations, permissions and channels.

The model knows four dictionaries and the clock; hypothesis looks for a sequence of requests, data
and pauses after which the two disagree about an error code or about a packet.
"""

from __future__ import annotations

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from relays.stun import Method
from relays.turn import (
    NS,
    channel_data,
    is_channel_data,
    read_channel_data,
    read_indication,
    send_indication,
)
from runtime.net.address import Address
from tests.unit.relays.bench import LIFETIME_0, UDP, Bench, Caller, code_of

PEERS = [Address(f"192.0.2.{host}", port) for host, port in ((1, 2000), (1, 3000), (2, 2000))]
NUMBERS = [0x4000, 0x4001]

callers = st.sampled_from([0, 0, 0, 1])
peers = st.sampled_from(PEERS)
numbers = st.sampled_from(NUMBERS)


@attrs.define
class Held:
    """What the model thinks that one client holds; times are ends."""

    relayed: Address
    expires: int
    permission_by_host: dict[str, int] = attrs.field(factory=dict)
    channel_by_number: dict[int, tuple[Address, int]] = attrs.field(factory=dict)


class RelayModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench.of()
        self.callers = [
            Caller(self.bench, ("198.51.100.2", 40_000)),
            Caller(self.bench, ("198.51.100.3", 40_000), "bob"),
        ]
        self.held: list[Held | None] = [None, None]
        for caller in self.callers:
            caller.learn_nonce()

    # --- requests ---

    @rule(who=callers)
    def allocate(self, who: int) -> None:
        if self.held[who] is not None:
            assert code_of(self.callers[who].call(Method.ALLOCATE, [UDP])) == 437
            return
        relayed = self.callers[who].allocate()
        self.held[who] = Held(relayed, self.bench.now + 600 * NS)

    @rule(who=callers)
    def refresh(self, who: int) -> None:
        held = self.held[who]
        assert code_of(self.callers[who].refresh()) == (0 if held else 437)
        if held is not None:
            held.expires = self.bench.now + 600 * NS

    @rule(who=callers)
    def give_back(self, who: int) -> None:
        code = code_of(self.callers[who].refresh(LIFETIME_0))
        assert code == (0 if self.held[who] else 437)
        self.held[who] = None

    @rule(who=callers, peer=peers)
    def permit(self, who: int, peer: Address) -> None:
        held = self.held[who]
        assert code_of(self.callers[who].permit(peer.host)) == (0 if held else 437)
        if held is not None:
            held.permission_by_host[peer.host] = self.bench.now + 300 * NS

    @rule(who=callers, number=numbers, peer=peers)
    def bind(self, who: int, number: int, peer: Address) -> None:
        held = self.held[who]
        code = code_of(self.callers[who].bind(number, peer))
        if held is None:
            assert code == 437
            return
        live = {n: p for n, (p, ends) in held.channel_by_number.items() if ends > self.bench.now}
        if live.get(number, peer) != peer or (peer in live.values() and live.get(number) != peer):
            assert code == 400
            return
        assert code == 0
        held.channel_by_number[number] = (peer, self.bench.now + 600 * NS)
        held.permission_by_host[peer.host] = self.bench.now + 300 * NS

    # --- data (a pause before each keeps strangers within their allowance) ---

    @rule(who=callers, number=numbers)
    def send_by_channel(self, who: int, number: int) -> None:
        self.pass_time(0.05)
        held = self.held[who]
        packet = channel_data(number, b"ping")
        peer, ends = held.channel_by_number.get(number, (None, 0)) if held else (None, 0)
        self.expect_at(who, packet, peer if ends > self.bench.now else None)

    @rule(who=callers, peer=peers)
    def send_by_indication(self, who: int, peer: Address) -> None:
        self.pass_time(0.05)
        self.expect_at(who, send_indication(peer, b"ping", bytes(12)), peer)

    @rule(who=callers, peer=peers)
    def hear(self, who: int, peer: Address) -> None:
        held = self.held[who]
        relayed = held.relayed if held else Address("203.0.113.6", 1)
        arrived = self.bench.from_peer(b"pong", peer, relayed)
        if held is None or not self.is_permitted(held, peer):
            assert arrived == []
            return
        ((destination, packet),) = arrived
        assert destination == self.callers[who].source
        live = [
            number
            for number, (bound, ends) in held.channel_by_number.items()
            if bound == peer and ends > self.bench.now
        ]
        view = memoryview(packet)
        assert is_channel_data(packet) == bool(live)
        if live:
            assert read_channel_data(view) is not None
            assert packet == channel_data(live[0], b"pong")
        else:
            unpacked = read_indication(view)
            assert unpacked is not None
            assert (unpacked[0], bytes(unpacked[1])) == (peer, b"pong")

    # --- time ---

    @rule()
    def allocate_all(self) -> None:
        for who in (0, 1):
            self.allocate(who)

    @rule(seconds=st.sampled_from([299, 301, 305]), permits=st.booleans())
    def pass_time_and_keep_allocations(self, seconds: float, permits: bool) -> None:
        self.pass_time(seconds)
        for who in (0, 1):
            self.refresh(who)
            if permits:
                self.permit(who, PEERS[0])

    @rule(seconds=st.sampled_from([1, 30, 299, 300, 599, 601]))
    def pass_time(self, seconds: float) -> None:
        self.bench.advance(seconds)
        self.held = [
            held if held is not None and held.expires > self.bench.now else None
            for held in self.held
        ]
        if seconds > 1:
            for caller in self.callers:
                caller.learn_nonce()

    @invariant()
    def the_machine_holds_one_port_for_each_allocation(self) -> None:
        live = {held.relayed.port for held in self.held if held is not None}
        assert {port for _, port in self.bench.sockets.open_ports.values()} == live
        assert self.bench.server.allocations == len(live)

    # --- helpers ---

    def is_permitted(self, held: Held, peer: Address) -> bool:
        return held.permission_by_host.get(peer.host, 0) > self.bench.now

    def expect_at(self, who: int, packet: bytes, peer: Address | None) -> None:
        held = self.held[who]
        left = self.bench.to_peers(packet, self.callers[who].source)
        if held is None or peer is None or not self.is_permitted(held, peer):
            assert left == []
        else:
            assert left == [(peer, b"ping", str(held.relayed.port))]


TestRelayModel = RelayModel.TestCase
TestRelayModel.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
