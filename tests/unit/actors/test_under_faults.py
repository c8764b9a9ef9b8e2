"""The control plane under drawn orders of turns, actors that crash in the midst of their work, and
a store that is away, slow, or did what it then says it could not do."""

from __future__ import annotations

from uuid import UUID

import attrs
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from actors.model import Conditions, RemoteIpCondition
from actors.relay import RelayDirectory
from actors.store.interface import Unavailable
from channel.messages import (
    AuthorizationCreated,
    AuthorizationDenied,
    AuthorizationRenewed,
    Authorize,
    ClientInit,
    GatewayInit,
)
from runtime.clock import NS_PER_MS
from runtime.faults import MILLION
from runtime.randomness import SeededRandomness, choice
from runtime.supervisor import Supervisor
from runtime.testing import FaultInjector, Faults

from .test_properties import ADDRESSES, EVENTS, NAMES, Story
from .world import World

STORE = (
    "acquire", "apply", "authorizations", "changes", "contents", "find_token", "get", "list",
    "use_token", "write_authorization",
)  # fmt: skip
MOST = Faults(
    shuffles_turns=True,
    crash_before_per_million=30_000,
    crash_after_per_million=30_000,
    crash_waiting_per_million=30_000,
    # A crash of these ends everything, or takes the tree with it when it happens often: what a
    # portal then does is to start anew, which is an event of its own (`kill_portal`).
    crash_spares=(Supervisor, RelayDirectory),
    effect_names=STORE,
    effect_error=lambda: Unavailable("away"),
    effect_fail_before_per_million=100_000,
    effect_fail_after_per_million=100_000,
    effect_delay_per_million=300_000,
    effect_delay_ns=(1, 200 * NS_PER_MS),
    stall_per_million=20_000,
    stall_ns=(1, 2_000 * NS_PER_MS),
    wall_jump_per_million=50_000,
    wall_jump_ns=(1, 5_000 * NS_PER_MS),
)
EVENTS_PER_RUN = 25


def told_ids(message: object) -> list[UUID]:
    """The authorisations that an agent has by this message."""
    match message:
        case AuthorizationCreated() | AuthorizationRenewed() | Authorize():
            return [message.authorization_id]
        case ClientInit() | GatewayInit():
            return [each.authorization_id for each in message.authorizations]
    return []


class FaultyStory(Story):
    """Begins in peace; then things happen while others go wrong."""

    # An account that the store cannot give is not owned by anybody; who wants it asks again.
    allowed_crashes = (*Story.allowed_crashes, "InjectedCrash", "start failed: Unavailable")

    def __init__(self, faults: Faults) -> None:
        self.injector = FaultInjector(faults)
        self.injector.heal()
        super().__init__(injector=self.injector)
        self.heard = 0
        for policy in range(2):
            self.put_policy(policy, policy * 2 + 4)

    def redial(self) -> None:
        """As agents do whose channel ended, or who hear nothing for long."""
        for agent in self.agents:
            if not agent.is_connected:
                agent.join()

    def check_what_was_told(self) -> None:
        """The store has every authorisation that an agent ever heard of."""
        rows = self.world.rows()
        for name, message in self.world.log[self.heard :]:
            for id in told_ids(message):
                assert id in rows, f"{name} was told of {message} which the store does not hold"
        self.heard = len(self.world.log)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
@given(st.integers(0, 2**32))
def test_no_agent_is_told_what_is_not_written_and_all_is_well_when_the_faults_are_over(seed: int):
    faults = MOST.swarm(seed)
    note(repr(faults))
    story, chance = FaultyStory(faults), SeededRandomness(seed, "events")
    world = story.world
    story.injector.resume()
    for _ in range(EVENTS_PER_RUN):
        name, which, number = choice(NAMES, chance), chance.integer(6), chance.integer(60)
        note(f"{name} {which} {number}")
        EVENTS[name](story, which, number)
        world.run_for(choice((0, 0.001, 0.05, 1, 8), chance))
        story.check_what_was_told()
        story.redial()
    story.injector.heal()
    note(repr(story.injector.statistics()))
    for gateway in story.gateways:
        gateway.is_silent = False
    make_allowed(story)
    for _ in range(4):  # somebody may wait for the store, or to be told that it is gone
        world.run_for(20)
        story.redial()
    story.check()
    assert all(agent.is_connected and agent.init is not None for agent in story.agents)
    for client in story.clients:
        answer = client.ask(world.web)
        world.run_for(4)
        assert isinstance(answer or client.answer(), AuthorizationCreated), answer
    story.check()
    story.check_what_was_told()


def make_allowed(story: FaultyStory) -> None:
    """Whatever happened to the account: from now on everybody may reach `web`."""
    world = story.world
    world.put(attrs.evolve(world.get("account", world.account.id), disabled=False))
    world.put(attrs.evolve(world.get("principal", world.user.id), disabled=False))
    for gateway in world.entities("gateway"):
        world.put(attrs.evolve(gateway, approved=True))
    for text in (world.user_token, world.site_token):
        world.change_token(text, expires_at=None)
    world.policy(world.web)


# --- what was found so -------------------------------------------------------------------------


def test_a_grant_that_the_store_has_but_did_not_confirm_does_not_stay_live() -> None:
    faults = Faults(
        effect_names=("write_authorization",),
        effect_fail_after_per_million=MILLION,
        effect_error=lambda: Unavailable("the commit was not confirmed"),
    )
    world = World(injector=FaultInjector(faults))
    world.policy()
    world.gateway()
    answer = world.client().ask(world.web)
    assert isinstance(answer, AuthorizationDenied)
    assert answer.reason == "unavailable"
    assert len(world.rows(live=True)) == 1
    world.host.heal()
    world.run_for(2)
    assert [row.end_reason for row in world.rows().values()] == ["abandoned"]
    assert world.rows(live=True) == {}


def test_a_move_while_the_store_is_away_ends_what_is_forbidden_there_and_crashes_nobody() -> None:
    world = World()
    here = RemoteIpCondition(operator="is_in", values=("203.0.113.0/24",))
    world.policy(world.web, conditions=Conditions(remote_ip=here))
    world.policy(world.db)
    gateway, client = world.gateway(), world.client(remote=ADDRESSES[0])
    for resource in (world.web, world.db):
        assert isinstance(client.ask(resource), AuthorizationCreated)
    world.store.is_away = True
    client.move(ADDRESSES[1])
    (row,) = [row for row in world.rows(live=True).values() if row.resource_id == world.db.id]
    assert set(client.live) == set(gateway.live) == {row.id}
    assert row.remote_ip == ADDRESSES[0]
    world.store.is_away = False
    world.run_for(2)
    (row,) = world.rows(live=True).values()
    assert (row.resource_id, row.remote_ip) == (world.db.id, ADDRESSES[1])
    assert world.live() == {row.id}
    assert world.crashes == []


def test_however_much_waits_for_the_store_there_is_one_attempt_a_second() -> None:
    world = World()
    world.policy(world.web, lease_s=60)
    world.policy(world.db, lease_s=60)
    world.gateway()
    for client in (world.client(), world.client(remote=ADDRESSES[1])):
        for resource in (world.web, world.db):
            assert isinstance(client.ask(resource), AuthorizationCreated)
    world.store.is_away = True
    world.run_for(100)
    assert world.live() == frozenset()
    before = world.host.statistics().effects
    world.run_for(20)
    assert world.host.statistics().effects - before <= 2 * 20  # the account's, and the clerk's
    world.store.is_away = False
    world.run_for(2)
    assert {row.end_reason for row in world.rows().values()} == {"expired"}
    before = world.host.statistics().effects
    world.run_for(20)
    assert world.host.statistics().effects == before
