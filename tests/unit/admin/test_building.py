"""Commands: each verb of the API has one, whose flags are what it takes."""

from __future__ import annotations

import io
from typing import Any

import pytest
from cyclopts import App
from rich.console import Console

from admin.building import BY_HAND, build
from admin.command import app
from admin.description import Operation, description
from admin.failures import Failure

OPERATIONS = [
    operation
    for noun, verbs in description().nouns.items()
    if noun not in BY_HAND
    for operation in verbs.values()
]


def words(operation: Operation) -> list[str]:
    return [operation.noun.replace("_", "-"), operation.verb]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: " ".join(words(each)))
def test_the_help_of_a_command_names_all_its_flags(operation: Operation) -> None:
    out = io.StringIO()
    app.help_print(words(operation), console=Console(file=out, width=1_000))
    for field in (*(operation.body or ()), *operation.query):
        assert f"{field.flag} " in out.getvalue()
    assert "--output" in out.getvalue()


def test_the_help_says_what_the_fields_mean_and_what_is_in_them() -> None:
    out = io.StringIO()
    for noun, verb in (("tokens", "create"), ("policies", "create")):
        app.help_print([noun, verb], console=Console(file=out, width=1_000))
    shown = out.getvalue()
    assert "gateway tokens a site_id" in shown
    assert "JSON, or @file with remote_ip_location_region, remote_ip, auth_provider" in shown
    assert not any(line.rstrip("│ ").endswith(" .") for line in shown.splitlines())


def refuse(failure: Failure) -> None:
    raise failure


def parsed(*argv: str) -> dict[str, Any]:
    made = App(name="admin")
    build(made, description(), refuse)
    _, bound, _ = made.parse_args(list(argv), exit_on_error=False, print_error=False)
    return bound.arguments


def test_flags_are_bound_to_fields() -> None:
    bound = parsed(
        "resources", "create", "--name", "Hall", "--kind", "dns", "--filters", "[]",
        "--site", "Berlin", "--site", "Bonn",
    )  # fmt: skip
    assert bound["site_ids"] == ("Berlin", "Bonn")
    assert (bound["name"], bound["kind"], bound["filters"]) == ("Hall", "dns", "[]")
    assert "address" not in bound


def test_truth_is_yes_or_no_and_lists_can_be_emptied() -> None:
    assert parsed("principals", "update", "Uwe", "--no-disabled")["disabled"] is False
    assert parsed("principals", "update", "Uwe", "--disabled")["disabled"] is True
    assert parsed("resources", "update", "Hall", "--empty-site-ids")["site_ids"] == ()
    assert parsed("principals", "update", "Uwe", "--email", "null")["email"] == "null"


def test_a_noun_of_two_words_is_written_either_way() -> None:
    assert parsed("policy-tests", "list", "--all")["all"] is True
    assert parsed("policy_tests", "list", "--all")["all"] is True
