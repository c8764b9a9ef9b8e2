"""The proof of a relay's address, against our own relay and against what is none."""

from __future__ import annotations

import pytest
import trio

from channel.messages import IpText, SocketAddress
from portal.probe import prove_address
from relays.stun import Attribute, MessageClass, StunMessage, xor_address_value
from runtime.net.address import Address
from runtime.net.udp import UdpSocket
from runtime.randomness import SystemRandomness

pytestmark = pytest.mark.system


async def test_nobody_a_stranger_and_another_transport_prove_nothing() -> None:
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
            assert not await prove_address(here, randomness)
            nursery.cancel_scope.cancel()
        tcp = SocketAddress(address=IpText("127.0.0.1"), port=port, transport="tcp")
        assert not await prove_address(tcp, randomness)
    assert not await prove_address(here, randomness)


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
            assert await prove_address(here, SystemRandomness())
            nursery.cancel_scope.cancel()
