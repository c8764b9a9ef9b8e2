"""What befalls hosts and networks (partitions, roaming, crashes, clocks); taps; the trace."""

from __future__ import annotations

from datetime import timedelta

import pytest

from runtime.net.address import Address
from simulations.net.host import RECEIVE_BUFFER_BYTES, Host
from simulations.net.links import LinkQuality
from simulations.net.nat import FULL_CONE, PORT_RESTRICTED
from simulations.net.packets import DROPS
from simulations.net.world import World
from tests.unit.simulations.net.corner import MS, NS, PORT, Socket, at, drops, watched


def two(world: World) -> tuple[Socket, Socket]:
    """A host at home and one in the cloud."""
    home = world.network("home", nat=PORT_RESTRICTED)
    cloud = world.network("cloud")
    return Socket(world.host("a", home), 5_000), Socket(world.host("b", cloud), PORT)


# --- sockets ---


def test_a_port_is_bound_once_and_can_be_given_up() -> None:
    world = World(1)
    a, b = two(world)
    with pytest.raises(ValueError, match="bound"):
        b.bind()
    b.host.unbind(PORT)
    b.host.unbind(PORT)
    a.send(at(b.host))
    world.run_for(NS)
    assert drops(world) == {"no socket": 1}
    assert a.failures == [("port_unreachable", at(b.host), 0)]


def test_ephemeral_ports_are_counted_up_past_those_taken() -> None:
    world = World(1)
    host = world.host("a", world.internet)
    Socket(host, 49_153)
    assert [host.ephemeral_port() for _ in range(3)] == [49_152, 49_154, 49_155]


def test_a_host_may_send_to_itself() -> None:
    world = World(1)
    a = Socket(world.host("a", world.internet), PORT)
    a.send(at(a.host))
    world.run_for(NS)
    assert a.sources == [at(a.host)]


# --- partitions ---


def test_a_partition_keeps_both_sides_apart_until_it_is_healed() -> None:
    world = World(1)
    a, b = two(world)
    a.send(at(b.host), b"opens")
    world.run_for(NS)
    outside = b.sources[0]
    cut = world.partition([a.host], [b.host])
    a.send(at(b.host))
    b.send(outside)
    world.run_for(NS)
    assert drops(world) == {"partition": 2}
    cut.heal()
    cut.heal()
    a.send(at(b.host), b"healed")
    b.send(outside, b"healed")
    world.run_for(NS)
    assert (a.data, b.data) == ([b"healed"], [b"opens", b"healed"])


def test_a_partition_may_keep_one_direction_only() -> None:
    world = World(1)
    a, b = two(world)
    a.send(at(b.host), b"opens")
    world.run_for(NS)
    world.partition([b.host], [a.host], one_way=True)
    a.send(at(b.host), b"passes")
    b.send(b.sources[0], b"does not")
    world.run_for(NS)
    assert (a.data, b.data) == ([], [b"opens", b"passes"])


def test_a_partition_of_networks_cuts_off_all_below_and_nobody_else() -> None:
    world = World(1)
    site = world.network("site", prefix="10.0.0.0/24", nat=PORT_RESTRICTED)
    floor = world.network("floor", prefix="10.0.1.0/24", behind=site)
    cloud = world.network("cloud")
    a, near = Socket(world.host("a", floor), 5_000), Socket(world.host("near", site), PORT)
    b, other = Socket(world.host("b", cloud), PORT), Socket(world.host("other", world.internet), 9)
    world.partition([site], [cloud])
    for to in (at(near.host), at(b.host), at(other.host, 9)):
        a.send(to)
    world.run_for(NS)
    assert [len(socket.got) for socket in (near, b, other)] == [1, 0, 1]
    other.send(at(b.host))
    near.send(at(b.host))
    world.run_for(NS)
    assert b.sources == [at(other.host, 9)]


def test_icmp_does_not_cross_a_partition() -> None:
    world = World(1)
    a, b = two(world)
    b.host.unbind(PORT)
    world.partition([b.host], [a.host.network], one_way=True)
    a.send(at(b.host))
    world.run_for(NS)
    assert (a.failures, drops(world)) == ([], {"no socket": 1})


# --- roaming ---


def test_a_roaming_host_keeps_its_sockets_and_gets_new_addresses() -> None:
    world = World(1)
    a, b = two(world)
    cafe = world.network("cafe", prefix="10.9.0.0/24", nat=FULL_CONE)
    moved: list[str | None] = []
    a.host.on_moved.append(lambda host: moved.append(host.ipv4))
    a.send(at(b.host), b"from home")
    world.run_for(NS)
    home = a.host.network
    a.host.move(cafe)
    a.send(at(b.host), b"from the cafe")
    world.run_for(NS)
    assert moved == [a.host.ipv4]
    assert str(moved[0]).startswith("10.9.0.")
    assert [source.host for source in b.sources] == [home.outer[0], cafe.outer[0]]
    b.send(b.sources[1], b"answer")
    world.run_for(NS)
    assert a.data == [b"answer"]


def test_what_was_under_way_to_the_old_place_is_lost() -> None:
    world = World(1)
    wlan = world.network("wlan", prefix="203.0.113.0/24", lan=LinkQuality(latency_ns=9 * MS))
    a, b = Socket(world.host("a", wlan), 5_000), Socket(world.host("b", world.internet), PORT)
    old = at(a.host, 5_000)
    b.send(old)
    world.run_for(10 * MS)
    a.host.move(world.network("other"))
    world.run_for(NS)
    b.send(old)
    world.run_for(NS)
    assert (a.got, drops(world)) == ([], {"no route": 2})


def test_rebinding_and_renumbering_a_nat_cut_what_came_in() -> None:
    world = World(1)
    a, b = two(world)
    home = a.host.network
    for change in (home.rebind, home.renumber):
        a.send(at(b.host))
        world.run_for(NS)
        change()
        b.send(b.sources[-1])
        world.run_for(NS)
    assert a.got == []
    assert drops(world) == {"nat no mapping": 1, "no route": 1}
    old = b.sources[-1].host
    a.send(at(b.host))
    world.run_for(NS)
    assert b.sources[-1].host == home.outer[0] != old
    home.renumber("203.0.113.77")
    assert home.outer == ("203.0.113.77",)
    with pytest.raises(ValueError, match="no NAT"):
        b.host.network.rebind()
    with pytest.raises(ValueError, match="no NAT"):
        b.host.network.renumber()


# --- pauses and crashes ---


def test_a_paused_host_is_silent_and_receives_when_it_goes_on() -> None:
    world = World(1)
    a, b = two(world)
    b.host.pause()
    b.send(at(a.host))
    a.send(at(b.host), b"1")
    a.send(at(b.host), b"2")
    world.run_for(NS)
    assert (b.got, world.sent) == ([], 2)
    assert world.in_flight() == 2
    b.host.resume()
    b.host.resume()
    world.run_for(NS)
    assert b.data == [b"1", b"2"]
    assert b.instants == [NS, NS]


def test_what_a_paused_host_keeps_is_bounded() -> None:
    world = World(1)
    a, b = two(world)
    b.host.pause()
    for _ in range(300):
        a.send(at(b.host), bytes(972))
    world.run_for(NS)
    kept = RECEIVE_BUFFER_BYTES // 1_000
    assert drops(world) == {"host buffer full": 300 - kept}
    b.host.resume()
    world.run_for(NS)
    assert len(b.got) == kept


def test_a_host_whose_processes_died_refuses_and_one_without_power_is_silent() -> None:
    for answers, failures in ((True, 1), (False, 0)):
        world = World(1)
        a, b = two(world)
        b.host.crash(answers=answers)
        b.send(at(a.host))
        a.send(at(b.host))
        world.run_for(NS)
        assert (b.got, len(a.failures)) == ([], failures)
        assert drops(world) == {"host down": 1}


def test_a_restarted_host_has_its_address_and_no_sockets() -> None:
    world = World(1)
    a, b = two(world)
    b.host.crash()
    b.host.restart()
    a.send(at(b.host))
    world.run_for(NS)
    assert drops(world) == {"no socket": 1}
    b.bind()
    a.send(at(b.host))
    world.run_for(NS)
    assert len(b.got) == 1


def test_a_crash_in_a_pause_ends_it_and_loses_what_waited() -> None:
    world = World(1)
    a, b = two(world)
    b.host.pause()
    a.send(at(b.host))
    world.run_for(NS)
    b.host.crash()
    b.host.resume()
    b.host.restart()
    assert (b.host.runs, world.in_flight()) == (True, 0)
    assert drops(world) == {"host down": 1}


def test_a_removed_host_leaves_its_address_free() -> None:
    world = World(1)
    a, b = two(world)
    address = b.host.ipv4
    a.send(at(b.host))
    world.remove_host(b.host)
    world.run_for(NS)
    assert drops(world) == {"no route": 1}
    world.host("b", b.host.network, ipv4=address)


# --- clocks ---


def test_a_clock_drifts_and_its_wall_time_with_it() -> None:
    world = World(1)
    host = world.host("a", world.internet)
    world.run_for(10 * NS)
    host.drift(100)
    world.run_for(10_000 * NS)
    assert host.clock.monotonic_ns() == 10_010 * NS + NS
    assert host.clock.utc_now() - world.clock.utc_now() == timedelta(seconds=1)
    host.drift(-100)
    world.run_for(10_000 * NS)
    assert host.clock.monotonic_ns() == world.now
    assert host.clock.drift_ppm == -100


def test_setting_the_wall_clock_leaves_monotonic_time_alone() -> None:
    world = World(1)
    host = world.host("a", world.internet)
    host.clock.jump(-3_600 * NS)
    host.clock.jump(NS)
    assert host.clock.offset_ns == -3_599 * NS
    assert host.clock.monotonic_ns() == world.now == 0
    assert world.clock.utc_now() - host.clock.utc_now() == timedelta(seconds=3_599)


def test_a_clock_that_stands_still_is_refused() -> None:
    with pytest.raises(ValueError, match="stand still"):
        World(1).host("a", World(1).internet).drift(-1_000_000)


# --- taps and the trace ---


def test_a_tap_sees_every_step_of_a_datagram() -> None:
    world = World(1)
    a, b = two(world)
    seen = watched(world)
    a.send(at(b.host), b"hello")
    world.run_for(NS)
    outside = Address(a.host.network.outer[0], 5_000)
    assert [(each.now, each.what, each.where, each.source) for each in seen] == [
        (0, "sent", "a", at(a.host, 5_000)),
        (0, "translated", "home", outside),
        (10 * MS, "delivered", "b", outside),
    ]
    assert {(each.number, each.origin, each.size, each.data) for each in seen} == {
        (0, "a", 33, b"hello")
    }


def test_every_reason_of_a_drop_is_a_known_one() -> None:
    assert len(set(DROPS)) == len(DROPS)


def run(seed: int, *, note: str = "", size: int = 10, extra: bool = False) -> str:
    world = World(seed)
    home = world.network("home", nat=PORT_RESTRICTED, uplink=LinkQuality(loss=0.3))
    a, b = Socket(world.host("a", home), 5_000), Socket(world.host("b", world.internet), PORT)
    if extra:
        world.host("c", home)
    for _ in range(50):
        a.send(at(b.host), bytes(size))
    world.run_for(NS)
    if note:
        world.note(note)
    return world.trace


def test_the_trace_is_the_same_for_the_same_and_differs_for_what_differs() -> None:
    assert run(1) == run(1) == run(1, extra=True)
    assert len({run(1), run(2), run(1, note="x"), run(1, note="y"), run(1, size=11)}) == 5


def test_asking_for_the_trace_does_not_change_it() -> None:
    def traced(ask: bool) -> str:
        world = World(1)
        a, b = two(world)
        for _ in range(20):
            a.send(at(b.host))
            world.run_for(5 * MS)
            if ask:
                assert world.trace
        return world.trace

    assert traced(ask=True) == traced(ask=False)


def test_names_of_randomness_are_independent() -> None:
    world = World(1)
    assert world.randomness("a").bytes(8) == World(1).randomness("a").bytes(8)
    assert world.randomness("a").bytes(8) != world.randomness("b").bytes(8)


def test_a_tap_can_be_taken_away() -> None:
    world = World(1)
    a, b = two(world)
    seen: list[object] = []
    tap = seen.append
    world.watch(tap)
    world.unwatch(tap)
    a.send(at(b.host))
    assert seen == []


def test_hosts_and_networks_are_found_by_name() -> None:
    world = World(1)
    a, _ = two(world)
    host: Host = world.hosts["a"]
    assert host is a.host
    assert world.networks["home"] is host.network
    assert repr(host) == f"<host a {host.ipv4}>"
