"""What the demo tells at its end: a table of every outcome with its figure, and one verdict."""

from __future__ import annotations

import io

from rich.console import Console

from simulations.demo import Outcome, _as_json, _summary

OUTCOMES = [
    Outcome("direct_path", "the page arrives", True, "203.0.113.2:1 <-> [x]\nround trip 1 ms"),
    Outcome("cut_by_revocation", "the traffic stops", False, "last byte " + "0123456789" * 8),
]


def test_the_closing_table_has_every_outcome_and_its_figure_within_80_columns() -> None:
    written = io.StringIO()
    _summary(Console(file=written, width=80), OUTCOMES)
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    [direct] = [line for line in lines if "direct path" in line]
    assert direct.split()[0] == "yes"
    assert "203.0.113.2:1 <-> [x]" in direct
    [cut] = [line for line in lines if "cut by revocation" in line]
    assert cut.split()[0] == "NO"
    assert "".join(lines).replace(" ", "").count("0123456789") == 8
    assert lines[-1] == "1 of 2 outcomes held."


def test_the_json_report_names_what_held_and_what_failed() -> None:
    report = _as_json(OUTCOMES, False, "")
    assert report["held"] is False
    assert report["outcomes"] == {"direct_path": True, "cut_by_revocation": False}
