"""Nodes come and drain while clients ask without a pause: no call is refused, no grant taken back.

From a seed, in virtual time. Agents do as real ones do: whose door drains goes to another within
250 ms, a client asks there again for what was not answered, and a gateway takes some milliseconds
to acknowledge. What is held to is what agents see: the answer to each request, and whether what
was granted stays, but for a newer one in its place.

HOLLOWAY_CHAOS_SEEDS=N tries N seeds instead of a few.
"""

from __future__ import annotations

import os
from collections import Counter
from uuid import UUID

import pytest

from channel.frames import Frame
from channel.messages import Ack, AuthorizationCreated, AuthorizationDenied, Challenge
from runtime.randomness import SeededRandomness

from .cluster_world import ClusterWorld
from .world import PORTAL, Agent, ClientAgent, GatewayAgent, Line

SEEDS = int(os.environ.get("HOLLOWAY_CHAOS_SEEDS", "4"))
MS = 10**6
S = 10**9
STEP_NS = 2 * MS
MOVE_NS = 250 * MS
ANSWER_NS = 16 * S
PAUSE_NS = 40 * MS
SPREAD_NS = 1 * S
"""In which the agents of a node that drains leave it."""


class FarWorld(ClusterWorld):
    """Messages between nodes take their time."""

    latency_ns = (MS, 30 * MS)


class Busy:
    """The world, and agents that live by themselves."""

    def __init__(self, seed: int, *, gateways: int, clients: int) -> None:
        self.draws = SeededRandomness(seed, "busy")
        self.world = FarWorld("a", "b", "c", seed=seed, effect_delay_ns=(0, 10 * MS))
        self.world.policy(self.world.web)
        self.world.policy(self.world.db)
        self.doors = ["a", "b", "c"]
        self.gateways = [BusyGateway(self, f"gateway {n}") for n in range(gateways)]
        self.clients = [BusyClient(self, f"client {n}") for n in range(clients)]
        self.answers: Counter[str] = Counter()
        self.told: dict[UUID, None] = {}

    @property
    def now(self) -> int:
        return self.world.clock.monotonic_ns()

    def run(self, seconds: float, *, asking: bool = True) -> None:
        end_ns = self.now + int(seconds * S)
        while self.now < end_ns:
            for agent in (*self.gateways, *self.clients):
                agent.live_on()
            for client in self.clients if asking else ():
                client.ask_on()
            self.world.cluster.run_for(STEP_NS)

    def join(self, name: str) -> None:
        self.world.add_node(name)
        self.doors.append(name)

    def drain(self, name: str) -> None:
        self.doors.remove(name)
        self.world.at = self.doors[0]
        self.world.begin_draining(name, SPREAD_NS)
        self.run(2 * SPREAD_NS / S)
        self.world.end_draining(name)


class _BusyAgent(Agent):
    """Goes to another door when its own drains."""

    def __init__(self, busy: Busy, name: str, token: str) -> None:
        super().__init__(busy.world, name, token, "198.51.100.7")
        self.busy = busy
        self.dial_ns = 0

    def live_on(self) -> None:
        if self.line is not None and self.line.is_open:
            self.dial_ns = 0
        elif not self.dial_ns:
            self.dial_ns = self.busy.now + self.busy.draws.integer(MOVE_NS)
        elif self.dial_ns <= self.busy.now:
            self.dial_ns = 0
            self._dial()

    def _dial(self) -> None:
        busy = self.busy
        door = busy.doors[busy.draws.integer(len(busy.doors))]
        self.init = None
        self.line = line = Line(self.world, self.remote)
        line.agent = self
        challenge = Challenge(nonce=self.world.randomness.bytes(32), portal=PORTAL)
        line.attachment = self.world.nodes[door].plane.connected(line, challenge)
        self.incarnation += 1
        self.say(self._join(challenge))


class BusyGateway(_BusyAgent, GatewayAgent):
    """Takes up to 30 ms to acknowledge, and what it has to say is lost with its channel."""

    def __init__(self, busy: Busy, name: str) -> None:
        super().__init__(busy, name, busy.world.site_token)
        self.outbox: list[tuple[int, Line | None, object, int | None]] = []

    def say(self, message: object, ref: int | None = None) -> None:
        if isinstance(message, Ack):
            due_ns = self.busy.now + self.busy.draws.integer(30 * MS)
            self.outbox.append((due_ns, self.line, message, ref))
        else:
            super().say(message, ref)

    def live_on(self) -> None:
        super().live_on()
        outbox, self.outbox = self.outbox, []
        for due_ns, line, message, ref in outbox:
            if due_ns > self.busy.now:
                self.outbox.append((due_ns, line, message, ref))
            elif line is self.line and line is not None and line.is_open:
                super().say(message, ref)


class BusyClient(_BusyAgent, ClientAgent):
    """Asks for one resource after the other, and says what became of it."""

    def __init__(self, busy: Busy, name: str) -> None:
        super().__init__(busy, name, busy.world.user_token)
        self.asked_ns: int | None = None
        self.asked_at: Line | None = None
        self.ask_ns = 0
        self.turn = 0

    def ask_on(self) -> None:
        now = self.busy.now
        if self.asked_ns is None and self.ask_ns <= now:
            self.asked_ns, self.asked_at = now, None
        elif self.asked_ns is not None and now - self.asked_ns > ANSWER_NS:
            self._answered("unanswered")

    def live_on(self) -> None:
        super().live_on()
        if self.asked_ns is not None and self.init is not None and self.asked_at is not self.line:
            self.asked_at = self.line
            resource = (self.world.web, self.world.db)[self.turn % 2]
            held = {self.gateway_by_connection[each] for each in self.live.values()}
            self.request(resource, connected=tuple(sorted(held)))

    def hear(self, frame: Frame) -> None:
        super().hear(frame)
        message = frame.message
        if isinstance(message, AuthorizationCreated):
            self.busy.told[message.authorization_id] = None
            self._answered("granted")
        elif isinstance(message, AuthorizationDenied):
            self._answered(message.reason)

    def _answered(self, what: str) -> None:
        if self.asked_ns is not None:
            self.busy.answers[what] += 1
            self.asked_ns = None
            self.turn += 1
            self.ask_ns = self.busy.now + self.busy.draws.integer(PAUSE_NS)


def check(busy: Busy) -> None:
    busy.run(1)
    busy.run(3, asking=False)
    assert set(busy.answers) == {"granted"}, busy.answers
    assert [each.name for each in busy.clients if each.asked_ns is not None] == []
    reasons = Counter(row.end_reason for id, row in busy.world.rows().items() if id in busy.told)
    assert set(reasons) <= {"", "replaced"}, reasons
    busy.world.at = busy.world.owner()
    live = set(busy.world.live())
    assert live == {id for each in busy.clients for id in each.live}
    assert live == {id for each in busy.gateways for id in each.live}
    assert not busy.world.crashes


@pytest.mark.parametrize("gateways", [1, 2])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_nodes_join_and_drain_without_a_refused_call(seed: int, gateways: int) -> None:
    busy = Busy(seed, gateways=gateways, clients=6)
    busy.run(1, asking=False)
    busy.run(1)
    for number in range(3):
        busy.join(f"n{number}")
        busy.run(0.5)
        busy.drain(busy.world.owner())
    check(busy)
