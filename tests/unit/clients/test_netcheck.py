"""Netcheck finds out what a NAT is, from what comes back through one that behaves as told."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.netcheck.core import (
    MAX_ENDPOINTS,
    MAX_PACKETS,
    SOCKETS,
    TRIES,
    Endpoint,
    Netcheck,
)
from relays.stun import (
    Attribute,
    MessageClass,
    Method,
    StunMessage,
    address_value,
    error_value,
    xor_address_value,
)
from runtime.net.address import Address
from runtime.randomness import SeededRandomness

from .nat_model import LOCALS, MS, PUBLIC, A, B, ModelNat, Outside, netcheck

FIRST, SECOND_PORT, SECOND = Address(A, 3478), Address(A, 3479), Address(B, 3478)
THIRD = Address("203.0.113.10", 3478)
OTHER = Address("203.0.113.3", 3479)
KINDS = ("endpoint_independent", "address_dependent", "address_and_port_dependent")
HOSTILE = Address("10.0.0.1", 22)


def alone() -> Netcheck:
    """A check that has one server, FIRST, and has asked it at the instant zero."""
    return Netcheck(
        [Endpoint("first", FIRST)], LOCALS, randomness=SeededRandomness(1, "core"), now=0
    )


@given(
    mapping=st.sampled_from(KINDS),
    filtering=st.sampled_from(KINDS),
    ports=st.sampled_from(("preserve", "sequential", "random", "range")),
    hairpinning=st.sampled_from(("none", "internal_source", "external_source")),
    seed=st.integers(0, 10_000),
)
def test_a_nat_is_found_out_as_what_it_is(
    mapping: str, filtering: str, ports: str, hairpinning: str, seed: int
) -> None:
    nat = ModelNat(
        mapping=mapping, filtering=filtering, ports=ports, hairpinning=hairpinning,
        chance=random.Random(seed),
    )  # fmt: skip
    outside = Outside(nat, other={SECOND: OTHER})
    core, found = netcheck(outside, FIRST, SECOND_PORT, SECOND, seed=seed)
    assert found.udp == "works"
    assert found.nat.present is True
    assert found.nat.mapping == mapping
    assert found.nat.filtering == filtering
    assert found.nat.ports == ports
    assert found.nat.public_hosts == (PUBLIC,)
    assert {one.round_trip_ns for one in found.servers} == {20 * MS}
    if mapping == "endpoint_independent" or filtering == "endpoint_independent":
        assert found.nat.hairpinning == hairpinning
    assert core.packets_sent <= MAX_PACKETS
    assert {each.host for each in outside.destinations} <= {A, B, PUBLIC}


def test_without_a_nat_the_own_address_is_seen_and_no_hairpin_is_tried() -> None:
    outside = Outside(None)
    _, found = netcheck(outside, FIRST, SECOND)
    assert found.nat.present is False
    assert found.nat.mapping == "endpoint_independent"
    assert found.nat.hairpinning == "not_measured"


def test_what_was_not_measured_is_said_with_the_reason() -> None:
    _, found = netcheck(Outside(ModelNat()), FIRST)
    assert (found.nat.mapping, found.nat.filtering) == ("not_measured", "not_measured")
    assert found.nat.hairpinning == "not_measured"
    assert [note.partition(":")[0] for note in found.notes] == [
        "mapping",
        "filtering",
        "hairpinning",
    ]


def test_two_relays_with_one_port_each_cannot_tell_on_what_a_mapping_depends() -> None:
    for mapping in KINDS[1:]:
        _, found = netcheck(Outside(ModelNat(mapping=mapping, ports="random")), FIRST, SECOND)
        assert found.nat.mapping == "endpoint_dependent"


@given(mapping=st.sampled_from(KINDS), filtering=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_one_server_with_two_addresses_tells_all(mapping: str, filtering: str, seed: int) -> None:
    ports = "preserve" if mapping == "endpoint_independent" else "random"
    nat = ModelNat(mapping=mapping, filtering=filtering, ports=ports, chance=random.Random(seed))
    outside = Outside(nat, other={FIRST: OTHER})
    core, found = netcheck(outside, FIRST, seed=seed)
    assert (found.nat.mapping, found.nat.filtering) == (mapping, filtering)
    assert [note.partition(":")[0] for note in found.notes] == ["hairpinning"]
    assert core.packets_sent <= MAX_PACKETS
    assert set(outside.destinations) == {FIRST, Address(OTHER.host, FIRST.port), OTHER}


def test_another_address_is_left_alone_where_the_named_ones_tell_all() -> None:
    for mapping in KINDS:
        outside = Outside(ModelNat(mapping=mapping, ports="random"), other={SECOND: OTHER})
        netcheck(outside, FIRST, SECOND_PORT, SECOND)
        assert OTHER not in outside.destinations


def test_another_address_that_is_silent_leaves_the_mapping_unmeasured() -> None:
    dead = frozenset({Address(OTHER.host, FIRST.port), OTHER})
    _, found = netcheck(Outside(ModelNat(), other={FIRST: OTHER}, dead=dead), FIRST)
    assert found.nat.mapping == "not_measured"
    assert found.udp == "works"
    assert any(note.startswith("mapping") for note in found.notes)


def test_a_server_that_is_silent_is_told_from_those_that_answer() -> None:
    _, found = netcheck(Outside(ModelNat(), dead=frozenset({SECOND})), FIRST, SECOND)
    assert found.udp == "partly"
    assert [one.reachable for one in found.servers] == [True, False]


def test_where_udp_is_blocked_nothing_more_than_the_tries_are_sent() -> None:
    servers = (FIRST, SECOND_PORT, SECOND)
    core, found = netcheck(Outside(ModelNat(), dead=frozenset(servers)), *servers)
    assert found.udp == "blocked"
    assert found.nat.present is None
    assert core.packets_sent == TRIES * len(servers)


@given(seed=st.integers(0, 1_000))
def test_losses_make_it_slower_and_never_say_more_than_is_so(seed: int) -> None:
    outside = Outside(ModelNat(), loss=0.2, chance=random.Random(seed))
    core, found = netcheck(outside, FIRST, SECOND, seed=seed)
    assert found.nat.mapping in ("endpoint_independent", "not_measured")
    assert found.nat.ports in ("preserve", "not_measured")
    assert core.packets_sent <= MAX_PACKETS


def test_the_most_servers_all_silent_or_all_there_stay_within_the_packets() -> None:
    servers = [Address(A, 3478 + number) for number in range(MAX_ENDPOINTS)]
    core, _ = netcheck(Outside(ModelNat(), dead=frozenset(servers)), *servers)
    assert core.packets_sent == TRIES * MAX_ENDPOINTS <= MAX_PACKETS
    core, _ = netcheck(Outside(ModelNat(), loss=0.7), *servers)
    assert core.packets_sent <= MAX_PACKETS
    with pytest.raises(ValueError, match="endpoints"):
        netcheck(Outside(None), *servers, SECOND)


def test_a_server_that_ignores_the_wish_for_another_address_says_nothing_of_filtering() -> None:
    def ignoring(server: Address, data: bytes) -> bytes:
        message = StunMessage.decode(data)
        values = (*message.attributes, (Attribute.OTHER_ADDRESS, address_value(OTHER)))
        return StunMessage(
            method=Method.BINDING,
            message_class=MessageClass.SUCCESS,
            transaction_id=message.transaction_id,
            attributes=values,
        ).encode()

    _, found = netcheck(Outside(ModelNat(), twist=ignoring), FIRST, SECOND)
    assert found.nat.filtering == "not_measured"


def test_an_error_of_a_server_shows_that_it_is_there() -> None:
    def refusing(server: Address, data: bytes) -> bytes:
        return StunMessage(
            method=Method.BINDING,
            message_class=MessageClass.ERROR,
            transaction_id=StunMessage.decode(data).transaction_id,
            attributes=((Attribute.ERROR_CODE, error_value(420)),),
        ).encode()

    _, found = netcheck(Outside(ModelNat(), twist=refusing), FIRST)
    assert found.udp == "works"
    assert [(one.error, one.mapped) for one in found.servers] == [(420, None)]


def test_a_server_that_changes_its_port_alone_is_not_taken_for_another_host() -> None:
    outside = Outside(
        ModelNat(filtering="address_dependent"), other={FIRST: OTHER}, poor=frozenset({FIRST})
    )
    _, found = netcheck(outside, FIRST, SECOND)
    assert found.nat.filtering == "address_dependent"


def test_a_round_trip_is_that_of_the_packet_that_was_answered() -> None:
    _, found = netcheck(Outside(ModelNat(), loses_first=2), FIRST)
    assert [one.round_trip_ns for one in found.servers] == [20 * MS]


def test_the_first_answer_counts_and_not_its_copy() -> None:
    core = alone()
    answer, _ = Outside(None)._serve(core.transmits[0][1], LOCALS[0], FIRST)
    core.receive(0, answer, FIRST, 5 * MS)
    core.receive(0, answer, FIRST, 900 * MS)
    assert core.finding().servers[0].round_trip_ns == 5 * MS


def test_servers_are_asked_one_after_the_other() -> None:
    core = Netcheck(
        [Endpoint(str(each), each) for each in (FIRST, SECOND)],
        LOCALS, randomness=SeededRandomness(1, "core"), now=0,
    )  # fmt: skip
    assert [to for _, _, to in core.transmits] == [FIRST]
    assert core.poll_timeout() == 20 * MS


def test_an_answer_is_waited_for_twice_as_long_each_time() -> None:
    core = alone()
    waited = []
    while (due := core.poll_timeout()) is not None:
        waited.append(due // MS)
        core.handle_timeout(due)
    assert waited == [250, 750, 1_750]


# --- whoever lies ---------------------------------------------------------------------------------


def claiming(mapped: Address, *liars: Address) -> Outside:
    def lie(server: Address, data: bytes) -> bytes:
        if server not in liars:
            return data
        message = StunMessage.decode(data)
        value = xor_address_value(mapped, message.transaction_id)
        return StunMessage(
            method=Method.BINDING,
            message_class=MessageClass.SUCCESS,
            transaction_id=message.transaction_id,
            attributes=(
                (Attribute.XOR_MAPPED_ADDRESS, value),
                (Attribute.OTHER_ADDRESS, address_value(mapped)),
            ),
        ).encode()

    return Outside(ModelNat(), twist=lie)


@pytest.mark.parametrize("liars", [(FIRST,), (SECOND,), (FIRST, SECOND_PORT)])
def test_one_that_lies_cannot_have_packets_sent_to_somebody_else(
    liars: tuple[Address, ...],
) -> None:
    outside = claiming(HOSTILE, *liars)
    netcheck(outside, FIRST, SECOND_PORT, SECOND)
    assert HOSTILE not in outside.destinations


@pytest.mark.parametrize(
    "place",
    [
        HOSTILE,
        Address("10.0.0.1", 4_000),
        Address("192.168.1.1", 4_000),
        Address("127.0.0.1", 4_000),
        Address("169.254.169.254", 4_000),
        Address("224.0.0.1", 4_000),
        Address("2001:db8::1", 4_000),
        Address("203.0.113.66", 53),
    ],
)
def test_a_server_has_a_few_packets_sent_to_one_public_place_and_no_others(place: Address) -> None:
    outside = Outside(ModelNat(), other={FIRST: place})
    netcheck(outside, FIRST)
    assert {each.host for each in outside.destinations} == {A}
    victim = Address("203.0.113.66", 4_000)
    outside = Outside(ModelNat(), other={FIRST: victim}, loss=0.9)
    netcheck(outside, FIRST)
    assert sum(each.host == victim.host for each in outside.destinations) <= 2 * TRIES


def test_a_server_in_a_private_network_may_have_its_other_address_there() -> None:
    server, other = Address("10.0.0.1", 3478), Address("10.0.0.2", 3479)
    _, found = netcheck(Outside(ModelNat(), other={server: other}), server)
    assert found.nat.mapping == "endpoint_independent"


def test_two_that_agree_on_a_lie_are_not_believed_while_a_third_says_otherwise() -> None:
    outside = claiming(HOSTILE, FIRST, SECOND)
    netcheck(outside, FIRST, SECOND, THIRD)
    assert HOSTILE not in outside.destinations


def test_an_echo_is_no_hairpin() -> None:
    outside = claiming(HOSTILE, FIRST, SECOND)
    outside.echoes = frozenset({HOSTILE})
    _, found = netcheck(outside, FIRST, SECOND)
    assert HOSTILE in outside.destinations
    assert found.nat.hairpinning == "none"


def test_not_even_all_together_have_packets_sent_to_this_machine_or_a_group() -> None:
    for host in ("127.0.0.1", "169.254.169.254", "224.0.0.1", "0.0.0.0", "255.255.255.255"):
        outside = claiming(Address(host, 4_000), FIRST, SECOND)
        netcheck(outside, FIRST, SECOND)
        assert {each.host for each in outside.destinations} == {A, B}


def test_all_together_get_a_few_small_packets_to_one_place_and_no_more() -> None:
    outside = claiming(HOSTILE, FIRST, SECOND)
    netcheck(outside, FIRST, SECOND)
    assert Counter(outside.destinations)[HOSTILE] <= 2 * TRIES


@given(
    st.lists(
        st.tuples(
            st.integers(0, SOCKETS - 1), st.binary(max_size=100), st.sampled_from((FIRST, HOSTILE))
        )
    )
)
def test_a_stranger_changes_nothing(datagrams: list[tuple[int, bytes, Address]]) -> None:
    core = alone()
    (request,) = core.transmits
    before = core.finding()
    for socket, data, source in datagrams:
        core.receive(socket, data, source, 1)
    # Nor does he with the right answer from the wrong place, or at the wrong socket.
    answer, _ = Outside(None)._serve(request[1], LOCALS[0], FIRST)
    core.receive(0, answer, HOSTILE, 2)
    core.receive(1, answer, FIRST, 2)
    assert core.finding() == before
    core.receive(0, answer, FIRST, 3)
    assert core.finding().udp == "works"


def test_no_more_than_so_many_datagrams_are_looked_at() -> None:
    core = alone()
    answer, _ = Outside(None)._serve(core.transmits[0][1], LOCALS[0], FIRST)
    for _ in range(512):
        core.receive(0, b"noise", HOSTILE, 1)
    core.receive(0, answer, FIRST, 2)
    assert core.finding().udp == "blocked"
