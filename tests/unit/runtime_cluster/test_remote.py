"""Actors of other nodes are used as those of this one: over real frames, in virtual time."""

from typing import Any

import attrs
import pytest
from msgspec import Raw

from runtime.actor import (
    LATER,
    Actor,
    ActorRef,
    CallError,
    Crashed,
    Dead,
    Down,
    Exit,
    NamedRef,
    NodeLost,
    NoHandler,
    Overloaded,
    Raise,
    Refused,
    TimedOut,
    Unreachable,
    handles,
)
from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.cluster.envelopes import Answer, Enclosed, make_codec
from runtime.cluster.frames import MAX_FRAME_BYTES, LinkProtocolError
from runtime.cluster.remote import NODE
from runtime.cluster.testing import HeapCluster
from runtime.randomness import SeededRandomness
from runtime.secret import Secret


@attrs.frozen
class Add:
    amount: int


@attrs.frozen
class Total:
    value: int


@attrs.frozen
class Fail:
    pass


@attrs.frozen
class Keep:
    pass


@attrs.frozen
class Ask:
    """To a Relay: call `ref` with the message enclosed, and answer what came of it."""

    ref: ActorRef
    message: Enclosed
    deadline_ns: int = 5 * NS_PER_S


@attrs.frozen
class Tie:
    ref: ActorRef
    how: str


@attrs.frozen
class News:
    text: str


@attrs.frozen
class Sealed:
    secret: Secret


@attrs.frozen
class Print:
    """Answered by so many characters."""

    characters: int


@attrs.frozen
class Unregistered:
    pass


CODEC = make_codec(
    {
        64: Add, 65: Total, 66: Fail, 67: Keep, 68: Ask, 69: Tie, 70: News, 71: Sealed,
        72: Print,
    }
)  # fmt: skip


class Counter(Actor):
    mailbox_limit = 100

    def __init__(self) -> None:
        self.total = 0
        self.callers: list[Any] = []
        self.seen: list[Any] = []

    @handles(Add)
    def add(self, message: Add) -> Total | Raise:
        if message.amount < 0:
            return Raise(ValueError("less than nothing"))
        if self.context.caller is not None:
            self.callers.append(self.context.caller.ref)
        self.total += message.amount
        self.seen.append(message.amount)
        return Total(self.total)

    @handles(Fail)
    def fail(self, message: Fail) -> None:
        raise KeyError("secret content")

    @handles(Keep)
    def keep(self, message: Keep) -> object:
        return LATER

    @handles(Sealed)
    def sealed(self, message: Sealed) -> str:
        return message.secret.reveal_text()

    @handles(Print)
    def print(self, message: Print) -> str:
        return "x" * message.characters


class Relay(Actor):
    def __init__(self) -> None:
        self.downs: list[Down] = []
        self.news: list[str] = []

    def started(self) -> None:
        self.subscribe("news")

    @handles(Ask)
    async def ask(self, message: Ask) -> object:
        try:
            return await self.call(message.ref, message.message.message, message.deadline_ns)
        except CallError as error:
            return type(error).__name__

    @handles(Tie)
    def tie(self, message: Tie) -> None:
        if message.how == "monitor":
            self.monitor(message.ref)
        elif message.how == "link":
            self.link(message.ref)
        elif message.how == "unlink":
            self.unlink(message.ref)
        else:
            self.exit(message.ref, message.how)

    @handles(Down)
    def down(self, message: Down) -> None:
        self.downs.append(message)

    @handles(News)
    def hear(self, message: News) -> None:
        self.news.append(message.text)


class Trapper(Relay):
    traps_exits = True

    def __init__(self) -> None:
        super().__init__()
        self.exits: list[Exit] = []

    @handles(Exit)
    def exited(self, message: Exit) -> None:
        self.exits.append(message)


class Two:
    """Two nodes, with an actor on each."""

    def __init__(self, seed: int = 1) -> None:
        self.cluster = HeapCluster(CODEC, SeededRandomness(seed, "cluster"))
        self.a = self.cluster.add("a")
        self.b = self.cluster.add("b")
        self.counter = Counter()
        self.there = self.b.scheduler.spawn(self.counter, name="counter")
        self.relay = Trapper()
        self.here = self.a.scheduler.spawn(self.relay)
        self.cluster.run_for(NS_PER_MS)

    def ask(self, message: object, deadline_ns: int = 5 * NS_PER_S) -> Any:
        return self.cluster.call("a", self.here, Ask(self.there, Enclosed(message), deadline_ns))

    def tie(self, how: str) -> None:
        self.a.scheduler.cast(self.here, Tie(self.there, how))
        self.cluster.run_for(10 * NS_PER_MS)


@pytest.fixture
def two() -> Two:
    return Two()


def refs_of(two: Two) -> list[ActorRef | NamedRef]:
    return [ActorRef("b", two.there.number), NamedRef("counter", "b")]


def test_casts_arrive_in_order(two: Two) -> None:
    for amount in range(50):
        assert two.a.scheduler.cast(refs_of(two)[amount % 2], Add(amount))
    two.cluster.run_for(10 * NS_PER_MS)
    assert two.counter.seen == list(range(50))


def test_a_call_is_answered_and_the_callee_knows_who_called(two: Two) -> None:
    assert two.ask(Add(3)) == Total(3)
    assert two.counter.callers == [two.here]
    for ref in refs_of(two):
        assert isinstance(two.cluster.call("a", ref, Add(1)), Total)
    assert two.counter.callers == [two.here, None, None]


def test_a_secret_travels_and_is_one_again(two: Two) -> None:
    assert two.ask(Sealed(Secret(b"word"))) == "word"


@pytest.mark.parametrize(
    ("message", "error"),
    [(Fail(), "Crashed"), (Add(-1), "Refused"), (Total(1), "NoHandler"), (Keep(), "TimedOut")],
)
def test_an_actor_gets_each_failure_as_its_own_error(two: Two, message: object, error: str) -> None:
    assert two.ask(message, NS_PER_S) == error


def test_a_message_travels_within_another_and_keeps_its_class(two: Two) -> None:
    there = two.b.scheduler.spawn(Relay())
    ask = Ask(two.there, Enclosed(Add(2)))
    assert two.cluster.call("a", ActorRef("b", there.number), ask) == Total(2)


def test_errors_reach_whoever_calls_from_outside(two: Two) -> None:
    there = refs_of(two)[0]
    with pytest.raises(Refused, match="ValueError: less than nothing"):
        two.cluster.call("a", there, Add(-1))
    with pytest.raises(NoHandler, match="Total"):
        two.cluster.call("a", there, Total(1))
    with pytest.raises(TimedOut):
        two.cluster.call("a", there, Keep(), NS_PER_S)
    with pytest.raises(Crashed, match="KeyError") as crashed:
        two.cluster.call("a", there, Fail())
    assert "secret content" not in str(crashed.value)
    with pytest.raises(Dead):
        two.cluster.call("a", there, Add(1))
    with pytest.raises(Unreachable):
        two.cluster.call("a", ActorRef("nowhere", 1), Add(1))


def test_a_full_mailbox_refuses_a_call_over_the_link(two: Two) -> None:
    two.cluster.stop("b")
    for _ in range(100):
        two.a.scheduler.cast(two.there, Add(1))
    errors: list[Exception | None] = []
    two.cluster.run_for(NS_PER_S)
    two.a.scheduler.call_soon(
        ActorRef("b", two.there.number), Add(1), lambda value, error: errors.append(error)
    )
    two.cluster.run_for(NS_PER_S)
    two.cluster.resume("b")
    two.cluster.run_for(NS_PER_S)
    assert [type(error) for error in errors] == [Overloaded]
    assert two.counter.total == 100


def test_what_is_not_registered_does_not_travel(two: Two) -> None:
    with pytest.raises(TypeError, match="Unregistered"):
        two.a.scheduler.cast(ActorRef("b", two.there.number), Unregistered())


def test_a_late_answer_is_dropped_and_counted(two: Two) -> None:
    two.cluster.stop("b")
    with pytest.raises(TimedOut):
        two.cluster.call("a", ActorRef("b", two.there.number), Add(1), NS_PER_S)
    two.cluster.resume("b")
    two.cluster.run_for(NS_PER_S)
    assert two.a.scheduler.statistics().late_replies == 1
    assert two.a.remote.statistics().calls == 0


def test_a_lost_node_ends_calls_watches_and_links(two: Two) -> None:
    two.tie("monitor")
    two.tie("link")
    errors: list[Exception | None] = []
    two.a.scheduler.call_soon(
        ActorRef("b", two.there.number), Keep(), lambda value, error: errors.append(error)
    )
    two.cluster.run_for(NS_PER_S)
    two.cluster.kill("b")
    two.cluster.run_for(NS_PER_S)
    assert [type(error) for error in errors] == [NodeLost]
    assert two.relay.downs == [Down(two.there, "noconnection")]
    assert two.relay.exits == [Exit(two.there, "noconnection")]
    assert two.a.remote.statistics().watches == 0


@pytest.mark.parametrize("reason", ["normal", "gone wrong"])
def test_an_end_reaches_watcher_and_linked_actor(two: Two, reason: str) -> None:
    two.tie("monitor")
    two.tie("link")
    two.b.scheduler.stop(two.there, reason)
    two.cluster.run_for(NS_PER_S)
    assert two.relay.downs == [Down(two.there, reason)]
    assert two.relay.exits == [Exit(two.there, reason)]
    two.tie("monitor")
    two.tie("link")
    assert two.relay.downs[1:] == [Down(two.there, "dead")]
    assert two.relay.exits[1:] == [Exit(two.there, "dead")]


def test_the_other_end_of_a_link_is_ended_too(two: Two) -> None:
    two.tie("link")
    two.a.scheduler.stop(two.here, "gone wrong")
    two.cluster.run_for(NS_PER_S)
    assert not two.b.scheduler.is_alive(two.there)


def test_an_unlinked_actor_lives_on(two: Two) -> None:
    two.tie("link")
    two.tie("unlink")
    two.a.scheduler.stop(two.here, "gone wrong")
    two.cluster.run_for(NS_PER_S)
    assert two.b.scheduler.is_alive(two.there)


def test_an_exit_signal_reaches_another_node(two: Two) -> None:
    two.tie("kill")
    assert not two.b.scheduler.is_alive(two.there)


def test_a_watch_that_is_taken_off_costs_the_other_node_nothing(two: Two) -> None:
    watch = two.a.scheduler.watch(ActorRef("b", two.there.number), lambda reason: None)
    two.cluster.run_for(NS_PER_S)
    assert two.b.remote.statistics().watched == 1
    two.a.scheduler.unwatch(watch)
    two.cluster.run_for(NS_PER_S)
    assert two.b.remote.statistics().watched == 0


def test_a_watcher_that_ends_takes_its_watches_along(two: Two) -> None:
    two.tie("monitor")
    assert two.b.remote.statistics().watched == 1
    two.a.scheduler.stop(two.here)
    two.cluster.run_for(NS_PER_S)
    assert two.b.remote.statistics().watched == 0


def test_a_broadcast_is_published_on_every_node(two: Two) -> None:
    third = two.cluster.add("c")
    listeners = [Relay() for _ in range(2)]
    two.b.scheduler.spawn(listeners[0])
    third.scheduler.spawn(listeners[1])
    two.cluster.run_for(NS_PER_S)
    assert two.a.scheduler.broadcast("news", News("hello")) == 1
    two.cluster.run_for(NS_PER_S)
    assert [each.news for each in (two.relay, *listeners)] == [["hello"]] * 3


def test_a_partition_loses_the_link_and_healing_brings_it_back(two: Two) -> None:
    two.tie("monitor")
    two.cluster.partition("a", "b")
    two.cluster.run_for(4 * NS_PER_S)
    assert two.relay.downs == [Down(two.there, "noconnection")]
    with pytest.raises(Unreachable):
        two.cluster.call("a", ActorRef("b", two.there.number), Add(1))
    two.cluster.heal("a", "b")
    assert two.ask(Add(1)) == Total(1)


def test_a_reference_of_an_earlier_life_means_nobody(two: Two) -> None:
    before = ActorRef("b", two.there.number)
    two.cluster.kill("b")
    again = two.cluster.add("b")
    fresh = again.scheduler.spawn(Counter())
    two.cluster.run_for(NS_PER_S)
    assert fresh.number != before.number
    with pytest.raises(Dead):
        two.cluster.call("a", before, Add(1))


@pytest.mark.parametrize("message", [Add(1), Total(1)])
def test_a_message_for_an_actor_is_refused_by_a_node(two: Two, message: object) -> None:
    with pytest.raises(LinkProtocolError):
        two.b.remote.receive("a", [(NODE, message)])


def test_a_stranger_cannot_answer_for_another_node(two: Two) -> None:
    two.cluster.add("c")
    answers: list[object] = []
    two.a.scheduler.call_soon(
        ActorRef("b", two.there.number), Keep(), lambda value, error: answers.append(value)
    )
    kind, body = CODEC.pack(Total(666))
    for id in range(50):
        two.a.remote.receive("c", [(NODE, Answer(id, kind, Raw(body)))])
    two.cluster.run_for(NS_PER_S)
    assert answers == []


class Sleeper(Actor):
    """Answers after a second."""

    @handles(Add)
    async def add(self, message: Add) -> Total:
        await self.sleep(NS_PER_S)
        return Total(message.amount)


def test_an_answer_to_an_earlier_life_of_the_caller_is_no_answer_to_the_next(two: Two) -> None:
    """Both lives number their calls from one on."""
    slow, kept = two.b.scheduler.spawn(Sleeper()), two.there
    two.a.scheduler.call_soon(ActorRef("b", slow.number), Add(666), lambda value, error: None)
    two.cluster.run_for(NS_PER_S // 10)
    two.cluster.kill("a")
    again = two.cluster.add("a")
    answers: list[object] = []
    again.scheduler.call_soon(
        ActorRef("b", kept.number), Keep(), lambda value, error: answers.append(value)
    )
    two.cluster.run_for(2 * NS_PER_S)
    assert answers == []
    assert two.b.remote.statistics().answers_lost == 1


def test_who_says_what_no_node_may_is_cut_off_and_dials_anew(two: Two) -> None:
    two.a.remote.tell("b", Add(1))
    two.cluster.run_for(10 * NS_PER_MS)
    assert not two.cluster.is_linked("a", "b")
    assert len(two.cluster.protocol_errors) == 1
    two.cluster.run_for(NS_PER_S)
    assert two.ask(Add(1)) == Total(1)


def test_the_same_seed_gives_the_same_run() -> None:
    def run(seed: int) -> list[int]:
        two = Two(seed)
        for amount in range(20):
            two.a.scheduler.cast(two.there, Add(amount))
        times = []
        while len(two.counter.seen) < 20:
            two.cluster.run_for(NS_PER_MS // 100)
            times.append(len(two.counter.seen))
        return times

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_an_answer_that_is_too_long_for_a_frame_is_refused_and_the_node_goes_on() -> None:
    two = Two()
    with pytest.raises(Refused, match="cannot travel"):
        two.cluster.call("a", two.there, Print(MAX_FRAME_BYTES))
    assert two.cluster.call("a", two.there, Print(10)) == "x" * 10


def test_a_message_that_is_too_long_for_a_frame_is_not_sent_and_counted() -> None:
    two = Two()
    before = two.a.remote.statistics().unsent
    assert not two.a.scheduler.cast(two.there, News("x" * MAX_FRAME_BYTES))
    assert two.a.remote.statistics().unsent == before + 1
    assert two.cluster.call("a", two.there, Add(1)) == Total(1)
