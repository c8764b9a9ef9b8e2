"""The description that comes with `holloway admin`: that it is true, and what is read from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from admin.description import Description, Field, description

ROOT = Path(__file__).resolve().parents[3]
GET = {"responses": {"200": {"content": {"application/json": {"schema": {"type": "object"}}}}}}


def document(**paths: Any) -> dict[str, Any]:
    return {"paths": {f"/v1/{name}": item for name, item in paths.items()}} | {
        "components": {"schemas": {}}
    }


def test_the_copy_is_what_the_api_says_of_itself() -> None:
    """If not: `make openapi`, and commit the result."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "openapi")], capture_output=True, check=True, cwd=ROOT
    )
    assert json.loads(done.stdout) == json.loads((ROOT / "admin" / "openapi.json").read_bytes())


def test_whatever_may_be_anything_is_said_to_be_so() -> None:
    """A step's field may be a text, a list, a number or nothing; `object` is told as a text."""
    copy = json.loads((ROOT / "admin" / "openapi.json").read_bytes())
    changed = copy["components"]["schemas"]["FieldChange"]["properties"]
    assert changed["before"] == changed["after"] == {"default": None}
    assert '"title": "object"' not in json.dumps(copy)


def test_every_path_is_an_operation_of_its_own() -> None:
    copy = json.loads((ROOT / "admin" / "openapi.json").read_bytes())
    wanted = {
        (method, path)
        for path, methods in copy["paths"].items()
        for method in methods
        if path.startswith("/v1/")
    }
    found = [
        (operation.method, operation.path)
        for verbs in description().nouns.values()
        for operation in verbs.values()
    ]
    assert set(found) == wanted
    assert len(found) == len(wanted)


@pytest.mark.parametrize(
    ("noun", "verbs"),
    [
        ("resources", {"list", "get", "create", "update", "delete"}),
        ("memberships", {"list", "get", "create", "delete"}),
        ("accounts", {"list", "get", "create", "update", "delete", "create-token"}),
        ("logs", {"sessions", "flows", "requests"}),
        ("events", {"watch"}),
    ],
)
def test_verbs_are_named_as_one_would_say(noun: str, verbs: set[str]) -> None:
    assert set(description().nouns[noun]) == verbs
    assert "explain" in description().nouns["policies"]


def field(noun: str, verb: str, name: str) -> Field:
    operation = description().nouns[noun][verb]
    fields = {each.name: each for each in (*(operation.body or ()), *operation.query)}
    return fields[name]


def test_fields_are_read_with_all_that_a_flag_needs() -> None:
    assert field("resources", "create", "kind").choices == (
        "cidr", "device_pool", "dns", "internet", "ip",
    )  # fmt: skip
    assert field("resources", "create", "kind").required
    sites = field("resources", "create", "site_ids")
    assert (sites.many, sites.refers, sites.short_flags) == (True, "sites", ("--site", "--sites"))
    assert field("resources", "create", "device_ids").refers == "clients"
    assert field("policies", "create", "group_id").short_flags == ("--group",)
    assert field("policies", "create", "conditions").kind == "json"
    assert field("principals", "update", "email").nullable
    assert field("tokens", "create", "max_uses").kind == "integer"
    assert field("auth_providers", "create", "client_id").refers is None


def test_secrets_have_no_flag_that_would_take_them() -> None:
    assert field("auth_providers", "create", "client_secret").flag == "--client-secret-file"
    assert field("directories", "update", "credentials").flag == "--credentials-file"


def test_a_new_noun_is_read_without_further_ado() -> None:
    new = Description(document(robots={"get": GET}, **{"robots/{id}/wake": {"post": GET}}))
    assert set(new.nouns["robots"]) == {"get", "wake"}


def test_values_are_quoted_in_paths() -> None:
    operation = description().nouns["nodes"]["get"]
    assert operation.url({"name": "a/b?c"}) == "/v1/nodes/a%2Fb%3Fc"
