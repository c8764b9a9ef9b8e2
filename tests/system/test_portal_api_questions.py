"""The JSON API over real HTTPS: questions to the policy engine, and what it refuses: changes that
break policy tests, and more of a kind than an account may have."""

from __future__ import annotations

from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import trio

from actors.limits import LIMITS
from actors.store.memory import MemoryStore
from actors.store.postgres import Logins, PostgresStore
from tests.system.portal_support import (
    access,
    installation,
    made,
    two_nodes,
    world,
)

pytestmark = pytest.mark.system


async def asked(client: httpx.AsyncClient, question: str, **fields: Any) -> dict[str, Any]:
    answer = await client.post(f"/v1/policies/{question}", json=fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def numbers(client: httpx.AsyncClient) -> int:
    return len((await client.get("/v1/changes?limit=1000")).json()["items"])


async def test_a_proposal_says_who_gains_and_who_loses_and_changes_nothing(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            ids = await world(here, client)
            before = await numbers(client)
            lost = await asked(
                client,
                "diff",
                mutations=[{"action": "delete", "noun": "memberships", "id": ids["memberships"]}],
            )
            (loss,) = lost["lost"]
            assert (loss["principal_id"], loss["principal_name"]) == (ids["principals"], "Uwe")
            assert (loss["resource_id"], loss["resource_name"]) == (ids["resources"], "Intranet")
            assert loss["policy_ids"] == [ids["policies"]]
            assert lost["gained"] == []
            assert (lost["complete"], lost["exact"], lost["failing_tests"]) == (True, True, [])
            group, everyone = str(uuid4()), await client.get("/v1/groups?kind=everyone")
            gained = await asked(
                client,
                "diff",
                mutations=[
                    {"action": "create", "noun": "groups", "id": group, "fields": {"name": "New"}},
                    {
                        "action": "create",
                        "noun": "policies",
                        "fields": {
                            "group_id": everyone.json()["items"][0]["id"],
                            "resource_id": ids["resources"],
                            "conditions": {
                                "current_time": {"zone": "UTC", "windows": [{"day": 0}]}
                            },
                        },
                    },
                    {
                        "action": "update",
                        "noun": "groups",
                        "id": group,
                        "fields": {"name": "Newer"},
                    },
                ],
            )
            names = {each["principal_name"] for each in gained["gained"]}
            assert names == {"Ada", "Nora"}  # Uwe has it already, at any time
            assert [each["name"] for each in gained["failing_tests"]] in (
                [],
                ["Nora does not reach the intranet"],
            )
            assert await numbers(client) == before
            found = (await client.get("/v1/groups")).json()["items"]
            assert {each["name"] for each in found} == {"Everyone", "Staff"}


@pytest.mark.parametrize(
    ("mutation", "status", "field"),
    [
        ({"action": "delete", "noun": "groups", "id": str(UUID(int=7))}, 404, "mutations[1]"),
        ({"action": "update", "noun": "groups"}, 422, "mutations[1].id"),
        (
            {"action": "update", "noun": "memberships", "id": str(UUID(int=7))},
            422,
            "mutations[1].action",
        ),
        (
            {"action": "create", "noun": "groups", "fields": {"name": "New", "colour": 1}},
            422,
            "mutations[1].fields.colour",
        ),
        (
            {"action": "create", "noun": "groups", "fields": {"name": ""}},
            422,
            "mutations[1].fields.name",
        ),
        ({"action": "create", "noun": "tokens", "fields": {}}, 422, "mutations[1].noun"),
    ],
)
async def test_a_proposal_that_could_not_be_made_is_refused_with_its_place(
    tmp_path: Path, mutation: dict[str, Any], status: int, field: str
) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            good = {"action": "create", "noun": "groups", "fields": {"name": "New"}}
            answer = await client.post("/v1/policies/diff", json={"mutations": [good, mutation]})
            assert answer.status_code == status, answer.text
            assert [each["field"] for each in answer.json()["errors"]] == [field]


async def test_the_past_is_told_as_it_was(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            ids = await world(here, client)
            then = here.office.clock.utc_now().isoformat()
            await client.delete(f"/v1/memberships/{ids['memberships']}")
            of_uwe = {"principal_id": ids["principals"]}
            now = await asked(client, "at", **of_uwe)
            assert now["reachable"] == []
            past = await asked(client, "at", at=then, **of_uwe)
            (reach,) = past["reachable"]
            assert (reach["resource_name"], reach["certain"]) == ("Intranet", True)
            assert past["number"] == now["number"] - 1
            for at in ("2100-01-01T00:00:00Z", "1999-01-01T00:00:00Z"):
                refused = await client.post("/v1/policies/at", json={"at": at})
                assert refused.status_code == 422
                assert refused.json()["errors"][0]["field"] == "at"


async def test_beyond_what_is_kept_the_past_is_not_made_up(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            then = here.office.clock.utc_now()
            await client.patch(
                f"/v1/accounts/{account_id}", json={"retention": {"changes_days": 1}}
            )
            store = here.store
            assert isinstance(store, MemoryStore)
            book = store._books[UUID(account_id)]
            book.pruned, book.changes[:] = 3, book.changes[3:]
            refused = await client.post(
                "/v1/policies/at", json={"at": (then - timedelta(hours=1)).isoformat()}
            )
            assert refused.status_code == 422, refused.text
            assert "kept since" in refused.json()["errors"][0]["message"]


async def test_recorded_accesses_are_replayed_under_a_proposal(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            ids = await world(here, client)
            since = here.office.clock.utc_now() - timedelta(minutes=1)
            authorization = await access(here, UUID(account_id), ids, lasts=timedelta(hours=1))
            cut = {"action": "update", "noun": "policies", "id": ids["policies"]}
            answer = await asked(
                client,
                "replay",
                since=since.isoformat(),
                mutations=[cut | {"fields": {"disabled": True}}],
            )
            assert answer["examined"] == 1
            assert answer["outcomes"] == {"stands": 0, "shortened": 0, "denied": 1, "unknown": 0}
            (different,) = answer["different"]
            assert different["authorization_id"] == authorization
            assert (different["outcome_now"], different["outcome"]) == ("stands", "denied")
            assert different["violated"] == ["policy_disabled"]
            same = await asked(client, "replay", since=since.isoformat(), mutations=[])
            assert same["different"] == []
            later = here.office.clock.utc_now() + timedelta(minutes=1)
            none = await asked(client, "replay", since=later.isoformat(), mutations=[])
            assert (none["examined"], none["until"]) == (0, None)


async def test_exposure_names_the_policy_that_bounds_it(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            ids = await world(here, client)
            (bound,) = (await client.get("/v1/policies/exposure")).json()["items"]
            assert bound == {
                "resource_id": ids["resources"],
                "resource_name": "Intranet",
                "disconnected_s": 86_400,
                "policy_id": ids["policies"],
                "connected": 0,
                "away": [],
            }
            await client.patch(f"/v1/policies/{ids['policies']}", json={"lease_s": 60})
            of_one = await client.get(
                "/v1/policies/exposure", params={"resource_id": ids["resources"]}
            )
            assert of_one.json()["items"][0]["disconnected_s"] == 60


async def test_a_question_may_state_what_is_not_known(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            ids = await world(here, client)
            conditions = {
                "remote_ip_location_region": {"operator": "is_in", "values": ["DE"]},
                "client_posture": {
                    "facts": [{"name": "os_version", "operator": "at_least", "value": "14.9"}]
                },
            }
            await client.patch(f"/v1/policies/{ids['policies']}", json={"conditions": conditions})
            question = {"principal_id": ids["principals"], "resource_id": ids["resources"]}
            unknown = await asked(client, "explain", **question)
            assert unknown["violated"] == ["remote_ip_location_region", "client_posture"]
            posture = [{"name": "os_version", "value": "14.10"}]
            stated = await asked(client, "explain", **question, region="DE", posture=posture)
            assert stated["allowed"] is True


# --- policy tests --------------------------------------------------------------------------------


async def test_a_change_that_breaks_a_policy_test_is_refused(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            ids = await world(here, client)
            kept = await made(
                client,
                "policy_tests",
                name="Uwe reaches the intranet",
                principal_id=ids["principals"],
                resource_id=ids["resources"],
                expected="allowed",
            )
            before = await numbers(client)
            policy, user = f"/v1/policies/{ids['policies']}", f"/v1/principals/{ids['principals']}"
            for method, path, body in [
                ("DELETE", policy, None),
                ("PATCH", policy, {"disabled": True}),
                ("DELETE", f"/v1/memberships/{ids['memberships']}", None),
                ("DELETE", f"/v1/groups/{ids['groups']}", None),
                ("PATCH", user, {"disabled": True}),
                ("PATCH", f"/v1/policy_tests/{kept['id']}", {"expected": "denied"}),
            ]:
                answer = await client.request(method, path, json=body)
                assert (answer.status_code, answer.json()["code"]) == (409, "policy_test_failed")
                (error,) = answer.json()["errors"]
                assert error["field"] == f"policy_tests.{kept['id']}"
                assert "Uwe reaches the intranet" in error["message"]
            assert await numbers(client) == before
            failing = await client.post(
                "/v1/policy_tests",
                json={
                    "name": "Nora reaches it",
                    "principal_id": ids["principals"],
                    "resource_id": ids["resources"],
                    "expected": "denied",
                },
            )
            assert failing.json()["code"] == "policy_test_failed"
            ran = await asked(client, "tests")
            assert ran == {"passed": 2, "failed": []}
            assert (await client.delete(f"/v1/policy_tests/{kept['id']}")).status_code == 204
            assert (await client.delete(policy)).status_code == 204


async def test_a_test_and_what_would_break_it_never_both_succeed(
    tmp_path: Path, database: Logins
) -> None:
    """Two nodes on one PostgreSQL: one adds the test while the other takes away what it needs."""
    async with two_nodes(tmp_path, database) as nodes, AsyncExitStack() as stack:
        _, admin = await nodes[0].admin_of("acme")
        one, other = [await stack.enter_async_context(node.client(admin)) for node in nodes]
        ids = await world(nodes[0], one)
        body = {
            "name": "Uwe reaches the intranet",
            "principal_id": ids["principals"],
            "resource_id": ids["resources"],
            "expected": "allowed",
        }
        for _ in range(10):
            answers: dict[str, httpx.Response] = {}

            async def call(name: str, send: Any, answers: dict[str, httpx.Response]) -> None:
                answers[name] = await send()

            policies = (await one.get("/v1/policies")).json()["items"]
            path = f"/v1/policies/{policies[0]['id']}"
            async with trio.open_nursery() as nursery:
                add = partial(one.post, "/v1/policy_tests", json=body)
                nursery.start_soon(call, "add", add, answers)
                nursery.start_soon(call, "cut", partial(other.delete, path), answers)
            statuses = (answers["add"].status_code, answers["cut"].status_code)
            assert statuses in ((201, 409), (409, 204)), statuses
            if statuses[0] == 201:
                await one.delete(f"/v1/policy_tests/{answers['add'].json()['id']}")
            else:
                fields = {"group_id": ids["groups"], "resource_id": ids["resources"]}
                await made(one, "policies", **fields)


# --- limits --------------------------------------------------------------------------------------


async def test_an_account_has_no_more_of_a_kind_than_it_may(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client, here.client(here.operator_token) as operator:
            limits = {"sites": 2, "principals": 2, "groups": 2, "tokens": 2}
            path = f"/v1/accounts/{account_id}"
            refused = await client.patch(path, json={"limits": limits})
            assert refused.json()["code"] == "operators_only"
            assert (await operator.patch(path, json={"limits": limits})).is_success
            await made(client, "sites", name="Paris")
            user = await made(client, "principals", name="Uwe")
            await made(client, "groups", name="Staff")
            token = {"kind": "client", "principal_id": user["id"]}
            await made(client, "tokens", name="laptop", **token)
            for noun, body in [
                ("sites", {"name": "Lyon"}),
                ("principals", {"name": "Eva"}),
                ("groups", {"name": "Guests"}),
                ("tokens", {"name": "phone", **token}),
            ]:
                answer = await client.post(f"/v1/{noun}", json=body)
                assert (answer.status_code, answer.json()["code"]) == (409, "limit_reached"), noun
                assert "2" in answer.json()["detail"]
            sites = (await client.get("/v1/sites?name=Paris")).json()["items"]
            assert (await client.delete(f"/v1/sites/{sites[0]['id']}")).status_code == 204
            await made(client, "sites", name="Lyon")


async def test_a_resource_has_no_more_policies_than_its_account_allows(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client, here.client(here.operator_token) as operator:
            ids = await world(here, client)
            limits = {"policies_per_resource": 2}
            changed = await operator.patch(f"/v1/accounts/{account_id}", json={"limits": limits})
            assert changed.json()["limits"]["policies_per_resource"] == 2
            policy = {"group_id": ids["groups"], "resource_id": ids["resources"]}
            await made(client, "policies", **policy)
            refused = await client.post("/v1/policies", json=policy)
            assert (refused.status_code, refused.json()["code"]) == (409, "limit_reached")
            assert [each["field"] for each in refused.json()["errors"]] == ["resource_id"]
            assert "2" in refused.json()["detail"]


async def test_of_many_at_once_no_more_are_made_than_there_may_be(
    tmp_path: Path, database: Logins
) -> None:
    async with two_nodes(tmp_path, database) as nodes, AsyncExitStack() as stack:
        account_id, admin = await nodes[0].admin_of("acme")
        async with nodes[0].client(nodes[0].operator_token) as operator:
            await operator.patch(f"/v1/accounts/{account_id}", json={"limits": {"sites": 6}})
        clients = [await stack.enter_async_context(node.client(admin)) for node in nodes]
        statuses: list[int] = []

        async def make(client: httpx.AsyncClient, name: str) -> None:
            answer = await client.post("/v1/sites", json={"name": name})
            statuses.append(answer.status_code)

        async with trio.open_nursery() as nursery:
            for i in range(20):
                nursery.start_soon(make, clients[i % 2], f"s{i}")
        assert sorted(statuses) == [201] * 5 + [409] * 15
        assert len((await clients[0].get("/v1/sites")).json()["items"]) == 6


async def test_the_installations_limits_hold_where_an_account_has_none(tmp_path: Path) -> None:
    async with installation(tmp_path, calls_per_s=10**6) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            for noun, kind, body in [
                ("auth_providers", "auth_provider", {"kind": "email"}),
                ("directories", "directory", {"kind": "scim", "credentials": "s3cret"}),
            ]:
                for i in range(LIMITS[kind]):  # type: ignore[index]  # a kind of entity
                    await made(client, noun, name=f"n{i}", **body)
                answer = await client.post(f"/v1/{noun}", json={"name": "more", **body})
                assert (answer.status_code, answer.json()["code"]) == (409, "limit_reached")


# --- secrets -------------------------------------------------------------------------------------


async def test_a_secret_goes_in_and_never_comes_out(tmp_path: Path, database: Logins) -> None:
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(PostgresStore.open(database, migrated=True))
        here = await stack.enter_async_context(installation(tmp_path, store=store))
        account_id, admin = await here.admin_of("acme")
        client = await stack.enter_async_context(here.client(admin))
        body = {
            "kind": "oidc",
            "name": "Keycloak",
            "issuer": "https://id.example.org",
            "client_id": "holloway",
            "client_secret": "s3cret-in",
        }
        provider = await made(client, "auth_providers", **body)
        directory = await made(
            client, "directories", kind="google", name="Staff", credentials="s3cret-in"
        )
        assert (provider["has_client_secret"], directory["has_credentials"]) == (True, True)
        path = f"/v1/auth_providers/{provider['id']}"
        renamed = await client.patch(path, json={"name": "New"})
        assert renamed.json()["has_client_secret"] is True
        kept = await store.get(UUID(account_id), "auth_provider", UUID(provider["id"]))
        sealed = getattr(kept, "client_secret")  # noqa: B009  # of one kind of entity
        opened = here.office.key_ring.open(
            sealed,
            table="auth_provider",
            column="client_secret",
            account_id=UUID(account_id),
            row_id=UUID(provider["id"]),
        )
        assert opened.reveal_text() == "s3cret-in"
        everything = ""
        for noun in ("auth_providers", "directories", "changes", "logs/requests"):
            everything += (await client.get(f"/v1/{noun}?limit=1000")).text
        assert "s3cret" not in everything
        assert "box" not in everything
        forgotten = await client.patch(path, json={"client_secret": None})
        assert forgotten.json()["has_client_secret"] is False
