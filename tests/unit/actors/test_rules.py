"""Rules that wait for nothing: choice of gateways, tunnel addresses, rate limits, the ledger."""

from __future__ import annotations

from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from uuid import UUID

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.choice import Choosable, choose_gateway
from actors.enrolment import (
    RESOLVER_RANGE,
    RangeExhausted,
    allocate,
    refusal,
)
from actors.ledger import LAST_CALL_NS, Ledger, new_ice
from actors.model import Account, Authorization
from actors.services import Bucket
from channel.messages import IpText
from runtime.randomness import SeededRandomness

from .world import START, S

ACCOUNT = Account(id=UUID(int=1), name="a", slug="a", created_at=START)
IDS = [UUID(int=number) for number in range(1, 7)]


def randomness(seed: int = 1) -> SeededRandomness:
    return SeededRandomness(seed, "rules")


@given(
    st.lists(
        st.builds(
            Choosable,
            gateway_id=st.sampled_from(IDS),
            load=st.integers(0, 3),
            suspect=st.booleans(),
            near=st.booleans(),
        ),
        unique_by=lambda each: each.gateway_id,
    ),
    st.sets(st.sampled_from(IDS)),
    st.sets(st.sampled_from(IDS)),
    st.integers(0, 100),
)
def test_nobody_better_is_passed_over(
    gateways: list[Choosable], connected: set[UUID], failed: set[UUID], seed: int
) -> None:
    def rank(each: Choosable) -> tuple[bool, bool, bool, int]:
        bad = each.gateway_id in failed or each.suspect
        return bad, each.gateway_id not in connected, not each.near, each.load

    chosen = choose_gateway(
        gateways, connected=connected, failed=failed, randomness=randomness(seed)
    )
    if not gateways:
        assert chosen is None
        return
    (winner,) = [each for each in gateways if each.gateway_id == chosen]
    assert rank(winner) == min(map(rank, gateways))


def test_between_equals_every_gateway_has_its_turn() -> None:
    gateways = [Choosable(gateway_id=id, load=0) for id in IDS]
    chosen = {
        choose_gateway(gateways, connected=(), failed=(), randomness=randomness(seed))
        for seed in range(100)
    }
    assert chosen == set(IDS)


def test_every_address_of_a_small_range_is_given_once_and_then_none() -> None:
    account = attrs.evolve(
        ACCOUNT,
        range_ipv4=IPv4Network("10.9.0.0/28"),
        range_ipv6=IPv6Network("fd00::/120"),
    )
    used: set[IPv4Address | IPv6Address] = set()
    for seed in range(14):
        ipv4, ipv6 = allocate(account, used, randomness(seed))
        assert ipv4 not in used
        assert ipv6 not in used
        assert IPv4Address("10.9.0.0") < ipv4 < IPv4Address("10.9.0.15")
        used |= {ipv4, ipv6}
    with pytest.raises(RangeExhausted):
        allocate(account, used, randomness())


def test_the_resolver_s_range_is_never_given_to_a_device() -> None:
    account = attrs.evolve(ACCOUNT, range_ipv4=IPv4Network("100.100.110.0/23"))
    for seed in range(200):
        ipv4, _ = allocate(account, (), randomness(seed))
        assert ipv4 not in RESOLVER_RANGE


def test_ice_credentials_have_the_lengths_of_the_decisions_and_never_repeat() -> None:
    source = randomness()
    made = [new_ice(source) for _ in range(50)]
    ends = [end for each in made for end in (each.client, each.gateway)]
    assert len({end.fragment for end in ends}) == len({end.password for end in ends}) == 100
    assert {(len(end.fragment), len(end.password)) for end in ends} == {(8, 32)}
    assert made[0].client.password not in repr(made[0])


def test_a_bucket_lets_a_burst_through_and_then_a_rate() -> None:
    bucket = Bucket(per_s=2, burst=3, now_ns=0)
    assert [bucket.take(0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(S // 2), bucket.take(S // 2)] == [True, False]
    assert [bucket.take(100 * S) for _ in range(4)] == [True, True, True, False]


def test_a_refusal_that_would_end_the_same_again_says_not_to_retry() -> None:
    assert not refusal("invalid_token").retry
    spread = {refusal("unavailable", randomness=randomness(n)).retry_after_ns for n in range(20)}
    assert len(spread) > 10
    assert min(spread) >= S


def authorization(number: int, seconds: int) -> Authorization:
    return Authorization(
        id=UUID(int=number),
        account_id=ACCOUNT.id,
        policy_id=IDS[0],
        client_id=IDS[1],
        gateway_id=IDS[2],
        resource_id=IDS[3],
        token_id=IDS[4],
        connection_id=IDS[5],
        remote_ip=IpText("203.0.113.7"),
        created_at=START,
        expires_at=START + timedelta(seconds=seconds),
    )


def test_the_ledger_has_each_authorisation_come_up_at_its_moments() -> None:
    ledger = Ledger()
    for number, seconds in ((1, 100), (2, 40)):
        ledger.add(authorization(number, seconds), now_ns=0, instant=START, stage="presumed")
    assert ledger.next_due_ns() == 20 * S
    (first,) = ledger.take_due(20 * S)
    assert first.id == UUID(int=2)
    ledger.postpone(first, 20 * S)
    assert ledger.next_due_ns() == 40 * S - LAST_CALL_NS
    (first,) = ledger.take_due(40 * S - LAST_CALL_NS)
    ledger.postpone(first, 40 * S - LAST_CALL_NS)
    assert ledger.next_due_ns() == 40 * S
    ledger.remove(first, 0)
    assert ledger.next_due_ns() == 50 * S
    assert len(ledger) == 1


def test_what_nobody_acknowledges_comes_up_before_its_lease_ends() -> None:
    ledger = Ledger()
    live = ledger.add(authorization(1, 3_600), now_ns=0, instant=START, stage="written")
    assert ledger.next_due_ns() == 20 * S
    ledger.acknowledge(live, S)
    assert ledger.next_due_ns() == S + (3_600 - 1) * S // 2


def test_what_a_new_owner_presumes_has_to_be_acknowledged_once_it_is_doubted() -> None:
    ledger = Ledger()
    live = ledger.add(authorization(1, 3_600), now_ns=0, instant=START, stage="presumed")
    assert live.acknowledged
    assert ledger.next_due_ns() == 1_800 * S
    ledger.doubt(live, S)
    assert not live.acknowledged
    assert ledger.next_due_ns() == 21 * S
    ledger.acknowledge(live, 2 * S)
    ledger.doubt(live, 3 * S)  # now it is known
    assert live.acknowledged
    assert ledger.next_due_ns() == 2 * S + (3_600 - 2) * S // 2


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 100)), max_size=100))
def test_a_ledger_that_forgets_keeps_its_heap_small(events: list[tuple[int, int]]) -> None:
    ledger = Ledger()
    for number, seconds in events:
        live = ledger.get(UUID(int=number))
        if live is not None:
            ledger.remove(live, 0)
        ledger.add(authorization(number, seconds), now_ns=0, instant=START, stage="presumed")
    due = [each.due_ns for each in ledger]
    assert ledger.next_due_ns() == min(due, default=None)
    assert len(ledger._due) <= 4 * len(ledger) + 65
