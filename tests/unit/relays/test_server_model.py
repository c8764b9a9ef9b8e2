"""The server core beside a reference model of RFC 8656 (`turn_reference`), which knows none of it.

Hypothesis looks for a history after which the two disagree about an error code, a packet or an open
port: requests of four clients of two users, by datagrams and by connections and two of them at one
address, for relayed addresses of either family, both, pairs and reserved ones; requests that come
twice or late; clients whose address changes and connections that end; expiries, revocations, ICMP
errors, a drain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relays.requests import ServerLimits
from relays.stun import Attribute, Method, StunMessage, read_xor_address, xor_address_value
from relays.turn import (
    IcmpError,
    channel_data,
    is_channel_data,
    read_channel_data,
    read_icmp_indication,
    read_indication,
    send_indication,
)
from tests.unit.relays.bench import LISTENER, UDP, Attributes, Bench, Caller, code_of
from tests.unit.relays.turn_reference import Client, Peer, Reference, S, family_of

CONNECTIONS = LISTENER + 1
PEERS: list[Peer] = [
    ("192.0.2.1", 2000),
    ("192.0.2.1", 3000),
    ("192.0.2.2", 2000),
    ("2001:db8::1", 2000),
    ("2001:db8::2", 2000),
    ("10.0.0.1", 2000),
    ("192.0.2.2", 53),
]
USUAL = [PEERS[0], PEERS[3]]
BOTH = (Attribute.ADDITIONAL_ADDRESS_FAMILY, b"\2\0\0\0")
OF_IPV4 = (Attribute.REQUESTED_ADDRESS_FAMILY, b"\1\0\0\0")
OF_IPV6 = (Attribute.REQUESTED_ADDRESS_FAMILY, b"\2\0\0\0")
EVEN = (Attribute.EVEN_PORT, b"\0")
PAIR = (Attribute.EVEN_PORT, b"\x80")
WANTS: dict[str, Attributes] = {
    "the usual": [],
    "IPv4": [OF_IPV4],
    "IPv6": [OF_IPV6],
    "both": [BOTH],
    "even": [EVEN],
    "both even": [BOTH, EVEN],
    "a pair": [PAIR],
    "a pair of IPv6": [PAIR, OF_IPV6],
    "contradiction": [BOTH, OF_IPV6],
    "another one": [BOTH, PAIR],
    "a token": [],
}
FAMILIES = {"IPv6": {2}, "a pair of IPv6": {2}, "both": {1, 2}, "both even": {1, 2}}
NONCE_IS_GOOD = 3500 * S
NONCE_IS_STALE = 3700 * S

callers = st.sampled_from([0, 0, 0, 0, 1, 2, 3])
peers = st.sampled_from([*USUAL, *USUAL, *PEERS])
numbers = st.sampled_from([0x4000, 0x4001, 0x4FFF])
families = st.sampled_from([None, None, 1, 2])
fates = st.sampled_from(["once", "once", "twice"])


@attrs.define
class Sent:
    """A request that left once, and may come again: `expect` is what the reference has to say, and
    `happened` what a success changes there."""

    client: Client
    data: bytes
    nonce_at: int
    expect: Callable[[], int]
    happened: Callable[[StunMessage], None]


class RelayModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        limits = ServerLimits(allocations_per_username=2, allocations=3)
        self.bench = Bench.of(ipv6=True, limits=limits)
        self.bench.server.add_listener(CONNECTIONS, reliable=True)
        self.reference = Reference(
            per_user=2,
            in_all=3,
            is_forbidden=lambda host: host.startswith("10."),
            now=self.bench.now,
        )
        self.callers = [
            Caller(self.bench, ("198.51.100.2", 40_000)),
            Caller(self.bench, ("198.51.100.3", 40_000), "bob"),
            Caller(self.bench, ("198.51.100.2", 40_000), listener=CONNECTIONS),
            Caller(self.bench, ("198.51.100.2", 40_000), "bob"),
        ]
        self.nonce_at = [0] * len(self.callers)
        self.tokens: list[bytes] = []
        self.late: deque[Sent] = deque(maxlen=6)
        self.steps = 0

    # --- requests ---

    @rule(who=callers, want=st.sampled_from(sorted(WANTS)), fate=fates, age=st.integers(0, 2))
    def allocate(self, who: int, want: str, fate: str, age: int) -> None:
        client, user, transaction = self.identify(who)
        attributes, token = [UDP, *WANTS[want]], None
        if want == "a token":
            token = self.tokens[-1 - age] if age < len(self.tokens) else bytes(8)
            attributes.append((Attribute.RESERVATION_TOKEN, token))
        is_sane = want not in ("contradiction", "another one")

        def expect() -> int:
            return self.reference.allocate_code(
                client, user, transaction, token, is_sane=is_sane, reserves="pair" in want
            )

        def happened(answer: StunMessage) -> None:
            self.allocated(client, user, transaction, want, token, answer)

        self.ask(who, Method.ALLOCATE, attributes, transaction, fate, expect, happened)

    def allocated(
        self,
        client: Client,
        user: str,
        transaction: bytes,
        want: str,
        token: bytes | None,
        answer: StunMessage,
    ) -> None:
        if client in self.reference.held:
            return
        ports = {}
        for value in answer.values(Attribute.XOR_RELAYED_ADDRESS):
            host, port = read_xor_address(value, answer.transaction_id)
            ports[family_of(host)] = port
            assert port % 2 == 0 or ("even" not in want and "pair" not in want)
        if token is None:
            assert set(ports) == FAMILIES.get(want, {1})
        else:
            family, leg = self.reference.reserved.pop(token)
            assert ports == {family: leg.port}
        assert answer.xor_address(Attribute.XOR_MAPPED_ADDRESS) == client[1]
        self.reference.allocate(client, user, transaction, ports)
        new_token = answer.value(Attribute.RESERVATION_TOKEN)
        assert (new_token is not None) == ("pair" in want)
        if new_token is not None:
            ((family, port),) = ports.items()
            self.reference.reserve(new_token, family, port + 1)
            self.tokens.append(new_token)

    @rule(who=callers)
    def hold_both_and_use_them(self, who: int) -> None:
        if self.client(who) not in self.reference.held:
            self.allocate(who, "both", "once", 0)
        for number, peer in zip((0x4000, 0x4001), USUAL, strict=True):
            self.bind(who, number, peer, "once")

    @precondition(lambda self: self.tokens)
    @rule(who=callers, age=st.integers(0, 2), fate=fates)
    def take_what_was_reserved(self, who: int, age: int, fate: str) -> None:
        """Two want it."""
        self.allocate(who, "a token", fate, age)
        self.allocate((who + 1) % len(self.callers), "a token", fate, age)

    @rule(who=callers, family=st.sampled_from([1, 2]))
    def give_one_family_back(self, who: int, family: int) -> None:
        self.refresh(who, family, 0, "once")
        for peer in USUAL:
            self.send_by_indication(who, peer, False)

    @rule(who=callers, family=families, lifetime=st.sampled_from([600, 600, 1800, 0]), fate=fates)
    def refresh(self, who: int, family: int | None, lifetime: int, fate: str) -> None:
        client, user, transaction = self.identify(who)
        attributes: Attributes = [(Attribute.LIFETIME, lifetime.to_bytes(4, "big"))]
        if family is not None:
            attributes.append(OF_IPV4 if family == 1 else OF_IPV6)

        def expect() -> int:
            return self.reference.refresh_code(client, user, family, lifetime)

        def happened(answer: StunMessage) -> None:
            assert answer.integer(Attribute.LIFETIME, 4) == lifetime
            self.reference.refresh(client, family, lifetime * S)

        self.ask(who, Method.REFRESH, attributes, transaction, fate, expect, happened)

    @rule(who=callers, some=st.lists(peers, min_size=1, max_size=3), fate=fates)
    def permit(self, who: int, some: list[Peer], fate: str) -> None:
        client, user, transaction = self.identify(who)
        hosts = [host for host, _ in some]
        attributes: Attributes = [
            (Attribute.XOR_PEER_ADDRESS, xor_address_value((host, 0), transaction))
            for host in hosts
        ]

        def expect() -> int:
            return self.reference.permit_code(client, user, hosts)

        def happened(_: StunMessage) -> None:
            self.reference.permit(client, hosts)

        self.ask(who, Method.CREATE_PERMISSION, attributes, transaction, fate, expect, happened)

    @rule(who=callers, number=numbers, peer=peers, fate=fates)
    def bind(self, who: int, number: int, peer: Peer, fate: str) -> None:
        client, user, transaction = self.identify(who)
        attributes: Attributes = [
            (Attribute.CHANNEL_NUMBER, number.to_bytes(2, "big") + b"\0\0"),
            (Attribute.XOR_PEER_ADDRESS, xor_address_value(peer, transaction)),
        ]

        def expect() -> int:
            return self.reference.bind_code(client, user, number, peer)

        def happened(_: StunMessage) -> None:
            self.reference.bind(client, number, peer)

        self.ask(who, Method.CHANNEL_BIND, attributes, transaction, fate, expect, happened)

    @precondition(lambda self: self.late)
    @rule(age=st.integers(0, 5))
    def a_request_comes_again_late(self, age: int) -> None:
        sent = self.late[-1 - age % len(self.late)]
        since = self.bench.now - sent.nonce_at
        if since < NONCE_IS_GOOD:
            self.deliver(sent)
        elif since > NONCE_IS_STALE:
            assert code_of(self.answer_to(sent)) == 438

    # --- data (a pause before each keeps strangers within their allowance) ---

    @rule(who=callers, number=numbers)
    def send_by_channel(self, who: int, number: int) -> None:
        self.pass_time(0.05)
        peer = self.reference.peer_of(self.client(who), number)
        self.expect_at(who, channel_data(number, b"ping"), peer, is_whole=False)

    @rule(who=callers, peer=peers, is_whole=st.booleans())
    def send_by_indication(self, who: int, peer: Peer, is_whole: bool) -> None:
        self.pass_time(0.05)
        packet = send_indication(peer, b"ping", bytes(12), dont_fragment=is_whole)
        self.expect_at(who, packet, peer, is_whole=is_whole)

    @rule(who=callers, peer=peers, is_error=st.booleans())
    def hear(self, who: int, peer: Peer, is_error: bool) -> None:
        client = self.client(who)
        held = self.reference.held.get(client)
        leg = None if held is None else held.legs.get(family_of(peer[0]))
        if leg is None:
            return
        socket = self.socket_of(family_of(peer[0]), leg.port)
        error = IcmpError(3, 0) if is_error else None
        if error is not None:
            self.bench.server.receive_icmp(socket, peer, error, self.bench.now)
        else:
            self.bench.server.receive_from_peer(socket, memoryview(b"pong"), peer, self.bench.now)
        arrived = self.bench.server.drain_transmits()
        is_let_in, number = self.reference.comes_in(client, peer)
        if not is_let_in:
            assert arrived == []
            return
        ((listener, packet, to),) = arrived
        assert (listener, to) == client
        view = memoryview(bytes(packet))
        if error is not None:
            assert read_icmp_indication(view) == (peer, error)
        elif number is not None:
            assert is_channel_data(view)
            assert read_channel_data(view) is not None
            assert packet == channel_data(number, b"pong")
        else:
            unpacked = read_indication(view)
            assert unpacked is not None
            assert (unpacked[0], bytes(unpacked[1])) == (peer, b"pong")

    # --- what happens to clients ---

    @rule(who=callers, port=st.sampled_from([40_000, 40_001]))
    def a_client_comes_from_another_address(self, who: int, port: int) -> None:
        """By datagrams a new mapping of a NAT; by a connection, its end and another one."""
        caller = self.callers[who]
        if caller.listener == CONNECTIONS:
            self.bench.server.client_gone(CONNECTIONS, caller.source)
            self.reference.connection_ended(self.client(who))
        caller.source = (caller.source[0], port)
        caller.nonce = b""

    @precondition(lambda self: self.steps % 5 == 4)
    @rule(user=st.sampled_from(["alice", "bob"]))
    def a_user_is_revoked(self, user: str) -> None:
        expected = sum(one.user == user for one in self.reference.held.values())
        assert self.bench.server.revoke_user(user) == expected
        self.reference.revoke(user)

    @precondition(lambda self: self.steps > 40)
    @rule()
    def the_relay_drains(self) -> None:
        self.bench.server.drain()
        self.reference.is_draining = True

    @rule(seconds=st.sampled_from([1, 29, 31, 299, 301, 305]))
    def pass_time_and_keep_allocations(self, seconds: float) -> None:
        self.pass_time(seconds)
        for who in range(len(self.callers)):
            self.refresh(who, None, 600, "once")

    @precondition(lambda self: self.steps % 10 == 9)
    @rule(seconds=st.sampled_from([601, 4000]))
    def pass_much_time(self, seconds: float) -> None:
        self.pass_time(seconds)

    @rule(seconds=st.sampled_from([1, 30, 299, 300, 599]))
    def pass_time(self, seconds: float) -> None:
        self.bench.advance(seconds)
        self.reference.pass_to(self.bench.now)

    @invariant()
    def the_machine_holds_one_port_for_each_relayed_address(self) -> None:
        self.steps += 1
        held = self.reference.held.values()
        live = {(family, leg.port) for one in held for family, leg in one.legs.items()}
        live |= {(family, leg.port) for family, leg in self.reference.reserved.values()}
        assert set(self.bench.sockets.open_ports.values()) == live
        assert self.bench.server.allocations == len(self.reference.held)

    # --- helpers ---

    def client(self, who: int) -> Client:
        return self.callers[who].listener, self.callers[who].source

    def identify(self, who: int) -> tuple[Client, str, bytes]:
        """Client, user and a new transaction id, with a nonce that is good."""
        caller = self.callers[who]
        if not caller.nonce or self.bench.now - self.nonce_at[who] > 3000 * S:
            caller.learn_nonce()
            self.nonce_at[who] = self.bench.now
        return self.client(who), caller.username, caller.transaction_id()

    def ask(
        self,
        who: int,
        method: Method,
        attributes: Attributes,
        transaction: bytes,
        fate: str,
        expect: Callable[[], int],
        happened: Callable[[StunMessage], None],
    ) -> None:
        data = self.callers[who].encode(method, attributes, transaction)
        sent = Sent(self.client(who), data, self.nonce_at[who], expect, happened)
        for _ in range(2 if fate == "twice" else 1):
            self.deliver(sent)
        self.late.append(sent)

    def deliver(self, sent: Sent) -> None:
        expected = sent.expect()
        answer = self.answer_to(sent)
        assert code_of(answer) == expected
        if expected == 0:
            sent.happened(answer)

    def answer_to(self, sent: Sent) -> StunMessage:
        listener, source = sent.client
        (raw,) = self.bench.from_client(sent.data, source, listener)
        return StunMessage.decode(raw)

    def socket_of(self, family: int, port: int) -> int:
        return next(
            number
            for number, opened in self.bench.sockets.open_ports.items()
            if opened == (family, port)
        )

    def expect_at(self, who: int, packet: bytes, peer: Peer | None, *, is_whole: bool) -> None:
        listener, source = self.client(who)
        self.bench.server.receive(listener, memoryview(packet), source, self.bench.now)
        left = [(n, bytes(data), to) for n, data, to in self.bench.server.drain_transmits()]
        leg = None if peer is None else self.reference.goes_out((listener, source), peer)
        if peer is None or leg is None:
            assert left == []
        else:
            socket = self.socket_of(family_of(peer[0]), leg.port)
            assert left == [(-socket if is_whole else socket, b"ping", peer)]


TestRelayModel = RelayModel.TestCase
TestRelayModel.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
