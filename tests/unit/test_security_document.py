"""docs/security.md names only tests and files that exist, and no row without either."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "security.md").read_text()
TESTS = re.findall(r"`([\w/]+\.py)::(\w+)`", DOCUMENT)
ROWS = [
    line.strip("| ").split(" | ")
    for line in DOCUMENT.partition("## Every requirement")[2].splitlines()
    if line.startswith("| ") and not line.startswith(("| what holds", "| requirement"))
]


def test_every_test_that_it_names_exists() -> None:
    assert len(TESTS) > 80
    missing = [
        f"{path}::{name}"
        for path, name in TESTS
        if not (ROOT / "tests" / path).is_file()
        or not re.search(rf"def {name}\(", (ROOT / "tests" / path).read_text())
    ]
    assert missing == []


def test_every_place_that_it_names_exists() -> None:
    places = {
        place for row in ROWS if len(row) == 3 for place in re.findall(r"`([\w./]+)`", row[1])
    }
    assert len(places) > 30
    assert [place for place in sorted(places) if not (ROOT / place).exists()] == []


def test_every_row_is_shown_by_a_test_or_says_why_not() -> None:
    assert len(ROWS) > 60
    bare = [row[0] for row in ROWS if len(row) == 3 and "::" not in row[2]]
    assert all("not in this version" in row[2] for row in ROWS if row[0] in bare)
