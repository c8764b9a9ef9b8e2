"""TURN over TCP and TLS on real sockets: what a client gets, and what one that is slow, silent,
broken or hostile cannot take."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
import trio

from relays.client import Allocated, Lost
from relays.stun import MessageClass, Method, StunMessage
from relays.transports.stream import StreamLimits
from runtime.net.presented import chain_of
from runtime.net.tcp import connect_tcp
from simulations.kernel.lab import Lab
from tests.system.stream_relay import (
    CLOCK,
    PATIENCE_S,
    StreamClient,
    StreamRelay,
    any_certificate,
    dialled,
    echoing_peer,
    stream_relay,
    until,
)
from tests.unit.channel.certificates import Authority

pytestmark = pytest.mark.system

BINDING = StunMessage(
    method=Method.BINDING, message_class=MessageClass.REQUEST, transaction_id=bytes(12)
).encode()
GARBAGE = (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"\xff" * 64, b"\0" * 64)


async def ended(stream: trio.abc.Stream) -> bool:
    """Whether the other side ends it, within our patience; what it says before is dropped."""
    with trio.move_on_after(PATIENCE_S):
        try:
            while await stream.receive_some(65_536):
                pass
        except trio.BrokenResourceError:
            pass
        return True
    return False


async def is_refused(relay: StreamRelay) -> bool:
    """Whether a newcomer's connection is reset."""
    try:
        async with await connect_tcp(relay.tcp) as stream:
            return await ended(stream)
    except OSError:
        return True


@pytest.mark.parametrize("transport", ["tcp", "tls"])
async def test_data_of_every_length_comes_back_whole_and_in_its_order(transport: str) -> None:
    async with stream_relay() as relay, echoing_peer() as peer, dialled(relay, transport) as client:
        await client.begin(peer)
        for bound in (False, True):
            if bound:
                client.turn.bind(peer, CLOCK.monotonic_ns())
                await client.speak()
                await until_bound(client)
            sent = [bytes([size]) * size for size in range(1, 200)]
            for data in sent:
                assert client.turn.send(peer, data, CLOCK.monotonic_ns())
            await client.speak()
            assert [await client.receive() for _ in sent] == sent
        counts = relay.counts(transport)
        assert counts.allocations == counts.connections == 1
        assert counts.packets == 4 * 199 + 2 == relay.server.relayed_packets
        assert counts.bytes == 4 * sum(range(1, 200)) + 10 == relay.server.relayed_bytes
        assert counts.errors == {401: 1}


async def until_bound(client: StreamClient) -> None:
    """Read until the answer to ChannelBind was taken."""
    while not client.turn.statistics()["channels"]:
        data = await client.stream.receive_some(65_536)
        for frame in client.frames.feed(bytes(data)):
            client.turn.receive(frame, CLOCK.monotonic_ns())


async def test_an_allocation_ends_with_its_connection_and_with_no_other() -> None:
    async with stream_relay() as relay, echoing_peer() as peer, dialled(relay, "tls") as other:
        await other.begin(peer)
        for transport in ("tcp", "tls"):
            async with dialled(relay, transport) as client:
                await client.begin(peer)
                assert relay.server.allocations == 2
                if transport == "tcp":  # killed, rather than closed
                    await trio.aclose_forcefully(client.stream)
            await until(lambda: relay.server.allocations == 1, "the allocation is gone")
        other.turn.send(peer, b"still here", CLOCK.monotonic_ns())
        assert await other.receive() == b"still here"


async def test_a_slow_reader_loses_data_and_neither_answers_nor_its_connection() -> None:
    async with stream_relay() as relay, echoing_peer() as peer, dialled(relay) as client:
        await client.begin(peer)
        reading = client.stream
        for _ in range(20_000):
            client.turn.send(peer, bytes(1_200), CLOCK.monotonic_ns())
            await client.speak()
            if relay.counts().dropped > 1_000:
                break
            await trio.sleep(0)
        counts = relay.counts()
        assert counts.dropped > 1_000
        assert counts.connections == 1
        assert not counts.ended
        door = next(iter(relay.streams._door_by_descriptor.values()))
        [connection] = door.client_by_source.values()
        assert connection.queued <= relay.streams.limits.queued_bytes
        await reading.send_all(BINDING)
        with trio.fail_after(PATIENCE_S):
            while True:
                frames = client.frames.feed(bytes(await reading.receive_some(65_536)))
                if any(frame[:2] == b"\1\1" for frame in frames):
                    break


async def test_whoever_asks_and_never_reads_the_answers_is_cut_off() -> None:
    async with stream_relay() as relay:
        async with await connect_tcp(relay.tcp) as stream:
            with trio.fail_after(PATIENCE_S), contextlib.suppress(trio.BrokenResourceError):
                while True:
                    await stream.send_all(BINDING * 1_000)
        await until(lambda: relay.counts().ended == {"slow": 1}, "it was cut off")


@pytest.mark.parametrize("transport", ["tcp", "tls"])
async def test_what_is_no_message_ends_the_connection_and_no_other(transport: str) -> None:
    async with stream_relay() as relay, echoing_peer() as peer, dialled(relay, transport) as client:
        await client.begin(peer)
        for garbage in GARBAGE:
            async with dialled(relay, transport) as stranger:
                await stranger.stream.send_all(garbage)
                assert await ended(stranger.stream)
        for garbage in GARBAGE:  # and without a handshake
            async with await connect_tcp(relay.tls) as stream:
                await stream.send_all(garbage)
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_eof()
                assert await ended(stream)
        assert relay.counts(transport).ended["framing"] == len(GARBAGE)
        assert relay.counts("tls").handshake_failures == len(GARBAGE)
        client.turn.send(peer, b"undisturbed", CLOCK.monotonic_ns())
        assert await client.receive() == b"undisturbed"


async def test_a_long_message_is_for_clients_with_an_allocation() -> None:
    async with stream_relay() as relay, echoing_peer() as peer, dialled(relay) as stranger:
        await stranger.stream.send_all(b"\x40\x00\x20\x00")
        assert await ended(stranger.stream)
        async with dialled(relay) as client:
            await client.begin(peer)
            client.turn.send(peer, bytes(60_000), CLOCK.monotonic_ns())
            await client.speak()
            assert await client.receive() == bytes(60_000)


async def test_who_dawdles_with_handshake_or_request_is_cut_off() -> None:
    limits = StreamLimits(handshake_s=1.0, unallocated_s=1.5)
    async with stream_relay(limits) as relay, echoing_peer() as peer, dialled(relay) as client:
        await client.begin(peer)
        async with (
            await connect_tcp(relay.tls) as silent,
            await connect_tcp(relay.tcp) as slow,
            dialled(relay, "tls") as asking,
        ):
            asker = asking.stream
            with trio.fail_after(PATIENCE_S):
                over: list[str] = []
                async with trio.open_nursery() as nursery:

                    async def dawdle(name: str, stream: Any, pieces: bytes, size: int) -> None:
                        try:
                            for start in range(0, len(pieces), size):
                                await stream.send_all(pieces[start : start + size])
                                await trio.sleep(0.1)
                            raise AssertionError("it was let dawdle")
                        except trio.BrokenResourceError:
                            over.append(name)

                    nursery.start_soon(dawdle, "byte by byte", slow, BINDING * 100, 1)
                    nursery.start_soon(dawdle, "nothing but questions", asker, BINDING * 400, 20)
                    assert await ended(silent)
            assert sorted(over) == ["byte by byte", "nothing but questions"]
        assert relay.counts("tls").ended["handshake_deadline"] == 1
        assert relay.counts("tls").handshake_failures == 1
        client.turn.send(peer, b"as good as before", CLOCK.monotonic_ns())
        assert await client.receive() == b"as good as before"


async def test_where_an_allocation_ended_another_may_follow_for_a_while() -> None:
    async with (
        stream_relay(StreamLimits(unallocated_s=1.0)) as relay,
        echoing_peer() as peer,
        dialled(relay) as client,
    ):
        await client.begin(peer)
        client.turn.close(CLOCK.monotonic_ns())
        await client.speak()
        await until(lambda: relay.server.allocations == 0, "given back")
        again = StreamClient(client.stream, relay.tcp)
        await again.begin(peer)
        await trio.sleep(2.5)
        assert relay.counts().connections == 1
        assert relay.server.revoke_user("alice") == 1
        assert await ended(client.stream)


async def test_connections_of_one_prefix_and_of_all_are_limited() -> None:
    limits = StreamLimits(connections=4, connections_per_prefix=3)
    async with stream_relay(limits) as relay:
        streams = [await connect_tcp(relay.tcp) for _ in range(3)]
        await until(lambda: relay.counts().connections == 3, "three are taken")
        assert await is_refused(relay)
        assert relay.counts().refused == {"prefix": 1}
        for each in streams:
            await each.aclose()


async def test_where_all_places_are_taken_the_oldest_without_an_allocation_gives_way() -> None:
    limits = StreamLimits(connections=3, connections_per_prefix=9)
    async with stream_relay(limits) as relay, echoing_peer() as peer, dialled(relay) as client:
        await client.begin(peer)
        oldest = await connect_tcp(relay.tcp)
        await until(lambda: relay.counts().connections == 2, "two are there")
        async with dialled(relay, "tls") as second, dialled(relay) as third:
            await second.begin(peer)
            await third.begin(peer)
            assert await ended(oldest)
            assert relay.counts().ended["displaced"] == 1
            assert await is_refused(relay)
            assert relay.counts().refused == {"full": 1}


async def test_newcomers_of_one_prefix_have_a_rate() -> None:
    async with stream_relay(StreamLimits(connections_per_second=1)) as relay:
        streams = [await connect_tcp(relay.tcp) for _ in range(4)]
        assert [await is_refused(relay) for _ in range(3)] == [True] * 3
        assert relay.counts().refused == {"rate": 3}
        await trio.sleep(1.0)
        streams.append(await connect_tcp(relay.tcp))
        await until(lambda: relay.counts().connections == 5, "one more a second later")
        for each in streams:
            await each.aclose()


async def test_without_an_open_file_left_newcomers_wait_and_are_taken_later() -> None:
    async with stream_relay() as relay:
        dialling = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (dialling.fileno() + 1, hard))
        try:
            await dialling.connect(relay.tcp)
            await until(lambda: relay.counts().refused["resources"] > 0, "it cannot be taken")
            await trio.sleep(0.6)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        async with trio.SocketStream(dialling) as stream:
            await stream.send_all(BINDING)
            with trio.fail_after(PATIENCE_S):
                assert (await stream.receive_some(100))[:2] == b"\1\1"


async def test_an_end_that_was_cut_off_without_a_word_is_found_dead() -> None:
    with Lab() as lab:
        core = lab.router("core")
        machine = lab.public_host("relay", core, "203.0.113.6/30")
        home = lab.public_host("client", core, "198.51.100.2/30")
        limits = StreamLimits(dead_after_s=2)
        async with stream_relay(limits, host="203.0.113.6", inside=machine.entered) as relay:
            streams = []
            for where in (relay.tcp, relay.tls):
                with home.entered():
                    dialling = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
                await dialling.connect(where)
                streams.append(trio.SocketStream(dialling))
            counts = relay.counts
            await until(lambda: counts().connections + counts("tls").connections == 2, "both came")
            home.nft("""table ip cut {
              chain out { type filter hook output priority 0; policy drop; }
            }""")
            await until(lambda: counts().connections + counts("tls").connections == 0, "both went")
            assert counts().ended == {"closed": 1}
            assert counts("tls").ended == {"handshake": 1}
            for stream in streams:
                await stream.aclose()


async def test_a_relay_that_drains_serves_its_stream_clients_on_and_takes_no_others() -> None:
    async with stream_relay() as relay, echoing_peer() as peer, dialled(relay, "tls") as client:
        await client.begin(peer)
        relay.server.drain()
        async with dialled(relay, "tls") as newcomer:
            assert (await newcomer.event(Lost)).code == 508
        client.turn.send(peer, b"to the end", CLOCK.monotonic_ns())
        assert await client.receive() == b"to the end"


# --- TLS -----------------------------------------------------------------------------------------


def write_pair(folder: Path, chain: bytes, key: bytes) -> tuple[Path, Path]:
    files = folder / "chain.pem", folder / "key.pem"
    for path, content in zip(files, (chain, key), strict=True):
        path.touch(mode=0o600)
        path.write_bytes(content)
    return files


async def shown(relay: StreamRelay) -> bytes:
    """The certificate that a newcomer is shown."""
    async with dialled(relay, "tls") as client:
        assert isinstance(client.stream, trio.SSLStream)
        await client.stream.do_handshake()
        return chain_of(client.stream._ssl_object)[0].tbs_certificate_bytes


async def test_a_new_certificate_serves_newcomers_and_ends_no_connection(tmp_path: Path) -> None:
    authority = Authority("web")
    chain, key = authority.issue_pem("relay.example")
    files = write_pair(tmp_path, chain, key)
    async with (
        stream_relay(None, *files) as relay,
        echoing_peer() as peer,
        dialled(relay, "tls") as client,
    ):
        await client.begin(peer)
        before = await shown(relay)
        assert not relay.certificates.look()
        other_chain, other_key = authority.issue_pem("relay.example")
        files[0].write_bytes(other_chain)  # and its key follows: nothing fits meanwhile
        assert not relay.certificates.look()
        assert await shown(relay) == before
        files[1].write_bytes(other_key)
        assert relay.certificates.look()
        after = await shown(relay)
        assert after != before
        for broken in (b"", b"no certificate", chain[:-200], chain):
            files[0].write_bytes(broken)
            assert not relay.certificates.look()
        files[0].unlink()
        assert not relay.certificates.look(again=True)
        assert await shown(relay) == after
        assert relay.certificates.refused == 6
        client.turn.send(peer, b"all the while", CLOCK.monotonic_ns())
        assert await client.receive() == b"all the while"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
async def test_old_tls_is_refused_and_1_2_has_forward_secrecy() -> None:
    async with stream_relay() as relay:
        old = any_certificate()
        old.set_ciphers("ALL:@SECLEVEL=0")
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        async with dialled(relay, "tls", old) as client:
            with pytest.raises(trio.BrokenResourceError):
                await client.speak()
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = any_certificate()
            context.minimum_version = context.maximum_version = version
            async with dialled(relay, "tls", context) as client:
                await client.event(Allocated)
                assert isinstance(client.stream, trio.SSLStream)
                name = client.stream.cipher()[0]
                assert name.startswith("ECDHE-" if version == ssl.TLSVersion.TLSv1_2 else "TLS_")
        weak = any_certificate()
        weak.maximum_version = ssl.TLSVersion.TLSv1_2
        weak.set_ciphers("AES128-GCM-SHA256:ECDHE-ECDSA-AES128-SHA")
        async with dialled(relay, "tls", weak) as client:
            with pytest.raises(trio.BrokenResourceError):
                await client.speak()
        assert relay.counts("tls").handshake_failures == 2
