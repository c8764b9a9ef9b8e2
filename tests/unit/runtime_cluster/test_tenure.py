"""What a node knows of the others and may do itself."""

from uuid import UUID

import attrs

from runtime.cluster.leases import NodeRow
from runtime.cluster.tenure import Tenure

KEYS = [UUID(int=number) for number in range(200)]


def row(name: str, *, incarnation: int = 1, draining: bool = False, left_ns: int = 9) -> NodeRow:
    return NodeRow(
        name=name,
        incarnation=incarnation,
        link_address=f"{name}:1",
        door_address=f"{name}:2",
        version="1",
        draining=draining,
        remaining_ns=left_ns,
    )


def test_before_the_first_renewal_nothing_is_known_and_nothing_allowed() -> None:
    tenure = Tenure("a", 1)
    assert not tenure.holds(0)
    assert tenure.owner_of(KEYS[0]) is None
    assert not tenure.is_ours(KEYS[0])
    assert tenure.doors() == ()


def test_a_lease_holds_up_to_its_end() -> None:
    tenure = Tenure("a", 1)
    tenure.renewed((row("a"),), 100)
    assert tenure.holds(99)
    assert not tenure.holds(100)
    tenure.renewed((row("a"),), 200)
    assert tenure.holds(199)
    tenure.was_lost()
    assert not tenure.holds(0)


def test_a_new_tenure_has_no_lease_before_its_first_renewal() -> None:
    tenure = Tenure("a", 1)
    tenure.renewed((row("a"),), 100)
    tenure.began_anew(7)
    assert tenure.incarnation == 7
    assert not tenure.holds(50)
    assert tenure.renewed((row("a", incarnation=7),), 100), "others have to know"
    assert tenure.holds(50)


def test_only_what_others_act_on_is_a_change() -> None:
    tenure = Tenure("a", 1)
    rows = (row("a"), row("b"))
    assert tenure.renewed(rows, 100)
    assert not tenure.renewed(tuple(attrs.evolve(each, remaining_ns=1) for each in rows), 200)
    for changed in (
        row("b", incarnation=2),
        row("b", draining=True),
        attrs.evolve(row("b"), link_address="b:7"),
        attrs.evolve(row("b"), door_address="b:8"),
        row("b", left_ns=0),
    ):
        assert tenure.renewed((row("a"), changed), 300), changed
        assert tenure.renewed(rows, 400)


def test_the_dead_are_not_seen() -> None:
    tenure = Tenure("a", 1)
    tenure.renewed((row("a"), row("b", left_ns=0), row("c")), 100)
    assert [each.name for each in tenure.rows] == ["a", "c"]
    assert tenure.row("b") is None
    assert tenure.row("c") == row("c")
    assert {tenure.owner_of(key) for key in KEYS} == {"a", "c"}


def test_who_drains_gets_no_key_and_no_newcomer() -> None:
    tenure = Tenure("a", 1)
    tenure.renewed((row("a"), row("b", draining=True), row("c")), 100)
    assert {tenure.owner_of(key) for key in KEYS} == {"a", "c"}
    assert tenure.doors() == ("a:2", "c:2")


def test_all_nodes_with_the_same_rows_agree() -> None:
    rows = (row("a"), row("b"), row("c"))
    tenures = [Tenure(name, 1) for name in "abc"]
    for tenure in tenures:
        tenure.renewed(rows, 100)
    for key in KEYS:
        (owner,) = {tenure.owner_of(key) for tenure in tenures}
        assert [tenure.is_ours(key) for tenure in tenures] == [owner == name for name in "abc"]
