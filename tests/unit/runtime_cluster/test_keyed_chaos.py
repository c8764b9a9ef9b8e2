"""Nodes that die, stop, drain, and lose each other and the store, at random: no two owners, nothing
acknowledged is lost, nothing is handled twice; and when all is well again, all is served.

HOLLOWAY_CHAOS_SEEDS=N tries N seeds instead of a few.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.cluster.keyed import keeper_name
from runtime.cluster.member import MEMBER
from runtime.randomness import SeededRandomness
from runtime.supervisor import Supervisor
from runtime.testing import Faults
from tests.keyed_world import KIND, Asker, End, Fail, KeyedWorld, WholeNode

NAMES = ("a", "b", "c", "d", "e")
STEPS = 60
RECOVERY_NS = 8 * NS_PER_S
"""After all is healed: two leases of 3 s, and what a call may wait meanwhile."""
FAULTS = Faults(
    shuffles_turns=True,
    crash_before_per_million=5_000,
    crash_after_per_million=5_000,
    crash_waiting_per_million=5_000,
    crash_start_per_million=20_000,
    crash_spares=(Supervisor, Asker),
)
"""Of the members too, though not more than a supervisor takes for chance: each message counts."""
SEEDS = int(os.environ.get("HOLLOWAY_CHAOS_SEEDS", "8"))


class Chaos:
    """One history, drawn from its seed."""

    def __init__(self, seed: int) -> None:
        self.chance = SeededRandomness(seed, "chaos")
        slow = self.chance.integer(3)
        self.world = KeyedWorld(
            seed,
            keys=10 + self.chance.integer(11),
            latency_ns=(NS_PER_MS // 10, (1, 20, 100)[slow] * NS_PER_MS),
            store_delay_ns=(NS_PER_MS // 5, (2, 20, 200)[self.chance.integer(3)] * NS_PER_MS),
            effect_delay_ns=(0, self.chance.integer(3) * NS_PER_MS),
            faults=FAULTS.swarm(seed) if self.chance.integer(2) else None,
        )
        self.draining: set[str] = set()
        for name in NAMES[: 3 + self.chance.integer(3)]:
            self.world.start(name)
        self.world.run_for(NS_PER_S)
        # In each history only some of all these happen, or the common would hide the rare.
        self.steps: list[Callable[[], None]] = [
            step
            for step in (
                self.kill,
                self.stop,
                self.part,
                self.cut,
                self.cut_all,
                self.drain,
                self.leave,
                self.fail,
                self.end,
                self.crash_runtime,
                self.fail_to_move,
            )
            if self.chance.integer(2)
        ]
        self.steps += [self.resume, self.heal, self.restart, self.uncut]

    def run(self) -> None:
        for _ in range(STEPS):
            if self.chance.integer(3) == 0:
                self.steps[self.chance.integer(len(self.steps))]()
            self.ask()
            self.world.run_for(self.chance.integer(200 * NS_PER_MS))
            if self.chance.integer(12) == 0:
                self.world.run_for(self.chance.integer(4 * NS_PER_S))
            self.world.check()
        self.end_of_all_evil()

    def end_of_all_evil(self) -> None:
        world = self.world
        world.fail_to_move.clear()
        world.cluster.heal_faults()
        for name in sorted(self.draining & set(world.nodes)):
            world.kill(name)
        while self.stopped():
            self.resume()
        while world.parted:
            self.heal()
        for node in world.nodes.values():
            node.way.is_cut = False
        world.run_for(NS_PER_MS)
        while len(world.nodes) < 3:
            self.restart()
        world.cluster.heal_faults()
        world.run_for(RECOVERY_NS)
        world.check()
        assert len({node.tenure.placement for node in world.nodes.values()}) == 1
        assert {row.name for row in self.a_node().tenure.rows} == set(world.nodes)
        assert all(node.holds() for node in world.nodes.values())
        last = world.ask_all()
        world.answered(last)
        world.run_for(NS_PER_S)
        world.check()
        assert all(asked.outcomes for asked in world.asked), "a call without an end"
        for key in world.keys:
            assert world.serving(key) == [self.a_node().tenure.owner_of(key)]

    def a_node(self) -> WholeNode:
        return next(iter(self.world.nodes.values()))

    # --- what happens ---

    def pick(self, names: list[str]) -> str | None:
        return sorted(names)[self.chance.integer(len(names))] if names else None

    def stopped(self) -> list[str]:
        return [name for name, node in self.world.nodes.items() if node.heap.stopped]

    def awake(self) -> list[str]:
        return [name for name, node in self.world.nodes.items() if not node.heap.stopped]

    def ask(self) -> None:
        for _ in range(self.chance.integer(4)):
            name = self.pick(list(self.world.nodes))
            key = self.world.keys[self.chance.integer(len(self.world.keys))]
            if name is not None:
                takes_ns = self.chance.integer(2) * self.chance.integer(100 * NS_PER_MS)
                self.world.ask(name, key, takes_ns=takes_ns)

    def kill(self) -> None:
        if (name := self.pick(list(self.world.nodes))) is not None and len(self.world.nodes) > 1:
            self.world.kill(name)

    def restart(self) -> None:
        if (name := self.pick([each for each in NAMES if each not in self.world.nodes])) is None:
            return
        self.draining.discard(name)
        self.world.start(name)
        for pair in sorted(map(sorted, self.world.parted)):
            if name in pair:
                self.world.heal(*pair)

    def stop(self) -> None:
        if (name := self.pick(self.awake())) is not None:
            self.world.cluster.stop(name)

    def resume(self) -> None:
        if (name := self.pick(self.stopped())) is not None:
            self.world.cluster.resume(name)

    def part(self) -> None:
        one, other = (self.pick(list(self.world.nodes)) for _ in range(2))
        if one is not None and other is not None and one != other:
            self.world.part(one, other)

    def heal(self) -> None:
        pairs = sorted(map(sorted, self.world.parted))
        if pairs:
            self.world.heal(*pairs[self.chance.integer(len(pairs))])

    def cut(self) -> None:
        if (name := self.pick(list(self.world.nodes))) is not None:
            self.world.nodes[name].way.is_cut = True

    def cut_all(self) -> None:
        for node in self.world.nodes.values():
            node.way.is_cut = True

    def uncut(self) -> None:
        for node in self.world.nodes.values():
            if self.chance.integer(2):
                node.way.is_cut = False

    def drain(self) -> None:
        if (name := self.pick(self.awake())) is not None:
            self.draining.add(name)
            self.world.drain(name)

    def leave(self) -> None:
        """In good order, and gone a moment later."""
        if (name := self.pick(self.awake())) is not None and len(self.world.nodes) > 1:
            self.world.drain(name)
            self.world.run_for(self.chance.integer(2 * NS_PER_S))
            self.world.leave(name)
            self.world.run_for(self.chance.integer(200 * NS_PER_MS))
            self.world.kill(name)

    def fail(self) -> None:
        self.world.cast(self.world.keys[self.chance.integer(len(self.world.keys))], Fail())

    def end(self) -> None:
        self.world.cast(self.world.keys[self.chance.integer(len(self.world.keys))], End())

    def crash_runtime(self) -> None:
        """An actor of the runtime itself ends."""
        if (name := self.pick(self.awake())) is not None:
            scheduler = self.world.nodes[name].heap.scheduler
            who = (MEMBER, keeper_name(KIND))[self.chance.integer(2)]
            ref = scheduler.registry.whereis(who)
            if ref is not None:
                scheduler.stop(ref, "crashed: on purpose")

    def fail_to_move(self) -> None:
        self.world.fail_to_move.add(self.world.keys[self.chance.integer(len(self.world.keys))])


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_happens_nothing_is_owned_twice_and_all_is_served_again(seed: int) -> None:
    Chaos(seed).run()
