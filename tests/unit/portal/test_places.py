"""Who gets one of a door's places, and who gives his up for it."""

from __future__ import annotations

from collections import Counter

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portal.places import Bounds, NoPlace, make_place


@attrs.define(eq=False)
class Held:
    source: str
    idle: bool = True


sources = st.sampled_from("abcd")
everybody = st.lists(st.builds(Held, source=sources, idle=st.booleans()), max_size=12)


@given(everybody, sources, st.integers(1, 12), st.integers(1, 12))
def test_there_are_never_more_than_the_bounds_say(
    newcomers: list[Held], source: str, in_all: int, per_source: int
) -> None:
    bounds, held = Bounds(in_all, per_source), list[Held]()
    for newcomer in [*newcomers, Held(source)]:
        counts = Counter(each.source for each in held)
        try:
            older = make_place(held, newcomer.source, bounds)
        except NoPlace:
            assert len(held) == in_all or counts[newcomer.source] == per_source
            continue
        if older is not None:
            assert older.idle
            assert older.source == newcomer.source or counts[older.source] == max(counts.values())
            assert counts[older.source] >= counts[newcomer.source]
            held.remove(older)
        else:
            assert len(held) < in_all
        held.append(newcomer)
        assert len(held) <= in_all
        assert max(Counter(each.source for each in held).values()) <= per_source


@given(st.integers(2, 12), st.lists(st.booleans(), min_size=2, max_size=12))
def test_a_source_that_holds_little_gets_a_place_while_another_has_an_idle_one(
    per_source: int, idle: list[bool]
) -> None:
    held = [Held("a", each) for each in idle]
    bounds = Bounds(len(held), max(per_source, len(held)))
    if not any(idle):
        with pytest.raises(NoPlace):
            make_place(held, "b", bounds)
    else:
        assert make_place(held, "b", bounds) is held[idle.index(True)]


def test_whoever_holds_as_many_as_any_displaces_only_himself() -> None:
    held = [Held("a"), Held("b"), Held("a"), Held("b")]
    assert make_place(held, "b", Bounds(4, 4)) is held[1]
    assert make_place(held, "c", Bounds(4, 4)) is held[0]


def test_at_its_own_bound_a_source_displaces_its_oldest_idle_one() -> None:
    held = [Held("b"), Held("a", idle=False), Held("a"), Held("a")]
    assert make_place(held, "a", Bounds(512, 3)) is held[2]
    with pytest.raises(NoPlace):
        make_place([Held("a", idle=False), Held("b")], "a", Bounds(512, 1))
