"""Token buckets against a slow reading: a level that drips."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portal.api.limits import TokenBuckets

S = 10**9


def test_a_burst_passes_and_then_one_each_interval() -> None:
    buckets = TokenBuckets(rate_per_s=20, burst=3)
    assert [buckets.take("a", 0) for _ in range(3)] == [0, 0, 0]
    assert buckets.take("a", 0) == S // 20
    assert buckets.take("a", S // 20) == 0
    assert buckets.take("a", S // 20) == S // 20


def test_one_key_does_not_slow_another() -> None:
    buckets = TokenBuckets(rate_per_s=1, burst=1)
    assert buckets.take("a", 0) == 0
    assert buckets.take("b", 0) == 0
    assert buckets.take("a", 0) == S


def test_looking_takes_nothing() -> None:
    buckets = TokenBuckets(rate_per_s=1, burst=1)
    assert buckets.wait_ns("a", 0) == 0
    assert buckets.take("a", 0) == 0
    assert buckets.wait_ns("a", 0) == S
    assert buckets.wait_ns("a", S) == 0


def test_memory_is_bounded() -> None:
    buckets = TokenBuckets(rate_per_s=1, burst=1, max_keys=10)
    for key in range(1_000):
        buckets.take(key, 0)
    assert len(buckets) == 10


@pytest.mark.parametrize("bad", [{"rate_per_s": 0}, {"burst": 0}, {"max_keys": 0}])
def test_limits_are_positive(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="positive"):
        TokenBuckets(**({"rate_per_s": 1, "burst": 1} | bad))


@given(st.lists(st.integers(0, 3 * S)), st.integers(1, 50), st.integers(1, 10))
def test_it_agrees_with_a_level_that_drips(gaps: list[int], rate: int, burst: int) -> None:
    interval = round(S / rate)
    buckets = TokenBuckets(rate_per_s=rate, burst=burst)
    now = last = 0
    level = burst * interval  # in ns of dripping, so that all is exact
    for gap in gaps:
        now += gap
        level = min(burst * interval, level + now - last)
        last = now
        wait = buckets.take("k", now)
        assert (wait == 0) == (level >= interval)
        if wait == 0:
            level -= interval
        else:
            assert wait == interval - level
