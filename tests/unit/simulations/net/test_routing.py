"""Where packets go: trees of networks, NATs behind NATs, hairpins, links besides the tree."""

from __future__ import annotations

import itertools
from random import Random

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.net.address import Address
from simulations.net.links import LinkQuality
from simulations.net.nat import (
    FULL_CONE,
    PORT_RESTRICTED,
    SYMMETRIC,
    Hairpinning,
    NatBehaviour,
)
from simulations.net.world import World
from tests.unit.simulations.net.corner import MS, NS, PORT, Socket, at, at6, drops, watched

HAIRPINNING_CONE = attrs.evolve(FULL_CONE, hairpinning="external")


def server(world: World) -> Socket:
    return Socket(world.host("server", world.network("cloud")), PORT)


def seen_by(world: World, server: Socket, *clients: Socket) -> list[Address]:
    """As whom the server sees them."""
    for client in clients:
        client.send(at(server.host))
    world.run_for(NS)
    return server.sources[-len(clients) :]


def test_a_datagram_crosses_both_uplinks_and_back() -> None:
    world = World(1)
    home = world.network("home", nat=PORT_RESTRICTED, uplink=LinkQuality(latency_ns=3 * MS))
    a, b = Socket(world.host("a", home), 5_000), server(world)
    a.send(at(b.host))
    world.run_for(NS)
    assert b.got == [(8 * MS, b"data", Address(home.outer[0], 5_000))]
    b.send(b.sources[0], b"answer")
    world.run_for(NS)
    assert a.got == [(NS + 8 * MS, b"answer", at(b.host))]


def test_the_same_private_address_may_be_in_many_homes() -> None:
    world = World(1)
    b = server(world)
    sockets = []
    for n in range(3):
        home = world.network(f"home {n}", prefix="192.168.1.0/24", nat=PORT_RESTRICTED)
        sockets.append(Socket(world.host(f"host {n}", home, ipv4="192.168.1.77"), 5_000))
    outside = seen_by(world, b, *sockets)
    assert len(set(outside)) == 3
    for n, address in enumerate(outside):
        b.send(address, str(n).encode())
    world.run_for(NS)
    assert [socket.data for socket in sockets] == [[b"0"], [b"1"], [b"2"]]


def test_a_private_address_means_the_own_network_s_host() -> None:
    world = World(1)
    homes = [world.network(f"home {n}", nat=PORT_RESTRICTED) for n in range(2)]
    a = Socket(world.host("a", homes[0], ipv4="192.168.1.10"), 5_000)
    near = Socket(world.host("near", homes[0], ipv4="192.168.1.20"), PORT)
    far = Socket(world.host("far", homes[1], ipv4="192.168.1.20"), PORT)
    a.send(Address("192.168.1.20", PORT))
    a.send(Address("192.168.1.30", PORT))
    world.run_for(NS)
    assert (len(near.got), len(far.got)) == (1, 0)
    assert drops(world) == {"no route": 1}


def test_carrier_grade_nat_translates_twice() -> None:
    world = World(1)
    carrier = world.network("carrier", prefix="100.64.0.0/10", nat=FULL_CONE)
    home = world.network("home", nat=FULL_CONE, behind=carrier)
    a, b = Socket(world.host("a", home), 5_000), server(world)
    seen = watched(world)
    (outside,) = seen_by(world, b, a)
    assert outside.host in carrier.outer
    assert home.outer[0].startswith("100.64.")
    b.send(outside, b"answer")
    world.run_for(NS)
    assert a.data == [b"answer"]
    assert [each.where for each in seen if each.what == "translated"] == [
        "home", "carrier", "carrier", "home",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("inner", "outer"), [(FULL_CONE, PORT_RESTRICTED), (PORT_RESTRICTED, FULL_CONE)]
)
def test_of_stacked_nats_the_stricter_one_decides(inner: NatBehaviour, outer: NatBehaviour) -> None:
    world = World(1)
    carrier = world.network("carrier", prefix="100.64.0.0/10", nat=outer)
    home = world.network("home", nat=inner, behind=carrier)
    a, b = Socket(world.host("a", home), 5_000), server(world)
    stranger = Socket(world.host("stranger", world.internet), PORT)
    (outside,) = seen_by(world, b, a)
    stranger.send(outside)
    world.run_for(NS)
    assert a.got == []
    assert drops(world) == {"nat filter": 1}


def test_stacked_symmetric_on_either_floor_looks_symmetric() -> None:
    for inner, outer in ((SYMMETRIC, FULL_CONE), (FULL_CONE, SYMMETRIC)):
        world = World(1)
        carrier = world.network("carrier", prefix="100.64.0.0/10", nat=outer)
        a = Socket(world.host("a", world.network("home", nat=inner, behind=carrier)), 5_000)
        b = server(world)
        other = Socket(world.host("other", world.internet), PORT)
        assert seen_by(world, b, a) != seen_by(world, other, a)


@pytest.mark.parametrize("hairpinning", ["none", "internal", "external"])
def test_two_hosts_behind_one_nat_meet_at_its_outside_by_hairpinning(
    hairpinning: Hairpinning,
) -> None:
    world = World(1)
    home = world.network("home", nat=attrs.evolve(FULL_CONE, hairpinning=hairpinning))
    a, c = (Socket(world.host(name, home), 5_000) for name in "ac")
    mine, theirs = seen_by(world, server(world), a, c)
    a.send(theirs, b"hello")
    world.run_for(NS)
    assert (
        c.sources == {"none": [], "internal": [at(a.host, 5_000)], "external": [mine]}[hairpinning]
    )


def test_homes_of_one_carrier_meet_at_its_nat() -> None:
    world = World(1)
    carrier = world.network("carrier", prefix="100.64.0.0/10", nat=HAIRPINNING_CONE)
    homes = [world.network(f"home {n}", nat=FULL_CONE, behind=carrier) for n in range(2)]
    a, c = (Socket(world.host(home.name, home), 5_000) for home in homes)
    _, theirs = seen_by(world, server(world), a, c)
    world.run_for(NS)
    a.send(theirs, b"hello")
    world.run_for(NS)
    assert c.data == [b"hello"]


def test_a_hairpin_turns_at_the_floor_that_has_the_address() -> None:
    world = World(1)
    home = world.network("home", nat=HAIRPINNING_CONE)
    floor = world.network("floor", prefix="192.168.2.0/24", behind=home, uplink=LinkQuality())
    a, c = Socket(world.host("a", floor), 5_000), Socket(world.host("c", home), 5_000)
    _, theirs = seen_by(world, server(world), a, c)
    a.send(theirs, b"hello")
    a.send(at(c.host, 5_000), b"straight")
    world.run_for(NS)
    assert sorted(c.data) == [b"hello", b"straight"]


def test_the_masquerade_race_ends_a_punch_that_one_side_begins_earlier() -> None:
    """With entries of dropped packets the later side is remapped, and the punch fails for good; the
    kernel does the same with a skew of 25 ms."""

    def punched(inbound_binding: bool) -> bool:
        world = World(1)
        behaviour = NatBehaviour(inbound_binding=inbound_binding, timeout_ns=300 * NS)
        sockets = [
            Socket(world.host(n, world.network(f"home {n}", nat=behaviour)), 5_000) for n in "ac"
        ]
        a, c = sockets
        mine, theirs = seen_by(world, server(world), a, c)
        for n in range(10):
            world.after(n * 100 * MS, a.send, theirs)
            world.after(n * 100 * MS + 25 * MS, c.send, mine)
        world.run_for(3 * NS)
        return bool(a.got) and bool(c.got)

    assert punched(inbound_binding=False)
    assert not punched(inbound_binding=True)


def test_req_12_icmp_ends_no_mapping() -> None:
    world = World(1)
    home = world.network("home", nat=PORT_RESTRICTED)
    a, b = Socket(world.host("a", home), 5_000), server(world)
    (before,) = seen_by(world, b, a)
    b.host.unbind(PORT)
    a.send(at(b.host))
    world.run_for(NS)
    assert a.failures == [("port_unreachable", at(b.host), 0)]
    b.bind()
    assert seen_by(world, b, a) == [before]
    b.send(before, b"answer")
    world.run_for(NS)
    assert a.data == [b"answer"]


def test_req_13_too_big_is_told_to_the_inside_as_it_sent() -> None:
    world = World(1)
    carrier = world.network("carrier", prefix="100.64.0.0/10", nat=FULL_CONE)
    home = world.network("home", nat=FULL_CONE, behind=carrier)
    a, b = Socket(world.host("a", home), 5_000), server(world)
    carrier.uplink.there.quality = LinkQuality(latency_ns=5 * MS, mtu=1_400)
    a.send(at(b.host), bytes(1_400))
    world.run_for(NS)
    assert a.failures == [("too_big", at(b.host), 1_400)]


# --- links besides the tree ---


def test_a_link_besides_the_tree_is_taken_where_it_is_shorter() -> None:
    world = World(1)
    a_net = world.network("a", prefix="203.0.113.0/25", prefix6="2001:db8:1::/64")
    b_net = world.network("b", prefix="203.0.113.128/25", prefix6="2001:db8:2::/64")
    c_net = world.network("c", prefix="192.0.2.0/24", behind=b_net)
    world.link(a_net, b_net, LinkQuality(latency_ns=MS))
    a = Socket(world.host("a", a_net), 5_000)
    b = Socket(world.host("b", b_net), PORT)
    c = Socket(world.host("c", c_net), PORT)
    outside = Socket(world.host("outside", world.internet), PORT)
    for to in (at(b.host), at6(b.host), at(c.host), at(outside.host)):
        a.send(to)
    world.run_for(NS)
    assert (b.instants, c.instants, outside.instants) == ([MS, MS], [6 * MS], [5 * MS])
    c.send(at(a.host, 5_000))
    world.run_for(NS)
    assert a.instants == [NS + 6 * MS]


def test_a_link_does_not_lead_around_a_nat() -> None:
    world = World(1)
    a_net, b_net = world.network("a"), world.network("b")
    home = world.network("home", nat=PORT_RESTRICTED, behind=a_net)
    with pytest.raises(ValueError, match="one address realm"):
        world.link(home, b_net, LinkQuality())
    with pytest.raises(ValueError, match="one address realm"):
        world.link(a_net, a_net, LinkQuality())
    world.link(a_net, b_net, LinkQuality(latency_ns=MS))
    h, b = Socket(world.host("h", home), 5_000), Socket(world.host("b", b_net), PORT)
    h.send(at(b.host))
    world.run_for(NS)
    assert b.got == [(6 * MS, b"data", Address(home.outer[0], 5_000))]


def test_links_inside_of_a_private_network_work() -> None:
    world = World(1)
    site = world.network("site", prefix="10.0.0.0/24", nat=PORT_RESTRICTED)
    floors = [world.network(f"floor {n}", prefix=f"10.0.{n}.0/24", behind=site) for n in (1, 2)]
    world.link(floors[0], floors[1], LinkQuality(latency_ns=MS))
    a = Socket(world.host("a", floors[0]), 5_000)
    b = Socket(world.host("b", floors[1]), PORT)
    a.send(at(b.host))
    world.run_for(NS)
    assert b.got == [(MS, b"data", at(a.host, 5_000))]


@given(st.integers(0, 2**32))
def test_without_nats_every_host_reaches_every_other_in_the_fewest_hops(seed: int) -> None:
    """Each hop takes a millisecond, so the delay counts them; the reference is the distance in the
    graph by Floyd and Warshall."""
    draw = Random(seed)
    world = World(seed)
    hop = LinkQuality(latency_ns=MS)
    networks = [world.internet]
    distance: dict[tuple[int, int], int] = {}

    def join(a: int, b: int) -> None:
        distance[a, b] = distance[b, a] = 1

    for n in range(1, draw.randint(2, 10)):
        parent = draw.randrange(n)
        networks.append(
            world.network(f"n{n}", prefix=f"10.{n}.0.0/24", behind=networks[parent], uplink=hop)
        )
        join(n, parent)
    for _ in range(draw.randint(0, 4)):
        a, b = draw.sample(range(len(networks)), 2)
        world.link(networks[a], networks[b], hop)
        join(a, b)
    everywhere = range(len(networks))
    for via, a, b in itertools.product(everywhere, repeat=3):
        around = distance.get((a, via), 99) + distance.get((via, b), 99)
        distance[a, b] = 0 if a == b else min(distance.get((a, b), 99), around)
    sockets = [Socket(world.host(f"h{n}", each), PORT) for n, each in enumerate(networks)]
    for a, b in itertools.permutations(everywhere, 2):
        start = world.now
        sockets[a].send(at(sockets[b].host))
        world.run_for(100 * MS)
        assert sockets[b].got[-1] == (start + distance[a, b] * MS, b"data", at(sockets[a].host))


# --- addresses ---


def test_all_addresses_are_drawn_and_those_taken_are_left_out() -> None:
    world = World(1)
    home = world.network("home", prefix="10.1.0.0/29", nat=PORT_RESTRICTED)
    world.host("fixed", home, ipv4="10.1.0.3")
    drawn = [world.host(f"h{n}", home).ipv4 for n in range(4)]
    assert sorted(drawn, key=str) == ["10.1.0.2", "10.1.0.4", "10.1.0.5", "10.1.0.6"]
    with pytest.raises(RuntimeError, match="no address left"):
        world.host("too many", home)


def test_leaving_a_host_out_gives_no_other_one_another_address() -> None:
    def addresses(*names: str) -> dict[str, str | None]:
        world = World(1)
        home = world.network("home", prefix="10.1.0.0/16", nat=PORT_RESTRICTED)
        return {name: world.host(name, home).ipv4 for name in names}

    assert addresses("a", "c").items() < addresses("a", "b", "c").items()


def test_an_address_and_a_name_are_given_once() -> None:
    world = World(1)
    home = world.network("home", nat=PORT_RESTRICTED, outer=["203.0.113.9"])
    world.host("a", home, ipv4="192.168.1.9")
    with pytest.raises(ValueError, match="taken"):
        world.host("b", home, ipv4="192.168.1.9")
    with pytest.raises(ValueError, match="already"):
        world.host("a", home)
    with pytest.raises(ValueError, match="already"):
        world.network("home")
    with pytest.raises(ValueError, match="taken"):
        world.network("other", nat=PORT_RESTRICTED, outer=["203.0.113.8", "203.0.113.9"])
    world.network("other", nat=PORT_RESTRICTED, outer=["203.0.113.8"])
    with pytest.raises(ValueError, match="taken"):
        world.host("c", world.internet, ipv4="203.0.113.9")


def test_a_nat_on_an_ipv6_only_network_has_no_outside() -> None:
    world = World(1)
    six = world.network("six", prefix6="2001:db8:2::/64")
    with pytest.raises(ValueError, match="no IPv4 addresses"):
        world.network("home", nat=PORT_RESTRICTED, behind=six)


def test_a_host_has_the_families_of_its_network_and_may_go_without() -> None:
    world = World(1)
    both = world.network("both", prefix="203.0.113.0/24", prefix6="2001:db8:1::/64")
    six = world.network("six", prefix6="2001:db8:2::/64")
    dual, only4, only6 = (
        world.host("dual", both),
        world.host("only 4", both, ipv6=""),
        world.host("only 6", six),
    )
    hosts = ((dual, "203.0.113.", "2001:db8:1::"), (only4, "203.0.113.", None),
             (only6, None, "2001:db8:2::"))  # fmt: skip
    for host, *begins in hosts:
        for address, begin in zip((host.ipv4, host.ipv6), begins, strict=True):
            assert (address is None) == (begin is None)
            assert address is None or begin is None or address.startswith(begin[:-1])
    Socket(only6, 5_000).send(at(dual))
    assert drops(world) == {"no address": 1}


def test_many_outside_addresses_are_shared_in_pairs() -> None:
    world = World(1)
    big = world.network("big", prefix="10.0.0.0/16", nat=NatBehaviour(public_addresses=3))
    assert len(set(big.outer)) == 3
    sockets = [Socket(world.host(f"h{n}", big), 5_000) for n in range(6)]
    outside = seen_by(world, server(world), *sockets)
    assert {address.host for address in outside} == set(big.outer)


def test_a_nat_without_room_drops() -> None:
    world = World(1)
    home = world.network("home", nat=NatBehaviour(first_port=5_000, last_port=5_001))
    a, b = world.host("a", home), server(world)
    for port in (6_000, 6_001, 6_002):
        a.send(port, at(b.host), b"x")
    world.run_for(NS)
    assert len(b.got) == 2
    assert drops(world) == {"nat no port": 1}
