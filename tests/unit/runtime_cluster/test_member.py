"""A node stays a member of its cluster: its lease, and the lives and deaths of others."""

from typing import Any

import pytest

from actors.store.interface import Unavailable
from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.cluster.leases import MAX_NODE_LEASE_NS
from runtime.cluster.member import MEMBER, AskMember, LeaseSettings, Leave, MemberStatistics
from runtime.cluster.placement import MAX_NODES
from tests.keyed_world import KeyedWorld, finish


@pytest.fixture
def world() -> KeyedWorld:
    world = KeyedWorld(keys=0)
    for name in "abc":
        world.start(name)
    world.run_for(NS_PER_S)
    return world


def statistics(world: KeyedWorld, name: str) -> MemberStatistics:
    member = world.nodes[name].cluster.member
    assert member is not None
    answer = world.cluster.call(name, member, AskMember())
    assert isinstance(answer, MemberStatistics)
    return answer


def seen(world: KeyedWorld, name: str) -> list[str]:
    return [row.name for row in world.nodes[name].tenure.rows]


def join_as(world: KeyedWorld, name: str, **named: Any) -> int:
    addresses = {"link_address": "z:1", "door_address": "z:2", "version": "test"}
    incarnation: int = finish(
        world.store.join_node(name, **addresses, ttl_ns=3 * NS_PER_S, **named)
    )
    return incarnation


def test_a_lease_that_could_not_be_renewed_twice_in_its_time_is_refused() -> None:
    LeaseSettings(ttl_ns=10, renewal_ns=5)
    for ttl_ns, renewal_ns in ((10, 6), (10, 0), (0, 0)):
        with pytest.raises(ValueError, match="twice"):
            LeaseSettings(ttl_ns=ttl_ns, renewal_ns=renewal_ns)


def test_each_node_renews_twice_a_second_and_sees_all(world: KeyedWorld) -> None:
    before = statistics(world, "a")
    world.run_for(10 * NS_PER_S)
    after = statistics(world, "a")
    assert 18 <= after.renewals - before.renewals <= 20
    assert after.renewals_failed == 0
    for name in "abc":
        assert seen(world, name) == ["a", "b", "c"]
        assert world.nodes[name].holds()


def test_who_joins_is_known_as_soon_as_there_is_a_link(world: KeyedWorld) -> None:
    world.run_for(NS_PER_S // 5)  # long before the next renewal of the others
    world.start("d")
    world.run_for(30 * NS_PER_MS)
    assert [seen(world, name) for name in "abcd"] == [["a", "b", "c", "d"]] * 4


def test_who_was_killed_is_expelled_long_before_its_lease_ends(world: KeyedWorld) -> None:
    world.kill("b")
    world.run_for(100 * NS_PER_MS)
    assert seen(world, "a") == seen(world, "c") == ["a", "c"]
    assert statistics(world, "a").expelled == 1


def test_who_was_stopped_is_given_up_when_its_lease_has_ended(world: KeyedWorld) -> None:
    world.cluster.stop("b")
    world.run_for(2 * NS_PER_S)
    assert seen(world, "a") == ["a", "b", "c"]
    world.run_for(2 * NS_PER_S)
    assert seen(world, "a") == ["a", "c"]
    assert statistics(world, "a").expelled == 0


def test_who_comes_back_with_nothing_taken_over_goes_on(world: KeyedWorld) -> None:
    incarnation = world.nodes["b"].tenure.incarnation
    world.cluster.stop("b")
    world.run_for(10 * NS_PER_S)
    assert not world.nodes["b"].holds()
    world.cluster.resume("b")
    world.run_for(NS_PER_S)
    assert world.nodes["b"].holds()
    assert world.nodes["b"].tenure.incarnation == incarnation
    assert seen(world, "a") == ["a", "b", "c"]


def test_who_was_given_up_begins_anew(world: KeyedWorld) -> None:
    tenure = world.nodes["b"].tenure
    before = tenure.incarnation
    finish(world.store.expel_node("b", before))
    world.run_for(NS_PER_S)
    assert tenure.incarnation > before
    assert world.nodes["b"].holds()
    assert statistics(world, "b").tenures == 1
    for name in "abc":
        row = world.nodes[name].tenure.row("b")
        assert row is not None
        assert row.incarnation == tenure.incarnation


def test_a_parted_node_is_not_given_up_by_those_that_do_not_reach_it(world: KeyedWorld) -> None:
    world.part("a", "b")
    world.run_for(20 * NS_PER_S)
    assert not world.cluster.is_linked("a", "b")
    assert [seen(world, name) for name in "abc"] == [["a", "b", "c"]] * 3
    assert [statistics(world, name).tenures for name in "abc"] == [0, 0, 0]


def test_a_node_without_the_store_loses_its_lease_and_gets_it_back(world: KeyedWorld) -> None:
    world.nodes["b"].way.is_cut = True
    world.run_for(5 * NS_PER_S)
    assert not world.nodes["b"].holds()
    assert seen(world, "a") == ["a", "c"]
    assert statistics(world, "b").renewals_failed > 1
    world.nodes["b"].way.is_cut = False
    world.run_for(3 * NS_PER_S)
    assert world.nodes["b"].holds()
    assert seen(world, "a") == ["a", "b", "c"]


def test_one_lost_request_costs_no_lease(world: KeyedWorld) -> None:
    """Nothing comes back for as long as one waits for it; the next is in time."""
    world.store_delay_ns = (MAX_NODE_LEASE_NS, MAX_NODE_LEASE_NS)
    world.run_for(NS_PER_S // 2)
    world.store_delay_ns = (NS_PER_MS, NS_PER_MS)
    for _ in range(400):
        world.run_for(10 * NS_PER_MS)
        assert all(node.holds() for node in world.nodes.values())


def test_a_node_whose_name_is_taken_is_over(world: KeyedWorld) -> None:
    join_as(world, "b")
    world.run_for(NS_PER_S)
    tenure = world.nodes["b"].tenure
    assert tenure.is_superseded
    assert not world.nodes["b"].holds()
    renewals = statistics(world, "b").renewals
    world.run_for(5 * NS_PER_S)
    assert tenure.is_superseded
    assert statistics(world, "b").renewals == renewals


def test_a_node_is_not_superseded_by_its_own_return(world: KeyedWorld) -> None:
    """It joined anew, and the answer to that got lost."""
    node = world.nodes["b"]
    finish(world.store.expel_node("b", node.tenure.incarnation))
    expelled = node.tenure.incarnation

    def has_rejoined() -> bool:
        (row,) = [each for each in finish(world.store.nodes()) if each.name == "b"]
        return bool(row.incarnation > expelled)

    assert world.cluster.run_until(has_rejoined, NS_PER_S)
    assert node.tenure.incarnation == expelled, "the answer is under way"
    node.way.is_cut = True
    world.run_for(5 * NS_PER_S)
    node.way.is_cut = False
    world.run_for(3 * NS_PER_S)
    assert not node.tenure.is_superseded
    assert node.holds()
    assert seen(world, "a") == ["a", "b", "c"]


def test_a_full_cluster_keeps_nobody_from_trying_again() -> None:
    world = KeyedWorld(keys=0)
    node = world.start("a")
    world.run_for(NS_PER_S)
    finish(world.store.leave_node("a", node.tenure.incarnation))
    others = [(f"n{number}", join_as(world, f"n{number}")) for number in range(MAX_NODES)]
    for _ in range(20):  # more tries than a supervisor would take for chance
        for name, incarnation in others:
            finish(world.store.renew_node(name, incarnation, draining=False, ttl_ns=3 * NS_PER_S))
        world.run_for(NS_PER_S)
    assert not node.holds()
    finish(world.store.leave_node(*others[0]))
    world.run_for(NS_PER_S)
    assert node.holds()
    assert world.crashes == []


def test_a_member_that_crashed_goes_on_as_before(world: KeyedWorld) -> None:
    world.drain("b")
    world.run_for(NS_PER_S)
    member = world.nodes["b"].cluster.member
    assert member is not None
    world.nodes["b"].heap.scheduler.stop(member, "crashed: on purpose")
    world.run_for(NS_PER_S)
    assert world.nodes["b"].cluster.member not in (None, member)
    assert world.nodes["b"].holds()
    row = world.nodes["a"].tenure.row("b")
    assert row is not None
    assert row.draining, "it still drains"


def test_who_has_left_does_not_return(world: KeyedWorld) -> None:
    world.leave("b")
    world.run_for(NS_PER_S)
    assert seen(world, "a") == ["a", "c"]
    assert not world.nodes["b"].holds()
    member = world.nodes["b"].cluster.member
    assert member is not None
    world.nodes["b"].heap.scheduler.stop(member, "crashed: on purpose")
    world.run_for(5 * NS_PER_S)
    assert seen(world, "a") == ["a", "c"]
    assert statistics(world, "a").expelled == 0


def test_who_cannot_say_farewell_is_told_so_and_leaves_all_the_same(world: KeyedWorld) -> None:
    world.nodes["b"].way.is_cut = True
    member = world.nodes["b"].heap.scheduler.registry.whereis(MEMBER)
    assert member is not None
    with pytest.raises(Unavailable):
        world.cluster.call("b", member, Leave())
    assert world.crashes == []
    world.nodes["b"].way.is_cut = False
    world.run_for(4 * NS_PER_S)
    assert seen(world, "a") == ["a", "c"], "the lease has run out"
