"""Keyed actors: started where their key lives, handed over, taken over, and never two at once."""

from uuid import UUID

import pytest

from runtime.actor import ActorRef, Dead, NamedRef, NodeLost, Unreachable
from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.cluster.keyed import (
    FENCED,
    HAND_OVER_PATIENCE_NS,
    MOVED,
    OVERDUE,
    Locate,
    Located,
    Relinquish,
    keeper_name,
)
from runtime.errors import Refused
from tests.keyed_world import ASK_DEADLINE_NS, KIND, Add, End, Fail, KeyedWorld, finish

FAST_NS = 100 * NS_PER_MS
KEYS = 12


@pytest.fixture
def world() -> KeyedWorld:
    world = KeyedWorld(keys=KEYS)
    for name in "abc":
        world.start(name)
    world.run_for(NS_PER_S)
    return world


def owner(world: KeyedWorld, key: UUID) -> str:
    (name,) = {node.tenure.owner_of(key) for node in world.nodes.values()}
    assert name is not None
    return name


def keys_of(world: KeyedWorld, name: str) -> list[UUID]:
    keys = [key for key in world.keys if owner(world, key) == name]
    assert keys
    return keys


def reasons(world: KeyedWorld, key: UUID) -> list[str]:
    return [reason for each, _, reason in world.ends if each == key]


def warm(world: KeyedWorld) -> None:
    """Have every actor run."""
    world.answered(world.ask_all())


# --- placement and calls -------------------------------------------------------------------------


def test_nothing_runs_that_nobody_asked_for(world: KeyedWorld) -> None:
    assert [world.serving(key) for key in world.keys] == [[]] * KEYS
    ask = Locate(world.keys[0], start=False)
    name = owner(world, world.keys[0])
    assert world.cluster.call("a", NamedRef(keeper_name(KIND), name), ask) == Located(None, True)


def test_an_actor_is_started_on_demand_where_its_key_lives(world: KeyedWorld) -> None:
    asked = world.ask_all()
    world.answered(asked)
    for key in world.keys:
        assert world.serving(key) == [owner(world, key)]
        mine = [each for each in asked if each.key == key]
        assert sorted(each.total for each in mine) == [1, 2, 3], "from every node, one actor"
        assert {each.epoch for each in mine} == {1}
    assert {owner(world, key) for key in world.keys} == set("abc")
    assert max(each.took_ns for each in asked) < FAST_NS
    world.check_orderly()


def test_a_node_that_does_not_have_the_key_says_so(world: KeyedWorld) -> None:
    key = keys_of(world, "a")[0]
    keeper = NamedRef(keeper_name(KIND), "b")
    assert world.cluster.call("a", keeper, Locate(key)) == Located(None, False)
    assert world.serving(key) == []


def test_a_key_that_does_not_exist_is_refused_at_once(world: KeyedWorld) -> None:
    asked = world.ask("a", UUID(int=7))
    world.run_for(FAST_NS)
    with pytest.raises(Dead, match="start failed: NotFound"):
        assert asked.total


def test_who_knows_no_node_yet_waits_and_then_gets_its_answer() -> None:
    world = KeyedWorld(keys=1)
    node = world.start("a")
    node.way.is_cut = True
    early, late = world.ask("a", world.keys[0], deadline_ns=NS_PER_S), world.ask("a", world.keys[0])
    world.run_for(2 * NS_PER_S)
    with pytest.raises(Unreachable, match="nowhere"):
        assert early.total
    node.way.is_cut = False
    world.run_for(3 * NS_PER_S)
    assert late.total == 1


def test_a_keeper_that_is_full_says_so_here_and_there(world: KeyedWorld) -> None:
    from runtime.errors import LimitReached

    for name, error in (("a", LimitReached), ("b", Refused)):
        key = keys_of(world, "a")[0]
        (keeper,) = [
            context._actor
            for context in world.nodes["a"].heap.scheduler._context_by_number.values()
            if context.ref == world.nodes["a"].keeper
        ]
        keeper.limit = 0
        asked = world.ask(name, key)
        world.run_for(FAST_NS)
        assert [type(each) for each in asked.outcomes] == [error]


# --- hand-over -----------------------------------------------------------------------------------


def test_a_node_that_joins_gets_its_keys_and_no_call_is_lost(world: KeyedWorld) -> None:
    warm(world)
    world.start("d")
    asked = world.run_asking(3 * NS_PER_S)
    world.answered(asked)
    world.check_orderly()
    assert keys_of(world, "d")
    for key in world.keys:
        assert world.serving(key) == [owner(world, key)]
        assert reasons(world, key) == ([MOVED] if owner(world, key) == "d" else [])
    assert max(each.took_ns for each in asked) < NS_PER_S // 2
    assert world.crashes == []


def test_a_node_that_drains_gives_all_away_and_no_call_is_lost(world: KeyedWorld) -> None:
    warm(world)
    gone = keys_of(world, "a")
    world.drain("a")
    asked = world.run_asking(3 * NS_PER_S)
    world.answered(asked)
    world.check_orderly()
    for key in world.keys:
        assert world.serving(key) == [owner(world, key)]
        assert owner(world, key) != "a"
        assert reasons(world, key) == ([MOVED] if key in gone else [])
    assert max(each.took_ns for each in asked) < NS_PER_S
    assert world.crashes == []


def test_one_after_the_other_is_replaced_and_no_call_is_lost(world: KeyedWorld) -> None:
    """A rolling restart: drain, leave, end, and a new start."""
    asked = []
    for name in "abc":
        world.drain(name)
        for _ in range(100):
            asked += world.run_asking(20 * NS_PER_MS)
            if not any(world.nodes[name].actor(key) for key in world.keys):
                break
        asked += [world.ask(other, key) for other in "abc" if other != name for key in world.keys]
        world.leave(name)
        world.answered(asked)
        world.kill(name)
        asked += world.run_asking(NS_PER_S // 5)
        world.start(name)
        asked += world.run_asking(2 * NS_PER_S)
    world.answered(asked)
    world.check_orderly()
    assert world.crashes == []
    assert {owner(world, key) for key in world.keys} == set("abc")


def test_the_last_node_that_drains_goes_on(world: KeyedWorld) -> None:
    for name in "abc":
        world.drain(name)
    world.run_for(2 * NS_PER_S)
    world.answered(world.ask_all())
    world.check()


def test_mail_that_is_there_is_answered_before_the_actor_moves(world: KeyedWorld) -> None:
    key = keys_of(world, "a")[0]
    warm(world)
    asked = [world.ask("a", key, takes_ns=100 * NS_PER_MS) for _ in range(8)]
    world.run_for(10 * NS_PER_MS)
    world.drain("a")
    world.answered(asked)
    assert {each.epoch for each in asked} == {1}
    world.answered(world.run_asking(NS_PER_S))
    world.check_orderly()
    assert reasons(world, key) == [MOVED]


def test_a_call_that_is_kept_is_made_again_at_the_next_place(world: KeyedWorld) -> None:
    key = keys_of(world, "a")[0]
    asked = world.ask("b", key, stays=True)
    world.run_for(FAST_NS)
    assert asked.outcomes == []
    world.drain("a")
    world.answered([asked])
    assert asked.epoch == 2
    world.check_orderly()


def test_who_takes_too_long_to_move_is_cut_off_and_the_key_is_served(world: KeyedWorld) -> None:
    key = keys_of(world, "a")[0]
    warm(world)
    stuck = world.ask("a", key, takes_ns=3 * HAND_OVER_PATIENCE_NS, deadline_ns=60 * NS_PER_S)
    behind = world.ask("a", key, deadline_ns=60 * NS_PER_S)
    world.run_for(FAST_NS)
    world.drain("a")
    world.run_for(HAND_OVER_PATIENCE_NS + 2 * NS_PER_S)
    assert reasons(world, key) == [OVERDUE]
    for each in (stuck, behind):
        with pytest.raises(Dead, match=OVERDUE):
            assert each.total, "whether it was handled is not known, so it is not repeated"
    world.answered([world.ask("b", key)])
    world.check()


def test_a_full_mailbox_does_not_keep_an_actor_from_moving(world: KeyedWorld) -> None:
    key = keys_of(world, "a")[0]
    warm(world)
    ref = world.nodes["a"].actor(key)
    assert ref is not None
    world.ask("a", key, takes_ns=NS_PER_S)
    world.run_for(10 * NS_PER_MS)
    while world.nodes["a"].heap.scheduler.cast(ref, Add(UUID(int=len(world.handled)))):
        pass
    world.drain("a")
    world.run_for(NS_PER_S // 2)
    assert world.serving(key) == ["a"]
    world.run_for(2 * NS_PER_S)
    assert reasons(world, key) == [MOVED]
    world.answered([world.ask("b", key)])


def test_an_actor_that_fails_to_prepare_its_move_moves_all_the_same(world: KeyedWorld) -> None:
    key = keys_of(world, "a")[0]
    warm(world)
    world.fail_to_move.add(key)
    world.drain("a")
    asked = world.run_asking(NS_PER_S)
    world.answered(asked)
    assert reasons(world, key) == [MOVED]
    assert world.crashes == []
    world.check_orderly()


def test_a_key_that_comes_back_while_it_moves_is_served(world: KeyedWorld) -> None:
    world.move_takes_ns = NS_PER_S
    warm(world)
    world.start("d")
    world.run_for(FAST_NS)
    coming = keys_of(world, "d")
    asked = [world.ask("a", key, deadline_ns=20 * NS_PER_S) for key in coming]
    world.run_for(FAST_NS)
    world.kill("d")
    asked += world.run_asking(3 * NS_PER_S)
    world.cluster.run_until(lambda: all(each.outcomes for each in asked), 20 * NS_PER_S)
    for each in asked:  # who waited for the new owner when that was killed cannot know
        (outcome,) = each.outcomes
        assert each.is_answered or type(outcome) is NodeLost or each.node == "d"
    for key in coming:
        assert world.serving(key) == [owner(world, key)] != ["d"]
    world.check_orderly()


# --- leases that are left over --------------------------------------------------------------------


def test_a_crashed_actor_comes_up_again_with_all_that_was_acknowledged(world: KeyedWorld) -> None:
    warm(world)
    key = keys_of(world, "a")[0]
    world.cast(key, Fail())
    world.run_for(FAST_NS)
    assert world.serving(key) == []
    (asked,) = mine = [world.ask("b", key)]
    world.answered(mine)
    assert (asked.total, asked.epoch) == (4, 2)
    world.check_orderly()


@pytest.mark.parametrize("after_ns", [0, 1, 10, 100, 500])
def test_an_actor_that_crashes_while_it_moves_leaves_no_lease_behind(
    world: KeyedWorld, after_ns: int
) -> None:
    world.move_takes_ns = NS_PER_S // 4
    warm(world)
    gone = keys_of(world, "a")
    for key in gone:
        world.ask("a", key, takes_ns=NS_PER_S // 10)
    world.run_for(5 * NS_PER_MS)
    world.drain("a")
    world.run_for(after_ns * NS_PER_MS)
    for key in gone:
        world.cast(key, Fail())
    world.run_for(NS_PER_S // 2)
    world.answered([world.ask("b", key) for key in gone])
    world.check_orderly()


def test_a_lease_without_an_actor_is_given_up_to_who_asks(world: KeyedWorld) -> None:
    warm(world)
    gone = keys_of(world, "a")
    for key in gone:
        world.cast(key, Fail())
    world.run_for(FAST_NS)
    world.drain("a")
    world.run_for(NS_PER_S)
    asked = [world.ask("b", key) for key in gone]
    world.answered(asked)
    assert max(each.took_ns for each in asked) < NS_PER_S // 2
    world.check_orderly()


def test_nobody_takes_a_key_that_by_its_owners_view_is_its_own(world: KeyedWorld) -> None:
    warm(world)
    key = keys_of(world, "a")[0]
    for claimed in ("a", "b", "nobody"):
        world.nodes["b"].heap.scheduler.cast(
            NamedRef(keeper_name(KIND), "a"), Relinquish(key, claimed)
        )
    world.run_for(NS_PER_S)
    assert world.serving(key) == ["a"]
    assert reasons(world, key) == []
    (asked,) = mine = [world.ask("b", key)]
    world.answered(mine)
    assert asked.epoch == 1, "the lease is still its own"


def test_an_actor_that_was_idle_gives_up_its_lease(world: KeyedWorld) -> None:
    warm(world)
    key = keys_of(world, "a")[0]
    world.cast(key, End())
    world.run_for(FAST_NS)
    assert world.serving(key) == []
    assert reasons(world, key) == ["normal"]
    join = world.nodes["b"].tenure
    epoch = finish(world.store.acquire(key, owner="b", incarnation=join.incarnation))
    assert epoch == 2, "nobody holds it"
    finish(world.store.release(key, owner="b", incarnation=join.incarnation))
    world.answered([world.ask("c", key)])


def test_calls_go_on_while_an_idle_actor_ends(world: KeyedWorld) -> None:
    asked = []
    for _ in range(50):
        for key in world.keys:
            world.cast(key, End())
        asked += world.run_asking(20 * NS_PER_MS, NS_PER_MS)
    world.answered(asked)
    world.check_orderly()


def test_a_keeper_that_ends_takes_its_actors_along_and_all_is_served_again(
    world: KeyedWorld,
) -> None:
    warm(world)
    world.nodes["a"].heap.scheduler.stop(world.nodes["a"].keeper, "crashed: on purpose")
    world.run_for(10 * NS_PER_MS)
    assert not any(world.nodes["a"].actor(key) for key in world.keys)
    asked = world.ask_all()
    world.answered(asked)
    assert max(each.took_ns for each in asked) < FAST_NS
    world.check_orderly()


def test_keys_that_move_while_there_is_no_keeper_are_served_elsewhere(world: KeyedWorld) -> None:
    warm(world)
    gone = keys_of(world, "a")
    world.nodes["a"].heap.scheduler.stop(world.nodes["a"].keeper, "crashed: on purpose")
    world.drain("a")
    world.run_for(NS_PER_S)
    world.answered([world.ask("b", key) for key in gone])
    world.check_orderly()


# --- death ----------------------------------------------------------------------------------------


def test_the_keys_of_a_killed_node_are_served_long_before_its_lease_ends(
    world: KeyedWorld,
) -> None:
    warm(world)
    gone = keys_of(world, "b")
    world.kill("b")
    asked = [world.ask(name, key) for key in gone for name in "ac"]
    world.answered(asked)
    assert max(each.took_ns for each in asked) < NS_PER_S // 2
    assert {each.epoch for each in asked} == {2}
    world.check()


def test_a_call_that_a_killed_node_may_have_handled_is_not_repeated(world: KeyedWorld) -> None:
    key = keys_of(world, "b")[0]
    asked = world.ask("a", key, takes_ns=NS_PER_S)
    world.run_for(FAST_NS)
    world.kill("b")
    world.run_for(NS_PER_S)
    assert [type(each).__name__ for each in asked.outcomes] == ["NodeLost"]
    world.check()


def test_the_keys_of_a_stopped_node_are_served_when_its_lease_has_ended(
    world: KeyedWorld,
) -> None:
    warm(world)
    gone = keys_of(world, "b")
    world.cluster.stop("b")
    asked = [world.ask("a", key, deadline_ns=20 * NS_PER_S) for key in gone]
    world.run_for(2 * NS_PER_S)
    assert not any(each.is_answered for each in asked)
    world.run_for(3 * NS_PER_S)
    later = [world.ask("a", key) for key in gone]
    world.answered(later)
    world.check()

    world.cluster.resume("b")
    world.run_for(NS_PER_S)
    for key in gone:
        assert reasons(world, key)[0] == FENCED
    assert world.nodes["b"].tenure.incarnation > 3
    assert keys_of(world, "b") == gone
    world.answered(world.ask_all())
    for key in gone:
        assert world.serving(key) == ["b"]
    assert not [crash for crash in world.crashes if "Fenced" in crash], "nobody had to find out"
    world.check()


def test_what_a_resumed_node_was_about_to_write_is_refused(world: KeyedWorld) -> None:
    key = keys_of(world, "b")[0]
    world.answered([world.ask("a", key)])
    world.ask("b", key, takes_ns=NS_PER_S // 2)
    world.run_for(FAST_NS)
    world.cluster.stop("b")
    world.run_for(5 * NS_PER_S)
    world.answered([world.ask("a", key)])
    world.cluster.resume("b")
    world.run_for(3 * NS_PER_S)
    assert [epoch for epoch, _ in world.accepted[key]] == [1, 2]
    world.check()


def test_a_node_that_was_expelled_though_it_lives_gives_up_all(world: KeyedWorld) -> None:
    warm(world)
    gone = keys_of(world, "b")
    finish(world.store.expel_node("b", world.nodes["b"].tenure.incarnation))
    asked = world.run_asking(3 * NS_PER_S)
    world.run_for(ASK_DEADLINE_NS)
    assert sum(not each.is_answered for each in asked) <= 3
    for key in gone:
        assert FENCED in reasons(world, key)
    world.answered(world.ask_all())
    world.check()


def test_a_node_whose_name_is_taken_ends_its_actors(world: KeyedWorld) -> None:
    warm(world)
    gone = keys_of(world, "b")
    finish(
        world.store.join_node(
            "b", link_address="b:9", door_address="b:9", version="1", ttl_ns=3 * NS_PER_S
        )
    )
    world.run_for(NS_PER_S)
    for key in gone:
        assert reasons(world, key) == [FENCED]
        assert world.nodes["b"].actor(key) is None


# --- partitions and the store ---------------------------------------------------------------------


def test_parted_nodes_agree_on_who_owns_what(world: KeyedWorld) -> None:
    warm(world)
    world.part("a", "b")
    world.run_for(5 * NS_PER_S)
    asked = {name: [world.ask(name, key) for key in world.keys] for name in "abc"}
    world.run_for(2 * ASK_DEADLINE_NS)
    for each in [*asked["a"], *asked["b"], *asked["c"]]:
        if {each.node, owner(world, each.key)} == {"a", "b"}:
            assert [type(outcome) for outcome in each.outcomes] == [Unreachable]
        else:
            assert each.epoch == 1, "nothing had to move"
    world.heal("a", "b")
    world.answered(world.ask_all())
    world.check_orderly()


def test_without_the_store_nothing_is_decided_and_then_all_goes_on(world: KeyedWorld) -> None:
    """All of them, for a minute: nobody could take anything, so all actors are the same after."""
    warm(world)
    refs = {key: world.nodes[owner(world, key)].actor(key) for key in world.keys}
    for node in world.nodes.values():
        node.way.is_cut = True
    world.run_for(60 * NS_PER_S)
    handled = len(world.handled)
    asked = world.ask_all()
    world.run_for(2 * ASK_DEADLINE_NS)
    assert not any(each.is_answered for each in asked)
    assert len(world.handled) == handled
    for node in world.nodes.values():
        node.way.is_cut = False
    world.run_for(5 * NS_PER_S)
    world.answered(world.ask_all())
    assert sum(world.nodes[owner(world, key)].actor(key) == refs[key] for key in world.keys) >= 1
    world.check()


def test_a_node_without_the_store_decides_nothing_and_its_keys_go_elsewhere(
    world: KeyedWorld,
) -> None:
    warm(world)
    gone = keys_of(world, "b")
    world.nodes["b"].way.is_cut = True
    world.run_for(3500 * NS_PER_MS)
    handled = len(world.handled)
    lapsed = [world.ask("b", key) for key in gone]
    world.run_for(FAST_NS)
    assert not world.nodes["b"].holds()
    assert not [each for each in lapsed if each.is_answered and each.epoch == 1]
    assert all(epoch == 2 for _, epoch, _ in world.handled[handled:])
    world.run_for(NS_PER_S)
    world.answered([world.ask("a", key) for key in gone])
    world.nodes["b"].way.is_cut = False
    world.run_for(5 * NS_PER_S)
    world.answered(world.ask_all())
    for key in gone:
        assert FENCED in reasons(world, key)
        assert world.serving(key) == ["b"]
    world.check()


def test_a_short_outage_is_waited_for(world: KeyedWorld) -> None:
    """A lease that lapsed within a decision's patience: it is decided as soon as it stands."""
    warm(world)
    key = keys_of(world, "b")[0]
    (ref,) = [node.actor(key) for node in world.nodes.values() if node.actor(key)]
    assert isinstance(ref, ActorRef)
    world.cluster.stop("b")
    world.cluster.stop("a")
    world.cluster.stop("c")
    world.run_for(10 * NS_PER_S)
    for name in "abc":
        world.cluster.resume(name)
    asked = world.ask("b", key)
    world.answered([asked])
    assert asked.epoch == 1
    world.check_orderly()
