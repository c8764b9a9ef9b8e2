"""A portal of several nodes under random faults: from a seed, in virtual time.

Always: what a gateway holds, the store holds too (or has only just ended); epochs that an agent
hears never go back. When all faults have healed: every agent is connected, every request that
policy allows is granted, and both ends hold what is live.

HOLLOWAY_CHAOS_SEEDS=N tries N seeds instead of a few.
"""

from __future__ import annotations

import os

import pytest

from channel.messages import AuthorizationCreated
from runtime.randomness import SeededRandomness

from .cluster_world import ClusterWorld
from .world import Agent, ClientAgent, GatewayAgent

SEEDS = int(os.environ.get("HOLLOWAY_CHAOS_SEEDS", "12"))
STEPS = 25
S = 10**9


class Chaos:
    def __init__(self, seed: int) -> None:
        self.draws = SeededRandomness(seed, "chaos")
        self.world = ClusterWorld("a", "b", "c", seed=seed, effect_delay_ns=(0, 5 * 10**6))
        self.world.policy(self.world.web)
        self.world.policy(self.world.db)
        self.gateways = [self._agent(GatewayAgent, f"gateway {n}", n) for n in range(2)]
        self.clients = [self._agent(ClientAgent, f"client {n}", n) for n in range(3)]
        self.next_name = 0
        self.parted: list[tuple[str, str]] = []
        self.told: list[str] = []

    def _agent(self, kind: type[Agent], name: str, number: int) -> Agent:
        world = self.world
        token = world.site_token if kind is GatewayAgent else world.user_token
        return kind(world, name, token, f"198.51.100.{number + 1}")

    @property
    def agents(self) -> list[Agent]:
        return [*self.gateways, *self.clients]

    def note(self, text: str) -> None:
        self.told.append(f"{self.world.clock.monotonic_ns() / S:.2f} {text}")

    def pick(self, of: list[str]) -> str:
        return of[self.draws.integer(len(of))]

    def awake(self) -> list[str]:
        return [name for name, node in self.world.nodes.items() if not node.heap.stopped]

    # --- what happens ---

    def step(self) -> None:
        events = [
            *([self.dial] * 4), *([self.request] * 6), self.kill, self.join, self.drain,
            self.stop, self.resume, self.part, self.heal, self.cut_off, self.lose_channel,
        ]  # fmt: skip
        events[self.draws.integer(len(events))]()
        self.world.run_for(self.draws.integer(1_500) / 1_000)
        self.check()

    def dial(self) -> None:
        for agent in self.agents:
            if agent.is_connected:
                continue
            self.world.at = self.pick(self.awake())
            self.note(f"{agent.name} dials {self.world.at}")
            agent.join()

    def request(self) -> None:
        client = self.clients[self.draws.integer(len(self.clients))]
        assert isinstance(client, ClientAgent)
        if client.is_connected and client.init is not None:
            resource = (self.world.web, self.world.db)[self.draws.integer(2)]
            client.request(resource, connected=self.connected_of(client))

    def connected_of(self, client: ClientAgent) -> tuple:  # type: ignore[type-arg]
        held = {client.gateway_by_connection[each] for each in client.live.values()}
        return tuple(sorted(held))

    def kill(self) -> None:
        if len(self.awake()) > 1:
            name = self.pick(self.awake())
            self.note(f"kill {name}")
            self.world.kill(name, *self.at(name))

    def at(self, name: str) -> list[Agent]:
        """The agents with a channel to this node."""
        scheduler = self.world.nodes[name].heap.scheduler
        found = []
        for agent in self.agents:
            attachment: object = agent.line.attachment if agent.line else None
            if agent.is_connected and getattr(attachment, "_scheduler", None) is scheduler:
                found.append(agent)
        return found

    def join(self) -> None:
        if len(self.world.nodes) < 5:
            self.next_name += 1
            self.note(f"join n{self.next_name}")
            self.world.add_node(f"n{self.next_name}")

    def drain(self) -> None:
        awake = self.awake()
        if len(awake) > 2 and not self.parted:
            name = self.pick(awake)
            if self.world.nodes[name].is_cut_off:
                return
            self.note(f"drain {name}")
            self.world.drain(name, *self.at(name))

    def stop(self) -> None:
        if len(self.awake()) > 1:
            name = self.pick(self.awake())
            self.note(f"stop {name}")
            self.world.cluster.stop(name)

    def resume(self) -> None:
        for name, node in self.world.nodes.items():
            if node.heap.stopped:
                self.note(f"resume {name}")
                self.world.cluster.resume(name)

    def part(self) -> None:
        names = self.awake()
        if len(names) > 1:
            one = self.pick(names)
            other = self.pick([name for name in names if name != one])
            self.note(f"part {one} {other}")
            self.world.cluster.partition(one, other)
            self.parted.append((one, other))

    def heal(self) -> None:
        for one, other in self.parted:
            self.note(f"heal {one} {other}")
            self.world.cluster.heal(one, other)
        self.parted.clear()

    def cut_off(self) -> None:
        node = self.world.nodes[self.pick(self.awake())]
        node.is_cut_off = not node.is_cut_off
        self.note(f"{node.name} {'cannot' if node.is_cut_off else 'can'} reach the store")

    def lose_channel(self) -> None:
        agent = self.agents[self.draws.integer(len(self.agents))]
        name = next((name for name in self.world.nodes if agent in self.at(name)), None)
        if name is not None and not self.world.nodes[name].heap.stopped:
            self.note(f"{agent.name} loses its channel")
            agent.lose_channel()

    def heal_all(self) -> None:
        self.resume()
        self.heal()
        for node in self.world.nodes.values():
            node.is_cut_off = False
        for _ in range(4):
            self.world.run_for(5)
            self.dial()
        self.world.run_for(5)

    # --- what must hold ---

    def check(self) -> None:
        rows = self.world.rows()
        for agent in self.gateways:
            for id in agent.live:
                assert id in rows, "a gateway holds what was never written"
        for agent in self.agents:
            epochs = (
                [f.epoch for f in agent.line.frames if f.epoch is not None] if agent.line else []
            )
            assert epochs == sorted(epochs), f"{agent.name} was commanded by a former owner"

    def check_healed(self) -> None:
        for agent in self.agents:
            assert agent.is_connected, f"{agent.name} is not connected"
        for client in self.clients:
            assert isinstance(client, ClientAgent)
            before = len(client.line.frames) if client.line else 0
            client.request(self.world.web, connected=self.connected_of(client))
            self.world.run_for(3)
            answer = client.answer(before)
            assert isinstance(answer, AuthorizationCreated), f"{client.name}: {answer}"
        self.world.at = self.world.owner()
        live = set(self.world.live())
        held_by_gateways = {id for agent in self.gateways for id in agent.live}
        held_by_clients = {id for agent in self.clients for id in agent.live}
        assert held_by_clients <= live
        assert live == held_by_gateways & live
        assert held_by_gateways <= live
        ended = {id for id, row in self.world.rows().items() if row.ended_at is not None}
        assert not live & ended


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_nodes_do_the_account_has_one_owner_and_is_served(seed: int) -> None:
    chaos = Chaos(seed)
    try:
        chaos.dial()
        for _ in range(STEPS):
            chaos.step()
        chaos.heal_all()
        chaos.check_healed()
    except AssertionError as error:
        error.add_note("\n".join(chaos.told))
        for crash in chaos.world.crashes:
            error.add_note(f"crash: {crash.label}: {crash.reason}")
        raise
