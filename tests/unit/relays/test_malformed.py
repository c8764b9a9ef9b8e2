"""Malformed packets of every kind at the server, at the client and at the codec: nothing but their
own errors comes of them.

Three ways to spoil a packet: its bytes are changed, cut or lengthened; its attributes are spoiled
and it is signed anew, so that what is wrong comes past the credentials; or it is random from the
start. 100,000 of them with HOLLOWAY_MALFORMED=100000 (`make soak`).
"""

from __future__ import annotations

import contextlib
import os
import random

import pytest

from relays.client import TurnClient
from relays.requests import ServerLimits
from relays.stun import (
    Attribute,
    Integrity,
    MessageClass,
    Method,
    StunError,
    StunMessage,
    address_value,
    error_value,
    xor_address_value,
)
from relays.turn import (
    NS,
    IcmpError,
    channel_data,
    data_indication,
    icmp_indication,
    read_channel_data,
    read_icmp_indication,
    read_indication,
    read_unfragmented_indication,
    send_indication,
)
from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from tests.unit.relays.bench import LISTENER, SERVER, UDP, Attributes, Bench, Caller

PACKETS = int(os.environ.get("HOLLOWAY_MALFORMED", "5000"))
CONNECTIONS = 5
SOURCE = ("198.51.100.2", 40_000)
PEER = Address("192.0.2.10", 5000)
PEER_IPV6 = Address("2001:db8::10", 5000)
ID = b"transaction!"
KINDS = [int(kind) for kind in Attribute] + [0x7777, 0xF777]
METHODS = [int(method) for method in Method] + [0x000, 0x5A5, 0xFFF]


class Spoiler:
    """Makes packets that somebody might have sent, and spoils them."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def bytes_spoiled(self, packet: bytes) -> bytes:
        spoiled = bytearray(packet)
        for _ in range(self.chance.randint(1, 4)):
            way = self.chance.randrange(5)
            at = self.chance.randrange(len(spoiled)) if spoiled else 0
            if way == 0 and spoiled:
                spoiled[at] = self.chance.randrange(256)
            elif way == 1 and spoiled:
                spoiled[at] ^= 1 << self.chance.randrange(8)
            elif way == 2:
                del spoiled[at:]
            elif way == 3:
                spoiled[at:at] = self.chance.randbytes(self.chance.randint(1, 24))
            elif len(spoiled) >= 20:  # as long as it says
                spoiled[2:4] = (len(spoiled) - 20).to_bytes(2, "big")
        return bytes(spoiled)

    def value(self, kind: int) -> bytes:
        """A value that an attribute of this kind has, might have, or cannot have."""
        usual = {
            int(Attribute.REQUESTED_TRANSPORT): UDP[1],
            int(Attribute.REQUESTED_ADDRESS_FAMILY): b"\2\0\0\0",
            int(Attribute.ADDITIONAL_ADDRESS_FAMILY): b"\2\0\0\0",
            int(Attribute.EVEN_PORT): b"\x80",
            int(Attribute.CHANNEL_NUMBER): b"\x40\0\0\0",
            int(Attribute.XOR_PEER_ADDRESS): xor_address_value(PEER, ID),
            int(Attribute.XOR_RELAYED_ADDRESS): xor_address_value(PEER_IPV6, ID),
            int(Attribute.XOR_MAPPED_ADDRESS): xor_address_value(PEER, ID),
            int(Attribute.ALTERNATE_SERVER): address_value(PEER),
            int(Attribute.ERROR_CODE): error_value(self.chance.choice((300, 401, 438, 508))),
            int(Attribute.CHANGE_REQUEST): b"\0\0\0\6",
        }.get(kind, b"")
        way = self.chance.randrange(4)
        if way == 0:
            return usual
        if way == 1:
            return self.bytes_spoiled(usual)
        return self.chance.randbytes(self.chance.choice((0, 1, 2, 4, 8, 20, 21, 300)))

    def attributes(self) -> Attributes:
        kinds = self.chance.choices(KINDS, k=self.chance.choice((0, 1, 2, 3, 5, 140)))
        return [(kind, self.value(kind)) for kind in kinds]

    def message(self, message_class: MessageClass, transaction_id: bytes = ID) -> StunMessage:
        return StunMessage(
            method=self.chance.choice(METHODS),
            message_class=message_class,
            transaction_id=transaction_id,
            attributes=tuple(self.attributes()),
        )

    def to_relay(self, caller: Caller) -> bytes:
        """Something for a relay, spoiled in one of the ways."""
        way = self.chance.randrange(4)
        if way == 0:
            return self.chance.randbytes(self.chance.choice((1, 4, 19, 20, 21, 60, 1500)))
        if way == 1:
            return self.message(MessageClass(self.chance.randrange(4))).encode()
        method = self.chance.choice(METHODS)
        if way == 2:
            attributes = self.attributes()
            if self.chance.random() < 0.5:
                attributes = [UDP, *attributes]
            return caller.encode(method, attributes, ID)
        return self.bytes_spoiled(
            self.chance.choice(
                (
                    channel_data(0x4000, b"ping"),
                    send_indication(PEER, b"ping", ID),
                    send_indication(PEER_IPV6, b"ping", ID, dont_fragment=True),
                    b"\0\1\0\x08" + bytes(16) + b"\0\3\0\4\0\0\0\6",
                    self.message(MessageClass.REQUEST).encode(fingerprint=True),
                    caller.encode(method, [UDP, *self.attributes()], ID),
                )
            )
        )

    def to_client(self, transaction_id: bytes, caller: Caller) -> bytes:
        """Something for a client that waits for this transaction, spoiled or signed."""
        message = self.message(
            self.chance.choice((MessageClass.SUCCESS, MessageClass.ERROR)), transaction_id
        )
        way = self.chance.randrange(4)
        if way == 0:
            return message.encode()
        if way == 1:
            return message.encode(key=caller.key, integrity=Integrity.SHA256)
        return self.bytes_spoiled(
            self.chance.choice(
                (
                    message.encode(),
                    data_indication(PEER, b"pong", ID),
                    icmp_indication(PEER, IcmpError(3, 4, 1300), ID),
                    channel_data(0x4000, b"pong"),
                )
            )
        )


def relay() -> tuple[Bench, list[Caller]]:
    """One that answers everybody, and two of its clients with allocations of both families."""
    limits = ServerLimits(
        unauthenticated_per_second=10**6, unauthenticated_burst=10**6, permissions_per_allocation=64
    )
    bench = Bench.of(ipv6=True, limits=limits)
    for number in (2, 3, 4):
        bench.server.add_listener(number)
    hosts = ("203.0.113.6", "203.0.113.7")
    corners = [Address(host, port) for host in hosts for port in (3478, 3479)]
    assert bench.server.offer_discovery(dict(enumerate(corners, LISTENER))) == 4
    bench.server.add_listener(CONNECTIONS, reliable=True)
    callers = [Caller(bench, SOURCE), Caller(bench, SOURCE, "bob", listener=CONNECTIONS)]
    for caller in callers:
        caller.allocate((Attribute.ADDITIONAL_ADDRESS_FAMILY, b"\2\0\0\0"))
        caller.permit(PEER.host, PEER_IPV6.host)
        caller.bind(0x4000, PEER)
    return bench, callers


@pytest.mark.timeout(600)
def test_no_malformed_packet_is_more_than_a_packet_to_the_server() -> None:
    bench, callers = relay()
    spoiler = Spoiler(1)
    server = bench.server
    for turn in range(PACKETS):
        caller = callers[turn % 2]
        packet = spoiler.to_relay(caller)
        server.receive(caller.listener, memoryview(packet), SOURCE, bench.now)
        for number, opened in list(bench.sockets.open_ports.items())[:2]:
            peer = PEER if opened[0] == 1 else PEER_IPV6
            server.receive_from_peer(number, memoryview(packet), peer, bench.now)
        for _, answer, _ in server.drain_transmits():
            assert len(answer) <= 65_535
        if turn % 500 == 499:
            bench.advance(60)
            for each in callers:
                each.nonce = b""
                each.call(Method.REFRESH, [])
    statistics = server.statistics()
    assert statistics["malformed_messages"] > PACKETS // 20
    assert statistics["errors_400"] > PACKETS // 50
    assert statistics["errors_420"] > PACKETS // 100
    assert len(bench.sockets.open_ports) <= 4 * len(callers)


@pytest.mark.timeout(600)
def test_no_malformed_packet_is_more_than_a_packet_to_the_client() -> None:
    bench, callers = relay()
    spoiler = Spoiler(2)
    now = bench.now
    challenge = callers[0].learn_nonce().attributes

    def new_client(seed: int) -> TurnClient:
        return TurnClient(
            server=SERVER, username="alice", password="opensesame", family="both",
            randomness=SeededRandomness(seed, "client"), now=now, redirects=2,
        )  # fmt: skip

    client, waiting = new_client(0), b""
    lives = 1
    for turn in range(PACKETS):
        for datagram in client.drain_datagrams():
            if datagram[0] < 0x40:
                waiting = datagram[8:20]
        packet = spoiler.to_client(waiting, callers[0])
        if spoiler.chance.random() < 0.1:  # so that some of them come past the challenge
            packet = StunMessage(
                method=Method.ALLOCATE,
                message_class=MessageClass.ERROR,
                transaction_id=waiting,
                attributes=challenge,
            ).encode()
        client.receive(packet, now)
        client.drain_events()
        now += NS // 10
        client.handle_timeout(now)
        if client.state == "over":
            client, lives = new_client(turn), lives + 1
    assert lives > PACKETS // 1000


@pytest.mark.timeout(600)
def test_the_codec_raises_nothing_but_its_own_error() -> None:
    _, callers = relay()
    spoiler = Spoiler(3)
    refused = 0
    for _ in range(PACKETS):
        packet = memoryview(spoiler.to_relay(callers[0]))
        read_channel_data(packet)
        read_indication(packet)
        read_unfragmented_indication(packet)
        read_icmp_indication(packet)
        try:
            message = StunMessage.decode(packet)
        except StunError:
            refused += 1
            continue
        with contextlib.suppress(StunError):
            message.error()
        for kind in {kind for kind, _ in message.attributes}:
            for read in (
                message.address,
                message.xor_addresses,
                message.text,
                message.password_algorithms,
            ):
                with contextlib.suppress(StunError):
                    read(kind)
    assert refused > PACKETS // 4
