"""The ICE agent alone: who gets an answer, what is learnt, and the limits."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channel.messages import Candidate, Candidates, IceCredentials, IpText
from relays.stun import Attribute, MessageClass, Method, StunMessage
from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from tests.unit.tunnel.network import ice
from tunnel.ice.agent import (
    CHECK_INTERVAL_NS,
    FIRST_PATIENCE_NS,
    Doubted,
    GaveUp,
    IceAgent,
    Lost,
    Outgoing,
    Selected,
    Silent,
)
from tunnel.ice.candidates import Base, Kind, network_of, priority_of
from tunnel.ice.checklist import MAX_PAIRS, MAX_REMOTES
from tunnel.ice.checks import CheckMessages, Role
from tunnel.ice.pair import (
    PROBE_OTHERS_AFTER_NS,
    TRANSITIONS,
    TWICE_RELAYED_AFTER_NS,
    VERDICT_AFTER_NS,
    Happening,
    PairState,
    diagram,
)

CONNECTION = UUID(int=1)
HERE, THERE = ice("here"), ice("there")
SOCKET = Address("192.0.2.7", 41_000)
PEER = Address("203.0.113.9", 5_000)
BASE = Base(
    address=SOCKET,
    socket=SOCKET,
    priority=priority_of("host", 65_535),
    network=network_of("192.0.2.0/24"),
)


def agent(controlling: bool = True, bases: int = 1) -> IceAgent:
    made = IceAgent(
        local=HERE,
        remote=THERE,
        controlling=controlling,
        randomness=SeededRandomness(1, "agent"),
        transaction_prefix=b"pfix",
        now=0,
    )
    made.set_bases([base(number) for number in range(bases)], 0)
    return made


def base(number: int) -> Base:
    address = Address("192.0.2.7", 41_000 + number)
    return Base(
        address=address,
        socket=address,
        priority=priority_of("host", 65_535 - number),
        network=BASE.network,
    )


def candidate(address: Address, kind: Kind = "host", priority: int | None = None) -> Candidate:
    return Candidate(
        kind=kind,
        address=IpText(address.host),
        port=address.port,
        priority=priority or priority_of(kind, 65_535),
        foundation="1",
    )


def trickle(made: IceAgent, *addresses: Address, generation: int = 0, now: int = 0) -> None:
    message = Candidates(
        connection_id=CONNECTION,
        generation=generation,
        add=tuple(candidate(address) for address in addresses),
    )
    made.add_candidates(message, now)


def their_check(
    *,
    local: IceCredentials = THERE,
    remote: IceCredentials = HERE,
    role: Role = "controlled",
    tie_breaker: int = 5,
    nominates: bool = False,
    kind: Kind = "prflx",
) -> StunMessage:
    data = CheckMessages(local, remote).request(
        b"t" * 12,
        priority=priority_of(kind, 77),
        role=role,
        tie_breaker=tie_breaker,
        nominates=nominates,
    )
    return StunMessage.decode(data)


def answer_to(check: Outgoing, made: IceAgent, now: int) -> None:
    """The peer answers a check that reached it."""
    request = CheckMessages(THERE, HERE).judge_request(StunMessage.decode(check.data))
    assert request is not None
    data = CheckMessages(THERE, HERE).success(request.transaction_id, check.base.address)
    made.receive_response(StunMessage.decode(data), check.base, check.remote, now)


def run(made: IceAgent, until: int) -> list[tuple[int, Outgoing]]:
    """Everything the agent sends up to an instant, with the time."""
    sent = []
    while (at := made.poll_timeout()) is not None and at <= until:
        made.handle_timeout(at)
        sent += [(at, check) for check in made.drain_checks()]
    return sent


def run_answering(made: IceAgent, until: int) -> None:
    """As `run`, with a peer that answers every check at once."""
    while (at := made.poll_timeout()) is not None and at <= until:
        made.handle_timeout(at)
        for check in made.drain_checks():
            answer_to(check, made, at)


def test_a_check_carries_what_the_rfc_asks_for() -> None:
    made = agent()
    trickle(made, PEER)
    (_, check), *_ = run(made, 0)
    message = StunMessage.decode(check.data)
    assert (check.base.address, check.remote) == (SOCKET, PEER)
    assert message.method == Method.BINDING
    assert message.message_class is MessageClass.REQUEST
    assert message.text(Attribute.USERNAME) == f"{THERE.fragment}:{HERE.fragment}"
    assert message.integer(Attribute.PRIORITY, 4) == 110 << 24 | 65_535 << 8 | 255
    assert message.integer(Attribute.ICE_CONTROLLING, 8) is not None
    assert message.has_fingerprint
    assert message.verify(THERE.password.encode())
    assert message.transaction_id.startswith(b"pfix")
    assert Attribute.USE_CANDIDATE not in message


def test_an_answer_makes_the_path_and_the_choice_is_told_to_the_peer() -> None:
    made = agent()
    trickle(made, PEER)
    (_, check), *_ = run(made, 0)
    answer_to(check, made, 30 * NS_PER_MS)
    (event,) = made.drain_events()
    assert isinstance(event, Selected)
    assert event.path.rtt_ns == 30 * NS_PER_MS
    assert event.path.remote == PEER
    nomination = run(made, 100 * NS_PER_MS)[0][1]
    assert Attribute.USE_CANDIDATE in StunMessage.decode(nomination.data)


@pytest.mark.parametrize(
    "message",
    [
        their_check(remote=ice("other")),
        their_check(local=ice("other")),
        their_check(remote=IceCredentials(fragment=HERE.fragment, password="w" * 32)),
        StunMessage(
            method=Method.BINDING, message_class=MessageClass.REQUEST, transaction_id=b"t" * 12
        ),
    ],
)
def test_a_stranger_gets_silence(message: StunMessage) -> None:
    made = agent()
    made.receive_request(message, BASE, PEER, 0)
    assert made.drain_checks() == []
    assert made.statistics().refused == 1
    assert made.statistics().remotes == 0


@pytest.mark.parametrize(
    "source",
    [
        Address("203.0.113.9", 53),
        Address("127.0.0.1", 5_000),
        Address("100.64.0.9", 5_000),
        Address("10.0.0.1", 5_000),
    ],
)
def test_a_check_from_an_address_that_candidates_may_not_have_gets_silence(
    source: Address,
) -> None:
    made = agent()
    made.receive_request(their_check(), BASE, source, 0)
    assert made.drain_checks() == []
    assert made.statistics().remotes == 0


def test_a_check_from_an_unknown_address_is_answered_and_answered_with_a_check() -> None:
    made = agent()
    made.receive_request(their_check(), BASE, PEER, 0)
    (answer,) = made.drain_checks()
    response = StunMessage.decode(answer.data)
    assert response.message_class is MessageClass.SUCCESS
    assert response.xor_address(Attribute.XOR_MAPPED_ADDRESS) == PEER
    assert response.verify(HERE.password.encode())
    (_, triggered), *_ = run(made, 0)
    assert triggered.remote == PEER
    answer_to(triggered, made, NS_PER_MS)
    assert made.selected is not None
    assert made.selected.remote.kind == "prflx"


def test_a_check_that_came_by_a_relay_makes_no_direct_path() -> None:
    """Its source is not the address that was signalled where a NAT of ours changed the port."""
    made = agent()
    made.receive_request(their_check(kind="relay"), BASE, PEER, 0)
    made.drain_checks()
    (_, triggered), *_ = run(made, 0)
    answer_to(triggered, made, NS_PER_MS)
    path = made.path()
    assert path is not None
    assert path.kind == "relayed"


def test_a_candidate_that_was_first_met_as_reflexive_takes_its_signalled_kind() -> None:
    made = agent()
    made.receive_request(their_check(), BASE, PEER, 0)
    made.drain_checks()
    message = Candidates(
        connection_id=CONNECTION, generation=0, add=(candidate(PEER, "relay", 1234),)
    )
    made.add_candidates(message, 0)
    (_, check), *_ = run(made, 0)
    answer_to(check, made, 1)
    path = made.path()
    assert path is not None
    assert path.kind == "relayed"
    assert path.relay == PEER


def relayed_base() -> Base:
    return Base(
        address=Address("198.51.100.5", 50_000),
        socket=SOCKET,
        server=Address("198.51.100.5", 3_478),
        priority=priority_of("relay", 65_535),
    )


def with_relays_at_both_ends() -> IceAgent:
    """A socket and a relayed address here, and there."""
    made = agent()
    made.set_bases([BASE, relayed_base()], 0)
    far_relay = candidate(Address("198.51.100.6", 50_001), "relay")
    message = Candidates(
        connection_id=CONNECTION, generation=0, add=(candidate(PEER, "srflx"), far_relay)
    )
    made.add_candidates(message, 0)
    return made


def test_two_relays_in_a_row_are_not_tried_where_another_pair_works() -> None:
    made = with_relays_at_both_ends()
    tried = set()
    while (at := made.poll_timeout()) is not None and at <= 60 * NS_PER_S:
        made.handle_timeout(at)
        for check in made.drain_checks():
            tried.add((check.base.kind, check.remote == PEER))
            answer_to(check, made, at)
    assert tried == {("host", True), ("host", False), ("relay", True)}


def test_two_relays_in_a_row_are_tried_soon_where_nothing_else_works() -> None:
    made = with_relays_at_both_ends()
    found = None
    while found is None and (at := made.poll_timeout()) is not None and at <= NS_PER_S:
        made.handle_timeout(at)
        for check in made.drain_checks():
            if check.base.server is not None and check.remote != PEER:
                answer_to(check, made, at)
                found = at
    assert found is not None
    assert found <= TWICE_RELAYED_AFTER_NS + NS_PER_S // 10
    path = made.path()
    assert path is not None
    assert path.kind == "relayed"


def test_an_answer_from_elsewhere_or_with_a_wrong_password_counts_for_nothing() -> None:
    made = agent()
    trickle(made, PEER)
    (_, check), *_ = run(made, 0)
    transaction_id = StunMessage.decode(check.data).transaction_id
    data = CheckMessages(THERE, HERE).success(transaction_id, SOCKET)
    made.receive_response(StunMessage.decode(data), BASE, Address("203.0.113.66", 5_000), 1)
    forged = CheckMessages(ice("other"), HERE).success(transaction_id, SOCKET)
    made.receive_response(StunMessage.decode(forged), BASE, PEER, 1)
    assert made.selected is None
    answer_to(check, made, 2)
    assert made.selected is not None, "and does not use up the transaction"


def test_checks_are_paced_and_start_faster_than_the_rfc() -> None:
    made = agent(bases=2)
    trickle(made, *(Address("203.0.113.9", 5_000 + n) for n in range(10)))
    sent = run(made, 2 * NS_PER_S)
    times = [at for at, _ in sent]
    assert all(b - a >= CHECK_INTERVAL_NS for a, b in pairwise(times))
    first_round = {(check.base.address, check.remote) for _, check in sent[:20]}
    assert len(first_round) == 20, "every pair has its turn before one is repeated"


def test_a_lone_pair_is_repeated_after_a_tenth_of_a_second() -> None:
    made = agent()
    trickle(made, PEER)
    times = [at // NS_PER_MS for at, _ in run(made, NS_PER_S)]
    assert times == [0, 100, 200, 400, 600, 1000]


def test_the_most_candidates_and_pairs_are_kept_to() -> None:
    made = agent(bases=8)
    for start in range(0, 96, 32):
        trickle(made, *(Address("203.0.113.9", 5_000 + start + n) for n in range(32)))
    statistics = made.statistics()
    assert statistics.remotes == MAX_REMOTES
    assert statistics.pairs == MAX_PAIRS
    for port in range(6_000, 6_100):
        made.receive_request(their_check(), BASE, Address("203.0.113.9", port), 0)
    assert made.statistics().remotes == MAX_REMOTES


def test_an_older_generation_is_dropped_and_a_newer_one_replaces_what_does_not_work() -> None:
    made = agent()
    other, third = Address("203.0.113.9", 5_001), Address("203.0.113.9", 5_002)
    trickle(made, PEER, other, generation=4)
    check = next(check for _, check in run(made, 0) if check.remote == PEER)
    answer_to(check, made, 1)
    trickle(made, third, generation=3)
    assert made.remote_addresses == [PEER, other]
    assert made.statistics().stale_generations == 1
    trickle(made, third, generation=5)
    assert made.remote_addresses == [PEER, third], "what works is kept while it works"


def test_a_candidate_may_be_removed() -> None:
    made = agent()
    trickle(made, PEER)
    message = Candidates(connection_id=CONNECTION, generation=0, remove=(candidate(PEER),))
    made.add_candidates(message, 0)
    assert made.remote_addresses == []
    assert run(made, FIRST_PATIENCE_NS - 1) == []


def test_a_base_that_goes_takes_its_path_with_it() -> None:
    made = agent()
    trickle(made, PEER)
    (_, check), *_ = run(made, 0)
    answer_to(check, made, 1)
    made.drain_events()
    made.set_bases([base(1)], 2)
    assert made.path() is None
    assert {check.base.address for _, check in run(made, NS_PER_S)} == {base(1).address}
    assert made.drain_events() == [], "we roam: that is not the peer's fault"
    run(made, 2 * NS_PER_S)
    assert made.drain_events() == [Lost()]


def test_a_base_that_comes_in_time_spares_the_report_of_a_loss() -> None:
    made = agent()
    trickle(made, PEER)
    (_, check), *_ = run(made, 0)
    answer_to(check, made, 1)
    made.drain_events()
    made.set_bases([], 2)
    made.set_bases([base(1)], NS_PER_S)
    (_, check), *_ = run(made, NS_PER_S)
    answer_to(check, made, NS_PER_S + 1)
    run_answering(made, 5 * NS_PER_S)
    assert [type(event) for event in made.drain_events()] == [Selected]


def test_an_agent_that_finds_nothing_gives_up_and_a_check_of_the_peer_wakes_it() -> None:
    made = agent()
    trickle(made, PEER)
    run(made, FIRST_PATIENCE_NS)
    assert made.drain_events() == [GaveUp()]
    assert made.poll_timeout() is None
    made.receive_request(their_check(), BASE, PEER, FIRST_PATIENCE_NS + 1)
    made.drain_checks()
    (_, check), *_ = run(made, FIRST_PATIENCE_NS + 1)
    answer_to(check, made, FIRST_PATIENCE_NS + 2)
    assert made.path() is not None


def test_the_controlled_side_follows_a_nomination_among_equals() -> None:
    made = agent(controlling=False)
    other = Address("203.0.113.9", 5_001)
    message = Candidates(
        connection_id=CONNECTION,
        generation=0,
        add=(candidate(PEER, priority=2_000), candidate(other, priority=1_000)),
    )
    made.add_candidates(message, 0)
    for _, check in run(made, CHECK_INTERVAL_NS):
        answer_to(check, made, CHECK_INTERVAL_NS)
    assert made.selected is not None
    assert made.selected.remote.address == PEER
    made.receive_request(their_check(role="controlling", nominates=True), BASE, other, 10**9)
    assert made.selected.remote.address == other


@pytest.mark.parametrize(
    ("controlling", "tie_breaker", "expected_role", "error"),
    [
        (True, 0, "controlling", True),
        (True, 2**64 - 1, "controlled", False),
        (False, 2**64 - 1, "controlled", True),
        (False, 0, "controlling", False),
    ],
)
def test_two_ends_of_one_role_settle_it_by_their_tie_breakers(
    controlling: bool, tie_breaker: int, expected_role: str, error: bool
) -> None:
    made = agent(controlling=controlling)
    check = their_check(role=made.role, tie_breaker=tie_breaker)
    made.receive_request(check, BASE, PEER, 0)
    (answer,) = made.drain_checks()
    response = StunMessage.decode(answer.data)
    assert made.role == expected_role
    assert response.error() == ((487, "") if error else None)


def test_a_487_answer_switches_the_role_once() -> None:
    made = agent()
    trickle(made, PEER)
    checks = [check for _, check in run(made, 150 * NS_PER_MS)]
    assert len(checks) == 2
    for check in checks:
        transaction_id = StunMessage.decode(check.data).transaction_id
        data = CheckMessages(THERE, HERE).error(transaction_id, 487)
        made.receive_response(StunMessage.decode(data), BASE, PEER, 160 * NS_PER_MS)
    assert made.role == "controlled"


def test_an_attribute_that_must_be_understood_and_is_not_is_named() -> None:
    request = StunMessage(
        method=Method.BINDING,
        message_class=MessageClass.REQUEST,
        transaction_id=b"t" * 12,
        attributes=(
            (Attribute.USERNAME, f"{HERE.fragment}:{THERE.fragment}".encode()),
            (Attribute.PRIORITY, (5).to_bytes(4, "big")),
            (0x7ABC, b"what?"),
        ),
    )
    message = StunMessage.decode(request.encode(key=HERE.password.encode()))
    made = agent()
    made.receive_request(message, BASE, PEER, 0)
    (answer,) = made.drain_checks()
    response = StunMessage.decode(answer.data)
    assert response.error() == (420, "")
    assert response.value(Attribute.UNKNOWN_ATTRIBUTES) == b"\x7a\xbc"


def test_a_path_without_data_is_doubted_too_when_a_check_stays_unanswered() -> None:
    made = agent()
    trickle(made, PEER)
    (_, check), *_ = run(made, 0)
    answer_to(check, made, 0)
    made.drain_events()
    run(made, 1_300 * NS_PER_MS)
    assert made.path() is not None
    assert made.drain_events() == [Doubted(), Silent()]
    run(made, 1_500 * NS_PER_MS)
    assert made.path() is None


def test_an_answer_that_once_came_very_late_keeps_no_dead_path() -> None:
    made = agent()
    trickle(made, PEER)
    (_, check), *_ = run(made, 0)
    answer_to(check, made, 3 * NS_PER_S)
    assert made.path() is not None
    run(made, 6 * NS_PER_S)
    assert made.path() is None


def test_a_path_that_carries_data_is_checked_within_a_second() -> None:
    made = agent(controlling=False)
    trickle(made, PEER)
    (_, check), *_ = run(made, 0)
    answer_to(check, made, 0)
    made.sent(NS_PER_S, expects_answer=False)
    ((at, check), *_) = run(made, 2 * NS_PER_S)
    assert at == 2 * NS_PER_S
    assert check.remote == PEER


def with_a_path_and_another_pair() -> tuple[IceAgent, Address]:
    """Both answered, the bursts of the beginning are over, and data went out at 2 s."""
    made = agent()
    other = Address("203.0.113.9", 5_001)
    trickle(made, PEER, other)
    run_answering(made, 2 * NS_PER_S)
    assert made.statistics().usable_pairs == 2
    made.drain_events()
    made.sent(2 * NS_PER_S, expects_answer=True)
    return made, other


def test_the_last_packet_of_a_conversation_costs_one_check_where_the_path_answers() -> None:
    made, _ = with_a_path_and_another_pair()
    assert made.selected is not None
    remote = made.selected.remote.address
    sent = run(made, 2_500 * NS_PER_MS)
    assert [(at // NS_PER_MS, check.remote) for at, check in sent] == [(2_500, remote)]
    answer_to(sent[0][1], made, 2_540 * NS_PER_MS)
    assert run(made, 3_200 * NS_PER_MS) == []
    assert made.drain_events() == [Doubted()]


def test_other_pairs_are_probed_a_tenth_of_a_second_after_the_path_and_judged_with_it() -> None:
    made, other = with_a_path_and_another_pair()
    assert made.selected is not None
    assert made.selected.remote.address == PEER
    began = 2_500 * NS_PER_MS
    first = [at for at, check in run(made, began + 200 * NS_PER_MS) if check.remote == other]
    assert first[0] == pytest.approx(began + PROBE_OTHERS_AFTER_NS, abs=CHECK_INTERVAL_NS)
    run(made, began + VERDICT_AFTER_NS - 1)
    assert made.path() is not None
    run(made, began + VERDICT_AFTER_NS)
    assert made.path() is None, "both were silent for as long"


def test_one_lost_check_costs_no_path() -> None:
    made = agent()
    trickle(made, PEER)
    (_, check), *_ = run(made, 0)
    answer_to(check, made, 0)
    lost, *_ = run(made, 100 * NS_PER_MS)
    assert lost[1].remote == PEER
    run_answering(made, 5 * NS_PER_S)
    assert made.path() is not None
    assert Lost() not in made.drain_events()


def test_consent_ends_thirty_seconds_after_the_last_answer() -> None:
    made = agent()
    trickle(made, PEER)
    (_, check), *_ = run(made, 0)
    answer_to(check, made, 0)
    assert made.selected is not None
    assert made.selected.expires_at == 30 * NS_PER_S


def test_data_that_is_answered_raises_no_suspicion() -> None:
    made = agent()
    trickle(made, PEER)
    (_, check), *_ = run(made, 0)
    answer_to(check, made, 0)
    for _, nomination in run(made, CHECK_INTERVAL_NS):
        answer_to(nomination, made, CHECK_INTERVAL_NS)
    made.sent(CHECK_INTERVAL_NS, expects_answer=True)
    made.heard(SOCKET, PEER)
    made.sent(2 * CHECK_INTERVAL_NS, expects_answer=False)
    made.drain_events()
    run_answering(made, 3 * NS_PER_S)
    assert made.drain_events() == []
    made.sent(3 * NS_PER_S, expects_answer=True)
    run(made, 3_500 * NS_PER_MS)
    assert made.drain_events() == [Doubted()]
    run(made, 4_500 * NS_PER_MS)
    assert made.path() is None


def test_every_state_of_a_pair_can_be_left_and_reached() -> None:
    assert {state for state, _ in TRANSITIONS} == set(PairState)
    assert set(TRANSITIONS.values()) == set(PairState)
    assert {happening for _, happening in TRANSITIONS} == set(Happening)


def test_the_diagram_of_a_pair_is_drawn_from_its_table() -> None:
    text = (Path(__file__).parents[4] / "docs" / "connectivity.md").read_text()
    assert f"```mermaid\n{diagram()}\n```" in text


ADDRESSES = st.sampled_from(
    [Address("203.0.113.9", 5_000 + n) for n in range(3)] + [Address("127.0.0.1", 5_000)]
)
STEPS = st.one_of(
    st.tuples(st.just("trickle"), ADDRESSES, st.integers(0, 3)),
    st.tuples(st.just("remove"), ADDRESSES, st.integers(0, 3)),
    st.tuples(st.just("check"), ADDRESSES, st.integers(0, 1)),
    st.tuples(st.just("bases"), ADDRESSES, st.integers(0, 3)),
    st.tuples(st.just("wait"), ADDRESSES, st.integers(0, 40_000)),
    st.tuples(st.just("answer"), ADDRESSES, st.integers(0, 5)),
    st.tuples(st.just("data"), ADDRESSES, st.integers(0, 1)),
    st.tuples(st.just("suspect"), ADDRESSES, st.integers(0, 1)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=40), st.booleans())
def test_whatever_happens_the_agent_keeps_its_word(
    steps: list[tuple[str, Address, int]], controlling: bool
) -> None:
    """Selected, Lost and GaveUp come in an order that makes sense, the path is always the last
    one reported, no check leaves too soon after another, and time always comes to rest."""
    made = agent(controlling=controlling)
    now = 0
    outgoing: list[Outgoing] = []
    has_path = roaming = False
    for kind, address, number in steps:
        if kind == "trickle":
            trickle(made, address, generation=number, now=now)
        elif kind == "remove":
            message = Candidates(
                connection_id=CONNECTION, generation=number, remove=(candidate(address),)
            )
            made.add_candidates(message, now)
        elif kind == "check":
            made.receive_request(their_check(nominates=bool(number)), BASE, address, now)
        elif kind == "bases":
            made.set_bases([base(n) for n in range(number)], now)
            roaming = True
        elif kind == "wait":
            end = now + number * NS_PER_MS
            sent = run(made, end)
            assert len(sent) <= (end - now) // CHECK_INTERVAL_NS + 1
            outgoing = [check for _, check in sent] or outgoing
            now = end
        elif kind == "answer" and outgoing:
            answer_to(outgoing[number % len(outgoing)], made, now)
        elif kind == "data":
            made.sent(now, expects_answer=bool(number))
            made.heard(SOCKET, address)
        elif kind == "suspect":
            made.suspect(now)
        assert all(response.remote.host != "127.0.0.1" for response in made.drain_checks())
        for event in made.drain_events():
            assert not isinstance(event, Lost) or has_path
            assert not isinstance(event, GaveUp) or not has_path
            has_path = isinstance(event, Selected) or (
                has_path and not isinstance(event, Lost | GaveUp)
            )
        if made.path() is not None:
            assert has_path
        elif kind != "bases":
            roaming = roaming and has_path
            assert roaming or not has_path
