"""Trees of supervisors: strategies, ordered and bounded shutdown, escalation. Single cases in
virtual time, and whole lives of random trees against a reference model, event by event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from runtime.actor import Actor, ActorRef, Exit, handles, is_abnormal
from runtime.clock import NS_PER_S, VirtualClock
from runtime.randomness import SeededRandomness
from runtime.scheduler import Scheduler
from runtime.supervisor import (
    ESCALATED,
    ChildSpec,
    DynamicSupervisor,
    Restart,
    Shutdown,
    StartChild,
    Strategy,
    Supervisor,
    TerminateChild,
)
from runtime.testing import Faults, HeapHost, seeded_host

Log = list[tuple[str, ...]]


@attrs.frozen
class End:
    """End so, or by a crash."""

    how: str


class Worker(Actor):
    def __init__(self, name: str, log: Log) -> None:
        self.name = name
        self.log = log

    def started(self) -> None:
        self.log.append(("start", self.name))

    def terminated(self, reason: str) -> None:
        self.log.append(("end", self.name, reason))

    @handles(End)
    def end(self, message: End) -> None:
        if message.how == "crash":
            raise ValueError
        self.stop(message.how)


class Slow(Worker):
    """Takes its time to end."""

    traps_exits = True

    def __init__(self, name: str, log: Log, takes_ns: int) -> None:
        super().__init__(name, log)
        self.takes_ns = takes_ns

    @handles(Exit)
    async def exited(self, message: Exit) -> None:
        self.log.append(("told", self.name))
        await self.sleep(self.takes_ns)
        self.stop(message.reason)


class LoggedSupervisor(Supervisor):
    def __init__(self, name: str, log: Log, children: list[ChildSpec], **options: Any) -> None:
        super().__init__(children, **options)
        self.name = name
        self.log = log

    def terminated(self, reason: str) -> None:
        self.log.append(("end", self.name, reason))


def new_host() -> HeapHost:
    clock = VirtualClock()
    return HeapHost(Scheduler(clock=clock, randomness=SeededRandomness(1, "actors")), clock)


@pytest.fixture
def host() -> HeapHost:
    return new_host()


@pytest.fixture
def log() -> Log:
    return []


def worker(name: str, log: Log, **options: Any) -> ChildSpec:
    return ChildSpec(id=name, factory=lambda: Worker(name, log), name=name, **options)


def slow(name: str, log: Log, takes_s: int, **options: Any) -> ChildSpec:
    return ChildSpec(
        id=name, factory=lambda: Slow(name, log, takes_s * NS_PER_S), name=name, **options
    )


def end(host: HeapHost, name: str, how: str = "crash") -> None:
    ref = host.scheduler.registry.whereis(name)
    assert ref is not None
    host.cast(ref, End(how))
    host.run_until_idle()


# --- strategies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "ended", "started"),
    [
        (Strategy.ONE_FOR_ONE, [], ["b"]),
        (Strategy.REST_FOR_ONE, ["c"], ["b", "c"]),
        (Strategy.ONE_FOR_ALL, ["c", "a"], ["a", "b", "c"]),
    ],
)
def test_the_strategy_says_who_is_restarted_with_one_that_crashed(
    host: HeapHost, log: Log, strategy: Strategy, ended: list[str], started: list[str]
):
    specs = [worker(name, log) for name in "abc"]
    host.scheduler.spawn(Supervisor(specs, strategy=strategy))
    host.run_until_idle()
    log.clear()
    end(host, "b")
    assert log == [
        ("end", "b", "crashed: ValueError"),
        *(("end", name, "shutdown") for name in ended),
        *(("start", name) for name in started),
    ]


def test_in_a_group_each_starts_when_the_one_before_has_come_up(host: HeapHost, log: Log):
    class Dawdling(Worker):
        async def started(self) -> None:
            await self.sleep(NS_PER_S)
            self.log.append(("start", self.name))

    specs = [
        ChildSpec(id="a", factory=lambda: Dawdling("a", log), name="a"),
        worker("b", log),
    ]
    host.scheduler.spawn(Supervisor(specs, strategy=Strategy.ONE_FOR_ALL))
    host.run_for(NS_PER_S)
    log.clear()
    end(host, "b")
    assert log == [("end", "b", "crashed: ValueError"), ("end", "a", "shutdown")]
    host.run_for(NS_PER_S)
    assert log[2:] == [("start", "a"), ("start", "b")]


def test_a_group_that_does_not_come_up_again_is_tried_until_it_escalates(host: HeapHost, log: Log):
    broken: list[bool] = []

    class Sometimes(Worker):
        def started(self) -> None:
            if broken:
                raise OSError
            super().started()

    specs = [
        worker("a", log),
        ChildSpec(id="b", factory=lambda: Sometimes("b", log), name="b"),
        worker("c", log),
    ]
    host.scheduler.spawn(
        LoggedSupervisor("top", log, specs, strategy=Strategy.REST_FOR_ONE, intensity=2)
    )
    host.run_until_idle()
    log.clear()
    broken.append(True)
    end(host, "b")
    assert log == [
        ("end", "b", "crashed: ValueError"),
        ("end", "c", "shutdown"),
        ("end", "b", "start failed: OSError"),
        ("end", "b", "start failed: OSError"),
        ("end", "a", "shutdown"),
        ("end", "top", ESCALATED),
    ]


# --- shutdown ----------------------------------------------------------------------------------


def test_children_end_in_reverse_order_each_in_its_own_time(host: HeapHost, log: Log):
    supervisor = host.scheduler.spawn(
        LoggedSupervisor("top", log, [slow("a", log, 2), slow("b", log, 3)])
    )
    host.run_until_idle()
    log.clear()
    host.scheduler.exit(supervisor, "shutdown")
    host.run_for(3 * NS_PER_S - 1)
    assert log == [("told", "b")]
    host.run_for(1)
    assert log[1:] == [("end", "b", "shutdown"), ("told", "a")]
    host.run_for(2 * NS_PER_S)
    assert log[3:] == [("end", "a", "shutdown"), ("end", "top", "shutdown")]


def test_a_child_that_takes_too_long_is_killed_and_one_may_be_given_no_time(
    host: HeapHost, log: Log
):
    specs = [
        slow("a", log, 9, shutdown=NS_PER_S),
        slow("b", log, 9, shutdown=Shutdown.BRUTAL_KILL),
        slow("c", log, 9),
        slow("d", log, 9, shutdown=Shutdown.INFINITY),
    ]
    supervisor = host.scheduler.spawn(Supervisor(specs))
    host.run_until_idle()
    log.clear()
    host.scheduler.exit(supervisor, "shutdown")
    host.run_for((9 + 5 + 1) * NS_PER_S)
    assert [entry for entry in log if entry[0] == "end"] == [
        ("end", "d", "shutdown"),
        ("end", "c", "killed"),
        ("end", "b", "killed"),
        ("end", "a", "killed"),
    ]
    assert ("told", "b") not in log
    assert host.scheduler.statistics().actors == 0


def test_a_supervisor_below_has_all_the_time_that_its_own_children_need(host: HeapHost, log: Log):
    def inner() -> Supervisor:
        return LoggedSupervisor("inner", log, [slow("a", log, 4), slow("b", log, 4)])

    supervisor = host.scheduler.spawn(Supervisor([ChildSpec(id="inner", factory=inner)]))
    host.run_until_idle()
    log.clear()
    host.scheduler.exit(supervisor, "shutdown")
    host.run_for(8 * NS_PER_S)
    assert log == [
        ("told", "b"),
        ("end", "b", "shutdown"),
        ("told", "a"),
        ("end", "a", "shutdown"),
        ("end", "inner", "shutdown"),
    ]


def test_a_dynamic_supervisor_ends_its_children_all_at_once(host: HeapHost, log: Log):
    supervisor = host.scheduler.spawn(DynamicSupervisor(limit=100))
    for number in range(100):
        host.call(supervisor, StartChild(slow(str(number), log, 4)))
    host.run_until_idle()
    host.scheduler.exit(supervisor, "shutdown")
    host.run_for(4 * NS_PER_S)
    assert host.scheduler.statistics().actors == 0


def test_a_child_taken_away_by_a_call_has_its_time_too(host: HeapHost, log: Log):
    supervisor = host.scheduler.spawn(DynamicSupervisor(limit=1))
    host.call(supervisor, StartChild(slow("a", log, 1)))
    host.run_until_idle()
    assert host.call(supervisor, TerminateChild("a"))
    assert host.clock.monotonic_ns() == NS_PER_S
    assert log == [("start", "a"), ("told", "a"), ("end", "a", "shutdown")]


# --- the reference model -----------------------------------------------------------------------

PERIOD_NS = 10


@attrs.define(eq=False)
class Leaf:
    name: str
    restart: Restart
    alive: bool = False

    def spec(self, log: Log) -> ChildSpec:
        return worker(self.name, log, restart=self.restart)

    def start(self, log: Log) -> None:
        self.alive = True
        log.append(("start", self.name))

    def end(self, log: Log, reason: str) -> None:
        if self.alive:
            self.alive = False
            log.append(("end", self.name, reason))


@attrs.define(eq=False)
class Branch:
    """A supervisor as OTP's book has it, read aloud."""

    name: str
    restart: Restart
    strategy: Strategy
    intensity: int
    below: list[Leaf | Branch]
    alive: bool = False
    kept: list[Leaf | Branch] = attrs.field(factory=list)
    restarted_at: list[int] = attrs.field(factory=list)

    def factory(self, log: Log) -> Callable[[], Supervisor]:
        return lambda: LoggedSupervisor(
            self.name,
            log,
            [child.spec(log) for child in self.below],
            strategy=self.strategy,
            intensity=self.intensity,
            period_ns=PERIOD_NS,
        )

    def spec(self, log: Log) -> ChildSpec:
        return ChildSpec(id=self.name, factory=self.factory(log), restart=self.restart)

    def start(self, log: Log) -> None:
        self.alive = True
        self.restarted_at = []
        self.kept = list(self.below)
        for child in self.kept:
            child.start(log)

    def end(self, log: Log, reason: str) -> None:
        if not self.alive:
            return
        for child in reversed(self.kept):
            child.end(log, "shutdown")
        self.alive = False
        log.append(("end", self.name, reason))

    def child_ended(self, child: Leaf | Branch, reason: str, now: int, log: Log) -> bool:
        """Whether this supervisor stands it."""
        if child.restart is Restart.TEMPORARY:
            self.kept.remove(child)
            return True
        if child.restart is Restart.TRANSIENT and not is_abnormal(reason):
            return True
        self.restarted_at = [at for at in self.restarted_at if at > now - PERIOD_NS] + [now]
        if len(self.restarted_at) > self.intensity:
            self.end(log, ESCALATED)
            return False
        first = self.kept.index(child)
        group = {
            Strategy.ONE_FOR_ONE: [child],
            Strategy.REST_FOR_ONE: self.kept[first:],
            Strategy.ONE_FOR_ALL: self.kept[:],
        }[self.strategy]
        for each in reversed(group):
            each.end(log, "shutdown")
        for each in group:
            if each.restart is Restart.TEMPORARY:
                self.kept.remove(each)
            else:
                each.start(log)
        return True


shapes = st.lists(
    st.tuples(
        st.sampled_from(Restart),
        st.sampled_from(Strategy),
        st.integers(0, 2),
        st.lists(st.sampled_from(Restart), max_size=3),
    ),
    min_size=1,
    max_size=3,
)


class TreesAgainstAModel(RuleBasedStateMachine):
    """Supervisors over supervisors over workers."""

    @initialize(
        strategy=st.sampled_from(Strategy),
        intensity=st.integers(0, 3),
        shape=shapes,
        seed=st.integers(0, 2**32),
    )
    def begin(self, strategy: Strategy, intensity: int, shape: list[Any], seed: int) -> None:
        self.host = seeded_host(Faults(seed=seed, shuffles_turns=True))
        self.log: Log = []
        self.expected: Log = []
        inner = [
            Branch(
                f"s{i}",
                restart,
                inner_strategy,
                inner_intensity,
                [Leaf(f"w{i}{j}", each) for j, each in enumerate(leaves)],
            )
            for i, (restart, inner_strategy, inner_intensity, leaves) in enumerate(shape)
        ]
        below: list[Leaf | Branch] = [Leaf("first", Restart.PERMANENT), *inner]
        self.top = Branch("top", Restart.TEMPORARY, strategy, intensity, below)
        self.ref: ActorRef = self.host.scheduler.spawn(self.top.factory(self.log)())
        self.host.run_until_idle()
        self.top.start(self.expected)

    @rule(pick=st.integers(0, 99), how=st.sampled_from(["crash", "normal", "shutdown", "odd"]))
    def worker_ends(self, pick: int, how: str) -> None:
        living = [
            (leaf, parent)
            for parent in (self.top, *self.top.kept)
            if isinstance(parent, Branch) and parent.alive
            for leaf in parent.kept
            if isinstance(leaf, Leaf) and leaf.alive
        ]
        if not living:
            return
        leaf, parent = living[pick % len(living)]
        end(self.host, leaf.name, how)
        now = self.host.clock.monotonic_ns()
        reason = "crashed: ValueError" if how == "crash" else how
        leaf.end(self.expected, reason)
        stands = parent.child_ended(leaf, reason, now, self.expected)
        if not stands and parent is not self.top:
            self.top.child_ended(parent, ESCALATED, now, self.expected)

    @rule(duration_ns=st.integers(1, 15))
    def time_passes(self, duration_ns: int) -> None:
        self.host.run_for(duration_ns)

    @rule()
    def all_is_shut_down(self) -> None:
        self.host.scheduler.exit(self.ref, "shutdown")
        self.host.run_until_idle()
        self.top.end(self.expected, "shutdown")
        assert self.host.scheduler.statistics().actors == 0

    @invariant()
    def they_agree(self) -> None:
        if hasattr(self, "host"):
            assert self.log == self.expected


TestTreesAgainstAModel = TreesAgainstAModel.TestCase
TestTreesAgainstAModel.settings = settings(max_examples=200, stateful_step_count=25, deadline=None)
