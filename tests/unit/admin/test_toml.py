"""Our TOML: what is written is read again by Python's own reader."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from admin.toml import to_toml

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
scalars = st.booleans() | st.integers(-(2**63), 2**63 - 1) | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)


@given(document=st.dictionaries(keys, values, max_size=5))
def test_it_is_read_as_it_was_meant(document: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(document)) == document


@given(text=texts)
def test_no_text_steers_a_terminal(text: str) -> None:
    written = to_toml({"name": text})
    assert "\x1b" not in written
    assert "\x9b" not in written
    assert "\u202e" not in written


def test_it_looks_as_a_person_would_write_it() -> None:
    document = {
        "version": 1,
        "account": {"name": "Acme"},
        "groups": [{"name": "Staff", "members": [f"user{n}@example.org" for n in range(8)]}],
        "policies": [
            {
                "group": "Staff",
                "disabled": None,
                "conditions": {
                    "client_verified": {"operator": "is", "value": True},
                    "current_time": {"zone": "UTC", "windows": [{"day": 0}, {"day": 1}]},
                },
            }
        ],
    }
    assert to_toml(document) == MEANT


MEANT = """\
version = 1

[account]
name = "Acme"

[[groups]]
name = "Staff"
members = [
  "user0@example.org",
  "user1@example.org",
  "user2@example.org",
  "user3@example.org",
  "user4@example.org",
  "user5@example.org",
  "user6@example.org",
  "user7@example.org",
]

[[policies]]
group = "Staff"

[policies.conditions]
client_verified = { operator = "is", value = true }

[policies.conditions.current_time]
zone = "UTC"
windows = [{ day = 0 }, { day = 1 }]
"""


def test_what_has_no_form_is_refused() -> None:
    with pytest.raises(TypeError):
        to_toml({"name": b"bytes"})
