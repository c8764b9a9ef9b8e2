"""The JSON API over real HTTPS: whoever has no right, no sense or no patience is told so."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from actors.model import Token
from actors.store.interface import Unavailable
from actors.store.memory import MemoryStore
from channel.credentials import decode_token
from portal.api.authentication import CALLS_BURST, FAILURES_BURST
from tests.system.portal_support import installation, make_token

pytestmark = pytest.mark.system


async def test_whoever_has_no_good_token_gets_nowhere(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        office = here.office
        unknown = make_token(office, "operator")[1]
        expired = await here.insert_token(
            "operator", expires_at=office.clock.utc_now() - timedelta(seconds=1)
        )
        relay = await here.insert_token("relay")
        elsewhere = await here.insert_token("operator", allowed_sources=("192.0.2.0/24",))
        body, checksum_broken = {"name": "x"}, admin[:-1] + ("A" if admin[-1] != "A" else "B")
        for token, status, code in [
            (None, 401, "missing_token"),
            ("nonsense", 401, "invalid_token"),
            (checksum_broken, 401, "invalid_token"),
            (unknown, 401, "invalid_token"),
            (expired, 401, "token_expired"),
            (relay, 403, "wrong_token_kind"),
            (elsewhere, 403, "source_not_allowed"),
        ]:
            async with here.client(token) as client:
                answer = await client.post("/v1/sites", json=body)
                assert (answer.status_code, answer.json()["code"]) == (status, code)
                assert ("www-authenticate" in answer.headers) == (status == 401)
                assert answer.headers["content-type"] == "application/problem+json"
        async with here.client(headers={"authorization": "Basic dXNlcjpwYXNz"}) as client:
            assert (await client.get("/v1/sites")).status_code == 401
        async with here.client() as client:
            assert (await client.get("/healthz")).json() == {"status": "ok"}
        async with here.client(here.operator_token) as operator, here.client(admin) as client:
            admin_id = (await client.get("/v1/principals")).json()["items"][0]["id"]
            principal = f"/v1/principals/{admin_id}"
            on_account = {"holloway-account": account_id}
            for path, change, undo, code in [
                (principal, {"role": "member"}, {"role": "admin"}, "not_admin"),
                (principal, {"disabled": True}, {"disabled": False}, "principal_disabled"),
                (
                    f"/v1/accounts/{account_id}",
                    {"disabled": True},
                    {"disabled": False},
                    "account_disabled",
                ),
            ]:
                assert (await operator.patch(path, json=change, headers=on_account)).is_success
                answer = await client.get("/v1/sites")
                assert (answer.status_code, answer.json()["code"]) == (403, code)
                assert (await operator.patch(path, json=undo, headers=on_account)).is_success
            assert (await client.get("/v1/sites")).is_success
            own = f"/v1/tokens/{decode_token(admin).id}"
            assert (await client.delete(own)).status_code == 204
            assert (await client.get("/v1/sites")).status_code == 401


async def test_bad_bodies_get_a_clear_answer_and_the_connection_goes_on(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        json_type = {"content-type": "application/json"}
        async with here.client(admin) as client:
            for content, headers, status, code in [
                (b'{"name": "x"}', {"content-type": "text/plain"}, 415, "not_json"),
                (b'{"name": "x"}', {}, 415, "not_json"),
                (b"", json_type, 422, "invalid_fields"),
                (b"{", json_type, 400, "malformed_json"),
                (b"\xff\xfe", json_type, 400, "malformed_json"),
                (b"[]", json_type, 422, "invalid_fields"),
                (b'{"name": "x", "y": 1}', json_type, 422, "invalid_fields"),
                (b'{"name": "\\ud800"}', json_type, 400, "malformed_json"),
                (b"x" * (1 << 20), json_type, 400, "malformed_json"),
                (b"x" * ((1 << 20) + 1), json_type, 413, "body_too_large"),
                (b"x" * 10_000_000, json_type, 413, "body_too_large"),
            ]:
                answer = await client.post("/v1/sites", content=content, headers=headers)
                assert (answer.status_code, answer.json()["code"]) == (status, code)
                assert answer.json()["detail"]

            async def endless() -> Any:
                for _ in range(160):
                    yield b"x" * 65_536

            answer = await client.post("/v1/sites", content=endless(), headers=json_type)
            assert answer.status_code == 413
            assert (await client.get("/v1/nothing")).json()["code"] == "no_such_path"
            assert (await client.get("/v1/sites/no-uuid")).status_code == 404
            wrong = await client.put("/v1/sites")
            assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
            assert "GET" in wrong.headers["allow"]
            sites = (await client.get("/v1/sites")).json()["items"]
            assert [site["name"] for site in sites] == ["Internet"]


async def test_too_many_calls_are_slowed_and_others_are_not(tmp_path: Path) -> None:
    async with installation(tmp_path, calls_per_s=0.1) as here:
        _, admin = await here.admin_of("acme")
        _, other = await here.admin_of("other")
        async with here.client(admin) as client, here.client(other) as neighbour:
            for i in range(CALLS_BURST):
                answer = await client.get("/v1/accounts")
                assert answer.status_code == 200
                left = f'"token";r={CALLS_BURST - 1 - i};'
                assert answer.headers["ratelimit"].startswith(left)
            assert answer.headers["ratelimit-policy"] == f'"token";q={CALLS_BURST};w=2000'
            answer = await client.get("/v1/accounts")
            assert answer.headers["ratelimit"].startswith('"token";r=0;')
            assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
            assert int(answer.headers["retry-after"]) >= 1
            assert (await neighbour.get("/v1/accounts")).status_code == 200


async def test_whoever_guesses_is_slowed_but_locks_out_nobody(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client, here.client("hlw_api_guess") as guesser:
            assert (await client.get("/v1/sites")).status_code == 200
            statuses = [
                (await guesser.get("/v1/sites")).status_code for _ in range(3 * FAILURES_BURST)
            ]
            assert statuses[0] == 401
            assert statuses[-1] == 429
            assert (await client.get("/v1/sites")).status_code == 200
            async with here.client(here.operator_token) as first_time_here:
                assert (await first_time_here.get("/v1/accounts")).status_code == 200


class AwayStore(MemoryStore):
    """A store whose database is away, once told so."""

    away = False

    async def find_token(self, id: UUID) -> Token | None:
        if self.away:
            raise Unavailable("away")
        return await super().find_token(id)


async def test_a_database_that_is_away_means_503_and_later(tmp_path: Path) -> None:
    store = AwayStore()
    async with installation(tmp_path, store=store) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            store.away = True
            answer = await client.get("/v1/sites")
            assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
            assert int(answer.headers["retry-after"]) >= 1
            assert (await client.get("/healthz")).status_code == 200
            store.away = False
            assert (await client.get("/v1/sites")).status_code == 200
