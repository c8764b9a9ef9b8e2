"""docs/control-plane.md says what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.enrolment import _RETRY
from actors.ledger import diagram
from actors.policy.engine import PROPERTIES
from actors.requests import CLIENT_VERSION, GATEWAY_VERSION

TEXT = (Path(__file__).parents[3] / "docs" / "control-plane.md").read_text()


def test_the_diagram_is_drawn_from_the_table() -> None:
    assert f"```mermaid\n{diagram()}\n```" in TEXT


@pytest.mark.parametrize("name", [*PROPERTIES, *_RETRY, CLIENT_VERSION, GATEWAY_VERSION])
def test_every_name_that_an_agent_can_hear_is_told(name: str) -> None:
    assert f"`{name}`" in TEXT
