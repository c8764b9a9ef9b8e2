"""Firewalls: what may leave, what may enter unasked, and what is remembered."""

from __future__ import annotations

import attrs
import pytest

from runtime.net.address import Address
from simulations.net.firewall import (
    STATEFUL,
    STATEFUL6,
    UDP_DROPPED,
    UDP_REJECTED,
    WEB_ONLY,
    Firewall,
    FirewallState,
    Rule,
)
from simulations.net.links import LinkQuality
from simulations.net.nat import FULL_CONE
from simulations.net.packets import TCP, UDP
from simulations.net.streams import HANDSHAKE_TIMEOUT, PROHIBITED
from simulations.net.world import World
from tests.unit.simulations.net.corner import (
    MS,
    NS,
    PORT,
    Client,
    Server,
    Socket,
    at,
    at6,
    drops,
)

INSIDE = Address("2001:db8:1::2", 5_000)
OUTSIDE = Address("2001:db8:2::2", 3_478)
OTHER = Address("2001:db8:2::3", 3_478)


def office(firewall: Firewall) -> tuple[World, Socket, Socket]:
    """A host behind the firewall, with a public address, and one on the internet; both families."""
    world = World(1)
    inside = world.network(
        "office", prefix="203.0.113.0/24", prefix6="2001:db8:1::/64", firewall=firewall
    )
    return (
        world,
        Socket(world.host("inside", inside), 5_000),
        Socket(world.host("outside", world.internet), PORT),
    )


def test_what_was_not_asked_for_does_not_enter() -> None:
    world, a, b = office(STATEFUL)
    b.send(at(a.host, 5_000))
    b.send(at6(a.host, 5_000))
    world.run_for(NS)
    assert a.got == []
    assert drops(world) == {"firewall": 2}


def test_answers_enter_and_nobody_else_s() -> None:
    world, a, b = office(STATEFUL)
    other = Socket(world.host("other", world.internet), PORT)
    a.send(at(b.host))
    world.run_for(NS)
    b.send(b.sources[0], b"answer")
    other.send(b.sources[0], b"intrusion")
    world.run_for(NS)
    assert a.data == [b"answer"]


def test_two_hosts_behind_firewalls_punch_through_over_ipv6() -> None:
    world = World(1)
    sides = []
    for n in (1, 2):
        home = world.network(f"home {n}", prefix6=f"2001:db8:{n}::/64", firewall=STATEFUL6)
        sides.append(Socket(world.host(f"host {n}", home), 5_000))
    a, b = sides
    assert (a.host.ipv4, b.host.ipv4) == (None, None)
    a.send(at6(b.host, 5_000), b"opens a's")
    world.run_for(NS)
    b.send(at6(a.host, 5_000), b"passes")
    world.run_for(NS)
    a.send(at6(b.host, 5_000), b"passes too")
    world.run_for(NS)
    assert (a.data, b.data) == ([b"passes"], [b"passes too"])
    assert a.sources == [at6(b.host, 5_000)], "IPv6 is not translated"


def test_a_flow_is_forgotten_after_its_timeout_and_refreshed_by_both_sides() -> None:
    box = FirewallState(attrs.evolve(STATEFUL, udp_timeout_ns=30 * NS))
    assert box.leaves(UDP, INSIDE, OUTSIDE, 0, True)
    for now in range(20 * NS, 100 * NS, 20 * NS):
        assert box.enters(UDP, OUTSIDE, INSIDE, now, True)
    assert not box.enters(UDP, OUTSIDE, INSIDE, 111 * NS, True)
    assert not box.enters(TCP, OUTSIDE, INSIDE, 90 * NS, True)


def test_an_allow_list_knows_protocol_port_and_prefix() -> None:
    box = FirewallState(
        Firewall(
            outbound=(Rule(protocol="udp", ports=((3_478, 3_479), (53, 53))),),
            inbound=(Rule(protocol="tcp", ports=((443, 443),), prefix="2001:db8:2::/64"),),
        )
    )
    assert [
        port
        for port in (52, 53, 3_478, 3_479, 3_480)
        if box.leaves(UDP, INSIDE, Address(OUTSIDE.host, port), 0, True)
    ] == [53, 3_478, 3_479]
    assert not box.leaves(TCP, INSIDE, Address(OUTSIDE.host, 53), 0, True)
    web = Address(INSIDE.host, 443)
    assert box.enters(TCP, OUTSIDE, web, 0, True)
    assert box.leaves(TCP, web, OUTSIDE, 0, True), "the answer to what was let in"
    assert not box.enters(UDP, OTHER, web, 0, True)
    assert not box.enters(TCP, Address("2001:db8:3::1", 9), web, 0, True)
    assert not box.enters(TCP, OTHER, Address(INSIDE.host, 444), 0, True)
    assert box.statistics() == {"flows": 4, "refused": 6}


def test_rules_may_change_while_what_is_established_stays() -> None:
    box = FirewallState(STATEFUL)
    box.leaves(UDP, INSIDE, OUTSIDE, 0, True)
    box.rules = UDP_DROPPED
    assert box.leaves(UDP, INSIDE, OUTSIDE, NS, True)
    assert not box.leaves(UDP, INSIDE, OTHER, NS, True)
    box.forget()
    assert not box.leaves(UDP, INSIDE, OUTSIDE, NS, True)


def test_flows_are_bounded_and_old_ones_leave_memory() -> None:
    box = FirewallState(attrs.evolve(STATEFUL, max_flows=10))
    for port in range(10):
        assert box.leaves(UDP, INSIDE, Address(OUTSIDE.host, port), 0, True)
    assert not box.leaves(UDP, INSIDE, OTHER, 0, True)
    assert box.refusal == "firewall table full"
    assert box.leaves(UDP, INSIDE, OTHER, 121 * NS, True)
    assert box.statistics()["flows"] == 1


@pytest.mark.parametrize(("firewall", "told"), [(UDP_DROPPED, False), (UDP_REJECTED, True)])
def test_blocked_udp_is_dropped_in_silence_or_rejected(firewall: Firewall, told: bool) -> None:
    world, a, b = office(firewall)
    a.send(at(b.host))
    world.run_for(NS)
    assert b.got == []
    assert a.failures == ([("prohibited", at(b.host), 0)] if told else [])


@pytest.mark.parametrize(
    ("firewall", "code"), [(UDP_DROPPED, HANDSHAKE_TIMEOUT), (UDP_REJECTED, PROHIBITED)]
)
def test_where_udp_is_blocked_streams_over_tcp_get_through(firewall: Firewall, code: int) -> None:
    world, a, b = office(firewall)
    server = Server(b.host, echoes=True)
    quic, tcp = Client(a.host, server.address), Client(a.host, server.address, "tcp")
    tcp.stream.send(b"hello")
    world.run_for(14 * NS)
    assert tcp.data == b"hello"
    world.run_for(10 * NS)
    assert [each for each, _ in quic.closed] == [code]


def test_a_web_only_network_lets_tcp_443_out_and_nothing_else() -> None:
    world, a, b = office(WEB_ONLY)
    web, other = Server(b.host, 443), Server(b.host, 8_443)
    open_one, closed_one = (Client(a.host, each.address, "tcp") for each in (web, other))
    world.run_for(2 * NS)
    assert open_one.stream.state == "open"
    assert closed_one.stream.state == "opening"


def test_a_firewall_may_look_at_one_family_only() -> None:
    world = World(1)
    home = world.network(
        "home", prefix="192.168.7.0/24", prefix6="2001:db8:1::/64", nat=FULL_CONE,
        firewall=STATEFUL6,
    )  # fmt: skip
    a, b = Socket(world.host("a", home), 5_000), Socket(world.host("b", world.internet), PORT)
    other = Socket(world.host("other", world.internet), PORT)
    a.send(at(b.host))
    world.run_for(NS)
    other.send(b.sources[0], b"through the full cone")
    other.send(at6(a.host, 5_000), b"over IPv6")
    world.run_for(NS)
    assert a.data == [b"through the full cone"]


def test_a_home_router_guards_ipv6_and_leaves_ipv4_to_its_nat() -> None:
    everything4 = (Rule(prefix="0.0.0.0/0"),)
    world = World(1)
    home = world.network(
        "home", prefix="192.168.7.0/24", prefix6="2001:db8:1::/64", nat=FULL_CONE,
        firewall=Firewall(outbound=(Rule(protocol="udp"),), inbound=everything4),
    )  # fmt: skip
    a, b = Socket(world.host("a", home), 5_000), Socket(world.host("b", world.internet), PORT)
    a.send(at(b.host))
    world.run_for(NS)
    other = Socket(world.host("other", world.internet), PORT)
    other.send(b.sources[0], b"by the NAT's leave")
    other.send(at6(a.host, 5_000), b"over IPv6")
    world.run_for(NS)
    assert a.data == [b"by the NAT's leave"]


def test_a_firewall_may_be_put_up_and_taken_down_while_the_world_runs() -> None:
    world, a, b = office(STATEFUL)
    network = a.host.network
    for firewall, passes in ((FirewallState(UDP_DROPPED), 0), (None, 1)):
        network.firewall = firewall
        a.send(at(b.host))
        world.run_for(NS)
        assert len(b.got) == passes


def test_a_black_hole_swallows_what_icmp_would_say() -> None:
    world, a, b = office(attrs.evolve(STATEFUL, passes_icmp=False))
    b.host.network.uplink.change(LinkQuality())
    a.host.network.uplink.there.quality = LinkQuality(latency_ns=MS, mtu=600)
    a.send(at(b.host), bytes(1_000))
    world.run_for(NS)
    assert (a.failures, b.got) == ([], [])
    assert drops(world) == {"too big": 1}
