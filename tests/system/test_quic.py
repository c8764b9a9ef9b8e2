"""QUIC on real sockets: bytes both ways, bounds, moves, restarts and strangers."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
from cryptography.x509 import Certificate

from runtime.net.address import Address
from runtime.net.quic import (
    BAD_CERTIFICATE,
    CONNECTION_REFUSED,
    HANDSHAKE_TIMEOUT,
    IDLE_TIMEOUT,
    LEAST_DATAGRAM_BYTES,
    PORT_CLOSED,
    STATELESS_RESET,
    QuicClosed,
    QuicConnection,
    QuicLimits,
    QuicListener,
    connect_quic,
)
from runtime.net.udp import UdpSocket
from tests.ports import free_port
from tests.system.rebinding import Rebinding
from tests.unit.channel.certificates import Authority

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]

AUTHORITY = Authority("quic")
CHAIN, KEY = AUTHORITY.issue_pem("localhost", "127.0.0.1")
ANY = Address("127.0.0.1", 0)
S = 10**9


def trust_all(chain: Sequence[Certificate]) -> None:
    assert len(chain) == 2


@asynccontextmanager
async def listening(
    handler: object, *, address: Address = ANY, limits: QuicLimits | None = None, **options: bytes
) -> AsyncIterator[QuicListener]:
    listener = QuicListener(
        UdpSocket.bind(address, least_bytes=LEAST_DATAGRAM_BYTES),
        certificate_chain_pem=CHAIN,
        key_pem=KEY,
        alpn="test/1",
        limits=limits,
        **options,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.serve, handler)
        yield listener
        nursery.cancel_scope.cancel()


def dial(listener: QuicListener, limits: QuicLimits | None = None, alpn: str = "test/1"):  # type: ignore[no-untyped-def]  # a context manager
    return connect_quic(
        listener.address, server_name="localhost", alpn=alpn, verify=trust_all, limits=limits
    )


async def echo(connection: QuicConnection) -> None:
    try:
        connection.send(b"hello")
        while data := await connection.receive():
            await connection.send_all(data)
    except QuicClosed:
        return


async def receive_exactly(connection: QuicConnection, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await connection.receive()
        assert piece
        data += piece
    assert len(data) == size
    return data


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_the_server_speaks_first_and_bytes_travel_both_ways(host: str) -> None:
    async with listening(echo, address=Address(host, 0)) as listener, dial(listener) as connection:
        assert not connection.send(b"too early"), "the server opens the stream"
        assert await connection.receive() == b"hello"
        blob = os.urandom(3_000_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.send_all, blob)
            assert await receive_exactly(connection, len(blob)) == blob
        assert connection.remote == listener.address
        assert len(connection.certificates) == 2


async def test_a_reader_that_does_not_read_holds_the_writer_back() -> None:
    limits = QuicLimits(receive_window_bytes=64 * 1024, send_buffer_bytes=100_000)
    reading = trio.Event()
    total = 2_000_000
    done = trio.Event()

    async def slow(connection: QuicConnection) -> None:
        connection.send(b"!")
        await reading.wait()
        await receive_exactly(connection, total)
        done.set()

    async with listening(slow, limits=limits) as listener, dial(listener, limits) as connection:
        await connection.receive()
        queued = 0
        while connection.send(bytes(10_000)):
            queued += 10_000
        assert queued <= 120_000
        with trio.move_on_after(0.3) as scope:
            while True:
                await connection.send_all(bytes(10_000))
                queued += 10_000
        assert scope.cancelled_caught
        assert queued < 64 * 1024 + 120_000, "no more than the window and the buffer is under way"
        reading.set()
        while queued < total:
            await connection.send_all(bytes(10_000))
            queued += 10_000
        await done.wait()


async def test_a_refused_certificate_ends_the_handshake_before_anything_is_sent() -> None:
    accepted: list[QuicConnection] = []

    async def note(connection: QuicConnection) -> None:
        accepted.append(connection)

    class NotMine(Exception):
        pass

    def refuse(chain: Sequence[Certificate]) -> None:
        assert chain[1] == AUTHORITY.certificate
        raise NotMine

    async with listening(note) as listener:
        with pytest.raises(NotMine):
            async with connect_quic(
                listener.address, server_name="localhost", alpn="test/1", verify=refuse
            ):
                raise AssertionError("never entered")
        while listener.statistics().connections:
            await trio.sleep(0.01)
        assert not accepted, "the server never saw the handshake complete"
    assert BAD_CERTIFICATE == 0x12A


async def test_another_protocol_is_refused() -> None:
    async with listening(echo) as listener:
        with pytest.raises(QuicClosed) as caught:
            async with dial(listener, alpn="other/9"):
                raise AssertionError("never entered")
        assert 0x100 <= caught.value.code < 0x200


async def test_a_close_carries_its_code_and_reason_after_what_was_sent() -> None:
    async def say_goodbye(connection: QuicConnection) -> None:
        connection.send(bytes(500_000))
        connection.close(7, "good\nbye", linger_ns=5 * S)
        assert not connection.send(b"more")

    async with listening(say_goodbye) as listener, dial(listener) as connection:
        await receive_exactly(connection, 500_000)
        assert await connection.receive() == b"", "the stream ends"
        while connection.closed is None:
            await trio.sleep(0.01)
        assert connection.closed.code == 7
        assert connection.closed.reason == "good?bye"


async def test_what_the_block_raises_comes_out_as_it_is() -> None:
    async with listening(echo) as listener:
        with pytest.raises(KeyError, match="mine"):
            async with dial(listener):
                raise KeyError("mine")


@asynccontextmanager
async def behind_nat(
    listener: QuicListener, limits: QuicLimits | None = None
) -> AsyncIterator[tuple[Rebinding, QuicConnection]]:
    """A connection through a NAT."""
    nat = Rebinding(listener.address)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(nat.run)
        async with connect_quic(
            nat.inside.local_address,
            server_name="localhost",
            alpn="test/1",
            verify=trust_all,
            limits=limits,
        ) as connection:
            yield nat, connection
        nursery.cancel_scope.cancel()


async def test_a_client_whose_address_changes_is_followed_to_its_new_path() -> None:
    moved = trio.Event()
    remotes: list[Address] = []

    async def note(connection: QuicConnection) -> None:
        def migrated(remote: Address) -> None:
            remotes.append(remote)
            moved.set()

        connection.on_migrated = migrated
        remotes.append(connection.remote)
        await echo(connection)

    async with listening(note) as listener, behind_nat(listener) as (nat, connection):
        assert await connection.receive() == b"hello"
        first = nat.outside.local_address
        ponged = trio.Event()
        connection.on_pong = ponged.set
        nat.rebind()
        connection.ping()
        await moved.wait()
        await ponged.wait()
        assert remotes == [first, nat.outside.local_address]
        connection.send(b"still here")
        assert await connection.receive() == b"still here"


async def test_a_server_that_vanished_is_noticed_by_the_idle_timeout() -> None:
    limits = QuicLimits(idle_timeout_ns=S // 2)
    async with listening(echo) as listener, behind_nat(listener, limits) as (nat, connection):
        await connection.receive()
        with UdpSocket.bind(ANY) as nobody:
            nat.server = nobody.local_address
            with pytest.raises(QuicClosed) as caught:
                await connection.receive()
        assert caught.value.code == IDLE_TIMEOUT


# Nothing but a closed port ends a connection with these while a test runs.
PATIENT = QuicLimits(idle_timeout_ns=3_600 * S, handshake_timeout_ns=3_600 * S)


async def test_a_server_whose_socket_is_gone_is_noticed_by_its_next_datagram() -> None:
    async with (
        listening(echo, limits=PATIENT) as listener,
        behind_nat(listener, PATIENT) as (nat, connection),
    ):
        assert await connection.receive() == b"hello"
        nat.go_away()
        connection.send(b"anybody?")
        with pytest.raises(QuicClosed) as caught:
            await connection.receive()
        assert caught.value.code == PORT_CLOSED


async def test_a_keepalive_alone_finds_a_server_whose_socket_is_gone() -> None:
    async with (
        listening(echo, limits=PATIENT) as listener,
        behind_nat(listener, PATIENT) as (nat, connection),
    ):
        assert await connection.receive() == b"hello"
        await trio.sleep(0.1)  # until nothing is under way that could be refused
        nat.go_away()
        suspicion = connection._endpoint.suspicion
        with trio.move_on_after(0.1):
            await connection.receive()
        assert not suspicion.open, "nobody asked"
        connection.keepalive()
        with pytest.raises(QuicClosed) as caught:
            await connection.receive()
        assert caught.value.code == PORT_CLOSED


async def test_keepalives_cost_a_server_nothing_and_are_never_answered() -> None:
    limits = QuicLimits(max_connections_per_source=2, max_handshakes_per_source=1, resets_per_s=1)
    async with listening(echo, limits=limits) as listener, dial(listener, limits) as connection:
        assert await connection.receive() == b"hello"
        with UdpSocket.bind(ANY) as stranger:
            for _ in range(1_000):
                connection.keepalive()
                stranger.send(b"\xff", listener.address)
            assert listener.statistics().dropped_unread == 2_000
            connection.send(b"well")
            assert await connection.receive() == b"well"
            async with dial(listener, limits) as another:
                assert await another.receive() == b"hello"
            assert stranger.receive_batch() == []
        found = listener.statistics()
        assert (found.accepted, found.refused_limit, found.retries_sent) == (2, 0, 0)
        assert (found.resets_sent, found.failures) == (0, 0)


async def test_a_refusal_that_any_packet_of_the_server_follows_is_forgotten() -> None:
    """The refusal is the kernel's own, and yet a lie: the server lives, behind a NAT whose socket
    is away for a moment."""
    async with (
        listening(echo, limits=PATIENT) as listener,
        behind_nat(listener, PATIENT) as (nat, connection),
    ):
        assert await connection.receive() == b"hello"
        suspicion = connection._endpoint.suspicion
        for number in range(3):
            nat.go_away()
            connection.ping()
            while not suspicion.open:
                await trio.sleep(0.001)
            nat.come_back()
            connection.send(b"%d" % number)
            assert await connection.receive() == b"%d" % number
            assert not suspicion.open
        assert connection.closed is None


async def test_a_refused_port_fails_a_dial_without_its_timeout() -> None:
    for host in ("127.0.0.1", "::1"):
        nobody = Address(host, free_port())
        with pytest.raises(QuicClosed) as caught:
            async with connect_quic(
                nobody, server_name="localhost", alpn="test/1", verify=trust_all, limits=PATIENT
            ):
                raise AssertionError("never entered")
        assert caught.value.code == PORT_CLOSED


async def test_a_server_that_was_restarted_sends_its_former_clients_away_at_once() -> None:
    async with (
        listening(echo, reset_key=b"r" * 32) as old,
        listening(echo, reset_key=b"r" * 32) as new,
        behind_nat(old) as (nat, connection),
    ):
        await connection.receive()
        nat.server = new.address
        connection.ping()
        with pytest.raises(QuicClosed) as caught:
            await connection.receive()
        assert caught.value.code == STATELESS_RESET
        # More than one where an acknowledgement was still to be sent.
        assert new.statistics().resets_sent >= 1


async def test_nobody_there_is_noticed_by_the_handshake_timeout() -> None:
    with UdpSocket.bind(ANY) as silent, pytest.raises(QuicClosed) as caught:
        async with connect_quic(
            silent.local_address,
            server_name="localhost",
            alpn="test/1",
            verify=trust_all,
            limits=QuicLimits(handshake_timeout_ns=S // 2),
        ):
            raise AssertionError("never entered")
    assert caught.value.code == HANDSHAKE_TIMEOUT


async def test_an_address_that_the_kernel_will_not_send_to_is_noticed_at_once() -> None:
    with pytest.raises(PermissionError):
        async with connect_quic(
            Address("255.255.255.255", 443), server_name="x", alpn="test/1", verify=trust_all
        ):
            raise AssertionError("never entered")


async def test_connections_of_one_source_are_bounded_and_the_next_is_told_so() -> None:
    limits = QuicLimits(max_connections_per_source=2)
    async with listening(echo, limits=limits) as listener:
        async with dial(listener), dial(listener):
            with pytest.raises(QuicClosed) as caught:
                async with dial(listener):
                    raise AssertionError("never entered")
            assert caught.value.code == CONNECTION_REFUSED
        while listener.statistics().connections:
            await trio.sleep(0.01)
        async with dial(listener) as connection:
            assert await connection.receive() == b"hello"


async def test_a_client_dials_from_the_address_that_it_is_given() -> None:
    remotes: list[str] = []

    async def note(connection: QuicConnection) -> None:
        remotes.append(connection.remote.host)
        await echo(connection)

    async with (
        listening(note) as listener,
        connect_quic(
            listener.address,
            server_name="localhost",
            alpn="test/1",
            verify=trust_all,
            source="127.0.0.9",
        ) as connection,
    ):
        assert await connection.receive() == b"hello"
    assert remotes == ["127.0.0.9"]


async def test_a_connection_that_is_over_leaves_nothing_behind_for_the_garbage_collector() -> None:
    cores: list[weakref.ref[object]] = []

    async def note(connection: QuicConnection) -> None:
        cores.append(weakref.ref(connection._core))
        await echo(connection)

    gc.collect()
    gc.disable()
    try:
        async with listening(note) as listener:
            for _ in range(3):
                async with dial(listener) as connection:
                    assert await connection.receive() == b"hello"
            while listener.statistics().connections:
                await trio.sleep(0.01)
            listener._endpoint._timers.clear()  # they would lie there until their time comes
            while any(core() is not None for core in cores):
                await trio.sleep(0.01)
    finally:
        gc.enable()
    assert len(cores) == 3


async def test_many_who_come_at_once_are_all_taken_in() -> None:
    count = 60
    greeted = 0

    async def greet(listener: QuicListener) -> None:
        nonlocal greeted
        async with dial(listener) as connection:
            assert await connection.receive() == b"hello"
            greeted += 1

    async with listening(echo) as listener:
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(greet, listener)
        assert greeted == count
        assert listener.statistics().accepted == count, "nobody had to dial twice"


async def test_under_many_handshakes_a_client_proves_its_address_first() -> None:
    async with listening(echo, limits=QuicLimits(retry_above_handshakes=0)) as listener:
        async with dial(listener) as connection:
            assert await connection.receive() == b"hello"
        assert listener.statistics().retries_sent == 1


async def test_garbage_datagrams_do_nothing_to_anybody() -> None:
    async with listening(echo) as listener, dial(listener) as connection:
        assert await connection.receive() == b"hello"
        with UdpSocket.bind(ANY) as stranger:
            for size in (0, 1, 20, 21, 100, 1200, 1400):
                for first in (0x00, 0x40, 0x80, 0xC0, 0xFF):
                    stranger.send(bytes([first]) + os.urandom(size), listener.address)
                version_1 = b"\xc0\x00\x00\x00\x01\x08" + os.urandom(8) + b"\x00\x00"
                stranger.send(version_1 + os.urandom(size), listener.address)
            await trio.sleep(0.1)
            for answer, _ in stranger.receive_batch():
                assert len(answer) < 1400
        connection.send(b"well")
        assert await connection.receive() == b"well"
        assert listener.statistics().connections == 1
        assert listener.statistics().failures == 0


async def test_a_peer_that_fills_gaps_of_its_window_cannot_make_it_grow() -> None:
    """aioquic alone doubles a window for one byte at its end; ours follows the reader."""
    limits = QuicLimits(receive_window_bytes=64 * 1024)
    sizes: list[int] = []

    async def never_read(connection: QuicConnection) -> None:
        connection.send(b"!")
        while connection.closed is None:
            stream = connection._stream
            assert stream is not None
            sizes.append(stream.max_stream_data_local)
            await trio.sleep(0.01)

    async with listening(never_read, limits=limits) as listener, dial(listener) as connection:
        await connection.receive()
        stream = connection._stream
        assert stream is not None
        for _ in range(10):
            # One byte at the very end of what the server allows, again and again.
            end = stream.max_stream_data_remote
            stream.sender._buffer_start = stream.sender._buffer_stop = end - 1
            stream.sender._buffer.clear()
            stream.sender.highest_offset = end - 1
            connection.send(b"x")
            await trio.sleep(0.02)
    await trio.sleep(0)
    assert set(sizes) == {64 * 1024}
