"""What clients are told to see: several devices of several users, whatever changes at once."""

from __future__ import annotations

import random
from uuid import UUID

import attrs
import pytest

from actors.consequences import as_told
from actors.model import Membership, Policy, Principal, Resource
from actors.policy.engine import Snapshot, visible_resources
from channel.messages import ClientInit, ResourceRemoved, ResourceUpserted
from channel.messages import Resource as ToldResource
from channel.versions import Spoken
from tests.unit.actors.world import ClientAgent, World, run

SPOKEN = Spoken(oldest=1, newest=2, kinds={1: frozenset({"ip"}), 2: frozenset({"ip", "cidr"})})
USERS, DEVICES, RESOURCES = 3, 3, 6


class Story:
    """Three users with three devices each; one device of each speaks an older version."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.world = world = World(seed, spoken=SPOKEN)
        self.users = [Principal(name=f"user {n}", **world.common()) for n in range(USERS)]
        world.put(*self.users)
        self.resources = [
            world.resource(f"resource {n}", f"10.1.{n}.0/24", kind="cidr")
            if n % 2
            else world.resource(f"resource {n}", f"10.1.{n}.1")
            for n in range(RESOURCES)
        ]
        world.put(*self.resources)
        self.policies: list[Policy] = []
        self.members: dict[UUID, Membership] = {}
        self.clients: list[tuple[ClientAgent, int]] = []
        for user in self.users:
            token = world.token("client", principal_id=user.id)
            for device in range(DEVICES):
                version = 1 if device == 0 else 2
                client = world.client(token=token, versions=(1, version))
                assert client.refused is None
                self.clients.append((client, version))

    def change(self) -> None:
        rng, world = self.rng, self.world
        match rng.randrange(5):
            case 0:
                group = rng.choice((world.everyone, world.staff))
                policy = world.policy(rng.choice(self.resources), group_id=group.id)
                self.policies.append(policy)
            case 1 if self.policies:
                gone = self.policies.pop(rng.randrange(len(self.policies)))
                world.remove("policy", gone.id)
            case 2:
                user = rng.choice(self.users)
                if user.id in self.members:
                    world.remove("membership", self.members.pop(user.id).id)
                else:
                    self.members[user.id] = world.membership(world.staff, user)
            case 3:
                at = rng.randrange(RESOURCES)
                name = f"named {rng.randrange(1_000)}"
                self.resources[at] = attrs.evolve(self.resources[at], name=name)
                world.put(self.resources[at])
            case 4:  # several at once
                self.resources = [self.renamed(each) for each in self.resources]
                world.put(*self.resources)

    def renamed(self, resource: Resource) -> Resource:
        if self.rng.randrange(2):
            return resource
        return attrs.evolve(resource, name=f"renamed {self.rng.randrange(1_000)}")

    def check(self) -> None:
        world = self.world
        snapshot = Snapshot.of(run(world.store.contents(world.account.id)))
        for client, version in self.clients:
            visible = visible_resources(snapshot, client.id).values()
            carried = [each for each in visible if each.kind in SPOKEN.carried(version)]
            assert told(client) == {each.id: as_told(each) for each in carried}
        assert not world.crashes


def told(client: ClientAgent) -> dict[UUID, ToldResource]:
    """What the client knows, by all that it heard."""
    known: dict[UUID, ToldResource] = {}
    assert client.line is not None
    for frame in client.line.frames:
        match frame.message:
            case ClientInit():
                known = {each.id: each for each in frame.message.resources}
            case ResourceUpserted():
                known[frame.message.resource.id] = frame.message.resource
            case ResourceRemoved():
                del known[frame.message.resource_id]
    return known


@pytest.mark.parametrize("seed", range(12))
def test_every_client_sees_what_its_own_user_and_version_may_see(seed: int) -> None:
    story = Story(seed)
    story.check()
    for _ in range(30):
        story.change()
        story.check()
