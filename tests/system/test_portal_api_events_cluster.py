"""Events at a portal of two nodes: whichever is asked, a stream tells of changes that were made,
and of agents that connect, at either. An account has its actor at one of them alone."""

from __future__ import annotations

import httpx
import pytest
import trio

from tests.system.test_cluster_command import nodes_of, pair_of, two_nodes
from tests.system.test_portal_api_events import Event, Stream, reading
from tests.system.test_portal_node import Portal, portal, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]


def client_of(here: Portal, address: str, account: str) -> httpx.AsyncClient:
    """The API at one node, for one account."""
    client = here.client()
    client.base_url = httpx.URL(f"https://{address}")
    client.headers["holloway-account"] = account
    return client


async def presence(stream: Stream, online: bool) -> dict[str, Event]:
    """The next word of a client and a gateway that both come, or both go, by kind."""
    found: dict[str, Event] = {}
    while len(found) < 2:
        event = await stream.next()
        if event.name == "presence" and event.data["online"] == online:
            found[event.data["kind"]] = event
    return found


async def test_either_node_tells_of_agents_and_changes_at_both() -> None:
    async with two_nodes() as here:

        async def both_are_up() -> bool:
            nodes = await nodes_of(here.state)
            return len(nodes) == 2 and all(each["status"] for each in nodes.values())

        await until(both_are_up)
        async with here.client() as first:
            nodes = (await first.get("/v1/nodes")).json()["items"]
            addresses = [node["node_address"] for node in nodes]
            assert len(set(addresses)) == 2
            pair = await pair_of(first, "acme")
            account = str(first.headers["holloway-account"])
        clients = [client_of(here, address, account) for address in addresses]
        async with (
            clients[0] as one,
            clients[1] as other,
            reading(one) as at_one,
            reading(other) as at_other,
        ):
            async with trio.open_nursery() as agents:
                agents.start_soon(pair.client.dialer.run)
                agents.start_soon(pair.gateway.dialer.run)
                came = [await presence(stream, True) for stream in (at_one, at_other)]
                assert came[0] == came[1]
                devices = (await one.get("/v1/clients")).json()["items"]
                assert came[0]["client"].data["id"] == devices[0]["id"]
                await other.post("/v1/sites", json={"name": "Paris"})
                for stream in (at_one, at_other):
                    while (event := await stream.next()).name != "change" or (
                        (event.data["after"] or {}).get("name") != "Paris"
                    ):
                        pass
                agents.cancel_scope.cancel()
            gone = [await presence(stream, False) for stream in (at_one, at_other)]
            assert gone[0].keys() == {"client", "gateway"}
            assert {each.data["id"] for each in gone[1].values()} == {
                each.data["id"] for each in came[0].values()
            }


async def test_the_one_node_that_there_is_tells_of_its_agents_and_of_its_end() -> None:
    async with portal() as here, here.client() as client:
        pair = await pair_of(client, "acme")
        async with reading(client) as stream, trio.open_nursery() as agents:
            agents.start_soon(pair.client.dialer.run)
            agents.start_soon(pair.gateway.dialer.run)
            came = await presence(stream, True)
            assert came["client"].data["remote_ip"] == "127.0.0.1"
            assert await here.end() == 0
            events = await stream.rest()
            assert (events[-1].name, events[-1].data["code"]) == ("end", "draining")
            agents.cancel_scope.cancel()
