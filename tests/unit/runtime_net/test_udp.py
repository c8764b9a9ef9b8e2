"""UDP sockets on loopback: batches, drops that are counted, a close that wakes."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from runtime.net.address import Address
from runtime.net.udp import UdpSocket

ANY = Address("127.0.0.1", 0)


async def receive_all(udp: UdpSocket, count: int) -> list[tuple[bytes, Address]]:
    received: list[tuple[bytes, Address]] = []
    with trio.fail_after(10):
        while len(received) < count:
            await udp.wait_readable()
            received += udp.receive_batch()
    return received


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_datagrams_arrive_in_order_with_their_sender(host: str) -> None:
    with UdpSocket.bind(Address(host, 0)) as a, UdpSocket.bind(Address(host, 0)) as b:
        sent = [bytes([n]) * n for n in range(200)]
        for data in sent:
            assert a.send(data, b.local_address)
        assert await receive_all(b, 200) == [(data, a.local_address) for data in sent]
        assert b.receive_batch() == []
        assert b.statistics().received_bytes == a.statistics().sent_bytes == sum(map(len, sent))


async def test_a_batch_is_bounded() -> None:
    with UdpSocket.bind(ANY) as a, UdpSocket.bind(ANY) as b:
        for _ in range(5):
            a.send(b"x", b.local_address)
        await b.wait_readable()
        assert len(b.receive_batch(limit=3)) == 3
        assert len(b.receive_batch(limit=3)) == 2


async def test_what_the_kernel_refuses_is_counted_and_not_raised() -> None:
    with UdpSocket.bind(ANY, dont_fragment=True) as udp:
        assert not udp.send(b"x" * 65_520, udp.local_address)
        assert not udp.send(b"x", Address("2001:db8::1", 9))
        assert udp.statistics().dropped_refused == 2


async def test_closing_wakes_whoever_waits_and_is_harmless_twice() -> None:
    udp = UdpSocket.bind(ANY)
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await udp.wait_readable()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        udp.close()
        udp.close()
    assert udp.receive_batch() == []
    assert not udp.send(b"x", ANY)
    with pytest.raises(trio.ClosedResourceError):
        await udp.wait_readable()


def test_two_sockets_share_a_port_only_when_both_ask() -> None:
    with UdpSocket.bind(ANY, reuse_port=True) as first:
        with UdpSocket.bind(first.local_address, reuse_port=True) as second:
            assert second.local_address == first.local_address
        with pytest.raises(OSError, match="in use"):
            UdpSocket.bind(first.local_address)


async def test_a_socket_of_both_families_shows_ipv4_under_its_plain_addresses() -> None:
    with (
        UdpSocket.bind(Address("::", 0), dual_stack=True, dont_fragment=True) as both,
        UdpSocket.bind(ANY) as ipv4,
        UdpSocket.bind(Address("::1", 0)) as ipv6,
    ):
        for other, loopback in ((ipv4, "127.0.0.1"), (ipv6, "::1")):
            assert other.send(b"to all", Address(loopback, both.local_address.port))
            await both.wait_readable()
            assert both.receive_batch() == [(b"to all", other.local_address)]
            assert both.send(b"and back", other.local_address)
            await other.wait_readable()
            assert other.receive_batch()[0][0] == b"and back"
