"""A noisy population of actors on a HeapHost; prints its whole trace. Run by test_two_ways in
processes with different hash seeds: `chatter.py SEED in_order` or `chatter.py SEED with_faults`."""

from __future__ import annotations

import sys
from typing import Any

import attrs

from runtime.actor import Actor, ActorError, ActorRef, Down, handles
from runtime.clock import NS_PER_MS, NS_PER_S, VirtualClock
from runtime.randomness import SeededRandomness, choice
from runtime.scheduler import Scheduler
from runtime.supervisor import ChildSpec, DynamicSupervisor
from runtime.testing import FaultInjector, Faults, HeapHost, SeededScheduler, heap_sleep

TOPICS = ("news", "weather", "sport")


@attrs.frozen
class Tick:
    pass


@attrs.frozen
class Say:
    what: str


@attrs.frozen
class Question:
    number: int


async def think(duration_ns: int) -> str:
    await heap_sleep(duration_ns)
    return f"thought for {duration_ns}"


class Chatterer(Actor):
    def __init__(self, trace: list[str]) -> None:
        self.trace = trace
        self.friends: set[ActorRef] = set()

    async def started(self) -> None:
        random = self.context.randomness
        self.subscribe(choice(TOPICS, random))
        self.note(await self.perform(think, random.integer(NS_PER_MS)))
        for topic in set(TOPICS):  # a set of text: its order hangs on the hash seed, and must not
            self.friends.update(self.context.pubsub.subscribers(topic))  # matter to anybody
        self.friends.discard(self.context.ref)
        for friend in self.friends:
            self.monitor(friend)
        self.send_after(random.integer(100) * NS_PER_MS, Tick())

    def terminated(self, reason: str) -> None:
        self.note(f"ended: {reason}")

    @handles(Tick)
    async def on_tick(self, message: Tick) -> None:
        random = self.context.randomness
        self.send_after(50 * NS_PER_MS + random.integer(NS_PER_S), message)
        self.publish(choice(TOPICS, random), Say(f"{random.integer(1000)}"))
        for friend in self.friends:
            try:
                answer = await self.call(friend, Question(random.integer(9)), 20 * NS_PER_MS)
                self.note(f"{friend} says {answer}")
            except ActorError as error:
                self.note(f"{friend}: {type(error).__name__}")
        if random.integer(5) == 0:
            raise RuntimeError("enough")

    @handles(Question)
    async def on_question(self, message: Question) -> int:
        await self.perform(think, self.context.randomness.integer(30 * NS_PER_MS))
        return message.number

    @handles(Say)
    def on_say(self, message: Say) -> None:
        self.note(f"heard {message.what}")

    @handles(Down)
    def on_down(self, message: Down) -> None:
        self.friends.discard(message.ref)
        self.note(f"{message.ref} is gone: {message.reason}")

    def note(self, what: Any) -> None:
        self.trace.append(f"{self.context.now()} {self.context.ref} {what}")


def make_scheduler(clock: VirtualClock, randomness: SeededRandomness, how: str) -> Scheduler:
    if how == "in_order":
        return Scheduler(clock=clock, randomness=randomness)
    faults = Faults(
        seed=randomness.seed,
        shuffles_turns=True,
        crash_before_per_million=5_000,
        crash_after_per_million=5_000,
        crash_waiting_per_million=5_000,
        crash_start_per_million=5_000,
        crash_spares=(DynamicSupervisor,),
        effect_fail_after_per_million=10_000,
        effect_delay_per_million=100_000,
        effect_lost_per_million=1_000,
        stall_per_million=1_000,
        wall_jump_per_million=1_000,
    )
    return SeededScheduler(injector=FaultInjector(faults), clock=clock, randomness=randomness)


def main() -> None:
    randomness = SeededRandomness(int(sys.argv[1]), "chatter")
    clock = VirtualClock()
    scheduler = make_scheduler(clock, randomness, sys.argv[2])
    host = HeapHost(
        scheduler, clock, randomness=randomness.child("host"), effect_delay_ns=(0, NS_PER_MS)
    )
    trace: list[str] = []
    supervisor = DynamicSupervisor(limit=20, intensity=1_000)
    scheduler.spawn(supervisor)
    for number in range(8):
        supervisor.start_child(ChildSpec(id=number, factory=lambda: Chatterer(trace)))
    host.run_for(5 * NS_PER_S)
    print("\n".join(trace))
    print(scheduler.tree())
    print(scheduler.statistics())
    print(host.statistics())


if __name__ == "__main__":
    main()
