"""A hint that the peer is gone: asked about several times, and believed only by silence."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.net.quic_suspicion import PATIENCE_S, PROBES, Suspicion


def run_to_the_end(suspicion: Suspicion) -> tuple[list[float], float]:
    """When it probes while nothing is heard, and when it gives up."""
    probes: list[float] = []
    while (now := suspicion.poll_timeout()) < math.inf:
        if suspicion.handle_timeout(now) == "gone":
            return probes, now
        probes.append(now)
    raise AssertionError("it never gave up")


def test_it_probes_at_once_and_several_times_and_gives_up_after_a_second() -> None:
    suspicion = Suspicion()
    assert suspicion.poll_timeout() == math.inf
    assert suspicion.handle_timeout(10.0) is None
    suspicion.hint(10.0, 0.05)
    probes, end = run_to_the_end(suspicion)
    assert probes[0] == 10.0
    assert len(probes) == PROBES
    assert end == pytest.approx(10.0 + PATIENCE_S)
    assert not suspicion.open


def test_where_a_round_trip_is_long_it_waits_for_three() -> None:
    suspicion = Suspicion()
    suspicion.hint(0.0, 2.0)
    probes, end = run_to_the_end(suspicion)
    assert (len(probes), end) == (PROBES, pytest.approx(6.0))


@pytest.mark.parametrize("asked", range(PROBES + 1))
def test_any_packet_of_the_peer_ends_it_however_late(asked: int) -> None:
    suspicion = Suspicion()
    suspicion.hint(0.0, 0.05)
    for _ in range(asked):
        assert suspicion.handle_timeout(suspicion.poll_timeout()) == "probe"
    suspicion.heard()
    assert not suspicion.open
    assert suspicion.handle_timeout(100.0) is None


def test_a_process_that_slept_sends_all_its_probes_before_it_gives_up() -> None:
    suspicion = Suspicion()
    suspicion.hint(0.0, 0.05)
    assert suspicion.handle_timeout(0.0) == "probe"
    said = [suspicion.handle_timeout(3600.0 + n) for n in range(PROBES)]
    assert said == ["probe"] * (PROBES - 1) + ["gone"]


@given(st.lists(st.floats(0.0, 0.3), max_size=200), st.booleans())
def test_a_flood_of_forged_hints_never_ends_who_answers_and_makes_few_probes(
    gaps: list[float], quick: bool
) -> None:
    """Between two hints every probe is answered; by then there is no more than the next one."""
    suspicion, now = Suspicion(), 0.0
    probes: list[float] = []
    for gap in gaps:
        suspicion.hint(now, 0.01)
        now += gap
        while suspicion.poll_timeout() <= now:
            due = suspicion.poll_timeout()
            assert suspicion.handle_timeout(due) == "probe"
            assert not probes or due - probes[-1] >= PATIENCE_S / PROBES - 1e-9
            probes.append(due)
            suspicion.heard()
            if quick:
                suspicion.hint(due, 0.01)
