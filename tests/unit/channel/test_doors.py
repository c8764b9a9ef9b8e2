"""Which door an agent tries next, whatever happens to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channel.doors import AVOID_NS, STEADY_NS, TOKEN_DOOR_WITHIN, Doors
from channel.frames import PORTAL_FRAME_LIMIT, FrameDecoder, RemoteProtocolError, encode_frame
from channel.messages import MAX_DOORS, TO_CLIENT, TO_GATEWAY, TO_RELAY, DoorAddress, Portals
from runtime.randomness import SeededRandomness

S = 10**9
HOME = "portal.example.com:443"
SEEDS = st.integers(0, 2**32)
LISTS = st.lists(st.sampled_from([HOME, *"abcdefgh"]), max_size=12)


def doors(seed: int = 1, learned: tuple[str, ...] = ("a", "b", "c")) -> Doors:
    them = Doors(HOME, SeededRandomness(seed, "doors"))
    them.learned(learned)
    return them


def stay(them: Doors, now: int) -> int:
    """Be taken in, and stay for as long as counts."""
    them.entered(now)
    return now + STEADY_NS


def steps(them: Doors) -> dict[str, Callable[[int], None]]:
    return {"failed": them.failed, "sent_away": them.sent_away, "left": them.left}


# --- any course of events ------------------------------------------------------------------------


@given(SEEDS, LISTS, st.integers(0, 5 * S))
def test_one_round_of_failures_tries_every_door_once(
    seed: int, learned: list[str], at: int
) -> None:
    them = doors(seed, tuple(learned))
    for _ in range(3):
        tried = []
        while not tried or not them.round_is_over:
            tried.append(them.next(at))
            them.failed(at)
        assert sorted(tried) == sorted({HOME, *learned})


EVENTS = st.tuples(
    st.sampled_from(["failed", "sent_away", "left", "a", "elsewhere"]),  # or sent on to that
    st.booleans(),  # taken in before that
    st.integers(0, 2 * STEADY_NS),  # and stayed so long
    st.none() | LISTS,  # and learned these
)


@given(SEEDS, st.lists(EVENTS, min_size=1, max_size=60))
def test_no_course_of_events_dials_a_door_twice_without_a_pause_or_a_steady_stay(
    seed: int, events: list[Any]
) -> None:
    them, now = doors(seed), 0
    tried: set[str] = set()
    sent_on_to: set[str] = set()
    for ending, is_taken_in, stay_ns, learned in events:
        if them.round_is_over:  # here the dialer pauses
            tried.clear()
            sent_on_to.clear()
        door = them.next(now)
        assert door not in tried
        assert door in them.known or door in sent_on_to
        assert len(sent_on_to) <= 1, "sent on twice in a round"
        tried.add(door)
        if is_taken_in:
            them.entered(now)
            if learned is not None:
                them.learned(learned)
            now += stay_ns
            if stay_ns >= STEADY_NS:
                tried = {door}
                sent_on_to.clear()
        if ending in steps(them):
            steps(them)[ending](now)
        elif them.sent_on(ending, now):
            sent_on_to.add(ending)
            assert not them.round_is_over
        assert HOME in them.known
        assert len(set(them.known)) == len(them.known)
        if ending == "left":
            assert them.round_is_over


@given(SEEDS, st.integers(1, 200))
def test_portals_that_name_others_each_time_still_lead_to_a_pause(seed: int, rounds: int) -> None:
    them = doors(seed, ())
    dialled = 0
    for number in range(rounds):
        if them.round_is_over:
            dialled = 0
        them.next(0)
        dialled += 1
        them.entered(0)
        them.learned([f"{number}-{each}" for each in range(100)])
        them.failed(0)
        assert len(them.known) == 1 + MAX_DOORS
        assert dialled <= 1 + MAX_DOORS


@given(SEEDS, st.integers(TOKEN_DOOR_WITHIN, 100))
def test_many_doors_that_lead_nowhere_do_not_hide_the_one_of_the_token(
    seed: int, count: int
) -> None:
    them = doors(seed, tuple(f"nowhere-{each}" for each in range(count)))
    first = []
    for _ in range(TOKEN_DOOR_WITHIN):
        first.append(them.next(0))
        them.failed(0)
    assert HOME in first


# --- the order -----------------------------------------------------------------------------------


def test_the_agents_of_a_node_that_died_spread_over_all_others() -> None:
    chosen: Counter[str] = Counter()
    for seed in range(400):
        them = doors(seed)
        while them.next(0) != "a":
            them.failed(0)
        them.failed(stay(them, 0))
        chosen[them.next(STEADY_NS)] += 1
    assert set(chosen) == {HOME, "b", "c"}
    assert min(chosen.values()) > 80


def test_whoever_left_for_a_reason_of_its_own_comes_back_to_the_same_door() -> None:
    for seed in range(20):
        them = doors(seed)
        door = them.next(0)
        them.left(stay(them, 0))
        assert them.round_is_over
        assert them.next(STEADY_NS) == door


@pytest.mark.parametrize("ending", ["failed", "sent_away"])
def test_a_door_that_failed_or_sent_away_is_followed_by_another_at_once(ending: str) -> None:
    for seed in range(20):
        them = doors(seed)
        door = them.next(0)
        now = stay(them, 0)
        steps(them)[ending](now)
        assert not them.round_is_over
        assert them.next(now) != door


def test_a_door_that_sent_us_away_is_the_last_one_for_a_minute() -> None:
    for seed in range(20):
        them = doors(seed)
        door = them.next(0)
        now = stay(them, 0)
        them.sent_away(now)
        them.next(now)
        now = stay(them, now)
        them.failed(now)
        rest = []
        while not them.round_is_over:
            rest.append(them.next(now))
            them.failed(now)
        assert rest[-1] == door
    firsts = set()
    for seed in range(50):
        them = doors(seed)
        door = them.next(0)
        them.sent_away(0)
        while not them.round_is_over:
            them.next(0)
            them.failed(0)
        firsts.add(them.next(AVOID_NS) == door)
    assert firsts == {True, False}


@pytest.mark.parametrize("to", ["a", "unheard-of"])
def test_whoever_is_sent_on_goes_there_at_once_and_else_to_the_others(to: str) -> None:
    for seed in range(20):
        them = doors(seed)
        while (door := them.next(0)) == to:
            them.failed(0)
        now = stay(them, 0)
        assert them.sent_on(to, now)
        assert not them.round_is_over
        assert them.next(now) == to
        them.failed(now)
        rest = set()
        while not them.round_is_over:
            rest.add(them.next(now))
            them.failed(now)
        assert rest == {HOME, "a", "b", "c"} - {door, to}


def test_nobody_is_sent_to_and_fro_without_a_pause() -> None:
    them = doors(1, ("a",))
    first = them.next(0)
    (other,) = {HOME, "a"} - {first}
    assert them.sent_on(other, 0)
    assert them.next(0) == other
    assert not them.sent_on(first, 0)
    assert them.round_is_over
    assert them.next(0) in {first, other}
    assert them.sent_on("unheard-of", 0)
    assert them.next(0) == "unheard-of"
    assert not them.sent_on("another", 0)


def test_an_agent_that_knows_no_other_door_pauses_after_each_try() -> None:
    them = doors(1, (HOME,))
    for step in steps(them).values():
        them.next(0)
        step(stay(them, 0))
        assert them.round_is_over
    assert them.next(0) == HOME


# --- the message ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("192.0.2.1:443", "192.0.2.1:443"),
        ("[2001:DB8:0::1]:1", "[2001:db8::1]:1"),
        ("Node-1.Portal.example.com:65535", "node-1.portal.example.com:65535"),
        ("node1:443", "node1:443"),
    ],
)
def test_a_door_is_an_address_or_a_name_with_a_port(text: str, canonical: str) -> None:
    message = Portals(addresses=(DoorAddress(text),))
    frame = encode_frame(message, limit=PORTAL_FRAME_LIMIT)
    assert canonical.encode() in frame
    for events in (TO_CLIENT, TO_GATEWAY, TO_RELAY):
        (one,) = FrameDecoder(events, PORTAL_FRAME_LIMIT).feed(frame)
        assert one.message == message


@pytest.mark.parametrize(
    "addresses",
    [
        [],
        ["192.0.2.1:443"] * (MAX_DOORS + 1),
        ["192.0.2.1"],
        ["192.0.2.1:0"],
        ["192.0.2.1:65536"],
        ["2001:db8::1:443"],
        ["[fe80::1%eth0]:443"],
        ["127.1:443"],
        ["0x7f000001:443"],
        ["a..b:443"],
        ["-a.example.com:443"],
        ["a b:443"],
        ["a/b:443"],
        ["a\n:443"],
        ["é.example.com:443"],
        [f"{'a' * 64}.example.com:443"],
        [443],
    ],
)
def test_what_is_no_list_of_doors_is_refused(addresses: list[object]) -> None:
    body = msgspec.json.encode({"event": "portals", "payload": {"addresses": addresses}})
    with pytest.raises(RemoteProtocolError):
        FrameDecoder(TO_CLIENT, PORTAL_FRAME_LIMIT).feed(len(body).to_bytes(4, "big") + body)
