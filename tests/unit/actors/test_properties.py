"""Whatever happens to an account: what is live is what a cold reload would decide, no more, no
less; what agents hold is what is live; and no actor crashes but those that are made to."""

from __future__ import annotations

from collections.abc import Callable
from datetime import time, timedelta
from typing import Any
from uuid import UUID

import attrs
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from actors.consequences import rejudge
from actors.messages import ACCOUNT, ListLive
from actors.model import (
    Conditions,
    CurrentTimeCondition,
    DayWindow,
    Policy,
    RemoteIpCondition,
    TimeRange,
)
from actors.policy.engine import Allowed, Snapshot
from actors.store.interface import Put
from actors.store.memory import MemoryStore
from actors.tree import ControlPlane
from actors.wire import node_codec
from channel.messages import Filter
from runtime.actor import NamedRef
from runtime.cluster.keyed import Locate, keeper_name
from runtime.cluster.node import start_alone
from runtime.randomness import SeededRandomness
from runtime.scheduler import Scheduler
from runtime.testing import FaultInjector, HeapHost
from tests.nodes import joined

from . import reading
from .world import PORTAL, ClientAgent, GatewayAgent, World, run

ADDRESSES = ["203.0.113.7", "198.51.100.20", "2001:db8::7"]


class Story:
    """A world in which things happen by number, so that hypothesis can shrink what happened."""

    allowed_crashes: tuple[str, ...] = ("on purpose",)

    def __init__(
        self,
        effect_delay_ns: tuple[int, int] = (0, 0),
        injector: FaultInjector | None = None,
    ) -> None:
        self.world = world = World(effect_delay_ns=effect_delay_ns, injector=injector)
        self.groups = [world.everyone, world.staff]
        self.resources = [world.web, world.db]
        self.gateways = [world.gateway("one"), world.gateway("two")]
        self.clients = [world.client(), world.client(remote=ADDRESSES[1])]
        world.run_for(1)
        self.agents: list[ClientAgent | GatewayAgent] = [*self.gateways, *self.clients]
        self.policy_ids = [world.new_id() for _ in range(3)]
        self.member_id = world.new_id()

    # --- what can happen ---

    def put_policy(self, which: int, choice: int) -> None:
        world = self.world
        remote = RemoteIpCondition(
            operator="is_in" if choice % 2 else "is_not_in",
            values=("203.0.113.0/24",) if choice % 3 else ("198.51.100.0/24", "2001:db8::/32"),
        )
        start = choice % 24
        window = TimeRange(start=time(start), end=time(start + 9 if start < 15 else 0))
        hours = CurrentTimeCondition(
            zone="Europe/Berlin",
            windows=tuple(DayWindow(day=day, ranges=(window,)) for day in range(choice % 7 + 1)),
        )
        common = world.common() | {"id": self.policy_ids[which % 3]}
        policy = Policy(
            **common,
            group_id=self.groups[choice % 2].id,
            resource_id=self.resources[choice // 2 % 2].id,
            disabled=choice % 13 == 3,
            lease_s=(60, 3_600, 86_400)[choice % 3],
            expires_at=world.clock.utc_now() + timedelta(minutes=choice)
            if choice % 5 == 0
            else None,
            conditions=Conditions(
                remote_ip=remote if choice % 6 == 1 else None,
                current_time=hours if choice % 6 == 2 else None,
            ),
        )
        self.try_put(policy)

    def remove_policy(self, which: int, choice: int) -> None:
        if any(each.id == self.policy_ids[which % 3] for each in self.world.entities("policy")):
            self.world.remove("policy", self.policy_ids[which % 3])

    def toggle_membership(self, which: int, choice: int) -> None:
        world = self.world
        members = world.entities("membership")
        if members:
            world.remove("membership", members[0].id)
        else:
            world.membership(world.staff, world.user)

    def disable_principal(self, which: int, choice: int) -> None:
        row = self.world.get("principal", self.world.user.id)
        self.world.put(attrs.evolve(row, disabled=choice % 4 == 0))

    def disable_account(self, which: int, choice: int) -> None:
        row = self.world.get("account", self.world.account.id)
        self.world.put(attrs.evolve(row, disabled=choice % 4 == 0))

    def change_resource(self, which: int, choice: int) -> None:
        row = self.resource(which)
        if choice % 2:
            self.world.put(attrs.evolve(row, address=f"10.0.1.{choice % 250}"))
        else:
            filters = (Filter(protocol="tcp", port_start=choice, port_end=choice + 1),)
            self.world.put(attrs.evolve(row, filters=filters))

    def change_unwatched(self, which: int, choice: int) -> None:
        """While no account actor lives."""
        ref = self.world.account_actor()
        self.world.scheduler.stop(ref, "crashed: on purpose")
        (self.change_resource, self.put_policy, self.remove_policy)[choice % 3](which, choice)

    def approve_gateway(self, which: int, choice: int) -> None:
        rows = sorted(self.world.entities("gateway"), key=lambda row: str(row.name))
        if rows:
            row = rows[which % len(rows)]
            self.world.put(attrs.evolve(row, approved=choice % 3 > 0))

    def remove_device(self, which: int, choice: int) -> None:
        kind: Any = ("client", "gateway")[choice % 2]
        rows = self.world.entities(kind)
        if rows:
            self.world.remove(kind, rows[which % len(rows)].id)

    def change_token(self, which: int, choice: int) -> None:
        at = self.world.clock.utc_now() + timedelta(minutes=choice) if choice % 3 == 0 else None
        text = self.world.user_token if which % 2 else self.world.site_token
        self.world.change_token(text, expires_at=at)

    def ask(self, which: int, choice: int) -> None:
        client = self.clients[which % 2]
        if not client.is_connected:
            return
        known = {each.id for each in self.gateways if each.init is not None}
        listed = tuple(sorted(known)) if choice % 3 == 0 else ()
        failed = tuple(sorted(known)) if choice % 5 == 0 else ()
        client.request(self.resource(choice), connected=listed, failed=failed)

    def move(self, which: int, choice: int) -> None:
        client = self.clients[which % 2]
        if client.is_connected:
            client.move(ADDRESSES[choice % 3])

    def lose(self, which: int, choice: int) -> None:
        agent = self.agents[which % 4]
        if agent.is_connected:
            agent.lose_channel()

    def join(self, which: int, choice: int) -> None:
        agent = self.agents[which % 4]
        if choice % 3 == 0:
            agent.restart()
        agent.join()
        for other in self.agents:  # the others come back too
            if choice % 2 and not other.is_connected:
                other.join()

    def silence(self, which: int, choice: int) -> None:
        gateway = self.gateways[which % 2]
        gateway.is_silent = choice % 4 == 0

    def crash_account(self, which: int, choice: int) -> None:
        self.world.crash(self.world.account_actor())

    def crash_owner(self, which: int, choice: int) -> None:
        agent = self.agents[which % 4]
        if agent.is_connected:
            self.world.crash(self.world.owner_of(agent))

    def kill_portal(self, which: int, choice: int) -> None:
        self.world.kill_portal(*self.agents)
        self.world.start_portal()

    def wait(self, which: int, choice: int) -> None:
        self.world.run_for((1, 31, 600, 3_601, 30_000)[which % 5])

    # --- helpers ---

    def resource(self, which: int) -> Any:
        return self.world.get("resource", self.resources[which % 2].id)

    def try_put(self, policy: Policy) -> None:
        older = [each for each in self.world.entities("policy") if each.id == policy.id]
        self.world.put(attrs.evolve(policy, created_at=older[0].created_at) if older else policy)

    # --- what must hold ---

    def check(self) -> None:
        world = self.world
        live = world.live()
        rows = world.rows(live=True)
        assert live == set(rows)
        contents = run(world.store.contents(world.account.id))
        snapshot, now = Snapshot.of(contents), world.clock.utc_now()
        for row in rows.values():
            assert isinstance(rejudge(snapshot, row, now), Allowed)
            expires_at, _, _ = reading.decide(
                contents.account,
                list(contents.entities),
                row.client_id,
                row.resource_id,
                row.token_id,
                row.remote_ip,
                now,
            )
            assert expires_at is not None
            assert row.expires_at <= now + timedelta(days=1)
        assert self.reloaded() == live
        for client in self.clients:
            for row in rows.values():
                if client.is_connected and row.client_id == client.id:
                    assert row.remote_ip == client.remote
        for agent, side in [(each, "gateway_id") for each in self.gateways] + [
            (each, "client_id") for each in self.clients
        ]:
            if agent.is_connected:
                own = {id for id, row in rows.items() if getattr(row, side) == agent.id}
                assert set(agent.live) == own, agent.name
        for gateway in self.gateways:
            for id in gateway.live if gateway.is_connected else ():
                address = snapshot.resources[rows[id].resource_id].address
                assert gateway.addresses[id] == address
        for crash in world.crashes:
            assert any(each in crash.reason for each in self.allowed_crashes), crash

    def reloaded(self) -> frozenset[UUID]:
        """What an account actor holds for live that starts now from what the store says."""
        world = self.world
        store = MemoryStore(world.clock)
        contents = run(world.store.contents(world.account.id))
        run(
            store.apply(
                world.account.id,
                [Put(contents.account), *map(Put, contents.entities)],
                who="copy",
                at=world.clock.utc_now(),
            )
        )
        owner = run(joined(store, "copy"))
        epoch = run(store.acquire(world.account.id, **owner))
        for row in world.rows().values():
            run(store.write_authorization(row, epoch=epoch))
        randomness = SeededRandomness(2, "reload")
        scheduler = Scheduler(
            clock=world.clock,
            randomness=randomness,
            node=owner["owner"],
            incarnation=owner["incarnation"],
        )
        host = HeapHost(scheduler, world.clock)

        async def prove(address: object, pins: object) -> bool:
            return True

        plane = ControlPlane(
            scheduler,
            store,
            world.clock,
            randomness,
            portal_name=PORTAL,
            prove_address=prove,
            tenure=start_alone(scheduler, store, node_codec(), incarnation=owner["incarnation"]),
        )
        plane.start()
        host.run_until_idle()
        located = host.call(NamedRef(keeper_name(ACCOUNT)), Locate(world.account.id))
        answer: frozenset[UUID] = host.call(located.ref, ListLive())
        return answer


EVENTS: dict[str, Callable[[Story, int, int], None]] = {
    name: getattr(Story, name)
    for name in (
        "ask",
        "put_policy",
        "remove_policy",
        "toggle_membership",
        "disable_principal",
        "disable_account",
        "change_resource",
        "change_unwatched",
        "approve_gateway",
        "remove_device",
        "change_token",
        "move",
        "lose",
        "join",
        "silence",
        "crash_account",
        "crash_owner",
        "kill_portal",
        "wait",
    )
}
# Requests and policies more often than the rest, or little would ever be live.
NAMES = [*EVENTS, *["ask"] * 8, *["put_policy"] * 6, *["join"] * 5]

happenings = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 5), st.integers(0, 59)),
    min_size=1,
    max_size=40,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
@given(happenings)
def test_what_is_live_is_always_what_a_cold_reload_would_decide(
    events: list[tuple[str, int, int]],
) -> None:
    story = Story()
    for policy in range(2):
        story.put_policy(policy, policy * 2 + 4)
    for name, which, choice in events:
        note(f"{name} {which} {choice}")
        EVENTS[name](story, which, choice)
        story.world.run_for(8)  # whoever is silent, twice, has been left by then
        story.check()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
@given(happenings, st.lists(st.sampled_from([1, 10, 50, 500, 8_000]), min_size=40, max_size=40))
def test_it_is_so_too_when_the_store_takes_its_time_and_things_happen_at_once(
    events: list[tuple[str, int, int]], pauses_ms: list[int]
) -> None:
    story = Story(effect_delay_ns=(0, 30_000_000))
    for policy in range(2):
        story.put_policy(policy, policy * 2 + 4)
    for (name, which, choice), pause_ms in zip(events, pauses_ms, strict=False):
        note(f"{name} {which} {choice}, then {pause_ms} ms")
        EVENTS[name](story, which, choice)
        story.world.run_for(pause_ms / 1_000)
        if pause_ms == 8_000:
            story.check()
    story.world.run_for(8)
    story.check()
