"""Placement of keys on nodes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from runtime.cluster.placement import (
    MAX_KEY_BYTES,
    MAX_NODES,
    MAX_WEIGHT,
    PlacedNode,
    Placement,
)

KEYS = [f"account-{number}".encode() for number in range(2_000)]

nodes = st.builds(
    PlacedNode,
    name=st.text("abcdefgh-0123456789", min_size=1, max_size=12),
    weight=st.integers(1, 4),
    draining=st.booleans(),
)
clusters = st.lists(nodes, max_size=8, unique_by=lambda node: node.name)
some_keys = st.lists(st.binary(max_size=32), min_size=1, max_size=20, unique=True)


def cluster(*names: str) -> Placement:
    return Placement(PlacedNode(name=name) for name in names)


def test_without_nodes_a_key_lives_nowhere():
    assert Placement().owner(b"key") is None
    assert Placement().ranked(b"key") == ()


def test_known_keys_live_where_they_always_lived():
    """These are part of the protocol between nodes of different versions."""
    view = Placement([PlacedNode(name="a"), PlacedNode(name="b"), PlacedNode(name="c", weight=3)])
    assert [view.owner(key) for key in KEYS[:12]] == list("babcaccabbac")


def test_another_process_places_alike():
    program = (
        "from runtime.cluster.placement import *;"
        "view = Placement(PlacedNode(name=n, weight=w) for n, w in [('a', 1), ('b', 2), ('c', 1)]);"
        "print(''.join(view.owner(f'account-{i}'.encode()) for i in range(200)))"
    )
    root = Path(__file__).parents[3]
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root
    )
    shares = (("c", 1), ("a", 1), ("b", 2))
    view = Placement(PlacedNode(name=name, weight=weight) for name, weight in shares)
    assert run.stdout.strip() == "".join(str(view.owner(key)) for key in KEYS[:200])


@given(clusters, some_keys)
def test_the_owner_is_first_of_the_ranked_and_order_of_naming_does_not_matter(
    cluster: list[PlacedNode], keys: list[bytes]
):
    view = Placement(cluster)
    assert Placement(reversed(cluster)) == view
    for key in keys:
        ranked = view.ranked(key)
        assert view.owner(key) == (ranked[0] if ranked else None)
        takers = [node for node in cluster if not node.draining] or cluster
        assert sorted(ranked) == sorted(node.name for node in takers)


@given(clusters, nodes, some_keys)
def test_a_node_that_comes_takes_only_what_becomes_its_own(
    cluster: list[PlacedNode], new: PlacedNode, keys: list[bytes]
):
    assume(new.name not in {node.name for node in cluster})
    assume(any(not node.draining for node in cluster))
    before, after = Placement(cluster), Placement([*cluster, new])
    for _, owner in before.moved(after, keys).values():
        assert owner == new.name
        assert not new.draining


@given(clusters, some_keys, st.data())
def test_a_node_that_goes_or_drains_gives_its_keys_to_the_next_in_rank_and_moves_no_other(
    cluster: list[PlacedNode], keys: list[bytes], data: st.DataObject
):
    takers = [node for node in cluster if not node.draining]
    assume(len(takers) >= 2)
    going = data.draw(st.sampled_from(takers))
    rest = [node for node in cluster if node != going]
    before = Placement(cluster)
    for after in (Placement(rest), Placement([*rest, attrs.evolve(going, draining=True)])):
        for key in keys:
            ranked = before.ranked(key)
            expected = ranked[1] if ranked[0] == going.name else ranked[0]
            assert after.owner(key) == expected


@given(clusters, some_keys, st.data())
def test_more_weight_draws_keys_only_to_its_node(
    cluster: list[PlacedNode], keys: list[bytes], data: st.DataObject
):
    assume(cluster)
    heavier = data.draw(st.sampled_from(cluster))
    evolved = attrs.evolve(heavier, weight=heavier.weight + 1)
    after = Placement(evolved if node == heavier else node for node in cluster)
    moved = Placement(cluster).moved(after, keys)
    assert {owner for _, owner in moved.values()} <= {heavier.name}


def test_keys_are_spread_by_weight():
    view = Placement([PlacedNode(name="one"), PlacedNode(name="three", weight=3)])
    share = sum(view.owner(key) == "three" for key in KEYS) / len(KEYS)
    assert 0.70 < share < 0.80
    even = cluster("a", "b", "c", "d")
    counts = [sum(even.owner(key) == name for key in KEYS) for name in "abcd"]
    assert all(400 < count < 600 for count in counts)


def test_when_all_drain_keys_still_live_somewhere():
    view = Placement([PlacedNode(name="a", draining=True), PlacedNode(name="b", draining=True)])
    assert {view.owner(key) for key in KEYS} == {"a", "b"}


def test_limits():
    with pytest.raises(ValueError, match="weight"):
        PlacedNode(name="a", weight=MAX_WEIGHT + 1)
    with pytest.raises(ValueError, match="name"):
        PlacedNode(name="")
    with pytest.raises(ValueError, match="one name"):
        cluster("a", "a")
    with pytest.raises(ValueError, match="at most"):
        cluster(*(f"n{number}" for number in range(MAX_NODES + 1)))
    with pytest.raises(ValueError, match="key"):
        cluster("a").owner(bytes(MAX_KEY_BYTES + 1))
