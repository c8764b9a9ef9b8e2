"""Streams: opening, order and loss, ending, and what becomes of them when addresses change."""

from __future__ import annotations

import pytest

from simulations.net.links import Bursts, LinkQuality
from simulations.net.nat import PORT_RESTRICTED, SYMMETRIC
from simulations.net.streams import (
    ADDRESS_LOST,
    HANDSHAKE_TIMEOUT,
    HERE,
    IDLE_NS,
    IDLE_TIMEOUT,
    NO_ADDRESS,
    PORT_CLOSED,
    RESET,
    SEGMENT_BYTES,
    SEND_LIMIT_BYTES,
    Protocol,
)
from simulations.net.world import World
from tests.unit.simulations.net.corner import MS, NS, Client, Server, drops, watched

BOTH = pytest.mark.parametrize("protocol", ["udp", "tcp"])
SLOW = LinkQuality(latency_ns=10 * MS)
ROUND_TRIP = 20 * MS


def pair(
    protocol: Protocol = "udp", quality: LinkQuality = SLOW, *, echoes: bool = False, seed: int = 1
) -> tuple[World, Client, Server]:
    """A client at home and a server on the internet; the home's uplink is the only hop."""
    world = World(seed)
    home = world.network("home", nat=PORT_RESTRICTED, uplink=quality)
    server = Server(world.host("server", world.internet), echoes=echoes)
    return world, Client(world.host("client", home), server.address, protocol), server


@pytest.mark.parametrize(("protocol", "round_trips"), [("udp", 1), ("tcp", 2)])
def test_the_handshake_takes_its_round_trips(protocol: Protocol, round_trips: int) -> None:
    world, client, server = pair(protocol)
    world.run_for(NS)
    assert client.opened_at == [round_trips * ROUND_TRIP]
    assert len(server.streams) == 1
    assert server.streams[0].protocol == protocol
    assert server.streams[0].remote.host == client.stream.host.network.outer[0]
    assert client.stream.remote == server.address


@BOTH
def test_bytes_travel_in_order_both_ways(protocol: Protocol) -> None:
    world, client, server = pair(protocol, echoes=True)
    sent = bytes(n % 251 for n in range(100_000))
    assert client.stream.send(sent)
    world.run_for(5 * NS)
    assert server.data == [sent]
    assert client.data == sent
    assert client.stream.total_out == server.streams[0].total_in == 100_000
    assert client.stream.round_trip_ns == pytest.approx(ROUND_TRIP)


@BOTH
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "quality",
    [
        LinkQuality(latency_ns=10 * MS, loss=0.2),
        LinkQuality(latency_ns=10 * MS, bursts=Bursts(begin=0.05, end=0.3)),
        LinkQuality(latency_ns=10 * MS, duplicate=0.3, reorder=0.3, jitter_ns=8 * MS),
        LinkQuality(latency_ns=10 * MS, corrupt=0.2),
        LinkQuality(latency_ns=10 * MS, bandwidth_bps=2_000_000, queue_bytes=20_000),
    ],
    ids=["loss", "bursts", "disorder", "corruption", "queue"],
)
def test_bytes_arrive_in_order_exactly_once_whatever_the_path_does(
    protocol: Protocol, quality: LinkQuality, seed: int
) -> None:
    world, client, server = pair(protocol, quality, echoes=True, seed=seed)
    sent = b"".join(n.to_bytes(4, "big") for n in range(5_000))
    assert client.stream.send(sent)
    world.run_until(lambda: len(client.data) == len(sent) or client.closed, limit_ns=300 * NS)
    assert (client.closed, server.closed) == ([], [])
    assert server.data == [sent]
    assert client.data == sent
    assert not client.stream._early
    assert not server.streams[0]._early


def test_a_loss_is_a_delay_that_doubles() -> None:
    world, client, server = pair()
    world.run_for(NS)
    uplink = client.stream.host.network.uplink
    uplink.there.quality = LinkQuality(loss=1.0)
    seen = watched(world)
    client.stream.send(b"late")
    world.run_for(1_500 * MS)
    uplink.change(SLOW)
    world.run_for(2 * NS)
    assert server.data == [b"late"]
    sent = [each.now - NS for each in seen if each.what == "sent" and each.origin == "client"]
    assert sent == [0, 200 * MS, 600 * MS, 1_400 * MS, 3_000 * MS]


def _packets_of(segments: int, *, echoes: bool, apart_ns: int = 0) -> list[tuple[str, int]]:
    """Who sent packets, and after how many ms, when a client says so much a second after."""
    world, client, _ = pair(echoes=echoes)
    world.run_for(NS)
    seen = watched(world)
    for number in range(segments):
        world.after(number * apart_ns, client.stream.send, bytes(SEGMENT_BYTES))
    world.run_for(NS)
    return [(each.origin, (each.now - NS) // MS) for each in seen if each.what == "sent"]


def test_a_single_segment_is_acknowledged_after_a_delay_and_a_second_one_at_once() -> None:
    assert _packets_of(1, echoes=False) == [("client", 0), ("server", 35)]
    assert _packets_of(2, echoes=False) == [("client", 0), ("client", 0), ("server", 10)]
    apart = _packets_of(3, echoes=False, apart_ns=15 * MS)
    assert apart == [("client", 0), ("client", 15), ("server", 25), ("client", 30), ("server", 65)]


def test_what_goes_the_other_way_acknowledges_too() -> None:
    assert _packets_of(1, echoes=True) == [("client", 0), ("server", 10), ("client", 45)]


def test_the_delay_of_an_acknowledgement_is_no_part_of_the_round_trip() -> None:
    world, client, _ = pair()
    for _ in range(20):
        client.stream.send(b"alone")
        world.run_for(NS)
    assert client.stream.round_trip_ns == ROUND_TRIP


@BOTH
def test_a_close_is_told_once_and_anything_after_it_again(protocol: Protocol) -> None:
    world, client, server = pair(protocol)
    world.run_for(NS)
    server.streams[0].close(7, "enough")
    server.streams[0].close(8, "again")
    client.stream.send(b"too late")
    world.run_for(NS)
    assert client.closed == [(7, "enough")]
    assert server.closed == []
    assert not client.stream.send(b"x")
    assert server.data == [b""]


def test_a_close_that_is_lost_is_said_again_when_the_other_side_speaks() -> None:
    world, client, server = pair()
    world.run_for(NS)
    world.partition([server.streams[0].host], [client.stream.host.network], one_way=True).heal()
    cut = world.partition([server.streams[0].host], [client.stream.host], one_way=True)
    server.streams[0].close(7, "enough")
    world.run_for(NS)
    cut.heal()
    client.stream.send(b"still there?")
    world.run_for(NS)
    assert client.closed == [(7, "enough")]


@BOTH
def test_silence_ends_a_stream_on_both_sides(protocol: Protocol) -> None:
    world, client, server = pair(protocol)
    world.run_for(NS)
    world.partition([client.stream.host], [server.streams[0].host])
    client.stream.send(b"x")
    world.run_for(IDLE_NS)
    assert [code for code, _ in client.closed] == [IDLE_TIMEOUT]
    assert [code for _, code, _ in server.closed] == [IDLE_TIMEOUT]


def test_pings_keep_an_idle_stream_and_keepalives_do_not() -> None:
    for act, lives in (("ping", True), ("keepalive", False)):
        world, client, server = pair()
        pongs: list[int] = []
        client.stream.ponged = lambda pongs=pongs, world=world: pongs.append(world.now)  # type: ignore[misc]
        for second in range(1, 30):
            world.after(second * NS, getattr(client.stream, act))
        world.run_for(30 * NS)
        assert (client.closed == server.closed == []) is lives
        assert bool(pongs) is lives


def test_a_keepalive_finds_out_that_the_other_process_died() -> None:
    world, client, server = pair()
    world.run_for(NS)
    server.streams[0].host.crash()
    world.run_for(NS)
    assert client.closed == []
    client.stream.keepalive()
    world.run_for(NS)
    assert [code for code, _ in client.closed] == [PORT_CLOSED]


@pytest.mark.parametrize(("protocol", "code"), [("udp", PORT_CLOSED), ("tcp", RESET)])
def test_a_restarted_host_without_the_server_refuses_what_comes_for_it(
    protocol: Protocol, code: int
) -> None:
    world, client, server = pair(protocol)
    world.run_for(NS)
    host = server.streams[0].host
    host.crash()
    host.restart()
    client.stream.send(b"x")
    world.run_for(NS)
    assert [each for each, _ in client.closed] == [code]


def test_a_keepalive_to_a_restarted_server_says_nothing() -> None:
    world, client, server = pair()
    world.run_for(NS)
    host = server.streams[0].host
    host.crash()
    host.restart()
    Server(host)
    client.stream.keepalive()
    world.run_for(NS)
    assert client.closed == []


@BOTH
def test_a_restarted_host_resets_what_it_does_not_know(protocol: Protocol) -> None:
    world, client, server = pair(protocol)
    world.run_for(NS)
    host = server.streams[0].host
    host.crash()
    host.restart()
    Server(host)
    client.stream.send(b"x")
    world.run_for(NS)
    assert [code for code, _ in client.closed] == [RESET]
    assert server.closed == []


@BOTH
def test_a_host_without_power_is_noticed_by_its_silence(protocol: Protocol) -> None:
    world, client, server = pair(protocol)
    world.run_for(NS)
    server.streams[0].host.crash(answers=False)
    client.stream.send(b"x")
    world.run_for(10 * NS)
    assert client.closed == []
    world.run_for(6 * NS)
    assert [code for code, _ in client.closed] == [IDLE_TIMEOUT]


@BOTH
def test_nobody_listens_or_nobody_is_there(protocol: Protocol) -> None:
    world, _, server = pair(protocol)
    host = world.host("other", world.internet)
    closed_port = Client(host, server.address._replace(port=444), protocol)
    no_host = Client(host, server.address._replace(host="203.0.113.99"), protocol)
    world.run_for(NS)
    assert [code for code, _ in closed_port.closed] == [PORT_CLOSED]
    world.run_for(IDLE_NS)
    assert [code for code, _ in no_host.closed] == [HANDSHAKE_TIMEOUT]


def test_a_family_that_the_host_does_not_have_fails_after_connect_returned() -> None:
    world, _, server = pair()
    host = world.host("six", world.network("six", prefix6="2001:db8:9::/64"))
    client = Client(host, server.address)
    assert client.closed == []
    world.run_for(NS)
    assert [code for code, _ in client.closed] == [NO_ADDRESS]


def test_streams_run_over_ipv6() -> None:
    world = World(1)
    host = world.host("six", world.network("six", prefix6="2001:db8:9::/64"))
    other = world.host("server", world.network("cloud", prefix6="2001:db8:8::/64"))
    server = Server(other, echoes=True)
    client = Client(host, server.address)
    client.stream.send(b"hello")
    world.run_for(NS)
    assert client.data == b"hello"
    assert server.streams[0].remote.host == host.ipv6


def test_a_path_too_narrow_for_quic_still_carries_tcp() -> None:
    narrow = LinkQuality(latency_ns=10 * MS, mtu=1_200)
    for protocol, code in (("udp", [HANDSHAKE_TIMEOUT]), ("tcp", [])):
        world, client, _ = pair("tcp" if protocol == "tcp" else "udp", narrow)
        client.stream.send(bytes(10_000))
        world.run_for(IDLE_NS)
        assert [each for each, _ in client.closed] == code


# --- when addresses change ---


def test_over_udp_a_stream_survives_a_rebinding_and_the_server_sees_it_a_round_trip_later() -> None:
    world, client, server = pair(echoes=True)
    world.run_for(NS)
    home = client.stream.host.network
    old = server.streams[0].remote
    home.renumber()
    client.stream.send(b"x")
    world.run_for(15 * MS)
    assert server.data == [b"x"]
    assert server.streams[0].remote == old
    world.run_for(20 * MS)
    assert server.streams[0].remote.host == home.outer[0] != old.host
    assert server.moved == [server.streams[0].remote]
    world.run_for(NS)
    assert client.data == b"x"
    assert (client.closed, server.closed) == ([], [])


def test_over_udp_a_stream_survives_roaming_though_its_owner_says_nothing() -> None:
    world, client, server = pair()
    world.run_for(NS)
    cafe = world.network("cafe", nat=SYMMETRIC)
    client.stream.host.move(cafe)
    world.run_for(NS)
    assert server.streams[0].remote.host == cafe.outer[0]
    server.streams[0].send(b"you moved")
    world.run_for(NS)
    assert client.data == b"you moved"


def test_what_the_server_sent_to_the_old_address_is_sent_again_to_the_new_one() -> None:
    world, client, server = pair()
    world.run_for(NS)
    client.stream.host.network.rebind()
    client.stream.host.network.renumber()
    server.streams[0].send(b"lost at first")
    world.run_for(5 * NS)
    assert client.data == b""
    client.stream.ping()
    world.run_for(NS)
    assert client.data == b"lost at first"


def test_an_answer_from_where_nobody_was_asked_moves_no_stream() -> None:
    world, client, server = pair()
    world.run_for(NS)
    stream, before = server.streams[0], server.streams[0].remote
    home = client.stream.host.network
    home.renumber()
    client.stream._transmit(HERE)
    world.run_for(15 * MS)
    assert (stream.remote, server.moved) == (before, [])
    world.run_for(20 * MS)
    assert stream.remote.host == home.outer[0], "it was asked then, as for any packet"


def test_over_tcp_a_rebinding_resets_the_stream() -> None:
    world, client, server = pair("tcp")
    world.run_for(NS)
    client.stream.host.network.renumber()
    client.stream.send(b"x")
    world.run_for(NS)
    assert [code for code, _ in client.closed] == [RESET]
    assert server.data == [b""]
    world.run_for(IDLE_NS)
    assert [code for _, code, _ in server.closed] == [IDLE_TIMEOUT]


def test_over_tcp_roaming_ends_the_stream() -> None:
    world, client, _ = pair("tcp")
    world.run_for(NS)
    client.stream.host.move(world.network("cafe", nat=PORT_RESTRICTED))
    assert client.closed == []
    world.run_for(0)
    assert [code for code, _ in client.closed] == [ADDRESS_LOST]


def test_the_other_side_of_a_nat_s_timeout_is_unreachable_until_the_client_speaks() -> None:
    world, client, server = pair()
    nat = client.stream.host.network.nat
    assert nat is not None
    world.run_for(NS)
    world.run_for(10 * NS)
    nat.forget()
    server.streams[0].send(b"hello")
    world.run_for(NS)
    assert client.data == b""
    client.stream.ping()
    world.run_for(NS)
    assert client.data == b"hello"


# --- pauses, limits ---


def test_a_paused_host_holds_its_streams_timers() -> None:
    world, client, server = pair(echoes=True)
    world.run_for(NS)
    client.stream.host.pause()
    server.streams[0].send(b"hello")
    world.run_for(14 * NS)
    assert client.closed == []
    client.stream.host.resume()
    world.run_for(NS)
    assert client.data == b"hello"
    client.stream.host.pause()
    world.run_for(60 * NS)
    assert [code for _, code, _ in server.closed] == [IDLE_TIMEOUT]
    client.stream.host.resume()
    world.run_for(NS)
    assert [code for code, _ in client.closed] == [IDLE_TIMEOUT]


def test_what_waits_to_be_sent_is_bounded() -> None:
    _, client, _ = pair()
    assert client.stream.send(bytes(SEND_LIMIT_BYTES))
    assert not client.stream.send(b"x")


def test_a_crash_tells_the_owners_of_streams_nothing() -> None:
    world, client, server = pair()
    world.run_for(NS)
    client.stream.host.crash()
    server.streams[0].host.crash()
    world.run_for(60 * NS)
    assert (client.closed, server.closed) == ([], [])
    assert not client.stream.send(b"x")
    assert client.stream.state == "closed"


def test_a_listener_may_stop_while_its_streams_live_on() -> None:
    world, client, server = pair(echoes=True)
    world.run_for(NS)
    host = server.streams[0].host
    with pytest.raises(ValueError, match="taken"):
        host.listen(443, print)
    host.stop_listening(443)
    late = Client(client.stream.host, server.address)
    client.stream.send(b"x")
    world.run_for(NS)
    assert client.data == b"x"
    assert [code for code, _ in late.closed] == [PORT_CLOSED]


def test_an_ended_stream_leaves_nothing_behind() -> None:
    world, client, server = pair()
    world.run_for(NS)
    client.stream.close()
    world.run_for(60 * NS)
    assert client.stream.host.streams.statistics() == {"streams": 0, "listeners": 0}
    assert server.streams[0].host.streams.statistics() == {"streams": 0, "listeners": 1}
    assert list(world.events_to_come()) == []
    assert drops(world) == {}
