"""The oracle of direct paths: it knows nothing of the product, and trying it out agrees with it."""

from __future__ import annotations

import ast
import random
import sys
from itertools import combinations_with_replacement, product
from pathlib import Path
from typing import get_args

import pytest

from simulations import oracle
from simulations.oracle import Abilities, Behaviour, Nat, Side, Verdict, judge
from tests.unit.simulations.punching import outcomes

BEHAVIOURS: tuple[Behaviour, ...] = get_args(Behaviour)
EIM, ADM, APDM = BEHAVIOURS
HARD = Nat(mapping=APDM, filtering=APDM, ports="random")
EASY = Nat()


def nine(**rest: object) -> list[Nat]:
    return [Nat(mapping=m, filtering=f, **rest) for m in BEHAVIOURS for f in BEHAVIOURS]  # type: ignore[arg-type]


def judged(one: tuple[Nat, ...], other: tuple[Nat, ...]) -> str:
    """In the words of the search, whichever side is named first."""
    verdict = judge(Side(nats=one), Side(nats=other))
    turned = judge(Side(nats=other), Side(nats=one))
    assert verdict == turned
    if verdict.path == "direct":
        return "always"
    return "sometimes" if verdict.may_be_direct else "never"


def tried(one: tuple[Nat, ...], other: tuple[Nat, ...], free_events: int) -> str:
    met = list(outcomes(one, other, free_events))
    return "always" if all(met) else "sometimes" if any(met) else "never"


def test_nothing_but_the_standard_library_and_attrs_is_imported() -> None:
    tree = ast.parse(Path(oracle.__file__).read_text())
    tops = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            tops |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            tops.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"__import__", "importlib.import_module"}
    assert tops - sys.stdlib_module_names == {"attrs"}


@pytest.mark.parametrize("filters_per", ["endpoint", "mapping"])
@pytest.mark.parametrize("inbound_binding", [False, True])
@pytest.mark.parametrize("reply_binding", [False, True])
def test_every_order_of_packets_of_all_81_pairs_agrees(
    filters_per: str, inbound_binding: bool, reply_binding: bool
) -> None:
    nats = nine(
        filters_per=filters_per, inbound_binding=inbound_binding, reply_binding=reply_binding
    )
    disagreements = [
        (one, other)
        for one, other in combinations_with_replacement(nats, 2)
        if judged((one,), (other,)) != tried((one,), (other,), free_events=4)
    ]
    assert disagreements == []


def test_stacked_nats_of_every_sort_agree() -> None:
    chance = random.Random(20_250_101)

    def any_stack() -> tuple[Nat, ...]:
        return tuple(
            Nat(
                mapping=chance.choice(BEHAVIOURS),
                filtering=chance.choice(BEHAVIOURS),
                filters_per=chance.choice(("endpoint", "mapping")),
                inbound_binding=chance.random() < 0.3,
                reply_binding=chance.random() < 0.5,
            )
            for _ in range(chance.choice((0, 1, 2, 2, 3)))
        )

    disagreements = [
        (one, other)
        for one, other in ((any_stack(), any_stack()) for _ in range(600))
        if judged(one, other) != tried(one, other, free_events=3)
    ]
    assert disagreements == []


def count(outcome: str, **rest: object) -> int:
    """Of how many of the 81 ordered pairs of such NATs this is judged."""
    nats = nine(**rest)
    return sum(judged((one,), (other,)) == outcome for one, other in product(nats, repeat=2))


def test_as_many_pairs_must_be_direct_as_counted_by_hand_and_in_the_document() -> None:
    eim_with_eim = 9
    eim_with_others = 2 * (2 * 6)  # the EIM side must not filter by port
    others = 4 * 4 - 2 * 2  # nor may these, nor may both be APDM
    assert count("always") == eim_with_eim + eim_with_others + others == 45
    assert count("always", reply_binding=True) == 81 - 2 * 2  # neither hears the other
    assert count("always", filters_per="mapping") == 42
    assert count("always", filters_per="mapping", reply_binding=True) == 57
    assert count("always", inbound_binding=True) == 30
    assert count("sometimes", inbound_binding=True) == 15


@pytest.mark.parametrize(
    ("one", "other", "path"),
    [
        (Side(), Side(nats=(HARD,)), "direct"),
        (Side(nats=(EASY,)), Side(nats=(EASY,)), "direct"),
        (Side(nats=(EASY,)), Side(nats=(HARD,)), "relayed"),
        (Side(nats=(Nat(filtering=ADM),)), Side(nats=(HARD,)), "direct"),
        (Side(nats=(HARD,)), Side(nats=(HARD,)), "relayed"),
        (Side(nats=(EASY, EASY)), Side(nats=(EASY,)), "direct"),
        (Side(nats=(EASY, HARD)), Side(nats=(EASY,)), "relayed"),
        (Side(nats=(HARD,), ipv6=True), Side(nats=(HARD,), ipv6=True), "direct"),
        (Side(nats=(HARD,), ipv6=True), Side(nats=(HARD,)), "relayed"),
        (Side(udp="relays"), Side(), "relayed"),
        (Side(udp="blocked"), Side(), "relayed"),
        (Side(udp="blocked", ipv6=True), Side(ipv6=True), "relayed"),
    ],
)
def test_known_pairs(one: Side, other: Side, path: str) -> None:
    assert judge(one, other).path == judge(other, one).path == path


def test_without_a_relay_that_can_be_reached_there_is_no_path() -> None:
    hard, blocked = Side(nats=(HARD,)), Side(udp="blocked")
    assert judge(hard, hard, relay_transports=()).path == "none"
    assert judge(hard, hard, relay_transports=("udp",)).path == "relayed"
    assert judge(blocked, Side(), relay_transports=("udp",)).path == "none"
    assert judge(blocked, Side(), relay_transports=("stream",)).path == "relayed"
    assert judge(Side(udp="relays"), Side(), relay_transports=("udp",)).path == "relayed"


@pytest.mark.parametrize(
    ("hairpinning", "path"),
    [("none", "relayed"), ("internal_source", "relayed"), ("external_source", "direct")],
)
def test_behind_one_carrier_grade_nat_it_has_to_hairpin(hairpinning: str, path: str) -> None:
    carrier = Nat(hairpinning=hairpinning)  # type: ignore[arg-type]
    one, other = Side(nats=(EASY, carrier)), Side(nats=(Nat(filtering=EIM), carrier))
    assert judge(one, other, shared_nats=1).path == path
    assert judge(one, other, shared_nats=1, same_lan=True).path == "direct"


def test_what_is_said_to_be_shared_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="in one way"):
        judge(Side(nats=(EASY,)), Side(nats=(HARD,)), shared_nats=1)
    with pytest.raises(ValueError, match="cannot be shared"):
        judge(Side(), Side(nats=(HARD,)), shared_nats=1)


def test_guessing_ports_helps_an_easy_nat_with_a_hard_one_only() -> None:
    easy, hard = Side(nats=(EASY,)), Side(nats=(HARD,))
    counting = Side(nats=(Nat(mapping=APDM, filtering=APDM, ports="sequential"),))
    probing, predicting = Abilities(birthday_probing=True), Abilities(port_prediction=True)
    assert judge(easy, hard, abilities=probing).path == "direct"
    assert judge(hard, hard, abilities=probing).path == "relayed"
    assert judge(easy, counting, abilities=predicting).path == "direct"
    assert judge(easy, hard, abilities=predicting).path == "relayed"


def test_a_verdict_says_why_and_what_is_left_to_chance() -> None:
    racing = Side(nats=(Nat(inbound_binding=True),))
    verdict = judge(racing, racing)
    assert verdict == Verdict(
        "relayed",
        "a check that comes too early takes the place of a binding; a relay carries it",
        may_be_direct=True,
    )
    assert all(
        judge(Side(nats=(one,)), Side(nats=(other,))).why for one in nine() for other in nine()
    )
