"""An agent that holds more than its join has room for."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import attrs
import pytest

from actors.services import Limits
from channel.messages import (
    MAX_AUTHORIZATIONS,
    AuthorizationCreated,
    Held,
    HeldWanted,
    MoreHeld,
)

from .world import GatewayAgent, World, run

MANY = 5_000


def world_with_many(**options: Any) -> tuple[World, GatewayAgent, set[UUID]]:
    """A gateway that holds MANY live authorisations of one client, and the portal gone."""
    world = World(**options)
    world.policy(world.web, lease_s=3600)
    gateway, client = world.gateway(), world.client()
    created = client.ask(world.web)
    assert isinstance(created, AuthorizationCreated)
    (row,) = world.rows().values()
    (epoch,) = {frame.epoch for frame in client.line.frames} if client.line else (0,)
    for _ in range(MANY - 1):
        other = attrs.evolve(row, id=world.new_id())
        run(world.store.write_authorization(other, epoch=epoch))
        gateway.live[other.id] = client.live[other.id] = other.connection_id
    world.kill_portal(gateway, client)
    world.start_portal()
    return world, gateway, set(gateway.live)


def test_a_gateway_keeps_thousands_of_authorisations_over_a_restart_of_the_portal() -> None:
    world, gateway, held = world_with_many()
    gateway.join()
    assert len(held) == MANY
    assert {each.authorization_id for each in gateway.init.authorizations} == held
    assert world.live() == held
    assert not gateway.more_held
    assert not world.crashes


def test_what_is_not_mentioned_in_any_part_ends() -> None:
    world, gateway, held = world_with_many()
    gone = sorted(held)[900]
    del gateway.live[gone]
    gateway.join()
    assert world.live() == held - {gone}
    assert world.rows()[gone].end_reason == "absent"


def test_who_does_not_tell_the_rest_in_time_is_sent_away_and_loses_nothing() -> None:
    world, gateway, held = world_with_many()
    gateway.hear = lambda frame: None  # type: ignore[method-assign]  # it does not answer
    gateway.join()
    assert gateway.heard(HeldWanted)
    world.run_for(31)
    assert gateway.refused == "protocol_error"
    del gateway.hear  # type: ignore[method-assign]  # it answers again
    gateway.join()
    assert world.live() == held


def test_nobody_is_asked_for_the_rest_who_has_not_proved_who_it_is() -> None:
    _, gateway, _ = world_with_many()
    gateway.join(signature=bytes(64))
    assert gateway.refused == "invalid_signature"
    assert not gateway.heard(HeldWanted)


def test_a_part_that_nobody_announced_ends_the_channel() -> None:
    world = World()
    gateway = world.gateway()
    gateway.say(MoreHeld(held=(), more=False))
    world.run_for(0)
    assert gateway.refused == "protocol_error"


@pytest.mark.parametrize("size", [500, MAX_AUTHORIZATIONS])
def test_nobody_may_go_on_and_on(size: int) -> None:
    world = World(limits=Limits(held_deadline_ns=10**18))
    gateway = GatewayAgent(world, "gateway", world.site_token, "198.51.100.9")
    gateway.join(held_follow=True)
    some = Held(authorization_id=UUID(int=1), connection_id=UUID(int=1))
    for _ in range(MAX_AUTHORIZATIONS // size + 1):
        assert gateway.is_connected
        gateway.say(MoreHeld(held=(some,) * size, more=True))
        world.run_for(0)
    assert gateway.refused == "protocol_error"
    assert not gateway.init
