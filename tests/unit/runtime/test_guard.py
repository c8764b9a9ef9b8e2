"""Guards: one input may fail, the process goes on, and tests still see the mistake."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from runtime.guard import Guard, surface_failures


@pytest.fixture
def as_in_production() -> Iterator[None]:
    before = surface_failures(False)
    yield
    surface_failures(before)


@pytest.mark.usefixtures("as_in_production")
def test_a_failure_is_counted_and_held_back() -> None:
    guard = Guard("test")
    for value in ("1", "x", "2", "y"):
        with guard:
            int(value)
    assert guard.failures == 2


@pytest.mark.usefixtures("as_in_production")
def test_a_failure_that_is_repeated_does_not_fill_the_log(
    capfd: pytest.CaptureFixture[str],
) -> None:
    guard = Guard("test")
    for _ in range(1_000):
        with guard:
            raise KeyError("a mistake")
    assert guard.failures == 1_000
    assert capfd.readouterr().err.count("input_failed") == 10


@pytest.mark.usefixtures("as_in_production")
def test_the_trace_of_a_failure_shows_no_values(capfd: pytest.CaptureFixture[str]) -> None:
    guard = Guard("test")
    password = "".join(("open", "sesame"))
    with guard:
        int("x" if password else "")
    shown = capfd.readouterr().err
    assert "ValueError" in shown
    assert password not in shown


@pytest.mark.usefixtures("as_in_production")
def test_what_says_that_the_input_is_wrong_passes_and_is_no_failure() -> None:
    guard = Guard("test", passes=(KeyError,))
    with pytest.raises(KeyError), guard:
        raise KeyError("the other side's fault")
    with guard:
        raise ValueError("ours")
    assert guard.failures == 1


@pytest.mark.usefixtures("as_in_production")
async def test_cancelling_passes_through() -> None:
    guard = Guard("test")
    with trio.move_on_after(0) as scope, guard:
        await trio.sleep_forever()
    assert scope.cancelled_caught
    assert guard.failures == 0


def test_in_tests_a_failure_surfaces() -> None:
    guard = Guard("test")
    with pytest.raises(KeyError), guard:
        raise KeyError("a mistake")
    assert guard.failures == 1
