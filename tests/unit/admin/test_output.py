"""What is printed: complete for programs, readable for people, and harmless for terminals."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from admin.calling import events_of
from admin.declaration import show_plan
from admin.description import Field
from admin.failures import NOT_FOUND, REFUSED, UNAVAILABLE, of_problem
from admin.output import Format, show_event, show_many, show_one
from admin.safety import UNSAFE, escaped, printable

HOSTILE = "\x1b]0;owned\x07\x9b31mred\u202etxt\x7f\r\nsecond\ud800half"
texts = st.text(st.characters(exclude_categories=["Cs"]))


def as_it_is(_: Field, value: str) -> str:
    return value


@given(text=texts)
def test_a_printable_text_is_one_harmless_line(text: str) -> None:
    assert not UNSAFE.search(printable(text))


@given(value=st.dictionaries(texts, texts))
def test_escaped_json_means_the_same(value: dict[str, str]) -> None:
    written = escaped(json.dumps(value, ensure_ascii=False, indent=2))
    assert json.loads(written) == value
    assert not UNSAFE.search(written.replace("\n", ""))


@pytest.mark.parametrize("format", ["json", "yaml"])
@given(value=st.dictionaries(texts, texts | st.lists(texts)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_programs_get_all_of_it(
    capsys: pytest.CaptureFixture[str], format: Format, value: dict[str, Any]
) -> None:
    capsys.readouterr()
    show_one(value, (), format, as_it_is)
    written = capsys.readouterr().out
    assert (json.loads(written) if format == "json" else yaml.safe_load(written)) == value
    assert not UNSAFE.search(written.replace("\n", ""))


@pytest.mark.parametrize(
    "show",
    [
        lambda item, format: show_one(item, (), format, as_it_is),
        lambda item, format: show_many([item], (), format, as_it_is),
        lambda item, format: show_event(item, format),
    ],
)
@pytest.mark.parametrize("format", ["table", "json", "yaml"])
def test_a_hostile_portal_does_not_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], show: Callable[[Any, Format], None], format: Format
) -> None:
    show({HOSTILE: HOSTILE, "token": HOSTILE, "nested": [{"x": HOSTILE}]}, format)
    assert not UNSAFE.search(capsys.readouterr().out.replace("\n", ""))


def test_neither_does_a_hostile_plan_or_problem(capsys: pytest.CaptureFixture[str]) -> None:
    step = {
        "action": "update", "kind": HOSTILE, "name": HOSTILE, "because": HOSTILE,
        "fields": [{"field": HOSTILE, "before": HOSTILE, "after": [HOSTILE]}],
    }  # fmt: skip
    access = {"principal": HOSTILE, "resource": HOSTILE, "since": HOSTILE, "until": HOSTILE}
    show_plan(
        {
            "steps": [step],
            "access": {"gained": [access], "lost": [access], "complete": False},
            "failing_tests": [HOSTILE],
        }
    )
    assert not UNSAFE.search(capsys.readouterr().out.replace("\n", ""))
    problem = {
        "detail": HOSTILE, "code": HOSTILE, "request_id": HOSTILE,
        "errors": [{"field": HOSTILE, "message": HOSTILE}],
    }  # fmt: skip
    assert not UNSAFE.search(str(of_problem(409, problem, {})).replace("\n", ""))


def test_markup_of_the_table_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    show_many([{"name": "[red]Staff[/red] :smile:"}], (), "table", as_it_is)
    assert "[red]Staff[/red] :smile:" in capsys.readouterr().out


def test_a_table_has_names_for_ids_and_leaves_out_what_nobody_has(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields = [
        Field(name="group_id", kind="string", refers="groups"),
        Field(name="empty", kind="string"),
        Field(name="name", kind="string"),
    ]
    items = [{"group_id": "1", "name": "a", "empty": None}]
    show_many(items, fields, "table", lambda field, value: {"1": "Staff"}.get(value, value))
    assert capsys.readouterr().out.splitlines() == ["name  group", "a     Staff"]


def test_a_table_has_instants_to_the_second_and_programs_get_the_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    item = {"at": "2027-01-31T09:00:00.123456Z"}
    show_many([item], (), "table", as_it_is)
    assert capsys.readouterr().out.splitlines() == ["at", "2027-01-31T09:00:00Z"]
    show_many([item], (), "json", as_it_is)
    assert json.loads(capsys.readouterr().out) == [item]


def test_what_has_an_inner_structure_is_told_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    check = {"property": "remote_ip", "holds": False, "detail": "unknown is_in 10.0.0.0/8"}
    good = {"property": "policy_disabled", "holds": True, "detail": ""}
    item = {
        "name": "x",
        "policies": [
            {"checks": [good, check], "expires_at": None, "group_id": "1", "group_name": "Staff"},
        ],
        "path": [{"kind": "principal", "id": "2", "name": "Uwe"}],
        "conditions": {
            "client_verified": None,
            "remote_ip": {"property": "remote_ip", "operator": "is_in", "values": ["::/8"]},
        },
    }
    show_one(item, (), "table", as_it_is)
    assert capsys.readouterr().out.splitlines() == [
        "name        x",
        "policies    - checks:",
        "                - ok  policy_disabled",
        "                - violated  remote_ip: unknown is_in 10.0.0.0/8",
        "              group: Staff",
        "path        - principal Uwe",
        "conditions  remote_ip:",
        "              operator: is_in",
        "              values: ::/8",
    ]
    show_many([item], (), "wide", as_it_is)
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "remote_ip"


def test_a_list_of_changes_says_what_became_of_what(capsys: pytest.CaptureFixture[str]) -> None:
    staff = {"id": "1", "name": "Staff", "disabled": False}
    changes = [
        {"number": 1, "before": None, "after": staff},
        {"number": 2, "before": staff, "after": staff | {"disabled": True, "name": HOSTILE}},
        {"number": 3, "before": staff, "after": None},
        {"number": 4, "before": {"id": "2"}, "after": None},
    ]
    show_many(changes, (), "table", as_it_is)
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["number", "change"]
    assert [line.split(maxsplit=1)[1] for line in (lines[0], *lines[2:])] == [
        "made Staff",
        "removed Staff",
        "removed",
    ]
    assert "disabled: false -> true" in lines[1]
    assert not UNSAFE.search("".join(lines))


def test_a_name_beside_an_id_that_is_shown_by_name_is_told_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields = [
        Field(name="resource_id", kind="string", refers="resources"),
        Field(name="resource_name", kind="string"),
    ]
    items = [{"resource_id": "1", "resource_name": "Intranet"}]
    show_many(items, fields, "table", lambda _, value: {"1": "Intranet"}.get(value, value))
    assert capsys.readouterr().out.splitlines() == ["resource", "Intranet"]


def test_a_token_is_printed_in_one_piece(capsys: pytest.CaptureFixture[str]) -> None:
    token = "hlw_client_" + "x" * 300
    show_one({"id": "1", "token": token}, (), "table", as_it_is)
    assert f"token: {token}" in capsys.readouterr().out.splitlines()


def test_a_failure_says_which_flag_and_ends_by_its_kind() -> None:
    problem = {
        "code": "invalid_fields",
        "detail": "Correct and send again: site_id: is wrong.",
        "errors": [{"field": "site_id", "message": "is wrong"}],
        "request_id": "r",
    }
    failure = of_problem(422, problem, {"site_id": "--site-id"})
    assert str(failure).splitlines() == [
        "Correct and send again:",
        "  --site-id: is wrong",
        "  (invalid_fields, request r)",
    ]
    assert failure.status == REFUSED
    assert of_problem(404, {}, {}).status == NOT_FOUND
    assert of_problem(503, {}, {}).status == UNAVAILABLE
    assert of_problem(500, {}, {}).status == 1


def test_server_sent_events_are_read() -> None:
    lines = [
        ": comment", "", "id: 7", "event: change", 'data: {"a":', "data: 1}", "",
        "event: end", "data: draining", "",
    ]  # fmt: skip
    assert list(events_of(iter(lines))) == [
        {"event": "change", "id": "7", "data": {"a": 1}},
        {"event": "end", "id": "7", "data": "draining"},
    ]
