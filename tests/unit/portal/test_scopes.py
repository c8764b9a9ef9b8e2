"""What scopes cover, and what entity tags match: pure rules of the API."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from litestar.routes import HTTPRoute

from actors.model import Scope
from portal.api.application import NOUNS
from portal.api.limits import TokenBuckets
from portal.api.preconditions import NotModified, Preconditions, tag_of
from portal.api.problems import Problem
from portal.api.scopes import allows, exceeding, scope_of

NAMES = ("sites", "policies", "*")
SCOPES = [f"{name}:{verb}" for name in NAMES for verb in ("read", "write")]


def reading(scopes: list[str], needed: str) -> bool:
    """The rule, read slowly: every call that the needed scope stands for is covered."""
    nouns = ("sites", "policies") if needed.startswith("*") else (needed.split(":")[0],)
    wide = [scope for scope in scopes if scope.startswith("*")]
    held = wide if needed.startswith("*") else scopes
    return all(
        any(
            scope.split(":")[0] in (noun, "*")
            and scope.split(":")[1] in (needed.split(":")[1], "write")
            for scope in held
        )
        for noun in nouns
    )


@given(st.lists(st.sampled_from(SCOPES)), st.sampled_from(SCOPES))
def test_a_scope_is_covered_by_its_own_noun_or_all_and_writing_includes_reading(
    scopes: list[str], needed: str
) -> None:
    assert allows(scopes, needed) == reading(scopes, needed)


@given(st.lists(st.sampled_from(SCOPES)), st.lists(st.sampled_from(SCOPES)))
def test_what_does_not_exceed_lets_nobody_do_more(scopes: list[str], held: list[str]) -> None:
    if not exceeding(scopes, held):
        for needed in SCOPES:
            assert not allows(scopes, needed) or allows(held, needed)


def test_every_route_of_every_noun_has_one_scope_that_a_token_can_have() -> None:
    pattern = next(each.pattern for each in get_args(Scope) if hasattr(each, "pattern"))
    tried = 0
    for noun in NOUNS:
        for route in noun.router.routes:
            assert isinstance(route, HTTPRoute)
            for handler in route.route_handlers:
                opt: dict[str, Any] = dict(noun.router.opt) | handler.opt
                bound = SimpleNamespace(opt=opt, http_methods=handler.http_methods)
                needed = scope_of(bound)  # type: ignore[arg-type]  # it has what is read
                if handler.http_methods == {"OPTIONS"}:
                    continue
                assert needed is not None
                assert re.match(pattern, needed), needed
                writes = not handler.http_methods <= {"GET"} and "verb" not in opt
                assert needed.endswith(":write") == writes
                tried += 1
    assert tried >= 80


TAGS = st.text("ab.", min_size=1, max_size=4)


@given(TAGS, TAGS, st.booleans())
def test_if_match_compares_strongly_and_if_none_match_weakly(
    tag: str, given_tag: str, weak: bool
) -> None:
    text = f'{"W/" if weak else ""}"{given_tag}"'
    same_state = tag.partition(".")[0] == given_tag.partition(".")[0]
    matching = Preconditions.of({"if-match": text})
    if same_state and not weak:
        matching.check(tag, is_read=False)
    else:
        with pytest.raises(Problem) as refused:
            matching.check(tag, is_read=False)
        assert refused.value.status == 412
    none_matching = Preconditions.of({"if-none-match": text})
    if tag == given_tag:
        with pytest.raises(NotModified):
            none_matching.check(tag, is_read=True)
        with pytest.raises(Problem):
            none_matching.check(tag, is_read=False)
    else:
        none_matching.check(tag, is_read=True)


@given(st.text(max_size=30))
def test_no_header_is_answered_by_a_defect(text: str) -> None:
    for name in ("if-match", "if-none-match"):
        try:
            Preconditions.of({name: text})
        except Problem as refused:
            assert refused.status == 400  # noqa: PT017  # either is right


def test_a_tag_tells_states_and_moments_apart() -> None:
    assert tag_of({"a": 1}) == tag_of({"a": 1})
    assert tag_of({"a": 1}) != tag_of({"a": 2})
    assert tag_of({"a": 1}, "now") != tag_of({"a": 1}, "then")
    assert tag_of({"a": 1}, "now").partition(".")[0] == tag_of({"a": 1})
    assert "." not in tag_of({"a": 1})


@given(st.lists(st.integers(0, 5 * 10**9), max_size=30))
def test_what_is_left_is_what_can_be_taken(waits: list[int]) -> None:
    buckets = TokenBuckets(rate_per_s=2, burst=4)
    now = 0
    for wait in waits:
        now += wait
        left = buckets.left("k", now)
        assert 0 <= left <= 4
        assert (buckets.wait_ns("k", now) == 0) == (left > 0)
        full_in = buckets.full_in_ns("k", now)
        assert buckets.left("k", now + full_in) == 4
        if left:
            assert buckets.take("k", now) == 0
            assert buckets.left("k", now) == left - 1
