"""The JSON API over real HTTPS: what a token may do, and that it hands on no more than it has."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.portal_support import Installation, installation, made, world

pytestmark = pytest.mark.system


async def token_with(client: httpx.AsyncClient, *scopes: str, **fields: Any) -> dict[str, Any]:
    admins = (await client.get("/v1/principals?role=admin")).json()["items"]
    return await made(
        client,
        "tokens",
        kind="api",
        name="narrow",
        principal_id=admins[0]["id"],
        scopes=list(scopes),
        **fields,
    )


def scope_needed(operation: dict[str, Any]) -> str:
    """As the document says it."""
    return str(operation["description"].rpartition("Scope: `")[2].rstrip("`."))


async def test_every_endpoint_wants_its_scope_and_names_it(tmp_path: Path) -> None:
    async with installation(tmp_path, calls_per_s=10**6) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            ids = await world(here, client)
            nothing = await token_with(client, "events:read")
            reader = await token_with(client, "*:read")
            document = (await client.get("/v1/openapi.json")).json()
            tried = 0
            async with here.client(nothing["token"]) as none, here.client(reader["token"]) as read:
                for path, item in document["paths"].items():
                    if not path.startswith("/v1/") or path == "/v1/events":
                        continue
                    target = path.replace("{id}", ids.get(path.split("/")[2], account_id))
                    target = target.replace("{account_id}", account_id).replace("{number}", "1")
                    for method, operation in item.items():
                        needed = scope_needed(operation)
                        options: Any = {"json": {}} if "requestBody" in operation else {}
                        refused = await none.request(method, target, **options)
                        assert (refused.status_code, refused.json()["code"]) == (
                            403,
                            "scope_missing",
                        ), (method, path, refused.text)
                        assert needed in refused.json()["detail"]
                        challenge = refused.headers["www-authenticate"]
                        assert f'scope="{needed}"' in challenge
                        answer = await read.request(method, target, **options)
                        is_refused = answer.status_code == 403 and (
                            answer.json()["code"] == "scope_missing"
                        )
                        assert is_refused == needed.endswith(":write"), (method, path)
                        tried += 1
            assert tried >= 80


async def test_a_token_hands_on_no_more_than_it_has(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            new = await token_with(client, "tokens:write", "principals:read", "sites:read")
            async with here.client(new["token"]) as narrow:
                same = await token_with(narrow, "sites:read", "tokens:read")
                assert same["scopes"] == ["sites:read", "tokens:read"]
                principal_id = same["principal_id"]
                body = {"kind": "api", "name": "x", "principal_id": principal_id}
                inherited = await made(narrow, "tokens", **body)
                assert inherited["scopes"] == new["scopes"]
                for scopes in (["sites:write"], ["*:read"], ["sites:read", "policies:read"]):
                    answer = await narrow.post("/v1/tokens", json=body | {"scopes": scopes})
                    assert answer.json()["code"] == "scope_missing", scopes
                    widened = await narrow.patch(
                        f"/v1/tokens/{same['id']}", json={"scopes": scopes}
                    )
                    assert widened.json()["code"] == "scope_missing", scopes
                narrowed = await narrow.patch(
                    f"/v1/tokens/{same['id']}", json={"scopes": ["sites:read"]}
                )
                assert narrowed.json()["scopes"] == ["sites:read"]
                strong = await token_with(client, "*:write")
                path = f"/v1/tokens/{strong['id']}"
                assert (await narrow.patch(path, json={"name": "renamed"})).is_success
                longer = await narrow.patch(path, json={"expires_at": None})
                assert longer.json()["code"] == "scope_missing"


async def test_a_token_makes_none_that_outlives_it_or_is_good_in_more_places(
    tmp_path: Path,
) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            soon = here.office.clock.utc_now() + timedelta(hours=1)
            new = await token_with(
                client,
                "tokens:write",
                "principals:read",
                expires_at=soon.isoformat(),
                allowed_sources=["127.0.0.0/8"],
            )
            async with here.client(new["token"]) as bound:
                body = {"kind": "api", "name": "x", "principal_id": new["principal_id"]}
                same = await made(bound, "tokens", **body)
                assert same["expires_at"] == new["expires_at"]
                assert same["allowed_sources"] == ["127.0.0.0/8"]
                later = (soon + timedelta(seconds=1)).isoformat()
                for change, field in [
                    ({"expires_at": later}, "expires_at"),
                    ({"allowed_sources": ["0.0.0.0/0"]}, "allowed_sources"),
                    ({"allowed_sources": ["::1/128"]}, "allowed_sources"),
                ]:
                    answer = await bound.post("/v1/tokens", json=body | change)
                    assert answer.status_code == 422, change
                    assert {each["field"] for each in answer.json()["errors"]} == {field}
                for change in ({"expires_at": None}, {"allowed_sources": []}):
                    answer = await bound.patch(f"/v1/tokens/{same['id']}", json=change)
                    assert answer.status_code == 422, change


async def test_operators_have_every_scope_and_make_operators(tmp_path: Path) -> None:
    async with installation(tmp_path) as here, here.client(here.operator_token) as operator:
        new = await made(operator, "tokens", kind="operator", name="second")
        assert (new["account_id"], new["scopes"]) == (None, [])
        async with here.client(new["token"]) as second:
            assert (await second.get("/v1/accounts")).is_success
            assert (await second.get("/v1/nodes")).json() == {"items": [], "next_cursor": None}
            await joined(here)
            (node,) = (await second.get("/v1/nodes")).json()["items"]
            assert (node["name"], node["state"]) == ("n1", "up")
            shown = await second.get("/v1/nodes/n1")
            assert shown.json() == node
            assert shown.headers["etag"]
            assert (await second.get("/v1/nodes/n2")).status_code == 404
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            for path in ("nodes", "nodes/n1", "relays"):
                assert (await client.get(f"/v1/{path}")).json()["code"] == "operators_only"


async def joined(here: Installation) -> None:
    await here.store.join_node(
        "n1", link_address="a:1", door_address="a:2", version="1", ttl_ns=60 * 10**9
    )


async def test_the_use_of_a_token_is_remembered(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            new = await token_with(client, "sites:read")
            path = f"/v1/tokens/{new['id']}"
            assert (await client.get(path)).json()["last_used_at"] is None
            async with here.client(new["token"]) as reader:
                assert (await reader.get("/v1/sites")).is_success
            used = (await client.get(path)).json()["last_used_at"]
            assert used is not None
            listed = (await client.get("/v1/tokens?name=narrow")).json()["items"]
            assert [each["last_used_at"] for each in listed] == [used]
