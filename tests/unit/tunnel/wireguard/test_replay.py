"""The replay window, against a set that forgets nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tunnel.wireguard.replay import WINDOW_SIZE, ReplayWindow

STEPS = st.lists(
    st.one_of(
        st.integers(0, 200),
        st.integers(0, 3 * WINDOW_SIZE),
        st.integers(2**64 - 20_000, 2**64 - 1),
    ),
    max_size=200,
)


@given(STEPS)
def test_a_counter_is_accepted_once_and_only_within_the_window(counters: list[int]) -> None:
    window = ReplayWindow()
    seen: set[int] = set()
    greatest = -1
    for counter in counters:
        expected = counter not in seen and counter + WINDOW_SIZE > greatest
        assert window.accept(counter) is expected
        if expected:
            seen.add(counter)
            greatest = max(greatest, counter)


def test_the_whole_window_may_arrive_backwards() -> None:
    window = ReplayWindow()
    assert all(window.accept(counter) for counter in reversed(range(WINDOW_SIZE)))
    assert not any(window.accept(counter) for counter in range(WINDOW_SIZE))


def test_a_long_jump_forgets_everything_below_the_window() -> None:
    window = ReplayWindow()
    assert window.accept(0)
    assert window.accept(10**12)
    assert not window.accept(0)
    assert window.accept(10**12 - WINDOW_SIZE + 1)
    assert not window.accept(10**12 - WINDOW_SIZE)
