"""The JSON API over real HTTPS: entity tags and preconditions, idempotency keys, filters."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import trio

from actors.model import EntityKind
from actors.store.interface import ANSWER_KEPT, Answer, Put
from actors.store.memory import MemoryStore
from channel.credentials import decode_token
from tests.system.portal_support import installation, made, world

pytestmark = pytest.mark.system

STALE = '"AAAAAAAAAAAAAAAAAAAA"'
NOUNS = (
    "principals",
    "groups",
    "memberships",
    "auth_providers",
    "identities",
    "directories",
    "sites",
    "resources",
    "policies",
    "policy_tests",
    "tokens",
    "clients",
    "gateways",
)


async def test_every_single_entity_has_a_tag_that_conditions_can_name(tmp_path: Path) -> None:
    async with installation(tmp_path, calls_per_s=10**6) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            ids = await world(here, client)
            paths = [f"/v1/{noun}/{ids[noun]}" for noun in NOUNS]
            for path in [*paths, f"/v1/accounts/{account_id}", "/v1/changes/1"]:
                shown = await client.get(path)
                tag = shown.headers["etag"]
                assert not tag.startswith("W/")
                for condition in (tag, f"{STALE}, W/{tag}", "*"):
                    again = await client.get(path, headers={"if-none-match": condition})
                    assert again.status_code == 304, (path, condition)
                    assert again.headers["etag"] == tag
                    assert again.content == b""
                assert (await client.get(path, headers={"if-none-match": STALE})).is_success
                assert (await client.get(path, headers={"if-match": tag})).is_success
                failed = await client.get(path, headers={"if-match": STALE})
                assert (failed.status_code, failed.json()["code"]) == (412, "precondition_failed")


async def test_an_update_is_carried_out_on_the_state_that_it_names_alone(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            new = await client.post("/v1/sites", json={"name": "Paris"})
            path, first = f"/v1/sites/{new.json()['id']}", new.headers["etag"]
            assert (await client.get(path)).headers["etag"] == first
            changed = await client.patch(path, json={"name": "Lyon"}, headers={"if-match": first})
            assert changed.status_code == 200
            second = changed.headers["etag"]
            assert second != first
            assert (await client.get(path)).headers["etag"] == second
            for method, condition in [
                ("PATCH", {"if-match": first}),
                ("PATCH", {"if-match": f"W/{second}"}),  # a weak tag never matches here
                ("PATCH", {"if-none-match": second}),
                ("PATCH", {"if-none-match": "*"}),
                ("DELETE", {"if-match": first}),
                ("DELETE", {"if-match": f"W/{second}"}),
            ]:
                options: Any = {"json": {"name": "Nice"}} if method == "PATCH" else {}
                answer = await client.request(method, path, headers=condition, **options)
                assert answer.status_code == 412, (method, condition)
                assert answer.json()["code"] == "precondition_failed"
                assert (await client.get(path)).json()["name"] == "Lyon"
            both = f"{first} ,{second}"
            assert (
                await client.patch(path, json={"name": "Nice"}, headers={"if-match": both})
            ).is_success
            for malformed in ("abc", '"a" "b"', '"a', "", ",".join(['"a"'] * 33)):
                answer = await client.patch(path, json={}, headers={"if-match": malformed})
                assert answer.status_code == 400, malformed
                assert answer.json()["code"] == "malformed_precondition"
            assert (await client.delete(path, headers={"if-match": "*"})).status_code == 204
            assert (await client.delete(path, headers={"if-match": "*"})).status_code == 404


async def test_presence_is_in_the_tag_for_caches_and_not_for_updates(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            ids = await world(here, client)
            path = f"/v1/clients/{ids['clients']}"
            away = (await client.get(path)).headers["etag"]
            here.agents.comes(UUID(account_id), UUID(ids["clients"]), 1)
            seen = await client.get(path, headers={"if-none-match": away})
            assert seen.status_code == 200
            assert seen.json()["online"] is True
            assert seen.json()["remote_ip"] == "192.0.2.7"
            assert seen.headers["etag"] != away
            verified = await client.patch(path, json={"verified": True}, headers={"if-match": away})
            assert verified.status_code == 200
            late = await client.patch(path, json={"verified": False}, headers={"if-match": away})
            assert late.status_code == 412


class HesitantStore(MemoryStore):
    """Lets something else happen between the reading of an entity and what is done with it."""

    async def get(self, account_id: UUID, kind: EntityKind, id: UUID) -> Any:
        entity = await super().get(account_id, kind, id)
        if kind == "site":
            await trio.sleep(0.05)
        return entity


@pytest.mark.parametrize("method", ["PATCH", "DELETE"])
async def test_of_several_that_name_one_state_one_alone_succeeds(
    tmp_path: Path, method: str
) -> None:
    """Two nodes, so that no lock of one helps: only the store decides."""
    store = HesitantStore()
    async with (
        installation(tmp_path / "a", store=store) as here,
        installation(tmp_path / "b", store=store) as there,
    ):
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client, there.client(admin) as other:
            new = await client.post("/v1/sites", json={"name": "Paris"})
            path, condition = f"/v1/sites/{new.json()['id']}", {"if-match": new.headers["etag"]}
            statuses: list[int] = []

            async def change(http: httpx.AsyncClient, name: str) -> None:
                answer = await http.patch(path, json={"name": name}, headers=condition)
                statuses.append(answer.status_code)

            async def remove(http: httpx.AsyncClient) -> None:
                answer = await http.delete(path, headers=condition)
                statuses.append(answer.status_code)

            async with trio.open_nursery() as nursery:
                for i, http in enumerate((client, other, client, other)):
                    if method == "DELETE" and i == 0:
                        nursery.start_soon(remove, http)
                    else:
                        nursery.start_soon(change, http, f"Paris {i}")
            assert sorted(statuses)[0] in (200, 204)
            assert set(sorted(statuses)[1:]) <= {404, 412}


# --- idempotency keys ----------------------------------------------------------------------------


async def test_a_creation_that_is_sent_again_is_carried_out_once(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            key = {"idempotency-key": "k-1"}
            first = await client.post("/v1/sites", json={"name": "Paris"}, headers=key)
            again = await client.post("/v1/sites", json={"name": "Paris"}, headers=key)
            assert (first.status_code, again.status_code) == (201, 201)
            assert again.json() == first.json()
            assert "idempotency-replayed" not in first.headers
            assert again.headers["idempotency-replayed"] == "true"
            made_at = f"/v1/sites/{first.json()['id']}"
            assert first.headers["location"] == again.headers["location"] == made_at
            assert (await client.get(made_at)).json() == first.json()
            other = await client.post("/v1/sites", json={"name": "Lyon"}, headers=key)
            assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
            elsewhere = await client.post("/v1/groups", json={"name": "Paris"}, headers=key)
            assert elsewhere.json()["code"] == "idempotency_key_reused"
            names = [each["name"] for each in (await client.get("/v1/sites")).json()["items"]]
            assert sorted(names) == ["Internet", "Paris"]
            for bad in ("", "x" * 256, "a b"):
                answer = await client.post(
                    "/v1/sites", json={"name": "x"}, headers={"idempotency-key": bad}
                )
                assert answer.status_code == 422, bad
                assert answer.json()["errors"][0]["field"] == "Idempotency-Key"


async def test_a_refused_creation_leaves_its_key_free(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            taken = await made(client, "sites", name="Paris")
            key = {"idempotency-key": "k-1"}
            refused = await client.post("/v1/sites", json={"name": "Paris"}, headers=key)
            assert refused.status_code == 409
            assert (await client.delete(f"/v1/sites/{taken['id']}")).status_code == 204
            new = await client.post("/v1/sites", json={"name": "Paris"}, headers=key)
            assert new.status_code == 201
            assert "idempotency-replayed" not in new.headers


async def test_a_key_belongs_to_the_token_that_sends_it(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        _, other = await here.admin_of("other")
        key = {"idempotency-key": "k-1"}
        async with here.client(admin) as client, here.client(other) as stranger:
            one = await client.post("/v1/sites", json={"name": "Paris"}, headers=key)
            two = await stranger.post("/v1/sites", json={"name": "Paris"}, headers=key)
            assert (one.status_code, two.status_code) == (201, 201)
            assert one.json()["id"] != two.json()["id"]


async def test_the_text_of_a_token_is_never_kept(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client, here.client(here.operator_token) as operator:
            user = await made(client, "principals", name="Uwe")
            key = {"idempotency-key": "k-1"}
            of_account = {"kind": "client", "name": "laptop", "principal_id": user["id"]}
            for http, path, body in [
                (client, "/v1/tokens", of_account),
                (operator, f"/v1/accounts/{account_id}/tokens", of_account),
                (operator, "/v1/tokens", {"kind": "relay", "name": "relays"}),
            ]:
                headers = key | {"idempotency-key": f"k-{body['kind']}-{len(path)}"}
                first = await http.post(path, json=body, headers=headers)
                again = await http.post(path, json=body, headers=headers)
                assert first.status_code == again.status_code == 201, first.text
                assert first.json()["token"].startswith("hlw_")
                assert again.json()["token"] is None
                assert "never kept" in again.json()["token_withheld"]
                assert again.json()["id"] == first.json()["id"]
                made_at = f"/v1/tokens/{first.json()['id']}"
                assert first.headers["location"] == again.headers["location"] == made_at
                token_id = decode_token(admin if http is client else here.operator_token).id
                kept = await here.store.answer_of(token_id, headers["idempotency-key"])
                assert kept is not None
                assert b"hlw_" not in kept.body
            once = await operator.get("/v1/tokens", params={"kind": "relay"})
            assert len(once.json()["items"]) == 1


class PausingStore(MemoryStore):
    """Lets a test look in while a creation is being carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.may_go = trio.Event(), trio.Event()
        self.pauses = False

    async def meet(self, *calls: Callable[[], Awaitable[object]]) -> None:
        """Carry out calls, of which one at least is in the midst of it when the others come."""
        self.pauses = True
        async with trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(call)
            await self.reached.wait()
            await trio.sleep(0.1)
            self.may_go.set()

    async def apply(self, *args: Any, **options: Any) -> Any:
        if self.pauses:
            self.reached.set()
            await self.may_go.wait()
        return await super().apply(*args, **options)


async def test_a_key_that_is_in_use_is_told_to_come_again(tmp_path: Path) -> None:
    store = PausingStore()
    async with installation(tmp_path, store=store) as here:
        _, admin = await here.admin_of("acme")
        with trio.fail_after(60):
            async with here.client(admin) as client, trio.open_nursery() as nursery:
                key = {"idempotency-key": "k-1"}
                send = partial(client.post, "/v1/sites", json={"name": "Paris"}, headers=key)
                answers: list[httpx.Response] = []

                async def first() -> None:
                    answers.append(await send())

                store.pauses = True
                nursery.start_soon(first)
                await store.reached.wait()
                meanwhile = await send()
                assert (meanwhile.status_code, meanwhile.json()["code"]) == (
                    409,
                    "idempotency_in_progress",
                )
                assert int(meanwhile.headers["retry-after"]) >= 1
                store.may_go.set()
                while not answers:
                    await trio.sleep(0.01)
                again = await send()
                assert again.json() == answers[0].json()
                assert again.headers["idempotency-replayed"] == "true"


async def test_one_key_at_two_nodes_makes_one_thing(tmp_path: Path) -> None:
    store = PausingStore()
    async with (
        installation(tmp_path / "a", store=store) as here,
        installation(tmp_path / "b", store=store) as there,
    ):
        _, admin = await here.admin_of("acme")
        answers: list[httpx.Response] = []
        async with here.client(admin) as one, there.client(admin) as other:

            async def send(http: httpx.AsyncClient) -> None:
                key = {"idempotency-key": "k-1"}
                answers.append(await http.post("/v1/sites", json={"name": "Paris"}, headers=key))

            await store.meet(partial(send, one), partial(send, other))
            assert [answer.status_code for answer in answers] == [201, 201]
            assert answers[0].json() == answers[1].json()
            sites = (await one.get("/v1/sites", params={"name": "Paris"})).json()["items"]
            assert len(sites) == 1


async def test_a_declaration_that_is_sent_again_is_applied_once(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            key = {"idempotency-key": "k-1"}
            number = (await client.post("/v1/declaration/plan", json={"declaration": {}})).json()
            body = {"declaration": {"sites": [{"name": "Paris"}]}, "number": number["number"]}
            first = await client.post("/v1/declaration/apply", json=body, headers=key)
            assert first.status_code == 200, first.text
            sites = (await client.get("/v1/sites", params={"name": "Paris"})).json()["items"]
            await client.delete(f"/v1/sites/{sites[0]['id']}")  # somebody else's change
            again = await client.post("/v1/declaration/apply", json=body, headers=key)
            assert (again.status_code, again.json()) == (200, first.json())
            assert again.headers["idempotency-replayed"] == "true"
            assert "location" not in again.headers
            assert not (await client.get("/v1/sites", params={"name": "Paris"})).json()["items"]
            other = {"declaration": {"sites": [{"name": "Lyon"}]}}
            reused = await client.post("/v1/declaration/apply", json=other, headers=key)
            assert reused.json()["code"] == "idempotency_key_reused"


async def test_of_a_long_declaration_the_steps_are_not_kept(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            key = {"idempotency-key": "k-1"}
            groups = [{"name": f"group {number:04} {'x' * 200}"} for number in range(300)]
            body = {"declaration": {"groups": groups}}
            first = await client.post("/v1/declaration/apply", json=body, headers=key)
            assert len(first.json()["steps"]) == 300
            again = await client.post("/v1/declaration/apply", json=body, headers=key)
            assert again.json() == {"number": first.json()["number"], "steps": None}


async def test_one_declaration_at_two_nodes_is_applied_once(tmp_path: Path) -> None:
    store = PausingStore()
    async with (
        installation(tmp_path / "a", store=store) as here,
        installation(tmp_path / "b", store=store) as there,
    ):
        _, admin = await here.admin_of("acme")
        answers: list[httpx.Response] = []
        async with here.client(admin) as one, there.client(admin) as other:
            planned = (await one.post("/v1/declaration/plan", json={"declaration": {}})).json()
            body = {"declaration": {"sites": [{"name": "Paris"}]}, "number": planned["number"]}

            async def send(http: httpx.AsyncClient) -> None:
                key = {"idempotency-key": "k-1"}
                answers.append(await http.post("/v1/declaration/apply", json=body, headers=key))

            await store.meet(partial(send, one), partial(send, other))
            assert [answer.status_code for answer in answers] == [200, 200]
            assert answers[0].json() == answers[1].json()


async def test_a_key_is_free_again_after_a_day(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            key = {"idempotency-key": "k-1"}
            old = Answer(
                token_id=decode_token(admin).id,
                key="k-1",
                request_hash=bytes(32),
                status=201,
                body=b"{}",
                at=here.office.clock.utc_now() - ANSWER_KEPT - timedelta(seconds=1),
            )
            account = await here.store.get(UUID(account_id), "account", UUID(account_id))
            await here.store.apply(
                UUID(account_id), [Put(account)], who="test", at=old.at, answer=old
            )
            new = await client.post("/v1/sites", json={"name": "Paris"}, headers=key)
            assert new.status_code == 201, new.text


# --- filters -------------------------------------------------------------------------------------


async def test_lists_are_filtered_by_fields_and_stay_pages(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            ids = await world(here, client)
            users = [
                (await made(client, "principals", name="twin", email=f"{i}@example.org"))["id"]
                for i in range(5)
            ]
            first = (await client.get("/v1/principals?name=twin&limit=3")).json()
            rest = await client.get(
                "/v1/principals", params={"name": "twin", "cursor": first["next_cursor"]}
            )
            assert [each["id"] for each in first["items"] + rest.json()["items"]] == users
            for path, query, expected in [
                ("principals", {"email": "3@example.org"}, [users[3]]),
                ("principals", {"name": "twin", "email": "uwe@example.org"}, []),
                ("principals", {"kind": "service_account"}, []),
                ("memberships", {"group_id": ids["groups"]}, [ids["memberships"]]),
                ("memberships", {"group_id": str(uuid4())}, []),
                ("resources", {"site_id": ids["sites"]}, [ids["resources"]]),
                ("resources", {"site_id": str(uuid4())}, []),
                ("resources", {"kind": "cidr"}, [ids["resources"]]),
                ("policies", {"resource_id": ids["resources"], "disabled": "true"}, []),
                ("tokens", {"kind": "client"}, [ids["tokens"]]),
                ("clients", {"principal_id": ids["principals"]}, [ids["clients"]]),
                ("gateways", {"approved": "false"}, [ids["gateways"]]),
                ("policy_tests", {"expected": "allowed"}, []),
                ("identities", {"subject": "uwe"}, [ids["identities"]]),
            ]:
                answer = await client.get(f"/v1/{path}", params=query)
                assert [each["id"] for each in answer.json()["items"]] == expected, (path, query)
            changes = await client.get("/v1/changes", params={"entity_id": ids["sites"]})
            assert [each["kind"] for each in changes.json()["items"]] == ["site"]
            for path, name, bad in [
                ("principals", "kind", "robot"),
                ("principals", "disabled", "1"),
                ("memberships", "group_id", "x"),
                ("resources", "colour", "red"),
                ("principals", "name", ""),
                ("principals", "name", "x" * 513),
                ("logs/requests", "since", "2026-01-01T00:00:00"),
            ]:
                answer = await client.get(f"/v1/{path}", params={name: bad})
                assert answer.status_code == 422, (path, name)
                assert answer.json()["errors"][0]["field"] == name


async def test_every_call_of_an_account_is_in_its_request_log(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        async with (
            here.client(admin, headers={"user-agent": "check/1"}) as client,
            here.client(here.operator_token) as operator,
        ):
            new = await client.post("/v1/sites", json={"name": "a very private name"})
            await client.get(f"/v1/sites/{uuid4()}?limit=1")
            await operator.get("/v1/sites", headers={"holloway-account": account_id})
            await operator.get("/v1/accounts")
            await here.api.journal.flush()
            rows = (await client.get("/v1/logs/requests?limit=1000")).json()["items"]
            by_admin = [row for row in rows if row["user_agent"] == "check/1"]
            assert [(row["method"], row["status"], row["code"]) for row in by_admin] == [
                ("GET", 422, "invalid_fields"),
                ("POST", 201, ""),
            ]
            assert by_admin[1]["id"] == new.headers["holloway-request-id"]
            assert by_admin[1]["path"] == "/v1/sites"
            assert by_admin[1]["remote_ip"] == "127.0.0.1"
            assert rows[0]["path"] == "/v1/sites"  # the operator's, newest first
            assert "/v1/accounts" not in {row["path"] for row in rows}
            assert "private" not in str(rows)
            page = (await client.get("/v1/logs/requests?limit=1")).json()
            more = await client.get("/v1/logs/requests", params={"cursor": page["next_cursor"]})
            assert page["items"] + more.json()["items"] == rows[: len(more.json()["items"]) + 1]
            token_id = str(decode_token(admin).id)
            mine = await client.get("/v1/logs/requests", params={"token_id": token_id})
            assert {row["token_id"] for row in mine.json()["items"]} == {token_id}
