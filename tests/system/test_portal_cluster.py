"""A portal of several nodes under load, and whatever may happen to it.

200 accounts, 40 of them with a client and a gateway on real channels, three nodes on three raylets.
Admins change accounts and clients ask for access without a pause, while nodes come, go, are killed
and stopped, links and the database fail. After each event every client is granted access anew, and
then `check` looks whether
- all that admins were told to be done is there;
- every authorisation was written by the owner of its account, and epochs never went back;
- every authorisation that a client was granted is in the database;
- none that both agents held before the event has ended, but for a newer one in its place;
- accounts without agents can be asked about at every node: a quarter of them each time.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from uuid import UUID

import pytest
import trio

from channel.messages import AuthorizationDenied
from tests.system.cluster_world import Recovery, World, open_world, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world() as world:
        yield world


async def check(world: World, what: str, begun: float) -> Recovery:
    """See the module. `begun` is when the event `what` was."""
    recovery = await world.served_since(begun)
    print(f"{what}: {recovery}")
    for answer in await world.denied():
        assert isinstance(answer, AuthorizationDenied)
        assert answer.reason == "forbidden"
    await world.in_thread(check_database, world)
    assert await world.unexplained() == []
    await world.settle()
    world.note_held()
    return recovery


def check_database(world: World) -> None:
    calls = {id: site.calls for id, site in list(world.record.site_by_id.items())}
    sites = dict(world.query("SELECT id, name FROM site"))
    for id, before in calls.items():
        site = world.record.site_by_id[id]
        if before == site.calls and not before % 2:  # nobody was about to change it
            assert sites.get(id) in {site.acknowledged, *site.in_doubt}, site
    others = "SELECT account_id, writer, owner, epoch FROM written WHERE writer <> owner"
    assert world.query(others) == []
    back = """
        SELECT * FROM (
            SELECT number, account_id, epoch,
                   lag(epoch) OVER (PARTITION BY account_id ORDER BY number) AS before
            FROM written
        ) AS ordered WHERE epoch < before
    """
    assert world.query(back) == []
    shared = """
        SELECT account_id, epoch FROM written GROUP BY 1, 2
        HAVING count(DISTINCT (owner, incarnation)) > 1
    """
    assert world.query(shared) == [], "one epoch, two owners"
    granted = granted_to(world)
    reason_by_id = dict(world.query('SELECT id, end_reason FROM "authorization"'))
    assert granted <= reason_by_id.keys()
    assert {reason_by_id[id] for id in world.held} <= {"", "replaced"}


def granted_to(world: World) -> set[UUID]:
    return {id for customer in world.customers for id in list(customer.client.granted)}


def test_at_first_all_are_served(world: World) -> None:
    world.run(check, world, "start", time.monotonic())


def test_a_node_joins_and_another_drains(world: World) -> None:
    """As agents see it, no call is refused, and nothing that was granted is taken back."""

    async def events() -> None:
        world.asked.clear()
        before = granted_to(world)
        begun = time.monotonic()
        name = await world.start_node()
        print(f"{name} is up after {time.monotonic() - begun:.1f} s")
        joined = await check(world, "node joined", time.monotonic())
        assert (await world.status_of(name))["accounts"] > 0
        begun = time.monotonic()
        await world.drain_node("n2")
        print(f"n2 has drained after {time.monotonic() - begun:.1f} s")
        drained = await check(world, "node drained", begun)
        print("requests meanwhile:", dict(world.asked))
        fresh = granted_to(world) - before
        rows = await world.in_thread(world.query, 'SELECT id, end_reason FROM "authorization"')
        print("how all grants ended:", dict(Counter(reason for _, reason in rows)))
        assert {reason for id, reason in rows if id in fresh} <= {"", "replaced"}
        assert set(world.asked) == {"granted"}
        assert not joined.refusals + drained.refusals

    world.run(events)


def test_a_node_s_process_is_killed(world: World) -> None:
    async def events() -> None:
        pid = await world.pid_of("n3")
        begun = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        await check(world, "kill -9 of a node", begun)
        await world.is_back("n3", pid)
        print(f"n3 is back after {time.monotonic() - begun:.1f} s")
        await check(world, "its return", time.monotonic())

    world.run(events)


def test_a_raylet_is_killed(world: World) -> None:
    async def events() -> None:
        pids = {name: await world.pid_of(name) for name in world.nodes}
        homes = {name: world.raylet_of(pid) for name, pid in pids.items()}
        victim = next(each for each in homes.values() if each is not world.ray.raylets[0])
        lost = [name for name, home in homes.items() if home is victim]
        begun = time.monotonic()
        os.killpg(victim.pid, signal.SIGKILL)

        async def gone() -> bool:
            return not {pids[name] for name in lost}.intersection(victim.processes())

        await until(gone)
        print(f"its nodes are gone after {time.monotonic() - begun:.1f} s")
        await check(world, f"kill -9 of the raylet of {', '.join(lost)}", begun)
        for name in lost:
            await world.is_back(name, pids[name])
        print(f"its nodes are back after {time.monotonic() - begun:.1f} s")
        await world.in_thread(world.ray.replace, victim)
        await check(world, "their return", time.monotonic())

    world.run(events)


def test_a_node_is_stopped_and_resumed(world: World) -> None:
    async def events() -> None:
        pid = await world.pid_of("n3")
        door = world.nodes["n3"].door
        before = await world.status_of("n3")
        elsewhere = [
            each for each in world.customers
            if door not in (each.client.door, each.gateway.door)
        ]  # fmt: skip
        os.kill(pid, signal.SIGSTOP)
        begun = time.monotonic()
        try:
            print("SIGSTOP of a node, agents elsewhere:", await world.served(elsewhere))
            await trio.sleep_until(trio.current_time() + max(0, begun + 10 - time.monotonic()))
        finally:
            os.kill(pid, signal.SIGCONT)
        await check(world, "SIGSTOP for 10 s, then SIGCONT", begun)
        after = await world.status_of("n3")
        assert after["pid"] == before["pid"]

    world.run(events)


def test_the_database_is_out_of_reach_of_one_node_and_of_all(world: World) -> None:
    async def events() -> None:
        name = "n3"
        door = world.nodes[name].door
        owned = {id for (id,) in world.query("SELECT account_id FROM lease WHERE owner = %s", name)}
        elsewhere = [
            each for each in world.customers
            if each.id in owned and door not in (each.client.door, each.gateway.door)
        ]  # fmt: skip
        world.between.tell("hold", world.nodes[name].database)
        print("no database for the owner, agents elsewhere:", await world.served(elsewhere))

        async def lapsed() -> bool:
            return not (await world.status_of(name))["ready"]

        await until(lapsed)
        last = world.query("SELECT max(number) FROM written WHERE writer = %s", name)
        await trio.sleep(2)
        assert world.query("SELECT max(number) FROM written WHERE writer = %s", name) == last
        world.between.tell("release", world.nodes[name].database)
        await check(world, "no database for one node", time.monotonic())

        databases = [node.database for node in world.nodes.values()]
        world.between.tell("refuse", *databases)
        await trio.sleep(8)
        granted = world.asked["granted"]
        await trio.sleep(2)
        assert world.asked["granted"] == granted
        world.between.tell("release", *databases)
        await check(world, "no database for all, 10 s", time.monotonic())

    world.run(events)


def test_a_pair_of_nodes_is_parted(world: World) -> None:
    async def events() -> None:
        await world.settle()
        places = await world.places()

        def across(pair: tuple[str, str]) -> int:
            """How many have their agents on both sides of it, and their account beyond."""
            return sum(
                {client, gateway} == {*pair} and owner not in pair
                for owner, client, gateway in places.values()
            )

        one, other = max(combinations(world.nodes, 2), key=across)
        apart = [each for each in world.customers if {one, other} <= {*places[each.id]}]
        assert apart, "nobody is at both"
        beyond = across((one, other))
        print(f"of {len(apart)} at {one} and {other}, {beyond} have their account beyond")
        world.note_held()
        world.asked.clear()
        await world.part(one, other)
        begun = time.monotonic()

        async def parted() -> bool:
            return not (await world.are_linked(one, other) or await world.are_linked(other, one))

        await until(parted)
        print(f"{one} and {other} are parted after {time.monotonic() - begun:.1f} s")
        others = [each for each in world.customers if each not in apart]
        print("meanwhile, the others:", await world.served(others, since=begun))
        print("meanwhile, those at both:", await world.served(apart, since=begun))
        print("meanwhile, all once more:", await world.served())
        assert await parted()
        print("requests meanwhile:", dict(world.asked))
        world.join(one, other)
        await check(world, f"{one} and {other} were parted", time.monotonic())
        await until(partial(world.are_linked, one, other))

    world.run(events)


def test_all_links_are_silent(world: World) -> None:
    async def events() -> None:
        links = [node.links for node in world.nodes.values()]
        world.between.tell("hold", *links)
        begun = time.monotonic()

        async def parted() -> bool:
            return not any([(await world.status_of(name))["links"] for name in world.nodes])

        await until(parted)
        print(f"no links after {time.monotonic() - begun:.1f} s")
        at_home = await world.at_home()
        print("meanwhile, agents and account at one node:", await world.served(at_home))
        # Agents stay where they were sent: from here on they are all at home.
        print("meanwhile, all, each at its account's node:", await world.served_since(begun))
        assert await parted()
        world.between.tell("release", *links)
        await check(world, "links were silent", time.monotonic())

    world.run(events)


def test_ray_s_head_is_away(world: World) -> None:
    async def events() -> None:
        pids = {name: await world.pid_of(name) for name in world.nodes}
        os.killpg(world.ray.head.pid, signal.SIGKILL)
        begun = time.monotonic()
        await world.in_thread(world.ray.head.end)
        await check(world, "without Ray's head", begun)
        await trio.sleep(max(0, begun + 10 - time.monotonic()))
        await world.in_thread(world.ray.head_returns)

        async def found() -> bool:
            found = {each.name: each.pid for each in await world.hosted()}
            return found == pids

        await until(found)
        print(f"head killed for 10 s: nodes found after {time.monotonic() - begun - 10:.1f} s")

    world.run(events)


def test_the_load_was_real(world: World) -> None:
    record = world.record
    print("admins:", record.acknowledged, record.refused, record.unanswered, dict(world.asked))
    assert record.acknowledged > 100
