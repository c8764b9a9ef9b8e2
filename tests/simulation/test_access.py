"""The same cores and actors do one whole access in virtual time: in vain, allowed, and cut."""

from __future__ import annotations

from typing import Final, Literal

import attrs
import pytest

from simulations.run import Run
from simulations.scenario.load import ready
from simulations.scenario.schema import NatBehaviour, Scenario

NatKind = Literal["port_restricted", "symmetric"]
NATS: Final[dict[NatKind, NatBehaviour]] = {
    "port_restricted": NatBehaviour(),
    "symmetric": NatBehaviour(mapping="address_and_port_dependent", ports="random"),
}


@attrs.frozen(kw_only=True)
class AccessReport:
    """What happened in one run. `path` is how answers came; times are virtual ns."""

    seed: int
    denied_at_first: bool
    answered: bool
    path: str
    first_answer_ns: int
    cut_after_revocation: bool
    datagrams: int
    trace: str

    @property
    def held(self) -> bool:
        """Whether all went as it has to."""
        return self.denied_at_first and self.answered and self.cut_after_revocation


def access(nat: NatKind = "port_restricted") -> Scenario:
    """The story, with such a NAT on both sides."""
    told = ready("access")
    networks = tuple(attrs.evolve(network, nat=NATS[nat]) for network in told.networks)
    return attrs.evolve(told, networks=networks)


def report(seed: int, nat: NatKind = "port_restricted") -> AccessReport:
    """Let it happen. Raises RuntimeError if the run ended early."""
    story = Run(access(nat), seed)
    result = story.carry_out()
    if result.error:
        raise RuntimeError(result.error)
    denied, reached, cut = (check.held for check in result.checks)
    (pair,) = result.pairs
    paths = story.traffic.pairs[0].paths_within(0, story.world.now)
    return AccessReport(
        seed=seed,
        denied_at_first=denied,
        answered=reached,
        path=paths[-1] if paths else "none",
        first_answer_ns=pair.first_answer_ns or 0,
        cut_after_revocation=cut,
        datagrams=result.counters["packets_sent"],
        trace=result.trace,
    )


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
