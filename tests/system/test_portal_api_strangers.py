"""No call crosses accounts: every endpoint of the OpenAPI document is tried with the ids of another
account. What is tried is read from the document, so a new endpoint is tried by being there."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import attrs
import httpx
import pytest

from tests.system.portal_support import (
    Installation,
    access,
    installation,
    world,
)

pytestmark = pytest.mark.system

OF_THE_INSTALLATION = {"relays", "nodes"}
STREAMS = {"/v1/events"}
FIELDS = {
    "principal_id": "principals",
    "group_id": "groups",
    "resource_id": "resources",
    "site_id": "sites",
    "site_ids": "sites",
    "device_id": "clients",
    "device_ids": "clients",
    "client_id": "clients",
    "gateway_id": "gateways",
    "policy_id": "policies",
    "token_id": "tokens",
    "auth_provider_id": "auth_providers",
    "directory_id": "directories",
    "id": "",
}
"""Which noun's id a field of a body or a query names; "" is the path's own."""

BODIES: dict[str, dict[str, Any]] = {
    "create_membership": {"group_id": "groups", "principal_id": "principals"},
    "create_policy": {"group_id": "groups", "resource_id": "resources"},
    "create_policy_test": {
        "name": "t",
        "principal_id": "principals",
        "resource_id": "resources",
        "auth_provider_id": "auth_providers",
        "expected": "denied",
    },
    "create_identity": {
        "principal_id": "principals",
        "auth_provider_id": "auth_providers",
        "subject": "s",
    },
    "create_token": {"kind": "client", "name": "t", "principal_id": "principals"},
    "explain_policies": {"client_id": "clients", "resource_id": "resources"},
}
"""A body that would do for each operation that names others; its values are nouns or literals."""


@attrs.frozen
class Two:
    """Two accounts: whoever calls, and a stranger."""

    client: httpx.AsyncClient
    account_id: str
    own: dict[str, str]
    strangers: dict[str, str]


async def two(here: Installation, client: httpx.AsyncClient, stranger: httpx.AsyncClient) -> Two:
    account_id = (await client.get("/v1/accounts")).json()["items"][0]["id"]
    other_id = (await stranger.get("/v1/accounts")).json()["items"][0]["id"]
    own, strangers = await world(here, client), await world(here, stranger)
    for ids, id in ((own, account_id), (strangers, other_id)):
        ids["accounts"] = id
        ids["authorizations"] = await access(here, UUID(id), ids)
    return Two(client=client, account_id=account_id, own=own, strangers=strangers)


def resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        found: Any = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        schema = found
    return schema


def names_ids(schema: dict[str, Any]) -> bool:
    """Whether a value is an id, or several."""
    if schema.get("format") == "uuid":
        return True
    parts = [schema.get("items") or {}, *schema.get("anyOf", ())]
    return any(part and names_ids(part) for part in parts)


def known(ids: dict[str, str], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: known(ids, each) for name, each in value.items()}
    if isinstance(value, list):
        return [known(ids, each) for each in value]
    return ids.get(value, value) if isinstance(value, str) else value


@asynccontextmanager
async def two_accounts(
    directory: Path,
) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient, Two]]:
    """Of one installation: a client of the one's admin, one of the other's, and what they have."""
    async with installation(directory, calls_per_s=10**6) as here:
        _, admin = await here.admin_of("acme")
        _, other = await here.admin_of("other")
        async with here.client(admin) as client, here.client(other) as stranger:
            yield client, stranger, await two(here, client, stranger)


async def test_another_accounts_ids_are_404_on_every_path(tmp_path: Path) -> None:
    async with two_accounts(tmp_path) as (client, stranger, both):
        document = (await client.get("/v1/openapi.json")).json()
        before = (await stranger.get("/v1/changes?limit=1000")).text
        tried = set()
        for path, item in document["paths"].items():
            noun = path.split("/")[2] if path.startswith("/v1/") else ""
            if not {"{id}", "{account_id}"} & set(path.split("/")):
                continue
            if noun in OF_THE_INSTALLATION:
                continue
            target = path.replace("{id}", both.strangers[noun])
            target = target.replace("{account_id}", both.strangers["accounts"])
            for method, operation in item.items():
                body: dict[str, Any] = {}
                if path.endswith("/tokens"):
                    body = {"kind": "client", "name": "t"}
                options = {"json": body} if "requestBody" in operation else {}
                answer = await client.request(method, target, **options)
                assert answer.status_code == 404, (method, path, answer.text)
                tried.add((method, path))
        assert len(tried) >= 40
        assert (await stranger.get("/v1/changes?limit=1000")).text == before


async def test_another_account_cannot_be_named_by_the_header(tmp_path: Path) -> None:
    async with two_accounts(tmp_path) as (client, _, both):
        document = (await client.get("/v1/openapi.json")).json()
        header = {"holloway-account": both.strangers["accounts"]}
        tried = 0
        for path, item in document["paths"].items():
            noun = path.split("/")[2] if path.startswith("/v1/") else ""
            if not noun or noun in OF_THE_INSTALLATION or noun == "accounts":
                continue
            target = path.replace("{id}", both.strangers.get(noun, ""))
            target = target.replace("{number}", "1")
            for method, operation in item.items():
                body = known(both.strangers, BODIES.get(operation["operationId"], {}))
                options = {"json": body} if "requestBody" in operation else {}
                answer = await client.request(method, target, headers=header, **options)
                assert answer.status_code in (404, 422), (method, path, answer.text)
                if answer.status_code == 422:  # the body was looked at first: nothing is said
                    assert both.strangers["accounts"] not in answer.text
                tried += 1
        assert tried >= 70


async def test_another_accounts_ids_are_404_in_every_field_of_a_body(tmp_path: Path) -> None:
    async with two_accounts(tmp_path) as (client, _, both):
        document = (await client.get("/v1/openapi.json")).json()
        tried = set()
        for path, item in document["paths"].items():
            for method, operation in item.items():
                if "requestBody" not in operation or "/accounts" in path:
                    continue
                schema = resolve(
                    document, operation["requestBody"]["content"]["application/json"]["schema"]
                )
                for field, each in schema["properties"].items():
                    if not names_ids(each):
                        continue
                    name = operation["operationId"]
                    assert field in FIELDS, f"{name}: say which noun {field} names"
                    foreign: Any = both.strangers[FIELDS[field]]
                    foreign = [foreign] if field.endswith("_ids") else foreign
                    body = body_for(both, name, field) | {field: foreign}
                    target = path.replace("{id}", both.own.get(path.split("/")[2], ""))
                    answer = await client.request(method, target, json=body)
                    assert answer.status_code == 404, (name, field, body, answer.text)
                    assert foreign not in (answer.json(), answer.text)
                    tried.add((name, field))
        assert len(tried) >= 20


def body_for(both: Two, name: str, field: str) -> dict[str, Any]:
    """The rest of a body in which one field will name a stranger."""
    more = {
        ("create_token", "site_id"): {"kind": "gateway", "name": "t"},
        ("create_resource", "site_ids"): {"name": "x", "kind": "ip", "address": "10.0.0.1"},
        ("create_resource", "device_ids"): {"name": "x", "kind": "device_pool"},
        ("update_resource", "device_ids"): {"kind": "device_pool", "site_ids": [], "address": ""},
        ("explain_policies", "principal_id"): {"resource_id": "resources"},
        ("explain_policies", "auth_provider_id"): {
            "principal_id": "principals",
            "resource_id": "resources",
        },
    }.get((name, field))
    return dict(known(both.own, copy.deepcopy(BODIES.get(name, {}) if more is None else more)))


async def test_another_accounts_ids_find_nothing_as_a_filter(tmp_path: Path) -> None:
    async with two_accounts(tmp_path) as (client, _, both):
        document = (await client.get("/v1/openapi.json")).json()
        tried = set()
        for path, item in document["paths"].items():
            noun = path.split("/")[2] if path.startswith("/v1/") else ""
            if noun in OF_THE_INSTALLATION or path in STREAMS:
                continue
            for each in item.get("get", {}).get("parameters", ()):
                if each["in"] != "query" or not names_ids(each["schema"]):
                    continue
                kind = FIELDS.get(each["name"])
                for id in {both.strangers[kind]} if kind else set(both.strangers.values()):
                    answer = await client.get(path, params={each["name"]: id})
                    assert answer.status_code == 200, (path, each["name"], answer.text)
                    assert answer.json()["items"] == [], (path, each["name"])
                tried.add((path, each["name"]))
        assert len(tried) >= 25
