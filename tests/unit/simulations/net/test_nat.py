"""The NAT, requirement by requirement of RFC 4787 (UDP), and the axes that it knows besides."""

from __future__ import annotations

import itertools
from typing import get_args

import attrs
import pytest

from runtime.net.address import Address
from simulations.net.nat import (
    FULL_CONE,
    PORT_RESTRICTED,
    RESTRICTED_CONE,
    RFC_4787,
    SYMMETRIC,
    Behaviour,
    Nat,
    NatBehaviour,
)
from simulations.net.packets import TCP, UDP

NS = 10**9
PUBLIC = "198.51.100.2"
INSIDE = Address("192.168.1.10", 40_000)
OTHER_INSIDE = Address("192.168.1.11", 40_000)
FIRST = Address("203.0.113.2", 3_478)
FIRST_OTHER_PORT = Address("203.0.113.2", 3_479)
SECOND = Address("203.0.113.6", 3_478)
PEERS = (FIRST, FIRST_OTHER_PORT, SECOND)
BEHAVIOURS: tuple[Behaviour, ...] = get_args(Behaviour)


def nat(behaviour: NatBehaviour, *addresses: str, seed: int = 1) -> Nat:
    return Nat("box", addresses or (PUBLIC,), behaviour, seed=seed)


def out(box: Nat, peer: Address = FIRST, now: int = 0, inside: Address = INSIDE) -> Address:
    outside = box.outbound(UDP, inside, peer, now)
    assert outside is not None
    return outside


@pytest.mark.parametrize(
    ("mapping", "distinct"),
    [("endpoint_independent", 1), ("address_dependent", 2), ("address_and_port_dependent", 3)],
)
def test_req_1_the_mapping_depends_on_what_its_name_says(mapping: Behaviour, distinct: int) -> None:
    box = nat(NatBehaviour(mapping=mapping, ports="random"))
    assert len({out(box, peer) for peer in PEERS}) == distinct


def test_req_2_pooling_is_paired() -> None:
    addresses = tuple(f"198.51.100.{n}" for n in range(2, 6))
    box = nat(NatBehaviour(mapping="address_and_port_dependent", public_addresses=4), *addresses)
    used = {}
    for n in range(8):
        host = f"192.168.1.{n}"
        seen = {out(box, peer, inside=Address(host, port)).host
                for peer in PEERS for port in (1_024, 5_000)}  # fmt: skip
        assert len(seen) == 1
        used[host] = seen.pop()
    assert set(used.values()) == set(addresses)


@pytest.mark.parametrize("ports", ["preserve", "random", "sequential", "range"])
def test_req_3_ports_are_not_overloaded(ports: str) -> None:
    box = nat(NatBehaviour(ports=ports))  # type: ignore[arg-type]
    flows = [Address(f"192.168.1.{n}", port) for n in range(40) for port in (4_000, 4_001)]
    assert len({out(box, inside=inside) for inside in flows}) == len(flows)


def test_req_3a_well_known_ports_stay_well_known() -> None:
    box = nat(NatBehaviour())
    seen = [out(box, inside=Address(f"192.168.1.{n}", 500)).port for n in range(20)]
    assert seen[0] == 500
    assert all(1 <= port < 1_024 for port in seen)
    assert out(box, inside=Address("192.168.1.40", 1_024)).port >= 1_024


def test_req_4_parity_is_kept_where_wanted() -> None:
    box = nat(NatBehaviour(keeps_parity=True))
    for n in range(50):
        for port in (7_000, 7_001):
            assert out(box, inside=Address(f"192.168.1.{n}", port)).port % 2 == port % 2


def test_req_5_a_mapping_lives_for_its_timeout() -> None:
    box = nat(attrs.evolve(RFC_4787, ports="random"))
    assert RFC_4787.timeout_ns >= 120 * NS
    first = out(box)
    assert out(box, now=300 * NS) == first
    assert box.inbound(UDP, FIRST, first, 600 * NS) == INSIDE
    assert box.inbound(UDP, FIRST, first, 901 * NS) is None
    assert box.refusal == "nat no mapping"


def test_req_6_packets_from_inside_refresh() -> None:
    box = nat(NatBehaviour(ports="random"))
    first = out(box)
    for now in range(0, 200 * NS, 20 * NS):
        assert out(box, now=now) == first


@pytest.mark.parametrize("refreshes", [True, False])
def test_req_6a_packets_from_outside_may_refresh(refreshes: bool) -> None:
    box = nat(NatBehaviour(inbound_refresh=refreshes))
    first = out(box)
    for now in range(20 * NS, 120 * NS, 20 * NS):
        box.inbound(UDP, FIRST, first, now)
    assert (box.inbound(UDP, FIRST, first, 121 * NS) is not None) is refreshes


def test_what_is_dropped_from_outside_refreshes_nothing() -> None:
    box = nat(NatBehaviour(inbound_refresh=True))
    first = out(box)
    assert box.inbound(UDP, SECOND, first, 25 * NS) is None
    assert box.inbound(UDP, FIRST, first, 31 * NS) is None


@pytest.mark.parametrize(
    ("filtering", "admitted"),
    [
        ("endpoint_independent", [FIRST, FIRST_OTHER_PORT, SECOND]),
        ("address_dependent", [FIRST, FIRST_OTHER_PORT]),
        ("address_and_port_dependent", [FIRST]),
    ],
)
def test_req_8_the_filter_admits_whom_the_inside_sent_to(
    filtering: Behaviour, admitted: list[Address]
) -> None:
    box = nat(NatBehaviour(filtering=filtering))
    outside = out(box, FIRST)
    assert [peer for peer in PEERS if box.inbound(UDP, peer, outside, NS)] == admitted
    assert box.statistics().filtered == 3 - len(admitted)


def test_a_peer_that_the_inside_is_silent_to_is_let_in_no_more() -> None:
    box = nat(PORT_RESTRICTED)
    outside = out(box, FIRST)
    for now in range(10 * NS, 60 * NS, 10 * NS):
        assert out(box, SECOND, now) == outside
    assert box.inbound(UDP, SECOND, outside, 51 * NS) == INSIDE
    assert box.inbound(UDP, FIRST, outside, 51 * NS) is None


@pytest.mark.parametrize(
    ("hairpinning", "source"),
    [("none", None), ("internal", INSIDE), ("external", Address(PUBLIC, INSIDE.port))],
)
def test_req_9_hairpinning(hairpinning: str, source: Address | None) -> None:
    box = nat(NatBehaviour(filtering="endpoint_independent", hairpinning=hairpinning))  # type: ignore[arg-type]
    theirs = out(box, inside=OTHER_INSIDE)
    mine = out(box)
    got = box.hairpin(UDP, INSIDE, theirs, NS)
    if source is None:
        assert got is None
        assert box.refusal == "nat no hairpinning"
    else:
        assert got == ((mine if hairpinning == "external" else INSIDE), OTHER_INSIDE)


def test_req_9_hairpinned_packets_meet_the_filter() -> None:
    box = nat(NatBehaviour(hairpinning="external"))
    mine, theirs = out(box), out(box, inside=OTHER_INSIDE)
    assert box.hairpin(UDP, INSIDE, theirs, 0) is None
    assert box.refusal == "nat filter"
    assert box.hairpin(UDP, OTHER_INSIDE, mine, 0) == (theirs, INSIDE)
    assert box.hairpin(UDP, INSIDE, theirs, 0) == (mine, OTHER_INSIDE)


@pytest.mark.parametrize(("mapping", "filtering"), list(itertools.product(BEHAVIOURS, BEHAVIOURS)))
def test_req_11_behaviour_is_deterministic(mapping: Behaviour, filtering: Behaviour) -> None:
    def history(seed: int) -> list[Address | None]:
        box = nat(NatBehaviour(mapping=mapping, filtering=filtering, ports="random"), seed=seed)
        outs = [out(box, peer, inside=Address("192.168.1.9", port))
                for port in range(2_000, 2_020) for peer in PEERS]  # fmt: skip
        return outs + [box.inbound(UDP, FIRST, each, NS) for each in outs]

    assert history(1) == history(1)
    assert history(1) != history(2)


def test_the_presets_are_what_they_are_called() -> None:
    assert FULL_CONE.mapping == RESTRICTED_CONE.mapping == "endpoint_independent"
    assert FULL_CONE.filtering == "endpoint_independent"
    assert RESTRICTED_CONE.filtering == "address_dependent"
    assert PORT_RESTRICTED.filtering == "address_and_port_dependent"
    assert SYMMETRIC.mapping == SYMMETRIC.filtering == "address_and_port_dependent"
    assert RFC_4787.mapping == "endpoint_independent"
    assert RFC_4787.hairpinning == "external"


# --- assignment of ports ---


def test_a_preserved_port_is_the_inside_one_until_another_host_has_it() -> None:
    box = nat(PORT_RESTRICTED)
    assert out(box).port == INSIDE.port
    assert out(box, inside=OTHER_INSIDE).port != INSIDE.port


@pytest.mark.parametrize("port", [1_024, 65_535])
def test_the_first_and_the_last_port_are_preserved_too(port: int) -> None:
    assert out(nat(PORT_RESTRICTED), inside=Address("192.168.1.9", port)).port == port


def test_a_preserved_port_is_free_again_when_its_mapping_is_over() -> None:
    box = nat(PORT_RESTRICTED)
    out(box)
    assert out(box, now=31 * NS, inside=OTHER_INSIDE).port == INSIDE.port


def test_random_ports_are_spread() -> None:
    box = nat(NatBehaviour(ports="random"))
    ports = [out(box, inside=Address("192.168.1.9", port)).port for port in range(2_000, 3_000)]
    assert min(ports) < 3_000
    assert max(ports) > 63_000
    assert sum(ports) / 1_000 == pytest.approx(33_280, abs=2_000)


def test_sequential_ports_count_up_and_begin_again() -> None:
    box = nat(NatBehaviour(
        mapping="address_and_port_dependent", ports="sequential", first_port=40_000,
        last_port=40_009,
    ))  # fmt: skip
    peers = [Address("203.0.113.2", port) for port in range(1, 30)]
    assert [out(box, peer).port for peer in peers[:10]] == list(range(40_000, 40_010))
    assert out(box, peers[10], now=31 * NS).port == 40_000


def test_a_range_is_one_host_s_own() -> None:
    box = nat(NatBehaviour(mapping="address_and_port_dependent", ports="range", range_ports=64))
    blocks: dict[str, set[int]] = {}
    for port in range(1, 31):
        for host in ("192.168.1.10", "192.168.1.11", "192.168.1.12"):
            mapped = out(box, Address("203.0.113.2", port), inside=Address(host, 5_000)).port
            blocks.setdefault(host, set()).add((mapped - 1_024) // 64)
    assert blocks == {"192.168.1.10": {0}, "192.168.1.11": {1}, "192.168.1.12": {2}}


def test_a_range_that_is_used_up_serves_its_host_no_more_and_others_still() -> None:
    box = nat(NatBehaviour(mapping="address_and_port_dependent", ports="range", range_ports=4))
    for port in range(1, 5):
        out(box, Address("203.0.113.2", port))
    assert box.outbound(UDP, INSIDE, Address("203.0.113.2", 5), 0) is None
    assert box.refusal == "nat no port"
    assert out(box, inside=OTHER_INSIDE).port == 1_028


def test_ranges_end_with_the_ports() -> None:
    box = nat(NatBehaviour(ports="range", range_ports=512, last_port=2_047))
    for n in range(2):
        out(box, inside=Address(f"192.168.1.{n}", 5_000))
    late = Address("192.168.1.9", 5_000)
    assert box.outbound(UDP, late, FIRST, 0) is None
    assert box.refusal == "nat no port"
    assert out(box, now=20 * NS, inside=Address("192.168.1.1", 5_000)).port == 1_536
    assert out(box, now=31 * NS, inside=late).port == 1_024, "the block of a host that is silent"


@pytest.mark.parametrize("ports", ["preserve", "random", "sequential"])
def test_every_port_can_be_given_and_then_none(ports: str) -> None:
    box = nat(NatBehaviour(ports=ports, first_port=5_000, last_port=5_099))  # type: ignore[arg-type]
    given = {out(box, inside=Address("192.168.1.9", 6_000 + n)).port for n in range(100)}
    assert given == set(range(5_000, 5_100))
    assert box.outbound(UDP, INSIDE, FIRST, 0) is None
    assert box.refusal == "nat no port"
    assert box.statistics().exhausted == 1
    assert box.outbound(UDP, INSIDE, FIRST, 31 * NS) is not None


def test_a_full_table_takes_no_more_until_something_is_over() -> None:
    box = nat(NatBehaviour(max_mappings=3))
    for n in range(3):
        out(box, inside=Address("192.168.1.9", 5_000 + n))
    assert box.outbound(UDP, INSIDE, FIRST, NS) is None
    assert box.refusal == "nat table full"
    assert out(box, now=31 * NS)
    assert box.statistics().mappings == 1


def test_expired_mappings_do_not_stay_in_memory() -> None:
    box = nat(SYMMETRIC)
    for n in range(5_000):
        out(box, Address("203.0.113.2", 1 + n), now=n * NS)
    assert box.statistics().mappings < 100


# --- UDP and TCP ---


def test_udp_and_tcp_have_tables_of_their_own() -> None:
    box = nat(PORT_RESTRICTED)
    assert box.outbound(UDP, INSIDE, FIRST, 0) == box.outbound(TCP, OTHER_INSIDE, FIRST, 0)
    outside = Address(PUBLIC, INSIDE.port)
    assert box.inbound(UDP, FIRST, outside, 0) == INSIDE
    assert box.inbound(TCP, FIRST, outside, 0) == OTHER_INSIDE
    assert box.mappings(0) == [(UDP, INSIDE, outside), (TCP, OTHER_INSIDE, outside)]


def test_rfc_5382_req_5_an_established_connection_outlives_two_hours() -> None:
    box = nat(PORT_RESTRICTED)
    outside = box.outbound(TCP, INSIDE, FIRST, 0)
    assert outside is not None
    assert box.inbound(TCP, FIRST, outside, 2 * 3_600 * NS + 240 * NS) == INSIDE


# --- rebinding ---


def test_forgetting_ends_every_mapping() -> None:
    box = nat(NatBehaviour(ports="random"))
    first = out(box)
    box.forget()
    assert box.inbound(UDP, FIRST, first, 0) is None
    assert out(box) != first


def test_renumbering_changes_the_address() -> None:
    box = nat(PORT_RESTRICTED)
    out(box)
    box.renumber(["198.51.100.9"])
    assert out(box) == Address("198.51.100.9", INSIDE.port)
    assert box.inbound(UDP, FIRST, Address(PUBLIC, INSIDE.port), 0) is None


# --- the masquerade race ---

MASQUERADE = attrs.evolve(PORT_RESTRICTED, inbound_binding=True)


def test_the_masquerade_race_remaps_the_flow_to_that_peer_alone() -> None:
    box = nat(MASQUERADE)
    assert out(box, FIRST).port == INSIDE.port
    assert box.inbound(UDP, SECOND, Address(PUBLIC, INSIDE.port), 0) is None
    remapped = out(box, SECOND, NS)
    assert remapped.port != INSIDE.port
    assert out(box, FIRST, NS).port == INSIDE.port
    assert out(box, FIRST_OTHER_PORT, NS).port == INSIDE.port
    assert out(box, SECOND, 2 * NS) == remapped
    assert box.inbound(UDP, SECOND, remapped, 2 * NS) == INSIDE
    assert box.inbound(UDP, SECOND, Address(PUBLIC, INSIDE.port), 2 * NS) is None
    assert box.inbound(UDP, FIRST, remapped, 2 * NS) is None


def test_the_masquerade_race_is_run_before_there_is_any_mapping_too() -> None:
    box = nat(MASQUERADE)
    assert box.inbound(UDP, SECOND, Address(PUBLIC, INSIDE.port), 0) is None
    assert out(box, SECOND, NS).port != INSIDE.port
    assert out(box, FIRST, NS).port == INSIDE.port


@pytest.mark.parametrize("mapping", ["address_dependent", "address_and_port_dependent"])
def test_an_endpoint_dependent_mapping_begins_beside_the_entry(mapping: Behaviour) -> None:
    box = nat(attrs.evolve(MASQUERADE, mapping=mapping))
    box.inbound(UDP, SECOND, Address(PUBLIC, INSIDE.port), 0)
    remapped = out(box, SECOND, NS)
    assert remapped.port != INSIDE.port
    assert box.mappings(NS) == [(UDP, INSIDE, remapped)]
    assert out(box, FIRST, NS).port == INSIDE.port


def test_who_sends_first_wins_the_masquerade_race() -> None:
    box = nat(MASQUERADE)
    outside = out(box, SECOND)
    assert box.inbound(UDP, SECOND, outside, 0) == INSIDE
    assert out(box, SECOND, NS) == outside


def test_an_entry_of_the_masquerade_race_ages_and_is_refreshed_by_what_it_drops() -> None:
    def begins_at(now: int, refreshed: bool) -> int:
        box = nat(MASQUERADE)
        box.inbound(UDP, SECOND, Address(PUBLIC, INSIDE.port), 0)
        if refreshed:
            box.inbound(UDP, SECOND, Address(PUBLIC, INSIDE.port), 20 * NS)
        return out(box, SECOND, now).port

    assert begins_at(31 * NS, refreshed=False) == INSIDE.port
    assert begins_at(31 * NS, refreshed=True) != INSIDE.port
    assert begins_at(51 * NS, refreshed=True) == INSIDE.port


def test_strict_rfc_4787_has_no_masquerade_race() -> None:
    box = nat(PORT_RESTRICTED)
    box.inbound(UDP, SECOND, Address(PUBLIC, INSIDE.port), 0)
    assert out(box, SECOND, NS).port == INSIDE.port


def test_who_was_dropped_stays_out_at_that_port_whatever_the_filter_says() -> None:
    box = nat(attrs.evolve(MASQUERADE, filtering="address_dependent"))
    early = Address(PUBLIC, INSIDE.port)
    assert box.inbound(UDP, FIRST, early, 0) is None
    assert out(box, FIRST_OTHER_PORT, NS) == early
    assert box.inbound(UDP, FIRST, early, 2 * NS) is None
    assert box.refusal == "nat filter"
    assert box.inbound(UDP, FIRST_OTHER_PORT, early, 2 * NS) == INSIDE
    out(box, FIRST_OTHER_PORT, 25 * NS)
    assert box.inbound(UDP, FIRST, early, 33 * NS) == INSIDE


REPLYING = attrs.evolve(SYMMETRIC, filtering="endpoint_independent", reply_binding=True)


def test_with_reply_binding_an_answer_leaves_from_where_the_question_came_in() -> None:
    box = nat(REPLYING)
    known = out(box, FIRST)
    assert box.inbound(UDP, SECOND, known, 0) == INSIDE
    assert out(box, SECOND, NS) == known
    assert out(box, FIRST_OTHER_PORT, NS) != known
    assert out(box, FIRST, NS) == known
    plain = nat(attrs.evolve(REPLYING, reply_binding=False))
    known = out(plain, FIRST)
    assert plain.inbound(UDP, SECOND, known, 0) == INSIDE
    assert out(plain, SECOND, NS) != known


def test_a_reply_binding_lasts_while_packets_go_and_its_mapping_holds() -> None:
    box = nat(attrs.evolve(REPLYING, inbound_refresh=False))
    known = out(box, FIRST)
    box.inbound(UDP, SECOND, known, 0)
    for second in (20, 40, 60):
        assert out(box, SECOND, second * NS) == known
    assert out(box, SECOND, 91 * NS) != known
    other = out(box, FIRST, 91 * NS)
    box.inbound(UDP, SECOND, other, 91 * NS)
    box.forget()
    assert box.statistics().replies == 0
    assert out(box, SECOND, 92 * NS) != other


def test_reply_bindings_are_bounded() -> None:
    box = nat(attrs.evolve(REPLYING, max_mappings=100))
    known = out(box, FIRST)
    for port in range(1, 1_000):
        assert box.inbound(UDP, Address("203.0.113.7", port), known, 0) == INSIDE
    assert box.statistics().replies == 100
    out(box, FIRST, 30 * NS)
    box.inbound(UDP, SECOND, known, 31 * NS)
    assert box.statistics().replies == 1


def test_entries_of_dropped_packets_are_bounded() -> None:
    box = nat(attrs.evolve(MASQUERADE, max_mappings=100))
    for port in range(1, 1_000):
        box.inbound(UDP, Address("203.0.113.7", port), Address(PUBLIC, 5_000), 0)
    assert box.statistics().blocks == 100
    box.inbound(UDP, SECOND, Address(PUBLIC, 5_000), 31 * NS)
    assert box.statistics().blocks == 1


def test_the_peers_of_a_mapping_do_not_pile_up() -> None:
    box = nat(FULL_CONE)
    for n in range(20_000):
        out(box, Address(f"203.0.{n % 250}.{n // 250}", 9), now=n * NS)
    (mapping,) = box._by_outside.values()
    assert len(mapping.peers) < 600
