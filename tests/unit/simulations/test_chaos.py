"""Faults are drawn within their budget, from the seed alone, each from a stream of its own."""

from __future__ import annotations

from collections import Counter

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.chaos import describe, draw
from simulations.scenario.load import dump, loads
from simulations.scenario.schema import Chaos, Fault, Portal, Relay, Scenario
from simulations.scenario.units import duration_ns, share_ppm
from tests.small_scenario import CHAOS, SCENARIO


def span(fault: Fault) -> tuple[int, int]:
    begins = duration_ns(fault.at)
    return begins, begins + (duration_ns(fault.duration) if fault.duration else 0)


@given(seed=st.integers(0, 2**62))
def test_all_that_is_drawn_lies_within_the_budget(seed: int) -> None:
    drawn = draw(SCENARIO, seed)
    assert drawn.seed == seed
    assert drawn.chaos is None
    assert len([fault for fault in drawn.faults if fault.kind not in ("roam", "change")]) <= 12
    for fault in drawn.faults:
        begins, ends = span(fault)
        assert 0 <= begins <= ends <= duration_ns(CHAOS.heals)
        assert ends - begins <= duration_ns(CHAOS.longest)
        if fault.quality is not None:
            assert share_ppm(fault.quality.loss) <= share_ppm(CHAOS.worst_loss)
            assert duration_ns(fault.quality.latency) <= duration_ns(CHAOS.worst_latency)


def test_what_is_drawn_can_be_saved_and_read_again() -> None:
    several = attrs.evolve(
        SCENARIO, portals=tuple(Portal(name=f"portal-{number}") for number in range(3))
    )
    for seed in range(200):
        drawn = draw(several, seed)
        assert loads(dump(drawn), "drawn") == drawn


@given(seed=st.integers(0, 2**62))
def test_no_more_than_so_many_go_on_at_once(seed: int) -> None:
    spans = [span(fault) for fault in draw(SCENARIO, seed).faults if fault.duration]
    for begins, _ in spans:
        assert sum(1 for other in spans if other[0] <= begins < other[1]) <= CHAOS.at_once


@given(seed=st.integers(0, 2**62))
def test_what_is_changed_is_changed_back(seed: int) -> None:
    places = {"laptop": "home"}
    enabled = {"staff-intranet"}
    for fault in draw(SCENARIO, seed).faults:
        if fault.kind == "roam":
            places[fault.targets[0]] = fault.to
        elif fault.change == "disable_policy":
            enabled.discard(fault.subject[0])
        elif fault.change == "enable_policy":
            enabled.add(fault.subject[0])
    assert places == {"laptop": "home"}
    assert enabled == {"staff-intranet"}


@given(seed=st.integers(0, 2**62))
def test_no_target_is_hit_twice_by_what_would_undo_each_other(seed: int) -> None:
    lives = [fault for fault in draw(SCENARIO, seed).faults if fault.kind in ("crash", "pause")]
    for number, fault in enumerate(lives):
        for other in lives[number + 1 :]:
            (begin, end), (other_begin, other_end) = span(fault), span(other)
            apart = end <= other_begin or other_end <= begin
            assert apart or not set(fault.targets) & set(other.targets)


def test_a_seed_gives_the_same_faults_and_another_seed_others() -> None:
    assert draw(SCENARIO, 7) == draw(SCENARIO, 7)
    assert draw(SCENARIO, 7) != draw(SCENARIO, 8)


def test_a_smaller_budget_draws_the_beginning_of_a_larger_one() -> None:
    fewer = attrs.evolve(SCENARIO, chaos=attrs.evolve(CHAOS, faults=5))
    assert set(draw(fewer, 3).faults) <= set(draw(SCENARIO, 3).faults)


def test_every_kind_is_drawn_in_some_seed() -> None:
    seen = Counter(fault.kind for seed in range(200) for fault in draw(SCENARIO, seed).faults)
    wanted = describe(Chaos())["kinds"]
    assert isinstance(wanted, list)
    assert set(wanted) == set(seen)


@pytest.mark.parametrize("kind", ["rebind", "roam", "change", "block_udp"])
def test_a_kind_without_targets_in_the_topology_is_not_drawn(kind: str) -> None:
    bare = Scenario(
        format=1,
        name="bare",
        portals=(Portal(name="portal"),),
        relays=(Relay(name="relay"),),
        chaos=CHAOS,
    )
    faults = [fault for seed in range(50) for fault in draw(bare, seed).faults]
    assert faults
    assert all(fault.kind != kind for fault in faults)


def test_faults_of_the_file_stay_and_without_a_budget_nothing_is_added() -> None:
    own = Fault(at="1s", kind="reconnect", targets=("laptop",))
    assert own in draw(attrs.evolve(SCENARIO, faults=(own,)), 1).faults
    assert draw(attrs.evolve(SCENARIO, chaos=None), 1).faults == ()
