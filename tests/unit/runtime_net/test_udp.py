"""UDP sockets on loopback: batches, drops that are counted, a close that wakes."""

from __future__ import annotations

import os
import socket

import pytest
import trio
import trio.testing

from runtime.net.address import Address
from runtime.net.udp import UdpSocket

ANY = Address("127.0.0.1", 0)
SO_NO_CHECK = 11


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


def closed_port(host: str) -> Address:
    with UdpSocket.bind(Address(host, 0)) as gone:
        return gone.local_address


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_closed_port_is_told_and_costs_no_other_datagram(host: str) -> None:
    nobody = closed_port(host)
    with (
        UdpSocket.bind(Address(host, 0), tell_refusals=True) as udp,
        UdpSocket.bind(Address(host, 0)) as somebody,
    ):
        assert udp.send(b"is anybody there?", nobody)
        # The kernel tells of the refusal instead of sending this one; it goes out all the same.
        assert udp.send(b"hello", somebody.local_address)
        assert await receive_all(somebody, 1) == [(b"hello", udp.local_address)]
        with trio.fail_after(10):
            await udp.wait_readable()
        assert udp.receive_batch() == []
        assert udp.take_refusals() == [nobody]
        assert udp.take_refusals() == []
        somebody.send(b"and you", udp.local_address)
        assert await receive_all(udp, 1) == [(b"and you", somebody.local_address)]


async def test_refusals_are_taken_in_bounded_batches_and_only_when_asked_for() -> None:
    nobody = closed_port("127.0.0.1")
    with UdpSocket.bind(ANY, tell_refusals=True) as udp, UdpSocket.bind(ANY) as plain:
        for _ in range(5):
            assert udp.send(b"x", nobody)
            assert plain.send(b"x", nobody)
        with trio.fail_after(10):
            await udp.wait_readable()
        assert [len(udp.take_refusals(limit=3)) for _ in range(3)] == [3, 2, 0]
        assert plain.take_refusals() == []


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::"])
async def test_what_is_too_short_ends_in_the_kernel_and_wakes_nobody(host: str) -> None:
    with UdpSocket.bind(Address(host, 0), least_bytes=21, dual_stack=True) as udp:
        loopbacks = ["127.0.0.1", "::1"] if host == "::" else [host]
        for loopback in loopbacks:
            there = Address(loopback, udp.local_address.port)
            with UdpSocket.bind(Address(loopback, 0)) as sender:
                before = udp.statistics().dropped_unread
                for size in range(21):
                    assert sender.send(b"\xff" * size, there)
                with trio.move_on_after(0.05) as patience:
                    await udp.wait_readable()
                assert patience.cancelled_caught
                assert udp.statistics().dropped_unread == before + 21
                for size in (21, 22, 1_200):
                    assert sender.send(b"x" * size, there)
                sizes = [len(data) for data, _ in await receive_all(udp, 3)]
                assert sizes == [21, 22, 1_200]
        assert udp.statistics().received_datagrams == 3 * len(loopbacks)
    assert udp.statistics().dropped_unread == 0, "nobody can say any more"


async def test_what_found_no_room_is_counted() -> None:
    with UdpSocket.bind(ANY, buffer_bytes=4_096) as udp, UdpSocket.bind(ANY) as sender:
        for _ in range(100):
            assert sender.send(b"x" * 1_000, udp.local_address)
        received = 0
        while batch := udp.receive_batch():
            received += len(batch)
        assert 0 < received < 100
        assert udp.statistics().dropped_unread == 100 - received


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


@pytest.mark.parametrize("receives_trains", [False, True])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_trains_arrive_as_the_datagrams_they_were_made_of(
    host: str, receives_trains: bool
) -> None:
    at = Address(host, 0)
    with UdpSocket.bind(at, trains=True) as a, UdpSocket.bind(at, trains=receives_trains) as b:
        sizes = [1_300] * 70 + [90, 90, 40, 40, 1_300, 7, 8, 0, 0, 5] + [60_000] * 3 + [100] * 130
        sent = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
        assert a.send_batch(sent, b.local_address) == len(sent)
        assert await receive_all(b, len(sent)) == [(data, a.local_address) for data in sent]
        assert b.statistics().received_datagrams == a.statistics().sent_datagrams == len(sent)
        assert b.statistics().received_bytes == a.statistics().sent_bytes == sum(sizes)


async def test_a_train_that_the_kernel_refuses_goes_as_single_datagrams() -> None:
    with UdpSocket.bind(ANY, trains=True) as a, UdpSocket.bind(ANY) as b:
        raw = socket.socket(fileno=os.dup(a.fileno()))
        with raw:
            # The kernel segments nothing that is to go without a checksum.
            raw.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        sent = [b"x" * 100] * 10
        for _ in range(2):
            assert a.send_batch(sent, b.local_address) == 10
            assert [data for data, _ in await receive_all(b, 10)] == sent
        assert a.statistics().sent_datagrams == 20
        assert a.statistics().dropped_refused == 0


async def test_a_batch_that_cannot_go_anywhere_is_counted() -> None:
    with UdpSocket.bind(ANY, trains=True) as a:
        assert a.send_batch([b"x" * 9] * 3, Address("2001:db8::1", 9)) == 0
        assert a.statistics().dropped_refused == 3
