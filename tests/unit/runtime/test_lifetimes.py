"""How actors start and end, and who is told: in virtual time."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import attrs
import pytest

from runtime.actor import (
    LATER,
    Actor,
    ActorRef,
    Crashed,
    Dead,
    Down,
    LimitReached,
    Monitor,
    NameTaken,
    StartFailed,
    Timer,
    handles,
)
from runtime.clock import NS_PER_S, VirtualClock
from runtime.inspection import CrashReport, Report
from runtime.randomness import SeededRandomness
from runtime.scheduler import Scheduler
from runtime.testing import HeapHost, heap_sleep


@attrs.frozen
class Do:
    """Have the actor run a function on itself."""

    function: Any


@attrs.frozen
class Await:
    """Have the actor await what a function of itself gives."""

    function: Any


@attrs.frozen
class Note:
    what: Any


class Subject(Actor):
    """Does what it is told, and writes down what happens to it."""

    def __init__(self, log: list[Any] | None = None, name: str = "") -> None:
        self.log: list[Any] = [] if log is None else log
        self.name = name

    def terminated(self, reason: str) -> None:
        self.log.append((self.name, "ended", reason) if self.name else ("ended", reason))

    @handles(Do)
    def do(self, message: Do) -> Any:
        return message.function(self)

    @handles(Await)
    async def wait(self, message: Await) -> Any:
        return await message.function(self)

    @handles(Note)
    def note(self, message: Note) -> None:
        self.log.append(message.what)

    @handles(Down)
    def down(self, message: Down) -> None:
        self.log.append(message)


@pytest.fixture
def reports() -> list[Report]:
    return []


@pytest.fixture
def host(reports: list[Report]) -> HeapHost:
    clock = VirtualClock()
    scheduler = Scheduler(
        clock=clock, randomness=SeededRandomness(1, "actors"), report=reports.append
    )
    return HeapHost(scheduler, clock)


# --- starting --------------------------------------------------------------------------------


def test_an_actor_starts_before_its_first_message(host: HeapHost):
    class Starting(Subject):
        async def started(self) -> None:
            await self.sleep(NS_PER_S)
            self.log.append("started")

    actor = Starting()
    ref = host.scheduler.spawn(actor)
    host.cast(ref, Note("first"))
    host.run_until_idle()
    assert actor.log == []
    host.run_for(NS_PER_S)
    assert actor.log == ["started", "first"]


@pytest.mark.parametrize("awaits", [True, False])
def test_a_failing_start_ends_the_actor_and_whoever_waits_for_it_is_told(
    host: HeapHost, reports: list[Report], awaits: bool
):
    class Awaiting(Subject):
        async def started(self) -> None:
            await self.sleep(1)
            raise KeyError

    class Plain(Subject):
        def started(self) -> None:
            raise KeyError

    actor = Awaiting() if awaits else Plain()

    async def start(subject: Actor) -> str:
        with pytest.raises(StartFailed, match="start failed: KeyError"):
            await subject.wait_started(subject.spawn(actor))
        return "told"

    assert host.call(host.scheduler.spawn(Subject()), Await(start)) == "told"
    assert actor.log == [("ended", "start failed: KeyError")]
    assert [type(report) for report in reports] == [CrashReport]


def test_waiting_for_a_start_that_has_happened_or_never_will_takes_no_time(host: HeapHost):
    async def wait(subject: Actor) -> str:
        child = subject.spawn(Subject())
        await subject.wait_started(child)
        subject.stop_actor(child)
        with pytest.raises(StartFailed):
            await subject.wait_started(child)
        return "done"

    assert host.call(host.scheduler.spawn(Subject()), Await(wait)) == "done"


def test_a_parent_that_waits_for_a_child_that_calls_it_is_a_circle(
    host: HeapHost, reports: list[Report]
):
    class Child(Subject):
        async def started(self) -> None:
            assert self.context.parent is not None
            await self.call(self.context.parent, Note("hello"))

    async def start(subject: Actor) -> None:
        await subject.wait_started(subject.spawn(Child()))

    with pytest.raises(Crashed, match="StartFailed"):
        host.call(host.scheduler.spawn(Subject()), Await(start))
    [first, *_] = reports
    assert isinstance(first, CrashReport)
    assert first.reason == "start failed: CallCycle"


def test_an_instance_is_spawned_once_and_a_name_is_taken_once(host: HeapHost):
    actor = Subject()
    ref = host.scheduler.spawn(actor, name="one")
    with pytest.raises(ValueError, match="spawned before"):
        host.scheduler.spawn(actor)
    with pytest.raises(NameTaken):
        host.scheduler.spawn(Subject(), name="one")
    assert host.scheduler.registry.whereis("one") == ref
    host.scheduler.stop(ref)
    assert host.scheduler.registry.whereis("one") is None
    host.scheduler.spawn(Subject(), name="one")


def test_the_number_of_actors_has_a_limit():
    scheduler = Scheduler(
        clock=VirtualClock(), randomness=SeededRandomness(1, "actors"), actor_limit=2
    )
    refs = [scheduler.spawn(Subject()) for _ in range(2)]
    with pytest.raises(LimitReached):
        scheduler.spawn(Subject())
    scheduler.stop(refs[0])
    scheduler.spawn(Subject())


# --- ending ----------------------------------------------------------------------------------


def test_stop_in_a_handler_takes_effect_when_it_ends_and_the_reply_is_sent(host: HeapHost):
    actor = Subject()
    ref = host.scheduler.spawn(actor)

    async def stop(subject: Actor) -> str:
        subject.stop("enough")
        await subject.sleep(1)
        return "bye"

    assert host.call(ref, Await(stop)) == "bye"
    assert actor.log == [("ended", "enough")]
    with pytest.raises(Dead):
        host.call(ref, Note(1))


def test_stopping_a_waiting_actor_runs_its_clean_up_and_loses_its_mail(host: HeapHost):
    actor = Subject()
    ref = host.scheduler.spawn(actor)

    async def wait(subject: Subject) -> None:
        try:
            await subject.sleep(NS_PER_S)
        finally:
            subject.log.append("cleaned")

    host.cast(ref, Await(wait))
    host.run_until_idle()
    host.cast(ref, Note("lost"))
    assert host.scheduler.stop(ref, "killed")
    assert not host.scheduler.stop(ref)
    host.run_for(2 * NS_PER_S)
    assert actor.log == ["cleaned", ("ended", "killed")]
    assert host.scheduler.statistics().dead_letters == 1


def test_a_clean_up_that_waits_or_fails_is_reported_and_stops_nothing(
    host: HeapHost, reports: list[Report]
):
    async def wait(subject: Subject) -> None:
        try:
            await subject.sleep(NS_PER_S)
        finally:
            await subject.sleep(1)

    actor = Subject()
    ref = host.scheduler.spawn(actor)
    host.cast(ref, Await(wait))
    host.run_until_idle()
    host.scheduler.stop(ref)
    [report] = reports
    assert isinstance(report, CrashReport)
    assert report.reason == "clean-up failed: RuntimeError"
    assert actor.log == [("ended", "shutdown")]


def test_a_failure_in_terminated_is_reported_and_stops_nothing(
    host: HeapHost, reports: list[Report]
):
    class Clumsy(Actor):
        def terminated(self, reason: str) -> None:
            raise ZeroDivisionError

    watcher = Subject()
    ref = host.scheduler.spawn(Clumsy())
    watching = host.scheduler.spawn(watcher)
    host.call(watching, Do(lambda subject: subject.monitor(ref) and None))
    host.scheduler.stop(ref, "normal")
    host.run_until_idle()
    assert watcher.log == [Down(ref, "normal")]
    assert [report.reason for report in reports if isinstance(report, CrashReport)] == [
        "terminated failed: ZeroDivisionError"
    ]


def test_an_effect_in_flight_is_dropped_when_its_actor_is_stopped(host: HeapHost):
    finished: list[str] = []

    async def effect() -> None:
        await heap_sleep(NS_PER_S)
        finished.append("finished")

    actor = Subject()
    ref = host.scheduler.spawn(actor)
    host.cast(ref, Await(lambda subject: subject.perform(effect)))
    host.run_until_idle()
    assert host.scheduler.statistics().effects_in_flight == 1
    host.scheduler.stop(ref)
    assert host.scheduler.statistics().effects_in_flight == 0
    host.run_for(2 * NS_PER_S)
    assert finished == []
    assert actor.log == [("ended", "shutdown")]


def test_a_result_that_comes_all_the_same_is_dropped_and_counted(host: HeapHost):
    async def effect() -> int:
        return 1

    ref = host.scheduler.spawn(Subject())
    host.cast(ref, Await(lambda subject: subject.perform(effect)))
    host.scheduler.run()
    [begun] = host.scheduler.drain_effects()
    host.scheduler.stop(ref)
    assert begun.abandoned
    assert not host.scheduler.complete(begun, 1)
    assert host.scheduler.statistics().late_effects == 1


def test_children_end_before_their_parent_the_youngest_first(host: HeapHost):
    log: list[Any] = []

    def family(subject: Actor) -> None:
        for name in ("a", "b"):
            child = Subject(log, name)
            subject.spawn(child)
            child.spawn(Subject(log, name + "1"))

    ref = host.scheduler.spawn(Subject(log, "root"))
    host.call(ref, Do(family))
    host.scheduler.stop(ref, "normal")
    assert log == [
        ("b1", "ended", "shutdown"),
        ("b", "ended", "shutdown"),
        ("a1", "ended", "shutdown"),
        ("a", "ended", "shutdown"),
        ("root", "ended", "normal"),
    ]
    assert host.scheduler.statistics().actors == 0


def test_a_child_that_crashes_leaves_its_parent_alone(host: HeapHost):
    box: list[ActorRef] = []
    ref = host.scheduler.spawn(Subject())
    host.call(ref, Do(lambda subject: box.append(subject.spawn(Subject()))))
    with pytest.raises(Crashed):
        host.call(box[0], Do(lambda subject: 1 / 0))
    assert host.scheduler.is_alive(ref)
    seen = host.scheduler.statistics_of(ref)
    assert seen is not None
    assert seen.children == 0


def test_a_dying_actor_spawns_nothing_and_sets_no_timer(host: HeapHost):
    refused: list[str] = []

    class Stubborn(Actor):
        def terminated(self, reason: str) -> None:
            for attempt in (
                lambda: self.spawn(Subject()),
                lambda: self.send_after(1, Note(1)),
                lambda: self.monitor(self.context.ref),
            ):
                try:
                    attempt()
                except Dead:
                    refused.append("refused")

    host.scheduler.stop(host.scheduler.spawn(Stubborn()))
    assert refused == ["refused"] * 3


def test_shutdown_ends_everybody_and_answers_whoever_waits(host: HeapHost):
    log: list[Any] = []
    for name in "abc":
        host.scheduler.spawn(Subject(log, name))
    errors: list[Exception | None] = []
    waiting = host.scheduler.spawn(Subject(log, "w"))
    host.scheduler.call_soon(
        waiting, Do(lambda subject: LATER), lambda value, error: errors.append(error)
    )
    host.run_until_idle()
    host.scheduler.shutdown()
    assert [entry[0] for entry in log] == ["w", "c", "b", "a"]
    assert [type(error) for error in errors] == [Dead]
    statistics = host.scheduler.statistics()
    assert (statistics.actors, statistics.ended) == (0, 4)
    assert host.scheduler.next_deadline() is None


# --- monitors --------------------------------------------------------------------------------


def test_a_monitor_tells_how_its_actor_ended(host: HeapHost):
    watcher = Subject()
    watching = host.scheduler.spawn(watcher)
    a, b, c = (host.scheduler.spawn(Subject()) for _ in range(3))
    host.scheduler.stop(c)

    def watch(subject: Actor) -> None:
        for ref in (a, b, c):
            subject.monitor(ref)

    host.call(watching, Do(watch))
    host.scheduler.stop(b, "normal")
    with pytest.raises(Crashed):
        host.call(a, Do(lambda subject: 1 / 0))
    host.run_until_idle()
    reason = "crashed: ZeroDivisionError"
    assert watcher.log == [Down(c, "dead"), Down(b, "normal"), Down(a, reason)]


def test_down_is_never_refused_and_never_comes_after_demonitor(host: HeapHost):
    watcher = Subject()
    watching = host.scheduler.spawn(watcher, mailbox_limit=1)
    watched = [host.scheduler.spawn(Subject()) for _ in range(4)]
    monitors: list[Monitor] = []
    host.call(
        watching,
        Do(lambda subject: monitors.extend(subject.monitor(ref) for ref in watched)),
    )
    host.cast(watching, Note("full"))
    assert not host.cast(watching, Note("refused"))
    for ref in watched[:3]:
        host.scheduler.stop(ref)
    watcher.demonitor(monitors[1])
    watcher.demonitor(monitors[3])
    host.scheduler.stop(watched[3])
    host.run_until_idle()
    assert watcher.log == ["full", Down(watched[0], "shutdown"), Down(watched[2], "shutdown")]


def test_a_watcher_that_ends_leaves_no_monitor_behind(host: HeapHost):
    watched = Subject()
    ref = host.scheduler.spawn(watched)
    watching = host.scheduler.spawn(Subject())
    host.call(watching, Do(lambda subject: subject.monitor(ref) and None))
    assert watched.context._extras.monitors
    host.scheduler.stop(watching)
    assert not watched.context._extras.monitors


def test_a_watch_from_outside_calls_back_once(host: HeapHost):
    reasons: list[str] = []
    ref = host.scheduler.spawn(Subject())
    host.scheduler.watch(ref, reasons.append)
    host.scheduler.unwatch(host.scheduler.watch(ref, reasons.append))
    host.scheduler.stop(ref, "normal")
    host.scheduler.watch(ref, reasons.append)
    assert reasons == ["normal", "dead"]


# --- timers ----------------------------------------------------------------------------------


def test_a_timer_comes_at_its_time_even_to_a_full_mailbox(host: HeapHost):
    actor = Subject()
    ref = host.scheduler.spawn(actor, mailbox_limit=1)
    host.call(ref, Do(lambda subject: subject.send_after(NS_PER_S, Note("timer")) and None))
    assert host.next_event_ns() == NS_PER_S
    host.clock.advance_to(NS_PER_S)
    host.cast(ref, Note("full"))
    host.run_until_idle()
    assert sorted(actor.log) == ["full", "timer"]


def test_a_cancelled_timer_does_not_come_even_from_the_mailbox(host: HeapHost):
    actor = Subject()
    ref = host.scheduler.spawn(actor)
    timers: list[Timer] = []

    def arm(subject: Actor) -> None:
        timers.extend(subject.send_after(each, Note(each)) for each in (1, 2, 3))

    async def dawdle(subject: Subject) -> list[bool]:
        await subject.perform(wait)
        return [subject.cancel(timer) for timer in timers]

    async def wait() -> None:
        await heap_sleep(2)

    host.call(ref, Do(arm))
    assert host.call(ref, Await(dawdle)) == [True, True, True]
    host.run_for(NS_PER_S)
    assert actor.log == []
    assert [actor.cancel(timer) for timer in timers] == [False] * 3


def test_a_timer_may_be_for_another_and_ends_with_who_set_it(host: HeapHost):
    actor = Subject()
    ref = host.scheduler.spawn(actor)
    setter = host.scheduler.spawn(Subject())
    for delay_ns in (1, 5):
        host.call(
            setter,
            Do(lambda subject, d=delay_ns: subject.send_after(d, Note(d), to=ref) and None),
        )
    host.run_for(2)
    host.scheduler.stop(setter)
    host.run_for(NS_PER_S)
    assert actor.log == [1]
    assert host.scheduler.statistics().timers == 0


# --- names and topics ------------------------------------------------------------------------


def test_names_belong_to_living_actors(host: HeapHost):
    registry = host.scheduler.registry
    a, b = host.scheduler.spawn(Subject()), host.scheduler.spawn(Subject())
    registry.register(("account", 1), a)
    registry.register(("account", 1), a)
    registry.register("alias", a)
    with pytest.raises(NameTaken):
        registry.register(("account", 1), b)
    assert registry.names() == (("account", 1), "alias")
    registry.unregister("alias")
    registry.unregister("alias")
    host.scheduler.stop(a)
    assert registry.whereis(("account", 1)) is None
    assert registry.statistics().names == 0
    with pytest.raises(Dead):
        registry.register("again", a)


def test_whoever_hears_of_an_end_finds_the_name_free(host: HeapHost):
    found: list[Any] = []

    class Heir(Actor):
        @handles(Do)
        def watch(self, message: Do) -> None:
            self.monitor(message.function)

        @handles(Down)
        def down(self, message: Down) -> None:
            found.append(self.context.registry.whereis("throne"))

    ref = host.scheduler.spawn(Subject(), name="throne")
    heir = host.scheduler.spawn(Heir())
    host.call(heir, Do(ref))
    host.scheduler.stop(ref)
    host.run_until_idle()
    assert found == [None]


def test_subscribers_hear_what_is_published_until_they_leave_or_end(host: HeapHost):
    actors = [Subject() for _ in range(3)]
    refs = [host.scheduler.spawn(actor, mailbox_limit=2) for actor in actors]
    pubsub = host.scheduler.pubsub
    for ref in refs:
        pubsub.subscribe("news", ref)
        pubsub.subscribe("news", ref)
    assert pubsub.publish("news", Note(1)) == 3
    host.run_until_idle()
    pubsub.unsubscribe("news", refs[0])
    host.scheduler.stop(refs[1])
    assert pubsub.subscribers("news") == (refs[2],)
    assert [pubsub.publish("news", Note(2)) for _ in range(3)] == [1, 1, 0]
    host.run_until_idle()
    assert [actor.log for actor in actors] == [[1], [1, ("ended", "shutdown")], [1, 2, 2]]
    host.scheduler.stop(refs[2])
    statistics = pubsub.statistics()
    assert (statistics.topics, statistics.subscriptions, statistics.refused) == (0, 0, 1)
    assert pubsub.publish("news", Note(3)) == 0
    with pytest.raises(Dead):
        pubsub.subscribe("news", refs[2])


# --- looking on ------------------------------------------------------------------------------


def test_the_tree_shows_every_actor_below_its_parent(host: HeapHost):
    ref = host.scheduler.spawn(Subject(), label="root")
    host.call(ref, Do(lambda subject: subject.spawn(Subject(), label="child") and None))
    host.run_for(3 * NS_PER_S)
    host.cast(ref, Note("waiting"))
    root, child = host.scheduler.tree().splitlines()
    assert root.startswith("root ")
    assert child.startswith("  child ")
    assert "mail 1/1000" in root
    assert "age 3.0 s" in child
    assert "restarts 0" in child


def test_a_reference_is_a_small_value(host: HeapHost):
    ref = host.scheduler.spawn(Subject())
    copy = pickle.loads(pickle.dumps(ref))
    assert copy == ref
    assert {ref: 1}[copy] == 1
    assert host.call(copy, Do(lambda subject: "reached")) == "reached"
    assert ActorRef("other", ref.number) != ref


def test_a_scheduler_does_not_run_within_itself(host: HeapHost):
    ref = host.scheduler.spawn(Subject())
    with pytest.raises(Crashed, match="RuntimeError"):
        host.call(ref, Do(lambda subject: host.scheduler.run()))


def test_an_actor_that_has_ended_leaves_nothing_for_the_garbage_collector(host: HeapHost):
    async def live(subject: Actor) -> None:
        child = subject.spawn(Subject())
        subject.monitor(child)
        subject.link(child)
        subject.send_after(NS_PER_S, Note("never"))
        subject.subscribe("news")
        await subject.sleep(1)
        subject.stop()

    gc.collect()
    gc.disable()
    try:
        for _ in range(100):
            host.cast(host.scheduler.spawn(Subject(), name="subject"), Await(live))
            host.run_for(NS_PER_S)
        assert host.scheduler.statistics().actors == 0
        assert gc.collect() < 100  # one for each of a hundred lives would be that many
    finally:
        gc.enable()
