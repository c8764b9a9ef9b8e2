"""The three seams that everybody uses: clock, randomness, secret."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.clock import NS_PER_S, SystemClock, VirtualClock
from runtime.randomness import SeededRandomness, SystemRandomness, choice, shuffle, uuid7
from runtime.secret import Secret


def test_the_system_clock_never_goes_back_and_knows_its_zone():
    clock = SystemClock()
    assert clock.monotonic_ns() <= clock.monotonic_ns()
    assert clock.utc_now().tzinfo is UTC


def test_a_virtual_clock_moves_both_times_together_and_never_back():
    clock = VirtualClock(start_ns=5, utc_start=datetime(2026, 1, 1, tzinfo=UTC))
    clock.advance(3 * NS_PER_S)
    assert clock.monotonic_ns() == 3 * NS_PER_S + 5
    assert clock.utc_now() == datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=3)
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance_to(4)
    with pytest.raises(ValueError, match="aware"):
        VirtualClock(utc_start=datetime(2026, 1, 1))  # noqa: DTZ001


@given(st.integers(), st.lists(st.integers(min_value=0, max_value=100), max_size=20))
def test_a_seeded_stream_does_not_depend_on_how_it_is_cut(seed: int, sizes: list[int]):
    pieces = SeededRandomness(seed, "a")
    whole = SeededRandomness(seed, "a")
    assert b"".join(pieces.bytes(size) for size in sizes) == whole.bytes(sum(sizes))


@given(st.integers(), st.integers(min_value=1, max_value=2**70))
def test_an_integer_stays_below_its_bound(seed: int, below: int):
    for randomness in (SeededRandomness(seed, "b"), SystemRandomness()):
        assert 0 <= randomness.integer(below) < below


@pytest.mark.parametrize("randomness", [SeededRandomness(1, "uniform"), SystemRandomness()])
def test_small_integers_are_uniform(randomness):
    counts = [0] * 7
    for _ in range(14_000):
        counts[randomness.integer(7)] += 1
    assert all(1_700 < count < 2_300 for count in counts)


def test_streams_of_different_names_differ_and_a_child_takes_nothing_from_its_parent():
    parent = SeededRandomness(1, "a")
    child = parent.child("b").bytes(32)
    assert parent.bytes(32) == SeededRandomness(1, "a").bytes(32)
    assert len({child, SeededRandomness(1, "b").bytes(32), SeededRandomness(2, "a").bytes(32)}) == 3


def test_a_seeded_stream_is_the_same_in_every_process():
    program = (
        "from runtime.randomness import SeededRandomness as R; r = R(7, 'x');"
        "print(r.bytes(40).hex(), [r.integer(1000) for _ in range(9)])"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in (0, 1)
    }
    assert len(seen) == 1


@given(st.integers(), st.lists(st.integers(), max_size=30))
def test_a_shuffle_keeps_every_item(seed: int, items: list[int]):
    shuffled = list(items)
    shuffle(shuffled, SeededRandomness(seed, "s"))
    assert sorted(shuffled) == sorted(items)
    if items:
        assert choice(items, SeededRandomness(seed, "c")) in items


def test_a_uuid7_carries_the_instant_and_sorts_by_it():
    clock = VirtualClock()
    randomness = SeededRandomness(1, "ids")
    ids = []
    for _ in range(100):
        ids.append(uuid7(clock, randomness))
        clock.advance(1_000_000)
    assert ids == sorted(ids)
    assert all(each.version == 7 and each.variant == "specified in RFC 4122" for each in ids)
    assert ids[0].int >> 80 == int(datetime(2026, 1, 1, tzinfo=UTC).timestamp() * 1_000)


def test_a_secret_never_shows_its_content(caplog: pytest.LogCaptureFixture):
    secret = Secret("hunter2")
    with caplog.at_level(logging.INFO):
        logging.getLogger("x").info("%s %r %s", secret, secret, [secret])
    shown = caplog.text + f"{secret} {secret!r} {secret:>40} {[secret]}"
    assert "hunter2" not in shown
    for leak in (pickle.dumps, json.dumps, vars):
        with pytest.raises(TypeError):
            leak(secret)  # type: ignore[operator]  # three callables of different shapes
    assert copy.deepcopy(secret) is secret


def test_a_secret_is_compared_by_content_and_revealed_on_demand():
    assert Secret("a").matches("a")
    assert Secret("a").matches(b"a")
    assert Secret(b"a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert hash(Secret("a")) == hash(Secret(b"a"))
    assert Secret("é").reveal() == "é".encode()
    assert Secret("é").reveal_text() == "é"
    with pytest.raises(ValueError, match="not UTF-8") as failure:
        Secret(b"\xffpassword").reveal_text()
    assert failure.value.__context__ is None
