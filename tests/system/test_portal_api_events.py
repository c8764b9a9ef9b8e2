"""The stream of events over real HTTPS: changes in order and without gaps, presence, its end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import attrs
import httpx
import pytest
import trio

from actors.model import Site
from actors.store.interface import Put, Remove, Unavailable
from actors.store.memory import MemoryStore
from channel.credentials import decode_token
from portal.api.feeds import MAX_PRESENCES, MAX_READERS_PER_TOKEN
from portal.api.office import Online
from tests.system.portal_support import Installation, installation, made

pytestmark = pytest.mark.system


@attrs.frozen
class Event:
    name: str
    data: dict[str, Any]
    id: int | None


@attrs.define
class Stream:
    """The events of one stream, read as they come."""

    lines: AsyncIterator[str]
    comments: int = 0

    async def next(self) -> Event:
        """The next event. Fails after a minute without one, or at the end of the stream."""
        fields: dict[str, str] = {}
        with trio.fail_after(60):
            async for line in self.lines:
                if line.startswith(":"):
                    self.comments += 1
                elif line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                elif "data" in fields:
                    id = int(fields["id"]) if "id" in fields else None
                    return Event(fields["event"], json.loads(fields["data"]), id)
                else:
                    fields.clear()
        raise EOFError

    async def rest(self) -> list[Event]:
        """All that comes until the stream ends."""
        events = []
        try:
            while True:
                events.append(await self.next())
        except EOFError:
            return events


@asynccontextmanager
async def reading(client: httpx.AsyncClient, **options: Any) -> AsyncIterator[Stream]:
    """A stream that has begun."""
    async with client.stream("GET", "/v1/events", **options) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.aiter_lines()
        assert (await anext(lines)).startswith("retry: ")
        yield Stream(lines)


async def readers(here: Installation, wanted: int) -> None:
    """Until this node has so many streams."""
    with trio.fail_after(30):
        while len(here.api.feeds) != wanted:
            await trio.sleep(0.01)


async def test_changes_come_in_order_as_they_happen(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        _, other = await here.admin_of("other")
        async with here.client(admin) as client, here.client(other) as stranger:
            changes = (await client.get("/v1/changes?limit=1000")).json()["items"]
            async with reading(client) as stream:
                await made(stranger, "sites", name="not for us")
                site = await made(client, "sites", name="Paris")
                event = await stream.next()
                assert (event.name, event.id) == ("change", changes[-1]["number"] + 1)
                assert event.data == (await client.get(f"/v1/changes/{event.id}")).json()
                assert event.data["after"]["name"] == "Paris"
                await client.patch(f"/v1/sites/{site['id']}", json={"name": "Lyon"})
                await client.delete(f"/v1/sites/{site['id']}")
                events = [await stream.next(), await stream.next()]
                assert [each.id for each in events] == [event.id + 1, event.id + 2]
                assert events[1].data["after"] is None


async def test_a_stream_resumes_without_a_gap(tmp_path: Path) -> None:
    async with installation(tmp_path, calls_per_s=10**6) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            for i in range(250):
                await made(client, "sites", name=f"s{i}")
            last = int((await client.get("/v1/changes?limit=1000")).json()["items"][-1]["number"])
            async with reading(client, headers={"last-event-id": "7"}) as stream:
                await made(client, "sites", name="late")
                ids = [(await stream.next()).id for _ in range(last + 1 - 7)]
            assert ids == list(range(8, last + 2))
            for id, status, code in [
                (str(last + 2), 410, "events_gone"),
                ("x", 422, "invalid_fields"),
                ("-1", 422, "invalid_fields"),
                ("9" * 19, 422, "invalid_fields"),
            ]:
                answer = await client.get("/v1/events", headers={"last-event-id": id})
                assert (answer.status_code, answer.json()["code"]) == (status, code), id


async def test_what_is_not_kept_any_more_is_a_gap_that_is_told(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            await client.patch(
                f"/v1/accounts/{account_id}", json={"retention": {"changes_days": 1}}
            )
            await made(client, "sites", name="Paris")
            await here.store.expire(here.office.clock.utc_now() + timedelta(days=2))
            answer = await client.get("/v1/events", headers={"last-event-id": "1"})
            assert (answer.status_code, answer.json()["code"]) == (410, "events_gone")


class PruningStore(MemoryStore):
    """Loses its past while somebody reads."""

    async def prune(self, account_id: UUID) -> None:
        book = self._books[account_id]
        book.pruned = book.number
        book.changes.clear()
        self._wake(account_id)


async def test_a_reader_that_is_left_behind_is_told_so(tmp_path: Path) -> None:
    store = PruningStore()
    async with installation(tmp_path, store=store) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client, reading(client) as stream:
            store._books[UUID(account_id)].number += 5  # as if they had been made and pruned
            await store.prune(UUID(account_id))
            (event,) = await stream.rest()
            assert (event.name, event.data["code"]) == ("end", "gap")


async def test_presence_comes_as_it_is_said_and_what_was_missed_is_told_later(
    tmp_path: Path,
) -> None:
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        account, device = UUID(account_id), here.office.new_id()
        async with here.client(admin) as client, reading(client) as stream:
            await readers(here, 1)
            here.agents.comes(account, device, 1)
            event = await stream.next()
            assert (event.name, event.id) == ("presence", None)
            assert event.data == {
                "kind": "client",
                "id": str(device),
                "online": True,
                "remote_ip": "192.0.2.7",
            }
            here.agents.comes(account, device, 1)  # said twice, told once
            here.agents.comes(account, device, 2, "192.0.2.8")
            assert (await stream.next()).data["remote_ip"] == "192.0.2.8"
            here.agents.goes(account, device)
            assert (await stream.next()).data["online"] is False
            unheard = here.office.new_id()
            here.agents.by_account[account][unheard] = Online(
                kind="gateway", remote_ip="192.0.2.9", number=1
            )
            await here.api.feeds._check_presence(account)
            assert (await stream.next()).data["id"] == str(unheard)


async def test_a_stream_ends_when_its_token_may_not_read_it_any_more(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            admins = (await client.get("/v1/principals?role=admin")).json()["items"]
            body = {"kind": "api", "name": "reader", "principal_id": admins[0]["id"]}
            for end, code in [
                ("delete", "invalid_token"),
                ("narrow", "scope_missing"),
                ("disable", "principal_disabled"),
                ("expire", "token_expired"),
            ]:
                new = await made(client, "tokens", **body, scopes=["events:read", "sites:read"])
                path = f"/v1/tokens/{new['id']}"
                async with here.client(new["token"]) as reader, reading(reader) as stream:
                    match end:
                        case "delete":
                            await client.delete(path)
                        case "narrow":
                            await client.patch(path, json={"scopes": ["sites:read"]})
                        case "disable":
                            other = await made(client, "principals", name="Eva", role="admin")
                            async with here.client(here.operator_token) as operator:
                                await operator.patch(
                                    f"/v1/principals/{admins[0]['id']}",
                                    json={"disabled": True},
                                    headers={"holloway-account": account_id},
                                )
                            assert other
                        case "expire":
                            soon = here.office.clock.utc_now() + timedelta(seconds=1)
                            await client.patch(path, json={"expires_at": soon.isoformat()})
                    events = await stream.rest()
                    assert (events[-1].name, events[-1].data["code"]) == ("end", code), end
                if end == "disable":
                    async with here.client(here.operator_token) as operator:
                        await operator.patch(
                            f"/v1/principals/{admins[0]['id']}",
                            json={"disabled": False},
                            headers={"holloway-account": account_id},
                        )
            await readers(here, 0)


async def test_an_operators_stream_ends_with_its_token(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        account_id, _ = await here.admin_of("acme")
        text = await here.insert_token("operator")
        on_account = {"holloway-account": account_id}
        async with here.client(text) as operator, here.client(here.operator_token) as other:
            async with reading(operator, headers=on_account) as stream:
                assert (await other.delete(f"/v1/tokens/{decode_token(text).id}")).is_success
                events = await stream.rest()
                assert [each.data["code"] for each in events] == ["invalid_token"]
            nameless = await other.get("/v1/events")
            assert (nameless.status_code, nameless.json()["code"]) == (400, "account_required")


async def test_a_reader_that_takes_nothing_is_sent_away_with_a_word(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        account = UUID(account_id)
        async with here.client(admin) as client, reading(client) as stream:
            await readers(here, 1)
            for _ in range(MAX_PRESENCES + 2):  # all at once: nothing is sent in between
                here.agents.comes(account, here.office.new_id(), 1)
            events = await stream.rest()
            assert (events[-1].name, events[-1].data["code"]) == ("end", "too_slow")
            await readers(here, 0)


async def test_streams_of_one_token_are_bounded(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        _, other = await here.admin_of("other")
        limits = httpx.Limits(max_connections=None)
        async with here.client(admin, limits=limits) as client, here.client(other) as neighbour:

            async def hold(task_status: trio.TaskStatus[None]) -> None:
                async with reading(client):
                    task_status.started()
                    await trio.sleep_forever()

            async with trio.open_nursery() as nursery:
                for _ in range(MAX_READERS_PER_TOKEN):
                    await nursery.start(hold)
                answer = await client.get("/v1/events")
                assert (answer.status_code, answer.json()["code"]) == (429, "too_many_streams")
                assert int(answer.headers["retry-after"]) >= 1
                async with reading(neighbour):
                    pass
                nursery.cancel_scope.cancel()
            await readers(here, 0)  # whoever hangs up leaves nothing behind
            async with reading(client):
                pass


async def test_a_node_that_ends_tells_its_readers(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client, reading(client) as stream:
            here.api.feeds.close()
            assert [each.data["code"] for each in await stream.rest()] == ["draining"]
            assert (await client.get("/v1/events")).status_code == 503


async def test_nothing_is_told_beyond_the_change_that_takes_the_right_away(tmp_path: Path) -> None:
    """All at once in one transaction, so that a reader finds them in one batch."""
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            admins = (await client.get("/v1/principals?role=admin")).json()["items"]
            new = await made(
                client, "tokens", kind="api", name="reader", principal_id=admins[0]["id"]
            )
            account, now = UUID(account_id), here.office.clock.utc_now()
            common: dict[str, Any] = {"account_id": account, "created_at": now}
            sites = [Site(id=here.office.new_id(), name=f"s{i}", **common) for i in range(3)]
            async with here.client(new["token"]) as reader, reading(reader) as stream:
                await here.store.apply(
                    account,
                    [Put(sites[0]), Remove("token", UUID(new["id"])), *map(Put, sites[1:])],
                    who="test",
                    at=now,
                )
                events = await stream.rest()
                assert [(each.name, each.data.get("kind")) for each in events] == [
                    ("change", "site"),
                    ("change", "token"),
                    ("end", None),
                ]


class AwayStore(MemoryStore):
    """A store whose database is away, while told so."""

    is_away = False

    async def changes(self, *args: Any, **options: Any) -> Any:
        if self.is_away:
            raise Unavailable("away")
        return await super().changes(*args, **options)


async def test_a_stream_outlives_the_loss_of_the_database(tmp_path: Path) -> None:
    store = AwayStore()
    async with installation(tmp_path, store=store) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client, reading(client) as stream:
            store.is_away = True
            await made(client, "tokens", kind="client", name="a", principal_id=await of(client))
            await trio.sleep(0.2)
            store.is_away = False
            await made(client, "tokens", kind="client", name="b", principal_id=await of(client))
            names = [(await stream.next()).data["after"]["name"] for _ in range(2)]
            assert names == ["a", "b"]


async def of(client: httpx.AsyncClient) -> str:
    """The id of a principal."""
    return str((await client.get("/v1/principals")).json()["items"][0]["id"])
