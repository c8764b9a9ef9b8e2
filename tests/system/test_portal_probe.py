"""The proof of a relay's address, against our own relay and against what is none."""

from __future__ import annotations

from functools import partial
from typing import Literal

import pytest
import trio

from channel.messages import IpText, SocketAddress
from portal.probe import prove_address
from relays.stun import Attribute, MessageClass, StunMessage, xor_address_value
from runtime.net.address import Address
from runtime.net.udp import UdpSocket
from runtime.randomness import SystemRandomness
from tests.system.stream_relay import stream_relay

PIN = "ab" * 32

pytestmark = pytest.mark.system


async def test_nobody_and_a_stranger_prove_nothing() -> None:
    randomness = SystemRandomness()
    with UdpSocket.bind(Address("127.0.0.1", 0)) as silent:
        port = silent.local_address.port
        here = SocketAddress(address=IpText("127.0.0.1"), port=port)
        async with trio.open_nursery() as nursery:

            async def babble() -> None:
                while True:
                    await silent.wait_readable()
                    for _, sender in silent.receive_batch():
                        silent.send(b"\x01\x01\x00\x00 not what was asked", sender)

            nursery.start_soon(babble)
            assert not await prove_address(here, (), randomness)
            nursery.cancel_scope.cancel()
        for transport in ("tcp", "tls", "quic"):
            there = SocketAddress(address=here.address, port=port, transport=transport)
            assert not await prove_address(there, (PIN,), randomness)
    assert not await prove_address(here, (), randomness)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_whoever_answers_stun_is_proved_even_if_a_datagram_is_lost(host: str) -> None:
    with UdpSocket.bind(Address(host, 0)) as relay:

        async def serve() -> None:
            heard = 0
            while True:
                await relay.wait_readable()
                for data, sender in relay.receive_batch():
                    heard += 1
                    if heard == 1:
                        continue
                    request = StunMessage.decode(data)
                    mapped = xor_address_value(sender, request.transaction_id)
                    answer = StunMessage(
                        method=request.method,
                        message_class=MessageClass.SUCCESS,
                        transaction_id=request.transaction_id,
                        attributes=((Attribute.XOR_MAPPED_ADDRESS, mapped),),
                    )
                    relay.send(answer.encode(), sender)

        here = SocketAddress(address=IpText(host), port=relay.local_address.port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            assert await prove_address(here, (), SystemRandomness())
            nursery.cancel_scope.cancel()


def at(address: Address, transport: Literal["tcp", "tls"]) -> SocketAddress:
    return SocketAddress(address=IpText(address.host), port=address.port, transport=transport)


async def test_our_relay_is_proved_over_tcp_and_over_tls_by_its_pin_alone() -> None:
    randomness = SystemRandomness()
    async with stream_relay() as relay:
        pin = relay.certificates.current.pin
        assert await prove_address(at(relay.tcp, "tcp"), (), randomness)
        assert await prove_address(at(relay.tls, "tls"), (PIN, pin), randomness)
        for pins in ((), (PIN,)):
            assert not await prove_address(at(relay.tls, "tls"), pins, randomness)
        assert not await prove_address(at(relay.tcp, "tls"), (pin,), randomness)
        assert not await prove_address(at(relay.tls, "tcp"), (pin,), randomness)


@pytest.mark.parametrize(
    "said", [b"", b"\x01\x01\x00\x0c" + bytes(40), b"\xff" * 20, b"HTTP/1.1 400"]
)
async def test_a_stranger_on_tcp_proves_nothing_whatever_it_says(said: bytes) -> None:
    async with trio.open_nursery() as nursery:

        async def babble(stream: trio.SocketStream) -> None:
            async with stream:
                await stream.send_all(said)

        listeners = await nursery.start(partial(trio.serve_tcp, babble, 0, host="127.0.0.1"))
        host, port = listeners[0].socket.getsockname()
        assert not await prove_address(at(Address(host, port), "tcp"), (), SystemRandomness())
        nursery.cancel_scope.cancel()
