"""Attacks on the JSON API by those who have a token, over real HTTPS."""

from __future__ import annotations

import weakref
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import attrs
import pytest
import trio

from actors.logs import RequestLog
from actors.model import Change, Site
from actors.store.interface import MAX_PAGE, NO_FILTER, Contents, Equals, Put
from actors.store.memory import MemoryStore
from actors.store.postgres import Logins, PostgresStore
from portal.api import authentication, feeds, frontdoor
from tests.system.portal_support import installation, made, world

pytestmark = pytest.mark.system


class RacedStore(MemoryStore):
    """Somebody changes an account just after it was read as a whole."""

    change: Site | None = None

    async def contents(self, account_id: UUID) -> Contents:
        found = await super().contents(account_id)
        if self.change is not None:
            change, self.change = self.change, None
            await self.apply(account_id, [Put(change)], who="other", at=change.created_at)
        return found


async def test_a_guessed_number_does_not_apply_a_declaration_to_a_state_that_was_not_read(
    tmp_path: Path,
) -> None:
    store = RacedStore()
    async with installation(tmp_path, store=store) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            number = await store.last_number(UUID(account_id))
            store.change = Site(
                id=here.office.new_id(),
                account_id=UUID(account_id),
                name="Berlin",
                created_at=here.office.clock.utc_now(),
            )
            declared = {"version": 1, "groups": [{"name": "Staff"}]}
            answer = await client.post(
                "/v1/declaration/apply", json={"declaration": declared, "number": number + 1}
            )
            assert (answer.status_code, answer.json()["code"]) == (409, "changed_meanwhile")
            groups = (await client.get("/v1/groups")).json()["items"]
            assert [group["name"] for group in groups] == ["Everyone"]


async def test_many_tokens_of_an_account_call_no_more_often_than_a_few(tmp_path: Path) -> None:
    async with installation(tmp_path, calls_per_s=0.001) as here:
        account_id, admin = await here.admin_of("acme")
        _, neighbour = await here.admin_of("globex")
        tokens = [admin]
        async with here.client(admin) as client:
            [owner] = (await client.get("/v1/principals")).json()["items"]
            for i in range(authentication.TOKENS_WORTH_OF_AN_ACCOUNT + 1):
                one = await made(
                    client, "tokens", kind="api", name=f"t{i}", principal_id=owner["id"]
                )
                tokens.append(one["token"])
        answers: list[int] = []
        async with here.client() as client:
            most = authentication.TOKENS_WORTH_OF_AN_ACCOUNT * authentication.CALLS_BURST
            while len(answers) <= most and 429 not in answers:
                token = tokens[len(answers) % len(tokens)]
                answer = await client.get(
                    f"/v1/accounts/{account_id}", headers={"authorization": f"Bearer {token}"}
                )
                answers.append(answer.status_code)
            assert answer.json()["code"] == "rate_limited"
            assert "together" in answer.json()["detail"]
            answer = await client.get(
                "/v1/accounts", headers={"authorization": f"Bearer {neighbour}"}
            )
            assert answer.status_code == 200


async def test_streams_of_one_account_leave_places_for_others(tmp_path: Path) -> None:
    async with installation(tmp_path) as here, AsyncExitStack() as stack:
        _, admin = await here.admin_of("acme")
        _, neighbour = await here.admin_of("globex")
        client = await stack.enter_async_context(here.client(admin))
        [owner] = (await client.get("/v1/principals")).json()["items"]

        async def opened(token: str) -> int:
            reader = await stack.enter_async_context(here.client(token))
            answer = await stack.enter_async_context(reader.stream("GET", "/v1/events"))
            return answer.status_code

        for i in range(feeds.MAX_READERS_PER_ACCOUNT // feeds.MAX_READERS_PER_TOKEN):
            one = await made(client, "tokens", kind="api", name=f"{i}", principal_id=owner["id"])
            for _ in range(feeds.MAX_READERS_PER_TOKEN):
                assert await opened(one["token"]) == 200
        assert await opened(admin) == 429
        assert await opened(neighbour) == 200


async def test_no_text_of_a_filter_reaches_the_database_that_it_cannot_take(
    tmp_path: Path, database: Logins
) -> None:
    async with (
        PostgresStore.open(database, migrated=True) as store,
        installation(tmp_path, store=store) as here,
    ):
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            for path in (
                "principals?email",
                "resources?address",
                "identities?issuer",
                "identities?subject",
                "changes?who",
                "accounts?slug",
            ):
                refused = await client.get(f"/v1/{path}=a%00b")
                assert (refused.status_code, refused.json()["code"]) == (422, "invalid_fields")


class WatchedStore(MemoryStore):
    """Knows how many changes that it gave out are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[weakref.ref[Change]] = []
        self.most_held = 0

    async def changes(
        self, account_id: UUID, *, after: int, limit: int = MAX_PAGE, equals: Equals = NO_FILTER
    ) -> tuple[Change, ...]:
        found = await super().changes(account_id, after=after, limit=limit, equals=equals)
        copies = tuple(attrs.evolve(each) for each in found)
        self.given = [each for each in self.given if each() is not None]
        self.given += map(weakref.ref, copies)
        self.most_held = max(self.most_held, len(self.given))
        return copies


async def test_a_question_about_the_past_holds_few_changes_at_a_time(tmp_path: Path) -> None:
    store = WatchedStore()
    async with installation(tmp_path, store=store) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            created_at = here.office.clock.utc_now()
            instant = created_at.isoformat()
            common = {"account_id": UUID(account_id), "created_at": created_at}
            for part in range(5):
                sites = [
                    Put(Site(id=here.office.new_id(), name=f"{part} {i}", **common))
                    for i in range(MAX_PAGE)
                ]
                at = here.office.clock.utc_now()
                await store.apply(UUID(account_id), sites, who="test", at=at)
            store.given, store.most_held = [], 0
            answer = await client.post("/v1/policies/at", json={"at": instant})
            assert answer.status_code == 200
            assert answer.json()["number"] < 10
            assert 0 < store.most_held <= 2 * MAX_PAGE


async def test_who_may_read_a_declaration_cannot_try_what_a_secret_is(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            await made(client, "directories", kind="scim", name="Staff", credentials="right")
            [owner] = (await client.get("/v1/principals")).json()["items"]
            reader = await made(
                client,
                "tokens",
                kind="api",
                name="reader",
                principal_id=owner["id"],
                scopes=["declaration:read"],
            )
        seen: dict[str, list[Any]] = {}
        async with here.client(reader["token"]) as client:
            for guess in ("right", "wrong"):
                entry = {"name": "Staff", "kind": "scim", "credentials": guess}
                declared = {"version": 1, "directories": [entry]}
                planned = await client.post("/v1/declaration/plan", json={"declaration": declared})
                seen[guess] = planned.json()["steps"]
        assert seen["right"] == seen["wrong"] != []


async def test_what_the_store_would_refuse_is_refused_as_a_proposal_too(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            ids = await world(here, client)
            fields = {
                "group_id": ids["groups"],
                "resource_id": ids["resources"],
                "conditions": {"current_time": {"zone": "Europe/Berlin", "windows": [{"day": 0}]}},
            }
            for expires_at, status in (
                ("9999-12-31T23:59:59Z", 422),
                ("9998-12-31T23:59:59Z", 200),
            ):
                create = {"action": "create", "noun": "policies"}
                proposed = create | {"fields": fields | {"expires_at": expires_at}}
                answer = await client.post("/v1/policies/diff", json={"mutations": [proposed]})
                assert answer.status_code == status, answer.text
                if status == 422:
                    assert answer.json()["errors"][0]["field"] == "mutations[0].expires_at"
            await made(client, "policies", **fields, expires_at="9998-12-31T23:59:59Z")
            gone = {"action": "delete", "noun": "groups", "id": ids["groups"]}
            for question, body in (
                ("explain", {"principal_id": ids["principals"], "resource_id": ids["resources"]}),
                ("at", {}),
                (
                    "diff",
                    {"mutations": [gone]},
                ),
            ):
                answer = await client.post(f"/v1/policies/{question}", json=body)
                assert answer.status_code == 200, answer.text


async def test_one_row_of_the_request_log_does_not_hold_up_the_others(
    tmp_path: Path, database: Logins
) -> None:
    async with (
        PostgresStore.open(database, migrated=True) as store,
        installation(tmp_path, store=store) as here,
    ):
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            for path in ("a%00b", "%ED%A0%80", "%FF", "%EF%BF%BF", "%E2%80%A8", "x" * 2_000):
                assert (await client.get(f"/v1/nodes/{path}")).status_code == 403
            bad = RequestLog(
                id=here.office.new_id(),
                account_id=UUID(account_id),
                at=here.office.clock.utc_now(),
                token_id=None,
                principal_id=None,
                method="no method",
                path="/",
                status=200,
                code="",
                remote_ip=None,
                user_agent="",
                duration_us=0,
            )
            here.api.journal._waiting.appendleft(bad)
            before = here.api.statistics()["lost_rows"]
            await here.api.journal.flush()
            statistics = here.api.statistics()
            assert (statistics["waiting_rows"], statistics["lost_rows"]) == (0, before + 1)
            logs = (await client.get("/v1/logs/requests", params={"limit": 1_000})).json()["items"]
            assert len([row for row in logs if row["path"].startswith("/v1/nodes/")]) == 6


async def test_a_stranger_does_not_fill_the_memory_for_bodies(tmp_path: Path) -> None:
    most = frontdoor.MAX_BUFFERED_BYTES_OF_SOURCE
    assert 4 * most <= frontdoor.MAX_BUFFERED_BYTES
    count = 1_048_000
    head = b"POST /v1/sites HTTP/1.1\r\nHost: x\r\nContent-Length: 1048576\r\n\r\n"
    async with installation(tmp_path) as here, AsyncExitStack() as stack:
        _, admin = await here.admin_of("acme")

        async def stranger(count: int) -> trio.SSLStream[trio.SocketStream]:
            stream = await trio.open_tcp_stream(
                "127.0.0.1", here.door.address.port, local_address="127.0.0.2"
            )
            tls = trio.SSLStream(stream, here.tls, server_hostname="127.0.0.1")
            stack.push_async_callback(trio.aclose_forcefully, tls)
            await tls.send_all(head + bytes(count))
            return tls

        for place in range(most // count):
            await stranger(count)
            with trio.fail_after(10):
                while here.api.statistics()["buffered_bytes"] < (place + 1) * count:
                    await trio.sleep(0.01)
        last = await stranger(most % count + 1)
        with trio.fail_after(10):
            assert (await last.receive_some()).startswith(b"HTTP/1.1 503 ")
        async with here.client(admin) as client:
            answer = await client.post("/v1/sites", json={"name": "x" * 1_000_000})
            assert answer.status_code == 422
