"""Gathering alone: which sockets ask which relays, what the answers change, and when it rests."""

from __future__ import annotations

import pytest

from relays.stun import Attribute, MessageClass, Method, StunMessage, xor_address_value
from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from tests.unit.tunnel.network import RELAY, relay_server
from tunnel.datagrams import Transmit
from tunnel.ice.candidates import address_of, network_of
from tunnel.ice.gathering import BINDING_INTERVALS_NS, MAX_SOCKETS, Gatherer

FIRST = Address("192.168.1.7", 41_000)
SECOND = Address("192.168.2.7", 41_000)
SIXTH = Address("2001:db8::7", 41_000)
OUTSIDE = Address("203.0.113.7", 41_000)


def gatherer(*sockets: Address) -> Gatherer:
    made = Gatherer(randomness=SeededRandomness(1, "gatherer"))
    for socket in sockets:
        made.add_socket(socket, network_of(f"{socket.host}/24"), 0)
    made.set_relays([relay_server()], 0)
    return made


def methods(transmits: list[Transmit]) -> list[tuple[Address, int]]:
    return [(t.local, StunMessage.decode(t.data).method) for t in transmits]


def answer(made: Gatherer, transmit: Transmit, mapped: Address, now: int = 0) -> bool:
    transaction_id = StunMessage.decode(transmit.data).transaction_id
    data = StunMessage(
        method=Method.BINDING,
        message_class=MessageClass.SUCCESS,
        transaction_id=transaction_id,
        attributes=((Attribute.XOR_MAPPED_ADDRESS, xor_address_value(mapped, transaction_id)),),
    ).encode()
    return made.receive(transmit.local, data, transmit.remote, now)


def addresses(made: Gatherer) -> dict[str, Address]:
    return {candidate.kind: address_of(candidate) for candidate in made.candidates()}


def test_nothing_is_sent_before_the_first_connection() -> None:
    made = gatherer(FIRST)
    assert made.drain_transmits() == []
    assert made.poll_timeout() is None
    assert addresses(made) == {"host": FIRST}


def test_every_socket_asks_every_relay_of_its_family() -> None:
    made = gatherer(FIRST, SECOND, SIXTH)
    made.start(0)
    assert methods(made.drain_transmits()) == [(FIRST, Method.BINDING), (SECOND, Method.BINDING)]


def test_an_answer_tells_the_reflexive_candidate_and_begins_the_allocation_from_there() -> None:
    made = gatherer(FIRST, SECOND)
    made.start(0)
    made.allocate(0)
    _, from_second = made.drain_transmits()
    assert answer(made, from_second, OUTSIDE)
    assert methods(made.drain_transmits()) == [(SECOND, Method.ALLOCATE)]
    assert addresses(made)["srflx"] == OUTSIDE
    assert made.generation == 0, "what is new is trickled"


def test_an_allocation_is_made_when_one_is_wanted_and_not_before() -> None:
    made = gatherer(FIRST)
    made.start(0)
    assert answer(made, made.drain_transmits()[0], OUTSIDE)
    assert made.drain_transmits() == []
    made.allocate(NS_PER_S)
    assert methods(made.drain_transmits()) == [(FIRST, Method.ALLOCATE)]


def test_without_a_nat_there_is_no_reflexive_candidate() -> None:
    public = Address("192.0.2.7", 41_000)
    made = gatherer(public)
    made.start(0)
    assert answer(made, made.drain_transmits()[0], public)
    assert addresses(made) == {"host": public}


def test_another_reflexive_address_begins_a_new_generation() -> None:
    made = gatherer(FIRST)
    made.start(0)
    answer(made, made.drain_transmits()[0], OUTSIDE)
    made.drain_transmits()
    made.suspect(NS_PER_S)
    again = next(t for t in made.drain_transmits() if _is_binding(t))
    answer(made, again, Address("203.0.113.8", 9_999), NS_PER_S)
    assert made.generation == 1
    assert addresses(made)["srflx"] == Address("203.0.113.8", 9_999)


def test_an_answer_that_was_not_asked_for_changes_nothing() -> None:
    made = gatherer(FIRST)
    made.start(0)
    (request,) = made.drain_transmits()
    other = gatherer(FIRST)
    other.start(0)
    forged = other.drain_transmits()[0]._replace(remote=Address("203.0.113.66", 3478))
    assert not answer(made, forged, OUTSIDE)
    assert answer(made, request, OUTSIDE)
    assert not answer(made, request, Address("203.0.113.66", 1_111)), "it was used up"
    assert addresses(made)["srflx"] == OUTSIDE


def test_a_relay_that_is_silent_is_asked_again_and_then_now_and_then() -> None:
    made = gatherer(FIRST)
    made.start(0)
    made.drain_transmits()
    times: list[int] = []
    while len(times) < len(BINDING_INTERVALS_NS) + 2:
        at = made.poll_timeout()
        assert at is not None
        made.handle_timeout(at)
        times += [at // NS_PER_MS] * len(made.drain_transmits())
    assert times == [100, 300, 700, 1500, 3100, 6300, 16_300, 26_300]


def test_with_the_last_connection_gathering_rests_and_starts_afresh() -> None:
    made = gatherer(FIRST)
    made.start(0)
    answer(made, made.drain_transmits()[0], OUTSIDE)
    made.rest(NS_PER_S)
    made.drain_transmits()
    assert made.poll_timeout() is None
    made.start(2 * NS_PER_S)
    assert methods(made.drain_transmits()) == [(FIRST, Method.BINDING)]


def test_a_socket_that_goes_takes_its_candidates_with_it() -> None:
    made = gatherer(FIRST, SECOND)
    made.start(0)
    answer(made, made.drain_transmits()[0], OUTSIDE)
    made.remove_socket(FIRST, NS_PER_S)
    assert addresses(made) == {"host": SECOND}
    assert made.generation == 1


def test_the_number_of_sockets_is_bounded() -> None:
    made = gatherer(*(Address("192.0.2.7", 10_000 + n) for n in range(MAX_SOCKETS)))
    with pytest.raises(ValueError, match="sockets"):
        made.add_socket(FIRST, None, 0)


def test_a_relay_answers_the_address_that_was_asked_only() -> None:
    made = gatherer(FIRST)
    made.start(0)
    (request,) = made.drain_transmits()
    assert request.remote == RELAY
    assert not made.receive(SECOND, request.data, RELAY, 0)
    assert not made.receive(FIRST, b"", RELAY, 0)


def _is_binding(transmit: Transmit) -> bool:
    return StunMessage.decode(transmit.data).method == Method.BINDING
