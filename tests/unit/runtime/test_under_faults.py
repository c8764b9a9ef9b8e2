"""A small office, run in drawn orders while its people crash, effects fail and the clock stalls.

An office is a tree of supervisors over workers that call each other, wait, keep timers, monitor and
are linked. Whatever happens, what the runtime promises holds; the model of it is a list of lives.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import attrs
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from runtime.actor import (
    LATER,
    Actor,
    ActorRef,
    CallCycle,
    Caller,
    Crashed,
    Dead,
    Down,
    NamedRef,
    Overloaded,
    Raise,
    TimedOut,
    handles,
    is_abnormal,
)
from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.randomness import SeededRandomness, choice
from runtime.supervisor import (
    ESCALATED,
    ChildSpec,
    DynamicSupervisor,
    Restart,
    StartChild,
    Strategy,
    Supervisor,
)
from runtime.testing import Faults, InjectedFailure, heap_sleep, seeded_host

PERIOD_NS = NS_PER_S
EVENTS_PER_RUN = 60
CALL_ERRORS = (CallCycle, Crashed, Dead, Overloaded, TimedOut)
NAMES = ("teller", "clerk", "porter")
MOST = Faults(
    shuffles_turns=True,
    crash_before_per_million=30_000,
    crash_after_per_million=30_000,
    crash_waiting_per_million=30_000,
    crash_start_per_million=30_000,
    effect_fail_before_per_million=100_000,
    effect_fail_after_per_million=100_000,
    effect_lost_per_million=50_000,
    effect_delay_per_million=100_000,
    effect_delay_ns=(1, 20 * NS_PER_MS),
    stall_per_million=50_000,
    stall_ns=(1, NS_PER_S),
    wall_jump_per_million=50_000,
)


class Refused(Exception):
    """The answer of somebody who will not."""


@attrs.frozen
class Job:
    number: int
    what: str
    sender: ActorRef | None = None


@attrs.frozen
class Ask(Job):
    pass


@attrs.frozen
class Tick:
    """A timer; for nobody but the one that set it."""

    number: int
    owner: ActorRef


@attrs.define(eq=False)
class Life:
    """One incarnation of somebody. `intensity` is that of a supervisor."""

    who: str
    ref: ActorRef
    parent: ActorRef | None
    restart: Restart
    is_restart: bool
    began_ns: int
    intensity: int = 0
    ended_ns: int | None = None
    reason: str | None = None


class Office:
    """The system, and all that was seen of it."""

    def __init__(self, faults: Faults) -> None:
        self.host = seeded_host(attrs.evolve(faults, crash_spares=(Watcher,)))
        assert self.host.injector is not None
        self.host.heal()  # until it has come up
        self.scheduler = self.host.scheduler
        self.chance = SeededRandomness(faults.seed, "office")
        self.watcher = Watcher()
        self.scheduler.spawn(self.watcher, label="watcher")
        self.wrong: list[str] = []
        self.lives: dict[ActorRef, Life] = {}
        self.came_up: list[ActorRef] = []
        self.links: list[tuple[ActorRef, ActorRef]] = []
        self.handled: Counter[int] = Counter()
        self.order: dict[tuple[ActorRef, ActorRef | None], list[int]] = defaultdict(list)
        self.answers: dict[int, list[tuple[int, Any, Exception | None]]] = {}
        self.deadline_ns: dict[int, int] = {}
        self.caller_by_call: dict[int, ActorRef] = {}  # calls of one in the office to another
        self.calls_over: Counter[int] = Counter()
        self.numbers = 0
        desk = [
            self.spec("teller", Restart.PERMANENT, name="teller"),
            self.spec("clerk", Restart.PERMANENT, name="clerk"),
            self.spec("porter", Restart.TRANSIENT, name="porter"),
        ]
        parts = [
            ChildSpec(id="desk", factory=lambda: Boss(self, "desk", desk, intensity=3)),
            ChildSpec(id="guests", factory=lambda: Guests(self), name="guests"),
        ]
        self.root = self.scheduler.spawn(
            Boss(self, "root", parts, intensity=6, strategy=Strategy.ONE_FOR_ONE)
        )
        self.host.run_for(NS_PER_S)
        self.host.injector.resume()

    def spec(self, who: str, restart: Restart, **options: Any) -> ChildSpec:
        return ChildSpec(
            id=who, factory=lambda: Worker(self, who, restart), restart=restart, **options
        )

    def take_number(self) -> int:
        self.numbers += 1
        return self.numbers

    # --- what those in it tell ---

    def began(self, actor: Worker | Boss | Guests) -> Life:
        context = actor.context
        life = self.lives[context.ref] = Life(
            who=actor.who,
            ref=context.ref,
            parent=context.parent,
            restart=actor.restart,
            is_restart=context.restarts > 0,
            began_ns=context.now(),
            intensity=0 if isinstance(actor, Worker) else actor.intensity,
        )
        return life

    def came(self, actor: Worker | Boss | Guests) -> None:
        self.began(actor)
        self.came_up.append(actor.context.ref)
        self.watcher.monitor(actor.context.ref)

    def ended(self, actor: Worker | Boss | Guests, reason: str) -> None:
        life = self.lives.get(actor.context.ref) or self.began(actor)  # it may not have come up
        if life.ended_ns is not None:
            self.wrong.append(f"{life.who} ended twice")
        life.ended_ns, life.reason = actor.context.now(), reason
        for child in self.lives.values():
            if child.parent == life.ref and child.ended_ns is None:
                self.wrong.append(f"{life.who} ended before its child {child.who}")

    # --- what happens to them ---

    def happen(self) -> None:
        chance = self.chance
        who, what = choice(NAMES, chance), choice(DEEDS, chance)
        match chance.integer(5):
            case 0 | 1:
                self.scheduler.cast(NamedRef(who), Job(self.take_number(), what))
            case 2 | 3:
                self.ask(who, what, choice((1, 20 * NS_PER_MS, NS_PER_S), chance))
            case _:
                guests = self.scheduler.registry.whereis("guests")
                if guests is not None:
                    name, restart = choice("abc", chance), choice(tuple(Restart), chance)
                    self.scheduler.cast(guests, StartChild(self.spec(name, restart), reuse=True))

    def ask(self, who: str, what: str, deadline_ns: int) -> None:
        number = self.take_number()
        answers = self.answers[number] = []
        clock = self.host.clock
        self.deadline_ns[number] = clock.monotonic_ns() + deadline_ns
        self.scheduler.call_soon(
            NamedRef(who),
            Ask(number, what),
            lambda value, error: answers.append((clock.monotonic_ns(), value, error)),
            deadline_ns=deadline_ns,
        )

    # --- what must hold ---

    def check(self) -> None:
        assert self.wrong == []
        assert all(count == 1 for count in self.handled.values()), "something was handled twice"
        for numbers in self.order.values():
            assert numbers == sorted(numbers), "one message of a sender overtook another"
        for number, answers in self.answers.items():
            assert len(answers) <= 1, "a call ended twice"
            for at_ns, value, error in answers:
                right = (value, error) == (number, None)
                assert right or isinstance(error, (*CALL_ERRORS, Refused)), (value, error)
                assert self.stalls or at_ns <= self.deadline_ns[number]
        assert all(count == 1 for count in self.calls_over.values())
        assert all(count == 1 for count in self.watcher.downs.values())
        for one, other in self.links:
            first, second = self.lives[one], self.lives[other]
            if first.ended_ns is not None and first.reason != "normal":
                assert second.ended_ns is not None, "an exit signal was not felt"
                assert second.ended_ns <= first.ended_ns, "an exit signal took time"
        self.check_intensity()

    def check_intensity(self) -> None:
        """Nobody is restarted more often in a period than its supervisor has patience for, and no
        supervisor loses its patience before."""
        restarts: dict[tuple[ActorRef, str], list[int]] = defaultdict(list)
        ends: Counter[ActorRef] = Counter()
        for life in self.lives.values():
            if life.parent is None:
                continue
            if life.is_restart:
                restarts[life.parent, life.who].append(life.began_ns)
            if life.reason is not None and (
                life.restart is Restart.PERMANENT or is_abnormal(life.reason)
            ):
                ends[life.parent] += 1
        for (parent, _), began_ns in restarts.items():
            intensity = self.lives[parent].intensity
            for first_ns, last_ns in zip(began_ns, began_ns[intensity:], strict=False):
                assert last_ns - first_ns >= PERIOD_NS, "too many restarts"
        for life in self.lives.values():
            if life.reason == ESCALATED:
                assert ends[life.ref] > life.intensity, "it gave up too soon"

    @property
    def stalls(self) -> bool:
        counts = self.host.statistics().faults
        return counts is not None and counts.stalls > 0

    def check_that_it_works(self) -> None:
        """With nothing going wrong any more, everybody is there; unless the root gave up, or is it
        that crashed."""
        if not self.scheduler.is_alive(self.root):
            reason = self.lives[self.root].reason
            assert reason == ESCALATED or "Injected" in str(reason), reason
            return
        for who in ("teller", "clerk"):
            number = self.take_number()
            assert self.host.call(NamedRef(who), Ask(number, "nothing")) == number

    def close(self) -> None:
        """End it in good order; then there is nothing left of it."""
        self.scheduler.exit(self.root, "shutdown")
        self.host.run_for(20 * NS_PER_S)
        self.check()
        assert all(len(answers) == 1 for answers in self.answers.values()), "a call did not end"
        assert all(life.ended_ns is not None for life in self.lives.values())
        assert self.watcher.downs == Counter(self.came_up)
        self.scheduler.stop(self.watcher.context.ref)
        self.host.run_until_idle()
        assert self.host.next_event_ns() is None
        left, host = self.scheduler.statistics(), self.host.statistics()
        assert (left.actors, left.queued, left.timers, left.effects_in_flight) == (0, 0, 0, 0)
        assert (host.effects_under_way, host.events) == (0, 0)
        assert left.spawned == left.ended == len(self.lives) + 1
        assert self.scheduler.registry.whereis("teller") is None


class Watcher(Actor):
    """Monitors everybody who came up."""

    mailbox_limit = 1

    def __init__(self) -> None:
        self.downs: Counter[ActorRef] = Counter()

    @handles(Down)
    def down(self, message: Down) -> None:
        self.downs[message.ref] += 1


class Boss(Supervisor):
    restart = Restart.PERMANENT

    def __init__(
        self,
        office: Office,
        who: str,
        children: list[ChildSpec],
        *,
        intensity: int,
        strategy: Strategy = Strategy.REST_FOR_ONE,
    ) -> None:
        super().__init__(children, strategy=strategy, intensity=intensity, period_ns=PERIOD_NS)
        self.office = office
        self.who = who

    async def started(self) -> None:
        self.office.came(self)
        await super().started()

    def terminated(self, reason: str) -> None:
        self.office.ended(self, reason)


class Guests(DynamicSupervisor):
    who = "guests"
    restart = Restart.PERMANENT

    def __init__(self, office: Office) -> None:
        super().__init__(limit=3, intensity=3, period_ns=PERIOD_NS)
        self.office = office

    async def started(self) -> None:
        self.office.came(self)
        await super().started()

    def terminated(self, reason: str) -> None:
        self.office.ended(self, reason)


DEEDS = (
    "nothing", "pass on", "tick", "tick", "fail", "leave", "be odd", "send away", "effect",
    "effect", "ask on", "ask on", "later", "refuse", "sleep",
)  # fmt: skip


class Worker(Actor):
    """Does what it is told, and tells the office."""

    mailbox_limit = 4

    def __init__(self, office: Office, who: str, restart: Restart) -> None:
        self.office = office
        self.who = who
        self.restart = restart
        self.kept: list[tuple[Caller, int]] = []

    async def started(self) -> None:
        self.office.came(self)
        if self.who == "porter":
            await self.perform(heap_sleep, NS_PER_MS, deadline_ns=50 * NS_PER_MS)
        if self.who in "abc":
            self.tie_to_another()

    def tie_to_another(self) -> None:
        for life in self.office.lives.values():
            if life.who in "abc" and life.who != self.who and life.ended_ns is None:
                self.link(life.ref)
                me = self.context.ref
                self.office.links += [(me, life.ref), (life.ref, me)]

    def terminated(self, reason: str) -> None:
        self.office.ended(self, reason)

    def take(self, job: Job) -> None:
        self.office.handled[job.number] += 1
        self.office.order[self.context.ref, job.sender].append(job.number)

    @handles(Job)
    def on_job(self, job: Job) -> object:
        self.take(job)
        return self.act(job)

    @handles(Ask)
    async def on_ask(self, job: Ask) -> object:
        self.take(job)
        match job.what:
            case "effect":
                try:
                    await self.perform(heap_sleep, 2 * NS_PER_MS, deadline_ns=50 * NS_PER_MS)
                except (InjectedFailure, TimedOut):
                    return Raise(Refused())
            case "sleep":
                await self.sleep(3 * NS_PER_MS)
            case "ask on":
                await self.ask_on()
        return self.act(job)

    async def ask_on(self) -> None:
        office = self.office
        number = office.take_number()
        office.caller_by_call[number] = self.context.ref
        kind = choice((Job, Ask), office.chance)
        what = choice(("nothing", "effect", "fail", "later", "refuse"), office.chance)
        try:
            to = NamedRef(choice(NAMES, office.chance))
            await self.call(to, kind(number, what, self.context.ref), 100 * NS_PER_MS)
        except (*CALL_ERRORS, Refused):
            pass
        office.calls_over[number] += 1

    def act(self, job: Job) -> object:
        office, me = self.office, self.context.ref
        match job.what:
            case "pass on":
                for _ in range(3):
                    number = office.take_number()
                    self.cast(NamedRef(choice(NAMES, office.chance)), Job(number, "nothing", me))
            case "tick":
                self.tick()
            case "fail":
                raise ValueError
            case "leave":
                self.stop()
            case "be odd":
                self.stop("odd")
            case "send away":
                for life in list(office.lives.values()):
                    if life.who == "a" and life.ended_ns is None:
                        self.exit(life.ref, choice(("normal", "odd", "kill"), office.chance))
            case "refuse":
                return Raise(Refused())
            case "later" if self.context.caller is not None:
                self.kept.append((self.context.caller, job.number))
                self.tick()
                return LATER
        return job.number

    def tick(self) -> None:
        number = self.office.take_number()
        self.send_after(self.office.chance.integer(NS_PER_S), Tick(number, self.context.ref))

    @handles(Tick)
    def on_tick(self, message: Tick) -> None:
        self.office.handled[message.number] += 1
        if message.owner != self.context.ref:
            self.office.wrong.append("a timer came to another one")
        for caller, number in self.kept:
            self.reply(caller, number)
        self.kept.clear()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_whatever_goes_wrong_what_the_runtime_promises_holds(seed: int) -> None:
    faults = MOST.swarm(seed)
    note(repr(faults))
    office = Office(faults)
    for _ in range(EVENTS_PER_RUN):
        for _ in range(office.chance.integer(4)):
            office.happen()
        office.host.run_for(choice((0, 1, NS_PER_MS, 30 * NS_PER_MS, NS_PER_S), office.chance))
        office.check()
    office.host.heal()
    office.host.run_for(10 * NS_PER_S)
    note(repr(office.host.statistics()))
    for number, caller in office.caller_by_call.items():
        assert number in office.calls_over or office.lives[caller].ended_ns is not None
    office.check_that_it_works()
    office.close()
