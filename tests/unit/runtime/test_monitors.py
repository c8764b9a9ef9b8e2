"""Monitors and watches against a reference model: a list of who watches whom.

One Down for each monitor on each end, with its reason, whatever the order of turns; none after
demonitor, also if it lay in the mailbox; none of or to those that have ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from runtime.actor import Actor, ActorRef, Down, Monitor, handles
from runtime.testing import Faults, seeded_host

ACTORS = 4
numbers = st.integers(0, ACTORS - 1)
Seen = Counter[tuple[ActorRef, str]]


@attrs.frozen
class Do:
    function: Callable[[Subject], object]


class Subject(Actor):
    def __init__(self) -> None:
        self.downs: Seen = Counter()

    @handles(Do)
    def do(self, message: Do) -> None:
        message.function(self)

    @handles(Down)
    def down(self, message: Down) -> None:
        self.downs[message.ref, message.reason] += 1


class Waiter(Actor):
    """Waits for one end."""

    def __init__(self, ref: ActorRef) -> None:
        self.ref = ref
        self.reason: str | None = None

    async def started(self) -> None:
        self.reason = await self.wait_ended(self.ref)


@attrs.define(eq=False)
class Watch:
    """A monitor of an actor, or (with `watcher` None) a watch from outside."""

    watcher: int | None
    watched: ActorRef
    monitor: Monitor


class MonitorsAgainstAModel(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.host = seeded_host(Faults(seed=seed, shuffles_turns=True))
        self.scheduler = self.host.scheduler
        self.subjects = [Subject() for _ in range(ACTORS)]
        self.refs = [self.scheduler.spawn(each) for each in self.subjects]
        self.expected: list[Seen] = [Counter() for _ in range(ACTORS)]
        self.watches: list[Watch] = []
        self.outside: Seen = Counter()
        self.expected_outside: Seen = Counter()
        self.waiters: list[tuple[Waiter, ActorRef]] = []
        self.reason_by_ref: dict[ActorRef, str] = {}

    # --- what happens ---

    @rule(one=numbers, other=numbers, is_dead=st.booleans())
    def monitor(self, one: int, other: int, is_dead: bool) -> None:
        """Again and again, if need be; also one's own, and somebody who has long ended."""
        target = self.refs[other]
        if is_dead and self.reason_by_ref:
            target = next(iter(self.reason_by_ref))
        watch = Watch(one, target, self.subjects[one].monitor(target))
        if target in self.reason_by_ref:
            self.expected[one][target, "dead"] += 1
        else:
            self.watches.append(watch)

    @rule(other=numbers)
    def watch(self, other: int) -> None:
        ref = self.refs[other]

        def ended(reason: str) -> None:
            self.outside[ref, reason] += 1

        self.watches.append(Watch(None, ref, self.scheduler.watch(ref, ended)))

    @rule(other=numbers)
    def wait(self, other: int) -> None:
        waiter = Waiter(self.refs[other])
        self.scheduler.spawn(waiter)
        self.waiters.append((waiter, self.refs[other]))
        self.host.run_until_idle()

    @rule(pick=st.integers(0, 99))
    def take_off(self, pick: int) -> None:
        if self.watches:
            watch = self.watches.pop(pick % len(self.watches))
            self.scheduler.unwatch(watch.monitor)

    @rule(one=numbers, how=st.sampled_from(["crash", "normal", "odd", "stop", "kill"]))
    def ends(self, one: int, how: str) -> None:
        self.end(one, how)
        self.told(self.refs[one])
        self.replace(one)

    @rule(one=numbers, pick=st.integers(0, 99))
    def ends_and_a_monitor_is_taken_off_before_its_down_is_read(self, one: int, pick: int) -> None:
        ref = self.refs[one]
        own = [each for each in self.watches if each.watched == ref and each.watcher is not None]
        self.scheduler.stop(ref, "odd")
        self.reason_by_ref[ref] = "odd"
        if own:
            late = own[pick % len(own)]
            self.scheduler.unwatch(late.monitor)
            self.watches.remove(late)
        self.host.run_until_idle()
        self.told(ref)
        self.replace(one)

    @rule()
    def time_passes(self) -> None:
        self.host.run_until_idle()

    # --- the model ---

    def end(self, one: int, how: str) -> None:
        ref = self.refs[one]
        reason = {"crash": "crashed: ValueError", "kill": "killed"}.get(how, how)
        match how:
            case "crash":
                self.scheduler.cast(ref, Do(crash))
            case "normal" | "odd":
                self.scheduler.cast(ref, Do(lambda subject: subject.stop(how)))
            case "stop":
                self.scheduler.stop(ref, "stop")
            case _:
                self.scheduler.exit(ref, "kill")
        self.reason_by_ref[ref] = reason
        self.host.run_until_idle()

    def told(self, ref: ActorRef) -> None:
        """Everybody who watches `ref` is told, but nobody who has ended."""
        for watch in [each for each in self.watches if each.watched == ref]:
            self.watches.remove(watch)
            key = (ref, self.reason_by_ref[ref])
            if watch.watcher is None:
                self.expected_outside[key] += 1
            elif self.refs[watch.watcher] != ref:
                self.expected[watch.watcher][key] += 1

    def replace(self, one: int) -> None:
        """Somebody new takes the place; what the one before watched is watched no more."""
        self.watches = [each for each in self.watches if each.watcher != one]
        self.subjects[one] = Subject()
        self.refs[one] = self.scheduler.spawn(self.subjects[one])
        self.expected[one] = Counter()

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "host"):
            return
        self.host.run_until_idle()
        assert [subject.downs for subject in self.subjects] == self.expected
        assert self.outside == self.expected_outside
        for waiter, ref in self.waiters:
            assert waiter.reason == self.reason_by_ref.get(ref)

    def teardown(self) -> None:
        """Nothing is kept of monitors that have done their work."""
        for ref in self.refs:
            context = self.scheduler.resolve(ref)
            assert context is not None
            own = [each for each in self.watches if each.watcher is not None]
            watching = sum(self.refs[each.watcher or 0] == ref for each in own)
            assert len(context._extras.watching or ()) == watching


def crash(subject: Subject) -> None:
    raise ValueError


TestMonitorsAgainstAModel = MonitorsAgainstAModel.TestCase
TestMonitorsAgainstAModel.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None
)
