"""What links do to packets, one quality at a time."""

from __future__ import annotations

import pytest

from simulations.net.links import Bursts, LinkQuality
from simulations.net.world import World
from tests.unit.simulations.net.corner import MS, NS, PORT, Socket, at, at6, drops, watched


def stretch(quality: LinkQuality, seed: int = 1) -> tuple[World, Socket, Socket]:
    """Two hosts; the way from the first to the second is a link of that quality, the way back is
    perfect."""
    world = World(seed)
    near = world.network("near", uplink=LinkQuality())
    far = world.network("far", uplink=LinkQuality())
    near.uplink.there.quality = quality
    return world, Socket(world.host("a", near), 5_000), Socket(world.host("b", far), PORT)


def burst(world: World, a: Socket, b: Socket, count: int, size: int = 100) -> None:
    """Send so many numbered datagrams at once, and wait for an hour."""
    for number in range(count):
        a.send(at(b.host), number.to_bytes(4, "big") + bytes(size - 4))
    world.run_for(3_600 * NS)


def numbers(b: Socket) -> list[int]:
    return [int.from_bytes(data[:4], "big") for data in b.data]


def test_latency_is_the_time_under_way() -> None:
    world, a, b = stretch(LinkQuality(latency_ns=7 * MS))
    burst(world, a, b, 3)
    assert b.instants == [7 * MS] * 3
    assert numbers(b) == [0, 1, 2]


def test_a_perfect_link_delivers_at_the_same_instant_but_not_within_the_sending() -> None:
    world, a, b = stretch(LinkQuality())
    a.send(at(b.host))
    assert b.got == []
    world.run_for(0)
    assert b.instants == [0]


def test_jitter_adds_up_to_its_bound_and_keeps_the_order() -> None:
    world, a, b = stretch(LinkQuality(latency_ns=7 * MS, jitter_ns=4 * MS))
    for number in range(500):
        world.after(number * MS, a.send, at(b.host), number.to_bytes(4, "big"))
    world.run_for(NS)
    delays = [instant - number * MS for number, instant in enumerate(b.instants)]
    assert numbers(b) == list(range(500))
    assert 7 * MS <= min(delays) < 8 * MS
    assert 10 * MS < max(delays) <= 11 * MS


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_loss_takes_its_share(share: float) -> None:
    world, a, b = stretch(LinkQuality(loss=share))
    burst(world, a, b, 5_000)
    lost = drops(world)["loss"]
    assert lost + len(b.got) == 5_000
    assert lost / 5_000 == pytest.approx(share, abs=0.02)


def test_bursts_lose_packets_in_a_row() -> None:
    quality = LinkQuality(bursts=Bursts(begin=0.01, end=0.25))
    world, a, b = stretch(quality)
    burst(world, a, b, 20_000)
    came = set(numbers(b))
    runs, run = [], 0
    for number in range(20_000):
        if number in came:
            runs += [run] if run else []
            run = 0
        else:
            run += 1
    assert sum(runs) / 20_000 == pytest.approx(0.01 / 0.26, abs=0.01)  # the share of the bad state
    assert sum(runs) / len(runs) == pytest.approx(4, abs=0.5)  # the mean stay in it


def test_a_good_state_may_lose_too() -> None:
    quality = LinkQuality(bursts=Bursts(begin=0.0, end=1.0, loss_in_good=0.5))
    world, a, b = stretch(quality)
    burst(world, a, b, 2_000)
    assert len(b.got) == pytest.approx(1_000, abs=100)


def test_duplicates_arrive_twice_and_are_counted() -> None:
    world, a, b = stretch(LinkQuality(duplicate=0.25))
    burst(world, a, b, 4_000)
    assert world.copies == len(b.got) - 4_000 == pytest.approx(1_000, abs=100)
    assert set(numbers(b)) == set(range(4_000))


def test_reordering_holds_some_back_so_that_later_ones_overtake() -> None:
    world, a, b = stretch(LinkQuality(latency_ns=5 * MS, reorder=0.1, reorder_ns=10 * MS))
    for number in range(1_000):
        world.after(number * MS, a.send, at(b.host), number.to_bytes(4, "big"))
    world.run_for(2 * NS)
    got = numbers(b)
    assert sorted(got) == list(range(1_000))
    late = [n for place, n in enumerate(got) if any(other > n for other in got[:place])]
    assert len(late) == pytest.approx(100, abs=35)


def test_without_reordering_a_link_is_first_in_first_out_whatever_its_latency_becomes() -> None:
    world, a, b = stretch(LinkQuality(latency_ns=50 * MS))
    a.send(at(b.host), b"slow")
    pipe = a.host.network.uplink.there
    world.after(MS, setattr, pipe, "quality", LinkQuality(latency_ns=MS))
    world.after(2 * MS, a.send, at(b.host), b"fast")
    world.run_for(NS)
    assert b.data == [b"slow", b"fast"]


def test_corruption_flips_one_bit_and_is_delivered() -> None:
    world, a, b = stretch(LinkQuality(corrupt=1.0))
    sent = bytes(range(50))
    for _ in range(100):
        a.send(at(b.host), sent)
    world.run_for(NS)
    flipped = set()
    for data in b.data:
        difference = int.from_bytes(sent, "big") ^ int.from_bytes(data, "big")
        assert difference.bit_count() == 1
        flipped.add(difference)
    assert len(b.data) == 100
    assert len(flipped) > 50


def test_an_empty_datagram_has_nothing_to_corrupt() -> None:
    world, a, b = stretch(LinkQuality(corrupt=1.0))
    a.send(at(b.host), b"")
    world.run_for(NS)
    assert b.data == [b""]


def test_bandwidth_spaces_packets_by_their_size_with_headers() -> None:
    world, a, b = stretch(LinkQuality(latency_ns=MS, bandwidth_bps=8 * 1_000_000))
    burst(world, a, b, 3, size=972)  # 1,000 bytes with IPv4 and UDP: 1 ms each
    assert b.instants == [2 * MS, 3 * MS, 4 * MS]


def test_what_does_not_fit_into_the_queue_is_dropped_at_the_tail() -> None:
    quality = LinkQuality(bandwidth_bps=8 * 1_000_000, queue_bytes=5_000)
    world, a, b = stretch(quality)
    burst(world, a, b, 8, size=972)
    assert numbers(b) == [0, 1, 2, 3, 4]
    assert drops(world) == {"queue full": 3}


def test_a_queue_drains_with_time() -> None:
    quality = LinkQuality(bandwidth_bps=8 * 1_000_000, queue_bytes=2_000)
    world, a, b = stretch(quality)
    for number in range(50):
        world.after(number * MS, a.send, at(b.host), bytes(972))
    world.run_for(NS)
    assert len(b.got) == 50


def test_what_is_larger_than_the_mtu_is_dropped_and_the_sender_told() -> None:
    world, a, b = stretch(LinkQuality(latency_ns=5 * MS, mtu=1_280))
    a.send(at(b.host), bytes(1_280 - 28))
    a.send(at(b.host), bytes(1_280 - 27))
    world.run_for(NS)
    assert [len(data) for data in b.data] == [1_252]
    assert a.failures == [("too_big", at(b.host), 1_280)]
    assert drops(world) == {"too big": 1}


def test_being_told_takes_as_long_as_the_packet_took() -> None:
    world, a, b = stretch(LinkQuality(latency_ns=5 * MS))
    told: list[int] = []
    b.host.network.uplink.back.quality = LinkQuality(mtu=600)
    a.host.unbind(5_000)
    a.host.bind(5_000, lambda *_: None, failed=lambda _: told.append(world.now))
    a.send(at(b.host), bytes(1_000))
    world.run_for(NS)
    assert told == [10 * MS]


def test_ipv6_has_larger_headers() -> None:
    world = World(1)
    near = world.network("near", prefix6="2001:db8:1::/64", uplink=LinkQuality(mtu=1_280))
    a, b = Socket(world.host("a", near), 5_000), Socket(world.host("b", world.internet), PORT)
    a.send(at6(b.host), bytes(1_232))
    a.send(at6(b.host), bytes(1_233))
    world.run_for(NS)
    assert [len(data) for data in b.data] == [1_232]


def test_a_quality_may_be_changed_while_packets_are_under_way() -> None:
    world, a, b = stretch(LinkQuality(latency_ns=5 * MS))
    a.send(at(b.host), b"before")
    a.host.network.uplink.change(LinkQuality(loss=1.0))
    a.send(at(b.host), b"during")
    a.host.network.uplink.change(LinkQuality(latency_ns=5 * MS))
    a.send(at(b.host), b"after")
    world.run_for(NS)
    assert b.data == [b"before", b"after"]


def test_a_changed_quality_does_not_begin_the_randomness_anew() -> None:
    world, a, b = stretch(LinkQuality(loss=0.5))
    fates = []
    for _ in range(2):
        before = len(b.got)
        burst(world, a, b, 100)
        fates.append(numbers(b)[before:])
        a.host.network.uplink.there.quality = LinkQuality(loss=0.5)
    assert fates[0] != fates[1]


def test_the_lan_joins_hosts_to_each_other_and_to_the_router() -> None:
    world = World(1)
    home = world.network("home", lan=LinkQuality(latency_ns=2 * MS), uplink=LinkQuality())
    a, b = Socket(world.host("a", home), 5_000), Socket(world.host("b", home), PORT)
    c = Socket(world.host("c", world.internet), PORT)
    a.send(at(b.host))
    a.send(at(c.host))
    c.send(at(a.host, 5_000))
    world.run_for(NS)
    assert (b.instants, c.instants, a.instants) == ([2 * MS], [2 * MS], [2 * MS])


def test_a_hop_without_impairment_costs_no_event() -> None:
    world, a, b = stretch(LinkQuality(latency_ns=MS))
    burst(world, a, b, 10)
    assert world.events == 10


def test_links_draw_from_streams_of_their_own() -> None:
    def lost_on_the_way_to_b(*, other: bool) -> list[int]:
        world = World(7)
        near = world.network("near", uplink=LinkQuality(loss=0.5))
        a, b = Socket(world.host("a", near), 5_000), Socket(world.host("b", world.internet), PORT)
        if other:
            lossy = world.network("other", uplink=LinkQuality(loss=0.5))
            c = Socket(world.host("c", lossy), 5_000)
        for number in range(200):
            if other:
                c.send(at(b.host), b"noise")
            a.send(at(b.host), number.to_bytes(4, "big"))
        world.run_for(NS)
        return [int.from_bytes(data, "big") for data in b.data if data != b"noise"]

    assert lost_on_the_way_to_b(other=False) == lost_on_the_way_to_b(other=True)


@pytest.mark.parametrize(
    "field", [{"loss": 1.5}, {"latency_ns": -1}, {"queue_bytes": 0}, {"mtu": 10}]
)
def test_impossible_qualities_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        LinkQuality(**field)  # type: ignore[arg-type]


def test_a_tap_sees_where_and_why_a_packet_was_dropped() -> None:
    world, a, b = stretch(LinkQuality(loss=1.0))
    seen = watched(world)
    a.send(at(b.host), b"x")
    world.run_for(NS)
    assert [(each.what, each.where, each.why) for each in seen] == [
        ("sent", "a", ""),
        ("dropped", "near uplink there", "loss"),
    ]
