"""Links and exit signals: single cases, and random lives against a reference model."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import Any

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from runtime.actor import Actor, ActorRef, Exit, handles
from runtime.clock import VirtualClock
from runtime.randomness import SeededRandomness
from runtime.scheduler import Scheduler
from runtime.testing import Faults, HeapHost, seeded_host


@attrs.frozen
class Do:
    """Have the actor run a function on itself."""

    function: Any


class Subject(Actor):
    """Does what it is told, and writes down how it ended."""

    def __init__(self) -> None:
        self.exits: list[Exit] = []
        self.ended: str | None = None

    def terminated(self, reason: str) -> None:
        self.ended = reason

    @handles(Do)
    def do(self, message: Do) -> Any:
        return message.function(self)


class Trapping(Subject):
    traps_exits = True

    @handles(Exit)
    def exited(self, message: Exit) -> None:
        self.exits.append(message)


class TrappingWithoutAHandler(Subject):
    traps_exits = True


def new_host() -> HeapHost:
    clock = VirtualClock()
    return HeapHost(Scheduler(clock=clock, randomness=SeededRandomness(1, "actors")), clock)


@pytest.fixture
def host() -> HeapHost:
    return new_host()


def do(host: HeapHost, ref: ActorRef, function: Any) -> None:
    host.cast(ref, Do(function))
    host.run_until_idle()


def crash(subject: Subject) -> None:
    raise ValueError


def test_a_crash_runs_on_from_link_to_link_and_stops_at_one_that_traps(host: HeapHost):
    subjects = [Subject(), Subject(), Trapping(), Subject()]
    refs = [host.scheduler.spawn(subject) for subject in subjects]
    for subject, peer in zip(subjects, refs[1:], strict=False):
        do(host, subject.context.ref, lambda one, peer=peer: one.link(peer))
    do(host, refs[0], crash)
    ended = [subject.ended for subject in subjects]
    assert ended == ["crashed: ValueError", "crashed: ValueError", None, None]
    assert subjects[2].exits == [Exit(refs[1], "crashed: ValueError")]


def test_a_normal_end_ends_nobody_else_but_one_that_traps_hears_of_it(host: HeapHost):
    subject, plain, trapping = Subject(), Subject(), Trapping()
    ref, plain_ref, trapping_ref = map(host.scheduler.spawn, (subject, plain, trapping))
    do(host, ref, lambda one: (one.link(plain_ref), one.link(trapping_ref)))
    do(host, ref, lambda one: one.stop())
    assert (subject.ended, plain.ended) == ("normal", None)
    assert trapping.exits == [Exit(ref, "normal")]


def test_a_signal_runs_through_a_chain_of_ten_thousand_links(host: HeapHost):
    subjects = [Subject() for _ in range(10_000)]
    refs = [host.scheduler.spawn(subject) for subject in subjects]
    for ref, peer in pairwise(refs):
        host.cast(ref, Do(lambda one, peer=peer: one.link(peer)))
    host.run_until_idle()
    do(host, refs[5_000], crash)
    assert host.scheduler.statistics().actors == 0
    assert {subject.ended for subject in subjects} == {"crashed: ValueError"}
    assert host.scheduler.statistics().crashed == 1


def test_a_spawn_with_a_link_is_felt_by_the_parent(host: HeapHost):
    parent = Subject()
    host.scheduler.spawn(parent)
    children: list[ActorRef] = []
    do(host, parent.context.ref, lambda one: children.append(one.spawn(Subject(), link=True)))
    do(host, children[0], crash)
    assert parent.ended == "crashed: ValueError"


def test_a_signal_from_outside_ends_one_that_traps_and_has_no_handler(host: HeapHost):
    subject, stranger = TrappingWithoutAHandler(), Subject()
    ref = host.scheduler.spawn(subject)
    host.scheduler.spawn(stranger)
    do(host, stranger.context.ref, lambda one: one.exit(ref, "odd"))
    assert subject.ended is None
    host.scheduler.exit(ref, "shutdown")
    host.run_until_idle()
    assert subject.ended == "shutdown"
    assert not host.scheduler.exit(ref, "shutdown")


def test_an_actor_that_has_not_come_up_cannot_trap(host: HeapHost):
    class Slow(Trapping):
        async def started(self) -> None:
            await self.sleep(10)

    subject = Slow()
    ref = host.scheduler.spawn(subject)
    host.run_until_idle()
    host.scheduler.exit(ref, "shutdown")
    assert subject.ended == "shutdown"


def test_an_exit_message_is_never_refused(host: HeapHost):
    subject = Trapping()
    ref = host.scheduler.spawn(subject, mailbox_limit=1)
    assert host.cast(ref, Do(lambda _: None))
    assert not host.cast(ref, Do(lambda _: None))
    host.scheduler.exit(ref, "odd")
    host.run_until_idle()
    assert subject.exits == [Exit(None, "odd")]


# --- the reference model -----------------------------------------------------------------------

ACTORS = 6
numbers = st.integers(0, ACTORS - 1)
reasons = st.sampled_from(["normal", "shutdown", "odd", "kill"])


class LinksAgainstAModel(RuleBasedStateMachine):
    """The model is a graph and a queue of signals."""

    @initialize(
        traps=st.lists(st.booleans(), min_size=ACTORS, max_size=ACTORS),
        seed=st.integers(0, 2**32),
    )
    def begin(self, traps: list[bool], seed: int) -> None:
        self.host = seeded_host(Faults(seed=seed, shuffles_turns=True))
        self.traps = traps
        self.subjects = [Trapping() if trap else Subject() for trap in traps]
        self.refs = [self.host.scheduler.spawn(subject) for subject in self.subjects]
        self.edges: set[frozenset[int]] = set()
        self.ended: list[str | None] = [None] * ACTORS
        self.exits: list[list[Exit]] = [[] for _ in range(ACTORS)]

    @rule(one=numbers, other=numbers)
    def link(self, one: int, other: int) -> None:
        do(self.host, self.refs[one], lambda actor: actor.link(self.refs[other]))
        if self.ended[one] is not None or one == other:
            return
        if self.ended[other] is not None:
            self.signal(one, self.refs[other], "dead")
        else:
            self.edges.add(frozenset((one, other)))

    @rule(one=numbers, other=numbers)
    def unlink(self, one: int, other: int) -> None:
        do(self.host, self.refs[one], lambda actor: actor.unlink(self.refs[other]))
        if self.ended[one] is None:
            self.edges.discard(frozenset((one, other)))

    @rule(one=numbers, how=st.sampled_from(["crash", "normal", "odd"]))
    def ends(self, one: int, how: str) -> None:
        do(self.host, self.refs[one], crash if how == "crash" else lambda actor: actor.stop(how))
        if self.ended[one] is None:
            self.end(one, "crashed: ValueError" if how == "crash" else how)

    @rule(one=numbers, other=numbers, reason=reasons)
    def exit(self, one: int, other: int, reason: str) -> None:
        do(self.host, self.refs[one], lambda actor: actor.exit(self.refs[other], reason))
        if self.ended[one] is not None or self.ended[other] is not None:
            return
        if reason == "kill":
            self.end(other, "killed")
        else:
            self.signal(other, self.refs[one], reason)

    def signal(self, number: int, source: ActorRef, reason: str) -> None:
        if self.traps[number]:
            self.exits[number].append(Exit(source, reason))
        elif reason != "normal" or source == self.refs[number]:
            self.end(number, reason)

    def end(self, number: int, reason: str) -> None:
        ending = deque([(number, reason)])
        while ending:
            one, why = ending.popleft()
            if self.ended[one] is not None:
                continue
            self.ended[one] = why
            for other in range(ACTORS):
                if other == one or frozenset((one, other)) not in self.edges:
                    continue
                self.edges.discard(frozenset((one, other)))
                if self.traps[other]:
                    self.exits[other].append(Exit(self.refs[one], why))
                elif why != "normal":
                    ending.append((other, why))

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "host"):
            return
        assert [subject.ended for subject in self.subjects] == self.ended
        for subject, expected in zip(self.subjects, self.exits, strict=True):
            if subject.ended is None:  # signals of one end may come in any order
                assert sorted(map(repr, subject.exits)) == sorted(map(repr, expected))


TestLinksAgainstAModel = LinksAgainstAModel.TestCase
TestLinksAgainstAModel.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
