"""A caller learns at once of everything that is wrong with a body."""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Meta, Struct, UnsetType

from actors.declaration import Declaration
from portal.api.misfits import misfits
from portal.api.policies import PolicyCreate
from portal.api.problems import MAX_FIELD_ERRORS, Problem
from portal.api.requests import decode_body
from portal.api.tokens import TokenCreate

ID = "01a20a28-2cd1-787e-b012-023ea85ce247"


def refused(content: bytes, type_: Any) -> dict[str, str]:
    with pytest.raises(Problem) as caught:
        decode_body(content, type_)
    assert caught.value.status == 422
    return {each.field: each.message for each in caught.value.errors}


def test_every_field_that_does_not_fit_is_named() -> None:
    body = {
        "group_id": "Staff",
        "lease_s": 5,
        "colour": "red",
        "conditions": {
            "remote_ip": {"operator": "is", "values": ["10.0.0.0/8", 7]},
            "current_time": {"windows": [{"day": 9, "ranges": [{"start": "8", "stop": "9"}]}]},
        },
    }
    found = refused(json.dumps(body).encode(), PolicyCreate)
    assert set(found) == {
        "group_id",
        "lease_s",
        "colour",
        "resource_id",
        "conditions.remote_ip.operator",
        "conditions.remote_ip.values[1]",
        "conditions.current_time.zone",
        "conditions.current_time.windows[0].day",
        "conditions.current_time.windows[0].ranges[0].start",
        "conditions.current_time.windows[0].ranges[0].stop",
        "conditions.current_time.windows[0].ranges[0].end",
    }
    assert found["resource_id"] == "is required"
    assert found["colour"] == "is not a field here"
    assert found["lease_s"] == "must be at least 60"


def test_a_list_with_too_many_entries_is_named_itself() -> None:
    body = {"kind": "api", "name": "t", "scopes": []}
    assert refused(json.dumps(body).encode(), TokenCreate) == {
        "scopes": "must have at least 1 entry"
    }


def test_no_more_are_named_than_an_answer_holds() -> None:
    sites = [{"name": ""} for _ in range(10_000)]
    found = refused(json.dumps({"sites": sites}).encode(), Declaration)
    assert len(found) == MAX_FIELD_ERRORS
    assert "sites[99].name" in found


@pytest.mark.parametrize("content", [b"[]", b"7", b"null", b'"x"'])
def test_what_is_no_object_is_wrong_as_a_whole(content: bytes) -> None:
    assert list(refused(content, TokenCreate)) == [""]


@pytest.mark.parametrize("content", [b'{"name": 7, ', b'{"name": 7}}', b"\xff", b"[" * 10_000])
def test_what_is_no_json_is_told_so_wherever_it_stops_to_be(content: bytes) -> None:
    with pytest.raises(Problem) as caught:
        decode_body(content, TokenCreate)
    assert (caught.value.status, caught.value.code) == (400, "malformed_json")


class Inner(Struct, forbid_unknown_fields=True, kw_only=True):
    a: Annotated[int, Meta(ge=0)]
    b: tuple[Annotated[str, Meta(max_length=2)], ...] = ()


class Outer(Struct, forbid_unknown_fields=True, kw_only=True):
    x: Inner | None = None
    y: list[Inner] | UnsetType = UNSET
    z: bool


values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 1) | st.text("ab", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abxyz"), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(values)
def test_something_is_wrong_exactly_where_the_codec_refuses(value: Any) -> None:
    found = misfits(value, Outer)
    try:
        msgspec.json.decode(json.dumps(value), type=Outer)
    except msgspec.ValidationError:
        assert found
        assert len({each.field for each in found}) == len(found)
    else:
        assert not found
