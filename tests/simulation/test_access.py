"""The same cores and actors do one whole access in virtual time: in vain, allowed, and cut."""

from __future__ import annotations

import pytest

from simulations.access import NatKind, report


@pytest.mark.parametrize(("nat", "path"), [("port_restricted", "direct"), ("symmetric", "relayed")])
def test_an_access_is_denied_allowed_and_cut(nat: NatKind, path: str) -> None:
    told = report(1, nat)
    assert told.denied_at_first
    assert told.answered
    assert told.path == path
    assert told.cut_after_revocation


def test_a_seed_gives_the_same_report_each_time_and_another_seed_another() -> None:
    assert report(7) == report(7)
    assert report(7).trace != report(8).trace


@pytest.mark.parametrize("seed", range(10, 20))
def test_every_seed_finds_a_direct_path_between_easy_nats(seed: int) -> None:
    told = report(seed)
    assert (told.held, told.path) == (True, "direct")
