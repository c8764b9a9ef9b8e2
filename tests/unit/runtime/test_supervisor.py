"""Supervision, in virtual time: single cases, and long random lives against a reference model."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.actor import Actor, ActorError, ActorRef, Crashed, LimitReached, handles
from runtime.clock import NS_PER_S, VirtualClock
from runtime.randomness import SeededRandomness
from runtime.scheduler import Scheduler
from runtime.supervisor import (
    ESCALATED,
    AlreadyStarted,
    ChildSpec,
    DynamicSupervisor,
    Restart,
    StartChild,
    Supervisor,
    TerminateChild,
    WhichChildren,
)
from runtime.testing import Faults, HeapHost, seeded_host


@attrs.frozen
class End:
    """End normally, or by a crash."""

    how: str


@attrs.frozen
class Ask:
    pass


class Child(Actor):
    @handles(End)
    def end(self, message: End) -> None:
        if message.how == "crash":
            raise ValueError
        self.stop(message.how)

    @handles(Ask)
    def ask(self, message: Ask) -> int:
        return self.context.restarts


def new_host() -> HeapHost:
    clock = VirtualClock()
    return HeapHost(Scheduler(clock=clock, randomness=SeededRandomness(1, "actors")), clock)


@pytest.fixture
def host() -> HeapHost:
    return new_host()


def end(host: HeapHost, ref: ActorRef | None, how: str = "crash") -> None:
    assert ref is not None
    host.cast(ref, End(how))
    host.run_until_idle()


def test_children_start_in_order_each_when_the_one_before_has_come_up(host: HeapHost):
    order: list[str] = []

    class Slow(Actor):
        def __init__(self, name: str, takes_ns: int) -> None:
            self.name = name
            self.takes_ns = takes_ns

        async def started(self) -> None:
            await self.sleep(self.takes_ns)
            order.append(self.name)

    inner = [ChildSpec(id="b", factory=lambda: Slow("b", 30))]
    host.scheduler.spawn(
        Supervisor(
            [
                ChildSpec(id="a", factory=lambda: Slow("a", 20)),
                ChildSpec(id="inner", factory=lambda: Supervisor(inner)),
                ChildSpec(id="c", factory=lambda: Slow("c", 10)),
            ]
        )
    )
    host.run_for(59)
    assert order == ["a", "b"]
    host.run_for(1)
    assert order == ["a", "b", "c"]


def test_a_supervisor_whose_child_does_not_come_up_does_not_either(host: HeapHost):
    class Broken(Actor):
        def started(self) -> None:
            raise OSError

    reasons: list[str] = []
    supervisor = host.scheduler.spawn(
        Supervisor([ChildSpec(id="a", factory=Child), ChildSpec(id="b", factory=Broken)])
    )
    host.scheduler.watch(supervisor, reasons.append)
    host.run_until_idle()
    assert reasons == ["start failed: StartFailed"]
    assert host.scheduler.statistics().actors == 0


def test_a_crashed_child_is_started_anew_under_its_name_and_the_others_stay(host: HeapHost):
    supervisor = host.scheduler.spawn(
        Supervisor([ChildSpec(id=name, factory=Child, name=name) for name in ("a", "b")])
    )
    host.run_until_idle()
    registry = host.scheduler.registry
    a, b = registry.whereis("a"), registry.whereis("b")
    end(host, a)
    again = registry.whereis("a")
    assert again not in (None, a)
    assert registry.whereis("b") == b
    assert again is not None
    assert host.call(again, Ask()) == 1
    assert [child.restarts for child in host.call(supervisor, WhichChildren())] == [1, 0]


def test_too_many_restarts_escalate_and_the_one_above_tries_again(host: HeapHost):
    def inner() -> Supervisor:
        return Supervisor(
            [ChildSpec(id="child", factory=Child, name="child")], intensity=2, period_ns=NS_PER_S
        )

    top = host.scheduler.spawn(
        Supervisor([ChildSpec(id="inner", factory=inner, name="inner", restart=Restart.TRANSIENT)])
    )
    host.run_until_idle()
    registry = host.scheduler.registry
    inner_ref = registry.whereis("inner")
    reasons: list[str] = []
    assert inner_ref is not None
    host.scheduler.watch(inner_ref, reasons.append)
    for _ in range(3):
        assert registry.whereis("inner") == inner_ref
        end(host, registry.whereis("child"))
    assert reasons == [ESCALATED]
    assert registry.whereis("inner") != inner_ref
    assert registry.whereis("child") is not None
    assert host.scheduler.is_alive(top)


def test_a_child_added_later_that_does_not_come_up_is_forgotten(host: HeapHost):
    class Broken(Actor):
        def started(self) -> None:
            raise OSError

    supervisor = host.scheduler.spawn(DynamicSupervisor(limit=2))
    host.call(supervisor, StartChild(ChildSpec(id="a", factory=Broken)))
    host.run_until_idle()
    assert host.call(supervisor, WhichChildren()) == ()
    assert host.scheduler.is_alive(supervisor)


def test_a_child_that_does_not_come_up_again_counts_until_it_escalates(host: HeapHost):
    broken: list[bool] = []

    class Sometimes(Child):
        def started(self) -> None:
            if broken:
                raise OSError

    supervisor = host.scheduler.spawn(DynamicSupervisor(limit=2, intensity=5))
    reasons: list[str] = []
    host.scheduler.watch(supervisor, reasons.append)
    ref = host.call(supervisor, StartChild(ChildSpec(id="a", factory=Sometimes)))
    broken.append(True)
    end(host, ref)
    assert reasons == [ESCALATED]


def test_a_dynamic_supervisor_has_a_limit_and_knows_its_own(host: HeapHost):
    supervisor = host.scheduler.spawn(DynamicSupervisor(limit=2))

    def start(id: int, reuse: bool = False) -> Any:
        return host.call(supervisor, StartChild(ChildSpec(id=id, factory=Child), reuse=reuse))

    first = start(1)
    start(2)
    with pytest.raises(LimitReached):
        start(3)
    with pytest.raises(AlreadyStarted) as taken:
        start(1)
    assert taken.value.ref == first
    assert start(1, reuse=True) == first
    assert host.call(supervisor, TerminateChild(1))
    assert not host.call(supervisor, TerminateChild(1))
    assert not host.scheduler.is_alive(first)
    start(3)
    assert [child.id for child in host.call(supervisor, WhichChildren())] == [2, 3]


def test_nonsense_is_refused_at_once():
    with pytest.raises(ValueError, match="unique"):
        Supervisor([ChildSpec(id=1, factory=Child)] * 2)
    with pytest.raises(ValueError, match="limit"):
        Supervisor([ChildSpec(id=1, factory=Child)], limit=0)
    with pytest.raises(ValueError, match="intensity"):
        Supervisor(period_ns=0)


# --- the reference model -----------------------------------------------------------------------

INTENSITY = 2
PERIOD_NS = 10
LIMIT = 3
ids = st.integers(0, 4)


@attrs.define
class Modelled:
    restart: Restart
    alive: bool = True
    restarts: int = 0


class SupervisionAgainstAModel(RuleBasedStateMachine):
    """The model is OTP's book read aloud: what is restarted, what is kept, when it is enough."""

    @initialize(forgets=st.booleans(), seed=st.integers(0, 2**32))
    def begin(self, forgets: bool, seed: int) -> None:
        self.host = seeded_host(Faults(seed=seed, shuffles_turns=True))
        self.forgets = forgets
        self.object: Supervisor = (
            DynamicSupervisor(limit=LIMIT, intensity=INTENSITY, period_ns=PERIOD_NS)
            if forgets
            else Supervisor(limit=LIMIT, intensity=INTENSITY, period_ns=PERIOD_NS)
        )
        self.supervisor = self.host.scheduler.spawn(self.object)
        self.host.run_until_idle()
        self.children: dict[int, Modelled] = {}
        self.restarted_at: list[int] = []
        self.alive = True

    @rule(id=ids, restart=st.sampled_from(Restart), from_outside=st.booleans())
    @precondition(lambda self: self.alive)
    def start(self, id: int, restart: Restart, from_outside: bool) -> None:
        spec = ChildSpec(id=id, factory=Child, restart=restart)
        expected = "started"
        if id in self.children and self.children[id].alive:
            expected = "AlreadyStarted"
        elif id not in self.children and len(self.children) >= LIMIT:
            expected = "LimitReached"
        try:
            if from_outside:
                self.object.start_child(spec)
            else:
                self.host.call(self.supervisor, StartChild(spec))
            happened = "started"
        except ActorError as error:
            happened = type(error).__name__
        assert happened == expected
        if expected == "started":
            self.children[id] = Modelled(restart)
        self.host.run_until_idle()

    @rule(id=ids)
    @precondition(lambda self: self.alive)
    def terminate(self, id: int) -> None:
        assert self.host.call(self.supervisor, TerminateChild(id)) == (id in self.children)
        self.children.pop(id, None)
        self.host.run_until_idle()

    @rule(id=ids, how=st.sampled_from(["crash", "normal", "shutdown", "odd"]))
    @precondition(lambda self: self.alive)
    def child_ends(self, id: int, how: str) -> None:
        child = self.children.get(id)
        if child is None or not child.alive:
            return
        end(self.host, self.object.child(id), how)
        abnormal = how in ("crash", "odd")
        if child.restart is Restart.PERMANENT or (child.restart is Restart.TRANSIENT and abnormal):
            now = self.host.clock.monotonic_ns()
            self.restarted_at = [at for at in self.restarted_at if at > now - PERIOD_NS] + [now]
            if len(self.restarted_at) > INTENSITY:
                self.alive = False
            child.restarts += 1
        elif child.restart is Restart.TEMPORARY or self.forgets:
            del self.children[id]
        else:
            child.alive = False

    @rule(duration_ns=st.integers(1, 15))
    def time_passes(self, duration_ns: int) -> None:
        self.host.run_for(duration_ns)

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "host"):
            return
        scheduler = self.host.scheduler
        assert scheduler.is_alive(self.supervisor) == self.alive
        if not self.alive:
            assert scheduler.statistics().actors == 0
            return
        seen = {child.id: child for child in self.host.call(self.supervisor, WhichChildren())}
        assert {id: (child.ref is not None, child.restarts) for id, child in seen.items()} == {
            id: (child.alive, child.restarts) for id, child in self.children.items()
        }
        for child in seen.values():
            if child.ref is not None:
                assert self.host.call(child.ref, Ask()) == child.restarts
        alive = sum(child.alive for child in self.children.values())
        assert scheduler.statistics().actors == 1 + alive
        assert self.object.statistics().alive == alive


TestSupervisionAgainstAModel = SupervisionAgainstAModel.TestCase
TestSupervisionAgainstAModel.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None
)


def test_a_supervisor_that_is_stopped_takes_its_children_along(host: HeapHost):
    supervisor = host.scheduler.spawn(Supervisor([ChildSpec(id=1, factory=Child)]))
    host.run_until_idle()
    host.scheduler.stop(supervisor)
    host.run_until_idle()
    statistics = host.scheduler.statistics()
    assert (statistics.actors, statistics.spawned) == (0, 2)


def test_a_factory_that_fails_at_a_restart_ends_the_supervisor(host: HeapHost):
    made: list[bool] = []

    def factory() -> Child:
        if made:
            raise MemoryError
        made.append(True)
        return Child()

    supervisor = host.scheduler.spawn(Supervisor([ChildSpec(id=1, factory=factory, name="c")]))
    host.run_until_idle()
    end(host, host.scheduler.registry.whereis("c"))
    assert not host.scheduler.is_alive(supervisor)
    other = host.scheduler.spawn(DynamicSupervisor(limit=1))
    with pytest.raises(Crashed):
        host.call(other, StartChild(ChildSpec(id=1, factory=factory)))
