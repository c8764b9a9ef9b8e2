"""Which relays an agent gets: near ones, which do not fail together."""

from __future__ import annotations

from itertools import permutations
from typing import Any
from uuid import UUID

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.model import Relay
from actors.relay_choice import FULL, ChoosableRelay, choose_relays, country_of, domain_of
from channel.frames import AGENT_FRAME_LIMIT, LENGTH_BYTES, FrameDecoder, encode_frame
from channel.messages import (
    FROM_UNJOINED,
    IpText,
    Load,
    RelayInit,
    RelayJoin,
    Relays,
    SocketAddress,
)
from runtime.randomness import SeededRandomness

from .test_choice import Atlas
from .world import START, RelayAgent, World

IDS = [UUID(int=number) for number in range(1, 7)]
relays_of_ids = st.lists(st.sampled_from(IDS), unique=True).flatmap(
    lambda ids: st.tuples(
        *(
            st.builds(
                ChoosableRelay,
                relay_id=st.just(id),
                load=st.sampled_from([0.0, 0.5, FULL]),
                domain=st.sampled_from("abc"),
                near=st.booleans(),
            )
            for id in ids
        )
    )
)


def cost(chosen: tuple[ChoosableRelay, ...]) -> tuple[Any, ...]:
    """What a choice of relays, in the order in which they were taken, is judged by."""
    return tuple(
        (
            each.load >= FULL,
            each.domain in {other.domain for other in chosen[:place]},
            not each.near,
            each.load,
        )
        for place, each in enumerate(chosen)
    )


@given(relays_of_ids, st.lists(st.sampled_from(IDS), unique=True), st.integers(0, 3), st.integers())
def test_no_other_relays_would_be_a_better_choice(
    relays: tuple[ChoosableRelay, ...], current: list[UUID], count: int, seed: int
) -> None:
    by_id = {each.relay_id: each for each in relays}
    randomness = SeededRandomness(seed, "relays")
    chosen = choose_relays(relays, count=count, current=current, randomness=randomness)
    assert len(chosen) == len(set(chosen)) == min(count, len(relays))
    stay = tuple(id for id in current if id in by_id)[:count]
    assert chosen[: len(stay)] == stay
    taken = tuple(by_id[id] for id in chosen)
    others = [each for each in relays if each.relay_id not in stay]
    assert cost(taken) == min(
        cost((*taken[: len(stay)], *rest)) for rest in permutations(others, len(chosen) - len(stay))
    )


def test_between_equals_the_draw_decides() -> None:
    relays = [ChoosableRelay(relay_id=id, load=0.0, domain=str(id)) for id in IDS]
    chosen = {
        choose_relays(relays, count=1, current=(), randomness=SeededRandomness(seed, "relays"))[0]
        for seed in range(100)
    }
    assert chosen == set(IDS)


def relay(*addresses: str, **fields: Any) -> Relay:
    return Relay(
        id=UUID(int=1),
        token_id=UUID(int=2),
        name="relay",
        addresses=tuple(SocketAddress(address=IpText(each), port=3478) for each in addresses),
        last_seen_at=START,
        **fields,
    )


@pytest.mark.parametrize(
    ("announced", "domain"),
    [
        (relay("192.0.2.77", region="DE", failure_domain="rack"), "rack"),
        (relay("192.0.2.77", region="DE"), "DE"),
        (relay("192.0.2.77", "198.51.100.1"), "192.0.2.0/24"),
        (relay("2001:db8:1:2:3::4"), "2001:db8:1:2::/64"),
        (relay(), str(UUID(int=1))),
    ],
)
def test_a_failure_domain_is_what_the_relay_says_or_its_region_or_its_network(
    announced: Relay, domain: str
) -> None:
    assert domain_of(announced) == domain


@pytest.mark.parametrize(
    ("announced", "country"),
    [
        (relay("198.51.100.1", region="CH"), "CH"),
        (relay("198.51.100.1", region="ch"), "CH"),
        (relay("198.51.100.1", region="eu-west"), "FR"),
        (relay("198.51.100.1"), "FR"),
        (relay("192.0.2.1"), None),
        (relay(), None),
    ],
)
def test_a_relays_country_is_its_region_or_that_of_its_address(
    announced: Relay, country: str | None
) -> None:
    assert country_of(announced, Atlas()) == country


# --- in the life of a portal ----------------------------------------------------------------------


def ids(*relays: RelayAgent) -> list[UUID]:
    return [each.heard(RelayInit)[0].relay_id for each in relays]


@pytest.mark.parametrize(("remote", "first"), [("203.0.113.7", "CH"), ("198.51.100.7", "FR")])
def test_an_agent_gets_a_near_relay_and_one_that_does_not_fail_with_it(
    remote: str, first: str
) -> None:
    for seed in range(5):
        world = World(seed, regions=Atlas())
        by_country = {
            country: [
                world.relay(f"{country}-{rack}", region=country, failure_domain=f"{country}{rack}")
                for rack in (1, 1, 2)
            ]
            for country in ("CH", "FR")
        }
        one, same, other = by_country[first]
        world.relay("far", address="192.0.2.9")
        init = world.client(remote=remote).init
        used = {each.id for each in init.relays}
        assert used in ({*ids(one, other)}, {*ids(same, other)})
        gateway = world.gateway(remote=remote)
        assert {each.id for each in gateway.init.relays} & set(ids(other)) == set(ids(other))


def test_a_relay_abroad_is_better_than_a_near_one_that_fails_with_the_first() -> None:
    world = World(regions=Atlas())
    near = [world.relay(name, region="CH", failure_domain="rack") for name in "ab"]
    abroad = world.relay("c", region="FR")
    used = {each.id for each in world.client(remote="203.0.113.7").init.relays}
    assert len(used & set(ids(*near))) == 1
    assert set(ids(abroad)) < used


def test_a_full_relay_comes_after_every_other() -> None:
    world = World(regions=Atlas())
    full, one, same = (
        world.relay(name, region="CH", failure_domain=domain)
        for name, domain in (("full", "a"), ("one", "b"), ("same", "b"))
    )
    full.say(Load(allocations=20_000, load=1.0))
    world.host.run_until_idle()
    used = {each.id for each in world.client(remote="203.0.113.7").init.relays}
    assert used == set(ids(one, same))


def test_relays_in_use_stay_when_nearer_ones_come() -> None:
    world = World(regions=Atlas())
    for name in "ab":
        world.relay(name, address="192.0.2.9")
    client = world.client(remote="203.0.113.7")
    world.relay("near", region="CH")
    world.run_for(12 * 3600 + 1)
    assert not any(told.removed for told in client.heard(Relays))
    assert {each.id for told in client.heard(Relays) for each in told.added} == {
        each.id for each in client.init.relays
    }


def test_a_failure_domain_is_kept_and_told_to_all_nodes() -> None:
    world = World()
    world.relay(region="DE", failure_domain="rack-7")
    (row,) = world.relay_rows()
    assert (row.region, row.failure_domain) == ("DE", "rack-7")
    assert world.relays()[0].relay == row


def test_a_relay_of_an_older_version_says_no_failure_domain_and_is_taken() -> None:
    join = RelayJoin(
        token="t",
        addresses=RelayAgent.addresses,
        stamp_secret=bytes(32),
        name="relay",
        failure_domain="rack-7",
        incarnation=1,
    )
    frame = encode_frame(join, limit=AGENT_FRAME_LIMIT)
    older = frame[LENGTH_BYTES:].replace(b'"failure_domain":"rack-7",', b"")
    assert len(older) < len(frame) - LENGTH_BYTES
    decoder = FrameDecoder(FROM_UNJOINED, AGENT_FRAME_LIMIT)
    (read,) = decoder.feed(len(older).to_bytes(LENGTH_BYTES, "big") + older)
    assert read.message == attrs.evolve(join, failure_domain="")
