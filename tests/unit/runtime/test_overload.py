"""Full mailboxes, idle actors, and a fair share for everybody."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.actor import Actor, Exit, IdleTimeout, Overload, Overloaded, handles
from runtime.clock import NS_PER_S, VirtualClock
from runtime.randomness import SeededRandomness
from runtime.scheduler import MESSAGES_PER_TURN, Scheduler
from runtime.testing import HeapHost

LIMIT = 3


@attrs.frozen
class Reading:
    sensor: int
    value: int


@attrs.frozen
class Remark:
    value: int


class Listener(Actor):
    mailbox_limit = LIMIT
    traps_exits = True

    def __init__(self) -> None:
        self.heard: list[Any] = []

    @handles(Reading, Remark, Exit)
    def hear(self, message: Any) -> int:
        self.heard.append(message)
        return len(self.heard)


class DroppingListener(Listener):
    overload = Overload.DROP_OLDEST


class CoalescingListener(Listener):
    overload = Overload.COALESCE
    coalesces: ClassVar = {Reading: "sensor"}


def new_host() -> HeapHost:
    clock = VirtualClock()
    return HeapHost(Scheduler(clock=clock, randomness=SeededRandomness(1, "actors")), clock)


@pytest.fixture
def host() -> HeapHost:
    return new_host()


class ModelMailbox:
    """What is to happen, on a list."""

    def __init__(self, overload: Overload) -> None:
        self.overload = overload
        self.items: list[Any] = []
        self.refused = self.dropped = self.coalesced = 0

    def put(self, message: Any) -> bool:
        if isinstance(message, Exit):
            self.items.append(message)
            return True
        if self.overload is Overload.COALESCE and isinstance(message, Reading):
            for place, item in enumerate(self.items):
                if isinstance(item, Reading) and item.sensor == message.sensor:
                    self.items[place] = message
                    self.coalesced += 1
                    return True
        if len(self.items) >= LIMIT:
            droppable = [item for item in self.items if not isinstance(item, Exit)]
            if self.overload is not Overload.DROP_OLDEST or not droppable:
                self.refused += 1
                return False
            self.items.pop(next(i for i, x in enumerate(self.items) if x is droppable[0]))
            self.dropped += 1
        self.items.append(message)
        return True


messages = st.one_of(
    st.builds(Reading, st.integers(0, 2), st.integers(0, 99)),
    st.builds(Remark, st.integers(0, 99)),
    st.builds(Exit, st.none(), st.just("odd")),
)


@given(
    listener=st.sampled_from([Listener, DroppingListener, CoalescingListener]),
    bursts=st.lists(st.lists(messages, max_size=12), max_size=4),
)
def test_every_policy_does_what_the_model_does(listener: type[Listener], bursts: list[list[Any]]):
    host = new_host()
    actor = listener()
    ref = host.scheduler.spawn(actor)
    model = ModelMailbox(listener.overload)
    expected: list[Any] = []
    for burst in bursts:
        for message in burst:
            if isinstance(message, Exit):
                model.put(message)
                host.scheduler.exit(ref, message.reason)
            else:
                assert host.cast(ref, message) == model.put(message)
            seen = host.scheduler.statistics_of(ref)
            assert seen is not None
            assert seen.mailbox_depth == len(model.items)
        host.run_until_idle()
        expected += model.items
        model.items = []
        assert actor.heard == expected
    counted = (model.refused, model.dropped, model.coalesced)
    statistics = host.scheduler.statistics()
    assert (statistics.refused, statistics.dropped, statistics.coalesced) == counted


def test_a_call_that_gives_way_to_a_newer_message_is_told_so(host: HeapHost):
    ref = host.scheduler.spawn(DroppingListener())
    answers: list[tuple[Any, Exception | None]] = []

    def call(number: int) -> None:
        host.scheduler.call_soon(
            ref, Remark(number), lambda value, error: answers.append((value, error))
        )

    for number in range(LIMIT + 1):
        call(number)
    assert [type(error) for _, error in answers] == [Overloaded]
    host.run_until_idle()
    assert [value for value, _ in answers[1:]] == [1, 2, 3]


def test_what_coalesces_is_said_by_the_class_or_not_at_all():
    with pytest.raises(TypeError, match="coalesces"):

        class Wrong(Actor):
            overload = Overload.COALESCE


# --- idle --------------------------------------------------------------------------------------


class Dozing(Actor):
    idle_timeout_ns = 5 * NS_PER_S

    def __init__(self) -> None:
        self.timeouts: list[int] = []

    @handles(Remark)
    async def hear(self, message: Remark) -> None:
        await self.sleep(message.value)

    @handles(Reading)
    def read(self, message: Reading) -> int:
        return message.value

    @handles(IdleTimeout)
    def idle(self, message: IdleTimeout) -> None:
        self.timeouts.append(self.context.now() // NS_PER_S)


def test_the_idle_timeout_counts_from_the_last_message_and_not_while_a_handler_waits(
    host: HeapHost,
):
    actor = Dozing()
    ref = host.scheduler.spawn(actor)
    host.run_for(4 * NS_PER_S)
    host.cast(ref, Remark(10 * NS_PER_S))
    host.run_for(14 * NS_PER_S)
    assert actor.timeouts == []
    host.run_for(1 * NS_PER_S)
    assert actor.timeouts == [19]
    host.run_for(5 * NS_PER_S)
    assert actor.timeouts == [19, 24]


def test_a_call_on_the_spot_is_activity_too(host: HeapHost):
    actor = Dozing()
    ref = host.scheduler.spawn(actor)

    class Asker(Actor):
        @handles(Remark)
        async def ask(self, message: Remark) -> int:
            answer: int = await self.call(ref, Reading(0, message.value))
            return answer

    asker = host.scheduler.spawn(Asker())
    host.run_for(4 * NS_PER_S)
    assert host.call(asker, Remark(7)) == 7
    assert host.scheduler.statistics().calls_in_caller == 1
    host.run_for(4 * NS_PER_S)
    assert actor.timeouts == []
    host.run_for(1 * NS_PER_S)
    assert actor.timeouts == [9]


def test_an_idle_actor_without_a_handler_ends_and_the_timeout_can_be_set_and_taken_off(
    host: HeapHost,
):
    class Brief(Actor):
        @handles(Remark)
        def hear(self, message: Remark) -> None:
            self.set_idle_timeout(message.value or None)

    ref = host.scheduler.spawn(Brief())
    reasons: list[str] = []
    host.scheduler.watch(ref, reasons.append)
    host.cast(ref, Remark(5))
    host.run_for(4)
    host.cast(ref, Remark(0))
    host.run_for(100)
    assert host.scheduler.is_alive(ref)
    host.cast(ref, Remark(5))
    host.run_for(5)
    assert reasons == ["normal"]
    assert host.scheduler.next_deadline() is None


# --- a fair share ------------------------------------------------------------------------------


class Greedy(Actor):
    """Always has a full mailbox: for every message that it handles it sends itself another."""

    @handles(Remark)
    def hear(self, message: Remark) -> None:
        self.cast(self.context.ref, message)


@given(greedy=st.integers(1, 5), budget=st.integers(1, 500))
def test_actors_with_full_mailboxes_delay_each_other_by_a_turn_and_no_more(
    greedy: int, budget: int
):
    others = 100
    host = new_host()
    hogs = [host.scheduler.spawn(Greedy()) for _ in range(greedy)]
    for ref in hogs:
        while host.cast(ref, Remark(0)):
            pass
    listeners = [Listener() for _ in range(others)]
    for listener in listeners:
        host.cast(host.scheduler.spawn(listener), Remark(0))
    handled = 0
    while not all(listener.heard for listener in listeners):
        handled += host.scheduler.run(budget)
    most = others + greedy * MESSAGES_PER_TURN  # one round of the run queue
    assert handled <= most + budget + MESSAGES_PER_TURN  # a turn is always ended


def test_one_with_a_full_mailbox_does_not_starve_ten_thousand_others(host: HeapHost):
    hog = host.scheduler.spawn(Greedy())
    while host.cast(hog, Remark(0)):
        pass
    others = [Listener() for _ in range(10_000)]
    refs = [host.scheduler.spawn(other) for other in others]
    for round_ in range(1, 6):
        for ref in refs:
            host.cast(ref, Remark(round_))
        handled = 0
        while handled < len(others) + MESSAGES_PER_TURN:
            handled += host.scheduler.run(1)
        assert {len(other.heard) for other in others} == {round_}
        seen = host.scheduler.statistics_of(hog)
        assert seen is not None
        assert seen.handled == round_ * MESSAGES_PER_TURN
