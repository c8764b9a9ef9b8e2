"""docs/policy.md says what the code does."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from actors.model import Conditions
from actors.policy import circumstances, diff
from portal import regions

TEXT = (Path(__file__).parents[4] / "docs" / "policy.md").read_text()


@pytest.mark.parametrize("name", [field.name for field in attrs.fields(Conditions)])
def test_every_condition_is_in_the_table(name: str) -> None:
    assert f"| `{name}` |" in TEXT


@pytest.mark.parametrize(
    "limit",
    [
        diff.MAX_PAIRS,
        diff.MAX_SPANS,
        circumstances.MAX_PIECES,
        circumstances.MAX_SPANS_EXAMINED,
        regions.MAX_KEPT,
    ],
)
def test_every_limit_is_told(limit: int) -> None:
    assert f"{limit:,}" in TEXT
